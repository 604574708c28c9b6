import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax.lab.models import networks as models

SHAPES = {
    "small-cnn": (8, 8, 1),
    "small-cnn-bn": (8, 8, 1),
    "lenet5": (28, 28, 1),
    "lenet5-wide": (28, 28, 1),
    "resnet8": (16, 16, 3),
    "resnet18": (32, 32, 3),
    "resnet20": (32, 32, 3),
    "resnet32": (32, 32, 3),
    "resnet56": (32, 32, 3),
    "vgg7": (32, 32, 3),
    "vgg16-bn": (32, 32, 3),
    "vgg-small": (32, 32, 3),
}
# Counted by hand from the layers; of LeNet-5, VGG-16 and the ImageNet ResNet-18 the figures are
# published.
PARAMETERS = {
    "small-cnn": (9 * 16 + 16) + (9 * 16 * 32 + 32) + (128 * 64 + 64) + (64 * 10 + 10),
    "small-cnn-bn": (9 * 16 + 32) + (9 * 16 * 32 + 64) + (128 * 64 + 64) + (64 * 10 + 10),
    "lenet5": 431_080,
    "lenet5-wide": (25 * 32 + 32) + (25 * 32 * 64 + 64) + (3136 * 512 + 512) + (512 * 10 + 10),
    "resnet18": 11_689_512 - 990 * (512 + 1) - 3 * 64 * (7 * 7 - 3 * 3),
    "resnet8": 9 * (3 * 16 + 2 * 16**2 + 16 * 32 + 32**2 + 32 * 64 + 64**2)
    + (16 * 32 + 32 * 64)  # of the shortcuts
    + 2 * (3 * 16 + 3 * 32 + 3 * 64)
    + (64 * 10 + 10),
    "resnet20": 272_474,
    "resnet32": 466_906,
    "resnet56": 855_770,
    "vgg7": 9 * (3 * 128 + 128 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512)
    + (8192 * 1024 + 10 * 1024 + 10)
    + (2 * 2 * (128 + 256 + 512) + 1024),
    "vgg16-bn": 14_728_266,
    # The kernels are 14.02 million: 56.09 MB in table 3 of ALQ.
    "vgg-small": 9 * (3 * 128 + 128**2 + 128 * 256 + 256**2 + 256 * 512 + 512**2)
    + 2 * 2 * (128 + 256 + 512)
    + (8192 + 1024) * 1024
    + 2 * 2 * 1024
    + (1024 * 10 + 10),
}


def _shapes(model, image_shape):
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_logits(name):
    model = models.build(name, classes=10)
    variables = _shapes(model, SHAPES[name])
    params = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in params) == PARAMETERS[name]
    assert all(leaf.dtype == jnp.float32 for leaf in params)
    images = jax.ShapeDtypeStruct((2, *SHAPES[name]), jnp.float32)

    def train(variables, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updated = jax.eval_shape(train, variables, images)
    assert logits.shape == (2, 10)
    assert jax.tree.structure(updated.get("batch_stats")) == jax.tree.structure(
        variables.get("batch_stats")
    )


def _values(shape):
    """Stands in for `init`, whose random numbers take seconds to compile."""
    values = np.random.default_rng(shape.size).normal(size=shape.shape)
    return jnp.asarray(np.abs(values) if len(shape.shape) == 1 else 0.1 * values, shape.dtype)


@pytest.mark.parametrize("kind", [models.SmallCNN, models.lenet5, models.ResNet])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32(kind):
    images = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    model, half = kind(), kind(dtype=jnp.bfloat16)
    shapes = _shapes(half, (16, 16, 3))
    assert shapes == _shapes(model, (16, 16, 3))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    variables = jax.tree.map(_values, shapes)
    logits = jax.jit(model.apply)(variables, images)
    rounded = jax.jit(half.apply)(variables, images)
    assert rounded.dtype == jnp.float32
    difference = float(jnp.abs(logits - rounded).max())
    assert 0 < difference < 0.1 * float(jnp.abs(logits).max())


def test_running_statistics_move_by_a_tenth():
    x = 3 + 2 * np.random.default_rng(0).normal(size=(8, 4, 4, 2)).astype(np.float32)
    norm = models._batch_norm(True, None)
    variables = norm.init(jax.random.key(0), x)
    _, updated = norm.apply(variables, x, mutable=["batch_stats"])
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-5)


def test_paths_are_flax_defaults():
    params = _shapes(models.build("resnet20", classes=10), (32, 32, 3))["params"]
    assert params["Conv_0"]["kernel"].shape == (3, 3, 3, 16)
    assert params["BasicBlock_3"]["Conv_2"]["kernel"].shape == (1, 1, 16, 32)
    assert "Conv_2" not in params["BasicBlock_0"]
    assert "bias" not in params["Conv_0"]
    assert params["Dense_0"]["kernel"].shape == (64, 10)


def test_convolutions_start_at_he_variance():
    x = jnp.zeros((1, 4, 4, 16))
    kernel = models._conv3x3(64, 2, None).init(jax.random.key(0), x)["params"]["kernel"]
    assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (1, 7, 5, 2), (1, 2, 3, 1)])
def test_max_pool_equals_flax(shape):
    x = jax.random.normal(jax.random.key(0), shape)

    def ours(x):
        return (models.max_pool_2x2(x) ** 2).sum()

    def theirs(x):
        return (nn.max_pool(x, (2, 2), (2, 2)) ** 2).sum()

    expected = nn.max_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(models.max_pool_2x2(x), expected)
    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(theirs)(x), rtol=1e-6)


def test_maps_too_small_to_pool():
    with pytest.raises(ValueError, match="a map of 1x4 cannot be pooled"):
        models.max_pool_2x2(jnp.zeros((1, 1, 4, 2)))
    with pytest.raises(ValueError, match="a map of 1x1"):
        _shapes(models.VGG16BN(), (16, 16, 3))


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_wrong_depths(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}, expected 6 n"):
        models.ResNet(depth=depth)


def test_names():
    assert models.MODELS.keys() - SHAPES.keys() == set(models.TEXT)
    with pytest.raises(ValueError, match="unknown model 'resnet-20'; did you mean 'resnet20'"):
        models.build("resnet-20", classes=10)
    assert models.default_model("digits") == "small-cnn"
    assert models.default_model("mnist") == "lenet5"
    assert models.default_model("cifar100") == "resnet20"
    assert models.default_model("mine", (14, 14, 3)) == "small-cnn"
    assert models.default_model("fashion_mnist", (28, 28, 1)) == "lenet5"
    assert models.default_model("svhn_cropped", (32, 32, 3)) == "resnet20"
    with pytest.raises(ValueError, match="unknown data set 'cifar'"):
        models.default_model("cifar")
    with pytest.raises(ValueError, match="4x4 pixels or more"):
        models.default_model("mine", (3, 9, 1))


@pytest.mark.parametrize("shape", [(4, 4, 1), (16, 16, 3), (28, 28, 1), (32, 48, 3)])
def test_default_models_take_images_of_their_size(shape):
    model = models.build(models.default_model("mine", shape), classes=3)
    assert _shapes(model, shape)["params"]["Dense_0"]["kernel"].ndim == 2
