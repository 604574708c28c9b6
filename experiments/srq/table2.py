"""SRQ, tables 2 and 4: ResNet-18 at 4/4 and 3/3 from a trained network (ResNet-18 by shape).

Appendix F's schedules and batch sizes on CIFAR-100 in place of ImageNet, after 90 epochs in full
precision; weights, the last layer's bias and layer inputs are quantized. The paper's errors stand
beside ours for their order alone (its RQ is another paper's). MobileNetV2 is left out.
"""

import optax

import quantjax as qj
from experiments.psg import protocol
from experiments.srq import learned_grids

TITLE = "SRQ, tables 2 and 4: ResNet-18 (CIFAR-100), weights and activations"
PAPER = {32: 30.24, 4: 30.37, 3: 32.79}  # top-1 error on ImageNet
RQ_PAPER = 38.48  # at 4 bits
# Width: epochs, batch size, learning rate and its drops {epoch: factor}.
SCHEDULES = {
    4: (150, 128, 5e-6, {125: 0.2}),
    3: (80, 256, 2e-5, {50: 0.5, 60: 0.5, 68: 0.5}),
}


def run(context):
    """Yields the float network, RQ at 4 bits, and SRQ with DropBits under both estimators."""
    for seed in context.seeds:
        rates = {0: 0.1, 30: 0.01, 60: 0.001}
        first = protocol.make(context, "cifar100", "resnet18", rates=rates, switch=90, end=90)
        start = first.plain(seed)
        error = round(100 - first.accuracy(start), 2)
        row = {"row": "full precision", "bits": 32, "seed": seed, "error": error}
        yield row | {"paper": {"error": PAPER[32]}}
        for bits in context.widths((4, 3)):
            epochs, batch_size, rate, drops = SCHEDULES[bits]

            def schedule(steps, per_epoch, rate=rate, drops=drops):
                del steps
                borders = {round(epoch * per_epoch): factor for epoch, factor in drops.items()}
                return optax.piecewise_constant_schedule(rate, borders)

            parts = learned_grids.make(
                context,
                "cifar100",
                "resnet18",
                epochs=epochs,
                schedule=schedule,
                batch_size=batch_size,
                augment=True,
            )
            if bits == 4:
                quantizer = qj.rq(bits, biases=True)
                trained = parts.train("RQ", quantizer, qj.rq_input(bits), seed, start)
                yield trained.row("RQ", bits, seed) | {"paper": {"error": RQ_PAPER}}
            for estimator in ("mode", "expectation"):
                quantizer, inputs = learned_grids.plain(bits, estimator, True, biases=True)
                trained = parts.train(f"{estimator}, {bits}", quantizer, inputs, seed, start)
                row = trained.row(f"SRQ + DropBits, {estimator}", bits, seed)
                yield row | ({"paper": {"error": PAPER[bits]}} if estimator == "mode" else {})
