"""Histograms of layer inputs that widen as more is seen, so that several calls make one fit.

Every cell keeps its weight and the moment about its lower edge, so that means are exact in spite
of the cells. The range always holds 0. NaN and infinity count for nothing.
"""

import jax.numpy as jnp

from quantjax.core import passes

COUNTS, OFFSETS = ARRAYS = passes.FITTING_ONLY
LOW, HIGH = EXTENT = ("pass_low", "pass_high")


def nothing(cells: int, dtype) -> dict:
    """Returns the buffers of a histogram that has seen nothing."""
    return {COUNTS: jnp.zeros(cells, dtype), OFFSETS: jnp.zeros(cells, dtype), **unseen(dtype)}


def joined(x, seen: dict, axis_name=None) -> dict:
    """Returns the buffers of a histogram that has seen x, too.

    Args:
      x: floats of any shape, in the dtype of the buffers.
      seen: buffers of a histogram.
      axis_name: of `pmap` or `shard_map`: what all devices see.
    """
    extent = widened(x, seen, axis_name)
    low, high = ends(extent)
    x, kept = passes.finite(x)
    cells = seen[COUNTS].size
    new = _spread(x, kept.astype(x.dtype), low, high, cells)
    old = _spread(*points(seen), low, high, cells)
    counts, offsets = (o + passes.total(n, axis_name) for o, n in zip(old, new, strict=True))
    return {COUNTS: counts, OFFSETS: offsets, **extent}


def unseen(dtype) -> dict:
    """Returns the extent of nothing."""
    return {LOW: jnp.asarray(jnp.inf, dtype), HIGH: jnp.asarray(-jnp.inf, dtype)}


def widened(x, seen: dict, axis_name=None) -> dict:
    """Returns the extent of all that was seen and x, as in `joined`."""
    return {
        LOW: jnp.minimum(seen[LOW], passes.least(x, axis_name)),
        HIGH: jnp.maximum(seen[HIGH], passes.most(x, axis_name)),
    }


def ends(seen: dict):
    """Returns the least and the largest value seen, or 0 where that is on the other side."""
    return jnp.minimum(seen[LOW], 0), jnp.maximum(seen[HIGH], 0)


def points(seen: dict):
    """Returns the mean of every cell, from the lowest up, and its weight; 0 where it is empty."""
    counts, (low, high) = seen[COUNTS], ends(seen)
    middle = seen[OFFSETS] / jnp.maximum(counts, 1)
    x = low + (jnp.arange(counts.size, dtype=counts.dtype) + middle) * _width(
        low, high, counts.size
    )
    return jnp.where(counts > 0, x, 0), counts


def _spread(x, weight, low, high, cells):
    """Returns the weight in every cell from low to high, and its moment about the lower edge."""
    place = (x - low) * (1 / _width(low, high, cells))
    cell = jnp.clip(jnp.floor(place), 0, cells - 1)
    index, empty = cell.astype(jnp.int32), jnp.zeros(cells, x.dtype)
    return empty.at[index].add(weight), empty.at[index].add(weight * (place - cell))


def _width(low, high, cells):
    width = (high - low) / cells
    return jnp.where(width >= jnp.finfo(width.dtype).tiny, width, 1)
