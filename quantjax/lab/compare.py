"""`quantjax compare`: methods side by side, from one full-precision network, on the same data."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape

from quantjax.lab import data, interrupts, methods, models
from quantjax.lab.models import networks
from quantjax.lab.recipes import check_writable, versions
from quantjax.lab.report import files, plots
from quantjax.lab.report import rows as rows_lib
from quantjax.lab.report.rows import Result
from quantjax.lab.train import tasks
from quantjax.lab.train.options import Options
from quantjax.lab.trained_rows import Rows

IMAGES = {"epochs": 5, "batch_size": 128, "seeds": (0,)}
DIGITS = {"epochs": 20, "batch_size": 32, "seeds": (0, 1, 2)}
TEXT = {"model": "text-small", "epochs": 3, "batch_size": 32, "seeds": (0,)}
QUICK = {"model": "small-cnn", "epochs": 4, "batch_size": 32, "limit": 2000, "seeds": (0,)}
QUICK_TEXT = {**QUICK, "model": "text-small", "epochs": 5, "limit": 500}
SEARCH = "quantjax run compare_settings --seeds 0 1 2"  # chose the settings of the rows
PAUSE = 30  # seconds between reports on the way: one takes a second
NOT_TOLD = ("out", "data_dir", "overwrite")  # nothing that is trained depends on them


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `quantjax compare` compares."""

    dataset: str = "digits"
    """digits, a TFDS set of images or text, or a directory of arrays or of a text."""
    model: str | None = None
    """A network, see `quantjax list`; by data set, or if --quick a small one, if not given."""
    methods: tuple[str, ...] | None = None
    """Rows of the table, see `quantjax list`, all, or module:function of your own; the usual ones,
    or if --quick four, if not given."""
    bits: tuple[int, ...] | None = None
    """Bit-widths, one row per method and width that it has; 2, or what is usual, if not given."""
    inputs: int | None = None
    """Bits of the layers' inputs: rows whose forward pass rounds weights train with them, others,
    such as PSG, ALQ and rounding, are calibrated afterwards; float if not given."""
    epochs: int | None = None
    """Epochs in full precision, and again for each row; by data set if not given."""
    batch_size: int | None = None
    """Images or windows of text per step; 32 for digits and text, 128 else, if not given."""
    seeds: tuple[int, ...] | None = None
    """A training each, of the weights, of the order of examples, and of whatever is drawn; 0 1 2
    for digits, 0 else or if --quick, if not given."""
    out: Path = Path("quantjax-report")
    """The folder of the report."""
    overwrite: bool = False
    """Write over the report of another comparison."""
    data_dir: Path | None = None
    """Where prepared TFDS sets lie."""
    limit: int | None = None
    """At most so many training and test images, or windows of text, drawn by a fixed seed."""
    quick: bool = False
    """A few epochs of a small network on 2,000 images or 500 windows, to try it: two minutes."""


def resolve(settings: Settings, shape: tuple[int, ...] | None = None) -> Settings:
    """Fills in the defaults that depend on the data set and checks all names and numbers.

    Args:
      shape: of an example; None: nothing is loaded yet, and where neither the data set's name nor
        the model says whether these are images or text, what depends on it stays open.

    Raises:
      ValueError: unknown method or model, width outside 1..16, counts below 1, no seed, or one
        below 0 or named twice, nothing to draw with, a model of images for text or the other way
        round, a folder that holds the report of another comparison; OSError: the report's folder
        cannot be written. All of it before anything is trained, and without `shape` all but the
        last before anything is loaded.
    """
    given = dataclasses.asdict(settings)
    filled = dataclasses.replace(
        settings, **{k: v for k, v in _usual(settings, shape).items() if given[k] is None}
    )
    filled = dataclasses.replace(filled, methods=methods.named(filled.methods))
    found = {name: methods.find(name).chosen(filled.bits) for name in filled.methods}
    for name, widths in found.items():
        for bits in widths:
            methods.plan_of(name, bits, 10)  # checks the width
        if filled.inputs is not None:
            methods.find(name).inputs(filled.inputs)
    if filled.bits == () or not any(found.values()):
        raise ValueError("nothing to compare: give at least one method and one width")
    if filled.seeds == ():
        raise ValueError("seeds must name at least one seed")
    if filled.seeds and (min(filled.seeds) < 0 or len(set(filled.seeds)) < len(filled.seeds)):
        raise ValueError(f"seeds must be different whole numbers from 0 on, got {filled.seeds}")
    for name in ("epochs", "batch_size", "limit"):
        count = getattr(filled, name)
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if filled.model is not None:
        models.build(filled.model, 10, shape=shape)
    plots.check()
    check_writable(filled.out)
    if None not in (filled.epochs, filled.model):
        check_folder(filled, describe(filled))
    return filled


