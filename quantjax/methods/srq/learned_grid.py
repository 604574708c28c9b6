"""What relaxed rounding learns of a grid: the logs of its interval alpha and spread sigma."""

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, passes, rounding
from quantjax.core.quantizer import QuantState

ZERO_INTERVAL = 0.1  # alpha of leaves that are all zero


def log_interval(x, axes, high):
    """Returns log alpha, kept dims: `high` reaches max|x| or 3 root mean squares, the lesser."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    return _log_interval(largest, jnp.mean(x**2, axis=axes, keepdims=True), high)


def _log_interval(largest, mean_square, high):
    reach = jnp.minimum(largest, 3 * jnp.sqrt(mean_square)) / high
    # All zero, as biases are at first: there is no range to go by.
    return jnp.log(jnp.where(reach >= jnp.finfo(reach.dtype).tiny, reach, ZERO_INTERVAL))


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


def observe(x, axis_name=None) -> dict:
    """Returns what `fit_inputs` needs of an input: sums and extremes of its finite values."""
    x, kept = passes.finite(x.astype(rounding.work_dtype(x.dtype)))
    return {
        "least": passes.least(jnp.where(kept, x, jnp.inf), axis_name),
        "pass_largest": jnp.maximum(passes.most(jnp.abs(x), axis_name), 0),
        "pass_squares": passes.total(jnp.sum(x**2), axis_name),
        "pass_count": passes.total(jnp.sum(kept, dtype=x.dtype), axis_name),
    }


def together(seen: dict, other: dict) -> dict:
    """Returns what was observed of two inputs as if they were one."""
    return {
        "least": jnp.minimum(seen["least"], other["least"]),
        "pass_largest": jnp.maximum(seen["pass_largest"], other["pass_largest"]),
        "pass_squares": seen["pass_squares"] + other["pass_squares"],
        "pass_count": seen["pass_count"] + other["pass_count"],
    }


def fit_inputs(seen: dict, bits: int, signed: bool | None):
    """Returns what is learned of a layer's inputs, and low, high; signed None: by their signs."""
    dtype = seen["least"].dtype
    negative = seen["least"] < 0 if signed is None else jnp.asarray(signed)
    low = jnp.where(negative, -(2.0 ** (bits - 1)), 0).astype(dtype)
    high = low + 2.0**bits - 1
    mean_square = seen["pass_squares"] / jnp.maximum(seen["pass_count"], 1)
    log_alpha = _log_interval(seen["pass_largest"], mean_square, jnp.maximum(high, 1))
    return spread(log_alpha), {"low": low, "high": high}


def first_inputs(x, bits: int, signed: bool | None, axis_name=None) -> QuantState:
    """Returns the state fitted to the first input of a layer."""
    seen = observe(x, axis_name)
    learned, limits = fit_inputs(seen, bits, signed)
    return QuantState(learned, {**limits, **seen, **passes.buffer()})


def more_inputs(x, state: QuantState, bits: int, signed: bool | None, axis_name=None):
    """Returns the state after another input: fitted again if this is still the fitting pass.

    The least input of all is kept; the rest is the present pass's.
    """
    fitting = state.buffers[passes.JOINS] == passes.FITTING
    present = observe(x, axis_name)
    seen = together({name: state.buffers[name] for name in present}, present)
    found = fit_inputs(seen, bits, signed)
    old = state.learned, {name: state.buffers[name] for name in found[1]}
    learned, limits = jax.tree.map(
        lambda new, old: jnp.where(fitting, new, old), found, (dict(old[0]), old[1])
    )
    # Sums of other passes are of no use, and would grow for ever.
    seen = {
        name: value if name == "least" else jnp.where(fitting, value, state.buffers[name])
        for name, value in seen.items()
    }
    return QuantState(learned, {**state.buffers, **limits, **seen})


def check_inputs(bits: int):
    """Returns the check of a state's width, for `inputwise`."""

    def check(learned, buffers):
        del learned
        codes = buffers["high"] - buffers["low"]
        checks.width(checks.width_of_codes(codes) - 1, bits)  # codes without a sign

    return check
