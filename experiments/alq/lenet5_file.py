"""ALQ of LeNet-5 (20-50-500) on MNIST, weighed as the file that ships.

Structures, images and choice of the epoch as in `alq_mnist`, but to a third of a bit, with a last
round that is long, and with straight-through steps in the place of basis steps (section 5.3), which
gave 0.1 points more in `alq_ablation`. The file is all of it: header, digests, bases, coordinates
and biases in float16. The paper counts the weights alone, with coordinates in float32 and without
dead channels; here they stay, so that the file loads as `lenet5`. The accuracy is that of the
network read back.
"""

import dataclasses

import jax
import jax.numpy as jnp

import quantjax as qj
from experiments.alq import mnist, protocol
from quantjax.core import qarray
from quantjax.lab import recipes

TITLE = "ALQ on MNIST: LeNet-5 20-50-500 as a file"
ROUNDS = ((0.5, 0.5, 0.5), (0.5, 1, 0.5), (0.75, 5.5, 1))  # as in `mnist`: 9.75 epochs in all
RATE = 1e-3  # of the straight-through steps


def schedule(per_epoch: int) -> tuple[qj.Phase, ...]:
    """Returns the phases of `alq_mnist`, by other rounds and straight-through."""
    return protocol.straight_through(mnist.schedule(per_epoch, ROUNDS, RATE))


def run(context):
    """Yields, per seed, full precision, and the file with its accuracy."""
    for seed in context.seeds:
        parts = protocol.mnist(context, seed, validation=5_000)
        start = parts.full_precision(seed)
        yield parts.float_row(start, seed)
        trained = parts.alq(start, schedule, mnist.BITS, seed, rest_rate=3e-4)
        tree = {**trained.variables, "params": with_half_coordinates(trained.encoded)}
        network = recipes.Network(tree, {"model": "lenet5", "dataset": "mnist"}, "float16")
        row = parts.row("ALQ", trained, seed)
        yield row | {"low precision": parts.accuracy(network.loaded()), "file": network}


def with_half_coordinates(encoded):
    """Returns the tree with the coordinates of its bases in float16."""

    def half(leaf):
        if not isinstance(leaf, qj.MultiBit):
            return leaf
        return dataclasses.replace(leaf, coords=leaf.coords.astype(jnp.float16))

    return jax.tree.map(half, encoded, is_leaf=qarray.is_encoded)
