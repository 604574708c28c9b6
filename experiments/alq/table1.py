"""Table 1 of ALQ: adaptive against uniform bit-width, VGG on CIFAR-10 and ResNet-18.

The paper has 92.0 percent at 0.66 bits beside 91.8 at 1 for VGG, and on ImageNet 68.9 beside 66.2
at 2 bits for ResNet-18, which is trained on CIFAR-100 here. Uniform networks train as long.
"""

import quantjax as qj
from experiments.alq import protocol

TITLE = "ALQ, table 1: adaptive and uniform bit-width"
# Network: (protocol, bits of the sketch, rounds, share that a round leaves, epochs, uniform width).
NETWORKS = {
    "VGG": (protocol.cifar10_vgg, 6, 5, 0.6, (10, 20), 1),
    "ResNet-18": (protocol.resnet18, 8, 9, 0.85, (5, 10), 2),
}


def run(context):
    """Yields full precision, ALQ and the uniform width for both networks."""
    for seed in context.seeds:
        for name, (make, bits, rounds, keep, epochs, width) in NETWORKS.items():
            parts = make(context, seed)
            start = parts.full_precision(seed)
            yield parts.float_row(start, seed) | {"network": name}

            def schedule(n, rounds=rounds, keep=keep, epochs=epochs):
                basis, coordinate = epochs
                return qj.alq_rounds(
                    n, rounds, keep, basis_epochs=basis, coordinate_epochs=coordinate
                )

            adaptive = parts.alq(start, schedule, bits, seed)
            yield parts.row("ALQ", adaptive, seed) | {"network": name}
            uniform = parts.alq(start, lambda n: protocol.uniform_width(schedule(n)), width, seed)
            yield parts.row("uniform", uniform, seed) | {"network": name}
