"""Networks by name, weights of PyTorch checkpoints for them, and channels taken out of them."""

from quantjax.lab.models.networks import (
    DEFAULTS,
    MODELS,
    VGG7,
    VGG16BN,
    LeNet5,
    ResNet,
    ResNet18,
    SmallCNN,
    VGGSmall,
    build,
    default_model,
    lenet5,
    lenet5_wide,
    max_pool_2x2,
)
from quantjax.lab.models.text import TextModel

__all__ = [
    "DEFAULTS",
    "MODELS",
    "VGG7",
    "VGG16BN",
    "LeNet5",
    "ResNet",
    "ResNet18",
    "SmallCNN",
    "TextModel",
    "VGGSmall",
    "build",
    "default_model",
    "lenet5",
    "lenet5_wide",
    "max_pool_2x2",
]
