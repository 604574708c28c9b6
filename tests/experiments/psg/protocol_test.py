import numpy as np
import pytest

import quantjax as qj
from experiments.psg import protocol
from quantjax.lab import data
from quantjax.lab.deploy import deploy, reestimated
from quantjax.lab.recipes import Context
from quantjax.lab.train import evaluation, tasks
from tests.experiments.recipes_test import Tiny, noise

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make(scale=1.0, **changes):
    dataset = noise("noise")
    task = tasks.classification(Tiny(dataset.classes), dataset)
    parts = protocol.Protocol(
        context=Context(scale=scale),
        task=task,
        evaluate=evaluation.make_evaluate(task),
        rates={0: 0.1, 4: 0.01, 6: 0.001},
        switch=4,
        end=8,
        batch_size=32,
        compiled={},
        model="tiny",
    )
    return parts._replace(**changes)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_rates_follow_the_epochs_at_any_scale(scale):
    per_epoch = round(10 * scale)
    whole, late = make(scale).rate(), make(scale).rate(4)
    for epoch, rate in ((0, 0.1), (3.9, 0.1), (4, 0.01), (5.9, 0.01), (6, 0.001), (7.9, 0.001)):
        step = int(epoch * per_epoch)
        np.testing.assert_allclose(whole(step), rate, rtol=1e-6)
        if epoch >= 4:
            np.testing.assert_allclose(late(step - 4 * per_epoch), rate, rtol=1e-6)


def test_grid_keeps_first_and_last_layer_wide_and_takes_the_dense_bias():
    parts = make()
    params = parts.task.init(0)["params"]
    encoded = protocol.grid(3, ends=8)
    encoded = encoded.encode(params, encoded.init(params))
    widths = {
        path: leaf.bits
        for path, leaf in {
            "first": encoded["Conv_0"]["kernel"],
            "middle": encoded["Conv_1"]["kernel"],
            "last": encoded["Dense_0"]["kernel"],
            "bias": encoded["Dense_0"]["bias"],
        }.items()
    }
    assert widths == {"first": 8, "middle": 3, "last": 8, "bias": 8}
    assert not isinstance(encoded["BatchNorm_0"]["bias"], qj.Grid)


@pytest.mark.usefixtures("few_programs")
def test_late_continues_from_the_switch_and_shares_a_program():
    parts = make(scale=0.2)
    start = parts.plain(seed=0)
    for bits in (4, 2):
        chain = protocol.psg(protocol.grid(bits, momentum=0.1), 10.0 * bits)
        parts.late("psg", chain, start, seed=0)
    assert parts.compiled["psg"].one._cache_size() == 1
    scores = parts.scores(start, protocol.grid(2))
    assert set(scores) == {"file", "full precision", "low precision", "MSE", "re-estimated"}
    again = reestimated(parts.task, deploy(start, protocol.grid(2)).variables)
    assert scores["re-estimated"] == parts.accuracy(again)
    assert isinstance(parts.task.dataset.train, data.Split)


def test_activations_are_scored_with_ranges_from_batch_norm(monkeypatch):
    parts = make()
    fitted = []
    search = protocol.linen.search_batch_norm_range

    def kept(*args, **kwargs):
        fitted.append(search(*args, **kwargs))
        return fitted[-1]

    monkeypatch.setattr(protocol.linen, "search_batch_norm_range", kept)
    scores = parts.with_activations(parts.task.init(0), protocol.grid(8), 8)
    assert scores["activation bits"] == 8
    assert scores["n"] in (2, 3, 4, 5, 6, 8, 10, 12)
    assert abs(scores["accuracy"] - parts.accuracy(parts.task.init(0))) <= 10
    # The images go into the first layer as they are.
    ((variables, _),) = fitted
    assert set(variables["quant_stats"]) == {"Conv_1", "Dense_0"}