def _usual(settings, shape) -> dict:
    """Returns the defaults, as far as they are known."""
    known = models.DEFAULTS.get(settings.dataset)
    usual = {"methods": methods.QUICK if settings.quick else methods.DEFAULT, "model": known}
    model = settings.model or known
    if model is None and shape is not None:
        model = models.default_model(settings.dataset, shape)
    if model is None:
        return usual
    text = model in networks.TEXT
    if settings.quick:
        return usual | (QUICK_TEXT if text else QUICK)
    images = DIGITS if settings.dataset == "digits" else IMAGES
    return usual | (TEXT if text else images)


def compare(settings: Settings, options: Options = Options()) -> list[Result]:  # noqa: B008
    """Runs the comparison, prints its table and writes its report; returns the rows.

    The report is written as rows come: an interrupted comparison leaves those it finished, and
    checkpoints beside it until it is complete.

    Raises:
      As `resolve` and `Options.session`.
    """
    settings = resolve(settings)
    dataset = data.load(settings.dataset, settings.data_dir)
    settings = resolve(settings, dataset.train[0].shape[1:])
    dataset = data.limited(dataset, settings.limit)
    about = {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_TOLD}
    with options.session(settings.out / "checkpoints", about, versions()):
        return _compare(settings, dataset)


def _compare(settings: Settings, dataset: data.Dataset | data.Text) -> list[Result]:
    first = jax.process_index() == 0  # of several processes one writes
    console = Console()
    described = describe(settings)
    results, complete, written = [], False, -math.inf
    try:
        for result in rows(settings, dataset, tell=console.print):
            results.append(result)
            if not first:
                continue
            files.write_network(settings.out, result)
            if time.monotonic() > written + PAUSE:
                files.write(settings.out, described, results, complete=False)
                written = time.monotonic()
            page = settings.out / "report.html"
            interrupts.tell(f"{page} holds the finished rows, {len(results)} so far")
            told = f"{result.title}, {result.bits:.3g} bits: {result.metric.text(result.quantized)}"
            console.print(f"[dim]{escape(told)} in {result.seconds:.0f} s[/]")
        complete = True
    finally:
        if results and first:
            page = files.write(settings.out, described, results, complete=complete)
            console.print(rows_lib.table(results))
            searched = f"Settings of rows: chosen on held-out training images of digits, {SEARCH}."
            for note in [*rows_lib.notes(results), searched]:
                console.print(f"[dim]{escape(note)}[/]", highlight=False)
            console.print(f"report: {page}")
    return results


def describe(settings: Settings) -> dict:
    """Returns the settings as the report shows them."""
    shown = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
        if name not in NOT_TOLD and value is not None
    }
    device = jax.devices()[0]
    command = " ".join(["quantjax", *sys.argv[1:]]) if sys.argv[1:2] == ["compare"] else ""
    about = {"device": device.device_kind, "versions": versions(), "command": command}
    return {**shown, "search": SEARCH, **about}


def rows(
    settings: Settings, dataset: data.Dataset | data.Text, tell: Callable = print
) -> Iterator[Result]:
    """Yields full precision first, then a row per method and width; tells of those that diverge.

    Args:
      settings: of `resolve`, given an example's shape.
      dataset: the loaded one, limited.
      tell: what prints.
    """
    shape = dataset.train[0].shape[1:]
    name = settings.model or models.default_model(settings.dataset, shape)
    model = models.build(name, dataset.classes, shape=shape)
    trained = Rows(
        tasks.of(model, dataset, augment=shape[0] >= 32),
        *(name, settings.dataset),
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seeds=settings.seeds,
        inputs=settings.inputs,
        tell=tell,
    )
    yield trained.full_precision()
    for method in settings.methods:
        for row in trained.widths(method, settings.bits):
            result = row()
            if result is not None:
                yield result


def check_folder(settings: Settings, described: dict):
    """Raises ValueError where the report's folder holds another comparison, with what differs."""
    there = files.read_settings(settings.out)
    if there is None or settings.overwrite:
        return
    mine = rows_lib.plain(described)
    names = [field.name for field in dataclasses.fields(settings) if field.name in {*mine, *there}]
    told = [
        f"{name} {there.get(name)!r}, here {mine.get(name)!r}"
        for name in names
        if there.get(name) != mine.get(name)
    ]
    if told:
        raise ValueError(
            f"{settings.out} holds the report of another comparison ({'; '.join(told)}): give "
            "another --out, or --overwrite"
        )
