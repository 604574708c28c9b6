"""SRQ with LSQ beside it on MNIST: weights and layer inputs at 4/4, 3/3 and 2/2 bits.

LeNet-5 20-50-500, five epochs in full precision and five for every row, as `compare_mnist`.
"""

from experiments.compare import mnist, protocol
from quantjax.lab import models
from quantjax.lab.train import tasks

TITLE = "SRQ and LSQ on MNIST: LeNet-5 20-50-500, weights and layer inputs"
WIDTHS = (4, 3, 2)
GRIDS = ("uniform", "lsq", "srq", "srq+dropbits")


def run(context):
    """Yields a row per seed, and ranks per width."""
    task = tasks.of(models.build("lenet5", 10), context.load("mnist"))
    for bits in context.widths(WIDTHS):
        asked = [(name, bits) for name in GRIDS]
        yield from protocol.run(
            *(context, task, "lenet5", asked),
            epochs=mnist.EPOCHS,
            batch_size=mnist.BATCH,
            inputs=bits,
        )
