"""PSG on MNIST: LeNet-5 (20-50-500) from scratch, weights at 4, 3 and 2 bits, beside plain SGD.

Six epochs. At 4 bits PSG begins at the first decay of the learning rate, as in the paper; at 3 and
2 bits it begins with the first step. There is no weight decay at 2 bits. The strength of a width
is the one whose rounded network is best on 5,000 held-out training images (appendix G); then every
seed is trained on all training images.
"""

import quantjax as qj
from quantjax.lab import protocol
from quantjax.lab.deploy import deploy

TITLE = "PSG on MNIST from scratch: LeNet-5 20-50-500, weights only"
CANDIDATES = {4: (100.0, 400.0), 3: (50.0, 80.0), 2: (10.0, 20.0)}


def run(context):
    """Yields the searched strengths, then per seed SGD's rounding and PSG at every width."""
    parts = protocol.make(
        context,
        "mnist",
        "lenet5",
        rates={0: 0.03, 4: 0.01, 5: 0.002},
        switch=4,
        end=6,
        augment=False,
    )
    widths = context.widths(tuple(CANDIDATES))
    starts = {}  # SGD before the switch, trained once for all widths
    strengths = {}
    for bits in widths:
        found = parts.search(CANDIDATES[bits], late(bits, 0, starts), qj.uniform(bits))
        strengths[bits] = max(found, key=found.get)
        yield {"row": "held-out accuracy", "bits": bits, "of": found}
    for seed in context.seeds:
        starts = {seed: parts.plain(seed)}
        plain = parts.late("sgd", protocol.sgd, starts[seed], seed)
        for bits in widths:
            yield row("SGD, rounded", parts, plain, bits, seed)
        for bits in widths:
            trained = late(bits, seed, starts)(parts, strengths[bits])
            yield row("PSG", parts, trained, bits, seed) | {"strength": strengths[bits]}


def late(bits, seed, starts):
    """Returns (parts, strength) -> variables after PSG, from starts[seed] or the first weights."""

    def train(parts, strength):
        decay = 0.0 if bits == 2 else 1e-4
        chain = protocol.psg(qj.uniform(bits, momentum=0.1), strength, weight_decay=decay)
        if bits < 4:
            whole = parts._replace(switch=0)
            return whole.late("psg, all epochs", chain, parts.task.init(seed), seed)
        if seed not in starts:
            starts[seed] = parts.plain(seed)
        return parts.late("psg", chain, starts[seed], seed)

    return train


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
