"""Rows of `quantjax compare` as a record: every seed's numbers, then ranks by paired tests."""

import itertools
from collections.abc import Iterator, Sequence

from quantjax.lab import methods
from quantjax.lab.report import rows as rows_lib
from quantjax.lab.report.rows import Result
from quantjax.lab.train import tasks
from quantjax.lab.trained_rows import Rows


def run(
    context,
    task: tasks.Task,
    model: str,
    asked: Sequence[tuple[str, int]],
    *,
    epochs: int,
    batch_size: int,
    inputs: int | None = None,
) -> Iterator[dict]:
    """Yields the rows of full precision, those of every method and width, and the ranks.

    Args:
      asked: (method, bits) pairs; widths that the context leaves out have no row.
      inputs: bits of the layers' inputs; None: they stay float.
      task, model, epochs, batch_size: as `trained_rows.Rows` takes them.
    """
    trained = Rows(
        *(task, model, task.dataset.name),
        epochs=epochs,
        batch_size=batch_size,
        seeds=context.seeds,
        inputs=inputs,
    )
    trained.total = context.steps(epochs, max(1, len(task.dataset.train[0]) // batch_size))
    full = trained.full_precision()
    for run in rows_lib.runs(full):
        yield {"row": "full precision", "seed": run.seed, "full precision": round(run.quantized, 3)}
    results = []
    for name, bits in asked:
        if context.bits is not None and bits not in context.bits:
            continue
        (row,) = trained.widths(name, (bits,))
        result = row()
        if result is None:
            yield {"row": methods.find(name).title, "bits": bits, "note": "diverged"}
            continue
        results.append((bits, result))
        for run in rows_lib.runs(result):
            found = {"row": run.title, "bits": bits, "seed": run.seed, "start": run.start}
            if methods.find(name).floats:
                found["full precision"] = round(run.full_precision, 3)
            found["low precision"] = round(run.quantized, 3)
            yield found | {"file KB": round(run.nbytes / 1000, 2)}
    for bits in dict.fromkeys(bits for bits, _ in results):
        yield {"bits": bits, "ranks": ranks([mine for of, mine in results if of == bits])}


def ranks(results: Sequence[Result]) -> str:
    """Returns titles from the best on: ` > ` where a paired test tells neighbours apart, else `, `.

    The test is McNemar's over the test examples of all seeds, at 5 percent.
    """
    sign = results[0].metric.sign
    ordered = sorted(results, key=lambda result: -sign * result.quantized)
    told = ordered[0].title
    for better, worse in itertools.pairwise(ordered):
        told += (" > " if rows_lib.told_apart(better, worse) else ", ") + worse.title
    return told
