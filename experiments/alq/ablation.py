"""ALQ's parts on MNIST, on a CPU: LeNet-5 at one bit, adaptive or uniform, ALQ or straight-through.

As table 1 (adaptive against uniform width at equal average bits), figure 1 (ALQ's step against the
straight-through ones at uniform width; see the curves) and section 5.3 (a straight-through step
together with pruning). All rows train as many epochs, without the paper's L2 norm on coordinates.
"""

import quantjax as qj
from experiments.alq import protocol

TITLE = "ALQ's parts on MNIST: LeNet-5 at one bit on average"
BITS = 3  # of the adaptive networks' sketch
KEEP = 0.55  # twice: to one bit


def adaptive(per_epoch: int) -> tuple[qj.Phase, ...]:
    """Returns two rounds, three and a half epochs in all."""
    return qj.alq_rounds(
        per_epoch,
        2,
        KEEP,
        prune_epochs=0.5,
        basis_epochs=0.75,
        coordinate_epochs=0.5,
        coordinate_rate=2e-4,
    )


def constant(kind: str):
    """Returns the schedule of figure 1: one kind of step, rate 1e-3, as long as `adaptive`."""

    def schedule(per_epoch: int) -> tuple[qj.Phase, ...]:
        return (qj.Phase(kind, sum(p.steps for p in adaptive(per_epoch)), 1e-3),)

    return schedule


ROWS = {
    "adaptive": (adaptive, BITS),
    "adaptive, straight-through": (lambda n: protocol.straight_through(adaptive(n)), BITS),
    "uniform": (lambda n: protocol.uniform_width(adaptive(n)), 1),
    "uniform, bases alone": (constant("basis"), 1),
    "uniform, straight-through": (constant("ste-reconstruction"), 1),
    "uniform, straight-through, loss-aware": (constant("ste-loss-aware"), 1),
}


def run(context):
    """Yields full precision and a row per way of training."""
    for seed in context.seeds:
        parts = protocol.mnist(context, seed)._replace(float_epochs=4)
        start = parts.full_precision(seed)
        yield parts.float_row(start, seed)
        for name, (schedule, bits) in ROWS.items():
            yield parts.row(name, parts.alq(start, schedule, bits, seed), seed)
