"""Layer inputs on an asymmetric grid that holds zero exactly, its range a running mean."""

import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, histograms, least_error, passes, rounding
from quantjax.core.quantizer import InputQuantizer, QuantState, described, inputwise

CELLS = 4096  # of the histogram of a pass: 16 for every level of an 8-bit grid


@described
def uniform_input(
    bits: int, *, fit: str | float = "range", momentum: float = 0.1, axis_name=None
) -> InputQuantizer:
    """Quantizes activations on an asymmetric grid that holds zero exactly.

    Args:
      bits: 1..16.
      fit: what the range of a pass is. "range": from the least to the largest value; "error": that
        cut to what gives the least squared error; a number p in (50, 100): from the (100 - p)th
        to the pth percentile. The last two keep a histogram, 32 KB a layer.
      momentum: weight of the present pass in the running range, in (0, 1].
      axis_name: of `pmap` or `shard_map`, over whose devices ranges are taken, too.

    The range is the first pass's, then a running mean; `linen.calibrate_batch_norm` fits it to
    batch norm's parameters instead. Values are (code - zero_point) * step, codes 0 .. 2**bits - 1.
    NaN and infinity have no part in ranges; a batch without finite values leaves them.

    Raises:
      ValueError: bits, fit or momentum out of range; a state of another width or fit.
    """
    bits = checks.bits(bits, 1)
    checks.momentum(momentum)
    if isinstance(fit, str):
        checks.choice("fit", fit, ("range", "error"))
    elif not 50 < fit < 100:
        raise ValueError(f"fit as a percentile must be in (50, 100), got {fit!r}")
    levels = float(2**bits - 1)

    def ends(seen):
        """Returns low <= 0 <= high of what one pass has seen."""
        if fit == "range":
            return histograms.ends(seen)
        if fit == "error":
            return _least_error_ends(seen, levels)
        return _percentiles(seen, fit)

    def init(x):
        x = x.astype(rounding.work_dtype(x.dtype))
        seen = see(x, nothing(x.dtype))
        found = _grid(*ends(seen), jnp.asarray(levels, x.dtype))
        return QuantState({}, {**found, **written(seen), **passes.buffer()})

    def nothing(dtype):
        return histograms.unseen(dtype) if fit == "range" else histograms.nothing(CELLS, dtype)

    def see(x, seen):
        join = histograms.widened if fit == "range" else histograms.joined
        return join(x, seen, axis_name)

    def written(seen):
        cells = [seen[name] for name in histograms.ARRAYS if name in seen]
        kept = {name: seen[name] for name in histograms.EXTENT}
        return kept | ({"pass_cells": jnp.stack(cells)} if cells else {})

    def read(buffers):
        """Returns what the present pass has seen so far: nothing where a new one begins."""
        begins = buffers[passes.JOINS] == passes.NEW
        seen = {name: buffers[name] for name in histograms.EXTENT}
        if fit != "range":
            seen |= dict(zip(histograms.ARRAYS, buffers["pass_cells"], strict=True))
        empty = nothing(buffers["step"].dtype)
        return {name: jnp.where(begins, empty[name], seen[name]) for name in seen}

    def move(x, buffers):
        before = read(buffers)
        seen = see(x, before)
        weight = passes.weight(buffers, momentum, x.dtype)
        nothing_before, nothing_now = (
            each[histograms.LOW] > each[histograms.HIGH] for each in (before, seen)
        )

        def running(old, before, union):
            before = jnp.where(nothing_before, old, before)
            return jnp.where(nothing_now, old, weight * union + (old - weight * before))

        old = buffers["low"], buffers["high"]
        low, high = map(running, old, ends(before), ends(seen))
        return {**buffers, **_grid(low, high, buffers["levels"]), **written(seen)}

    def apply(x, state, key, update):
        del key
        buffers = state.buffers
        wide = x.astype(buffers["step"].dtype)
        if update:
            buffers = move(lax.stop_gradient(wide), buffers)
        step, zero_point = buffers["step"], buffers["zero_point"]
        # (code - zero_point) * step with codes 0..levels: the grid shifted by whole codes.
        low, high = -zero_point, buffers["levels"] - zero_point
        x_hat = rounding.nearest_on_grid(wide, step, low, high)
        return x_hat.astype(x.dtype), state._replace(buffers=buffers)

    def check(learned, buffers):
        del learned
        if ("pass_cells" in buffers) != (fit != "range"):
            raise ValueError(
                f"the state was made by another quantizer than uniform_input(fit={fit!r})"
            )
        checks.width(checks.width_of_codes(buffers["levels"]) - 1, bits)  # codes without a sign

    return inputwise(init, apply, check)


def _grid(low, high, levels):
    step = rounding.positive((high - low) / levels)
    zero_point = jnp.clip(jnp.round(-low * (1 / step)), 0, levels)
    return {"low": low, "high": high, "levels": levels, "step": step, "zero_point": zero_point}


def _least_error_ends(seen, levels):
    """Cuts what reaches farthest first, so that a short tail on the other side stays whole."""
    low, high = histograms.ends(seen)
    x, weight = histograms.points(seen)
    farthest = jnp.maximum(-low, high)

    def cut(fraction):
        return jnp.maximum(low, -fraction * farthest), jnp.minimum(high, fraction * farthest)

    def error(fraction):
        grid = _grid(*cut(fraction), levels)
        zero_point, step = grid["zero_point"], grid["step"]
        codes = rounding.to_codes(x, step, -zero_point, levels - zero_point)
        return jnp.sum(weight * (codes * step - x) ** 2)

    return cut(least_error.fraction(error, farthest))


def _percentiles(seen, percent):
    x, weight = histograms.points(seen)  # in ascending order
    share = jnp.cumsum(weight) / jnp.maximum(jnp.sum(weight), 1)
    low, high = (x[jnp.argmax(share >= level)] for level in (1 - percent / 100, percent / 100))
    return jnp.minimum(low, 0), jnp.maximum(high, 0)
