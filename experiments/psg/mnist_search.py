"""The strengths of `psg_mnist`: rounded accuracy on 5,000 held-out training images (appendix G)."""

import quantjax as qj
from experiments.psg import protocol

TITLE = "PSG on MNIST: strengths on held-out training images"
CANDIDATES = {4: (100.0, 400.0), 3: (50.0, 80.0), 2: (10.0, 20.0)}


def run(context):
    """Yields a row per width and strength."""
    parts = protocol.mnist(context)
    starts = {}  # SGD before the switch, trained once for a width's candidates
    for bits in context.widths(tuple(CANDIDATES)):

        def train(smaller, strength, bits=bits):
            if bits == 4 and 0 not in starts:
                starts[0] = smaller.plain(seed=0)
            return protocol.mnist_psg(smaller, bits, strength, 0, starts.get(0))

        for strength, accuracy in parts.search(CANDIDATES[bits], train, qj.uniform(bits)).items():
            yield {
                "row": f"strength {strength:g}",
                "bits": bits,
                "seed": 0,
                "strength": strength,
                "low precision": accuracy,
            }
