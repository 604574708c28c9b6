"""Uniform grids for weights and for the inputs of layers, and the zero target of sparse training.

The weight grid is the one of PSG: symmetric and narrow, -(2**(b-1)-1) .. 2**(b-1)-1 times one
step per leaf or group. The input grid is asymmetric and holds zero exactly.
"""

import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, passes, qarray, rounding
from quantjax.core.quantizer import (
    InputQuantizer,
    Quantizer,
    QuantState,
    described,
    inputwise,
    leafwise,
)


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
    bits: int, *, axes=None, momentum: float | None = None, biases: bool = False
) -> Quantizer:
    """Rounds weights to the narrow symmetric grid that spans their range (PSG's target).

    Args:
      bits: 2..16.
      axes: what shares one step: None or "tensor" (the whole leaf), "channel" (the last axis of a
        kernel, the rows of an embedding), axes counted from the end, {pattern: axes}, or a
        function (path, leaf) -> axes. Biases always have one step.
      momentum: weight of the present range in the running one, in (0, 1]; None: `update` takes
        the range of the present weights.
      biases: also takes the bias beside every kernel.

    Ranges always include 0. The buffers are low, high (the range), limit = 2**(bits-1) - 1 and
    step = max(-low, high) / limit, 1 where that is 0.

    Raises:
      ValueError: bits, axes or momentum out of range; a state of another width.
    """
    bits = checks.bits(bits, 2)
    _check_momentum(momentum)
    axes = checks.axes(axes)

    def init(path, leaf, key):
        del key
        low, high = _range(leaf, checks.group_axes(axes, path, leaf))
        limit = jnp.full_like(low, 2 ** (bits - 1) - 1)
        return {}, {"low": low, "high": high, "limit": limit, "step": _step(low, high, limit)}

    def apply(leaf, learned, buffers, key):
        del learned, key
        limit, step = buffers["limit"], checks.fitting(buffers["step"], leaf)
        x = leaf.astype(step.dtype)
        return rounding.nearest_on_grid(x, step, -limit, limit).astype(leaf.dtype)

    def encode(leaf, learned, buffers):
        del learned
        limit, step = buffers["limit"], checks.fitting(buffers["step"], leaf)
        codes = rounding.to_codes(leaf.astype(step.dtype), step, -limit, limit)
        return qarray.Grid(codes.astype(qarray.code_dtype(bits)), step, bits=bits, dtype=leaf.dtype)

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
        checks.width(checks.width_of_codes(buffers["limit"]), bits)

    return leafwise(init, apply, encode, update, biases=biases, check=check)


@described
def uniform_input(bits: int, *, momentum: float = 0.1, axis_name=None) -> InputQuantizer:
    """Quantizes activations on an asymmetric grid that holds zero exactly.

    Args:
      bits: 1..16.
      momentum: weight of the present pass in the running range, in (0, 1].
      axis_name: of `pmap` or `shard_map`, over whose devices ranges are taken, too.

    The range is the first pass's, then a running mean; `linen.calibrate_batch_norm` fits it to
    batch norm's parameters instead. Values are (code - zero_point) * step, codes 0 .. 2**bits - 1.
    NaN and infinity have no part in ranges; a batch without finite values leaves them.

    Raises:
      ValueError: bits or momentum out of range; a state of another width.
    """
    bits = checks.bits(bits, 1)
    _check_momentum(momentum)

    def grid(low, high, levels):
        step = _positive((high - low) / levels)
        zero_point = jnp.clip(jnp.round(-low * (1 / step)), 0, levels)
        return {"low": low, "high": high, "levels": levels, "step": step, "zero_point": zero_point}

    def extent(x):
        x = x.astype(rounding.work_dtype(x.dtype))
        return passes.least(x, axis_name), passes.most(x, axis_name)

    def init(x):
        low, high = extent(x)
        found = grid(*_with_zero(low, high), jnp.full_like(low, 2**bits - 1))
        return QuantState({}, {**found, "pass_low": low, "pass_high": high, **passes.buffer()})

    def move(x, buffers):
        begins, infinity = buffers[passes.JOINS] == passes.NEW, jnp.asarray(jnp.inf, x.dtype)
        before = (
            jnp.where(begins, infinity, buffers["pass_low"]),
            jnp.where(begins, -infinity, buffers["pass_high"]),
        )
        present = extent(x)
        union = jnp.minimum(before[0], present[0]), jnp.maximum(before[1], present[1])
        nothing_before, nothing = before[0] > before[1], union[0] > union[1]
        weight = passes.weight(buffers, momentum, x.dtype)

        def running(old, before, union):
            before = jnp.where(nothing_before, old, before)
            return jnp.where(nothing, old, weight * union + (old - weight * before))

        old = buffers["low"], buffers["high"]
        low, high = map(running, old, _with_zero(*before), _with_zero(*union))
        ends = {"pass_low": union[0], "pass_high": union[1]}
        return {**buffers, **grid(low, high, buffers["levels"]), **ends}

    def apply(x, state, key, update):
        del key
        buffers = state.buffers
        wide = x.astype(buffers["step"].dtype)
        if update:
            buffers = move(lax.stop_gradient(wide), buffers)
        step, zero_point = buffers["step"], buffers["zero_point"]
        # (code - zero_point) * step with codes 0..levels: the grid shifted by whole codes.
        low, high = -zero_point, buffers["levels"] - zero_point
        x_hat = rounding.nearest_on_grid(wide, step, low, high)
        return x_hat.astype(x.dtype), state._replace(buffers=buffers)

    def check(learned, buffers):
        del learned
        checks.width(checks.width_of_codes(buffers["levels"]) - 1, bits)  # codes without a sign

    return inputwise(init, apply, check)


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


def _with_zero(low, high):
    return jnp.minimum(low, 0), jnp.maximum(high, 0)


def _step(low, high, limit):
    return _positive(jnp.maximum(-low, high) / limit)


def _positive(step):
    # Below the smallest normal number 1 / step overflows.
    return jnp.where(step >= jnp.finfo(step.dtype).tiny, step, 1)


def _check_momentum(momentum):
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"momentum must be in (0, 1], got {momentum!r}")
