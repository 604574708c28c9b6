"""The hard concrete distribution: a relaxed binary mask that is exactly 0 or 1 most of the time.

Equation 4 of the DropBits paper: a binary concrete variable is stretched from (0, 1) to
(gamma, zeta) and clipped to [0, 1].
"""

import jax
import jax.numpy as jnp

from quantjax.core import checks


def from_uniform(u, prob, *, temperature=0.2, gamma=-0.1, zeta=1.1):
    """Returns masks in [0, 1] from uniform numbers (eq. 4), differentiable in both.

    Args:
      u: uniform numbers in [0, 1].
      prob: the probabilities Pi in (0, 1), broadcast against u.
      temperature: tau' > 0; the smaller, the closer to a coin.
      gamma: lower end of the stretched support, < 0.
      zeta: upper end, > 1.

    Where a mask is clipped its gradients are 0. Temperature, gamma and zeta get none.

    Raises:
      ValueError: an argument out of its range.
    """
    check(prob, temperature, gamma, zeta)
    u, prob = jnp.broadcast_arrays(u, prob)
    return _mask(u, prob, temperature, gamma, zeta)


def sample(key, prob, *, temperature=0.2, gamma=-0.1, zeta=1.1):
    """Returns one mask per entry of `prob`, by reparametrisation (eq. 4).

    Raises:
      ValueError: an argument out of its range.
    """
    prob = jnp.asarray(prob)
    u = jax.random.uniform(key, prob.shape, prob.dtype)
    return from_uniform(u, prob, temperature=temperature, gamma=gamma, zeta=zeta)


def prob_nonzero(prob, *, temperature=0.2, gamma=-0.1, zeta=1.1):
    """Returns the probability that a mask is not 0: the smoothed l0 norm R of section 3.5.

    Raises:
      ValueError: an argument out of its range.
    """
    check(prob, temperature, gamma, zeta)
    return jax.nn.sigmoid(logit(prob) - temperature * jnp.log(-gamma / zeta))


def logit(prob):
    """Returns log(p / (1 - p))."""
    return jnp.log(prob) - jnp.log1p(-prob)


@jax.custom_jvp
def _mask(u, prob, temperature, gamma, zeta):
    concrete = jax.nn.sigmoid((logit(u) + logit(prob)) / temperature)
    return jnp.clip(concrete * (zeta - gamma) + gamma, 0, 1)


@_mask.defjvp
def _mask_jvp(primals, tangents):
    u, prob, temperature, gamma, zeta = primals
    mask = _mask(*primals)
    concrete = (mask - gamma) / (zeta - gamma)
    inside = (mask > 0) & (mask < 1)
    slope = jnp.where(inside, (zeta - gamma) * concrete * (1 - concrete) / temperature, 0)

    # d logit(p) / dp; u = 0 and u = 1 are always clipped, and autodiff would make 0 * inf of them.
    def through(p, tangent):
        p = jnp.where(inside, p, 0.5)
        return slope / (p * (1 - p)) * tangent

    return mask, through(u, tangents[0]) + through(prob, tangents[1])


def check(prob, temperature, gamma, zeta):
    """Raises ValueError for concrete arguments out of their range."""
    checks.number("probabilities", prob, "inside (0, 1)", lambda p: (p > 0) & (p < 1))
    checks.number("temperature", temperature, "positive", lambda t: t > 0)
    checks.number("gamma", gamma, "negative", lambda g: g < 0)
    checks.number("zeta", zeta, "above 1", lambda z: z > 1)
