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

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

LARGE = 1e9  # root of the largest y, whose square stays finite, and of 1 over the least
BLOCK = 4  # edges that share an exponential
FAR = 85.0  # exp(FAR) is finite
SHARPEST = 100.0  # largest s of a block
UNROLLED = 16  # more edges than this are visited by a loop of the compiled program


PARTS = TAIL, SLOPE, MOMENT = tuple(map(operator.attrgetter, ("tail", "slope", "moment")))


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
    """An edge, seen from t; relative to the nearest cell."""

    e: Any
    arm: Any  # point - e
    y: Any
    growth: Any
    base: Any
    total: Any  # growth * y + base
    tail: Any  # F less its limit
    slope: Any  # F'
    moment: Any  # F' times the arm

    @property
    def below(self):
        """F."""
        return self.growth * self.y / self.total

    @property
    def above(self):
        """1 - F."""
        return self.base / self.total


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


def numbered(place, origin):
    """Returns i -> the edge origin + i: a block's exponential times one of the grid."""

    @functools.cache
    def block(number):
        middle = origin + number * BLOCK + (BLOCK - 1) / 2
        # Of half the exponent: finite and exact to s = SHARPEST, near the edge and far from it.
        roots = (
            jnp.exp(jnp.clip(0.5 * place.s * (middle - point), -FAR, FAR))
            for point in (place.points[:1] if place.points[0] is place.points[1] else place.points)
        )
        roots = tuple(roots)
        return middle, (roots[0], roots[-1])

    @functools.cache
    def edge(i):
        middle, roots = block(i // BLOCK)
        offset = i % BLOCK - (BLOCK - 1) / 2
        left = middle + offset < place.t
        root = _pick(left, roots) * jnp.exp(0.5 * offset * place.s)
        root = jnp.clip(root, 1 / LARGE, LARGE)
        return _edge(place, middle + offset, left, root * root)

    return edge


def mass(place, left: Edge, right: Edge, width):
    """Of `width` cells between two edges, relative; without a difference of nearly equal F."""
    return -jnp.expm1(-place.s * width) * right.y / (left.total * right.total)


class Run(NamedTuple):
    """Adjacent cells: the edges at their ends, and `added(part)`, a sum over those between."""

    place: Place
    left: Edge
    right: Edge
    count: Any
    added: Callable

    @property
    def mass(self):
        """The mass of all cells."""
        return mass(self.place, self.left, self.right, self.count)

    def lever(self, part, offset=0):
        """Sum over its codes n of (n - code - offset) (part(right edge) - part(left edge)).

        An edge between two of them leaves -1. The limits of F leave nothing where the offset is 0:
        the cell of t has n = code.
        """
        high = self.right.e - 0.5 - self.place.code - offset
        low = self.left.e + 0.5 - self.place.code - offset
        return high * part(self.right) - low * part(self.left) - self.added(part)


def run(place, origin, edge, start, stop) -> Run:
    """The cells from edge number `start` to `stop`; edge: as `numbered` returns it."""
    fixed = isinstance(stop, int)
    right = edge(stop) if fixed else at(place, origin + stop)
    count, nothing = stop - start - 1, jnp.zeros_like(place.t)

    @functools.cache
    def in_a_loop():
        def add(block, sums):
            edge = numbered(place, origin + start + 1 + block * BLOCK)
            for i in range(BLOCK):
                counts = block * BLOCK + i < count
                parts = (jnp.where(counts, part(edge(i)), 0) for part in PARTS)
                sums = tuple(a + b for a, b in zip(sums, parts, strict=True))
            return sums

        return lax.fori_loop(0, (count + BLOCK - 1) // BLOCK, add, (nothing,) * len(PARTS))

    def added(part):
        if fixed and count <= UNROLLED:
            return sum((part(edge(i)) for i in range(start + 1, stop)), nothing)
        return in_a_loop()[PARTS.index(part)]

    return Run(place, edge(start), right, stop - start, added)


def _edge(place, e, left, y):
    growth, base = _pick(left, place.growth), _pick(left, place.base)
    arm, total = place.point - e, growth * y + base
    square = total * total
    tail = jnp.where(left, y, -1) / total
    return Edge(e, arm, y, growth, base, total, tail, y / square, arm * y / square)


def _pick(left, pair):
    """What an edge left of t takes, or right of it."""
    return pair[0] if pair[0] is pair[1] else jnp.where(left, *pair)
