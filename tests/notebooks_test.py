"""Every notebook runs within a minute, and its stored outputs are complete and clean."""

import json
import os
import re
import resource
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
BUDGET = 180  # seconds of processor time: a minute on two cores, half as much again on shared ones
HUNG = 600  # seconds for one cell
LARGEST = 1_500_000  # bytes
OUTSIDE = re.compile(r"(?<![\w.~])/(home|root|work|opt|tmp|usr|var|mnt|Users|private)/|\b[A-Z]:\\")
EXPORTED = ("text/plain", "text/html", "text/markdown")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each
def test_runs_within_a_minute(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=HUNG,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    before = processor_seconds()
    client.execute(env={**os.environ, "PATH": scripts, "TMPDIR": str(tmp_path)})
    took = processor_seconds() - before
    check_outputs(notebook)
    assert took < BUDGET, f"{path.name} took {took:.0f} s of processor time"


@each
def test_stored_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    cells = check_outputs(notebook)
    assert any(cell.outputs for cell in cells)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "run it from the top: kernel restart, run all"
    )


@each
def test_is_kept_small_and_plain(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    nbformat.validate(nbformat.from_dict(notebook))
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(text) < LARGEST
    assert notebook["metadata"] == KERNEL
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert not OUTSIDE.search("".join(cell["source"])), cell["id"]


def check_outputs(notebook):
    """Returns the code cells, whose outputs hold no error, no warning and no path of a machine."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", f"{cell.id}: {output}"
            assert output.get("name") != "stderr", f"{cell.id}: {output.text}"
            texts = [output.get("text", "")]
            texts += [output.get("data", {}).get(kind, "") for kind in EXPORTED]
            for text in texts:
                assert not OUTSIDE.search(text), f"{cell.id}: {text}"
    return cells


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
