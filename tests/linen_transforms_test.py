"""Quantized inputs under Flax's and JAX's transformations, and with random keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import quantjax as qj
from quantjax import linen as qnn
from quantjax.methods.uniform_input import uniform_input
from tests.linen_toys import (
    BOTH,
    Mlp,
    Scanned,
    counting,
    data,
    fitted,
    init,
    learned_step,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_remat_agrees_with_the_plain_model():
    x = data(6, 4)

    class Rematted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(nn.Dense)(5, name="Dense_0")(x)
            return nn.remat(nn.Dense)(3, name="Dense_1")(inputs=nn.relu(x))

    q = uniform_input(3)
    plain, variables, quant = fitted(Mlp(), x, q)
    for model in (Rematted(), nn.remat(Mlp)()):
        apply = qnn.quantize_inputs(model.apply, q)
        _, other = apply(variables, x, mutable=BOTH)
        assert jax.tree.all(jax.tree.map(jnp.allclose, other, quant))
        _, other = apply({**variables, **quant}, x, mutable=["quant_stats"])
        assert jax.tree.structure(other) == jax.tree.structure(quant)

        def loss(params, apply):
            return jnp.sum(apply({"params": params, **quant}, x) ** 2)

        grads = [jax.jit(jax.grad(functools.partial(loss, apply=f))) for f in (plain, apply)]
        one, two = (g(variables["params"]) for g in grads)
        assert jax.tree.all(jax.tree.map(functools.partial(jnp.allclose, atol=1e-5), one, two))


@pytest.mark.parametrize("quantizer", [uniform_input(4), learned_step()])
def test_scan_keeps_one_state_per_layer(quantizer):
    x = data(6, 4)
    apply, variables, quant = fitted(Scanned(), x, quantizer)
    params = variables["params"]["ScanBlock_0"]["Dense_0"]
    for leaf in jax.tree.leaves(quant):
        assert leaf.shape == (3,)
    expected, updated = x, []
    for i in range(3):
        state = [
            {k: v[i] for k, v in quant[c]["ScanBlock_0"]["Dense_0"].items()} if c in quant else {}
            for c in BOTH
        ]
        expected, new = quantizer.apply(expected, qj.QuantState(*state), update=True)
        updated.append(new.buffers)
        expected = nn.relu(expected @ params["kernel"][i] + params["bias"][i][None])
    np.testing.assert_allclose(apply({**variables, **quant}, x), expected, atol=1e-5)
    _, after = apply({**variables, **quant}, x, mutable=["quant_stats"])
    if "quant_stats" in quant:
        after = after["quant_stats"]["ScanBlock_0"]["Dense_0"]
        for name, leaf in after.items():
            np.testing.assert_allclose(leaf, [u[name] for u in updated], rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda p: apply({"params": p, **quant}, x).sum())(variables["params"])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("axes", [("params",), ("params", "quant")])
def test_scan_without_the_collections_says_what_to_name(axes):
    x, model = data(6, 4), Scanned(axes)
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    with pytest.raises(ValueError, match=r"ScanBlock_0/Dense_0: .*variable_axes must name both"):
        apply(variables, x, mutable=BOTH)


def test_a_vmapped_layer_has_a_state_per_member():
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = dict.fromkeys(("params", *BOTH), 0)
            heads = nn.vmap(nn.Dense, variable_axes=axes, split_rngs={"params": True})
            return heads(3)(x)

    x = data(5, 6, 4)
    apply, variables, quant = fitted(Heads(), x)
    high = quant["quant_stats"]["VmapDense_0"]["high"]
    np.testing.assert_array_equal(high, x.max((1, 2)))
    assert apply({**variables, **quant}, x).shape == (5, 6, 3)


def test_vmap_and_jit_over_the_function():
    x = data(6, 4)
    apply, variables, quant = fitted(Mlp(), x)
    variables = {**variables, **quant}
    one = jax.vmap(lambda row: apply(variables, row))(x)
    np.testing.assert_allclose(one, apply(variables, x), atol=1e-6)
    _, states = jax.vmap(lambda b: apply(variables, b, mutable=["quant_stats"]))(data(3, 6, 4))
    assert states["quant_stats"]["Dense_0"]["high"].shape == (3,)


def test_setup_layers_shared_layers_and_keyword_inputs():
    class Shared(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)
            self.out = nn.Dense(2)

        def __call__(self, x):
            return self.out(inputs=self.dense(inputs=self.dense(x)))

    x = data(6, 4)
    apply, variables, quant = fitted(Shared(), x, counting())
    stats = quant["quant_stats"]
    assert (stats["dense"]["count"], stats["out"]["count"]) == (1, 0)
    _, after = apply({**variables, **quant}, x, mutable=["quant_stats"])
    assert after["quant_stats"]["dense"]["count"] == 3


def test_a_subclass_that_calls_super_quantizes_once():
    class Standardized(nn.Dense):
        def __call__(self, values):
            return super().__call__(values)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = Standardized(4)
            return layer(values=layer(x))

    x = data(6, 4)
    apply, variables, quant = fitted(Model(), x, counting())
    _, after = apply({**variables, **quant}, x, mutable=["quant_stats"])
    assert after["quant_stats"]["Standardized_0"]["count"] == 3


def test_methods_partial_calls_and_init():
    class Coder(nn.Module):
        def setup(self):
            self.encoder = nn.Dense(2)
            self.decoder = nn.Dense(4)

        def __call__(self, x):
            return self.decoder(self.encoder(x))

        def encode(self, x):
            return self.encoder(x)

    x, model = data(6, 4), Coder()
    variables = qnn.quantize_inputs(model.init, uniform_input(4))(jax.random.key(0), x)
    assert set(variables) == {"params", "quant_stats"}
    for quantizer in (uniform_input(4), {"encoder": uniform_input(4), "decoder": uniform_input(4)}):
        apply = qnn.quantize_inputs(model.apply, quantizer)
        assert apply(variables, x, method="encode").shape == (6, 2)
    apply = qnn.quantize_inputs(model.apply, {"decoder": None, ".*": uniform_input(4)})
    assert apply(variables, x, method=Coder.encode).shape == (6, 2)
    apply = qnn.quantize_inputs(model.apply, {"nowhere": uniform_input(4), ".*": None})
    with pytest.raises(ValueError, match="'nowhere' matches no path"):
        apply(variables, x, method="encode")


def test_the_model_may_be_a_single_layer():
    x = data(6, 4)
    apply, variables, quant = fitted(nn.Dense(3), x)
    assert set(quant["quant_stats"]) >= {"low", "high"}
    assert apply({**variables, **quant}, x).shape == (6, 3)


def test_the_rng_stream_makes_the_pass_stochastic():
    x = data(6, 4)
    apply, variables, quant = fitted(Mlp(), x, learned_step(noise=1.0))
    variables = {**variables, **quant}
    run = [apply(variables, x, rngs={"quant": jax.random.key(i)}) for i in (0, 0, 1)]
    assert jnp.array_equal(run[0], run[1])
    assert not jnp.array_equal(run[0], run[2])
    params_only = apply(variables, x, rngs={"params": jax.random.key(0)})
    assert jnp.array_equal(params_only, apply(variables, x))


def test_two_layers_get_two_keys():
    keys = []

    def apply(x, state, *, key=None, update=False):
        del update
        keys.append(key)
        return x, state

    quantizer = qj.InputQuantizer(lambda x: qj.QuantState({}, {}), apply)
    model, x = Mlp(), data(6, 4)
    variables = init(model, x)
    qnn.quantize_inputs(model.apply, quantizer)(variables, x, rngs={"quant": jax.random.key(0)})
    assert not jnp.array_equal(*map(jax.random.key_data, keys))


def test_a_scan_that_stops_the_rng_stream_is_an_error():
    x = data(6, 4)
    key = {"quant": jax.random.key(0)}
    apply, variables, quant = fitted(Scanned(), x)
    with pytest.raises(ValueError, match=r"ScanBlock_0/Dense_0: .*split_rngs must name it"):
        apply({**variables, **quant}, x, rngs=key)
    apply, variables, quant = fitted(Scanned(rngs=("params", "quant")), x)
    assert apply({**variables, **quant}, x, rngs=key).shape == (6, 4)


def test_nn_jit_is_an_error():
    x, model = data(6, 4), nn.jit(Mlp)()
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, counting())
    with pytest.raises(ValueError, match=r"Dense_0: nn.jit keeps compiled programs"):
        apply(variables, x, mutable=BOTH)
