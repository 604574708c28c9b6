"""The calls of one layer in a pass of a model over a batch, which together count once.

`linen` and `nnx` set the buffer `joins` of an input quantizer: SAME or FITTING after each call in
a pass, NEW where it ends. Quantizers only read it: used by itself, every call is a pass.
Statistics take what is finite, and where axes of `pmap` or `shard_map` are named, all devices.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

JOINS = "joins"
NEW, SAME, FITTING = 0, 1, 2
FITTING_ONLY = ("cell_counts", "cell_offsets")  # buffers that nothing reads once its pass is over


def buffer() -> dict:
    """Returns the buffer of a quantizer that counts passes, to be merged into its own."""
    return {JOINS: jnp.full((), NEW, jnp.float32)}


def end(buffers):
    """Returns a tree of buffers in which the next call of every layer begins another pass.

    What only the fitting pass needs has no elements from here on.
    """

    def reset(path, leaf):
        name = getattr(path[-1], "key", None)
        if name in FITTING_ONLY:
            return leaf[..., :0] if leaf.size else leaf
        return leaf * 0 if name == JOINS else leaf

    return jax.tree_util.tree_map_with_path(reset, buffers)


def called(buffers: dict, *, fitting: bool = False) -> dict:
    """Returns the buffers of one layer after a call; others of the same pass will join it.

    Args:
      buffers: of any quantizer; those without `joins` stay as they are.
      fitting: this call made the state.
    """
    if JOINS not in buffers:
        return buffers
    old = buffers[JOINS]
    same = jnp.full_like(old, FITTING) if fitting else jnp.where(old == FITTING, FITTING, SAME)
    return {**buffers, JOINS: same.astype(old.dtype)}


def moved(x, buffers: dict, fit: Callable, move: Callable):
    """Returns the buffers after another call: fit(x, buffers) in the fitting pass, else move(...).

    Once that pass is over, which shapes tell, a compiled step knows nothing of fitting.
    """
    if not all(buffers[name].size for name in FITTING_ONLY):
        return move(x, buffers)
    return lax.cond(buffers[JOINS] == FITTING, fit, move, x, buffers)


def weight(buffers: dict, momentum, dtype):
    """Returns the weight of the present pass in a running value: 1 in the fitting pass."""
    return jnp.where(buffers[JOINS] == FITTING, 1, momentum).astype(dtype)


def finite(x):
    """Returns x with 0 in place of NaN and infinity, and where it was finite."""
    kept = jnp.isfinite(x)
    return jnp.where(kept, x, 0), kept


def least(x, axis_name=None):
    """Returns the least finite value of x, infinity where there is none."""
    found = jnp.min(jnp.where(jnp.isfinite(x), x, jnp.inf), initial=jnp.inf)
    return found if axis_name is None else lax.pmin(found, axis_name)


def most(x, axis_name=None):
    """Returns the largest finite value of x, minus infinity where there is none."""
    return -least(-x, axis_name)


def total(x, axis_name=None):
    """Returns a sum of one device as that of all."""
    return x if axis_name is None else lax.psum(x, axis_name)
