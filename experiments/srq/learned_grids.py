"""Training with learned grids: weights and layer inputs quantized, as in the tables of SRQ."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import quantjax as qj
from quantjax.core import paths
from quantjax.core.quantizer import InputQuantizer, Quantizer
from quantjax.lab import data, models
from quantjax.lab.deploy import Deployed, deploy
from quantjax.lab.plans import faster_masks
from quantjax.lab.recipes import Context, Network
from quantjax.lab.train import engine, evaluation, tasks
from quantjax.methods.srq import widths
from quantjax.methods.srq.semi_relaxed import srq, srq_input


class Grids(NamedTuple):
    """Data, network and schedule of a table's training; `make` builds one."""

    context: Context
    task: tasks.Task
    epochs: float
    batch_size: int
    schedule: Callable  # (steps, steps per epoch) -> optax.Schedule
    weight_decay: float
    mask_rate: float  # how much faster the masks' logits learn
    biases: bool  # whether biases are quantized as weights are
    compiled: dict  # {name: Steps}: one program for all runs of a name
    model: str  # its name

    @property
    def steps(self) -> int:
        """Steps of one training."""
        return self.context.steps(self.epochs, self._per_epoch)

    def float_net(self, seed: int) -> dict:
        """Returns the variables of the network trained in full precision."""
        method = engine.Method(self._adamw())
        return self._fit("float", method, self.task.init(seed), seed).variables

    def first(self, seed: int) -> dict:
        """Returns the variables of a training from scratch.

        Biases that are quantized begin as torch has them: from Flax's zeros "mode" moves none.
        """
        variables = self.task.init(seed)
        return torch_biases(variables, seed) if self.biases else variables

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
        state = self._fit(name, method, start or self.first(seed), seed)
        shipped = deploy(state.variables, quantizer, state.state)
        evaluate = evaluation.make_evaluate(self.task, inputs)
        accuracy = evaluate(shipped.variables, self.task.dataset.test).accuracy
        dataset = self.task.dataset
        told = {"model": self.model, "dataset": dataset.name, "inputs": repr(inputs)}
        told |= {"mean": list(dataset.mean), "std": list(dataset.std)}
        network = Network({**shipped.variables, "params": shipped.encoded}, told)
        error = round(100 - accuracy, 2)
        return Trained(error, widths.of_state(state.state), state, shipped, network)

    def learned(
        self,
        bits: int,
        penalty: float,
        seed: int,
        start: Mapping | None = None,
        estimator: str = "mode",
    ) -> "Trained":
        """Trains with learned widths in the first half, and at these in the second (appendix F).

        Under the expectation's gradient the loss holds on to levels until it has little left to
        gain: it takes a converged start and a large penalty.
        """
        quantizer = srq(
            bits,
            learn_bits=True,
            freeze_after=self.steps // 2,
            penalty=penalty,
            estimator=estimator,
            biases=self.biases,
        )
        inputs = srq_input(bits, estimator=estimator)
        return self.train(
            f"learned, {bits}, {penalty}, {estimator}", quantizer, inputs, seed, start
        )

    def fixed(
        self,
        bits: int,
        chosen: Mapping[str, int] | None,
        seed: int,
        start: Mapping | None = None,
        estimator: str = "mode",
    ) -> "Trained":
        """Trains at the widths {path: width} from the first step, the twin of learned ones.

        None: all `bits`, the uniform network.
        """
        quantizer = srq(
            bits, learn_bits=True, freeze_after=0, estimator=estimator, biases=self.biases
        )

        def init(params, key=None):
            state = quantizer.init(params, key)
            return widths.at_widths(state, bits, chosen or dict.fromkeys(state.buffers, bits))

        inputs = srq_input(bits, estimator=estimator)
        name = f"fixed, {bits}, {estimator}"
        return self.train(name, quantizer._replace(init=init), inputs, seed, start)

    def error(self, variables: Mapping) -> float:
        """Returns the test error of a float network in percent."""
        evaluate = evaluation.make_evaluate(self.task)
        return round(100 - evaluate(variables, self.task.dataset.test).accuracy, 2)

    def smaller(self, count: int) -> "Grids":
        """Returns the same on the first `count` training images."""
        dataset = self.task.dataset
        train = data.Split(*(part[:count] for part in dataset.train))
        task = self.task._replace(dataset=dataset._replace(train=train))
        return self._replace(task=task, compiled={})

    @property
    def _per_epoch(self):
        return len(self.task.dataset.train.labels) // self.batch_size

    def _fit(self, name, method, variables, seed):
        return engine.fit(
            self.task,
            method,
            variables,
            self.steps,
            batch_size=self.batch_size,
            seed=seed,
            steps=engine.shared_steps(self.compiled, name, self.task, method),
            label=name,
        )

    def _adamw(self):
        rate = self.schedule(self.steps, self.steps / self.epochs)
        descend = optax.adamw(rate, weight_decay=self.weight_decay, mask=qj.decay_mask)
        return optax.chain(descend, faster_masks(self.mask_rate))


