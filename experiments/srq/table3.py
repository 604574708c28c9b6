"""SRQ, tables 3 and 5: learned bit-widths, and the same widths fixed from scratch.

LeNet-5 on MNIST and VGG-7 on CIFAR-10 as in table 1, with a weight decay of 0.02 for VGG; the
penalty acts in the first half of the epochs, and the widths are kept in the second (appendix F).
Widths of inputs stay what they are. Biases learn widths of their own, which the rows leave out: the
paper says nothing of them. Left out is ResNet-18, for which the appendix has ten epochs from a
trained network, nine of them under the penalty, and no learning rate.
"""

import functools

from experiments.srq import learned_grids

TITLE = "SRQ, tables 3 and 5: learned bit-widths and their fixed twins"
PENALTIES = (1e-3, 1e-2)  # of the paper's range, 5e-5 to 1e-2
PAPER = {  # data set, width: (uniform, ((fixed, learned) for the weaker and the stronger penalty))
    ("mnist", 4): (0.53, ((0.55, 0.52), (0.59, 0.58))),
    ("mnist", 3): (0.58, ((0.65, 0.55), (0.85, 0.60))),
    ("mnist", 2): (0.63, ((0.68, 0.59), (0.70, 0.64))),
    ("cifar10", 4): (6.77, ((6.74, 6.65), (6.87, 6.80))),
    ("cifar10", 3): (6.82, ((6.81, 6.77), (7.13, 7.04))),
    ("cifar10", 2): (7.49, ((7.43, 7.36), (9.62, 7.55))),
}


def run(context):
    """Yields the uniform network, and for every penalty the learned widths and their twin."""
    for dataset, make in (
        ("mnist", learned_grids.paper_lenet),
        ("cifar10", functools.partial(learned_grids.paper_vgg, weight_decay=0.02)),
    ):
        parts = make(context)
        for seed in context.seeds:
            for bits in context.widths((4, 3, 2)):
                uniform, others = PAPER[dataset, bits]

                def row(trained, name, paper, bits=bits, seed=seed, dataset=dataset):
                    told = {"paper": {"error": paper}}
                    return trained.row(f"{dataset}: {name}", bits, seed) | told

                yield row(parts.fixed(bits, None, seed), "uniform width", uniform)
                for penalty, (fixed, regularised) in zip(PENALTIES, others, strict=True):
                    learned = parts.learned(bits, penalty, seed)
                    yield row(learned, f"learned widths, penalty {penalty:g}", regularised)
                    twin = parts.fixed(bits, learned.widths, seed)
                    yield row(twin, f"fixed twin, penalty {penalty:g}", fixed)
