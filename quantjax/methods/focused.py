"""Focused Quantization: pruned networks on powers of two, recentred on the modes of the weights.

A pruned layer's weights form two modes. Each gets a grid of powers of two around its mean, fine
where its weights are; a layer with one mode gets powers of two around zero. Either way there are
2**bits - 1 symbols: zero, then the levels of c-, then those of c+ (which are the negative and the
positive ones of a layer with one mode). FQ n is a number in the notes to the paper.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.core import order, paths, qarray
from quantjax.core.quantizer import Quantizer, leafwise
from quantjax.methods import mixture as mixture_lib

FEWEST = 16  # non-zero weights that a mixture is fitted to
EXPONENTS = (-126, 127)  # of normal float32 numbers
CANDIDATES = tuple(range(-3, 4))  # beside the overflow rule's bias, with bias="error"


def focused(
    bits: int,
    *,
    min_separation: float = 2.0,
    refit_every: int | None = None,
    bias: str = "overflow",
) -> Quantizer:
    """Quantizes pruned weights to a layer's own powers of two, recentred where it has two modes.

    A weight that is zero stays zero and gets no gradient; another one never becomes zero by the
    choice of its level. Forward alpha * level, levels chosen for the weight itself; backward
    dQ/dw = 1, dQ/dalpha = Q / alpha (FQ 3, 7). `init` fits a mixture and gives each weight its
    component, at random where it has a key; they stay until the next fit. Layers with fewer than
    16 non-zero weights, or with those of one sign only, or all equal, are not recentred.

    Learned: alpha, one per leaf. Buffers: component (int8, -1, 1, or 0: by value), border and
    inside (where c+ is the likelier, for 0), mean and std (c-, c+; std a power of two), bias,
    recentred, limit = 2**(bits-1) - 1 levels per component, count and wait (steps since the last
    fit and between fits).

    Args:
      bits: 3..8; 2, too, with an infinite min_separation.
      min_separation: the least Wasserstein separation that is recentred (FQ 7); `math.inf` for
        plain shift quantization of every layer.
      refit_every: N: `update` fits anew N steps after `init`, then 2N steps later, then 4N, ...
        (algorithm 1); None: never.
      bias: "overflow": the largest with at most a share 2**-(bits+1) of the weights beyond the
        largest level (FQ 6); "error": of the least squared error among its neighbours.

    Raises:
      ValueError: an argument outside its range.
    """
    least = 2 if min_separation == np.inf else 3
    if not (isinstance(bits, int) and not isinstance(bits, bool) and least <= bits <= 8):
        raise ValueError(f"bits must be a whole number in {least}..8, got {bits!r}")
    if not min_separation >= 0:
        raise ValueError(f"min_separation must not be negative, got {min_separation!r}")
    if refit_every is not None and not (isinstance(refit_every, int) and refit_every >= 1):
        raise ValueError(f"refit_every must be a whole number of steps, got {refit_every!r}")
    if bias not in ("overflow", "error"):
        raise ValueError(f'bias must be "overflow" or "error", got {bias!r}')
    fit_leaves = functools.partial(_fit, min_separation=min_separation, search=bias == "error")

    def start(path, leaf, key):
        del path, key
        alpha = jnp.ones((1,) * leaf.ndim, jnp.float32)
        return {"alpha": alpha}, {
            "limit": jnp.full_like(alpha, 2 ** (bits - 1) - 1, jnp.int32),
            "count": jnp.zeros((), jnp.int32),
            "wait": jnp.asarray(refit_every or 0, jnp.int32),
        }

    base = leafwise(start, _apply, _encode)

    def init(params, key=None):
        state = base.init(params, key)
        leaves = paths.restrict(paths.flatten(params)[0], state.buffers)
        limits = {path: mine["limit"] for path, mine in state.buffers.items()}
        fitted = fit_leaves(leaves, limits, _keys(key, leaves))
        buffers = {path: mine | fitted[path] for path, mine in state.buffers.items()}
        return state._replace(buffers=buffers)

    def update(params, state, *, key=None):
        leaves = paths.restrict(paths.flatten(params)[0], state.buffers)
        buffers = {
            path: {**mine, "count": mine["count"] + 1} for path, mine in state.buffers.items()
        }
        due = {path: mine["count"] >= mine["wait"] for path, mine in buffers.items()}

        def refit(buffers):
            limits = {path: mine["limit"] for path, mine in buffers.items()}
            fitted = fit_leaves(leaves, limits, _keys(key, leaves))
            for path, new in fitted.items():
                wait = buffers[path]["wait"]
                new |= {"limit": limits[path], "count": jnp.zeros_like(wait), "wait": 2 * wait}
            return {
                path: jax.tree.map(functools.partial(jnp.where, due[path]), new, buffers[path])
                for path, new in fitted.items()
            }

        any_due = functools.reduce(jnp.logical_or, due.values())
        return state._replace(buffers=lax.cond(any_due, refit, lambda old: old, buffers))

    return (
        base._replace(init=init) if refit_every is None else base._replace(init=init, update=update)
    )


def shift_levels(bits: int, bias: int):
    """Returns +-2**(e - bias), e in 0 .. 2**(bits-1) - 1, ascending (FQ 2): [2**bits] float32.

    Raises:
      ValueError: bits outside 1..8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in 1..8, got {bits!r}")
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
    if not 3 <= bits <= 8:
        raise ValueError(f"bits must be in 3..8, got {bits!r}")
    table = _table(
        {
            "mean": jnp.asarray(mean, jnp.float32),
            "std": _power_of_two(jnp.asarray(std, jnp.float32)),
            "bias": jnp.asarray(bias, jnp.int32),
            "recentred": jnp.asarray(True),
            "limit": jnp.asarray(2 ** (bits - 1) - 1, jnp.int32),
        }
    )
    return tuple(jnp.asarray(alpha, jnp.float32) * levels for levels in table)


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
    spread = jnp.where(recentred, _exponent(buffers["std"]), 0)
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
    border, component = buffers["border"], buffers["component"]
    by_value = ((border[..., 0] < x) & (x < border[..., 1])) == buffers["inside"]
    positive = jnp.where(component == 0, by_value, component > 0)
    beyond = x - _of(positive, buffers["mean"])
    below = beyond < 0
    span = exponents(buffers)
    top = jnp.where(below, _of(positive, span.below), _of(positive, span.above))
    # Half a unit of the exponent more carries from 1.5 * 2**p on: nearest in value.
    nearest = (order.magnitude_keys(beyond) + (1 << 22) >> 23) - 127
    exponent = jnp.clip(nearest, _of(positive, span.lowest), top)
    return Choice(_alive(x), positive, below, exponent)


