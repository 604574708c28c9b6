"""Monte Carlo estimates beside float64 NumPy: eq. 1 to 4 written down, integrals over the noise."""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.srq import monte_carlo
from quantjax.methods.srq import semi_relaxed

pytestmark = pytest.mark.usefixtures("quick_compilation")

ALPHA, BITS = 0.5, 3
SIGMA = ALPHA / 3
CODES = np.arange(-4, 4)
MIDPOINTS = ALPHA * np.arange(-3.5, 2.6)  # figure 6
BESIDE = ALPHA * np.array([-3.8, -2.3, -1.4, -0.7, 0.2, 1.6, 2.9])  # no two categories are equal
EVERYWHERE = ALPHA * np.linspace(-4, 3, 71)
FREE = np.array([False, False, True, True, True, False, False])  # modes of BESIDE without a mask
COUNT = 3000
PROBS = (0.85, 0.92)
KEY = jax.random.key(0)


def pi(x, sigma=SIGMA):
    """Eq. 1, not normalised."""
    x = np.asarray(x, np.float64)[..., None]
    ends = [(ALPHA * (CODES + shift) - x) / sigma for shift in (0.5, -0.5)]
    above, below = (1 / (1 + np.exp(-end)) for end in ends)
    return above - below


def normalised(weights):
    return weights / weights.sum(-1, keepdims=True)


class Drawn(NamedTuple):
    beside: monte_carlo.Draw
    midpoints: monte_carlo.Draw
    everywhere: monte_carlo.Draw


def draw(sampler, count=COUNT):
    """Draws at all three sets of points, in one program."""
    sets = (BESIDE, MIDPOINTS, EVERYWHERE)
    draws = monte_carlo.monte_carlo(sampler, KEY, np.concatenate(sets), count)
    ends = np.cumsum([0, *map(len, sets)])
    return Drawn(
        *(
            jax.tree.map(lambda part, a=a, b=b: np.asarray(part[:, a:b]), draws)
            for a, b in itertools.pairwise(ends)
        )
    )


@pytest.fixture(scope="module")
def rq():
    return draw(monte_carlo.rq(ALPHA, SIGMA, bits=BITS))


@pytest.fixture(scope="module")
def sharp():
    return draw(monte_carlo.rq(ALPHA, SIGMA, bits=BITS, temperature=1e-3))


@pytest.fixture(scope="module")
def plain():
    return draw(monte_carlo.srq(ALPHA, SIGMA, bits=BITS), 20)


@pytest.fixture(scope="module")
def dropped():
    return draw(monte_carlo.srq(ALPHA, SIGMA, bits=BITS, probs=PROBS))


def of_masks(fn):
    """E fn(Z) over independent hard concrete masks (eq. 4), Z the weights of all codes [8]."""
    u = (np.arange(400) + 0.5) / 400
    sides = []
    for prob in PROBS:
        s = 1 / (1 + ((1 - u) / u * (1 - prob) / prob) ** (1 / 0.2))
        sides.append(np.clip(1.2 * s - 0.1, 0, 1))
    levels = np.array([2, 2, 1, 0, 0, 0, 2, 2])
    one, two = (side.ravel() for side in np.meshgrid(*sides))
    masks = np.stack([np.ones_like(one), one, two], axis=-1)[:, levels]
    return np.mean(fn(masks), axis=0)


# One draw


def test_categories():
    given = monte_carlo.categories(BESIDE, ALPHA, SIGMA, bits=BITS)
    np.testing.assert_allclose(given, normalised(pi(BESIDE)), atol=1e-6)


@jax.jit
def rq_draws(x, gumbel, temperature):
    draw = partial(monte_carlo.rq_draw, temperature=temperature)
    return jax.vmap(draw, in_axes=(0, None, None, None))(x, ALPHA, SIGMA, gumbel)


