"""What relaxed rounding learns of a grid: the logs of its interval alpha and spread sigma."""

import jax.numpy as jnp
from jax import lax

from quantjax.core import first_pass, least_error


def first(x, axes, limits: dict) -> dict:
    """Returns what is learned of the grid of weights: alpha of least squared error over `axes`."""
    least, most = (f(x, axis=axes, keepdims=True, initial=0) for f in (jnp.min, jnp.max))
    low, high = limits["low"], limits["high"]
    alpha = least_error.step(x, least_error.widest(least, most, low, high), low, high)
    return spread(jnp.log(alpha))


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


def fit_inputs(bits: int, signed: bool | None):
    """Returns the `fit` of `first_pass`: alpha of least squared error on the codes low .. high."""

    def fit(seen):
        low, high = first_pass.codes(seen, bits, signed)
        alpha = first_pass.least_error_step(seen, low, high)
        return spread(jnp.log(alpha)), {"low": low, "high": high}

    return fit
