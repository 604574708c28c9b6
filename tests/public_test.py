"""What `import quantjax as qj` offers."""

import importlib.metadata
import re
from importlib import resources

import quantjax as qj


def test_every_public_name_is_there_and_documented():
    for name in qj.__all__:
        assert getattr(qj, name).__doc__, name
    assert len(set(qj.__all__)) == len(qj.__all__)


def test_version_types_and_completion():
    assert qj.__version__ == importlib.metadata.version("quantjax")
    assert resources.files("quantjax").joinpath("py.typed").is_file()
    assert {"linen", "nnx", "uniform", "__version__"} <= set(dir(qj))
    assert set(qj.__all__) <= set(dir(qj))


def test_messages_and_docstrings_point_to_names_that_exist():
    for name in qj.__all__:
        for other in re.findall(r"`qj\.([\w.]+)", getattr(qj, name).__doc__ or ""):
            found = qj
            for part in other.split("."):
                found = getattr(found, part)
