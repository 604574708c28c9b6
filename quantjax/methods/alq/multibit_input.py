"""Multi-bit inputs of layers: x_ref + D gamma with bases in {-1, 1} (section 4 of ALQ)."""

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, histograms, passes, rounding
from quantjax.core.quantizer import InputQuantizer, QuantState, described, inputwise
from quantjax.methods.alq import bases as bases_lib

FIRST_FITS = 10  # alternations of levels and least squares in the first pass
CELLS = 64  # of the first pass's histogram, for every level; with 16 the alternations stall


@described
def multi_bit_input(bits: int, *, momentum: float = 0.1, axis_name=None) -> InputQuantizer:
    """Quantizes activations to x_ref + D gamma, fitted by a running average (eq. 24).

    Args:
      bits: I_x, 1..8.
      momentum: weight of the present pass's least-squares fit in the running one, in (0, 1].
      axis_name: of `pmap` or `shard_map`, over whose devices is fitted, too.

    The buffers ref (scalar) and coords [K] make the levels, one set per layer. The first pass
    starts from even levels over its range, 0 included, and is fitted as a histogram, so that
    several calls of a layer make one fit; base and sums are those of the present pass. NaN and
    infinity count for nothing. Gradients are straight-through between the outermost levels and 0
    beyond. The last layer's output stays as it is.

    Raises:
      ValueError: bits or momentum out of range; a state of another width.
    """
    bits = checks.bits(bits, most=bases_lib.MOST_BITS)
    checks.number("momentum", momentum, "in (0, 1]", lambda m: (m > 0) & (m <= 1))
    cells = CELLS * 2 ** max(bits, 4)

    def init(x):
        x = x.astype(rounding.work_dtype(x.dtype))
        nothing = {
            "base": jnp.zeros(bits + 1, x.dtype),
            "sums": jnp.zeros(bits + 2 + bits * (bits + 1) // 2, x.dtype),
            "ref": jnp.zeros((), x.dtype),
            "coords": jnp.zeros(bits, x.dtype),
            **histograms.nothing(cells, x.dtype),
            **passes.buffer(),
        }
        return QuantState({}, first_pass(x, nothing))

    def first_pass(x, buffers):
        """The fit to x and all that came before it in the fitting pass."""
        seen = histograms.joined(x, buffers, axis_name)
        points, (low, high) = histograms.points(seen), histograms.ends(seen)
        powers = jnp.asarray([2.0**k / (2**bits - 1) for k in range(bits)], x.dtype)
        start = jnp.append((low + high) / 2, (high - low) / 2 * powers)
        fitted = lax.fori_loop(
            0, FIRST_FITS, lambda _, base: _solve(base, _equations(*points, base)), start
        )
        return {**buffers, **seen, "ref": fitted[0], "coords": fitted[1:]}

    def later_pass(x, buffers):
        """Eq. 24: the fit to the present pass, given the levels before it, in the running one."""
        begins = buffers[passes.JOINS] == passes.NEW
        present = jnp.append(buffers["ref"], buffers["coords"])
        base = jnp.where(begins, present, buffers["base"])
        x, kept = passes.finite(x)
        sums = passes.total(_equations(x, kept.astype(x.dtype), base), axis_name)
        sums = sums + jnp.where(begins, 0, buffers["sums"])
        moved = momentum * _solve(base, sums) + (1 - momentum) * base
        moved = jnp.where(sums[0] > 0, moved, base)
        return {**buffers, "ref": moved[0], "coords": moved[1:], "base": base, "sums": sums}

    def apply(x, state, key, update):
        del key
        buffers = state.buffers
        wide = x.astype(buffers["coords"].dtype)
        if update:
            buffers = passes.moved(lax.stop_gradient(wide), buffers, first_pass, later_pass)
        x_hat = _nearest(wide, buffers["ref"], buffers["coords"]).astype(x.dtype)
        return x_hat, state._replace(buffers=buffers)

    def check(learned, buffers):
        del learned
        checks.width(buffers["coords"].shape[-1], bits)

    return inputwise(init, apply, check)


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
    reach = jnp.sum(coords)
    inside = rounding.within(x, ref - reach, ref + reach)
    return _nearest(x, ref, coords), jnp.where(inside, tangents[0], 0)


def _as_group(coords, x):
    return coords.reshape((1,) * x.ndim + coords.shape)


def _equations(x, weight, base):
    """Returns the normal equations of [1, D] for what base leaves of x, as one flat array.

    Given the present level of every activation. First come the rows of the matrix, without its
    diagonal but for the first, since all are the sum of weights; then the right side.
    """
    ref, coords = base[0], base[1:]
    group = _as_group(coords, x)
    mask = jnp.ones(group.shape, bool)
    codes = bases_lib.nearest_codes(group, mask, x - ref)
    rest = weight * (x - (ref + bases_lib.values(bases_lib.Bases(codes, group, mask))))
    matrix, pulls = [jnp.sum(weight)], [jnp.sum(rest)]
    for i in range(coords.size):
        matrix.append(jnp.sum(bases_lib.signed(codes, i, weight)))
        for j in range(i):
            same = bases_lib.is_set(codes, i) == bases_lib.is_set(codes, j)
            matrix.append(jnp.sum(jnp.where(same, weight, -weight)))
        pulls.append(jnp.sum(bases_lib.signed(codes, i, rest)))
    return jnp.stack([*matrix, *pulls])


def _solve(base, sums):
    """Returns the least-squares ref and coords of the equations about base."""
    size = base.size
    entries = iter(sums)
    count = next(entries)
    lower, inverses = [], []
    for i in range(size):
        row = [*(next(entries) for _ in range(i)), count]
        factors, inverse = bases_lib.factor_row(row, lower, inverses)
        lower.append(factors)
        inverses.append(inverse)
    fitted = base + jnp.stack(bases_lib.solve(lower, inverses, list(entries)))
    return jnp.append(fitted[:1], jnp.abs(fitted[1:]))
