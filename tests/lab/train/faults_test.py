"""Faults of disks, files, data and settings: each is told in one line, and costs no checkpoint."""

import contextlib
import io
import itertools
import resource
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from quantjax.lab import data
from quantjax.lab.train import engine, tasks
from quantjax.lab.train import session as session_lib
from quantjax.lab.train.checkpoints import Journal, Seen
from quantjax.lab.train.options import Options
from tests.lab.train import toy_task

pytestmark = pytest.mark.usefixtures("quick_compilation")
LABEL = "000-train"
LONGEST = 500  # characters of a line
ERRORS = (ValueError, OSError, FloatingPointError)  # what the command shows as one line


def state(step):
    return {
        "weights": jnp.arange(40.0).reshape(8, 5) + step,
        "moments": jnp.arange(7, dtype=jnp.int8) + step,
        "step": jnp.int32(step),
        "key": jax.random.key_data(jax.random.key(step)),
    }


def seen(step):
    return Seen([("train", at, at / 3) for at in range(step)], {"best": jnp.full(3, step / 7)})


def bits(tree):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), tree)


def write(journal, *steps):
    with journal.phase("train") as log:
        for step in steps:
            log.save(state(step), seen(step), step)


def read(folder, keep=2):
    """Returns the step that a resumed run goes on from; 0: anew. It is whole."""
    mine = Seen([], {"best": jnp.zeros(3)})
    with Journal(folder, {"run": 1}, resume=True, keep=keep).phase("train") as log:
        found = log.restored(state(0), mine)
    step = int(found["step"])
    assert bits(found) == bits(state(step))
    assert mine.history == seen(step).history
    assert bits(mine.kept) == bits(seen(step).kept)
    return step


def lines(capfd):
    told = capfd.readouterr()
    assert told.out == ""
    found = told.err.splitlines()
    for line in found:
        assert line.startswith("quantjax: ")
        assert len(line) < LONGEST
    return [line.removeprefix("quantjax: ") for line in found]


