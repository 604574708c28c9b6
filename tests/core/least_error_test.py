"""The step of least squared error against a search of its own in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantjax.core import least_error

cheap = settings(derandomize=True, deadline=None, max_examples=100)
WEIGHTS = arrays(np.float32, (4, 6), elements=st.floats(-8, 8, width=32, allow_subnormal=False))


def error(x, step, low, high, offset=0.0):
    """Squared error of a grid, by the nearest of all its levels."""
    levels = (np.arange(low, high + 1) + offset) * np.float64(step)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, np.float64(x))]
    return np.sum((np.float64(x) - nearest) ** 2)


@functools.partial(jax.jit, static_argnames=("offset", "axes"))  # one program for all widths
def fitted(x, low, high, offset, axes):
    least, most = (f(x, axis=axes, keepdims=True, initial=0) for f in (jnp.min, jnp.max))
    widest = least_error.widest(least, most, low + offset, high + offset)
    return widest, least_error.step(x, widest, low, high, halves=offset > 0)


def found(x, bits, offset=0.0, axes=None):
    return fitted(x, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, offset, axes)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tails", ["normal", "laplace", "standard_t"])
def test_it_is_within_a_percent_of_the_best_step(tails, bits, offset):
    rng = np.random.default_rng(bits)
    draw = getattr(rng, tails)
    x = np.float32(draw(3, size=5000) if tails == "standard_t" else draw(size=5000))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest, step = found(jnp.asarray(x), bits, offset)
    mine = error(x, step[0], low, high, offset)
    best = min(error(x, widest[0] * f, low, high, offset) for f in np.geomspace(1, 1 / 64, 1000))
    assert mine <= (1.002 if bits < 8 else 1.03) * best
    assert mine <= error(x, widest[0], low, high, offset)


@cheap
@given(x=WEIGHTS, bits=st.integers(1, 6), axis=st.sampled_from([None, 0, 1]))
def test_it_is_never_worse_than_the_range_in_any_group(x, bits, axis):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    widest, step = (np.float64(s) for s in found(jnp.asarray(x), bits, axes=axis))
    assert step.shape == np.sum(x, axis=axis, keepdims=True).shape
    assert np.all(step > 0)
    for i in np.ndindex(*step.shape):
        rows = tuple(
            slice(None) if n == 1 else slice(k, k + 1) for k, n in zip(i, step.shape, strict=True)
        )
        group = x[rows]
        assert error(group, step[i], low, high) <= error(group, widest[i], low, high) * (1 + 1e-5)


def test_the_widest_step_reaches_both_ends_and_zeros_have_one():
    least, most = jnp.asarray([-4.0, -1.0, 0.0]), jnp.asarray([3.0, 1.0, 0.0])
    np.testing.assert_allclose(
        least_error.widest(least, most, -2, 1), [3.0, 1.0, least_error.ZERO_STEP]
    )
    np.testing.assert_allclose(least_error.widest(least, most, -8, 7)[0], 0.5)
    np.testing.assert_allclose(least_error.widest(least, most, -0.5, 0.5)[:2], [8.0, 2.0])
    np.testing.assert_allclose(least_error.widest(least, most, 0, 3)[:2], [1.0, 1 / 3])


def test_weights_count_as_copies_and_it_jits_and_vmaps():
    x = jnp.asarray([0.1, 0.5, -0.9, 2.0])
    weight = jnp.asarray([5.0, 3.0, 2.0, 1.0])
    copies = jnp.repeat(x, jnp.asarray([5, 3, 2, 1]))
    widest = jnp.asarray([2.0])
    expected = least_error.step(copies, widest, -2, 1)
    mine = jax.jit(lambda x: least_error.step(x, widest, -2, 1, weight=weight))(x)
    np.testing.assert_array_equal(mine, expected)
    many = jax.vmap(lambda x: least_error.step(x, widest, -2, 1, weight=weight))
    np.testing.assert_array_equal(many(jnp.stack([x, 2 * x]))[0], expected)
