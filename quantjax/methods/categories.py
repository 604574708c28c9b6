"""The categories of relaxed rounding: a logistic variable around x, cut into the cells of a grid.

In units of the grid t = x / alpha, s = alpha / sigma, u = t - e and F(e) = sigmoid(-s u). The cell
between two edges has the mass F(right) - F(left), so that sums over cells are sums over edges, and

    dF/dt = -s F',  s dF/ds = -s u F',  F' = decay / (1 + decay)**2,  decay = exp(-s |u|).

Where no cell with a mask above 0 holds t, all masses are tiny and F is told from its limit, 0 left
of t and 1 right of it, by exp(-s (|u| - shift)) / (1 + decay), with the distance `shift` of the
nearest such cell: ratios of masses are never 0 / 0, however far x lies from the grid.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.core import rounding

ZERO_INTERVAL = 0.1  # alpha of leaves that are all zero
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


class _Place(NamedTuple):
    """Where x lies, in units of the grid."""

    t: Any
    s: Any
    point: Any  # the nearest one of a cell that no mask removes
    shift: Any  # |t - point|


class _Edge(NamedTuple):
    """The border of two cells at the signed distance u = t - edge."""

    u: Any
    arm: Any  # point - edge: of u what does not cancel far from the grid
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
    def mass(self):
        """F(edge), as told from its limit."""
        tail = self.near * self.inverse
        return jnp.where(self.u > 0, tail, 1 - tail)

    @property
    def tail(self):
        """F(edge) less its limit."""
        tail = self.near * self.inverse
        return jnp.where(self.u > 0, tail, -tail)

    @property
    def slope(self):
        """F'(edge), in the same unit."""
        return self.near * self.inverse**2


def log_interval(x, axes, high):
    """Returns log alpha, kept dims: `high` reaches max|x| or 3 root mean squares, the lesser."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    reach = jnp.minimum(largest, 3 * jnp.sqrt(jnp.mean(x**2, axis=axes, keepdims=True))) / high
    # All zero, as biases are at first: there is no range to go by.
    return jnp.log(jnp.where(reach >= jnp.finfo(x.dtype).tiny, reach, ZERO_INTERVAL))


def spread(log_alpha) -> dict:
    """Returns what is learned of a grid: log_alpha and log_sigma, sigma = alpha / 3 at first."""
    return {"log_alpha": log_alpha, "log_sigma": log_alpha - jnp.log(3).astype(log_alpha.dtype)}


def positive(learned):
    """Returns alpha and sigma; the barrier keeps alpha one number for every use of it."""
    return lax.optimization_barrier(jnp.exp(learned["log_alpha"])), jnp.exp(learned["log_sigma"])


def limits(bits: int, dtype) -> dict:
    """Returns the lowest and the highest code of a signed grid as arrays."""
    half = 2 ** (bits - 1)
    return {"low": jnp.asarray(-half, dtype), "high": jnp.asarray(half - 1, dtype)}


def fit_inputs(x, bits: int, signed: bool | None):
    """Returns what is learned of a layer's inputs, and low, high; signed None: by their signs."""
    x = x.astype(rounding.work_dtype(x.dtype))
    negative = jnp.any(x < 0) if signed is None else jnp.asarray(signed)
    low = jnp.where(negative, -(2.0 ** (bits - 1)), 0).astype(x.dtype)
    high = low + 2.0**bits - 1
    log_alpha = log_interval(x, None, jnp.maximum(high, 1)).reshape(())
    return spread(log_alpha), {"low": low, "high": high}


def log_masses(t, s, codes):
    """Returns the log mass of the unit cell around every code, on a new last axis (eq. 1)."""
    t, s = t[..., None], jnp.broadcast_to(s, t.shape)[..., None]
    codes = jnp.reshape(codes, (1,) * (t.ndim - 1) + (-1,))
    outside = jax.nn.softplus(s * (t - codes - 0.5)) + jax.nn.softplus(s * (codes - 0.5 - t))
    return jnp.log(-jnp.expm1(-s)) - outside


def mode(t, s, code, low, high) -> Estimate:
    """The largest of all cells low .. high, which is `code`, under eq. 3: d(code * share)."""
    a, b = _plain_edge(t - code + 0.5, s), _plain_edge(t - code - 0.5, s)
    A, B = _plain_edge(t - low + 0.5, s), _plain_edge(t - high - 0.5, s)
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
    return _best(_nearest(t, s, cells, masks)[0], cells, masks)


