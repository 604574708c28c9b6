"""ALQ on MNIST: LeNet-5 (20-50-500) below half a bit per weight, on a CPU in some minutes.

Structures as in appendix C.1 (kernelwise, kernelwise, subchannelwise(2), channelwise); 55,000
training images, and 5,000 for the choice of the epoch. The schedule is far shorter than the 180
epochs of the paper (`alq_table2`): from two bits in three rounds, and with bases at five times the
paper's rate. A basis turns where the step passes half the way to the next sum: with few bits left,
few of them do at 1e-3. Coordinates have no L2 norm here, unlike in the paper (section 3.3).
"""

import quantjax as qj
from experiments.alq import protocol

TITLE = "ALQ on MNIST: LeNet-5 20-50-500, reduced schedule"
BITS = 2
# The share that a round leaves, epochs of its bases and of its coordinates.
ROUNDS = ((0.5, 0.5, 0.5), (0.52, 0.75, 0.5), (0.87, 2.25, 0.5))
BASIS_RATE = 5e-3


def schedule(per_epoch: int, rounds=ROUNDS, rate=BASIS_RATE) -> tuple[qj.Phase, ...]:
    """Returns the phases, 5.75 epochs in all; the last round is the longest."""
    phases = ()
    for keep, bases, coordinates in rounds:
        phases += qj.alq_rounds(
            per_epoch,
            1,
            keep,
            prune_epochs=0.25,
            basis_epochs=bases,
            coordinate_epochs=coordinates,
            basis_rate=rate,
        )
    return phases


def run(context):
    """Yields full precision and ALQ, with storage, layers, smaller network and curves."""
    for seed in context.seeds:
        parts = protocol.mnist(context, seed, validation=5_000)
        start = parts.full_precision(seed)
        yield parts.float_row(start, seed)
        trained = parts.alq(start, schedule, BITS, seed, rest_rate=3e-4)
        yield parts.row("ALQ", trained, seed)
