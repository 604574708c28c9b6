"""Kinds of tasks: which one a data set is for, and what its metric says of a score."""

import math
from functools import partial

import jax
import numpy as np
import pytest

from quantjax.lab import data, models
from quantjax.lab.train import evaluation, tasks
from tests.lab.train import toy_task

TINY = partial(models.TextModel, width=16, blocks=1, heads=2)  # in place of text-small
PLEAS = b"The quick brown fox jumps over the lazy dog, and the dog does not care. "


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    pass


def write_text(folder, windows=24):
    """Writes a text of so many training windows, and half as many test windows."""
    for name, count in (("train", 32 * windows + 33), ("test", 32 * windows + 1)):
        (folder / f"{name}.txt").write_bytes((PLEAS * count)[:count])
    return folder


def test_the_data_set_says_which_task_it_is(tmp_path):
    text = data.load(write_text(tmp_path))
    task = tasks.of(TINY(), text)
    assert (task.metric, task.examples) == (tasks.BITS_PER_BYTE, "windows")
    x = task.inputs(text.train.tokens)
    assert (x.shape, x.dtype) == ((24, 64), np.int32)
    assert task.augment is None
    assert tasks.of(TINY(), text, augment=True).augment is None
    toy = toy_task.make()
    images = tasks.of(toy.model, toy.dataset)
    assert (images.metric, images.examples) == (tasks.ACCURACY, "images")
    assert (images.augment, images.how) == (None, toy.how)
    assert images.how == "(pixels / 255 - mean) / std, mean [0.3], std [0.2]"
    assert tasks.of(toy.model, toy.dataset, augment=True).augment is not None
    np.testing.assert_array_equal(
        *(t.inputs(toy.dataset.test.images) for t in (images, toy)), strict=True
    )


def test_bits_per_byte_are_the_loss_in_base_2_and_lower_is_better(tmp_path):
    task = tasks.of(TINY(), data.load(write_text(tmp_path)))
    variables = jax.tree.map(np.zeros_like, task.init(0))
    score = evaluation.make_evaluate(task)(variables, task.dataset.test)
    assert task.metric.of(score) == pytest.approx(8, rel=1e-4)  # of 256 equally likely bytes
    assert task.metric.sign == task.metric.best(-1, 1) == -1
    assert tasks.ACCURACY.sign == 1


def test_scores_in_words():
    score = tasks.Score(loss=2 * math.log(2), accuracy=97.5)
    assert tasks.ACCURACY.told(score) == "accuracy 97.50 percent, loss 1.3863"
    assert tasks.BITS_PER_BYTE.told(score) == "2.000 bits per byte, accuracy 97.50 percent"
