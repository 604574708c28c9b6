"""`quantjax compare`: methods side by side, from one full-precision network, on the same data."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from rich.console import Console

from quantjax.encoded import storage
from quantjax.lab import data, interrupts, methods, models
from quantjax.lab.deploy import better_statistics, deploy
from quantjax.lab.models import networks
from quantjax.lab.recipes import check_writable, versions
from quantjax.lab.report import files, plots
from quantjax.lab.report.rows import Result, table
from quantjax.lab.train import engine, evaluation, phases, tasks
from quantjax.lab.train.options import Options

IMAGES = {"epochs": 5, "batch_size": 128}
DIGITS = {"epochs": 20, "batch_size": 32}
TEXT = {"model": "text-small", "epochs": 3, "batch_size": 32}
QUICK = {"model": "small-cnn", "epochs": 4, "batch_size": 32, "limit": 2000}
QUICK_TEXT = {"model": "text-small", "epochs": 5, "batch_size": 32, "limit": 500}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `quantjax compare` compares."""

    dataset: str = "digits"
    """digits, a TFDS set of images or text, or a directory of arrays or of a text."""
    model: str | None = None
    """A network, see `quantjax list`; by data set, or if --quick a small one, if not given."""
    methods: tuple[str, ...] | None = None
    """Rows of the table, see `quantjax list`; the usual ones, or if --quick four, if not given."""
    bits: tuple[int, ...] | None = None
    """Bit-widths, one row per method and width that it has; 2, or what is usual, if not given."""
    epochs: int | None = None
    """Epochs in full precision, and again for each row; by data set if not given."""
    batch_size: int | None = None
    """Images or windows of text per step; 32 for digits and text, 128 else, if not given."""
    seed: int = 0
    """Of the weights, of the order of examples, and of whatever is drawn."""
    out: Path = Path("quantjax-report")
    """The folder of the report."""
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
      ValueError: unknown method or model, width outside 1..16, counts below 1, nothing to draw
        with, a model of images for text or the other way round; OSError: the report's folder
        cannot be written. All of it before anything is trained, and without `shape` all but the
        last before anything is loaded.
    """
    given = dataclasses.asdict(settings)
    filled = dataclasses.replace(
        settings, **{k: v for k, v in _usual(settings, shape).items() if given[k] is None}
    )
    found = {name: methods.find(name).chosen(filled.bits) for name in filled.methods}
    for name, widths in found.items():
        for bits in widths:
            methods.find(name).plan(bits, 10)  # checks the width
    if filled.bits == () or not any(found.values()):
        raise ValueError("nothing to compare: give at least one method and one width")
    for name in ("epochs", "batch_size", "limit"):
        count = getattr(filled, name)
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if filled.model is not None:
        models.build(filled.model, 10, shape=shape)
    plots.check()
    check_writable(filled.out)
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

    The report is written after every row: an interrupted comparison leaves those it finished, and
    checkpoints beside it until it is complete.

    Raises:
      As `resolve` and `Options.session`.
    """
    settings = resolve(settings)
    dataset = data.load(settings.dataset, settings.data_dir)
    settings = resolve(settings, dataset.train[0].shape[1:])
    dataset = data.limited(dataset, settings.limit)
    about = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("out", "data_dir")}
    with options.session(settings.out / "checkpoints", about, versions()):
        return _compare(settings, dataset)


def _compare(settings: Settings, dataset: data.Dataset | data.Text) -> list[Result]:
    first = jax.process_index() == 0  # of several processes one writes
    console = Console()
    described = describe(settings)
    results = []
    try:
        for result in rows(settings, dataset, tell=console.print):
            results.append(result)
            if not first:
                continue
            files.write_network(settings.out, result)
            page = files.write(settings.out, described, results, complete=False)
            interrupts.tell(f"{page} holds the finished rows, {len(results)} so far")
            console.print(
                f"[dim]{result.title}, {result.bits:g} bits: "
                f"{result.metric.text(result.quantized)} in {result.seconds:.0f} s[/]"
            )
        if first:
            files.write(settings.out, described, results)
    finally:
        if results and first:
            console.print(table(results))
            console.print(f"report: {page}")
    return results


