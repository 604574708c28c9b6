"""The console script `quantjax`, which Ctrl-C ends within seconds from its first moment on.

It stands outside of the package, since importing that takes seconds. Python answers a signal
between two lines of the main thread. That thread may wait a minute for steps in flight, the
exception may be raised where it is swallowed (in a callback of the garbage collector) or turned
into another (in the import of an extension), and an interpreter that goes down beside computing
threads may crash. So a second thread is woken by the signal itself and ends the process if the main
thread has not.
"""

import os
import signal
import sys
import threading
import time

STATUS = 130  # what shells give for Ctrl-C
PATIENCE = 3.0  # seconds for the main thread to end by itself


def command():
    """Runs `quantjax.lab.cli.main` and exits with its status, or with 130."""
    interrupted = watch()
    os.environ["MPLBACKEND"] = "agg"  # a notebook's is inherited, and no window is opened here
    try:
        from quantjax.lab.cli import main

        status = main()
    except BaseException:
        if interrupted.is_set():
            leave()
        raise
    if interrupted.is_set():
        leave()
    sys.exit(status)


def watch(patience: float = PATIENCE) -> threading.Event:
    """From now on SIGINT ends this process after `patience` seconds at the latest.

    Returns the event of it. Where SIGINT is ignored, as in a job in the background, it stays so.
    """
    interrupted = threading.Event()
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return interrupted
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def wait():
        while os.read(read, 1)[0] != signal.SIGINT:
            pass
        interrupted.set()
        time.sleep(patience)
        leave()

    def answer(*signal_and_frame):
        interrupted.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, answer)
    threading.Thread(target=wait, daemon=True).start()
    return interrupted


def leave():
    """Says what is on disk and ends the process; files are replaced whole, so none is half."""
    told = getattr(sys.modules.get("quantjax.lab.interrupts"), "on_disk", "nothing was written")
    sys.stdout.flush()
    print(f"quantjax: interrupted; {told}", file=sys.stderr, flush=True)
    os._exit(STATUS)
