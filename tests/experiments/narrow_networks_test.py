import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments.fq import narrow_networks
from quantjax.lab import recipes
from quantjax.lab.models import LeNet5

WIDE = (6, 8, 12)
NARROW = (4, 5, 7)


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(1), (3, 16, 16, 1))


@pytest.fixture
def variables(images):
    model = LeNet5(10, WIDE)
    made = model.init(jax.random.key(0), images)
    # Biases begin at zero, and would hide what becomes of them.
    return jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 1 else leaf, made)


def test_file_in_the_old_shapes_gives_the_logits_of_the_narrow_network(variables, images):
    reduced = narrow_networks.narrowed(variables, NARROW)
    params = reduced.variables["params"]
    assert narrow_networks.features(params) == NARROW
    quantizer = qj.lsq(8)
    encoded = quantizer.encode(params, quantizer.init(params))
    whole = {"params": narrow_networks.widened(encoded, reduced)}
    shapes = jax.tree.map(jnp.shape, qj.decode(whole))
    assert shapes == jax.tree.map(jnp.shape, variables)
    loaded = recipes.Network(whole, {}).loaded()
    found = LeNet5(10, WIDE).apply(loaded, images)
    wanted = LeNet5(10, NARROW).apply({"params": qj.decode(encoded)}, images)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_cut_that_is_narrow_already(variables):
    reduced = narrow_networks.narrowed(variables, (20, 50, 500))
    for old, new in zip(
        jax.tree.leaves(variables), jax.tree.leaves(reduced.variables), strict=True
    ):
        np.testing.assert_array_equal(old, new)


def test_loose_ends_go_and_the_rest_stays():
    masks = {
        f"{layer.name}/kernel": np.zeros(shape, bool)
        for layer, shape in zip(
            narrow_networks.LENET5, ((1, 1, 1, 3), (1, 1, 3, 2), (4, 3), (3, 2)), strict=True
        )
    }
    first, second, third, last = masks.values()
    first[..., 0, 0] = second[..., 0, 0] = third[2, 1] = last[1, 0] = True  # a way through
    first[..., 0, 2] = True  # read by nothing
    second[..., 1, 1] = True  # reads what is never written
    third[3, 0] = last[2, 1] = True  # an input that is dead; an output of a dead unit
    left = narrow_networks.without_loose_ends(masks)
    assert {path: np.flatnonzero(mask).tolist() for path, mask in left.items()} == {
        "Conv_0/kernel": [0],
        "Conv_1/kernel": [0],
        "Dense_0/kernel": [7],
        "Dense_1/kernel": [2],
        "Conv_0/bias": [0],
        "Conv_1/bias": [0],
        "Dense_0/bias": [1],
        "Dense_1/bias": [0],
    }
