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

from quantjax.core import checks, meshes, order_statistics, paths, random_numbers
from quantjax.core.quantizer import Quantizer, described, keep, leafwise


@described
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
    begin, every = checks.whole("begin", begin, 0), checks.whole("every", every, 1)
    end = None if end is None else checks.whole("end", end, 0)
    if end is not None and not end > begin:
        raise ValueError(f"end must come after begin, got begin={begin}, end={end}")

    def start(path, leaf, key):
        del path, key
        return {}, {
            "mask": jnp.ones_like(leaf, bool),
            "density": jnp.asarray(density, jnp.float32),
            "count": jnp.zeros((), jnp.int32),
        }

    def counted(leaf, learned, buffers, key):
        del leaf, learned, key
        return {**buffers, "count": buffers["count"] + 1}

    def check(learned, buffers):
        del learned
        for name in ("mask", "density", "count"):
            buffers[name]  # a KeyError: the state is another quantizer's

    base = leafwise(start, _apply, _encode, counted, biases=biases, check=check)

    def groups(leaves):
        return [list(leaves)] if across else [[path] for path in leaves]

    def prune(leaves, buffers):
        masks = {}
        for group in groups(leaves):
            mine = {path: leaves[path] for path in group}
            masks |= _largest(mine, buffers[group[0]]["density"])
        return masks

    def move(leaves, buffers):
        masks = {}
        for group in groups(leaves):
            first = buffers[group[0]]
            now = _gradual(first["density"], first["count"], begin, end)
            due = (first["count"] >= begin) & (first["count"] <= end)
            due &= ((first["count"] - begin) % every == 0) | (first["count"] == end)
            masks |= lax.cond(
                due,
                lambda leaves, masks, now: _largest(leaves, now),
                lambda leaves, masks, now: masks,
                {path: leaves[path] for path in group},
                {path: buffers[path]["mask"] for path in group},
                now,
            )
        return masks

    def over(params, state, fn):
        """Returns the state with the masks that fn gives, which sees all leaves."""
        leaves = paths.restrict(paths.flatten(params)[0], state.buffers)
        masks = meshes.typed_as(leaves, fn, leaves, state.buffers)
        buffers = {path: {**old, "mask": masks[path]} for path, old in state.buffers.items()}
        return state._replace(buffers=buffers)

    def init(params, key=None):
        state = base.init(params, key)
        return over(params, state, prune) if end is None else state

    def update(params, state, *, key=None):
        return over(params, base.update(params, state, key=key), move)

    return base._replace(init=init, update=keep if end is None else update)


@described
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
    end, every = checks.whole("end", end, 0), checks.whole("every", every, 1)
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


@described
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
    n, m = checks.whole("n", n, 1), checks.whole("m", m, 1)
    if n > m:
        raise ValueError(f"n of m needs 1 <= n <= m, got {n} and {m}")
    if not (isinstance(axis, int | np.integer) and axis < 0):
        raise ValueError(f"axis is counted from the end, such as -2; got {axis!r}")
    axis = int(axis)
    every = None if every is None else checks.whole("every", every, 1)

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


@described
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
        if checks.is_concrete(mask):
            # On the host: leaves may lie on other devices than the masks do.
            flat_masks[path] = np.asarray(mask)
            if not np.all(np.isin(flat_masks[path], (0, 1))):
                raise ValueError(f"{path}: a mask holds True and False, or 1 and 0")

    def owns(flat):
        missing = [path for path in flat_masks if path not in flat]
        if missing:
            raise ValueError(f"masks without a leaf: {missing} not among {list(flat)}")
        return list(flat_masks)

    def start(path, leaf, key):
        del key
        shape = jnp.shape(flat_masks[path])
        if shape != leaf.shape:
            raise ValueError(f"a mask of shape {shape}, the leaf has {leaf.shape}")
        return {}, {}

    base = leafwise(start, _apply, _encode, owns=owns)

    def init(params, key=None):
        state = base.init(params, key)
        flat, _ = paths.flatten(params)
        for path, mask in flat_masks.items():
            mask = meshes.typed_as(flat[path], _as_bools, flat[path], mask)
            state.buffers[path] = {"mask": mask}
        return state

    return base._replace(init=init)


def _as_bools(leaf, mask):
    del leaf  # says where the mask lies
    return jnp.asarray(mask, bool)


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
    at = leaf.ndim + axis
    keys = order_statistics.magnitude_keys(leaf)
    index = lax.broadcasted_iota(jnp.int32, leaf.shape, at)
    place, left = index % m, leaf.shape[at] - index

    def neighbour(distance):
        # Shifted rather than grouped: of a sharded axis only the borders cross devices.
        config = [(0, 0, 0)] * leaf.ndim
        config[at] = (-distance, distance, 0)
        return lax.pad(keys, jnp.zeros((), keys.dtype), config)

    better = jnp.zeros(leaf.shape, jnp.int32)
    for distance in range(1, m):
        # Of equal ones those before are better.
        better += (place >= distance) & (neighbour(-distance) >= keys)
        better += (place + distance < m) & (left > distance) & (neighbour(distance) > keys)
    return better < n


def _gradual(density, step, begin, end):
    left = 1 - jnp.clip((step - begin) / (end - begin), 0, 1).astype(density.dtype)
    return density + (1 - density) * left**3


def _check_density(density):
    checks.number("density", density, "in (0, 1]", lambda share: (share > 0) & (share <= 1))
