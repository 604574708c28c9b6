"""Training: one jitted step for every method, whatever it quantizes and however it descends."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import AxisType

from quantjax import linen
from quantjax.core.quantizer import InputQuantizer, Quantizer, QuantState
from quantjax.lab import interrupts
from quantjax.lab.train import checkpoints, guards, meshes
from quantjax.lab.train import session as session_lib
from quantjax.lab.train.progress import Progress
from quantjax.lab.train.tasks import Task

FITTED_TO = 256  # training examples, by input quantizers
CHUNK = 64  # steps in one `lax.scan`
ASKED = 32  # steps after which processes ask each other whether to save
LAG = 2  # dispatches that the device may be behind


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
    totals: dict  # since the last report: sums of loss and accuracy, batches, skipped; and stopped

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


def model_apply(model: nn.Module, input_quantizer) -> Callable:
    """Returns the model's apply, with quantized inputs where there is a quantizer."""
    model = session_lib.current().model(model)
    if input_quantizer is None:
        return model.apply
    return linen.quantize_inputs(model.apply, input_quantizer)


def copied(tree):
    """Returns a tree with buffers of its own, which no step can take."""
    return jax.tree.map(jnp.copy, tree)


def init_state(task: Task, variables: Mapping, method: Method, seed: int) -> TrainState:
    """Returns the state of a phase that starts from `variables`, which stay valid.

    Input quantizers fit themselves to the first 256 training examples. On a mesh the state lies as
    `meshes.shardings` says.
    """
    # Copies, since the step donates its state.
    variables = copied(dict(variables))
    params = variables["params"]
    key, init_key = jax.random.split(jax.random.key(seed))
    quant = {name: variables.get(name, {}) for name in ("quant", "quant_stats")}
    if method.input_quantizer is not None and not any(quant.values()):
        apply = model_apply(task.model, method.input_quantizer)
        x = task.inputs(task.dataset.train[0][:FITTED_TO])
        _, fitted = jax.jit(lambda v, x: apply(v, x, mutable=list(quant)))(variables, x)
        quant |= fitted
    if method.quantizer is None:
        state = QuantState({}, {})
    else:
        state = copied(method.quantizer.init(params, init_key))  # it may hold the params
    opt_state = method.optimizer.init(_trainable(params, state.learned, quant["quant"]))
    return placed(
        TrainState(
            step=jnp.zeros((), jnp.int32),
            key=key,
            params=params,
            state=state,
            **quant,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=copied(opt_state),
            totals=_no_totals(),
        )
    )


def placed(state: TrainState) -> TrainState:
    """Returns a state that lies where the session's mesh and rules say."""
    session = session_lib.current()
    if session.mesh is None:
        return state
    where = meshes.shardings(state, state.params, session.mesh, session.rules)
    return meshes.place(state, where)


class Steps(NamedTuple):
    """Compiled training steps; both donate their state.

    Where indices are None, the arrays are the batches themselves.
    """

    one: Callable  # (state, (x, y), indices [batch]) -> (state, loss: NaN where it was refused)
    many: Callable  # the same over indices [steps, batch], in one `lax.scan`; losses [steps]
    explain: Callable  # (state, (x, y), indices) -> {"the weights": ..., ...} of the next step


