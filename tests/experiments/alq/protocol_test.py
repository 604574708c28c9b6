"""The settings of ALQ's recipes: structures, schedules, what they leave, the L2 norm."""

import math
import types

import jax
import pytest

import quantjax as qj
from experiments.alq import ablation, mnist, protocol, table1, table2, table3, table4, training
from quantjax.lab import data
from quantjax.lab.recipes import Context
from tests.experiments.alq.training_test import shapes_of
from tests.experiments.recipes_test import noise

IMAGES = {"lenet5": (1, 28, 28, 1), "vgg-small": (1, 32, 32, 3), "resnet18": (1, 32, 32, 3)}


@pytest.fixture(autouse=True)
def noisy(monkeypatch):
    monkeypatch.setattr(data, "load", noise)


def groups(parts):
    """Returns the shapes of a network's coordinates by path, by the protocol's structures."""
    images = jax.ShapeDtypeStruct(IMAGES[parts.model], "float32")
    params = jax.eval_shape(parts.task.model.init, jax.random.key(0), images)["params"]
    return shapes_of(params, **parts.structures)


def test_structures_of_the_networks():
    lenet = groups(protocol.mnist(Context(), 0))
    assert lenet == {
        "Conv_0/kernel": (1, 1, 1, 20),
        "Conv_1/kernel": (1, 1, 20, 50),  # kernelwise
        "Dense_0/kernel": (2, 1, 500),
        "Dense_1/kernel": (1, 5),
    }
    vgg = groups(protocol.cifar10_vgg(Context(), 0))
    assert vgg["Conv_0/kernel"] == (1, 1, 1, 128)  # channelwise
    assert vgg["Conv_1/kernel"] == (3, 3, 1, 128)  # pixelwise
    assert [vgg[f"Dense_{i}/kernel"] for i in range(3)] == [(16, 1, 1024), (2, 1, 1024), (2, 1, 5)]
    resnet = groups(protocol.resnet18(Context(), 0))
    assert resnet["Conv_0/kernel"] == (1, 1, 1, 64)
    assert resnet["BasicBlock_0/Conv_0/kernel"] == (3, 3, 1, 64)
    assert resnet["Dense_0/kernel"] == (2, 1, 5)


def test_images_of_the_networks(monkeypatch):
    made = []
    monkeypatch.setattr(protocol, "make", lambda *args, **kwargs: made.append(kwargs))
    for make in (protocol.mnist, protocol.cifar10_vgg, protocol.resnet18):
        make(Context(), 0)
    assert [kwargs["validation"] for kwargs in made] == [10_000, 5_000, 5_000]
    assert [kwargs.get("batch_size", 128) for kwargs in made] == [128, 128, 256]
    assert [kwargs.get("augment", True) for kwargs in made] == [False, True, True]


def left(schedule, bits):
    """Returns the bits that a schedule leaves, groups of all sizes alike."""
    return bits * math.prod(phase.keep for phase in schedule if phase.kind == "prune")


def rounds(schedule):
    return sum(phase.kind == "prune" for phase in schedule)


def test_schedules_lead_to_the_widths_beside_them():
    for round_count, target in ((5, 0.66), (6, 0.40)):
        schedule = table3.schedule(round_count)(10)
        assert left(schedule, table3.BITS) == pytest.approx(target)
        assert rounds(schedule) == round_count
    assert (table3.BITS, table4.BITS, table2.BITS) == (6, 8, 8)  # section 5.1
    for target in table4.TARGETS:
        assert left(table4.schedule(target, 50)(10), table4.BITS) == pytest.approx(target)
    assert rounds(table4.schedule(1, 0)(10)) == 9
    assert left(table2.schedule(10), table2.BITS) == pytest.approx(8 * 0.6**6)
    assert left(mnist.schedule(100), mnist.BITS) == pytest.approx(2 * 0.5 * 0.52 * 0.87)
    assert left(ablation.adaptive(100), ablation.BITS) == pytest.approx(1, abs=0.1)


def epochs(schedule, kind, per_epoch=10):
    return sum(phase.steps for phase in schedule if phase.kind == kind) / per_epoch


def test_epochs_of_appendix_c():
    lenet, vgg, resnet = table2.schedule(10), table3.schedule(5)(10), table4.schedule(2, 50)(10)
    assert [epochs(way, "basis") for way in (lenet, vgg, resnet)] == [6 * 10 + 10, 50, 45]
    assert [epochs(way, "coordinate") for way in (lenet, vgg, resnet)] == [6 * 20 + 20, 100, 90]
    assert epochs(resnet, "ste-loss-aware") == 50
    assert {phase.learning_rate for phase in vgg if phase.kind == "basis"} == {1e-3, 1e-4}
    assert {phase.learning_rate for phase in vgg if phase.kind == "coordinate"} == {1e-4, 1e-5}


