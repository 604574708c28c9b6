"""What `quantjax compare` leaves behind: a page, its pictures, and the numbers as JSON and CSV."""

import base64
import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from quantjax.core.summary import size_text, summary
from quantjax.lab import plots


class Result(NamedTuple):
    """One row: a method at a width."""

    method: str  # key as on the command line: "psg"
    title: str  # "PSG"
    bits: float  # average bits per weight; 32 for full precision
    full_precision: float  # test accuracy of the float weights, percent
    quantized: float  # test accuracy of what ships, percent
    nbytes: int  # size of the whole encoded network
    compression: float  # times smaller than float32
    weight_error: float  # sum of squared weight errors over quantized layers / number of layers
    seconds: float  # time this row took, compilation included
    curve: tuple  # ((step, training loss, test accuracy of the float weights), ...)
    params: Any  # float params (tree)
    encoded: Any  # tree with Grid, Table or MultiBit leaves


class Column(NamedTuple):
    """A column of the printed table and of the page's."""

    heading: str
    meaning: str


COLUMNS = (
    Column("method", "How the network came to few bits; the mark is the one of the pictures."),
    Column("bits", "Bits per weight, averaged over the quantized layers, scales and tables apart."),
    Column("full precision, %", "Test accuracy of the float weights that the method trained."),
    Column("quantized, %", "Test accuracy of the encoded network: what ships."),
    Column(
        "size, kB",
        "The whole encoded network in units of 1000 bytes: codes, scales and tables, and the "
        "leaves that stay float.",
    ),
    Column("compression", "How many times smaller than the same network in float32."),
    Column(
        "weight error",
        "Squared distance between float and quantized weights, summed over all quantized layers, "
        "divided by the number of these layers (the MSE of the PSG paper).",
    ),
    Column("time, s", "What this row took, compilation included."),
)
_QUANTIZED = 3  # the column whose best cells are bold
_NUMBERS = Result._fields[: Result._fields.index("curve")]  # what a line of CSV holds
_LEAD = ("dataset", "model", "epochs", "seed", "device", "versions", "command")
_MARKS = dict(zip("osD^vP<X>*", "●■◆▲▼✚◀✖▶★", strict=True))
_NONE = "–"  # noqa: RUF001


def write(
    folder: Path, settings: Mapping, results: Sequence[Result], *, complete: bool = True
) -> Path:
    """Writes the report of the finished rows into `folder` and returns the path of its page.

    The files are report.html (one self-contained file), results.json, results.csv, pareto.png and
    histograms.png. Each is written beside its place and renamed when whole, so that a reader never
    meets half a file. Six rows take about a second: call it after every row.

    Args:
      folder: made when absent.
      settings: what was run. dataset, model, epochs, seed, device and versions (text or a
        mapping) make the first paragraph, command the last one, any others a list; all of it
        goes into the JSON.
      results: the finished rows in the order of the table; 32 bits and more are full precision.
      complete: False adds a note that only finished rows are shown.

    Raises:
      ValueError: no results.
    """
    if not results:
        raise ValueError("a report needs at least one finished row, got none")
    results = [_on_host(result) for result in results]
    pictures = [(result, plots.picture(result)) for result in results]
    pictures = [(result, picture) for result, picture in pictures if picture is not None]
    figures = {
        "pareto": plots.pareto(results),
        "histograms": plots.histograms(pictures) if pictures else None,
        "curves": plots.curves(results),
    }
    images = {key: plots.png(figure) for key, figure in figures.items() if figure is not None}
    files = {f"{key}.png": images[key] for key in ("pareto", "histograms") if key in images}
    files["results.json"] = _json(settings, results, complete).encode()
    files["results.csv"] = _csv(results).encode()
    files["report.html"] = _html(settings, results, images, complete).encode()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _replace(folder / name, content)
    return folder / "report.html"


