import jax
import numpy as np
import pytest

from quantjax.lab import data
from quantjax.lab.data import splits
from quantjax.lab.names import nearest_name_error


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (12, 6, 5), np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": rng.integers(0, 256, (4, 6, 5), np.uint8),
        "test_labels": np.array([3, 0, 1, 2]),
    }


def _write(path, arrays):
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)


def test_digits_are_split_by_class(digits):
    assert digits.train.images.shape == (1400, 8, 8, 1)
    assert digits.test.images.shape == (397, 8, 8, 1)
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert digits.train.images.max() == 255
    shares = np.bincount(digits.test.labels) / np.bincount(digits.train.labels)
    np.testing.assert_allclose(shares, 397 / 1400, atol=0.01)
    again = data.load("digits")
    np.testing.assert_array_equal(again.test.images, digits.test.images)


def test_statistics_are_those_of_the_training_pixels(digits):
    pixels = digits.train.images / 255
    np.testing.assert_allclose(digits.mean, [pixels.mean()], atol=5e-5)
    np.testing.assert_allclose(digits.std, [pixels.std()], atol=5e-5)
    normal = data.normalize(digits.train.images, digits.mean, digits.std)
    assert abs(float(normal.mean())) < 1e-3
    assert abs(float(normal.std()) - 1) < 1e-3


@pytest.mark.parametrize("archive", [False, True])
def test_directory_of_arrays(tmp_path, arrays, archive):
    if archive:
        np.savez(tmp_path / "data.npz", **arrays)
    else:
        _write(tmp_path, arrays)
    dataset = data.load(tmp_path)
    assert dataset.name == tmp_path.name
    assert dataset.classes == 4  # the label 3 is only in the test split
    np.testing.assert_array_equal(dataset.train.images[..., 0], arrays["train_images"])
    np.testing.assert_array_equal(dataset.test.labels, arrays["test_labels"])
    assert data.load(str(tmp_path)).mean == dataset.mean


def test_a_bare_name_is_a_directory_only_where_arrays_lie(tmp_path, arrays, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="unknown data set 'mine'"):
        data.load("mine")
    _write(tmp_path / "mine", arrays)
    assert data.load("mine").classes == 4


@pytest.mark.parametrize("archive", [False, True])
def test_missing_arrays_are_named(tmp_path, arrays, archive):
    del arrays["test_labels"]
    if archive:
        np.savez(tmp_path / "data.npz", **arrays)
    else:
        _write(tmp_path, arrays)
    with pytest.raises(FileNotFoundError, match=r"lacks the arrays \['test_labels'\]; found "):
        data.load(tmp_path)


def test_a_missing_directory_and_two_archives(tmp_path, arrays):
    with pytest.raises(FileNotFoundError, match="no directory"):
        data.load(tmp_path / "absent")
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, **arrays)
    with pytest.raises(ValueError, match=r"holds 2 \.npz files"):
        data.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("train_images", np.zeros((12, 6, 5), np.float32), "float32, expected"),
        ("train_images", np.zeros((12, 30), np.uint8), r"\(12, 30\)"),
        ("train_labels", np.zeros(11, int), r"labels have shape \(11,\)"),
        ("train_labels", np.zeros(12), "float64"),
        ("train_labels", np.full(12, -1), "lowest label is -1"),
        ("test_images", np.zeros((4, 6, 6), np.uint8), "expected the same"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, name, wrong, message):
    _write(tmp_path, arrays | {name: wrong})
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"unknown data set 'cifar11'; did you mean .*'cifar10'"):
        data.load("cifar11")
    with pytest.raises(ValueError, match="unknown data set 'digit'; did you mean 'digits'"):
        data.load("digit")
    assert "known: a, b" in str(nearest_name_error("thing", "zzz", ["b", "a"]))


def test_normalize_jits_and_checks_channels():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3), np.uint8)
    mean, std = splits.STATISTICS["cifar10"]
    out = jax.jit(data.normalize)(images, mean, std)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, (images / 255 - np.array(mean)) / np.array(std), atol=1e-5)
    np.testing.assert_allclose(data.normalize(images[0], mean, std), out[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"mean has shape \(1,\), expected \(3,\)"):
        data.normalize(images, (0.5,), (0.5,))


def test_augment_crops_the_padded_image():
    pad, n = 2, 400
    image = np.arange(1, 5 * 4 * 2 + 1, dtype=np.uint8).reshape(5, 4, 2)
    out = np.asarray(
        jax.jit(data.augment, static_argnames=("pad", "flip"))(
            jax.random.key(0), np.stack([image] * n), pad=pad
        )
    )
    assert out.dtype == np.uint8
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    crops = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[top : top + 5, left : left + 4]
            crops[crop.tobytes()] = (top, left, False)
            crops[crop[:, ::-1].tobytes()] = (top, left, True)
    drawn = np.array([crops[crop.tobytes()] for crop in out])  # KeyError: no crop of the image
    for axis in (0, 1):
        counts = np.bincount(drawn[:, axis], minlength=2 * pad + 1)
        assert counts.min() > 0.6 * n / (2 * pad + 1)
    assert 0.4 < drawn[:, 2].mean() < 0.6
    assert abs(np.corrcoef(drawn.T)[np.triu_indices(3, 1)]).max() < 0.2


def test_augment_without_padding_and_flip_changes_nothing():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    out = data.augment(jax.random.key(1), images, pad=0, flip=False)
    np.testing.assert_array_equal(out, images)
    with pytest.raises(ValueError, match="pad is -1"):
        data.augment(jax.random.key(1), images, pad=-1)
    with pytest.raises(ValueError, match=r"expected \[n, h, w, c\]"):
        data.augment(jax.random.key(1), images[0])
