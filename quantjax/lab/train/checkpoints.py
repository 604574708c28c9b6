"""Checkpoints of a run, by Orbax: a folder for each of its phases, in the order of their beginning.

A run is a function of its settings, so it is continued by running it again: phases that were
finished give back their last state, the one that was interrupted goes on from its newest
checkpoint, and everything between is computed anew, bit for bit.
"""

import contextlib
import functools
import json
import logging
import re
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from quantjax.encoded import storage
from quantjax.lab import interrupts

FORMAT = 1
SECONDS = 60.0  # between checkpoints
KEEP = 2  # in a phase that goes on
SHARE = 20  # training takes that many times what its checkpoints take, at least
SHOWN = 3  # differences in a message
OURS = r"\d{3}-|damaged-\d{3}-|\.?run\.json"  # how names in a run's folder begin
LONGEST = 200  # characters of another library's message


class Seen(NamedTuple):
    """What watches a phase and is saved beside its state."""

    history: list  # of tuples of numbers and strings; grows
    kept: dict  # {"best": a tree of arrays}, always of one structure


def nothing() -> Seen:
    """Returns that of a phase that nobody watches."""
    return Seen([], {})


class Journal:
    """The checkpoints of a run."""

    def __init__(
        self,
        folder: Path,
        about: dict,
        *,
        resume: bool = False,
        seconds: float = SECONDS,
        keep: int = KEEP,
        versions: dict | None = None,
    ):
        """Opens the folder, or makes it.

        Args:
          folder: of this run alone.
          about: what the run is a function of, as JSON; checked on resuming.
          resume: go on with what lies there.
          seconds: between checkpoints.
          keep: checkpoints of a phase that goes on.
          versions: of packages; where they differ on resuming, it is told.

        Raises:
          ValueError: nothing to resume, a run with other settings (says which), or a folder of
            other files; OSError: the folder cannot be written.
        """
        self.folder, self.seconds, self.keep = Path(folder), seconds, keep
        self.resumed = resume
        self._began = 0
        _quiet()
        about = json.loads(json.dumps({"format": FORMAT, **about}))
        note = self.folder / "run.json"
        if resume:
            self._check(note, about, versions or {})
        elif self.folder.exists() and jax.process_index() == 0:
            # A run that was killed as it began or ended may lack its note.
            others = [at.name for at in self.folder.iterdir() if not re.match(OURS, at.name)]
            if others and not note.is_file():
                raise ValueError(f"{self.folder} holds other files than a run's: {others[0]}")
            before = self.folder.with_name(f"{self.folder.name}.before")
            shutil.rmtree(before, ignore_errors=True)
            self.folder.rename(before)
            _tell(f"starting anew; an interrupted run's checkpoints are in {before} now")
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            storage.replace(
                note, json.dumps({"about": about, "versions": versions or {}}, indent=1).encode()
            )

    def phase(self, label: str) -> "Phase":
        """Returns the log of the next phase.

        Raises:
          ValueError: on resuming, this phase was another one.
        """
        number, self._began = self._began, self._began + 1
        name = f"{number:03d}-{re.sub('[^a-z0-9]+', '-', label.lower()).strip('-')}"
        others = [found.name for found in self.folder.glob(f"{number:03d}-*") if found.name != name]
        if others:
            raise ValueError(
                f"{self.folder} is of another run: its phase {number} is {others[0]}, not {name}"
            )
        return Phase(self, self.folder / name)

    def finish(self):
        """Removes the checkpoints of a run that is over."""
        if jax.process_index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others lie beside it
                self.folder.parent.rmdir()
        interrupts.tell_checkpoint("")

    def _check(self, note: Path, about: dict, versions: dict):
        if not note.is_file():
            raise ValueError(f"nothing to resume: {self.folder} holds no run")
        try:
            found = json.loads(note.read_text())
            there, then = dict(found["about"]), dict(found["versions"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{note} is damaged: no run to resume") from None
        differ = _differences(there, about)
        if differ:
            raise ValueError(f"{self.folder} is of another run: {differ}")
        differ = _differences(then, versions)
        if differ:
            _tell(f"resuming with other versions, so not bit for bit: {differ}")


class Phase:
    """The checkpoints of a phase; a context, within which they are written in the background."""

    def __init__(self, journal: Journal, folder: Path):
        self._journal, self._folder = journal, folder
        self.complete = False  # it was at its end when it was saved
        self._saved_at, self._cost = time.monotonic(), 0.0
        self._manager = self._opened()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self._settle()
        self._close()

    def restored(self, state, seen: Seen):
        """Returns the state of the newest whole checkpoint, or the one given; fills `seen`.

        Raises:
          ValueError: a checkpoint of another model or method; says what differs.
        """
        if not self._journal.resumed:
            return state
        like = {"state": state, "kept": seen.kept}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                told = self._told(step)
                differ = _differences(
                    {name: kind for name, kind, _ in told["leaves"]}, _kinds(_named(like))
                )
                if not differ:
                    leaves = self._read(step, _named(like), told)
            except Exception as error:  # whatever Orbax and its storage say of damage
                if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # nothing is wrong with the checkpoint
                self._put_aside(step, error)
                continue
            if differ:
                raise ValueError(f"{self._folder} is of another model or method: {differ}")
            found = jax.tree.unflatten(jax.tree.structure(like), leaves)
            seen.history[:] = [tuple(row) for row in told["history"]]
            seen.kept.update(found["kept"])
            self.complete = told["complete"]
            if not self.complete:
                _tell(f"{self._folder.name}: going on at step {step}")
            return found["state"]
        return state

    def due(self) -> bool:
        """Whether a checkpoint is due."""
        seconds = self._journal.seconds
        wait = max(seconds, SHARE * self._cost) if seconds else 0  # 0: after every step
        return time.monotonic() - self._saved_at >= wait

    def save(self, state, seen: Seen, step: int, *, complete: bool = False):
        """Writes a checkpoint in the background, from copies made now.

        What cannot be written is told; training goes on, and older checkpoints stay.
        """
        began = time.monotonic()
        self._settle()
        if step == self._manager.latest_step():
            return
        # Copies, since the next step takes the buffers.
        named = {name: _own(leaf) for name, leaf in _named({"state": state, "kept": seen.kept})}
        told = {
            "complete": complete,
            "history": [list(row) for row in seen.history],
            "leaves": [
                [name, kind, _digest(named[name])] for name, kind in _kinds(named.items()).items()
            ],
        }
        # Orbax takes no empty arrays; there is nothing to restore of them.
        arrays = {f"{i:05d}": leaf for i, leaf in enumerate(named.values()) if leaf.size}
        text = json.dumps(told, default=lambda scalar: scalar.item())
        told = {"text": text, "digest": zlib.crc32(text.encode())}
        try:
            with interrupts.patient():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        arrays=ocp.args.StandardSave(arrays), told=ocp.args.JsonSave(told)
                    ),
                    force=True,
                )
                if interrupts.requested.is_set():
                    self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
        else:
            self.complete = complete
            interrupts.tell_checkpoint(f"go on with --resume (step {step} of {self._folder.name})")
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - began

    def _settle(self):
        """Waits for the checkpoint that is being written."""
        try:
            with interrupts.patient():
                self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)

    def _opened(self) -> ocp.CheckpointManager:
        if jax.process_index() == 0:
            # Not by Orbax, which fails where a thread of a failed one still writes.
            for half in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(half, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._journal.keep,
            enable_async_checkpointing=True,
            # Where none can be made, the threads that write into them would wait for minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._folder.absolute(), options=options)

    def _failed(self, error: Exception):
        """Tells that a checkpoint could not be written, and removes what there is of it."""
        _tell(
            f"a checkpoint of {self._folder.name} could not be written ({_brief(error)}); "
            "earlier ones stay, training goes on"
        )
        self._close()
        with contextlib.suppress(Exception):
            self._manager = self._opened()

    def _close(self):
        for _ in range(3):  # it raises what its threads have met and what has been told, in turn
            with contextlib.suppress(Exception):
                self._manager.close()
                break

    def _put_aside(self, step: int, error: Exception):
        """Moves a damaged checkpoint out of the way of the next one of its step."""
        name = f"damaged-{self._folder.name}-{step}"
        _tell(
            f"{self._folder.name}: the checkpoint of step {step} is damaged ({_brief(error)}) "
            f"and moved to {name}"
        )
        if jax.process_index() == 0:
            shutil.rmtree(self._folder.with_name(name), ignore_errors=True)
            with contextlib.suppress(OSError):
                (self._folder / str(step)).rename(self._folder.with_name(name))
        self._manager.reload()

    def _told(self, step: int) -> dict:
        args = ocp.args.Composite(told=ocp.args.JsonRestore())
        told = self._manager.restore(step, args=args)["told"]
        if zlib.crc32(told["text"].encode()) != told["digest"]:
            raise ValueError("its description is not what was written")
        return json.loads(told["text"])

    def _read(self, step: int, named: list, told: dict) -> list:
        """Returns the leaves, where those of `named` lie, after comparing their digests."""
        like = {f"{i:05d}": _abstract(leaf) for i, (_, leaf) in enumerate(named)}
        full = {key: leaf for key, leaf in like.items() if leaf.size}
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore(full))
        arrays = self._manager.restore(step, args=args)["arrays"]
        leaves = []
        for (name, leaf), key, (_, _, digest) in zip(named, like, told["leaves"], strict=True):
            if key in full and digest is not None and digest != _digest(_own(arrays[key])):
                raise ValueError(f"{name} is not what was written")
            leaves.append(_typed(arrays[key], leaf) if key in full else leaf)
        return leaves


