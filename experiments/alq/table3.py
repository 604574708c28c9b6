"""Table 3 of ALQ: VGG on CIFAR-10 below one bit, and the ablation of section 5.3.

The paper has 92.0 percent at 0.66 bits (five rounds), 90.9 at 0.40 (six), and 90.7 at 0.66 where
the basis step is a straight-through one.
"""

import quantjax as qj
from experiments.alq import protocol

TITLE = "ALQ, table 3: VGG on CIFAR-10"
BITS = 6


def schedule(rounds: int):
    """Returns algorithm 5 with appendix C.2's numbers, for `Protocol.alq`."""
    return lambda per_epoch: qj.alq_rounds(per_epoch, rounds, keep=0.6)


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
            yield parts.row(name, parts.alq(start, way, BITS, seed), seed)
