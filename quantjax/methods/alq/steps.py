"""ALQ's steps as pure functions: bases, coordinates, pruning, and the straight-through baselines.

Every step adds one gradient to AMSGrad's moments, in the domain of the weights and in that of the
coordinates, and minimises the quadratic model of the loss (eq. 10) over what it may change:

- `basis_step`: every weight moves to the candidate sum nearest to the AMSGrad point (eq. 19), then
  the coordinates to the model's minimum given the bases (eq. 23);
- `coordinate_step`: plain AMSGrad in the coordinates (eq. 21);
- `prune_step`: the coordinates whose removal raises the model least are removed (eq. 13).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, order_statistics, qarray
from quantjax.methods import amsgrad
from quantjax.methods.alq import bases as bases_lib
from quantjax.methods.alq.bases import Bases
from quantjax.methods.alq.multibit import RIDGE, from_multi_bit
from quantjax.methods.amsgrad import Moments, accumulate

PRUNE_RATE = 1e-3  # the learning rate in eq. 13's metric


class AlqMoments(NamedTuple):
    """AMSGrad's moments of one leaf, in both domains."""

    count: jax.Array  # scalar, int32: gradients seen
    weights: Moments  # [*shape]
    coords: Moments  # [*group, K]


class Descent(NamedTuple):
    """The numbers of AMSGrad."""

    learning_rate: jax.typing.ArrayLike
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


def init_moments(mb: qarray.MultiBit) -> AlqMoments:
    """Returns the moments of a leaf before its first step."""
    dtype = mb.coords.dtype
    zero = jnp.zeros(mb.shape, dtype)
    return AlqMoments(
        jnp.zeros((), jnp.int32), amsgrad.zero_moments(zero), amsgrad.zero_moments(mb.coords)
    )


def basis_step(
    mb: qarray.MultiBit, grad, moments: AlqMoments, *, learning_rate, b1=0.9, b2=0.999, eps=1e-8
) -> tuple[qarray.MultiBit, AlqMoments]:
    """Chooses new bases, then the coordinates that fit them best (eq. 19 and 23, algorithm 3).

    Groups whose gradients never exceeded eps stay as they are: there eq. 23 is all ridge.

    Args:
      mb: the leaf.
      grad: of the loss at its decoded value, [*shape].
      moments: from `init_moments` or the last step.
      learning_rate, b1, b2, eps: of AMSGrad.

    Returns:
      The new leaf and moments; the coordinates' moments follow from the weights'.
    """
    bases, moments = move_bases(
        from_multi_bit(mb), grad, moments, Descent(learning_rate, b1, b2, eps)
    )
    return _encoded(mb, bases), moments


def coordinate_step(
    mb: qarray.MultiBit,
    grad,
    moments: AlqMoments,
    *,
    learning_rate,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
) -> tuple[qarray.MultiBit, AlqMoments]:
    """Moves the coordinates by AMSGrad (eq. 21, algorithm 4).

    The basis of a coordinate that becomes negative is turned, so that the weights stay the same.

    Args:
      mb, grad, moments, learning_rate, b1, b2, eps: as in `basis_step`.
      weight_decay: strength of the L2 penalty on the coordinates.
    """
    bases, moments = move_coords(
        from_multi_bit(mb), grad, moments, Descent(learning_rate, b1, b2, eps), weight_decay
    )
    return _encoded(mb, bases), moments


def prune_step(
    tree,
    grads,
    moments,
    *,
    count,
    preselect: float,
    learning_rate=PRUNE_RATE,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
):
    """Removes the coordinates whose removal raises the quadratic model least (algorithm 2).

    Args:
      tree: MultiBit leaves.
      grads: arrays of their shapes, in a tree of the same structure.
      moments: AlqMoments, likewise.
      count: how many coordinates of all leaves together are removed, exactly.
      preselect: the share of every leaf's coordinates, in (0, 1], that comes first; where these
        are fewer than count, the rest follows by increment. Fractions are rounded by the step.
      learning_rate, b1, b2, eps: of AMSGrad; the coordinates that stay do not move.

    Raises:
      ValueError: preselect out of range; count negative, or more than there are, or all of them.
    """
    check_preselect(preselect)
    leaves, treedef = jax.tree.flatten(tree, is_leaf=qarray.is_encoded)
    alive = sum(jnp.count_nonzero(leaf.mask) for leaf in leaves)
    if not isinstance(alive, jax.core.Tracer) and not isinstance(count, jax.core.Tracer):
        left = int(alive) - int(count)
        if count < 0 or left < 1:
            raise ValueError(f"pruning {count} of {int(alive)} coordinates leaves {left} of them")
    found, moved = prune(
        [from_multi_bit(leaf) for leaf in leaves],
        treedef.flatten_up_to(grads),
        treedef.flatten_up_to(moments),
        Descent(learning_rate, b1, b2, eps),
        count,
        preselect,
    )
    new = [_encoded(leaf, bases) for leaf, bases in zip(leaves, found, strict=True)]
    return treedef.unflatten(new), treedef.unflatten(moved)


