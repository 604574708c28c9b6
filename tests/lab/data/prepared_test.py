"""Sets that TFDS has prepared: what serves, what does not, and the cache beside them."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantjax.encoded import storage
from quantjax.lab import data
from quantjax.lab.data import splits


def test_an_unprepared_set_says_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="download_and_prepare"):
        data.load("mnist", tmp_path)
    with pytest.raises(ValueError, match=r"1\.0\.0"):
        data.load("mnist:1.0.0", tmp_path)


def _prepare(path, shape=(6, 5, 1), label="label", splits=("train", "validation")):
    """Writes a TFDS set of seven images as TFDS itself does, and returns the images."""
    import tensorflow_datasets as tfds

    images = np.random.default_rng(0).integers(0, 256, (7, 6, 5), np.uint8)

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image, name = tfds.features.Image(shape=shape), tfds.features.ClassLabel(num_classes=9)
            features = tfds.features.FeaturesDict({"image": image, label: name})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            for row, image in enumerate(images):
                png = io.BytesIO()
                Image.fromarray(image).save(png, format="PNG")
                png.seek(0)
                yield row, {"image": png, label: row}  # arrays would need TensorFlow

    tfds.disable_progress_bar()
    Tiny(data_dir=path, file_format="array_record").download_and_prepare()
    return images


def test_a_prepared_set(tmp_path):
    images = _prepare(tmp_path)
    for name in ("tiny", "tiny:1.0.0"):
        dataset = data.load(name, tmp_path)
        assert dataset.classes == 9
        np.testing.assert_array_equal(dataset.train.images, images[..., None])
        np.testing.assert_array_equal(dataset.test.labels, np.arange(7))
        np.testing.assert_allclose(dataset.mean, [images.mean() / 255], atol=5e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": (None, None, 1)}, r"images of shape \(None, None, 1\)"),
        ({"label": "kind"}, r"features \['image', 'kind'\], expected an image named"),
        ({"splits": ("train",)}, r"splits \['train'\], expected train, and test"),
    ],
)
def test_a_prepared_set_that_does_not_serve(tmp_path, wrong, message):
    _prepare(tmp_path, **wrong)
    with pytest.raises(ValueError, match=message):
        data.load("tiny", tmp_path)


def test_a_set_prepared_as_tfrecord(tmp_path):
    _prepare(tmp_path)
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="prepared as TFRECORD, expected ARRAY_RECORD"):
        data.load("tiny", tmp_path)


def test_mnist():
    if "QUANTJAX_DATA_DIR" not in os.environ:
        pytest.skip("QUANTJAX_DATA_DIR names no directory of prepared TFDS sets")
    mnist = data.load("mnist", os.environ["QUANTJAX_DATA_DIR"])
    assert mnist.train.images.shape == (60000, 28, 28, 1)
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test.labels).tolist() == counts
    mean, std = splits._statistics(mnist.train.images)
    assert (mean, std) == (mnist.mean, mnist.std)


@pytest.fixture
def decoded(monkeypatch):
    """Counts the images that are decoded."""
    from tensorflow_datasets.core.features import Image as Feature

    count, decode = [], Feature.decode_example_np

    def counted(self, example):
        count.append(1)
        return decode(self, example)

    monkeypatch.setattr(Feature, "decode_example_np", counted)
    return count


def test_images_are_decoded_once(tmp_path, decoded):
    images = _prepare(tmp_path)
    first = data.load("tiny", tmp_path)
    assert len(decoded) == 14
    second = data.load("tiny", tmp_path)
    assert len(decoded) == 14
    np.testing.assert_array_equal(second.train.images, images[..., None])
    np.testing.assert_array_equal(second.test.labels, first.test.labels)
    assert second.train.labels.dtype == np.int32


@pytest.mark.parametrize("how", ["other files", "cut off", "garbage"])
def test_a_cache_of_other_files_or_damaged_is_made_anew(tmp_path, decoded, how):
    images = _prepare(tmp_path)
    data.load("tiny", tmp_path)
    folder = tmp_path / "tiny" / "1.0.0"
    cache = folder / ".quantjax-train.npz"
    good = cache.read_bytes()
    if how == "other files":
        os.utime(next(folder.glob("*train*array_record*")), ns=(1, 1))
    else:
        cache.write_bytes(good[: len(good) // 2] if how == "cut off" else b"garbage")
    again = data.load("tiny", tmp_path)
    assert len(decoded) > 14
    np.testing.assert_array_equal(again.train.images, images[..., None])
    count = len(decoded)
    data.load("tiny", tmp_path)
    assert len(decoded) == count


def test_a_folder_that_cannot_be_written_has_no_cache(tmp_path, monkeypatch):
    images = _prepare(tmp_path)

    def refuse(path, content):
        raise PermissionError(path)

    monkeypatch.setattr(storage, "replace", refuse)
    loaded = data.load("tiny", tmp_path)
    np.testing.assert_array_equal(loaded.train.images, images[..., None])
    assert not list(tmp_path.rglob(".quantjax*"))


def test_prepared_sets_are_found(tmp_path, monkeypatch):
    assert data.prepared(tmp_path / "absent") == {}
    _prepare(tmp_path)
    (tmp_path / "with" / "config" / "2.0.0").mkdir(parents=True)
    (tmp_path / "with" / "config" / "2.0.0" / "dataset_info.json").write_text("{}")
    found = {"tiny": tmp_path / "tiny/1.0.0", "with/config": tmp_path / "with/config/2.0.0"}
    assert data.prepared(tmp_path) == found
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert list(data.prepared()) == ["tiny", "with/config"]
    assert data.prepared(Path("~/nothing-here")) == {}
