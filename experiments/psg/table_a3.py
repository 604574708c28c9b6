"""PSG, table A3: Adam, ResNet-32 on CIFAR-100, 4 bits, first and last layer at 8.

Adam at 0.001 with L2 decay; from epoch 82 its rates fall as SGD's do. With PSG the gradients are
scaled before Adam's moments, and the learning rate is multiplied by lambda_s / 100 (public code).
"""

import optax

import quantjax as qj
from experiments.psg import protocol

TITLE = "PSG, table A3: Adam, ResNet-32, CIFAR-100, 4 bits"
PAPER = {"Adam": (66.66, 55.27, 43.5), "Adam with PSG": (66.80, 60.35, 51.55)}
BITS, STRENGTH = 4, 150.0


def run(context):
    """Yields both rows: full precision, 4-bit weights, 4-bit weights and inputs."""
    parts = protocol.make(
        context,
        "cifar100",
        "resnet32",
        rates={0: 1e-3, 82: 1e-4, 123: 1e-5},
        switch=82,
        end=150,
    )
    deployed = protocol.grid(BITS, ends=8)
    optimizers = {"Adam": adam, "Adam with PSG": scaled_adam}
    for seed in context.seeds:
        start = parts.plain(seed, adam)
        for name, (full, weights, both) in PAPER.items():
            trained = parts.late(name, optimizers[name], start, seed)
            yield {
                "row": name,
                "bits": BITS,
                "seed": seed,
                **parts.scores(trained, deployed),
                **parts.with_activations(trained, deployed, BITS),
                "paper": {"full precision": full, "low precision": weights, "accuracy": both},
            }


def adam(rate):
    """Returns Adam with L2 decay, as torch has it."""
    return optax.chain(optax.add_decayed_weights(1e-4), optax.adam(rate))


def scaled_adam(rate):
    """Returns Adam behind the position scale."""
    target = protocol.grid(BITS, momentum=0.1, ends=8)
    scale = qj.scale_by_position(target, strength=STRENGTH)
    return optax.chain(scale, adam(lambda count: 1e-2 * STRENGTH * rate(count)))
