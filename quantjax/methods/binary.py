"""Binary weights (BWN; Rastegari et al., ECCV 2016): signs times the mean magnitude of a group."""

import jax.numpy as jnp

from quantjax.core import checks, qarray, rounding
from quantjax.core.quantizer import Quantizer, described, leafwise


@described
def binary(*, axes="channel", biases: bool = False) -> Quantizer:
    """Sends weights to sign(w) times the mean of |w|, the binary ones of least squared error.

    Args:
      axes: what shares a magnitude, as in `uniform`; the paper's filters by default. Biases have
        one.
      biases: also takes the bias beside every kernel.

    The sign of 0 is 1. `update` takes the magnitudes of the present weights (eq. 6). The gradient
    is straight-through, 1 for every weight; the paper multiplies it by the magnitude, and sets it
    to 0 beyond |w| = 1. Leaves encode as `MultiBit` with one basis.

    Raises:
      ValueError: axes; a state of another quantizer.
    """
    axes = checks.axes(axes)

    def magnitude(leaf, group):
        x = jnp.abs(leaf.astype(rounding.work_dtype(leaf.dtype)))
        return {"magnitude": jnp.mean(x, axis=group, keepdims=True)}

    def init(path, leaf, key):
        del key
        return {}, magnitude(leaf, checks.group_axes(axes, path, leaf))

    def signs(leaf):
        return jnp.where(leaf < 0, -1, 1)

    def apply(leaf, learned, buffers, key):
        del learned, key
        size = checks.fitting(buffers["magnitude"], leaf)
        value = signs(leaf).astype(size.dtype) * size
        return rounding.straight_through(leaf, value.astype(leaf.dtype))

    def encode(leaf, learned, buffers):
        del learned
        size = checks.fitting(buffers["magnitude"], leaf)[..., None]
        basis = signs(leaf).astype(jnp.int8)[..., None]
        return qarray.MultiBit(basis, size, jnp.ones_like(size, bool), dtype=leaf.dtype)

    def update(leaf, learned, buffers, key):
        del learned, key
        group = checks.fitting(buffers["magnitude"], leaf).shape
        return magnitude(leaf, tuple(axis for axis, kept in enumerate(group) if kept == 1))

    def check(learned, buffers):
        checks.names(learned, buffers, {}, {"magnitude"})

    return leafwise(init, apply, encode, update, biases=biases, check=check)
