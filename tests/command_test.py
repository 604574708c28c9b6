"""Ctrl-C ends the command, also where the main thread does not answer or the import does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A job in the background of a shell is started with SIGINT ignored.
FIRST = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)
import quantjax_command
quantjax_command.PATIENCE = 0.2

def ready():
    print("ready", flush=True)
    time.sleep(60)

def main_is(main):
    sys.modules["quantjax"] = sys.modules["quantjax.lab"] = types.ModuleType("stands in")
    sys.modules["quantjax.lab.cli"] = types.SimpleNamespace(main=main)
    quantjax_command.command()
"""
ANSWERS = """
def main():
    try:
        ready()
    except KeyboardInterrupt:
        return 130
main_is(main)
"""
SWALLOWS = """
def main():  # as a callback of the garbage collector does
    sys.modules["quantjax.lab.interrupts"] = types.SimpleNamespace(on_disk="two rows are on disk")
    try:
        ready()
    except KeyboardInterrupt:
        time.sleep(60)
main_is(main)
"""
TURNS_IT_INTO_ANOTHER = """
def main():  # as the import of an extension does
    try:
        ready()
    except KeyboardInterrupt:
        raise ImportError("while initializing")
main_is(main)
"""
IGNORES = """
signal.signal(signal.SIGINT, signal.SIG_IGN)

def main():
    print("ready", flush=True)
    time.sleep(1)
    return 7
main_is(main)
"""


def interrupted(code):
    process = subprocess.Popen(
        [sys.executable, "-c", FIRST + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (ANSWERS, "nothing was written"),
        (SWALLOWS, "two rows are on disk"),
        (TURNS_IT_INTO_ANOTHER, "nothing was written"),
    ],
)
def test_it_ends_with_130_and_says_what_is_on_disk(code, told):
    assert interrupted(code) == (130, f"quantjax: interrupted; {told}\n")


def test_in_the_background_it_is_ignored_as_ever():
    assert interrupted(IGNORES) == (7, "")


def test_the_script_is_this_command():
    script = Path(sys.executable).with_name("quantjax")
    if not script.exists():
        pytest.skip("no script `quantjax` beside this Python")
    shown = subprocess.run(
        [script, "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "quantjax list" in shown.stdout
