"""Ternary weights: TWN (Li et al., 2016), and the rounding of BitNet b1.58 (Ma et al., 2024)."""

import jax.numpy as jnp

from quantjax.core import checks, qarray, rounding
from quantjax.core.quantizer import Quantizer, described, leafwise

TWN_THRESHOLD = 0.7  # times mean|w|, eq. 6 of TWN
SCALES = ("kept", "all")


@described
def ternary(
    threshold: float = TWN_THRESHOLD, *, scale: str = "kept", axes=None, biases: bool = False
) -> Quantizer:
    """Sends weights to -s, 0 or s: those above threshold * mean|w| to s with their sign.

    Args:
      threshold: in units of mean|w|, > 0.
      scale: what s is: "kept", the mean magnitude of the weights above the threshold, the best s
        for them (TWN, eq. 5), or "all", mean|w|: `ternary(0.5, scale="all")` rounds w / mean|w|, as
        BitNet b1.58 does.
      axes: what shares threshold and scale, as in `uniform`; biases have one.
      biases: also takes the bias beside every kernel.

    `update` takes both from the present weights. The gradient is straight-through, 1 for every
    weight. Leaves encode as a narrow 2-bit `Grid`.

    Raises:
      ValueError: threshold, scale or axes; a state of another quantizer.
    """
    checks.number("threshold", threshold, "positive", lambda t: t > 0)
    checks.choice("scale", scale, SCALES)
    axes = checks.axes(axes)

    def measure(leaf, group):
        x = jnp.abs(leaf.astype(rounding.work_dtype(leaf.dtype)))
        mean = jnp.mean(x, axis=group, keepdims=True)
        if scale == "all":
            return {"threshold": threshold * mean, "scale": rounding.positive(mean)}
        kept = x > threshold * mean
        count = jnp.sum(kept, axis=group, keepdims=True, dtype=x.dtype)
        total = jnp.sum(jnp.where(kept, x, 0), axis=group, keepdims=True)
        size = rounding.positive(total / jnp.maximum(count, 1))
        return {"threshold": threshold * mean, "scale": size}

    def init(path, leaf, key):
        del key
        return {}, measure(leaf, checks.group_axes(axes, path, leaf))

    def codes(leaf, buffers):
        size = checks.fitting(buffers["scale"], leaf)
        x = leaf.astype(size.dtype)
        return jnp.where(jnp.abs(x) > buffers["threshold"], jnp.where(x < 0, -1, 1), 0), size

    def apply(leaf, learned, buffers, key):
        del learned, key
        found, size = codes(leaf, buffers)
        value = found.astype(size.dtype) * size
        return rounding.straight_through(leaf, value.astype(leaf.dtype))

    def encode(leaf, learned, buffers):
        del learned
        found, size = codes(leaf, buffers)
        found = found.astype(qarray.code_dtype(2))
        return qarray.Grid(found, size, bits=2, dtype=leaf.dtype, levels=3)

    def update(leaf, learned, buffers, key):
        del learned, key
        group = checks.fitting(buffers["scale"], leaf).shape
        return measure(leaf, tuple(axis for axis, kept in enumerate(group) if kept == 1))

    def check(learned, buffers):
        checks.names(learned, buffers, {}, {"threshold", "scale"})

    return leafwise(init, apply, encode, update, biases=biases, check=check)
