"""`stacked` over pruning, multi-bit and focused quantizers: each layer as if it were alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS = 3
QUANTIZERS = {
    "multi_bit": lambda: qj.multi_bit(2, "channel"),
    "multi_bit by blocks": lambda: qj.multi_bit(2, -2, blocks=2),
    "focused": lambda: qj.focused(4, min_separation=0.0, refit_every=1),
    "magnitude and focused": lambda: qj.chain(
        qj.magnitude(0.5, end=2, every=1), qj.focused(4, refit_every=1)
    ),
    "surgery": lambda: qj.surgery(0.5, end=3),
    "n of m": lambda: qj.n_m(2, 4, every=1),
    "magnitude across": lambda: qj.magnitude(0.5, across=True, end=2, every=1),
}
STACK = {"Stack_.*": 1}


def make_params(seed=0):
    """Layers of very different sizes, and one leaf that is no stack."""
    rng = np.random.default_rng(seed)
    scale = np.asarray([1.0, 1e-3, 50.0])[:, None, None]
    return {
        "Stack_0": {"kernel": jnp.asarray(scale * rng.normal(size=(LAYERS, 8, 6)), jnp.float32)},
        "Stack_1": {"kernel": jnp.asarray(scale * rng.normal(size=(LAYERS, 4, 8)), jnp.float32)},
        "Dense_0": {"kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)},
    }


def layer(tree, i):
    """The stacked leaves of one layer; works on states, too."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def stacks(params):
    return {name: leaf for name, leaf in params.items() if name != "Dense_0"}


def part(state, i):
    """What the state says of one layer."""
    mine = {
        field: {path: v for path, v in getattr(state, field).items() if path[:5] == "Stack"}
        for field in state._fields
    }
    return layer(qj.QuantState(**mine), i)


def equal(actual, desired):
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_layer_is_as_if_alone(name):
    """init, apply, update and encode; law 1 before and after the update."""
    alone = QUANTIZERS[name]()
    quantizer = qj.stacked(alone, STACK)
    params, moved = make_params(), make_params(1)
    state = quantizer.init(params)
    one_by_one = [alone.init(stacks_of(params, i)) for i in range(LAYERS)]
    apply, update = jax.jit(quantizer.apply), jax.jit(quantizer.update)
    for weights in (params, moved):
        applied = apply(weights, state)
        for i, mine in enumerate(one_by_one):
            close(part(state, i), mine)
            expected = jax.jit(alone.apply)(stacks_of(weights, i), part(state, i))
            equal(layer(stacks(applied), i), expected)
        equal(jax.jit(qj.decode)(quantizer.encode(weights, state)), applied)
        assert applied["Dense_0"]["kernel"].shape == (8, 4)
        layout = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        one_by_one = [
            jax.jit(alone.update)(stacks_of(weights, i), part(state, i)) for i in range(LAYERS)
        ]
        state = update(weights, state)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == layout


def stacks_of(params, i):
    return layer(stacks(params), i)


def close(actual, desired):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), actual, desired
    )


@pytest.mark.parametrize("name", ["multi_bit", "magnitude and focused"])
def test_as_the_target_of_position_scaled_gradients(name):
    alone = QUANTIZERS[name]()
    params = make_params()
    grads = jax.tree.map(jnp.ones_like, params)
    transform = qj.scale_by_position(qj.stacked(alone, STACK), strength=2.0, eps=0.0)
    scaled, state = jax.jit(transform.update)(grads, transform.init(params), params)
    goal = jax.jit(qj.stacked(alone, STACK).apply)(params, state.target)
    jax.tree.map(
        lambda s, w, t: np.testing.assert_allclose(s, 2 * np.abs(w - t), rtol=1e-4, atol=1e-5),
        scaled,
        params,
        goal,
    )


