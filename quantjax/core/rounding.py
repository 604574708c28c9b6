"""Rounding to a uniform grid, the same in every jitted program, with straight-through gradients.

Codes are `round(x * (1 / step))`, values `codes * step`: written as a quotient, two compiled
programs may disagree on weights half-way between two levels. Ties go to the even code.
"""

import jax
import jax.numpy as jnp


def work_dtype(dtype):
    """Returns the dtype of the arithmetic on values of `dtype`: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def to_codes(x, step, low, high):
    """Returns the integers `clip(round(x / step), low, high)` as floats; shapes broadcast."""
    return _round(x * (1 / step), low, high)


def _round(scaled, low, high):
    codes = jnp.clip(jnp.round(scaled), low, high)
    return jnp.where(codes == 0, 0, codes)  # an integer code knows no negative zero


@jax.custom_jvp
def nearest_on_grid(x, step, low, high):
    """Returns the values `step * clip(round(x / step), low, high)`.

    The gradient is straight-through: 1 for x inside [low, high] * step, 0 outside; that of `step`
    is what remains of d(code * step), as learned-step quantizers use it (code - x / step inside,
    the bound outside). The bounds get none. The border belongs to the inside, and so does what
    rounding errors put beside it: the largest weight of a leaf, in units of a step made from it.
    """
    return to_codes(x, step, low, high) * step


@nearest_on_grid.defjvp
def _nearest_on_grid_jvp(primals, tangents):
    x, step, low, high = primals
    dx, dstep = tangents[:2]
    scaled = x * (1 / step)
    codes = _round(scaled, low, high)
    inside = within(scaled, low, high)
    tangent = jnp.where(inside, dx, 0) + jnp.where(inside, codes - scaled, codes) * dstep
    return codes * step, tangent


def within(x, low, high):
    """True inside of [low, high], and for the rounding errors of a quotient beside its ends."""
    eps = jnp.finfo(jnp.result_type(x, jnp.float32)).eps
    slack = 4 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    return (x >= low - slack) & (x <= high + slack)
