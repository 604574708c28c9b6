"""The options of commands that train: where, in what precision, and what is kept on the way."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax

from quantjax.lab import interrupts
from quantjax.lab.train import checkpoints, meshes, monitor
from quantjax.lab.train import session as session_lib

HEARTBEAT = 30  # seconds without a sign of life, after which a process counts as lost


@dataclasses.dataclass(frozen=True)
class Options:
    """How `quantjax compare` and `quantjax run` train."""

    resume: bool = False
    """Go on where an interrupted run of the same settings stopped, bit for bit."""
    save_every: float = checkpoints.SECONDS
    """Seconds between checkpoints; one is written at the end of every phase, too."""
    keep: int = checkpoints.KEEP
    """Checkpoints of a phase that goes on; each holds the last state and the best network."""
    mesh: str | None = None
    """Devices, such as data=8 or data=4,model=2: batches over data, weights in parts over model."""
    precision: Literal["float32", "bf16"] = "float32"
    """What layers compute in; weights, grids and losses stay float32."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A step with a non-finite loss or weight ends the phase, or is left out and counted."""
    tensorboard: Path | None = None
    """Folder for TensorBoard: losses, accuracies, histograms of weights."""
    profile: Path | None = None
    """Folder for a trace of five steps, for Perfetto or TensorBoard."""
    coordinator: str | None = None
    """host:port of the first of several processes, which share one mesh."""
    processes: int = 1
    """How many processes there are."""
    process: int = 0
    """Which of them this is."""

    @property
    def about(self) -> dict:
        """What of it results depend on, by what is not as it is by default."""
        told = {"precision": self.precision, "on_nan": self.on_nan}
        usual = Options()
        return {name: value for name, value in told.items() if value != getattr(usual, name)}

    @contextlib.contextmanager
    def session(self, folder: Path, about: dict, versions: dict) -> Iterator[session_lib.Session]:
        """Everything that trains within does so by these options; checkpoints lie in `folder`.

        They are removed at the end, and stay where it is not reached.

        Args:
          folder: for this run alone.
          about: what the run is a function of, as JSON; checked on resuming.
          versions: of packages.

        Raises:
          ValueError: a mesh that does not exist, nothing to resume, a run of other settings,
            numbers out of range; OSError: a folder cannot be written.
        """
        for name, least in (("save_every", 0), ("keep", 1), ("processes", 1), ("process", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.process >= self.processes:
            raise ValueError(f"process {self.process} of {self.processes}: they count from 0")
        if (self.coordinator is None) != (self.processes == 1):
            raise ValueError("several processes need a coordinator, host:port of the first one")
        if self.coordinator is not None and not jax.distributed.is_initialized():
            jax.distributed.initialize(
                self.coordinator,
                self.processes,
                self.process,
                heartbeat_timeout_seconds=HEARTBEAT,
            )
            interrupts.several = True
        mesh = None if self.mesh is None else meshes.make(self.mesh)
        if self.processes > 1 and mesh is None:
            raise ValueError("several processes need a mesh, such as --mesh data=2")
        trace = None if self.profile is None else monitor.Trace(self.profile)
        board = None if self.tensorboard is None else monitor.Board(self.tensorboard)
        # Last, since it puts the checkpoints of an earlier run aside.
        journal = checkpoints.Journal(
            folder,
            {**about, **self.about},
            resume=self.resume,
            seconds=self.save_every,
            keep=self.keep,
            versions=versions,
        )
        session = session_lib.Session(
            mesh=mesh,
            precision=session_lib.PRECISIONS[self.precision],
            on_nan=self.on_nan,
            journal=journal,
            board=board,
            trace=trace,
        )
        with session_lib.use(session):
            yield session
        if trace is not None:
            trace.stop()
        journal.finish()
