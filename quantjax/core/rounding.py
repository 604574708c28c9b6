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


def to_codes(x, step, low, high, halves: bool = False):
    """Returns the integers `clip(round(x / step), low, high)` as floats.

    With halves, `clip(floor(x / step), low, high)`: the levels are half a step above the codes.
    """
    return _round(x * (1 / step), low, high, halves)


def positive(step):
    """Returns a step with 1 in place of 0 and of what is so small that 1 / step overflows."""
    return jnp.where(step >= jnp.finfo(step.dtype).tiny, step, 1)


def _round(scaled, low, high, halves):
    # No difference here: a program may or may not round before it subtracts.
    codes = jnp.clip(jnp.floor(scaled) if halves else jnp.round(scaled), low, high)
    return jnp.where(codes == 0, 0, codes)  # an integer code knows no negative zero


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def nearest_on_grid(x, step, low, high, halves: bool = False):
    """Returns the values `step * clip(round(x / step), low, high)`.

    The gradient is straight-through: 1 for x inside of the outermost levels, 0 outside; that of
    `step` is what remains of d(level * step), as learned-step quantizers use it (level - x / step
    inside, the outermost level outside). The bounds get none. The border belongs to the inside,
    and so does what rounding errors put beside it: the largest weight of a leaf, in units of a step
    made from it. With halves the levels are the codes of `to_codes` and a half.
    """
    return _levels(x * (1 / step), low, high, halves)[0] * step


@nearest_on_grid.defjvp
def _nearest_on_grid_jvp(halves, primals, tangents):
    x, step, low, high = primals
    dx, dstep = tangents[:2]
    scaled = x * (1 / step)
    levels, *ends = _levels(scaled, low, high, halves)
    inside = within(scaled, *ends)
    tangent = jnp.where(inside, dx, 0) + jnp.where(inside, levels - scaled, levels) * dstep
    return levels * step, tangent


def _levels(scaled, low, high, halves):
    """The nearest level in steps, and the outermost ones."""
    shift = 0.5 if halves else 0
    return tuple(code + shift for code in (_round(scaled, low, high, halves), low, high))


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
