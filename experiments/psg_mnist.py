"""PSG from scratch: LeNet-5 (20-50-500) on MNIST, weights at 4, 3 and 2 bits, beside plain SGD.

The strength of a width is the one whose rounded network is best on 5,000 held-out training
images (appendix G of the paper); then every seed is trained on all training images.
"""

import optax

import quantjax as qj
from quantjax.lab import data, engine, models
from quantjax.lab.deploy import deploy

TITLE = "PSG from scratch on MNIST, LeNet-5, weights only"
WIDTHS = (4, 3, 2)
STRENGTHS = {4: (100.0, 200.0, 400.0), 3: (50.0, 100.0, 200.0), 2: (10.0, 20.0, 30.0)}
EPOCHS, SEARCH_EPOCHS, BATCH, RATE = 8, 3, 128, 0.03


def run(context):
    """Yields the searched strengths, then per seed SGD's rounding and PSG at every width."""
    dataset = data.load("mnist", context.data_dir)
    train, held_out = data.holdout(dataset.train, 5000, seed=0)
    search = trainer(dataset._replace(train=train, test=held_out), context, SEARCH_EPOCHS)
    best = {}
    for bits in context.widths(WIDTHS):
        found = {s: search(bits, s, seed=0)["low precision"] for s in STRENGTHS[bits]}
        best[bits] = max(found, key=found.get)
        yield {"row": "held-out accuracy", "bits": bits, "of": found, "strength": best[bits]}
    full = trainer(dataset, context, EPOCHS)
    for seed in context.seeds:
        for bits, scores in full(context.widths(WIDTHS), None, seed).items():
            yield {"row": "SGD, rounded", "bits": bits, "seed": seed, **scores}
        for bits in context.widths(WIDTHS):
            scores = full(bits, best[bits], seed)
            yield {"row": "PSG", "bits": bits, "seed": seed, "strength": best[bits], **scores}


def trainer(dataset, context, epochs):
    """Returns (bits, strength, seed) -> scores; with strength None, SGD's at several widths."""
    task = engine.Task(models.build("lenet5", dataset.classes), dataset)
    total = context.steps(epochs, len(dataset.train.labels) // BATCH)
    evaluate = engine.make_evaluate(task)
    rate = optax.cosine_decay_schedule(RATE, total)
    compiled = {}  # one program for SGD, and one for PSG at all widths

    def scores(variables, bits):
        shipped = deploy(variables, qj.uniform(bits))
        return {
            "full precision": round(evaluate(variables, dataset.test).accuracy, 2),
            "low precision": round(evaluate(shipped.variables, dataset.test).accuracy, 2),
            "MSE": round(shipped.weight_error, 5),
            "squared error": {row.path: round(row.squared_error, 5) for row in shipped.layers},
        }

    def train(bits, strength, seed):
        if strength is None:
            decay = optax.add_decayed_weights(1e-4)
            method = engine.Method(optax.chain(decay, optax.sgd(rate, momentum=0.9)))
        else:
            chain = optax.inject_hyperparams(qj.psg)(
                rate,
                qj.uniform(bits, momentum=0.1),
                strength=strength,
                weight_decay=1e-4 if bits > 2 else 0.0,  # none at 2 bits (appendix C)
            )
            method = engine.Method(chain)
        label = "SGD" if strength is None else "PSG"
        if label not in compiled:
            compiled[label] = engine.make_steps(task, method)
        try:
            state = engine.fit(
                task,
                method,
                task.init(seed),
                total,
                batch_size=BATCH,
                seed=seed,
                steps=compiled[label],
                label=label,
            )
        except FloatingPointError:
            return {"full precision": 0.0, "low precision": 0.0, "diverged": True}
        if strength is None:
            return {width: scores(state.variables, width) for width in bits}
        return scores(state.variables, bits)

    return train
