"""Layers in one leaf: each is what it would be alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import quantjax as qj

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCALES = (1.0, 0.1, 0.01)  # one grid for all would leave nothing of the last layer


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_params():
    layers = normal(3, 12, 8) * jnp.asarray(SCALES)[:, None, None]
    return {
        "Blocks": {"kernel": layers, "bias": normal(3, 8, seed=1)},
        "Head": {"kernel": normal(8, 4, seed=2)},
    }


def layer(params, index):
    return {"Blocks": jax.tree.map(lambda leaf: leaf[index], params["Blocks"])}


QUANTIZERS = {
    "uniform": lambda: qj.uniform(4),
    "per channel": lambda: qj.uniform(3, axes="channel", momentum=0.5),
    "srq": lambda: qj.srq(4),
    "multi_bit": lambda: qj.multi_bit(2, axes="channel"),
    "focused": lambda: qj.focused(4, min_separation=0.0, refit_every=1),
    "magnitude": lambda: qj.magnitude(0.3, end=2, every=1),
    "across": lambda: qj.magnitude(0.3, across=True, end=2, every=1),
    "surgery": lambda: qj.surgery(0.3, end=9),
    "n_m": lambda: qj.n_m(2, 4, every=1),
    "chain": lambda: qj.chain(qj.magnitude(0.3, end=2, every=1), qj.uniform(4)),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_layer_is_what_it_would_be_alone(name):
    params, inner = make_params(), QUANTIZERS[name]()
    quantizer = qj.stacked(inner, {"Blocks": 1})
    state = quantizer.init(params)
    moved = jax.tree.map(lambda leaf: 1.5 * leaf + 0.001, params)
    state = jax.jit(quantizer.update)(moved, state)
    applied = jax.jit(quantizer.apply)(moved, state)
    apply, update = jax.jit(inner.apply), jax.jit(inner.update)
    for index in range(3):
        alone = update(layer(moved, index), inner.init(layer(params, index)))
        kept = state.buffers["Blocks/kernel"]
        for a, b in zip(
            jax.tree.leaves(kept), jax.tree.leaves(alone.buffers["Blocks/kernel"]), strict=True
        ):
            np.testing.assert_allclose(a[index], b, rtol=1e-5, atol=1e-6)
        expected = apply(layer(moved, index), alone)["Blocks"]["kernel"]
        np.testing.assert_allclose(
            applied["Blocks"]["kernel"][index], expected, rtol=1e-4, atol=1e-6
        )
    decoded = jax.jit(qj.decode)(quantizer.encode(moved, state))
    jax.tree.map(np.testing.assert_array_equal, decoded, applied)


def relative_error(params, quantizer):
    state = quantizer.init(params)
    got = quantizer.apply(params, state)["Blocks"]["kernel"]
    far = jnp.sum((got - params["Blocks"]["kernel"]) ** 2, axis=(1, 2))
    return jnp.sqrt(far / jnp.sum(params["Blocks"]["kernel"] ** 2, axis=(1, 2)))


def test_small_layers_are_not_rounded_away():
    params = make_params()
    assert relative_error(params, qj.uniform(4))[-1] == 1.0
    errors = relative_error(params, qj.stacked(qj.uniform(4), {"Blocks": 1}))
    assert bool(jnp.all(errors < 0.2))


def test_two_leading_axes_and_leaves_without_any():
    leaf = normal(2, 3, 6, 4)
    params = {"Blocks": {"kernel": leaf}, "Head": {"kernel": normal(4, 4)}}
    quantizer = qj.stacked(qj.uniform(4), {"Blocks": 2})
    state = quantizer.init(params)
    assert state.buffers["Blocks/kernel"]["step"].shape == (2, 3, 1, 1)
    assert state.buffers["Head/kernel"]["step"].shape == (1, 1)
    np.testing.assert_allclose(
        state.buffers["Blocks/kernel"]["step"], qj.symmetric_step(leaf, 4, (-2, -1)), rtol=1e-6
    )
    assert jax.tree.structure(quantizer.update(params, state)) == jax.tree.structure(state)
    jax.tree.map(
        np.testing.assert_array_equal,
        qj.decode(quantizer.encode(params, state)),
        quantizer.apply(params, state),
    )


def test_layers_draw_for_themselves():
    params = {"Blocks": {"kernel": jnp.broadcast_to(normal(12, 8), (4, 12, 8))}}
    quantizer = qj.stacked(qj.srq(4, dropbits=True, estimator="mode"), {"Blocks": 1})
    state = quantizer.init(params)
    apply = jax.jit(quantizer.apply)
    seen = [apply(params, state, key=jax.random.key(seed))["Blocks"]["kernel"] for seed in range(4)]
    assert any(not np.array_equal(found[0], found[1]) for found in seen)
    first, again = (apply(params, state, key=jax.random.key(0)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_learned_widths_of_their_own_are_stacked_at_the_widest():
    params = make_params()
    inner = qj.srq(4, learn_bits=True, penalty=1e-2)
    quantizer = qj.stacked(inner, {"Blocks": 1})
    state = quantizer.init(params)
    logits = jnp.asarray([[3.0, 3.0, 3.0], [3.0, 3.0, -3.0], [3.0, -3.0, -3.0]])  # 4, 3, 2 bits
    learned = dict(state.learned)
    learned["Blocks/kernel"] = {**learned["Blocks/kernel"], "mask_logits": logits}
    state = quantizer.update(params, state._replace(learned=learned))
    np.testing.assert_array_equal(state.buffers["Blocks/kernel"]["width"], [4, 3, 2])
    encoded = quantizer.encode(params, state)["Blocks"]["kernel"]
    assert encoded.bits == 4
    assert encoded.nbits == 3 * 12 * 8 * 4 + 3 * 32
    for index, width in enumerate((4, 3, 2)):
        assert np.abs(np.asarray(encoded.codes[index]) + 0.5).max() <= 2 ** (width - 1)
    alone = [
        inner.penalty(qj.QuantState(*(jax.tree.map(lambda x, i=i: x[i], part) for part in only)))
        for i in range(3)
        for only in [tuple({"k": part["Blocks/kernel"]} for part in state)]
    ]
    head = inner.penalty(qj.QuantState(*({"k": part["Head/kernel"]} for part in state)))
    np.testing.assert_allclose(quantizer.penalty(state), sum(alone) + head, rtol=1e-5)


def test_scanned_linen_and_vmapped_nnx_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Dense(8)(x)), None

    scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    params = scanned().init(jax.random.key(0), jnp.ones((2, 8)), None)["params"]
    state = qj.stacked(qj.uniform(4), {"Dense_0": 1}).init(params)
    assert state.buffers["Dense_0/kernel"]["step"].shape == (3, 1, 1)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(8, 8, rngs=rngs)

    params = nnx.state(make(nnx.Rngs(0)), nnx.Param)
    quantizer = qj.stacked(qj.uniform(4), {".*": 1})
    state = quantizer.init(params)
    assert state.buffers["kernel"]["step"].shape == (3, 1, 1)
    assert jax.tree.structure(quantizer.apply(params, state)) == jax.tree.structure(params)


@pytest.mark.parametrize("inner", ["uniform", "multi_bit", "surgery"])
def test_target_of_psg(inner):
    params = make_params()
    tx = qj.scale_by_position(qj.stacked(QUANTIZERS[inner](), {"Blocks": 1}), strength=1.0)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    goal = qj.stacked(QUANTIZERS[inner](), {"Blocks": 1}).apply(params, state.target)
    far = jnp.abs(params["Blocks"]["kernel"] - goal["Blocks"]["kernel"])
    np.testing.assert_allclose(updates["Blocks"]["kernel"], far, rtol=1e-4, atol=1e-6)


def test_quantizer_of_alq():
    params = {"Blocks": {"kernel": make_params()["Blocks"]["kernel"]}}
    quantizer = qj.stacked(qj.multi_bit(2, axes="channel"), {"Blocks": 1})
    phases = (
        qj.Phase("prune", 2, 1e-3, keep=0.5),
        qj.Phase("basis", 2, 1e-2),
        qj.Phase("coordinate", 2, 1e-2),
    )
    tx = qj.alq(quantizer, phases)
    state = tx.init(params)
    weights = qj.alq_params(state, params)

    @jax.jit
    def step(weights, state):
        grads = jax.tree.map(lambda w, goal: w - 0.9 * goal, weights, params)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    for _ in range(6):
        weights, state = step(weights, state)
    encoded = quantizer.encode(qj.alq_params(state, params), qj.alq_state(state))
    assert qj.average_bits(encoded) == pytest.approx(1.0)
    jax.tree.map(np.testing.assert_array_equal, qj.decode(encoded), qj.alq_params(state, params))


@pytest.mark.parametrize(
    ("axes", "message"),
    [({}, "at least one pattern"), ({"a": -1}, "whole number from 0"), ({"a": 1.5}, "got 1.5")],
)
def test_bad_axes_raise_at_construction(axes, message):
    with pytest.raises(ValueError, match=message):
        qj.stacked(qj.uniform(4), axes)


def test_patterns_that_match_nothing_or_leaves_with_fewer_axes():
    with pytest.raises(ValueError, match="'Layers' matches no path"):
        qj.stacked(qj.uniform(4), {"Layers": 1}).init(make_params())
    with pytest.raises(ValueError, match="Head/kernel: 3 leading axes, but shape"):
        qj.stacked(qj.uniform(4), {"Head": 3}).init(make_params())
