"""What ships of a trained network: its weights encoded, and what that costs."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from quantjax.core import qarray
from quantjax.core.quantizer import Quantizer, QuantState
from quantjax.encoded.summary import Row, Summary, summary


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
