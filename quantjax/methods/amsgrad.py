"""AMSGrad with a projection: subgradient steps that stay in a set (eq. 8 of ALQ).

Every step minimises the quadratic model g (x' - x) + |x' - x|^2_H / 2 over the set, which is the
projection, in the metric H, of the plain AMSGrad point x - g / H.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from quantjax.core import checks, rounding


class Moments(NamedTuple):
    """Moments of one array's gradients, in float32 or wider."""

    mean: jax.Array  # [*shape]
    square: jax.Array  # [*shape], not negative
    largest: jax.Array  # [*shape], the running maximum of square


def zero_moments(x) -> Moments:
    """Returns moments before the first step, for one array."""
    # Three arrays: a step that takes its state's buffers cannot take one thrice.
    return Moments(*(jnp.zeros_like(x, rounding.work_dtype(x.dtype)) for _ in range(3)))


def accumulate(moments: Moments, grad, b1, b2) -> Moments:
    """Returns the moments after one more gradient."""
    grad = grad.astype(moments.mean.dtype)
    mean = b1 * moments.mean + (1 - b1) * grad
    square = b2 * moments.square + (1 - b2) * grad * grad
    return Moments(mean, square, jnp.maximum(moments.largest, square))


def model(moments: Moments, count, learning_rate, b1, b2, eps):
    """Returns g and H of the quadratic model (eq. 10), bias-corrected.

    Args:
      count: steps accumulated, at least 1.
    """
    dtype = moments.mean.dtype
    count = jnp.asarray(count, dtype)
    slope = moments.mean * (jnp.asarray(learning_rate, dtype) / _one_minus_power(b1, count))
    metric = (jnp.sqrt(moments.largest) + eps) / jnp.sqrt(_one_minus_power(b2, count))
    return slope, metric


class ProjectedAmsgradState(NamedTuple):
    """State of `projected_amsgrad`."""

    count: jax.Array  # scalar, int32: steps done
    mean: optax.Updates  # as the params: float32 or wider, as the two below
    square: optax.Updates
    largest: optax.Updates


def projected_amsgrad(
    learning_rate, project: Callable, *, b1=0.9, b2=0.999, eps=1e-8
) -> optax.GradientTransformation:
    """Descends by AMSGrad and projects every point on a set in AMSGrad's metric (eq. 8).

    Args:
      learning_rate: a number or a schedule.
      project: (target, metric) -> point: trees like the params; the point of the set that is
        nearest to target in sum metric (point - target)^2. `quantizer.apply` with a fixed state
        makes one for any quantizer, since its nearest level is so in any diagonal metric.
      b1, b2: decay of the moments, in [0, 1).
      eps: added to the root of the largest second moment.

    Raises:
      ValueError: a number out of range; params missing in `update`.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        check_decay(name, value)
    check_positive("eps", eps)
    check_not_negative("learning_rate", learning_rate)

    def init(params):
        zeros = [jax.tree.map(lambda x: zero_moments(x).mean, params) for _ in range(3)]
        return ProjectedAmsgradState(jnp.zeros((), jnp.int32), *zeros)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("projected_amsgrad needs params: call update(grads, state, params)")
        count = optax.safe_increment(state.count)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        grads, treedef = jax.tree.flatten(updates)
        before = zip(*(treedef.flatten_up_to(tree) for tree in state[1:]), strict=True)
        moved = [
            accumulate(Moments(*moments), grad, b1, b2)
            for moments, grad in zip(before, grads, strict=True)
        ]
        models = [model(moments, count, rate, b1, b2, eps) for moments in moved]
        wide = [
            x.astype(moments.mean.dtype)
            for x, moments in zip(treedef.flatten_up_to(params), moved, strict=True)
        ]
        target = [x - slope / metric for x, (slope, metric) in zip(wide, models, strict=True)]
        metric = treedef.unflatten([metric for _, metric in models])
        points = treedef.flatten_up_to(project(treedef.unflatten(target), metric))
        steps = [
            (point - x).astype(grad.dtype)
            for point, x, grad in zip(points, wide, grads, strict=True)
        ]
        trees = (treedef.unflatten(part) for part in zip(*moved, strict=True))
        return treedef.unflatten(steps), ProjectedAmsgradState(count, *trees)

    return optax.GradientTransformation(init, update)


def check_decay(name, value):
    """Raises ValueError for a concrete number outside [0, 1)."""
    checks.number(name, value, "in [0, 1)", lambda x: (x >= 0) & (x < 1))


def check_not_negative(name, value):
    """Raises ValueError for a concrete number that is negative or not finite."""
    checks.number(name, value, "finite and not negative", lambda x: np.isfinite(x) & (x >= 0))


def check_positive(name, value):
    """Raises ValueError for a concrete number that is not positive and finite."""
    checks.number(name, value, "finite and positive", lambda x: np.isfinite(x) & (x > 0))


def _one_minus_power(base, count):
    """Returns 1 - base**count without cancellation; base a number or traced."""
    if isinstance(base, jax.core.Tracer):
        return 1 - base**count
    with np.errstate(divide="ignore"):
        return -jnp.expm1(count * jnp.asarray(np.log(base), count.dtype))