def one_line(error):
    text = str(error)
    assert 10 < len(text) < LONGEST
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quick_compilation):
    """A run with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    write(Journal(folder, {"run": 1}, seconds=0), 1, 2)
    return folder


@pytest.fixture
def copy(tmp_path, whole):
    return Path(shutil.copytree(whole, tmp_path / "run"))


# Damage to the files of a checkpoint


def cut(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def flipped(place, bit=4):
    def change(file):
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1 << bit
        file.write_bytes(content)

    return change


def folder_instead(file):
    file.unlink()
    file.mkdir()


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def file_instead(path):
    remove(path)
    path.write_text("no folder")


FILES = {  # pattern: whether a checkpoint without it is damaged
    "told/metadata": True,
    "arrays/manifest.ocdbt": True,
    "arrays/d/*": True,
    "arrays/_METADATA": None,  # some of it, Orbax does without
    "_CHECKPOINT_METADATA": False,
    "commit_success.txt": False,
    "told/commit_success.txt": False,
    "arrays/commit_success.txt": False,
    "arrays/ocdbt.process_0/manifest.ocdbt": False,
    "arrays/ocdbt.process_0/d/*": None,
}
DAMAGE = {
    "emptied": cut(0),
    "cut in the beginning": cut(0.1),
    "cut in the middle": cut(0.5),
    "cut at the end": cut(0.99),
    "deleted": Path.unlink,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a bit at the start": flipped(0),
    "a bit in the first half": flipped(0.3, 2),
    "a bit in the second half": flipped(0.7, 0),
    "a bit at the end": flipped(1),
    "other bytes": lambda file: file.write_bytes(np.random.default_rng(0).bytes(300)),
    "a folder": folder_instead,
}
DAMAGED = list(itertools.product(FILES, DAMAGE))


@pytest.mark.parametrize(("pattern", "how"), DAMAGED)
def test_a_damaged_file(copy, capfd, pattern, how):
    for file in (copy / LABEL / "2").glob(pattern):
        DAMAGE[how](file)
    step, told = read(copy), lines(capfd)
    assert told[-1] == f"{LABEL}: going on at step {step}"
    if step == 1:
        assert told[0].startswith(f"{LABEL}: the checkpoint of step 2 is damaged (")
    assert len(told) == 3 - step  # of what harms nobody nothing is said
    assert FILES[pattern] is not (step == 2)
    assert read(copy) == step
    assert (copy / LABEL / "1").is_dir()


@pytest.mark.parametrize("how", DAMAGE)
def test_all_checkpoints_damaged(copy, capfd, how):
    for step in (1, 2):
        DAMAGE[how](copy / LABEL / str(step) / "told" / "metadata")
    assert read(copy) == 0
    for step, told in zip((2, 1), lines(capfd), strict=True):
        assert f"the checkpoint of step {step} is damaged (" in told
    write(Journal(copy, {"run": 1}, resume=True, seconds=0), 1)
    assert read(copy) == 1


# Folders


class Wrong(NamedTuple):
    """A folder that is not as it was left."""

    how: object  # (folder of the run) -> None
    step: int | None  # from where it goes on
    told: str = ""  # said besides


FOLDERS = {
    "no arrays": Wrong(lambda run: remove(run / LABEL / "2" / "arrays"), 1, "is damaged"),
    "no description": Wrong(lambda run: remove(run / LABEL / "2" / "told"), 1, "is damaged"),
    "a file for the arrays": Wrong(
        lambda run: file_instead(run / LABEL / "2" / "arrays"), 1, "is damaged"
    ),
    "a file for the description": Wrong(
        lambda run: file_instead(run / LABEL / "2" / "told"), 1, "is damaged"
    ),
    "no chunks": Wrong(lambda run: remove(run / LABEL / "2" / "arrays" / "d"), 1, "is damaged"),
    "arrays of an older one": Wrong(
        lambda run: (
            remove(run / LABEL / "2" / "arrays"),
            shutil.copytree(run / LABEL / "1" / "arrays", run / LABEL / "2" / "arrays"),
        ),
        1,
        "is not what was written",
    ),
    "a description of an older one": Wrong(
        lambda run: (
            remove(run / LABEL / "2" / "told"),
            shutil.copytree(run / LABEL / "1" / "told", run / LABEL / "2" / "told"),
        ),
        1,
        "is not what was written",
    ),
    "a newer one that is empty": Wrong(
        lambda run: (run / LABEL / "9").mkdir(), 2, "the checkpoint of step 9 is damaged"
    ),
    "the newest gone": Wrong(lambda run: remove(run / LABEL / "2"), 1),
    "a file for the newest": Wrong(lambda run: file_instead(run / LABEL / "2"), 1),
    "the older gone": Wrong(lambda run: remove(run / LABEL / "1"), 2),
    "half of a newer one": Wrong(
        lambda run: (run / LABEL / "3.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True), 2
    ),
    "a file like half of one": Wrong(
        lambda run: (run / LABEL / "3.orbax-checkpoint-tmp").write_text(""), 2
    ),
    "a stranger's file": Wrong(lambda run: (run / LABEL / "notes.txt").write_text(""), 2),
    "a stranger's folder": Wrong(lambda run: (run / LABEL / "2.5").mkdir(), 2),
    "all gone": Wrong(lambda run: remove(run / LABEL), 0),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_as_it_was(copy, capfd, name):
    wrong = FOLDERS[name]
    wrong.how(copy)
    assert read(copy) == wrong.step
    told = lines(capfd)
    assert len(told) == (wrong.told != "") + (wrong.step > 0)
    assert wrong.told in told[0] if wrong.told else True
    write(Journal(copy, {"run": 1}, resume=True, seconds=0), 3)
    assert lines(capfd) == []
    assert read(copy) == 3


# What a run says of itself


NOTES = {
    "emptied": "",
    "cut": '{"about": {"format"',
    "no JSON": "\0\0\0\0",
    "not UTF-8": "\udcff",
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "no settings": '{"versions": {}}',
    "no versions": '{"about": {}}',
    "settings that are a number": '{"about": 3, "versions": {}}',
    "settings that are a list": '{"about": [1, 2], "versions": {}}',
    "versions that are null": '{"about": {}, "versions": null}',
    "another format": '{"about": {"format": 99, "run": 1}, "versions": {}}',
    "another run": '{"about": {"format": 1, "run": 2}, "versions": {}}',
    "more settings": '{"about": {"format": 1, "run": 1, "bits": 2}, "versions": {}}',
}


def untouched(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", NOTES)
def test_another_or_a_damaged_run(copy, capfd, name):
    good = (copy / "run.json").read_bytes()
    (copy / "run.json").write_bytes(NOTES[name].encode(errors="surrogateescape"))
    before = untouched(copy)
    with pytest.raises(ValueError, match=r"is damaged|is of another run: \w+ \w+, here ") as error:
        read(copy)
    one_line(error.value)
    assert lines(capfd) == []
    assert untouched(copy) == before
    (copy / "run.json").write_bytes(good)
    assert read(copy) == 2


@pytest.mark.parametrize("how", [remove, folder_instead, lambda note: remove(note.parent)])
def test_nothing_to_resume(copy, capfd, how):
    how(copy / "run.json")
    with pytest.raises(ValueError, match="nothing to resume") as error:
        read(copy)
    one_line(error.value)
    assert lines(capfd) == []
    assert not copy.exists() or (copy / LABEL / "2").is_dir()


STATES = {
    "wider": {"weights": jnp.zeros((8, 6))},
    "deeper": {"more": jnp.zeros(2)},
    "shallower": {"weights": None},
    "one axis more": {"weights": jnp.zeros((8, 5, 1))},
    "one axis less": {"weights": jnp.zeros(40)},
    "another dtype": {"moments": jnp.zeros(7, jnp.uint8)},
    "wider numbers": {"moments": jnp.zeros(7, jnp.int16)},
    "floats for integers": {"step": jnp.zeros(())},
    "another name": {"weights": None, "kernel": jnp.zeros((8, 5))},
    "another nesting": {"weights": {"kernel": jnp.zeros((8, 5))}},
    "another kind of key": {"key": jnp.zeros(4, jnp.uint32)},
}


@pytest.mark.parametrize("name", STATES)
def test_another_model(copy, capfd, name):
    before = untouched(copy / LABEL)
    log = Journal(copy, {"run": 1}, resume=True).phase("train")
    with log, pytest.raises(ValueError, match="is of another model or method: state/") as error:
        log.restored(state(0) | STATES[name], seen(0))
    one_line(error.value)
    assert lines(capfd) == []
    assert untouched(copy / LABEL) == before


# Disks


@contextlib.contextmanager
def full(size):
    """Within, no file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = list(itertools.product((0, 1, 60, 90, 150, 200, 250, 300, 350, 450), (1, 3)))


