"""What `quantjax compare` leaves behind: a page, its pictures, and the numbers as JSON and CSV."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from quantjax.encoded import storage
from quantjax.lab.report import page, plots
from quantjax.lab.report.rows import (
    MEANS,
    Result,
    best_per_width,
    numbers,
    plain,
    runs,
)
from quantjax.lab.train.tasks import ACCURACY


def write(
    folder: Path, settings: Mapping, results: Sequence[Result], *, complete: bool = True
) -> Path:
    """Writes the report of the finished rows into `folder` and returns the path of its page.

    The files are report.html (one self-contained file), results.json, results.csv, pareto.png and
    histograms.png. Each is written beside its place and renamed when whole, so that a reader never
    meets half a file. Six rows take about a second: call it after every row.

    Args:
      folder: made when absent.
      settings: what was run. dataset, model, epochs, seeds, device and versions (text or a
        mapping) make the first paragraph, command the last one, any others a list; all of it
        goes into the JSON.
      results: the finished rows in the order of the table, of one seed each or `rows.joined`; 32
        bits and more are full precision. JSON and CSV hold means, spreads over seeds (sample
        standard deviations) and which rows are bold, JSON the seeds' own numbers and curves too;
        both name their metric unless it is accuracy in percent.
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
    files["report.html"] = page.html(settings, results, images, complete).encode()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        storage.replace(folder / name, content)
    return folder / "report.html"


def write_network(folder: Path, result: Result) -> Path:
    """Writes a row's network, `networks/METHOD-BITS.safetensors`, of its first seed; returns where.

    What is no letter, digit or one of `._+-` in the method's name becomes `-`.
    """
    name = re.sub(r"[^\w.+-]+", "-", result.method)
    path = Path(folder) / "networks" / f"{name}-{result.bits:.3g}bits.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace(path, result.file)
    return path


def read_settings(folder: Path) -> dict | None:
    """Returns the settings of the report in a folder; None where there is none that can be read."""
    try:
        return dict(json.loads((Path(folder) / "results.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _on_host(result):
    values = {name: float(getattr(result, name)) for name in (*MEANS, "seconds")}
    curve = tuple((int(step), float(loss), float(right)) for step, loss, right in result.curve)
    # Encoded leaves of NumPy arrays decode without a compilation for every shape.
    params, encoded = jax.device_get((result.params, result.encoded))
    return result._replace(**values, curve=curve, params=params, encoded=encoded)


def _json(settings, results, complete):
    rows, best = [], best_per_width(results)
    for i, result in enumerate(results):
        row = numbers(result) | {"best": i in best, "runs": [_run(run) for run in runs(result)]}
        rows.append(json.dumps(plain(row), allow_nan=False))
    # One line for each row, which keeps curves readable.
    head = {"settings": plain(settings), "complete": complete, **_metric(results)}
    head = json.dumps(head, allow_nan=False)
    return head[:-1] + ', "results": [\n' + ",\n".join(rows) + "\n]}\n"


def _run(result):
    """What JSON holds of one seed."""
    values = {name: getattr(result, name) for name in ("seed", *MEANS, "seconds")}
    return values | {"nbytes": int(result.nbytes), "curve": result.curve}


def _csv(results):
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    metric, best = _metric(results), best_per_width(results)
    for i, result in enumerate(results):
        row = plain(numbers(result))
        row |= {"seeds": " ".join(map(str, row["seeds"])), "best": i in best, **metric}
        if i == 0:
            writer.writerow(row)
        writer.writerow("" if value is None else value for value in row.values())
    return out.getvalue()


def _metric(results):
    metric = results[0].metric
    return {} if metric == ACCURACY else {"metric": metric.name}
