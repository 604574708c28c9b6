"""NNX models on packed kernels give what they give on decoded ones."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import quantjax as qj
from quantjax.encoded import packed as packed_lib

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Everything(nnx.Module):
    """Every layer that has a kernel or an embedding."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.layers = nnx.List([nnx.Linear(96, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)])
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.general = nnx.LinearGeneral(8, (2, 4), rngs=rngs)

    def __call__(self, x, tokens):
        e = self.embed(tokens)
        x = nnx.relu(self.conv(x)).reshape(x.shape[0], -1)
        for layer in self.layers:
            x = layer(x)
        x = x + self.attention(e).mean(axis=1)
        return self.embed.attend(self.general(x).reshape(x.shape))


@pytest.fixture(scope="module")
def models():
    """A model on decoded and on packed kernels, and its packed params."""
    model = Everything(nnx.Rngs(0))
    quantizer = qj.uniform(3)
    params = nnx.state(model, nnx.Param)
    encoded = quantizer.encode(params, quantizer.init(params))
    decoded = nnx.clone(model)
    nnx.update(decoded, qj.decode(encoded))
    packed = qj.pack(encoded)
    return decoded, qj.nnx.packed(model, packed), packed


def inputs(rows):
    rng = np.random.default_rng(rows)
    images = jnp.asarray(rng.normal(size=(rows, 4, 4, 3)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 11, (rows, 3)))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 5])
def test_every_layer(models, rows):
    decoded, packed, _ = models
    args = inputs(rows)
    run = nnx.jit(lambda model, *args: model(*args))
    expected = run(decoded, *args)
    close(run(packed, *args), expected)
    graph, state = nnx.split(packed)
    close(jax.jit(lambda state: nnx.merge(graph, state)(*args))(state), expected)
    close(pickle.loads(pickle.dumps(packed))(*args), expected)


def test_few_rows_never_decode_a_linear_kernel(monkeypatch):
    layer = nnx.Linear(50, 30, rngs=nnx.Rngs(0))
    quantizer = qj.ternary()
    params = nnx.state(layer, nnx.Param)
    encoded = quantizer.encode(params, quantizer.init(params))
    packed = qj.nnx.packed(layer, qj.pack(encoded))
    nnx.update(layer, qj.decode(encoded))
    expected = layer(jnp.ones((2, 50)))
    monkeypatch.setattr(packed_lib.Packed, "decode", None)
    close(packed(jnp.ones((2, 50))), expected)
    with pytest.raises(TypeError, match="NoneType"):
        packed(jnp.ones((9, 50)))


def test_optimizers_do_not_see_bytes(models):
    _, packed, _ = models
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(packed, nnx.Param))} == {
        np.dtype("float32")
    }
    nnx.Optimizer(packed, optax.adam(1e-3), wrt=nnx.Param)
    kernels = jax.tree.leaves(nnx.state(packed, qj.nnx.PackedKernel))
    assert np.dtype("uint8") in {leaf.dtype for leaf in kernels}


@pytest.mark.parametrize("rows", [2, 5])
def test_inputs_are_quantized_on_either_side(models, rows):
    decoded, packed, params = models
    x, tokens = inputs(rows)
    quantizer = qj.uniform_input(2)
    expected = qj.nnx.quantize_inputs(decoded, quantizer)
    expected.eval()
    qj.nnx.calibrate(expected, [x], tokens=tokens)
    assert not np.allclose(expected(x, tokens), decoded(x, tokens), rtol=1e-3)
    after = qj.nnx.quantize_inputs(packed, quantizer)
    after.eval()
    qj.nnx.calibrate(after, [x], tokens=tokens)
    for model in (qj.nnx.packed(expected, params), after):
        close(model(x, tokens), expected(x, tokens))


def test_steps_of_quantized_inputs_stay_what_they_are():
    model = qj.nnx.quantize_inputs(
        nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0))), qj.lsq_input(4)
    )
    qj.nnx.calibrate(model, jnp.ones((2, 4)))
    params, quantizer = nnx.state(model, nnx.Param), qj.uniform(4)
    packed = qj.nnx.packed(model, qj.pack(quantizer.encode(params, quantizer.init(params))))
    kinds = [jax.tree.leaves(nnx.state(net, qj.nnx.QuantParam)) for net in (model, packed)]
    assert len(kinds[0]) == len(kinds[1]) == 1
    assert kinds[0] == kinds[1]


def test_plain_and_encoded_leaves_and_those_that_are_missing():
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    quantizer = qj.uniform(4)
    params = {"layers": {"1": {"kernel": model.layers[1].kernel[...], "bias": jnp.ones(2)}}}
    encoded = quantizer.encode(params, quantizer.init(params))
    found = qj.nnx.packed(model, encoded)
    kernel = found.layers[1].kernel
    assert isinstance(kernel, nnx.Param)
    np.testing.assert_array_equal(kernel[...], encoded["layers"]["1"]["kernel"].decode())
    np.testing.assert_array_equal(found.layers[1].bias[...], jnp.ones(2))
    np.testing.assert_array_equal(found.layers[0].kernel[...], model.layers[0].kernel[...])


class Tied(nnx.Module):
    """One weight in two places, of which the state names the first."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(8, 8, rngs=rngs)
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.linear.kernel = self.embed.embedding

    def __call__(self, index):
        return self.linear(self.embed(index))


def test_tied_weights_are_packed_in_all_places():
    model = Tied(nnx.Rngs(0))
    quantizer = qj.uniform(2)
    params = nnx.state(model, nnx.Param)
    encoded = quantizer.encode(params, quantizer.init(params))
    packed = qj.nnx.packed(model, qj.pack(encoded))
    nnx.update(model, qj.decode(encoded))
    close(packed(jnp.arange(3)), model(jnp.arange(3)))
    assert packed.linear.kernel is packed.embed.embedding


def test_packed_models_print(models):
    _, packed, _ = models
    assert "kernel=PackedKernel(" in repr(packed)
    assert "value=Array([[" in repr(packed.layers[0].kernel)


def test_bad_input(models):
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected an NNX model"):
        qj.nnx.packed(lambda x: x, {})
    with pytest.raises(
        ValueError, match=r"weight is none of the model's params: \['bias', 'kernel'\]"
    ):
        qj.nnx.packed(model, {"weight": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 4\), the model's \(4, 2\)"):
        qj.nnx.packed(model, {"kernel": jnp.ones((2, 4))})
