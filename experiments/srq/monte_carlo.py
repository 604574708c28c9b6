"""What rounding does at random, by Monte Carlo: RQ, SRQ and SRQ + DropBits (section 3.4 of SRQ).

`rq` and `srq` give a sampler, (key, x) -> Draw at one x; `monte_carlo` draws from it at every x of
an array; the functions below it are the figures' quantities. Values and slopes are those of the
library's own quantizers.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.methods import hard_concrete
from quantjax.methods.srq import relaxed, semi_relaxed


class Draw(NamedTuple):
    """One stochastic pass at one x; `monte_carlo` puts [count, *x.shape] before every shape."""

    x_hat: jax.Array  # []
    slope: jax.Array  # [], d x_hat / dx as the backward pass has it
    choice: jax.Array  # [2**bits], p of section 3.4: the r of eq. 2 (RQ), the one-hot y of eq. 3
    jacobian: jax.Array  # [2], dr_i / dpi_j, see `jacobian`


def rq(alpha, sigma, *, bits: int, temperature=1.0) -> Callable:
    """Returns RQ's sampler (eq. 2); scalars alpha, sigma and temperature."""

    def sample(key, x):
        gumbel = jax.random.gumbel(key, (2**bits,), x.dtype)
        return rq_draw(x, alpha, sigma, gumbel, temperature=temperature)

    return sample


def srq(alpha, sigma, *, bits: int, probs=None, estimator: str = "mode") -> Callable:
    """Returns SRQ's sampler, whose draws are all the same, or that of SRQ + DropBits.

    Args:
      alpha, sigma: scalars.
      bits: 1..8.
      probs: None, or the mask probabilities Pi_1 .. Pi_{bits-1} of the bit levels (eq. 4).
      estimator: "mode" or "expectation", whose gradient `slope` is.
    """
    probs = None if probs is None else jnp.asarray(probs)

    def sample(key, x):
        masks = None if probs is None else hard_concrete.sample(key, probs.astype(x.dtype))
        return srq_draw(x, alpha, sigma, masks, bits=bits, estimator=estimator)

    return sample


def rq_draw(x, alpha, sigma, gumbel, *, temperature) -> Draw:
    """Returns what RQ makes of a scalar x with the noise gumbel [2**bits]."""
    bits = gumbel.size.bit_length() - 1
    of_x = partial(relaxed.quantize, bits=bits, temperature=temperature)
    x_hat, slope = jax.value_and_grad(of_x)(x, alpha, sigma, gumbel)
    log_pi = relaxed.log_categories(x, alpha, sigma, _codes(bits))
    r = jax.nn.softmax((log_pi + gumbel) / temperature)
    return Draw(x_hat, slope, r, jacobian(r, jnp.exp(log_pi), x / alpha) / temperature)


def srq_draw(x, alpha, sigma, masks=None, *, bits: int, estimator: str = "mode") -> Draw:
    """Returns what SRQ makes of a scalar x with the masks of the bit levels [bits - 1], if any."""
    of_x = partial(semi_relaxed.quantize, bits=bits, masks=masks, estimator=estimator)
    x_hat, slope = jax.value_and_grad(of_x)(x, alpha, sigma)
    codes = _codes(bits)
    choice = (jnp.round(x_hat / alpha) == codes).astype(x_hat.dtype)
    log_pi = relaxed.log_categories(x, alpha, sigma, codes)
    z = 1.0 if masks is None else jnp.append(1.0, masks)[semi_relaxed.bit_levels(bits)]
    r = jax.nn.softmax(log_pi + jnp.log(z))
    return Draw(x_hat, slope, choice, jacobian(r, jnp.exp(log_pi), x / alpha))


