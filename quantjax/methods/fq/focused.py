"""Focused Quantization: pruned networks on powers of two, recentred on the modes of the weights.

A pruned layer's weights form two modes. Each gets a grid of powers of two around its mean, fine
where its weights are; a layer with one mode gets powers of two around zero. Either way there are
2**bits - 1 symbols: zero, then the levels of c-, then those of c+ (which are the negative and the
positive ones of a layer with one mode). FQ n is a number in the notes to the paper.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.core import checks, meshes, order_statistics, paths, qarray
from quantjax.core.quantizer import Quantizer, described, keep, leafwise
from quantjax.methods.fq import mixture as mixture_lib
from quantjax.methods.fq import shift
from quantjax.methods.fq.mixture import Mixture, assign, fit_mixture, separation
from quantjax.methods.fq.shift import focused_levels, shift_levels

__all__ = [
    "Mixture",
    "assign",
    "fit_mixture",
    "focused",
    "focused_levels",
    "separation",
    "shift_levels",
]

FEWEST = 16  # non-zero weights that a mixture is fitted to
CANDIDATES = tuple(range(-3, 4))  # beside the overflow rule's bias, with bias="error"

# What a fit writes into the buffers of a leaf.
FITTED = ("component", "border", "inside", "mean", "std", "recentred", "bias")


@described
def focused(
    bits: int,
    *,
    min_separation: float = 2.0,
    refit_every: int | None = None,
    bias: str = "overflow",
) -> Quantizer:
    """Quantizes pruned weights to a layer's own powers of two, recentred where it has two modes.

    A weight that is zero stays zero and gets no gradient (after `surgery` in a chain it cannot
    recover: let masks settle first); another one never becomes zero by the choice of its level.
    Forward alpha * level, levels chosen for the weight itself; backward
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
    bits = checks.bits(bits, least, 8)
    if not min_separation >= 0:
        raise ValueError(f"min_separation must not be negative, got {min_separation!r}")
    if refit_every is not None:
        refit_every = checks.whole("refit_every", refit_every, 1)
    if bias not in ("overflow", "error"):
        raise ValueError(f'bias must be "overflow" or "error", got {bias!r}')

    def fit(leaves, buffers, key):
        return _fit(
            leaves,
            {path: mine["limit"] for path, mine in buffers.items()},
            paths.leaf_keys(jax.random.key(0) if key is None else key, leaves),
            key is not None,
            min_separation,
            search=bias == "error",
        )

    def start(path, leaf, key):
        del path, key
        alpha = jnp.ones((1,) * leaf.ndim, jnp.float32)
        return {"alpha": alpha}, {
            "limit": jnp.full_like(alpha, 2 ** (bits - 1) - 1, jnp.int32),
            "count": jnp.zeros((), jnp.int32),
            "wait": jnp.asarray(refit_every or 0, jnp.int32),
        }

    def counted(leaf, learned, buffers, key):
        del leaf, learned, key
        return {**buffers, "count": buffers["count"] + 1}

    def check(learned, buffers):
        del learned
        checks.width(checks.width_of_codes(buffers["limit"]), bits)

    symbols = jax.jit(functools.partial(_symbols, bits=bits))

    def encode(leaf, learned, buffers):
        _check_fits(leaf, buffers)
        codes, levels = meshes.shaped_as(leaf, symbols, leaf, learned["alpha"], buffers)
        return qarray.Table(codes, levels, bits=bits, dtype=leaf.dtype)

    base = leafwise(start, _apply, encode, counted, check=check)

    def init(params, key=None):
        state = base.init(params, key)
        leaves = paths.restrict(paths.flatten(params)[0], state.buffers)
        one = jnp.zeros(())
        like = {path: dict.fromkeys(FITTED, one) | {"component": x} for path, x in leaves.items()}
        fitted = meshes.typed_as(like, fit, leaves, state.buffers, key)
        buffers = {path: mine | fitted[path] for path, mine in state.buffers.items()}
        return state._replace(buffers=buffers)

    def fit_when_due(leaves, buffers, key):
        def refit(buffers):
            out = {}
            for path, new in fit(leaves, buffers, key).items():
                wait = buffers[path]["wait"]
                new |= {"count": jnp.zeros_like(wait), "wait": 2 * wait}
                out[path] = buffers[path] | new
            return out

        # Leaves begin together, and their counts stay the same.
        one = next(iter(buffers.values()))
        return lax.cond(one["count"] >= one["wait"], refit, lambda old: old, buffers)

    def update(params, state, *, key=None):
        buffers = base.update(params, state, key=key).buffers
        leaves = paths.restrict(paths.flatten(params)[0], buffers)
        buffers = meshes.typed_as(buffers, fit_when_due, leaves, buffers, key)
        return state._replace(buffers=buffers)

    return base._replace(init=init, update=keep if refit_every is None else update)


