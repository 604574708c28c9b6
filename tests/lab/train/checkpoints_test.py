"""Checkpoints of small states: what is kept, what is given back, and what is said."""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.lab import interrupts
from quantjax.lab.train import checkpoints, engine, evaluation, phases
from quantjax.lab.train import session as session_lib
from quantjax.lab.train.checkpoints import Journal, Seen
from tests.lab.train import toy_task

pytestmark = pytest.mark.usefixtures("quick_compilation")
ABOUT = {"experiment": "toy", "seeds": [0, 1]}


def state(step):
    return {"weights": jnp.arange(12.0).reshape(3, 4) + step, "step": jnp.int32(step)}


def seen(step):
    """What was seen until a step; its best network has a number of its own."""
    history = [("toy", at, 0.1 * at, 1 / 3) for at in range(1, step + 1)]
    return Seen(history, {"best": {"weights": jnp.full((3, 4), step / 7)}})


def begun(folder, **options):
    return Journal(folder, ABOUT, **{"seconds": 0, **options})


def resumed(folder, **options):
    return begun(folder, resume=True, **options)


def write(journal, *steps, label="train", complete=None):
    with journal.phase(label) as log:
        for step in steps:
            log.save(state(step), seen(step), step, complete=step == complete)
    return log


def read(journal, label="train", like=None):
    """Returns what a phase gives back, what it has seen, and its log."""
    mine = Seen([], jax.tree.map(jnp.zeros_like, seen(0).kept))
    with journal.phase(label) as log:
        return log.restored(state(0) if like is None else like, mine), mine, log


