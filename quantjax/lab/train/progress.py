"""A progress bar with the time left; a line now and then where there is no terminal."""

import sys
import time

EVERY = 30.0  # seconds between lines


class Progress:
    """Context of one bar. `advance` counts steps; `show` sets the count and the loss."""

    def __init__(self, label: str, total: int, done: int = 0):
        self._bar = None
        self._label, self._total, self._done, self._loss = label, total, done, ""
        self._first = done
        self._began = self._told = time.monotonic()
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[loss]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(label, total=total, completed=done, loss="")

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error):
        if self._bar:
            self._bar.stop()

    def advance(self, steps: int):
        """Counts steps as done (dispatched: the device may lag a little behind)."""
        self._update(self._done + steps, self._loss)

    def show(self, done: int, loss: float, skipped: int = 0):
        """Sets the steps done and the mean loss; of those since the last call some were skipped."""
        left_out = f", {skipped} steps skipped" if skipped else ""
        self._update(done, f"loss {loss:.3f}{left_out}")

    def _update(self, done, loss):
        self._done, self._loss = done, loss
        if self._bar:
            self._bar.update(self._task, completed=done, loss=loss)
            return
        now = time.monotonic()
        if now - self._told >= EVERY and done < self._total:
            self._told = now
            left = (now - self._began) * (self._total - done) / max(done - self._first, 1)
            told = [f"{done} of {self._total} steps", loss, f"about {_duration(left)} left"]
            line = ", ".join(part for part in told if part)
            print(f"{self._label}: {line}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
