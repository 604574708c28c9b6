"""PACT (Choi et al., 2018): layer inputs clipped where a learned bound says."""

import functools
import math

import jax
import jax.numpy as jnp

from quantjax.core import checks, first_pass, histograms, rounding
from quantjax.core.quantizer import InputQuantizer, described

DECAY = 2e-4  # the paper's, for ResNet-20 on CIFAR-10


@described
def pact_input(
    bits: int,
    *,
    clip: float | None = None,
    decay: float = DECAY,
    signed: bool | None = None,
    axis_name=None,
) -> InputQuantizer:
    """Clips layer inputs to [0, alpha] and rounds them to even steps; alpha is learned.

    Args:
      bits: 2..8; 1..8 with signed=False, since a signed grid has three levels or more.
      clip: alpha at first, positive; None: the largest input of the first pass.
      decay: lambda >= 0 of the L2 term lambda alpha**2 / 2: every call of a layer adds lambda alpha
        to the gradient of its alpha, so that no loop has to; loss scaling does not scale it.
      signed: clips to [-alpha, alpha] instead; None: where the first pass has negative values, as
        images have. The paper has inputs after a ReLU alone.
      axis_name: of `pmap` or `shard_map`, over whose devices the first pass is fitted, too.

    The gradient of an input is 1 within the bounds and 0 beyond them; that of alpha is 1 where the
    input is at least alpha (-1 at -alpha), and 0 elsewhere (eq. 3). NaN and infinity count for
    nothing.

    Raises:
      ValueError: an argument out of its range; a state of another width.
    """
    bits = checks.bits(bits, 1 if signed is False else 2, 8)
    if not (math.isfinite(decay) and decay >= 0):
        raise ValueError(f"decay must be finite and >= 0, got {decay!r}")
    if clip is not None:
        checks.number("clip", clip, "positive", lambda c: c > 0)

    def fit(seen):
        least, most = histograms.ends(seen)
        negative = least < 0 if signed is None else jnp.asarray(signed)
        high = jnp.where(negative, 2 ** (bits - 1) - 1, 2**bits - 1).astype(most.dtype)
        low = jnp.where(negative, -high, 0)
        largest = rounding.positive(jnp.maximum(most, jnp.where(negative, -least, 0)))
        bound = largest if clip is None else jnp.asarray(clip, most.dtype)
        return {"clip": bound}, {"low": low, "high": high}

    def values(x, learned, buffers):
        del x, buffers
        return (_decayed(learned["clip"], decay),)

    def quantize(x, values, buffers):
        (bound,), low, high = values, buffers["low"], buffers["high"]
        return _clipped(x.astype(bound.dtype), bound, low, high).astype(x.dtype)

    return first_pass.input_quantizer(fit, values, quantize, bits, axis_name)


def _least(bound):
    """A bound below what 1 / step allows, or negative, is as good as 0, and can still grow."""
    return jnp.maximum(bound, jnp.finfo(bound.dtype).tiny * 2.0**16)


@jax.custom_jvp
def _clipped(x, bound, low, high):
    step = _least(bound) / high
    return rounding.to_codes(x, step, low, high) * step


@_clipped.defjvp
def _clipped_jvp(primals, tangents):
    x, bound, low, _ = primals
    bound = _least(bound)
    floor = jnp.where(low < 0, -bound, 0)
    of_x = jnp.where((x >= floor) & (x <= bound), tangents[0], 0)
    of_bound = jnp.where(x >= bound, 1, jnp.where((low < 0) & (x <= floor), -1, 0))
    return _clipped(*primals), of_x + of_bound.astype(x.dtype) * tangents[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _decayed(bound, decay):
    """Returns the bound; its cotangent gains that of decay * bound**2 / 2."""
    del decay
    return bound


_decayed.defvjp(
    lambda bound, decay: (bound, bound),
    lambda decay, bound, cotangent: (cotangent + decay * bound,),
)