@jax.custom_jvp
@jax.jit  # outside of jit one program, not one per operation
def _quantize(x, alpha, buffers):
    value = shift.level(shift.choose(x, buffers), buffers) * alpha
    return jnp.where(jnp.isnan(x), x, value)


@_quantize.defjvp
def _quantize_jvp(primals, tangents):
    x, alpha, buffers = primals
    dx, dalpha = tangents[:2]
    # dQ/dw = z and dQ/dalpha = Q / alpha (FQ 7).
    value = shift.level(shift.choose(x, buffers), buffers)
    return _quantize(x, alpha, buffers), jnp.where(shift.alive(x), dx, 0) + value * dalpha


def _apply(leaf, learned, buffers, key):
    del key
    _check_fits(leaf, buffers)
    return _quantize(leaf.astype(jnp.float32), learned["alpha"], buffers).astype(leaf.dtype)


def _symbols(leaf, alpha, buffers, *, bits):
    """Returns the symbol of every weight and their levels: zero, then those of c- and of c+."""
    limit = buffers["limit"]
    choice, span = shift.choose(leaf, buffers), shift.exponents(buffers)
    lowest, largest = (shift.of_component(choice.positive, ends) for ends in span[:2])
    above = largest - lowest + 1 + choice.exponent - lowest
    rank = jnp.where(choice.below, largest - choice.exponent, above)
    symbol = 1 + jnp.where(choice.positive, limit, 0) + rank
    codes = jnp.where(choice.alive, symbol, 0).astype(qarray.code_dtype(bits, signed=False))
    table = shift.table(buffers, bits)
    zero = jnp.zeros_like(table[0][..., :1])
    levels = jnp.concatenate([zero, *table, zero], axis=-1)  # the last is no symbol
    return codes, levels * alpha[..., None]


@functools.partial(jax.jit, static_argnames="search")
def _fit(leaves, limits, keys, sampled, min_separation, *, search) -> dict:
    """Returns what a fit writes into the buffers of every leaf.

    Only what must read the weights is done leaf by leaf; all else is of shape [leaves], which is
    a fraction of the compiling. Whether components are sampled is data, for the same reason.
    """
    places = [mixture_lib.bin_places(leaf) for leaf in leaves.values()]
    hists = mixture_lib.of_places(*(jnp.stack(parts) for parts in zip(*places, strict=True)))
    mixtures, moments = mixture_lib.fit(hists), mixture_lib.moments(hists)
    limit = jnp.stack([jnp.squeeze(limits[path]) for path in leaves])
    recentred = mixture_lib.separation(mixtures, moments.variance) >= min_separation
    recentred &= (moments.count >= FEWEST) & (moments.variance > 0) & (limit >= 3)
    recentred &= (moments.negative > 0) & (moments.negative < moments.count)
    border, inside = mixture_lib.regions(mixtures)
    two = recentred[:, None]
    layers = {
        # One mode: c+ is what lies outside of the negative numbers.
        "border": jnp.where(two, border, jnp.asarray([[-jnp.finfo(jnp.float32).max, 0]])),
        "inside": recentred & inside,
        "mean": jnp.where(two, _narrow(mixtures.mean, [leaf.dtype for leaf in leaves.values()]), 0),
        "std": jnp.where(two, shift.power_of_two(mixtures.std), 1),
        "recentred": recentred,
        "limit": limit,
    }
    odds, components = mixture_lib.odds(mixtures), {}
    for i, (path, leaf) in enumerate(leaves.items()):
        mine = jax.tree.map(lambda part, i=i: part[i], odds)
        component = mixture_lib.draw(keys[path], leaf, mine, sampled)
        kept = recentred[i] & shift.alive(leaf)
        components[path] = jnp.where(kept, component, 0).astype(jnp.int8)
    # Drawn once: the compiler would draw again for every use.
    components = lax.optimization_barrier(components)
    weights = list(leaves.values()), list(components.values())
    count = jnp.sum(hists.count.astype(jnp.int32), axis=-1)
    bias = _overflow_bias(*weights, layers, count)
    if search:
        bias = _best_bias(*weights, layers, bias)
    layers = _finish(layers, bias)
    del layers["limit"]
    out = {}
    for i, (path, leaf) in enumerate(leaves.items()):
        one = (1,) * leaf.ndim
        out[path] = {name: part[i].reshape(one + part.shape[1:]) for name, part in layers.items()}
        out[path]["component"] = components[path]
    return out


