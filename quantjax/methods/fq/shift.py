"""Levels of Focused Quantization: sums of a mean and a power of two, and which is the nearest.

A leaf's levels follow from a few numbers in its buffers: mean and std of c- and c+, the bias, the
number of levels per component, and whether the layer is recentred. All of it is exact: integers,
powers of two and one addition; a fixed-point input is multiplied by shifts and additions. FQ n is
a number in the notes to the paper.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.core import checks, order_statistics

EXPONENTS = (-126, 127)  # of normal float32 numbers


def shift_levels(bits: int, bias: int):
    """Returns +-2**(e - bias), e in 0 .. 2**(bits-1) - 1, ascending (FQ 2): [2**bits] float32.

    Raises:
      ValueError: bits outside 1..8.
    """
    checks.bits(bits, 1, 8)
    sizes = 2.0 ** (np.arange(2 ** (bits - 1)) - bias)
    return jnp.asarray(np.concatenate([-sizes[::-1], sizes]), jnp.float32)


def focused_levels(bits: int, alpha, mean, std, bias):
    """Returns the levels of c- and of c+, ascending, [2**(bits-1) - 1] each (FQ 9).

    Inner shift quantization has bits - 1 bits; std is rounded to a power of two; the largest level
    of c- and the smallest of c+ are left out.

    Args:
      bits: 3..8.
      alpha: the layer's factor, a scalar.
      mean, std: of c- and c+, two numbers each.
      bias: the layer's b, an integer.

    Raises:
      ValueError: bits out of range.
    """
    checks.bits(bits, 3, 8)
    both = table(
        {
            "mean": jnp.asarray(mean, jnp.float32),
            "std": power_of_two(jnp.asarray(std, jnp.float32)),
            "bias": jnp.asarray(bias, jnp.int32),
            "recentred": jnp.asarray(True),
            "limit": jnp.asarray(2 ** (bits - 1) - 1, jnp.int32),
        },
        bits,
    )
    return tuple(jnp.asarray(alpha, jnp.float32) * levels for levels in both)


class Choice(NamedTuple):
    """Where a weight goes: its level is mean + sign * 2**exponent of its component."""

    alive: jax.Array  # bool: not pruned
    positive: jax.Array  # bool: of c+
    below: jax.Array  # bool: below the mean, sign = -1
    exponent: jax.Array  # int32


class Range(NamedTuple):
    """The exponents of the levels of c- and c+, [..., 2] int32 each."""

    lowest: jax.Array  # on both sides of the mean
    below: jax.Array  # largest below the mean; lowest - 1: there are none
    above: jax.Array


def exponents(buffers: Mapping) -> Range:
    """Returns the exponents of a leaf's levels, std included."""
    limit, bias = buffers["limit"][..., None], buffers["bias"][..., None]
    recentred = buffers["recentred"][..., None]
    # Recentred: e in 0..E, E = 2**(bits-2) - 1, both sides, but the largest of c- and the smallest
    # of c+ (FQ 9). Plain: e in 1..E, E = 2**(bits-1) - 1, a side each (FQ 7).
    spread = jnp.where(recentred, exponent_of(buffers["std"]), 0)
    top = jnp.where(recentred, (limit - 1) // 2, limit) - bias + spread
    lowest = jnp.where(recentred, 0, 1) - bias + spread
    minus = jnp.arange(2) == 0
    none = jnp.where(recentred, top - 1, lowest - 1)
    outer = minus.reshape((1,) * (top.ndim - 1) + (2,))
    return Range(lowest, jnp.where(outer, top, none), jnp.where(outer, none, top))


def choose(w, buffers: Mapping) -> Choice:
    """Returns the nearest level, in value, of the component of every weight of a leaf.

    Of two equally near levels it is the one farther from the mean.
    """
    x = w.astype(jnp.float32)
    positive = is_positive(x, buffers)
    beyond = x - of_component(positive, buffers["mean"])
    below = beyond < 0
    span = exponents(buffers)
    top = jnp.where(below, of_component(positive, span.below), of_component(positive, span.above))
    # Half a unit of the exponent more carries from 1.5 * 2**p on: nearest in value.
    nearest = (order_statistics.magnitude_keys(beyond) + (1 << 22) >> 23) - 127
    exponent = jnp.clip(nearest, of_component(positive, span.lowest), top)
    return Choice(alive(x), positive, below, exponent)


def is_positive(x, buffers: Mapping):
    """Returns where weights are of c+: by their component, or by value where it is 0 (FQ 5)."""
    border, component = buffers["border"], buffers["component"]
    by_value = ((border[..., 0] < x) & (x < border[..., 1])) == buffers["inside"]
    return jnp.where(component == 0, by_value, component > 0)


_choose = jax.jit(choose)


def level(choice: Choice, buffers: Mapping):
    """Returns the levels of a choice, float32, alpha apart; zero where a weight is pruned."""
    step = exp2(choice.exponent)
    value = of_component(choice.positive, buffers["mean"]) + jnp.where(choice.below, -step, step)
    return jnp.where(choice.alive, value, 0)


def table(buffers: Mapping, bits: int):
    """Returns the levels of c- and of c+, ascending, alpha apart, [..., 2**(bits-1) - 1] each."""
    span = exponents(buffers)
    rank = jnp.arange(2 ** (bits - 1) - 1)
    rank = rank.reshape((1,) * (span.lowest.ndim - 1) + rank.shape)
    tables = []
    for i in (0, 1):
        lowest, largest = span.lowest[..., i, None], span.below[..., i, None]
        count = largest - lowest + 1
        below = rank < count
        step = exp2(jnp.where(below, largest - rank, lowest + rank - count))
        tables.append(buffers["mean"][..., i, None] + jnp.where(below, -step, step))
    return tables


def power_of_two(std):
    """Returns the nearest powers of two, nearest in log2 (FQ 9)."""
    return exp2(jnp.round(jnp.log2(std)).astype(jnp.int32))


def exp2(exponent):
    """Returns 2**exponent exactly, in float32."""
    bits = jnp.clip(exponent, *EXPONENTS) + 127 << 23
    return lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def exponent_of(x):
    """Returns floor(log2 |x|) of float32 numbers."""
    return (order_statistics.magnitude_keys(x) >> 23) - 127


def alive(x):
    """Returns where weights are not pruned: magnitudes from the smallest normal float32 on."""
    return jnp.abs(x.astype(jnp.float32)) >= jnp.finfo(jnp.float32).tiny


def of_component(positive, pair):
    """Returns the number of each weight's component, of pairs [..., 2]."""
    return jnp.where(positive, pair[..., 1], pair[..., 0])


class Operations(NamedTuple):
    """What one application of a kernel costs, all its outputs at one position."""

    shifts: int  # of an input, one per weight that is not pruned
    adds: int
    multiplications: int  # by a mean: two per output where a layer is recentred; alpha is apart


def operations(w, buffers: Mapping) -> Operations:
    """Returns the operations of a kernel [..., inputs, outputs], as `shift_dot` does them.

    Every weight that is not pruned shifts its input and adds it to the output's sum. In a
    recentred layer it also adds it to the sum of its component, which is multiplied by its mean
    once per output.
    """
    kept = np.asarray(_choose(jnp.asarray(w), buffers).alive)
    weights, recentred = int(np.count_nonzero(kept)), bool(np.all(buffers["recentred"]))
    outputs = kept.shape[-1]
    if not recentred:
        return Operations(weights, weights, 0)
    return Operations(weights, 2 * weights + 2 * outputs, 2 * outputs)


def shift_dot(x, w, buffers: Mapping) -> tuple[np.ndarray, int]:
    """Returns (y, exponent): x @ w is y * 2**exponent exactly, by shifts and additions alone.

    Levels are those of the weights, alpha apart; recentred ones from 7 bits on are sums that
    float32 rounds. Multiplications by a mean are shifts and
    additions, too, one per bit that is set.

    Args:
      x: integers, [n, inputs]: fixed-point numbers in units of the caller's.
      w: a kernel [inputs, outputs].
      buffers: those of the kernel.

    Raises:
      ValueError: x no integers, or sums that 64 bits do not hold.
    """
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"fixed-point inputs are integers, got {x.dtype}")
    x = x.astype(np.int64)
    chosen = Choice(*(np.asarray(part) for part in _choose(jnp.asarray(w), buffers)))
    means = np.asarray(buffers["mean"], np.float64).reshape(2)
    exponents_used = chosen.exponent[chosen.alive]
    unit = min([_last_bit(mean) for mean in means if mean] + [int(min(exponents_used, default=0))])
    factors = [int(mean * 2.0**-unit) for mean in means]
    shifts = np.where(chosen.alive, chosen.exponent - unit, 0)
    width = max([int(shifts.max(initial=0)) + 1] + [abs(factor).bit_length() for factor in factors])
    width += int(np.abs(x).max(initial=0)).bit_length() + 1 + len(w).bit_length()
    if width > 63:
        raise ValueError(f"sums of {width} bits do not fit into 64: use fewer bits of x")
    y = np.zeros((len(x), w.shape[1]), np.int64)
    for i, row in enumerate(x.T):
        moved = row[:, None] << shifts[i]
        signed = np.where(chosen.below[i], -moved, moved)
        y += np.where(chosen.alive[i], signed, 0)
    for positive, factor in zip((False, True), factors, strict=True):
        mine = chosen.alive & (chosen.positive == positive)
        total = sum(np.where(mine[i], row[:, None], 0) for i, row in enumerate(x.T))
        for bit in range(abs(factor).bit_length()):
            if abs(factor) >> bit & 1:
                y += total << bit if factor > 0 else -(total << bit)
    return y, unit


def _last_bit(x: float) -> int:
    """Returns the exponent of the last bit that is set."""
    mantissa, exponent = np.frexp(x)
    whole = int(mantissa * 2.0**53)
    return int(exponent) - 53 + (whole & -whole).bit_length() - 1
