"""Tasks: what is trained on what. The engine knows no kind of task, only what stands here."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from quantjax.lab import data as data_lib


class Score(NamedTuple):
    """Means over the predictions of a split."""

    loss: float
    accuracy: float  # percent of hits


class Metric(NamedTuple):
    """What a task is judged by."""

    name: str
    unit: str
    of: Callable[[Score], float]
    best: Callable = max  # of two values


ACCURACY = Metric("accuracy", "percent", lambda score: score.accuracy)
BITS_PER_BYTE = Metric("bits per byte", "bits", lambda score: score.loss / math.log(2), min)


class Task(NamedTuple):
    """A model, its data, and what lies between the two and after the model."""

    model: nn.Module
    dataset: Any  # `train` and `test`: pairs (x, y) of arrays whose leading axis counts examples
    inputs: Callable  # x [n, ...] -> what the model takes
    measure: Callable  # (outputs, y) -> (losses, hits): floats and bools, one per prediction
    augment: Callable | None = None  # (key, x, y) -> (x, y), of a training batch
    metric: Metric = ACCURACY

    def init(self, seed: int) -> dict:
        """Returns the model's variables, initialised by a seed."""
        example = self.inputs(self.dataset.train[0][:1])
        return jax.jit(self.model.init)(jax.random.key(seed), example)


def classification(model: nn.Module, dataset: data_lib.Dataset, augment: bool = False) -> Task:
    """Returns the task of naming an image's class.

    Args:
      model: normalized images [n, h, w, c] -> logits [n, classes].
      dataset: images in memory.
      augment: pad-4 random crop and flip.
    """
    inputs = partial(_normalized, mean=dataset.mean, std=dataset.std)
    return Task(model, dataset, inputs, cross_entropy, _moved if augment else None)


def next_token(model: nn.Module, dataset) -> Task:
    """Returns the task of predicting every next byte of a text.

    Args:
      model: bytes [n, length] int32 -> logits [n, length, 256].
      dataset: of `data.load`: windows of bytes, and the same windows one byte later.
    """
    return Task(model, dataset, _as_int32, cross_entropy, metric=BITS_PER_BYTE)


def cross_entropy(logits, labels):
    """Returns losses and hits of logits [..., classes] beside integer labels [...]."""
    labels = labels.astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=-1) == labels


def _normalized(images, mean, std):
    return data_lib.normalize(images, mean, std)


def _as_int32(tokens):
    return jnp.asarray(tokens, jnp.int32)


def _moved(key, images, labels):
    return data_lib.augment(key, images), labels
