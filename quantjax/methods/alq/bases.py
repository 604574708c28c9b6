"""Sums of binary bases in groups: the arithmetic under `multibit` and `transformation`.

The bases of one weight are the bits of one byte, so that a pass over a leaf reads one byte per
weight. A leaf lies in its view: the leaf's shape, an axis perhaps split in blocks. A group is what
shares coordinates, the axes of length 1 in `coords`; nothing here moves an axis, so a sharded one
stays sharded. Loops over the K bases are unrolled; all groups are done at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MOST_BITS = 8


class Bases(NamedTuple):
    """Weights as sums of binary bases, sum_k mask_k coords_k (2 bit_k - 1)."""

    codes: jax.Array  # [*view], uint8; bit k says where basis k is +1; 1 where masked
    coords: jax.Array  # [*group, K], float; zero where masked
    mask: jax.Array  # [*group, K], bool


def axes_of(coords) -> tuple[int, ...]:
    """Returns the axes that a group spans, counted from the end of the view."""
    group = coords.shape[:-1]
    return tuple(axis - len(group) for axis, kept in enumerate(group) if kept == 1)


def total(x, axes):
    """Returns the sum over a group, dims kept."""
    return jnp.sum(x, axis=axes, keepdims=True)


def group_size(codes, coords) -> int:
    """Returns how many weights share coordinates."""
    return codes.size // max(1, coords[..., 0].size)


def is_set(codes, k: int):
    """True where basis k is +1."""
    return (codes >> jnp.uint8(k)) & jnp.uint8(1) == 1


def signed(codes, k: int, x):
    """Returns x times basis k."""
    return jnp.where(is_set(codes, k), x, -x)


def pack(basis):
    """Returns the codes of int8 bases in {-1, 1}, [*view, K] -> [*view]."""
    bits = [(basis[..., k] > 0).astype(jnp.uint8) << k for k in range(basis.shape[-1])]
    return _any(bits)


def unpack(codes, count: int):
    """Returns int8 bases in {-1, 1}, [*view] -> [*view, K]."""
    one = jnp.int8(1)
    return jnp.stack([jnp.where(is_set(codes, k), one, -one) for k in range(count)], axis=-1)


def masked_bits(mask):
    """Returns the byte whose bits are 1 where a group's slots are masked, [*group]."""
    return _any([jnp.where(mask[..., k], 0, 1 << k) for k in range(mask.shape[-1])])


def values(bases: Bases):
    """Returns the sums over the bases, [*view], term by term in the order of the slots."""
    out = jnp.zeros(bases.codes.shape, bases.coords.dtype)
    for k in range(bases.coords.shape[-1]):
        out = out + signed(bases.codes, k, bases.coords[..., k])
    return out


class Sums(NamedTuple):
    """All sums that a group can form, ascending."""

    sums: jax.Array  # [*group, 2**K], float
    codes: jax.Array  # [*group, 2**K], uint8


def candidates(coords) -> Sums:
    """Returns the 2**K sums of every group, sorted once (eq. 20)."""
    sums = jnp.zeros((*coords.shape[:-1], 1), coords.dtype)
    for k in range(coords.shape[-1]):
        # In the order of `values` and MultiBit.decode, so that all three agree bit for bit.
        sums = jnp.concatenate([sums - coords[..., k : k + 1], sums + coords[..., k : k + 1]], -1)
    codes = lax.broadcasted_iota(jnp.uint8, sums.shape, sums.ndim - 1)
    return Sums(*lax.sort((sums, codes), num_keys=1))


def search(sums, x):
    """Returns the index of the sum nearest to x, [*group, 2**K], [*view] -> [*view].

    Bisection of the borders between neighbours: K reads per weight. Half-way values go down.
    """
    borders = (sums[..., 1:] + sums[..., :-1]) * 0.5
    index = jnp.zeros(x.shape, jnp.int32)
    width = sums.shape[-1] // 2
    while width:
        index = index + jnp.where(x > _pick(borders, index + (width - 1)), width, 0)
        width //= 2
    return index


def nearest_value(coords, x):
    """Returns the sum nearest to every x (eq. 19)."""
    table = candidates(coords)
    return _pick(table.sums, search(table.sums, x))


