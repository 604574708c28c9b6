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


def map_and_sum(fn: Callable, arrays: list[tuple], numbers: list[jax.Array]) -> tuple:
    """Returns ([first of every leaf], *[sums over its elements, one a leaf]).

    Args:
      fn: (*parts, *numbers) -> (first, *others), parts flat, first and others like them; with
        parts that are 0 the others are 0.
      arrays: for every leaf arrays of its shape, all of one dtype.
      numbers: arrays whose first axis counts the leaves: fn gets a leaf's own.
    """
    shapes = [leaf[0].shape for leaf in arrays]
    sizes = [leaf[0].size for leaf in arrays]
    counts = [-(-size // PART) for size in sizes]
    owner = np.repeat(np.arange(len(arrays)), counts)

    def in_parts(leaves):
        padded = []  # zeros among the operands: a pad is a kernel for every leaf
        for leaf, count in zip(leaves, counts, strict=True):
            padded += [leaf.reshape(-1), jnp.zeros(count * PART - leaf.size, leaf.dtype)]
        return jnp.concatenate(padded).reshape(-1, PART)

    columns = [in_parts(leaves) for leaves in zip(*arrays, strict=True)]
    mine = [values[owner] for values in numbers]

    def of_part(values):
        first, *others = fn(*values)
        return first, *(jnp.sum(other) for other in others)

    run = lax.map if jax.default_backend() == "cpu" else lambda f, xs: jax.vmap(f)(xs)
    first, *sums = run(of_part, (*columns, *mine))
    ends = np.cumsum(counts)
    firsts = [
        first[end - count : end].reshape(-1)[:size].reshape(shape)
        for shape, size, end, count in zip(shapes, sizes, ends, counts, strict=True)
    ]
    # One kernel for all leaves; a select, so that a NaN stays in its own.
    is_mine = owner[:, None] == np.arange(len(arrays))
    return firsts, *(jnp.where(is_mine, part[:, None], 0).sum(0) for part in sums)
