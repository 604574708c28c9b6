import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.core import paths


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params():
    return {
        "Attn": {"wq": normal(4, 6), "wk": normal(4, 6, seed=1)},
        "Mlp": {"wi": normal(6, 8, seed=2), "bias": normal(8, seed=3)},
        "pos_embedding": normal(5, 4, seed=4),
        "Norm": {"scale": normal(4, seed=5)},
        "Dense_0": {"kernel": normal(4, 3, seed=6), "bias": normal(3, seed=7)},
    }


NAMES = {"Attn/w.": "kernel", "Mlp/wi": "kernel", "pos_embedding": "embedding"}


def values(tree):
    return paths.flatten(tree)[0]


def test_named_leaves_are_quantized_as_kernels_are_and_keep_their_paths():
    quantizer = qj.named(NAMES, qj.uniform(4, axes="channel", biases=True))
    state = quantizer.init(params())
    assert set(state.buffers) == {
        "Attn/wq",
        "Attn/wk",
        "Mlp/wi",
        "Mlp/bias",  # beside one kernel alone; Attn has two, and no bias
        "pos_embedding",
        "Dense_0/kernel",
        "Dense_0/bias",
    }
    shapes = {path: mine["step"].shape for path, mine in state.buffers.items()}
    assert shapes["Attn/wq"] == (1, 6)
    assert shapes["pos_embedding"] == (5, 1)  # rows
    assert shapes["Mlp/bias"] == (1,)
    applied, leaves = values(jax.jit(quantizer.apply)(params(), state)), values(params())
    for path in state.buffers:
        axes = {"pos_embedding": -1}.get(path, None if leaves[path].ndim == 1 else -2)
        step = qj.symmetric_step(leaves[path], 4, axes)
        expected = qj.nearest(leaves[path], step, bits=4)
        np.testing.assert_allclose(applied[path], expected, rtol=1e-6, atol=1e-7)
    encoded = quantizer.encode(params(), state)
    assert isinstance(encoded["Attn"]["wq"], qj.Grid)
    assert encoded["Norm"]["scale"].shape == (4,)
    jax.tree.map(
        np.testing.assert_array_equal, qj.decode(encoded), quantizer.apply(params(), state)
    )


def test_patterns_axes_stacked_and_keys_reach_named_leaves():
    tree = params()
    tree["Mlp"]["wi"] = normal(3, 6, 8)
    inner = qj.partition(
        {
            "Attn/wq": qj.uniform(8),
            ".*kernel": qj.srq(3, learn_bits=True, axes={"Mlp": "channel"}),
            "pos_embedding": None,
        }
    )
    quantizer = qj.named(NAMES, qj.stacked(inner, {"Mlp/wi": 1}))
    state = quantizer.init(tree, jax.random.key(0))
    assert set(state.buffers) == {"Attn/wq", "Attn/wk", "Mlp/wi", "Dense_0/kernel"}
    assert state.learned["Mlp/wi"]["log_alpha"].shape == (3, 1, 8)
    key = jax.random.key(1)
    assert quantizer.penalty(state, key=key) > 0
    moved = jax.jit(quantizer.update)(tree, state, key=key)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    apply = jax.jit(quantizer.apply)
    kept = [values(apply(tree, state, key=jax.random.key(seed)))["Attn/wk"] for seed in range(9)]
    assert len({np.asarray(leaf).tobytes() for leaf in kept}) > 1  # bits are dropped by the key
    jax.tree.map(
        np.testing.assert_array_equal,
        qj.decode(quantizer.encode(tree, state)),
        jax.jit(quantizer.apply)(tree, state),
    )


def test_a_bias_by_another_name():
    tree = {"Dense_0": {"w": normal(4, 3), "b": normal(3)}}
    names = {".*/w": "kernel", ".*/b": "bias"}
    state = qj.named(names, qj.uniform(4, biases=True)).init(tree)
    assert set(state.buffers) == {"Dense_0/w", "Dense_0/b"}
    assert set(qj.named(names, qj.uniform(4)).init(tree).buffers) == {"Dense_0/w"}


def test_named_leaves_are_targets_of_psg():
    tree = params()
    tx = qj.scale_by_position(qj.named(NAMES, qj.uniform(3)), strength=2.0)
    grads = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    step = qj.symmetric_step(tree["Mlp"]["wi"], 3)
    far = jnp.abs(tree["Mlp"]["wi"] - qj.nearest(tree["Mlp"]["wi"], step, bits=3))
    np.testing.assert_allclose(updates["Mlp"]["wi"], 2 * far, rtol=1e-5, atol=1e-6)


def test_decay_mask_takes_the_same_names():
    tree = params()
    learned = {"Attn/wq": {"alpha": jnp.ones(())}}
    mask = values(qj.decay_mask((tree, learned), NAMES))
    expected = {"Attn/wq", "Attn/wk", "Mlp/wi", "pos_embedding", "Dense_0/kernel"}
    assert {path for path, decays in mask.items() if decays} == {f"0/{path}" for path in expected}
    mask = values(qj.decay_mask(tree, NAMES))
    assert {path for path, decays in mask.items() if decays} == expected
    tx = optax.adamw(1e-3, mask=functools.partial(qj.decay_mask, names={"w": "kernel"}))
    tx.init({"w": jnp.ones((2, 2))})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "at least one pattern"),
        ({"Attn": "weight"}, "names must be among .*kernel.*got"),
        ({"[": "kernel"}, "no regex"),
    ],
)
def test_bad_names_raise_at_construction(names, message):
    with pytest.raises(ValueError, match=message):
        qj.named(names, qj.uniform(4))


def test_a_pattern_that_matches_nothing_raises_at_init():
    with pytest.raises(ValueError, match="'wo' matches no path"):
        qj.named({"wo": "kernel"}, qj.uniform(4)).init(params())


def test_leaves_of_other_names_are_pointed_to():
    with pytest.raises(ValueError, match=r"named\(\{pattern: 'kernel'\}, quantizer\)"):
        qj.uniform(4).init({"w": normal(3, 4)})
