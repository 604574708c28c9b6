"""Every line of the table of methods, at every width, on a network that trains in no time."""

import jax
import numpy as np
import pytest

from quantjax.core import qarray
from quantjax.encoded import storage
from quantjax.lab import methods
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
        plan = entry.plan(bits, TOTAL)
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
        methods.METHODS["alq"].plan(bits, TOTAL)
    assert "alq" in methods.DEFAULT
    assert "alq-0.5" not in methods.DEFAULT


@pytest.mark.parametrize("name", [name for name, entry in methods.METHODS.items() if entry.shared])
@pytest.mark.parametrize("bits", [0, 17])
def test_widths_out_of_range(name, bits):
    entry = methods.METHODS[name]
    with pytest.raises(ValueError, match=rf"bits must be a whole number in .*, got {bits}"):
        entry.plan(bits, TOTAL)
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
        assert float(numbers["strength"]) == methods.strength(bits)
        assert (float(numbers["weight_decay"]) > 0) is (bits > 2)  # none at 2 bits (appendix C)
    assert len({float(numbers["strength"]) for numbers in found.values()}) == 3


def test_strengths_of_other_widths_are_the_nearest_known_ones():
    known = methods.STRENGTHS
    assert [methods.strength(bits) for bits in (2, 3, 4)] == [known[2], known[3], known[4]]
    assert methods.strength(8) == known[4]


def test_find():
    assert methods.find("psg") is methods.METHODS["psg"]
    with pytest.raises(ValueError, match=r"unknown method 'psgd'; did you mean .*'psg'"):
        methods.find("psgd")
