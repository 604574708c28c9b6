"""Which input quantizer takes which layer: what `linen` and `nnx` have in common."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from quantjax.core import paths as paths_lib
from quantjax.core.quantizer import InputQuantizer, Quantizer


def by_pattern(quantizer) -> dict[str, InputQuantizer | None]:
    """Returns {pattern: InputQuantizer | None}; a bare quantizer gets the pattern `.*`.

    Raises:
      ValueError: neither an InputQuantizer nor a filled dict of them.
    """
    quantizers = dict(quantizer) if isinstance(quantizer, Mapping) else {".*": quantizer}
    strange = [q for q in quantizers.values() if not isinstance(q, InputQuantizer | None)]
    if not quantizers or strange or not isinstance(quantizer, Mapping | InputQuantizer):
        weights = [q for q in strange if isinstance(q, Quantizer)]
        hint = (
            f"; {weights[0]!r} is a Quantizer, it takes trees of params. Inputs of layers take "
            "uniform_input, lsq_input, srq_input or multi_bit_input"
            if weights
            else ""
        )
        raise ValueError(
            f"expected an InputQuantizer or {{pattern: InputQuantizer | None}}, got "
            f"{quantizer!r}{hint}"
        )
    paths_lib.check_patterns(quantizers)
    return quantizers


def choose(quantizers: Mapping, where: str, path: str) -> InputQuantizer | None:
    """Returns the quantizer of the layer at `path`, None where it stays as it is."""
    pattern = paths_lib.first_match(quantizers, path) if paths_lib.matches(where, path) else None
    return None if pattern is None else quantizers[pattern]


def check_patterns(quantizers: Mapping, where: str, layers: Iterable[str]):
    """Raises ValueError, with the layers' paths, if a pattern owns none of them."""
    layers = list(dict.fromkeys(layers))
    if not layers:
        raise ValueError(
            "the model has no layer whose input could be quantized: Conv, ConvTranspose, and "
            "Dense, DenseGeneral (Linen, those it called) or Linear, LinearGeneral (NNX)"
        )
    considered = paths_lib.assign([where], layers)[where]
    paths_lib.assign(quantizers, considered)


def as_float(x, dtype):
    """Returns floats as they are, anything else as an array of `dtype`."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def refuse(number: int, bad: Mapping):
    """Raises ValueError for a batch that gives layers NaN or infinity.

    Args:
      number: of the batch.
      bad: {path: how many values}.
    """
    found = ", ".join(f"{path} ({count} values)" for path, count in bad.items() if count)
    if found:
        raise ValueError(
            f"batch {number} gives these layers inputs that are NaN or infinite: {found}; "
            "calibrate on finite batches"
        )