def masked_mode_estimate(t, s, cells: Cells, masks):
    """Returns `masked_mode` under eq. 3, and (cotangent -> cotangents of the masks)."""
    place, _ = _nearest(t, s, cells, masks)
    code = _kept(_best(place, cells, masks))
    _, jump = _beside(masks[cells.mask])
    ((total, _, slope, moment),) = _kept(_sums(place, cells, (lambda i: jump[i],)))
    a, b = _edge(place, code - 0.5), _edge(place, code + 0.5)
    beside = _choose(b.u > 0, b.near, _choose(a.u < 0, a.near, 1))
    unmasked_share = -jnp.expm1(-s) * beside * a.inverse * b.inverse / total

    def mask_of(i, z):
        cell, mine = _at(cells, masks, i)
        return jnp.where((cell.low <= code) & (code <= cell.high), mine, z)

    z = _loop(len(cells.low), mask_of, jnp.zeros_like(t))
    weight = code * z * unmasked_share
    dt = s * (a.below - b.above + slope / total)
    sds = s * (a.arm * a.below - b.arm * b.above + moment / total) + (t - place.point) * dt
    estimate = Estimate(code, weight * dt, weight * (sds + _width_term(s, 1)))

    def to_masks(cotangent):
        own, others = _kept((cotangent * code * unmasked_share, cotangent * weight / total))

        def of_cell(cell, mass):
            mine = (cell.low <= code) & (code <= cell.high)
            return jnp.where(mine, own, 0) - others * mass

        return _over_masks(place, cells, masks, of_cell)

    return estimate, to_masks


def expectation(t, s, low, high) -> Estimate:
    """The mean of all categories low .. high, sum_i r_i n_i; low and high may be traced."""
    point = jnp.clip(t, low - 0.5, high + 0.5)
    place = _Place(t, s, point, jnp.abs(t - point))
    code = jnp.clip(_held(t), low, high)
    left, right = _parts(_edge(place, low - 0.5)), _parts(_edge(place, high + 0.5))

    def minus(i, sums):
        parts = _parts(_edge(place, low + i + 0.5))
        return tuple(total - part for total, part in zip(sums, parts, strict=True))

    # An edge counts for the code left of it and against the one right of it: 1 less inside.
    count = high - low
    count = count if isinstance(count, int) else count.astype(jnp.int32)
    total = tuple(b - a for a, b in zip(left, right, strict=True))
    first = tuple((high - code) * b - (low - code) * a for a, b in zip(left, right, strict=True))
    return _mean(place, code, total, _kept(_loop(count, minus, first)))


def masked_expectation(t, s, cells: Cells, masks):
    """Returns the mean of all masked categories, and (cotangent -> cotangents of the masks)."""
    place, code = _nearest(t, s, cells, masks)
    cells = _codes(cells)
    right, jump = _beside(masks[cells.mask])

    def first_jump(i):  # of z (n - code): formed from the distance, since z n and z code cancel
        return jump[i] * (i + float(cells.low[0] - 1) - code) - right[i]

    total, first = _kept(_sums(place, cells, (lambda i: jump[i], first_jump)))
    estimate = _mean(place, code, total, first)

    def to_masks(cotangent):
        weight, offset = _kept((cotangent / total[0], first[1] / total[0]))

        def of_cell(cell, mass):
            return weight * (cell.low - code - offset) * mass

        return _over_masks(place, cells, masks, of_cell)

    return estimate, to_masks


def _edge(place, e) -> _Edge:
    """The edge e; `near` is relative to the nearest cell."""
    u = place.t - e
    near = _kept(jnp.exp(-place.s * jnp.maximum(jnp.abs(u) - place.shift, 0)))
    decay = near * jnp.exp(-place.s * place.shift)
    return _Edge(u, place.point - e, near, _kept(1 / (1 + decay)), decay)


def _plain_edge(u, s) -> _Edge:
    """The edge at distance u, relative to nothing."""
    decay = jnp.exp(-s * jnp.abs(u))
    return _Edge(u, u, decay, 1 / (1 + decay), decay)


def _kept(arrays):
    """Arrays that several sums take: without a barrier each sum would compute them again."""
    return lax.optimization_barrier(arrays)


def _parts(edge):
    """F as a mass and as a tail, F' and F' times its arm."""
    slope = edge.slope
    return edge.mass, edge.tail, slope, edge.arm * slope


def _mean(place, code, total, first) -> Estimate:
    """From the `_parts` of sum_i r_i and of sum_i r_i (n_i - code), the code whose cell holds t.

    The limits of F add up to 0 in the latter: its tails are all of it, and nothing cancels. Beyond
    the grid, or in a cell that a mask removes, it is the nearest code.
    """
    mass, _, slope, moment = total
    _, tail, first_slope, first_moment = first
    offset = tail / mass
    dt = place.s * (offset * slope - first_slope) / mass
    sds = place.s * (offset * moment - first_moment) / mass + (place.t - place.point) * dt
    return Estimate(code + offset, dt, sds)


