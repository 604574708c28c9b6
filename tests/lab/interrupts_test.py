"""Ctrl-C ends a process whose main thread does not answer."""

import os
import signal
import subprocess
import sys

import pytest

# A job in the background of a shell is started with SIGINT ignored.
DEAF = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from quantjax.lab import interrupts

interrupts.watch(patience=0.2)
if len(sys.argv) > 1:
    interrupts.tell(sys.argv[1])
ready = False
while True:
    try:
        if not ready:
            ready = True
            print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:  # as a callback of the garbage collector swallows it
        pass
"""
ANSWERS = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from quantjax.lab import cli

def work(arguments):
    print("ready", flush=True)
    time.sleep(60)

cli._main = work
cli.command()
"""


def interrupted(code, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((), "nothing was written"), (("two rows are on disk",), "two rows are on disk")],
)
def test_a_thread_that_swallows_it_is_left_behind(arguments, told):
    assert interrupted(DEAF, *arguments) == (130, f"quantjax: interrupted; {told}\n")


def test_a_command_that_answers_ends_with_130():
    assert interrupted(ANSWERS) == (130, "quantjax: interrupted; nothing was written\n")
