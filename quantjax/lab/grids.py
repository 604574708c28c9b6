"""Training with learned grids: weights and layer inputs quantized, as in the tables of SRQ."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax

import quantjax as qj
from quantjax.core.quantizer import InputQuantizer, Quantizer
from quantjax.lab import data, engine, models
from quantjax.lab.deploy import Deployed, deploy
from quantjax.lab.recipes import Context
from quantjax.methods.semi_relaxed import width_name, widths

MASK_RATE = 10  # the masks' logits learn that much faster: a short training has to move them


class Grids(NamedTuple):
    """Data, network and length of a table's training; `make` builds one."""

    context: Context
    task: engine.Task
    epochs: float
    batch_size: int
    rate: float  # peak learning rate of AdamW
    weight_decay: float
    compiled: dict  # {name: Steps}: one program for all runs of a name

    @property
    def steps(self) -> int:
        """Steps of one training."""
        per_epoch = len(self.task.dataset.train.labels) // self.batch_size
        return self.context.steps(self.epochs, per_epoch)

    def float_net(self, seed: int) -> dict:
        """Returns the variables of the network trained in full precision."""
        return self._fit(
            "float", engine.Method(self._adamw()), self.task.init(seed), seed
        ).variables

    def train(
        self,
        name: str,
        quantizer: Quantizer,
        inputs: InputQuantizer | Mapping | None,
        seed: int,
        start: Mapping | None = None,
    ) -> "Trained":
        """Trains weights and grids, from scratch or from `start`, and deploys the network.

        Quantizers of one name must differ in their states alone: they share a program.
        """
        method = engine.Method(self._adamw(), quantizer, inputs)
        state = self._fit(name, method, start or self.task.init(seed), seed)
        shipped = deploy(state.variables, quantizer, state.state)
        evaluate = engine.make_evaluate(self.task, inputs)
        accuracy = evaluate(shipped.variables, self.task.dataset.test).accuracy
        learned = [width_name(width) for width in widths(state.state).values()]
        return Trained(round(100 - accuracy, 2), "/".join(learned), state, shipped)

    def error(self, variables: Mapping) -> float:
        """Returns the test error of a float network in percent."""
        evaluate = engine.make_evaluate(self.task)
        return round(100 - evaluate(variables, self.task.dataset.test).accuracy, 2)

    def smaller(self, count: int) -> "Grids":
        """Returns the same on the first `count` training images."""
        dataset = self.task.dataset
        train = data.Split(*(part[:count] for part in dataset.train))
        task = self.task._replace(dataset=dataset._replace(train=train))
        return self._replace(task=task, compiled={})

    def _fit(self, name, method, variables, seed):
        if name not in self.compiled:
            self.compiled[name] = engine.make_steps(self.task, method)
        return engine.fit(
            self.task,
            method,
            variables,
            self.steps,
            batch_size=self.batch_size,
            seed=seed,
            steps=self.compiled[name],
            label=name,
        )

    def _adamw(self):
        warm = max(1, self.steps // 20)
        rate = optax.warmup_cosine_decay_schedule(
            self.rate / 10, self.rate, warm, max(self.steps, warm + 1)
        )
        descend = optax.adamw(rate, weight_decay=self.weight_decay, mask=qj.decay_mask)
        return optax.chain(descend, faster_masks())


class Trained(NamedTuple):
    """A network trained with learned grids."""

    error: float  # of the deployed network on the test set, percent
    widths: str  # of its layers, such as 3/2/3/3 or 2/2/2/T
    state: engine.TrainState
    shipped: Deployed


def faster_masks(factor: float = MASK_RATE) -> optax.GradientTransformation:
    """Multiplies the updates of DropBits' mask logits."""

    def update(updates, state, params=None):
        del params

        def scale(path, leaf):
            return leaf * factor if "mask_logits" in jax.tree_util.keystr(path) else leaf

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make(
    context: Context,
    dataset: str,
    model: str | Callable,
    *,
    epochs: float,
    rate: float,
    weight_decay: float = 0.01,
    batch_size: int = 128,
    augment: bool = False,
    symmetric: bool = False,
) -> Grids:
    """Returns the training of a table; with `symmetric`, images lie in [-1, 1] (appendix F)."""
    loaded = data.load(dataset, context.data_dir)
    if symmetric:
        half = (0.5,) * len(loaded.mean)
        loaded = loaded._replace(mean=half, std=half)
    task = engine.Task(models.build(model, loaded.classes), loaded, augment)
    return Grids(context, task, epochs, batch_size, rate, weight_decay, {})
