"""PSG, table A8, CIFAR-10 part: ResNet-18 with lambda_s = 10 at 8, 6 and 4 bits.

90 epochs at 0.1 divided by 10 every 30, the last 15 with PSG at learning rate 0.001. The table
gives the strengths; the accuracies are beside plain SGD's rounding.
"""

from experiments.psg import protocol

TITLE = "PSG, table A8: ResNet-18, CIFAR-10, strength 10"
WIDTHS, STRENGTH = (8, 6, 4), 10.0


def run(context):
    """Yields plain SGD's rounding and PSG at every width, with inputs at the same width."""
    parts = protocol.make(
        context,
        "cifar10",
        "resnet18",
        rates={0: 0.1, 30: 0.01, 60: 0.001},
        switch=75,
        end=90,
    )
    for seed in context.seeds:
        start = parts.plain(seed)
        plain = parts.late("sgd", protocol.sgd, start, seed)
        for bits in context.widths(WIDTHS):
            yield row("SGD, rounded", parts, plain, bits, seed)
        for bits in context.widths(WIDTHS):
            chain = protocol.psg(protocol.grid(bits, momentum=0.1), STRENGTH)
            trained = parts.late("psg", chain, start, seed)
            yield row("PSG", parts, trained, bits, seed) | {"strength": STRENGTH}


def row(name, parts, variables, bits, seed):
    """Returns one row of the record."""
    return {
        "row": name,
        "bits": bits,
        "seed": seed,
        **parts.scores(variables, protocol.grid(bits)),
        **parts.with_activations(variables, protocol.grid(bits), bits),
    }