def jacobian(r, pi, t):
    """Returns dr_i / dpi_j = (r_i [i = j] - r_i r_j) / pi_j, the estimator of section 3.4, [2].

    For RQ it is to be divided by the temperature (eq. 2); under DropBits r holds the masks.

    Args:
      r, pi: categories [2**bits], normalised and not (eq. 1).
      t: x / alpha. Of the two codes around it, which j runs over, i is the nearer one, of two
        equally near the upper one.
    """
    half = r.size // 2
    below = jnp.clip(jnp.floor(t), -half, half - 2).astype(jnp.int32) + half
    j = jnp.stack([below, below + 1])
    i = jnp.clip(jnp.floor(t + 0.5), -half, half - 1).astype(jnp.int32) + half
    return r[i] * ((i == j) - r[j]) / pi[j]


@partial(jax.jit, static_argnames=("sampler", "count"))
def monte_carlo(sampler: Callable, key, x, count: int) -> Draw:
    """Returns `count` independent draws at every x, [count, *x.shape] before a Draw's shapes.

    Compiled once for a sampler: keep it.
    """
    x = jnp.asarray(x, jnp.result_type(float))
    keys = jax.random.split(key, (count, x.size))
    draws = jax.vmap(jax.vmap(sampler), in_axes=(0, None))(keys, x.ravel())
    return jax.tree.map(lambda part: part.reshape(count, *x.shape, *part.shape[2:]), draws)


def categories(x, alpha, sigma, *, bits: int):
    """Returns the original categorical distribution pi_i / sum_j pi_j, [*x.shape, 2**bits]."""
    return jax.nn.softmax(relaxed.log_categories(jnp.asarray(x), alpha, sigma, _codes(bits)))


def quantization_error(draws: Draw, x, power: int = 1):
    """Returns E|x - x_hat|**power at every x; section 3.4 and figure 6 have power 1."""
    return jnp.mean(jnp.abs(draws.x_hat - x) ** power, axis=0)


def sampling_distribution(draws: Draw):
    """Returns E[p], [*x.shape, 2**bits]: how often each code is chosen (figure 4), RQ's mean r."""
    return jnp.mean(draws.choice, axis=0)


def distribution_bias(draws: Draw, origin):
    """Returns the l2 norm of E[p] - origin at every x (section 3.4, figure 6).

    `origin` is what `categories` gives for the same x.
    """
    return jnp.linalg.norm(sampling_distribution(draws) - origin, axis=-1)


def gradient_variance(draws: Draw):
    """Returns the variance of dr_i / dpi_j, [*x.shape, 2], over the draws (section 3.4, figure 6).

    The last axis are the two neighbours j of x, i is the nearer one of them: see `jacobian`.
    """
    return jnp.var(draws.jacobian, axis=0)


def true_gradient(loss: Callable, x, alpha, sigma, *, bits: int):
    """Returns d/dx of E[loss(x_hat)], x_hat one of the categories: sum_i dr_i/dx loss(g_i).

    What estimators are compared with in appendix B. `loss` maps a scalar to a scalar.
    """
    at_levels = jax.vmap(loss)(_codes(bits) * alpha)

    def expected(x):
        return categories(x, alpha, sigma, bits=bits) @ at_levels

    x = jnp.asarray(x, jnp.result_type(float))
    return jax.vmap(jax.grad(expected))(x.ravel()).reshape(x.shape)


def estimated_gradient(loss: Callable, draws: Draw):
    """Returns E[loss'(x_hat) dx_hat/dx] at every x, the mean of what backpropagation gives."""
    slopes = jax.vmap(jax.grad(loss))(draws.x_hat.ravel()).reshape(draws.x_hat.shape)
    return jnp.mean(slopes * draws.slope, axis=0)


def gradient_bias(loss: Callable, draws: Draw, x, alpha, sigma, *, bits: int):
    """Returns `estimated_gradient` less `true_gradient` at every x (appendix B, figure 8)."""
    return estimated_gradient(loss, draws) - true_gradient(loss, x, alpha, sigma, bits=bits)


def _codes(bits):
    half = 2 ** (bits - 1)
    return np.arange(-half, half)
