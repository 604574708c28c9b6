"""Quantized layer inputs for any Flax Linen model, without editing it.

`quantize_inputs` wraps `model.apply`: an interceptor, entered inside the wrapped call and thus
inside whatever is jitted, hands every Conv and Dense layer its input through an `InputQuantizer`.
The state lives beside the params: collection `quant` holds what is learned, `quant_stats` the
buffers. `calibrate` fits it to data, `calibrate_batch_norm` to batch norm's parameters (PSG).
`packed` runs the model on kernels that stay packed. `fold_batch_norm` comes before quantization,
`reestimate_batch_norm` after it.
"""

from quantjax.linen.batch_norm import calibrate_batch_norm, search_batch_norm_range
from quantjax.linen.batch_norm_folding import fold_batch_norm
from quantjax.linen.batch_norm_statistics import reestimate_batch_norm
from quantjax.linen.calibration import calibrate
from quantjax.linen.layers import quantize_inputs
from quantjax.linen.packed_layers import packed

__all__ = [
    "calibrate",
    "calibrate_batch_norm",
    "fold_batch_norm",
    "packed",
    "quantize_inputs",
    "reestimate_batch_norm",
    "search_batch_norm_range",
]
