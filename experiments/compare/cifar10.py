"""The methods side by side on CIFAR-10 at 16x16 pixels: ResNet-8, whose epochs a CPU can train.

Pixels are means of 2x2; batch norms; no augmentation. Rows, plans and settings are those of
`quantjax compare`: eight epochs in full precision and eight for every row that continues.
"""

import numpy as np

from experiments.compare import protocol
from quantjax.lab import data, models
from quantjax.lab.train import tasks

TITLE = "Methods side by side on CIFAR-10 at 16x16: ResNet-8, weights only"
EPOCHS, BATCH = 8, 128
GRIDS = ("sgd-least-error", "lsq", "parq", "psg", "psg-multi-bit", "srq", "alq")
ASKED = (*((name, bits) for bits in (4, 3, 2) for name in GRIDS), ("focused", 5))


def run(context):
    """Yields a row per seed, and ranks per width."""
    dataset = context.load("cifar10")
    dataset = dataset._replace(train=halved(dataset.train), test=halved(dataset.test))
    task = tasks.of(models.build("resnet8", dataset.classes), dataset)
    yield from protocol.run(context, task, "resnet8", ASKED, epochs=EPOCHS, batch_size=BATCH)


def halved(split: data.Split) -> data.Split:
    """Returns images of half the height and width, each pixel the rounded mean of 2x2."""
    n, height, width, channels = split.images.shape
    parts = split.images.reshape(n, height // 2, 2, width // 2, 2, channels)
    means = np.round(parts.mean(axis=(2, 4), dtype=np.float32))
    return split._replace(images=means.astype(np.uint8))
