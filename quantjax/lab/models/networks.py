"""The papers' small networks in Flax Linen; kernels lie at paths such as `Conv_0/kernel`.

Every model but those of `TEXT` (see `models.text`) maps images [n, h, w, c] to logits [n, classes].
All take `train`, which is True while batch norm uses (and updates) the statistics of the batch;
models without batch norm ignore it. `dtype` is what layers compute in (None: float32); parameters
and logits stay float32.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from quantjax.lab.models.text import TextModel
from quantjax.lab.names import nearest_name_error

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
VGG16_STAGES = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
SAME_AS_TORCH = ((1, 1), (1, 1))  # with stride 2, "SAME" pads only one side


def max_pool_2x2(x):
    """Returns the maxima of 2x2 windows: [n, h, w, c] -> [n, h // 2, w // 2, c].

    The last row or column of an odd size is dropped. Ties share the gradient. The backward pass is
    8 times faster on the CPU than that of `nn.max_pool`.

    Raises:
      ValueError: h or w is below 2.
    """
    n, height, width, channels = x.shape
    if height < 2 or width < 2:
        raise ValueError(f"a map of {height}x{width} cannot be pooled; expected 2x2 or more")
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(n, height, 2, width, 2, channels).max(axis=(2, 4))


class SmallCNN(nn.Module):
    """Two convolutions and two dense layers, for images from 4x4 such as the 8x8 digits."""

    classes: int = 10
    dtype: Any = None
    batch_norm: bool = False  # after the convolutions

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=not self.batch_norm, dtype=self.dtype)(x)
            x = _batch_norm(train, self.dtype)(x) if self.batch_norm else x
            x = max_pool_2x2(nn.relu(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64, dtype=self.dtype)(x))
        return _logits(nn.Dense(self.classes, dtype=self.dtype)(x))


class LeNet5(nn.Module):
    """Two 5x5 convolutions with 2x2 pooling, two dense layers: `lenet5` and `lenet5_wide`."""

    classes: int = 10
    features: tuple[int, int, int] = (20, 50, 500)
    padding: str = "VALID"
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        *convolutions, hidden = self.features
        for features in convolutions:
            layer = nn.Conv(features, (5, 5), padding=self.padding, dtype=self.dtype)
            x = max_pool_2x2(nn.relu(layer(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(hidden, dtype=self.dtype)(x))
        return _logits(nn.Dense(self.classes, dtype=self.dtype)(x))


def lenet5(classes: int = 10, dtype=None) -> LeNet5:
    """20C5-MP2-50C5-MP2-500FC without padding: the network of Deep Compression and ALQ."""
    return LeNet5(classes, (20, 50, 500), "VALID", dtype)


def lenet5_wide(classes: int = 10, dtype=None) -> LeNet5:
    """32C5-MP2-64C5-MP2-512FC with padding: the network of RQ, SRQ and DropBits."""
    return LeNet5(classes, (32, 64, 512), "SAME", dtype)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 one where the shape changes."""

    features: int
    stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns [n, h / stride, w / stride, features]."""
        y = _conv3x3(self.features, self.stride, self.dtype)(x)
        y = nn.relu(_batch_norm(train, self.dtype)(y))
        y = _conv3x3(self.features, 1, self.dtype)(y)
        y = _batch_norm(train, self.dtype)(y)
        if y.shape != x.shape:
            x = nn.Conv(
                self.features,
                (1, 1),
                strides=self.stride,
                padding="VALID",
                use_bias=False,
                kernel_init=he_fan_out,
                dtype=self.dtype,
            )(x)
            x = _batch_norm(train, self.dtype)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The residual network for CIFAR: three stages of (depth - 2) / 6 blocks, 16 to 64 wide.

    Raises:
      ValueError: `depth` is not 8, 14, 20, 26, ...
    """

    depth: int = 20
    classes: int = 10
    dtype: Any = None

    def __post_init__(self):
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ValueError(f"depth is {self.depth}, expected 6 n + 2 such as 20, 32 or 56")
        super().__post_init__()

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        x = _residual_stages(x, (16, 32, 64), (self.depth - 2) // 6, self.dtype, train)
        return _logits(nn.Dense(self.classes, dtype=self.dtype)(x.mean(axis=(1, 2))))


class ResNet18(nn.Module):
    """ResNet-18 for images from 32x32: four stages of two blocks, 64 to 512 wide, no stem pool."""

    classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        x = _residual_stages(x, (64, 128, 256, 512), 2, self.dtype, train)
        return _logits(nn.Dense(self.classes, dtype=self.dtype)(x.mean(axis=(1, 2))))


class VGG7(nn.Module):
    """2x128C3-MP2-2x256C3-MP2-2x512C3-MP2-1024FC, the VGG-7 of RQ and SRQ; images from 8x8.

    Batch norm after every convolution; pooling comes before it (appendix F of SRQ).
    """

    classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        for features in (128, 256, 512):
            for pool in (False, True):
                x = _conv3x3(features, 1, self.dtype)(x)
                x = max_pool_2x2(x) if pool else x
                x = nn.relu(_batch_norm(train, self.dtype)(x))
        x = nn.relu(nn.Dense(1024, dtype=self.dtype)(x.reshape(x.shape[0], -1)))
        return _logits(nn.Dense(self.classes, dtype=self.dtype)(x))


class VGG16BN(nn.Module):
    """VGG-16 with batch norm and one dense layer, for images from 32x32."""

    classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        for stage in VGG16_STAGES:
            for features in stage:
                x = _conv3x3(features, 1, self.dtype, use_bias=True)(x)
                x = nn.relu(_batch_norm(train, self.dtype)(x))
            x = max_pool_2x2(x)
        return _logits(nn.Dense(self.classes, dtype=self.dtype)(x.mean(axis=(1, 2))))


class VGGSmall(nn.Module):
    """2x128C3-MP2-2x256C3-MP2-2x512C3-MP2-2x1024FC with batch norm: the VGG of ALQ, for 32x32."""

    classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        for features in (128, 256, 512):
            for _ in range(2):
                x = nn.relu(_batch_norm(train, self.dtype)(_conv3x3(features, 1, self.dtype)(x)))
            x = max_pool_2x2(x)
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.Dense(1024, use_bias=False, dtype=self.dtype)(x)
            x = nn.relu(_batch_norm(train, self.dtype)(x))
        return _logits(nn.Dense(self.classes, dtype=self.dtype)(x))


MODELS = {
    "small-cnn": SmallCNN,
    "small-cnn-bn": partial(SmallCNN, batch_norm=True),
    "lenet5": lenet5,
    "lenet5-wide": lenet5_wide,
    "resnet8": partial(ResNet, 8),
    "resnet18": ResNet18,
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet56": partial(ResNet, 56),
    "vgg7": VGG7,
    "vgg16-bn": VGG16BN,
    "vgg-small": VGGSmall,
    "text-small": TextModel,
}
TEXT = ("text-small",)  # of them, those that take bytes
DEFAULTS = {
    "digits": "small-cnn",
    "mnist": "lenet5",
    "cifar10": "resnet20",
    "cifar100": "resnet20",
    "tiny_shakespeare": "text-small",
}


def build(
    name: str, classes: int, dtype=None, *, shape: tuple[int, ...] | None = None
) -> nn.Module:
    """Returns the model of that name, one of `MODELS`.

    Args:
      name, classes, dtype: of the model.
      shape: of an example, (h, w, c) or (length,), that it must take; None: any.

    Raises:
      ValueError: unknown name (the nearest are named), or a model of images for text or the other
        way round.
    """
    if name not in MODELS:
        raise nearest_name_error("model", name, MODELS)
    if shape is not None and (len(shape) == 1) != (name in TEXT):
        taken = "bytes [length]" if name in TEXT else "images [h, w, c]"
        raise ValueError(f"the model {name!r} takes {taken}, the examples are {list(shape)}")
    return MODELS[name](classes=classes, dtype=dtype)


def default_model(dataset_name: str, shape: tuple[int, ...] | None = None) -> str:
    """Returns the model for a data set: by its name, or else by an example's shape.

    That is (h, w, c) of an image, (length,) of a window of text.

    Raises:
      ValueError: unknown name and no shape, or images below 4x4.
    """
    if dataset_name in DEFAULTS:
        return DEFAULTS[dataset_name]
    if shape is None:
        raise nearest_name_error("data set", dataset_name, DEFAULTS)
    if len(shape) == 1:
        return "text-small"
    side = min(shape[:2])
    if side < 4:
        raise ValueError(f"images have shape {shape}, expected 4x4 pixels or more")
    if side < 16:  # LeNet-5 without padding has nothing left to pool
        return "small-cnn"
    return "lenet5" if side < 32 else "resnet20"


def _residual_stages(x, widths: tuple[int, ...], blocks: int, dtype, train: bool):
    """A convolution, then stages of basic blocks; all stages but the first halve the map."""
    x = nn.relu(_batch_norm(train, dtype)(_conv3x3(widths[0], 1, dtype)(x)))
    for stage, features in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            x = BasicBlock(features, stride, dtype)(x, train)
    return x


def _conv3x3(features: int, stride: int, dtype, use_bias: bool = False) -> nn.Conv:
    return nn.Conv(
        features,
        (3, 3),
        strides=stride,
        padding=SAME_AS_TORCH,
        use_bias=use_bias,
        kernel_init=he_fan_out,
        dtype=dtype,
    )


def _batch_norm(train: bool, dtype) -> nn.BatchNorm:
    """Torch's defaults; its momentum of 0.1 is 0.9 in Flax."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype)


def _logits(x):
    """At least float32, so that the loss is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
