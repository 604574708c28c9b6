"""Quantized inputs of Linen layers: values, state, patterns, dtypes and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import quantjax as qj
from quantjax import linen as qnn
from quantjax.methods.uniform_input import uniform_input
from tests.linen_toys import (
    BOTH,
    Mlp,
    Norm,
    Scanned,
    counting,
    data,
    fitted,
    init,
    learned_step,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_values_are_those_of_quantizing_by_hand():
    x, q = data(6, 4), uniform_input(3)
    model = Mlp()
    apply, variables, quant = fitted(model, x, q)
    first, second = variables["params"]["Dense_0"], variables["params"]["Dense_1"]
    y, one = q.apply(x, q.init(x))
    y = nn.relu(nn.Dense(5).apply({"params": first}, y))
    y, two = q.apply(y, q.init(y))
    y = nn.Dense(3).apply({"params": second}, y)
    assert jnp.array_equal(apply({**variables, **quant}, x), y)
    assert list(quant) == ["quant_stats"]
    for state, path in ((one, "Dense_0"), (two, "Dense_1")):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, quant["quant_stats"][path], state[1]))
    jitted = jax.jit(apply)({**variables, **quant}, x)
    np.testing.assert_allclose(jitted, y, atol=1e-6)


def test_state_is_used_as_it_is_and_updated_only_where_mutable():
    x = data(6, 4)
    apply, variables, quant = fitted(Mlp(), x, counting())
    assert quant["quant_stats"]["Dense_1"]["count"] == 0
    variables = {**variables, **quant}
    _, after = jax.jit(functools.partial(apply, mutable=["quant_stats"]))(variables, x)
    assert after["quant_stats"]["Dense_0"]["count"] == 1
    assert not isinstance(apply(variables, x), tuple)
    assert apply(variables, x, mutable=["quant"])[1] == {}


def test_a_collection_that_would_be_empty_does_not_exist():
    x = data(6, 4)
    _, _, quant = fitted(Mlp(), x, learned_step())
    assert list(quant) == ["quant"]
    _, _, quant = fitted(Scanned(), x, uniform_input(4))
    assert list(quant) == ["quant_stats"]
    _, _, quant = fitted(Scanned(), x, learned_step())
    assert list(quant) == ["quant"]
    rematted = nn.remat(Mlp)()
    _, _, quant = fitted(rematted, x, learned_step())
    assert list(quant) == ["quant"]


def test_learned_state_alone_needs_quant_mutable_only():
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, learned_step())
    _, quant = apply(variables, x, mutable=["quant"])
    assert set(quant["quant"]) == {"Dense_0", "Dense_1"}
    with pytest.raises(ValueError, match=r"Dense_0: .*not fitted, and quant cannot be written"):
        apply(variables, x, mutable=["quant_stats"])


def test_gradients_reach_weights_and_learned_inputs_and_train():
    x, y = data(32, 4), jnp.sin(data(32, 3, seed=2))
    apply, variables, quant = fitted(Mlp(), x, learned_step())
    tx = optax.sgd(0.05)

    @jax.jit
    def step(trainable, opt_state):
        def loss(trainable):
            params, learned = trainable
            return jnp.mean((apply({"params": params, "quant": learned}, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(trainable, updates), opt_state, value, grads

    trainable = (variables["params"], quant["quant"])
    opt_state, losses = tx.init(trainable), []
    for _ in range(30):
        trainable, opt_state, value, grads = step(trainable, opt_state)
        losses.append(float(value))
        if len(losses) == 1:
            assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    assert losses[-1] < losses[0]


def test_fitting_and_updating_pass_no_gradient_through_the_state():
    x, model = data(6, 4), Mlp()
    apply, variables, quant = fitted(model, x)

    def loss(params, state):
        out, _ = apply({"params": params, **state}, x, mutable=BOTH)
        return jnp.sum(out**2)

    for state in ({}, quant):
        grads = jax.jit(jax.grad(loss))(variables["params"], state)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_batch_norm_statistics_move_beside_the_quantizers():
    x, model = data(4, 6, 6, 2), Norm()
    variables = init(model, x, train=False)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    out, state = apply(variables, x, train=True, mutable=[*BOTH, "batch_stats"])
    assert set(state) == {"quant_stats", "batch_stats"}
    variables = {**variables, **state}
    run = jax.jit(functools.partial(apply, train=True, mutable=["batch_stats", "quant_stats"]))
    _, state = run(variables, x + 1)
    for name in ("batch_stats", "quant_stats"):
        old, new = (flatten_dict(v[name]) for v in (variables, state))
        assert old.keys() == new.keys()
        assert any(not jnp.array_equal(old[key], new[key]) for key in old)
    _, state = apply(variables, x, train=True, mutable=["batch_stats"])
    assert set(state) == {"batch_stats"}
    assert apply(variables, x, train=False).shape == out.shape


def test_patterns_choose_quantizers():
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    for kwargs in ({"where": "Dense_1"}, {"quantizer": {"Dense_0": None, ".*": counting()}}):
        apply = qnn.quantize_inputs(model.apply, **{"quantizer": counting(), **kwargs})
        _, quant = apply(variables, x, mutable=BOTH)
        assert set(quant["quant_stats"]) == {"Dense_1"}
    quantizer = {"Dense_0": learned_step(), "Dense_1": counting()}
    _, quant = qnn.quantize_inputs(model.apply, quantizer)(variables, x, mutable=BOTH)
    assert {c: set(layers) for c, layers in quant.items()} == {
        "quant": {"Dense_0"},
        "quant_stats": {"Dense_1"},
    }


@pytest.mark.parametrize(
    ("quantizer", "where", "message"),
    [
        (counting(), "Dense", r"'Dense' matches no path.*\['Dense_0', 'Dense_1'\]"),
        ({"Conv_0": counting(), ".*": None}, ".*", r"'Conv_0' matches no path.*'Dense_1'"),
        ({".*": counting(), "Dense_1": None}, ".*", r"'Dense_1' is shadowed.*'Dense_0'"),
        ({"Dense_0": counting()}, "Dense_1", r"'Dense_0' matches no path.*\['Dense_1'\]"),
    ],
)
def test_a_pattern_without_layers_is_an_error(quantizer, where, message):
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, quantizer, where)
    with pytest.raises(ValueError, match=message):
        apply(variables, x, mutable=BOTH)


def test_a_model_without_layers_is_an_error():
    model = nn.LayerNorm()
    x = data(6, 4)
    apply = qnn.quantize_inputs(model.apply, counting())
    with pytest.raises(ValueError, match="no layer whose input"):
        apply(init(model, x), x)


@pytest.mark.parametrize("quantizer", [qj.uniform(4), {}, {"a": 3}, None])
def test_what_is_no_input_quantizer_is_an_error(quantizer):
    with pytest.raises(ValueError, match="expected an InputQuantizer"):
        qnn.quantize_inputs(Mlp().apply, quantizer)


def test_a_jitted_apply_is_an_error():
    with pytest.raises(ValueError, match="apply_fn is jitted already"):
        qnn.quantize_inputs(jax.jit(Mlp().apply), counting())


def test_an_unfitted_layer_is_an_error_with_its_path():
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    for mutable in (False, ["quant"], ["batch_stats"]):
        with pytest.raises(ValueError, match=r"Dense_0: .*not fitted.*mutable=\['quant', 'quant_"):
            apply(variables, x, mutable=mutable)


def test_half_a_state_is_an_error():
    def init(x):
        del x
        return qj.QuantState({"alpha": jnp.ones(())}, {"count": jnp.zeros(())})

    quantizer = qj.InputQuantizer(init, lambda x, state, **_: (x, state))
    x = data(6, 4)
    apply, variables, quant = fitted(Mlp(), x, quantizer)
    for mutable in (False, BOTH):
        with pytest.raises(ValueError, match=r"Dense_0: .*lacks \['quant_stats/count'\]"):
            apply({**variables, "quant": quant["quant"]}, x, mutable=mutable)


def test_dtypes_of_inputs():
    model = nn.Dense(3, dtype=jnp.bfloat16)
    x = data(6, 4).astype(jnp.bfloat16)
    apply, variables, quant = fitted(model, x)
    assert quant["quant_stats"]["high"].dtype == jnp.float32
    out, after = apply({**variables, **quant}, x, mutable=["quant_stats"])
    assert out.dtype == jnp.bfloat16
    assert jax.tree.map(lambda a: a.dtype, after) == jax.tree.map(lambda a: a.dtype, quant)

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Dense(2)(nn.Embed(5, 4)(ids)) + nn.Dense(2)(ids[..., None])

    ids = jnp.arange(5)
    apply, variables, quant = fitted(Tokens(), ids, uniform_input(8))
    assert set(quant["quant_stats"]) == {"Dense_0", "Dense_1"}
    assert quant["quant_stats"]["Dense_1"]["high"] == 4
    assert apply({**variables, **quant}, ids).dtype == jnp.float32


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv(2, (3,)), (2, 5, 3)),
        (nn.ConvTranspose(2, (3,)), (2, 5, 3)),
        (nn.DenseGeneral((2, 2), axis=(-2, -1)), (2, 5, 3)),
        (nn.MultiHeadDotProductAttention(2, qkv_features=4), (2, 5, 4)),
    ],
)
def test_every_kind_of_layer(layer, shape):
    x = data(*shape)
    apply, variables, quant = fitted(layer, x, uniform_input(2))
    quantized = apply({**variables, **quant}, x)
    assert not jnp.allclose(quantized, layer.apply(variables, x), atol=1e-3)


def test_the_float_model_is_untouched():
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    run = jax.jit(model.apply)
    before = run(variables, x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(2))
    jax.jit(functools.partial(apply, mutable=BOTH))(variables, x)
    assert jnp.array_equal(run(variables, x), before)
    np.testing.assert_allclose(model.apply(variables, x), before, atol=1e-6)
