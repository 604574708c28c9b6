"""The report of networks that are judged by bits per byte, where lower is better."""

import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from quantjax.lab.report import axes, files, plots
from quantjax.lab.report import rows as rows_lib
from quantjax.lab.train.tasks import ACCURACY, BITS_PER_BYTE
from tests.lab.report.files_test import SETTINGS, make, read, written

pytestmark = pytest.mark.usefixtures("quick_compilation")

CURVE = ((10, 3.5, 5.25), (20, 2.5, 3.75))


def text(method="psg", bits=4.0, quantized=2.5, curve=CURVE, **other):
    other = {"full_precision": 2.25, "metric": BITS_PER_BYTE, "curve": curve} | other
    return make(method, bits, quantized, **other)


def everything():
    return [
        text("float", 32.0, 2.25),
        text("psg", 4.0, 2.5),
        text("lsq", 4.0, 2.375, curve=((10, 2.4, 3.5), (20, 2.0, 2.4))),
        text("psg", 2.0, 8.5, curve=((10, 5.0, 7.5), (20, 4.0, 6.0))),
        text("lsq", 2.0, 3.0, curve=((10, 2.9, 3.6), (20, 2.8, 3.4))),
    ]


def test_the_page_and_the_files_name_the_metric(tmp_path):
    page = written(tmp_path, everything())
    assert {"full precision, bits per byte", "quantized, bits per byte"} <= set(page.cells)
    assert {"2.250", "2.375", "8.500"} <= set(page.cells)
    for part in (
        "Bits per byte against size",
        "Down and to the left is better",
        "Training loss and test bits per byte of the float weights",
        "the best quantized bits per byte of a width, in whole bits",
        "Lower is better",
    ):
        assert part in page.text
    for part in ("ccuracy", "%, ", "Up and to", "equal ratios", "images"):
        assert part not in page.text
    stored = json.loads(read(tmp_path / "results.json"))
    assert stored["metric"] == "bits per byte"
    assert stored["results"][0]["runs"][0]["curve"] == [list(point) for point in CURVE]
    lines = list(csv.DictReader(io.StringIO(read(tmp_path / "results.csv"))))
    assert [line["metric"] for line in lines] == ["bits per byte"] * 5
    assert [float(line["quantized"]) for line in lines] == [2.25, 2.5, 2.375, 8.5, 3.0]


def test_accuracies_go_without_saying(tmp_path):
    page = written(tmp_path, [make("float", 32.0), make()])
    assert "metric" not in json.loads(read(tmp_path / "results.json"))
    assert read(tmp_path / "results.csv").splitlines()[0].split(",")[-1] == "best"
    for part in (
        "Accuracy against size",
        "Up and to the left is better",
        "the best accuracy that fits into a size. Where errors differ more than fourfold",
        "Training loss and test accuracy of the float weights, step by step; grey: full "
        "precision. Rows without",
    ):
        assert part in page.text
    assert rows_lib.axis(ACCURACY, "the float weights") == "test accuracy of the float weights, %"
    assert [column.heading for column in rows_lib.columns([make()])][3:5] == [
        "full precision, %",
        "quantized, %",
    ]


def test_the_table_fits_and_its_lowest_are_bold():
    rows = everything()
    assert rows_lib.best_per_width(rows) == {2, 4}
    accuracies = [row._replace(metric=ACCURACY) for row in rows]
    assert rows_lib.best_per_width(accuracies) == {1, 3}
    console = Console(width=80, file=io.StringIO())
    console.print(rows_lib.table(rows))
    printed = console.file.getvalue()
    assert "2.375" in printed
    assert "%" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_front_goes_down():
    ax = plots.pareto(everything()).axes[0]
    front = ax.lines[0].get_ydata()
    assert np.all(np.diff(front) <= 0)
    assert {8.5, 3.0, 2.25} >= {front[0], front[-1]}
    assert front[-1] == 2.25
    assert ax.get_yscale() == "linear"
    bottom, top = ax.get_ylim()
    assert bottom < 2.25 < 8.5 < top
    label = "test bits per byte of the quantized network, lower is better"
    assert ax.get_ylabel() == label


def test_curves_are_drawn_as_they_are_and_headings_stay_apart():
    fig = plots.curves(everything())
    fig.draw_without_rendering()
    scores = fig.axes[1]
    assert scores.get_yscale() == "linear"
    assert list(scores.lines[0].get_ydata()) == [5.25, 3.75]
    boxes = [text.get_window_extent() for ax in fig.axes for text in ax.texts]
    assert len(boxes) == len(fig.axes) == 4
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert box.x1 <= fig.bbox.x1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out(tmp_path, value):
    rows = [text("float", 32.0, 2.25), text(quantized=value, curve=((10, value, value),))]
    files.write(tmp_path, SETTINGS, rows)
    stored = json.loads(read(tmp_path / "results.json"))["results"][1]
    assert (stored["quantized"], stored["runs"][0]["curve"]) == (None, [[10, None, None]])
    for values in ([value], [value, 2.0], [2.0]):
        (ax,) = plots.blank(2, 2)[1]
        axes.scale(BITS_PER_BYTE).draw(ax, values)
        assert np.diff(ax.get_ylim()) > 0
