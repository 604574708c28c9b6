"""Splits: statistics, what is held out, what is left of a limit."""

import numpy as np
import pytest

from quantjax.lab import data
from quantjax.lab.data import splits


def test_a_constant_channel_has_deviation_one():
    images = np.full((3, 2, 2, 2), 7, np.uint8)
    images[..., 1] = np.arange(12).reshape(3, 2, 2)
    _, std = splits._statistics(images)
    assert std[0] == 1.0
    assert std[1] == round(float((np.arange(12) / 255).std()), 4)


def test_holdout_is_disjoint_and_seeded():
    digits = data.load("digits")
    train, validation = data.holdout(digits.train, 200, seed=3)
    assert (len(train.labels), len(validation.labels)) == (1200, 200)
    numbered = data.Split(np.arange(1400)[:, None, None, None], np.arange(1400, dtype=np.int32))
    rest, held = data.holdout(numbered, 200, seed=3)
    assert sorted([*rest.labels, *held.labels]) == list(range(1400))
    np.testing.assert_array_equal(digits.train.labels[held.labels], validation.labels)
    assert not np.array_equal(data.holdout(numbered, 200, seed=4)[1].labels, held.labels)
    for count in (0, 1400):
        with pytest.raises(ValueError, match=f"count is {count}, expected 1 .. 1399"):
            data.holdout(numbered, count, seed=0)


def test_a_limit_draws_images_of_both_splits():
    digits = data.load("digits")
    assert data.limited(digits, None) == digits
    assert data.limited(digits, 1400).train is digits.train
    few = data.limited(digits, 100)
    assert [len(part.labels) for part in (few.train, few.test)] == [100, 100]
    assert len(np.unique(few.train.labels)) == 10  # drawn: sets sorted by class keep all of them
    assert (few.mean, few.std) == (digits.mean, digits.std)
    again = data.limited(digits, 100)
    np.testing.assert_array_equal(few.train.images, again.train.images)
    numbered = digits._replace(test=data.Split(np.arange(397), np.arange(397)))
    rows = data.limited(numbered, 20).test
    np.testing.assert_array_equal(rows.images, rows.labels)
    assert (np.diff(rows.labels) > 0).all()
