"""The recipes of the comparison: what they train, and that defaults are what the search chose."""

import json

import numpy as np
import pytest

from experiments.compare import cifar10, mnist, mnist_inputs, protocol, settings
from quantjax.lab import compare, data, methods, models, recipes
from quantjax.lab.recipes import Context
from quantjax.lab.report import rows as rows_lib
from tests.experiments.recipes_test import noise
from tests.lab.report import seeds_test

RECORD = recipes.FOLDER / "results" / "compare_settings-s0-1-2.json"


def test_settings_are_what_the_search_chose():
    record = json.loads(RECORD.read_text())
    assert record["complete"]
    assert record["command"] == "quantjax run compare_settings --seeds 0 1 2"
    chosen = {row["chosen"]: row["settings"] for row in record["rows"] if "chosen" in row}
    assert chosen == methods.ON_DIGITS
    assert set(chosen) == set(settings.CANDIDATES)


def test_settings_hold_where_they_were_searched():
    for name, mine in methods.ON_DIGITS.items():
        entry = methods.METHODS[name]
        assert methods.settings_on("digits", name, entry.usual) == mine
        assert methods.settings_on("mnist", name, entry.usual) == {}
        assert methods.settings_on("digits", name, entry.usual + 1) == {}
        methods.plan_of(name, entry.usual, 40, **mine)
    assert methods.settings_on("digits", "of_mine:plan", 2) == {}


def test_every_trained_row_is_searched_with_as_much_care():
    trained = {name for name, entry in methods.METHODS.items() if entry.start != "none"}
    assert set(settings.CANDIDATES) == trained - {"alq-0.5"}  # ALQ's settings
    for name, grid in settings.CANDIDATES.items():
        count = np.prod([len(values) for values in grid.values()])
        assert count in (4, 6), name


def test_the_mildest_of_what_is_as_good_is_chosen():
    scores = {"0.1": [90.0, 91.0, 92.0], "0.2": [94.0, 95.0, 96.0], "0.3": [94.5, 95.5, 96.5]}
    assert settings.chosen(scores) == "0.2"
    assert settings.chosen(scores | {"0.4": [97.0, 97.0, 97.1]}) == "0.4"
    assert settings.chosen({"0.1": [90.0], "0.2": [90.1], "0.3": [90.1]}) == "0.2"


def test_held_out_images_are_of_the_training_set(monkeypatch):
    """The network that is judged never sees the test images, and trains as long as `compare`."""
    digits = data.load("digits")
    made = []

    class Rows(settings.Rows):
        def full_precision(self):
            made.append(self)
            raise StopIteration

    monkeypatch.setattr(settings, "Rows", Rows)
    with pytest.raises(RuntimeError):
        list(settings.run(Context()))
    (rows,) = made
    train, held_out = rows.task.dataset.train, rows.task.dataset.test
    assert len(held_out.labels) == 300
    both = np.concatenate([train.images, held_out.images]).reshape(len(digits.train.labels), -1)
    original = digits.train.images.reshape(len(both), -1)
    np.testing.assert_array_equal(*(part[np.lexsort(part.T)] for part in (both, original)))
    batch, epochs = compare.DIGITS["batch_size"], compare.DIGITS["epochs"]
    assert rows.total == epochs * (len(digits.train.labels) // batch)


@pytest.mark.parametrize(
    ("recipe", "model", "names"),
    [
        (mnist, "lenet5", {name for name, _ in mnist.ASKED}),
        (mnist_inputs, "lenet5", {"uniform", "lsq", "srq", "srq+dropbits"}),
        (cifar10, "resnet8", {name for name, _ in cifar10.ASKED}),
    ],
)
def test_what_a_recipe_compares(recipe, model, names, monkeypatch):
    seen = []

    def run(context, task, name, asked, **kwargs):
        seen.append((task, name, asked, kwargs))
        yield {}

    monkeypatch.setattr(data, "load", noise)
    monkeypatch.setattr(protocol, "run", run)
    list(recipe.run(Context()))
    asked = [pair for _, _, pairs, _ in seen for pair in pairs]
    assert {name for name, _ in asked} == names
    assert len(asked) == len(set(asked))
    for name, bits in asked:
        assert methods.METHODS[name].chosen((bits,)) == (bits,)
    for task, name, _, kwargs in seen:
        assert name == model
        assert isinstance(task.model, type(models.build(model, 5)))
        assert kwargs["batch_size"] == 128
    if recipe is mnist_inputs:
        assert [kwargs["inputs"] for *_, kwargs in seen] == [4, 3, 2]
        assert [{bits for _, bits in asked} for _, _, asked, _ in seen] == [{4}, {3}, {2}]


def test_pixels_are_means_of_four():
    images = np.array([[[0, 1], [1, 1]], [[10, 20], [30, 41]]], np.uint8)[..., None]
    found = cifar10.halved(data.Split(images, np.zeros(2, np.int32)))
    np.testing.assert_array_equal(found.images.ravel(), [1, 25])
    assert found.images.shape == (2, 1, 1, 1)


def test_ranks_tell_neighbours_apart_by_the_paired_test():
    rounded, lsq, psg = seeds_test.everything()[1:]
    assert rows_lib.told_apart(rounded, psg)
    assert protocol.ranks([rounded, psg, lsq]) == "LSQ, PSG > ROUNDED"
