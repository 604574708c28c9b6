"""The table of LeNet-5 as whole files in RESULTS.md is the records'."""

import re

import pytest

from quantjax.lab import recipes
from quantjax.lab.report import records

PAGE = (recipes.FOLDER / "RESULTS.md").read_text()
LINES = re.findall(
    r"^\| `(\w+_lenet5_\w+)`, ([^|]+?) \| ([\d.]+) KB \| ([\d.]+)% \|", PAGE, re.MULTILINE
)
LARGEST = {"alq_lenet5_file": 24, "fq_lenet5_file": 11}  # KB, as is claimed


@pytest.mark.parametrize(("name", "row", "size", "accuracy"), LINES)
def test_line_is_the_record(name, row, size, accuracy):
    told = {
        (mine["row"], f"{mine['file KB']:.1f}", f"{mine['low precision']:.2f}")
        for record in records.load(recipes.FOLDER / "results")
        for mine in record["rows"]
        if record["experiment"] == name and "file KB" in mine
    }
    assert (row, size, accuracy) in told
    assert float(accuracy) >= 99
    assert float(size) <= LARGEST.get(name, min(LARGEST.values()))


def test_table_has_lines():
    assert LINES
