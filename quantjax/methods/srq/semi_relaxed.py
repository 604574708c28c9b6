"""Semi-relaxed quantization (SRQ) with DropBits: the mode of the categories.

The forward pass rounds to the category of largest probability; the backward pass differentiates
the probabilities of `categories`, in closed form and without ever forming them. DropBits multiplies
the probabilities by hard concrete masks, one for each bit level of the grid.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core import checks, first_pass, qarray, rounding
from quantjax.core.quantizer import (
    InputQuantizer,
    Quantizer,
    at,
    described,
    leafwise,
)
from quantjax.methods import hard_concrete
from quantjax.methods.srq import estimators, learned_grid, widths
from quantjax.methods.srq.bit_masks import bit_levels, bit_penalty

__all__ = [
    "bit_levels",
    "bit_penalty",
    "quantize",
    "srq",
    "srq_input",
]

MASK_PROBABILITY, MASK_DEVIATION = 0.9, 0.01  # appendix F


def quantize(x, alpha, sigma, *, bits, signed=True, masks=None, estimator="expectation"):
    """Returns x on the grid of interval alpha: the mode of its categories (eq. 3, algorithm 1).

    Args:
      x: floats of any shape.
      alpha: grid interval > 0, broadcasts to x.
      sigma: scale of the logistic noise > 0, broadcasts to x; it only shapes gradients, and with
        masks the choice among categories.
      bits: 1..8; the codes are -2**(bits-1) .. 2**(bits-1)-1, or 0 .. 2**bits-1 if not signed.
      masks: signed grids only, [*group, count], group broadcasting to x. Either bits - 1
        masks Z_1 .. Z_{bits-1} of the bit levels, or 2**(bits-1) - 1 masks of pairs of end points,
        from the outside in (figure 3).
      estimator: "expectation", the gradient of sum_i r_i g_i, or "mode", eq. 3 as written: that
        is the level times the gradient of its share, and so never moves what rounds to zero. Under
        "expectation" sigma below alpha / 100 counts as alpha / 100, and gives log sigma the
        gradient of that.

    The cotangent of a mask that is exactly 0 is 0. Gradients are of reverse mode only: `jax.jvp`,
    `jax.jacfwd` and `jax.hessian` raise TypeError; `jax.vjp`, `jax.grad`, `jax.jacrev` work.

    Raises:
      ValueError: bits, estimator or the number of masks; alpha or sigma not positive; shapes
        larger than that of x.
    """
    bits = checks.bits(bits, most=8)
    checks.choice("estimator", estimator, estimators.KNOWN)
    checks.number("alpha", alpha, "positive", lambda a: a > 0)
    checks.number("sigma", sigma, "positive", lambda s: s > 0)
    x = jnp.asarray(x)
    dtype = rounding.work_dtype(x.dtype)
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)
    alpha, sigma = jnp.asarray(alpha, dtype), jnp.asarray(sigma, dtype)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    masks = masks if masks is None else jnp.asarray(masks, dtype)
    shapes = alpha.shape, sigma.shape, () if masks is None else masks.shape[:-1]
    if np.broadcast_shapes(x.shape, *shapes) != x.shape:
        raise ValueError(f"alpha, sigma and groups of masks {shapes} are larger than x {x.shape}")
    if masks is None:
        ends = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
        return estimators.on_grid(x, alpha, sigma, *ends, estimator, 2**bits)
    if not signed:
        raise ValueError("masks need a signed grid: an unsigned one has no symmetric levels")
    return estimators.on_masked_grid(x, alpha, sigma, masks, bits, estimator)


@described
def srq(
    bits: int,
    *,
    dropbits: bool = False,
    learn_bits: bool = False,
    freeze_after: int | None = None,
    penalty: float = 1e-3,
    estimator: str = "expectation",
    axes=None,
    biases: bool = False,
    temperature: float = 0.2,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> Quantizer:
    """Semi-relaxed quantization of weights, with DropBits and learned bit-widths on request.

    Args:
      bits: 1..8; 2..8 with DropBits.
      dropbits: multiplies the bit levels of a leaf by hard concrete masks when given a key.
      learn_bits: adds `bit_penalty`, and lets `update` write the width: mask probabilities below
        0.5 are dropped from the highest level down. Implies dropbits.
      freeze_after: number of updates after which the width is kept and the penalty ends.
      penalty: lambda of section 3.5, >= 0.
      estimator: "expectation" or "mode", eq. 3 as written, see `quantize`. "mode" never moves what
        rounds to zero: heads that start at zero, and with `biases` Flax's biases, stay 0 for ever.
      axes: what shares alpha and sigma, as in `uniform`. Masks are always one set per leaf; biases
        have one step.
      biases: also takes the bias beside every kernel.
      temperature, gamma, zeta: of the hard concrete masks.

    Learned, all by their logarithm or logit: log_alpha, at first the step of least squared error;
    log_sigma, alpha / 3; and mask_logits, probabilities ~ N(0.9, 0.01**2) (0.9 without a key).
    Without a key a leaf is rounded to the codes low .. high of its width, as in algorithm 1.

    Raises:
      ValueError: an argument out of its range; a state of another width or quantizer; with
        learn_bits, `encode` under jit.
    """
    bits = checks.bits(bits, most=8)
    checks.choice("estimator", estimator, estimators.KNOWN)
    dropbits = dropbits or learn_bits
    if dropbits and bits < 2:
        raise ValueError("DropBits needs at least 2 bits: a 1-bit grid has no bit levels")
    if freeze_after is not None and not (learn_bits and freeze_after >= 0):
        raise ValueError(f"freeze_after={freeze_after!r} needs learn_bits=True, and must be >= 0")
    if not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"penalty must be finite and >= 0, got {penalty!r}")
    shape = {"temperature": temperature, "gamma": gamma, "zeta": zeta}
    hard_concrete.check(prob=0.5, **shape)
    axes = checks.axes(axes)

    def init(path, leaf, key):
        x = leaf.astype(rounding.work_dtype(leaf.dtype))
        buffers = learned_grid.limits(bits, x.dtype)
        learned = learned_grid.first(x, checks.group_axes(axes, path, leaf), buffers)
        if dropbits:
            noise = 0 if key is None else jax.random.normal(key, (bits - 1,), x.dtype)
            learned["mask_logits"] = hard_concrete.logit(
                jnp.full((bits - 1,), MASK_PROBABILITY, x.dtype) + noise * MASK_DEVIATION
            )
        if learn_bits:
            never = np.iinfo(np.int32).max
            buffers["width"] = jnp.asarray(bits, jnp.int32)
            buffers["count"] = jnp.zeros((), jnp.int32)
            buffers["freeze_after"] = jnp.asarray(
                never if freeze_after is None else freeze_after, jnp.int32
            )
        return learned, buffers

    def apply(leaf, learned, buffers, key):
        alpha, sigma = learned_grid.positive(learned)
        checks.fitting(alpha, leaf)
        if not dropbits or key is None:
            ends = buffers["low"], buffers["high"]
            return estimators.on_grid(leaf, alpha, sigma, *ends, estimator)
        masks = masks_of(learned, buffers, key)
        return estimators.on_masked_grid(leaf, alpha, sigma, masks, bits, estimator)

    def apply_all(leaves):
        """One program for the leaves of one group and dtype: each alone compiles for long."""
        masked = dropbits and any(key is not None for *_, key in leaves.values())
        one = {
            path: leaf
            for path, leaf in leaves.items()
            if leaf[1]["log_alpha"].size == 1 == leaf[1]["log_sigma"].size
        }
        if len(one) < 2 or len({learned["log_alpha"].dtype for _, learned, *_ in one.values()}) > 1:
            return {}
        masks = [None] * len(one)
        if masked:
            parts = [
                ({"mask_logits": learned["mask_logits"]}, buffers, key)
                for _, learned, buffers, key in one.values()
            ]
            stacked = jax.tree.map(lambda *each: jnp.stack(each), *parts)
            masks = list(jax.vmap(masks_of)(*stacked))
        grids = []
        for (path, (leaf, learned, buffers, _)), mine in zip(one.items(), masks, strict=True):
            alpha, sigma = learned_grid.positive(learned)
            with at(path):
                checks.fitting(alpha, leaf)
            grids.append((leaf, alpha, sigma, mine, buffers["low"], buffers["high"]))
        return dict(zip(one, estimators.on_grids(grids, bits, estimator), strict=True))

    def masks_of(learned, buffers, key):
        masks = hard_concrete.sample(key, _probabilities(learned), **shape)
        if learn_bits:
            levels = 1 + jnp.arange(masks.size, dtype=buffers["width"].dtype)
            kept = ~_frozen(buffers) | (levels < buffers["width"])
            masks = jnp.where(kept, masks, 0)
        return masks

    def encode(leaf, learned, buffers):
        if learn_bits and not checks.is_concrete(buffers["high"]):
            raise ValueError(
                "a learned width decides the dtype of the codes, so `encode` with learn_bits looks "
                "at it: call `encode` outside of jit and eval_shape"
            )
        alpha, _ = learned_grid.positive(learned)
        checks.fitting(alpha, leaf)
        codes = rounding.to_codes(leaf.astype(alpha.dtype), alpha, buffers["low"], buffers["high"])
        width = int(buffers["high"]).bit_length() + 1 if learn_bits else bits
        return qarray.Grid(
            codes.astype(qarray.code_dtype(width)), alpha, bits=width, dtype=leaf.dtype
        )

    def update(leaf, learned, buffers, key):
        del leaf, key
        if not learn_bits:
            return buffers
        kept = _probabilities(learned) >= 0.5
        width = 1 + jnp.max(jnp.where(kept, 1 + jnp.arange(kept.size), 0))
        width = jnp.where(_frozen(buffers), buffers["width"], width).astype(jnp.int32)
        low, high = widths.limits(width, buffers["low"].dtype)
        count = jnp.minimum(buffers["count"], buffers["freeze_after"] - 1) + 1
        return {**buffers, "width": width, "low": low, "high": high, "count": count}

    def price(learned, buffers, key):
        if key is None:
            masks = (1 + jnp.arange(bits - 1) < buffers["width"]).astype(buffers["low"].dtype)
        else:
            masks = masks_of(learned, buffers, key)
        cost = penalty * bit_penalty(masks, _probabilities(learned), **shape)
        return jnp.where(_frozen(buffers), 0, cost)

    def check(learned, buffers):
        widths_too = {"width", "count", "freeze_after"} if learn_bits else set()
        checks.names({}, buffers, {}, {"low", "high", *widths_too})
        if dropbits:
            checks.width(1 + learned["mask_logits"].shape[-1], bits)
        if learn_bits:
            checks.width(buffers["width"], bits, bits)
        else:
            checks.width(checks.width_of_codes(buffers["high"]), bits)

    return leafwise(
        init,
        apply,
        encode,
        update,
        price if learn_bits else None,
        biases=biases,
        check=check,
        apply_all=apply_all,
    )


@described
def srq_input(
    bits: int, *, signed: bool | None = None, estimator: str = "expectation", axis_name=None
) -> InputQuantizer:
    """Semi-relaxed quantization of layer inputs, with a learned interval and spread per layer.

    Args:
      bits: 1..8.
      signed: codes -2**(bits-1) .. 2**(bits-1)-1 rather than 0 .. 2**bits-1; None: signed where
        the first pass has negative values.
      estimator: "expectation" or "mode", see `quantize`.
      axis_name: of `pmap` or `shard_map`, over whose devices the first pass is fitted, too.

    Learned are log_alpha and log_sigma, set by the first pass as `srq` sets them by the weights.
    NaN and infinity count for nothing.

    Raises:
      ValueError: bits or estimator; a state of another width.
    """
    bits = checks.bits(bits, most=8)
    checks.choice("estimator", estimator, estimators.KNOWN)

    def values(x, learned, buffers):
        del x, buffers
        return learned_grid.positive(learned)

    def quantize(x, values, buffers):
        return estimators.on_grid(x, *values, buffers["low"], buffers["high"], estimator)

    def slopes(x, values, buffers):
        return estimators.slopes(x, *values, buffers["low"], buffers["high"], estimator)

    fit = learned_grid.fit_inputs(bits, signed)
    return first_pass.input_quantizer(fit, values, quantize, bits, axis_name, slopes)


def _probabilities(learned):
    edge = jnp.finfo(learned["mask_logits"].dtype).eps
    return jnp.clip(jax.nn.sigmoid(learned["mask_logits"]), edge, 1 - edge)


def _frozen(buffers):
    return buffers["count"] >= buffers["freeze_after"]
