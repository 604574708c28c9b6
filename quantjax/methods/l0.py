"""L0 regularisation (Louizos et al. 2018), a baseline of pruning: a hard concrete gate per weight.

A gate is exactly zero with a probability that is trained; the penalty is the expected number of
weights that are not. Gates are those of `hard_concrete`, with its defaults.
"""

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core.quantizer import Quantizer, described, leafwise
from quantjax.methods import hard_concrete

LARGEST = 12.0  # of a logit: beyond it float32 probabilities are 0 or 1


@described
def l0(strength: float, *, prob: float = 0.9) -> Quantizer:
    """Multiplies every weight by its gate: drawn with a key, the one of u = 1/2 without.

    Learned: logit, of the leaf's shape: that of the gate's probability Pi. The penalty is
    strength times the sum of the probabilities that gates are not zero. It encodes to plain
    arrays, pruned weights zero. Logits want a rate of their own, such as Adam's 1e-2.

    Args:
      strength: lambda, not negative.
      prob: of all gates at the start, in (0, 1).

    Raises:
      ValueError: an argument outside its range; a state of another quantizer or of other leaves.
    """
    if not 0 <= strength < np.inf:
        raise ValueError(f"strength must be finite and not negative, got {strength!r}")
    if not 0 < prob < 1:
        raise ValueError(f"prob must be in (0, 1), got {prob!r}")

    def init(path, leaf, key):
        del path, key
        start = float(np.log(prob) - np.log1p(-prob))
        price = jnp.asarray(strength, jnp.float32)
        return {"logit": jnp.full_like(leaf, start, jnp.float32)}, {"strength": price}

    def apply(leaf, learned, buffers, key):
        del buffers
        p = _probability(learned)
        if p.shape != leaf.shape:
            raise ValueError(
                f"the state was made for another tree: gates {p.shape}, leaf {leaf.shape}"
            )
        if key is None:
            gate = hard_concrete.from_uniform(jnp.full_like(p, 0.5), p)
        else:
            gate = hard_concrete.sample(key, p)
        return (leaf.astype(gate.dtype) * gate).astype(leaf.dtype)

    def penalty(learned, buffers, key):
        del key
        return buffers["strength"] * jnp.sum(hard_concrete.prob_nonzero(_probability(learned)))

    # jit: the product is rounded once, to the leaf's dtype, as in training.
    encode = jax.jit(lambda leaf, learned, buffers: apply(leaf, learned, buffers, None))

    def check(learned, buffers):
        return learned["logit"], buffers["strength"]  # KeyError: another quantizer's

    return leafwise(init, apply, encode, penalty=penalty, check=check)


def _probability(learned):
    return jax.nn.sigmoid(jnp.clip(learned["logit"], -LARGEST, LARGEST))
