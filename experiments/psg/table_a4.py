"""PSG, table A4, CIFAR-100 part: VGG-16 with batch norm at W4A4, W3A8 and W2A8.

SGD to epoch 82 at 0.1; the second decay is at epoch 145. The strengths are searched by appendix G,
with the first seed. First and last layer at 8 bits for 3 and 2 bits; no weight decay at 2 bits.
"""

import functools

from experiments.psg import protocol, strength_search

TITLE = "PSG, table A4: VGG16-bn, CIFAR-100, weights and inputs"
PAPER = {  # (weights, inputs): (SGD full, SGD low, PSG full, PSG low)
    (4, 4): (73.12, 63.08, 73.21, 70.92),
    (3, 8): (73.12, 3.44, 71.85, 68.28),
    (2, 8): (73.12, 1.00, 69.36, 53.25),
}
CANDIDATES = (50.0, 150.0, 450.0)


def run(context):
    """Yields SGD's rounding and PSG at the three pairs of widths."""
    parts = protocol.make(
        context,
        "cifar100",
        "vgg16-bn",
        rates={0: 0.1, 82: 0.01, 145: 0.001},
        switch=82,
        end=150,
    )
    widths = context.widths(tuple(weights for weights, _ in PAPER))
    pairs = {pair: paper for pair, paper in PAPER.items() if pair[0] in widths}
    search = strength_search.begin(parts, context.seeds[0])
    strengths = {}
    for bits, _ in pairs:
        late = functools.partial(psg, bits=bits, seed=context.seeds[0])
        found = search.choose(CANDIDATES, late, target(bits))
        strengths[bits] = found.strength
        yield found.row | {"bits": bits}
    for seed in context.seeds:
        start = parts.plain(seed)
        plain = parts.late("sgd", protocol.sgd, start, seed)
        for (bits, inputs), paper in pairs.items():
            yield row("SGD", parts, plain, bits, inputs, seed, paper[:2])
        for (bits, inputs), paper in pairs.items():
            trained = psg(parts, start, strengths[bits], bits, seed)
            yield row("PSG", parts, trained, bits, inputs, seed, paper[2:]) | {
                "strength": strengths[bits]
            }


def target(bits, momentum=None):
    """Returns the grid of a width."""
    return protocol.grid(bits, momentum=momentum, ends=8 if bits in (2, 3) else None)


def psg(parts, start, strength, bits, seed):
    """Returns the variables after the epochs of PSG."""
    decay = 0.0 if bits == 2 else 1e-4
    chain = protocol.psg(target(bits, momentum=0.1), strength, weight_decay=decay)
    return parts.late("psg" if bits == 4 else "psg, ends at 8", chain, start, seed)


def row(name, parts, variables, bits, inputs, seed, paper):
    """Returns one row of the record."""
    return {
        "row": name,
        "bits": bits,
        "seed": seed,
        **parts.scores(variables, target(bits)),
        **parts.with_activations(variables, target(bits), inputs),
        "paper": dict(zip(("full precision", "accuracy"), paper, strict=True)),
    }
