"""Appendix F of SRQ as settings: schedules, images, masks, biases, the freezing of widths."""

import types

import jax
import numpy as np
import pytest

from experiments.srq import learned_grids, mnist, mnist_widths, table1, table2, table3
from quantjax.lab import data, models, plans
from quantjax.lab.recipes import Context
from quantjax.methods.srq import semi_relaxed
from tests.experiments.recipes_test import Tiny, noise

pytestmark = pytest.mark.usefixtures("quick_compilation")

PER_EPOCH = 10


class EnoughError(Exception):
    """Ends a recipe at a training."""


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(data, "load", noise)
    monkeypatch.setattr(models, "build", lambda name, classes: Tiny(classes))


@pytest.fixture
def fits(monkeypatch):
    """The methods and the first variables of trainings that do not happen."""
    fits = []

    def fit(task, method, variables, total, **kwargs):
        fits.append(types.SimpleNamespace(task=task, method=method, start=variables, total=total))
        raise EnoughError

    monkeypatch.setattr(learned_grids.engine, "fit", fit)
    return fits


def trained(fits, train, *args, **kwargs):
    with pytest.raises(EnoughError):
        train(*args, **kwargs)
    return fits.pop()


def rates(schedule, *epochs):
    return [float(schedule(int(epoch * PER_EPOCH))) for epoch in epochs]


def test_lenet_of_appendix_f(tiny):
    parts = learned_grids.paper_lenet(Context())
    assert (parts.model, parts.epochs, parts.weight_decay) == ("lenet5-wide", 100, 0.01)
    assert (parts.mask_rate, parts.biases) == (1, True)
    dataset = parts.task.dataset
    assert set(dataset.mean) == set(dataset.std) == {0.5}  # images in [-1, 1]
    assert not parts.task.augment
    schedule = parts.schedule(100 * PER_EPOCH, PER_EPOCH)
    expected = [5e-4, 5e-4, 5e-4, 4e-4, 3.2e-4, 5e-4 * 0.8**49]
    np.testing.assert_allclose(rates(schedule, 0, 49.9, 50, 51, 52.9, 99.9), expected, rtol=1e-5)


def test_vgg_of_appendix_f(tiny):
    parts = learned_grids.paper_vgg(Context())
    assert (parts.model, parts.epochs, parts.weight_decay) == ("vgg7", 300, 0.01)
    assert (parts.mask_rate, parts.biases) == (1, True)
    assert parts.task.augment
    assert parts.task.dataset.std == noise("cifar10").std
    schedule = parts.schedule(300 * PER_EPOCH, PER_EPOCH)
    expected = [1e-4, 1e-4, 1e-5, 1e-5, 9e-6, 1e-5 * 0.9**49]
    np.testing.assert_allclose(rates(schedule, 0, 149.9, 150, 250, 251, 299.9), expected, rtol=1e-5)
    assert semi_relaxed.MASK_PROBABILITY == 0.9
    assert semi_relaxed.MASK_DEVIATION == 0.01


def test_biases_begin_as_torch_has_them(tiny, fits):
    parts = learned_grids.paper_lenet(Context())
    fit = trained(fits, parts.train, "srq", *learned_grids.plain(3, "mode", biases=True), seed=0)
    params = fit.start["params"]
    bias = np.asarray(params["Dense_0"]["bias"])
    most = params["Dense_0"]["kernel"].shape[0] ** -0.5
    assert 0 < np.max(np.abs(bias)) <= most
    assert len(set(bias.tolist())) == bias.size
    assert not np.any(params["BatchNorm_0"]["bias"])  # beside no kernel
    floats = parts._replace(biases=False)
    fit = trained(fits, floats.train, "srq", *learned_grids.plain(3, "mode"), seed=0)
    assert not np.any(fit.start["params"]["Dense_0"]["bias"])


