"""Table 4 of ALQ: ResNet-18 at 2 and 1 bit (ResNet by shape: CIFAR-100 in place of ImageNet).

Nine rounds of 5 epochs of bases and 10 of coordinates, and the 50 straight-through epochs of
appendix C.3 at the end. The paper has 68.9 percent (70.0 with the finish) at 2.0 bits and 65.6
(67.8) at 1.0 on ImageNet, from five and nine rounds of 15 percent; of 8 bits these leave 3.55 and
1.85, so that here a round leaves whatever leads to the width: 0.857 and 0.794. The post-training of
appendix C is left out.
"""

import quantjax as qj
from experiments.alq import protocol

TITLE = "ALQ, table 4: ResNet-18"
BITS = 8
ROUNDS = 9
TARGETS = (2, 1)


def schedule(target: int, finish: int):
    """Returns algorithm 5 with appendix C.3's numbers, for `Protocol.alq`."""
    keep = protocol.keep(BITS, target, ROUNDS)

    def phases(per_epoch: int) -> tuple[qj.Phase, ...]:
        return qj.alq_rounds(
            per_epoch,
            ROUNDS,
            keep,
            basis_epochs=5,
            coordinate_epochs=10,
            finish_epochs=finish,
        )

    return phases


def run(context):
    """Yields full precision, and ALQ without and with the finish at both widths."""
    for seed in context.seeds:
        parts = protocol.resnet18(context, seed)
        start = parts.full_precision(seed)
        yield parts.float_row(start, seed)
        for target in context.widths(TARGETS):
            for name, epochs in (("ALQ", 0), ("ALQ and straight-through", 50)):
                way = schedule(target, epochs)
                decay = protocol.COORDINATE_DECAY
                trained = parts.alq(start, way, BITS, seed, weight_decay=decay)
                yield parts.row(name, trained, seed) | {"bits": target}
