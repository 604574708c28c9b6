import types

import jax
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.lab.train import engine, phases, tasks
from tests.experiments.recipes_test import Tiny, noise

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make():
    dataset = noise("noise")
    return tasks.classification(Tiny(dataset.classes), dataset)


def test_a_phase_begins_with_the_weights_of_the_one_before():
    task = make()
    start = task.init(0)
    parts = [
        phases.Phase("first", engine.Method(optax.sgd(0.1)), 3),
        phases.Phase("second", engine.Method(optax.sgd(0.0), qj.uniform(4)), 2),
    ]
    seen = []

    def score(variables):
        seen.append(jax.device_get(variables["params"]))
        return float(len(seen) == 1)  # the first is the best

    outcome = phases.run(task, parts, start, score, batch_size=32, seed=0, every=2)
    assert [(point.phase, point.step) for point in outcome.history] == [
        ("first", 2),
        ("first", 3),
        ("second", 5),
    ]
    jax.tree.map(np.testing.assert_array_equal, outcome.variables["params"], seen[1])
    jax.tree.map(np.testing.assert_array_equal, outcome.early["params"], seen[0])
    assert (outcome.early_score, outcome.final_score) == (1.0, 0.0)
    assert set(outcome.state.buffers) == {"Conv_0/kernel", "Conv_1/kernel", "Dense_0/kernel"}
    # The variables it began with are still there.
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(start))


def test_phases_without_steps_are_an_error():
    task = make()
    for wrong in ([], [phases.Phase("none", engine.Method(optax.sgd(0.1)), 0)]):
        with pytest.raises(ValueError, match="at least one step"):
            phases.run(task, wrong, task.init(0), lambda variables: 0.0, batch_size=32, seed=0)


def test_the_first_of_equal_scores_is_the_early_network_and_the_seed_is_the_given_one(monkeypatch):
    seeds = []

    def state(name):
        return types.SimpleNamespace(variables=name, state=None, opt_state=None)

    def run(task, steps, start, total, *, seed, observe, **kwargs):
        seeds.append(seed)
        for done, name in enumerate("abc"[:total], 1):
            observe(engine.Report(state(name), done, 0.0, 0.0, 0.0))
        return state("abc"[total - 1])

    def init_state(task, variables, method, seed):
        seeds.append(seed)
        return state("start")

    monkeypatch.setattr(engine, "init_state", init_state)
    monkeypatch.setattr(engine, "make_steps", lambda *args: None)
    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(engine, "copied", lambda tree: tree)
    parts = [
        phases.Phase(name, engine.Method(optax.sgd(0.1)), total)
        for name, total in (("all", 3), ("worse", 1))
    ]
    scores = {"a": 1.0, "b": 2.0, "c": 2.0}
    outcome = phases.run(None, parts, {}, scores.get, batch_size=32, seed=7)
    assert (outcome.early, outcome.variables) == ("b", "a")
    assert outcome.early_score == 2.0
    assert seeds == [7, 7, 7, 7]
