"""What ships of a trained network: its weights encoded, and what that costs."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from quantjax import linen
from quantjax.core import qarray
from quantjax.core.quantizer import InputQuantizer, Quantizer, QuantState
from quantjax.encoded.summary import Row, Summary, summary
from quantjax.lab.train import tasks

EXAMPLES = 2000  # of the training set, for the statistics of batch norms after quantization


class Deployed(NamedTuple):
    """A network as it ships."""

    variables: dict  # with the decoded weights: what is evaluated
    encoded: Any  # params whose quantized leaves are Grid, Table or MultiBit
    summary: Summary  # beside the float weights

    @property
    def layers(self) -> list[Row]:
        """The rows of the quantized leaves, biases among them where they are quantized."""
        return [row for row in self.summary.rows if row.squared_error is not None]

    @property
    def bits(self) -> float:
        """Average bits per quantized weight."""
        sizes = [math.prod(row.shape) for row in self.layers]
        return sum(row.bits * size for row, size in zip(self.layers, sizes, strict=True)) / sum(
            sizes
        )

    @property
    def weight_error(self) -> float:
        """The MSE of PSG's table A1: squared errors of all quantized layers over their number.

        The bias beside a kernel is of its layer.
        """
        found = {row.path for row in self.layers}
        kernels = {path.removesuffix("kernel") for path in found if path.endswith("kernel")}
        biases = {f"{layer}bias" for layer in kernels} & found
        return sum(row.squared_error for row in self.layers) / len(found - biases)


def deploy(variables: Mapping, quantizer: Quantizer, state: QuantState | None = None) -> Deployed:
    """Encodes the params of a network.

    Args:
      variables: of the float network.
      quantizer: what it ships in.
      state: trained with it; None: fitted to the final weights.
    """
    params = variables["params"]
    encoded = quantizer.encode(params, quantizer.init(params) if state is None else state)
    shipped = {**variables, "params": qarray.decode(encoded)}
    return Deployed(shipped, encoded, summary(encoded, params))


def reestimated(task: tasks.Task, variables: Mapping, inputs: InputQuantizer | None = None) -> dict:
    """Returns variables with batch norms' statistics of the first training examples.

    They are those of the weights at hand: what was rounded after training has others than its
    float network. Without batch norms nothing changes.

    Args:
      inputs: the quantizer of the layers' inputs, whose state the variables hold.
    """
    if "batch_stats" not in variables:
        return dict(variables)
    x = task.dataset.train[0]
    size = max(1, min(EXAMPLES, len(x)) // 4)
    x = x[: 4 * size]
    batches = [task.inputs(x[at : at + size]) for at in range(0, len(x), size)]
    apply = task.model.apply
    apply = apply if inputs is None else linen.quantize_inputs(apply, inputs)
    return linen.reestimate_batch_norm(apply, variables, batches, train=False)


def better_statistics(
    task: tasks.Task,
    evaluate: Callable,
    variables: Mapping,
    inputs: InputQuantizer | None = None,
) -> dict:
    """Returns variables with batch norms as they are, or re-estimated, by the training set.

    Re-estimation repairs what rounding has shifted; where little has, running statistics are as
    good. The loss on the examples of the re-estimation decides; of equals what there is stays.

    Args:
      task, variables, inputs: as in `reestimated`.
      evaluate: of `evaluation.make_evaluate`.
    """
    if "batch_stats" not in variables:
        return dict(variables)
    train = task.dataset.train
    seen = type(train)(*(part[:EXAMPLES] for part in train))
    ways = variables, reestimated(task, variables, inputs)
    return dict(min(ways, key=lambda way: evaluate(way, seen).loss))