def _width_term(s, width):
    return s * width / jnp.expm1(s * width)


def _nearest(t, s, cells, masks):
    """The place of t, and the nearest code that no mask removes: the left one of two."""
    held = _held(t)

    def visit(i, least):
        cell, z = _at(cells, masks, i)
        point = jnp.clip(t, cell.low - 0.5, cell.high + 0.5)
        mine = jnp.abs(t - point), point, jnp.clip(held, cell.low, cell.high)
        return _choose((z > 0) & (mine[0] < least[0]), mine, least)

    far = jnp.full_like(t, jnp.inf)
    shift, point, code = _loop(len(cells.low), visit, (far, t, jnp.zeros_like(t)))
    return _Place(t, s, point, shift), code


def _held(t):
    """The code whose cell holds t, its right edge included; exact, as ceil(t - 0.5) is not."""
    code = jnp.round(t)
    return jnp.where(t - code == -0.5, code - 1, code)


def _codes(cells):
    """The same with every code in a cell of its own."""
    codes = np.arange(cells.low[0], cells.high[-1] + 1, dtype=cells.low.dtype)
    return Cells(codes, codes, np.repeat(cells.mask, cells.high - cells.low + 1))


def _best(place, cells, masks):
    """The code of the largest category: of a cell's codes the nearest can be it."""
    t, s = place.t, place.s
    code = jnp.round(t)
    sides = jnp.exp(-s * jnp.abs(t - code + 0.5)), jnp.exp(-s * jnp.abs(t - code - 0.5))
    holding = 1 / ((1 + sides[0]) * (1 + sides[1]))
    step = jnp.exp(-s)

    def visit(cell, z, left, right, best):
        # The code next to an edge has its other edge one further away.
        edge = _choose(right.u > 0, right, left)
        inside = (code >= cell.low) & (code <= cell.high)
        mass = jnp.where(inside, holding, edge.near * edge.inverse / (1 + edge.decay * step))
        mine = z * mass, jnp.clip(code, cell.low, cell.high)
        return _choose(mine[0] > best[0], mine, best)

    nothing = jnp.zeros_like(t)
    return _fold(place, cells, masks, visit, (nothing, nothing))[1]


def _choose(condition, these, those):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), these, those)


def _beside(z):
    """The masks right of every edge, and how much larger those left of it are."""
    end = jnp.zeros_like(z[:1])
    right = jnp.concatenate([z, end])
    return right, jnp.concatenate([end, z]) - right


def _sums(place, cells, jumps):
    """Sums over edges of `_parts`, once for each of `jumps`, functions of the edge's index.

    An edge counts for the cell left of it and against the one right of it.
    """
    edges = np.append(cells.low[0] - 0.5, cells.high + 0.5)

    def add(i, sums):
        edge = edges[i] if isinstance(i, int) else jnp.asarray(edges, place.t.dtype)[i]
        parts = _parts(_edge(place, edge))
        out = []
        for mine, jump in zip(sums, jumps, strict=True):
            weight = jump(i)
            out.append(tuple(a + weight * part for a, part in zip(mine, parts, strict=True)))
        return tuple(out)

    return _loop(len(edges), add, ((jnp.zeros_like(place.t),) * 4,) * len(jumps))


def _over_masks(place, cells, masks, of_cell):
    """Sums `of_cell(cell, its mass without the mask)` over all elements, by mask."""

    def term(cell, left, right):
        return of_cell(cell, right.mass - left.mass)

    if len(cells.low) > UNROLLED:

        def add(cell, z, left, right, out):
            return out.at[cell.mask].add(sum_to(term(cell, left, right), out.shape[1:]))

        return _fold(place, cells, masks, add, jnp.zeros_like(masks))

    def collect(cell, z, left, right, terms):  # one sum over elements for each mask, not each cell
        return {**terms, cell.mask: terms.get(cell.mask, 0) + term(cell, left, right)}

    terms = _kept(_fold(place, cells, masks, collect, {}))
    return jnp.stack([sum_to(terms[k], masks.shape[1:]) for k in range(len(masks))])


def _fold(place, cells, masks, visit, carry):
    """Runs `visit(cell, z, left edge, right edge, carry)` over all cells; edges are formed once."""

    def body(i, both):
        left, carry = both
        cell, z = _at(cells, masks, i)
        right = _edge(place, cell.high + 0.5)
        return right, visit(cell, z, left, right, carry)

    first = _edge(place, cells.low[0] - 0.5)
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
