"""Every line of the table of methods, at every width, on a network that trains in no time."""

import jax
import numpy as np
import pytest

from quantjax.core import qarray
from quantjax.encoded import storage
from quantjax.lab import methods, plans
from quantjax.lab.deploy import deploy
from quantjax.lab.train import engine
from tests.lab.train import toy_task

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTHS = (4, 3, 2)
TOTAL = 4


@pytest.fixture(scope="module")
def task():
    return toy_task.make(train=32)


def fit(task, method, steps):
    start = toy_task.start(task)
    return engine.fit(task, method, start, TOTAL, batch_size=16, seed=0, steps=steps)


def layout(tree):
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "alq-0.5"])
def test_every_method_trains_and_ships_at_every_width(name, task, tmp_path):
    entry = methods.METHODS[name]
    steps, layouts, ends = None, [], {}
    widths = entry.chosen(WIDTHS)
    usual = WIDTHS if 2 in entry.widths else (4, 3)
    assert widths == {"pruned": (32,), "ternary": (2,), "binary": (1,)}.get(name, usual)
    for bits in widths if entry.shared else widths[-1:]:
        plan = methods.plan_of(name, bits, TOTAL)
        variables, state = toy_task.start(task), None
        if plan.method is not None:
            # The first width's program serves the others.
            if steps is None or not entry.shared:
                steps = engine.make_steps(task, plan.method)
            start = engine.init_state(task, variables, plan.method, seed=0)
            layouts.append(layout(start._replace(key=None)))
            end = fit(task, plan.method, steps)
            variables, state = end.variables, end.state
            ends[bits] = end
        shipped = (
            deploy(variables, plan.method.quantizer, state)
            if plan.deploy is None
            else deploy(variables, plan.deploy, plan.trained and plan.trained(end.opt_state))
        )
        if plan.trained is None:
            assert shipped.bits == bits
        else:  # an average over groups of several sizes
            assert shipped.bits == pytest.approx(bits, rel=0.25)
        for leaf in jax.tree.leaves(shipped.variables):
            assert np.all(np.isfinite(leaf))
        storage.save(tmp_path / "net", {**shipped.variables, "params": shipped.encoded})
        loaded = qarray.decode(storage.load(tmp_path / "net"))
        jax.tree.map(np.testing.assert_array_equal, loaded, dict(shipped.variables))
    if steps is None or not entry.shared:
        return
    assert all(other == layouts[0] for other in layouts)
    assert steps.one._cache_size() == 1
    # The shared program holds nothing of the width that it was compiled for.
    plan = entry.plan(widths[-1], TOTAL)
    own = fit(task, plan.method, engine.make_steps(task, plan.method))
    for a, b in zip(
        jax.tree.leaves(own.variables), jax.tree.leaves(ends[widths[-1]].variables), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_widths_of_alq(bits):
    with pytest.raises(ValueError, match=rf"whole number in 1\.\.8, got {bits}"):
        methods.plan_of("alq", bits, TOTAL)
    assert "alq" in methods.DEFAULT
    assert "alq-0.5" not in methods.DEFAULT
    assert 1 + len(methods.DEFAULT) <= 8  # with full precision


@pytest.mark.parametrize("name", [name for name, entry in methods.METHODS.items() if entry.shared])
@pytest.mark.parametrize("bits", [0, 17])
def test_widths_out_of_range(name, bits):
    entry = methods.METHODS[name]
    with pytest.raises(ValueError, match=rf"bits must be a whole number in .*, got {bits}"):
        methods.plan_of(name, bits, TOTAL)
    with pytest.raises(ValueError, match=rf"bits must be a whole number in 1\.\.16, got {bits}"):
        entry.chosen((4, bits))
    for allowed in entry.widths if len(entry.widths) > 1 else ():
        assert entry.chosen((allowed,)) == (allowed,)


def test_usual_widths():
    usual = {name: entry.chosen(None) for name, entry in methods.METHODS.items()}
    assert usual["psg"] == (2,)
    assert usual["focused"] == usual["psg-sparse"] == (5,)
    assert usual["pruned"] == (32,)
    assert usual["alq"] == (2,)
    assert usual["alq-0.5"] == (1,)
    assert methods.METHODS["psg"].chosen((1, 4)) == (4,)


def test_widths_change_what_is_trained():
    """The strength and the weight decay of a width are in the state."""
    found = {}
    for bits in WIDTHS:
        chain = methods.METHODS["psg"].plan(bits, TOTAL).method.optimizer
        found[bits] = chain.init({"kernel": np.ones((2, 2), np.float32)}).hyperparams
    for bits, numbers in found.items():
        assert float(numbers["strength"]) == plans.strength_of(bits)
        assert (float(numbers["weight_decay"]) > 0) is (bits > 2)  # none at 2 bits (appendix C)
    assert len({float(numbers["strength"]) for numbers in found.values()}) == 3


def test_strengths_of_other_widths_are_the_nearest_known_ones():
    known = plans.STRENGTHS
    assert [plans.strength_of(bits) for bits in (2, 3, 4)] == [known[2], known[3], known[4]]
    assert plans.strength_of(8) == known[4]


def test_find():
    assert methods.find("psg") is methods.METHODS["psg"]
    with pytest.raises(ValueError, match=r"unknown method 'psgd'; did you mean .*'psg'"):
        methods.find("psgd")


def test_which_rows_start_from_the_first_weights():
    starts = {}
    for name, entry in methods.METHODS.items():
        starts.setdefault(entry.start, set()).add(name)
    assert starts["none"] == {"sgd", "sgd-least-error"}
    assert starts["scratch"] == {"psg-scratch", "psg-directional", "psg-adam"}
    # All trained rows have the same steps, those of the network that they start from included.
    assert {methods.METHODS[name].steps(7) for name in starts["trained"]} == {7}
    assert {methods.METHODS[name].steps(7) for name in starts["scratch"]} == {14}


def test_learned_widths_freeze_at_half():
    quantizer = methods.METHODS["dropbits-learned"].plan(3, 10).method.quantizer
    buffers = quantizer.init({"kernel": np.ones((2, 2), np.float32)}).buffers["kernel"]
    assert int(buffers["freeze_after"]) == 5


def test_mask_logits_alone_learn_faster():
    updates = ({"kernel": 1.0}, {"kernel": {"mask_logits": 1.0, "log_alpha": 1.0}})
    for factor, transformation in ((10, plans.faster_masks()), (3, plans.faster_masks(3))):
        found, _ = transformation.update(updates, transformation.init(updates))
        assert found == ({"kernel": 1.0}, {"kernel": {"mask_logits": factor, "log_alpha": 1.0}})


def first_step(optimizer, gradient, weight=0.5):
    """Returns what the first step does to a weight among others."""
    params = {"kernel": np.asarray([[1.0, weight]], np.float32)}
    gradients = {"kernel": np.full((1, 2), gradient, np.float32)}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return float(updates["kernel"][0, 1])


def test_settings_of_the_pruned_rows():
    def quantizer(name, bits=5):
        return repr(methods.METHODS[name].plan(bits, 160).method.quantizer)

    assert quantizer("pruned", 32) == "magnitude(0.2, end=120, every=3, across=True)"
    # Pruned in the first third; fitted anew after 1, 3, 7 and 15 sixteenths.
    pruned = "magnitude(0.2, end=53, every=3, across=True)"
    expected = f"chain({pruned}, focused(5, refit_every=10))"
    assert quantizer("focused") == expected
    plan = methods.METHODS["psg-sparse"].plan(5, 160)
    assert repr(plan.deploy) == "chain(magnitude(0.2, across=True), focused(5))"
    assert first_step(plan.method.optimizer, 0.0) == 0  # no weight decay
    rate, strength = 0.0005, plans.SPARSE_STRENGTH
    found = first_step(plan.method.optimizer, 1.0)
    assert found == pytest.approx(-rate * strength * 0.5)  # its distance from zero


def test_settings_of_the_rows_of_learned_grids(monkeypatch):
    for name, told in (
        ("srq", "srq(3)"),
        ("srq+dropbits", "srq(3, dropbits=True)"),
        ("dropbits-learned", "srq(3, learn_bits=True, freeze_after=80, penalty=0.01)"),
    ):
        plan = methods.METHODS[name].plan(3, 160)
        assert told in repr(plan.method.quantizer), name
    params = {"kernel": np.ones((2, 2), np.float32)}
    zero = jax.tree.map(np.zeros_like, params)
    optimizer = methods.METHODS["srq"].plan(3, 160).method.optimizer
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -1e-4 * 0.01, rtol=1e-5)  # rate, then decay