def _overflow_bias(leaves, components, layers, count):
    """Returns the largest biases with which few enough weights saturate (FQ 6), [leaves]."""
    keys = []
    for i, (leaf, component) in enumerate(zip(leaves, components, strict=True)):
        mine = {name: part[i] for name, part in layers.items()} | {"component": component}
        x = leaf.astype(jnp.float32)
        positive = shift.is_positive(x, mine)
        mean, std = (shift.of_component(positive, mine[name]) for name in ("mean", "std"))
        # The smallest k with |v| <= 2**k, as a key that orders; 0 for what is pruned.
        key = order_statistics.magnitude_keys((x - mean) / std) + ((1 << 23) - 1) >> 23
        keys.append(jnp.where(shift.alive(x), key, 0).astype(jnp.uint8))

    def at_least(t):
        return jnp.stack([jnp.sum(key >= t[i]) for i, key in enumerate(keys)])

    limit = layers["limit"]
    allowed = count // (4 * (limit + 1))
    largest = order_statistics.kth_largest(at_least, allowed + 1, jnp.int32, bits=8)
    top = jnp.where(count > 0, largest - 127, 0)
    return jnp.where(layers["recentred"], (limit - 1) // 2, limit) - top


def _best_bias(leaves, components, layers, bias):
    """Returns the biases of least squared error among the neighbours of some, [leaves]."""

    def errors(offset):
        new = _finish(layers, bias + offset)
        found = []
        for i, (leaf, component) in enumerate(zip(leaves, components, strict=True)):
            mine = {name: part[i] for name, part in new.items()} | {"component": component}
            x = leaf.astype(jnp.float32)
            exact = jnp.where(shift.alive(x), x, 0)
            found.append(jnp.sum((shift.level(shift.choose(x, mine), mine) - exact) ** 2))
        return jnp.stack(found)

    offsets = jnp.asarray(CANDIDATES)
    return bias + offsets[jnp.argmin(lax.map(errors, offsets), axis=0)]


def _finish(layers, bias):
    """Returns the layers with their biases, and with means that are exact beside their levels.

    Modes narrower than float32 tells apart get the smallest steps that it does.
    """
    two = layers["recentred"][:, None]
    finest = shift.exponent_of(layers["std"]) - shift.exponent_of(layers["mean"]) + 22
    bias = jnp.where(two[:, 0], jnp.minimum(bias, jnp.min(finest, axis=-1)), bias)
    new = {**layers, "bias": bias}
    return {**new, "mean": jnp.where(two, _exact(layers["mean"], shift.exponents(new)), 0)}


def _exact(mean, span: shift.Range):
    """Returns the means, rounded so that mean +- 2**exponent is a float32 number in 3..6 bits."""
    top = jnp.maximum(span.below, span.above)
    unit = shift.exp2(jnp.maximum(shift.exponent_of(mean), top) - 22)
    return jnp.round(mean / unit) * unit


def _narrow(mean, dtypes):
    """Returns the means as numbers of their leaves' dtypes: levels are then their own nearest."""
    out = mean
    for dtype in set(dtypes):
        info = jnp.finfo(dtype)
        rounded = lax.reduce_precision(mean, min(info.nexp, 8), min(info.nmant, 23))
        out = jnp.where(np.array([[dtype == other] for other in dtypes]), rounded, out)
    return out


def _check_fits(leaf, buffers):
    if buffers["component"].shape != leaf.shape:
        raise ValueError(
            f"the state was made for another tree: components {buffers['component'].shape}, "
            f"leaf {leaf.shape}"
        )
