"""What reaches `quantjax compare` from outside: plans, input bits, folders of other reports."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import quantjax as qj
from quantjax.encoded import storage
from quantjax.lab import artifacts, compare, data, methods, models
from quantjax.lab.cli import main
from quantjax.lab.compare import Settings
from quantjax.lab.report import headline
from quantjax.lab.train import engine

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_method.md").read_text()
TINY = {"epochs": 1, "limit": 320, "quick": True}


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory, which modules are imported from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_plan_of_the_page_is_a_row(here):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (last,) = (i for i, block in enumerate(blocks) if "def my_ternary" in block)
    code = "\n".join(block for block in blocks[: last + 1] if "check_laws" not in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 35
    (here / "my_methods.py").write_text(code)
    (words,) = re.findall(r"^quantjax (compare .*my_methods:.*)$", PAGE, re.MULTILINE)
    words = words.replace("lsq ", "sgd-least-error ")  # compiles nothing
    assert main([*words.split(), "--quick", "--epochs", "1", "--limit", "320"]) == 0
    _, rounded, mine = rows_of(here / "quantjax-report")
    assert (mine["method"], mine["title"]) == ("my_methods:my_ternary", "my_ternary")
    assert (mine["bits"], mine["start"]) == (2, "trained")
    assert mine["nbytes"] < 1.1 * rounded["nbytes"]
    loaded = qj.load(here / "quantjax-report/networks/my_methods-my_ternary-2bits.safetensors")
    assert {leaf.levels for leaf in _grids(loaded["params"])} == {3}


def _grids(tree):
    return [layer["kernel"] for layer in tree.values()]


BROKEN = """
from quantjax.lab import methods, plans
number = 3
def nothing(bits, total):
    return None
entry = methods.Entry("an entry", lambda bits, total: plans.rounded(bits, total), "none")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_one:plan", r"'absent_one:plan': cannot import 'absent_one': ModuleNotFoundError"),
        ("broken_one:plan", r"cannot import 'broken_one': ZeroDivisionError"),
        ("of_mine:absent", r"of_mine.py has no 'absent'"),
        ("of_mine:number", r"'of_mine:number' is 3, expected a function"),
        ("of_mine:nothing", r"of_mine:nothing returned None for 2 bits, expected a .*Plan"),
    ],
)
def test_what_is_no_plan_is_named_before_anything_is_trained(here, name, message):
    (here / "of_mine.py").write_text(BROKEN)
    (here / "broken_one.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match=message):
        compare.resolve(Settings(methods=(name,), out=here / "report"))
    assert not (here / "report").exists()


def test_an_entry_says_more(here):
    (here / "of_mine_too.py").write_text(BROKEN)
    entry = methods.find("of_mine_too:entry")
    assert (entry.title, entry.start) == ("an entry", "none")


def test_inputs_are_quantized_in_training_or_calibrated_afterwards(tmp_path, capsys):
    names = ("sgd-least-error", "lsq", "uniform")
    settings = Settings(methods=names, inputs=4, out=tmp_path, **TINY)
    full, *found = compare.compare(settings)
    assert full.inputs is None
    assert [row.inputs for row in found] == [4, 4, 4]
    assert "inputs" in capsys.readouterr().out
    collections = {"sgd-least-error": {"quant_stats"}, "uniform": {"quant_stats"}}
    for row in found:
        path = tmp_path / "networks" / f"{row.method}-2bits.safetensors"
        told = storage.inspect(path).metadata["inputs"]
        assert told == repr(methods.find(row.method).inputs(4))
        tree = qj.load(path)
        more = {"quant", "quant_stats"} & set(tree)
        assert more == collections.get(row.method, {"quant", "quant_stats"})
        # What ships is what was judged: the file alone gives the same accuracy on all test images.
        digits = data.limited(data.load("digits"), settings.limit)
        apply = qj.linen.quantize_inputs(
            models.build("small-cnn", 10).apply, methods.find(row.method).inputs(4)
        )
        images = data.normalize(digits.test.images, digits.mean, digits.std)
        predicted = np.argmax(apply(qj.decode(tree), images), axis=1)
        assert row.quantized == pytest.approx(100 * np.mean(predicted == digits.test.labels))
    score = artifacts.evaluate(tmp_path / "networks" / "lsq-2bits.safetensors")
    assert abs(score.accuracy - found[1].quantized) < 6  # of all test images, not of 320


def test_the_report_of_another_comparison_is_not_written_over(tmp_path):
    settings = Settings(methods=("sgd",), out=tmp_path, **TINY)
    compare.compare(settings)
    before = (tmp_path / "results.csv").read_text()
    other = Settings(methods=("sgd",), bits=(4,), seeds=(1,), out=tmp_path, **TINY)
    with pytest.raises(ValueError, match="holds the report of another comparison") as error:
        compare.compare(other)
    assert "bits None, here [4]" in str(error.value)
    assert "seeds [0], here [1]" in str(error.value)
    assert "epochs" not in str(error.value)
    assert (tmp_path / "results.csv").read_text() == before
    compare.resolve(settings)  # the same one may be made again
    compare.resolve(Settings(methods=("sgd",), bits=(4,), overwrite=True, out=tmp_path, **TINY))
    (tmp_path / "results.json").write_text("{")
    compare.resolve(other)


def test_seeds_are_trainings_of_their_own_and_share_a_program(tmp_path, monkeypatch):
    made, make_steps = [], engine.make_steps
    monkeypatch.setattr(
        engine, "make_steps", lambda *args: made.append(make_steps(*args)) or made[-1]
    )
    settings = Settings(methods=("lsq",), bits=(3, 2), seeds=(0, 3), out=tmp_path / "both", **TINY)
    both = compare.compare(settings)
    assert [[run.seed for run in row.runs] for row in both] == [[0, 3]] * 3
    assert len(made) == 2  # full precision, LSQ
    assert [steps.one._cache_size() for steps in made] == [1, 1]
    for row in both:
        first, second = row.runs
        assert first.curve != second.curve
        assert row.quantized == (first.quantized + second.quantized) / 2
    alone = compare.compare(
        Settings(methods=("lsq",), bits=(3, 2), seeds=(3,), out=tmp_path / "alone", **TINY)
    )
    for row, single in zip(both, alone, strict=True):
        assert row.runs[1].quantized == single.quantized
        assert row.runs[1].curve == single.curve


def test_the_record_in_the_repository_is_of_todays_default():
    record = headline.load(ROOT / "experiments" / "results")
    settings = record["settings"]
    usual = compare.resolve(Settings(out=ROOT / "experiments" / "results" / "compare"))
    assert record["complete"]
    assert tuple(settings["methods"]) == usual.methods == methods.DEFAULT
    for name in ("dataset", "model", "epochs", "batch_size"):
        assert settings[name] == getattr(usual, name)
    assert tuple(settings["seeds"]) == usual.seeds
    assert settings["command"] == "quantjax compare --out experiments/results/compare"
    rows = record["results"]
    assert [row["method"] for row in rows] == ["float", *methods.DEFAULT]
    titles = [methods.METHODS[name].title for name in methods.DEFAULT]
    assert [row["title"] for row in rows[1:]] == titles
    for row in rows:
        assert row["seeds"] == settings["seeds"]
