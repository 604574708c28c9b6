"""Batch norms of NNX models: statistics measured anew, and folding into the layer before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import quantjax as qj
from quantjax import nnx as qnnx
from tests import quick

pytestmark = pytest.mark.usefixtures("quick_compilation")

EPSILON = 1e-5


def data(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


class Net(nnx.Module):
    def __init__(self, rngs, **kwargs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, **kwargs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.hidden = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(5, rngs=rngs, **kwargs)])
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.out(nnx.relu(self.norms[0](self.hidden(self.drop(x)))))


class Line(nnx.Module):
    """wire(model, x) with layers of four channels, in evaluation mode."""

    def __init__(self, wire, layer=None, **kwargs):
        rngs = nnx.Rngs(0)
        self.wire = wire
        self.layer = layer(rngs) if layer else nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs, **kwargs)
        self.other = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.more = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.wire(self, x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, momentum=0.0)

    def __call__(self, x):
        return nnx.relu(self.norm(self.layer(x)))


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.vmap(Block)(rngs.split(3))

    def __call__(self, x):
        axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
        return nnx.scan(lambda x, block: block(x), **axes)(x, self.blocks)


def randomized(model, seed=0):
    """Statistics and parameters of a trained network, as it were; scales of both signs."""
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        for name in ("bias", "mean"):
            if isinstance(variable := getattr(module, name, None), nnx.Variable):
                variable[...] = jnp.asarray(rng.normal(size=variable.shape), variable.dtype)
        for name in ("var", "scale"):
            if isinstance(variable := getattr(module, name, None), nnx.Variable):
                sign = rng.choice([-1, 1], variable.shape) if name == "scale" else 1
                drawn = rng.uniform(0.3, 3, variable.shape) * sign
                variable[...] = jnp.asarray(drawn, variable.dtype)
    return model


def stats(norm):
    return {"mean": norm.mean[...], "var": norm.var[...]}


def union_of(stats, sizes):
    n = np.asarray(sizes, np.float64)[:, None] / sum(sizes)
    mean, var = (np.stack([np.asarray(s[k], np.float64) for s in stats]) for k in ("mean", "var"))
    center = (n * mean).sum(0)
    return {"mean": center, "var": (n * (var + (mean - center) ** 2)).sum(0)}


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, dict(found), dict(expected))


def values(model):
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {"/".join(map(str, path)): leaf[...] for path, leaf in flat}


# Statistics measured anew.


def test_statistics_are_those_of_all_data():
    model, x = randomized(Net(nnx.Rngs(0))), 3 * data(9, 5, 5, 2) + 1
    before, batches = values(model), [x[:6], x[6:]]
    out = qnnx.reestimate_batch_norm(model, iter(batches))
    assert type(out) is type(model)
    y = np.asarray(model.conv(x), np.float64).reshape(-1, 4)
    assert_close(stats(out.norm), {"mean": y.mean(0), "var": y.var(0)})
    # Behind it, as Flax finds them in training without momentum and dropout.
    trained = nnx.clone(model)
    trained.set_attributes(momentum=0.0)
    trained.drop.deterministic = True
    run, found = nnx.jit(lambda model, x: model(x)), []
    for batch in batches:
        run(trained, batch)
        found.append(stats(trained.norms[0]))
    assert_close(stats(out.norms[0]), union_of(found, [6, 3]))
    after = values(out)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, values(model), before))
    for path, value in before.items():
        assert jnp.array_equal(after[path], value) != path.endswith(("mean", "var"))


def test_modes_and_attributes_are_the_models():
    model, x = Net(nnx.Rngs(0), momentum=0.7), data(6, 5, 5, 2)
    for evaluating in (False, True):
        model.set_attributes(deterministic=evaluating, use_running_average=evaluating)
        out = qnnx.reestimate_batch_norm(model, x)
        assert (out.norm.use_running_average, out.drop.deterministic) == (evaluating, evaluating)
        assert (out.norm.momentum, out.norm.use_fast_variance) == (0.7, True)
        assert nnx.graphdef(out) == nnx.graphdef(model)


def test_calls_in_one_pass_and_shared_norms_are_one_union():
    def wire(model, x):
        return model.norm(x), model.same(5 * x[:3] + 1, use_running_average=True)

    x, model = data(8, 4), Line(wire)
    model.same = model.norm
    out = qnnx.reestimate_batch_norm(model, [x, 2 * x])
    parts = [np.asarray(p, np.float64) for p in (x, 2 * x)]
    parts = np.concatenate([part for p in parts for part in (p, 5 * p[:3] + 1)])
    assert_close(stats(out.norm), {"mean": parts.mean(0), "var": parts.var(0)})
    assert out.same is out.norm
    assert out.other.mean[...] is model.other.mean[...]


def test_stacked_layers_have_statistics_each():
    model, x = randomized(Stack(nnx.Rngs(0))), data(9, 4)
    out = qnnx.reestimate_batch_norm(model, [x[:6], x[6:]])
    found = []
    for batch in (x[:6], x[6:]):
        trained = nnx.clone(model)
        trained(batch)
        found.append(stats(trained.blocks.norm))
    for i in range(3):
        expected = union_of([{k: v[i] for k, v in s.items()} for s in found], [6, 3])
        assert_close({k: v[i] for k, v in stats(out.blocks.norm).items()}, expected)


def test_batch_norms_run_by_vmap():
    class Members(nnx.Module):
        def __init__(self, rngs):
            self.members = nnx.vmap(Block)(rngs.split(3))

        def __call__(self, x):
            return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.members, x)

    x, model = data(6, 4), Members(nnx.Rngs(0))
    out = qnnx.reestimate_batch_norm(model, x)
    kernels, biases = (getattr(model.members.layer, name)[...] for name in ("kernel", "bias"))
    y = jnp.einsum("ni,mio->mno", x, kernels) + biases[:, None]
    assert_close(stats(out.members.norm), {"mean": y.mean(1), "var": y.var(1)})
    with pytest.raises(ValueError, match=r"members/norm: .*members/layer is under vmap"):
        qnnx.fold_batch_norm(model, x)


def test_quantized_and_packed_models():
    plain = Line(lambda m, x: m.other(m.more(nnx.relu(m.norm(m.layer(x))))))
    model, x = randomized(plain), data(16, 4)
    quantized = qnnx.quantize_inputs(model, qj.uniform_input(2))
    qnnx.calibrate(quantized, x)
    params, quantizer = nnx.state(quantized, nnx.Param), qj.uniform(4)
    encoded = quantizer.encode(params, quantizer.init(params))
    packed = qnnx.packed(quantized, qj.pack(encoded))
    before = nnx.state(packed, qnnx.QuantStat)
    packed.train()  # quantizers would move
    out = qnnx.reestimate_batch_norm(packed, [x, 3 * x])
    after = nnx.state(out, qnnx.QuantStat)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, after, before))
    found = []
    for batch in (x, 3 * x):
        packed.eval()
        for norm in (packed.norm, packed.other):
            norm.use_running_average, norm.momentum = False, 0.0
        packed(batch)
        found.append(stats(packed.other))
    assert_close(stats(out.other), union_of(found, [16, 16]), rtol=1e-4)
    with pytest.raises(ValueError, match="layer: its kernel is no array of floats"):
        qnnx.fold_batch_norm(packed, x)


def test_models_that_quantize_their_weights():
    model, x = randomized(Line(straight)), data(16, 4)
    model = qnnx.quantize_weights(model, qj.uniform(3))
    out = qnnx.reestimate_batch_norm(model, [x, 2 * x])
    layer = nnx.clone(model.model.layer)
    layer.kernel[...] = qj.decode(model.encode())["layer"]["kernel"]
    y = np.asarray(layer(jnp.concatenate([x, 2 * x])), np.float64)
    assert_close(stats(out.model.norm), {"mean": y.mean(0), "var": y.var(0)})
    with pytest.raises(ValueError, match="model/layer/kernel is read elsewhere, too, or changed"):
        qnnx.fold_batch_norm(model, x)


def test_subclasses():
    class Own(nnx.BatchNorm):
        def __call__(self, values, train):
            return super().__call__(2 * values, use_running_average=not train)

    x, model = data(8, 4), Line(lambda model, x: model.norm(x, False))
    model.norm = Own(4, rngs=nnx.Rngs(0))
    out = qnnx.reestimate_batch_norm(model, [x, x + 1])
    np.testing.assert_allclose(out.norm.mean[...], 2 * x.mean(0) + 1, rtol=1e-5)
    assert type(out.norm) is Own


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_sharded_batches(kind):
    x, model = data(16, 4), randomized(Line(lambda m, x: m.other(m.more(m.norm(m.layer(x))))))
    expected = stats(qnnx.reestimate_batch_norm(model, [x, 2 * x]).other)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    nnx.update(model, jax.device_put(nnx.state(model), everywhere))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    out = qnnx.reestimate_batch_norm(model, [spread, 2 * spread])
    assert_close(stats(out.other), expected)
    assert out.norm.mean[...].sharding == everywhere
    assert jax.typeof(out.norm.mean[...]) == jax.typeof(model.norm.mean[...])


def test_statistics_under_jit():
    x, model = data(8, 4), Line(lambda model, x: model.norm(x))
    model.norm.mean[...] = jnp.ones(4)
    out = nnx.jit(lambda model, x: stats(qnnx.reestimate_batch_norm(model, x).norm))(model, x)
    assert_close(out, {"mean": x.mean(0), "var": x.var(0)})
    assert jnp.array_equal(model.norm.mean[...], jnp.ones(4))


def test_bad_arguments_of_the_statistics():
    x, model = data(8, 4), Line(lambda model, x: model.norm(x))
    with pytest.raises(ValueError, match="at least one batch"):
        qnnx.reestimate_batch_norm(model, [])
    with pytest.raises(ValueError, match=r"norm: an input of shape \(1, 4\) gives .*two or more"):
        qnnx.reestimate_batch_norm(model, x[:1])
    with pytest.raises(ValueError, match=r"NaN or infinite: \['norm'\]"):
        qnnx.reestimate_batch_norm(model, x.at[2, 2].set(jnp.inf))
    with pytest.raises(ValueError, match=r"ran none of its batch norms: \['norm', 'other'\]"):
        qnnx.reestimate_batch_norm(Line(lambda model, x: model.layer(x)), x)
    with pytest.raises(ValueError, match=r"has no nnx\.BatchNorm"):
        qnnx.reestimate_batch_norm(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), x)
    for name in ("reestimate_batch_norm", "fold_batch_norm"):
        with pytest.raises(ValueError, match=rf"an NNX model, got 3; .*quantjax.linen.{name}"):
            getattr(qnnx, name)(3, x)


# Folding.


def folded_norms(model):
    """The batch norms that only add: paths of those that divide and multiply by the same."""
    return {
        "/".join(map(str, path))
        for path, norm in nnx.iter_modules(model)
        if isinstance(norm, nnx.BatchNorm)
        and np.allclose(
            1 if norm.scale is None else norm.scale[...], np.sqrt(norm.var[...] + EPSILON), 1e-6
        )
    }


def check_folding(model, x, close=1e-5):
    """Folds random statistics in, compares the outputs, and returns what was folded."""
    randomized(model)
    before = values(model)
    out = qnnx.fold_batch_norm(model, x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, values(model), before))
    assert jax.tree.map(jax.typeof, values(out)) == jax.tree.map(jax.typeof, before)
    assert nnx.graphdef(out) == nnx.graphdef(model)
    run = quick.jit(lambda state: nnx.merge(nnx.graphdef(evaluating), state)(x))
    found = []
    for evaluating in (nnx.clone(model), nnx.clone(out)):
        evaluating.eval()
        found.append(np.asarray(run(nnx.state(evaluating)), np.float64))
    assert np.abs(found[1] - found[0]).max() <= close * np.abs(found[0]).max()
    return folded_norms(out)


def straight(model, x):
    return nnx.relu(model.norm(model.layer(x)))


def conv(kind=nnx.Conv, **kwargs):
    return lambda rngs: kind(4, 4, (3,), rngs=rngs, **kwargs)


FOLDS = {
    "linear": (straight, {}),
    "without bias": (straight, {"use_bias": False}),
    "statistics alone": (straight, {"use_bias": False, "use_scale": False}),
    "convolution": (straight, {"layer": conv()}),
    "groups": (straight, {"layer": conv(feature_group_count=4, use_bias=False)}),
    "transposed": (straight, {"layer": conv(nnx.ConvTranspose, strides=(2,))}),
    "keyword": (lambda model, x: model.norm(x=model.layer(inputs=x)), {}),
    "dropout between": (lambda model, x: model.norm(model.drop(model.layer(x))), {}),
    "jitted": (lambda model, x: nnx.jit(straight)(model, x), {}),
    "rematted": (lambda model, x: nnx.remat(straight)(model, x), {}),
}


@pytest.mark.parametrize("name", FOLDS)
def test_what_is_folded(name):
    wire, kwargs = FOLDS[name]
    assert check_folding(Line(wire, **kwargs), data(3, 6, 4)) == {"norm"}


def test_networks():
    assert check_folding(Net(nnx.Rngs(0)), data(3, 5, 5, 2)) == {"norm", "norms/0"}
    assert check_folding(Stack(nnx.Rngs(0)), data(6, 4)) == {"blocks/norm"}


class Scaled(nnx.Linear):
    def __call__(self, x):
        return x @ (self.kernel[...] / jnp.linalg.norm(self.kernel[...]))


class Doubled(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


def with_tied(model, x):
    return model.more(model.norm(model.layer(x)))


NEITHER = "not what a Conv, ConvTranspose or Dense layer gives"
STAYS = {
    "residual sum": (lambda m, x: m.norm(y := m.layer(x)) + y, {}, "what layer gives goes elsewhe"),
    "two norms": (lambda m, x: m.norm(y := m.layer(x)) + m.other(y), {}, "what layer gives goes"),
    "pre-activation": (lambda m, x: m.layer(nnx.relu(m.norm(x))), {}, NEITHER),
    "activation between": (lambda m, x: m.norm(nnx.relu(m.layer(x))), {}, NEITHER),
    "layer twice": (lambda m, x: m.norm(m.layer(m.layer(x))), {}, "layer is called more than once"),
    "norm twice": (lambda m, x: m.norm(m.norm(m.layer(x))), {}, "norm is called more than once"),
    "own layer": (
        straight,
        {"layer": lambda rngs: Scaled(4, 4, rngs=rngs)},
        "layer: Scaled has a __call__ of its own",
    ),
    "transposed kernel": (
        lambda m, x: m.norm(m.layer(x)),
        {"layer": conv(nnx.ConvTranspose, transpose_kernel=True)},
        "layer: its kernel is transposed",
    ),
    "own product": (
        straight,
        {
            "layer": lambda r: nnx.Linear(
                4, 4, dot_general=lambda *a, **k: jax.lax.dot_general(*a), rngs=r
            )
        },
        "layer: it computes with a user's dot_general",
    ),
    "own promotion": (
        straight,
        {"layer": lambda r: nnx.Linear(4, 4, promote_dtype=lambda args, dtype: args, rngs=r)},
        "layer: it computes with a user's promote_dtype",
    ),
    "other channels": (straight, {"axis": 2}, "its channels lie along axis 2, expected -1"),
    "no batch norm": (lambda m, x: m.layer(x), {}, "The model runs no BatchNorm"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name):
    wire, kwargs, reason = STAYS[name]
    with pytest.raises(ValueError, match=f"no batch norm can be folded.*{reason}"):
        qnnx.fold_batch_norm(Line(wire, **kwargs), data(3, 6, 4))


def test_tied_kernels_and_own_norms_stay():
    tied = Line(with_tied)
    tied.more.kernel = tied.layer.kernel
    with pytest.raises(ValueError, match=r"layer/kernel is read elsewhere, too"):
        qnnx.fold_batch_norm(tied, data(6, 4))
    own = Line(straight)
    own.norm = Doubled(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Doubled has a __call__ of its own"):
        qnnx.fold_batch_norm(own, data(6, 4))
    trains = Line(lambda model, x: model.norm(model.layer(x), use_running_average=False))
    with pytest.raises(
        ValueError, match="norm: this batch norm is called with use_running_average"
    ):
        qnnx.fold_batch_norm(trains, data(6, 4))


def test_folding_under_quantized_inputs_and_shapes_alone():
    model, x = randomized(Net(nnx.Rngs(0))), data(6, 5, 5, 2)
    quantized = qnnx.quantize_inputs(model, qj.uniform_input(8))
    qnnx.calibrate(quantized, x)
    quantized.eval()
    out = qnnx.fold_batch_norm(quantized, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert folded_norms(out) == {"norm", "norms/0"}
    np.testing.assert_allclose(out(x), quantized(x), atol=0.05)
