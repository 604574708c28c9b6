"""Statistics of batch norms in Linen models, measured anew."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import quantjax as qj
from quantjax import batch_norms
from quantjax import linen as qnn
from tests import quick
from tests.linen_batch_norm_toys import (
    REMAT,
    Block,
    Line,
    Stack,
    assert_close,
    random_variables,
    two_layers,
)
from tests.linen_toys import data

pytestmark = pytest.mark.usefixtures("quick_compilation")


def by_training(apply, variables, x, **kwargs):
    """The statistics of one batch, as Flax itself finds them without momentum."""
    run = functools.partial(apply, train=True, mutable=["batch_stats"], **kwargs)
    return quick.jit(run)(variables, x)[1]["batch_stats"]


def union_of(stats, sizes):
    """The formula of the union, in float64."""
    n = np.asarray(sizes, np.float64)[:, None] / sum(sizes)
    mean, var = (np.stack([np.asarray(s[k], np.float64) for s in stats]) for k in ("mean", "var"))
    center = (n * mean).sum(0)
    return {"mean": center, "var": (n * (var + (mean - center) ** 2)).sum(0)}


def test_statistics_are_those_of_all_data_at_the_first_batch_norm():
    model, x = Line(lambda x, norm: norm(name="norm")(x)), 3 * data(10, 4) + 100
    variables = random_variables(model, x)
    out = qnn.reestimate_batch_norm(model.apply, variables, iter([x[:5], x[5:8], x[8:]]))
    x = np.asarray(x, np.float64)
    assert_close(out["batch_stats"]["norm"], {"mean": x.mean(0), "var": x.var(0)})
    assert out["params"] is variables["params"]


def test_later_batch_norms_take_the_union_of_batches_normalised_each_by_itself():
    model, x = Line(two_layers), data(9, 4)
    variables, batches = random_variables(model, x), [x[:6], x[6:]]
    out = qnn.reestimate_batch_norm(model.apply, variables, batches, train=False)
    stats = [by_training(model.apply, variables, batch) for batch in batches]
    for name in ("a", "b"):
        assert_close(out["batch_stats"][name], union_of([s[name] for s in stats], [6, 3]))
    again = qnn.reestimate_batch_norm(model.apply, variables, batches, train=True)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, out))


def test_momentum_has_no_part_in_it_and_single_arrays_are_one_batch():
    x = data(6, 5, 5, 2)
    conv = Line(lambda x, norm: nn.relu(norm(name="norm")(nn.Conv(3, (3, 3))(x))), momentum=0.9)
    variables = random_variables(conv, x)
    variables["batch_stats"]["norm"]["mean"] *= jnp.nan  # what was there counts for nothing
    out = qnn.reestimate_batch_norm(conv.apply, variables, x)
    y = np.asarray(nn.Conv(3, (3, 3)).apply({"params": variables["params"]["Conv_0"]}, x))
    y = y.astype(np.float64).reshape(-1, 3)
    assert_close(out["batch_stats"]["norm"], {"mean": y.mean(0), "var": y.var(0)})


def test_calls_in_one_pass_are_one_union():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=True, name="norm")
            return norm(x), norm(5 * x[:3] + 1), norm(x=x, mask=x[:, :1] > 0)

    x, model = data(8, 4), Shared()
    out = qnn.reestimate_batch_norm(model.apply, random_variables(model, x), [x, 2 * x])
    parts = [np.asarray(p, np.float64) for p in (x, 2 * x)]
    parts = np.concatenate([part for p in parts for part in (p, 5 * p[:3] + 1, p[p[:, 0] > 0])])
    assert_close(out["batch_stats"]["norm"], {"mean": parts.mean(0), "var": parts.var(0)})


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(0, 99),
    st.floats(-1e3, 1e3),
)
@settings(max_examples=20, deadline=None)
def test_a_union_is_the_same_however_it_is_cut(sizes, seed, offset):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset, 1 + i, (n, 3)).astype(np.float32) for i, n in enumerate(sizes)]
    union = batch_norms.empty(jnp.zeros(3), jnp.zeros(3))
    for part in parts:
        wide = part.astype(np.float64)
        found = (np.float32(wide.mean(0)), np.float32(wide.var(0)))
        union = batch_norms.joined(union, len(part), *found)
    whole = np.concatenate(parts).astype(np.float64)
    expected = dict(zip(batch_norms.UNION, (sum(sizes), whole.mean(0), whole.var(0)), strict=True))
    assert_close(union, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", [Block, REMAT])
def test_scanned_and_rematted_blocks(block):
    model, x = Stack(block), data(9, 4)
    variables, batches = random_variables(model, x), [x[:6], x[6:]]
    out = qnn.reestimate_batch_norm(model.apply, variables, batches, train=False)
    stats = [by_training(model.apply, variables, b)["blocks"]["norm"] for b in batches]
    found = out["batch_stats"]["blocks"]["norm"]
    assert found["mean"].shape == (3, 4)
    for i in range(3):
        expected = union_of([{k: v[i] for k, v in s.items()} for s in stats], [6, 3])
        assert_close({k: v[i] for k, v in found.items()}, expected)


def test_a_batch_norm_in_a_loop_is_called_many_times():
    class Loop(nn.Module):
        @nn.compact
        def __call__(self, x):
            def step(norm, x, _):
                norm(x)
                return 2 * x, None

            norm = nn.BatchNorm(use_running_average=True, name="norm")
            loop = nn.scan(
                step, variable_carry="batch_stats", variable_broadcast="params", length=3
            )
            return loop(norm, x, None)[0]

    x, model = data(6, 4), Loop()
    variables = {"params": {}, "batch_stats": {}}
    norm = nn.BatchNorm(use_running_average=True)
    variables = {name: {"norm": leaf} for name, leaf in random_variables(norm, x).items()}
    out = qnn.reestimate_batch_norm(model.apply, variables, x)
    parts = np.concatenate([np.asarray(k * x, np.float64) for k in (1, 2, 4)])
    assert_close(out["batch_stats"]["norm"], {"mean": parts.mean(0), "var": parts.var(0)})


def test_quantized_inputs_stay_as_they_are_and_count():
    model, x = Line(two_layers), data(8, 4)
    apply = qnn.quantize_inputs(model.apply, qj.uniform_input(2))
    variables = qnn.calibrate(apply, random_variables(model, x), x)
    out = qnn.reestimate_batch_norm(apply, variables, [x, 3 * x], train=False)
    assert out["quant_stats"] is variables["quant_stats"]
    stats = [by_training(apply, variables, b)["b"] for b in (x, 3 * x)]
    assert_close(out["batch_stats"]["b"], union_of(stats, [8, 8]))
    plain = qnn.reestimate_batch_norm(model.apply, variables, [x, 3 * x])
    assert not jnp.allclose(plain["batch_stats"]["a"]["mean"], out["batch_stats"]["a"]["mean"])


def test_packed_kernels():
    model, x = Line(two_layers), data(64, 4)
    variables, quantizer = random_variables(model, x), qj.uniform(4)
    encoded = quantizer.encode(variables["params"], quantizer.init(variables["params"]))
    packed = {**variables, "params": qj.pack(encoded)}
    plain = {**variables, "params": qj.decode(encoded)}
    out = qnn.reestimate_batch_norm(qnn.packed(model.apply), packed, x)
    assert out["params"] is packed["params"]
    expected = qnn.reestimate_batch_norm(model.apply, plain, x)
    assert_close(out["batch_stats"]["b"], expected["batch_stats"]["b"])


def test_dropout_is_off_where_the_kwargs_say_so():
    def wire(x, norm):
        return norm(name="norm")(
            nn.Dropout(0.5, deterministic=norm.keywords["use_running_average"])(x)
        )

    model, x = Line(wire), data(8, 4) + 2
    out = qnn.reestimate_batch_norm(model.apply, random_variables(model, x), x, train=False)
    np.testing.assert_allclose(out["batch_stats"]["norm"]["mean"], x.mean(0), rtol=1e-5)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto])
def test_sharded_batches_and_statistics(kind):
    model, x = Line(two_layers), data(16, 4)
    variables = random_variables(model, x)
    expected = qnn.reestimate_batch_norm(model.apply, variables, [x, 2 * x])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    place = functools.partial(NamedSharding, mesh)
    everywhere = jax.device_put(variables, place(PartitionSpec()))
    spread = jax.device_put(x, place(PartitionSpec("data")))
    out = qnn.reestimate_batch_norm(model.apply, everywhere, [spread, 2 * spread])
    assert_close(out["batch_stats"]["b"], expected["batch_stats"]["b"])
    assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, everywhere)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, out, everywhere)
    assert jax.tree.all(same)
    # Variables that lie on no device stay so.
    out = qnn.reestimate_batch_norm(model.apply, variables, [spread, 2 * spread])
    assert not out["batch_stats"]["b"]["mean"].committed
    assert_close(out["batch_stats"]["b"], expected["batch_stats"]["b"])


def test_statistics_sharded_over_channels_stay_so():
    model, x = Line(lambda x, norm: norm(name="norm")(x)), data(6, 8)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    stats = NamedSharding(mesh, PartitionSpec("model"))
    variables = jax.device_put(random_variables(model, x), stats)
    out = qnn.reestimate_batch_norm(model.apply, variables, x)
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.sharding == stats, out))
    np.testing.assert_allclose(out["batch_stats"]["norm"]["var"], x.var(0), rtol=1e-5)


def test_batch_norms_with_a_named_axis():
    model = nn.BatchNorm(use_running_average=True, axis_name="data")
    auto = (jax.sharding.AxisType.Auto,)
    x, mesh = data(8, 4), jax.make_mesh((8,), ("data",), axis_types=auto)
    spread, everywhere = PartitionSpec("data"), PartitionSpec()

    def apply(variables, x, **kwargs):
        run = functools.partial(model.apply, **kwargs)
        specs = {"in_specs": (everywhere, spread), "out_specs": (spread, everywhere)}
        return jax.shard_map(run, mesh=mesh, **specs)(variables, x)

    variables = random_variables(model, x)
    out = qnn.reestimate_batch_norm(apply, variables, [x, 3 * x])
    both = np.concatenate([np.asarray(k * x, np.float64) for k in (1, 3)])
    assert_close(out["batch_stats"], {"mean": both.mean(0), "var": both.var(0)})


class OwnCall(nn.BatchNorm):
    """Its arguments are others, and there are two calls in one."""

    @nn.compact
    def __call__(self, values, train):
        return super().__call__(2 * values, use_running_average=not train)


@pytest.mark.parametrize("kind", [OwnCall, nn.remat(OwnCall, static_argnums=(2,))])
def test_subclasses(kind):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return kind(name="norm")(x, False)

    x, model = data(8, 4), Model()
    out = qnn.reestimate_batch_norm(model.apply, random_variables(model, x), [x, x + 1])
    np.testing.assert_allclose(out["batch_stats"]["norm"]["mean"], 2 * x.mean(0) + 1, rtol=1e-5)


def test_what_is_kept():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, extra=True):
            centered = self.variable("batch_stats", "center", lambda: jnp.ones(4))
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                centered.value += 1
            x = nn.BatchNorm(use_running_average=True, axis=(1, 2), name="norm")(x)
            return nn.BatchNorm(use_running_average=True, name="other")(x) if extra else x

    x, model = data(6, 3, 4), Model()
    variables = freeze(random_variables(model, x))
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables["batch_stats"])
    out = qnn.reestimate_batch_norm(model.apply, {**variables, "batch_stats": low}, x, extra=False)
    assert isinstance(out["batch_stats"], FrozenDict)
    assert jax.tree.map(jax.typeof, out["batch_stats"]) == jax.tree.map(jax.typeof, low)
    np.testing.assert_allclose(out["batch_stats"]["norm"]["mean"], x.mean(0), atol=0.01)
    assert out["batch_stats"]["other"]["mean"] is low["other"]["mean"]
    assert out["batch_stats"]["center"] is low["center"]


def test_statistics_under_jit():
    model, x = Line(two_layers), data(8, 4)
    variables = random_variables(model, x)
    out = jax.jit(functools.partial(qnn.reestimate_batch_norm, model.apply))(variables, x)
    expected = qnn.reestimate_batch_norm(model.apply, variables, x)
    assert_close(out["batch_stats"]["b"], expected["batch_stats"]["b"])


def test_bad_arguments_of_the_statistics():
    model, x = Line(two_layers), data(8, 4)
    variables = random_variables(model, x)
    run = functools.partial(qnn.reestimate_batch_norm, model.apply)
    with pytest.raises(ValueError, match="at least one batch"):
        run(variables, [])
    with pytest.raises(ValueError, match=r"no statistics .*'batch_stats' among \['params'\]"):
        run({"params": variables["params"]}, x)
    with pytest.raises(ValueError, match=r"a: an input of shape \(1, 5\) gives .*two or more"):
        run(variables, [x, x[:1]])
    with pytest.raises(ValueError, match=r"NaN or infinite: \['a', 'b'\]"):
        run(variables, x.at[2, 2].set(jnp.nan))
    with pytest.raises(ValueError, match=r"b: 'batch_stats' holds no mean and var"):
        run({**variables, "batch_stats": {"a": variables["batch_stats"]["a"]}}, x)
    with pytest.raises(ValueError, match="apply is jitted already"):
        qnn.reestimate_batch_norm(jax.jit(model.apply), variables, x)
    with pytest.raises(ValueError, match=r"runs no nn\.BatchNorm"):
        qnn.reestimate_batch_norm(lambda v, x, mutable: (x, {**v}), variables, x)
    jitted = nn.jit(Line)(two_layers)
    with pytest.raises(ValueError, match=r"nn.jit keeps compiled programs"):
        qnn.reestimate_batch_norm(jitted.apply, variables, x)
