"""The strengths of `psg_mnist`, by 5,000 held-out training images (appendix G).

All rows are scored on these; plain SGD's full precision is what a strength has to keep.
"""

import quantjax as qj
from experiments.psg import protocol, strength_search

TITLE = "PSG on MNIST: strengths on held-out training images"
CANDIDATES = {4: (100.0, 400.0), 3: (50.0, 80.0), 2: (10.0, 20.0)}
SEED = 0


def run(context):
    """Yields a row of plain SGD, then one per width and strength."""
    search = strength_search.begin(protocol.mnist(context), SEED)
    yield {"row": "SGD", "seed": SEED, "full precision": search.plain}
    for bits in context.widths(tuple(CANDIDATES)):

        def train(parts, start, strength, bits=bits):
            return protocol.mnist_psg(parts, bits, strength, SEED, start)

        found = search.choose(CANDIDATES[bits], train, qj.uniform(bits))
        for strength, scores in found.scores.items():
            yield {
                "row": f"strength {strength:g}",
                "bits": bits,
                "seed": SEED,
                "strength": strength,
                **scores,
            }
        yield found.row | {"bits": bits}
