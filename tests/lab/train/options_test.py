"""What commands that train are told, and what is checked before they do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from quantjax.lab import data, models
from quantjax.lab.train import engine, evaluation, monitor, session, tasks
from quantjax.lab.train.options import Options
from tests.lab.train import toy_task

pytestmark = pytest.mark.usefixtures("quick_programs")


def opened(tmp_path, **options):
    return Options(**options).session(tmp_path / "run", {"epochs": 3}, {"jax": "1"})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"save_every": -1.0}, "save_every must be at least 0"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"processes": 2}, "several processes need a coordinator"),
        ({"coordinator": "localhost:1"}, "several processes need a coordinator"),
        ({"process": 1}, "process 1 of 1"),
        ({"mesh": "data=64"}, "needs 64 devices"),
        ({"mesh": "rows=2"}, "the axes data and model"),
        ({"resume": True}, "nothing to resume: .*run holds no run"),
    ],
)
def test_bad_input_is_told_before_training(tmp_path, options, told):
    with pytest.raises(ValueError, match=told), opened(tmp_path, **options):
        pytest.fail("it began")


@pytest.mark.parametrize("option", ["tensorboard", "profile"])
def test_folders_that_cannot_be_made(tmp_path, option):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyboardInterrupt), opened(tmp_path):
        raise KeyboardInterrupt
    with pytest.raises(OSError), opened(tmp_path, **{option: tmp_path / "file" / "below"}):  # noqa: PT011
        pytest.fail("it began")
    assert not (
        tmp_path / "run.before"
    ).exists()  # an earlier run's checkpoints are where they were


def test_checkpoints_go_with_the_end_and_stay_without_it(tmp_path):
    with opened(tmp_path) as inside:
        assert session.current() is inside
        assert (tmp_path / "run" / "run.json").is_file()
    assert not (tmp_path / "run").exists()
    assert session.current() == session.Session()
    with pytest.raises(KeyboardInterrupt), opened(tmp_path):
        raise KeyboardInterrupt
    assert (tmp_path / "run" / "run.json").is_file()
    with opened(tmp_path, resume=True):
        pass


def test_another_precision_is_another_run(tmp_path):
    with pytest.raises(KeyboardInterrupt), opened(tmp_path):
        raise KeyboardInterrupt
    with (
        pytest.raises(ValueError, match="precision missing, here bf16"),
        opened(tmp_path, resume=True, precision="bf16"),
    ):
        pytest.fail("it began")


def test_layers_compute_in_bfloat16_with_float32_masters():
    task = tasks.classification(models.build("small-cnn", 10), data.load("digits"))
    method = engine.Method(optax.sgd(0.1))
    variables, found = task.init(0), {}
    for name, precision in (("float32", None), ("bf16", jnp.bfloat16)):
        with session.use(session.Session(precision=precision)):
            state = engine.init_state(task, variables, method, seed=0)
            steps = engine.make_steps(task, method)
            arrays = tuple(jnp.asarray(part) for part in task.dataset.train)
            text = steps.one.lower(state, arrays, np.arange(16)).as_text()
            state, _ = steps.one(state, arrays, np.arange(16))
            score = evaluation.make_evaluate(task)(variables, task.dataset.test)
            found[name] = state.params, score.loss, "bf16" in text
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found["bf16"][0]))
    assert (found["float32"][2], found["bf16"][2]) == (False, True)
    assert found["float32"][1] != found["bf16"][1]
    assert found["float32"][1] == pytest.approx(found["bf16"][1], rel=0.02)
    with (
        session.use(session.Session(precision=jnp.bfloat16)),
        pytest.raises(ValueError, match="Network has no field `dtype`"),
    ):
        engine.make_steps(toy_task.make(), method)


def test_tensorboard_has_losses_and_weights(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    task, method = toy_task.make(), engine.Method(optax.sgd(0.1))
    board = monitor.Board(tmp_path)
    with session.use(session.Session(board=board)):
        engine.fit(task, method, toy_task.start(task), 8, batch_size=16, seed=0, label="a, b/c")
    (file,) = tmp_path.glob("a-b-c/events*")
    raw, tags, at = file.read_bytes(), {}, 0
    while at < len(raw):  # length, its checksum, the event, its checksum
        size = int.from_bytes(raw[at : at + 8], "little")
        event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append(event.step)
        at += 16 + size
    assert tags["train/loss"] == tags["params/Dense_0/kernel"] == [4, 8]
    assert {"train/accuracy", "train/skipped", "params/Dense_1/bias"} <= tags.keys()


def test_a_trace_of_a_few_steps(tmp_path):
    task, method = toy_task.make(), engine.Method(optax.sgd(0.1))
    trace = monitor.Trace(tmp_path)
    with session.use(session.Session(trace=trace)):
        engine.fit(task, method, toy_task.start(task), 12, batch_size=16, seed=0)
        engine.fit(task, method, toy_task.start(task), 12, batch_size=16, seed=0)
    assert len(list(tmp_path.rglob("perfetto_trace.json.gz"))) == 1  # of the first phase
