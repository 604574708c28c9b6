"""DoReFa-Net (Zhou et al., 2016): weights squeezed by tanh, activations cut to [0, 1]."""

import jax
import jax.numpy as jnp

from quantjax.core import checks, qarray, rounding
from quantjax.core.quantizer import (
    InputQuantizer,
    Quantizer,
    QuantState,
    described,
    inputwise,
    leafwise,
)


@described
def dorefa(bits: int, *, biases: bool = False) -> Quantizer:
    """Rounds tanh(w) / max|tanh(w)| to 2**bits even levels in [-1, 1] (eq. 9); no level is 0.

    Args:
      bits: 1..8. One bit is sign(w) times the mean magnitude of the leaf (eq. 7).
      biases: also takes the bias beside every kernel.

    All weights of a layer are of size 1, whatever they were: it is made for networks whose batch
    norms undo such scales. The maximum and the mean are buffers, which `update` takes from the
    present weights; no gradient goes through them. The gradient is straight-through for rounding
    and sign. Applied to what it gives, tanh squeezes once more: unlike other quantizers it does not
    give the same again.

    Raises:
      ValueError: bits; a state of another width or quantizer.
    """
    bits = checks.bits(bits, most=8)

    def measure(leaf):
        x = leaf.astype(rounding.work_dtype(leaf.dtype))
        size = jnp.mean(jnp.abs(x)) if bits == 1 else jnp.max(jnp.abs(jnp.tanh(x)))
        size = rounding.positive(size).reshape((1,) * leaf.ndim)
        return {"size": size, "levels": jnp.full_like(size, 2**bits - 1)}

    def scaled(leaf, buffers):
        """Places on the grid, from 0 to the number of levels less 1, and what one of them is."""
        size, levels = checks.fitting(buffers["size"], leaf), buffers["levels"]
        x = leaf.astype(size.dtype)
        if bits == 1:
            return jnp.where(x < 0, 0.0, 1.0).astype(x.dtype), size
        half = levels / 2
        return jnp.clip(jnp.round(jnp.tanh(x) * (half / size) + half), 0, levels), 1 / levels

    def values(places, unit, buffers):
        return (2 * places - buffers["levels"]) * unit

    def apply(leaf, learned, buffers, key):
        del learned, key
        places, unit = scaled(leaf, buffers)
        value = values(places, unit, buffers)
        x = leaf.astype(value.dtype)
        smooth = x if bits == 1 else jnp.tanh(x) / buffers["size"]
        return rounding.straight_through(smooth, value).astype(leaf.dtype)

    def encode(leaf, learned, buffers):
        del learned
        places, unit = scaled(leaf, buffers)
        index = jnp.arange(2**bits, dtype=unit.dtype).reshape((1,) * unit.ndim + (-1,))
        levels = values(index, unit[..., None], jax.tree.map(lambda b: b[..., None], buffers))
        codes = places.astype(qarray.code_dtype(bits, signed=False))
        return qarray.Table(codes, levels, bits=bits, dtype=leaf.dtype)

    def check(learned, buffers):
        checks.names(learned, buffers, {}, {"size", "levels"})
        checks.width(checks.width_of_codes(buffers["levels"]) - 1, bits)

    return leafwise(
        lambda path, leaf, key: ({}, measure(leaf)),
        apply,
        encode,
        lambda leaf, learned, buffers, key: measure(leaf),
        biases=biases,
        check=check,
    )


@described
def dorefa_input(bits: int) -> InputQuantizer:
    """Cuts layer inputs to [0, 1] and rounds them to 2**bits even levels (eq. 11).

    Args:
      bits: 1..8.

    The gradient is 1 in [0, 1] and 0 outside. There is nothing to fit: a network whose activations
    are larger needs a bounded nonlinearity, as in the paper, or batch norms before it.

    Raises:
      ValueError: bits; a state of another width.
    """
    bits = checks.bits(bits, most=8)

    def init(x):
        dtype = rounding.work_dtype(x.dtype)
        return QuantState({}, {"levels": jnp.asarray(2**bits - 1, dtype)})

    def apply(x, state, key, update):
        del key, update
        levels = state.buffers["levels"]
        wide = x.astype(levels.dtype)
        return rounding.nearest_on_grid(wide, 1 / levels, 0, levels).astype(x.dtype), state

    def check(learned, buffers):
        del learned
        checks.width(checks.width_of_codes(buffers["levels"]) - 1, bits)  # codes without a sign

    return inputwise(init, apply, check)
