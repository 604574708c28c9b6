"""Linen models on packed kernels give what they give on decoded ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

import quantjax as qj
from quantjax.encoded import packed as packed_lib

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Everything(nn.Module):
    """Every layer that has a kernel or an embedding."""

    @nn.compact
    def __call__(self, x, tokens):
        embed = nn.Embed(11, 8)
        e = embed(tokens)
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.ConvTranspose(4, (2, 2))(x)
        x = nn.ConvLocal(3, (2, 2))(x).reshape(x.shape[0], -1)
        x = nn.Dense(8, name="dense")(x)
        x = x + nn.MultiHeadDotProductAttention(2)(e, e).mean(axis=1)
        x = nn.DenseGeneral((2, 4))(nn.DenseGeneral(8)(x))
        x = nn.DenseGeneral(8, axis=(-2, -1))(x)
        return embed.attend(nn.Einsum((8, 8), "...i,io->...o")(x))


def inputs(rows):
    rng = np.random.default_rng(rows)
    images = jnp.asarray(rng.normal(size=(rows, 4, 4, 3)), jnp.float32)
    return images, jnp.asarray(rng.integers(0, 11, (rows, 3)))


def encodings(model, *args, quantizer=None):
    """Params of a model, decoded and packed."""
    quantizer = qj.uniform(3) if quantizer is None else quantizer
    params = jax.jit(model.init)(jax.random.key(0), *args)["params"]
    encoded = quantizer.encode(params, quantizer.init(params))
    return {"params": qj.decode(encoded)}, {"params": qj.pack(encoded)}


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def of_kind(tree, kind):
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


@pytest.mark.parametrize("rows", [2, 5])
def test_every_layer(rows):
    model, args = Everything(), inputs(rows)
    decoded, packed = encodings(model, *args)
    assert len(of_kind(packed, qj.Packed)) == 13
    apply = qj.linen.packed(model.apply)
    expected = jax.jit(model.apply)(decoded, *args)
    close(jax.jit(apply)(packed, *args), expected)
    close(jax.jit(apply)(decoded, *args), expected)  # nothing packed: nothing happens


def test_few_rows_never_decode_a_dense_kernel(monkeypatch):
    model, x = nn.Dense(30), jnp.ones((2, 50))
    decoded, packed = encodings(model, x)
    expected = model.apply(decoded, x)
    monkeypatch.setattr(packed_lib.Packed, "decode", None)
    close(qj.linen.packed(model.apply)(packed, x), expected)
    with pytest.raises(TypeError, match="NoneType"):
        qj.linen.packed(model.apply)(packed, jnp.ones((9, 50)))


QUANTIZERS = {
    "ternary": qj.ternary(),
    "with biases": qj.uniform(4, axes="channel", biases=True),
    "bases": qj.multi_bit(2, axes=-2),
    "focused": qj.chain(qj.magnitude(0.5), qj.focused(4)),
    "8 bits": qj.uniform(8),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_quantizers(quantizer):
    model, x = nn.Sequential([nn.Dense(40), nn.relu, nn.Dense(6)]), jnp.ones((1, 30))
    decoded, packed = encodings(model, x, quantizer=quantizer)
    close(jax.jit(qj.linen.packed(model.apply))(packed, x), model.apply(decoded, x))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, None])
def test_dtypes(dtype):
    model, x = nn.Dense(6, dtype=dtype), jnp.ones((1, 30), jnp.bfloat16)
    decoded, packed = encodings(model, x)
    found = qj.linen.packed(model.apply)(packed, x)
    expected = model.apply(decoded, x)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-2
    )


class Doubled(nn.Dense):
    """A layer of a user's own."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_subclasses_and_own_products_decode():
    def product(x, kernel, dims, precision=None, preferred_element_type=None):
        return 3 * jax.lax.dot_general(x, kernel, dims)

    for model in (Doubled(5), nn.Dense(5, dot_general=product)):
        decoded, packed = encodings(model, jnp.ones((1, 8)))
        close(
            qj.linen.packed(model.apply)(packed, jnp.ones((1, 8))),
            model.apply(decoded, jnp.ones((1, 8))),
        )


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8)
        return nn.BatchNorm(use_running_average=False)(layer(nn.relu(layer(x))))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(8)(x)) + nn.Conv(8, (1,))(x), None


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned()(x, None)[0]


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("rows", [2, 7])
def test_scanned_layers(remat, rows):
    model, x = Stack(remat), jnp.ones((1, rows, 8))
    quantizer = qj.stacked(qj.uniform(2), {".*": 1})
    decoded, packed = encodings(model, x, quantizer=quantizer)
    close(jax.jit(qj.linen.packed(model.apply))(packed, x), model.apply(decoded, x))


