"""Steps that are not finite, and what is said of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.core.quantizer import leafwise
from quantjax.lab.train import checkpoints, engine, guards, session
from quantjax.lab.train.engine import Method
from quantjax.lab.train.tasks import cross_entropy
from tests.lab.train import toy_task

pytestmark = pytest.mark.usefixtures("quick_programs")
BAD_EXAMPLE = 37  # its batch is that of step 3 with seed 0


def poisoned(value=np.nan):
    """The toy task with one training image whose loss is not finite: its label is 3."""
    task = toy_task.make(batch_norm=False)
    labels = task.dataset.train.labels.copy()
    labels[BAD_EXAMPLE] = 3
    train = task.dataset.train._replace(labels=labels)

    def measure(outputs, labels):
        losses, hits = cross_entropy(outputs, jnp.minimum(labels, 2))
        return jnp.where(labels == 3, value, losses), hits

    return task._replace(dataset=task.dataset._replace(train=train), measure=measure)


def bad_step(total=4):
    batches = engine._Batches(64, 16, 0)
    return next(step for step in range(total) if BAD_EXAMPLE in batches.at(step))


def reports(task, method, total=4, scan=False, state=None):
    if state is None:
        state = engine.init_state(task, toy_task.start(task), method, seed=0)
    steps = engine.make_steps(task, method)
    return engine.train(
        task, steps, state, total, batch_size=16, seed=0, every=1 if not scan else 4, scan=scan
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("scan", [False, True])
def test_a_loss_that_is_not_finite_stops_and_says_in_which_step(value, scan, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 4)
    told = rf"training: step {bad_step() + 1} is not finite, first in the loss"
    with pytest.raises(FloatingPointError, match=told):
        list(reports(poisoned(value), Method(optax.sgd(0.1)), scan=scan))


def test_the_layer_is_named_and_what_came_before_the_step_is_kept(tmp_path):
    """A quantizer whose second layer has no gradient from its third update on."""

    def apply(leaf, learned, buffers, key):
        return leaf * jnp.where(buffers["count"] == 2, buffers["bad"], 1)

    quantizer = leafwise(
        lambda path, leaf, key: (
            {}, {"count": jnp.zeros(()), "bad": jnp.where("Dense_1" in path, jnp.inf, 1.0)}
        ),
        apply,
        apply,
        lambda leaf, learned, buffers, key: {**buffers, "count": buffers["count"] + 1},
    )  # fmt: skip
    task, method = toy_task.make(batch_norm=False), Method(optax.sgd(0.1), quantizer)
    with pytest.raises(FloatingPointError, match=r"step 3 .* the output of Dense_1 \(\d+ of 48"):
        list(reports(task, method))
    # Nothing of the step is in a checkpoint, and resuming meets it again.
    seen = []

    def run(resume):
        journal = checkpoints.Journal(tmp_path / "run", {}, resume=resume, seconds=0)
        with session.use(session.Session(journal=journal)):
            state = engine.init_state(task, toy_task.start(task), method, seed=0)
            engine.run(
                task,
                engine.make_steps(task, method),
                state,
                4,
                batch_size=16,
                seed=0,
                every=1,
                observe=lambda report: seen.append(report.steps),
            )

    for resume in (False, True):
        with pytest.raises(FloatingPointError):
            run(resume)
    assert seen == [1, 2]


def test_a_weight_that_overflows_is_named():
    task = toy_task.make(batch_norm=False)
    huge = optax.chain(optax.sgd(1.0), optax.scale(3e38), optax.scale(1e3))
    with pytest.raises(FloatingPointError, match=r"step 1 .* the next value of params/Dense_0/"):
        list(reports(task, Method(huge)))


@pytest.mark.parametrize("scan", [False, True])
def test_skipped_steps_change_nothing_but_the_count(scan, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 4)
    task, method = poisoned(), Method(optax.sgd(0.1, momentum=0.9), qj.uniform(4, momentum=0.1))
    with session.use(session.Session(on_nan="skip")):
        found = list(reports(task, method, scan=scan))
    assert sum(report.skipped for report in found) == 1
    assert int(found[-1].state.step) == 4
    assert all(np.isfinite(report.loss) for report in found if scan or not report.skipped)
    # The same by hand: the step is not taken.
    steps = engine.make_steps(task, method)
    state = engine.init_state(task, toy_task.start(task), method, seed=0)
    batches = engine._Batches(64, 16, 0)
    arrays = tuple(jnp.asarray(part) for part in task.dataset.train)
    for step in range(4):
        if step == bad_step():
            state = state._replace(step=state.step + 1)
        else:
            state, _ = steps.one(state, arrays, batches.at(step))
    final = found[-1].state
    for part in ("params", "opt_state", "state"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            getattr(final, part),
            getattr(state, part),
        )


def test_memory_that_does_not_suffice():
    error = jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore"
    )

    def one(state, arrays, indices):
        raise error

    task, method = toy_task.make(), Method(optax.sgd(0.1))
    state = engine.init_state(task, toy_task.start(task), method, seed=0)
    steps = engine.make_steps(task, method)._replace(one=one)
    with pytest.raises(MemoryError, match=r"a step of 16 .* batches of 8, .* 99 bytes\.\)$"):
        next(engine.train(task, steps, state, 1, batch_size=16, seed=0))
    assert guards.out_of_memory(ValueError("another"), "x", 1) is None
