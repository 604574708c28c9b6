"""Every recipe runs from end to end, on noise and with a tiny network in place of the paper's."""

import json
import math
import types
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest

from experiments.alq import training
from quantjax.lab import data, models, recipes
from quantjax.methods.srq import logistic_masses

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCORES = {"low precision", "sparse", "error"}
RECIPES = sorted(recipes.known_recipes())
# They run the code of others at other settings, which tests of settings ask for: slow ones alone.
ALIKE = {
    *("alq_table1", "alq_table2", "alq_table3", "fq_cifar10", "fq_table_a7"),
    *("psg_table_a8", "srq_table3", "srq_mnist_widths"),
}


class Tiny(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x, train: bool = False):
        for features in (4, 6):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


def build(name, classes, dtype=None):
    """LeNet-5 stays one: recipes name its layers."""
    return models.LeNet5(classes, (4, 6, 8), "SAME") if name == "lenet5" else Tiny(classes)


def noise(name, data_dir=None):
    rng = np.random.default_rng(0)

    def split(count):
        images = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        return data.Split(images, rng.integers(0, 5, count, dtype=np.int32))

    return data.Dataset(name, split(320), split(40), 5, (0.5,) * 3, (0.3,) * 3)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(data, "load", noise)
    monkeypatch.setattr(models, "build", build)
    structured = training.structured  # bases cost compilation, and tell no recipe from another
    monkeypatch.setattr(
        training, "structured", lambda params, bits, **kw: structured(params, min(bits, 1), **kw)
    )
    monkeypatch.setattr(logistic_masses, "UNROLLED", 0)  # loops compile sooner


def check(name, folder):
    path = recipes.run(name, recipes.Context(scale=0.01), folder)
    record = json.loads(path.read_text())
    assert record["complete"]
    assert record["scale"] == 0.01
    assert record["experiment"] == name
    scored = [row for row in record["rows"] if SCORES & row.keys()]
    assert scored
    for row in scored:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))


@pytest.mark.parametrize("name", sorted(set(RECIPES) - ALIKE))
def test_recipe_begins_and_records(name, tiny, monkeypatch, tmp_path):
    """The first rows, until one has a score: every method compiles programs of its own."""
    load = recipes.load

    def first_rows(path):
        recipe = load(path)

        def run(context):
            scored = False
            for count, row in enumerate(recipe.run(context)):
                yield row
                scored |= bool(SCORES & row.keys())
                if scored and count:
                    return

        return types.SimpleNamespace(TITLE=recipe.TITLE, run=run)

    monkeypatch.setattr(recipes, "load", first_rows)
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_to_its_end(name, tiny, tmp_path):
    check(name, tmp_path)


@pytest.mark.parametrize("path", sorted((recipes.FOLDER / "results").glob("*.json")))
def test_records_say_what_they_are(path: Path):
    record = json.loads(path.read_text())
    assert record["experiment"] in RECIPES
    assert record["complete"]
    assert record["command"].startswith(f"quantjax run {record['experiment']}")
    for name in ("device", "versions", "seconds", "scale", "rows"):
        assert record[name]
    if record["scale"] != 1:
        assert f"--scale {record['scale']:g}" in record["command"]
