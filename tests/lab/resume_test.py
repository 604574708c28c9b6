"""`quantjax compare` and `quantjax run`, stopped by signals and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from quantjax.encoded import storage

ROOT = Path(__file__).parents[2]
# A job in the background of a shell ignores SIGINT.
CODE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
COMMAND = [sys.executable, "-c", f"{CODE}from quantjax_command import command; command()"]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
RECIPE = '''
"""A recipe of two short phases."""
import optax
from quantjax.lab import models
from quantjax.lab.train import engine, evaluation, tasks
TITLE = "two phases"

def run(context):
    task = tasks.classification(models.build("small-cnn", 3), context.load("./data"))
    variables = task.init(0)
    for name in ("first", "second"):
        method = engine.Method(optax.sgd(0.05, momentum=0.9))
        total = context.steps(30, 2)
        state = engine.fit(task, method, variables, total, batch_size=32, seed=0, label=name)
        variables = state.variables
        score = evaluation.make_evaluate(task)(variables, task.dataset.test)
        yield {"row": name, "loss": score.loss, "accuracy": score.accuracy}
'''


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        labels = rng.integers(0, 3, 64)
        images = rng.integers(0, 128, (64, 8, 8))
        images[np.arange(64), :, labels] += 100
        np.save(tmp_path / "data" / f"{part}_images.npy", images.astype(np.uint8))
        np.save(tmp_path / "data" / f"{part}_labels.npy", labels)
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path


def start(folder, *words):
    return subprocess.Popen(
        [*COMMAND, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(folder, *words):
    process = start(folder, *words)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def stopped(folder, number, when, *words):
    """Starts a command, sends a signal as soon as `when` is there, and returns what it told."""
    process = start(folder, *words)
    for _ in range(3000):
        if list(folder.glob(when)) or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == STATUS[number], err
    return err


def test_compare_goes_on_within_a_row_and_between_rows(folder):
    words = ["compare", "--dataset", "./data", "--model", "small-cnn", "--methods", "sgd", "lsq"]
    words += ["--epochs", "30", "--batch-size", "32", "--save-every", "0"]
    finished(folder, *words, "--out", "whole")
    told = stopped(
        folder, signal.SIGTERM, "cut/checkpoints/000-*/[0-9]*[0-9]", *words, "--out", "cut"
    )
    assert "nothing was written; go on with --resume (step" in told
    assert told.count("\n") == 1
    stop = "cut/checkpoints/001-*/[0-9]*[0-9]"
    told = stopped(folder, signal.SIGINT, stop, *words, "--out", "cut", "--resume")
    assert "going on at step" in told
    assert "report.html holds the finished rows, 2 so far; go on with --resume (step" in told
    _, told = finished(folder, *words, "--out", "cut", "--resume")
    assert "going on at step" in told
    assert not (folder / "cut" / "checkpoints").exists()
    rows = [
        json.loads((folder / out / "results.json").read_text())["results"]
        for out in ("whole", "cut")
    ]
    for row in rows[0] + rows[1]:
        for part in (row, *row["runs"]):
            part.pop("seconds")
    assert rows[0] == rows[1]
    # The bytes of two files of one tree differ: safetensors shuffles its metadata.
    for network in (folder / "whole" / "networks").iterdir():
        trees = [storage.load(folder / out / "networks" / network.name) for out in ("whole", "cut")]
        jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_recipe_goes_on(folder):
    words = ["run", "recipe.py", "--save-every", "0"]
    finished(folder, *words, "--out", "whole")
    stop = "cut/checkpoints/recipe/001-*/[0-9]*[0-9]"
    told = stopped(folder, signal.SIGTERM, stop, *words, "--out", "cut")
    assert "recipe.json holds 1 finished rows; go on with --resume (step" in told
    process = start(folder, *words, "--out", "cut", "--resume", "--seeds", "1")
    assert process.communicate(timeout=300)[1].count("\n") == 1  # other settings, another record
    assert process.returncode == 2
    finished(folder, *words, "--out", "cut", "--resume")
    whole, cut = (
        json.loads((folder / out / "recipe.json").read_text()) for out in ("whole", "cut")
    )
    assert cut["complete"]
    assert whole["rows"] == cut["rows"]
