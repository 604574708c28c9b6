"""PSG, table A1: ResNet-32 on CIFAR-100, weights at 8, 6, 4, 3 and 2 bits.

82 epochs of SGD (or `--init` with the public checkpoint of that epoch), then PSG to epoch 150.
The paper gives lambda_s = 150 at 4 bits; for 3 and 2 bits it is searched by appendix G, with the
first seed. At these widths the first and last layer keep 8 bits; at 2 bits there is no weight
decay.
"""

import functools

from experiments.psg import protocol, strength_search

TITLE = "PSG, table A1: ResNet-32, CIFAR-100, weights only"
PAPER = {  # bits: (full precision, low precision, MSE), and SGD's MSE
    8: (70.14, 70.05, 0.03, 0.03),
    6: (70.59, 70.33, 0.41, 0.58),
    4: (70.08, 69.57, 0.5, 11.0),
    3: (68.96, 68.56, 0.84, 48.0),
    2: (67.16, 60.76, 67.0, 157.0),
}
STRENGTH = 150.0
CANDIDATES = {3: (100.0, 200.0, 400.0), 2: (50.0, 100.0, 200.0, 400.0)}


def run(context):
    """Yields plain SGD's rounding and PSG's two networks at every width, for every seed."""
    parts = protocol.make(
        context,
        "cifar100",
        "resnet32",
        rates={0: 0.1, 82: 0.01, 123: 0.001},
        switch=82,
        end=150,
    )
    widths = context.widths(tuple(PAPER))
    strengths = dict.fromkeys(widths, STRENGTH)
    searched = [bits for bits in widths if bits in CANDIDATES]
    if searched:
        search = strength_search.begin(parts, context.seeds[0])
        for bits in searched:
            late = functools.partial(psg, bits=bits, seed=context.seeds[0])
            found = search.choose(CANDIDATES[bits], late, target(bits))
            strengths[bits] = found.strength
            yield found.row | {"bits": bits}
    for seed in context.seeds:
        start = parts.plain(seed)
        if seed == context.seeds[0]:
            yield {"row": "at the switch", "full precision": parts.accuracy(start)}
        plain = parts.late("sgd", protocol.sgd, start, seed)
        for bits in widths:
            scores = parts.scores(plain, target(bits))
            yield {"row": "SGD, rounded", "bits": bits, "seed": seed, **scores} | {
                "paper": {"MSE": PAPER[bits][3]}
            }
        for bits in widths:
            trained = psg(parts, start, strengths[bits], bits, seed)
            yield {
                "row": "PSG",
                "bits": bits,
                "seed": seed,
                "strength": strengths[bits],
                **parts.scores(trained, target(bits)),
                "paper": dict(
                    zip(("full precision", "low precision", "MSE"), PAPER[bits][:3], strict=True)
                ),
            }


def target(bits, momentum=None):
    """Returns the grid: running range in training, the final weights' range at deployment."""
    return protocol.grid(bits, momentum=momentum, ends=8 if bits in (2, 3) else None)


def psg(parts, start, strength, bits, seed):
    """Returns the variables after the epochs of PSG."""
    decay = 0.0 if bits == 2 else 1e-4
    chain = protocol.psg(target(bits, momentum=0.1), strength, weight_decay=decay)
    return parts.late("psg, ends at 8" if bits in (2, 3) else "psg", chain, start, seed)