def test_learned_widths_freeze_at_half_and_those_of_a_twin_at_once(tiny, fits):
    parts = learned_grids.paper_lenet(Context(scale=0.1))
    assert parts.steps == 20
    params = parts.task.init(0)["params"]
    learned = trained(fits, parts.learned, 3, 1e-2, seed=0)
    assert learned.total == 20
    buffers = learned.method.quantizer.init(params).buffers
    assert {int(mine["freeze_after"]) for mine in buffers.values()} == {10}
    assert "Dense_0/bias" in buffers
    assert "estimator='mode'" in repr(learned.method.input_quantizer)
    assert "penalty=0.01" in repr(learned.method.quantizer)
    chosen = dict.fromkeys(buffers, 3) | {"Conv_1/kernel": 1, "Dense_0/kernel": 2}
    twin = trained(fits, parts.fixed, 3, chosen, seed=0)
    state = twin.method.quantizer.init(params)
    assert {path: int(mine["width"]) for path, mine in state.buffers.items()} == chosen
    assert {int(mine["freeze_after"]) for mine in state.buffers.values()} == {0}
    uniform = trained(fits, parts.fixed, 3, None, seed=0).method.quantizer.init(params)
    assert {int(mine["width"]) for mine in uniform.buffers.values()} == {3}


def test_masks_learn_faster_where_that_is_asked_for(tiny, fits):
    parts = learned_grids.paper_lenet(Context())._replace(schedule=lambda steps, per: 0.1)
    params = {"layer": {"kernel": np.ones((2, 2), np.float32)}}
    trainable = (params, {"layer/kernel": {"mask_logits": np.ones(2, np.float32)}}, {})
    moved = {}
    for rate in (1, 10):
        grids = parts._replace(mask_rate=rate)
        optimizer = trained(fits, grids.float_net, seed=0).method.optimizer
        state = optimizer.init(trainable)
        zero = jax.tree.map(np.zeros_like, trainable)
        kernel = optimizer.update(zero, state, trainable)[0][0]["layer"]["kernel"]
        np.testing.assert_allclose(kernel, -0.1 * 0.01, rtol=1e-6)  # weight decay alone
        updates, _ = optimizer.update(trainable, state, trainable)
        moved[rate] = updates[1]["layer/kernel"]["mask_logits"]
    np.testing.assert_allclose(moved[10], 10 * moved[1], rtol=1e-6)


def owned(quantizer, params):
    return set(jax.eval_shape(quantizer.init, params).buffers)


def test_a_short_schedule_warms_up_and_falls_to_zero():
    found = rates(learned_grids.short(1e-3)(200, PER_EPOCH), 0, 1, 10.5, 20)
    np.testing.assert_allclose(found, [1e-4, 1e-3, 5e-4, 0], rtol=1e-5, atol=1e-9)


def test_all_quantizers_of_the_tables_take_biases(monkeypatch):
    starts = []
    monkeypatch.setattr(table1, "annealed", lambda start: starts.append(start) or 1.0)
    params = {"Dense_0": {"kernel": np.ones((4, 2), np.float32), "bias": np.ones(2, np.float32)}}
    kinds = list(table1.kinds(3, table1.PAPER["mnist", 3]))
    assert [(name, paper) for name, _, _, paper in kinds] == [
        *(("RQ", 0.69), ("RQ, annealed", 0.74), ("Gumbel-Softmax, STE", 0.65)),
        *(("SRQ, mode", 0.67), ("SRQ + DropBits, mode", 0.58)),
        *(("SRQ, expectation", None), ("SRQ + DropBits, expectation", None)),
    ]
    for name, quantizer, inputs, _ in kinds:
        assert owned(quantizer, params) == {"Dense_0/kernel", "Dense_0/bias"}, name
        assert ("dropbits=True" in repr(quantizer)) is ("DropBits" in name)
        assert ("estimator='mode'" in repr(inputs)) is ("mode" in name)
    assert len(list(table1.kinds(2, table1.PAPER["mnist", 2]))) == 6  # none annealed
    assert len(list(table1.kinds(4, table1.PAPER["mnist", 4]))) == 7
    assert starts == [1.0, 2.0]


