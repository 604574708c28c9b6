"""Recurrent Linen layers: one grid over time, or an error that says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from quantjax import linen as qnn
from quantjax.methods.uniform_input import uniform_input
from tests.linen_toys import BOTH, data, init

pytestmark = pytest.mark.usefixtures("quick_compilation")

READ = {"variable_broadcast": ("params", *BOTH)}
MOVE = {"variable_broadcast": ("params", "quant"), "variable_carry": "quant_stats"}
STEPWISE = {"variable_broadcast": "params", "variable_axes": dict.fromkeys(BOTH, 0)}


class Loop(nn.Module):
    """A cell over time: in a Python loop, or by nn.scan with these options."""

    options: dict | None = None

    @nn.compact
    def __call__(self, x):
        cell = nn.GRUCell(4, name="cell")
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        if self.options is None:
            ys = []
            for i in range(x.shape[1]):
                carry, y = cell(carry, x[:, i])
                ys.append(y)
            return jnp.stack(ys, 1)
        body = nn.scan(
            lambda cell, carry, x: cell(carry, x),
            in_axes=1,
            out_axes=1,
            split_rngs={"params": False},
            **self.options,
        )
        return body(cell, carry, x)[1]


@pytest.fixture(scope="module")
def fitted():
    x = data(2, 5, 3)
    apply = qnn.quantize_inputs(Loop().apply, uniform_input(4, momentum=0.5))
    return x, apply, qnn.calibrate(apply, init(Loop(), x), x)


def quantized(model):
    return qnn.quantize_inputs(model.apply, uniform_input(4, momentum=0.5))


def test_one_grid_serves_all_steps_and_lengths(fitted):
    x, apply, variables = fitted
    high = variables["quant_stats"]["cell"]["in"]["high"]
    assert high.shape == ()
    assert high == x.max()
    rnn = nn.RNN(nn.GRUCell(4), **READ)
    for model in (Loop(READ), rnn):
        np.testing.assert_allclose(quantized(model)(variables, x), apply(variables, x), atol=1e-5)
        longer = data(2, 7, 3, seed=1)
        expected = apply(variables, longer)
        np.testing.assert_allclose(quantized(model)(variables, longer), expected, atol=1e-5)


def test_a_loop_that_carries_the_state_counts_a_sequence_once(fitted):
    x, apply, variables = fitted
    expected = apply(variables, 3 * x, mutable=["quant_stats"])[1]
    found = quantized(Loop(MOVE))(variables, 3 * x, mutable=["quant_stats"])[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    np.testing.assert_allclose(found["quant_stats"]["cell"]["in"]["high"], 2 * x.max(), rtol=1e-5)


@pytest.mark.parametrize("options", [READ, MOVE, STEPWISE])
def test_a_loop_over_time_does_not_make_a_state(options):
    x = data(2, 5, 3)
    variables = init(Loop(), x)
    for model in (Loop(options), nn.RNN(nn.GRUCell(4), **options), nn.RNN(nn.GRUCell(4))):
        with pytest.raises(ValueError, match=r"cell/i.: a loop over time can read .*Python loop"):
            quantized(model)(variables, x, mutable=BOTH)


def test_cells_without_dense_layers_are_named():
    x, model = data(2, 5, 3), nn.RNN(nn.OptimizedLSTMCell(4))
    variables = init(model, x)
    with pytest.raises(ValueError, match=r"^cell: OptimizedLSTMCell multiplies without Dense"):
        quantized(model)(variables, x, mutable=BOTH)

    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.RNN(nn.OptimizedLSTMCell(4, name="cell"), name="rnn")(x)
            return nn.Dense(2, name="head")(y[:, -1])

    variables = init(Head(), x)
    apply = qnn.quantize_inputs(Head().apply, {".*cell": None, ".*": uniform_input(4)})
    assert set(qnn.calibrate(apply, variables, x)["quant_stats"]) == {"head"}


def test_updates_that_nn_rnn_would_lose_are_an_error(fitted):
    x, _, variables = fitted
    with pytest.raises(ValueError, match=r"cannot update it. Keep quant_stats out of `mutable`"):
        quantized(nn.RNN(nn.GRUCell(4), **READ))(variables, x, mutable=["quant_stats"])
