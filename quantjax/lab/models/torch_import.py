"""Weights of PyTorch checkpoints for the models of `quantjax.lab.models`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from quantjax.lab.models.networks import VGG16_STAGES, VGG16BN, LeNet5, ResNet, ResNet18, SmallCNN

BATCH_NORM = {
    "weight": "params/{}/scale",
    "bias": "params/{}/bias",
    "running_mean": "batch_stats/{}/mean",
    "running_var": "batch_stats/{}/var",
}
LINEAR = {"weight": "params/{}/kernel", "bias": "params/{}/bias"}


class Layer(NamedTuple):
    """Where a torch layer goes."""

    path: str  # of the Flax layer, such as "BasicBlock_0/Conv_1"
    flattened: int = 1  # channels of the map that this dense layer's input was flattened from


def load_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns a state dict, torch name -> array, from an `.npz` or `.safetensors` file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(
            f"{path} ends in {path.suffix!r}, expected .npz or .safetensors; in torch, write it "
            "with safetensors.torch.save_file(model.state_dict(), ...)"
        )
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def import_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, np.ndarray],
    image_shape: tuple[int, int, int],
    layers: Mapping[str, Layer] | None = None,
) -> dict:
    """Returns the model's variables (`params`, and `batch_stats` if it has any) as float32 arrays.

    image_shape: (h, w, c) of one input. layers: torch prefix -> Layer (None: `torch_layers`).
    Kernels turn from OIHW to HWIO and from OI to IO; `num_batches_tracked` and names in double
    underscores are ignored, every other name must find its place.

    Raises:
      ValueError: names that are missing, left over or of another shape, all of them listed.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = flatten_dict(dict(jax.eval_shape(model.init, jax.random.key(0), images)), sep="/")
    left = {name: array for name, array in state_dict.items() if not _ignored(name)}
    missing, misshapen, variables = [], [], {}
    for prefix, layer in (layers or torch_layers(model)).items():
        fields = BATCH_NORM if f"batch_stats/{layer.path}/mean" in shapes else LINEAR
        for field, target in fields.items():
            name, target = f"{prefix}.{field}", target.format(layer.path)
            if target not in shapes:  # a layer without bias
                continue
            if name not in left:
                missing.append(name)
                continue
            array, expected = np.asarray(left.pop(name)), _torch_shape(shapes[target].shape)
            if array.shape != expected:
                misshapen.append(f"{name} {array.shape}, expected {expected}")
                continue
            variables[target] = jnp.asarray(_to_flax(array, layer), shapes[target].dtype)
    problems = {"missing": missing, "left over": sorted(left), "of another shape": misshapen}
    if not any(problems.values()):
        problems["without a torch name"] = sorted(shapes.keys() - variables.keys())
    if any(problems.values()):
        listed = "; ".join(f"{what}: {names}" for what, names in problems.items() if names)
        raise ValueError(f"the state dict does not fit {type(model).__name__}: {listed}")
    return unflatten_dict(variables, sep="/")


def torch_layers(model: nn.Module) -> dict[str, Layer]:
    """Returns torch prefix -> Layer under the names that public checkpoints use.

    ResNets: conv1, bn1, layer1.0.conv1, layer2.0.downsample.0, fc. VGG16BN: features.0, classifier.
    LeNet5 and SmallCNN: conv1, conv2, fc1, fc2.

    Raises:
      ValueError: another kind of model.
    """
    if isinstance(model, ResNet):
        return _resnet_layers(stages=3, blocks=(model.depth - 2) // 6)
    if isinstance(model, ResNet18):
        return _resnet_layers(stages=4, blocks=2)
    if isinstance(model, VGG16BN):
        return _vgg16_layers()
    if isinstance(model, LeNet5 | SmallCNN):
        flattened = model.features[1] if isinstance(model, LeNet5) else 32
        return {
            "conv1": Layer("Conv_0"),
            "conv2": Layer("Conv_1"),
            "fc1": Layer("Dense_0", flattened),
            "fc2": Layer("Dense_1"),
        }
    raise ValueError(
        f"no torch names are known for {type(model).__name__}, expected ResNet, VGG16BN, LeNet5 "
        "or SmallCNN; pass layers={torch prefix: Layer(path)}"
    )


def _resnet_layers(stages: int, blocks: int) -> dict[str, Layer]:
    layers = {"conv1": Layer("Conv_0"), "bn1": Layer("BatchNorm_0"), "fc": Layer("Dense_0")}
    for stage in range(stages):
        for block in range(blocks):
            prefix, path = f"layer{stage + 1}.{block}", f"BasicBlock_{stage * blocks + block}"
            pairs = [("conv1", "bn1"), ("conv2", "bn2")]
            if stage > 0 and block == 0:
                pairs.append(("downsample.0", "downsample.1"))
            for index, (convolution, norm) in enumerate(pairs):
                layers[f"{prefix}.{convolution}"] = Layer(f"{path}/Conv_{index}")
                layers[f"{prefix}.{norm}"] = Layer(f"{path}/BatchNorm_{index}")
    return layers


def _vgg16_layers() -> dict[str, Layer]:
    layers, index, position = {}, 0, 0
    for stage in VGG16_STAGES:
        for _ in stage:
            layers[f"features.{position}"] = Layer(f"Conv_{index}")
            layers[f"features.{position + 1}"] = Layer(f"BatchNorm_{index}")
            index, position = index + 1, position + 3  # and the ReLU
        position += 1  # the pooling
    return layers | {"classifier": Layer("Dense_0")}


def _ignored(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last == "num_batches_tracked" or (name.startswith("__") and name.endswith("__"))


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """HWIO -> OIHW, IO -> OI; vectors stay."""
    return (*shape[:-3:-1], *shape[:-2])


def _to_flax(array: np.ndarray, layer: Layer) -> np.ndarray:
    """OIHW -> HWIO, OI -> IO; a flattened map's inputs from channels, h, w to h, w, channels."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if array.ndim == 2:
        outputs, inputs = array.shape
        return array.reshape(outputs, layer.flattened, -1).transpose(2, 1, 0).reshape(inputs, -1)
    return array
