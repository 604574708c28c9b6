"""The categories of relaxed rounding: a logistic variable around x, cut into the cells of a grid.

In units of the grid t = x / alpha, s = alpha / sigma and F(e) = sigmoid(s (e - t)): the cell between
two edges has the mass F(right) - F(left). Sums over cells become sums over edges: of the tails

    G(e) = F(e) left of t,  F(e) - 1 right of it,  |G(e)| = decay / (1 + decay),
    F'(e) = decay / (1 + decay)**2,  decay = exp(-s |t - e|),

with dF/dt = -s F' and s dF/ds = -s (t - e) F'. Under masks z a total mass is sum_e (z left of e - z
right of it) G(e), plus z of the cell that holds t. All masses are taken relative to that of the
nearest cell with z > 0, so that no ratio is 0 / 0, however far x lies from the grid.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

UNROLLED = 40  # more edges than this are visited by a loop of the compiled program


class Cells(NamedTuple):
    """Adjacent runs of codes from left to right, and the mask that each of them is under."""

    low: np.ndarray  # first code of every cell
    high: np.ndarray  # last code
    mask: np.ndarray  # index into (1, *masks)


class Estimate(NamedTuple):
    """x_hat / alpha and the derivatives that an estimator gives it."""

    value: Any
    dt: Any
    sds: Any  # s times the derivative by s


class _Edge(NamedTuple):
    """The border of two cells at the signed distance u = t - edge."""

    u: Any
    near: Any  # exp(-s |u|), relative to the nearest cell
    inverse: Any  # 1 / (1 + exp(-s |u|))

    decay: Any  # exp(-s |u|)

    @property
    def below(self):
        """F(edge)."""
        return jnp.where(self.u > 0, self.decay, 1) * self.inverse

    @property
    def above(self):
        """1 - F(edge)."""
        return jnp.where(self.u > 0, 1, self.decay) * self.inverse

    @property
    def tail(self):
        """G(edge)."""
        tail = self.near * self.inverse
        return jnp.where(self.u > 0, tail, -tail)

    @property
    def slope(self):
        """F'(edge)."""
        return self.near * self.inverse**2


def log_masses(t, s, codes):
    """Returns the log mass of the unit cell around every code, on a new last axis (eq. 1)."""
    t, s = t[..., None], jnp.broadcast_to(s, t.shape)[..., None]
    outside = jax.nn.softplus(s * (t - codes - 0.5)) + jax.nn.softplus(s * (codes - 0.5 - t))
    return jnp.log(-jnp.expm1(-s)) - outside


def mode(t, s, code, low, high) -> Estimate:
    """The largest of all cells low .. high, which is `code`, under eq. 3: d(code * share)."""
    a, b = _edge(t - code + 0.5, s), _edge(t - code - 0.5, s)
    A, B = _edge(t - low + 0.5, s), _edge(t - high - 0.5, s)
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
    """Returns the code of largest mask times mass; masks: [1 + count, *group]."""
    return _best(t, s, cells, masks, _distance(t, cells, masks)).code


def masked_mode_estimate(t, s, cells: Cells, masks):
    """Returns `masked_mode` under eq. 3, and (cotangent -> cotangents of the masks)."""
    shift = _distance(t, cells, masks)
    best = _best(t, s, cells, masks, shift)
    total, slope, moment = _totals(t, s, cells, masks, shift)
    code = best.code
    a, b = _edge(t - code + 0.5, s), _edge(t - code - 0.5, s)
    unmasked_share = -jnp.expm1(-s) * best.mass / total
    weight = code * best.mask * unmasked_share
    estimate = Estimate(
        code,
        weight * s * (a.below - b.above + slope / total),
        weight * (s * (a.u * a.below - b.u * b.above + moment / total) + _width_term(s, 1)),
    )

    def to_masks(cotangent):
        own = cotangent * code * unmasked_share
        others = cotangent * weight / total

        def of_cell(cell, mass):
            mine = (cell.low <= code) & (code <= cell.high)
            return jnp.where(mine, own, 0) - others * mass

        return _over_masks(t, s, cells, masks, shift, of_cell)

    return estimate, to_masks


