"""Focused Quantization on CIFAR-10: ResNet-20 and VGG-7 pruned to 20 percent, then at 5 bits.

Plain training for 164 epochs, 60 of dynamic network surgery, then quantized for 15: fitted anew
after 1, 2 and 4 more epochs, with 8 to end on (algorithm 1 with k doubling). The paper's own
augmentation (aspect, hue, contrast) is replaced by crops and flips.
"""

from experiments.fq import sparse_networks
from experiments.psg import protocol

TITLE = "FQ on CIFAR-10: ResNet-20 and VGG-7, pruned by surgery, weights only"
WIDTHS = (5, 4, 3)
DENSITIES = {"resnet20": 0.2, "vgg7": 0.1}
RATES = {0: 0.1, 82: 0.01, 123: 0.001}


def run(context):
    """Yields, per network and seed, the pruned one and FQ at every width."""
    widths = context.widths(WIDTHS)
    for model, density in DENSITIES.items():
        parts = protocol.make(context, "cifar10", model, rates=RATES, switch=82, end=164)
        for seed in context.seeds:
            dense = parts.late("sgd", protocol.sgd, parts.plain(seed), seed)
            full = parts.accuracy(dense)
            pruned = sparse_networks.prune(parts, dense, density, epochs=60, rate=0.02, seed=seed)
            named = {"model": model, "seed": seed, "full precision": full}
            yield {
                "row": "pruned",
                **named,
                "sparse": parts.accuracy(pruned.variables),
                "density": round(pruned.density, 4),
            }
            for bits in widths:
                result = sparse_networks.focus(
                    parts, pruned, bits, epochs=15, rate=0.005, seed=seed
                )
                yield {"row": "FQ", "bits": bits, **named} | sparse_networks.measured(parts, result)