@pytest.mark.parametrize(("size", "step"), FULL)
def test_a_full_disk(tmp_path, copy, capsys, size, step):
    """Where there are two checkpoints, and where there is none."""
    first = step == 1
    folder = tmp_path / "new" if first else copy
    with Journal(folder, {"run": 1}, resume=not first, seconds=0).phase("train") as log:
        with full(size):
            log.save(state(step), seen(step), step)
            log._settle()
            told = lines(capsys)
            assert len(told) <= 1
        if told:
            assert told[0].startswith(f"a checkpoint of {LABEL} could not be written (")
            assert "File too large" in told[0]
        assert read(folder) == (step - 1 if told else step)
        assert read(copy) >= 2
        lines(capsys)
        log.save(state(step + 1), seen(step + 1), step + 1)
    assert lines(capsys) == []
    assert read(folder) == step + 1
    assert sorted(found.name for found in (folder / LABEL).iterdir()) == sorted(
        map(str, [step + 1, step - bool(told)][: 2 - (first and bool(told))])
    )


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("size", [0, 5, 20])
def test_a_disk_that_is_full_before_training(tmp_path, copy, size, resume):
    with full(size), pytest.raises(OSError, match="File too large") as error:
        Journal(copy, {"run": 1}, resume=resume)
    one_line(error.value)
    assert read(copy if resume else tmp_path / "run.before") == 2


