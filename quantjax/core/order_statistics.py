"""Order statistics by counting: exact, and of sharded arrays only the counts cross devices."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from quantjax.core import rounding


def magnitude_keys(x):
    """Returns the bits of |x| as integers, which order like the magnitudes; NaN is the largest."""
    x = jnp.abs(x.astype(rounding.work_dtype(x.dtype)))
    return lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")


def magnitude_of(key):
    """Returns the magnitude whose key it is, in the float type of the same size."""
    return lax.bitcast_convert_type(key, f"float{8 * key.dtype.itemsize}")


def kth_largest(at_least: Callable, k, dtype, bits: int | None = None):
    """Returns the k-th largest of a multiset of integer keys, by bisection on their bits.

    Args:
      at_least: t -> how many keys are t or more; t has the shape of k, one entry per multiset.
      k: integers, at least 1; beyond the number of keys the result is 0.
      dtype: of the keys, a signed integer type; keys are not negative.
      bits: keys are below 2**bits; None: as many as the type has.
    """
    dtype = jnp.dtype(dtype)
    bits = 8 * dtype.itemsize - 1 if bits is None else bits

    def settle(i, t):
        higher = t | (jnp.ones((), dtype) << jnp.asarray(bits - 1 - i, dtype))
        return jnp.where(at_least(higher) >= k, higher, t)

    return lax.fori_loop(0, bits, settle, jnp.zeros(jnp.shape(k), dtype))
