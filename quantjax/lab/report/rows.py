"""The rows of a comparison, and the texts of its table's cells."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from quantjax.lab.report import paired
from quantjax.lab.train.tasks import ACCURACY, Metric


class Result(NamedTuple):
    """A row, a method at a width: of one seed, or by `joined` of several."""

    method: str  # key as on the command line: "psg"
    title: str  # "PSG"
    bits: float  # average bits per weight; 32 for full precision
    full_precision: float  # the metric of the float weights on the test set; NaN: it has none
    quantized: float  # the metric of what ships
    nbytes: float  # of the file of the whole network
    compression: float  # times smaller than the file of the float network
    weight_error: float  # sum of squared weight errors over quantized layers / number of layers
    seconds: float  # time this row took, all seeds and compilation included
    curve: tuple  # ((step, training loss, metric of the float weights), ...), of the first seed
    params: Any  # float params (tree), of the first seed
    encoded: Any  # tree with Grid, Table or MultiBit leaves, of the first seed
    file: bytes = b""  # what ships, as `save` writes it, of the first seed
    metric: Metric = ACCURACY  # the same in all rows
    seed: int = 0
    start: str = ""  # "trained", "scratch", "none"; "" for full precision
    inputs: int | None = None  # bits of layer inputs; None: they stay float
    note: str = ""  # a sentence about the row
    scores: Any = None  # [n] the metric of what ships, for each test example
    runs: tuple = ()  # the Results of several seeds


class Column(NamedTuple):
    """A column of the page's table, and of the printed one."""

    heading: str
    meaning: str
    printed: bool = True  # on the console, too, which has 80 columns


# Networks of text have none, and it is their metric that takes a word.
BATCH_NORMS = (
    "Its batch norms have running statistics, or those of 2,000 training images under these very "
    "weights, whichever has the lower loss there."
)
QUANTIZED = "quantized"  # the column whose best cells are bold begins so
MEANS = ("bits", "full_precision", "quantized", "nbytes", "compression", "weight_error")
SPREADS = ("full_precision", "quantized")  # that are told with their spread over seeds
NONE = "–"  # noqa: RUF001


def joined(results: Sequence[Result]) -> Result:
    """Returns one row of the results of several seeds: means, the total time, and all of them."""
    means = {name: float(np.mean([getattr(r, name) for r in results])) for name in MEANS}
    seconds = sum(result.seconds for result in results)
    return results[0]._replace(**means, seconds=seconds, runs=tuple(results))


def runs(row: Result) -> tuple[Result, ...]:
    """Returns the results of a row, seed by seed."""
    return row.runs or (row,)


def spread(row: Result, name: str) -> float:
    """Returns the sample standard deviation over seeds; NaN with one seed."""
    values = [getattr(result, name) for result in runs(row)]
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def columns(results: Sequence[Result]) -> tuple[Column, ...]:
    """Returns the columns of the table of some rows, which have one metric."""
    metric = results[0].metric
    name, unit = f"Test {metric.name}", metric.symbol or metric.name
    seeds = max(len(runs(row)) for row in results)
    mean = f" Mean of {seeds} seeds ± their sample standard deviation." if seeds > 1 else ""
    inputs = Column("inputs", f"Bits of layer inputs; {NONE} where they stay float.")
    return (
        Column("method", "How the network came to few bits; the mark is the one of the pictures."),
        Column(
            "start",
            "trained: it continues from the network in full precision, for as many epochs again; "
            "scratch: from that network's first weights, for as many epochs as both have together; "
            "none: there is no further training.",
        ),
        Column(
            "bits", "Bits per weight, averaged over the quantized layers, scales and tables apart."
        ),
        *([inputs] if any(row.inputs for row in results) else []),
        Column(
            f"full precision, {unit}",
            f"{name} of the float weights that the method trained; {NONE} where there are none."
            + mean,
        ),
        Column(
            f"{QUANTIZED}, {unit}",
            f"{name} of the encoded network: what ships. {metric.meaning or BATCH_NORMS}{mean}",
        ),
        Column(
            "size, kB",
            "The file of the whole network in units of 1000 bytes: codes, scales and tables, "
            "leaves that stay float, names and digests.",
        ),
        Column("times smaller", "Than the file of the network in float32."),
        Column(
            "weight error",
            "Squared distance between float and quantized weights, summed over all quantized "
            "layers, divided by the number of these layers (the MSE of the PSG paper).",
            printed=False,
        ),
        Column("time, s", "What this row took, all seeds and compilation included."),
    )


def axis(metric: Metric, whose: str) -> str:
    """Returns how a picture names a metric: `test accuracy of the float weights, %`."""
    return ", ".join(filter(None, [f"test {metric.name} of {whose}", metric.symbol]))


