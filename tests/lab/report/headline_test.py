"""The README's table of the comparison, on a small made-up record."""

import json

import pytest

from quantjax.lab.report import headline


def row(**changes):
    base = {
        "method": "lsq",
        "title": "LSQ",
        "start": "trained",
        "bits": 2.0,
        "inputs": None,
        "seeds": [0, 1, 2],
        "full_precision": 97.0,
        "full_precision_spread": 0.5,
        "quantized": 98.237,
        "quantized_spread": 0.146,
        "nbytes": 3900.4,
        "best": True,
    }
    return base | changes


FLOAT = row(
    title="full precision", start="", bits=32.0, quantized=97.229, nbytes=54824.0, best=False
)


def record(*rows, **changes):
    settings = {
        "dataset": "digits",
        "model": "small-cnn",
        "methods": ["lsq", "psg"],
        "seeds": [0, 1, 2],
        "epochs": 20,
        "command": "quantjax compare",
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "device": "cpu",
    }
    base = {"settings": settings, "complete": True, "results": [FLOAT, *(rows or [row()])]}
    return base | changes


def test_means_and_spreads_with_the_best_in_bold():
    rounded = row(title="rounded", start="none", quantized=90.5, quantized_spread=3.2, best=False)
    table, made = headline.markdown(record(row(), rounded)).split("\n\n")
    assert table.splitlines() == [
        "| method | starts from | bits | accuracy, % | size, kB |",
        "| --- | --- | --- | --- | --- |",
        "| full precision |  | 32 | 97.23 ± 0.15 | 54.8 |",
        "| LSQ | trained | 2 | **98.24 ± 0.15** | 3.9 |",
        "| rounded | – | 2 | 90.50 ± 3.20 | 3.9 |",  # noqa: RUF001
    ]
    assert made == (
        "small-cnn on digits, 3 seeds, 20 epochs, python 3.11.7, jax 0.10.2, cpu: "
        "`quantjax compare`"
    )


def test_average_widths_widths_of_inputs_and_what_has_diverged():
    rows = [
        row(title="ALQ | half", bits=1.934, inputs=4, best=False),
        row(quantized=None, quantized_spread=None, best=False),
    ]
    text = headline.markdown(record(*rows))
    assert "| method | starts from | bits | inputs | accuracy, % | size, kB |" in text
    assert r"| ALQ \| half | trained | 1.93 | 4 | 98.24 ± 0.15 | 3.9 |" in text
    assert "| LSQ | trained | 2.00 | – | – | 3.9 |" in text  # noqa: RUF001


def test_one_seed_has_no_spread():
    made = record(row(quantized_spread=None, seeds=[0]))
    made["settings"] |= {"seeds": [0], "versions": "jax 0.10.2", "command": ""}
    text = headline.markdown(made)
    assert "| **98.24** |" in text
    assert text.endswith("\n\nsmall-cnn on digits, 1 seed, 20 epochs, jax 0.10.2, cpu")


def test_another_metric_is_named():
    text = headline.markdown(record(row(quantized=2.3456), metric="bits per byte"))
    assert "| bits per byte |" in text
    assert "| **2.346 ± 0.146** |" in text


def test_an_interrupted_comparison_says_so():
    assert "\n\n**interrupted**, small-cnn" in headline.markdown(record(complete=False))


def test_load_finds_the_comparison_in_a_folder_of_records(tmp_path):
    with pytest.raises(FileNotFoundError, match="quantjax compare --out"):
        headline.load(tmp_path)
    (tmp_path / "compare").mkdir()
    path = tmp_path / "compare" / "results.json"
    path.write_text(json.dumps(record()))
    assert headline.load(tmp_path) == record()


def without(name):
    lacking = row()
    del lacking[name]
    return lacking


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Expecting"),
        ("[]", "it lacks one of settings"),
        ('{"settings": {}, "complete": true}', "it lacks one of settings"),
        (json.dumps(record(results=[])), "it has no rows"),
        (json.dumps(record(results=[1])), "it lacks title"),
        (json.dumps(record(settings={"dataset": "digits"})), "it lacks model, seeds"),
        (json.dumps(record(without("start"))), "it lacks start"),
    ],
)
def test_a_file_that_is_no_comparison_is_named(tmp_path, content, told):
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "results.json").write_text(content)
    with pytest.raises(ValueError, match=f"results.json is no record of a comparison: {told}"):
        headline.load(tmp_path)