def straight_through_step(
    mb: qarray.MultiBit,
    w,
    grad,
    moments: AlqMoments,
    *,
    learning_rate,
    loss_aware: bool,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
) -> tuple[qarray.MultiBit, jax.Array, AlqMoments]:
    """Moves full-precision weights by the gradient at their sums (the baselines of section 5.2).

    Args:
      mb: the leaf in use.
      w: the full-precision weights that are maintained, [*shape].
      grad, moments, learning_rate, b1, b2, eps: as in `basis_step`.
      loss_aware: projects in AMSGrad's metric; False: by the reconstruction error.

    Returns:
      The new leaf, weights and moments.
    """
    descent = Descent(learning_rate, b1, b2, eps)
    bases, w, moments = straight_through(
        from_multi_bit(mb), w, grad, moments, descent, loss_aware=loss_aware
    )
    return _encoded(mb, bases), w, moments


def check_preselect(value):
    """Raises ValueError for a share outside (0, 1]."""
    checks.number("preselect", value, "a share in (0, 1]", lambda x: (x > 0) & (x <= 1))


def move_bases(bases: Bases, grad, moments: AlqMoments, descent: Descent):
    """`basis_step` on the leaf's codes."""
    weights, slope, metric = _weight_model(bases, grad, moments, descent)
    old = bases_lib.values(bases)
    new = _project(bases, old - slope / metric, metric)
    moved = _any_gradient(bases, weights, descent.eps)
    new = Bases(
        jnp.where(moved, new.codes, bases.codes),
        jnp.where(moved[..., None], new.coords, bases.coords),
        bases.mask,
    )
    return new, AlqMoments(moments.count + 1, weights, _coord_moments(new, weights))


def move_coords(
    bases: Bases, grad, moments: AlqMoments, descent: Descent, weight_decay
) -> tuple[Bases, AlqMoments]:
    """`coordinate_step` on the leaf's codes."""
    moments = _accumulate(bases, grad, moments, descent, weight_decay)
    slope, metric = amsgrad.model(moments.coords, moments.count, *descent)
    coords = jnp.where(bases.mask, bases.coords - slope / metric, 0)
    new, turned = bases_lib.restore_signs(bases._replace(coords=coords))
    mean = moments.coords.mean
    mean = jnp.where(turned, -mean, mean)  # the gradient of a turned coordinate turns too
    return new, moments._replace(coords=moments.coords._replace(mean=mean))


def prune(leaves, grads, moments, descent: Descent, count, preselect):
    """`prune_step` on lists; count may be 0."""
    moved = [
        _accumulate(bases, grad, mine, descent, 0.0)
        for bases, grad, mine in zip(leaves, grads, moments, strict=True)
    ]
    rises = []
    for bases, mine in zip(leaves, moved, strict=True):
        slope, metric = amsgrad.model(mine.coords, mine.count, *descent)
        rises.append(increments(bases.coords, slope, metric))
    masks = [bases.mask for bases in leaves]
    # Rounded so that the mean over the steps is the share: a small leaf gives one now and then.
    first = [
        jnp.floor(preselect * jnp.count_nonzero(bases.mask) + mine.count * 0.618034 % 1)
        for bases, mine in zip(leaves, moved, strict=True)
    ]
    kept = keep_largest(rises, masks, first, count)
    new = []
    for bases, mask in zip(leaves, kept, strict=True):
        codes = bases.codes | bases_lib.masked_bits(mask)
        new.append(Bases(codes, jnp.where(mask, bases.coords, 0), mask))
    return new, moved


def increments(coords, slope, metric):
    """Returns what removing each coordinate adds to the model (eq. 13)."""
    return -slope * coords + 0.5 * metric * coords * coords


def keep_largest(rises, masks, first, count):
    """Returns the masks without the `count` smallest increments, exactly.

    Args:
      rises, masks: lists of arrays, one pair per leaf.
      first: how many of each leaf's smallest come before all others.
      count: how many are removed; may be traced.

    Of equal increments the first ones go. Found by counting: only counts leave their device.
    """
    keys = [_descending(rise) for rise in rises]
    early = [
        smallest([key], [mask], jnp.asarray(number, jnp.int32))[0]
        for key, mask, number in zip(keys, masks, first, strict=True)
    ]
    late = [mask & ~one for mask, one in zip(masks, early, strict=True)]
    gone = smallest(keys, early, count)
    more = smallest(keys, late, jnp.maximum(count - _count(early), 0))
    return [mask & ~one & ~other for mask, one, other in zip(masks, gone, more, strict=True)]


def smallest(keys, masks, count):
    """Returns the masks of the `count` largest keys where the masks are True, of equal ones the
    first; all of them where there are fewer."""
    dtype = keys[0].dtype
    bits = 8 * dtype.itemsize
    border = order_statistics.kth_largest(
        lambda t: _count([mask & (key >= t) for key, mask in zip(keys, masks, strict=True)]),
        count,
        dtype,
        bits=bits,
    )
    above = [mask & (key > border) for key, mask in zip(keys, masks, strict=True)]
    equal = [mask & (key == border) for key, mask in zip(keys, masks, strict=True)]
    # Places as keys, the first one the largest.
    total, places = sum(mask.size for mask in masks), []
    left = total
    for mask in masks:
        places.append(left - _places(mask.shape))
        left -= mask.size
    last = order_statistics.kth_largest(
        lambda t: _count([one & (place >= t) for one, place in zip(equal, places, strict=True)]),
        count - _count(above),
        jnp.int32,
        bits=(total + 1).bit_length(),
    )
    return [
        one | (same & (place >= last))
        for one, same, place in zip(above, equal, places, strict=True)
    ]


