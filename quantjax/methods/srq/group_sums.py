"""Elementwise work on large arrays part by part on the CPU, and sums over groups of elements."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from quantjax.core import meshes, rounding

CHUNK = 2**16  # elements of a part: the arrays of a computation on it stay in the cache


def map_and_sum(fn, sums: int, divisible: bool, *arrays):
    """Returns fn(*arrays), part by part where `divisible` and one CPU is all there is.

    Parts are a reshape, which would gather what several devices hold.

    Args:
      fn: (*arrays) -> arrays of their shape. The first is returned as it is; the others, of the
        dtype of work, are only ever summed over, and where divided come back as their sums.
      sums: the number of these others.
      divisible: fn takes flat parts of the arrays, too.
      arrays: all of one shape.
    """
    shape, size = arrays[0].shape, arrays[0].size
    count = _parts(arrays, max(1, size // CHUNK))
    if count == 1 or not divisible:
        return fn(*arrays)

    def body(before, part):
        first, *more = fn(*part)
        return jax.tree.map(jnp.add, before, more), first

    parts = [array.reshape(count, -1) for array in arrays]
    start = [jnp.zeros(size // count, rounding.work_dtype(arrays[0].dtype))] * sums
    found, first = lax.scan(body, start, parts)
    return first.reshape(shape), *(part.sum() for part in found)


def map_parts(fn, x):
    """Returns fn(x), arrays of x's shape, part by part as `map_and_sum` does."""
    count = _parts((x,), -(-x.size // CHUNK))
    if count == 1:
        return fn(x)
    return jax.tree.map(lambda found: found.reshape(x.shape), lax.map(fn, x.reshape(count, -1)))


def _parts(arrays, least):
    """Returns into how many parts arrays are divided: `least`, or what divides them next."""
    if jax.default_backend() != "cpu" or not meshes.one_device(arrays):
        return 1
    return next((n for n in range(least, 2 * least) if arrays[0].size % n == 0), 1)


def varying_alike(*arrays):
    """Returns arrays that vary over the same axes of `jax.shard_map`, all else as they are.

    The cotangents of a `custom_vjp` vary as all its inputs together do: those of an input that is
    one on all devices are then summed over them, as for any other function.
    """
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return arrays
    # An operation between two arrays varies as both.
    zero = sum(jnp.zeros_like(array, shape=()) for array in arrays)
    return tuple(array + zero.astype(array.dtype) for array in arrays)


def sum_to(array, shape):
    """Sums over the axes that were broadcast from `shape`."""
    if math.prod(shape) == 1:
        return array.sum().reshape(shape)
    lead = array.ndim - len(shape)
    array = array.sum(axis=tuple(range(lead)))
    stretched = tuple(i for i, (n, m) in enumerate(zip(shape, array.shape, strict=True)) if n != m)
    return array.sum(axis=stretched, keepdims=True)
