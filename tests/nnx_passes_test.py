"""One pass counts once, widths, and numbers that are not finite: quantized inputs of NNX."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quantjax as qj
from quantjax import nnx as qnnx
from quantjax.nnx import input_layers

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Twice(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.layer(5 * self.layer(x))


def data(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def fitted(model, x, quantizer):
    model = qnnx.quantize_inputs(model, quantizer)
    qnnx.calibrate(model, x)
    return model


def high(model):
    return float(model.layer.promote_dtype.buffers["high"][...])


def test_a_layer_called_twice_sees_the_union_of_the_pass():
    x, plain = data(6, 4), Twice(nnx.Rngs(0))
    model = fitted(plain, x, qj.uniform_input(16, momentum=0.25))

    def seen(x):
        return float(max(x.max(), 5 * plain.layer(x).max()))

    np.testing.assert_allclose(high(model), seen(x), rtol=1e-3)
    old = high(model)
    nnx.jit(lambda model, x: model(x))(model, 3 * x)
    np.testing.assert_allclose(high(model), 0.75 * old + 0.25 * seen(3 * x), rtol=0.05)
    assert float(model.layer.promote_dtype.buffers["joins"][...]) == 0


def test_learned_grids_are_fitted_to_the_union():
    x, plain = data(6, 4), Twice(nnx.Rngs(0))
    model = fitted(plain, x, qj.srq_input(8))
    both = jnp.concatenate([x, 5 * plain.layer(x)])
    found = model.layer.promote_dtype.learned["log_alpha"][...]
    np.testing.assert_allclose(found, qj.srq_input(8).init(both).learned["log_alpha"], atol=0.02)


def test_the_clone_is_still_its_class_and_travels():
    x = data(6, 4)
    model = fitted(Twice(nnx.Rngs(0)), x, qj.uniform_input(4))
    assert isinstance(model, Twice)
    assert type(model).__name__ == "Twice"
    model.eval()
    merged = nnx.merge(*nnx.split(model))
    assert type(merged) is type(nnx.clone(model)) is type(model)
    assert jnp.array_equal(merged(x), model(x))


def test_pickle_of_a_quantized_model_makes_the_same_class():
    made = input_layers._counting_passes(nnx.Linear)
    again = pickle.loads(pickle.dumps(made.__new__(made).__reduce_ex__(2)[:2]))
    assert type(again[0](*again[1])) is made


def test_calibrate_takes_the_width_in_force():
    x = data(6, 4)
    model = fitted(Twice(nnx.Rngs(0)), x, qj.uniform_input(4))
    qnnx.calibrate(model, 3 * x)
    alone = fitted(Twice(nnx.Rngs(0)), 3 * x, qj.uniform_input(4))
    assert high(model) == high(alone)
    model.layer.promote_dtype.quantizer = qj.uniform_input(2)
    with pytest.raises(ValueError, match=r"layer: the state has 4 bits, the quantizer 2"):
        model(x)
    qnnx.calibrate(model, x)
    assert float(model.layer.promote_dtype.buffers["levels"][...]) == 3


def test_calibration_refuses_what_is_not_finite_and_leaves_the_state():
    x = data(6, 4)
    model = fitted(Twice(nnx.Rngs(0)), x, qj.uniform_input(4))
    before = high(model)
    with pytest.raises(ValueError, match=r"batch 1 gives .*layer \(\d+ values\)"):
        qnnx.calibrate(model, [2 * x, x.at[0, 0].set(jnp.nan)])
    assert high(model) == before
    model(2 * x)


def test_calibration_looks_into_scanned_layers():
    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(rngs.split(3))

        def __call__(self, x):
            axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
            return nnx.scan(lambda x, layer: layer(x), **axes)(x, self.layers)

    x = data(6, 4)
    model = qnnx.quantize_inputs(Stack(nnx.Rngs(0)), qj.uniform_input(4))
    with pytest.raises(ValueError, match=r"batch 0 gives .*layers \(\d+ values\)"):
        qnnx.calibrate(model, x.at[0, 0].set(jnp.nan))
    qnnx.calibrate(model, [x, x])
    assert model(x).shape == (6, 4)


def test_recurrent_layers_have_one_grid_over_time():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs))

        def __call__(self, x):
            return self.rnn(x)

    x = data(2, 5, 3)
    model = qnnx.quantize_inputs(Model(nnx.Rngs(0)), qj.uniform_input(8, momentum=0.5))
    with pytest.raises(ValueError, match=r"rnn/cell/dense_h: a loop over time cannot make"):
        qnnx.calibrate(model, x)
    carry = model.rnn.cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0))
    qnnx.calibrate(model.rnn.cell, [carry], inputs=x[:, 0])
    act = model.rnn.cell.dense_i.promote_dtype
    first = float(act.buffers["high"][...])
    assert first == x[:, 0].max()
    qnnx.calibrate(model, x)
    np.testing.assert_allclose(act.buffers["high"][...], (first + x.max()) / 2, rtol=1e-5)
    model.eval()
    assert model(x).shape == (2, 5, 4)
    assert model(data(2, 7, 3)).shape == (2, 7, 4)


@pytest.mark.parametrize("model", [3, lambda x: x])
def test_mixed_up_interfaces_are_named(model):
    with pytest.raises(ValueError, match=r"expected an NNX model, got .*linen.quantize_inputs"):
        qnnx.quantize_inputs(model, qj.uniform_input(4))
    with pytest.raises(ValueError, match=r"expected what quantize_inputs returned"):
        qnnx.calibrate(model, data(2, 4))
