"""Quantized weights as an NNX module: the functional interface, carried along."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import quantjax as qj
from quantjax.core.paths import path_name
from quantjax.nnx import QuantParam, QuantStat, calibrate, quantize_inputs, quantize_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.first(x)))))


def data(rows=32):
    x = jax.random.normal(jax.random.key(0), (rows, 6))
    return x, jnp.argmax(x[:, :3], axis=1)


def loss_of(model, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
    return losses.mean() + model.penalty()


@nnx.jit
def step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, grads)
    model.update()
    return loss


def trained(quantizer, steps=20, net=Net, rngs=None):
    x, y = data()
    model = quantize_weights(net(nnx.Rngs(0)), quantizer, rngs=rngs)
    tx = optax.adamw(1e-2, mask=qj.decay_mask)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    return model, [float(step(model, optimizer, x, y)) for _ in range(steps)]


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.first, self.head = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.first(x)))


@pytest.mark.parametrize("make", [lambda: qj.lsq(3), lambda: qj.uniform(3)])
def test_it_trains_as_the_functional_loop_does(make):
    """The README's loop on the state of the same model."""
    quantizer, (x, y) = make(), data()
    model, losses = trained(quantizer, 8, Plain)
    graph, params = nnx.split(Plain(nnx.Rngs(0)))
    params = nnx.to_pure_dict(params)
    state = quantizer.init(params)
    trainable = params, state.learned
    tx = optax.adamw(1e-2, mask=qj.decay_mask)
    opt_state = tx.init(trainable)

    def loss(trainable, state):
        params, learned = trainable
        weights = quantizer.apply(params, state._replace(learned=learned))
        pure = nnx.state(Plain(nnx.Rngs(0)))
        nnx.replace_by_pure_dict(pure, weights)
        logits = nnx.merge(graph, pure)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def one(trainable, state, opt_state):
        value, grads = jax.value_and_grad(loss)(trainable, state)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        params, learned = trainable = optax.apply_updates(trainable, updates)
        state = quantizer.update(params, state._replace(learned=learned))
        return value, trainable, state, opt_state

    by_hand = []
    for _ in range(8):
        value, trainable, state, opt_state = one(trainable, state, opt_state)
        by_hand.append(float(value))
    np.testing.assert_allclose(losses, by_hand, atol=1e-5)
    for path, values in state.learned.items():
        for name, value in values.items():
            np.testing.assert_allclose(model.state.learned[path][name], value, atol=1e-5)
    for path, values in state.buffers.items():
        for name, value in values.items():
            np.testing.assert_allclose(model.state.buffers[path][name], value, atol=1e-5)


def test_what_trains_and_what_does_not():
    model = quantize_weights(Net(nnx.Rngs(0)), qj.lsq(2))
    names = {
        "/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, QuantParam))
    }
    assert names == {"learned/first/kernel/step", "learned/head/kernel/step"}
    mask = jax.tree_util.tree_leaves_with_path(qj.decay_mask(nnx.state(model, nnx.Param)))
    decayed = {path_name(path) for path, decays in mask if decays}
    assert decayed == {"model/first/kernel", "model/head/kernel"}
    assert nnx.state(model, QuantStat)


def test_training_falls_and_batch_statistics_move():
    model, losses = trained(qj.lsq(3), 60)
    assert losses[-1] < 0.7 * losses[0]
    assert float(jnp.abs(model.model.norm.mean[...]).max()) > 0
    assert float(model.model.drop.rngs.count[...]) == 60  # of the model, not of a copy


def test_what_evaluates_is_what_ships():
    x, _ = data()
    model, _ = trained(qj.srq(3), 5)
    model.eval()
    encoded = model.encode()
    assert isinstance(encoded["first"]["kernel"], qj.Grid)
    graph, params, rest = nnx.split(model.model, nnx.Param, ...)
    nnx.replace_by_pure_dict(params, qj.decode(encoded))
    np.testing.assert_allclose(nnx.merge(graph, params, rest)(x), model(x), atol=1e-6)


def test_penalty_and_update_see_the_masks_of_the_call():
    quantizer = qj.srq(3, learn_bits=True, freeze_after=3, penalty=0.1)
    model = quantize_weights(Plain(nnx.Rngs(0)), quantizer, rngs=nnx.Rngs(quant=1))
    x, _ = data()
    keys = []
    for _ in range(2):
        model(x)
        keys.append(model.key[...])
        expected = quantizer.penalty(model.state, key=keys[-1])
        assert float(model.penalty()) == float(expected) > 0
    assert not jnp.array_equal(*map(jax.random.key_data, keys))
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    assert float(model.penalty()) == float(quantizer.penalty(model.state))


def test_state_that_moves():
    quantizer = qj.chain(qj.magnitude(0.5, end=4, every=1), qj.uniform(4))
    model, _ = trained(quantizer, 6, Plain)
    buffers = model.state.buffers["first/kernel"]
    assert int(np.sum(buffers["0"]["mask"])) == 24
    assert qj.summary(model.encode())


def test_quantized_inputs_beside():
    x, _ = data()
    inner = quantize_inputs(Plain(nnx.Rngs(0)), qj.uniform_input(4))
    calibrate(inner, x)
    model = quantize_weights(inner, qj.uniform(4))
    assert model(x).shape == (32, 3)
    again = nnx.clone(model)
    np.testing.assert_array_equal(model(x), again(x))


@pytest.mark.parametrize(
    ("model", "quantizer", "message"),
    [
        (lambda: None, lambda: qj.uniform(4), "expected an NNX model"),
        (lambda: Plain(nnx.Rngs(0)), lambda: qj.uniform_input(4), "goes to quantjax.nnx.quantize"),
        (lambda: Plain(nnx.Rngs(0)), lambda: 4, "expected a Quantizer of weights, got 4"),
        (lambda: nnx.BatchNorm(3, rngs=nnx.Rngs(0)), lambda: qj.uniform(4), "nothing to quantize"),
    ],
)
def test_bad_input(model, quantizer, message):
    with pytest.raises(ValueError, match=message):
        quantize_weights(model(), quantizer())
