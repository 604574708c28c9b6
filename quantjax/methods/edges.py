"""A logistic variable around x, cut at the edges of a grid's cells.

In units of the grid t = x / alpha, s = alpha / sigma, u = t - e, and F(e) = sigmoid(-s u) is the
mass left of the edge e. Two edges cut out F(right) - F(left), so that sums over cells are sums over
edges, and

    dF/dt = -s F',  s dF/ds = -s u F',  F' = F (1 - F).

Far outside of the cells that count, all masses are tiny. They are told in units of
fade = exp(-s d), d the distance of the nearest cell that no mask removes, and F as the difference
from its limit, 0 left of t and 1 right of it: ratios are never 0 / 0, however far x lies. With
y = exp(s (e - t)), divided by fade left of t and multiplied by it right of t, that difference is

    y / (1 + fade y)  left of t,    -1 / (y + fade)  right of t,    and F' = y / (..)**2.

The three sums over edges divide each for themselves, since a compiler keeps a shared quotient of
every edge in memory, and exponentials are formed once for every `BLOCK` edges.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

LARGE = 1e9  # root of the largest y, whose square stays finite, and of 1 over the least
BLOCK = 4  # edges that share an exponential
FAR = 85.0  # exp(FAR) is finite
SHARPEST = 100.0  # largest s of a block
UNROLLED = 40  # more edges than this are visited by a loop of the compiled program


class Place(NamedTuple):
    """Where x lies, in units of the grid; pairs are for the edges left and right of it."""

    t: Any
    s: Any
    code: Any  # the nearest one that no mask removes
    point: Any  # t moved into its cell
    points: tuple  # t moved as far to the left, to the right
    growth: tuple  # of a cut's `total`, growth * y + base
    base: tuple


class Edge(NamedTuple):
    """An edge, seen from t."""

    left: Any  # of t
    arm: Any  # point - edge
    y: Any
    growth: Any
    base: Any

    @property
    def total(self):
        """growth * y + base."""
        return self.growth * self.y + self.base

    @property
    def below(self):
        """F."""
        return self.growth * self.y / self.total

    @property
    def above(self):
        """1 - F."""
        return self.base / self.total

    @property
    def parts(self):
        """F less its limit, F', and F' times the arm; relative to the nearest cell."""
        total = self.total
        square = total * total
        tail = jnp.where(self.left, self.y, -1) / total
        return tail, self.y / square, self.arm * self.y / square


def place(t, s, code, holes: bool) -> Place:
    """The place of t, whose nearest code is `code`; holes: masks may remove codes on both sides."""
    point = jnp.clip(t, code - 0.5, code + 0.5)
    gap = t - point
    fade = jnp.exp(-s * jnp.abs(gap))
    if not holes:  # outside of the grid all edges are on one side
        growth, base = jnp.where(gap > 0, fade, 1), jnp.where(gap < 0, fade, 1)
        return Place(t, s, code, point, (point, point), (growth, growth), (base, base))
    points = jnp.where(gap < 0, t + gap, point), jnp.where(gap > 0, t + gap, point)
    one = jnp.ones_like(fade)
    return Place(t, s, code, point, points, (fade, one), (one, fade))


def at(place, e) -> Edge:
    """The edge e."""
    left = e < place.t
    y = jnp.exp(place.s * (e - _pick(left, place.points)))
    return _edge(place, e, left, jnp.clip(y, LARGE**-2, LARGE**2))


def in_block(place, origin, block, i: int) -> Edge:
    """The edge origin + block * BLOCK + i: its block's exponential times one of the grid."""
    offset = i - (BLOCK - 1) / 2
    middle = origin + block * BLOCK + (BLOCK - 1) / 2
    e = middle + offset
    left = e < place.t
    # Of half the exponent, and squared: finite and exact to s = SHARPEST, near the edge and far.
    near = (jnp.clip(0.5 * place.s * (middle - point), -FAR, FAR) for point in place.points)
    both = place.points[0] is place.points[1]
    roots = (jnp.exp(next(near)),) * 2 if both else tuple(jnp.exp(part) for part in near)
    root = _pick(left, roots) * jnp.exp(0.5 * offset * place.s)
    root = jnp.clip(root, 1 / LARGE, LARGE)
    return _edge(place, e, left, root * root)


def mass(place, left: Edge, right: Edge, width):
    """Of `width` cells between two edges, relative; without a difference of nearly equal F."""
    return -jnp.expm1(-place.s * width) * right.y / (left.total * right.total)


class Run(NamedTuple):
    """Sums over adjacent cells: of their masses, and of their masses times n - code."""

    mass: Any
    slope: Any  # of F' at its ends
    moment: Any  # of F' times the arm
    first: Any
    first_slope: Any
    first_moment: Any

    @property
    def changes(self):
        """All that edges change."""
        return self.slope, self.moment, self.first_slope, self.first_moment


def run(place, origin, start, stop) -> Run:
    """Sums over the cells between the edges origin + start and origin + stop.

    An edge counts for the cell left of it and against the one right of it, so that n - code leaves
    one less of every inner edge. The limits of F add up to nothing: the cell of t has n = code.
    """
    left, right = (_numbered(place, origin, i) for i in (start, stop))
    low = origin + start + 0.5 - place.code
    high = origin + stop - 0.5 - place.code
    inner = _inner(place, origin, start + 1, stop)
    _, *ends = (r - p for p, r in zip(left.parts, right.parts, strict=True))
    firsts = (
        high * r - low * p - total
        for p, r, total in zip(left.parts, right.parts, inner, strict=True)
    )
    return Run(mass(place, left, right, stop - start), *ends, *firsts)


def _inner(place, origin, start, stop):
    """Sums of `parts` over the edges start .. stop - 1."""
    sums, count = (jnp.zeros_like(place.t),) * 3, stop - start
    if isinstance(count, int) and count <= UNROLLED:
        for i in range(start, stop):
            sums = _plus(sums, _numbered(place, origin, i).parts)
        return sums

    def add(block, sums):
        for i in range(BLOCK):
            counts = block * BLOCK + i < count
            parts = in_block(place, origin + start, block, i).parts
            sums = _plus(sums, (jnp.where(counts, part, 0) for part in parts))
        return sums

    return lax.fori_loop(0, (count + BLOCK - 1) // BLOCK, add, sums)


def _numbered(place, origin, i):
    return in_block(place, origin, i // BLOCK, i % BLOCK)


def _edge(place, e, left, y):
    growth, base = _pick(left, place.growth), _pick(left, place.base)
    return Edge(left, place.point - e, y, growth, base)


def _pick(left, pair):
    """What an edge left of t takes, or right of it."""
    return pair[0] if pair[0] is pair[1] else jnp.where(left, *pair)


def _plus(sums, more):
    return tuple(a + b for a, b in zip(sums, more, strict=True))
