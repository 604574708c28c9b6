"""Batch norms of NNX models folded into the layer before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quantjax as qj
from quantjax import nnx as qnnx
from tests import quick
from tests.nnx_batch_norm_toys import (
    Line,
    Net,
    Stack,
    data,
    randomized,
    straight,
    values,
)

EPSILON = 1e-5
pytestmark = pytest.mark.usefixtures("quick_compilation")


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
