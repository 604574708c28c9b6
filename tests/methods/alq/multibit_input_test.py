"""Multi-bit activations: eq. 24 fitted, its gradient, and its reference folded into a bias."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.methods.alq.multibit_input import fold_reference
from tests import quick


def relu_batch(seed, shape=(64, 6, 6, 3)):
    return jnp.maximum(jnp.asarray(np.random.default_rng(seed).normal(size=shape)), 0) * 2


def levels(state):
    ref, coords = (np.asarray(state.buffers[name], np.float64) for name in ("ref", "coords"))
    signs = np.array(list(itertools.product([-1, 1], repeat=len(coords))))
    return ref + signs @ coords


@pytest.fixture(scope="module")
def fitted():
    quantizer = qj.multi_bit_input(2)
    return quantizer, quick.jit(quantizer.init)(relu_batch(0))


def test_values_are_the_nearest_levels(fitted):
    quantizer, state = fitted
    x = relu_batch(1)
    x_hat, same = quick.jit(quantizer.apply)(x, state)
    grid = levels(state)
    distances = np.abs(np.asarray(x)[..., None] - grid)
    np.testing.assert_allclose(np.abs(x_hat - x), distances.min(-1), atol=1e-5)
    assert np.asarray(x_hat).min() < 0.3 * np.asarray(x_hat).max()
    jax.tree.map(np.testing.assert_array_equal, same, state)
    assert state.buffers["ref"] > 0
    assert np.all(np.asarray(state.buffers["coords"]) >= 0)


def test_the_fit_beats_even_levels_and_is_stationary(fitted):
    _, state = fitted
    x = np.asarray(relu_batch(0), np.float64).ravel()
    error = np.mean(np.min(np.abs(x[:, None] - levels(state)), axis=1) ** 2)
    even = np.linspace(0, x.max(), 4)
    assert error < 0.5 * np.mean(np.min(np.abs(x[:, None] - even), axis=1) ** 2)
    # Given the levels' assignment, lstsq in float64 finds nothing much better.
    ref, coords = (np.asarray(state.buffers[name], np.float64) for name in ("ref", "coords"))
    signs = np.array(list(itertools.product([-1, 1], repeat=2)))
    chosen = signs[np.argmin(np.abs(x[:, None] - ref - signs @ coords), axis=1)]
    matrix = np.concatenate([np.ones((len(x), 1)), chosen], axis=1)
    best = x - matrix @ np.linalg.lstsq(matrix, x, rcond=None)[0]
    assert error <= 1.02 * np.mean(best**2)


def test_running_average(fitted):
    _, state = fitted
    x = relu_batch(2) + 1.0
    whole, half = (
        quick.jit(qj.multi_bit_input(2, momentum=m).apply, static_argnames="update")(
            x, state, update=True
        )[1]
        for m in (1.0, 0.25)
    )
    for name in ("ref", "coords"):
        old, new, mixed = (np.asarray(s.buffers[name]) for s in (state, whole, half))
        assert np.any(np.abs(new - old) > 1e-2)
        np.testing.assert_allclose(mixed, 0.25 * new + 0.75 * old, rtol=1e-5)


def test_gradient_is_straight_through_between_the_outermost_levels(fitted):
    quantizer, state = fitted
    low, high = levels(state).min(), levels(state).max()
    x = jnp.asarray([low - 0.1, low + 0.01, (low + high) / 2, high - 0.01, high + 0.1, 1e6])
    gradient = jax.grad(lambda x: jnp.sum(quantizer.apply(x, state)[0]))(x)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0, 0])


def test_the_outermost_levels_themselves_have_a_gradient(fitted):
    quantizer, state = fitted
    rng = np.random.default_rng(0)
    ref = jnp.asarray(rng.normal(size=200), jnp.float32)
    coords = jnp.asarray(rng.uniform(0.01, 2, size=(200, 2)), jnp.float32)

    def gradient(ref, coords):
        mine = state._replace(buffers={**state.buffers, "ref": ref, "coords": coords})
        ends = ref + jnp.asarray([-1.0, 1.0]) * jnp.sum(coords)
        return jax.grad(lambda x: jnp.sum(quantizer.apply(x, mine)[0]))(ends)

    assert bool(jnp.all(quick.jit(jax.vmap(gradient))(ref, coords) == 1))


def test_reference_moves_into_the_bias(fitted):
    quantizer, state = fitted
    x_hat, _ = quantizer.apply(relu_batch(3), state)
    layer = nn.Conv(4, (3, 3), padding="VALID")
    params = quick.jit(layer.init)(jax.random.key(0), x_hat)["params"]
    ref = state.buffers["ref"]
    moved = {**params, "bias": fold_reference(params["kernel"], params["bias"], ref)}
    expected = layer.apply({"params": params}, x_hat)
    np.testing.assert_allclose(layer.apply({"params": moved}, x_hat - ref), expected, atol=1e-5)


def test_in_a_flax_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3))(x))
            return nn.Dense(2)(x.mean(axis=(1, 2)))

    model, x = Net(), relu_batch(4, (8, 6, 6, 3))
    params = quick.jit(model.init)(jax.random.key(0), x)["params"]
    apply = qj.linen.quantize_inputs(model.apply, {"Conv_0": None, ".*": qj.multi_bit_input(2)})
    both = ["quant", "quant_stats"]
    _, quant = quick.jit(lambda v: apply(v, x, mutable=both))({"params": params})
    variables = {"params": params, **quant}
    _, moved = quick.jit(lambda v, x: apply(v, x, mutable=["quant_stats"]))(variables, x * 2)
    for name in ("ref", "coords"):
        old, new = (tree["quant_stats"]["Dense_0"][name] for tree in (quant, moved))
        assert np.any(np.asarray(old) != np.asarray(new))
    assert jax.eval_shape(apply, variables, x).shape == (8, 2)


@pytest.mark.parametrize("x", [jnp.zeros((4, 3)), jnp.full((4, 3), 0.5), jnp.ones((1, 1))])
def test_degenerate_batches_stay_finite(x):
    quantizer = qj.multi_bit_input(3)
    state = quantizer.init(x)
    x_hat, moved = quantizer.apply(x, state, update=True)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((x_hat, moved)))
    np.testing.assert_allclose(x_hat, x, atol=1e-5)


def test_bad_arguments():
    for bits in (0, 9, 2.0):
        with pytest.raises(ValueError, match="bits"):
            qj.multi_bit_input(bits)
    with pytest.raises(ValueError, match="momentum"):
        qj.multi_bit_input(2, momentum=0.0)
