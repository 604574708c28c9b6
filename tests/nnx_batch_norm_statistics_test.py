"""Statistics of batch norms in NNX models, measured anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import quantjax as qj
from quantjax import nnx as qnnx
from tests.nnx_batch_norm_toys import (
    Block,
    Line,
    Net,
    Stack,
    assert_close,
    data,
    randomized,
    stats,
    straight,
    union_of,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