def table(results: Sequence[Result]):
    """Returns a rich table of the results; the best quantized accuracy of a width is bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(COLUMNS):
        # Broken headings: the table fits into 80 columns.
        heading = column.heading.replace(",", "").replace(" ", "\n")
        out.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    best = best_per_width(results)
    for row, cells in enumerate(_cells(results)):
        styles = ["bold" if row in best and i == _QUANTIZED else "" for i in range(len(cells))]
        # Text: a title in square brackets is no markup.
        out.add_row(*(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
    return out


def best_per_width(results: Sequence[Result]) -> set[int]:
    """Returns the rows of best quantized accuracy among those of the same width, ties included.

    Widths are rounded to whole bits, 1 at least. A width of one row has no best.
    """
    widths = {}
    for row, result in enumerate(results):
        if result.bits < 32:
            widths.setdefault(max(1, round(result.bits)), []).append(row)
    best = set()
    for rows in widths.values():
        most = max(results[row].quantized for row in rows)
        if len(rows) > 1:
            best |= {row for row in rows if results[row].quantized == most}
    return best


def _on_host(result):
    numbers = {name: float(getattr(result, name)) for name in _NUMBERS[2:]}
    numbers["nbytes"] = int(result.nbytes)
    curve = tuple((int(step), float(loss), float(right)) for step, loss, right in result.curve)
    # Encoded leaves of NumPy arrays decode without a compilation for every shape.
    params, encoded = jax.device_get((result.params, result.encoded))
    return result._replace(**numbers, curve=curve, params=params, encoded=encoded)


def _cells(results):
    """Returns the table's texts, row by row."""
    whole = all(float(result.bits).is_integer() for result in results)
    rows = []
    for r in results:
        low = r.bits < 32
        rows.append(
            [
                r.title,
                _number(r.bits, "g" if whole else ".2f"),
                _number(r.full_precision, ".2f"),
                _number(r.quantized, ".2f") if low else _NONE,
                _number(r.nbytes / 1000, ",.1f"),
                _number(r.compression, ".1f") + "×",  # noqa: RUF001
                _significant(r.weight_error) if low else _NONE,
                _number(r.seconds, ",.1f"),
            ]
        )
    return rows


def _number(value, spec):
    return format(value, spec) if math.isfinite(value) else _NONE


def _significant(value):
    """Returns three significant digits, without an exponent from 0.001 to a million."""
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else _NONE
    magnitude = math.floor(math.log10(abs(value)))
    if -3 <= magnitude < 6:
        return f"{value:,.{max(0, 2 - magnitude)}f}"
    return f"{value:.2e}"


