"""Quantized layer inputs, and packed kernels, for any Flax NNX model, without editing it."""

from quantjax.nnx.input_layers import (
    LAYERS,
    ActQuant,
    QuantParam,
    QuantStat,
    calibrate,
    quantize_inputs,
)
from quantjax.nnx.packed_layers import PackedKernel, packed

__all__ = [
    "LAYERS",
    "ActQuant",
    "PackedKernel",
    "QuantParam",
    "QuantStat",
    "calibrate",
    "packed",
    "quantize_inputs",
]
