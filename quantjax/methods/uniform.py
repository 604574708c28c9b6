"""Uniform grids for weights, and the zero target of sparse training.

The grid is the one of PSG: symmetric and narrow, -(2**(b-1)-1) .. 2**(b-1)-1 times one step per
leaf or group.
"""

import jax.numpy as jnp

from quantjax.core import checks, least_error, qarray, rounding
from quantjax.core.quantizer import Quantizer, described, leafwise


def symmetric_step(w, bits: int, axes=None):
    """Returns max|w| / (2**(bits-1) - 1) over `axes`, dims kept, in float32 or wider.

    Args:
      w: floats, a kernel to axes by name.
      bits: 2..16.
      axes: None or "tensor" (all), "channel" (all but the last), or counted from the end.

    Raises:
      ValueError: bits or axes out of range.
    """
    bits = checks.bits(bits, 2)
    axes = checks.group_axes(checks.axes(axes), "kernel", w)
    largest = jnp.max(jnp.abs(w), axis=axes, keepdims=True)
    return largest.astype(rounding.work_dtype(w.dtype)) / (2 ** (bits - 1) - 1)


def nearest(x, step, *, bits: int, signed: bool = True, narrow: bool = False):
    """Returns the nearest values of a uniform grid, with a clipped straight-through gradient.

    Args:
      x: floats of any shape.
      step: positive, broadcasts against x.
      bits: 1..16; 2..16 for narrow grids.
      signed: codes -2**(bits-1) .. 2**(bits-1)-1 rather than 0 .. 2**bits-1.
      narrow: with signed, codes -(2**(bits-1)-1) .. 2**(bits-1)-1.

    Raises:
      ValueError: bits outside their range, or narrow without signed.
    """
    bits = checks.bits(bits, 2 if narrow else 1)
    if narrow and not signed:
        raise ValueError("narrow=True needs signed=True: an unsigned grid has no lowest level")
    x = jnp.asarray(x)
    dtype = rounding.work_dtype(x.dtype)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    low, high = (jnp.asarray(bound, dtype) for bound in (low + narrow, high))
    step = jnp.asarray(step, dtype)
    return rounding.nearest_on_grid(x.astype(dtype), step, low, high).astype(x.dtype)


@described
def uniform(
    bits: int,
    *,
    axes=None,
    fit: str = "max",
    momentum: float | None = None,
    biases: bool = False,
) -> Quantizer:
    """Rounds weights to a narrow symmetric grid: that of their range, PSG's, or of least error.

    Args:
      bits: 2..16.
      axes: what shares one step: None or "tensor" (the whole leaf), "channel" (the last axis of a
        kernel, the rows of an embedding), axes counted from the end, {pattern: axes}, or a
        function (path, leaf) -> axes. Biases always have one step.
      fit: "max": the grid spans the range of the weights, and follows it. "error": the step of
        least squared error for the weights that `init` sees, which `update` keeps; at 2 and 3
        bits the better choice wherever weights are rounded, and never worse by that error.
      momentum: weight of the present range in the running one, in (0, 1]; None: `update` takes
        the range of the present weights. Only for fit="max".
      biases: also takes the bias beside every kernel.

    Ranges always include 0. The buffers are limit = 2**(bits-1) - 1, step, and for "max" low and
    high (the range), of which step = max(-low, high) / limit, 1 where that is 0.

    Raises:
      ValueError: bits, axes, fit or momentum; a state of another width or fit.
    """
    bits = checks.bits(bits, 2)
    checks.choice("fit", fit, ("max", "error"))
    checks.momentum(momentum)
    if fit == "error" and momentum is not None:
        raise ValueError(f"momentum={momentum!r} needs fit='max': a step of least error is kept")
    axes = checks.axes(axes)

    def init(path, leaf, key):
        del key
        low, high = _range(leaf, checks.group_axes(axes, path, leaf))
        limit = jnp.full_like(low, 2 ** (bits - 1) - 1)
        step = _step(low, high, limit)
        if fit == "error":
            step = least_error.step(leaf.astype(step.dtype), step, -limit, limit)
            return {}, {"limit": limit, "step": step}
        return {}, {"low": low, "high": high, "limit": limit, "step": step}

    def apply(leaf, learned, buffers, key):
        del learned, key
        limit, step = buffers["limit"], checks.fitting(buffers["step"], leaf)
        x = leaf.astype(step.dtype)
        return rounding.nearest_on_grid(x, step, -limit, limit).astype(leaf.dtype)

    def encode(leaf, learned, buffers):
        del learned
        limit, step = buffers["limit"], checks.fitting(buffers["step"], leaf)
        codes = rounding.to_codes(leaf.astype(step.dtype), step, -limit, limit)
        codes = codes.astype(qarray.code_dtype(bits))
        return qarray.Grid(codes, step, bits=bits, dtype=leaf.dtype, levels=2**bits - 1)

    def update(leaf, learned, buffers, key):
        del learned, key
        group = checks.fitting(buffers["low"], leaf).shape
        low, high = _range(leaf, tuple(axis for axis, kept in enumerate(group) if kept == 1))
        if momentum is not None:
            low = momentum * low + (1 - momentum) * buffers["low"]
            high = momentum * high + (1 - momentum) * buffers["high"]
        return {**buffers, "low": low, "high": high, "step": _step(low, high, buffers["limit"])}

    def check(learned, buffers):
        del learned
        ranges = {"low", "high"} if fit == "max" else set()
        checks.names({}, buffers, {}, {"limit", "step", *ranges})
        checks.width(checks.width_of_codes(buffers["limit"]), bits)

    moves = update if fit == "max" else None
    return leafwise(init, apply, encode, moves, biases=biases, check=check)


@described
def zero() -> Quantizer:
    """Sends every owned leaf to 0: the target of sparse training. It has no grid to encode to."""

    def to_zero(leaf):
        return leaf - leaf  # unlike zeros_like, it keeps the leaf's sharding

    return leafwise(
        init=lambda path, leaf, key: ({}, {}),
        apply=lambda leaf, learned, buffers, key: to_zero(leaf),
        encode=lambda leaf, learned, buffers: to_zero(leaf),
    )


def _range(x, axes):
    """Returns low <= 0 <= high over `axes` with kept dims, in float32 or wider."""
    x = x.astype(rounding.work_dtype(x.dtype))
    low = jnp.min(x, axis=axes, keepdims=True, initial=0)
    return low, jnp.max(x, axis=axes, keepdims=True, initial=0)


def _step(low, high, limit):
    return rounding.positive(jnp.maximum(-low, high) / limit)