class Trained(NamedTuple):
    """A network trained with learned grids."""

    error: float  # of the deployed network on the test set, percent
    widths: dict  # of its kernels and biases by path; 1 is ternary
    state: engine.TrainState
    shipped: Deployed
    network: Network

    @property
    def named_widths(self) -> str:
        """Those of the kernels, as in the paper's tables: 3/2/3/3 or 2/2/2/T."""
        kernels = (width for path, width in self.widths.items() if paths.is_weight(path))
        return "/".join(map(widths.name, kernels))

    def row(self, name: str, bits: int, seed: int) -> dict:
        """Returns the row of a record; `bits` are those of the layers' inputs."""
        return {
            "row": name,
            "bits": bits,
            "seed": seed,
            "error": self.error,
            "file": self.network,
            "widths": self.named_widths,
        }


def plain(
    bits: int, estimator: str, dropbits: bool = False, biases: bool = False
) -> tuple[Quantizer, InputQuantizer]:
    """Returns SRQ for weights, with biases or without, and for layer inputs."""
    quantizer = srq(bits, dropbits=dropbits, estimator=estimator, biases=biases)
    return quantizer, srq_input(bits, estimator=estimator)


def torch_biases(variables: Mapping, seed: int) -> dict:
    """Returns the variables with the biases beside kernels as torch draws them.

    Uniform within 1 / sqrt(n), n the inputs of an output.
    """
    flat, rebuild = paths.flatten(variables["params"])
    keys = paths.leaf_keys(jax.random.key(seed), flat)
    drawn = {}
    for path, bias in flat.items():
        kernel = flat.get(f"{path.removesuffix('bias')}kernel")
        if paths.role(path) == "bias" and kernel is not None:
            most = kernel[..., 0].size ** -0.5
            drawn[path] = jax.random.uniform(keys[path], bias.shape, bias.dtype, -most, most)
    return {**variables, "params": rebuild(flat | drawn)}


def short(peak: float) -> Callable:
    """Returns the schedule of a short training: warmed up, then a cosine down to 0."""

    def schedule(steps, per_epoch):
        del per_epoch
        warm = max(1, steps // 20)
        return optax.warmup_cosine_decay_schedule(peak / 10, peak, warm, max(steps, warm + 1))

    return schedule


def decaying(rate: float, last: float, factor: float, drops: Mapping[float, float] | None = None):
    """Returns appendix F's: `rate`, times drops[share of the steps], times `factor` per late epoch.

    Args:
      rate: at first.
      last: number of epochs in which it decays by `factor` each.
      factor: of one such epoch.
      drops: {share of all steps: what it is multiplied with from there on}.
    """

    def schedule(steps, per_epoch):
        def at(step):
            late = jnp.maximum(step - (steps - last * per_epoch), 0)
            value = rate * factor ** jnp.floor(late / per_epoch)
            for share, drop in (drops or {}).items():
                value = value * jnp.where(step >= share * steps, drop, 1)
            return value

        return at

    return schedule


def make(
    context: Context,
    dataset: str,
    model: str | Callable,
    *,
    epochs: float,
    schedule: Callable,
    weight_decay: float = 0.01,
    mask_rate: float = 1,
    biases: bool = True,
    batch_size: int = 128,
    augment: bool = False,
    symmetric: bool = False,
) -> Grids:
    """Returns the training of a table by appendix F; with `symmetric`, images lie in [-1, 1].

    A short training may want masks that learn faster than weights (`mask_rate`), and biases that
    stay float.
    """
    loaded = context.load(dataset)
    if symmetric:
        half = (0.5,) * len(loaded.mean)
        loaded = loaded._replace(mean=half, std=half)
    task = tasks.classification(models.build(model, loaded.classes), loaded, augment)
    return Grids(
        context,
        task,
        epochs,
        batch_size,
        schedule,
        weight_decay,
        mask_rate,
        biases,
        compiled={},
        model=model,
    )


def paper_lenet(context: Context) -> Grids:
    """Returns LeNet-5 (32-64-512) on MNIST by appendix F: 100 epochs."""
    return make(
        context,
        "mnist",
        "lenet5-wide",
        epochs=100,
        schedule=decaying(5e-4, last=50, factor=0.8),
        symmetric=True,
    )


def paper_vgg(context: Context, weight_decay: float = 0.01) -> Grids:
    """Returns VGG-7 on CIFAR-10 by appendix F: 300 epochs with crops and flips.

    The weight decay is 0.02 in tables 3 and 5.
    """
    return make(
        context,
        "cifar10",
        "vgg7",
        epochs=300,
        schedule=decaying(1e-4, last=50, factor=0.9, drops={0.5: 0.1}),
        weight_decay=weight_decay,
        augment=True,
    )
