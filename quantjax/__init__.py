"""Neural networks of four bits and less, as pure functions:  import quantjax as qj."""

import importlib

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
from quantjax.methods.focused import focused
from quantjax.methods.pruning import magnitude, n_m, pruned, surgery
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
    "focused",
    "linen",
    "magnitude",
    "n_m",
    "nearest",
    "nnx",
    "owned",
    "partition",
    "position_scale",
    "pruned",
    "psg",
    "scale_by_position",
    "summary",
    "surgery",
    "symmetric_step",
    "uniform",
    "uniform_input",
    "warp",
    "zero",
]


def __getattr__(name):
    if name in ("linen", "nnx"):  # only these need Flax
        return importlib.import_module(f"quantjax.{name}")
    raise AttributeError(f"module 'quantjax' has no attribute {name!r}")
