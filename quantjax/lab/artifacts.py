"""The commands on a saved network: `quantjax inspect`, `evaluate` and `export`."""

import ast
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import quantjax as qj
from quantjax.core import qarray
from quantjax.core.quantizer import InputQuantizer
from quantjax.encoded import export as export_lib
from quantjax.encoded import onnx, packed, storage, summary
from quantjax.lab import data, models
from quantjax.lab.names import nearest_name_error
from quantjax.lab.report import layers, plots
from quantjax.lab.train import engine, evaluation, tasks

INPUTS = {
    maker.__name__: maker
    for maker in (
        *(qj.uniform_input, qj.srq_input, qj.rq_input, qj.lsq_input),
        *(qj.pact_input, qj.dorefa_input, qj.multi_bit_input),
    )
}
CHECKED = 16  # test examples


def inspect(path: Path, folder: Path | None = None, tell=None):
    """Prints what a file holds, leaf by leaf, after comparing its digests.

    Args:
      path: of a file that `qj.save` has written.
      folder: for pictures of bits and weights by layer; None: none are drawn.
      tell: what prints; None: the console.

    Raises:
      As `qj.load`.
    """
    tell = Console().print if tell is None else tell
    found = storage.inspect(path)
    leaves = found.decoded()
    tell(summary.of_file(found, leaves))
    for name, value in found.metadata.items():
        tell(f"{name}: {value}", markup=False, highlight=False)
    if folder is None:
        return
    leaves = {name: leaf for name, leaf in leaves.items() if qarray.is_encoded(leaf)}
    if not leaves:
        raise ValueError(f"{path}: no encoded leaves to draw")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("bits", layers.bits(leaves)), ("weights", layers.weights(leaves))):
        (folder / f"{name}.png").write_bytes(plots.png(figure))
    tell(f"pictures: {folder}")


def evaluate(
    path: Path,
    dataset: str | None = None,
    model: str | None = None,
    data_dir: Path | None = None,
    tell=None,
) -> tasks.Score:
    """Returns loss and accuracy of a saved network on the test examples of a data set.

    Args:
      path: of the file.
      dataset, model: as in `quantjax compare`; None: what the file's metadata say. Its metadata
        may also have `inputs`, the repr of the quantizer of the layers' inputs or of a dict of
        them by pattern, and `mean` and `std`, if other than the data set's.
      data_dir: where prepared TFDS sets lie.
      tell: what prints the score by the task's metric; None: nothing is printed.

    Raises:
      ValueError: the file names no data set or model and none is given, is of another network, or
        of images where the data are text or the other way round.
    """
    task, variables, inputs = _network(path, dataset, model, data_dir)
    score = evaluation.make_evaluate(task, inputs)(qarray.decode(variables), task.dataset.test)
    if tell is not None:
        tell(task.metric.told(score))
    return score


