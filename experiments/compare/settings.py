"""The settings of the rows of `quantjax compare`, by 300 held-out training images of the digits.

Every row is trained as the comparison trains it, at its usual width and for as many steps, without
those images, and scored on them. Chosen is the mildest setting, smaller rates and strengths first,
whose mean over the seeds is within one standard error of the best one: what is no better on the
digits is more likely to diverge elsewhere. Grids of four or six candidates were set beforehand. The
rows of the table are those of the choice, which `ON_DIGITS` in quantjax/lab/methods.py
has.
"""

import itertools

import numpy as np

from quantjax.lab import compare, data, methods, models
from quantjax.lab.train import tasks
from quantjax.lab.trained_rows import Rows

TITLE = "Settings of the comparison's rows: digits, held-out training images"
HELD_OUT, SEED = 300, 0
SGD = {"rate": (0.003, 0.01, 0.03, 0.1)}
ADAM = {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}
CANDIDATES = {
    "uniform": SGD,
    "ternary": SGD,
    "binary": SGD,
    "lq-net": SGD,
    "lsq": ADAM,
    "lsq-balanced": ADAM,
    "rq": ADAM,
    "srq": ADAM,
    "srq+dropbits": ADAM,
    "dropbits-learned": {"rate": (3e-3, 1e-2), "penalty": (1e-3, 1e-2)},
    "parq": ADAM,
    "psg": {"rate": (0.01, 0.03), "strength": (10.0, 30.0, 100.0)},
    "psg-multi-bit": {"rate": (0.01, 0.03), "strength": (30.0, 100.0, 300.0)},
    "psg-scratch": {"rate": (0.005, 0.01), "strength": (10.0, 30.0, 60.0)},
    "psg-directional": {"rate": (0.01, 0.03), "strength": (2.0, 4.0, 8.0)},
    "psg-adam": {"rate": (0.003, 0.01), "eps": (1e-5, 1e-4, 1e-3)},
    "pruned": SGD,
    "focused": SGD,
    "psg-sparse": {"rate": (0.01, 0.03), "strength": (30.0, 60.0, 120.0)},
    "alq": {"basis_rate": (3e-4, 1e-3, 3e-3), "coordinate_rate": (3e-4, 1e-3)},
}


def run(context):
    """Yields the candidates of every method, what is chosen, and its rows."""
    dataset = context.load("digits")
    count = min(HELD_OUT, len(dataset.train.labels) // 4)
    rest, held_out = data.holdout(dataset.train, count, SEED)
    task = tasks.of(
        models.build("small-cnn", dataset.classes), dataset._replace(train=rest, test=held_out)
    )
    whole = len(dataset.train.labels) // compare.DIGITS["batch_size"]
    epochs = compare.DIGITS["epochs"] * whole
    trained = Rows(
        *(task, "small-cnn", "digits"),
        epochs=1,
        batch_size=compare.DIGITS["batch_size"],
        seeds=context.seeds,
    )
    trained.total = context.steps(1, epochs)  # as many steps as with all training images
    for result in trained.full_precision().runs:
        yield {"row": "full precision", "seed": result.seed, "full precision": result.quantized}
    for name, grid in CANDIDATES.items():
        entry, found = methods.find(name), {}
        total = entry.steps(trained.total)
        for values in itertools.product(*grid.values()):
            settings, kept, scores = dict(zip(grid, values, strict=True)), {}, {}
            told = ", ".join(f"{key} {value:g}" for key, value in settings.items())
            for seed in context.seeds:
                plan = methods.plan_of(name, entry.usual, total, **settings)
                try:
                    result = trained.result(name, entry, plan, entry.usual, total, seed, kept)
                    scores[seed] = round(result.quantized, 3)
                except FloatingPointError:
                    scores[seed] = 0.0
            found[told] = scores, settings
            yield {"candidate": name, "setting": told, "held-out accuracy": scores}
        best = chosen({told: list(scores.values()) for told, (scores, _) in found.items()})
        scores, settings = found[best]
        yield {"chosen": name, "settings": settings, "of": len(found)}
        for seed, score in scores.items():
            told = {"row": entry.title, "bits": entry.usual, "seed": seed, "low precision": score}
            yield told | {"setting": best}


def chosen(scores: dict[str, list[float]]) -> str:
    """Returns the first setting whose mean is within one standard error of the best one's."""
    means = {told: float(np.mean(values)) for told, values in scores.items()}
    best = scores[max(means, key=means.get)]
    error = np.std(best, ddof=1) / np.sqrt(len(best)) if len(best) > 1 else 0.0
    return next(told for told, mean in means.items() if mean >= np.mean(best) - error)