def test_as_the_quantizer_of_alq_through_all_phases():
    """Pruning ranks the layers' coordinates together, the other steps are a layer's own."""
    params = {name: make_params()[name] for name in ("Stack_0", "Stack_1")}
    params = jax.tree.map(
        lambda leaf: leaf / jnp.asarray([1.0, 1e-3, 50.0]).reshape(3, 1, 1), params
    )
    quantizer = qj.stacked(qj.multi_bit(2, "channel"), STACK)
    kinds = ("basis", "coordinate", "prune", "ste-reconstruction", "ste-loss-aware")
    schedule = [qj.Phase(kind, 1, 0.05, 0.5) for kind in kinds]
    transform = qj.alq(quantizer, schedule)
    apart = qj.alq(qj.multi_bit(2, "channel"), schedule)
    # One tree whose leaves are the layers: the same coordinates, ranked together.
    split = {f"{name}_{i}": layer(params[name], i) for name in params for i in range(LAYERS)}
    states = transform.init(params), apart.init(split)
    updates = jax.jit(transform.update), jax.jit(apart.update)
    params, split = qj.alq_params(states[0], params), qj.alq_params(states[1], split)
    for step, phase in enumerate(schedule):
        new = []
        for tree, state, update in zip((params, split), states, updates, strict=True):
            grads = jax.tree.map(lambda leaf: jnp.cos(9 * leaf), tree)
            moves, state = update(grads, state, tree)
            tree = optax.apply_updates(tree, moves)
            new.append((qj.alq_params(state, tree), state))
        (params, first), (split, second) = new
        states = first, second
        kept = [
            sum(
                int(np.count_nonzero(mine["mask"])) for mine in qj.alq_state(state).buffers.values()
            )
            for state in states
        ]
        assert kept[0] == kept[1] == (84 if step < 2 else 42), phase
        for name in params:
            for i in range(LAYERS):
                np.testing.assert_allclose(
                    params[name]["kernel"][i], split[f"{name}_{i}"]["kernel"], atol=1e-5
                )
    decoded = qj.decode(quantizer.encode(params, qj.alq_state(first)))
    equal(decoded, params)


def test_layers_of_several_learned_widths_encode_at_the_widest():
    params = make_params()
    quantizer = qj.stacked(qj.srq(4, learn_bits=True), STACK)
    state = quantizer.init(params)
    # The highest mask that is kept says the width: 2, 4 and 3 bits.
    logits = jnp.asarray([[3.0, -3.0, -3.0], [3.0, 3.0, 3.0], [3.0, 3.0, -3.0]])
    for path in ("Stack_0/kernel", "Stack_1/kernel"):
        state.learned[path]["mask_logits"] = logits
    state = quantizer.update(params, state)
    np.testing.assert_array_equal(state.buffers["Stack_0/kernel"]["width"], [2, 4, 3])
    encoded = quantizer.encode(params, state)["Stack_0"]["kernel"].validate()
    assert encoded.bits == 4
    assert [int(jnp.min(codes)) for codes in encoded.codes] == [-2, -8, -4]
    equal(encoded.decode(), jax.jit(quantizer.apply)(params, state)["Stack_0"]["kernel"])


def test_every_layer_draws_on_its_own():
    """Equal layers under one key: equal draws would tie the noise of a whole network together."""
    same = jnp.broadcast_to(make_params()["Dense_0"]["kernel"], (LAYERS, 8, 4))
    params = {"Stack_0": {"kernel": same}}
    quantizer = qj.stacked(qj.rq(3), STACK)
    state = quantizer.init(params)
    apply = jax.jit(quantizer.apply)
    drawn = apply(params, state, key=jax.random.key(0))["Stack_0"]["kernel"]
    for i in range(LAYERS):
        for j in range(i):
            assert np.mean(np.asarray(drawn[i] != drawn[j])) > 0.5
    equal(apply(params, state, key=jax.random.key(0))["Stack_0"]["kernel"], drawn)
    plain = apply(params, state)["Stack_0"]["kernel"]
    equal(plain[1:], plain[:-1])
