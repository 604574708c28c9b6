"""Focused Quantization on MNIST: LeNet-5 (20-50-500) pruned below 10 percent, then at 5 bits.

Six epochs of plain training, six of dynamic network surgery, seven quantized: the mixtures are
fitted anew after one epoch and after two more, then four are trained (algorithm 1, k = 1, 2, 4).
"""

from experiments.fq import sparse_networks
from experiments.psg import protocol

TITLE = "FQ on MNIST: LeNet-5 20-50-500, pruned by surgery, weights only"
WIDTHS = (5, 4, 3)
DENSITY = 0.092  # what masks with a memory keep is a little more


def run(context):
    """Yields, per seed, the dense network, the pruned one, and FQ at every width."""
    parts = protocol.mnist(context)
    widths = context.widths(WIDTHS)
    for seed in context.seeds:
        dense = parts.late("sgd", protocol.sgd, parts.plain(seed), seed)
        full = parts.accuracy(dense)
        pruned = sparse_networks.prune(parts, dense, DENSITY, epochs=6, rate=0.02, seed=seed)
        yield {
            "row": "pruned",
            "seed": seed,
            "full precision": full,
            "sparse": parts.accuracy(pruned.variables),
            "density": round(pruned.density, 4),
        }
        for bits in widths:
            result = sparse_networks.focus(parts, pruned, bits, epochs=7, rate=0.01, seed=seed)
            row = {"row": "FQ", "bits": bits, "seed": seed, "full precision": full}
            yield row | sparse_networks.measured(parts, result)
