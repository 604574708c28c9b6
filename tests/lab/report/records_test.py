import json

import pytest

from quantjax.lab.report import records


def record(**changes):
    rows = [
        {"row": "held-out accuracy", "bits": 2, "of": {"10.0": 90.0}},
        {
            "row": "PSG",
            "bits": 2,
            "seed": 0,
            "low precision": 94.0,
            "paper": {"low precision": 60.8},
        },
        {
            "row": "PSG",
            "bits": 2,
            "seed": 1,
            "low precision": 96.0,
            "paper": {"low precision": 60.8},
        },
        {"row": "SGD", "bits": 2, "seed": 0, "low precision": 39.5},
    ]
    base = {
        "experiment": "toy",
        "title": "A toy",
        "command": "quantjax run toy",
        "scale": 1.0,
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
        "complete": True,
        "seconds": 120.0,
        "rows": rows,
    }
    return base | changes


def test_mean_and_deviation_over_seeds_beside_the_paper():
    text = records.markdown([record()])
    assert "| PSG | 2 | 95.00 ± 1.00 | 60.8 |" in text
    assert "| SGD | 2 | 39.50 |  |" in text
    assert "held-out" not in text
    assert "2 seeds" in text
    assert "`quantjax run toy`" in text


def test_rows_without_a_width():
    rows = [{"row": "pruned", "seed": 0, "sparse": 99.5}]
    text = records.markdown([record(rows=rows)])
    assert "|  | sparse |" in text  # no empty column
    assert "| pruned | 99.50 |" in text
    rows.append({"row": "FQ", "seed": 0, "bits": 5, "sparse": 99.0})
    text = records.markdown([record(rows=rows)])
    assert "|  | bits | sparse |" in text
    assert "| pruned |  | 99.50 |" in text


def test_shortened_and_interrupted_runs_say_so():
    text = records.markdown([record(scale=0.1, complete=False)])
    assert "**every phase shortened to 0.1 of the paper's**" in text
    assert "**interrupted**" in text


def test_show_replaces_the_section_and_nothing_else(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="quantjax run"):
        records.show(None, folder)
    (folder / "toy.json").write_text(json.dumps(record()))
    page = tmp_path / "README.md"
    page.write_text(f"before\n{records.BEGIN}\nold\n{records.END}\nafter\n")
    for _ in range(2):
        records.show(page, folder)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "old" not in text
        assert text.count("A toy") == 1
    page.write_text("no section")
    with pytest.raises(ValueError, match="no results section"):
        records.show(page, folder)