def make_steps(task: Task, method: Method) -> Steps:
    """Returns the jitted steps of a method, by the session's mesh, precision and `on_nan`.

    A step whose loss or weights are not finite changes nothing; with "stop" those after it neither.
    The states of another member of the same family, such as the same quantizer at another width,
    fit too and compile nothing.
    """
    session = session_lib.current()
    apply = model_apply(task.model, method.input_quantizer)
    quantizer = method.quantizer

    def loss_fn(trainable, state: TrainState, x, y, key, watched=()):
        params, learned, quant = _parts(trainable, state)
        current = state.state._replace(learned=learned)
        weights = params if quantizer is None else quantizer.apply(params, current, key=key)
        variables = state._replace(params=weights, quant=quant).variables
        outputs, moved = apply(
            variables,
            task.inputs(x),
            train=True,
            mutable=["batch_stats", "quant_stats", *watched],
            rngs={"quant": jax.random.fold_in(key, 1), "dropout": jax.random.fold_in(key, 2)},
            **({"capture_intermediates": True} if watched else {}),
        )
        losses, hits = task.measure(outputs, y)
        loss, penalty = jnp.mean(losses), 0.0
        if quantizer is not None:
            penalty = quantizer.penalty(current, key=key)
        return loss + penalty, (loss, jnp.mean(hits.astype(jnp.float32)), moved)

    def drawn(state, arrays, indices):
        """Returns the key of the step and its batch."""
        key = jax.random.fold_in(state.key, state.step)
        x, y = arrays if indices is None else (part[indices] for part in arrays)
        if task.augment is not None:
            x, y = task.augment(jax.random.fold_in(key, 3), x, y)
        return key, x, y

    def next_state(state: TrainState, grads, moved, key):
        trainable = _trainable(state.params, state.state.learned, state.quant)
        updates, opt_state = method.optimizer.update(grads, state.opt_state, trainable)
        params, learned, quant = _parts(optax.apply_updates(trainable, updates), state)
        quant_state = state.state._replace(learned=learned)
        if quantizer is not None:
            quant_state = quantizer.update(params, quant_state, key=key)
        return state._replace(
            step=state.step + 1,
            params=params,
            state=quant_state,
            quant=quant,
            quant_stats=moved.get("quant_stats", state.quant_stats),
            batch_stats=moved.get("batch_stats", state.batch_stats),
            opt_state=opt_state,
        )

    def one(state: TrainState, arrays, indices):
        key, x, y = drawn(state, arrays, indices)
        trainable = _trainable(state.params, state.state.learned, state.quant)
        grads, (loss, hits, moved) = jax.grad(loss_fn, has_aux=True)(trainable, state, x, y, key)
        new = next_state(state, grads, moved, key)
        good = guards.all_finite(loss, (new.params, new.state.learned, new.quant))
        totals = state.totals
        if session.on_nan == "stop":
            good &= ~totals["stopped"]
        added = {"loss": loss, "accuracy": 100 * hits, "batches": 1.0, "skipped": 0.0}
        skipped = {"loss": 0.0, "accuracy": 0.0, "batches": 0.0, "skipped": 1.0}
        new = guards.where(good, new, state)
        if session.on_nan == "skip":
            new = new._replace(step=state.step + 1)
        totals = {
            name: totals[name] + jnp.where(good, added[name], skipped[name]) for name in added
        } | {"stopped": totals["stopped"] | ~good & (session.on_nan == "stop")}
        return new._replace(totals=totals), jnp.where(good, loss, jnp.nan)

    def on_mesh(state, arrays, indices):
        """The same, with a state that lies as it did."""
        if session.mesh is None:
            return one(state, arrays, indices)
        where = meshes.shardings(state, state.params, session.mesh, session.rules)
        if AxisType.Explicit in session.mesh.axis_types:
            everywhere = jax.sharding.NamedSharding(session.mesh, jax.sharding.PartitionSpec())
            run = jax.sharding.auto_axes(one, out_sharding=(where, everywhere))
            return run(state, arrays, indices)
        state, loss = one(state, arrays, indices)
        return jax.lax.with_sharding_constraint(state, where), loss

    def many(state, arrays, indices):
        def body(state, now):
            rows, now = (now, None) if indices is None else (arrays, now)
            return on_mesh(state, rows, now)

        return jax.lax.scan(body, state, arrays if indices is None else indices)

    layers = []  # names, in the order of the computation, which a dict out of jit has lost

    @jax.jit
    def numbers(state: TrainState, arrays, indices):
        key, x, y = drawn(state, arrays, indices)
        trainable = _trainable(state.params, state.state.learned, state.quant)
        loss, (_, _, moved) = loss_fn(trainable, state, x, y, key, ("intermediates",))
        layers[:], outputs = guards.in_order(moved.pop("intermediates", {}))
        grads, (_, _, moved) = jax.grad(loss_fn, has_aux=True)(trainable, state, x, y, key)
        return outputs, loss, grads, next_state(state, grads, moved, key).variables

    def explain(state, arrays, indices):
        outputs, loss, grads, new = numbers(state, arrays, indices)
        return {
            "the output": list(zip(layers, outputs, strict=True)),
            "the loss": loss,
            "the gradient": grads,
            "the next value": new,
        }

    return Steps(jax.jit(on_mesh, donate_argnums=0), jax.jit(many, donate_argnums=0), explain)


