"""Table 2 of ALQ: LeNet-5 on MNIST by the paper's schedule (appendix C.1).

Six times 40 percent pruned, each followed by 10 epochs of bases and 20 of coordinates, and 30
epochs of post-training. The paper has 22.7 KB and 99.12 percent; of 8 bits the rounds leave 0.37.
`alq_mnist` is the short way.
"""

import quantjax as qj
from experiments.alq import protocol

TITLE = "ALQ, table 2: LeNet-5 20-50-500 on MNIST"
BITS = 8


def schedule(per_epoch: int) -> tuple[qj.Phase, ...]:
    """Returns algorithm 5 with appendix C.1's numbers."""
    return qj.alq_rounds(per_epoch, rounds=6, keep=0.6, post_epochs=30)


def run(context):
    """Yields full precision and ALQ."""
    for seed in context.seeds:
        parts = protocol.mnist(context, seed)._replace(float_epochs=100)
        start = parts.full_precision(seed)
        yield parts.float_row(start, seed)
        decay = protocol.COORDINATE_DECAY
        trained = parts.alq(start, schedule, BITS, seed, weight_decay=decay)
        yield parts.row("ALQ", trained, seed)
