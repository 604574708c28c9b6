"""Ctrl-C that ends a command within seconds, whatever the device still computes.

Python answers a signal between two lines of the main thread. That thread may wait a minute for
steps in flight, the exception may be raised where it is swallowed (in a callback of the garbage
collector), and an interpreter that goes down beside computing threads may crash. So a second
thread is woken by the signal itself and ends the process if the main thread has not.
"""

import os
import signal
import sys
import threading
import time

STATUS = 130  # what shells give for Ctrl-C
PATIENCE = 3.0  # seconds for the main thread to end by itself

_on_disk = "nothing was written"


def tell(on_disk: str):
    """Sets what an interruption says of the files."""
    global _on_disk
    _on_disk = on_disk


def watch(patience: float = PATIENCE):
    """From now on SIGINT ends this process, at the latest after `patience` seconds."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def wait():
        while os.read(read, 1)[0] != signal.SIGINT:
            pass
        time.sleep(patience)
        leave()

    threading.Thread(target=wait, daemon=True).start()


def leave():
    """Says what is on disk and ends the process; files are replaced whole, so none is half."""
    sys.stdout.flush()
    print(f"quantjax: interrupted; {_on_disk}", file=sys.stderr, flush=True)
    os._exit(STATUS)
