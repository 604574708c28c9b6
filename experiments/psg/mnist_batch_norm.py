"""Batch norms after rounding on MNIST: 2-bit weights with the float network's statistics, and anew.

A small network with batch norm after its convolutions, from scratch, six epochs, as in `psg_mnist`;
the strength is that of 2 bits there. "low precision" keeps the running statistics of the float
weights, "re-estimated" has those of 2,000 training images under the rounded ones.
"""

import quantjax as qj
from experiments.psg import protocol

TITLE = "Batch norms re-estimated after rounding: a small network on MNIST at 2 bits"
BITS, STRENGTH = 2, 20.0


def run(context):
    """Yields, per seed, SGD's rounding at both steps, and PSG."""
    parts = protocol.mnist(context, "small-cnn-bn")
    for seed in context.seeds:
        start = parts.plain(seed)
        plain = parts.late("sgd", protocol.sgd, start, seed)
        trained = protocol.mnist_psg(parts, BITS, STRENGTH, seed, start)
        for name, variables, quantizer in (
            ("SGD, rounded", plain, qj.uniform(BITS)),
            ("SGD, rounded at least error", plain, qj.uniform(BITS, fit="error")),
            ("PSG", trained, qj.uniform(BITS)),
        ):
            row = {"row": name, "bits": BITS, "seed": seed}
            yield row | parts.scores(variables, quantizer)
