"""What is written of training for other tools: TensorBoard's events, traces for Perfetto."""

import sys
from pathlib import Path

import jax
import numpy as np

from quantjax.core import paths

TRACED = (3, 8)  # first step of a trace and the one after its last: the programs are compiled


class Board:
    """Scalars and histograms of every report, for `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path):
        """Opens the folder; raises ValueError without tensorboardX, OSError where it is closed."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError(
                "--tensorboard needs tensorboardX: pip install 'quantjax[lab]'"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._writers, self._open = folder, {}, SummaryWriter

    def add(self, label: str, report):
        """Adds a report of `engine.train`: means since the last one, and the weights."""
        if label not in self._writers:
            name = label.replace("/", "-").replace(",", "").replace(" ", "-")
            self._writers[label] = self._open(str(self._folder / name), flush_secs=10)
        writer = self._writers[label]
        for name in ("loss", "accuracy", "skipped"):
            writer.add_scalar(f"train/{name}", getattr(report, name), report.steps)
        trained = {"params": report.state.params, "learned": report.state.state.learned}
        for path, leaf in paths.flatten(trained)[0].items():
            values = np.asarray(leaf, np.float32).ravel()
            if values.size:
                writer.add_histogram(path, values, report.steps)
        writer.flush()


class Trace:
    """A trace of a few steps of the first phase that has them."""

    def __init__(self, folder: Path):
        """Takes the folder of the trace; raises OSError where it cannot be made."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._running, self._done = folder, False, False

    def before(self, step: int):
        """Called before a phase's step of that number."""
        if step >= TRACED[0] and not self._running and not self._done:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, state):
        """Called when so many steps of a phase are dispatched."""
        if self._running and step >= TRACED[1]:
            jax.block_until_ready(state)
            self.stop()

    def stop(self):
        """Ends a running trace, as a phase does that is shorter."""
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._done = False, True
            print(
                f"quantjax: trace of {TRACED[1] - TRACED[0]} steps in {self._folder}: "
                "perfetto_trace.json.gz for ui.perfetto.dev, or tensorboard --logdir",
                file=sys.stderr,
            )
