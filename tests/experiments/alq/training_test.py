"""ALQ in the lab: the paper's structures by layer, and training by phases to the best network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from experiments.alq import protocol, training
from quantjax.lab import models
from tests.lab.train import toy_task

pytestmark = pytest.mark.usefixtures("quick_compilation")


def shapes_of(params, **structures):
    quantizer = training.structured(params, 2, **structures)
    state = jax.eval_shape(quantizer.init, params)
    return {path: buffers["coords"].shape[:-1] for path, buffers in state.buffers.items()}


def test_structures_of_appendix_c():
    model = models.LeNet5(features=(20, 50, 500))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    assert shapes_of(params, conv="kernelwise") == {
        "Conv_0/kernel": (1, 1, 1, 20),
        "Conv_1/kernel": (1, 1, 20, 50),
        "Dense_0/kernel": (2, 1, 500),
        "Dense_1/kernel": (1, 10),
    }
    assert shapes_of(params, first="channelwise", blocks=(16, 4)) == {
        "Conv_0/kernel": (1, 1, 1, 20),
        "Conv_1/kernel": (5, 5, 1, 50),
        "Dense_0/kernel": (16, 1, 500),
        "Dense_1/kernel": (4, 1, 10),
    }
    # One input channel is no group for pixels, three do not divide 500: channelwise then.
    assert shapes_of(params, blocks=(3,))["Conv_0/kernel"] == (1, 1, 1, 20)
    assert shapes_of(params, blocks=(3,))["Dense_1/kernel"] == (1, 10)
    convs = {name: params[name] for name in ("Conv_0", "Conv_1")}
    assert set(shapes_of(convs)) == {"Conv_0/kernel", "Conv_1/kernel"}
    with pytest.raises(ValueError, match="structure must be one of"):
        training.structured(params, 2, conv="layerwise")


def test_training_keeps_the_best_network_after_the_last_pruning():
    task = toy_task.make()
    validation = toy_task.split(30, 2)
    start = toy_task.start(task)
    quantizer = training.structured(start["params"], 2, blocks=(2, 1))
    schedule = (
        qj.Phase("coordinate", 4, 1e-2),
        qj.Phase("prune", 4, 1e-3, 0.5),
        qj.Phase("coordinate", 6, 1e-2),
    )
    outcome = training.train(
        task, validation, start, quantizer, schedule, batch_size=16, seed=0, every=2
    )
    assert [(p.kind, p.step) for p in outcome.history] == [
        *(("coordinate", 2), ("coordinate", 4)),
        *(("prune", 6), ("prune", 8)),
        *(("coordinate", 10), ("coordinate", 12), ("coordinate", 14)),
    ]
    assert [p.bits for p in outcome.history[:2]] == [2.0, 2.0]
    after = [p for p in outcome.history if p.step > 8]
    assert outcome.bits == pytest.approx(after[-1].bits, abs=1e-4)
    assert outcome.bits < 1.5
    decoded = qj.decode(outcome.encoded)
    jax.tree.map(np.testing.assert_array_equal, decoded, outcome.variables["params"])
    assert training.by_layer(outcome.encoded).keys() == {"Dense_0/kernel", "Dense_1/kernel"}
    evaluate = training.evaluation.make_evaluate(task)
    assert evaluate(outcome.variables, validation).accuracy == max(p.score for p in after)


def test_a_better_network_from_before_the_last_pruning_is_not_kept(monkeypatch):
    task = toy_task.make()
    start = toy_task.start(task)
    seen = []
    scores = iter([99.0, 98.0, 97.0, 96.0, 50.0, 60.0, 55.0])

    def evaluate(variables, split):
        seen.append(jax.device_get(variables["params"]))
        return training.tasks.Score(0.0, next(scores))

    monkeypatch.setattr(training.evaluation, "make_evaluate", lambda task: evaluate)
    outcome = training.train(
        task,
        toy_task.split(30, 2),
        start,
        training.structured(start["params"], 1),
        (qj.Phase("prune", 8, 1e-3, 0.5), qj.Phase("coordinate", 6, 1e-2)),
        batch_size=16,
        seed=0,
        every=2,
    )
    assert [point.step for point in outcome.history] == [2, 4, 6, 8, 10, 12, 14]
    jax.tree.map(np.testing.assert_array_equal, outcome.variables["params"], seen[5])


def test_baselines_train_as_long():
    phases = qj.alq_rounds(10, 2)
    for other in (protocol.uniform_width(phases), protocol.straight_through(phases)):
        assert [p.steps for p in other] == [p.steps for p in phases]
        assert [p.learning_rate for p in other] == [p.learning_rate for p in phases]
    assert "prune" not in {p.kind for p in protocol.uniform_width(phases)}
    assert {p.kind for p in protocol.straight_through(phases)} == {
        "prune",
        "ste-reconstruction",
        "coordinate",
    }