UNWRITABLE = {
    "below a file": lambda path: path.write_text(""),
    "below no folder of its own": lambda path: path.symlink_to("/proc/quantjax"),
    "of the kernel": lambda path: path.symlink_to("/proc/sys"),
    "a link to nothing": lambda path: path.symlink_to("nowhere/at/all"),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_folder_that_cannot_be_written_before_training(tmp_path, capfd, name):
    UNWRITABLE[name](tmp_path / "place")
    with (
        pytest.raises(OSError, match=r"\[Errno \d+\]") as error,
        Options().session(tmp_path / "place" / "run", {}, {}),
    ):
        pytest.fail("it began")
    one_line(error.value)
    assert lines(capfd) == []


@pytest.mark.parametrize("what", ["the phase", "the run"])
def test_a_file_in_place_of_a_folder_while_training(copy, capfd, what):
    with Journal(copy, {"run": 1}, resume=True, seconds=0).phase("train") as log:
        (copy / LABEL if what == "the phase" else copy).rename(copy.with_name("away"))
        (copy / LABEL if what == "the phase" else copy).write_text("")
        log.save(state(3), seen(3), 3)
        log._settle()
        (told,) = lines(capfd)
        assert told.startswith(f"a checkpoint of {LABEL} could not be written (")
    assert lines(capfd) == []
    assert {found.name for found in copy.with_name("away").rglob("[12]")} == {"1", "2"}


# Numbers


POISONED = [  # examples whose pixels are no numbers, and what is done about it
    *((example, "stop") for example in (*range(0, 64, 8), *range(3, 64, 16))),
    *((example, "skip") for example in range(0, 64, 16)),
]


class Floats(NamedTuple):
    """Images as floats, which may be no numbers."""

    train: tuple
    test: tuple


def poisoned(example, value):
    images, labels = toy_task.split(64, 0)
    images = images.astype(np.float32) / 255
    images[example, 1, 2] = value
    split = images, labels
    return tasks.Task(
        toy_task.Network(), Floats(split, split), lambda images: images, tasks.cross_entropy
    )


def batch_of(example):
    """Returns the number of the step, from 0, that draws an example."""
    batches = engine._Batches(64, 8, 0)
    return next(step for step in range(8) if example in batches.at(step))


@pytest.fixture(scope="module")
def programs(quick_compilation):
    """The steps that stop, and those that skip; the data are arguments of theirs."""
    made = {}
    method = engine.Method(optax.sgd(0.05, momentum=0.9))
    for on_nan in ("stop", "skip"):
        with session_lib.use(session_lib.Session(on_nan=on_nan)):
            made[on_nan] = engine.make_steps(poisoned(0, 0.0), method)
    return method, made


@pytest.mark.parametrize(("example", "on_nan"), POISONED)
def test_a_batch_that_is_not_finite(tmp_path, capfd, programs, example, on_nan):
    method, made = programs
    task = poisoned(example, np.nan if example % 2 else np.inf)
    at = batch_of(example)
    variables = toy_task.start(task)

    def fit(resume=False):
        journal = Journal(tmp_path / "run", {"run": 1}, seconds=0, resume=resume)
        with session_lib.use(session_lib.Session(on_nan=on_nan, journal=journal)):
            return engine.fit(
                task, method, variables, 8, batch_size=8, seed=0, steps=made[on_nan], label="train"
            )

    if on_nan == "skip":
        end = fit()
        assert int(end.step) == 8
        assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(end.variables))
        assert lines(capfd) == []
        return
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match=f"train: step {at + 1} is not fin") as error:
            fit(resume)
        assert "first in the output of Dense_0 (" in one_line(error.value)
        # Where it goes on from is the step before.
        assert lines(capfd) == [f"{LABEL}: going on at step {at}"] * resume
    start = engine.init_state(task, variables, method, 0)
    with Journal(tmp_path / "run", {"run": 1}, resume=True).phase("train") as log:
        found = log.restored(start, Seen([], {}))
    assert int(found.step) == at
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(found.variables))


LEAVES = {
    "kernel": ("params", "Dense_0", "kernel"),
    "last kernel": ("params", "Dense_1", "kernel"),
    "last bias": ("params", "Dense_1", "bias"),
    "scale": ("params", "BatchNorm_0", "scale"),
}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", LEAVES)
def test_weights_that_are_not_finite(programs, name, value):
    method, made = programs
    collection, layer, leaf = LEAVES[name]
    variables = jax.tree.map(np.array, toy_task.start(poisoned(0, 0.0)))
    variables[collection][layer][leaf].flat[0] = value
    with pytest.raises(FloatingPointError, match="step 1 is not finite, first in the ") as error:
        engine.fit(poisoned(0, 0.0), method, variables, 3, batch_size=8, seed=0, steps=made["stop"])
    one_line(error.value)


# Settings


MESHES = {
    "": "is written as",
    "data": "is written as",
    "data=": "is written as",
    "data=0": "is written as",
    "data=-1": "is written as",
    "data=2.5": "is written as",
    "data=two": "is written as",
    "data:8": "is written as",
    "data=2;model=2": "is written as",
    "data=2,data=2": "is written as",
    "data=2,": "is written as",
    "=2": "is written as",
    "rows=2": r"has the axes data and model, got \['rows'\]",
    "data=2,stage=2": r"has the axes data and model, got \['stage'\]",
    "data=9": "needs 9 devices, found 8",
    "data=4,model=4": "needs 16 devices, found 8",
    "data=99999999999": "needs 99999999999 devices",
}
OPTIONS = [
    ({"save_every": -0.5}, "save_every must be at least 0"),
    ({"keep": 0}, "keep must be at least 1"),
    ({"keep": -3}, "keep must be at least 1"),
    ({"processes": 0}, "processes must be at least 1"),
    ({"process": -1}, "process must be at least 0"),
    ({"process": 1}, "process 1 of 1"),
    ({"processes": 2}, "several processes need a coordinator"),
    ({"coordinator": "localhost:1"}, "several processes need a coordinator"),
    ({"resume": True}, "nothing to resume"),
    *(({"mesh": text}, told) for text, told in MESHES.items()),
]


