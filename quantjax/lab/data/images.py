"""Data sets in memory as uint8, and what a training loop does to a batch of images."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.lab.data import prepared, splits, text
from quantjax.lab.data.splits import ARRAYS, Dataset
from quantjax.lab.data.text import Text


def load(name: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> Dataset | Text:
    """Loads `digits` (in scikit-learn), a directory of arrays or of a text, or a prepared TFDS set.

    A directory holds train_images, train_labels, test_images and test_labels, one .npy file each
    or all in one .npz file: images [n, h, w] or [n, h, w, c] uint8, labels [n] integers from 0.
    Or it holds a text: train.txt and test.txt, any bytes. Any TFDS image classification set of one
    image size serves, and any TFDS set with strings named `text` (a newline between examples),
    from `data_dir` (None: where TFDS keeps its data), prepared as ArrayRecord; TensorFlow is not
    needed. A test split is `test`, or else `validation`.

    Raises:
      FileNotFoundError: the set is not prepared, the directory or a file in it is missing.
      ValueError: unknown name (the nearest are named), neither images of one size with one label
        nor text, or a text shorter than a window.
    """
    if name == "digits":
        return _load_digits()
    if _is_directory(name):
        return _load_directory(Path(name).expanduser())
    return prepared.load(name, data_dir)


def normalize(images, mean, std):
    """Returns (images / 255 - mean) / std as float32: images [..., c] uint8, mean and std [c].

    Raises:
      ValueError: mean or std is not one number per channel.
    """
    channels = images.shape[-1]
    mean, std = (jnp.asarray(value, jnp.float32) for value in (mean, std))
    for what, value in (("mean", mean), ("std", std)):
        if value.shape != (channels,):
            raise ValueError(f"{what} has shape {value.shape}, expected ({channels},)")
    per_channel = (1,) * (images.ndim - 1) + (channels,)
    scaled = jnp.asarray(images, jnp.float32) / 255
    return (scaled - mean.reshape(per_channel)) / std.reshape(per_channel)


def augment(key, images, *, pad: int = 4, flip: bool = True):
    """Crops each image at random out of its zero-padded self, and mirrors half of them.

    images [n, h, w, c] of any dtype, before `normalize` (the padding is black); same out. Jits.

    Raises:
      ValueError: images without four dimensions, negative pad.
    """
    if images.ndim != 4:
        raise ValueError(f"images have shape {images.shape}, expected [n, h, w, c]")
    if pad < 0:
        raise ValueError(f"pad is {pad}, expected 0 or more")
    n, height, width, _ = images.shape
    crop_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(crop_key, (2, n, 1), 0, 2 * pad + 1)
    rows = top + jnp.arange(height)[None]
    columns = jnp.arange(width)[None]
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (n, 1))
        columns = jnp.where(mirrored, width - 1 - columns, columns)
    columns = left + columns
    # Row by row, then column by column, 128x32x32x3 takes 0.15 ms; selecting among shifts 9.9 ms.
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    cropped = jnp.take_along_axis(padded, rows[:, :, None, None], axis=1)
    return jnp.take_along_axis(cropped, columns[:, None, :, None], axis=2)


def _load_digits() -> Dataset:
    """1,797 images of 8x8: every 4.5th of a fixed shuffle sorted by class is a test image."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    n, count = len(labels), 397
    shuffled = np.random.default_rng(0).permutation(n)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    tested = np.zeros(n, bool)
    tested[by_class[np.arange(count) * n // count]] = True
    train, test = (splits.split("digits", images[rows], labels[rows]) for rows in (~tested, tested))
    return splits.dataset("digits", train, test, classes=10)


def _is_directory(name) -> bool:
    """A bare name counts only if data lie there: TFDS names its own directories like sets."""
    path = Path(name).expanduser()
    if isinstance(name, os.PathLike) or path.is_absolute() or str(name).startswith((".", "~")):
        return True
    return path.is_dir() and (_holds_arrays(path) or text.in_directory(path))


def _holds_arrays(path: Path) -> bool:
    return any(file.suffix in (".npy", ".npz") for file in path.iterdir())


def _load_directory(path: Path) -> Dataset | Text:
    if not path.is_dir():
        raise FileNotFoundError(
            f"no directory {path}; expected one that holds {', '.join(ARRAYS)}, or else "
            + " and ".join(text.FILES)
        )
    if text.in_directory(path) and not _holds_arrays(path):
        return text.load_directory(path)
    archives = sorted(path.glob("*.npz"))
    if len(archives) > 1:
        raise ValueError(f"{path} holds {len(archives)} .npz files, expected one (or .npy files)")
    found = {file.stem: file for file in path.glob("*.npy")}
    if archives:
        with (
            splits.reading(archives[0]),
            archives[0].open("rb") as file,  # here, since NumPy leaves a damaged one open
            np.load(file, allow_pickle=False) as archive,
        ):
            arrays = {name: archive[name] for name in ARRAYS if name in archive}
            found = dict.fromkeys(archive.files)
    else:
        arrays = {}
        for name in [name for name in ARRAYS if name in found]:
            with splits.reading(found[name]), found[name].open("rb") as file:
                arrays[name] = np.load(file, allow_pickle=False)
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise FileNotFoundError(
            f"{archives[0] if archives else path} lacks the arrays {missing}; found {sorted(found)}"
        )
    train, test = (
        splits.split(f"{path} {part}", arrays[f"{part}_images"], arrays[f"{part}_labels"])
        for part in ("train", "test")
    )
    if train.images.shape[1:] != test.images.shape[1:]:
        raise ValueError(
            f"{path}: training images have shape {train.images.shape[1:]}, "
            f"test images {test.images.shape[1:]}, expected the same"
        )
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return splits.dataset(path.resolve().name, train, test, classes)
