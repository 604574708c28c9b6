"""L0 regularisation beside its expectations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.methods import hard_concrete
from quantjax.methods.l0 import l0

PATH = "Dense_0/kernel"


def tree(w):
    return {"Dense_0": {"kernel": jnp.asarray(w, jnp.float32)}}


def at(state, prob):
    logit = jnp.full_like(state.learned[PATH]["logit"], np.log(prob / (1 - prob)))
    return state._replace(learned={PATH: {"logit": logit}})


@pytest.mark.parametrize("prob", [0.05, 0.3, 0.8])
def test_gates_are_zero_as_often_as_the_penalty_says(prob):
    quantizer = l0(0.5)
    params = tree(np.ones((100, 200)))
    state = at(quantizer.init(params), prob)
    gates = np.asarray(quantizer.apply(params, state, key=jax.random.key(0))["Dense_0"]["kernel"])
    expected = float(hard_concrete.prob_nonzero(prob))
    assert abs(np.mean(gates != 0) - expected) < 5 * np.sqrt(expected * (1 - expected) / 20000)
    assert float(quantizer.penalty(state)) == pytest.approx(0.5 * 20000 * expected, rel=1e-5)


def test_without_a_key_gates_are_open_or_shut():
    quantizer = l0(0.5)
    params = tree(np.full((2, 2), 3.0))
    for prob, gate in ((0.01, 0), (0.99, 1)):
        state = at(quantizer.init(params), prob)
        np.testing.assert_array_equal(quantizer.apply(params, state)["Dense_0"]["kernel"], 3 * gate)
    half = quantizer.apply(params, at(quantizer.init(params), 0.5))["Dense_0"]["kernel"]
    np.testing.assert_allclose(half, 1.5, rtol=1e-5)


def test_training_shuts_the_gates_of_weights_that_do_not_matter():
    quantizer = l0(0.3)
    wanted = jnp.asarray([[2.0, 0.0, -1.5, 0.01]])
    trainable = tree(jnp.ones((1, 4)))
    state = quantizer.init(trainable)
    trainable = (trainable, state.learned)
    tx = optax.adam(0.05)

    @jax.jit
    def step(trainable, opt_state, key):
        def loss(trainable):
            params, learned = trainable
            now = state._replace(learned=learned)
            w = quantizer.apply(params, now, key=key)["Dense_0"]["kernel"]
            return jnp.sum((w - wanted) ** 2) + quantizer.penalty(now)

        updates, opt_state = tx.update(jax.grad(loss)(trainable), opt_state)
        return optax.apply_updates(trainable, updates), opt_state

    opt_state = tx.init(trainable)
    for key in jax.random.split(jax.random.key(0), 400):
        trainable, opt_state = step(trainable, opt_state, key)
    params, learned = trainable
    out = np.asarray(
        quantizer.encode(params, qj.QuantState(learned, state.buffers))["Dense_0"]["kernel"]
    )
    assert np.all(out[0, [1, 3]] == 0)
    np.testing.assert_allclose(out[0, [0, 2]], [2.0, -1.5], atol=0.1)


def test_gates_of_other_leaves_and_states_of_others():
    quantizer, params = l0(0.5), tree(np.ones((3, 4)))
    for shape in ((1, 4), (4, 3), (3, 1)):  # the first would broadcast
        state = quantizer.init(tree(np.ones(shape)))
        for run in (quantizer.apply, quantizer.encode):
            with pytest.raises(ValueError, match=f"{PATH}: the state was made for another tree"):
                run(params, state)
    with pytest.raises(ValueError, match=f"{PATH}: .*another quantizer"):
        quantizer.encode(params, qj.uniform(4).init(params))
    with pytest.raises(ValueError, match=f"{PATH}: .*another quantizer"):
        qj.uniform(4).encode(params, quantizer.init(params))
    assert repr(quantizer) == "l0(0.5)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 0.5), "strength"),
        ((np.inf, 0.5), "strength"),
        ((1.0, 0.0), "prob"),
        ((1.0, 1.0), "prob"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        l0(arguments[0], prob=arguments[1])
