"""DropBits' masks: which codes of a grid share one, and what keeping them costs."""

import functools

import jax.numpy as jnp
import numpy as np

from quantjax.core import checks
from quantjax.methods import hard_concrete
from quantjax.methods.srq.categories import Cells


def bit_levels(bits: int) -> np.ndarray:
    """Returns int[2**bits]: 0 for the codes -1, 0, 1, k for those only in the (k+1)-bit grid."""
    bits = checks.bits(bits, most=8)
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    # The (k+1)-bit grid is the first with -2**k <= n < 2**k.
    first = [(n if n >= 0 else -n - 1).bit_length() for n in codes.tolist()]
    return np.where(np.abs(codes) <= 1, 0, first)


def end_pairs(bits: int) -> np.ndarray:
    """Returns int[2**bits]: 0 for the codes -1, 0, 1, else the pair of end points, 1 outermost.

    Figure 3a: the outermost two codes share mask 1, the next two mask 2, and so on.
    """
    bits = checks.bits(bits, most=8)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.arange(low, high + 1)
    pairs = 1 + np.minimum(codes - low, high - codes)
    return np.where(np.abs(codes) <= 1, 0, pairs)


def bit_penalty(masks, probs, *, temperature=0.2, gamma=-0.1, zeta=1.1):
    """Returns R(Z, Pi) of section 3.5: the smoothed l0 norm of the highest mask that is not 0.

    Args:
      masks: Z_1 .. Z_{bits-1} along the last axis; groups before it are summed over.
      probs: their probabilities, the same shape.

    Raises:
      ValueError: shapes differ, or an argument of the hard concrete distribution.
    """
    masks, probs = jnp.asarray(masks), jnp.asarray(probs)
    if masks.shape != probs.shape:
        raise ValueError(f"masks {masks.shape} beside probabilities {probs.shape}")
    alive = masks > 0
    above = jnp.cumsum(alive[..., ::-1], axis=-1)[..., ::-1] - alive
    norm = hard_concrete.prob_nonzero(probs, temperature=temperature, gamma=gamma, zeta=zeta)
    return jnp.sum(jnp.where(alive & (above == 0), norm, 0))


@functools.cache
def cells(bits: int, count: int) -> Cells:
    """Returns the runs of codes under one of `count` masks."""
    if bits == 1:
        raise ValueError("masks need at least 2 bits: a 1-bit grid has no bit levels")
    if count == bits - 1:
        mask = bit_levels(bits)
    elif count == 2 ** (bits - 1) - 1:
        mask = end_pairs(bits)
    else:
        raise ValueError(
            f"{bits} bits have {bits - 1} masks of bit levels or {2 ** (bits - 1) - 1} of end "
            f"points, got {count}"
        )
    codes = np.arange(mask.size) - mask.size // 2
    first = np.append(True, mask[1:] != mask[:-1])
    low, high = codes[first], codes[np.append(first[1:], True)]
    # 32 bits: one type of index whether or not x64 is on.
    return Cells(*(part.astype(np.int32) for part in (low, high, mask[first])))
