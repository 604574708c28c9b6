"""ALQ's schedules: phases of one kind of step each, and algorithm 5 as a tuple of them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core import checks
from quantjax.methods import amsgrad
from quantjax.methods.alq.steps import PRUNE_RATE

STRAIGHT_THROUGH = ("ste-reconstruction", "ste-loss-aware")
KINDS = ("basis", "coordinate", "prune", *STRAIGHT_THROUGH)
PRESELECT = 10  # the preselected share over that which a step removes


class Phase(NamedTuple):
    """Some steps of one kind."""

    kind: str
    """basis, coordinate, prune; ste-reconstruction, ste-loss-aware: the baselines of 5.2."""
    steps: int
    learning_rate: float
    keep: float = 1.0
    """The share of the coordinates that a prune phase leaves, in (0, 1]."""


def alq_rounds(
    steps_per_epoch: int,
    rounds: int = 6,
    keep: float = 0.6,
    *,
    start_epochs: float = 0,
    prune_epochs: float = 1,
    basis_epochs: float = 10,
    coordinate_epochs: float = 20,
    post_epochs: float = 0,
    finish_epochs: int = 0,
    basis_rate: float = 1e-3,
    coordinate_rate: float = 1e-4,
) -> tuple[Phase, ...]:
    """Returns algorithm 5: rounds times [prune, bases, coordinates], with appendix C's settings.

    Rates fall to a tenth after half of a phase's epochs.

    Args:
      steps_per_epoch: optimizer steps in an epoch.
      rounds: R, at least 1; LeNet-5 6, VGG 5 or 6, ResNet-18 5 or 9.
      keep: the share that a round leaves, eq. 28; 0.85 on ImageNet.
      start_epochs: of bases before the first round, to recover from the sketch.
      prune_epochs, basis_epochs, coordinate_epochs: of every round; 5 and 10 on ImageNet.
      post_epochs: of further training after the last round, a third of it bases, at rates that
        begin at a tenth (appendix C.1: 30 if the loss has not converged).
      finish_epochs: of loss-aware straight-through steps at the end, 1e-4 times 0.95 per epoch
        (appendix C.3: 50).
      basis_rate, coordinate_rate: of AMSGrad. A basis turns where a step passes the middle of two
        sums, so that with few bits left a larger basis_rate trains faster: 5e-3 on LeNet-5.

    Raises:
      ValueError: counts that are negative, or numbers out of range.
    """
    for name, value in (("rounds", rounds), ("steps_per_epoch", steps_per_epoch)):
        _check_count(name, value)
    _check_count("finish_epochs", finish_epochs, least=0)
    amsgrad.check_not_negative("prune_epochs", prune_epochs)

    def halves(kind, epochs, rate):
        amsgrad.check_not_negative("epochs", epochs)
        total = round(epochs * steps_per_epoch)
        parts = ((total + 1) // 2, rate), (total // 2, rate / 10)
        return [Phase(kind, count, rate) for count, rate in parts if count]

    phases = halves("basis", start_epochs, basis_rate)
    for _ in range(rounds):
        count = max(1, round(prune_epochs * steps_per_epoch))
        phases.append(Phase("prune", count, PRUNE_RATE, keep))
        phases += halves("basis", basis_epochs, basis_rate)
        phases += halves("coordinate", coordinate_epochs, coordinate_rate)
    phases += halves("basis", post_epochs / 3, basis_rate / 10)
    phases += halves("coordinate", post_epochs * 2 / 3, coordinate_rate / 10)
    for epoch in range(finish_epochs):
        phases.append(Phase("ste-loss-aware", steps_per_epoch, 1e-4 * 0.95**epoch))
    check_schedule(phases)
    return tuple(phases)


def check_schedule(schedule: Sequence[Phase]):
    """Raises ValueError for no phases, kinds that are unknown or numbers out of range."""
    if not isinstance(schedule, Sequence) or not schedule:
        raise ValueError(f"a schedule is phases, as alq_rounds gives them; got {schedule!r}")
    for phase in schedule:
        if not isinstance(phase, Phase):
            raise ValueError(f"a schedule is a sequence of Phase, got {phase!r} in it")
        if phase.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {phase.kind!r}")
        _check_count("steps", phase.steps)
        amsgrad.check_not_negative("learning_rate", phase.learning_rate)
        checks.number("keep", phase.keep, "in (0, 1]", lambda keep: (keep > 0) & (keep <= 1))


def check_left(schedule: Sequence[Phase], masks: Sequence):
    """Raises ValueError if the schedule would prune all coordinates; traced masks pass."""
    if any(isinstance(mask, jax.core.Tracer) for mask in masks):
        return
    start = left = sum(int(np.count_nonzero(mask)) for mask in masks)
    for phase in schedule:
        if phase.kind == "prune":
            left = int(remaining(left, np.float32(phase.keep), 1, 1))
    if left < 1:
        raise ValueError(f"the schedule would leave {left} of {start} coordinates")


def remaining(before, keep, step, steps):
    """Returns how many of M0 coordinates are left after step t of the T of a prune phase.

    M0 - round((M0 - M_T) t / T) with M_T = round(M0 keep); all may be traced.
    """
    gone = (before - jnp.round(before * keep)) * step / steps
    return before - jnp.round(gone).astype(jnp.int32)


def _check_count(name, value, least=1):
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be a whole number from {least}, got {value!r}")
