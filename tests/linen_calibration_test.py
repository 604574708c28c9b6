"""Calibration by batches and by batch norm's parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from quantjax import linen as qnn
from quantjax.linen import probes
from quantjax.methods.uniform_input import uniform_input
from tests.linen_toys import (
    BOTH,
    Mlp,
    Norm,
    data,
    init,
    learned_step,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_calibrate_fits_first_and_updates_after():
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4, momentum=0.25))
    out = qnn.calibrate(apply, variables, iter([x, 2 * x]))
    high = out["quant_stats"]["Dense_0"]["high"]
    np.testing.assert_allclose(high, 1.25 * x.max(), rtol=1e-6)
    again = qnn.calibrate(apply, out, x)  # what was there has no part in it
    assert again["quant_stats"]["Dense_0"]["high"] == x.max()
    assert jnp.array_equal(
        qnn.calibrate(apply, variables, x)["quant_stats"]["Dense_0"]["high"], x.max()
    )
    with pytest.raises(ValueError, match="at least one batch"):
        qnn.calibrate(apply, variables, [])
    with pytest.raises(ValueError, match="quantizes no inputs"):
        qnn.calibrate(model.apply, variables, x)


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
    """The layers fed by one batch norm alone."""
    variables = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), x)
    apply = qnn.quantize_inputs(model.apply, uniform_input(4))
    return probes.fed_by_one_batch_norm(apply, variables, x, kwargs)


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
    "thinned": (True, lambda m, norm, other, x: nn.Dropout(0.5, deterministic=True)(norm(x))),
    "switched": (False, lambda m, norm, other, x: norm(x) * (x > 0)),
    "zero weights": (
        False,
        lambda m, norm, other, x: norm(x) + nn.Dense(4, kernel_init=nn.initializers.zeros)(x),
    ),
    "two by two": (False, lambda m, norm, other, x: norm(x) + norm(x)[..., ::-1]),
    "layer norm": (False, lambda m, norm, other, x: nn.LayerNorm()(norm(x))),
    "constant": (False, lambda m, norm, other, x: 0 * norm(x)),
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


@pytest.mark.parametrize(("second", "alone"), [("norm", True), ("other", False), (None, False)])
def test_a_layer_called_twice_needs_one_batch_norm_for_both_calls(second, alone):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            norms = {
                name: nn.BatchNorm(use_running_average=True, name=name)
                for name in ("norm", "other", "third")
            }
            layer = nn.Dense(4, name="out")
            y = layer(norms["norm"](x))
            return norms["third"](layer(nn.relu(norms[second](2 * x)) if second else y))

    assert ("out" in fed(Model(), data(8, 4))) == alone


def test_scanned_batch_norms_that_add_up_are_several():
    class Sum(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            nn.Dense(2, name="look")(x)
            return x + nn.BatchNorm(use_running_average=True)(jnp.ones_like(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = dict.fromkeys(("params", "batch_stats", *BOTH), 0)
            body = nn.scan(Sum, variable_axes=axes, split_rngs={"params": True}, length=3)
            return nn.Dense(2, name="out")(body(name="blocks")(jnp.zeros_like(x))[0])

    assert fed(Model(), data(8, 4)) == set()


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
