"""PSG's table A7 beside pruning: sparse ResNet-32 on CIFAR-100, cut once or pruned in training.

PSG with the target zero and plain SGD are cut across all layers at the end, as in the table.
Gradual magnitude pruning and dynamic network surgery train on while they prune, from the same
epoch and for as long. L0 regularisation does so at one strength, and is then cut, too. At 80
percent and more, FQ at 5 bits is fitted to each result.
"""

import jax
import optax

import quantjax as qj
from quantjax.lab import engine, protocol, sparse
from quantjax.lab.deploy import deploy
from quantjax.methods.l0 import l0

TITLE = "Sparse training beside pruning: ResNet-32, CIFAR-100 (PSG, table A7)"
STRENGTHS = {20: 100.0, 50: 100.0, 70: 200.0, 80: 600.0, 90: 1200.0}  # by sparsity in percent
RATES = {0: 0.1, 82: 0.01, 123: 0.001}
BITS = 5
L0_STRENGTH = 1e-6  # per weight: not searched
L0_RATE = 1e-2  # Adam's, of the gates


def run(context):
    """Yields SGD, PSG and L0 cut, gradual pruning and surgery at every sparsity."""
    parts = protocol.make(context, "cifar100", "resnet32", rates=RATES, switch=82, end=200)
    for seed in context.seeds:
        start = parts.plain(seed)
        plain = parts.late("sgd", protocol.sgd, start, seed)
        gates = l0(L0_STRENGTH)
        gated = train(parts, "L0", gates, start, seed)
        open_gates = gates.apply(gated.variables["params"], gated.state)
        gated = {**gated.variables, "params": open_gates}
        for sparsity, strength in STRENGTHS.items():
            density = 1 - sparsity / 100
            cut = qj.magnitude(density, across=True)
            yield row("SGD, cut", parts, plain, cut, sparsity, seed)
            yield row("L0, cut", parts, gated, cut, sparsity, seed) | {"strength": L0_STRENGTH}
            descent = protocol.psg(
                qj.zero(), strength, weight_decay=0.0 if sparsity >= 80 else 1e-4
            )
            trained = parts.late("psg", descent, start, seed)
            yield row("PSG, cut", parts, trained, cut, sparsity, seed) | {"strength": strength}
            for name, pruner in pruners(parts, density).items():
                end = train(parts, name, pruner, start, seed)
                yield row(name, parts, end.variables, pruner, sparsity, seed, end.state)


def pruners(parts, density):
    """Returns the quantizers that prune while they train; their masks stay for the last quarter."""
    end = max(1, 3 * length(parts) // 4)
    return {
        "magnitude, gradual": qj.magnitude(density, across=True, end=end, every=max(1, end // 100)),
        "surgery": qj.surgery(density, end=end),
    }


def length(parts):
    """Returns the steps of the late part."""
    per_epoch = len(parts.task.dataset.train.labels) // parts.batch_size
    return parts.context.steps(parts.end - parts.switch, per_epoch)


def train(parts, name, pruner, variables, seed):
    """Returns the end of the late part with a quantizer, at the same rates."""
    descent = sparse.optimizer(parts.rate(parts.switch))
    if name == "L0":
        descent = optax.partition({"weights": descent, "gates": optax.adam(L0_RATE)}, labels)
    method = engine.Method(descent, pruner)
    if name not in parts.compiled:  # densities are in the state
        parts.compiled[name] = engine.make_steps(parts.task, method)
    return engine.fit(
        parts.task,
        method,
        variables,
        length(parts),
        batch_size=parts.batch_size,
        seed=seed,
        steps=parts.compiled[name],
        label=name,
    )


def labels(trainable):
    """Returns which optimizer moves what: the weights, or all that a quantizer learns."""
    params, *learned = trainable
    weights = jax.tree.map(lambda leaf: "weights", params)
    return (weights, *jax.tree.map(lambda leaf: "gates", learned))


def row(name, parts, variables, pruner, sparsity, seed, state=None):
    """Returns one row of the record."""
    params = variables["params"]
    state = pruner.init(params) if state is None else state
    cut = {**variables, "params": pruner.apply(params, state)}
    found = {
        "row": name,
        "sparsity": sparsity,
        "seed": seed,
        "full precision": parts.accuracy(variables),
        "sparse": parts.accuracy(cut),
    }
    if sparsity >= 80:
        found["FQ, not trained"] = parts.accuracy(deploy(cut, qj.focused(BITS)).variables)
    return found
