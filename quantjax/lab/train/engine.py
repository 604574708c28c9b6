"""Training: one jitted step for every method, whatever it quantizes and however it descends."""

import collections
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from quantjax import linen
from quantjax.core.quantizer import InputQuantizer, Quantizer, QuantState
from quantjax.lab import data as data_lib
from quantjax.lab.train.progress import Progress


class Method(NamedTuple):
    """How a phase trains: what is quantized in the forward pass, and how it descends."""

    optimizer: optax.GradientTransformation
    quantizer: Quantizer | None = None  # weights; None: as they are
    input_quantizer: InputQuantizer | Mapping | None = None  # as `linen.quantize_inputs` takes it


class TrainState(NamedTuple):
    """Everything that a training step moves."""

    step: jax.Array  # scalar, int32: steps done in this phase
    key: jax.Array  # scalar key
    params: Any
    state: QuantState  # of the weights' quantizer
    quant: dict  # collection `quant`: what input quantizers learn
    quant_stats: dict  # collection `quant_stats`: their buffers
    batch_stats: dict
    opt_state: Any
    totals: dict  # sums since the last report: loss, correct, batches

    @property
    def variables(self) -> dict:
        """The collections that `model.apply` takes, with the float params."""
        collections = {
            "params": self.params,
            "batch_stats": self.batch_stats,
            "quant": self.quant,
            "quant_stats": self.quant_stats,
        }
        return {name: value for name, value in collections.items() if value}


class Task(NamedTuple):
    """What is trained on what: a model, its data, and how images become its inputs."""

    model: nn.Module
    dataset: data_lib.Dataset
    augment: bool = False  # pad-4 random crop and flip

    def inputs(self, images):
        """Returns uint8 images as the model's normalized inputs."""
        return data_lib.normalize(images, self.dataset.mean, self.dataset.std)

    def init(self, seed: int) -> dict:
        """Returns the model's variables, initialised by a seed."""
        example = self.inputs(self.dataset.train.images[:1])
        return jax.jit(self.model.init)(jax.random.key(seed), example)


def model_apply(model: nn.Module, input_quantizer) -> Callable:
    """Returns the model's apply, with quantized inputs where there is a quantizer."""
    if input_quantizer is None:
        return model.apply
    return linen.quantize_inputs(model.apply, input_quantizer)


def copied(tree):
    """Returns a tree with buffers of its own, which no step can take."""
    return jax.tree.map(jnp.copy, tree)


def init_state(task: Task, variables: Mapping, method: Method, seed: int) -> TrainState:
    """Returns the state of a phase that starts from `variables`, which stay valid.

    Input quantizers fit themselves to the first 256 training images.
    """
    # Copies, since the step donates its state.
    variables = copied(dict(variables))
    params = variables["params"]
    key, init_key = jax.random.split(jax.random.key(seed))
    quant = {name: variables.get(name, {}) for name in ("quant", "quant_stats")}
    if method.input_quantizer is not None and not any(quant.values()):
        apply = model_apply(task.model, method.input_quantizer)
        images = task.inputs(task.dataset.train.images[:256])
        _, fitted = jax.jit(lambda v, x: apply(v, x, mutable=list(quant)))(variables, images)
        quant |= fitted
    if method.quantizer is None:
        state = QuantState({}, {})
    else:
        state = copied(method.quantizer.init(params, init_key))  # it may hold the params
    opt_state = method.optimizer.init(_trainable(params, state.learned, quant["quant"]))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=key,
        params=params,
        state=state,
        **quant,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=copied(opt_state),
        totals=_no_totals(),
    )


class Steps(NamedTuple):
    """Compiled training steps; both donate their state."""

    one: Callable  # (state, images, labels, indices [batch]) -> state
    many: Callable  # the same over indices [steps, batch], in one `lax.scan`


def make_steps(task: Task, method: Method) -> Steps:
    """Returns the jitted steps of a method.

    The states of another member of the same family, such as the same quantizer at another width,
    fit too and compile nothing.
    """
    apply = model_apply(task.model, method.input_quantizer)
    quantizer = method.quantizer

    def loss_fn(trainable, state: TrainState, images, labels, key):
        params, learned, quant = _parts(trainable, state)
        current = state.state._replace(learned=learned)
        weights = params if quantizer is None else quantizer.apply(params, current, key=key)
        variables = state._replace(params=weights, quant=quant).variables
        logits, moved = apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "quant_stats"],
            rngs={"quant": jax.random.fold_in(key, 1), "dropout": jax.random.fold_in(key, 2)},
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        penalty = 0.0 if quantizer is None else quantizer.penalty(current, key=key)
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
        return loss + penalty, (loss, correct, moved)

    def one(state: TrainState, images, labels, indices):
        key = jax.random.fold_in(state.key, state.step)
        images, labels = images[indices], labels[indices]
        if task.augment:
            images = data_lib.augment(jax.random.fold_in(key, 3), images)
        trainable = _trainable(state.params, state.state.learned, state.quant)
        grads, (loss, correct, moved) = jax.grad(loss_fn, has_aux=True)(
            trainable, state, task.inputs(images), labels, key
        )
        updates, opt_state = method.optimizer.update(grads, state.opt_state, trainable)
        params, learned, quant = _parts(optax.apply_updates(trainable, updates), state)
        quant_state = state.state._replace(learned=learned)
        if quantizer is not None:
            quant_state = quantizer.update(params, quant_state, key=key)
        totals = state.totals
        return state._replace(
            step=state.step + 1,
            params=params,
            state=quant_state,
            quant=quant,
            quant_stats=moved.get("quant_stats", state.quant_stats),
            batch_stats=moved.get("batch_stats", state.batch_stats),
            opt_state=opt_state,
            totals={
                "loss": totals["loss"] + loss,
                "correct": totals["correct"] + correct,
                "batches": totals["batches"] + 1,
            },
        )

    def many(state, images, labels, indices):
        def body(state, batch):
            return one(state, images, labels, batch), None

        return jax.lax.scan(body, state, indices)[0]

    return Steps(jax.jit(one, donate_argnums=0), jax.jit(many, donate_argnums=0))


