"""The smallest file of LeNet-5 (20-50-500) on MNIST: surgery below one percent, then LSQ.

From the network of `fq_lenet5_file` (`--init` takes that file; else it is trained first) the
weakest channels leave, which makes the rest faster. Then a ladder: on every rung surgery to a count
of weights for every layer, what leads nowhere is cut, and three bits with learned steps are trained
on the masks. The file has the shapes of `lenet5` again: what left is zeros, of little cost to ANS.
Biases are float16, or zero where a channel has no weights. The accuracy is that of the network read
back from its file; rungs and epochs were set beforehand, and every rung is shown.
"""

import numpy as np

import quantjax as qj
from experiments.fq import lenet5_file, narrow_networks, sparse_networks
from experiments.psg import protocol
from quantjax.encoded import storage
from quantjax.lab import recipes
from quantjax.lab.train import evaluation

TITLE = "The smallest file on MNIST: LeNet-5 20-50-500, surgery on, then LSQ"
WIDTHS = (12, 28, 150)  # of 20, 50 and 500
LADDER = (  # weights of every layer, about
    {"Conv_0": 150, "Conv_1": 1400, "Dense_0": 2000, "Dense_1": 450},
    {"Conv_0": 130, "Conv_1": 1000, "Dense_0": 1200, "Dense_1": 320},
    {"Conv_0": 115, "Conv_1": 750, "Dense_0": 800, "Dense_1": 240},
)
BITS = 3


def run(context):
    """Yields, per seed and rung, the file and its accuracy."""
    parts = protocol.mnist(context)
    for seed in context.seeds:
        reduced = narrow_networks.narrowed(first(context, parts, seed), WIDTHS)
        small, variables = narrower(parts, reduced.variables), reduced.variables
        sizes = {name: layer["kernel"].size for name, layer in variables["params"].items()}
        for counts in LADDER:
            shares = {name: min(1.0, count / sizes[name]) for name, count in counts.items()}
            pruned = sparse_networks.prune(small, variables, shares, epochs=4, rate=0.02, seed=seed)
            variables, encoded = quantize(small, without_loose_ends(pruned), seed)
            whole = narrow_networks.widened(encoded, reduced)
            network = recipes.Network(
                {"params": whole}, {"model": "lenet5", "dataset": "mnist"}, "float16"
            )
            yield {
                "row": f"about {sum(counts.values())} weights",
                "bits": BITS,
                "seed": seed,
                "low precision": parts.accuracy(network.loaded()),
                "weights": {
                    name: int(np.count_nonzero(layer["kernel"].codes))
                    for name, layer in whole.items()
                },
                "file": network,
            }


def first(context, parts, seed: int):
    """Returns the variables that the ladder starts from."""
    if context.init is None:
        return lenet5_file.trained(parts, seed)["file"].loaded()
    return qj.decode(storage.load(context.init))


def narrower(parts, variables):
    """Returns the protocol with the model of these variables."""
    widths = narrow_networks.features(variables["params"])
    task = parts.task._replace(model=parts.task.model.clone(features=widths))
    return parts._replace(task=task, evaluate=evaluation.make_evaluate(task), compiled={})


def without_loose_ends(pruned: sparse_networks.Pruned) -> sparse_networks.Pruned:
    """Returns the network without what leads nowhere; the masks hold biases, too."""
    masks = narrow_networks.without_loose_ends(pruned.masks)
    cut, params = qj.pruned(masks), pruned.variables["params"]
    return sparse_networks.Pruned({"params": cut.apply(params, cut.init(params))}, masks)


def quantize(small, pruned: sparse_networks.Pruned, seed: int):
    """Returns float variables and encoded params after training on the learned grid."""
    quantizer = qj.chain(qj.pruned(pruned.masks), qj.lsq(BITS))
    end = sparse_networks.fit(
        small, "lsq", quantizer, pruned.variables, epochs=3, rate=0.01, seed=seed
    )
    return {"params": end.params}, quantizer.encode(end.params, end.state)
