"""What relaxed rounding learns of a grid: the logs of its interval alpha and spread sigma."""

import jax.numpy as jnp
from jax import lax

from quantjax.core import rounding

ZERO_INTERVAL = 0.1  # alpha of leaves that are all zero


def log_interval(x, axes, high):
    """Returns log alpha, kept dims: `high` reaches max|x| or 3 root mean squares, the lesser."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    reach = jnp.minimum(largest, 3 * jnp.sqrt(jnp.mean(x**2, axis=axes, keepdims=True))) / high
    # All zero, as biases are at first: there is no range to go by.
    return jnp.log(jnp.where(reach >= jnp.finfo(x.dtype).tiny, reach, ZERO_INTERVAL))


def spread(log_alpha) -> dict:
    """Returns what is learned of a grid: log_alpha and log_sigma, sigma = alpha / 3 at first."""
    return {"log_alpha": log_alpha, "log_sigma": log_alpha - jnp.log(3).astype(log_alpha.dtype)}


def positive(learned):
    """Returns alpha and sigma; the barrier keeps alpha one number for every use of it."""
    return lax.optimization_barrier(jnp.exp(learned["log_alpha"])), jnp.exp(learned["log_sigma"])


def limits(bits: int, dtype) -> dict:
    """Returns the lowest and the highest code of a signed grid as arrays."""
    half = 2 ** (bits - 1)
    return {"low": jnp.asarray(-half, dtype), "high": jnp.asarray(half - 1, dtype)}


def fit_inputs(x, bits: int, signed: bool | None):
    """Returns what is learned of a layer's inputs, and low, high; signed None: by their signs."""
    x = x.astype(rounding.work_dtype(x.dtype))
    negative = jnp.any(x < 0) if signed is None else jnp.asarray(signed)
    low = jnp.where(negative, -(2.0 ** (bits - 1)), 0).astype(x.dtype)
    high = low + 2.0**bits - 1
    log_alpha = log_interval(x, None, jnp.maximum(high, 1)).reshape(())
    return spread(log_alpha), {"low": low, "high": high}
