"""The README is true: its snippets run, its commands exist, its results are the records'."""

import re
from pathlib import Path

import pytest

from quantjax.lab.report import records

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_snippets_run_in_order(capsys, tmp_path, monkeypatch, quick_programs):
    monkeypatch.chdir(tmp_path)  # one of them writes a file
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "Grid" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "lsq", "pact", "dorefa", "rq"])
def test_the_loop_of_learned_grids_takes_any_input_quantizer(name, quick_programs):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    setting, loop = blocks[0], next(block for block in blocks if "def step(" in block)
    learned = next(block for block in blocks if "def srq_step(" in block)
    other = learned.replace("qj.srq_input(bits=3)", f"qj.{name}_input(bits=3)")
    assert other != learned
    namespace = {}
    for block in (setting, loop, other):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["encoded"]


def test_the_two_commands_are_the_ones_of_ci():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert commands == [
        'pip install -e ".[lab]" && quantjax compare',
        'pip install -e ".[test]" && pytest',
    ]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_results_are_the_records():
    text = records.markdown(records.load(ROOT / "experiments" / "results"))
    assert records.replaced(README, text) == README


def test_pictures_and_files_that_it_names_exist():
    names = re.findall(r"\]\(([^)]+)\)", README) + re.findall(
        r"`([\w/]+\.(?:py|ipynb|txt))`", README
    )
    assert names
    for name in (name for name in names if not name.startswith("https://")):
        assert (ROOT / name).exists(), name
