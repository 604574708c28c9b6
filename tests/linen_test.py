"""Quantized layer inputs of Linen models: the interceptor, its state, and the fitting passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import quantjax as qj
from quantjax import lineage
from quantjax import linen as qnn
from quantjax.core import rounding
from quantjax.methods.uniform import uniform_input

BOTH = ["quant", "quant_stats"]


def learned_step(bits=4, noise=0.0):
    """A learned-step quantizer without buffers; with a key it dithers before rounding."""
    low, high = -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)

    def init(x):
        step = 2 * jnp.mean(jnp.abs(x)).astype(jnp.float32) / jnp.sqrt(high)
        return qj.QuantState({"step": step}, {})

    def apply(x, state, *, key=None, update=False):
        del update
        y = x.astype(jnp.float32)
        if key is not None:
            y = y + noise * jax.random.normal(key, x.shape)
        y = rounding.nearest_on_grid(y, state.learned["step"], low, high)
        return y.astype(x.dtype), state

    return qj.InputQuantizer(init, apply)


def counting():
    """Passes x through and counts its updates: tells which calls updated, and how often."""

    def init(x):
        del x
        return qj.QuantState({}, {"count": jnp.zeros((), jnp.int32)})

    def apply(x, state, *, key=None, update=False):
        del key
        return x, state._replace(buffers={"count": state.buffers["count"] + update})

    return qj.InputQuantizer(init, apply)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(3)(x)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(2)(x.mean((1, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(x.shape[-1])(x)), None


def stack(axes, rngs=("params",)):
    split = dict.fromkeys(rngs, True)
    return nn.scan(Block, variable_axes=axes, split_rngs=split, length=3)


class Scanned(nn.Module):
    axes: tuple = ("params", "quant", "quant_stats")
    rngs: tuple = ("params",)

    @nn.compact
    def __call__(self, x):
        return stack(dict.fromkeys(self.axes, 0), self.rngs)()(x)[0]


def data(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def init(model, x, **kwargs):
    return jax.jit(functools.partial(model.init, **kwargs))(jax.random.key(1), x)


def fitted(model, x, quantizer=None, **kwargs):
    variables = init(model, x, **kwargs)
    apply = qnn.quantize_inputs(model.apply, quantizer or uniform_input(4))
    return apply, variables, apply(variables, x, mutable=BOTH, **kwargs)[1]


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


def test_the_float_model_is_untouched():
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    run = jax.jit(model.apply)
    before = run(variables, x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(2))
    jax.jit(functools.partial(apply, mutable=BOTH))(variables, x)
    assert jnp.array_equal(run(variables, x), before)
    np.testing.assert_allclose(model.apply(variables, x), before, atol=1e-6)


def test_calibrate_fits_first_and_updates_after():
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4, momentum=0.25))
    out = qnn.calibrate(apply, variables, iter([x, 2 * x]))
    high = out["quant_stats"]["Dense_0"]["high"]
    np.testing.assert_allclose(high, 1.25 * x.max(), rtol=1e-6)
    again = qnn.calibrate(apply, out, x)
    np.testing.assert_allclose(
        again["quant_stats"]["Dense_0"]["high"], 0.75 * high + 0.25 * x.max(), rtol=1e-6
    )
    assert jnp.array_equal(
        qnn.calibrate(apply, variables, x)["quant_stats"]["Dense_0"]["high"], x.max()
    )
    with pytest.raises(ValueError, match="at least one batch"):
        qnn.calibrate(apply, variables, [])
    with pytest.raises(ValueError, match="quantizes no inputs"):
        qnn.calibrate(model.apply, variables, x)


# Ranges from batch norm.


class ResBlock(nn.Module):
    """Two convolutions with batch norm; the first block's shortcut is a strided 1x1 conv."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, norm):
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if self.strides > 1:
            x = norm(name="down_norm")(nn.Conv(self.features, (1, 1), 2, name="down")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    block: type = ResBlock

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm(name="stem_norm")(nn.Conv(4, (3, 3), name="stem")(x)))
        x = self.block(4, name="a")(x, norm)
        x = self.block(8, 2, name="b")(x, norm)
        x = nn.swish(norm(name="head_norm")(nn.Conv(8, (1, 1), name="mix")(x)))
        x = nn.Dense(6, name="pre")(x.mean((1, 2)))
        return nn.Dense(3, name="head")(nn.relu(x))


