"""The settings of PSG's recipes, on stand-ins that keep what they are asked to train."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.psg import (
    mnist,
    protocol,
    strength_search,
    table_a1,
    table_a2,
    table_a3,
    table_a4,
    table_a7,
    table_a8,
)
from quantjax.lab.recipes import Context

PARAMS = {
    "Conv_0": {"kernel": jnp.asarray([[1.0, -2.0], [3.0, 4.0]])},
    "Conv_1": {"kernel": jnp.asarray([[-5.0, 6.0, 7.0], [8.0, -9.0, 10.0]])},
    "Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
}


class Parts:
    """In place of a `Protocol`: networks are their names."""

    def __init__(self):
        self.trained = []
        self.context = Context()

    def plain(self, seed, optimizer=None):
        self.trained.append(("plain", seed, optimizer))
        return f"start {seed}"

    def late(self, name, optimizer, start, seed):
        self.trained.append((name, seed, start, optimizer))
        return f"{name} of {start}"

    def accuracy(self, variables):
        return 50.0

    def scores(self, variables, quantizer):
        return {"low precision": 50.0, "network": variables}

    def with_activations(self, variables, quantizer, bits):
        return {"activation bits": bits}


@pytest.fixture
def parts(monkeypatch):
    """What a recipe gets; the arguments that it was made with are in its `made`."""
    parts = Parts()

    def make(context, dataset, model, **schedule):
        parts.made = {"dataset": dataset, "model": model, **schedule}
        return parts

    monkeypatch.setattr(protocol, "make", make)
    return parts


@pytest.fixture
def searches(monkeypatch):
    """The searches of a recipe; every one takes the last candidate."""
    searches = []

    class Search:
        def __init__(self, parts, seed):
            self.parts, self.seed = parts, seed

        def choose(self, candidates, train, quantizer):
            assert train(Parts(), "held-out start", 7.0).endswith("of held-out start")
            searches.append((self.seed, tuple(candidates)))
            return strength_search.Found(candidates[-1], {}, {"row": "found"})

    monkeypatch.setattr(strength_search, "begin", Search)
    return searches


def numbers(optimizer):
    """Returns the strength, the weight decay and the kind of scale of a chain."""
    found = optimizer(lambda step: 0.1).init(PARAMS).hyperparams
    return {name: float(found[name]) for name in ("strength", "weight_decay")}


def strengths(parts):
    """Returns the strengths of all trainings by PSG."""
    late = [args for args in parts.trained if args[0] not in ("plain", "sgd")]
    return [numbers(optimizer)["strength"] for *_, optimizer in late]


def widths(quantizer):
    """Returns the width of every owned leaf."""
    buffers = quantizer.init(PARAMS).buffers
    return {path: (int(jnp.max(mine["limit"])) + 1).bit_length() for path, mine in buffers.items()}


@pytest.mark.parametrize("table", [table_a1, table_a4])
def test_ends_keep_eight_bits_below_four_and_two_bits_have_no_decay(table):
    for bits in (4, 3, 2):
        ends = 8 if bits < 4 else bits
        layers = {"Conv_0/kernel": ends, "Dense_0/kernel": ends, "Dense_0/bias": ends}
        assert widths(table.target(bits)) == {**layers, "Conv_1/kernel": bits}
        parts = Parts()
        table.psg(parts, "start", 30.0, bits, seed=1)
        ((name, seed, start, optimizer),) = parts.trained
        assert (seed, start) == (1, "start")
        decay = pytest.approx(0.0 if bits == 2 else 1e-4)
        assert numbers(optimizer) == {"strength": 30.0, "weight_decay": decay}
        assert (name == "psg") is (bits == 4)  # partitions are programs of their own


def test_a1_searches_at_three_and_two_bits_and_takes_the_papers_strength_elsewhere(parts, searches):
    rows = list(table_a1.run(Context(seeds=(5, 6))))
    assert parts.made["model"] == "resnet32"
    assert parts.made["rates"] == {0: 0.1, 82: 0.01, 123: 0.001}
    assert (parts.made["switch"], parts.made["end"]) == (82, 150)
    assert searches == [(5, table_a1.CANDIDATES[bits]) for bits in (3, 2)]
    psg = [row for row in rows if row["row"] == "PSG"]
    assert [(row["seed"], row["bits"], row["strength"]) for row in psg] == [
        (seed, bits, strength)
        for seed in (5, 6)
        for bits, strength in ((8, 150.0), (6, 150.0), (4, 150.0), (3, 400.0), (2, 400.0))
    ]
    assert strengths(parts) == [row["strength"] for row in psg]
    assert all(row["network"].endswith(f"of start {row['seed']}") for row in psg)


def test_a1_without_these_widths_searches_nothing(parts, searches):
    rows = list(table_a1.run(Context(bits=(8,))))
    assert [row["row"] for row in rows] == ["at the switch", "SGD, rounded", "PSG"]
    assert searches == []


def test_a2_has_no_decay_and_two_kinds_of_scale(parts, searches, monkeypatch):
    kinds = []
    psg = protocol.psg
    monkeypatch.setattr(protocol, "psg", lambda *a, **kw: kinds.append(kw) or psg(*a, **kw))
    rows = list(table_a2.run(Context(seeds=(5, 6))))
    assert (parts.made["switch"], parts.made["end"]) == (75, 90)
    assert parts.made["rates"] == {0: 0.1, 30: 0.01, 60: 0.001}
    assert searches == [(5, candidates) for candidates in table_a2.CANDIDATES.values()]
    assert [kind["directional"] for kind in kinds] == [False, True] * 3
    assert {kind["weight_decay"] for kind in kinds} == {0.0}
    trained = [row for row in rows if "paper" in row]
    assert [(row["row"], row["strength"], row["activation bits"]) for row in trained] == [
        ("independent", 1000.0, 8),
        ("directional", 25.0, 8),
    ] * 2
    assert strengths(parts) == [1000.0, 25.0] * 2


def test_a3_scales_before_adam_and_multiplies_its_rate(parts):
    list(table_a3.run(Context()))
    assert parts.made["rates"] == {0: 1e-3, 82: 1e-4, 123: 1e-5}
    assert [optimizer for *_, optimizer in parts.trained] == [
        *(table_a3.adam, table_a3.adam, table_a3.scaled_adam)
    ]
    # Adam's first step is the rate, whatever the gradient: 1e-2 lambda_s times the plain one's.
    grads = {name: {leaf: 0.5 + x for leaf, x in of.items()} for name, of in PARAMS.items()}
    steps = {}
    for make in (table_a3.adam, table_a3.scaled_adam):
        optimizer = make(lambda step: 1e-3)
        updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
        steps[make] = float(jnp.max(jnp.abs(updates["Conv_1"]["kernel"])))
    assert steps[table_a3.adam] == pytest.approx(1e-3, rel=1e-3)
    for make, rate in ((table_a3.adam, 1e-3), (table_a3.scaled_adam, 1.5e-3)):  # decay alone
        optimizer = make(lambda step: 1e-3)
        zero = jax.tree.map(jnp.zeros_like, PARAMS)
        updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
        np.testing.assert_allclose(updates["Dense_0"]["kernel"], -rate, rtol=1e-3)
    assert steps[table_a3.scaled_adam] == pytest.approx(1.5e-3, rel=1e-3)


def test_a4_searches_once_per_pair_of_widths(parts, searches):
    rows = list(table_a4.run(Context(seeds=(5, 6))))
    assert parts.made["model"] == "vgg16-bn"
    assert parts.made["rates"] == {0: 0.1, 82: 0.01, 145: 0.001}
    assert searches == [(5, table_a4.CANDIDATES)] * 3
    psg = [row for row in rows if row["row"] == "PSG"]
    assert [(row["bits"], row["activation bits"]) for row in psg] == [(4, 4), (3, 8), (2, 8)] * 2
    assert {row["strength"] for row in psg} == {450.0} == set(strengths(parts))


def test_a7_has_the_tables_strengths_and_no_decay_from_eighty_percent(parts, monkeypatch):
    cuts = []
    monkeypatch.setattr(table_a7, "cut", lambda params, share: cuts.append(share))
    monkeypatch.setattr(
        Parts, "late", lambda self, *args: self.trained.append(args) or {"params": PARAMS}
    )
    list(table_a7.run(Context()))
    assert (parts.made["switch"], parts.made["end"]) == (82, 200)
    assert cuts == [0.2, 0.5, 0.7, 0.8, 0.9] * 2
    found = [numbers(args[1]) for args in parts.trained if args[0] == "psg"]
    assert [mine["strength"] for mine in found] == [100.0, 100.0, 200.0, 600.0, 1200.0]
    assert [mine["weight_decay"] > 0 for mine in found] == [True, True, True, False, False]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_a7_cuts_the_share_of_all_kernels_together(share):
    params = {name: PARAMS[name] for name in ("Conv_0", "Conv_1")}
    sparse = table_a7.cut({**params, "Dense_0": {"bias": jnp.full(2, 0.5)}}, share)
    values = np.concatenate([np.ravel(sparse[name]["kernel"]) for name in params])
    whole = np.concatenate([np.ravel(params[name]["kernel"]) for name in params])
    np.testing.assert_array_equal(values, np.where(np.abs(whole) > 10 * share, whole, 0))
    np.testing.assert_array_equal(sparse["Dense_0"]["bias"], 0.5)


def test_a8_has_strength_ten_at_all_widths(parts):
    rows = list(table_a8.run(Context()))
    assert (parts.made["dataset"], parts.made["model"]) == ("cifar10", "resnet18")
    assert (parts.made["switch"], parts.made["end"]) == (75, 90)
    found = [numbers(args[3]) for args in parts.trained if args[0] == "psg"]
    assert found == [{"strength": 10.0, "weight_decay": pytest.approx(1e-4)}] * 3
    assert [(row["bits"], row["activation bits"]) for row in rows] == [(8, 8), (6, 6), (4, 4)] * 2


def test_mnist_trains_six_epochs_and_below_four_bits_all_of_them_by_psg(parts):
    made = protocol.mnist(Context())
    assert (parts.made["dataset"], parts.made["model"]) == ("mnist", "lenet5")
    assert parts.made["rates"] == {0: 0.03, 4: 0.01, 5: 0.002}
    assert (parts.made["switch"], parts.made["end"], parts.made["augment"]) == (4, 6, False)
    made.task = types.SimpleNamespace(init=lambda seed: f"first {seed}")
    made._replace = lambda switch: made if switch == 0 else None
    for bits in (4, 3, 2):
        protocol.mnist_psg(made, bits, 30.0, 1, "at the switch")
    assert [args[:3] for args in made.trained] == [
        ("psg", 1, "at the switch"),
        ("psg, all epochs", 1, "first 1"),
        ("psg, all epochs", 1, "first 1"),
    ]
    found = [numbers(args[3])["weight_decay"] for args in made.trained]
    assert found == pytest.approx([1e-4, 1e-4, 0.0])


def test_mnist_takes_the_strength_of_a_width(parts, monkeypatch):
    asked = []
    monkeypatch.setattr(protocol, "mnist_psg", lambda parts, *args: asked.append(args))
    monkeypatch.setattr(mnist, "row", lambda *args: {})
    list(mnist.run(Context(seeds=(5, 6))))
    assert asked == [
        (bits, strength, seed, f"start {seed}")
        for seed in (5, 6)
        for bits, strength in ((4, 400.0), (3, 80.0), (2, 20.0))
    ]
