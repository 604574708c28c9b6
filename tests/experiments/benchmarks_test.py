"""Benchmarks run, at sizes that say nothing about speed."""

import json

import pytest

import quantjax as qj
from experiments.benchmarks import growth, training_steps
from quantjax.lab import recipes

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_training_steps_beside_float(capsys):
    told = ["--batch", "4", "--rounds", "2", "--compilations", "0", "--methods", "fq", "psg"]
    training_steps.main(told)
    record = json.loads(capsys.readouterr().out)
    assert list(record["rows"]) == ["float", "psg", "fq"]  # in the table's order
    for row in record["rows"].values():
        assert row["step, ms"] > 0
        assert row["memory, MB"] > 1
    assert record["rows"]["float"]["step / float"] == 1
    assert record["bars, step / float"] == {}  # they hold at batch 128


def test_growth_and_its_picture(capsys, tmp_path, monkeypatch):
    kinds = {
        "uniform": growth.Kind(qj.uniform),
        "magnitude": growth.Kind(lambda bits: qj.magnitude(0.5), range(0)),
    }
    monkeypatch.setattr(growth, "KINDS", kinds)
    monkeypatch.setattr(growth, "WIDTHS", (2, 3))
    monkeypatch.setattr(growth, "FROM", 0)
    for module in (growth, recipes):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    growth.main(["--largest", "3e4", "--rounds", "1", "--write"])
    record = json.loads(capsys.readouterr().out)
    assert list(record["ms"]["pass by weights"]["uniform"]) == ["10000", "30000"]
    assert list(record["ms"]["fit by bits"]) == ["uniform"]
    assert set(record["exponents"]["pass by weights"]) == {
        *("uniform", "magnitude", "PSG", "SGD with momentum"),
    }
    folder = tmp_path / "results" / "benchmarks"
    assert json.loads((folder / "growth.json").read_text()) == record
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_exponents_are_slopes():
    assert growth.exponent({10: 1.0, 100: 100.0, 1000: 10_000.0}) == 2
    assert growth.exponent({10: 9.0, 100: 10.0, 1000: 100.0}, least=100) == 1
    assert growth.exponent({100: 1.0}) is None
