"""Neural networks of four bits and less, as pure functions:  import quantjax as qj."""

from quantjax.core.qarray import Grid, MultiBit, Table, decode
from quantjax.core.quantizer import (
    InputQuantizer,
    Quantizer,
    QuantState,
    chain,
    decay_mask,
    owned,
    partition,
)
from quantjax.core.summary import summary
from quantjax.methods.psg import position_scale, psg, scale_by_position, warp
from quantjax.methods.uniform import nearest, symmetric_step, uniform, uniform_input, zero

__all__ = [
    "Grid",
    "InputQuantizer",
    "MultiBit",
    "QuantState",
    "Quantizer",
    "Table",
    "chain",
    "decay_mask",
    "decode",
    "nearest",
    "owned",
    "partition",
    "position_scale",
    "psg",
    "scale_by_position",
    "summary",
    "symmetric_step",
    "uniform",
    "uniform_input",
    "warp",
    "zero",
]