def random_norms(variables, seed=0):
    """Batch norm parameters of both signs."""
    rng = np.random.default_rng(seed)

    def change(path, leaf):
        if path[-1].key in ("scale", "bias") and "norm" in path[-2].key.lower():
            return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return leaf

    return {**variables, "params": jax.tree_util.tree_map_with_path(change, variables["params"])}


def fed(model, x, **kwargs):
    """The layers fed by one batch norm alone; nothing is run."""
    variables = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), x)
    return qnn._fed_by_one_batch_norm(model.apply, variables, x, kwargs)


REMAT = nn.remat(ResBlock, static_argnums=(2,))


def test_remat_does_not_hide_what_an_input_is_made_of():
    x = data(4, 8, 8, 3)
    paths = {"a/Conv_0", "a/Conv_1", "b/Conv_1", "pre"}
    assert fed(ResNet(), x, train=False) == fed(ResNet(REMAT), x, train=False) == paths


def test_batch_norm_ranges_of_a_residual_net():
    x, model, n = data(4, 8, 8, 3), ResNet(REMAT), 3.0
    variables = random_norms(init(model, x, train=False))
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    seen = qnn.calibrate(apply, variables, [x, 1.5 * x], train=False)
    out = qnn.calibrate_batch_norm(apply, seen, x, n, train=False)
    assert {*out} == {*variables, "quant_stats"}
    new, old = out["quant_stats"], seen["quant_stats"]

    def norm(*path):
        p = functools.reduce(dict.get, path, variables["params"])
        return p["bias"] - n * jnp.abs(p["scale"]), p["bias"] + n * jnp.abs(p["scale"])

    by_norm = {
        ("a", "Conv_0"): ("stem_norm",),  # through the block's argument
        ("a", "Conv_1"): ("a", "BatchNorm_0"),
        ("b", "Conv_1"): ("b", "BatchNorm_0"),
    }
    for path, source in by_norm.items():
        stats = functools.reduce(dict.get, path, new)
        assert stats["low"] == 0
        np.testing.assert_allclose(stats["high"], jnp.maximum(norm(*source)[1].max(), 0), rtol=1e-6)
        np.testing.assert_allclose(stats["step"], stats["high"] / 15, rtol=1e-6)
    # Swish and a mean over equal values: the walk from low to high is sampled at four rows.
    low, high = norm("head_norm")
    walk = nn.swish(jnp.linspace(low, high, 4))
    np.testing.assert_allclose(new["pre"]["high"], walk.max(), rtol=1e-5)
    np.testing.assert_allclose(new["pre"]["low"], jnp.minimum(walk.min(), 0), rtol=1e-5)
    # Images, residual sums, and what follows a layer without batch norm keep what was seen.
    kept = [("stem",), ("b", "Conv_0"), ("b", "down"), ("mix",), ("head",)]
    for path in kept:
        stats = functools.reduce(dict.get, path, new)
        before = functools.reduce(dict.get, path, old)
        assert all(jnp.array_equal(stats[name], before[name]) for name in before), path
    count = sum(len(v) if "low" not in v else 1 for v in new.values())
    assert len(by_norm) + 1 + len(kept) == count


def test_batch_norm_ranges_without_calibration_fit_the_rest_to_x():
    x, model = data(4, 6, 6, 2), Norm()
    variables = init(model, x, train=False)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    run = functools.partial(qnn.calibrate_batch_norm, apply, train=False)
    out = jax.jit(run)(variables, x)["quant_stats"]
    assert out["Conv_0"]["high"] == x.max()
    np.testing.assert_allclose(out["Dense_0"]["high"], 6, rtol=1e-6)
    assert out["Dense_0"]["low"] == 0


