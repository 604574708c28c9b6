"""Proximal training: against straight-through training, and PARQ's map against its closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import quantjax as qj
from quantjax.methods.proximal import find_proximal

PATH = "Dense_0/kernel"
cheap = settings(derandomize=True, deadline=None, max_examples=100)


def params_of(*leaves):
    return {
        f"Dense_{i}": {"kernel": jnp.asarray(x), "bias": jnp.zeros(x.shape[-1], x.dtype)}
        for i, x in enumerate(leaves)
    }


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def loss_of(params):
    x = jnp.asarray(normal(64, 8, seed=5))
    y = jnp.asarray(normal(64, 3, seed=6))
    hidden = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    return jnp.mean(
        (hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None] - y) ** 2
    )


def train(tx, params, steps):
    state = tx.init(params)
    params = qj.proximal_params(state, params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_of)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.fixture
def double():
    """In float32 a weight that lingers half-way between levels may part two equal trainings."""
    with jax.enable_x64(True):
        yield jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64), params_of(normal(8, 16), normal(16, 3, seed=1))
        )


@pytest.mark.parametrize("target", [qj.uniform(3), qj.uniform(2, fit="error"), qj.binary()])
def test_hard_is_straight_through_training(target, double):
    """300 steps of Adam beside those of a loop that quantizes, and lets every gradient through."""
    params, base = double, optax.adam(1e-2)
    mine, state = train(qj.proximal(base, target, qj.hard()), params, 300)
    quant, opt_state = target.init(params), base.init(params)

    @jax.jit
    def step(params, quant, opt_state):
        grads = jax.grad(loss_of)(target.apply(params, quant))
        updates, opt_state = base.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, target.update(params, quant), opt_state

    for _ in range(300):
        params, quant, opt_state = step(params, quant, opt_state)
    for path, latent in find_proximal(state).latent.items():
        name, kind = path.split("/")
        np.testing.assert_allclose(latent, params[name][kind], atol=1e-9)
    exact = qj.proximal_params(state, mine)
    expected = target.apply(params, quant)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exact, expected)
    assert loss_of(exact) < 0.8 * loss_of(target.apply(double, target.init(double)))


def test_hard_is_straight_through_training_with_the_quantizers_own_gradient(double):
    """Toward a grid that follows the range, whose border belongs to it, `apply` agrees."""
    target, base, params = qj.uniform(3), optax.adam(1e-2), double
    mine, state = train(qj.proximal(base, target, qj.hard()), params, 300)
    quant, opt_state = target.init(params), base.init(params)

    @jax.jit
    def step(params, quant, opt_state):
        grads = jax.grad(lambda p: loss_of(target.apply(p, quant)))(params)
        updates, opt_state = base.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, target.update(params, quant), opt_state

    for _ in range(300):
        params, quant, opt_state = step(params, quant, opt_state)
    latent = find_proximal(state).latent
    np.testing.assert_allclose(latent[PATH], params["Dense_0"]["kernel"], atol=1e-9)
    np.testing.assert_allclose(mine["Dense_0"]["bias"], params["Dense_0"]["bias"], atol=1e-9)


def closed_form(u, step, limit, hardness):
    """The proximal map by levels: a clip of c + slope (u - c) between the two levels around u."""
    u, end = np.float64(u), limit * step
    lower = np.clip(np.floor(np.clip(u, -end, end) / step), -limit, limit - 1) * step
    upper, center = lower + step, lower + step / 2
    if hardness == 1:
        return np.where(np.clip(u, -end, end) > center, upper, lower)
    return np.clip(center + (np.clip(u, -end, end) - center) / (1 - hardness), lower, upper)


@cheap
@given(
    u=arrays(np.float32, (5, 4), elements=st.floats(-4, 4, width=32, allow_subnormal=False)),
    hardness=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    bits=st.integers(2, 4),
)
def test_parqs_map_is_its_closed_form(u, hardness, bits):
    limit, step = 2 ** (bits - 1) - 1, np.float32(0.7)
    end = limit * np.float64(step)
    distance = np.abs(np.mod(np.clip(u, -end, end) / step, 1) - 0.5)
    u = np.where(distance < 1e-4, 0, u).astype(np.float32)  # half-way either level will do
    nearest = np.float32(np.clip(np.round(u / step), -limit, limit) * step)
    state = {"step": jnp.full((1, 1), step), "limit": jnp.full((1, 1), float(limit))}
    mine = qj.parq(hardness)(jnp.asarray(u), jnp.asarray(nearest), state, jnp.zeros((), jnp.int32))
    np.testing.assert_allclose(mine, closed_form(u, np.float64(step), limit, hardness), atol=3e-6)


def test_pulls_at_their_ends_and_between():
    u, nearest = jnp.asarray([[0.3, -1.2, 9.0]]), jnp.asarray([[0.0, -1.0, 3.0]])
    state = {"step": jnp.ones((1, 1)), "limit": jnp.full((1, 1), 3.0)}
    count = jnp.asarray(5)
    for make in (qj.binary_relax, qj.parq):
        np.testing.assert_array_equal(make(1.0)(u, nearest, state, count), nearest)
        np.testing.assert_allclose(make(0.0)(u, nearest, state, count)[0, :2], u[0, :2], rtol=1e-6)
    np.testing.assert_allclose(
        qj.binary_relax(0.25)(u, nearest, state, count), [[0.225, -1.15, 7.5]]
    )
    schedule = qj.binary_relax(optax.linear_schedule(0.0, 1.0, 10))
    np.testing.assert_allclose(schedule(u, nearest, state, count), (u + nearest) / 2)
    np.testing.assert_allclose(
        qj.parq(0.5)(u, nearest, state, count), [[0.1, -1.0, 3.0]], atol=1e-6
    )


def test_annealed_is_a_sigmoid_from_0_to_1():
    values = np.asarray([qj.annealed(100)(step) for step in (0, 25, 50, 75, 100, 200)])
    np.testing.assert_allclose(values[[0, 2, 4, 5]], [0, 0.5, 1, 1], atol=1e-6)
    assert values[1] < 0.1 < 0.9 < values[3]
    np.testing.assert_allclose(values[1] + values[3], 1, atol=1e-6)


@pytest.mark.parametrize("make", [qj.binary_relax, qj.parq])
def test_annealed_training_ends_on_the_grid(make):
    target = qj.uniform(2, fit="error")
    params = params_of(normal(8, 16), normal(16, 3, seed=1))
    tx = qj.proximal(optax.adam(1e-2), target, make(qj.annealed(50)))
    params, state = train(tx, params, 60)
    exact, quant = qj.proximal_params(state, params), qj.proximal_state(state)
    encoded = target.encode(exact, quant)
    decoded = qj.decode(encoded)
    jax.tree.map(np.testing.assert_array_equal, decoded, exact)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, exact)


def test_latent_weights_are_float32_and_updates_keep_the_dtype():
    params = params_of(
        normal(8, 16).astype(jnp.bfloat16), normal(16, 3, seed=1).astype(jnp.bfloat16)
    )
    tx = qj.proximal(optax.sgd(1e-4), qj.uniform(4), qj.binary_relax(0.5))
    state = tx.init(params)
    before = state.latent[PATH]
    assert before.dtype == jnp.float32
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, state, params)
    assert updates["Dense_0"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.latent[PATH], before - 1e-4, rtol=1e-6)


def test_beside_another_optimizer_and_in_a_chain():
    params = params_of(normal(8, 16), normal(16, 3, seed=1))
    tx = optax.partition(
        {
            "grid": optax.chain(qj.proximal(optax.sgd(0.1), qj.uniform(4), qj.hard())),
            "rest": optax.adam(0.1),
        },
        lambda tree: jax.tree.map(lambda leaf: "grid" if leaf.ndim > 1 else "rest", tree),
    )
    state = tx.init(params)
    pulled = qj.proximal_params(state, params)
    assert pulled["Dense_0"]["bias"] is params["Dense_0"]["bias"]
    jax.tree.map(
        np.testing.assert_array_equal,
        pulled,
        qj.uniform(4).apply(params, qj.uniform(4).init(params)),
    )
    with pytest.raises(ValueError, match="expected the state of one proximal"):
        qj.proximal_state(optax.adam(0.1).init(params))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qj.parq(1.5), r"hardness must be in \[0, 1\], got 1.5"),
        (lambda: qj.binary_relax(-0.1), "hardness must be in"),
        (lambda: qj.annealed(0), "steps must be a whole number from 1 on"),
        (lambda: qj.annealed(10, -1.0), "steepness must be positive"),
        (lambda: qj.proximal(optax.sgd(0.1), qj.uniform(2), "hard"), "pull must be hard"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("quantizer", [qj.lsq(2), qj.srq(2)])
def test_learned_leaves_raise(quantizer):
    with pytest.raises(ValueError, match=f"the quantizer learns .*{PATH}"):
        qj.proximal(optax.sgd(0.1), quantizer, qj.hard()).init(params_of(normal(8, 4)))


@pytest.mark.parametrize("quantizer", [qj.ternary(), qj.multi_bit(2, "channel"), qj.magnitude(0.5)])
def test_a_target_without_a_step_under_parq(quantizer):
    with pytest.raises(ValueError, match=f"{PATH}: parq needs a uniform grid"):
        qj.proximal(optax.sgd(0.1), quantizer, qj.parq(0.5)).init(params_of(normal(8, 4)))


def test_another_tree():
    params = params_of(normal(8, 4))
    tx = qj.proximal(optax.sgd(0.1), qj.uniform(2), qj.hard())
    other = {"Dense_1": params["Dense_0"]}
    with pytest.raises(ValueError, match="made for another tree"):
        tx.update(other, tx.init(params), other)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(params, tx.init(params))