def bits(tree):
    def leaf(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return jax.tree.map(leaf, tree)


def steps_of(folder, label="000-train"):
    return sorted(int(found.name) for found in (folder / label).iterdir() if found.name.isdigit())


def damage(folder, step, label="000-train"):
    file = max((folder / label / str(step) / "arrays" / "d").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# What is kept


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    write(begun(tmp_path / "run", keep=keep), 1, 2, 3, 4, 5)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5][-keep:]


def test_the_last_state_the_best_network_and_the_history_come_back(tmp_path, capsys):
    write(begun(tmp_path / "run"), 2, 4)
    found, mine, log = read(resumed(tmp_path / "run"))
    assert bits(found) == bits(state(4))
    assert bits(mine.kept) == bits(seen(4).kept)
    assert mine.history == seen(4).history
    assert not log.complete
    assert capsys.readouterr().err == "quantjax: 000-train: going on at step 4\n"


def test_a_phase_at_its_end_is_complete(tmp_path, capsys):
    assert write(begun(tmp_path / "run"), 2, 4, complete=4).complete
    found, _, log = read(resumed(tmp_path / "run"))
    assert log.complete
    assert bits(found) == bits(state(4))
    assert capsys.readouterr().err == ""


def test_an_unresumed_journal_gives_back_what_it_is_given(tmp_path):
    found, mine, log = read(begun(tmp_path / "run"))
    assert bits(found) == bits(state(0))
    assert (mine.history, log.complete) == ([], False)


def test_a_phase_without_checkpoints_begins_anew(tmp_path):
    write(begun(tmp_path / "run"), 3, complete=3)
    journal = resumed(tmp_path / "run")
    read(journal)
    found, mine, log = read(journal, "another")
    assert bits(found) == bits(state(0))
    assert (mine.history, log.complete) == ([], False)


def test_a_resumed_run_saves_on(tmp_path):
    write(begun(tmp_path / "run"), 2, 4)
    journal = resumed(tmp_path / "run")
    with journal.phase("train") as log:
        log.restored(state(0), seen(0))
        log.save(state(6), seen(6), 6)
    assert steps_of(tmp_path / "run") == [4, 6]
    assert bits(read(resumed(tmp_path / "run"))[0]) == bits(state(6))


@pytest.mark.parametrize("score", [np.float32(0.1), np.float64(0.1), jnp.float32(0.1), 7, "word"])
def test_numbers_of_a_history_of_any_kind(tmp_path, score):
    mine = Seen([("toy", np.int64(3), score, float("nan"), -float("inf"))], {})
    with begun(tmp_path / "run").phase("train") as log:
        log.save(state(1), mine, 1)
    found = Seen([], {})
    with resumed(tmp_path / "run").phase("train") as log:
        log.restored(state(0), found)
    assert str(found.history[0]) == str(("toy", 3, getattr(score, "item", lambda: score)(), *[
        float("nan"), -float("inf")
    ]))  # fmt: skip


DTYPES = ("bfloat16", "float16", "float32", "int8", "uint8", "int32", "uint32", "bool", "int4")


def test_leaves_of_every_kind_come_back(tmp_path):
    values = np.arange(6).reshape(2, 3) % 2
    kinds = {name: jnp.asarray(values, name) for name in DTYPES}
    kinds |= {
        "not a number": jnp.asarray([np.nan, -np.nan, np.inf, -0.0]),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "scalar": jnp.float32(0.1),
        "key": jax.random.key(5),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "on the host": np.arange(12.0).reshape(3, 4).T,
        "nothing": None,
        "deep": ({"a": [jnp.ones(2)]}, optax.EmptyState()),
    }
    with begun(tmp_path / "run").phase("train") as log:
        log.save(kinds, checkpoints.nothing(), 1)
    like = jax.tree.map(lambda x: x if x.dtype == np.float64 else jnp.zeros_like(x), kinds)
    like = like | {"on the host": np.zeros((4, 3))}
    with resumed(tmp_path / "run").phase("train") as log:
        found = log.restored(like, checkpoints.nothing())
    assert jax.tree.structure(found) == jax.tree.structure(kinds)
    assert bits(found) == bits(kinds)
    assert found["keys"].dtype == kinds["keys"].dtype
    assert jax.random.bits(found["key"]) == jax.random.bits(kinds["key"])


def test_what_is_saved_is_a_copy(tmp_path):
    """The next step takes the buffers while they are written."""
    weights = np.zeros((300, 300), np.float32)
    with begun(tmp_path / "run").phase("train") as log:
        for step in range(1, 4):
            weights[:] = step
            log.save({"weights": weights}, checkpoints.nothing(), step)
            weights[:] = -1
    with resumed(tmp_path / "run").phase("train") as log:
        found = log.restored({"weights": weights}, checkpoints.nothing())
    np.testing.assert_array_equal(found["weights"], np.float32(3))


# Damage


def test_of_a_damaged_newest_it_is_told_and_the_one_before_is_used(tmp_path, capsys):
    write(begun(tmp_path / "run"), 2, 4)
    damage(tmp_path / "run", 4)
    found, mine, _ = read(resumed(tmp_path / "run"))
    assert bits(found) == bits(state(2))
    assert bits(mine.kept) == bits(seen(2).kept)
    assert mine.history == seen(2).history
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("quantjax: 000-train: the checkpoint of step 4 is damaged (")
    assert first.endswith(") and moved to damaged-000-train-4")
    assert second == "quantjax: 000-train: going on at step 2"


def test_another_digest_is_damage(tmp_path, capsys, monkeypatch):
    """As of a disk that gives other bytes without a word."""
    write(begun(tmp_path / "run"), 2, 4)
    newest = state(4)["weights"].tobytes()
    digest = checkpoints._digest

    def other(array):
        return digest(array) + (array.tobytes() == newest)

    monkeypatch.setattr(checkpoints, "_digest", other)
    assert bits(read(resumed(tmp_path / "run"))[0]) == bits(state(2))
    assert "step 4 is damaged (state/weights is not what was written)" in capsys.readouterr().err


def test_where_all_are_damaged_the_phase_begins_anew(tmp_path, capsys):
    write(begun(tmp_path / "run"), 2, 4)
    for step in (2, 4):
        damage(tmp_path / "run", step)
    found, mine, log = read(resumed(tmp_path / "run"))
    assert bits(found) == bits(state(0))
    assert (mine.history, log.complete) == ([], False)
    assert bits(mine.kept) == bits(jax.tree.map(jnp.zeros_like, seen(0).kept))
    told = capsys.readouterr().err.splitlines()
    assert ["step 4 is damaged" in told[0], "step 2 is damaged" in told[1], len(told)] == [1, 1, 2]


def test_the_step_of_a_damaged_one_is_saved_again(tmp_path, capsys):
    write(begun(tmp_path / "run"), 2, 4)
    damage(tmp_path / "run", 4)
    journal = resumed(tmp_path / "run")
    with journal.phase("train") as log:
        log.restored(state(0), seen(0))
        log.save(state(4), seen(4), 4)
    assert "could not be written" not in capsys.readouterr().err
    assert bits(read(resumed(tmp_path / "run"))[0]) == bits(state(4))
    assert (tmp_path / "run" / "damaged-000-train-4").is_dir()


@pytest.mark.parametrize(
    "error", [MemoryError("host"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory: device")]
)
def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, error):
    """Another process may hold the device: every checkpoint would be put aside, one by one."""
    write(begun(tmp_path / "run"), 2, 4)

    def full(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Phase, "_read", full)
        with pytest.raises(type(error), match=str(error)):
            read(resumed(tmp_path / "run"))
    assert bits(read(resumed(tmp_path / "run"))[0]) == bits(state(4))


# Runs that are none, or others


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match=r"nothing to resume: .*run holds no run"):
        resumed(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_settings_says_which(tmp_path):
    write(begun(tmp_path / "run"), 2)
    told = r"run is of another run: experiment toy, here toys; scale missing, here 0\.5"
    with pytest.raises(ValueError, match=told):
        Journal(tmp_path / "run", ABOUT | {"experiment": "toys", "scale": 0.5}, resume=True)
    with pytest.raises(ValueError, match=r"seeds \[0, 1\], here missing"):
        Journal(tmp_path / "run", {"experiment": "toy"}, resume=True)
    Journal(tmp_path / "many", dict.fromkeys("abcde", 0))
    with pytest.raises(ValueError, match="a 0, here 1; b 0, here 1; c 0, here 1; 2 more"):
        Journal(tmp_path / "many", dict.fromkeys("abcde", 1), resume=True)
    assert bits(read(resumed(tmp_path / "run"))[0]) == bits(state(2))


def test_settings_are_compared_as_json(tmp_path):
    Journal(tmp_path / "run", {"widths": (2, 3), "name": "a"})
    Journal(tmp_path / "run", {"widths": [2, 3], "name": "a"}, resume=True)


def test_other_versions_are_told_and_taken(tmp_path, capsys):
    write(begun(tmp_path / "run", versions={"jax": "1", "numpy": "2"}), 2)
    found = read(resumed(tmp_path / "run", versions={"jax": "1", "numpy": "3"}))[0]
    assert bits(found) == bits(state(2))
    first = capsys.readouterr().err.splitlines()[0]
    assert first == ("quantjax: resuming with other versions, so not bit for bit: numpy 2, here 3")
    resumed(tmp_path / "run", versions={"jax": "1", "numpy": "3"})  # said once
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("like", "told"),
    [
        ({"weights": jnp.zeros((3, 5))}, r"state/weights float32\[3, 4\], here float32\[3, 5\]"),
        ({"weights": jnp.zeros((3, 4), jnp.int8)}, r"float32\[3, 4\], here int8\[3, 4\]"),
        ({"extra": jnp.zeros(2)}, r"state/extra missing, here float32\[2\]"),
        ({"step": None}, r"state/step int32\[\], here missing"),
        ({"step": {"count": jnp.int32(0)}}, r"state/step int32\[\], here missing; state/step/coun"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_leaves(tmp_path, capsys, like, told):
    write(begun(tmp_path / "run"), 2, 4)
    with pytest.raises(ValueError, match=f"000-train is of another model or method: .*{told}"):
        read(resumed(tmp_path / "run"), like=state(0) | like)
    assert steps_of(tmp_path / "run") == [2, 4]
    assert capsys.readouterr().err == ""


def test_another_network_in_a_real_state_names_its_layer(tmp_path):
    method = engine.Method(optax.sgd(0.1, momentum=0.9), qj.uniform(4))
    wide = toy_task.make(classes=5)
    for task, resume in ((toy_task.make(), False), (wide, True)):
        journal = begun(tmp_path / "run", resume=resume)
        start = engine.init_state(task, toy_task.start(task), method, 0)
        with journal.phase("train") as log:
            if resume:
                told = r"state/params/Dense_1/bias float32\[3\], here float32\[5\]; .* 1 more"
                with pytest.raises(ValueError, match=told):
                    log.restored(start, checkpoints.nothing())
            else:
                log.save(start, checkpoints.nothing(), 1)


def test_phases_in_another_order_are_another_run(tmp_path):
    journal = begun(tmp_path / "run")
    for label in ("full precision", "LSQ, 2 bits"):
        write(journal, 1, label=label)
    told = "its phase 0 is 000-full-precision, not 000-lsq-2-bits"
    with pytest.raises(ValueError, match=told):
        resumed(tmp_path / "run").phase("LSQ, 2 bits")
    journal = resumed(tmp_path / "run")
    with journal.phase("Full Precision"), journal.phase("LSQ: 2 bits"):
        pass


# The folder


def test_starting_anew_moves_what_is_there(tmp_path, capsys):
    write(begun(tmp_path / "run"), 2)
    write(begun(tmp_path / "run"), 3)
    assert capsys.readouterr().err == (
        "quantjax: starting anew; an interrupted run's checkpoints are in "
        f"{tmp_path / 'run.before'} now\n"
    )
    assert bits(read(resumed(tmp_path / "run.before"))[0]) == bits(state(2))
    assert bits(read(resumed(tmp_path / "run"))[0]) == bits(state(3))


@pytest.mark.parametrize("left", ["000-train/2", ".run.json.17.part", "damaged-000-train-2"])
def test_what_a_run_has_left_that_was_killed_at_its_end_is_in_nobodys_way(tmp_path, left):
    (tmp_path / "run" / left).mkdir(parents=True)
    write(begun(tmp_path / "run"), 3)
    assert (tmp_path / "run.before" / left).is_dir()


def test_files_of_others_stay_where_they_are(tmp_path):
    (tmp_path / "run" / "000-train").mkdir(parents=True)
    (tmp_path / "run" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds other files than a run's: thesis\.txt"):
        begun(tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").is_file()


def test_a_run_that_is_over_leaves_nothing(tmp_path):
    (tmp_path / "beside").write_text("")
    journal = begun(tmp_path / "run")
    write(journal, 2)
    assert "--resume" in interrupts.checkpoint
    journal.finish()
    assert [found.name for found in tmp_path.iterdir()] == ["beside"]
    assert interrupts.checkpoint == ""


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("where", ["below a file", "/proc/quantjax"])
def test_a_folder_that_cannot_be_written(tmp_path, where, resume):
    (tmp_path / "below a file").write_text("")
    with pytest.raises(ValueError if resume else OSError, match=re.escape(where)):
        Journal(tmp_path / where / "run", ABOUT, resume=resume)


def test_what_cannot_be_written_is_told_and_training_goes_on(tmp_path, capsys, monkeypatch):
    journal = begun(tmp_path / "run")
    write(journal, 1, label="before")
    with journal.phase("train") as log:
        log.save(state(1), seen(1), 1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.ocp.args, "StandardSave", lambda arrays: 1 / 0)
            log.save(state(2), seen(2), 2)
        assert capsys.readouterr().err == (
            "quantjax: a checkpoint of 001-train could not be written (division by zero); "
            "earlier ones stay, training goes on\n"
        )
        log.save(state(3), seen(3), 3)
    assert capsys.readouterr().err == ""
    assert steps_of(tmp_path / "run", "001-train") == [1, 3]


# When


def test_the_first_is_due_after_the_seconds_asked_for(tmp_path, monkeypatch):
    clock = itertools.count(100.0, 25.0)
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: next(clock))
    with begun(tmp_path / "run", seconds=60).phase("train") as log:
        assert [log.due() for _ in range(4)] == [False, False, True, True]  # 25, 50, 75, 100


def test_training_takes_twenty_times_what_its_checkpoints_take(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    with begun(tmp_path / "run", seconds=60).phase("train") as log:
        settle = log._settle

        def slow():
            now[0] += 7  # for the one before, which is still being written
            settle()

        monkeypatch.setattr(log, "_settle", slow)
        log.save(state(1), seen(1), 1)
        now[0] += 139
        assert not log.due()
        now[0] += 1
        assert log.due()


def test_without_a_pause_there_is_one_after_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: 0.0)
    with begun(tmp_path / "run", seconds=0).phase("train") as log:
        assert log.due()


# In training


class Stopped(BaseException):
    """Comes at a checkpoint, as a kill does."""


@functools.cache
def parts():
    """The task, phases with compiled steps, and a score."""
    task = toy_task.make()
    evaluate = evaluation.make_evaluate(task)
    validation = toy_task.split(30, 2)
    methods = {
        "search": engine.Method(optax.adam(0.05)),
        "deploy": engine.Method(optax.adam(0.05), qj.srq(2, dropbits=True)),
    }
    made = [
        phases.Phase(name, method, 7, engine.make_steps(task, method))
        for name, method in methods.items()
    ]
    return task, made, lambda variables: evaluate(variables, validation).accuracy


def run(journal):
    """Returns all that comes out of two phases, as bits."""
    task, made, score = parts()
    with session_lib.use(session_lib.Session(journal=journal)):
        out = phases.run(task, made, toy_task.start(task), score, batch_size=16, seed=3, every=3)
    return bits(out._replace(history=())), out.history


@pytest.fixture(scope="module")
def undisturbed(quick_compilation):
    return run(None)


def test_checkpoints_change_no_bit(tmp_path, undisturbed):
    assert run(begun(tmp_path / "run")) == undisturbed


@pytest.mark.parametrize("at", [1, 3, 7, 8, 12, 14])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, undisturbed, monkeypatch, at):
    count = itertools.count(1)
    save = checkpoints.Phase.save

    def stopping(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if next(count) == at:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Phase, "save", stopping)
        with pytest.raises(Stopped):
            run(begun(tmp_path / "run"))
    assert run(resumed(tmp_path / "run")) == undisturbed


@pytest.mark.parametrize("damaged", [["001-deploy"], ["000-search", "001-deploy"]])
def test_a_phase_whose_checkpoints_are_all_damaged_is_trained_anew(
    tmp_path, undisturbed, capsys, damaged
):
    run(begun(tmp_path / "run"))
    for label in damaged:
        for step in steps_of(tmp_path / "run", label):
            damage(tmp_path / "run", step, label)
    assert run(resumed(tmp_path / "run")) == undisturbed
    told = capsys.readouterr().err
    assert told.count("is damaged") == 2 * len(damaged)
    assert "going on" not in told


def test_a_signal_saves_before_it_ends_the_run(tmp_path, undisturbed, monkeypatch):
    journal = begun(tmp_path / "run", seconds=1e9)
    due = checkpoints.Phase.due
    count = itertools.count(1)

    def asked(self):
        if next(count) == 4:
            interrupts.requested.set()
        return due(self)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Phase, "due", asked)
        with pytest.raises(KeyboardInterrupt):
            run(journal)
    interrupts.requested.clear()
    assert len(steps_of(tmp_path / "run", "000-search")) == 1
    assert interrupts.checkpoint.startswith("go on with --resume (step ")
    assert run(resumed(tmp_path / "run")) == undisturbed


def test_what_run_json_says(tmp_path):
    begun(tmp_path / "run", versions={"jax": "1"})
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == {
        "about": {"format": checkpoints.FORMAT, **ABOUT},
        "versions": {"jax": "1"},
    }