class Report(NamedTuple):
    """Where training stands, between chunks of steps."""

    state: TrainState
    steps: int  # done in this phase
    loss: float  # mean over the steps since the last report
    accuracy: float  # on the training batches, percent
    seconds: float  # since the phase began


def train(
    task: Task,
    steps: Steps,
    state: TrainState,
    total: int,
    *,
    batch_size: int,
    seed: int,
    every: int | None = None,
    label: str = "training",
    scan: bool | None = None,
) -> Iterator[Report]:
    """Trains for `total` steps and yields a report every `every` steps (None: once an epoch).

    The last report comes after the last step. The batches depend on seed and step alone.

    Args:
      task, steps, state: from `Task`, `make_steps` and `init_state`; the state is donated.
      total: steps of this phase, of `batch_size` images each.
      seed: of the order of the images.
      every: steps between reports.
      label: of the progress bar, which is quiet when not on a terminal.
      scan: steps in chunks inside `lax.scan` rather than one by one; None: except on the CPU,
        where convolutions inside a loop run 6 to 10 times slower.

    Raises:
      ValueError: a batch larger than the training set, or a count below 1.
      FloatingPointError: the loss is not finite.
    """
    count = len(task.dataset.train.labels)
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must be in 1..{count}, the training set; got {batch_size}")
    for name, count_of in (("total", total), ("every", 1 if every is None else every)):
        if count_of < 1:
            raise ValueError(f"{name} must be at least 1, got {count_of}")
    scan = jax.default_backend() != "cpu" if scan is None else scan
    per_epoch = count // batch_size
    every = min(every or per_epoch, total)
    images, labels = (jnp.asarray(array) for array in task.dataset.train)
    start = time.monotonic()
    batches = _batches(count, batch_size, seed)
    with Progress(label, total) as progress:
        for done in range(0, total, every):
            chunk = np.stack([next(batches) for _ in range(min(every, total - done))])
            if scan:
                state = steps.many(state, images, labels, jnp.asarray(chunk))
            else:
                for indices in chunk:
                    state = steps.one(state, images, labels, indices)
                    progress.advance(1)
            sums = {name: float(value) for name, value in state.totals.items()}
            loss = sums["loss"] / sums["batches"]
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"{label}: the loss is {loss} within the first {done + len(chunk)} steps; "
                    "a smaller learning rate or strength may help"
                )
            progress.show(done + len(chunk), loss)
            state = state._replace(totals=_no_totals())
            accuracy = 100 * sums["correct"] / (sums["batches"] * batch_size)
            yield Report(state, done + len(chunk), loss, accuracy, time.monotonic() - start)


def shared_steps(compiled: dict, name: str, task: Task, method: Method) -> Steps:
    """Returns the steps kept as `name`, made at its first use; methods differ in states alone."""
    if name not in compiled:
        compiled[name] = make_steps(task, method)
    return compiled[name]


def fit(
    task: Task,
    method: Method,
    variables: Mapping,
    total: int,
    *,
    batch_size: int,
    seed: int,
    steps: Steps | None = None,
    label: str = "training",
) -> TrainState:
    """Trains a phase of `total` steps from `variables` to its end and returns the final state.

    Args:
      steps: compiled for a member of the method's family; None: compiled here.
      task, method, variables, total, batch_size, seed, label: as in `init_state` and `train`.
    """
    steps = make_steps(task, method) if steps is None else steps
    state = init_state(task, variables, method, seed)
    reports = train(task, steps, state, total, batch_size=batch_size, seed=seed, label=label)
    return collections.deque(reports, maxlen=1).pop().state


class Score(NamedTuple):
    """Loss and accuracy over a split."""

    loss: float
    accuracy: float  # percent


def make_evaluate(task: Task, input_quantizer=None, batch_size: int = 500) -> Callable:
    """Returns evaluate(variables, split) -> Score, compiled once for all trees of one shape."""
    apply = model_apply(task.model, input_quantizer)

    @jax.jit
    def sums(variables, images, labels, real):
        logits = apply(variables, task.inputs(images), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses * real), jnp.sum((jnp.argmax(logits, axis=-1) == labels) * real)

    def evaluate(variables, split: data_lib.Split) -> Score:
        count = len(split.labels)
        size = min(batch_size, count)
        parts = []
        for start in range(0, count, size):
            # The last batch is filled up with images that do not count.
            index = np.arange(start, start + size)
            real = (index < count).astype(np.float32)
            index = np.minimum(index, count - 1)
            parts.append(sums(variables, split.images[index], split.labels[index], real))
        loss, correct = np.sum(np.asarray(jax.device_get(parts), np.float64), axis=0)
        return Score(float(loss / count), float(100 * correct / count))

    return evaluate


def _no_totals() -> dict:
    return {"loss": jnp.zeros(()), "correct": jnp.zeros((), jnp.int32), "batches": jnp.zeros(())}


def _batches(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count).astype(np.int32)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]
        epoch += 1


def _trainable(params, learned, quant):
    # The params alone where nothing else learns, so that the optimizer sees the params' own paths.
    return (params, learned, quant) if learned or quant else params


def _parts(trainable, state: TrainState):
    if state.state.learned or state.quant:
        return trainable
    return trainable, state.state.learned, state.quant
