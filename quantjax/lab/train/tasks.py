"""Tasks: what is trained on what. The engine knows no kind of task, only what stands here."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from quantjax.lab import data as data_lib


class Score(NamedTuple):
    """Means over the predictions of a split."""

    loss: float
    accuracy: float  # percent of hits


class Predictions(NamedTuple):
    """What a network makes of every example: means over its predictions."""

    losses: np.ndarray  # [n], float64
    hits: np.ndarray  # [n], float64, 0 .. 1

    @property
    def score(self) -> Score:
        """The means over all examples."""
        return Score(float(self.losses.mean()), float(100 * self.hits.mean()))


class Metric(NamedTuple):
    """What a task is judged by, and how that is told."""

    name: str
    unit: str
    of: Callable[[Score], float]
    beside: Callable[[Score], str]  # what of a score is told beside it
    best: Callable = max  # of two values
    digits: int = 2
    symbol: str = ""  # of the unit, where the name does not say it
    meaning: str = ""  # a sentence, where the name does not say it

    def of_each(self, found: Predictions) -> np.ndarray:
        """Returns the metric of every example [n]; its mean is that of all."""
        return self.of(Score(found.losses, 100 * found.hits))

    @property
    def sign(self) -> int:
        """1, or -1 where lower is better: a value times it is the higher the better."""
        return self.best(1, -1)

    def text(self, value: float) -> str:
        """Returns `97.50 percent`, `2.345 bits per byte`."""
        return f"{value:.{self.digits}f} {self.unit}"

    def told(self, score: Score) -> str:
        """Returns a score in words."""
        name = "" if self.name == self.unit else f"{self.name} "
        return f"{name}{self.text(self.of(score))}, {self.beside(score)}"


ACCURACY = Metric(
    "accuracy",
    unit="percent",
    of=lambda score: score.accuracy,
    beside=lambda score: f"loss {score.loss:.4f}",
    symbol="%",
)
BITS_PER_BYTE = Metric(
    "bits per byte",
    unit="bits per byte",
    of=lambda score: score.loss / math.log(2),
    beside=lambda score: f"accuracy {ACCURACY.text(score.accuracy)}",
    best=min,
    digits=3,
    meaning="It is the loss in base 2: the bits that a byte of the test text takes where the "
    "network predicts it. Lower is better.",
)


class Task(NamedTuple):
    """A model, its data, and what lies between the two and after the model."""

    model: nn.Module
    dataset: Any  # `train` and `test`: pairs (x, y) of arrays whose leading axis counts examples
    inputs: Callable  # x [n, ...] -> what the model takes
    measure: Callable  # (outputs, y) -> (losses, hits): floats and bools, one per prediction
    augment: Callable | None = None  # (key, x, y) -> (x, y), of a training batch
    metric: Metric = ACCURACY
    examples: str = "images"  # what there are n of
    how: str = ""  # `inputs`, as a formula

    def init(self, seed: int) -> dict:
        """Returns the model's variables, initialised by a seed."""
        example = self.inputs(self.dataset.train[0][:1])
        return _init(self.model, jax.random.key(seed), example)


def classification(model: nn.Module, dataset: data_lib.Dataset, augment: bool = False) -> Task:
    """Returns the task of naming an image's class.

    Args:
      model: normalized images [n, h, w, c] -> logits [n, classes].
      dataset: images in memory.
      augment: pad-4 random crop and flip.
    """
    inputs = partial(_normalized, mean=dataset.mean, std=dataset.std)
    mean, std = ([round(float(v), 4) for v in s] for s in (dataset.mean, dataset.std))
    how = f"(pixels / 255 - mean) / std, mean {mean}, std {std}"
    return Task(model, dataset, inputs, cross_entropy, _moved if augment else None, how=how)


def next_token(model: nn.Module, dataset: data_lib.Text) -> Task:
    """Returns the task of predicting every next byte of a text.

    Args:
      model: bytes [n, length] int32 -> logits [n, length, 256].
      dataset: of `data.load`: windows of bytes, and the same windows one byte later.
    """
    return Task(
        *(model, dataset, _as_int32, cross_entropy),
        metric=BITS_PER_BYTE,
        examples="windows",
        how="bytes",
    )


def of(model: nn.Module, dataset: data_lib.Dataset | data_lib.Text, augment: bool = False) -> Task:
    """Returns the task that a data set is for, by its type.

    Args:
      model: that takes its examples.
      dataset: of `data.load`.
      augment: images, as in `classification`.
    """
    if isinstance(dataset, data_lib.Text):
        return next_token(model, dataset)
    return classification(model, dataset, augment)


def cross_entropy(logits, labels):
    """Returns losses and hits of logits [..., classes] beside integer labels [...]."""
    labels = labels.astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=-1) == labels


@partial(jax.jit, static_argnums=0)
def _init(model, key, example):
    """One program for all seeds."""
    return model.init(key, example)


def _normalized(images, mean, std):
    return data_lib.normalize(images, mean, std)


def _as_int32(tokens):
    return jnp.asarray(tokens, jnp.int32)


def _moved(key, images, labels):
    return data_lib.augment(key, images), labels