def test_rates_and_lengths_of_the_short_recipes():
    schedule = mnist.schedule(100)
    assert sum(phase.steps for phase in schedule) == 575
    found = [phase.learning_rate for phase in schedule if phase.kind == "basis"]
    assert found == pytest.approx([5e-3, 5e-4] * 3)
    ways = {name: schedule(100) for name, (schedule, _) in ablation.ROWS.items()}
    assert {sum(phase.steps for phase in way) for way in ways.values()} == {350}
    assert rounds(ways["uniform"]) == rounds(ways["uniform, bases alone"]) == 0
    assert rounds(ways["adaptive"]) == rounds(ways["adaptive, straight-through"]) == 2
    assert {(p.kind, p.learning_rate) for p in ways["uniform, straight-through"]} == {
        ("ste-reconstruction", 1e-3)
    }


def test_the_float_network_is_trained_with_momentum_and_decay(monkeypatch):
    fits = []

    def fit(task, method, variables, total, **kwargs):
        fits.append((method.optimizer, total))
        return types.SimpleNamespace(variables=variables)

    monkeypatch.setattr(protocol.engine, "fit", fit)
    parts = protocol.mnist(Context(), 0)
    monkeypatch.setattr(type(parts.task), "init", lambda task, seed: "first")
    assert parts.full_precision(0) == "first"
    ((optimizer, total),) = fits
    assert total == 8 * parts.per_epoch
    params = {"kernel": jax.numpy.ones((2, 2))}
    state, first = optimizer.init(params), None
    for expected in (1.0, 1.9 * (1 + math.cos(math.pi / total)) / 2):
        updates, state = optimizer.update(params, state, params)
        first = updates["kernel"][0, 0] if first is None else first
        assert float(updates["kernel"][0, 0] / first) == pytest.approx(expected, rel=1e-5)
    assert float(first) == pytest.approx(-0.03 * (1 + 1e-4))


class Parts:
    """In place of a `Protocol`."""

    def __init__(self):
        self.trained = []

    def _replace(self, **changes):
        return self

    def full_precision(self, seed):
        return "start"

    def float_row(self, start, seed):
        return {"row": "full precision"}

    def alq(self, start, schedule, bits, seed, **kwargs):
        self.trained.append((schedule(10), bits, kwargs))
        return "outcome"

    def row(self, name, outcome, seed):
        return {"row": name}


@pytest.fixture
def parts(monkeypatch):
    parts = Parts()
    for name in ("mnist", "cifar10_vgg", "resnet18"):
        monkeypatch.setattr(protocol, name, lambda *args, **kwargs: parts)
    made = {name: (lambda *args: parts, *rest) for name, (_, *rest) in table1.NETWORKS.items()}
    monkeypatch.setattr(table1, "NETWORKS", made)
    return parts


@pytest.mark.parametrize("table", [table1, table2, table3, table4])
def test_tables_have_an_l2_norm_on_coordinates(table, parts):
    list(table.run(Context()))
    assert parts.trained
    for _, _, kwargs in parts.trained:
        assert kwargs == {"weight_decay": protocol.COORDINATE_DECAY}
    assert protocol.COORDINATE_DECAY > 0


@pytest.mark.parametrize("recipe", [mnist, ablation])
def test_short_recipes_have_none(recipe, parts):
    list(recipe.run(Context()))
    assert parts.trained
    for _, _, kwargs in parts.trained:
        assert "weight_decay" not in kwargs


def test_table_1_puts_uniform_widths_beside_the_papers_averages(parts):
    list(table1.run(Context()))
    vgg, uniform_vgg, resnet, uniform_resnet = parts.trained
    assert left(vgg[0], vgg[1]) == pytest.approx(0.66)
    assert left(resnet[0], resnet[1]) == pytest.approx(2.0)
    assert (vgg[1], resnet[1]) == (6, 8)
    assert (uniform_vgg[1], uniform_resnet[1]) == (1, 2)
    for adaptive, uniform in ((vgg, uniform_vgg), (resnet, uniform_resnet)):
        assert rounds(uniform[0]) == 0
        assert sum(p.steps for p in uniform[0]) == sum(p.steps for p in adaptive[0])
    assert [epochs(resnet[0], kind) for kind in ("basis", "coordinate")] == [45, 90]


def test_the_norm_reaches_the_transformation(monkeypatch):
    class EnoughError(Exception):
        pass

    def alq(quantizer, schedule, **kwargs):
        raise EnoughError(kwargs)

    monkeypatch.setattr(training.qj, "alq", alq)
    parts = protocol.mnist(Context(), 0)
    start = {"params": {"Dense_0": {"kernel": jax.numpy.ones((4, 2))}}}
    with pytest.raises(EnoughError, match=r"'weight_decay': 0\.25"):
        parts.alq(start, qj.alq_rounds, 1, 0, weight_decay=0.25)
