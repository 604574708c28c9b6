"""Training: phases of steps, whatever a method quantizes and however it descends.

What belongs to it stands beside it and is found here, too: states, and compiled steps.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from quantjax.lab import interrupts
from quantjax.lab.train import checkpoints, guards, meshes, states
from quantjax.lab.train import session as session_lib
from quantjax.lab.train.progress import Progress
from quantjax.lab.train.states import Method, TrainState, copied, init_state, model_apply
from quantjax.lab.train.steps import Steps, make_steps, shared_steps
from quantjax.lab.train.tasks import Task

__all__ = [
    "Method",
    "Report",
    "Steps",
    "TrainState",
    "copied",
    "fit",
    "init_state",
    "make_steps",
    "model_apply",
    "run",
    "shared_steps",
    "train",
]

CHUNK = 64  # steps in one `lax.scan`
ASKED = 32  # steps after which processes ask each other whether to save
LAG = 2  # dispatches that the device may be behind


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
                going = states.beside(jnp.zeros((), bool), state.totals["stopped"])
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
            state = states.without_totals(state)
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
