"""The engine beside loops written by hand, on a network that trains in milliseconds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.core.quantizer import QuantState, leafwise
from quantjax.lab import data
from quantjax.lab.train import engine, evaluation
from quantjax.lab.train.engine import Method
from tests import toys
from tests.lab.train import toy_task


@pytest.fixture(scope="module")
def task():
    return toy_task.make()


@pytest.fixture(scope="module")
def plain():
    return toy_task.make(batch_norm=False)


@pytest.fixture(scope="module")
def sgd():
    return Method(optax.sgd(0.1, momentum=0.9))


def fit(task, method, total=4, seed=0, batch_size=16, variables=None, **kwargs):
    start = toy_task.start(task) if variables is None else variables
    return engine.fit(task, method, start, total, batch_size=batch_size, seed=seed, **kwargs)


def equal(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


def close(actual, desired, rtol=1e-4, atol=1e-6):
    def leaf(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)

    jax.tree.map(leaf, actual, desired)


def cross_entropy(logits, labels):
    logits = np.float64(logits)
    largest = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]
    return log_sum - logits[np.arange(len(labels)), labels]


# A step, by hand


def test_a_step_trains_weights_and_grids_on_loss_and_penalty(plain, quick_programs):
    """Beside the loop of the design, over the whole training set, so that no order matters."""
    quantizer = toys.learned_step(3, penalty=0.5)
    tx = optax.chain(optax.add_decayed_weights(0.1, mask=qj.decay_mask), optax.sgd(0.05))
    variables = toy_task.start(plain)
    images = plain.inputs(plain.dataset.train.images)
    labels = plain.dataset.train.labels
    state = quantizer.init(variables["params"])
    trainable = (variables["params"], state.learned)
    opt_state = tx.init(trainable)

    @jax.jit
    def step(trainable, opt_state):
        def loss_fn(trainable):
            params, learned = trainable
            current = state._replace(learned=learned)
            logits = plain.model.apply({"params": quantizer.apply(params, current)}, images)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss + quantizer.penalty(current), (loss, logits)

        grads, (loss, logits) = jax.grad(loss_fn, has_aux=True)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss, logits

    method = Method(tx, quantizer)
    steps, whole = engine.make_steps(plain, method), len(labels)
    start = engine.init_state(plain, variables, method, seed=0)
    for report in engine.train(plain, steps, start, 3, batch_size=whole, seed=0, every=1):
        trainable, opt_state, loss, logits = step(trainable, opt_state)
        close((report.state.params, report.state.state.learned), trainable)
        assert report.loss == pytest.approx(float(loss), rel=1e-4)  # without the penalty
        correct = np.mean(np.argmax(logits, axis=1) == labels)
        assert report.accuracy == pytest.approx(100 * correct)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), trainable[1], state.learned)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_update_sees_the_params_after_every_step(task, quick_programs):
    quantizer = qj.chain(toys.dropping(), qj.uniform(4))
    state = fit(task, Method(optax.sgd(0.1), quantizer), total=5)
    last = quantizer.init(state.params)
    for path, buffers in state.state.buffers.items():
        assert int(buffers["0"]["count"]) == 5
        # Without momentum, the range is that of the final weights times what they learned.
        gain = state.state.learned[path]["0"]["gain"]
        expected = np.abs(last.buffers[path]["1"]["high"] * gain)
        np.testing.assert_allclose(np.abs(buffers["1"]["high"]), expected, rtol=1e-5)


def test_apply_penalty_and_update_of_a_step_get_one_key(plain, quick_programs):
    """The gradient of the gain under SGD of rate 1 tells what `apply` saw."""
    seen = []

    def note(what):
        def fn(*arguments):
            if what == "penalty":
                learned, _, key = arguments
                seen.append((what, key is not None))
                return jnp.sum(learned["gain"] * jax.random.uniform(key))
            leaf, learned, _, key = arguments
            seen.append((what, key is not None))
            if what == "update":
                return {"drawn": jax.random.uniform(key)}
            return leaf * jax.lax.stop_gradient(learned["gain"])

        return fn

    quantizer = leafwise(
        lambda path, leaf, key: ({"gain": jnp.ones((1, 1))}, {"drawn": jnp.zeros(())}),
        note("apply"),
        note("apply"),
        note("update"),
        note("penalty"),
    )
    method = Method(optax.sgd(1.0), quantizer)
    steps = engine.make_steps(plain, method)
    state, second = (fit(plain, method, total=total, steps=steps) for total in (1, 2))
    assert set(seen) == {("apply", True), ("update", True), ("penalty", True)}
    for path, buffers in state.state.buffers.items():
        # gain = 1 - 1 * drawn: the penalty drew the same number as the update.
        drawn = 1 - state.state.learned[path]["gain"][0, 0]
        np.testing.assert_allclose(drawn, buffers["drawn"], rtol=1e-5)
        assert second.state.buffers[path]["drawn"] != buffers["drawn"]  # every step has its own


def test_batch_norm_statistics_move_by_a_tenth(task, sgd):
    variables = toy_task.start(task)
    count = len(task.dataset.train.labels)
    state = fit(task, sgd, total=1, batch_size=count, variables=variables)
    dense = variables["params"]["Dense_0"]
    images = np.float64(task.inputs(task.dataset.train.images)).reshape(count, -1)
    y = images @ np.float64(dense["kernel"]) + np.float64(dense["bias"])
    stats = state.batch_stats["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 0.1 * y.mean(axis=0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * y.var(axis=0), rtol=1e-4)


# Determinism, donation, compilation


def test_one_by_one_and_in_a_scan_are_the_same(task, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 3)
    quantizer = toys.dropping()  # keys and counts, too, must not depend on the way
    method = Method(optax.adam(0.01), quantizer)
    steps = engine.make_steps(task, method)
    ends = []
    for scan in (False, True):
        state = engine.init_state(task, toy_task.start(task), method, seed=1)
        reports = list(
            engine.train(task, steps, state, 7, batch_size=16, seed=2, every=3, scan=scan)
        )
        assert [report.steps for report in reports] == [3, 6, 7]
        ends.append(reports)
    for one, many in zip(*ends, strict=True):
        assert one.loss == pytest.approx(many.loss, rel=1e-4)
        assert one.accuracy == many.accuracy
    last = [reports[-1].state for reports in ends]
    close(last[0]._replace(key=None), last[1]._replace(key=None))
    assert int(last[0].step) == int(last[1].step) == 7


def test_the_start_stays_valid_after_its_state_was_donated(task, sgd):
    variables = toy_task.start(task)
    before = jax.tree.map(np.array, variables)
    steps = engine.make_steps(task, sgd)
    first = fit(task, sgd, variables=variables, steps=steps)
    equal(variables, before)
    # A second phase starts where the first one ended, and leaves it valid, too.
    end = jax.tree.map(np.array, first.variables)
    fit(task, sgd, variables=first.variables, steps=steps)
    equal(jax.tree.map(np.array, first.variables), end)


def test_states_may_hold_the_params_themselves(task):
    anchored = leafwise(
        lambda path, leaf, key: ({}, {"start": leaf}),
        lambda leaf, learned, buffers, key: leaf,
        lambda leaf, learned, buffers: leaf,
    )
    fit(task, Method(optax.sgd(0.1), anchored), total=1)


def test_the_same_seed_gives_the_same_bits(task):
    method = Method(optax.adam(0.01), toys.dropping())
    steps = engine.make_steps(task, method)
    ends = [fit(task, method, seed=seed, steps=steps).variables for seed in (3, 3, 4)]
    equal(ends[0], ends[1])
    differ = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, ends[1:]), strict=True)]
    assert all(differ)


def test_initial_weights_depend_on_the_seed(task):
    equal(task.init(5), task.init(5))
    kernels = [task.init(seed)["params"]["Dense_0"]["kernel"] for seed in (5, 6)]
    assert np.any(kernels[0] != kernels[1])


@pytest.mark.usefixtures("few_programs")
def test_another_member_of_the_family_compiles_nothing(task, quick_programs):
    def member(bits):
        return Method(optax.sgd(0.1), qj.uniform(bits), qj.uniform_input(bits))

    shared = engine.make_steps(task, member(4))
    for bits in (4, 2, 3):
        state = fit(task, member(bits), steps=shared)
        assert shared.one._cache_size() == 1
    # And holds nothing of the member that it was compiled for.
    own = fit(task, member(bits))
    equal(state._replace(key=None), own._replace(key=None))


# Inputs


def test_input_quantizers_fit_themselves_to_the_first_images(task):
    method = Method(optax.sgd(0.1), input_quantizer=qj.uniform_input(4))
    variables = toy_task.start(task)
    state = engine.init_state(task, variables, method, seed=0)
    images = np.asarray(task.inputs(task.dataset.train.images))
    low, high = float(images.min()), float(images.max())
    fitted = state.quant_stats["Dense_0"]
    np.testing.assert_allclose([fitted["low"], fitted["high"]], [low, high], rtol=1e-5)
    assert state.quant == {}
    assert set(state.variables) == {"params", "batch_stats", "quant_stats"}
    # A state that is there already is kept.
    moved = jax.tree.map(lambda leaf: leaf + 1, state.quant_stats)
    again = engine.init_state(task, {**variables, "quant_stats": moved}, method, seed=0)
    equal(again.quant_stats, moved)


def test_what_input_quantizers_learn_is_trained(task, quick_programs):
    inputs = {"Dense_0": toys.learned_input(4), "Dense_1": qj.uniform_input(4)}
    method = Method(optax.sgd(0.1), toys.learned_step(4), inputs)
    start = engine.init_state(task, toy_task.start(task), method, seed=0)
    first = float(start.quant["Dense_0"]["step"])
    low = float(start.quant_stats["Dense_1"]["low"])
    state = fit(task, method, total=6)
    assert int(state.quant_stats["Dense_0"]["count"]) == 6  # updated in every step
    assert abs(float(state.quant["Dense_0"]["step"]) - first) > 1e-5
    assert float(state.quant_stats["Dense_1"]["low"]) == low == 0  # after a ReLU
    assert set(state.variables) == {"params", "batch_stats", "quant", "quant_stats"}
    evaluate = evaluation.make_evaluate(task, inputs)
    score = evaluate(state.variables, task.dataset.test)
    assert np.isfinite(score.loss)
    # Evaluation quantizes the inputs: another step gives another loss.
    other = state._replace(quant=jax.tree.map(lambda leaf: 4 * leaf, state.quant))
    assert evaluate(other.variables, task.dataset.test).loss != score.loss


# Batches


class Fake(NamedTuple):
    """Stands in for a TrainState: what `train` itself needs of it."""

    totals: dict
    batches: tuple = ()
    step: int = 0


def batches(task, total, seed=0, batch_size=12, **kwargs):
    """The indices of every batch that `train` asks for."""

    def one(state, arrays, indices):
        del arrays
        return state._replace(batches=(*state.batches, np.asarray(indices))), np.float32(1.0)

    def many(state, arrays, indices):
        for row in indices:
            state, _ = one(state, arrays, row)
        return state, np.ones(len(indices), np.float32)

    reports = engine.train(
        task,
        engine.Steps(one, many, None),
        Fake(
            {name: jnp.ones(()) for name in ("loss", "accuracy", "batches", "skipped", "stopped")}
        ),
        total,
        batch_size=batch_size,
        seed=seed,
        **kwargs,
    )
    return np.stack(list(reports)[-1].state.batches)


def test_an_epoch_holds_every_image_once_at_most(task):
    seen = batches(task, total=15)  # 64 images: 5 batches of 12 an epoch, 4 images left over
    epochs = seen.reshape(3, 60)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 60
        assert 0 <= epoch.min() <= epoch.max() < 64
    assert np.any(epochs[0] != epochs[1])
    assert len(set(epochs.ravel().tolist())) == 64  # others are left over each time


def test_batches_depend_on_seed_and_step_alone(task, monkeypatch):
    monkeypatch.setattr(engine, "CHUNK", 4)
    seen = batches(task, total=13)
    np.testing.assert_array_equal(batches(task, total=13, every=2), seen)
    np.testing.assert_array_equal(batches(task, total=13, every=4, scan=True), seen)
    np.testing.assert_array_equal(batches(task, total=7), seen[:7])
    assert np.any(batches(task, total=13, seed=1) != seen)


def test_reports_come_once_an_epoch_and_after_the_last_step(task, sgd):
    steps = engine.make_steps(task, sgd)
    state = engine.init_state(task, toy_task.start(task), sgd, seed=0)
    reports = list(engine.train(task, steps, state, 10, batch_size=16, seed=0))
    assert [report.steps for report in reports] == [4, 8, 10]
    assert reports[-1].loss < reports[0].loss
    assert 0 <= reports[0].accuracy <= reports[-1].accuracy <= 100
    assert 0 < reports[0].seconds < reports[-1].seconds


@pytest.mark.parametrize("batch_size", [0, 65, -1])
def test_a_batch_must_fit_into_the_training_set(task, sgd, batch_size):
    with pytest.raises(ValueError, match=rf"batch_size must be in 1\.\.64.*got {batch_size}"):
        fit(task, sgd, batch_size=batch_size)


@pytest.mark.parametrize(("total", "every"), [(0, None), (-1, None), (3, -1)])
def test_counts_below_one(task, sgd, total, every):
    with pytest.raises(ValueError, match="at least 1"):
        batches(task, total, every=every)


def test_a_loss_that_diverges_says_when_and_what_to_try(plain):
    with pytest.raises(
        FloatingPointError, match=r"wild: step \d is not finite, first in .*smaller"
    ):
        fit(plain, Method(optax.sgd(1e30)), label="wild")


def test_augmentation_shifts_and_mirrors_what_is_trained_on(plain, sgd):
    count = len(plain.dataset.train.labels)
    augmented = toy_task.make(batch_norm=False, augment=True)
    steps = engine.make_steps(augmented, sgd)
    once, again = (
        fit(augmented, sgd, total=1, batch_size=count, steps=steps).params for _ in range(2)
    )
    straight = fit(plain, sgd, total=1, batch_size=count).params
    equal(once, again)
    assert np.any(once["Dense_0"]["kernel"] != straight["Dense_0"]["kernel"])


# Evaluation


@pytest.mark.parametrize("batch_size", [1, 10, 23, 500])
def test_evaluation_counts_every_image_once(task, batch_size):
    variables = toy_task.start(task)
    images, labels = task.dataset.test
    logits = task.model.apply(variables, task.inputs(images))
    score = evaluation.make_evaluate(task, batch_size=batch_size)(variables, task.dataset.test)
    assert score.loss == pytest.approx(cross_entropy(logits, labels).mean(), rel=1e-6)
    correct = int(np.sum(np.argmax(logits, axis=1) == labels))
    assert score.accuracy == 100 * correct / 23


def test_evaluation_compiles_once_and_uses_running_statistics(task):
    evaluate = evaluation.make_evaluate(task, batch_size=10)
    variables = [task.init(seed) for seed in range(3)]
    before = len(toy_task.TRACES)
    scores = [evaluate(v, task.dataset.test) for v in variables]
    assert len(toy_task.TRACES) == before + 1
    assert len({score.loss for score in scores}) == 3
    # Alone or among others, an image has the same logits: no statistics of the batch.
    single = data.Split(task.dataset.test.images[:1], task.dataset.test.labels[:1])
    logits = task.model.apply(variables[0], task.inputs(task.dataset.test.images))
    expected = cross_entropy(logits[:1], single.labels)[0]
    assert evaluate(variables[0], single).loss == pytest.approx(expected, rel=1e-5)


def test_an_untrained_state_has_the_variables_it_started_from(task, sgd):
    variables = toy_task.start(task)
    state = engine.init_state(task, variables, sgd, seed=0)
    equal(state.variables, variables)
    assert state.state == QuantState({}, {})
    assert int(state.step) == 0
