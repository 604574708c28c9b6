"""One pass counts once, widths and numbers that are not finite: quantized inputs of Linen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze

import quantjax as qj
from quantjax import linen as qnn
from tests.linen_toys import BOTH, Mlp, Scanned, data, fitted, init

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Twice(nn.Module):
    """A layer called with x and, in the same pass, with five times its output."""

    @nn.compact
    def __call__(self, x, _=None):
        layer = nn.Dense(x.shape[-1], name="layer")
        return layer(5 * layer(x)), None


class Plain(nn.Module):
    wrap: callable = staticmethod(lambda block: block)

    @nn.compact
    def __call__(self, x):
        return self.wrap(Twice)(name="block")(x)[0]


def scan(block):
    axes = dict.fromkeys(("params", *BOTH), 0)
    return nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=2)


def stats(state):
    return state["quant_stats"]["block"]["layer"]


def ranges(x, params):
    """The range of all that the layer sees, by hand, 0 included."""
    second = 5 * (x @ params["kernel"] + params["bias"][None])
    return min(0, x.min(), second.min()), max(0, x.max(), second.max())


@pytest.mark.parametrize("wrap", [lambda block: block, nn.remat], ids=["plain", "remat"])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_layer_called_twice_sees_the_union_of_the_pass(wrap, jitted):
    # The last kind of quantizer passes x on, so that the second input is known: 16 bits.
    x, model = data(6, 4), Plain(wrap)
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, qj.uniform_input(16, momentum=0.25))
    run = functools.partial(apply, mutable=BOTH)
    run = jax.jit(run) if jitted else run
    params = variables["params"]["block"]["layer"]
    _, quant = run(variables, x)
    first = ranges(x, params)
    np.testing.assert_allclose([stats(quant)[n] for n in ("low", "high")], first, rtol=1e-3)
    _, moved = run({**variables, **quant}, 3 * x)
    second = np.asarray(ranges(3 * x, params))
    expected = 0.25 * second + 0.75 * np.asarray(first)
    np.testing.assert_allclose(stats(moved)["high"], expected[1], rtol=0.05)
    assert jax.tree.structure(quant) == jax.tree.structure(moved)
    types = [jax.tree.map(lambda a: (a.shape, a.dtype), state) for state in (quant, moved)]
    assert types[0] == types[1]


def test_scanned_layers_called_twice_have_a_union_each():
    x, model = data(6, 4), Plain(scan)
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, qj.uniform_input(16))
    _, quant = jax.jit(functools.partial(apply, mutable=BOTH))(variables, x)
    params = variables["params"]["block"]["layer"]
    for i in range(2):
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        np.testing.assert_allclose(stats(quant)["high"][i], ranges(x, mine)[1], rtol=1e-3)
        x = Twice().apply({"params": {"layer": mine}}, x)[0]


@pytest.mark.parametrize("quantizer", [qj.srq_input(8), qj.rq_input(8)])
def test_learned_grids_are_fitted_to_the_union_and_then_left_alone(quantizer):
    x, model = data(6, 4), Plain()
    variables = init(model, x)
    params = variables["params"]["block"]["layer"]
    apply = qnn.quantize_inputs(model.apply, quantizer)
    out = qnn.calibrate(apply, variables, x)
    second = 5 * (x @ params["kernel"] + params["bias"][None])
    expected = quantizer.init(jnp.concatenate([x, second])).learned
    found = out["quant"]["block"]["layer"]
    np.testing.assert_allclose(found["log_alpha"], expected["log_alpha"], atol=0.02)
    _, after = apply(out, 3 * x, mutable=BOTH)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, after["quant"], out["quant"]))


def test_passes_end_however_the_variables_arrive():
    x = data(6, 4)
    apply, variables, quant = fitted(Mlp(), x, qj.uniform_input(4, momentum=0.5))
    variables = {**variables, **quant}
    expected = apply(variables, 3 * x, mutable=["quant_stats"])[1]
    hidden = qnn.quantize_inputs(
        lambda x: Mlp().apply(variables, x, mutable=["quant_stats"]),
        qj.uniform_input(4, momentum=0.5),
    )
    calls = (
        lambda v: apply(variables=v, mutable=["quant_stats"], x=3 * x),
        lambda v: apply(freeze(v), 3 * x, mutable=["quant_stats"]),
        lambda v: hidden(3 * x),
    )
    for call in calls:
        found = call(variables)[1]
        assert jax.tree.all(jax.tree.map(jnp.array_equal, dict(found), expected))
    again = apply({**variables, **expected}, 3 * x, mutable=["quant_stats"])[1]
    high = quant["quant_stats"]["Dense_0"]["high"]
    np.testing.assert_allclose(again["quant_stats"]["Dense_0"]["high"], 2.5 * high, rtol=1e-6)


def test_donated_state():
    x = data(6, 4)
    apply, variables, quant = fitted(Mlp(), x, qj.uniform_input(4))
    expected = jax.device_get(apply({**variables, **quant}, x, mutable=["quant_stats"])[1])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(quant, x):
        return apply({**variables, **quant}, x, mutable=["quant_stats"])[1]

    found = step(quant, x)
    near = functools.partial(jnp.allclose, rtol=1e-5)
    assert jax.tree.all(jax.tree.map(near, found, expected))
    step(found, x)
    assert step._cache_size() == 1


@pytest.mark.parametrize("make", [qj.uniform_input, qj.srq_input, qj.rq_input, qj.multi_bit_input])
def test_calibrate_takes_the_width_in_force(make):
    x, model = data(6, 4), Mlp()
    variables = init(model, x)
    fresh = dict(variables)
    for bits in (4, 2):
        apply = qnn.quantize_inputs(model.apply, make(bits))
        variables = qnn.calibrate(apply, variables, x)
        alone = qnn.calibrate(apply, fresh, x)
        same = functools.partial(jnp.allclose, equal_nan=True)
        assert jax.tree.all(jax.tree.map(same, variables, alone))
        # multi_bit_input's levels are at most four here
        assert len(jnp.unique(make(bits).apply(x, _state(variables))[0])) <= 2**bits
    wrong = qnn.quantize_inputs(model.apply, make(3))
    with pytest.raises(ValueError, match=r"Dense_0: the state has 2 bits, the quantizer 3"):
        wrong(variables, x)


def _state(variables):
    return qj.QuantState(*(variables.get(c, {}).get("Dense_0", {}) for c in BOTH))


@pytest.mark.parametrize("model", [Mlp(), Scanned(), nn.remat(Mlp)()], ids=["mlp", "scan", "remat"])
def test_calibration_refuses_what_is_not_finite(model):
    x = data(6, 4)
    variables = init(model, x)
    apply = qnn.quantize_inputs(model.apply, qj.uniform_input(4))
    for value in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match=r"batch 1 gives .*Dense_0 \(\d+ values\).*finite"):
            qnn.calibrate(apply, variables, [x, x.at[2, 1].set(value)])
    qnn.calibrate(apply, variables, x)
    jax.jit(lambda v, x: qnn.calibrate(apply, v, x))(variables, x)  # traced: nothing to look at


def test_a_skipped_step_of_loss_scaling_leaves_all_state_as_it_was():
    from flax.training.dynamic_scale import DynamicScale

    x = data(6, 4)
    apply, variables, quant = fitted(Mlp(), x, qj.uniform_input(4))

    @jax.jit
    def step(scale, params, stats, x):
        def loss(params):
            out, moved = apply({"params": params, **stats}, x, mutable=["quant_stats"])
            return jnp.sum(out**2), moved

        scale, is_finite, (_, moved), grads = scale.value_and_grad(loss, has_aux=True)(params)
        new = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), moved
        kept = jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, (params, stats))
        return scale, *kept, is_finite

    before = variables["params"], quant
    scale, *kept, is_finite = step(DynamicScale(), *before, 2 * x.at[0, 0].set(jnp.nan))
    assert not is_finite
    assert jax.tree.all(jax.tree.map(jnp.array_equal, tuple(kept), before))
    _, *moved, is_finite = step(scale, *kept, 2 * x)
    assert is_finite
    assert not jnp.array_equal(
        moved[1]["quant_stats"]["Dense_0"]["high"], quant["quant_stats"]["Dense_0"]["high"]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: qnn.quantize_inputs(Mlp(), qj.uniform_input(4)),
            "is the model itself: pass model",
        ),
        (lambda: qnn.quantize_inputs(qj.uniform_input(4), Mlp().apply), "expected an InputQ"),
        (lambda: qnn.quantize_inputs(3, qj.uniform_input(4)), "must be model.apply or a function"),
        (lambda: qnn.calibrate(Mlp(), {}, data(2, 4)), "apply is the model itself"),
        (
            lambda: qnn.quantize_inputs(Mlp().apply, {".*": qj.uniform(4)}),
            r"expected an InputQuantizer.*uniform\(4\) is a Quantizer, it takes trees of params",
        ),
    ],
)
def test_mixed_up_interfaces_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
