"""Phases: a network trained in parts, each with its own method, and scored as it goes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from quantjax.core.quantizer import QuantState
from quantjax.lab.train import engine


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
    task: engine.Task,
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
    history, early, before = [], None, 0
    for phase in phases:
        state = engine.init_state(task, variables, phase.method, seed)
        steps = phase.steps or engine.make_steps(task, phase.method)
        for report in engine.train(
            task,
            steps,
            state,
            phase.total,
            batch_size=batch_size,
            seed=seed,
            every=every,
            label=phase.name,
        ):
            now = report.state.variables
            point = Point(phase.name, before + report.steps, report.loss, score(now))
            if early is None or point.score > max(past.score for past in history):
                early = engine.copied(now)  # the next step takes these buffers
            history.append(point)
        before += phase.total
        variables = report.state.variables
    return Outcome(variables, report.state.state, early, tuple(history), report.state.opt_state)
