"""Text: its windows, where it comes from, and what is refused."""

import os

import numpy as np
import pytest

from quantjax.lab import data
from quantjax.lab.data import text

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 1000, np.uint8))


def _write(path, train=CONTENT, test=CONTENT[:300]):
    for name, content in zip(text.FILES, (train, test), strict=True):
        (path / name).write_bytes(content)


@pytest.mark.parametrize("size", [9, 16, 17, 24, 25, 1000])
def test_windows_that_do_not_overlap_give_the_text_back(size):
    found = text.windows("here", CONTENT[:size], stride=8, length=8)
    covered = (size - 1) // 8 * 8
    assert found.tokens.shape == found.targets.shape == (covered // 8, 8)
    assert found.tokens.dtype == found.targets.dtype == np.uint8
    assert found.tokens.tobytes() == CONTENT[:covered]
    assert found.targets.tobytes() == CONTENT[1 : covered + 1]


def test_windows_overlap_by_the_stride():
    tokens, targets = text.windows("here", CONTENT, stride=4, length=8)
    assert len(tokens) == (len(CONTENT) - 9) // 4 + 1
    np.testing.assert_array_equal(tokens[1:, :4], tokens[:-1, 4:])
    np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])
    for row in (0, 7, len(tokens) - 1):
        assert targets[row].tobytes() == CONTENT[4 * row + 1 : 4 * row + 9]


def test_a_directory_of_a_text(tmp_path, monkeypatch):
    _write(tmp_path)
    loaded = data.load(tmp_path)
    assert isinstance(loaded, data.Text)
    assert (loaded.name, loaded.classes) == (tmp_path.name, 256)
    assert loaded.train.tokens.shape == ((1000 - 65) // 32 + 1, text.LENGTH)
    assert loaded.train.tokens[1].tobytes() == CONTENT[32:96]
    assert loaded.test.tokens.tobytes() == CONTENT[:256]
    monkeypatch.chdir(tmp_path.parent)
    for name in (f"./{tmp_path.name}", tmp_path.name):
        np.testing.assert_array_equal(data.load(name).train.targets, loaded.train.targets)


@pytest.mark.parametrize("size", [0, 64])
def test_files_that_are_too_short(tmp_path, size):
    _write(tmp_path, test=CONTENT[:size])
    with pytest.raises(ValueError, match=rf"test\.txt has {size} bytes, expected 65 or more"):
        data.load(tmp_path)
    _write(tmp_path, train=CONTENT[:size], test=CONTENT[:65])
    with pytest.raises(ValueError, match=rf"train\.txt has {size} bytes"):
        data.load(tmp_path)


def test_a_directory_that_lacks_a_file(tmp_path):
    _write(tmp_path)
    (tmp_path / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks \['test\.txt'\]"):
        data.load(tmp_path)


def test_arrays_come_before_a_text_beside_them(tmp_path):
    _write(tmp_path)
    np.save(tmp_path / "train_images.npy", np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(FileNotFoundError, match="lacks the arrays"):
        data.load(tmp_path)


def test_limits_and_what_is_held_out_count_windows(tmp_path):
    _write(tmp_path)
    loaded = data.load(tmp_path)
    few = data.limited(loaded, 3)
    assert isinstance(few, data.Text)
    assert (len(few.train.tokens), len(few.test.tokens)) == (3, 3)
    np.testing.assert_array_equal(few.train.targets[:, :-1], few.train.tokens[:, 1:])
    assert data.limited(loaded, 1000).train is loaded.train
    rest, held = data.holdout(loaded.train, 5, seed=0)
    assert isinstance(held, data.Windows)
    assert len(held.tokens) == len(held.targets) == 5
    both = [row.tobytes() for part in (rest, held) for row in part.tokens]
    assert sorted(both) == sorted(row.tobytes() for row in loaded.train.tokens)
    with pytest.raises(ValueError, match="count is 30, expected 1"):
        data.holdout(loaded.train, 30, seed=0)


def _prepare(path, features=("text",), splits=("train", "validation"), examples=(b"",)):
    """Writes a TFDS set of strings as TFDS itself does."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            dictionary = tfds.features.FeaturesDict({n: tfds.features.Text() for n in features})
            return tfds.core.DatasetInfo(builder=self, features=dictionary, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in splits}

        def _generate_examples(self):
            for row, example in enumerate(examples):
                yield row, dict.fromkeys(features, example)

    tfds.disable_progress_bar()
    Tiny(data_dir=path, file_format="array_record").download_and_prepare()


def test_a_prepared_set_of_strings(tmp_path):
    examples = [CONTENT[:100], b"", "Größe".encode(), CONTENT[100:]]
    joined = b"\n".join(examples)
    _prepare(tmp_path, ("text", "title"), examples=examples)
    loaded = data.load("tiny", tmp_path)
    assert (loaded.name, loaded.classes) == ("tiny", 256)
    assert loaded.test.tokens.tobytes() == joined[: (len(joined) - 1) // 64 * 64]
    assert loaded.train.targets[2].tobytes() == joined[65:129]
    assert not list(tmp_path.rglob(".quantjax*"))  # reading it again is as fast


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"features": ("title",)}, r"features \['title'\], expected an image .*or a string named"),
        ({"splits": ("train",)}, r"splits \['train'\], expected train, and test"),
        ({"examples": (b"short",)}, "tiny train has 5 bytes, expected 65 or more"),
    ],
)
def test_a_prepared_set_that_does_not_serve(tmp_path, wrong, message):
    _prepare(tmp_path, **{"examples": [CONTENT], **wrong})
    with pytest.raises(ValueError, match=message):
        data.load("tiny", tmp_path)


def test_tiny_shakespeare():
    folder = os.environ.get("QUANTJAX_DATA_DIR")
    if folder is None or "tiny_shakespeare" not in data.prepared(folder):
        pytest.skip("QUANTJAX_DATA_DIR names no directory with tiny_shakespeare, prepared by TFDS")
    loaded = data.load("tiny_shakespeare", folder)
    assert loaded.train.tokens.shape == ((1_003_854 - 65) // 32 + 1, 64)
    assert loaded.test.tokens.shape == ((55_770 - 1) // 64, 64)
    assert loaded.train.tokens[0].tobytes().startswith(b"First Citizen:\nBefore we proceed")
    assert len(np.unique(loaded.train.tokens)) == 65
