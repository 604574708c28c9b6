"""SRQ on MNIST: LeNet-5 (20-50-500), weights and layer inputs of all layers, on the CPU.

A short stand-in for tables 1, 3 and 6: 4 epochs of AdamW where the paper trains a wider LeNet-5
for 100. It compares the two estimators, with DropBits and without, from scratch and from a float
net; learns widths from 3/3 on; and trains RQ on 6,400 images, since it forms all categories.
"""

import itertools

import quantjax as qj
from quantjax.lab import grids

TITLE = "SRQ and DropBits on MNIST: LeNet-5 20-50-500, weights and activations"
PENALTIES = (1e-3, 1e-2)
SUBSET = 6400


def run(context):
    """Yields the test error of every run, per seed."""
    parts = grids.make(context, "mnist", "lenet5", epochs=4, rate=1e-3, symmetric=True)
    bits = context.widths((4, 3, 2))
    for seed in context.seeds:
        for width in bits:
            yield srq(parts, width, "expectation", True, seed)
        if 3 in bits:
            yield from at_three_bits(parts, seed)


def at_three_bits(parts, seed):
    """Yields both estimators and starts, learned widths, and RQ on a subset."""
    start = parts.float_net(seed)
    yield {"row": "full precision", "W/A": "32/32", "seed": seed, "error": parts.error(start)}
    for estimator, dropbits, first in itertools.product(
        ("mode", "expectation"), (False, True), (None, start)
    ):
        if (estimator, dropbits, first) != ("expectation", True, None):  # done above
            yield srq(parts, 3, estimator, dropbits, seed, first)
    for penalty in PENALTIES:
        quantizer = qj.srq(
            3,
            learn_bits=True,
            freeze_after=parts.steps // 2,
            penalty=penalty,
            estimator="expectation",
        )
        inputs = qj.srq_input(3, estimator="expectation")
        trained = parts.train(f"learned, {penalty}", quantizer, inputs, seed)
        yield row("learned widths", 3, seed, trained) | {"penalty": penalty}
    few = parts.smaller(SUBSET)
    for name, quantizer, inputs in (
        ("RQ", qj.rq(3), qj.rq_input(3)),
        ("SRQ, expectation", *expected(3)),
    ):
        trained = few.train(name, quantizer, inputs, seed)
        yield row(name, 3, seed, trained) | {"images": SUBSET}


def expected(bits):
    """Returns plain SRQ with the expectation's gradient for weights and inputs."""
    return qj.srq(bits, estimator="expectation"), qj.srq_input(bits, estimator="expectation")


def srq(parts, bits, estimator, dropbits, seed, start=None):
    """Trains one network and returns its row."""
    quantizer = qj.srq(bits, dropbits=dropbits, estimator=estimator)
    inputs = qj.srq_input(bits, estimator=estimator)
    name = f"{estimator}, {'DropBits' if dropbits else 'SRQ'}, {bits if dropbits else 'any'}"
    trained = parts.train(name, quantizer, inputs, seed, start)
    title = "SRQ + DropBits" if dropbits else "SRQ"
    first = {"from": "scratch" if start is None else "float net"}
    return row(title, bits, seed, trained) | {"estimator": estimator} | first


def row(name, bits, seed, trained):
    """Returns one row of the record."""
    return {
        "row": name,
        "W/A": f"{bits}/{bits}",
        "seed": seed,
        "error": trained.error,
        "widths": trained.widths,
    }
