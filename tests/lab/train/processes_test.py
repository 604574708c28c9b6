"""Two real processes on one machine, beside one."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.lab.train import processes_run

ROOT = Path(__file__).parents[3]


def unused_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(folder, total, processes, process, port, *resume):
    words = [folder, total, processes, process, port, *resume]
    # Here the devices of a process are simulated; there each has one.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.lab.train.processes_run", *map(str, words)],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process):
    out, err = process.communicate(timeout=300)
    return np.array([line.split() for line in out.splitlines() if line[:1].isdigit()], float), err


def test_two_processes_give_the_losses_of_one(tmp_path):
    port = unused_port()
    both = [start(tmp_path, 20, 2, process, port) for process in (0, 1)]
    expected = np.array(processes_run.losses(20))
    for process in both:
        found, err = told(process)
        assert process.returncode == 0, err
        np.testing.assert_array_equal(found[:, 0], expected[:, 0])
        np.testing.assert_allclose(found[0, 1], expected[0, 1], atol=1e-5)
        np.testing.assert_allclose(found[:, 1], expected[:, 1], atol=1e-3)


@pytest.mark.slow
def test_the_death_of_one_ends_the_other_and_one_goes_on(tmp_path):
    total, port = 3000, unused_port()
    both = [start(tmp_path, total, 2, process, port) for process in (0, 1)]
    for _ in range(2400):
        if list(tmp_path.glob("run/000-*/[0-9]*[0-9]")):
            break
        time.sleep(0.05)
    both[1].kill()
    killed = time.monotonic()
    _, err = told(both[0])
    assert time.monotonic() - killed < 60
    both[1].communicate()
    assert both[0].returncode == 2
    assert "another process is gone; start again with --resume" in err
    alone = start(tmp_path, total, 1, 0, port, "resume")
    found, err = told(alone)
    assert alone.returncode == 0, err
    assert "going on at step" in err
    assert found[-1, 0] == total
    assert found[0, 0] > 1
