import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import quantjax as qj
from quantjax.lab import data, models
from quantjax.lab.deploy import deploy
from quantjax.lab.models.torch_import import Layer, import_state_dict, load_torch, torch_layers
from quantjax.lab.train.evaluation import make_evaluate
from quantjax.lab.train.tasks import classification

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
RESNET = GOLDEN / "ResNet82_state_dict.npz"
needs_golden = pytest.mark.skipif(
    not RESNET.exists(), reason="the golden arrays of shared/golden are not beside the repository"
)


def _convolution(x, weight, bias, pad):
    """Cross-correlation of [n, c, h, w] with OIHW, one kernel position at a time."""
    size = weight.shape[-1]
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height, width = x.shape[2] - size + 1, x.shape[3] - size + 1
    out = np.zeros((len(x), len(weight), height, width))
    for row in range(size):
        for column in range(size):
            part = x[:, :, row : row + height, column : column + width]
            out += np.einsum("nchw,oc->nohw", part, weight[:, :, row, column])
    return out + bias.reshape(1, -1, 1, 1)


def _pool(x):
    n, channels, height, width = x.shape
    x = x[:, :, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, channels, height // 2, 2, width // 2, 2).max((3, 5))


def _batch_norm(x, state, name):
    scale, bias, mean, var = (
        state[f"{name}.{field}"].reshape(1, -1, 1, 1)
        for field in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def _relu(x):
    return np.maximum(x, 0)


def _random_state(shapes):
    """Weights that keep the scale of activations, and norms away from the identity."""
    rng = np.random.default_rng(0)
    state = {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape) * np.sqrt(2 / max(np.prod(shape[1:]), 1))
        if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            values = rng.uniform(0.5, 1.5, shape)
        state[name] = values.astype(np.float32)
    return state


def _logits(model, state, images):
    """Runs the imported model on [n, c, h, w]."""
    images = images.transpose(0, 2, 3, 1)
    variables = import_state_dict(model, state, images.shape[1:])
    return np.asarray(jax.jit(model.apply)(variables, images.astype(np.float32)))


@pytest.mark.parametrize(
    ("model", "size", "channels", "pad"),
    [
        (models.LeNet5(7, (6, 5, 11), "VALID"), (21, 24), 2, 0),
        (models.LeNet5(7, (6, 5, 11), "SAME"), (12, 14), 1, 2),
        (models.SmallCNN(7), (8, 12), 1, 1),
    ],
)
def test_plain_networks_equal_a_float64_forward_pass(model, size, channels, pad):
    kernel, (first, second, hidden) = (
        (5, model.features) if isinstance(model, models.LeNet5) else (3, (16, 32, 64))
    )
    images = np.random.default_rng(1).normal(size=(3, channels, *size))
    for _ in (1, 2):
        size = tuple((side + 2 * pad - kernel + 1) // 2 for side in size)
    flat = second * size[0] * size[1]
    shapes = {
        "conv1.weight": (first, channels, kernel, kernel),
        "conv1.bias": (first,),
        "conv2.weight": (second, first, kernel, kernel),
        "conv2.bias": (second,),
        "fc1.weight": (hidden, flat),
        "fc1.bias": (hidden,),
        "fc2.weight": (7, hidden),
        "fc2.bias": (7,),
    }
    state = _random_state(shapes)
    x = images
    for layer in ("conv1", "conv2"):
        x = _convolution(x, state[f"{layer}.weight"], state[f"{layer}.bias"], pad)
        x = _pool(_relu(x))
    assert x.shape[2] > 1 < x.shape[3]  # or the order of flattening would not matter
    x = x.reshape(len(x), -1)  # torch flattens channels first
    x = _relu(x @ state["fc1.weight"].T + state["fc1.bias"])
    expected = x @ state["fc2.weight"].T + state["fc2.bias"]
    np.testing.assert_allclose(_logits(model, state, images), expected, atol=1e-5, rtol=1e-4)


def test_vgg16_equals_a_float64_forward_pass():
    plan = [64, 64, "M", 128, 128, "M", *(256,) * 3, "M", *(512,) * 3, "M", *(512,) * 3, "M"]
    steps, shapes, position, channels = [], {}, 0, 3
    for features in plan:
        name = f"features.{position}"
        steps.append((features, name, f"features.{position + 1}"))
        if features == "M":
            position += 1
            continue
        shapes |= {f"{name}.weight": (features, channels, 3, 3), f"{name}.bias": (features,)}
        for field in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"features.{position + 1}.{field}"] = (features,)
        position, channels = position + 3, features
    assert position == 44  # as in torch: features.0 to features.43
    state = _random_state(shapes | {"classifier.weight": (10, 512), "classifier.bias": (10,)})
    images = np.random.default_rng(1).normal(size=(1, 3, 32, 32))
    x = images
    for features, name, norm in steps:
        if features == "M":
            x = _pool(x)
            continue
        x = _convolution(x, state[f"{name}.weight"], state[f"{name}.bias"], 1)
        x = _relu(_batch_norm(x, state, norm))
    expected = x.reshape(1, 512) @ state["classifier.weight"].T + state["classifier.bias"]
    logits = _logits(models.VGG16BN(), state, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


@needs_golden
def test_public_resnet_gives_the_golden_logits():
    golden = np.load(GOLDEN / "psg_ckpt_ResNet82.npz")
    logits = _logits(models.ResNet(32, 100), load_torch(RESNET), golden["input"])
    np.testing.assert_allclose(logits, golden["logits.fp.f32"], atol=1e-4, rtol=0)
    pixels = golden["input_uint8_nchw"].transpose(0, 2, 3, 1)
    normal = data.normalize(pixels, *data.STATISTICS["cifar100"])
    np.testing.assert_allclose(normal, golden["input"].transpose(0, 2, 3, 1), atol=1e-6)


@needs_golden
def test_errors_list_every_name_that_does_not_fit():
    model, state = models.ResNet(32, 100), load_torch(RESNET)
    kernel = state.pop("layer2.0.conv1.weight")
    with pytest.raises(ValueError, match=r"ResNet: missing: \['layer2\.0\.conv1\.weight'\]$"):
        import_state_dict(model, state, (32, 32, 3))
    state["layer2.0.conv1.weigth"] = kernel
    with pytest.raises(ValueError, match=r"missing: .*; left over: \['layer2\.0\.conv1\.weigth'\]"):
        import_state_dict(model, state, (32, 32, 3))
    state["layer2.0.conv1.weight"] = state.pop("layer2.0.conv1.weigth")
    with pytest.raises(ValueError, match=r"fc\.weight \(100, 64\), expected \(10, 64\)"):
        import_state_dict(models.ResNet(32, 10), state, (32, 32, 3))
    with pytest.raises(ValueError, match=r"left over: .*layer1\.3\.bn1\.bias"):
        import_state_dict(models.ResNet(20, 100), state, (32, 32, 3))
    with pytest.raises(ValueError, match=r"missing: .*layer3\.8\.conv2\.weight"):
        import_state_dict(models.ResNet(56, 100), state, (32, 32, 3))


def test_layers_of_other_models_are_the_callers_to_name():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x), nn.Dense(2, use_bias=False)(x)

    state = {"a.weight": np.ones((3, 4)), "a.bias": np.ones(3), "b.weight": np.arange(8.0)}
    state["b.weight"] = state["b.weight"].reshape(2, 4)
    layers = {"a": Layer("Dense_0"), "b": Layer("Dense_1")}
    params = import_state_dict(Two(), state, (4,), layers)["params"]
    assert params["Dense_1"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(params["Dense_1"]["kernel"], state["b.weight"].T)
    with pytest.raises(ValueError, match="no torch names are known for Two"):
        torch_layers(Two())
    del layers["b"], state["b.weight"]
    with pytest.raises(ValueError, match=r"without a torch name: \['params/Dense_1/kernel'\]"):
        import_state_dict(Two(), state, (4,), layers)


def test_files(tmp_path):
    state = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2)}
    np.savez(tmp_path / "state.npz", **state)
    save_file(state, tmp_path / "state.safetensors")
    for name in ("state.npz", "state.safetensors"):
        loaded = load_torch(tmp_path / name)
        assert loaded.keys() == state.keys()
        for key, array in state.items():
            np.testing.assert_array_equal(loaded[key], array)
    with pytest.raises(ValueError, match=r"ends in '\.pt', expected \.npz or \.safetensors"):
        load_torch(tmp_path / "state.pt")
    for name in ("absent.npz", "absent.safetensors"):
        with pytest.raises(FileNotFoundError):
            load_torch(tmp_path / name)


@needs_golden
@pytest.mark.slow
@pytest.mark.skipif(
    "QUANTJAX_DATA_DIR" not in os.environ,
    reason="QUANTJAX_DATA_DIR names no directory of prepared TFDS sets",
)
@pytest.mark.parametrize(("bits", "expected"), [(None, 69.63), (4, 56.73)])
def test_public_resnet_reaches_its_accuracy_on_cifar100(bits, expected):
    cifar = data.load("cifar100", os.environ["QUANTJAX_DATA_DIR"])
    model = models.ResNet(32, 100)
    variables = import_state_dict(model, load_torch(RESNET), cifar.test.images.shape[1:])
    if bits is not None:  # every layer, the dense bias included
        variables = deploy(variables, qj.uniform(bits, biases=True)).variables
    evaluate = make_evaluate(classification(model, cifar))
    assert evaluate(variables, cifar.test).accuracy == pytest.approx(expected, abs=0.1)


@needs_golden
def test_public_resnet_rounded_to_four_bits_gives_the_stored_logits():
    golden = np.load(GOLDEN / "psg_ckpt_ResNet82.npz")
    model = models.ResNet(32, 100)
    variables = import_state_dict(model, load_torch(RESNET), (32, 32, 3))
    shipped = deploy(variables, qj.uniform(4, biases=True))
    images = jnp.asarray(golden["input"].transpose(0, 2, 3, 1))
    logits = jax.jit(model.apply)(shipped.variables, images)
    np.testing.assert_allclose(logits, golden["logits.b4.f32"], rtol=1e-4, atol=1e-4)
    total = sum(row.squared_error for row in shipped.layers if row.path.endswith("kernel"))
    np.testing.assert_allclose(total, golden["sse_total.b4"], rtol=1e-5)
