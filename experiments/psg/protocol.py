"""The PSG paper's protocol: plain training, then the last epochs with another optimizer.

A recipe names the data, the network, the learning rates by epoch and the epoch of the switch;
`Protocol` trains both parts, at any scale, and scores what comes out at any width.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import optax

import quantjax as qj
from quantjax import linen
from quantjax.core.quantizer import Quantizer
from quantjax.lab import data, models
from quantjax.lab.deploy import deploy, reestimated
from quantjax.lab.models.torch_import import import_state_dict, load_torch
from quantjax.lab.recipes import Context, Network
from quantjax.lab.train import engine, evaluation, tasks


class Protocol(NamedTuple):
    """Data, network and schedule of a table; `make` builds one."""

    context: Context
    task: tasks.Task
    evaluate: Callable
    rates: Mapping[float, float]  # {first epoch: learning rate}
    switch: float  # the epoch at which the late part begins
    end: float
    batch_size: int
    compiled: dict  # {name: Steps}: one program for all widths of an optimizer
    model: str  # its name

    def rate(self, start: float = 0.0) -> optax.Schedule:
        """Returns the learning rate by step of a part that begins at epoch `start`."""
        per_epoch = len(self.task.dataset.train.labels) // self.batch_size
        later = {epoch: rate for epoch, rate in self.rates.items() if epoch > start}
        first = self.rates[max(epoch for epoch in self.rates if epoch <= start)]
        borders = [self.context.steps(epoch - start, per_epoch) for epoch in later]
        parts = [optax.constant_schedule(rate) for rate in (first, *later.values())]
        return optax.join_schedules(parts, borders)

    def plain(self, seed: int, optimizer: Callable | None = None) -> dict:
        """Returns the variables at the switch: imported from `--init` if given, else trained."""
        if self.context.init is not None:
            shape = self.task.dataset.train.images.shape[1:]
            return import_state_dict(self.task.model, load_torch(self.context.init), shape)
        start = self.task.init(seed)
        return self._train("plain", optimizer or sgd, start, 0.0, self.switch, seed)

    def late(self, name: str, optimizer: Callable, variables: Mapping, seed: int) -> dict:
        """Returns the variables at the end; optimizer(rate) makes the late part's optimizer.

        Optimizers of one name must differ in their states alone: they share a program.
        """
        return self._train(name, optimizer, variables, self.switch, self.end, seed)

    def _train(self, name, optimizer, variables, start, end, seed):
        per_epoch = len(self.task.dataset.train.labels) // self.batch_size
        method = engine.Method(optimizer(self.rate(start)))
        return engine.fit(
            self.task,
            method,
            variables,
            self.context.steps(end - start, per_epoch),
            batch_size=self.batch_size,
            seed=seed,
            steps=engine.shared_steps(self.compiled, name, self.task, method),
            label=name,
        ).variables

    def scores(self, variables: Mapping, quantizer: Quantizer) -> dict:
        """Returns accuracies in percent at full and low precision, table A1's MSE, and the file.

        The paper's low precision has the batch norms of the float network, and so has the file.
        "re-estimated" is the accuracy with the statistics of training images under the rounded
        weights.
        """
        shipped = deploy(variables, quantizer)
        told = {"model": self.model, "dataset": self.task.dataset.name}
        found = {
            "file": Network({**shipped.variables, "params": shipped.encoded}, told),
            "full precision": self.accuracy(variables),
            "low precision": self.accuracy(shipped.variables),
            "MSE": round(shipped.weight_error, 4),
        }
        if "batch_stats" in variables:
            found["re-estimated"] = self.accuracy(reestimated(self.task, shipped.variables))
        return found

    def accuracy(self, variables: Mapping) -> float:
        """Returns the accuracy on the test set in percent."""
        return round(self.evaluate(variables, self.task.dataset.test).accuracy, 2)

    def with_activations(self, variables: Mapping, quantizer: Quantizer, bits: int) -> dict:
        """Returns the accuracy with quantized weights and layer inputs, and the n of their ranges.

        The ranges come from batch norm's parameters, n searched on training images. The first
        layer takes the images as they are.
        """
        inputs = {"Conv_0": None, ".*": qj.uniform_input(bits)}
        apply = linen.quantize_inputs(self.task.model.apply, inputs)
        evaluate = evaluation.make_evaluate(self.task, inputs)
        train = self.task.dataset.train
        sample = data.Split(train.images[:2000], train.labels[:2000])
        fitted, n = linen.search_batch_norm_range(
            apply,
            deploy(variables, quantizer).variables,
            self.task.inputs(train.images[:256]),
            score=lambda variables: evaluate(variables, sample).accuracy,
            train=False,
        )
        accuracy = evaluate(fitted, self.task.dataset.test).accuracy
        return {"activation bits": bits, "accuracy": round(accuracy, 2), "n": n}


def make(
    context: Context,
    dataset: str,
    model: str,
    *,
    rates: Mapping[float, float],
    switch: float,
    end: float,
    batch_size: int = 128,
    augment: bool = True,
) -> Protocol:
    """Returns the protocol of a table; with `augment`, images are cropped and flipped at random."""
    loaded = context.load(dataset)
    task = tasks.classification(models.build(model, loaded.classes), loaded, augment)
    evaluate = evaluation.make_evaluate(task)
    return Protocol(context, task, evaluate, rates, switch, end, batch_size, {}, model)


def sgd(rate, weight_decay: float = 1e-4) -> optax.GradientTransformation:
    """Returns SGD with momentum 0.9 and L2 weight decay on all parameters (appendix C)."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9))


def psg(
    target: Quantizer, strength: float, *, weight_decay: float = 1e-4, directional: bool = False
) -> Callable:
    """Returns rate -> the paper's chain, with its numbers in the state."""

    def optimizer(rate):
        return optax.inject_hyperparams(qj.psg)(
            rate, target, strength=strength, weight_decay=weight_decay, directional=directional
        )

    return optimizer


def grid(bits: int, *, momentum: float | None = None, ends: int | None = None) -> Quantizer:
    """Returns the paper's weight grid, dense biases included; first and last layer at `ends` bits.

    Args:
      bits: 2..16.
      momentum: of the running range in training, 0.1 in public code; None at deployment.
      ends: 8 where the target is 3 or 2 bits; None: as all layers.
    """
    inner = qj.uniform(bits, momentum=momentum, biases=True)
    if ends is None:
        return inner
    outer = qj.uniform(ends, momentum=momentum, biases=True)
    # Conv_0 and Dense_0 at the top level are the first and the last layer of these networks.
    return qj.partition({"Conv_0": outer, "Dense_0": outer, ".*(kernel|bias)": inner})


def mnist(context: Context, model: str = "lenet5") -> Protocol:
    """Returns LeNet-5 (20-50-500), or another, on MNIST: six epochs, the last two slower."""
    return make(
        context,
        "mnist",
        model,
        rates={0: 0.03, 4: 0.01, 5: 0.002},
        switch=4,
        end=6,
        augment=False,
    )


def mnist_psg(parts: Protocol, bits: int, strength: float, seed: int, start: Mapping) -> dict:
    """Returns the variables after PSG: from `start` at the switch, or below 4 bits from scratch."""
    chain = psg(qj.uniform(bits, momentum=0.1), strength, weight_decay=0.0 if bits == 2 else 1e-4)
    if bits < 4:
        whole = parts._replace(switch=0)
        return whole.late("psg, all epochs", chain, parts.task.init(seed), seed)
    return parts.late("psg", chain, start, seed)
