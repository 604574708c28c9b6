"""The hard concrete distribution beside eq. 4 in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantjax.methods import hard_concrete

SHAPES = ({}, {"temperature": 0.7, "gamma": -0.3, "zeta": 1.05})


def equation_4(u, prob, temperature=0.2, gamma=-0.1, zeta=1.1):
    u, prob = np.float64(u), np.float64(prob)
    odds = np.log(u / (1 - u)) + np.log(prob / (1 - prob))
    stretched = (zeta - gamma) / (1 + np.exp(-odds / temperature)) + gamma
    return np.clip(stretched, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape):
    rng = np.random.default_rng(0)
    u, prob = rng.uniform(1e-6, 1 - 1e-6, (2, 4000)).astype(np.float32)
    masks = hard_concrete.from_uniform(jnp.asarray(u), jnp.asarray(prob), **shape)
    expected = equation_4(u, prob, **shape)
    np.testing.assert_allclose(masks, expected, atol=2e-5)
    assert np.mean(masks == 0) > 0.1
    assert np.mean(masks == 1) > 0.1


@settings(max_examples=60, deadline=None)
@given(u=st.floats(0.001, 0.999), prob=st.floats(0.001, 0.999))
def test_gradients_are_those_of_the_formula(u, prob):
    value, (du, dp) = jax.value_and_grad(hard_concrete.from_uniform, argnums=(0, 1))(u, prob)
    if value in (0, 1):
        assert du == dp == 0
        return
    h = 1e-7
    for got, left, right in (
        (du, equation_4(u - h, prob), equation_4(u + h, prob)),
        (dp, equation_4(u, prob - h), equation_4(u, prob + h)),
    ):
        if 0 < left < 1 and 0 < right < 1:
            assert float(got) == pytest.approx((right - left) / (2 * h), rel=2e-3, abs=1e-4)


def test_forward_mode_is_reverse_mode():
    u, prob = jnp.asarray([0.3, 0.5, 0.999]), jnp.asarray([0.6, 0.4, 0.9])
    fn = hard_concrete.from_uniform
    forward, reverse = (
        jax.jit(jac(fn, argnums=(0, 1)))(u, prob) for jac in (jax.jacfwd, jax.jacrev)
    )
    assert np.any(np.asarray(forward) != 0)
    for a, b in zip(forward, reverse, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_ends_of_the_uniform_numbers_have_finite_gradients():
    u = jnp.asarray([0.0, 1.0])
    values, pull = jax.vjp(hard_concrete.from_uniform, u, jnp.asarray([0.3, 0.3]))
    np.testing.assert_array_equal(values, [0, 1])
    for cotangent in pull(jnp.ones(2)):
        np.testing.assert_array_equal(cotangent, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_probability_of_being_non_zero_is_the_frequency(shape):
    n = 40_000
    for prob in (0.1, 0.5, 0.9):
        masks = hard_concrete.sample(jax.random.key(1), jnp.full(n, prob), **shape)
        expected = float(hard_concrete.prob_nonzero(prob, **shape))
        deviation = np.sqrt(expected * (1 - expected) / n)
        assert abs(np.mean(np.asarray(masks) > 0) - expected) < 5 * deviation


def test_same_key_same_masks():
    prob = jnp.full(16, 0.5)
    one, again, other = (hard_concrete.sample(jax.random.key(k), prob) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.any(np.asarray(one) != np.asarray(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prob": 0.0}, r"probabilities must be inside \(0, 1\)"),
        ({"prob": 1.0}, r"probabilities must be inside \(0, 1\)"),
        ({"prob": jnp.asarray([0.5, 1.5])}, r"probabilities must be inside \(0, 1\)"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"gamma": 0.0}, "gamma must be negative"),
        ({"zeta": 1.0}, "zeta must be above 1"),
    ],
)
def test_bad_input(change, message):
    arguments = {"prob": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        hard_concrete.sample(jax.random.key(0), **arguments)
    with pytest.raises(ValueError, match=message):
        hard_concrete.prob_nonzero(**arguments)
