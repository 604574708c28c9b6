"""Batch norms of Linen models folded into the layer before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import quantjax as qj
from quantjax import folding
from quantjax import linen as qnn
from quantjax.lab import models
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

EPSILON = 1e-5


def folded_norms(variables):
    """The batch norms that only add: paths of those that divide and multiply by the same."""
    params, stats = (flatten_dict(unfreeze(variables[c])) for c in ("params", "batch_stats"))
    return {
        "/".join(key[:-1])
        for key, var in stats.items()
        if key[-1] == "var"
        and np.allclose(params.get((*key[:-1], "scale"), 1), np.sqrt(var + EPSILON), rtol=1e-6)
    }


def check_folding(model, x, *, close=1e-5, seed=0, **kwargs):
    """Folds random statistics in, compares the outputs, and returns what was folded."""
    variables = random_variables(model, x, seed, **kwargs)
    assert not folded_norms(variables)
    out = qnn.fold_batch_norm(model.apply, variables, x, **kwargs)
    assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, variables)
    run = quick.jit(functools.partial(model.apply, **kwargs))
    before, after = (np.asarray(run(v, x), np.float64) for v in (variables, out))
    assert np.abs(after - before).max() <= close * np.abs(before).max()
    return folded_norms(out)


@pytest.mark.parametrize(
    ("name", "side", "count", "total"),
    [("resnet20", 8, 21, 21), ("vgg-small", 8, 8, 8), ("vgg7", 8, 3, 6)],
)
def test_networks_of_the_lab(name, side, count, total):
    model, x = models.build(name, 10), data(2, side, side, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert len(jax.tree.leaves(shapes["batch_stats"])) == 2 * total
    assert len(check_folding(model, x, train=False)) == count


def layer(**kwargs):
    return nn.Dense(4, name="layer", **kwargs)


def conv(kind=nn.Conv, **kwargs):
    return kind(4, (3,), name="layer", **kwargs)


FOLDS = {
    "dense": lambda x, norm: norm()(layer()(x)),
    "without biases": lambda x, norm: norm(use_bias=False)(layer(use_bias=False)(x)),
    "without scale": lambda x, norm: norm(use_scale=False)(layer()(x)),
    "statistics alone": lambda x, norm: norm(use_scale=False, use_bias=False)(layer()(x)),
    "convolution": lambda x, norm: norm()(conv()(x)),
    "groups": lambda x, norm: norm()(conv(feature_group_count=4, strides=2)(x)),
    "masked": lambda x, norm: norm()(conv(mask=jnp.ones((3, 4, 4)).at[0].set(0))(x)),
    "transposed": lambda x, norm: norm()(conv(nn.ConvTranspose, strides=(2,))(x)),
    "named axis": lambda x, norm: norm(axis=2, name="norm")(x=layer()(inputs=x)),
    "dropout": lambda x, norm: norm()(nn.Dropout(0.5, deterministic=True)(layer()(x))),
    "jitted after": lambda x, norm: jax.jit(nn.gelu)(norm()(layer()(x))),
    "sequential": lambda x, norm: nn.Sequential([layer(), norm(), nn.relu, nn.Dense(2)])(x),
    "boxed": lambda x, norm: norm()(
        layer(kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "m")))(x)
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_what_is_folded(name):
    assert len(check_folding(Line(FOLDS[name]), data(3, 6, 4))) == 1


class Scaled(nn.Dense):
    """Its kernel has length one, whatever it is multiplied by."""

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))
        return inputs @ (kernel / jnp.linalg.norm(kernel))


class Doubled(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x)


def twice(x, norm):
    return sum((dense := layer(), one := norm(name="one"), one(dense(x)), dense(x))[2:])


def norm_twice(x, norm):
    return sum((one := norm(name="one"), one(layer()(x)), one(x))[1:])


def tied(x, norm):
    y = norm()((dense := layer())(x))
    return y @ dense.variables["params"]["kernel"].T


def both_norms(x, norm):
    y = layer()(x)
    return norm()(y) + norm()(y)


NEITHER = "not what a Conv, ConvTranspose or Dense layer gives"
STAYS = {
    "residual sum": (lambda x, norm: norm()(y := layer()(x)) + y, "what layer gives goes else"),
    "returned": (lambda x, norm: (norm()(y := layer()(x)), y), "what layer gives goes elsewhere"),
    "two norms": (both_norms, "what layer gives goes elsewhere"),
    "pre-activation": (lambda x, norm: layer()(nn.relu(norm()(x))), NEITHER),
    "activation between": (lambda x, norm: norm()(nn.relu(layer()(x))), NEITHER),
    "general": (lambda x, norm: norm()(nn.DenseGeneral(4)(x)), NEITHER),
    "layer twice": (twice, "layer is called more than once"),
    "norm twice": (norm_twice, "one is called more than once"),
    "tied": (tied, "params/layer/kernel is read elsewhere"),
    "own layer": (lambda x, norm: norm()(Scaled(4, name="layer")(x)), "Scaled has a __call__ of"),
    "own norm": (
        lambda x, norm: Doubled(use_running_average=True)(layer()(x)),
        "Doubled has a __call__ of its own",
    ),
    "transposed kernel": (
        lambda x, norm: norm()(conv(nn.ConvTranspose, transpose_kernel=True)(x)),
        "layer: its kernel is transposed",
    ),
    "own product": (
        lambda x, norm: norm()(layer(dot_general=lambda *args, **_: jax.lax.dot_general(*args))(x)),
        "layer: it computes with a user's dot_general",
    ),
    "own promotion": (
        lambda x, norm: norm()(layer(promote_dtype=lambda *args, **_: args)(x)),
        "layer: it computes with a user's promote_dtype",
    ),
    "other channels": (lambda x, norm: norm(axis=1)(layer()(x)), "its channels lie along axis 1"),
    "remat between": (lambda x, norm: norm()(nn.remat(nn.Dense)(4, name="layer")(x)), NEITHER),
    "weight norm": (
        lambda x, norm: norm()(nn.WeightNorm(layer())(x)),
        "is read elsewhere, too, or changed|WeightNorm|" + NEITHER,
    ),
    "no batch norm": (lambda x, norm: layer()(x), "The model runs no BatchNorm"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name):
    wire, reason = STAYS[name]
    model, x = Line(wire), data(3, 6, 4)
    with pytest.raises(ValueError, match=f"no batch norm can be folded.*({reason})"):
        qnn.fold_batch_norm(model.apply, random_variables(model, x), x)


def test_a_residual_net_folds_all_but_what_also_goes_into_the_sum():
    def wire(x, norm):
        x = nn.relu(norm(name="stem_norm")(nn.Conv(4, (3, 3), name="stem")(x)))
        y = nn.Conv(4, (3, 3), name="one")(x)
        y = nn.Conv(4, (3, 3), name="two")(nn.relu(norm(name="one_norm")(y)) + y)
        x = x + norm(name="two_norm")(y)
        x = nn.avg_pool(nn.Conv(4, (1, 1), name="three")(x), (2, 2), (2, 2))
        return norm(name="three_norm")(x)

    assert check_folding(Line(wire), data(3, 6, 6, 2)) == {"stem_norm", "two_norm"}


@pytest.mark.parametrize("block", [Block, REMAT])
def test_scanned_and_rematted_blocks_are_folded(block):
    assert check_folding(Stack(block), data(6, 4)) == {"blocks/norm"}


@pytest.mark.parametrize(
    "axes", [(("params", 1), ("batch_stats", 0)), (("params", 0), ("batch_stats", 1))]
)
def test_other_axes_of_a_scan_stay(axes):
    model, x = Stack(axes=axes), data(6, 4)
    with pytest.raises(ValueError, match=r"blocks/norm: .* or changed on its way to blocks/"):
        qnn.fold_batch_norm(model.apply, random_variables(model, x), x)


def test_layers_shared_by_the_steps_of_a_scan_stay():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            kwargs = {"variable_broadcast": "params", "variable_axes": {"batch_stats": 0}}
            loop = nn.scan(
                Block, split_rngs={"params": False}, in_axes=nn.broadcast, length=3, **kwargs
            )
            return loop(name="blocks")(x, False)[0]

    x, model = data(6, 4), Shared()
    with pytest.raises(ValueError, match=r"blocks/norm: "):
        qnn.fold_batch_norm(model.apply, random_variables(model, x), x)


def test_vmapped_blocks_stay():
    class Members(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            kwargs = {"variable_axes": axes, "split_rngs": {"params": True}}
            members = nn.vmap(Block, in_axes=(0, None), **kwargs)
            return members(name="blocks")(x, False)[0]

    x, model = data(3, 6, 4), Members()
    with pytest.raises(ValueError, match=r"blocks/layer is under vmap"):
        qnn.fold_batch_norm(model.apply, random_variables(model, x), x)


def test_only_shapes_count_and_other_leaves_are_the_same():
    model, x = Line(two_layers), data(6, 4)
    variables = freeze({**random_variables(model, x), "more": {"leaf": jnp.ones(2)}})
    out = qnn.fold_batch_norm(model.apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert isinstance(out, FrozenDict)
    assert folded_norms(out) == {"a", "b"}
    assert out["more"]["leaf"] is variables["more"]["leaf"]
    assert out["params"]["Dense_0"]["kernel"] is variables["params"]["Dense_0"]["kernel"]
    again = qnn.fold_batch_norm(model.apply, out, x)
    assert_close(again["params"]["first"], out["params"]["first"], atol=0)
    jitted = jax.jit(lambda variables: qnn.fold_batch_norm(model.apply, variables, x))(variables)
    assert_close(jitted["params"]["first"], out["params"]["first"])


def test_the_formulas():
    model, x = Line(FOLDS["dense"]), data(2, 6, 4)
    variables = random_variables(model, x)
    out = qnn.fold_batch_norm(model.apply, variables, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    dense, norm = wide["params"]["layer"], wide["params"]["BatchNorm_0"]
    stats = wide["batch_stats"]["BatchNorm_0"]
    s = norm["scale"] / np.sqrt(stats["var"] + EPSILON)
    assert_close(out["params"]["layer"], {"kernel": dense["kernel"] * s, "bias": dense["bias"] * s})
    mean, var = stats["mean"] * s, stats["var"] * s**2
    assert_close(out["batch_stats"]["BatchNorm_0"], {"mean": mean, "var": var})
    scale = np.sqrt(var + EPSILON)
    assert_close(out["params"]["BatchNorm_0"], {"scale": scale, "bias": norm["bias"]})


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
    st.lists(st.floats(0, 1e4, width=32), min_size=4, max_size=4),
    st.sampled_from([1e-3, 1e-5]),
    st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_any_scale_and_variance(scale, var, epsilon, seed):
    rng = np.random.default_rng(seed)
    kernel, bias, mean, shift = rng.normal(size=(4, 4)).astype(np.float32)
    layer = {"kernel": kernel[None], "bias": bias}
    norm = {"mean": mean, "var": np.float32(var), "scale": np.float32(scale), "bias": shift}
    out = folding.folded({"norm": (layer, norm, epsilon)})["norm"]

    def run(layer, norm):
        layer, norm = (jax.tree.map(lambda leaf: np.asarray(leaf, float), t) for t in (layer, norm))
        y = layer["kernel"] + layer["bias"] - norm["mean"]
        return y * norm["scale"] / np.sqrt(norm["var"] + epsilon) + norm["bias"]

    before, after = run(layer, norm), run(*out)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6 * np.abs(before).max())


def test_statistics_may_be_measured_after_folding():
    model, x = Line(two_layers), 2 * data(64, 4) + 1
    variables = random_variables(model, x)
    apply = quick.jit(model.apply)
    out = qnn.fold_batch_norm(model.apply, variables, x)
    before, after = (qnn.reestimate_batch_norm(model.apply, v, x) for v in (variables, out))
    np.testing.assert_allclose(apply(after, x), apply(before, x), rtol=1e-3, atol=1e-4)
    assert not jnp.allclose(apply(after, x), apply(out, x), rtol=0.1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    class Low(nn.Module):
        @nn.compact
        def __call__(self, x):
            kwargs = {"dtype": dtype, "param_dtype": dtype}
            norm = nn.BatchNorm(use_running_average=True, **kwargs)
            return norm(nn.Dense(4, **kwargs)(x))

    assert check_folding(Low(), data(6, 4), close=0.03) == {"BatchNorm_0"}


def test_sharded_kernels_stay_sharded():
    model, x = Line(FOLDS["convolution"]), data(3, 6, 4)
    variables = random_variables(model, x)
    expected = qnn.fold_batch_norm(model.apply, variables, x)
    for kind in (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto):
        mesh = jax.make_mesh((2,), ("m",), axis_types=(kind,), devices=jax.devices()[:2])

        def place(leaf, mesh=mesh):
            axes = (None, "m", None) if leaf.ndim == 3 else ("m",)
            return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

        spread = jax.tree.map(place, variables)
        out = qnn.fold_batch_norm(model.apply, spread, x)
        assert jax.tree.map(jax.typeof, out) == jax.tree.map(jax.typeof, spread)
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, out, spread))
        assert_close(out["params"]["layer"], expected["params"]["layer"])


def test_folding_under_quantized_inputs():
    model, x = Line(two_layers), data(6, 4)
    apply = qnn.quantize_inputs(model.apply, qj.uniform_input(8))
    variables = qnn.calibrate(apply, random_variables(model, x), x)
    out = qnn.fold_batch_norm(apply, variables, x)
    assert folded_norms(out) == {"a", "b"}
    np.testing.assert_allclose(apply(out, x), apply(variables, x), atol=0.02)
    fresh = {name: variables[name] for name in ("params", "batch_stats")}
    with pytest.raises(ValueError, match="first: the input quantizer is not fitted"):
        qnn.fold_batch_norm(apply, fresh, x)


def test_kernels_that_the_function_changes_stay():
    model, x = Line(two_layers), data(6, 4)
    variables, quantizer = random_variables(model, x), qj.uniform(4)
    state = quantizer.init(variables["params"])

    def quantized(variables, x):
        return model.apply({**variables, "params": quantizer.apply(variables["params"], state)}, x)

    with pytest.raises(ValueError, match=r"params/first/kernel is read elsewhere, too, or changed"):
        qnn.fold_batch_norm(quantized, variables, x)


def in_a_scan(step, carry, stacked=None, length=None):
    return jax.lax.scan(step, carry, stacked, length)[1]


def test_kernels_that_go_round_a_loop_stay():
    model, x = Line(FOLDS["without biases"]), data(6, 4)
    variables = random_variables(model, x)
    other = jnp.ones((4, 4))

    def swapped(variables, x):
        def step(kernels, _):
            params = {**variables["params"], "layer": {"kernel": kernels[0]}}
            return kernels[::-1], model.apply({**variables, "params": params}, x)

        return in_a_scan(step, (variables["params"]["layer"]["kernel"], other), length=2)

    def read_again(variables, x):
        def step(before, variables):
            return variables["params"]["layer"]["kernel"], model.apply(variables, x) + x @ before

        return in_a_scan(step, other, variables)

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
    for apply, leaves in ((swapped, variables), (read_again, stacked)):
        with pytest.raises(ValueError, match=r"params/layer/kernel is read elsewhere, too"):
            qnn.fold_batch_norm(apply, leaves, x)
    once = functools.partial(in_a_scan, lambda carry, v: (carry, model.apply(v, x)), 0)
    out = qnn.fold_batch_norm(lambda variables, x: once(variables), stacked, x)
    assert folded_norms(out) == {"BatchNorm_0"}
    np.testing.assert_allclose(once(out), once(stacked), rtol=1e-5, atol=1e-6)


def test_bad_arguments_of_folding():
    model, x = Line(two_layers), data(6, 4)
    variables, quantizer = random_variables(model, x), qj.uniform(4)
    with pytest.raises(ValueError, match="a: this batch norm uses the statistics of the batch"):
        qnn.fold_batch_norm(model.apply, variables, x, train=True)
    with pytest.raises(ValueError, match="apply is jitted already"):
        qnn.fold_batch_norm(jax.jit(model.apply), variables, x)
    packed = qj.pack(quantizer.encode(variables["params"], quantizer.init(variables["params"])))
    with pytest.raises(ValueError, match=r"first: its kernel is no array of floats; fold before"):
        qnn.fold_batch_norm(qnn.packed(model.apply), {**variables, "params": packed}, x)
    lenet = models.build("lenet5", 10)
    image = data(1, 28, 28, 1)
    shapes = jax.eval_shape(lenet.init, jax.random.key(0), image)
    with pytest.raises(ValueError, match="The model runs no BatchNorm"):
        qnn.fold_batch_norm(lenet.apply, shapes, image)
