"""The commands on a saved network: `quantjax inspect` and `quantjax evaluate`."""

import ast
from pathlib import Path

import jax
from rich.console import Console

import quantjax as qj
from quantjax.core import qarray
from quantjax.core.quantizer import InputQuantizer
from quantjax.encoded import storage, summary
from quantjax.lab import data, models
from quantjax.lab.names import nearest_name_error
from quantjax.lab.report import layers, plots
from quantjax.lab.train import engine

INPUTS = {
    maker.__name__: maker
    for maker in (
        *(qj.uniform_input, qj.srq_input, qj.rq_input, qj.lsq_input),
        *(qj.pact_input, qj.dorefa_input, qj.multi_bit_input),
    )
}


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
    tell(summary.of_file(path))
    for name, value in storage.inspect(path).metadata.items():
        tell(f"{name}: {value}", markup=False, highlight=False)
    if folder is None:
        return
    leaves = {
        name: leaf
        for name, leaf in storage.flatten(storage.load(path))[0].items()
        if qarray.is_encoded(leaf)
    }
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
) -> engine.Score:
    """Returns loss and accuracy of a saved network on the test images of a data set.

    Args:
      path: of the file.
      dataset, model: as in `quantjax compare`; None: what the file's metadata say. Its metadata
        may also have `inputs`, the repr of the quantizer of the layers' inputs or of a dict of
        them by pattern, and `mean` and `std`, if other than the data set's.
      data_dir: where prepared TFDS sets lie.

    Raises:
      ValueError: the file names no data set or model and none is given, or is of another network.
    """
    told = {"dataset": dataset, "model": model}
    told = storage.inspect(path).metadata | {k: v for k, v in told.items() if v is not None}
    for name in ("dataset", "model"):
        if not isinstance(told.get(name), str):
            raise ValueError(f"{path} names no {name}: give --{name}")
    loaded = data.load(told["dataset"], data_dir)
    for name in {"mean", "std"} & told.keys():
        loaded = loaded._replace(**{name: tuple(told[name])})
    task = engine.Task(models.build(told["model"], loaded.classes), loaded)
    tree = storage.load(path)
    # Collections of input quantizers are the file's own; the others must be the model's.
    like = {**tree, **jax.eval_shape(lambda: task.init(0))}
    variables = qarray.decode(storage.load(path, like=like))
    return engine.make_evaluate(task, _inputs(told))(variables, loaded.test)


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