def expectation(t, s, low, high) -> Estimate:
    """The mean of all categories low .. high, sum_i r_i n_i; low and high may be traced."""
    code = _holding(t, low, high)
    shift = jnp.abs(t - jnp.clip(t, low - 0.5, high + 0.5))
    left, right = _edge(t - low + 0.5, s, shift), _edge(t - high - 0.5, s, shift)

    def minus(i, sums):
        edge = _edge(t - low - i - 0.5, s, shift)
        return _minus(sums, _parts(edge))

    # Edge by edge, n left of it less n right of it: 1 inside, and what remains at the ends.
    count = high - low
    count = count if isinstance(count, int) else count.astype(jnp.int32)
    first = tuple(
        (high - code) * r - (low - code) * l
        for l, r in zip(_parts(left), _parts(right), strict=True)
    )
    total = tuple(r - l for l, r in zip(_parts(left), _parts(right), strict=True))
    inside = jnp.where(shift > 0, 0, 1)
    first = _loop(count, minus, first)
    return _mean(s, code, (total[0] + inside, *total[1:]), first)


def masked_expectation(t, s, cells: Cells, masks):
    """Returns the mean of all masked categories, and (cotangent -> cotangents of the masks)."""
    shift = _distance(t, cells, masks)
    code = _holding(t, cells.low[0], cells.high[-1])
    total, first = _moments(t, s, cells, masks, shift, code)
    estimate = _mean(s, code, total, first)

    def to_masks(cotangent):
        weight = cotangent / total[0]

        def of_cell(cell, mass):
            return weight * (cell.low - estimate.value) * mass

        return _over_masks(t, s, cells, masks, shift, of_cell)

    return estimate, to_masks


def _edge(u, s, shift=None) -> _Edge:
    """An edge at distance u; `near` is relative to a cell at distance `shift`."""
    if shift is None:
        near = decay = jnp.exp(-s * jnp.abs(u))
    else:
        near = jnp.exp(-s * jnp.maximum(jnp.abs(u) - shift, 0))
        decay = near * jnp.exp(-s * shift)
    return _Edge(u, near, 1 / (1 + decay), decay)


def _parts(edge):
    """G, F' and u F'."""
    slope = edge.slope
    return edge.tail, slope, edge.u * slope


def _minus(sums, parts):
    return tuple(total - part for total, part in zip(sums, parts, strict=True))


def _mean(s, code, total, first) -> Estimate:
    """From sum_i r_i and sum_i r_i (n_i - code), each with its two slopes."""
    offset = first[0] / total[0]
    return Estimate(
        code + offset,
        s * (offset * total[1] - first[1]) / total[0],
        s * (offset * total[2] - first[2]) / total[0],
    )


def _width_term(s, width):
    return s * width / jnp.expm1(s * width)


def _holding(t, low, high):
    """The code whose cell holds t, edges on their left; the nearest beyond low .. high."""
    return jnp.clip(jnp.ceil(t - 0.5), low, high)


def _distance(t, cells, masks):
    """How far the nearest cell is that no mask removes."""

    def visit(i, least):
        cell, z = _at(cells, masks, i)
        distance = jnp.abs(t - jnp.clip(t, cell.low - 0.5, cell.high + 0.5))
        return jnp.where(z > 0, jnp.minimum(least, distance), least)

    return _loop(len(cells.low), visit, jnp.full_like(t, jnp.inf))


class _Best(NamedTuple):
    score: Any
    code: Any
    mask: Any
    mass: Any  # relative, without the factor 1 - exp(-s)


