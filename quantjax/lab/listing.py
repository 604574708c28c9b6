"""What there is: methods, models, data sets and recipes, each with a line (`quantjax list`)."""

import inspect
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from quantjax.lab import data, methods, models, recipes


def show(data_dir: Path | None = None, console: Console | None = None):
    """Prints all four lists.

    Args:
      data_dir: where prepared TFDS sets lie; None: where TFDS keeps its data.
      console: to print to; None: stdout.
    """
    console = Console() if console is None else console
    parts = {
        "methods, for `quantjax compare --methods`": _methods(),
        "models, for --model": _models(),
        "data sets, for --dataset": _datasets(data_dir),
        "recipes, for `quantjax run`": _recipes(),
    }
    for title, lines in parts.items():
        table = Table(
            title=title, title_justify="left", box=None, show_header=False, pad_edge=False
        )
        table.add_column(no_wrap=True)
        table.add_column()
        for name, told in lines:
            table.add_row(f"  {name}", told)
        console.print(table, markup=False)
        console.print()


def _methods() -> Iterable[tuple[str, str]]:
    for name, entry in methods.METHODS.items():
        low, high = entry.widths[0], entry.widths[-1]
        if high == 32:
            widths = "float weights"
        else:
            widths = f"{low} to {high} bits" if high > low else f"{low} bit{'s'[: low > 1]}"
        default = "; by default" if name in methods.DEFAULT else ""
        yield name, f"{entry.title}; {widths}{default}"
    yield methods.ALL, "All of these."
    yield "module:function", "Of your own, (bits, total steps) -> quantjax.lab.plans.Plan."


def _models() -> Iterable[tuple[str, str]]:
    for name, make in models.MODELS.items():
        told = ""
        if isinstance(make, partial):
            told = "".join(f" Depth {n}." for n in make.args)
            told += " With batch norm." if make.keywords.get("batch_norm") else ""
            make = make.func
        yield name, inspect.getdoc(make).partition("\n")[0] + told


def _datasets(data_dir) -> Iterable[tuple[str, str]]:
    yield "digits", "1,797 images of 8x8, in scikit-learn: nothing to prepare."
    for name, where in data.prepared(data_dir).items():
        yield name, f"Prepared in {where}."
    arrays = ", ".join(data.ARRAYS)
    yield "a directory", f"Of .npy or .npz arrays: {arrays}. Or of train.txt and test.txt."
    kinds = "of image classification, or with strings named text"
    yield "any other", f"TFDS set {kinds}, prepared as ArrayRecord under --data-dir."


def _recipes() -> Iterable[tuple[str, str]]:
    found = recipes.known_recipes()
    for name, file in found.items():
        yield name, recipes.title(file)
    if not found:
        yield "none here", recipes.WHERE
