"""One key per leaf: the same key gives the same masks to every function, in any composition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.core import paths
from tests import toys

DENSE = "Dense_0/kernel"


def ones():
    return {
        "Conv_0": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "Dense_0": {"kernel": jnp.ones((6, 5)), "bias": jnp.ones(5)},
        "Embed_0": {"embedding": jnp.ones((4, 3))},
    }


def flat(tree):
    return paths.flatten(tree)[0]


def kept(quantizer, params, key):
    """Which weights a dropping quantizer keeps, by path."""
    state = quantizer.init(params)
    return flat(quantizer.apply(params, state, key=key))


def test_a_leafs_mask_depends_on_its_key_and_path_alone():
    key = jax.random.key(5)
    masks = kept(toys.dropping(), ones(), key)
    expected = toys.drop_mask(paths.leaf_key(key, DENSE), (6, 5))
    np.testing.assert_array_equal(masks[DENSE], expected)
    alone = kept(toys.dropping(), {"Dense_0": {"kernel": jnp.ones((6, 5))}}, key)
    np.testing.assert_array_equal(alone[DENSE], expected)
    # A member of a partition gets the same key: who shares a tree with whom changes nothing.
    parted = qj.partition({"Conv_0": qj.uniform(8), ".*": toys.dropping()})
    np.testing.assert_array_equal(kept(parted, ones(), key)[DENSE], expected)
    other = kept(toys.dropping(), ones(), jax.random.key(6))
    assert np.any(other[DENSE] != expected)


def test_without_a_key_nothing_is_dropped():
    for quantizer in (
        toys.dropping(),
        qj.chain(toys.dropping()),
        qj.chain(toys.dropping(), qj.uniform(4)),
    ):
        state = quantizer.init(ones())
        jax.tree.map(np.testing.assert_array_equal, quantizer.apply(ones(), state), ones())


COMPOSED = {
    "alone": lambda: toys.dropping(),
    "partition": lambda: qj.partition({"Conv_0": toys.dropping(), ".*": toys.dropping()}),
    "chain of one": lambda: qj.chain(toys.dropping()),
    "partition of chains": lambda: qj.partition(
        {"Conv_0": qj.chain(toys.dropping()), ".*": toys.dropping()}
    ),
    "chain of a partition": lambda: qj.chain(
        qj.partition({".*": toys.dropping()}), qj.partition({"Conv_0": qj.uniform(8)})
    ),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_penalty_sees_the_masks_of_apply(name):
    quantizer, params = COMPOSED[name](), ones()
    state = quantizer.init(params)
    for seed in range(3):
        key = jax.random.key(seed)
        applied = flat(quantizer.apply(params, state, key=key))
        total = sum(float(applied[path].sum()) for path in state.buffers)
        assert float(quantizer.penalty(state, key=key)) == total
        assert total < sum(flat(params)[path].size for path in state.buffers)
    whole = sum(flat(params)[path].size for path in state.buffers)
    assert float(quantizer.penalty(state)) == whole


def test_members_of_a_chain_get_keys_of_their_own():
    quantizer, params = qj.chain(toys.dropping(), toys.dropping()), ones()
    key = jax.random.key(7)
    masks = [
        toys.drop_mask(paths.leaf_key(jax.random.fold_in(key, i), DENSE), (6, 5)) for i in (0, 1)
    ]
    assert np.any(masks[0] != masks[1])
    np.testing.assert_array_equal(kept(quantizer, params, key)[DENSE], masks[0] * masks[1])
    dense = {"Dense_0": params["Dense_0"]}
    state = quantizer.init(dense)
    total = sum(float(mask.sum()) for mask in masks)
    assert float(quantizer.penalty(state, key=key)) == total


def test_init_and_update_get_the_same_keys_as_apply():
    params, key = ones(), jax.random.key(9)

    def drawn(state, *names):
        node = state.buffers[DENSE]
        for name in names:
            node = node[name]
        return float(node["drawn"])

    for quantizer, names, own in (
        (toys.dropping(), (), key),
        (qj.partition({".*": toys.dropping()}), (), key),
        (qj.chain(qj.zero(), toys.dropping()), ("1",), jax.random.fold_in(key, 1)),
    ):
        expected = float(jax.random.uniform(paths.leaf_key(own, DENSE)))
        assert drawn(quantizer.init(params, key), *names) == expected
        state = quantizer.init(params)
        assert drawn(state, *names) == 0
        assert drawn(quantizer.update(params, state, key=key), *names) == expected
        assert drawn(quantizer.update(params, state), *names) == 0
