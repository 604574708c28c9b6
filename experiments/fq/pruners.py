"""Ways to a sparse network side by side: PSG's table A7 beside pruning and L0 regularisation.

PSG with the target zero, plain SGD and L0 are cut across all layers at the end. Gradual magnitude
pruning and dynamic network surgery train on while they prune, from the same epoch, for as long.
"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
import optax

import quantjax as qj
from experiments.fq import sparse_networks
from experiments.psg import protocol
from quantjax.lab import recipes
from quantjax.lab.deploy import deploy
from quantjax.lab.train import engine
from quantjax.methods.l0 import l0

BITS = 5
L0_RATE = 1e-2  # Adam's, of the gates


def table(
    parts: protocol.Protocol, strengths: Mapping[int, float], l0_strength: float, seed: int
) -> Iterator[dict]:
    """Yields SGD, L0 and PSG cut, gradual pruning and surgery at every sparsity.

    From 80 percent on FQ at 5 bits is fitted to each result, and not trained.

    Args:
      parts: plain training up to the switch, then the late part in each of the ways.
      strengths: {sparsity in percent: lambda_s of PSG}; equal ones are trained once.
      l0_strength: per weight.
      seed: of the training.
    """
    start = parts.plain(seed)
    plain = parts.late("sgd", protocol.sgd, start, seed)
    gates = l0(l0_strength)
    gated = _train(parts, "L0", gates, start, seed)
    open_gates = gates.apply(gated.variables["params"], gated.state)
    shares = [np.mean(np.asarray(mine) != 0) for mine in _owned(open_gates, gated.state)]
    sizes = [mine.size for mine in _owned(open_gates, gated.state)]
    gated = {**gated.variables, "params": open_gates}
    by_l0 = {
        "strength": l0_strength,
        "open gates": round(float(np.average(shares, None, sizes)), 4),
    }
    trained = {}
    for sparsity, strength in strengths.items():
        density = 1 - sparsity / 100
        cut = qj.magnitude(density, across=True)
        yield _row("SGD, cut", parts, plain, cut, sparsity, seed)
        yield _row("L0, cut", parts, gated, cut, sparsity, seed) | by_l0
        decay = 0.0 if sparsity >= 80 else 1e-4  # table A7
        if (strength, decay) not in trained:
            descent = protocol.psg(qj.zero(), strength, weight_decay=decay)
            trained[strength, decay] = parts.late("psg", descent, start, seed)
        psg = _row("PSG, cut", parts, trained[strength, decay], cut, sparsity, seed)
        yield psg | {"strength": strength}
        for name, pruner in _pruners(parts, density).items():
            end = _train(parts, name, pruner, start, seed)
            yield _row(name, parts, end.variables, pruner, sparsity, seed, end.state)


def _pruners(parts, density):
    """Returns the quantizers that prune while they train; their masks stay for the last quarter."""
    end = max(1, 3 * _length(parts) // 4)
    return {
        "magnitude, gradual": qj.magnitude(density, across=True, end=end, every=max(1, end // 100)),
        "surgery": qj.surgery(density, end=end),
    }


def _length(parts):
    """Returns the steps of the late part."""
    per_epoch = len(parts.task.dataset.train.labels) // parts.batch_size
    return parts.context.steps(parts.end - parts.switch, per_epoch)


def _train(parts, name, pruner, variables, seed):
    """Returns the end of the late part with a quantizer, at the same rates."""
    descent = sparse_networks.optimizer(parts.rate(parts.switch))
    if name == "L0":
        descent = optax.partition({"weights": descent, "gates": optax.adam(L0_RATE)}, _labels)
    method = engine.Method(descent, pruner)
    return engine.fit(
        parts.task,
        method,
        variables,
        _length(parts),
        batch_size=parts.batch_size,
        seed=seed,
        steps=engine.shared_steps(parts.compiled, name, parts.task, method),
        label=name,
    )


def _labels(trainable):
    """Returns which optimizer moves what: the weights, or all that a quantizer learns."""
    params, *learned = trainable
    weights = jax.tree.map(lambda leaf: "weights", params)
    return (weights, *jax.tree.map(lambda leaf: "gates", learned))


def _owned(params, state):
    """Returns the leaves that a state owns."""
    mine = zip(jax.tree.leaves(params), jax.tree.leaves(qj.owned(state, params)), strict=True)
    return [leaf for leaf, owned in mine if owned]


def _row(name, parts, variables, pruner, sparsity, seed, state=None):
    """Returns one row of the record."""
    params = variables["params"]
    state = pruner.init(params) if state is None else state
    cut = {**variables, "params": pruner.apply(params, state)}
    kept = [np.count_nonzero(leaf) for leaf in _owned(cut["params"], state)]
    told = {"model": parts.model, "dataset": parts.task.dataset.name}
    found = {
        "row": name,
        "file": recipes.Network(cut, told),
        "sparsity": sparsity,
        "seed": seed,
        "full precision": parts.accuracy(variables),
        "sparse": parts.accuracy(cut),
        "density": round(sum(kept) / sum(leaf.size for leaf in _owned(params, state)), 4),
    }
    if sparsity >= 80:
        found["FQ, not trained"] = parts.accuracy(deploy(cut, qj.focused(BITS)).variables)
    return found