def level(choice: Choice, buffers: Mapping):
    """Returns the levels of a choice, float32, alpha apart; zero where a weight is pruned."""
    step = _exp2(choice.exponent)
    value = _of(choice.positive, buffers["mean"]) + jnp.where(choice.below, -step, step)
    return jnp.where(choice.alive, value, 0)


@jax.custom_jvp
def _quantize(x, alpha, buffers):
    value = level(choose(x, buffers), buffers) * alpha
    return jnp.where(jnp.isnan(x), x, value)


@_quantize.defjvp
def _quantize_jvp(primals, tangents):
    x, alpha, buffers = primals
    dx, dalpha = tangents[:2]
    # dQ/dw = z and dQ/dalpha = Q / alpha (FQ 7).
    value = level(choose(x, buffers), buffers)
    return _quantize(x, alpha, buffers), jnp.where(_alive(x), dx, 0) + value * dalpha


def _apply(leaf, learned, buffers, key):
    del key
    _check_fits(leaf, buffers)
    return _quantize(leaf.astype(jnp.float32), learned["alpha"], buffers).astype(leaf.dtype)


def _encode(leaf, learned, buffers):
    _check_fits(leaf, buffers)
    limit = buffers["limit"]
    bits = int(np.max(limit) + 1).bit_length()
    choice, span = choose(leaf, buffers), exponents(buffers)
    # Zero, then the levels of c- and of c+ in ascending order.
    lowest, largest = _of(choice.positive, span.lowest), _of(choice.positive, span.below)
    above = largest - lowest + 1 + choice.exponent - lowest
    rank = jnp.where(choice.below, largest - choice.exponent, above)
    symbol = 1 + jnp.where(choice.positive, limit, 0) + rank
    codes = jnp.where(choice.alive, symbol, 0).astype(qarray.code_dtype(bits, signed=False))
    table = _table(buffers)
    zero = jnp.zeros_like(table[0][..., :1])
    levels = jnp.concatenate([zero, *table, zero], axis=-1)  # the last is no symbol
    levels = levels * learned["alpha"][..., None]
    return qarray.Table(codes, levels, bits=bits, dtype=leaf.dtype)


def _table(buffers: Mapping):
    """Returns the levels of c- and of c+, ascending, [..., limit] each, alpha apart."""
    span = exponents(buffers)
    rank = jnp.arange(int(np.max(buffers["limit"])))
    rank = rank.reshape((1,) * (span.lowest.ndim - 1) + rank.shape)
    tables = []
    for i in (0, 1):
        lowest, largest = span.lowest[..., i, None], span.below[..., i, None]
        count = largest - lowest + 1
        below = rank < count
        step = _exp2(jnp.where(below, largest - rank, lowest + rank - count))
        tables.append(buffers["mean"][..., i, None] + jnp.where(below, -step, step))
    return tables


