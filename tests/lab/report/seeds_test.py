"""Rows of several seeds: means, spreads, and what is bold."""

import csv
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from quantjax.lab.report import files, plots
from quantjax.lab.report import rows as rows_lib
from tests.lab.report.files_test import SETTINGS, Page, make, read

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXAMPLES = 400


def row(method, right, *, bits=2.0, start="trained", seeds=(0, 1, 2), **other):
    """A row whose seeds have the first `right[seed]` test examples right."""
    runs = []
    for seed, count in zip(seeds, right, strict=True):
        scores = 100.0 * (np.arange(EXAMPLES) < count)
        told = {"seed": seed, "scores": scores, "start": start, **other}
        runs.append(make(method, bits, float(scores.mean()), **told))
    return rows_lib.joined(runs)


def everything():
    return [
        row("float", (396, 396, 392), bits=32.0, start=""),
        row("rounded", (300, 200, 250), start="none"),
        row("lsq", (388, 392, 390)),
        row("psg", (386, 392, 389), note="its note."),
    ]


def test_a_row_is_the_mean_of_its_seeds():
    mine = row("lsq", (388, 392, 390))
    assert mine.quantized == pytest.approx(97.5)
    assert rows_lib.spread(mine, "quantized") == pytest.approx(0.5)  # of n - 1
    assert mine.seconds == 3 * 1.25
    assert [run.seed for run in rows_lib.runs(mine)] == [0, 1, 2]
    one = row("lsq", (388,), seeds=(4,))
    assert math.isnan(rows_lib.spread(one, "quantized"))
    assert [run.seed for run in rows_lib.runs(make(seed=5))] == [5]


def test_what_a_paired_test_does_not_tell_apart_is_bold_together():
    rows = everything()
    assert rows_lib.best_per_width(rows) == {2, 3}
    assert not rows_lib.told_apart(rows[2], rows[3])  # 3 examples of 1,200
    assert rows_lib.told_apart(rows[1], rows[2])
    notes = " ".join(rows_lib.notes(rows))
    assert "Bold: the best" in notes
    assert "McNemar" in notes
    assert "One of 400 test images is 0.25 percent." in notes
    assert "PSG: its note." in notes


def test_nothing_is_bold_where_nothing_is_told_apart():
    rows = [everything()[0], *everything()[2:]]
    assert rows_lib.best_per_width(rows) == set()
    assert "Nothing is bold" in rows_lib.notes(rows)[0]


def test_the_same_images_decide_not_the_same_number():
    """Equal accuracies on other images are no tie of images, but no difference either."""
    first, last = row("a", (200,), seeds=(0,)), row("b", (200,), seeds=(0,))
    last = last._replace(runs=(last.runs[0]._replace(scores=last.runs[0].scores[::-1]),))
    assert not rows_lib.told_apart(first, last)


def test_only_seeds_of_both_count():
    a, b = row("a", (400, 0), seeds=(0, 1)), row("b", (399,), seeds=(0,))
    assert not rows_lib.told_apart(a, b)
    assert rows_lib.told_apart(a, row("b", (200,), seeds=(0,)))


def test_files_hold_means_spreads_and_every_seed(tmp_path):
    files.write(tmp_path, SETTINGS | {"seeds": [0, 1, 2]}, everything())
    stored = json.loads(read(tmp_path / "results.json"))["results"]
    lsq = stored[2]
    assert (lsq["method"], lsq["start"], lsq["seeds"], lsq["best"]) == (
        *("lsq", "trained"),
        [0, 1, 2],
        True,
    )
    assert lsq["quantized"] == pytest.approx(97.5)
    assert lsq["quantized_spread"] == pytest.approx(0.5)
    assert [run["seed"] for run in lsq["runs"]] == [0, 1, 2]
    assert [run["quantized"] for run in lsq["runs"]] == [97, 98, 97.5]
    assert [mine["best"] for mine in stored] == [False, False, True, True]
    lines = list(csv.DictReader(io.StringIO(read(tmp_path / "results.csv"))))
    assert lines[2]["seeds"] == "0 1 2"
    assert float(lines[2]["quantized_spread"]) == pytest.approx(0.5)
    page = Page(read(tmp_path / "report.html"))
    assert {"97.50 ±0.50", "trained"} <= set(page.cells)
    assert "seeds 0, 1, 2" in page.text
    assert "Bars are a standard deviation over seeds" in page.text
    assert "of the first seed" in page.text


def test_the_printed_table_fits():
    console = Console(width=80, file=io.StringIO())
    rows = [*everything(), row("a longer title of ours", (100, 350, 400), inputs=4)]
    console.print(rows_lib.table(rows))
    printed = console.file.getvalue()
    assert "97.50 ±0.50" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_what_does_not_apply_stays_empty(tmp_path):
    mine = row("alq", (380, 381, 382), full_precision=math.nan, weight_error=math.nan)
    files.write(tmp_path, SETTINGS, [everything()[0], mine])
    stored = json.loads(read(tmp_path / "results.json"))["results"][1]
    assert {
        stored[name] for name in ("full_precision", "full_precision_spread", "weight_error")
    } == {None}
    assert rows_lib.cells_of([mine])[0][3] == rows_lib.NONE


def test_error_bars_are_the_spread_and_lie_within_the_axes():
    rows = everything()
    (ax,) = plots.pareto(rows).axes
    (bars,) = [
        segments
        for container in ax.containers
        for segments in [container[2][0].get_segments()]
        if np.isclose(segments[0].mean(axis=0)[1], rows[1].quantized)
    ]
    low, high = bars[0][:, 1]
    deviation = np.std([75, 50, 62.5], ddof=1)
    np.testing.assert_allclose([low, high], [62.5 - deviation, 62.5 + deviation])
    bottom, top = ax.get_ylim()
    assert bottom <= low < high <= top


def test_names_of_plans_from_outside_are_names_of_files(tmp_path):
    path = files.write_network(tmp_path, make("../a.b:plan", file=b"bytes"))
    assert path.parent == tmp_path / "networks"
    assert path.name == "..-a.b-plan-4bits.safetensors"
    assert path.read_bytes() == b"bytes"