def _plain(value):
    """Returns the value as JSON has it: no NaN or infinity, other objects as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _json(settings, results, complete):
    rows = []
    for result in results:
        row = {name: getattr(result, name) for name in (*_NUMBERS, "curve")}
        rows.append(json.dumps(_plain(row), allow_nan=False))
    # One line for each row, which keeps curves readable.
    head = json.dumps({"settings": _plain(settings), "complete": complete}, allow_nan=False)
    return head[:-1] + ', "results": [\n' + ",\n".join(rows) + "\n]}\n"


def _csv(results):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_NUMBERS)
    for result in results:
        values = _plain(result[: len(_NUMBERS)])
        writer.writerow("" if value is None else value for value in values)
    return out.getvalue()


def _replace(path, content):
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _html(settings, results, images, complete):
    subject = " on ".join(str(settings[key]) for key in ("model", "dataset") if key in settings)
    heading = f"{subject} at few bits" if subject else "Low-bit methods side by side"
    note = '<p class="note" role="status">interrupted: finished rows only</p>'
    parts = [
        f"<h1>{escape(heading)}</h1>",
        _paragraph(settings, results),
        "" if complete else note,
        _table_html(results),
        _figure(
            images,
            "pareto",
            "Accuracy against size",
            "Quantized test accuracy against the size of the encoded network. Up and to the left "
            "is better. Numbers are bits per weight; the grey steps are the Pareto front, the "
            "best accuracy that fits into a size. Where errors differ more than fourfold, equal "
            "distances upwards are equal ratios of the error.",
        ),
        _figure(
            images,
            "histograms",
            "Weights and their levels",
            "The float weights of the largest quantized layer, on a logarithmic axis; vertical "
            "lines are the levels that the grid offers. The nearer the weights lie to the lines, "
            "the less they lose when they are quantized. More than 64 levels are not drawn. "
            "Where every group of a layer has levels of its own, weights are in units of their "
            "step, or one group is shown.",
        ),
        _figure(
            images,
            "curves",
            "Training",
            "Training loss and test accuracy of the float weights, step by step; grey: full "
            "precision. Rows without a training of their own are absent.",
        ),
        _layers_html(results),
        _meanings_html(),
        _settings_html(settings),
    ]
    title = f"quantjax compare: {subject}" if subject else "quantjax compare"
    return _PAGE.replace("{title}", escape(title)).replace("{body}", "\n".join(filter(None, parts)))


def _paragraph(settings, results):
    facts = []
    if "epochs" in settings:
        facts.append(f"{settings['epochs']} epoch{'s'[settings['epochs'] == 1 :]}")
    facts += [f"seed {settings['seed']}"] if "seed" in settings else []
    facts += [f"on {settings['device']}"] if "device" in settings else []
    versions = settings.get("versions", "")
    if isinstance(versions, Mapping):
        versions = ", ".join(f"{package} {version}" for package, version in versions.items())
    seconds = sum(result.seconds for result in results)
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    rows = f"{len(results)} row{'s'[len(results) == 1 :]} in {took}"
    text = "; ".join(filter(None, [", ".join(facts), str(versions), rows]))
    return (
        '<p class="lead">The same network in full precision and brought to few bits, method '
        f"beside method: {escape(text)}.</p>"
    )


def _table_html(results):
    best, looks = best_per_width(results), plots.colors(results)
    lines = []
    for row, (result, cells) in enumerate(zip(results, _cells(results), strict=True)):
        color, marker = looks[result.method]
        mark = f'<span class="mark" style="color:{color}">{_MARKS[marker]}</span> '
        cells = [escape(cell) for cell in cells]
        if row in best:
            cells[_QUANTIZED] = f"<strong>{cells[_QUANTIZED]}</strong>"
        first, *rest = cells
        line = f'<th scope="row">{mark}{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest)
        starts = row > 0 and result.method != results[row - 1].method
        lines.append(f"<tr{' class=starts' if starts else ''}>{line}</tr>")
    head = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in COLUMNS)
    hint = "Bold: the best quantized accuracy among rows of the same width, in whole bits."
    return _grid(head, lines) + (f'<p class="hint">{hint}</p>' if best else "")


def _layers_html(results):
    columns = ("layer", "shape", "kept as", "bits", "size", "squared error", "relative error")
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    out = []
    for result in results:
        rows = summary(result.encoded, result.params).rows
        if all(row.relative_error is None for row in rows):  # nothing is encoded
            continue
        lines = []
        for row in rows:
            coded = row.relative_error is not None
            cells = [
                "×".join(map(str, row.shape)) or "scalar",  # noqa: RUF001
                row.method,
                f"{row.bits:.3g}",
                size_text(row.nbytes),
                _significant(row.squared_error) if coded else _NONE,
                f"{row.relative_error:.2%}" if coded else _NONE,
            ]
            line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            lines.append(f'<tr><th scope="row">{escape(row.path)}</th>{line}</tr>')
        name = escape(plots.name(result))
        out.append(f"<details><summary>{name}</summary>{_grid(head, lines)}</details>")
    return f"<h2>Layer by layer</h2>{''.join(out)}" if out else ""


def _grid(head, lines):
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _figure(images, key, heading, caption):
    if key not in images:
        return ""
    data = base64.b64encode(images[key]).decode()
    # A PNG holds its width and height here; three of its pixels lie on two of the page.
    width, height = (int.from_bytes(images[key][at : at + 4], "big") * 2 // 3 for at in (16, 20))
    return (
        f'<section><h2>{heading}</h2><figure class="{key}">'
        f'<img alt="{escape(caption)}" width="{width}" height="{height}" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure></section>"
    )


def _meanings_html():
    items = "".join(
        f"<dt>{escape(column.heading)}</dt><dd>{escape(column.meaning)}</dd>" for column in COLUMNS
    )
    return f"<section><h2>How to read the columns</h2><dl>{items}</dl></section>"


def _settings_html(settings):
    others = {key: value for key, value in _plain(settings).items() if key not in _LEAD}
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(_text(value))}</dd>" for key, value in others.items()
    )
    out = "<section><h2>To run it again</h2>"
    if settings.get("command"):
        out += f"<pre><code>{escape(str(settings['command']))}</code></pre>"
    if items:
        out += f"<details><summary>All settings</summary><dl>{items}</dl></details>"
    numbers = "<code>results.json</code> and <code>results.csv</code>"
    return f'{out}<p class="hint">The numbers of this page, unrounded: {numbers}.</p></section>'


def _text(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Pictures are drawn in ink on white: in dark mode their lightness is turned round, hues stay.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #5f5f5f;
  --line: #dcdcdc; --fill: #f5f5f4; --note: #fff3d6; --note-ink: #6b4700; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "Liberation Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .8rem; }
.lead { color: var(--soft); margin: 0 0 1.6rem; max-width: 46rem; }
.note { display: inline-block; margin: 0 0 1.4rem; padding: .35rem .8rem; border-radius: .4rem;
  background: var(--note); color: var(--note-ink); font-weight: 600; }
.hint, figcaption { color: var(--soft); font-size: .875rem; margin: .6rem 0 0; max-width: 46rem; }
.wide { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .94rem; }
th, td { padding: .36rem .2rem .36rem 1.1rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; padding-left: .2rem; }
thead th { color: var(--soft); font-size: .82rem; font-weight: 600; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink); }
tbody th { font-weight: 500; }
tbody td { color: var(--ink); }
tbody tr.starts > * { border-top: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 1px solid var(--line); }
tbody tr:hover > * { background: var(--fill); }
strong { font-weight: 750; }
.mark { display: inline-block; width: 1.3em; text-align: center; }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
details + details { margin: 0; }
summary { cursor: pointer; font-weight: 500; }
details table { font-size: .86rem; margin: .4rem 0 .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.4rem; margin: 0;
  font-size: .94rem; }
dt { font-weight: 600; }
dd { margin: 0; max-width: 40rem; overflow-wrap: anywhere; }
pre { background: var(--fill); border-radius: .4rem; padding: .8rem 1rem; overflow-x: auto;
  font-size: .88rem; }
code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; }
@media screen and (max-width: 40rem) { figure { overflow-x: auto; }
  .histograms img, .curves img { max-width: none; width: 40rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .7rem; } }
@media (prefers-color-scheme: dark) {
  :root { --page: #1a1a1a; --ink: #e6e6e6; --soft: #a8a8a8; --line: #3c3c3c; --fill: #262626;
    --note: #4a3607; --note-ink: #ffdf9a; }
  img, .mark { filter: invert(.9) hue-rotate(180deg); }
}
@media print {
  :root { --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --fill: #f5f5f4; }
  @page { margin: 16mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  img, .mark { filter: none; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section, tr, details { break-inside: avoid; }
  .wide { overflow: visible; }
  th, td { padding: .25rem .1rem .25rem .6rem; }
  thead th { white-space: normal; }
  details table { margin: .2rem 0; }
  h2, summary { break-after: avoid; }
  pre { white-space: pre-wrap; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
