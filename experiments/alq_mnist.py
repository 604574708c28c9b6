"""ALQ on MNIST: LeNet-5 (20-50-500) below half a bit per weight, on a CPU in under half an hour.

Structures as in appendix C.1 (kernelwise, kernelwise, subchannelwise(2), channelwise); 55,000
training images, and 5,000 for the choice of the epoch. The schedule is shorter than the 180
epochs of the paper (`alq_table2`): from four bits in five rounds, the last one long.
"""

import quantjax as qj
from quantjax.lab import alq_protocol

TITLE = "ALQ on MNIST: LeNet-5 20-50-500, reduced schedule"
BITS = 4
# Per round: the share of the coordinates that it leaves, epochs of bases and of coordinates.
ROUNDS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (0.65, 1, 0.5), (0.75, 2, 0.5))
LAST = 0.89


def schedule(per_epoch: int) -> tuple[qj.Phase, ...]:
    """Returns the phases, 18 epochs in all."""
    phases = ()
    for keep, basis_epochs, coordinate_epochs in ROUNDS:
        phases += qj.alq_rounds(
            per_epoch,
            1,
            keep,
            prune_epochs=0.5,
            basis_epochs=basis_epochs,
            coordinate_epochs=coordinate_epochs,
            coordinate_rate=2e-4,
        )
    return phases + qj.alq_rounds(
        per_epoch,
        1,
        LAST,
        basis_epochs=6,
        coordinate_epochs=3,
        basis_rate=2e-3,
        coordinate_rate=3e-4,
    )


def run(context):
    """Yields full precision and ALQ, with storage, layers, smaller network and curves."""
    for seed in context.seeds:
        parts = alq_protocol.mnist(context, seed, validation=5_000)
        start = parts.full_precision(seed)
        yield parts.float_row(start, seed)
        trained = parts.alq(start, schedule, BITS, seed, rest_rate=3e-4)
        yield parts.row("ALQ", trained, seed)