@functools.partial(jax.jit, static_argnames=("min_separation", "search"))
def _fit(leaves: Mapping, limits: Mapping, keys: Mapping, *, min_separation, search) -> dict:
    """Returns what a fit writes into the buffers of every leaf; all mixtures in one loop."""
    hists = [mixture_lib.histogram(leaf) for leaf in leaves.values()]
    hists = jax.tree.map(lambda *parts: jnp.stack(parts), *hists)
    mixtures, moments = mixture_lib.fit(hists), mixture_lib.moments(hists)
    two_modes = mixture_lib.separation(mixtures, moments.variance) >= min_separation
    two_modes &= (moments.count >= FEWEST) & (moments.variance > 0)
    two_modes &= (moments.negative > 0) & (moments.negative < moments.count)
    borders, inside = mixture_lib.regions(mixtures)
    out = {}
    for i, (path, leaf) in enumerate(leaves.items()):
        fitted = jax.tree.map(lambda part, i=i: part[i], mixtures)
        recentred = two_modes[i] & jnp.squeeze(limits[path] >= 3)
        component = mixture_lib.assign(keys[path], leaf, fitted)
        mine = {
            "component": jnp.where(recentred & _alive(leaf), component, 0).astype(jnp.int8),
            # One mode: c+ is what lies outside of the negative numbers.
            "border": jnp.where(
                recentred, borders[i], jnp.asarray([-jnp.finfo(jnp.float32).max, 0])
            ),
            "inside": recentred & inside[i],
            "mean": jnp.where(recentred, _narrow(fitted.mean, leaf.dtype), 0),
            "std": jnp.where(recentred, _power_of_two(fitted.std), 1),
            "recentred": recentred,
        }
        for name in ("border", "inside", "mean", "std", "recentred"):
            mine[name] = mine[name].reshape((1,) * leaf.ndim + mine[name].shape)
        out[path] = _with_bias(leaf, {**mine, "limit": limits[path]}, search)
    return out


def _with_bias(leaf, mine, search):
    """Returns the buffers with the bias (FQ 6) and with means that are exact beside its levels."""
    x = leaf.astype(jnp.float32)
    alive = _alive(x)
    positive = choose(x, {**mine, "bias": jnp.zeros_like(mine["limit"])}).positive
    value = (x - _of(positive, mine["mean"])) / _of(positive, mine["std"])
    # The smallest k with |v| <= 2**k, as a key that orders; 0 for what is pruned.
    key = jnp.where(alive, order.magnitude_keys(value) + ((1 << 23) - 1) >> 23, 0)
    count = jnp.sum(alive).astype(jnp.int32)
    allowed = count // (4 * (jnp.squeeze(mine["limit"]) + 1))
    largest = order.kth_largest(lambda t: jnp.sum(key >= t), allowed + 1, jnp.int32, bits=8)
    top = jnp.where(count > 0, largest - 127, 0)
    limit = mine["limit"]
    bias = jnp.where(mine["recentred"], (limit - 1) // 2, limit) - top

    def finish(bias):
        new = {**mine, "bias": bias}
        new["mean"] = jnp.where(
            mine["recentred"][..., None], _exact(mine["mean"], exponents(new)), 0
        )
        return new

    if search:

        def error(offset):
            new = finish(bias + offset)
            return jnp.sum((level(choose(x, new), new) - jnp.where(alive, x, 0)) ** 2)

        offsets = jnp.asarray(CANDIDATES)
        bias += offsets[jnp.argmin(lax.map(error, offsets))]
    new = finish(bias)
    del new["limit"]
    return new


def _exact(mean, span: Range):
    """Returns the means, rounded so that mean +- 2**exponent is a float32 number in 3..6 bits."""
    top = jnp.maximum(span.below, span.above)
    unit = _exp2(jnp.maximum(_exponent(mean), top) - 22)
    return jnp.round(mean / unit) * unit


def _narrow(mean, dtype):
    """Returns the means as numbers of the leaf's dtype: levels are then their own nearest."""
    info = jnp.finfo(dtype)
    return lax.reduce_precision(mean, min(info.nexp, 8), min(info.nmant, 23))


def _power_of_two(std):
    """Returns the nearest powers of two, nearest in log2 (FQ 9)."""
    return _exp2(jnp.round(jnp.log2(std)).astype(jnp.int32))


def _exp2(exponent):
    """Returns 2**exponent exactly, in float32."""
    bits = jnp.clip(exponent, *EXPONENTS) + 127 << 23
    return lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def _exponent(x):
    """Returns floor(log2 |x|) of float32 numbers."""
    return (order.magnitude_keys(x) >> 23) - 127


def _alive(x):
    return jnp.abs(x.astype(jnp.float32)) >= jnp.finfo(jnp.float32).tiny


def _of(positive, pair):
    """Returns the number of each weight's component, of pairs [..., 2]."""
    return jnp.where(positive, pair[..., 1], pair[..., 0])


def _keys(key, leaves):
    return {path: paths.leaf_key(key, path) for path in leaves}


def _check_fits(leaf, buffers):
    if buffers["component"].shape != leaf.shape:
        raise ValueError(
            f"the state was made for another tree: components {buffers['component'].shape}, "
            f"leaf {leaf.shape}"
        )
