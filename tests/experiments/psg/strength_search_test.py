"""Appendix G: what a search trains on, and which strength it takes."""

import types

import numpy as np
import pytest

import quantjax as qj
from experiments.psg import protocol, strength_search
from quantjax.lab.recipes import Context
from tests.experiments.psg.protocol_test import make

pytestmark = pytest.mark.usefixtures("quick_compilation")


def rows_of(*splits):
    return np.concatenate([split.images.reshape(len(split.images), -1) for split in splits])


def test_nothing_is_trained_on_the_images_that_score(monkeypatch):
    fits = []

    def fit(task, method, variables, total, *, label, steps, **kwargs):
        fits.append((label, task.dataset, steps, total))
        return types.SimpleNamespace(variables=variables)

    monkeypatch.setattr(protocol.engine, "fit", fit)
    parts = make()
    search = strength_search.begin(parts, seed=3)
    for bits in (3, 2):

        def train(parts, start, strength, bits=bits):
            assert start is search.start
            return parts.late("psg", protocol.psg(qj.uniform(bits), strength), start, seed=3)

        search.choose((1.0, 2.0), train, qj.uniform(bits))
    # The network at the switch and plain SGD's serve all widths, and so does a program.
    assert [label for label, *_ in fits] == ["plain", "sgd", *["psg"] * 4]
    assert len({id(steps) for label, _, steps, _ in fits if label == "psg"}) == 1
    assert [total for *_, total in fits] == [4 * 9] * 6
    whole = rows_of(parts.task.dataset.train)
    for _, dataset, *_ in fits:
        assert len(dataset.test.labels) == 32
        found = rows_of(dataset.train, dataset.test)
        assert found.shape == whole.shape
        np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(whole, axis=0))


def test_at_most_a_tenth_is_held_out_and_not_more_than_the_constant(monkeypatch):
    parts = make()
    monkeypatch.setattr(protocol.Protocol, "_train", lambda self, name, opt, start, *args: start)
    monkeypatch.setattr(protocol.Protocol, "accuracy", lambda self, variables: 0.0)
    monkeypatch.setattr(strength_search, "HELD_OUT", 20)
    search = strength_search.begin(parts, seed=0)
    assert len(search.parts.task.dataset.test.labels) == 20
    assert len(search.parts.task.dataset.train.labels) == 300


def choose(monkeypatch, scores, init=None):
    """Chooses among strengths of these accuracies, where plain SGD has 70 percent."""

    def train(parts, start, strength):
        if scores[strength] is None:
            raise FloatingPointError
        return strength, 0

    def deploy(variables, quantizer):
        return types.SimpleNamespace(variables=(variables[0], 1))

    monkeypatch.setattr(strength_search, "deploy", deploy)
    parts = types.SimpleNamespace(
        accuracy=lambda variables: scores[variables[0]][variables[1]], context=Context(init=init)
    )
    return strength_search.Search(parts, {}, 70.0).choose(scores, train, quantizer=None)


def test_the_best_rounded_network_wins_among_those_that_keep_full_precision(monkeypatch):
    scores = {100.0: (70.5, 50.0), 200.0: (68.5, 60.0), 400.0: (68.4, 65.0), 800.0: None}
    found = choose(monkeypatch, scores)
    assert strength_search.TOLERANCE == 1.5
    assert found.strength == 200.0
    assert found.scores[400.0] == {"full precision": 68.4, "low precision": 65.0}
    assert found.scores[800.0] == {"full precision": 0.0, "low precision": 0.0}
    assert found.row == {
        "row": "strength by held-out images",
        "chosen": 200.0,
        "full precision of SGD": 70.0,
        "of": found.scores,
    }


def test_where_all_lose_precision_the_least_loss_wins_and_the_row_says_so(monkeypatch):
    found = choose(monkeypatch, {50.0: (60.0, 55.0), 100.0: (65.0, 40.0)})
    assert found.strength == 100.0
    assert found.row["note"] == "every strength loses more than 1.5 points of full precision"


def test_a_given_start_has_seen_the_held_out_images(monkeypatch):
    found = choose(monkeypatch, {50.0: (70.0, 55.0)}, init="checkpoint.npz")
    assert found.row["start"] == "--init, which has seen the held-out images"
