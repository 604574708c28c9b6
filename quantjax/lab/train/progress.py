"""A progress bar with the time left; silent when the output is not a terminal."""

import sys


class Progress:
    """Context of one bar. `advance` counts steps; `show` sets the count and the loss."""

    def __init__(self, label: str, total: int):
        self._bar = None
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
            self._task = self._bar.add_task(label, total=total, loss="")

    def __enter__(self):
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error):
        if self._bar:
            self._bar.stop()

    def advance(self, steps: int):
        """Counts steps as done (dispatched: the device may lag a little behind)."""
        if self._bar:
            self._bar.advance(self._task, steps)

    def show(self, done: int, loss: float):
        """Sets the steps done and the mean loss."""
        if self._bar:
            self._bar.update(self._task, completed=done, loss=f"loss {loss:.3f}")
