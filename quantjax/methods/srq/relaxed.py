"""Relaxed quantization (RQ): rounding as a sample of the categories, by Gumbel-Softmax.

It forms all 2**bits categories of every element: the baseline that SRQ does without.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from quantjax.core import checks, first_pass, passes, qarray, rounding
from quantjax.core.quantizer import (
    InputQuantizer,
    Quantizer,
    described,
    inputwise,
    leafwise,
)
from quantjax.methods.srq import categories, learned_grid


def log_categories(x, alpha, sigma, codes):
    """Returns log pi_i of eq. 1 for every code, on a new last axis; not normalised."""
    return categories.log_masses(x * (1 / alpha), alpha / sigma, codes)


def quantize(x, alpha, sigma, gumbel, *, bits, temperature, signed=True):
    """Returns the relaxed sample sum_i r_i g_i (eq. 2), differentiable in x, alpha and sigma.

    Args:
      x: floats of any shape.
      alpha: grid interval > 0, broadcasts against x.
      sigma: scale of the logistic noise > 0, broadcasts against x.
      gumbel: Gumbel(0, 1) noise [*x.shape, 2**bits].
      bits: 1..8; the codes are -2**(bits-1) .. 2**(bits-1)-1, or 0 .. 2**bits-1 if not signed.
      temperature: tau > 0.

    Raises:
      ValueError: bits or temperature out of range; gumbel of another shape.
    """
    return _sample(x, alpha, sigma, gumbel, bits, temperature, signed, straight_through=False)


def quantize_straight_through(x, alpha, sigma, gumbel, *, bits, temperature, signed=True):
    """Returns the sampled category itself, under the multi-class straight-through estimator.

    The baseline of appendix E: the largest of the perturbed categories, and of the gradient only
    that through its share. Arguments and errors as `quantize`.
    """
    return _sample(x, alpha, sigma, gumbel, bits, temperature, signed, straight_through=True)


def annealed(start: float) -> Callable:
    """Returns appendix F's schedule: max(0.5, start * exp(-t / 100000)), moved every 1000 steps.

    `start` is 1 at 3 bits and 2 at 4 bits in the paper.
    """
    return lambda step: jnp.maximum(0.5, start * jnp.exp(-(step // 1000) * 1000 / 100_000))


@described
def rq(
    bits: int, *, temperature=1.0, straight_through: bool = False, axes=None, biases: bool = False
) -> Quantizer:
    """Relaxed quantization of weights: Gumbel-Softmax with a key, rounding without (algorithm 3).

    Args:
      bits: 1..8.
      temperature: tau > 0, or a schedule step -> tau such as `annealed(1.0)`; `update` counts.
      straight_through: `quantize_straight_through` in place of `quantize` (appendix E).
      axes: what shares alpha and sigma, as in `uniform`; biases have one step.
      biases: also takes the bias beside every kernel.

    Learned are log_alpha, at first the step of least squared error, and log_sigma, alpha / 3.

    Raises:
      ValueError: bits, axes or temperature; a state of another width or quantizer.
    """
    bits = _check(bits, temperature)
    axes = checks.axes(axes)

    def init(path, leaf, key):
        del key
        x = leaf.astype(rounding.work_dtype(leaf.dtype))
        limits = learned_grid.limits(bits, x.dtype)
        learned = learned_grid.first(x, checks.group_axes(axes, path, leaf), limits)
        return learned, {**limits, "count": jnp.zeros((), jnp.int32)}

    def apply(leaf, learned, buffers, key):
        checks.fitting(learned["log_alpha"], leaf)
        return _apply(leaf, learned, buffers, key, bits, temperature, straight_through)

    def encode(leaf, learned, buffers):
        alpha, _ = learned_grid.positive(learned)
        x = leaf.astype(checks.fitting(alpha, leaf).dtype)
        codes = rounding.to_codes(x, alpha, buffers["low"], buffers["high"])
        codes = codes.astype(qarray.code_dtype(bits))
        return qarray.Grid(codes, alpha, bits=bits, dtype=leaf.dtype)

    def update(leaf, learned, buffers, key):
        del leaf, learned, key
        return {**buffers, "count": optax.safe_increment(buffers["count"])}

    def check(learned, buffers):
        checks.names(learned, buffers, {"log_alpha", "log_sigma"}, {"low", "high", "count"})
        checks.width(checks.width_of_codes(buffers["high"]), bits)

    return leafwise(init, apply, encode, update, biases=biases, check=check)


@described
def rq_input(
    bits: int,
    *,
    temperature=1.0,
    straight_through: bool = False,
    signed: bool | None = None,
    axis_name=None,
) -> InputQuantizer:
    """Relaxed quantization of layer inputs; arguments as `rq`, the last two as in `srq_input`.

    Raises:
      ValueError: bits or temperature; a state of another width.
    """
    bits = _check(bits, temperature)
    fit = learned_grid.fit_inputs(bits, signed)

    def init(x):
        state = first_pass.begin(x, fit, bits, axis_name)
        return state._replace(buffers={**state.buffers, "count": jnp.zeros((), jnp.int32)})

    def apply(x, state, key, update):
        if not update:
            return _apply(x, *state, key, bits, temperature, straight_through), state
        state = first_pass.go_on(x, state, fit, axis_name)
        count = state.buffers["count"]
        moved = jnp.where(
            state.buffers[passes.JOINS] == passes.NEW, optax.safe_increment(count), count
        )
        x_hat = _apply(x, *state, key, bits, temperature, straight_through)
        return x_hat, state._replace(buffers={**state.buffers, "count": moved})

    return inputwise(init, apply, first_pass.check(bits))


def _apply(x, learned, buffers, key, bits, temperature, straight_through):
    alpha, sigma = learned_grid.positive(learned)
    low, high = buffers["low"], buffers["high"]
    wide = x.astype(alpha.dtype)
    if key is None:
        return rounding.nearest_on_grid(wide, alpha, low, high).astype(x.dtype)
    tau = temperature(buffers["count"]) if callable(temperature) else temperature
    gumbel = jax.random.gumbel(key, (*x.shape, 2**bits), alpha.dtype)
    return _relax(wide, alpha, sigma, gumbel, low, tau, straight_through).astype(x.dtype)


def _check(bits, temperature):
    checks.number("temperature", temperature, "positive", lambda t: t > 0)
    return checks.bits(bits, most=8)


def _sample(x, alpha, sigma, gumbel, bits, temperature, signed, straight_through):
    bits = _check(bits, temperature)
    x, gumbel = jnp.asarray(x), jnp.asarray(gumbel)
    if gumbel.shape != (*x.shape, 2**bits):
        raise ValueError(f"gumbel noise {gumbel.shape} for x {x.shape} at {bits} bits")
    wide = x.astype(rounding.work_dtype(x.dtype))
    low = -(2 ** (bits - 1)) if signed else 0
    return _relax(wide, alpha, sigma, gumbel, low, temperature, straight_through).astype(x.dtype)


def _relax(x, alpha, sigma, gumbel, low, temperature, straight_through):
    codes = low + jnp.arange(gumbel.shape[-1], dtype=x.dtype)
    logits = (log_categories(x, alpha, sigma, codes) + gumbel) / temperature
    share = jax.nn.softmax(logits, axis=-1)
    if not straight_through:
        return jnp.einsum("...i,i->...", share, codes) * alpha
    best = jnp.argmax(share, axis=-1)
    chosen = jnp.take_along_axis(share, best[..., None], axis=-1)[..., 0]
    # Eq. 3: the cotangent of the chosen share is that of x_hat times its level; others get none.
    return (low + best.astype(x.dtype)) * alpha * _one(chosen)


@jax.custom_jvp
def _one(share):
    return jnp.ones_like(share)


@_one.defjvp
def _one_jvp(primals, tangents):
    return _one(*primals), tangents[0]