@jax.jit
def srq_draws(x, masks):
    draw = partial(monte_carlo.srq_draw, bits=BITS)
    return jax.vmap(draw, in_axes=(0, None, None, None))(x, ALPHA, SIGMA, masks)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_draw_of_rq_is_eq_2(temperature):
    gumbel = np.random.default_rng(0).gumbel(size=8)

    def r(pi):
        return normalised(np.exp((np.log(pi) + gumbel) / temperature))

    def x_hat(x):
        return r(pi(x)) @ CODES * ALPHA

    given = rq_draws(BESIDE, gumbel, temperature)
    np.testing.assert_allclose(given.choice, r(pi(BESIDE)), atol=1e-6)
    np.testing.assert_allclose(given.x_hat, x_hat(BESIDE), atol=1e-5)
    np.testing.assert_allclose(given.slope, central(x_hat, BESIDE), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(given.jacobian, jacobians(r), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("masks", [None, (1.0, 1.0), (0.6, 0.9), (0.3, 0.0), (0.0, 0.0)])
def test_a_draw_of_srq_is_eq_3(masks):
    z = np.ones(8) if masks is None else np.append(1.0, masks)[semi_relaxed.bit_levels(BITS)]

    def r(pi):
        return normalised(pi * z)

    given = srq_draws(BESIDE, None if masks is None else np.asarray(masks))
    mode = np.argmax(r(pi(BESIDE)), axis=-1)

    def kept(x):
        return r(pi(x))[np.arange(len(x)), mode] * CODES[mode] * ALPHA

    np.testing.assert_array_equal(given.choice, mode[:, None] == np.arange(8))
    np.testing.assert_allclose(given.x_hat, CODES[mode] * ALPHA, rtol=1e-6)
    np.testing.assert_allclose(given.slope, central(kept, BESIDE), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(given.jacobian, jacobians(r), rtol=1e-3, atol=1e-5)


def central(fn, x, h=1e-6):
    return (fn(x + h) - fn(x - h)) / (2 * h)


def jacobians(r):
    """dr_i / dpi_j at BESIDE by differences, i the nearest code and j the neighbours."""
    out = []
    for x in BESIDE:
        i = np.argmin(np.abs(CODES * ALPHA - x))
        below = np.flatnonzero(x >= CODES * ALPHA)[-1]
        at = pi(x)
        steps = [1e-6 * at * (np.arange(8) == j) for j in np.minimum(below, 6) + np.array([0, 1])]
        out.append([(r(at + h) - r(at - h))[i] / (2 * h.sum()) for h in steps])
    return np.asarray(out)


def test_jacobian_at_a_midpoint_takes_the_upper_code():
    r = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    pi = jnp.asarray([0.5, 1.0, 2.0, 4.0])
    expected = [-0.3 * 0.2 / 1.0, 0.3 * 0.7 / 2.0]  # i is code 0, j are -1 and 0
    np.testing.assert_allclose(monte_carlo.jacobian(r, pi, -0.5), expected, rtol=1e-6)


# Distributions


def test_sharp_rq_samples_the_categories(sharp):
    origin = normalised(pi(MIDPOINTS))
    assert np.all(np.abs(sharp.midpoints.choice.max(-1) - 1) < 0.5)
    deviation = np.sqrt(origin * (1 - origin) / COUNT)
    found = monte_carlo.sampling_distribution(sharp.midpoints)
    np.testing.assert_array_less(np.abs(found - origin), 5 * deviation + 1e-3)


def test_srq_is_one_point(plain):
    distribution = monte_carlo.sampling_distribution(plain.beside)
    nearest = np.abs(CODES * ALPHA - BESIDE[:, None]).argmin(-1)
    np.testing.assert_array_equal(distribution, np.arange(8) == nearest[:, None])


def test_dropbits_samples_as_its_masks(dropped):
    def mode(masks):
        best = np.argmax(pi(BESIDE) * masks[:, None], axis=-1)
        return best[..., None] == np.arange(8)

    expected = of_masks(mode)
    # The grid of the integral resolves 1 / 400 of each mask.
    deviation = np.sqrt(expected * (1 - expected) / COUNT)
    found = monte_carlo.sampling_distribution(dropped.beside)
    np.testing.assert_array_less(np.abs(found - expected), 5 * deviation + 5e-3)


def test_masks_that_are_all_one_leave_srq(plain):
    certain = draw(monte_carlo.srq(ALPHA, SIGMA, bits=BITS, probs=(1 - 1e-6,) * 2), 20)
    for mine, theirs in zip(jax.tree.leaves(certain), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_noise_is_independent(rq):
    found = rq.everywhere.x_hat[:, ::7]
    found = np.concatenate([found[1:], found[:-1]], axis=1)  # between points, from draw to draw
    correlation = np.corrcoef(found.T) - np.eye(found.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(COUNT)


def test_draws_have_the_shape_of_x():
    draws = jax.eval_shape(
        lambda x: monte_carlo.monte_carlo(monte_carlo.rq(1.0, 1.0, bits=2), KEY, x, 5),
        np.zeros((2, 3)),
    )
    assert [part.shape[:3] for part in draws] == [(5, 2, 3)] * 4
    assert draws.choice.shape == (5, 2, 3, 4)


# Figure 6


def test_error_of_srq_is_that_of_rounding(plain):
    exact = np.abs(BESIDE - np.round(BESIDE / ALPHA) * ALPHA)
    found = [monte_carlo.quantization_error(plain.beside, BESIDE, power) for power in (1, 2)]
    np.testing.assert_allclose(found, [exact, exact**2], atol=1e-6)


def test_error_of_dropbits(dropped):
    def error(masks):
        best = np.argmax(pi(BESIDE) * masks[:, None], axis=-1)
        return np.abs(CODES[best] * ALPHA - BESIDE)

    found = monte_carlo.quantization_error(dropped.beside, BESIDE)
    np.testing.assert_allclose(found, of_masks(error), atol=5 * ALPHA / np.sqrt(COUNT))


def test_error_of_rq(rq, sharp):
    """Samples of the categories miss a midpoint by more than half a step, SRQ by exactly half."""
    expected = (normalised(pi(MIDPOINTS)) * np.abs(CODES * ALPHA - MIDPOINTS[:, None])).sum(-1)
    found = monte_carlo.quantization_error(sharp.midpoints, MIDPOINTS)
    np.testing.assert_allclose(found, expected, atol=5 * ALPHA / np.sqrt(COUNT))
    assert np.all(found > ALPHA / 2)
    # At the paper's temperature relaxed samples lie between the levels, so near midpoints.
    assert np.all(monte_carlo.quantization_error(rq.midpoints, MIDPOINTS) < ALPHA / 2)


def test_error_over_all_weights(rq, plain, dropped):
    of_rq, of_srq, of_dropbits = (
        np.mean(monte_carlo.quantization_error(drawn.everywhere, EVERYWHERE)) / ALPHA
        for drawn in (rq, plain, dropped)
    )
    assert of_srq == pytest.approx(0.25, abs=0.005)
    assert of_srq < of_dropbits < of_rq


def test_bias(rq, sharp, plain, dropped):
    origin = normalised(pi(BESIDE))
    nearest = np.abs(CODES * ALPHA - BESIDE[:, None]).argmin(-1)
    hot = np.arange(8) == nearest[:, None]
    of_srq = monte_carlo.distribution_bias(plain.beside, origin)
    np.testing.assert_allclose(of_srq, np.linalg.norm(hot - origin, axis=-1), atol=1e-5)
    # DropBits moves the choice where the mode is under a mask, and nowhere else.
    of_dropbits = monte_carlo.distribution_bias(dropped.beside, origin)
    np.testing.assert_allclose(of_dropbits[FREE], of_srq[FREE], atol=1e-5)
    assert np.all(of_dropbits[~FREE] < of_srq[~FREE])
    middle = normalised(pi(MIDPOINTS))
    of_rq, of_sharp = (monte_carlo.distribution_bias(d.midpoints, middle) for d in (rq, sharp))
    assert np.all(of_sharp < 0.04)
    assert np.all((of_rq > of_sharp) & (of_rq < 0.1))


def test_variance(rq, sharp, plain, dropped):
    def moments(masks):
        r = normalised(pi(BESIDE) * masks[:, None])
        i = np.abs(CODES * ALPHA - BESIDE[:, None]).argmin(-1)[None, :, None]
        below = np.minimum(np.floor(BESIDE / ALPHA), 2).astype(int) + 4
        j = (below[:, None] + [0, 1])[None]
        r_i, r_j = np.take_along_axis(r, i, -1), np.take_along_axis(r, j, -1)
        jacobian = r_i * ((i == j) - r_j) / np.take_along_axis(pi(BESIDE)[None], j, -1)
        return np.stack([jacobian, jacobian**2], axis=1)

    mean, square = of_masks(moments)
    found = monte_carlo.gradient_variance(dropped.beside)
    np.testing.assert_allclose(found, square - mean**2, rtol=0.25, atol=1e-3)
    assert np.all(monte_carlo.gradient_variance(plain.everywhere) < 1e-10)
    # The colder, the louder: what keeps RQ at high temperatures (section 3.2).
    of_rq, of_sharp = (monte_carlo.gradient_variance(drawn.midpoints) for drawn in (rq, sharp))
    assert np.all(of_sharp > 100 * of_rq)


# Figure 8


def loss(x_hat):
    return jnp.cos(2 * x_hat) + x_hat**2


def test_true_gradient():
    def expected(x):
        levels = CODES * ALPHA
        return normalised(pi(x)) @ (np.cos(2 * levels) + levels**2)

    given = monte_carlo.true_gradient(loss, BESIDE, ALPHA, SIGMA, bits=BITS)
    np.testing.assert_allclose(given, central(expected, BESIDE), rtol=1e-3, atol=1e-4)


def test_estimated_gradient_is_the_mean_of_backpropagation(rq):
    draws = rq.beside
    slope = -2 * np.sin(2 * np.float64(draws.x_hat)) + 2 * draws.x_hat
    given = monte_carlo.estimated_gradient(loss, draws)
    np.testing.assert_allclose(given, np.mean(slope * draws.slope, axis=0), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_expectation_has_no_bias_on_linear_losses(plain):
    full = draw(monte_carlo.srq(ALPHA, SIGMA, bits=BITS, estimator="expectation"), 2)

    def bias(draws, loss):
        return np.abs(monte_carlo.gradient_bias(loss, draws, BESIDE, ALPHA, SIGMA, bits=BITS))

    def linear(x_hat):
        return 3 * x_hat

    assert np.all(bias(full.beside, linear) < 1e-4)
    assert np.max(bias(full.beside, loss)) > 0.1
    assert np.max(bias(plain.beside, linear)) > 1


def test_estimated_gradient_of_dropbits(dropped):
    def through_the_mode(masks):
        weights = [pi(BESIDE + h) * masks[:, None] for h in (-1e-6, 1e-6)]
        mode = np.argmax(weights[0], axis=-1)[..., None]
        low, high = (np.take_along_axis(normalised(w), mode, -1)[..., 0] for w in weights)
        level = CODES[mode[..., 0]] * ALPHA
        return (-2 * np.sin(2 * level) + 2 * level) * level * (high - low) / 2e-6

    given = monte_carlo.estimated_gradient(loss, dropped.beside)
    np.testing.assert_allclose(given, of_masks(through_the_mode), rtol=0.1, atol=0.05)


def test_bias_of_rq_vanishes_with_its_temperature(rq):
    """Eq. 2 becomes a sample of the categories; what is left is noise, which grows."""
    cold = draw(monte_carlo.rq(ALPHA, SIGMA, bits=BITS, temperature=0.2))
    of_cold, of_rq = (
        monte_carlo.gradient_bias(loss, drawn.beside, BESIDE, ALPHA, SIGMA, bits=BITS)
        for drawn in (cold, rq)
    )
    assert np.mean(np.abs(of_cold)) < 0.5 * np.mean(np.abs(of_rq))  # noise of 0.03 is in both
