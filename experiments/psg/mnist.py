"""PSG on MNIST: LeNet-5 (20-50-500) from scratch, weights at 4, 3 and 2 bits, beside plain SGD.

Six epochs. At 4 bits PSG begins at the first decay of the learning rate, as in the paper; at 3 and
2 bits it begins with the first step. There is no weight decay at 2 bits. The strengths are those
that `psg_mnist_search` found best on held-out training images.
"""

import quantjax as qj
from experiments.psg import protocol
from quantjax.lab.deploy import deploy

TITLE = "PSG on MNIST from scratch: LeNet-5 20-50-500, weights only"
STRENGTHS = {4: 400.0, 3: 80.0, 2: 20.0}


def run(context):
    """Yields, per seed, SGD's rounding and PSG at every width."""
    parts = protocol.mnist(context)
    widths = context.widths(tuple(STRENGTHS))
    for seed in context.seeds:
        start = parts.plain(seed)
        plain = parts.late("sgd", protocol.sgd, start, seed)
        for bits in widths:
            yield row("SGD, rounded", parts, plain, bits, seed)
        for bits in widths:
            trained = protocol.mnist_psg(parts, bits, STRENGTHS[bits], seed, start)
            yield row("PSG", parts, trained, bits, seed) | {"strength": STRENGTHS[bits]}


def row(name, parts, variables, bits, seed):
    """Returns one row of the record, with the squared weight error of every layer."""
    layers = deploy(variables, qj.uniform(bits)).layers
    return {
        "row": name,
        "bits": bits,
        "seed": seed,
        **parts.scores(variables, qj.uniform(bits)),
        "squared error": {layer.path: round(layer.squared_error, 4) for layer in layers},
    }
