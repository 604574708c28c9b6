"""A task that trains in milliseconds: three classes of 4x4 images, a network with batch norm."""

import numpy as np
from flax import linen as nn

from quantjax.lab import data
from quantjax.lab.train import tasks

TRACES = []  # one entry for every time the network is traced
_STARTS = {}


class Network(nn.Module):
    classes: int = 3
    batch_norm: bool = True

    @nn.compact
    def __call__(self, x, train: bool = False):
        TRACES.append(x.shape)
        x = nn.Dense(8)(x.reshape(x.shape[0], -1))
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.classes)(nn.relu(x))


def split(count: int, seed: int) -> data.Split:
    """Images whose brightest column is their class, under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 128, (count, 4, 4, 1))
    images[np.arange(count), :, labels] += 100
    return data.Split(images.astype(np.uint8), labels)


def make(train: int = 64, test: int = 23, **options) -> tasks.Task:
    dataset = data.Dataset("toy", split(train, 0), split(test, 1), 3, (0.3,), (0.2,))
    augment = options.pop("augment", False)
    return tasks.classification(Network(**options), dataset, augment)


def start(task: tasks.Task) -> dict:
    """The variables of seed 0, which take a compilation, once for every network."""
    if task.model not in _STARTS:
        _STARTS[task.model] = task.init(0)
    return _STARTS[task.model]