def _places(shape):
    """Returns the index of every element, counted row by row."""
    out = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        step = math.prod(shape[axis + 1 :])
        out = out + step * lax.broadcasted_iota(jnp.int32, shape, axis)
    return out


def _count(masks):
    return sum(jnp.count_nonzero(mask) for mask in masks).astype(jnp.int32)


def _descending(x):
    """Returns unsigned integers that are the larger the smaller x is; NaN is the largest x."""
    x = jnp.where(x == 0, 0, jnp.where(jnp.isnan(x), jnp.inf, x))  # no negative zero
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, unsigned)
    sign = jnp.asarray(1 << (8 * x.dtype.itemsize - 1), unsigned)
    # Negative numbers: the larger magnitude has the larger key; positive ones: the reverse.
    return jnp.where(bits >= sign, bits, bits ^ (sign - 1))


def straight_through(
    bases: Bases, w, grad, moments: AlqMoments, descent: Descent, *, loss_aware: bool
):
    """`straight_through_step` on the leaf's codes."""
    weights, slope, metric = _weight_model(bases, grad, moments, descent)
    point = w.astype(slope.dtype).reshape(slope.shape) - slope / metric
    if loss_aware:
        new = _project(bases, point, metric)
        moved = _any_gradient(bases, weights, descent.eps)
        coords = jnp.where(moved[..., None], new.coords, bases.coords)
        new = Bases(jnp.where(moved, new.codes, bases.codes), coords, bases.mask)
    else:
        new = _project(bases, point, None)
    moments = AlqMoments(moments.count + 1, weights, _coord_moments(new, weights))
    return new, point.reshape(w.shape).astype(w.dtype), moments


def _weight_model(bases, grad, moments, descent):
    """The weights' new moments, and g and H of eq. 10 in the leaf's view."""
    weights = accumulate(moments.weights, grad, descent.b1, descent.b2)
    slope, metric = amsgrad.model(weights, moments.count + 1, *descent)
    return weights, slope.reshape(bases.codes.shape), metric.reshape(bases.codes.shape)


def _project(bases, point, metric):
    """The nearest sums, then their best coordinates, in a diagonal metric (None: plain)."""
    codes = bases_lib.nearest_codes(bases.coords, bases.mask, point)
    codes = lax.optimization_barrier(codes)  # it is read K (K + 1) times below
    new = bases._replace(codes=codes)
    if metric is not None:
        metric, point = lax.optimization_barrier((metric, point))
    coords = bases_lib.refit(new, point, metric, RIDGE)
    return bases_lib.restore_signs(new._replace(coords=coords))[0]


def _any_gradient(bases, weights, eps):
    """True for groups in which some gradient was above the level of eps, [*group]."""
    root = jnp.sqrt(weights.largest).reshape(bases.codes.shape)
    return jnp.any(root > eps, axis=bases_lib.axes_of(bases.coords), keepdims=True)


def _accumulate(bases, grad, moments, descent, weight_decay) -> AlqMoments:
    """Both domains' moments after one more gradient; that of the coordinates by eq. 14."""
    axes, count = bases_lib.axes_of(bases.coords), bases.coords.shape[-1]
    wide = grad.astype(bases.coords.dtype).reshape(bases.codes.shape)
    slots = [bases_lib.total(bases_lib.signed(bases.codes, k, wide), axes) for k in range(count)]
    mine = jnp.stack(slots, axis=-1) + weight_decay * bases.coords
    mine = jnp.where(bases.mask, mine, 0)
    return AlqMoments(
        moments.count + 1,
        accumulate(moments.weights, grad, descent.b1, descent.b2),
        accumulate(moments.coords, mine, descent.b1, descent.b2),
    )


def _coord_moments(bases, weights: Moments) -> Moments:
    """The coordinates' moments as the weights' imply: B^T m, and sums over the group."""
    axes, count = bases_lib.axes_of(bases.coords), bases.coords.shape[-1]
    mean, square, largest = (x.reshape(bases.codes.shape) for x in weights)
    slots = [bases_lib.total(bases_lib.signed(bases.codes, k, mean), axes) for k in range(count)]

    def spread(x):
        return jnp.where(bases.mask, bases_lib.total(x, axes)[..., None], 0)

    mean = jnp.where(bases.mask, jnp.stack(slots, axis=-1), 0)
    return Moments(mean, spread(square), spread(largest))


def _encoded(mb, bases):
    basis = bases_lib.unpack(bases.codes, bases.coords.shape[-1])
    return dataclasses.replace(mb, basis=basis, coords=bases.coords, mask=bases.mask)
