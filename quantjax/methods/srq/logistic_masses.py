"""A logistic variable around x, cut at the edges of a grid's cells.

In units of the grid t = x / alpha, s = alpha / sigma, u = t - e, and F(e) = sigmoid(-s u) is the
mass left of the edge e. Two edges cut out F(right) - F(left), so that sums over cells are sums over
edges, and

    dF/dt = -s F',  s dF/ds = -s u F',  F' = F (1 - F).

Far outside of the cells that count, all masses are tiny. They are told in units of
fade = exp(-s d), d the distance of the nearest cell that no mask removes, and F as the difference
from its limit, 0 left of t and 1 right of it: ratios are never 0 / 0, however far x lies. With
y = exp(s (e - t)), divided by fade left of t and multiplied by it right of t, that difference is

    y / (1 + fade y)  left of t,    -1 / (y + fade)  right of t,    and F' / fade = y / (..)**2.

The three sums over edges divide each for themselves, since a compiler keeps a shared quotient of
every edge in memory, and exponentials are formed once for every `BLOCK` edges.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

LARGE = 1e9  # y is kept within LARGE**-2 .. LARGE**2: y**2 and 1 / y**2 are finite in float32
BLOCK = 4  # edges that share an exponential
SHARPEST = 100.0  # largest s of a block: exp(0.75 s), half its width, is finite
UNROLLED = 16  # more edges than this are visited by a loop of the compiled program


PARTS = TAIL, SLOPE, MOMENT = tuple(map(operator.attrgetter, ("tail", "slope", "moment")))


class Place(NamedTuple):
    """Where x lies, in units of the grid; pairs are for the edges left and right of it."""

    t: Any
    s: Any
    code: Any  # the nearest one that no mask removes
    side: Any  # edges below it are left of t; half-way, those of the cell that `code` has
    point: Any  # t moved into that cell
    points: tuple  # t moved as far to the left, to the right
    growth: tuple  # of an edge's `total`, growth * y + base
    base: tuple


class Edge(NamedTuple):
    """An edge, seen from t."""

    e: Any
    arm: Any  # point - e
    y: Any  # relative, as the next ones
    growth: Any
    base: Any
    total: Any  # growth * y + base
    tail: Any  # (F less its limit) / fade
    slope: Any  # F' / fade
    moment: Any  # arm * F' / fade

    @property
    def below(self):
        """F itself."""
        return self.growth * self.y / self.total

    @property
    def above(self):
        """1 - F itself."""
        return self.base / self.total


class Sums(NamedTuple):
    """Of an edge's `tail`, `slope` and `moment`, over several edges."""

    tail: Any
    slope: Any
    moment: Any


def place(t, s, code, holes: bool) -> Place:
    """The place of t, whose nearest code is `code`; holes: masks may remove codes on both sides."""
    point = jnp.clip(t, code - 0.5, code + 0.5)
    gap = t - point
    fade, side = jnp.exp(-s * jnp.abs(gap)), jnp.where(gap == 0, code, t)
    if not holes:  # outside of the grid all edges are on one side
        growth, base = jnp.where(gap > 0, fade, 1), jnp.where(gap < 0, fade, 1)
        return Place(t, s, code, side, point, (point,) * 2, (growth,) * 2, (base,) * 2)
    points = jnp.where(gap < 0, t + gap, point), jnp.where(gap > 0, t + gap, point)
    one = jnp.ones_like(fade)
    return Place(t, s, code, side, point, points, (fade, one), (one, fade))


def at(place, e) -> Edge:
    """The edge e."""
    left = e < place.side
    return _edge(place, e, left, _bounded(jnp.exp(place.s * (e - _pick(left, place.points))), 2))


def numbered(place, origin):
    """Returns i -> the edge origin + i: a block's exponential times one of the grid."""

    @functools.cache
    def block(number):
        middle = origin + number * BLOCK + (BLOCK - 1) / 2
        # Of half the exponent, which may be 0 or infinite: the edge's own factor is neither.
        return middle, _each(lambda point: jnp.exp(0.5 * place.s * (middle - point)), place.points)

    @functools.cache
    def edge(i):
        middle, roots = block(i // BLOCK)
        offset = i % BLOCK - (BLOCK - 1) / 2
        left = middle + offset < place.side
        root = _bounded(_pick(left, roots) * jnp.exp(0.5 * offset * place.s), 1)
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
        """The mass of all cells, relative."""
        return mass(self.place, self.left, self.right, self.count)

    def lever(self, part, offset=0):
        """Sum over its codes n of (n - code - offset) (part(right edge) - part(left edge)).

        An edge between two of them leaves -1. With `TAIL`, offset 0: F's limits then add nothing,
        as the cell that holds t is that of `code` or one of weight 0.
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
                within = block * BLOCK + i < count
                parts = (jnp.where(within, part(edge(i)), 0) for part in PARTS)
                sums = Sums(*map(jnp.add, sums, parts))
            return sums

        blocks = (count + BLOCK - 1) // BLOCK
        return lax.fori_loop(0, blocks, add, Sums(nothing, nothing, nothing))

    def added(part):
        if fixed and count <= UNROLLED:
            return sum((part(edge(i)) for i in range(start + 1, stop)), nothing)
        return part(in_a_loop())

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


def _each(fn, pair):
    """`fn` of both, formed once where they are the same."""
    first = fn(pair[0])
    return first, first if pair[0] is pair[1] else fn(pair[1])


def _bounded(y, power):
    return jnp.clip(y, LARGE**-power, LARGE**power)
