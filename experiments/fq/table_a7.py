"""PSG's table A7 beside pruning and L0: sparse ResNet-32 on CIFAR-100.

The ways are those of `pruners`. L0 is trained at one strength, which was not searched.
"""

from experiments.fq import pruners
from experiments.psg import protocol

TITLE = "Sparse training beside pruning: ResNet-32, CIFAR-100 (PSG, table A7)"
STRENGTHS = {20: 100.0, 50: 100.0, 70: 200.0, 80: 600.0, 90: 1200.0}  # by sparsity in percent
RATES = {0: 0.1, 82: 0.01, 123: 0.001}
L0_STRENGTH = 1e-6  # per weight


def run(context):
    """Yields every way at every sparsity."""
    parts = protocol.make(context, "cifar100", "resnet32", rates=RATES, switch=82, end=200)
    for seed in context.seeds:
        yield from pruners.table(parts, STRENGTHS, L0_STRENGTH, seed)