class Line(nn.Module):
    """Applies `wire(norm, x)` between a batch norm (twice on demand) and a last layer."""

    wire: callable
    use_scale: bool = True
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(
            use_running_average=True, use_scale=self.use_scale, dtype=self.dtype, name="norm"
        )
        other = nn.BatchNorm(use_running_average=True, name="other")
        return nn.Dense(2, name="out")(self.wire(self, norm, other, x))


WIRES = {
    "straight": (True, lambda m, norm, other, x: norm(x)),
    "leaky": (True, lambda m, norm, other, x: nn.leaky_relu(norm(x))),
    "doubled": (True, lambda m, norm, other, x: (lambda y: y + nn.relu(y))(norm(x))),
    "learned slope": (True, lambda m, norm, other, x: nn.PReLU(name="slope")(norm(x))),
    "pooled": (True, lambda m, norm, other, x: nn.avg_pool(norm(x)[:, None], (1, 1))[:, 0]),
    "norm of norm": (True, lambda m, norm, other, x: other(norm(x) + x)),
    "jitted": (True, lambda m, norm, other, x: jax.jit(nn.gelu)(norm(x))),
    "remat": (True, lambda m, norm, other, x: jax.checkpoint(nn.silu)(norm(x))),
    "residual": (False, lambda m, norm, other, x: norm(x) + x),
    "gated": (False, lambda m, norm, other, x: norm(x) * nn.sigmoid(x)),
    "sum of two": (False, lambda m, norm, other, x: norm(x) + other(x)),
    "twice": (False, lambda m, norm, other, x: norm(x) + norm(2 * x)),
    "matrix": (False, lambda m, norm, other, x: norm(x) @ jnp.ones((4, 4))),
    "layer": (False, lambda m, norm, other, x: nn.relu(nn.Dense(4)(norm(x)))),
    "loop": (True, lambda m, norm, other, x: jax.lax.fori_loop(0, 2, lambda i, y: y + 1, norm(x))),
    "search": (
        False,
        lambda m, norm, other, x: jax.lax.while_loop(
            lambda y: y.max() > 1, lambda y: y / 2, norm(x)
        ),
    ),
}


@pytest.mark.parametrize("name", WIRES)
def test_what_counts_as_fed_by_one_batch_norm(name):
    expected, wire = WIRES[name]
    assert ("out" in fed(Line(wire), data(8, 4))) == expected


def test_arrays_among_the_further_arguments_are_data():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, bias):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x) + bias)

    x = data(8, 4)
    assert fed(Model(), x, bias=1.0) == {"Dense_0"}
    assert fed(Model(), x, bias=data(8, 4)) == set()


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"dtype": jnp.bfloat16}])
def test_the_low_side_is_fitted_too(options):
    x, model = data(8, 4), Line(WIRES["straight"][1], **options)
    variables = random_norms(init(model, x))
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    stats = qnn.calibrate_batch_norm(apply, variables, x, n=2)["quant_stats"]["out"]
    norm = variables["params"]["norm"]
    spread = 2 * jnp.abs(norm.get("scale", jnp.ones(4)))
    tolerance = 1e-2 if "dtype" in options else 1e-6
    np.testing.assert_allclose(stats["high"], (norm["bias"] + spread).max(), rtol=tolerance)
    np.testing.assert_allclose(stats["low"], (norm["bias"] - spread).min(), rtol=tolerance)


def test_other_feature_axes():
    class Channels(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, axis=(1, 2))(x)
            return nn.Dense(2)(nn.relu(x))

    x, model = data(8, 3, 4), Channels()
    variables = random_norms(init(model, x))
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    out = qnn.calibrate_batch_norm(apply, variables, x, n=2)
    norm = variables["params"]["BatchNorm_0"]
    expected = (norm["bias"] + 2 * jnp.abs(norm["scale"])).max()
    np.testing.assert_allclose(out["quant_stats"]["Dense_0"]["high"], expected, rtol=1e-6)


class PreNorm(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return x + nn.Dense(4)(y), None


class PostNorm(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))), None