def test_shared_layers_and_mutable_collections():
    model, x = Twice(), jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    quantizer = qj.uniform(2)
    encoded = quantizer.encode(variables["params"], quantizer.init(variables["params"]))
    others = {"batch_stats": variables["batch_stats"]}
    expected = model.apply({"params": qj.decode(encoded), **others}, x, mutable=["batch_stats"])
    apply = qj.linen.packed(model.apply)
    found = apply({"params": qj.pack(encoded), **others}, x, mutable=["batch_stats"])
    jax.tree.map(close, found, expected)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x)).reshape(x.shape[0], -1)
        return nn.DenseGeneral(6)(nn.relu(nn.Dense(8)(x)))


@pytest.mark.parametrize("model", [Small(), nn.Dense(5)], ids=["model", "layer"])
@pytest.mark.parametrize("rows", [2, 5])
def test_inputs_are_quantized_on_either_side(model, rows):
    images = inputs(rows)[0]
    args = (images if isinstance(model, Small) else images.reshape(rows, -1),)
    decoded, packed = encodings(model, *args)
    quantize = qj.uniform_input(2)
    apply = qj.linen.quantize_inputs(model.apply, quantize)
    _, quant = apply(decoded, *args, mutable=["quant", "quant_stats"])
    expected = jax.jit(apply)({**decoded, **quant}, *args)
    assert not np.allclose(expected, model.apply(decoded, *args), rtol=1e-3)
    for way in (
        qj.linen.packed(apply),
        qj.linen.quantize_inputs(qj.linen.packed(model.apply), quantize),
    ):
        close(jax.jit(way)({**packed, **quant}, *args), expected)


def test_a_packed_bias_beside_a_plain_kernel():
    model, x = nn.Dense(6), jnp.ones((1, 8))
    params = {"kernel": jnp.ones((8, 6)), "bias": jnp.arange(6.0)}
    bias = qj.Grid(np.arange(6, dtype=np.int8), np.ones(1, np.float32), 4, np.dtype("float32"))
    packed = {"params": qj.pack(params | {"bias": bias})}
    close(qj.linen.packed(model.apply)(packed, x), model.apply({"params": params}, x))


def test_intermediates_are_captured_once():
    model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), jnp.ones((2, 8))
    decoded, packed = encodings(model, x)
    options = {"capture_intermediates": True, "mutable": ["intermediates"]}
    expected = model.apply(decoded, x, **options)
    jax.tree.map(close, qj.linen.packed(model.apply)(packed, x, **options), expected)


def test_embeddings_out_of_range_are_those_of_flax():
    model, index = nn.Embed(300, 8), jnp.asarray([7, 299, 300, -1, -300, -301])
    decoded, packed = encodings(model, index)
    apply = jax.jit(qj.linen.packed(model.apply))
    np.testing.assert_array_equal(apply(packed, index), model.apply(decoded, index))
    small = jnp.asarray([7, 255], jnp.uint8)
    np.testing.assert_array_equal(apply(packed, small), model.apply(decoded, small))


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.lecun_normal(), (8, 4))


def test_bad_input():
    x = jnp.ones((1, 8))
    decoded, packed = encodings(nn.Sequential([Own()]), x)
    del decoded
    with pytest.raises(
        ValueError, match=r"layers_0/kernel: a Own cannot multiply by a packed leaf"
    ):
        qj.linen.packed(nn.Sequential([Own()]).apply)(packed, x)
    _, packed = encodings(nn.Dense(4), x)
    for model, other in ((nn.Dense(5), x), (nn.Dense(4), x[:, :6]), (nn.Dense(4), x[0, :6])):
        with pytest.raises(errors.ScopeParamShapeError, match="kernel"):
            qj.linen.packed(model.apply)(packed, other)
    with pytest.raises(ValueError, match="jitted already"):
        qj.linen.packed(jax.jit(Own().apply))
    with pytest.raises(ValueError, match=r"pass model\.apply"):
        qj.linen.packed(Own())
