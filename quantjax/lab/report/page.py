"""The page of a comparison: one HTML file that holds its pictures."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape

from quantjax.encoded.summary import size_text, summary
from quantjax.lab.report import axes, plots
from quantjax.lab.report.rows import (
    NONE,
    QUANTIZED,
    Result,
    best_per_width,
    cells_of,
    columns,
    notes,
    plain,
    significant,
)

_LEAD = ("dataset", "model", "epochs", "seeds", "device", "versions", "command")
_MARKS = dict(zip("osD^vP<X>*", "●■◆▲▼✚◀✖▶★", strict=True))


def html(
    settings: Mapping, results: Sequence[Result], images: Mapping[str, bytes], complete: bool
) -> str:
    """Returns the page.

    Args:
      settings, results, complete: as `report.write` takes them.
      images: PNGs by name: pareto, histograms, curves; absent ones are left out.
    """
    subject = " on ".join(str(settings[key]) for key in ("model", "dataset") if key in settings)
    heading = f"{subject} at few bits" if subject else "Low-bit methods side by side"
    metric = results[0].metric
    lower = "" if metric.sign > 0 else "Lower is better. "
    several = any(row.runs for row in results)
    bars = " Bars are a standard deviation over seeds to either side." if several else ""
    first = ", of the first seed" if several else ""
    note = '<p class="note" role="status">interrupted: finished rows only</p>'
    parts = [
        f"<h1>{escape(heading)}</h1>",
        _paragraph(settings, results),
        "" if complete else note,
        _table_html(results),
        _figure(
            images,
            "pareto",
            f"{metric.name.capitalize()} against size",
            f"Quantized test {metric.name} against the size of the encoded network. "
            f"{'Up' if metric.sign > 0 else 'Down'} and to the left is better. Numbers are bits "
            f"per weight; the grey steps are the Pareto front, the best {metric.name} that fits "
            f"into a size.{bars}{axes.scale(metric).told}",
        ),
        _figure(
            images,
            "histograms",
            "Weights and their levels",
            "The float weights of the largest quantized layer, on a logarithmic axis; vertical "
            "lines are the levels that the grid offers. The nearer the weights lie to the lines, "
            f"the less they lose when they are quantized{first}. More than 64 levels are not "
            "drawn. Where every group of a layer has levels of its own, weights are in units of "
            "their step, or one group is shown.",
        ),
        _figure(
            images,
            "curves",
            "Training",
            f"Training loss and test {metric.name} of the float weights, step by step{first}; "
            f"grey: full precision. {lower}Rows without a training of their own are absent.",
        ),
        _layers_html(results),
        _meanings_html(results),
        _settings_html(settings),
    ]
    title = f"quantjax compare: {subject}" if subject else "quantjax compare"
    return _PAGE.replace("{title}", escape(title)).replace("{body}", "\n".join(filter(None, parts)))


def _paragraph(settings, results):
    facts = []
    if "epochs" in settings:
        facts.append(f"{settings['epochs']} epoch{'s'[settings['epochs'] == 1 :]}")
    if "seeds" in settings:
        seeds = plain(settings["seeds"])
        seeds = seeds if isinstance(seeds, list) else [seeds]
        facts.append(f"seed{'s'[len(seeds) == 1 :]} {', '.join(map(str, seeds))}")
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
    heads = [column.heading for column in columns(results)]
    quantized = next(i for i, heading in enumerate(heads) if heading.startswith(QUANTIZED))
    lines = []
    for row, (result, cells) in enumerate(zip(results, cells_of(results), strict=True)):
        color, marker = looks[result.method]
        mark = f'<span class="mark" style="color:{color}">{_MARKS[marker]}</span> '
        cells = [escape(cell) for cell in cells]
        if row in best:
            cells[quantized] = f"<strong>{cells[quantized]}</strong>"
        first, *rest = cells
        line = f'<th scope="row">{mark}{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest)
        starts = row > 0 and result.method != results[row - 1].method
        lines.append(f"<tr{' class=starts' if starts else ''}>{line}</tr>")
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in heads)
    below = "".join(f'<p class="hint">{escape(note)}</p>' for note in notes(results))
    return _grid(head, lines) + below


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
                significant(row.squared_error) if coded else NONE,
                f"{row.relative_error:.2%}" if coded else NONE,
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


def _meanings_html(results):
    items = "".join(
        f"<dt>{escape(column.heading)}</dt><dd>{escape(column.meaning)}</dd>"
        for column in columns(results)
    )
    return f"<section><h2>How to read the columns</h2><dl>{items}</dl></section>"


def _settings_html(settings):
    others = {key: value for key, value in plain(settings).items() if key not in _LEAD}
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
