"""SRQ on MNIST: LeNet-5 (20-50-500), weights and layer inputs of all layers, on the CPU.

A short stand-in for tables 1, 3 and 6: 4 epochs of AdamW where the paper trains a wider LeNet-5
for 100. Beside DropBits at every width it learns widths from 3/3 on, each with its twin of fixed
widths (`srq_mnist_widths` learns narrower ones); compares the two estimators from scratch and from
a float net; and trains RQ on 6,400 images, since it forms all categories. Unlike in the paper,
biases stay float, and the masks learn ten times faster than the weights: so few steps would hardly
move them.
"""

import itertools

import quantjax as qj
from experiments.srq import learned_grids
from quantjax.lab.plans import MASK_RATE

TITLE = "SRQ and DropBits on MNIST: LeNet-5 20-50-500, weights and activations"
PENALTIES = (1e-2, 1e-3)
SUBSET = 6400


def run(context):
    """Yields the test error of every run, per seed."""
    parts = learned_grids.make(
        context,
        "mnist",
        "lenet5",
        epochs=4,
        schedule=learned_grids.short(1e-3),
        mask_rate=MASK_RATE,
        biases=False,
        symmetric=True,
    )
    bits = context.widths((3, 2, 4))
    for seed in context.seeds:
        for width in bits:
            yield srq(parts, width, "expectation", True, seed)
        if 3 in bits:
            yield from at_three_bits(parts, seed)


def at_three_bits(parts, seed):
    """Yields learned widths, both estimators and starts, and RQ on a subset."""
    for penalty in PENALTIES:
        learned = parts.learned(3, penalty, seed, estimator="expectation")
        name = f"learned widths, penalty {penalty:g}"
        yield learned.row(name, 3, seed)
        twin = parts.fixed(3, learned.widths, seed, estimator="expectation")
        yield twin.row(f"{name}: fixed twin", 3, seed)
    few = parts.smaller(SUBSET)
    for name, quantizer, inputs in (
        ("RQ", qj.rq(3), qj.rq_input(3)),
        ("SRQ, expectation", *learned_grids.plain(3, "expectation")),
    ):
        yield few.train(name, quantizer, inputs, seed).row(f"{name}, {SUBSET} images", 3, seed)
    start = parts.float_net(seed)
    yield {"row": "full precision", "bits": 32, "seed": seed, "error": parts.error(start)}
    for estimator, dropbits, first in itertools.product(
        ("mode", "expectation"), (False, True), (None, start)
    ):
        if (estimator, dropbits, first) != ("expectation", True, None):  # done above
            yield srq(parts, 3, estimator, dropbits, seed, first)


def srq(parts, bits, estimator, dropbits, seed, start=None):
    """Trains one network and returns its row."""
    quantizer, inputs = learned_grids.plain(bits, estimator, dropbits)
    kind = "SRQ + DropBits" if dropbits else "SRQ"
    trained = parts.train(f"{kind}, {estimator}, {bits}", quantizer, inputs, seed, start)
    origin = "" if start is None else ", from a float net"
    return trained.row(f"{kind}, {estimator}{origin}", bits, seed)
