"""Quantized layer inputs of NNX models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import quantjax as qj
from quantjax import linen as qlinen
from quantjax import nnx as qnnx
from quantjax.core import rounding
from quantjax.methods.uniform_input import uniform_input

pytestmark = pytest.mark.usefixtures("quick_compilation")


def learned_step(bits=4, noise=0.0):
    """A learned-step quantizer that also counts its updates; with a key it dithers."""
    low, high = -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)

    def init(x):
        step = 2 * jnp.mean(jnp.abs(x)).astype(jnp.float32) / jnp.sqrt(high)
        return qj.QuantState({"step": step}, {"count": jnp.zeros((), jnp.int32)})

    def apply(x, state, *, key=None, update=False):
        y = x.astype(jnp.float32)
        if key is not None:
            y = y + noise * jax.random.normal(key, x.shape)
        y = rounding.nearest_on_grid(y, state.learned["step"], low, high)
        return y.astype(x.dtype), state._replace(buffers={"count": state.buffers["count"] + update})

    return qj.InputQuantizer(init, apply)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(5, 3, rngs=rngs)])

    def __call__(self, x):
        return self.rest[0](nnx.relu(self.first(x)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def data(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def fitted(model, x, quantizer=None, **kwargs):
    model = qnnx.quantize_inputs(model, quantizer or uniform_input(4), **kwargs)
    qnnx.calibrate(model, x)
    return model


def stats(model, kind):
    flat = nnx.to_flat_state(nnx.state(model, kind))
    return {"/".join(map(str, path)): leaf[...] for path, leaf in flat}


def test_values_are_those_of_quantizing_by_hand():
    x, q, model = data(6, 4), uniform_input(3), Mlp(nnx.Rngs(0))
    quantized = fitted(model, x, q)
    quantized.eval()
    y, one = q.apply(x, q.init(x))
    y = nnx.relu(model.first(y))
    y, _ = q.apply(y, q.init(y))
    assert jnp.array_equal(quantized(x), model.rest[0](y))
    found = stats(quantized, qnnx.QuantStat)
    for name, value in one.buffers.items():
        assert found[f"first/promote_dtype/buffers/{name}"] == value
    assert not stats(quantized, qnnx.QuantParam)


def test_the_model_given_stays_float():
    x, model = data(6, 4), Mlp(nnx.Rngs(0))
    before = model(x)
    quantized = fitted(model, x, uniform_input(2))
    assert jnp.array_equal(model(x), before)
    assert not jnp.allclose(quantized(x), before, atol=1e-3)


def test_kernels_keep_their_paths_and_float_checkpoints_load():
    x, model = data(6, 4), Mlp(nnx.Rngs(0))
    quantized = fitted(model, x)
    assert stats(quantized, nnx.Param).keys() == stats(model, nnx.Param).keys()
    learned = fitted(model, x, learned_step())
    added = stats(learned, nnx.Param).keys() - stats(model, nnx.Param).keys()
    steps = {"first/promote_dtype/learned/step", "rest/0/promote_dtype/learned/step"}
    assert added == steps == stats(learned, qnnx.QuantParam).keys()
    other = Mlp(nnx.Rngs(1))
    nnx.update(learned, nnx.state(other))
    assert jnp.array_equal(learned.first.kernel[...], other.first.kernel[...])


def test_training_updates_and_evaluation_does_not():
    x = data(6, 4)
    model = fitted(Mlp(nnx.Rngs(0)), x, learned_step())
    count = functools.partial(stats, model, qnnx.QuantStat)
    model(x)
    assert set(map(int, count().values())) == {1}
    model.eval()
    model(x)
    assert set(map(int, count().values())) == {1}
    qnnx.calibrate(model, [x, x, x])  # fits anew, and counts two updates
    assert set(map(int, count().values())) == {2}
    model.train()
    nnx.jit(lambda model: model(x))(model)
    assert set(map(int, count().values())) == {3}


@pytest.mark.parametrize("evaluating", [True, False])
def test_the_clone_takes_the_mode_of_the_model(evaluating):
    model = Net(nnx.Rngs(0))
    if evaluating:
        model.eval()
    act = qnnx.quantize_inputs(model, uniform_input(4)).conv.promote_dtype
    assert (act.use_running_average, act.deterministic) == (evaluating, evaluating)


def test_jit_grad_and_training():
    x, y = data(32, 4), jnp.sin(data(32, 3, seed=2))
    model = fitted(Mlp(nnx.Rngs(0)), x, learned_step())
    optimizer = nnx.Optimizer(model, optax.sgd(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value, grads

    losses = []
    for _ in range(30):
        value, grads = step(model, optimizer)
        losses.append(float(value))
        if len(losses) == 1:
            assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
            assert len(jax.tree.leaves(grads)) == 6
    assert losses[-1] < losses[0]
    assert set(map(int, stats(model, qnnx.QuantStat).values())) == {30}


def test_split_and_merge():
    x = data(6, 4)
    model = fitted(Mlp(nnx.Rngs(0)), x, learned_step())
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, rest):
        model = nnx.merge(graph, params, rest)
        return model(x), nnx.state(model, qnnx.QuantStat)

    out, after = run(params, rest)
    np.testing.assert_allclose(out, model(x), atol=1e-6)
    assert [int(leaf) for leaf in jax.tree.leaves(after)] == [1, 1]
    again = nnx.clone(model)
    model.eval()
    again.eval()
    assert jnp.array_equal(again(x), model(x))


def test_remat():
    class Rematted(Mlp):
        def __call__(self, x):
            x = nnx.remat(lambda layer, x: nnx.relu(layer(x)))(self.first, x)
            return self.rest[0](x)

    x = data(6, 4)
    plain, remat = (fitted(cls(nnx.Rngs(0)), x, learned_step()) for cls in (Mlp, Rematted))
    grads = [nnx.jit(nnx.grad(lambda m: (m(x) ** 2).sum()))(m) for m in (plain, remat)]
    one, two = map(jax.tree.leaves, grads)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_batch_norm_moves_beside_the_quantizers():
    x = data(4, 6, 6, 2)
    model = Net(nnx.Rngs(0))
    model.eval()
    model = fitted(model, x)
    before = stats(model, nnx.BatchStat), stats(model, qnnx.QuantStat)
    nnx.jit(lambda model: model(x + 1))(model)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, stats(model, nnx.BatchStat), before[0]))
    model.train()
    nnx.jit(lambda model: model(x + 1))(model)
    after = stats(model, nnx.BatchStat), stats(model, qnnx.QuantStat)
    for old, new in zip(before, after, strict=True):
        assert any(not jnp.array_equal(old[path], new[path]) for path in old)


def test_a_shared_layer_has_one_state():
    class Shared(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.same = self.dense

        def __call__(self, x):
            return self.same(self.dense(inputs=x))

    x = data(6, 4)
    model = fitted(Shared(nnx.Rngs(0)), x, learned_step())
    assert stats(model, qnnx.QuantStat) == {"dense/promote_dtype/buffers/count": 1}
    model(x)
    assert stats(model, qnnx.QuantStat) == {"dense/promote_dtype/buffers/count": 3}


def test_patterns_choose_quantizers():
    x, model = data(6, 4), Mlp(nnx.Rngs(0))
    quantizer = {"first": None, "rest/.*": learned_step()}
    for one in (fitted(model, x, quantizer), fitted(model, x, learned_step(), where="rest")):
        assert stats(one, qnnx.QuantStat).keys() == {"rest/0/promote_dtype/buffers/count"}


@pytest.mark.parametrize(
    ("quantizer", "where", "message"),
    [
        (learned_step(), "Linear", r"'Linear' matches no path.*\['first', 'rest/0'\]"),
        ({"second": learned_step()}, ".*", r"'second' matches no path.*'rest/0'"),
        ({".*": learned_step(), "first": None}, ".*", r"'first' is shadowed"),
        (qj.uniform(4), ".*", "expected an InputQuantizer"),
    ],
)
def test_bad_patterns_and_quantizers(quantizer, where, message):
    with pytest.raises(ValueError, match=message):
        qnnx.quantize_inputs(Mlp(nnx.Rngs(0)), quantizer, where)


def test_other_errors():
    x, model = data(6, 4), Mlp(nnx.Rngs(0))
    quantized = qnnx.quantize_inputs(model, uniform_input(4))
    for run in (quantized, nnx.jit(quantized)):
        with pytest.raises(ValueError, match=r"^first: the input quantizer is not fitted; call"):
            run(x)
    with pytest.raises(ValueError, match="at least one batch"):
        qnnx.calibrate(quantized, [])
    with pytest.raises(ValueError, match="the model quantizes no inputs"):
        qnnx.calibrate(model, x)
    with pytest.raises(ValueError, match="first: the inputs of this layer are quantized already"):
        qnnx.quantize_inputs(quantized, uniform_input(4))
    with pytest.raises(ValueError, match="no layer whose input"):
        qnnx.quantize_inputs(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), uniform_input(4))


def test_a_layer_that_is_never_reached_is_an_error():
    class Idle(Mlp):
        def __call__(self, x):
            return self.first(x)

    model = qnnx.quantize_inputs(Idle(nnx.Rngs(0)), uniform_input(4))
    with pytest.raises(ValueError, match=r"saw no input: \['rest/0'\]"):
        qnnx.calibrate(model, data(6, 4))
    assert not model.first.promote_dtype.calibrating


def test_the_model_may_be_a_single_layer():
    x = data(6, 4)
    model = fitted(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), x)
    assert model(x).shape == (6, 3)
    assert stats(model, qnnx.QuantStat)["promote_dtype/buffers/high"] == x.max()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda r: nnx.Conv(3, 2, (3,), rngs=r), (2, 5, 3)),
        (lambda r: nnx.ConvTranspose(3, 2, (3,), rngs=r), (2, 5, 3)),
        (lambda r: nnx.LinearGeneral((5, 3), (2, 2), axis=(-2, -1), rngs=r), (2, 5, 3)),
        (lambda r: nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=r), (2, 5, 4)),
    ],
)
def test_every_kind_of_layer(layer, shape):
    x, layer = data(*shape), layer(nnx.Rngs(0))
    quantized = fitted(layer, x, uniform_input(2))
    assert not jnp.allclose(quantized(x), layer(x), atol=1e-3)


def test_dtypes_of_inputs():
    layer = nnx.Linear(4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = data(6, 4).astype(jnp.bfloat16)
    model = fitted(layer, x)
    assert model(x).dtype == jnp.bfloat16
    assert model.promote_dtype.buffers["high"][...].dtype == jnp.float32
    whole = jnp.arange(24).reshape(6, 4)
    model = fitted(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), whole)
    model.eval()
    assert model(whole).dtype == jnp.float32
    assert model.promote_dtype.buffers["high"][...] == 23


def test_the_rng_stream_makes_training_stochastic():
    x = data(6, 4)
    model = fitted(Mlp(nnx.Rngs(0)), x, learned_step(noise=1.0), rngs=nnx.Rngs(quant=0))
    run = nnx.jit(lambda model: model(x))
    assert not jnp.array_equal(run(model), run(model))
    model.eval()
    assert jnp.array_equal(run(model), run(model))


def test_scanned_layers_have_a_state_each():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))
            self.layers = make(rngs.split(3))

        def __call__(self, x):
            run = nnx.scan(
                lambda x, layer: nnx.relu(layer(x)),
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
            )
            return run(x, self.layers)

    x = data(6, 4)
    model = fitted(Stack(nnx.Rngs(0)), x)
    high = model.layers.promote_dtype.buffers["high"][...]
    assert high.shape == (3,)
    assert high[0] == x.max()
    assert model(x).shape == (6, 4)


def test_one_weight_quantizer_serves_linen_nnx_and_plain_trees():
    class Two(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(5, name="first")(x))
            return linen.Dense(3, name="second")(x)

    class TwoNnx(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 5, rngs=rngs)
            self.second = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    x, weights, acts = data(6, 4), qj.uniform(3), uniform_input(4)
    model = TwoNnx(nnx.Rngs(0))
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    plain = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(state))

    quantized = weights.apply(plain, weights.init(plain))
    on_nnx = weights.apply(state, weights.init(state))
    assert weights.init(state).buffers.keys() == {"first/kernel", "second/kernel"}
    for path in ("first", "second"):
        for leaf in ("kernel", "bias"):
            assert jnp.array_equal(on_nnx[path][leaf][...], quantized[path][leaf])

    linen_apply = qlinen.quantize_inputs(Two().apply, acts)
    variables = {"params": quantized}
    _, stats_linen = linen_apply(variables, x, mutable=["quant", "quant_stats"])
    nnx_model = fitted(nnx.merge(graph, on_nnx, rest), x, acts)
    nnx_model.eval()
    assert jnp.array_equal(linen_apply({**variables, **stats_linen}, x), nnx_model(x))
