"""The step of a uniform grid of least squared error, found among fractions of the widest one."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.core import rounding

COARSE = np.geomspace(1, 1 / 64, 32)  # 14% apart
FINE = np.geomspace(COARSE[0] / COARSE[1], COARSE[1] / COARSE[0], 34)[1:-1]  # around the best one


ZERO_STEP = 0.1  # where all is zero, as biases are at first: there is no range to go by


def widest(least, most, low, high):
    """Returns the smallest step with which the codes low..high span least..most, per group.

    Args:
      least, most: at most and at least 0.
      low, high: the outermost levels in steps; a high of 0, as one bit has it, counts as 1.
    """
    high, low = jnp.where(high > 0, high, 1), jnp.where(low < 0, low, -jnp.inf)
    step = jnp.maximum(most / high, least / low)
    return jnp.where(step >= jnp.finfo(step.dtype).tiny, step, ZERO_STEP)


def step(x, widest, low, high, *, halves: bool = False, weight=1):
    """Returns the step of least squared error per group, never worse than the widest one.

    Args:
      x: floats.
      widest: the largest candidate, positive, of x's rank: groups are its axes of length 1.
      low, high: codes, broadcast to the groups.
      halves: whether levels lie at half steps, as in `rounding.to_codes`.
      weight: of every element, broadcasts to x.
    """

    def error(fraction):
        candidate = fraction * widest
        codes = rounding.to_codes(x, candidate, low, high, halves)
        rest = (codes + 0.5 if halves else codes) * candidate - x
        return _sum_over(weight * rest**2, widest.shape)

    return widest * fraction(error, widest)


def fraction(error: Callable, like):
    """Returns the fraction in 1/73 .. 1 with the least `error`, per group, of 64 candidates.

    Args:
      error: fractions -> errors, both of the shape of `like`.
      like: an array of the groups' shape and dtype.

    1 is a candidate, and of equals the larger ones win: nothing is ever worse than the whole.
    """
    one = jnp.ones_like(like)

    def search(candidates, around, best):
        candidates = jnp.asarray(candidates, like.dtype)

        def better(i, best):
            tried = jnp.minimum(around * candidates[i], 1)
            found = error(tried)
            smaller = found < best[1]
            return jnp.where(smaller, tried, best[0]), jnp.where(smaller, found, best[1])

        return lax.fori_loop(0, candidates.size, better, best)

    best = search(COARSE, one, (one, jnp.full_like(like, jnp.inf)))
    return search(FINE, best[0], best)[0]


def _sum_over(x, group):
    """Returns the sums over the axes of length 1 in `group`, kept, that x has longer."""
    axes = tuple(axis for axis, kept in enumerate(group) if kept == 1)
    return jnp.sum(x, axis=axes, keepdims=True) if group else jnp.sum(x)
