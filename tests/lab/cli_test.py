"""The command line: exit statuses, and one line for bad input."""

import importlib
import json
from pathlib import Path

import pytest

from quantjax.lab import recipes
from quantjax.lab.cli import main
from quantjax.lab.compare import Settings
from quantjax.lab.train.options import Options

pytestmark = pytest.mark.usefixtures("quick_compilation")

compare = importlib.import_module("quantjax.lab.compare")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], ["compare", "run", "results", "quantjax list"]),
        (["compare"], ["--methods", "--bits", "--epochs", "--out", "--quick", "report"]),
        (["run"], ["name of a recipe", "--scale", "--seeds", "--limit", "--record", "--data-dir"]),
        (["results"], ["--write", "table", "--folder"]),
        (["list"], ["methods, models, data sets and recipes", "--data-dir"]),
    ],
)
def test_help(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in told:
        assert word in out


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["compare", "--epoch", "3"], ["compare", "--bits", "four"]]
)
def test_arguments_that_are_no_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--methods", "psgd"], "unknown method 'psgd'; did you mean 'sgd'"),
        (["compare", "--bits", "0"], "bits must be a whole number in 1..16, got 0"),
        (["compare", "--model", "lenet"], "unknown model 'lenet'; did you mean 'lenet5'"),
        (["compare", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["compare", "--model", "lenet5", "--dataset", "./absent"], "no directory absent"),
        (["compare", "--out", "file"], "file"),
        (["run", "psg_mnst"], "unknown experiment 'psg_mnst'; did you mean 'psg_mnist'"),
        (["run", "recipe.py", "--scale", "0"], "scale must be positive, got 0"),
        (["run", "recipe.py", "--bits", "7"], "bits (7,): this recipe has (4, 2)"),
        (["run", "recipe.py", "--limit", "0"], "limit must be at least 1, got 0"),
        (["run", "recipe.py", "--seeds"], "seeds must name at least one seed"),
        (["compare", "--methods"], "nothing to compare: give at least one method"),
        (["compare", "--seeds"], "seeds must name at least one seed"),
        (["compare", "--seeds", "0", "-1"], "different whole numbers from 0 on, got (0, -1)"),
        (["compare", "--seeds", "1", "1"], "different whole numbers from 0 on, got (1, 1)"),
        (["compare", "--inputs", "0"], "bits must be"),
        (["compare", "--methods", "absent_module:plan"], "cannot import 'absent_module'"),
        (["results", "--folder", "absent"], "no records in absent"),
        (["run", "recipe.py", "--out", "file"], "file"),
        (["run", "other.py"], "other.py is no recipe: it lacks run"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("recipe.py").write_text(RECIPE)
    Path("other.py").write_text("TITLE = 'no run'\n")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quantjax: ")
    assert message in err
    assert err.count("\n") == 1


RECIPE = """
TITLE = "two widths"

def run(context):
    for bits in context.widths((4, 2)):
        yield {"bits": bits, "steps": context.steps(10, 10), "seeds": list(context.seeds)}
"""


def test_run_tells_where_the_record_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("recipe.py").write_text(RECIPE)
    words = "run recipe.py --scale 0.5 --seeds 1 2 --bits 2 --out results"
    assert main(words.split()) == 0
    record = Path("results/recipe-b2-s1-2-scale0.5.json")
    assert capsys.readouterr().out == f"record: {record}\n"
    assert json.loads(record.read_text())["rows"] == [{"bits": 2, "steps": 50, "seeds": [1, 2]}]


def test_records_stay_out_of_the_repository_unless_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path / "experiments")
    Path("recipe.py").write_text(RECIPE)
    assert main(["run", "recipe.py", "--bits", "2"]) == 0
    assert Path("quantjax-results/recipe-b2.json").is_file()
    assert not Path("experiments").exists()
    assert main(["run", "recipe.py", "--bits", "2", "--record"]) == 0
    assert Path("experiments/results/recipe-b2.json").is_file()
    capsys.readouterr()
    assert main(["results", "--folder", "quantjax-results"]) == 0
    assert "quantjax run recipe --bits 2" in capsys.readouterr().out


def test_compare_is_given_its_settings(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "compare", lambda *given: seen.append(given))
    words = ["--methods", "psg", "sgd", "--bits", "4", "2", "--epochs", "3", "--seeds", "7", "9"]
    assert main(["compare", *words, "--out", str(tmp_path), "--quick"]) == 0
    assert main(["compare", "--resume", "--mesh", "data=2", "--precision", "bf16"]) == 0
    expected = Settings(
        methods=("psg", "sgd"), bits=(4, 2), epochs=3, seeds=(7, 9), out=tmp_path, quick=True
    )
    options = Options(resume=True, mesh="data=2", precision="bf16")
    assert seen == [(expected, Options()), (Settings(), options)]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), 130, ""),
        (FloatingPointError("the loss is nan"), 2, "quantjax: the loss is nan\n"),
        (PermissionError("no"), 2, "quantjax: no\n"),
    ],
)
def test_how_a_command_ends(error, status, told, monkeypatch, capsys):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(compare, "compare", fail)
    monkeypatch.setattr(recipes, "run", fail)
    for arguments in (["compare"], ["run", "psg_mnist"]):
        assert main(arguments) == status
        assert capsys.readouterr().err == told


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch):
    def fail(*given):
        raise TypeError("a bug")

    monkeypatch.setattr(compare, "compare", fail)
    with pytest.raises(TypeError, match="a bug"):
        main(["compare"])