@pytest.mark.parametrize(("options", "told"), OPTIONS)
def test_settings_out_of_range(tmp_path, capfd, options, told):
    with (
        pytest.raises(ValueError, match=told) as error,
        Options(**options).session(tmp_path / "run", {}, {}),
    ):
        pytest.fail("it began")
    one_line(error.value)
    assert lines(capfd) == []
    assert not (tmp_path / "run").exists()


BATCHES = [(0, None), (-1, None), (65, None), (10**9, None), (9, "data=2"), (12, "data=8")]


@pytest.mark.parametrize(("size", "mesh"), BATCHES)
def test_batches_of_a_wrong_size(tmp_path, programs, size, mesh):
    method, made = programs
    task = poisoned(0, 0.0)
    with (
        Options(mesh=mesh).session(tmp_path / "run", {}, {}),
        pytest.raises(ValueError, match=r"batch_size must be in 1\.\.64|does not divide") as error,
    ):
        engine.fit(
            task, method, toy_task.start(task), 3, batch_size=size, seed=0, steps=made["stop"]
        )
    one_line(error.value)


# Data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS set of seven images, as arrays in two kinds of files, and what it holds."""
    import tensorflow_datasets as tfds
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 5), np.uint8)

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image, label = (
                tfds.features.Image(shape=(6, 5, 1)),
                tfds.features.ClassLabel(num_classes=9),
            )
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples() for split in ("train", "test")}

        def _generate_examples(self):
            for row, image in enumerate(images):
                png = io.BytesIO()
                Image.fromarray(image).save(png, format="PNG")
                png.seek(0)
                yield row, {"image": png, "label": row}

    tfds.disable_progress_bar()
    Tiny(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
    shutil.copytree(root / "tfds", root / "cached")
    good = data.load("tiny", root / "cached")
    arrays = dict(zip(data.ARRAYS, (*good.train, *good.test), strict=True))
    for name in ("npy", "npz"):
        (root / name).mkdir()
    for name, array in arrays.items():
        np.save(root / "npy" / f"{name}.npy", array)
    np.savez(root / "npz" / "all.npz", **arrays)
    return root, good


FILES_OF_DATA = {
    "npy": "train_images.npy",
    "npz": "all.npz",
    "tfds": "tiny/1.0.0/tiny-test.array_record-00000-of-00001",
    "tfds info": "tiny/1.0.0/dataset_info.json",
    "cached": "tiny/1.0.0/.quantjax-train.npz",
}
CHANGES = {name: how for name, how in DAMAGE.items() if not name.startswith("a bit")} | {
    "a bit of the first bytes": flipped(0.001, 3)
}
DAMAGED_DATA = list(itertools.product(FILES_OF_DATA, CHANGES))


@pytest.mark.parametrize(("kind", "how"), DAMAGED_DATA)
def test_damaged_data(tmp_path, capfd, prepared, kind, how):
    """None of it is taken for data; a cache that is damaged is made anew."""
    root, good = prepared
    folder = Path(shutil.copytree(root / kind.split()[0], tmp_path / "data"))
    file = folder / FILES_OF_DATA[kind]
    CHANGES[how](file)
    capfd.readouterr()
    try:
        found = data.load(folder if kind.startswith("np") else "tiny", folder)
    except (ValueError, OSError) as error:
        text = one_line(error)
        assert kind != "cached"
        assert str(folder) in text or "tiny" in text
        return
    for here, there in zip(found.train + found.test, good.train + good.test, strict=True):
        np.testing.assert_array_equal(here, there)


def test_they_are_two_hundred_at_least():
    tables = (
        *(DAMAGED, DAMAGE, FOLDERS, NOTES, STATES, FULL, UNWRITABLE, POISONED, LEAVES),
        *(OPTIONS, BATCHES, DAMAGED_DATA),
    )
    assert sum(map(len, tables)) >= 200
