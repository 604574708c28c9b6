"""Multi-bit inputs of layers: x_ref + D gamma with bases in {-1, 1} (section 4 of ALQ)."""

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, rounding
from quantjax.core.quantizer import InputQuantizer, QuantState
from quantjax.methods.alq import bases as bases_lib

FIRST_FITS = 10  # alternations of levels and least squares on the first batch


def multi_bit_input(bits: int, *, momentum: float = 0.1) -> InputQuantizer:
    """Quantizes activations to x_ref + D gamma, fitted by a running average (eq. 24).

    Args:
      bits: I_x, 1..8.
      momentum: weight of the present batch's least-squares fit in the running one, in (0, 1].

    The buffers are ref (scalar) and coords [K], one set per layer. The first batch starts from
    even levels over its range, 0 included. Gradients are straight-through between the outermost
    levels and 0 beyond. The last layer's output stays as it is.

    Raises:
      ValueError: bits or momentum out of range.
    """
    checks.bits(bits, most=bases_lib.MOST_BITS)
    checks.number("momentum", momentum, "in (0, 1]", lambda m: (m > 0) & (m <= 1))

    def init(x):
        x = x.astype(rounding.work_dtype(x.dtype))
        low, high = jnp.min(x, initial=0), jnp.max(x, initial=0)
        powers = jnp.asarray([2.0**k / (2**bits - 1) for k in range(bits)], x.dtype)
        ref, coords = (low + high) / 2, (high - low) / 2 * powers
        for _ in range(FIRST_FITS):
            ref, coords = _fit(x, ref, coords)
        return QuantState({}, {"ref": ref, "coords": coords})

    def apply(x, state, *, key=None, update=False):
        del key
        ref, coords = state.buffers["ref"], state.buffers["coords"]
        wide = x.astype(coords.dtype)
        if update:
            fitted = _fit(lax.stop_gradient(wide), ref, coords)
            ref, coords = (
                momentum * new + (1 - momentum) * old
                for new, old in zip(fitted, (ref, coords), strict=True)
            )
            state = state._replace(buffers={"ref": ref, "coords": coords})
        return _nearest(wide, ref, coords).astype(x.dtype), state

    return InputQuantizer(init, apply)


def fold_reference(kernel, bias, ref):
    """Returns the bias that takes the place of x_ref: bias + ref * sum of the kernel's inputs.

    Then layer(x_ref + D gamma) = layer(D gamma) with this bias. A padded convolution must pad
    D gamma with -x_ref, which stands for zero.

    Args:
      kernel: [..., features].
      bias: [features].
      ref: scalar.
    """
    return bias + ref * jnp.sum(kernel, axis=tuple(range(kernel.ndim - 1)))


@jax.custom_jvp
def _nearest(x, ref, coords):
    return ref + bases_lib.nearest_value(_as_group(coords, x), x - ref)


@_nearest.defjvp
def _nearest_jvp(primals, tangents):
    x, ref, coords = primals
    inside = jnp.abs(x - ref) <= jnp.sum(coords)
    return _nearest(x, ref, coords), jnp.where(inside, tangents[0], 0)


def _as_group(coords, x):
    return coords.reshape((1,) * x.ndim + coords.shape)


def _fit(x, ref, coords):
    """The least-squares ref and coords, given the present level of every activation."""
    group = _as_group(coords, x)
    mask = jnp.ones(group.shape, bool)
    codes = bases_lib.nearest_codes(group, mask, x - ref)
    rest = x - (ref + bases_lib.values(bases_lib.Bases(codes, group, mask)))
    one = jnp.ones((), x.dtype)
    # Of the columns [1, D]; the constant one first.
    rows, pulls = [[jnp.asarray(x.size, x.dtype)]], [jnp.sum(rest)]
    for i in range(coords.size):
        row = [jnp.sum(bases_lib.signed(codes, i, one))]
        for j in range(i):
            same = bases_lib.is_set(codes, i) == bases_lib.is_set(codes, j)
            row.append(jnp.sum(jnp.where(same, one, -one)))
        rows.append([*row, jnp.asarray(x.size, x.dtype)])
        pulls.append(jnp.sum(bases_lib.signed(codes, i, rest)))
    lower, inverses = [], []
    for row in rows:
        factors, inverse = bases_lib.factor_row(row, lower, inverses)
        lower.append(factors)
        inverses.append(inverse)
    step = bases_lib.solve(lower, inverses, pulls)
    return ref + step[0], jnp.abs(coords + jnp.stack(step[1:]))
