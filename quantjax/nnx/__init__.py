"""Quantized inputs and weights, packed kernels and batch norms of any Flax NNX model, unedited."""

from quantjax.nnx.batch_norm import fold_batch_norm, reestimate_batch_norm
from quantjax.nnx.input_layers import (
    LAYERS,
    ActQuant,
    QuantParam,
    QuantStat,
    calibrate,
    quantize_inputs,
)
from quantjax.nnx.packed_layers import PackedKernel, packed
from quantjax.nnx.weights import QuantizedWeights, quantize_weights

__all__ = [
    "LAYERS",
    "ActQuant",
    "PackedKernel",
    "QuantParam",
    "QuantStat",
    "QuantizedWeights",
    "calibrate",
    "fold_batch_norm",
    "packed",
    "quantize_inputs",
    "quantize_weights",
    "reestimate_batch_norm",
]