@pytest.mark.parametrize(("block", "by_itself"), [(PreNorm, True), (PostNorm, False)])
def test_scanned_blocks(block, by_itself):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = dict.fromkeys(("params", "batch_stats", *BOTH), 0)
            scanned = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=3)
            x = scanned(name="blocks")(x)[0]
            return nn.Dense(2, name="out")(nn.BatchNorm(use_running_average=True)(x))

    x, model = data(8, 4), Model()
    variables = random_norms(init(model, x))
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    seen = qnn.calibrate(apply, variables, x)
    out = qnn.calibrate_batch_norm(apply, seen, x, n=2)["quant_stats"]["blocks"]["Dense_0"]
    norm = variables["params"]["blocks"]["BatchNorm_0"]
    by_norm = jnp.maximum((norm["bias"] + 2 * jnp.abs(norm["scale"])).max(-1), 0)
    observed = seen["quant_stats"]["blocks"]["Dense_0"]["high"]
    np.testing.assert_allclose(out["high"], by_norm if by_itself else observed, rtol=1e-6)


def test_learned_steps_are_refitted():
    x, model = data(8, 4), Line(WIRES["leaky"][1])
    variables = random_norms(init(model, x))
    apply = qnn.quantize_inputs(model.apply, learned_step())
    seen = qnn.calibrate(apply, variables, x)
    out = qnn.calibrate_batch_norm(apply, seen, x)
    assert out["quant"]["out"]["step"] > seen["quant"]["out"]["step"]
    assert "quant_stats" not in out


def test_bad_arguments_of_the_fitting_pass():
    x, model = data(8, 4), Line(WIRES["straight"][1])
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    with pytest.raises(ValueError, match="n must be positive, got 0"):
        qnn.calibrate_batch_norm(apply, variables, x, n=0)
    with pytest.raises(ValueError, match=r"norm: .*at least two examples"):
        qnn.calibrate_batch_norm(apply, variables, x[:1])
    with pytest.raises(ValueError, match="quantizes no inputs"):
        qnn.calibrate_batch_norm(model.apply, variables, x)
    with pytest.raises(ValueError, match="apply is jitted already"):
        qnn.calibrate_batch_norm(jax.jit(apply), variables, x)
    residual = qnn.quantize_inputs(Line(WIRES["residual"][1]).apply, uniform_input(4))
    with pytest.raises(ValueError, match="nothing to fit to"):
        qnn.calibrate_batch_norm(residual, variables, x)


def test_the_search_takes_the_best_n_of_training_data():
    x, model = data(8, 4), Line(WIRES["straight"][1])
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    target = model.apply(variables, x)
    scores = {}

    def score(fitted):
        n = float(fitted["quant_stats"]["out"]["high"])
        scores[n] = -float(jnp.mean((apply(fitted, x) - target) ** 2))
        return scores[n]

    fitted, n = qnn.search_batch_norm_range(apply, variables, x, score, (1.0, 2.0, 3.0, 9.0))
    assert list(scores) == [1.0, 2.0, 3.0, 9.0]
    assert n == max(scores, key=scores.get)
    assert fitted["quant_stats"]["out"]["high"] == n
    assert fitted["params"] is variables["params"]
    worst = qnn.search_batch_norm_range(apply, variables, x, lambda v: np.nan, (4, 5))
    assert worst[1] == 4
    with pytest.raises(ValueError, match="at least one candidate"):
        qnn.search_batch_norm_range(apply, variables, x, score, ())


def test_lineage_of_a_plain_program():
    def f(w, x):
        a = lineage.mark(w * x, "a")
        b = lineage.mark(x, "b")
        lineage.look(a + w, "one")
        lineage.look(a + b, "two")
        lineage.look(jax.nn.relu(w), "none")
        lineage.look(x, "data")
        return jax.lax.cond(True, lambda y: y, lambda y: -y, a)

    jaxpr = jax.make_jaxpr(f)(1.0, 2.0).jaxpr
    found = lineage.trace(jaxpr, [frozenset(), frozenset({lineage.DATA})])
    assert found == {
        "one": [{"a"}],
        "two": [{"a", "b"}],
        "none": [frozenset()],
        "data": [{lineage.DATA}],
    }