class Report(NamedTuple):
    """Where training stands, between chunks of steps."""

    state: TrainState
    steps: int  # done in this phase
    loss: float  # mean over the steps since the last report
    accuracy: float  # on the training batches, percent
    seconds: float  # since the phase began, or went on
    skipped: int = 0  # steps since the last report that were not finite


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
    log: checkpoints.Phase | None = None,
    seen: checkpoints.Seen | None = None,
) -> Iterator[Report]:
    """Trains for `total` steps and yields a report every `every` steps (None: once an epoch).

    The last report comes after the last step. The batches depend on seed and step alone.

    Args:
      task, steps, state: from `Task`, `make_steps` and `init_state`; the state is donated.
      total: steps of this phase, of `batch_size` examples each.
      seed: of the order of the examples.
      every: steps between reports.
      label: of the progress bar, which is quiet when not on a terminal.
      scan: steps in chunks inside `lax.scan` rather than one by one; None: except on the CPU,
        where convolutions inside a loop run 6 to 10 times slower.
      log: of the session's journal: where checkpoints go, with what was `seen`.

    Raises:
      ValueError: a batch larger than the training set or that does not divide over the mesh, or a
        count below 1.
      FloatingPointError: a loss or weight is not finite; says in which step and layer.
      MemoryError: a step does not fit into the device's memory.
      ConnectionError: another process is gone.
      KeyboardInterrupt: a signal came; what was trained is saved.
    """
    session = session_lib.current()
    count = len(task.dataset.train[0])
    if not 1 <= batch_size <= count:
        raise ValueError(f"batch_size must be in 1..{count}, the training set; got {batch_size}")
    for name, count_of in (("total", total), ("every", 1 if every is None else every)):
        if count_of < 1:
            raise ValueError(f"{name} must be at least 1, got {count_of}")
    meshes.check_batch(session.mesh, batch_size)
    scan = jax.default_backend() != "cpu" if scan is None else scan
    every = min(every or count // batch_size, total)
    feed = meshes.Feed(task.dataset.train, session.mesh)
    batches = _Batches(count, batch_size, seed)
    at = int(state.step)
    start, flying = time.monotonic(), collections.deque()

    def landed(keep: int):
        """Waits until at most `keep` dispatches fly; says what was not finite."""
        while len(flying) > keep:
            step, losses = flying.popleft()
            bad = np.flatnonzero(np.isnan(np.atleast_1d(losses)))
            if bad.size and session.on_nan == "stop":
                step += int(bad[0])
                going = meshes.place(jnp.zeros((), bool), state.totals["stopped"].sharding)
                good = state._replace(totals={**state.totals, "stopped": going})
                if log is not None:
                    log.save(good, seen, step)
                found = steps.explain(good, *feed.batch(batches.at(step)))
                raise FloatingPointError(guards.explain(label, step + 1, found))

    with Progress(label, total, at) as progress, _told(label, batch_size):
        while at < total:
            end = min(at - at % every + every, total)
            while at < end:
                size = CHUNK if scan and end - at >= CHUNK else 1
                if session.trace is not None:
                    session.trace.before(at)
                if size == 1:
                    state, losses = steps.one(state, *feed.batch(batches.at(at)))
                else:
                    chunk = np.stack([batches.at(at + i) for i in range(size)])
                    state, losses = steps.many(state, *feed.batch(chunk))
                flying.append((at, losses))
                at += size
                landed(LAG)
                progress.advance(size)
                if session.trace is not None:
                    session.trace.after(at, state)
                if at < end:
                    _keep(log, state, seen, at, landed, reported=False)
            landed(0)
            sums = {name: float(value) for name, value in state.totals.items()}
            done = max(sums["batches"], 1)
            progress.show(at, sums["loss"] / done, int(sums["skipped"]))
            state = state._replace(totals=_placed_totals(state))
            report = Report(
                state,
                at,
                sums["loss"] / done if sums["batches"] else float("nan"),
                sums["accuracy"] / done,
                time.monotonic() - start,
                int(sums["skipped"]),
            )
            if session.board is not None:
                session.board.add(label, report)
            yield report
            _keep(log, state, seen, at, landed, reported=True, complete=at == total)


def run(
    task: Task,
    steps: Steps,
    state: TrainState,
    total: int,
    *,
    batch_size: int,
    seed: int,
    every: int | None = None,
    label: str = "training",
    observe: Callable[[Report], None] | None = None,
    seen: checkpoints.Seen | None = None,
) -> TrainState:
    """Trains a phase to its end and returns the final state; goes on where it was interrupted.

    From a mesh it comes back whole, on one device.

    Args:
      task, steps, state, total, batch_size, seed, every, label: as in `train`.
      observe: called with every report; after a resumption only with those that it has not had.
      seen: what `observe` keeps; saved and given back beside the state.
    """
    seen = checkpoints.nothing() if seen is None else seen
    session = session_lib.current()
    with contextlib.ExitStack() as stack:
        log = None
        if session.journal is not None:
            log = stack.enter_context(session.journal.phase(label))
            stack.enter_context(interrupts.polling())
            state = log.restored(state, seen)
        reports = train(
            task,
            steps,
            state,
            total,
            batch_size=batch_size,
            seed=seed,
            every=every,
            label=label,
            log=log,
            seen=seen,
        )
        for report in reports:
            state = report.state
            if observe is not None:
                observe(report)
    seen.kept.update(meshes.gathered(seen.kept, session.mesh))
    return meshes.gathered(state, session.mesh)


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
    return run(task, steps, state, total, batch_size=batch_size, seed=seed, label=label)


class _Batches:
    """The examples of every step, by its number: each epoch in an order of its own."""

    def __init__(self, count: int, batch_size: int, seed: int):
        self._count, self._size, self._seed = count, batch_size, seed
        self._epoch, self._order = -1, None

    def at(self, step: int) -> np.ndarray:
        """Returns the indices [batch] of a step."""
        epoch, place = divmod(step, self._count // self._size)
        if epoch != self._epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
            self._epoch, self._order = epoch, order.astype(np.int32)
        return self._order[place * self._size : (place + 1) * self._size]


def _keep(log, state, seen, step, landed, *, reported, complete=False):
    """Saves where it is due, and leaves where a signal came.

    Several processes save together, so they ask each other, which takes time: now and then.
    """
    alone = jax.process_count() == 1
    if log is None or not (alone or reported or step % ASKED == 0):
        return
    wishes = np.array([interrupts.requested.is_set(), log.due()])
    if not alone:
        wishes = multihost_utils.process_allgather(wishes).any(axis=0)
    stop, due = wishes
    if complete or stop or due:
        landed(0)
        log.save(state, seen, step, complete=complete)
    if stop:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _told(label, batch_size):
    """What the runtime raises, as something that a user can act on."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        told = guards.out_of_memory(error, label, batch_size) or guards.lost_process(error, label)
        if told is None:
            raise
        raise told from error


def _no_totals() -> dict:
    sums = {name: jnp.zeros(()) for name in ("loss", "accuracy", "batches", "skipped")}
    return sums | {"stopped": jnp.zeros((), bool)}


def _placed_totals(state) -> dict:
    totals = _no_totals()
    return jax.tree.map(lambda new, old: meshes.place(new, old.sharding), totals, state.totals)


def _trainable(params, learned, quant):
    # The params alone where nothing else learns, so that the optimizer sees the params' own paths.
    return (params, learned, quant) if learned or quant else params


def _parts(trainable, state: TrainState):
    if state.state.learned or state.quant:
        return trainable
    return trainable, state.state.learned, state.quant
