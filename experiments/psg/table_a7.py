"""PSG, table A7: sparse training of ResNet-32 on CIFAR-100, the target of every weight being 0.

Trained to epoch 200 with the table's lambda_s, then the smallest weights of all layers together
are cut. No weight decay at 80 percent and more. The appendix gives the strengths alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from experiments.psg import protocol

TITLE = "PSG, table A7: sparse training, ResNet-32, CIFAR-100"
STRENGTHS = {20: 100.0, 50: 100.0, 70: 200.0, 80: 600.0, 90: 1200.0}  # by sparsity in percent


def run(context):
    """Yields plain SGD and PSG, each cut to every sparsity."""
    parts = protocol.make(
        context,
        "cifar100",
        "resnet32",
        rates={0: 0.1, 82: 0.01, 123: 0.001},
        switch=82,
        end=200,
    )
    for seed in context.seeds:
        start = parts.plain(seed)
        plain = parts.late("sgd", protocol.sgd, start, seed)
        for sparsity in STRENGTHS:
            yield row("SGD, cut", parts, plain, sparsity, seed)
        for sparsity, strength in STRENGTHS.items():
            decay = 0.0 if sparsity >= 80 else 1e-4
            chain = protocol.psg(qj.zero(), strength, weight_decay=decay)
            trained = parts.late("psg", chain, start, seed)
            yield row("PSG, cut", parts, trained, sparsity, seed) | {"strength": strength}


def row(name, parts, variables, sparsity, seed):
    """Returns one row of the record."""
    sparse = {**variables, "params": cut(variables["params"], sparsity / 100)}
    return {
        "row": name,
        "sparsity": sparsity,
        "seed": seed,
        "full precision": parts.accuracy(variables),
        "sparse": parts.accuracy(sparse),
    }


def cut(params, share):
    """Returns params whose smallest kernel entries, `share` of all of them, are zero."""
    owned = qj.owned(qj.zero().init(params), params)
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(owned), strict=True))
    sizes = np.sort(np.concatenate([np.abs(leaf).ravel() for leaf, mine in pairs if mine]))
    threshold = sizes[max(0, round(share * sizes.size) - 1)] if share > 0 else -1.0
    return jax.tree.map(
        lambda leaf, mine: jnp.where(jnp.abs(leaf) > threshold, leaf, 0) if mine else leaf,
        params,
        owned,
    )
