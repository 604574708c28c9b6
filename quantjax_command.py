"""The console script `quantjax`, which Ctrl-C and SIGTERM end within seconds from its first moment.

It stands outside of the package, since importing that takes seconds. Python answers a signal
between two lines of the main thread. That thread may wait a minute for steps in flight, the
exception may be raised where it is swallowed (in a callback of the garbage collector) or turned
into another (in the import of an extension), and an interpreter that goes down beside computing
threads may crash. So a second thread is woken by the signal itself and ends the process if the main
thread has not. Training that keeps checkpoints is asked to stop instead, and saves one first.
"""

import os
import signal
import sys
import threading
import time

# What shells give for them.
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE = 3.0  # seconds for the main thread to end by itself
SAVING = 60.0  # and while it writes a checkpoint


def command():
    """Runs `quantjax.lab.cli.main` and exits with its status, or with 130 or 143."""
    interrupted = Interrupted()
    interrupted.watch()
    os.environ["MPLBACKEND"] = "agg"  # a notebook's is inherited, and no window is opened here
    try:
        from quantjax.lab.cli import main

        status = main()
    except BaseException:
        if interrupted.is_set():
            interrupted.leave()
        raise
    if interrupted.is_set():
        interrupted.leave()
    if status and _lab("several"):
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


class Interrupted(threading.Event):
    """Whether a signal came that ends this process."""

    def __init__(self):
        super().__init__()
        self.status = STATUS[signal.SIGINT]

    def watch(self):
        """From now on SIGINT and SIGTERM end this process after PATIENCE seconds at the latest.

        Where a signal is ignored, as SIGINT is in a job in the background, it stays so.
        """
        usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        mine = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
        if not mine:
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

        def wait():
            while (number := os.read(read, 1)[0]) not in mine:
                pass
            self.status = STATUS[number]
            self.set()
            began = time.monotonic()
            while time.monotonic() - began < (SAVING if _lab("saving") else PATIENCE):
                time.sleep(0.05)
            self.leave()

        for number in mine:
            signal.signal(number, self._answer)
        threading.Thread(target=wait, daemon=True).start()

    def _answer(self, number, frame):
        del frame
        asked = _lab("requested")
        self.status = STATUS[number]
        self.set()
        if _lab("polled") and not asked.is_set():
            asked.set()
            return
        raise KeyboardInterrupt

    def leave(self):
        """Says what is on disk and ends the process; files are replaced whole, so none is half."""
        told = [_lab("on_disk") or "nothing was written", _lab("checkpoint")]
        sys.stdout.flush()
        text = "; ".join(part for part in told if part)
        print(f"quantjax: interrupted; {text}", file=sys.stderr, flush=True)
        os._exit(self.status)


def _lab(name: str):
    return getattr(sys.modules.get("quantjax.lab.interrupts"), name, None)