def test_widths_of_a_row_are_those_of_the_kernels():
    found = {"Conv_0/bias": 3, "Conv_0/kernel": 2, "Dense_0/bias": 3, "Dense_0/kernel": 1}
    assert learned_grids.Trained(0.0, found, None, None, None).named_widths == "2/T"


@pytest.mark.parametrize(("recipe", "rate"), [(mnist, plans.MASK_RATE), (mnist_widths, 60)])
def test_short_recipes_keep_float_biases_and_faster_masks(recipe, rate, tiny, monkeypatch):
    def float_net(grids, seed):
        assert (grids.mask_rate, grids.biases) == (rate, False)
        assert grids.task.dataset.std == (0.5,) * 3  # images in [-1, 1]
        raise EnoughError

    monkeypatch.setattr(learned_grids.Grids, "float_net", float_net)
    monkeypatch.setattr(learned_grids.Grids, "train", lambda grids, *args: float_net(grids, 0))
    with pytest.raises(EnoughError):
        next(iter(recipe.run(Context())))


class Row:
    """In place of a `Trained`."""

    widths: dict = {}  # noqa: RUF012

    def row(self, name, bits, seed):
        return {"row": name, "bits": bits}


def test_table_2_has_the_schedules_of_appendix_f(tiny, monkeypatch):
    asked = []

    def train(grids, name, quantizer, inputs, seed, start):
        schedule = grids.schedule(grids.epochs * PER_EPOCH, PER_EPOCH)
        assert (grids.mask_rate, grids.weight_decay, start) == (1, 0.01, "trained")
        assert "biases=True" in repr(quantizer)
        asked.append((name, grids.epochs, grids.batch_size, schedule))
        return Row()

    first = types.SimpleNamespace(plain=lambda seed: "trained", accuracy=lambda variables: 70.0)
    monkeypatch.setattr(table2.protocol, "make", lambda *args, **kwargs: first)
    monkeypatch.setattr(learned_grids.Grids, "train", train)
    rows = list(table2.run(Context()))
    assert rows[0]["error"] == 30.0
    assert [name for name, *_ in asked] == [
        *("RQ", "mode, 4", "expectation, 4"),
        *("mode, 3", "expectation, 3"),
    ]
    for name, epochs, batch_size, schedule in asked:
        if name.endswith("3"):
            assert (epochs, batch_size) == (80, 256)
            found = rates(schedule, 0, 49, 51, 59, 61, 67, 69)
            expected = [2e-5, 2e-5, 1e-5, 1e-5, 5e-6, 5e-6, 2.5e-6]
        else:
            assert (epochs, batch_size) == (150, 128)
            found, expected = rates(schedule, 0, 124, 126, 149), [5e-6, 5e-6, 1e-6, 1e-6]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_table_3_learns_under_two_penalties_and_trains_twins(tiny, monkeypatch):
    asked = []

    def learned(grids, bits, penalty, seed):
        asked.append((grids.model, grids.weight_decay, bits, penalty))
        return Row()

    monkeypatch.setattr(learned_grids.Grids, "learned", learned)
    monkeypatch.setattr(learned_grids.Grids, "fixed", lambda grids, bits, widths, seed: Row())
    rows = list(table3.run(Context()))
    assert asked == [
        (model, decay, bits, penalty)
        for model, decay in (("lenet5-wide", 0.01), ("vgg7", 0.02))
        for bits in (4, 3, 2)
        for penalty in (1e-3, 1e-2)
    ]
    first = [(row["row"], row["paper"]["error"]) for row in rows[:5]]
    assert first == [
        ("mnist: uniform width", 0.53),
        ("mnist: learned widths, penalty 0.001", 0.52),
        ("mnist: fixed twin, penalty 0.001", 0.55),
        ("mnist: learned widths, penalty 0.01", 0.58),
        ("mnist: fixed twin, penalty 0.01", 0.59),
    ]
