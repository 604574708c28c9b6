"""Phases: a network trained in parts, each with its own method, and scored as it goes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from quantjax.core.quantizer import QuantState
from quantjax.lab.train import checkpoints, engine
from quantjax.lab.train.tasks import Task


class Phase(NamedTuple):
    """A part of the training."""

    name: str
    method: engine.Method
    total: int  # steps
    steps: engine.Steps | None = None  # compiled for a member of the method's family


class Point(NamedTuple):
    """A measurement on the way."""

    phase: str
    step: int  # over all phases
    loss: float  # mean training loss since the last point
    score: float


class Outcome(NamedTuple):
    """What a training gave: the last network, and the best one on the way."""

    variables: dict  # final
    state: QuantState  # of the last phase's quantizer
    early: dict  # variables of the best score, the first of equals
    history: tuple[Point, ...]
    opt_state: Any = None  # of the last phase's optimizer

    @property
    def final_score(self) -> float:
        """The score of the last network."""
        return self.history[-1].score

    @property
    def early_score(self) -> float:
        """The best score on the way; choose by it on validation data only."""
        return max(point.score for point in self.history)


def run(
    task: Task,
    phases: Sequence[Phase],
    variables: Mapping,
    score: Callable,
    *,
    batch_size: int,
    seed: int,
    every: int | None = None,
) -> Outcome:
    """Trains the phases one after the other; each begins with the weights of the one before.

    Args:
      task, variables, batch_size, seed, every: as in `engine.train`.
      phases: at least one step in all.
      score: score(variables) -> float, higher is better; called every `every` steps and at the
        end of a phase, on float weights.

    Raises:
      ValueError: no phases, or a phase without steps.
    """
    if not phases or any(phase.total < 1 for phase in phases):
        raise ValueError(f"every phase needs at least one step, got {[p.total for p in phases]}")
    # Every phase is watched from the best that the phases before it have given.
    history, early, best, before = [], dict(variables), -math.inf, 0
    for phase in phases:
        state = engine.init_state(task, variables, phase.method, seed)
        steps = phase.steps or engine.make_steps(task, phase.method)
        seen = checkpoints.Seen([], {"early": engine.copied(state.variables)})

        def observe(report, seen=seen, name=phase.name, before=before, best=best):
            now = report.state.variables
            point = Point(name, before + report.steps, report.loss, score(now))
            if point.score > max([past[-1] for past in seen.history], default=best):
                seen.kept["early"] = engine.copied(now)  # the next step takes these buffers
            seen.history.append(point)

        state = engine.run(
            task,
            steps,
            state,
            phase.total,
            batch_size=batch_size,
            seed=seed,
            every=every,
            label=phase.name,
            observe=observe,
            seen=seen,
        )
        points = [Point(*row) for row in seen.history]
        if max(point.score for point in points) > best:
            early, best = seen.kept["early"], max(point.score for point in points)
        history += points
        before += phase.total
        variables = state.variables
    return Outcome(variables, state.state, early, tuple(history), state.opt_state)
