"""The categories of relaxed rounding: a logistic variable around x, cut into the cells of a grid.

In units of the grid t = x / alpha, s = alpha / sigma; sums over categories are sums over the edges
of cells, see `logistic_masses`.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.methods.srq import logistic_masses

REACH = 2.0**20
FAR = 1e30
FEW = 16  # masks whose sums a compiler may form anew for each of them


class Cells(NamedTuple):
    """Adjacent runs of codes from left to right, and the mask that each of them is under."""

    low: np.ndarray  # first code of every run
    high: np.ndarray  # last code
    mask: np.ndarray  # index into (1, *masks)

    def under(self, k: int) -> list[tuple[int, int]]:
        """Returns first and last codes of the runs under mask k."""
        return [(int(self.low[i]), int(self.high[i])) for i in np.flatnonzero(self.mask == k)]


class Estimate(NamedTuple):
    """x_hat / alpha and the derivatives that an estimator gives it."""

    value: Any
    dt: Any
    sds: Any  # s times the derivative by s


def log_masses(t, s, codes):
    """Returns the log mass of the unit cell around every code, on a new last axis (eq. 1)."""
    t, s = t[..., None], jnp.broadcast_to(s, t.shape)[..., None]
    codes = jnp.reshape(codes, (1,) * (t.ndim - 1) + (-1,))
    outside = jax.nn.softplus(s * (t - codes - 0.5)) + jax.nn.softplus(s * (codes - 0.5 - t))
    return jnp.log(-jnp.expm1(-s)) - outside


def mode(t, s, code, low, high) -> Estimate:
    """The largest of all cells low .. high, which is `code`, under eq. 3: d(code * share)."""
    a, b = _half(t - code + 0.5, s), _half(t - code - 0.5, s)
    A, B = _half(t - low + 0.5, s), _half(t - high - 0.5, s)
    width = high - low + 1
    # A mass is (1 - exp(-s width)) F(right) (1 - F(left)). The cell of the mode is as near as the
    # grid, and beyond the grid they share an edge: in ratios and differences that cancels exactly.
    share = jnp.expm1(-s) / jnp.expm1(-s * width)
    share = share * (a.inverse * b.inverse) / (A.inverse * B.inverse)
    dt = s * ((a.below - A.below) - (b.above - B.above))
    sds = s * ((a.u * a.below - A.u * A.below) - (b.u * b.above - B.u * B.above))
    sds += _width_term(s, 1) - _width_term(s, width)
    return Estimate(code, code * share * dt, code * share * sds)


def masked_mode(t, s, cells: Cells, masks):
    """Returns the code of largest mask times mass, or NaN of NaN; masks: [1 + count, *group]."""
    return _largest(_within_reach(t), s, cells, masks)


def masked_mode_estimate(t, s, cells: Cells, masks):
    """Returns `masked_mode` under eq. 3, and (cotangent -> cotangents of the masks)."""
    t = _within_reach(t)
    near, code = _nearest(t, cells, masks), _largest(t, s, cells, masks)
    place = logistic_masses.place(t, s, near, holes=True)
    edges = [*(cells.low - 0.5).tolist(), float(cells.high[-1]) + 0.5]  # float64s would spread
    borders = [logistic_masses.at(place, e) for e in edges]
    sizes = (cells.high - cells.low + 1).tolist()
    runs = [
        logistic_masses.mass(place, *ends, size)
        for ends, size in zip(itertools.pairwise(borders), sizes, strict=True)
    ]
    masses = _by_mask(cells, masks, runs)
    total = _weighted(masks, masses)
    # An edge counts for the run left of it and against the one right of it.
    ends = jnp.zeros_like(masks[:1])
    jumps = -jnp.diff(masks[cells.mask], axis=0, prepend=ends, append=ends)
    slope = _weighted(jumps, [edge.slope for edge in borders]) / total
    moment = _weighted(jumps, [edge.moment for edge in borders]) / total

    a, b = logistic_masses.at(place, code - 0.5), logistic_masses.at(place, code + 0.5)
    unmasked = logistic_masses.mass(place, a, b, 1) / total
    mine = [_among(code, cells.under(k)) for k in range(len(masks))]
    weight = code * unmasked * _weighted(masks, mine)
    dt = s * (a.below - b.above + slope)
    sds = s * (a.arm * a.below - b.arm * b.above + moment) + (t - place.point) * dt
    estimate = Estimate(code, weight * dt, weight * (sds + _width_term(s, 1)))

    def to_masks(cotangent):
        # The share of the mode moves with its own mask as far as others hold the rest.
        rest = [jnp.where(own, 0, mass) for own, mass in zip(mine, masses, strict=True)]
        own = cotangent * code * unmasked * _weighted(masks, rest) / total
        others = cotangent * weight / total
        pairs = zip(mine, masses, strict=True)
        return [jnp.where(hit, own, -others * mass) for hit, mass in pairs][1:]

    return estimate, to_masks


def expectation(t, s, low, count) -> Estimate:
    """The mean of `count` categories from `low` on, sum_i r_i n_i; both may be traced."""
    s = jnp.minimum(s, logistic_masses.SHARPEST)
    code = jnp.clip(jnp.round(t), low, low + count - 1)
    place = logistic_masses.place(t, s, code, holes=False)
    origin = low - 0.5
    run = logistic_masses.run(place, origin, logistic_masses.numbered(place, origin), 0, count)
    return _mean(place, [run], [1], run.mass, run.lever(logistic_masses.TAIL) / run.mass)


def masked_expectation(t, s, cells: Cells, masks):
    """Returns the mean of all masked categories, and (cotangent -> cotangents of the masks)."""
    t, s = _within_reach(t), jnp.minimum(s, logistic_masses.SHARPEST)
    place = logistic_masses.place(t, s, _nearest(t, cells, masks), holes=True)
    origin = float(cells.low[0]) - 0.5
    edge = logistic_masses.numbered(place, origin)
    borders = [*(cells.low - cells.low[0]).tolist(), int(cells.high[-1] - cells.low[0]) + 1]
    runs = [logistic_masses.run(place, origin, edge, *ends) for ends in itertools.pairwise(borders)]
    masses = _by_mask(cells, masks, [run.mass for run in runs])
    levers = _by_mask(cells, masks, [run.lever(logistic_masses.TAIL) for run in runs])
    total = _weighted(masks, masses)
    shares, firsts = ([part / total for part in parts] for parts in (masses, levers))
    estimate = _mean(place, runs, masks[cells.mask], total, _weighted(masks, firsts))
    other_shares, other_firsts = (_without_each(masks, parts) for parts in (shares, firsts))

    def to_masks(cotangent):
        # A mask moves the mean away from that of the others: its own terms cancel.
        terms = zip(firsts, other_shares, shares, other_firsts, strict=True)
        return [cotangent * (first * rest - share * more) for first, rest, share, more in terms][1:]

    return estimate, to_masks


class _Half(NamedTuple):
    u: Any
    inverse: Any
    below: Any
    above: Any


def _half(u, s):
    """F and 1 - F at the signed distance u = t - edge, relative to nothing."""
    decay = jnp.exp(-s * jnp.abs(u))
    inverse = 1 / (1 + decay)
    tail = decay * inverse
    return _Half(u, inverse, jnp.where(u > 0, tail, inverse), jnp.where(u > 0, inverse, tail))


def _mean(place, runs, weights, total, offset) -> Estimate:
    """The mean code + offset of runs of cells, and its derivatives."""
    slope, moment = (
        _weighted(weights, [run.lever(part, offset) for run in runs]) / total
        for part in (logistic_masses.SLOPE, logistic_masses.MOMENT)
    )
    dt = -place.s * slope
    return Estimate(place.code + offset, dt, -place.s * moment + (place.t - place.point) * dt)


def _weighted(weights, parts):
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def _by_mask(cells, masks, parts):
    """Sums of what belongs to runs of cells, mask by mask."""
    pairs = list(zip(cells.mask, parts, strict=True))
    return [sum(part for k, part in pairs if k == mine) for mine in range(len(masks))]


def _width_term(s, width):
    return s * width / jnp.expm1(s * width)


def _within_reach(t):
    """Bounded where float32 would no longer tell which code is nearer."""
    return jnp.clip(t, -REACH, REACH)


def _nearest_of(t, runs):
    """The nearest code in `runs`, and its distance."""
    clipped = [jnp.clip(jnp.round(t), *run) for run in runs]
    pairs = [(code, jnp.abs(t - code)) for code in clipped]
    return functools.reduce(lambda a, b: _choose(b[1] < a[1], b, a), pairs)


def _nearest(t, cells, masks):
    """The nearest code that no mask removes; of two, the one that `round` takes."""
    best = _nearest_of(t, cells.under(0))  # which nothing masks
    for k, z in list(enumerate(masks))[1:]:
        code, distance = _nearest_of(t, cells.under(k))
        nearer = (distance < best[1]) | ((distance == best[1]) & (code == jnp.round(t)))
        best = _choose((z > 0) & nearer, (code, distance), best)
    return best[0]


def _largest(t, s, cells, masks):
    """The code of the largest category: of a mask's codes the nearest can be it.

    With E = exp(-s d) at the distance d, the mass is proportional to E / (1 + c E + E**2), c = 2
    cosh(s / 2). Where z E / (..) exceeds that of the best so far is told without a quotient, and
    as a sum of what E and what z adds to it: each is exact in its sign, however wide or sharp.
    """
    candidates = [_nearest_of(t, cells.under(k)) for k in range(len(masks))]
    least = candidates[0][1]  # of the codes that no mask removes
    for z, (_, distance) in zip(masks[1:], candidates[1:], strict=True):
        least = jnp.where(z > 0, jnp.minimum(least, distance), least)
    # E is told relative to that of the nearest, `fade`, which multiplies c and E**2.
    wide = jnp.minimum(jnp.exp(s * (0.5 - least)), FAR)
    c, fade = wide * (1 + jnp.exp(-s)), wide * jnp.exp(-0.5 * s)
    square = fade * fade
    best = candidates[0][0], jnp.exp(-s * (candidates[0][1] - least)), jnp.ones_like(t)
    for z, (code, distance) in zip(masks[1:], candidates[1:], strict=True):
        E = jnp.exp(-s * jnp.maximum(distance - least, 0))
        _, best_E, best_z = best
        by_distance = z * (E - best_E) * (1 - square * E * best_E)
        by_mask = (z - best_z) * best_E * (1 + E * (c + square * E))
        more = by_distance + by_mask
        larger = (more > 0) | ((more == 0) & (code == jnp.round(t)))  # half-way as `round`
        best = _choose((z > 0) & larger, (code, E, jnp.broadcast_to(z, t.shape)), best)
    return jnp.where(jnp.isnan(t), t, jnp.where(best[0] == 0, 0, best[0]))  # no negative zero


def _choose(condition, these, those):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), these, those)


def _among(code, runs):
    return functools.reduce(jnp.logical_or, [(low <= code) & (code <= high) for low, high in runs])


def _without_each(masks, parts):
    """For every mask the weighted sum of all other parts, without subtracting."""
    terms = [z * part for z, part in zip(masks, parts, strict=True)]
    before, after = (_sums_before(ordered) for ordered in (terms, terms[::-1]))
    return [a + b for a, b in zip(before, after[::-1], strict=True)]


def _sums_before(terms):
    if len(terms) > FEW:
        return [jnp.zeros_like(terms[0]), *jnp.cumsum(jnp.stack(terms[:-1]), axis=0)]
    return [0, *itertools.accumulate(terms[:-1])]
