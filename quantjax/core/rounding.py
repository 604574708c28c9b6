"""Rounding to a uniform grid, the same in every jitted program, with straight-through gradients.

Codes are `round(x * (1 / step))`, values `codes * step`: written as a quotient, two compiled
programs may disagree on weights half-way between two levels. Ties go to the even code.
"""

import functools

import jax
import jax.numpy as jnp


def work_dtype(dtype):
    """Returns the dtype of the arithmetic on values of `dtype`: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def to_codes(x, step, low, high, offset: float = 0):
    """Returns the integers `clip(round(x / step - offset), low, high)` as floats."""
    return _round(x * (1 / step) - offset, low, high)


def positive(step):
    """Returns a step with 1 in place of 0 and of what is so small that 1 / step overflows."""
    return jnp.where(step >= jnp.finfo(step.dtype).tiny, step, 1)


def _round(scaled, low, high):
    codes = jnp.clip(jnp.round(scaled), low, high)
    return jnp.where(codes == 0, 0, codes)  # an integer code knows no negative zero


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def nearest_on_grid(x, step, low, high, offset: float = 0):
    """Returns the values `step * (clip(round(x / step - offset), low, high) + offset)`.

    The gradient is straight-through: 1 for x inside of the outermost levels, 0 outside; that of
    `step` is what remains of d(level * step), as learned-step quantizers use it (level - x / step
    inside, the outermost level outside). The bounds get none. The border belongs to the inside,
    and so does what rounding errors put beside it: the largest weight of a leaf, in units of a step
    made from it. With offset 1/2 the levels lie at half steps, and none is 0.
    """
    return (to_codes(x, step, low, high, offset) + offset) * step


@nearest_on_grid.defjvp
def _nearest_on_grid_jvp(offset, primals, tangents):
    x, step, low, high = primals
    dx, dstep = tangents[:2]
    scaled = x * (1 / step)
    levels = _round(scaled - offset, low, high) + offset
    inside = within(scaled, low + offset, high + offset)
    tangent = jnp.where(inside, dx, 0) + jnp.where(inside, levels - scaled, levels) * dstep
    return levels * step, tangent


@jax.custom_jvp
def straight_through(x, value):
    """Returns value, with the gradient as if it were x; both of one shape and dtype."""
    del x
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def within(x, low, high):
    """True inside of [low, high], and for the rounding errors of a quotient beside its ends."""
    eps = jnp.finfo(jnp.result_type(x, jnp.float32)).eps
    slack = 4 * eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    return (x >= low - slack) & (x <= high + slack)
