"""Table A7's comparison at the size of MNIST: LeNet-5 (20-50-500), sparse in five ways.

Four epochs of plain training, then two in each of the ways of `pruners`. Strengths
of PSG and L0 were not searched.
"""

from experiments.fq import pruners
from experiments.psg import protocol

TITLE = "Sparse training beside pruning: LeNet-5 20-50-500, MNIST"
STRENGTHS = {80: 100.0, 90: 100.0}  # by sparsity in percent
L0_STRENGTH = 1e-6  # per weight


def run(context):
    """Yields every way at every sparsity."""
    parts = protocol.mnist(context)
    for seed in context.seeds:
        yield from pruners.table(parts, STRENGTHS, L0_STRENGTH, seed)
