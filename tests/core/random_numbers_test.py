"""The numbers are those of jax.random, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax.core import paths, random_numbers


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 4)])
def test_as_jax_random_draws(make, shape):
    draw = jax.jit(random_numbers.uniform, static_argnums=1)
    for seed in (0, 123456789):
        key = make(seed)
        expected = jax.random.uniform(key, shape)
        found = draw(key, shape)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected)


def test_keys_of_another_generator():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(random_numbers.uniform(key, (5,)), jax.random.uniform(key, (5,)))


def test_several_keys_at_once():
    keys = jax.random.split(jax.random.key(0), 3)
    found = jax.vmap(lambda key: random_numbers.uniform(key, (4,)))(keys)
    for mine, key in zip(found, keys, strict=True):
        np.testing.assert_array_equal(mine, jax.random.uniform(key, (4,)))


def test_keys_of_many_leaves_are_their_own():
    key = jax.random.key(0)
    names = ["Conv_0/kernel", "Dense_0/kernel"]
    for path, mine in paths.leaf_keys(key, names).items():
        np.testing.assert_array_equal(
            jax.random.key_data(mine), jax.random.key_data(paths.leaf_key(key, path))
        )
    assert paths.leaf_keys(None, names) == dict.fromkeys(names)
