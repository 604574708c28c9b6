"""What an interrupted command says of its files, and how training is asked to stop.

`quantjax_command` catches the signals: where training asks whether one came (`polled`) it sets
`requested` instead of raising, so that what was trained is saved first.
"""

import contextlib
import threading

STATUS = 130  # what shells give for Ctrl-C

on_disk = "nothing was written"
checkpoint = ""
polled = False  # training looks at `requested` after every step
saving = False  # a checkpoint is being written: worth waiting for
several = False  # processes: after a failure the others are not waited for
requested = threading.Event()


def tell(what: str):
    """Sets what is on disk by now."""
    global on_disk
    on_disk = what


def tell_checkpoint(what: str):
    """Sets what is said of the newest checkpoint."""
    global checkpoint
    checkpoint = what


@contextlib.contextmanager
def polling():
    """Within, signals are answered by who asks `requested`."""
    global polled
    before, polled = polled, True
    try:
        yield
    finally:
        polled = before


@contextlib.contextmanager
def patient():
    """Within, a process that was asked to stop may take its time."""
    global saving
    saving = True
    try:
        yield
    finally:
        saving = False
