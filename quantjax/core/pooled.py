"""One program for the leaves of a tree: elementwise work whose numbers differ from leaf to leaf.

A compiler makes the kernels of every leaf anew, which for a long formula takes most of the time in
which a training step compiles. Here leaves are cut into parts of one size and go through a single
loop; on accelerators all parts at once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PART = 4096  # elements: what a part computes on the way stays in the cache


def map_and_sum(fn: Callable, arrays: list[tuple], numbers: list[tuple]) -> list[tuple]:
    """Returns (first, *sums) for every leaf: first of its shape, sums over its elements.

    Args:
      fn: (*parts, *numbers) -> (first, *others), parts flat, first and others like them; with
        parts that are 0 the others are 0.
      arrays: for every leaf arrays of its shape, all of one dtype.
      numbers: for every leaf arrays whose shapes are those of the next leaf's.
    """
    shapes = [leaf[0].shape for leaf in arrays]
    sizes = [leaf[0].size for leaf in arrays]
    counts = [-(-size // PART) for size in sizes]
    owner = np.repeat(np.arange(len(arrays)), counts)

    def in_parts(leaves):
        padded = [
            jnp.pad(leaf.reshape(-1), (0, count * PART - leaf.size))
            for leaf, count in zip(leaves, counts, strict=True)
        ]
        return jnp.concatenate(padded).reshape(-1, PART)

    columns = [in_parts(leaves) for leaves in zip(*arrays, strict=True)]
    mine = [jnp.stack(values)[owner] for values in zip(*numbers, strict=True)]

    def of_part(values):
        first, *others = fn(*values)
        return first, *(jnp.sum(other) for other in others)

    run = lax.map if jax.default_backend() == "cpu" else lambda f, xs: jax.vmap(f)(xs)
    first, *sums = run(of_part, (*columns, *mine))
    ends = np.cumsum(counts)
    out = []
    for shape, size, end, count in zip(shapes, sizes, ends, counts, strict=True):
        rows = slice(end - count, end)
        leaf = first[rows].reshape(-1)[:size].reshape(shape)
        out.append((leaf, *(part[rows].sum() for part in sums)))
    return out
