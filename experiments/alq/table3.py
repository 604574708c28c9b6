"""Table 3 of ALQ: VGG on CIFAR-10 below one bit, and the ablation of section 5.3.

The paper has 92.0 percent at 0.66 bits (five rounds), 90.9 at 0.40 (six), and 90.7 at 0.66 where
the basis step is a straight-through one. Its rounds of 40 percent leave 0.47 and 0.28 of the 6 bits
that it has for VGG, so that here a round leaves whatever leads to the width: 0.643 and 0.637. The
post-training of appendix C is left out.
"""

import quantjax as qj
from experiments.alq import protocol

TITLE = "ALQ, table 3: VGG on CIFAR-10"
BITS = 6
TARGETS = {5: 0.66, 6: 0.40}  # average bits by rounds


def schedule(rounds: int):
    """Returns algorithm 5 with appendix C.2's epochs, for `Protocol.alq`."""
    keep = protocol.keep(BITS, TARGETS[rounds], rounds)
    return lambda per_epoch: qj.alq_rounds(per_epoch, rounds, keep)


def run(context):
    """Yields full precision, ALQ after five and six rounds, and the ablation."""
    ways = {
        "ALQ, five rounds": schedule(5),
        "ALQ, six rounds": schedule(6),
        "straight-through, five rounds": lambda n: protocol.straight_through(schedule(5)(n)),
    }
    for seed in context.seeds:
        parts = protocol.cifar10_vgg(context, seed)
        start = parts.full_precision(seed)
        yield parts.float_row(start, seed)
        for name, way in ways.items():
            trained = parts.alq(start, way, BITS, seed, weight_decay=protocol.COORDINATE_DECAY)
            yield parts.row(name, trained, seed)
