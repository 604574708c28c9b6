"""SRQ on MNIST: bit-widths learned from 3/3 on, beside the uniform net and fixed twins.

A short stand-in for tables 3 and 5: LeNet-5 (20-50-500), 4 epochs from a float net, the penalty in
the first two. Masks learn 20 times faster than weights, for the paper's 50 epochs of a penalty.
"""

from quantjax.lab import grids

TITLE = "DropBits on MNIST: learned bit-widths, LeNet-5 20-50-500"
PENALTIES = (1e-3, 3e-4)  # of the paper's range, 5e-5 to 1e-2
BITS = 3
MASK_RATE = 20


def run(context):
    """Yields the float net, the uniform one, and per penalty learned widths and their twin."""
    parts = grids.make(
        context,
        "mnist",
        "lenet5",
        epochs=4,
        schedule=grids.short(1e-3),
        symmetric=True,
        mask_rate=MASK_RATE,
    )
    for seed in context.seeds:
        start = parts.float_net(seed)
        yield {"row": "full precision", "bits": 32, "seed": seed, "error": parts.error(start)}
        uniform = parts.fixed(BITS, None, seed, start)
        yield uniform.row("uniform width", BITS, seed)
        for penalty in PENALTIES:
            learned = parts.learned(BITS, penalty, seed, start)
            name = f"learned widths, penalty {penalty:g}"
            yield learned.row(name, BITS, seed)
            twin = parts.fixed(BITS, learned.widths, seed, start)
            yield twin.row(f"{name}: fixed twin", BITS, seed)
