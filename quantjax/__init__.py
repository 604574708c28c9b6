"""Neural networks of four bits and less, as pure functions:  import quantjax as qj."""

import importlib
import importlib.metadata

from quantjax.core import rounding
from quantjax.core.combinators import chain, named, partition
from quantjax.core.qarray import Grid, MultiBit, Table, decode
from quantjax.core.quantizer import (
    InputQuantizer,
    Quantizer,
    QuantState,
    decay_mask,
    leafwise,
    owned,
)
from quantjax.core.stacked import stacked
from quantjax.encoded.export import export
from quantjax.encoded.packed import Packed, pack
from quantjax.encoded.storage import load, save
from quantjax.encoded.summary import summary
from quantjax.methods.alq.multibit import average_bits, multi_bit, sketch, storage_bits
from quantjax.methods.alq.multibit_input import multi_bit_input
from quantjax.methods.alq.schedule import Phase, alq_rounds
from quantjax.methods.alq.transformation import alq, alq_params, alq_state
from quantjax.methods.amsgrad import projected_amsgrad
from quantjax.methods.binary import binary
from quantjax.methods.dorefa import dorefa, dorefa_input
from quantjax.methods.fq.focused import focused
from quantjax.methods.lsq import lsq, lsq_input
from quantjax.methods.pact_input import pact_input
from quantjax.methods.proximal import (
    annealed,
    binary_relax,
    hard,
    parq,
    proximal,
    proximal_params,
    proximal_state,
)
from quantjax.methods.pruning import magnitude, n_m, pruned, surgery
from quantjax.methods.psg import position_scale, psg, scale_by_position, warp
from quantjax.methods.srq.relaxed import rq, rq_input
from quantjax.methods.srq.semi_relaxed import srq, srq_input
from quantjax.methods.ternary import ternary
from quantjax.methods.uniform import nearest, symmetric_step, uniform, zero
from quantjax.methods.uniform_input import uniform_input

__all__ = [
    "Grid",
    "InputQuantizer",
    "MultiBit",
    "Packed",
    "Phase",
    "QuantState",
    "Quantizer",
    "Table",
    "alq",
    "alq_params",
    "alq_rounds",
    "alq_state",
    "annealed",
    "average_bits",
    "binary",
    "binary_relax",
    "chain",
    "decay_mask",
    "decode",
    "dorefa",
    "dorefa_input",
    "export",
    "focused",
    "hard",
    "leafwise",
    "linen",
    "load",
    "lsq",
    "lsq_input",
    "magnitude",
    "multi_bit",
    "multi_bit_input",
    "n_m",
    "named",
    "nearest",
    "nnx",
    "owned",
    "pack",
    "pact_input",
    "parq",
    "partition",
    "position_scale",
    "projected_amsgrad",
    "proximal",
    "proximal_params",
    "proximal_state",
    "pruned",
    "psg",
    "rounding",
    "rq",
    "rq_input",
    "save",
    "scale_by_position",
    "sketch",
    "srq",
    "srq_input",
    "stacked",
    "storage_bits",
    "summary",
    "surgery",
    "symmetric_step",
    "ternary",
    "uniform",
    "uniform_input",
    "warp",
    "zero",
]


FLAX = ("linen", "nnx")  # only these need Flax, so they are imported at their first use


def __getattr__(name):
    if name in FLAX:
        return importlib.import_module(f"quantjax.{name}")
    if name == "__version__":
        return importlib.metadata.version("quantjax")
    raise AttributeError(f"module 'quantjax' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *FLAX, "__version__"})