def describe(settings: Settings) -> dict:
    """Returns the settings as the report shows them."""
    shown = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(settings).items()
        if name not in ("out", "data_dir") and value is not None
    }
    device = jax.devices()[0]
    command = " ".join(["quantjax", *sys.argv[1:]]) if sys.argv[1:2] == ["compare"] else ""
    return {**shown, "device": device.device_kind, "versions": versions(), "command": command}


def rows(
    settings: Settings, dataset: data.Dataset | data.Text, tell: Callable = print
) -> Iterator[Result]:
    """Yields full precision first, then a row per method and width; tells of those that diverge.

    Args:
      settings: of `resolve`, given an example's shape.
      dataset: the loaded one, limited.
      tell: what prints.
    """
    x = dataset.train[0]
    shape = x.shape[1:]
    name = settings.model or models.default_model(settings.dataset, shape)
    model = models.build(name, dataset.classes, shape=shape)
    task = tasks.of(model, dataset, augment=shape[0] >= 32)
    metric, evaluate = task.metric, evaluation.make_evaluate(task)
    total = settings.epochs * max(1, len(x) // settings.batch_size)

    def scored(variables):
        return metric.of(evaluate(variables, dataset.test))

    def run(label, method, steps, variables):
        phase = phases.Phase(label, method, total, steps)
        return phases.run(
            task,
            [phase],
            variables,
            lambda variables: metric.sign * scored(_plain(variables)),
            batch_size=settings.batch_size,
            seed=settings.seed,
            every=-(-total // 10),
        )

    def file(method, bits, encoded, variables, score):
        """Returns the file of a network, which `quantjax evaluate` reads with nothing beside it."""
        told = {"model": name, "dataset": settings.dataset, "classes": dataset.classes}
        told |= {"method": method, "bits": bits, "seed": settings.seed, metric.name: score}
        return storage.to_bytes({**variables, "params": encoded}, metadata=told)

    began = time.monotonic()
    first = task.init(settings.seed)
    method = methods.full_precision(total)
    full = run("full precision", method, None, first)
    trained = _plain(full.variables)
    score = metric.sign * full.final_score
    whole = file("float", 32, trained["params"], trained, score)
    yield Result(
        method="float",
        title="full precision",
        bits=32,
        full_precision=score,
        quantized=score,
        nbytes=len(whole),
        compression=1.0,
        weight_error=0.0,
        seconds=time.monotonic() - began,
        curve=_curve(full, metric),
        params=trained["params"],
        encoded=trained["params"],
        file=whole,
        metric=metric,
    )
    for key in settings.methods:
        entry = methods.find(key)
        start = trained if entry.pretrained else first
        steps = None
        for bits in entry.chosen(settings.bits):
            began = time.monotonic()
            plan = entry.plan(bits, total)
            outcome = full
            if plan.method is not None:
                # One compiled step serves all widths: they differ in their states alone.
                if steps is None or not entry.shared:
                    steps = engine.make_steps(task, plan.method)
                try:
                    outcome = run(f"{entry.title}, {bits} bits", plan.method, steps, start)
                except FloatingPointError as error:
                    tell(f"{error}; it has no row")
                    continue
            variables = _plain(outcome.variables)
            if plan.deploy is None:
                shipped = deploy(variables, plan.method.quantizer, outcome.state)
            else:
                state = None if plan.trained is None else plan.trained(outcome.opt_state)
                shipped = deploy(variables, plan.deploy, state)
            deployed = better_statistics(task, evaluate, shipped.variables)
            score = scored(deployed)
            packed = file(key, shipped.bits, shipped.encoded, deployed, score)
            yield Result(
                method=key,
                title=entry.title,
                bits=shipped.bits,
                full_precision=metric.sign * outcome.final_score,
                quantized=score,
                nbytes=len(packed),
                compression=len(whole) / len(packed),
                weight_error=shipped.weight_error,
                seconds=time.monotonic() - began,
                curve=_curve(outcome, metric),
                params=variables["params"],
                encoded=shipped.encoded,
                file=packed,
                metric=metric,
            )


def _plain(variables: dict) -> dict:
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}


def _curve(outcome: phases.Outcome, metric: tasks.Metric) -> tuple:
    return tuple((p.step, p.loss, metric.sign * p.score) for p in outcome.history)