def test_a_large_eps_keeps_the_distance_in_adam():
    optimizer = methods.METHODS["psg-adam"].plan(2, 160).method.optimizer
    # 0.5 is half a step from its level: with this gradient Adam's ratio is s / (s + eps) = 1 / 2.
    assert first_step(optimizer, 2e-4) == pytest.approx(-0.01 / 2, rel=1e-3)


def test_parq_is_on_the_grid_for_the_last_quarter(monkeypatch):
    seen = []
    lib = plans.proximal_lib
    annealed = lib.annealed
    monkeypatch.setattr(lib, "annealed", lambda steps: seen.append(steps) or annealed(steps))
    methods.METHODS["parq"].plan(2, 160)
    assert seen == [120]


@pytest.mark.parametrize(
    ("name", "bits", "start", "average"),
    [
        ("alq", 1, 2, 1),
        ("alq", 2, 3, 2),
        ("alq", 5, 6, 5),
        ("alq", 8, 8, 8),
        ("alq-0.5", 1, 2, 0.5),
    ],
)
def test_alq_begins_a_bit_higher_and_prunes_to_the_average(name, bits, start, average, monkeypatch):
    schedules = []
    alq = plans.alq

    def kept(quantizer, schedule):
        schedules.append(schedule)
        return alq(quantizer, schedule)

    monkeypatch.setattr(plans, "alq", kept)
    plan = methods.METHODS[name].plan(bits, 160)
    assert f"multi_bit({start}, " in repr(plan.deploy)
    (schedule,) = schedules
    left = np.prod([phase.keep for phase in schedule if phase.kind == "prune"])
    assert start * left == pytest.approx(average)
    assert sum(phase.kind == "prune" for phase in schedule) == 3
    assert sum(phase.steps for phase in schedule) <= 160
    rates = {phase.learning_rate for phase in schedule if phase.kind == "coordinate"}
    assert sorted(rates) == pytest.approx([3e-5, 3e-4])


def test_full_precision_is_sgd_with_decay_along_a_cosine():
    optimizer = plans.full_precision(160).optimizer
    assert first_step(optimizer, 1.0) == pytest.approx(-0.05 * (1 + 1e-4 * 0.5))
