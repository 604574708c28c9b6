"""Data sets that TFDS has prepared as ArrayRecord, without TensorFlow; decoded once."""

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quantjax.encoded import storage
from quantjax.lab.data import splits, text
from quantjax.lab.data.splits import ARRAYS, Dataset, Split
from quantjax.lab.data.text import Text
from quantjax.lab.names import nearest_name_error

PREPARE = (
    "prepare it where there is a network with tfds.builder({name!r}, data_dir=..., "
    "file_format='array_record').download_and_prepare() and pass that data_dir, or pass the path "
    "of a directory that holds "
    + ", ".join(f"{array}.npy" for array in ARRAYS)
    + ", or else "
    + " and ".join(text.FILES)
)


def load(name: str, data_dir: str | os.PathLike | None) -> Dataset | Text:
    """Returns an image classification set or a text; see `images.load`."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        names = tfds.list_builders(with_community_datasets=False)
        error = nearest_name_error("data set", name, ["digits", *names])
        raise ValueError(f"{error}; a path of arrays starts with '.', '~' or '/'") from None
    except AssertionError as error:  # a version that does not exist
        raise ValueError(str(error)) from None
    except Exception as error:
        with splits.reading(f"{name!r} in {data_dir}"):
            raise error
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"{name!r} is not prepared in {builder.data_dir}: " + PREPARE.format(name=name)
        )
    is_text = _is_text(builder.info.features, tfds.features)
    if not is_text:
        shape, classes = _check_features(name, builder.info.features, tfds.features)
    found = builder.info.splits
    test = next((split for split in ("test", "validation") if split in found), None)
    if "train" not in found or test is None:
        raise ValueError(
            f"{name!r} has the splits {list(found)}, expected train, and test or validation"
        )
    if is_text:
        return text.dataset(name, *(_read_text(name, builder, split) for split in ("train", test)))
    train, test = (_read(name, builder, split, shape) for split in ("train", test))
    return splits.dataset(name, train, test, classes)


def _is_text(features, kinds) -> bool:
    """A string beside an image is a caption: such a set is one of images."""
    features = dict(features.items())
    found = features.get("text")
    string = isinstance(found, kinds.Tensor) and not found.shape and found.np_dtype == np.object_
    return string and "image" not in features


def _check_features(name: str, features, kinds) -> tuple[tuple[int, ...], int]:
    """Returns the image shape and the number of classes."""
    features = dict(features.items())
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, kinds.Image) or not isinstance(label, kinds.ClassLabel):
        raise ValueError(
            f"{name!r} has the features {sorted(features)}, expected an image named 'image' and a "
            "class label named 'label', or a string named 'text'"
        )
    if None in image.shape or image.np_dtype != np.uint8:
        raise ValueError(
            f"{name!r} has images of shape {image.shape} and dtype {np.dtype(image.np_dtype)}, "
            "expected one fixed size and uint8: resize them into a directory of .npy arrays"
        )
    return image.shape, label.num_classes


def _read(name: str, builder, split: str, shape: tuple[int, ...]) -> Split:
    """Decodes one split, 0.1 to 0.3 ms per image, or takes what was decoded before."""
    folder = Path(builder.data_dir)
    cache, source = folder / f".quantjax-{split}.npz", _fingerprint(folder)
    found = _cached(cache, source)
    if found is not None:
        return splits.split(f"{name} {split}", *found)
    records = _records(name, builder, split)
    n = len(records)
    print(f"decoding {n} images of {name}, {split}", file=sys.stderr, flush=True)
    images, labels = np.empty((n, *shape), np.uint8), np.empty(n, np.int32)
    for row, example in enumerate(_examples(f"{name!r} in {folder}, {split},", records)):
        images[row], labels[row] = example["image"], example["label"]
    try:
        content = io.BytesIO()
        np.savez(content, images=images, labels=labels, source=source)
        storage.replace(cache, content.getbuffer())
    except OSError:  # a folder of others: decoded again next time
        pass
    return splits.split(f"{name} {split}", images, labels)


def _read_text(name: str, builder, split: str) -> tuple[str, bytes]:
    """Returns what errors call a split, and its examples with a newline between them."""
    where = f"{name!r} in {builder.data_dir}, {split},"
    examples = _examples(where, _records(name, builder, split))
    return f"{name} {split}", b"\n".join(example["text"] for example in examples)


def _records(name: str, builder, split: str):
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(
            f"{name!r} in {builder.data_dir} is prepared as {builder.info.file_format.name}, "
            "expected ARRAY_RECORD: " + PREPARE.format(name=name)
        ) from None


def _examples(where: str, records, chunk: int = 1000) -> Iterator[dict]:
    """Yields all records; they are read faster in chunks."""
    n = len(records)
    for start in range(0, n, chunk):
        with splits.reading(where):
            examples = records.__getitems__(range(start, min(start + chunk, n)))
        yield from examples


def _fingerprint(folder: Path) -> str:
    """Returns names, sizes and times of the files that a cache was made of."""
    files = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    return json.dumps([(f.name, (told := f.stat()).st_size, told.st_mtime_ns) for f in files])


def _cached(cache: Path, source: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the decoded arrays; None where there are none of these very files."""
    try:
        # Opened here: NumPy leaves a damaged file open.
        with cache.open("rb") as file, np.load(file, allow_pickle=False) as found:
            if str(found["source"]) == source:
                return found["images"], found["labels"]
    except Exception:  # of the many that damage raises
        pass
    return None


def prepared(data_dir: str | os.PathLike | None = None) -> dict[str, Path]:
    """Returns {name: folder} of the sets that lie in `data_dir`; None: where TFDS keeps them."""
    usual = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folder = Path(usual if data_dir is None else data_dir).expanduser()
    infos = [*folder.glob("*/*/dataset_info.json"), *folder.glob("*/*/*/dataset_info.json")]
    names = ("/".join(info.relative_to(folder).parts[:-2]) for info in infos)
    return dict(sorted(zip(names, (info.parent for info in infos), strict=True)))