def _named(tree) -> list:
    """Returns [(path, leaf)]."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _kinds(named) -> dict:
    """Returns {path: dtype and shape}, as messages show them."""
    raw = ((name, _raw(leaf)) for name, leaf in named)
    return {name: f"{leaf.dtype.name}{list(leaf.shape)}" for name, leaf in raw}


def _raw(leaf):
    """Returns a leaf without what Orbax does not know: keys as their data."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _own(leaf):
    """Returns a copy that no step can take: on the host where this process sees all of it."""
    leaf = _raw(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.numpy.copy(leaf)
    return np.array(leaf)


def _abstract(leaf):
    leaf = _raw(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _typed(found, leaf):
    """Returns what was found as a leaf of its kind, bound to a device only where that one is."""
    if isinstance(leaf, jax.Array) and not leaf.committed:
        found = jax.numpy.array(np.asarray(found))
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf))
    return found


def _digest(array) -> int | None:
    return zlib.crc32(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else None


def _differences(there: dict, here: dict) -> str:
    """Returns the first differences of two flat dicts, as a message shows them; "" if none."""
    found = [
        f"{name} {there.get(name, 'missing')}, here {here.get(name, 'missing')}"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]
    more = [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "; ".join([*found[:SHOWN], *more])


def _brief(error: Exception) -> str:
    """Returns what another library says, without the dumps that it appends."""
    lines = str(error).strip().splitlines()
    text = re.split(r" \[\w+(?:\[\d+\])?=", lines[0])[0] if lines else type(error).__name__
    text = text.rsplit('": ', 1)[-1]  # which file of which file of which database
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@functools.cache
def _quiet():
    """Leaves out the traces that Orbax's threads print of errors which it raises, too."""

    def ours(record):
        return "orbax" not in record.pathname and "orbax" not in record.getMessage()

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(ours)
    usual = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":  # of writes beside one that failed
            usual(unraisable)

    sys.unraisablehook = hook


def _tell(text: str):
    print(f"quantjax: {text}", file=sys.stderr, flush=True)