def export(
    path: Path,
    out: Path,
    dataset: str | None = None,
    model: str | None = None,
    data_dir: Path | None = None,
    *,
    platforms: tuple[str, ...] = export_lib.PLATFORMS,
    batch: int | None = None,
    pixels: bool = False,
    tell=print,
):
    """Writes a saved network as a program that needs no quantjax, and compares their logits.

    It takes what the model takes: float32 images, normalised with the mean and the deviation that
    are told, or int32 bytes of text.

    Args:
      path, dataset, model, data_dir: as in `evaluate`.
      out: of the program: ONNX where it ends in `.onnx`, else StableHLO, as `qj.export` has it.
      platforms: that StableHLO runs on.
      batch: rows of its input; None: any number.
      pixels: it takes uint8, as the data set has it: images, which it normalises itself, or bytes.
      tell: what prints.

    Raises:
      ValueError: as in `evaluate` and `qj.export`, a package is missing, or ONNX Runtime has no
        kernel for what the network does.
      OSError: the program cannot be written; an old one is as it was.
    """
    task, variables, inputs = _network(path, dataset, model, data_dir)
    of_model = engine.model_apply(task.model, inputs)

    def apply(variables, x):
        return of_model(variables, task.inputs(x) if pixels else x, train=False)

    examples = task.dataset.test[0][: batch or CHECKED]
    examples = np.resize(examples, (batch or len(examples), *examples.shape[1:]))
    x = examples if pixels else np.asarray(task.inputs(examples))
    as_onnx = out.suffix == ".onnx"
    try:
        if as_onnx:
            program = onnx.export_onnx(apply, variables, x, batch=batch)
        else:
            shipped, run = variables, apply
            if batch is not None and batch <= packed.FEW:  # products by tables are faster
                shipped = {**variables, "params": packed.pack(variables["params"])}
                run = qj.linen.packed(apply)
            program = export_lib.export(run, shipped, x, batch=batch, platforms=platforms)
    except ImportError as error:
        raise ValueError(str(error)) from error
    found = (_run_onnx if as_onnx else _run)(program, x)
    storage.replace(out, program)
    runs = "ONNX" if as_onnx else f"StableHLO for {', '.join(platforms)}"
    tell(f"{out}: {runs}, {summary.size_text(len(program))}")
    shape = f"{x.dtype} [{batch or 'any'}, {', '.join(map(str, x.shape[1:]))}]"
    tell(f"it takes {shape}" + ("" if pixels else f", {task.how}"))
    if found is None:
        tell("not compared with the library: it does not run on this machine")
        return
    given = jax.jit(apply)(qarray.decode(variables), x)
    difference = np.abs(found - given).max()
    tell(f"logits of {len(x)} test {task.examples}: {difference:.1e} from the library's")


def _run(program, x):
    """Returns the logits of StableHLO, None where it is of other platforms."""
    exported = jax.export.deserialize(bytearray(program))
    here = jax.export.default_export_platform()
    return np.asarray(exported.call(x)) if here in exported.platforms else None


def _run_onnx(program, x):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of what it then raises
    try:
        session = onnxruntime.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]
    except Exception as error:  # its own have no class in common
        raise ValueError(f"ONNX Runtime does not run this network: {error}") from error


def _network(path, dataset, model, data_dir):
    """Returns the task, the encoded variables and the input quantizer of a saved network."""
    found = storage.inspect(path)
    told = {"dataset": dataset, "model": model}
    told = found.metadata | {k: v for k, v in told.items() if v is not None}
    for name in ("dataset", "model"):
        if not isinstance(told.get(name), str):
            raise ValueError(f"{path} names no {name}: give --{name}")
    loaded = data.load(told["dataset"], data_dir)
    for name in {"mean", "std"} & told.keys() & set(loaded._fields):
        loaded = loaded._replace(**{name: tuple(told[name])})
    shape = loaded.train[0].shape[1:]
    task = tasks.of(models.build(told["model"], loaded.classes, shape=shape), loaded)
    leaves = found.decoded()
    # Collections of input quantizers are the file's own; the others must be the model's.
    like = {**found.tree(leaves), **jax.eval_shape(lambda: task.init(0))}
    return task, found.tree(leaves, like), _inputs(told)


def _inputs(told) -> InputQuantizer | dict | None:
    text = told.get("inputs", "None")
    try:
        return _made(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, AttributeError) as error:
        raise ValueError(
            f"metadata say inputs={text!r}, which is no input quantizer: {error}"
        ) from None


def _made(node):
    """Returns what the repr of a quantizer, a dict of them or None says; nothing else is called."""
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key): _made(value) for key, value in pairs}
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if node.func.id not in INPUTS:
        raise nearest_name_error("input quantizer", node.func.id, INPUTS)
    arguments = map(ast.literal_eval, node.args)
    options = {option.arg: ast.literal_eval(option.value) for option in node.keywords}
    return INPUTS[node.func.id](*arguments, **options)
