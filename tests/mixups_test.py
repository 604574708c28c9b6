"""What goes to another interface is an error that says where it belongs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import quantjax as qj
from quantjax.encoded import product

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(4)(x)))


MODEL, X = Net(), jnp.ones((2, 5))
PARAMS = {"Dense_0": {"kernel": jnp.ones((5, 4))}, "Dense_1": {"kernel": jnp.ones((4, 3))}}
Q, INPUTS, SGD = qj.uniform(4), qj.uniform_input(4), optax.sgd(0.1)
STATE = Q.init(PARAMS)
ENCODED = Q.encode(PARAMS, STATE)
LINEAR = nnx.Linear(5, 4, rngs=nnx.Rngs(0))

WEIGHTS = "expected a Quantizer, got uniform_input.*InputQuantizer goes to linen.quantize_inputs"
PATTERNS = "with at least one pattern, got"
STATES = "expected the QuantState that `init` or `update` returned"
MIXUPS = {
    "input quantizer as PSG's target": (lambda: qj.scale_by_position(INPUTS, strength=1), WEIGHTS),
    "number as PSG's target": (lambda: qj.scale_by_position(4, strength=1), "a Quantizer, got 4"),
    "arguments of psg": (lambda: qj.psg(Q, 0.1, strength=1), "a Quantizer, got 0.1"),
    "input quantizer in a partition": (lambda: qj.partition({".*": INPUTS}), WEIGHTS),
    "partition of one": (lambda: qj.partition(Q), PATTERNS),
    "partition of a list": (lambda: qj.partition([Q]), PATTERNS),
    "input quantizer in a chain": (lambda: qj.chain(Q, INPUTS), WEIGHTS),
    "chain of a list": (lambda: qj.chain([Q, Q]), "expected a Quantizer"),
    "optimizer in a chain": (lambda: qj.chain(Q, SGD), "an optimizer goes into optax.chain"),
    "stacked input quantizer": (lambda: qj.stacked(INPUTS, {"a": 1}), WEIGHTS),
    "arguments of stacked": (lambda: qj.stacked({"a": 1}, Q), "expected a Quantizer"),
    "arguments of named": (lambda: qj.named(Q, {"a": "kernel"}), PATTERNS),
    "input quantizer for ALQ": (lambda: qj.alq(INPUTS, qj.alq_rounds(5)), WEIGHTS),
    "no schedule": (lambda: qj.alq(qj.multi_bit(2, -2), 5), "phases, as alq_rounds gives them"),
    "arguments of proximal": (lambda: qj.proximal(Q, SGD, qj.hard()), "expected a Quantizer, got"),
    "model as params": (lambda: Q.init(MODEL), "expected a tree of params"),
    "state before params": (lambda: Q.apply(STATE, PARAMS), STATES),
    "state before params, encode": (lambda: Q.encode(STATE, PARAMS), STATES),
    "buffers as state": (lambda: Q.update(PARAMS, STATE.buffers), STATES),
    "params as state, owned": (lambda: qj.owned(PARAMS, STATE), STATES),
    "params for a penalty": (lambda: qj.srq(3, learn_bits=True).penalty(PARAMS), STATES),
    "variables for params": (lambda: Q.apply({"params": PARAMS}, STATE), "made for another tree"),
    "params for an input": (lambda: INPUTS.init(PARAMS), "takes one array, the input of a layer"),
    "params as an input's state": (lambda: INPUTS.apply(X, PARAMS), STATES),
    "product without pack": (lambda: product(X, ENCODED["Dense_0"]["kernel"]), "what `pack`"),
    "linen, model": (lambda: qj.linen.quantize_inputs(MODEL, INPUTS), "pass model.apply"),
    "linen, NNX model": (lambda: qj.linen.quantize_inputs(LINEAR, INPUTS), "goes to quantjax.nnx"),
    "linen, weights": (lambda: qj.linen.quantize_inputs(MODEL.apply, Q), "is a Quantizer"),
    "nnx, apply": (lambda: qj.nnx.quantize_inputs(MODEL.apply, INPUTS), "quantjax.linen"),
    "nnx, weights": (lambda: qj.nnx.quantize_inputs(LINEAR, Q), "is a Quantizer"),
    "nnx, inputs": (
        lambda: qj.nnx.quantize_weights(LINEAR, INPUTS),
        "quantjax.nnx.quantize_inputs",
    ),
    "export of a model": (lambda: qj.export(MODEL, {"params": ENCODED}, X), "pass model.apply"),
    "statistics of a model": (
        lambda: qj.linen.reestimate_batch_norm(MODEL, {"params": PARAMS}, X),
        "pass model.apply",
    ),
}


@pytest.mark.parametrize("name", MIXUPS)
def test_it_is_told(name):
    call, message = MIXUPS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_encoded_leaves_serve_packed_models():
    variables = MODEL.init(jax.random.key(0), X)
    encoded = Q.encode(variables["params"], Q.init(variables["params"]))
    expected = MODEL.apply({"params": qj.decode(encoded)}, X)
    assert jnp.array_equal(qj.linen.packed(MODEL.apply)({"params": encoded}, X), expected)
