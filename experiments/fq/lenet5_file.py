"""Focused Quantization of LeNet-5 (20-50-500) on MNIST, weighed as the file that ships.

Surgery with a density for every layer in two rounds, then three bits (algorithm 1), then ANS. A
weight into a unit that nothing reads, or out of one without inputs, is cut before the network is
encoded, and such a unit's bias. The file is all of it: header, digests, levels, biases in float16.
The accuracy is that of the network read back from it. The schedule is from a trial.
"""

import quantjax as qj
from experiments.fq import narrow_networks, sparse_networks
from experiments.psg import protocol
from quantjax.encoded import entropy
from quantjax.lab import recipes
from quantjax.lab.deploy import deploy

TITLE = "FQ on MNIST: LeNet-5 20-50-500 as a file, pruned by surgery per layer"
ROUNDS = (  # epochs, densities
    (6, {"Conv_0": 0.6, "Conv_1": 0.2, "Dense_0": 0.04, "Dense_1": 0.3}),
    (10, {"Conv_0": 0.35, "Conv_1": 0.08, "Dense_0": 0.01, "Dense_1": 0.12}),
)
BITS = 3


def run(context):
    """Yields, per seed, the file and its accuracy."""
    parts = protocol.mnist(context)
    for seed in context.seeds:
        yield trained(parts, seed)


def trained(parts, seed: int) -> dict:
    """Returns the row of a seed."""
    dense = parts.late("sgd", protocol.sgd, parts.plain(seed), seed)
    pruned = sparse_networks.Pruned(dense, {})
    for epochs, densities in ROUNDS:
        pruned = sparse_networks.prune(
            parts, pruned.variables, densities, epochs=epochs, rate=0.02, seed=seed
        )
    result = sparse_networks.focus(parts, pruned, BITS, epochs=7, rate=0.01, seed=seed)
    return {
        "row": "FQ",
        "bits": BITS,
        "seed": seed,
        "full precision": parts.accuracy(dense),
        "sparse": parts.accuracy(pruned.variables),
    } | as_file(parts, result)


def as_file(parts, result: sparse_networks.Focused) -> dict:
    """Returns the network to ship, its density, and its accuracy as its file gives it back."""
    buffers = result.state.buffers
    masks = narrow_networks.without_loose_ends(
        {p: mine["0"]["mask"] for p, mine in buffers.items()}
    )
    state = result.state._replace(
        buffers={path: {**mine, "0": {"mask": masks[path]}} for path, mine in buffers.items()}
    )
    cut = qj.pruned(masks)
    params = result.variables["params"]
    variables = {**result.variables, "params": cut.apply(params, cut.init(params))}
    shipped = deploy(variables, result.quantizer, state)
    network = recipes.Network(
        {**variables, "params": shipped.encoded}, {"model": "lenet5", "dataset": "mnist"}, "float16"
    )
    return {
        "low precision": parts.accuracy(network.loaded()),
        "density": round(entropy.compression(shipped.encoded).density, 4),
        "file": network,
    }
