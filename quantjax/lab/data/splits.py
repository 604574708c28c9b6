"""A data set in memory: its types, its checks, its statistics."""

import contextlib
from typing import NamedTuple, TypeVar

import numpy as np

from quantjax.lab.data.text import Text, Windows

# Of a directory that holds a data set.
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
# Mean and deviation per channel that the literature (and its checkpoints) normalise with.
STATISTICS = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (
        (129.3 / 255, 124.1 / 255, 112.4 / 255),
        (68.2 / 255, 65.4 / 255, 70.4 / 255),
    ),
}


class Split(NamedTuple):
    """Images and their labels."""

    images: np.ndarray  # [n, height, width, channels] uint8
    labels: np.ndarray  # [n] int32, 0 .. classes - 1


class Dataset(NamedTuple):
    """A training and a test split, and the statistics that `normalize` takes."""

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1]
    std: tuple[float, ...]


AnySplit = TypeVar("AnySplit", Split, Windows)
AnyDataset = TypeVar("AnyDataset", Dataset, Text)


@contextlib.contextmanager
def reading(what):
    """Within, whatever a library says of damage is a ValueError of a line that names the files."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{what} cannot be read: {lines[0][:200]}") from None


def holdout(split: AnySplit, count: int, seed: int) -> tuple[AnySplit, AnySplit]:
    """Returns (training, validation): `count` examples drawn by the seed, and the others, in order.

    Windows of a training text overlap: training sees most of what is held out of them.

    Raises:
      ValueError: `count` is not in 1 .. n - 1.
    """
    n = len(split[0])
    if not 0 < count < n:
        raise ValueError(f"count is {count}, expected 1 .. {n - 1} of {n}")
    held = np.zeros(n, bool)
    held[np.random.default_rng(seed).permutation(n)[:count]] = True
    return _rows(split, ~held), _rows(split, held)


def limited(dataset: AnyDataset, limit: int | None, seed: int = 0) -> AnyDataset:
    """Returns at most `limit` examples of each split, drawn by the seed, in order; None: all."""

    def part(split: AnySplit) -> AnySplit:
        n = len(split[0])
        if limit is None or limit >= n:
            return split
        rows = np.sort(np.random.default_rng(seed).permutation(n)[:limit])
        return _rows(split, rows)

    return dataset._replace(train=part(dataset.train), test=part(dataset.test))


def _rows(split: AnySplit, rows: np.ndarray) -> AnySplit:
    return type(split)(*(part[rows] for part in split))


def split(where: str, images: np.ndarray, labels: np.ndarray) -> Split:
    """Returns a split after checks of shapes, dtypes and labels; grey images get a channel axis."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise ValueError(
            f"{where}: images have shape {images.shape} and dtype {images.dtype}, expected "
            "[n, h, w] or [n, h, w, c] uint8"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{where}: labels have shape {labels.shape} and dtype {labels.dtype}, expected "
            f"{images.shape[:1]} integers"
        )
    if labels.min() < 0:
        raise ValueError(f"{where}: the lowest label is {labels.min()}, expected 0 or more")
    images = images[..., None] if images.ndim == 3 else images
    return Split(images, labels.astype(np.int32))


def dataset(name: str, train: Split, test: Split, classes: int) -> Dataset:
    """Returns the data set; mean and deviation are the literature's, or else the images' own."""
    known = name.split(":")[0]  # without TFDS's version
    mean, std = STATISTICS.get(known) or _statistics(train.images)
    return Dataset(name, train, test, classes, mean, std)


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel, from exact counts: the same numbers on every machine."""
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 4096):  # bincount makes int64 of its input
        for channel, count in enumerate(counts):
            part = images[start : start + 4096, ..., channel]
            count += np.bincount(part.ravel(), minlength=256)
    values, total = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / total
    std = np.sqrt(np.maximum(counts @ values**2 / total - mean**2, 0))
    return (
        tuple(round(float(value), 4) for value in mean),
        tuple(round(float(value), 4) or 1.0 for value in std),
    )
