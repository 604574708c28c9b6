"""ALQ on MNIST: LeNet-5 (20-50-500) below half a bit per weight, on a CPU in a quarter of an hour.

Structures as in appendix C.1 (kernelwise, kernelwise, subchannelwise(2), channelwise); 50,000
training images, and 10,000 for the choice of the epoch. The schedule is shorter than the 180
epochs of the paper (`alq_table2`): from four bits in five rounds, the last one long.
"""

import quantjax as qj
from quantjax.lab import alq_protocol as alq

TITLE = "ALQ on MNIST: LeNet-5 20-50-500, reduced schedule"
BITS = 4
KEEP = 0.643  # five times: to a ninth of the coordinates


def schedule(per_epoch: int) -> tuple[qj.Phase, ...]:
    """Returns four short rounds and a long one, 18.5 epochs in all."""
    short = qj.alq_rounds(
        per_epoch,
        4,
        KEEP,
        prune_epochs=0.5,
        basis_epochs=1,
        coordinate_epochs=0.5,
        coordinate_rate=2e-4,
    )
    long = qj.alq_rounds(
        per_epoch, 1, KEEP, basis_epochs=6, coordinate_epochs=2, coordinate_rate=3e-4
    )
    return short + long


def run(context):
    """Yields full precision and ALQ, with storage, layers, smaller network and curves."""
    for seed in context.seeds:
        parts = alq.mnist(context, seed)
        start = parts.full_precision(seed)
        yield parts.float_row(start, seed)
        trained = parts.alq(start, schedule, BITS, seed)
        yield parts.row("ALQ", trained, seed)
