"""The k-th largest by bisection against sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantjax.core import order_statistics

FLOATS = st.floats(width=32, allow_nan=False)  # zeros of both signs, subnormals and infinity too


@jax.jit
def kth(x, k):
    keys = order_statistics.magnitude_keys(x)
    return order_statistics.kth_largest(lambda t: jnp.sum(keys >= t), k, keys.dtype)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(x=arrays(np.float32, (13,), elements=FLOATS), k=st.integers(1, 13))
def test_kth_largest_is_what_sorting_finds(x, k):
    expected = np.sort(np.abs(x))[::-1][k - 1]
    key = kth(x, k)
    assert np.asarray(key).view(np.float32) == expected
    assert np.asarray(key) == expected.view(np.int32)


def test_beyond_the_number_of_keys_it_is_zero():
    assert kth(np.ones(13, np.float32), 14) == 0


def test_several_multisets_at_once_and_few_bits():
    keys = jnp.asarray([[3, 1, 7], [2, 2, 0]])

    def at_least(t):
        return jnp.sum(keys >= t, axis=1, keepdims=True)

    for k, expected in ((1, [[7], [2]]), (2, [[3], [2]]), (3, [[1], [0]])):
        found = order_statistics.kth_largest(at_least, jnp.full((2, 1), k), jnp.int32, bits=3)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_keys_order_like_magnitudes(dtype):
    with jax.enable_x64(True):
        x = jnp.asarray([0.0, -0.5, 0.50390625, -2.0, jnp.inf, jnp.nan], dtype)
        keys = order_statistics.magnitude_keys(x)
        assert np.all(np.diff(np.asarray(keys)) > 0)
        np.testing.assert_array_equal(
            order_statistics.magnitude_of(keys), jnp.abs(x).astype(keys.dtype.str.replace("i", "f"))
        )