def _best(t, s, cells, masks, shift) -> _Best:
    """The largest category: of a cell's codes the nearest can be it."""
    code = jnp.round(t)
    far = jnp.exp(-s)
    holding = 1 / ((1 + jnp.exp(-s * jnp.abs(t - code + 0.5))) * (1 + jnp.exp(-s * jnp.abs(code + 0.5 - t))))

    def visit(cell, z, left, right, best):
        # The code next to an edge has its other edge one further away.
        edge = _choose(right.u > 0, right, left)
        inside = (code >= cell.low) & (code <= cell.high)
        beside = edge.near * edge.inverse / (1 + edge.decay * far)
        mass = jnp.where(inside, holding, beside)
        mine = _Best(z * mass, jnp.clip(code, cell.low, cell.high), z, mass)
        return _choose(mine.score > best.score, mine, best)

    nothing = jnp.zeros_like(t)
    return _fold(t, s, cells, masks, shift, visit, _Best(nothing, nothing, nothing, nothing))


def _choose(condition, these, those):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), these, those)


def _totals(t, s, cells, masks, shift):
    """The sums over edges of (z left - z right) times G, F' and u F'; the first with what holds t."""

    def visit(cell, z, left, right, sums):
        holds = (left.u > 0) & (right.u <= 0)
        mass, slope, moment = (r - l for l, r in zip(_parts(left), _parts(right), strict=True))
        parts = (mass + jnp.where(holds, 1, 0), slope, moment)
        return tuple(total + z * part for total, part in zip(sums, parts, strict=True))

    return _fold(t, s, cells, masks, shift, visit, (jnp.zeros_like(t),) * 3)


def _moments(t, s, cells, masks, shift, code):
    """The sums of `_totals` over single codes, and those weighted by n - code."""

    def visit(cell, z, left, right, sums):
        holds = (left.u > 0) & (right.u <= 0)
        mass, slope, moment = (r - l for l, r in zip(_parts(left), _parts(right), strict=True))
        parts = [z * part for part in (mass + jnp.where(holds, 1, 0), slope, moment)]
        total, first = sums
        offset = cell.low - code
        return (
            tuple(a + part for a, part in zip(total, parts, strict=True)),
            tuple(a + offset * part for a, part in zip(first, parts, strict=True)),
        )

    nothing = (jnp.zeros_like(t),) * 3
    return _fold(t, s, cells, masks, shift, visit, (nothing, nothing))


def _over_masks(t, s, cells, masks, shift, of_cell):
    """Sums `of_cell(cell, its mass without the mask)` over all elements, by mask."""

    def visit(cell, z, left, right, out):
        holds = (left.u > 0) & (right.u <= 0)
        term = of_cell(cell, right.tail - left.tail + jnp.where(holds, 1, 0))
        return out.at[cell.mask].add(sum_to(term, out.shape[1:]))

    return _fold(t, s, cells, masks, shift, visit, jnp.zeros_like(masks))


def _fold(t, s, cells, masks, shift, visit, carry):
    """Runs `visit(cell, z, left edge, right edge, carry)` over all cells, every edge formed once."""

    def body(i, both):
        left, carry = both
        cell, z = _at(cells, masks, i)
        right = _edge(t - cell.high - 0.5, s, shift)
        return right, visit(cell, z, left, right, carry)

    first = _edge(t - cells.low[0] + 0.5, s, shift)
    return _loop(len(cells.low), body, (first, carry))[1]


def _at(cells, masks, i):
    """The i-th cell and its mask."""
    if isinstance(i, int):
        cell = Cells(*(int(part[i]) for part in cells))
    else:
        cell = Cells(*(jnp.asarray(part)[i] for part in cells))
    return cell, masks[cell.mask]


def _loop(count, body, carry):
    if isinstance(count, int) and count <= UNROLLED:
        for i in range(count):
            carry = body(i, carry)
        return carry
    return lax.fori_loop(0, count, body, carry)


def sum_to(array, shape):
    """Sums over the axes that were broadcast from `shape`."""
    lead = array.ndim - len(shape)
    array = array.sum(axis=tuple(range(lead)))
    stretched = tuple(i for i, (n, m) in enumerate(zip(shape, array.shape, strict=True)) if n < m)
    return array.sum(axis=stretched, keepdims=True)
