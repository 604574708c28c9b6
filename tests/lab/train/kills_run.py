"""Trains every method in one run that keeps checkpoints: what `kills_test` starts and kills."""

import contextlib
import itertools
import os
import pickle
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

import quantjax as qj
from experiments.alq import training
from quantjax.lab.train import checkpoints, engine, evaluation, phases
from quantjax.lab.train import session as session_lib
from tests.lab.train import toy_task

STEPS = 10  # of every phase
EVERY = 0.01  # seconds: no step is shorter, so that a kill hits the one that it is meant for
SCHEDULE = (
    qj.Phase("prune", 3, 1e-2, 0.6),
    qj.Phase("basis", 3, 1e-2),
    qj.Phase("coordinate", 4, 1e-2),
)


def _momentum():
    return optax.sgd(optax.cosine_decay_schedule(0.05, STEPS), momentum=0.9)


METHODS = {
    "float": lambda: engine.Method(_momentum()),
    "psg": lambda: engine.Method(qj.psg(0.05, qj.uniform(4, momentum=0.1), strength=20.0)),
    "uniform": lambda: engine.Method(_momentum(), qj.uniform(4), qj.uniform_input(4)),
    "lsq": lambda: engine.Method(optax.adam(0.01), qj.lsq(4), qj.lsq_input(4)),
    "rq": lambda: engine.Method(optax.adam(0.01), qj.rq(3)),
    "srq": lambda: engine.Method(optax.adam(0.01), qj.srq(3, dropbits=True)),
    "dropbits": lambda: engine.Method(
        optax.adam(0.5), qj.srq(4, learn_bits=True, freeze_after=7, penalty=1.0)
    ),
    "magnitude": lambda: engine.Method(_momentum(), qj.magnitude(0.3, end=9, every=2)),
    "parq": lambda: engine.Method(
        qj.proximal(optax.adam(0.01), qj.uniform(2, fit="error"), qj.parq(qj.annealed(9)))
    ),
    "fq": lambda: engine.Method(  # fitted anew after 1, 3 and 7 steps
        _momentum(), qj.chain(qj.surgery(0.5, end=6), qj.focused(3, refit_every=1))
    ),
}
NAMES = (*METHODS, "alq", "search", "deploy")  # of the phases, in their order


def train() -> dict:
    """Trains all and returns {name: what came out of it}."""
    task = toy_task.make()
    start = toy_task.start(task)
    validation = toy_task.split(30, 2)
    out = {
        name: engine.fit(task, make(), start, STEPS, batch_size=16, seed=3, label=name)
        for name, make in METHODS.items()
    }
    out["alq"] = training.train(
        task,
        validation,
        start,
        training.structured(start["params"], 2, blocks=(2, 1)),
        SCHEDULE,
        batch_size=16,
        seed=3,
        every=2,
    )
    evaluate = evaluation.make_evaluate(task)
    parts = [
        phases.Phase("search", engine.Method(optax.adam(0.005)), STEPS),
        phases.Phase("deploy", engine.Method(optax.adam(0.01), qj.uniform(2)), STEPS),
    ]

    def score(variables):
        return evaluate(variables, validation).accuracy

    out["phases"] = phases.run(task, parts, start, score, batch_size=16, seed=3, every=3)
    return out


def leaves(tree) -> dict:
    """Returns {path: array} of all numbers and words of a tree."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(_plain(leaf)) for path, leaf in flat}


def _plain(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


@contextlib.contextmanager
def _without_cache():
    """Within, programs are compiled: one that was loaded is not written whole."""
    try:
        _use_cache(False)
        yield
    finally:
        _use_cache(True)


def _use_cache(use):
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # what it has decided once


class Program:
    """A jitted function that only the first process traces and compiles; the others load it."""

    def __init__(self, file: Path, function):
        self._file, self._function, self._loaded = file, function, None

    def __call__(self, *args):
        if self._loaded is None:
            if not self._file.is_file():
                lowered = self._function.lower(*args)
                with _without_cache():
                    parts = serialize_executable.serialize(lowered.compile())
                self._file.write_bytes(pickle.dumps(parts))
            parts = pickle.loads(self._file.read_bytes())
            self._loaded = serialize_executable.deserialize_and_load(*parts)
        return self._loaded(*args)


def share_programs(folder: Path):
    """Makes all processes share the engine's programs: nearly all of a start would be tracing."""
    count = itertools.count()
    make_steps, init_state = engine.make_steps, engine.init_state

    def init(task, variables, method, seed):
        start = jax.jit(partial(init_state, task, method=method, seed=seed))
        return Program(folder / f"{next(count):02d}", start)(dict(variables))

    def make(task, method):
        steps = make_steps(task, method)
        return steps._replace(one=Program(folder / f"{next(count):02d}", steps.one))

    engine.init_state, engine.make_steps = init, make


def main(out: Path, programs: Path, folder: Path | None, seconds: float, resume: bool, to):
    """Trains and writes all leaves; tells (phase, n) as its n-th step of this process is done.

    Args:
      out: file of the leaves; what is told on stderr goes beside it.
      programs: folder that all processes share.
      folder: of the checkpoints; None: none are kept.
      seconds, resume: of the journal.
      to: connection.
    """
    from tests import quick  # it compiles, and no process may that others are forked from

    os.dup2(os.open(out.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    share_programs(programs)
    session = session_lib.Session()
    if folder is not None:

        class Told(checkpoints.Phase):
            def __init__(self, journal, folder):
                super().__init__(journal, folder)
                self._name, self._count = folder.name.split("-")[1], itertools.count()

            def tell(self):
                to.send((self._name, next(self._count)))
                time.sleep(EVERY)

            def restored(self, state, seen):
                self.tell()
                return super().restored(state, seen)

            def due(self):
                self.tell()
                return super().due()

        checkpoints.Phase, checkpoints.SHARE = Told, 0
        about = {"what": "all methods"}
        journal = checkpoints.Journal(folder, about, resume=resume, seconds=seconds, keep=2)
        session = session_lib.Session(journal=journal)
    with quick.compilation(), session_lib.use(session):
        np.savez(out, **leaves(train()))