def table(results: Sequence[Result]):
    """Returns a rich table of the results; bold as `best_per_width` says."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    heads = columns(results)
    for i, column in enumerate(heads):
        if not column.printed:
            continue
        # Broken headings: the table fits into 80 columns.
        heading = column.heading.replace(",", "").replace(" ", "\n")
        out.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    best = best_per_width(results)
    for row, cells in enumerate(cells_of(results)):
        shown = [
            # Text: a title in square brackets is no markup.
            Text(cell, "bold" if row in best and column.heading.startswith(QUANTIZED) else "")
            for column, cell in zip(heads, cells, strict=True)
            if column.printed
        ]
        out.add_row(*shown)
    return out


def notes(results: Sequence[Result]) -> list[str]:
    """Returns what is to be read below a table: what bold means, how many images there are."""
    found, metric = [], results[0].metric
    whose = "McNemar's" if metric == ACCURACY else "of their differences"
    test = f"a paired test over the test examples of all seeds ({whose}, at {paired.LEVEL:.0%})"
    if best_per_width(results):
        found.append(
            f"Bold: the best quantized {metric.name} of a width, in whole bits, and all that "
            f"{test} does not tell from it."
        )
    elif any(row.scores is not None for row in results):
        found.append(f"Nothing is bold: {test} tells no two quantized networks of a width apart.")
    counts = {len(row.scores) for row in results if row.scores is not None}
    if counts and metric == ACCURACY:
        (count,) = counts
        found.append(f"One of {count:,} test images is {100 / count:.2g} percent.")
    for row in results:
        if row.note:
            found.append(f"{row.title}: {row.note}")
    return found


def told_apart(a: Result, b: Result) -> bool:
    """Whether a paired test tells the quantized networks of two rows apart.

    All test examples of the seeds that both have count; without them any difference does.
    """
    by_seed = [{run.seed: run.scores for run in runs(row)} for row in (a, b)]
    seeds = [seed for seed in by_seed[0] if seed in by_seed[1]]
    pairs = [[mine[seed] for seed in seeds] for mine in by_seed]
    if not seeds or any(scores is None for part in pairs for scores in part):
        return a.quantized != b.quantized
    return paired.p_value(*map(np.concatenate, pairs)) < paired.LEVEL


def best_per_width(results: Sequence[Result]) -> set[int]:
    """Returns the rows of best quantized networks among those of the same width, ties included.

    Ties are what a paired test does not tell apart. Widths are rounded to whole bits, 1 at least. A
    width of one row, or of ties alone, has no best.
    """
    widths = {}
    for row, result in enumerate(results):
        if result.bits < 32 and math.isfinite(result.quantized):
            widths.setdefault(max(1, round(result.bits)), []).append(row)
    best = set()
    for rows in widths.values():
        sign = results[0].metric.sign
        top = max(rows, key=lambda row: sign * results[row].quantized)
        ties = {row for row in rows if not told_apart(results[top], results[row])}
        if len(ties) < len(rows):
            best |= ties
    return best


def cells_of(results: Sequence[Result]) -> list[list[str]]:
    """Returns the texts of the table's cells, row by row."""
    whole = all(float(result.bits).is_integer() for result in results)
    with_inputs = any(row.inputs for row in results)
    rows = []
    for r in results:
        low = r.params is not r.encoded  # full precision ships as it is
        digits = f".{r.metric.digits}f"
        rows.append(
            [
                r.title,
                {"none": NONE, "": ""}.get(r.start, r.start),
                _number(r.bits, "g" if whole else ".2f"),
                *([NONE if r.inputs is None else str(r.inputs)] if with_inputs else []),
                _with_spread(r, "full_precision", digits),
                _with_spread(r, "quantized", digits) if low else NONE,
                _number(r.nbytes / 1000, ",.1f"),
                _number(r.compression, ".1f") + "×",  # noqa: RUF001
                significant(r.weight_error) if low else NONE,
                _number(r.seconds, ",.1f"),
            ]
        )
    return rows


def _with_spread(row, name, spec):
    deviation = spread(row, name)
    told = f" ±{deviation:{spec}}" if math.isfinite(deviation) else ""
    return _number(getattr(row, name), spec) + told


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


def numbers(row: Result) -> dict:
    """Returns what JSON and CSV hold of a row: its seeds, means and spreads.

    Keys in order; NaN where something does not apply.
    """
    out = {"method": row.method, "title": row.title, "start": row.start, "inputs": row.inputs}
    out["seeds"] = [run.seed for run in runs(row)]
    for name in (*MEANS, "seconds"):
        out[name] = getattr(row, name)
        if name in SPREADS:
            out[f"{name}_spread"] = spread(row, name)
    return out


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
