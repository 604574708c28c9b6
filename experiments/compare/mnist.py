"""The methods side by side on MNIST: LeNet-5 20-50-500, weights at 4, 3 and 2 bits, and fewer.

The rows, plans and settings are those of `quantjax compare` (`compare_settings`), five epochs in
full precision and five for every row that continues. Layer inputs stay float:
`compare_mnist_inputs` has both quantized.
"""

from experiments.compare import protocol
from quantjax.lab import models
from quantjax.lab.train import tasks

TITLE = "Methods side by side on MNIST: LeNet-5 20-50-500, weights only"
EPOCHS, BATCH = 5, 128
GRIDS = ("sgd-least-error", "uniform", "lsq", "parq", "psg", "psg-multi-bit", "srq", "alq")
ASKED = (
    *((name, bits) for bits in (4, 3, 2) for name in GRIDS),
    *(("ternary", 2), ("binary", 1), ("focused", 5), ("psg-sparse", 5)),
)


def run(context):
    """Yields a row per seed, and ranks per width."""
    task = tasks.of(models.build("lenet5", 10), context.load("mnist"))
    yield from protocol.run(context, task, "lenet5", ASKED, epochs=EPOCHS, batch_size=BATCH)
