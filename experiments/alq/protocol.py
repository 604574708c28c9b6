"""The ALQ paper's protocol: a trained network, its multi-bit version, a validation split.

The validation images choose the epoch; the test images give the reported accuracy.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import optax

import quantjax as qj
from experiments.alq import training
from quantjax.lab import data, models
from quantjax.lab.models import dead_channels
from quantjax.lab.recipes import Context, Network
from quantjax.lab.train import engine, evaluation, tasks

# L2 norm on the coordinates (section 3.3). The paper has no number; its public code's is 0 unless
# one is given.
COORDINATE_DECAY = 1e-4
LENET5 = tuple(dead_channels.Layer(name) for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1"))


class Protocol(NamedTuple):
    """Data and network of a table."""

    context: Context
    task: tasks.Task  # without the validation images
    validation: data.Split
    evaluate: Callable
    batch_size: int
    float_epochs: float  # of training in full precision
    float_rate: float
    structures: dict  # for `training.structured`
    model: str  # its name

    @property
    def per_epoch(self) -> int:
        """Scaled steps per epoch."""
        count = len(self.task.dataset.train.labels) // self.batch_size
        return self.context.steps(1, max(1, count))

    def full_precision(self, seed: int) -> dict:
        """Returns the variables of the trained float network: SGD, momentum, cosine schedule."""
        total = max(1, round(self.float_epochs * self.per_epoch))
        chain = optax.chain(
            optax.add_decayed_weights(1e-4),
            optax.sgd(optax.cosine_decay_schedule(self.float_rate, total), momentum=0.9),
        )
        return engine.fit(
            self.task,
            engine.Method(chain),
            self.task.init(seed),
            total,
            batch_size=self.batch_size,
            seed=seed,
            label="full precision",
        ).variables

    def alq(
        self,
        variables: Mapping,
        schedule: Callable[[int], Sequence[qj.Phase]],
        bits: int,
        seed: int,
        **kwargs,
    ) -> training.Outcome:
        """Trains by ALQ from a float network.

        Args:
          variables: of the float network.
          schedule: scaled steps per epoch -> phases.
          bits: of the sketch.
          seed: of the order of images.
          kwargs: for `qj.alq`; the tables give `weight_decay=COORDINATE_DECAY`.
        """
        quantizer = training.structured(variables["params"], bits, **self.structures)
        return training.train(
            self.task,
            self.validation,
            variables,
            quantizer,
            schedule(self.per_epoch),
            batch_size=self.batch_size,
            seed=seed,
            every=max(1, self.per_epoch // 2),
            **kwargs,
        )

    def accuracy(self, variables: Mapping) -> float:
        """Returns the accuracy on the test set in percent."""
        return round(self.evaluate(variables, self.task.dataset.test).accuracy, 2)

    def float_row(self, variables: Mapping, seed: int) -> dict:
        """Returns the record's row of the float network."""
        return {"row": "full precision", "seed": seed, "full precision": self.accuracy(variables)}

    def row(self, name: str, outcome: training.Outcome, seed: int) -> dict:
        """Returns the record's row of a multi-bit network."""
        told = {"model": self.model, "dataset": self.task.dataset.name}
        row = {
            "row": name,
            "seed": seed,
            "file": Network({**outcome.variables, "params": outcome.encoded}, told),
            "average bits": round(outcome.bits, 4),
            "low precision": self.accuracy(outcome.variables),
            "KB": round(outcome.kilobytes, 2),
            "layers": training.by_layer(outcome.encoded),
        }
        if all(layer.name in outcome.encoded for layer in LENET5):
            reduced = dead_channels.remove_dead_channels(outcome.variables, LENET5)
            left = dead_channels.reduced_storage_bits(outcome.encoded, reduced) / 8e3
            row |= {"widths": reduced.widths, "KB without dead channels": round(left, 2)}
        curve = [
            {"phase": p.kind, "step": p.step, "loss": round(p.loss, 5), "bits": p.bits}
            | {"validation": round(p.score, 2)}
            for p in outcome.history
        ]
        return row | {"curve": curve}


def make(
    context: Context,
    seed: int,
    dataset: str,
    model: str,
    *,
    validation: int,
    float_epochs: float,
    float_rate: float = 0.05,
    batch_size: int = 128,
    augment: bool = True,
    **structures,
) -> Protocol:
    """Returns the protocol of a table.

    Args:
      context, dataset, model, batch_size, augment: as in `lab.protocol.make`.
      seed: of the validation split.
      validation: held-out training images; at most a sixth of them.
      float_epochs, float_rate: of the network that ALQ starts from.
      structures: conv, first, blocks of `training.structured`.
    """
    loaded = context.load(dataset)
    count = min(validation, len(loaded.train.labels) // 6)
    rest, held_out = data.holdout(loaded.train, count, seed)
    task = tasks.classification(
        models.build(model, loaded.classes), loaded._replace(train=rest), augment
    )
    return Protocol(
        context,
        task,
        held_out,
        evaluation.make_evaluate(task),
        batch_size,
        float_epochs,
        float_rate,
        structures,
        model,
    )


def mnist(context: Context, seed: int, validation: int = 10_000) -> Protocol:
    """Returns LeNet-5 (20-50-500) on MNIST with the structures of appendix C.1."""
    return make(
        context,
        seed,
        "mnist",
        "lenet5",
        validation=validation,
        float_epochs=8,
        float_rate=0.03,
        augment=False,
        conv="kernelwise",
    )


def cifar10_vgg(context: Context, seed: int) -> Protocol:
    """Returns the small VGG on CIFAR-10 with the structures of appendix C.2.

    The float network comes from SGD; the appendix has Adam.
    """
    return make(
        context,
        seed,
        "cifar10",
        "vgg-small",
        validation=5_000,
        float_epochs=200,
        first="channelwise",
        blocks=(16, 2, 2),
    )


def resnet18(context: Context, seed: int, dataset: str = "cifar100") -> Protocol:
    """Returns ResNet-18 with the structures and batches of appendix C.3, on images of the lab."""
    return make(
        context,
        seed,
        dataset,
        "resnet18",
        validation=5_000,
        float_epochs=200,
        batch_size=256,
        first="channelwise",
        blocks=(2,),
    )


def keep(bits: float, target: float, rounds: int) -> float:
    """Returns the share of the coordinates that a round leaves, from `bits` down to a target.

    A target of average bits: it is met as far as groups of all sizes are pruned alike.
    """
    return (target / bits) ** (1 / rounds)


def uniform_width(phases: Sequence[qj.Phase]) -> tuple[qj.Phase, ...]:
    """Returns a schedule without its pruning: the baseline of table 1, which trains as long."""
    return tuple(
        qj.Phase("basis", phase.steps, phase.learning_rate) if phase.kind == "prune" else phase
        for phase in phases
    )


def straight_through(phases: Sequence[qj.Phase]) -> tuple[qj.Phase, ...]:
    """Returns a schedule whose basis phases are straight-through steps (section 5.3)."""
    return tuple(
        phase._replace(kind="ste-reconstruction") if phase.kind == "basis" else phase
        for phase in phases
    )
