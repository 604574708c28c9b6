"""PSG, table A1: ResNet-32 on CIFAR-100, weights at 8, 6, 4, 3 and 2 bits.

82 epochs of SGD (or `--init` with the public checkpoint of that epoch), then PSG to epoch 150.
The paper gives lambda_s = 150 at 4 bits; for 3 and 2 bits it is searched on held-out images. At
these widths the first and last layer keep 8 bits; at 2 bits there is no weight decay.
"""

from experiments.psg import protocol

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
    for seed in context.seeds:
        start = parts.plain(seed)
        if seed == context.seeds[0]:
            yield {"row": "at the switch", "full precision": parts.accuracy(start)}
            for bits in sorted(set(widths) & set(CANDIDATES)):
                found = parts.search(CANDIDATES[bits], late(start, bits), target(bits))
                strengths[bits] = max(found, key=found.get)
                yield {"row": "held-out accuracy", "bits": bits, "of": found}
        plain = parts.late("sgd", protocol.sgd, start, seed)
        for bits in widths:
            scores = parts.scores(plain, target(bits))
            yield {"row": "SGD, rounded", "bits": bits, "seed": seed, **scores} | {
                "paper": {"MSE": PAPER[bits][3]}
            }
        for bits in widths:
            trained = late(start, bits, seed)(parts, strengths[bits])
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


def late(start, bits, seed=0):
    """Returns (parts, strength) -> variables after the epochs of PSG."""

    def train(parts, strength):
        decay = 0.0 if bits == 2 else 1e-4
        chain = protocol.psg(target(bits, momentum=0.1), strength, weight_decay=decay)
        return parts.late("psg, ends at 8" if bits in (2, 3) else "psg", chain, start, seed)

    return train
