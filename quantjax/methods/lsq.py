"""Learned step size quantization (Esser et al., ICLR 2020): the step trains with the weights."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.core import checks, first_pass, histograms, least_error, qarray, rounding
from quantjax.core.quantizer import InputQuantizer, Quantizer, described, leafwise

FITS = ("error", "mean")


@described
def lsq(
    bits: int, *, axes=None, fit: str = "error", balanced: bool = False, biases: bool = False
) -> Quantizer:
    """Rounds weights to a grid whose step is learned.

    Args:
      bits: 1..8.
      axes: what shares a step, as in `uniform`; biases have one step.
      fit: the first step: "error", that of least squared error, or "mean", the paper's
        2 mean|w| / sqrt(2**(bits-1) - 1).
      balanced: levels at half steps, as many below zero as above and none at it, as ParetoQ's
        stretched elastic quantization has them (Liu et al. 2025): made for 1 and 2 bits. Otherwise
        codes are -2**(bits-1) .. 2**(bits-1)-1.
      biases: also takes the bias beside every kernel.

    Learned is step, of which the absolute value counts. Its gradient is that of eq. 3 (level - w /
    step inside of the grid, the outermost level outside), times 1 / sqrt(n q), n the number of
    weights that share it and q the highest level in steps (section 2.2). Under Adam, which undoes
    that scale, a smaller learning rate for the steps than for the weights may help.

    Raises:
      ValueError: bits, axes or fit; a state of another width or quantizer.
    """
    bits = checks.bits(bits, most=8)
    checks.choice("fit", fit, FITS)
    axes = checks.axes(axes)
    low, high, offset = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.5 if balanced else 0.0

    def scale(high, share):
        """Section 2.2; the one level of a 1-bit grid beside zero counts as 1."""
        return 1 / jnp.sqrt(jnp.maximum(high + offset, 1 - offset) * share)

    def init(path, leaf, key):
        del key
        x = leaf.astype(rounding.work_dtype(leaf.dtype))
        group = {"axis": checks.group_axes(axes, path, leaf), "keepdims": True}
        if fit == "mean":
            step = 2 * jnp.mean(jnp.abs(x), **group) * scale(jnp.asarray(high, x.dtype), 1)
            step = jnp.where(step >= jnp.finfo(step.dtype).tiny, step, least_error.ZERO_STEP)
        else:
            least, most = (f(x, initial=0, **group) for f in (jnp.min, jnp.max))
            widest = least_error.widest(least, most, low + offset, high + offset)
            step = least_error.step(x, widest, low, high, halves=balanced)
        limits = {"low": jnp.asarray(low, x.dtype), "high": jnp.asarray(high, x.dtype)}
        return {"step": step}, limits

    def apply(leaf, learned, buffers, key):
        del key
        step = checks.fitting(positive(learned["step"]), leaf)
        step = scale_gradient(step, scale(buffers["high"], leaf.size / step.size))
        x = leaf.astype(step.dtype)
        low, high = buffers["low"], buffers["high"]
        return rounding.nearest_on_grid(x, step, low, high, balanced).astype(leaf.dtype)

    def encode(leaf, learned, buffers):
        step = checks.fitting(positive(learned["step"]), leaf)
        low, high = buffers["low"], buffers["high"]
        codes = rounding.to_codes(leaf.astype(step.dtype), step, low, high, balanced)
        if not balanced:
            codes = codes.astype(qarray.code_dtype(bits))
            return qarray.Grid(codes, step, bits=bits, dtype=leaf.dtype)
        levels = jnp.arange(2**bits, dtype=step.dtype).reshape((1,) * step.ndim + (-1,))
        levels = (low + levels + offset) * step[..., None]
        codes = (codes - low).astype(qarray.code_dtype(bits, signed=False))
        return qarray.Table(codes, levels, bits=bits, dtype=leaf.dtype)

    def check(learned, buffers):
        checks.names(learned, buffers, {"step"}, {"low", "high"})
        checks.width(checks.width_of_codes(buffers["high"]), bits)

    return leafwise(init, apply, encode, biases=biases, check=check)


@described
def lsq_input(
    bits: int, *, signed: bool | None = None, fit: str = "error", axis_name=None
) -> InputQuantizer:
    """Rounds layer inputs to a grid whose step is learned, one per layer.

    Args:
      bits: 1..8.
      signed: codes -2**(bits-1) .. 2**(bits-1)-1 rather than 0 .. 2**bits-1; None: signed where
        the first pass has negative values.
      fit: the step after the first pass, as in `lsq`.
      axis_name: of `pmap` or `shard_map`, over whose devices the first pass is fitted, too.

    The gradient of the step is scaled by 1 / sqrt(n q), n the number of features of a layer: the
    elements of one example. NaN and infinity count for nothing.

    Raises:
      ValueError: bits or fit; a state of another width.
    """
    bits = checks.bits(bits, most=8)
    checks.choice("fit", fit, FITS)

    def find(seen):
        low, high = first_pass.codes(seen, bits, signed)
        step = first_pass.least_error_step(seen, low, high)
        if fit == "mean":
            x, weight = histograms.points(seen)
            mean = jnp.sum(weight * jnp.abs(x)) / jnp.maximum(jnp.sum(weight), 1)
            step = jnp.where(mean > 0, 2 * mean / jnp.sqrt(jnp.maximum(high, 1)), step)
        return {"step": step}, {"low": low, "high": high}

    def values(x, learned, buffers):
        features = math.prod(x.shape[1:])
        scale = 1 / jnp.sqrt(features * jnp.maximum(buffers["high"], 1))
        return (scale_gradient(positive(learned["step"]), scale),)

    def quantize(x, values, buffers):
        (step,), low, high = values, buffers["low"], buffers["high"]
        return rounding.nearest_on_grid(x.astype(step.dtype), step, low, high).astype(x.dtype)

    return first_pass.input_quantizer(find, values, quantize, bits, axis_name)


def positive(step):
    """Returns |step|, kept from 0; the barrier keeps it one number for every use."""
    return lax.optimization_barrier(jnp.maximum(jnp.abs(step), jnp.finfo(step.dtype).tiny))


@jax.custom_jvp
def scale_gradient(x, factor):
    """Returns x, whose gradient is multiplied by a factor."""
    del factor
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals, tangents):
    x, factor = primals
    return x, tangents[0] * factor
