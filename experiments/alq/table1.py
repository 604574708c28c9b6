"""Table 1 of ALQ: adaptive against uniform bit-width, VGG on CIFAR-10 and ResNet-18.

The paper has 92.0 percent at 0.66 bits beside 91.8 at 1 for VGG, and on ImageNet 68.9 beside 66.2
at 2 bits for ResNet-18, which is trained on CIFAR-100 here. Uniform networks train as long.

Five rounds of 40 percent leave 0.47 of the 6 bits that the paper has for VGG, nine rounds of 15
percent 1.85 of ResNet-18's 8, so that here a round leaves whatever leads to the width: 0.643 for
VGG, 0.857 for ResNet-18. The post-training of appendix C is left out.
"""

import functools

import quantjax as qj
from experiments.alq import protocol

TITLE = "ALQ, table 1: adaptive and uniform bit-width"
# Network: (protocol, bits of the sketch, rounds, average bits, epochs, uniform width).
NETWORKS = {
    "VGG": (protocol.cifar10_vgg, 6, 5, 0.66, (10, 20), 1),
    "ResNet-18": (protocol.resnet18, 8, 9, 2.0, (5, 10), 2),
}


def run(context):
    """Yields full precision, ALQ and the uniform width for both networks."""
    for seed in context.seeds:
        for name, (make, bits, rounds, target, epochs, width) in NETWORKS.items():
            parts = make(context, seed)
            start = parts.full_precision(seed)
            yield parts.float_row(start, seed) | {"network": name}
            adaptive = functools.partial(
                schedule, rounds=rounds, keep=protocol.keep(bits, target, rounds), epochs=epochs
            )
            for kind, way, first in (
                ("ALQ", adaptive, bits),
                ("uniform", lambda n, way=adaptive: protocol.uniform_width(way(n)), width),
            ):
                decay = protocol.COORDINATE_DECAY
                trained = parts.alq(start, way, first, seed, weight_decay=decay)
                yield parts.row(kind, trained, seed) | {"network": name}


def schedule(per_epoch: int, rounds: int, keep: float, epochs: tuple[int, int]):
    """Returns algorithm 5 with appendix C's numbers; epochs are of bases and of coordinates."""
    basis, coordinate = epochs
    return qj.alq_rounds(per_epoch, rounds, keep, basis_epochs=basis, coordinate_epochs=coordinate)
