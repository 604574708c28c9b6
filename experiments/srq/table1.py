"""SRQ, tables 1 and 6: RQ, RQ annealed, its straight-through twin, SRQ, SRQ with DropBits.

LeNet-5 (32-64-512) on MNIST for 100 epochs and VGG-7 on CIFAR-10 for 300, by appendix F: weights,
biases and inputs of all layers (appendix G), the images among them. The paper's numbers stand
beside eq. 3 as written ("mode"); the rows of the expectation's gradient differ from it.

The appendix leaves open: the first biases, which begin as torch has them (`Grids.first`); the batch
size, 128 here; and the optimizer of these tables, AdamW with the decay of 0.01 that it has
elsewhere. The annealing of RQ goes by steps, and is not shortened with the epochs.
"""

import quantjax as qj
from experiments.srq import learned_grids
from quantjax.methods.srq.relaxed import annealed

TITLE = "SRQ, tables 1 and 6: LeNet-5 on MNIST and VGG-7 on CIFAR-10, weights and activations"
PAPER = {  # data set, width: RQ, annealed, Gumbel-Softmax and multi-class STE, SRQ, with DropBits
    ("mnist", 4): (0.58, 0.62, 0.57, 0.59, 0.53),
    ("mnist", 3): (0.69, 0.74, 0.65, 0.67, 0.58),
    ("mnist", 2): (0.76, None, 0.74, 0.72, 0.63),
    ("cifar10", 4): (8.43, 8.47, 8.25, 7.15, 6.85),
    ("cifar10", 3): (9.56, 10.78, 8.44, 7.08, 6.94),
    ("cifar10", 2): (11.75, None, 10.41, 7.68, 7.51),
}


def run(context):
    """Yields the test error of every method, per data set, seed and width."""
    for dataset, make in (
        ("mnist", learned_grids.paper_lenet),
        ("cifar10", learned_grids.paper_vgg),
    ):
        parts = make(context)
        for seed in context.seeds:
            for bits in context.widths((4, 3, 2)):
                for name, quantizer, inputs, paper in kinds(bits, PAPER[dataset, bits]):
                    trained = parts.train(f"{name}, {bits}", quantizer, inputs, seed)
                    row = trained.row(f"{dataset}: {name}", bits, seed)
                    yield row if paper is None else row | {"paper": {"error": paper}}


def kinds(bits, paper):
    """Yields name, quantizers of weights and inputs, and the paper's error, if it has one."""
    relaxed, cooled, straight, semi, dropped = paper
    yield "RQ", qj.rq(bits, biases=True), qj.rq_input(bits), relaxed
    if cooled is not None:
        tau = annealed(bits - 2.0)  # 1 at 3 bits, 2 at 4
        yield (
            "RQ, annealed",
            qj.rq(bits, temperature=tau, biases=True),
            qj.rq_input(bits, temperature=tau),
            cooled,
        )
    yield (
        "Gumbel-Softmax, STE",
        qj.rq(bits, straight_through=True, biases=True),
        qj.rq_input(bits, straight_through=True),
        straight,
    )
    for estimator, theirs in (("mode", (semi, dropped)), ("expectation", (None, None))):
        for dropbits, error in zip((False, True), theirs, strict=True):
            name = "SRQ + DropBits" if dropbits else "SRQ"
            grids = learned_grids.plain(bits, estimator, dropbits, biases=True)
            yield f"{name}, {estimator}", *grids, error
