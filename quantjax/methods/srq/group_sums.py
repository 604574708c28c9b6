"""Elementwise work on large arrays part by part on the CPU, and sums over groups of elements."""

import math

import jax
import jax.numpy as jnp
from jax import lax

CHUNK = 2**16  # elements of a part: the arrays of a computation on it stay in the cache


def map_and_sum(fn, divisible: bool, *arrays):
    """Returns fn(*arrays), part by part on the CPU where `divisible`.

    Args:
      fn: (*arrays) -> arrays of their shape. The first is returned as it is; the others are only
        ever summed over, and where divided come back as their sums.
      divisible: fn takes flat parts of the arrays, too.
      arrays: all of one shape.
    """
    shape, size = arrays[0].shape, arrays[0].size
    count = max(1, size // CHUNK)
    count = next((n for n in range(count, 2 * count) if size % n == 0), 1)
    if count == 1 or not divisible:
        return fn(*arrays)

    def one_by_one(*arrays):
        def body(sums, part):
            first, *more = fn(*part)
            return jax.tree.map(jnp.add, sums, more), first

        parts = [array.reshape(count, -1) for array in arrays]
        results = jax.eval_shape(fn, *(part[0] for part in parts))[1:]
        start = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in results]
        sums, first = lax.scan(body, start, parts)
        return first.reshape(shape), *(part.sum() for part in sums)

    def at_once(*arrays):
        first, *more = fn(*arrays)
        return first, *(part.sum() for part in more)  # no reshape: x may be sharded

    return lax.platform_dependent(*arrays, cpu=one_by_one, default=at_once)


def sum_to(array, shape):
    """Sums over the axes that were broadcast from `shape`."""
    if math.prod(shape) == 1:
        return array.sum().reshape(shape)
    lead = array.ndim - len(shape)
    array = array.sum(axis=tuple(range(lead)))
    stretched = tuple(i for i, (n, m) in enumerate(zip(shape, array.shape, strict=True)) if n != m)
    return array.sum(axis=stretched, keepdims=True)
