"""SRQ on MNIST: bit-widths learned from 3/3 on, beside the uniform net and fixed twins.

A short stand-in for tables 3 and 5: LeNet-5 (20-50-500), 8 epochs from a float net of 8, under the
penalty in the first four. Masks learn 60 times faster than weights: the paper has 50 such epochs.
Biases stay float, unlike in the paper.
"""

from experiments.srq import learned_grids

TITLE = "DropBits on MNIST: learned bit-widths, LeNet-5 20-50-500"
PENALTIES = (1e-2, 1e-3)  # of the paper's range, 5e-5 to 1e-2
BITS = 3
MASK_RATE = 60
ESTIMATOR = "expectation"


def run(context):
    """Yields the float net, the uniform one, and per penalty learned widths and their twin."""
    parts = learned_grids.make(
        context,
        "mnist",
        "lenet5",
        epochs=8,
        schedule=learned_grids.short(1e-3),
        mask_rate=MASK_RATE,
        biases=False,
        symmetric=True,
    )
    for seed in context.seeds:
        start = parts.float_net(seed)
        yield {"row": "full precision", "bits": 32, "seed": seed, "error": parts.error(start)}
        uniform = parts.fixed(BITS, None, seed, start, ESTIMATOR)
        yield uniform.row("uniform width", BITS, seed)
        for penalty in PENALTIES:
            learned = parts.learned(BITS, penalty, seed, start, ESTIMATOR)
            name = f"learned widths, penalty {penalty:g}"
            yield learned.row(name, BITS, seed)
            twin = parts.fixed(BITS, learned.widths, seed, start, ESTIMATOR)
            yield twin.row(f"{name}: fixed twin", BITS, seed)
