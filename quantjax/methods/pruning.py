"""Pruning: quantizers that multiply weights by a mask, and what decides the mask.

The gradient reaches every weight, pruned ones too, so that a weight may recover. Masks move in
`update` alone; a quantizer whose schedule has ended is constant. They compose by `chain` with a
grid, and are targets of `scale_by_position`.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.core import checks, order_statistics, paths, random_numbers
from quantjax.core.quantizer import Quantizer, QuantState, leafwise


def magnitude(
    density: float,
    *,
    across: bool = False,
    begin: int = 0,
    end: int | None = None,
    every: int = 100,
    biases: bool = False,
) -> Quantizer:
    """Keeps the weights of largest magnitude.

    Args:
      density: the share that is kept, in (0, 1]: round(density * size) weights, one at least, and
        all that equal the smallest kept one.
      across: ranks the weights of all owned leaves together rather than leaf by leaf.
      begin, end, every: the gradual schedule in steps (calls of `update`): masks move at begin,
        begin + every, ... and at end, with density_t = d + (1 - d) (1 - (t - begin) /
        (end - begin))**3 (Zhu and Gupta 2017, eq. 1). Without an end `init` prunes, once for all.
      biases: also takes the bias beside every kernel.

    Raises:
      ValueError: a density outside (0, 1], or a schedule out of order.
    """
    _check_density(density)
    _check_steps(begin=begin, end=end, every=every)
    if end is not None and not end > begin:
        raise ValueError(f"end must come after begin, got begin={begin}, end={end}")

    def start(path, leaf, key):
        del path, key
        return {}, {
            "mask": jnp.ones_like(leaf, bool),
            "density": jnp.asarray(density, jnp.float32),
            "count": jnp.zeros((), jnp.int32),
        }

    base = leafwise(start, _apply, _encode, biases=biases)

    def groups(state):
        return [list(state.buffers)] if across else [[path] for path in state.buffers]

    def init(params, key=None):
        state = base.init(params, key)
        if end is not None:
            return state
        flat, _ = paths.flatten(params)
        buffers = {}
        for group in groups(state):
            mine = state.buffers[group[0]]
            masks = _largest(paths.restrict(flat, group), mine["density"])
            buffers |= {path: {**state.buffers[path], "mask": masks[path]} for path in group}
        return state._replace(buffers=buffers)

    def update(params, state, *, key=None):
        del key
        flat, _ = paths.flatten(params)
        leaves = paths.restrict(flat, state.buffers)
        buffers = {}
        for group in groups(state):
            mine = [state.buffers[path] for path in group]
            count = mine[0]["count"] + 1
            now = _gradual(mine[0]["density"], count, begin, end)
            due = (count >= begin) & (count <= end)
            due &= ((count - begin) % every == 0) | (count == end)
            masks = lax.cond(
                due,
                lambda leaves, masks, now: _largest(leaves, now),
                lambda leaves, masks, now: masks,
                {path: leaves[path] for path in group},
                {path: old["mask"] for path, old in zip(group, mine, strict=True)},
                now,
            )
            for path, old in zip(group, mine, strict=True):
                buffers[path] = {**old, "mask": masks[path], "count": old["count"] + 1}
        return state._replace(buffers=buffers)

    return base._replace(init=init) if end is None else base._replace(init=init, update=update)


def surgery(
    density: float,
    *,
    end: int,
    low: float = 0.9,
    high: float = 1.1,
    every: int = 1,
    decay: float = 1e-4,
    power: float = 1.0,
    biases: bool = False,
) -> Quantizer:
    """Dynamic network surgery (Guo et al. 2016): weights are cut, and spliced when they recover.

    With t the magnitude that a share `density` of the present weights of the leaf reach: a weight
    below low * t is cut, one from high * t on is kept, between them the mask stays (eq. 3). `init`
    cuts at t. `update` moves the mask with probability (1 + decay * step)**(-power) where it has
    a key, and always without one; after step `end` the mask is constant. The density hovers about
    its value, since masks have a memory.

    Args:
      density: in (0, 1].
      end: the last step at which masks may move.
      low, high: 0 <= low <= high.
      every: steps between moves.
      decay, power: of the probability, not negative.
      biases: also takes the bias beside every kernel.

    Raises:
      ValueError: an argument outside its range, thresholds out of order.
    """
    _check_density(density)
    _check_steps(end=end, every=every)
    if not 0 <= low <= high < np.inf:
        raise ValueError(f"thresholds must be in order, 0 <= low <= high, got {low} and {high}")
    if not (decay >= 0 and power >= 0):
        raise ValueError(f"decay and power must not be negative, got {decay} and {power}")

    def init(path, leaf, key):
        del key
        share = jnp.asarray(density, jnp.float32)
        return {}, {
            "mask": _largest({path: leaf}, share)[path],
            "density": share,
            "count": jnp.zeros((), jnp.int32),
        }

    def update(leaf, learned, buffers, key):
        del learned
        count = buffers["count"] + 1
        due = (count <= end) & (count % every == 0)
        if key is not None:
            chance = (1 + decay * count) ** -power
            due &= random_numbers.uniform(key, ()) < chance

        def move(leaf, mask):
            keys = order_statistics.magnitude_keys(leaf)
            threshold = order_statistics.magnitude_of(_threshold([keys], buffers["density"]))
            size = jnp.abs(leaf.astype(threshold.dtype))
            return (size >= high * threshold) | (mask & (size >= low * threshold))

        mask = lax.cond(due, move, lambda leaf, mask: mask, leaf, buffers["mask"])
        return {**buffers, "mask": mask, "count": count}

    return leafwise(init, _apply, _encode, update, biases=biases)


def n_m(n: int, m: int, *, axis: int = -2, every: int | None = None) -> Quantizer:
    """Keeps the n largest of every m consecutive weights along an axis, such as 2:4.

    Of equal magnitudes the first are kept, so that a group never has more than n. A shorter last
    group keeps n too.

    Args:
      n, m: 1 <= n <= m.
      axis: counted from the end; -2, the inputs of a kernel, is what hardware sums along.
      every: `update` takes the masks anew after so many steps; None: they stay as `init` made them.

    Raises:
      ValueError: an argument outside its range; at `init`, a leaf without that axis, by path.
    """
    if not 1 <= n <= m:
        raise ValueError(f"n of m needs 1 <= n <= m, got {n} and {m}")
    if not (isinstance(axis, int) and axis < 0):
        raise ValueError(f"axis is counted from the end, such as -2; got {axis!r}")
    _check_steps(every=every)

    def init(path, leaf, key):
        del path, key
        if leaf.ndim < -axis:
            raise ValueError(f"no axis {axis} in shape {leaf.shape}")
        return {}, {"mask": _best_of_each(leaf, n, m, axis), "count": jnp.zeros((), jnp.int32)}

    def update(leaf, learned, buffers, key):
        del learned, key
        count = buffers["count"] + 1
        mask = lax.cond(
            count % every == 0,
            lambda leaf, mask: _best_of_each(leaf, n, m, axis),
            lambda leaf, mask: mask,
            leaf,
            buffers["mask"],
        )
        return {**buffers, "mask": mask, "count": count}

    return leafwise(init, _apply, _encode, None if every is None else update)


def pruned(masks) -> Quantizer:
    """Multiplies leaves by masks that never move; it owns the leaves that have one.

    Args:
      masks: a tree of arrays of bools (or of 0 and 1) with the paths of the leaves to prune; such
        as `{path: buffers["mask"] for path, buffers in state.buffers.items()}` of another state.

    Raises:
      ValueError: no masks, or other values; at `init`, a mask without a leaf or of another shape,
        by path.
    """
    flat_masks, _ = paths.flatten(masks)
    if not flat_masks:
        raise ValueError("pruned needs at least one mask")
    for path, mask in flat_masks.items():
        if not isinstance(mask, jax.core.Tracer) and not np.all(np.isin(np.asarray(mask), (0, 1))):
            raise ValueError(f"{path}: a mask holds True and False, or 1 and 0")
    base = leafwise(lambda path, leaf, key: ({}, {}), _apply, _encode)

    def init(params, key=None):
        del key
        flat, _ = paths.flatten(params)
        missing = [path for path in flat_masks if path not in flat]
        if missing:
            raise ValueError(f"masks without a leaf: {missing} not among {list(flat)}")
        buffers = {}
        for path, mask in flat_masks.items():
            if jnp.shape(mask) != flat[path].shape:
                raise ValueError(
                    f"{path}: a mask of shape {jnp.shape(mask)}, the leaf has {flat[path].shape}"
                )
            buffers[path] = {"mask": jnp.asarray(mask, bool)}
        return QuantState({}, buffers)

    return base._replace(init=init)


@jax.custom_jvp
def masked(w, mask):
    """Returns w where the mask is True, else 0; the gradient reaches every w."""
    return jnp.where(mask, w, 0)


@masked.defjvp
def _masked_jvp(primals, tangents):
    return masked(*primals), tangents[0]


def _apply(leaf, learned, buffers, key):
    del learned, key
    mask = buffers["mask"]
    if mask.shape != leaf.shape:
        raise ValueError(
            f"the state was made for another tree: mask {mask.shape}, leaf {leaf.shape}"
        )
    return masked(leaf, mask)


def _encode(leaf, learned, buffers):
    return _apply(leaf, learned, buffers, None)


@jax.jit
def _largest(leaves: Mapping, density) -> dict:
    """Returns the masks of the largest weights of some leaves, ranked together."""
    wide = jnp.result_type(jnp.float32, *leaves.values())
    keys = {
        path: order_statistics.magnitude_keys(leaf.astype(wide)) for path, leaf in leaves.items()
    }
    threshold = _threshold(list(keys.values()), density)
    return {path: mine >= threshold for path, mine in keys.items()}


def _threshold(keys: list, density):
    """Returns the key of the smallest weight that is kept."""
    size = sum(mine.size for mine in keys)
    kept = jnp.round(density * size).astype(jnp.int32)
    return order_statistics.kth_largest(
        lambda t: sum(jnp.sum(mine >= t) for mine in keys),
        jnp.clip(kept, 1, size),
        keys[0].dtype,
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _best_of_each(leaf, n: int, m: int, axis: int):
    length = leaf.shape[axis]
    at = leaf.ndim + axis
    keys = order_statistics.magnitude_keys(leaf)
    if length % m:  # filled up with keys that are below all others
        padding = [(0, 0)] * leaf.ndim
        padding[at] = (0, -length % m)
        keys = jnp.pad(keys, padding, constant_values=-1)
    keys = keys.reshape(*leaf.shape[:at], -1, m, *leaf.shape[at + 1 :])

    def count(chosen):
        return jnp.sum(chosen, axis=at + 1, keepdims=True)

    k = jnp.full_like(count(keys), n, jnp.int32)
    border = order_statistics.kth_largest(lambda t: count(keys >= t), k, keys.dtype)
    above, equal = keys > border, keys == border
    # Of those that equal the border the first: places as keys, the first place the largest.
    shape = [1] * keys.ndim
    shape[at + 1] = m
    place = jnp.arange(m, 0, -1, dtype=jnp.int32).reshape(shape)
    left = n - count(above).astype(jnp.int32)
    last = order_statistics.kth_largest(
        lambda t: count(equal & (place >= t)), left, jnp.int32, bits=m.bit_length()
    )
    mask = above | (equal & (place >= last))
    mask = mask.reshape(*leaf.shape[:at], -1, *leaf.shape[at + 1 :])
    return lax.slice_in_dim(mask, 0, length, axis=at)


def _gradual(density, step, begin, end):
    left = 1 - jnp.clip((step - begin) / (end - begin), 0, 1).astype(density.dtype)
    return density + (1 - density) * left**3


def _check_density(density):
    checks.number("density", density, "in (0, 1]", lambda share: (share > 0) & (share <= 1))


def _check_steps(**counts):
    for name, count in counts.items():
        least = 1 if name == "every" else 0
        if count is None:
            continue
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {count!r}")
