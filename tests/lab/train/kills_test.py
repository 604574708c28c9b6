"""SIGKILL at random moments: a resumed run ends with the bits of one that nothing disturbed."""

import collections
import json
import multiprocessing
import time

import numpy as np
import pytest

from tests.lab.train import kills_run

CONTEXT = multiprocessing.get_context("forkserver")  # a fork of what has imported all takes no time
CONTEXT.set_forkserver_preload(["tests.lab.train.kills_run"])
PASSES = 5  # a kill that comes when its phase is just over is made up for in another pass


class Started:
    """A process that trains."""

    def __init__(self, out, programs, folder=None, seconds=0.0, resume=False):
        self.out, self._events, theirs = out, *CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(
            target=kills_run.main, args=(out, programs, folder, seconds, resume, theirs)
        )
        self._process.start()
        theirs.close()

    def wait_for(self, name, count):
        """Returns the seconds that the last step took, once that one of a phase is done."""
        before = time.monotonic()
        while True:
            event, now = self._events.recv(), time.monotonic()
            if event == (name, count):
                return now - before
            before = now

    def kill(self):
        """Returns the phases that it has told of since it was last asked."""
        self._process.kill()
        return [name for name, _ in self._rest()]

    def end(self):
        """Returns the leaves that came out, once it is over."""
        self._rest()
        told = self.out.with_suffix(".err").read_text()
        assert self._process.exitcode == 0, told
        with np.load(self.out) as found:
            return dict(found), told

    def _rest(self):
        events = []
        try:
            while True:
                events.append(self._events.recv())
        except EOFError:
            self._events.close()
        self._process.join()
        return events


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, programs):
    """What comes out where no checkpoints are kept, either."""
    return Started(tmp_path_factory.mktemp("undisturbed") / "out.npz", programs).end()[0]


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    other = [
        name
        for name, leaf in found.items()
        if leaf.dtype != expected[name].dtype or leaf.tobytes() != expected[name].tobytes()
    ]
    assert not other


def newest(folder, name):
    """Returns the step of the newest checkpoint of a phase, 0 if none."""
    return max((int(at.name) for at in folder.glob(f"*-{name}/*") if at.name.isdigit()), default=0)


def kill_each(tmp_path, programs, expected, seed, times):
    """Kills every phase so many times, at random moments; returns the counts."""
    rng = np.random.default_rng(seed)
    kills, saves = collections.Counter(), 0
    for number in range(PASSES):
        folder, out = tmp_path / f"run{number}", tmp_path / f"out{number}.npz"
        started = 0
        for name in kills_run.NAMES:
            while kills[name] < times:
                at = newest(folder, name)
                if at == kills_run.STEPS:
                    break  # over, and cannot be killed in this pass
                process = Started(
                    out, programs, folder, float(rng.choice([0.0, 0.1])), bool(started)
                )
                started += 1
                took = process.wait_for(name, int(rng.integers(kills_run.STEPS - at + 1)))
                time.sleep(rng.uniform(0, took))
                kills[[name, *process.kill()][-1]] += 1
                saves += any(folder.glob("*/*.orbax-checkpoint-tmp*"))
        found, told = Started(out, programs, folder, resume=bool(started)).end()
        same_bits(found, expected)
        assert "damaged" not in told
        if min(kills[name] for name in kills_run.NAMES) >= times:
            break
    counts = {"seed": seed, "kills": sum(kills.values()), "in saves": saves, **kills}
    print(json.dumps(counts))
    assert min(kills[name] for name in kills_run.NAMES) >= times
    return counts


def test_killed_in_every_method_and_resumed_all_bits_are_the_same(
    tmp_path, programs, undisturbed, record_property
):
    record_property("kills", kill_each(tmp_path, programs, undisturbed, 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_killed_twenty_times_in_every_method(
    tmp_path, programs, undisturbed, record_property, seed
):
    """Twice each: also what goes on from a checkpoint is killed again."""
    record_property("kills", kill_each(tmp_path, programs, undisturbed, seed, 2))
