"""Layer inputs whose grid is fitted in one pass, and learned from then on."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, histograms, least_error, passes, rounding
from quantjax.core.quantizer import InputQuantizer, QuantState, Scalars, inputwise

CELLS = 64  # of the histogram, for every level, and for 16 levels at least


def begin(x, fit: Callable, bits: int, axis_name=None) -> QuantState:
    """Returns the state fitted to the first input of a layer.

    Args:
      x: floats of any shape.
      fit: histogram -> (learned, buffers), both dicts of arrays.
      bits: of the grid: says how fine the histogram is.
      axis_name: of `pmap` or `shard_map`, over whose devices is fitted.

    The least input seen is kept: `summary` names layers whose signed grid meets no negative one.
    """
    x = x.astype(rounding.work_dtype(x.dtype))
    seen = histograms.nothing(CELLS * 2 ** max(bits, 4), x.dtype)
    seen = histograms.joined(x, seen, axis_name)
    learned, buffers = fit(seen)
    return QuantState(
        learned, {**buffers, **seen, "least": seen[histograms.LOW], **passes.buffer()}
    )


def go_on(x, state: QuantState, fit: Callable, axis_name=None) -> QuantState:
    """Returns the state after another input: fitted again while the fitting pass lasts."""
    x = lax.stop_gradient(x.astype(state.buffers["least"].dtype))
    least = jnp.minimum(state.buffers["least"], passes.least(x, axis_name))

    def again(x, buffers):
        seen = histograms.joined(x, buffers, axis_name)
        learned, found = fit(seen)
        return learned, {**buffers, **found, **seen, "least": least}

    def keep(x, buffers):
        del x
        return state.learned, {**buffers, "least": least}

    return QuantState(*passes.moved(x, state.buffers, again, keep))


def codes(seen: dict, bits: int, signed: bool | None):
    """Returns the lowest and the highest code, signed or not; None: by what a histogram has seen.

    They are -2**(bits-1) .. 2**(bits-1)-1 or 0 .. 2**bits-1.
    """
    low = histograms.ends(seen)[0]
    negative = low < 0 if signed is None else jnp.asarray(signed)
    low = jnp.where(negative, -(2.0 ** (bits - 1)), 0).astype(low.dtype)
    return low, low + 2.0**bits - 1


def least_error_step(seen: dict, low, high):
    """Returns the step of least squared error for what a histogram has seen, a scalar."""
    widest = least_error.widest(*histograms.ends(seen), low, high)
    x, weight = histograms.points(seen)
    return least_error.step(x, widest[None], low, high, weight=weight)[0]


def input_quantizer(
    fit: Callable,
    values: Callable,
    quantize: Callable,
    bits: int,
    axis_name=None,
    slopes: Callable | None = None,
) -> InputQuantizer:
    """Makes the quantizer of layer inputs that are fitted as `begin` and `go_on` do.

    Args:
      fit, bits, axis_name: as in `begin`; low and high are the outermost codes in the buffers.
      values: as in `Scalars`.
      quantize: (x, values, buffers) -> x_hat, element by element.
      slopes: as in `Scalars`; None: found by differentiating `quantize`.
    """

    def init(x):
        return begin(x, fit, bits, axis_name)

    def run(x, state, key, update):
        del key
        if update:
            state = go_on(x, state, fit, axis_name)
        return quantize(x, values(x, *state), state.buffers), state

    slopes = functools.partial(_slopes, quantize) if slopes is None else slopes
    return inputwise(init, run, check(bits))._replace(scalars=Scalars(values, slopes))


def _slopes(quantize, x, values, buffers):
    """Returns d x_hat / d value as if every element had values of its own."""
    # The zeros have x's shape, and vary over axes of `shard_map` as it does.
    spread = [value + jnp.zeros_like(x, dtype=value.dtype) for value in values]
    x_hat, pull = jax.vjp(lambda *values: quantize(x, values, buffers), *spread)
    return pull(jnp.ones_like(x_hat))


def check(bits: int) -> Callable:
    """Returns the check of a state's width, for `inputwise`; the buffers low and high are codes."""

    def check(learned, buffers):
        del learned
        span = buffers["high"] - buffers["low"]
        checks.width(checks.width_of_codes(span) - 1, bits)  # codes without a sign

    return check