def nearest_codes(coords, mask, x):
    """Returns the bases of the sum nearest to every x (eq. 19)."""
    table = candidates(coords)
    return _pick(table.codes, search(table.sums, x)) | masked_bits(mask)


def refit(bases: Bases, point, metric, ridge):
    """Returns coordinates that minimise |B coords - point|^2_metric + ridge |coords|^2.

    The coordinates are moved rather than found anew, twice with one factorisation, which keeps
    float32 accurate; directions that the bases do not span are left as they are.

    Args:
      bases: masked slots stay at zero; new coordinates may be negative.
      point: [*view].
      metric: positive, [*view]; or None for ones.
      ridge: added to the diagonal of B^T H B.
    """
    codes, mask = bases.codes, bases.mask
    axes, slots = axes_of(bases.coords), range(bases.coords.shape[-1])
    weight = jnp.ones((), point.dtype) if metric is None else metric
    if metric is None:
        everything = jnp.asarray(group_size(codes, bases.coords), point.dtype)
    else:
        everything = total(metric, axes)
    lower, inverses = [], []
    for i in slots:
        row = []
        for j in range(i):
            same = is_set(codes, i) == is_set(codes, j)
            product = total(jnp.where(same, weight, -weight), axes)
            row.append(jnp.where(mask[..., i] & mask[..., j], product, 0))
        row.append(jnp.where(mask[..., i], everything + ridge, 1))
        factors, inverse = factor_row(row, lower, inverses)
        lower.append(factors)
        inverses.append(inverse)
    for _ in range(2):
        pull = point - values(bases)
        pull = lax.optimization_barrier(pull if metric is None else metric * pull)
        rest = []
        for i in slots:
            slope = total(signed(codes, i, pull), axes) - ridge * bases.coords[..., i]
            rest.append(jnp.where(mask[..., i], slope, 0))
        step = jnp.stack(solve(lower, inverses, rest), axis=-1)
        bases = bases._replace(coords=bases.coords + step)
    return bases.coords


def solve(lower, inverses, rhs):
    """Solves A x = rhs for all groups at once, A = L D L^T from `factor_row`.

    The K steps are written out; an equation that depends on those before it gets x = 0.
    """
    forward = []
    for factors, value in zip(lower, rhs, strict=True):
        forward.append(value - dot(factors, forward))
    return back_substitute(lower, [z * d for z, d in zip(forward, inverses, strict=True)])


def factor_row(row, lower, inverses):
    """Returns the next row of L and 1 / D in A = L D L^T; 1 / D is 0 for a dependent row."""
    products = []
    for j, entry in enumerate(row[:-1]):
        products.append(entry - dot(lower[j], products))
    factors = [p * inverse for p, inverse in zip(products, inverses, strict=True)]
    pivot = row[-1] - dot(factors, products)
    usable = pivot > row[-1] * (8 * jnp.finfo(row[-1].dtype).eps)
    return factors, jnp.where(usable, 1 / jnp.where(usable, pivot, 1), 0)


def back_substitute(lower, x):
    """Returns the solution of L^T y = x."""
    out = list(x)
    for i in reversed(range(len(out))):
        for k in range(i):
            out[k] = out[k] - lower[i][k] * out[i]
    return out


def dot(a, b):
    """Returns the sum of products of two lists of arrays; 0 for empty ones."""
    return sum((x * y for x, y in zip(a, b, strict=True)), start=0)


def restore_signs(bases: Bases) -> tuple[Bases, jax.Array]:
    """Returns the same weights with coordinates that are not negative, and which were turned.

    Section 3.3: the basis of a negative coordinate becomes its complement.
    """
    turned = bases.coords < 0
    turns = masked_bits(~turned)
    return bases._replace(codes=bases.codes ^ turns, coords=jnp.abs(bases.coords)), turned


def _any(bits):
    out = bits[0].astype(jnp.uint8)
    for bit in bits[1:]:
        out = out | bit.astype(jnp.uint8)
    return out


def _pick(table, index):
    # take_along_axis keeps the sharding of the weights; the group's table is small.
    index = index[..., None]
    return jnp.take_along_axis(table, index, axis=-1, mode="promise_in_bounds")[..., 0]
