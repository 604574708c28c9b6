"""The rows of a comparison, and the texts of its table's cells."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from quantjax.lab.train.tasks import ACCURACY, Metric


class Result(NamedTuple):
    """One row: a method at a width."""

    method: str  # key as on the command line: "psg"
    title: str  # "PSG"
    bits: float  # average bits per weight; 32 for full precision
    full_precision: float  # the metric of the float weights on the test set
    quantized: float  # the metric of what ships
    nbytes: int  # of the file of the whole network
    compression: float  # times smaller than the file of the float network
    weight_error: float  # sum of squared weight errors over quantized layers / number of layers
    seconds: float  # time this row took, compilation included
    curve: tuple  # ((step, training loss, metric of the float weights), ...)
    params: Any  # float params (tree)
    encoded: Any  # tree with Grid, Table or MultiBit leaves
    file: bytes = b""  # what ships, as `save` writes it
    metric: Metric = ACCURACY  # the same in all rows


class Column(NamedTuple):
    """A column of the printed table and of the page's."""

    heading: str
    meaning: str


# Networks of text have none, and it is their metric that takes a word.
BATCH_NORMS = (
    "Its batch norms have running statistics, or those of 2,000 training images under these very "
    "weights, whichever has the lower loss there."
)
QUANTIZED = 3  # the column whose best cells are bold
NUMBERS = Result._fields[: Result._fields.index("curve")]  # what a line of CSV holds
NONE = "–"  # noqa: RUF001


def columns(metric: Metric) -> tuple[Column, ...]:
    """Returns the columns of a table whose networks are judged by a metric."""
    name, unit = f"Test {metric.name}", metric.symbol or metric.name
    return (
        Column("method", "How the network came to few bits; the mark is the one of the pictures."),
        Column(
            "bits", "Bits per weight, averaged over the quantized layers, scales and tables apart."
        ),
        Column(f"full precision, {unit}", f"{name} of the float weights that the method trained."),
        Column(
            f"quantized, {unit}",
            f"{name} of the encoded network: what ships. {metric.meaning or BATCH_NORMS}",
        ),
        Column(
            "size, kB",
            "The file of the whole network in units of 1000 bytes: codes, scales and tables, "
            "leaves that stay float, names and digests.",
        ),
        Column("compression", "How many times smaller than the file of the network in float32."),
        Column(
            "weight error",
            "Squared distance between float and quantized weights, summed over all quantized "
            "layers, divided by the number of these layers (the MSE of the PSG paper).",
        ),
        Column("time, s", "What this row took, compilation included."),
    )


def axis(metric: Metric, whose: str) -> str:
    """Returns how a picture names a metric: `test accuracy of the float weights, %`."""
    return ", ".join(filter(None, [f"test {metric.name} of {whose}", metric.symbol]))


def table(results: Sequence[Result]):
    """Returns a rich table of the results; the best quantized network of a width is bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns(results[0].metric)):
        # Broken headings: the table fits into 80 columns.
        heading = column.heading.replace(",", "").replace(" ", "\n")
        out.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    best = best_per_width(results)
    for row, cells in enumerate(cells_of(results)):
        styles = ["bold" if row in best and i == QUANTIZED else "" for i in range(len(cells))]
        # Text: a title in square brackets is no markup.
        out.add_row(*(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
    return out


def best_per_width(results: Sequence[Result]) -> set[int]:
    """Returns the rows of best quantized networks among those of the same width, ties included.

    Widths are rounded to whole bits, 1 at least. A width of one row has no best.
    """
    widths = {}
    for row, result in enumerate(results):
        if result.bits < 32 and math.isfinite(result.quantized):
            widths.setdefault(max(1, round(result.bits)), []).append(row)
    best = set()
    for rows in widths.values():
        top = results[0].metric.best(results[row].quantized for row in rows)
        if len(rows) > 1:
            best |= {row for row in rows if results[row].quantized == top}
    return best


def cells_of(results):
    """Returns the texts of the table's cells, row by row."""
    whole = all(float(result.bits).is_integer() for result in results)
    rows = []
    for r in results:
        low = r.params is not r.encoded  # full precision ships as it is
        digits = f".{r.metric.digits}f"
        rows.append(
            [
                r.title,
                _number(r.bits, "g" if whole else ".2f"),
                _number(r.full_precision, digits),
                _number(r.quantized, digits) if low else NONE,
                _number(r.nbytes / 1000, ",.1f"),
                _number(r.compression, ".1f") + "×",  # noqa: RUF001
                significant(r.weight_error) if low else NONE,
                _number(r.seconds, ",.1f"),
            ]
        )
    return rows


def _number(value, spec):
    return format(value, spec) if math.isfinite(value) else NONE


def significant(value):
    """Returns three significant digits, without an exponent from 0.001 to a million."""
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else NONE
    magnitude = math.floor(math.log10(abs(value)))
    if -3 <= magnitude < 6:
        return f"{value:,.{max(0, 2 - magnitude)}f}"
    return f"{value:.2e}"


def plain(value):
    """Returns the value as JSON has it: no NaN or infinity, other objects as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
