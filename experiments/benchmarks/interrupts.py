"""Ctrl-C at random moments: how every command ends, and within how many seconds.

`python -m experiments.benchmarks.interrupts [--tries 10] [--write]` starts each command, sends
SIGINT after a random time, and notes the exit status, the seconds until the process is gone and
whether what lies on disk is whole. Bars: status 130 (what a shell gives for a signal counts), 5 s.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quantjax.encoded import storage
from quantjax.lab import recipes

BAR = 5.0  # seconds
COMMAND = [sys.executable, "-c", "from quantjax_command import command; command()"]
RECIPE = '''
"""Steps of a network large enough that a chunk of them takes long."""

from experiments.psg import protocol

TITLE = "steps to interrupt"


def run(context):
    """Yields a row per epoch."""
    parts = protocol.make(
        context, "digits", "lenet5-wide", rates={0: 0.01}, switch=1, end=2, augment=False
    )
    variables = parts.plain(0)
    for row in range(1000):
        variables = parts.late("sgd", protocol.sgd, variables, 0)
        yield {"row": f"epoch {row}", "seed": 0, "low precision": parts.accuracy(variables)}
'''


def main():
    """Tries every command and prints, or with --write records, the outcomes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    # Children ignore what this process ignores, as it does as a job in the background of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "steps.py").write_text(RECIPE)
        network = _network(folder)
        commands = {  # with the seconds that it takes at most here
            "compare": (["compare", "--out", str(folder / "report")], 60),
            "run": (["run", str(folder / "steps.py"), "--out", str(folder)], 60),
            "evaluate": (["evaluate", network], 8),
            "export": (["export", network, "--out", str(folder / "net.stablehlo")], 12),
            "inspect": (["inspect", network, "--plots", str(folder)], 5),
            "list": (["list"], 3),
            "results": (["results"], 3),
        }
        found = {}
        for name, (words, most) in commands.items():
            tries = [_try(words, draw.uniform(0.2, most), folder) for _ in range(arguments.tries)]
            hit = [one for one in tries if one["interrupted"]]
            found[name] = {
                "tries": len(tries),
                "ended before": len(tries) - len(hit),
                "statuses": sorted({one["status"] for one in hit}),
                "slowest": max((one["seconds"] for one in hit), default=None),
                "messages": sorted({one["told"] for one in hit}),
            }
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    recipes.benchmark("interrupts", {"bar": BAR, "commands": found}, arguments.write)


def _network(folder: Path) -> str:
    words = ["compare", "--quick", "--methods", "sgd", "--epochs", "1", "--out", str(folder)]
    subprocess.run([*COMMAND, *words], check=True, stdout=subprocess.DEVNULL)
    return str(next((folder / "networks").glob("sgd*")))


def _try(words, after: float, folder: Path) -> dict:
    process = subprocess.Popen(
        [*COMMAND, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.wait(after)
        interrupted = False
    except subprocess.TimeoutExpired:
        interrupted = True
        process.send_signal(signal.SIGINT)
    began = time.monotonic()
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
    seconds = round(time.monotonic() - began, 2)
    for file in folder.rglob("*.json"):
        json.loads(file.read_text())
    for file in folder.rglob("*.safetensors"):
        storage.load(file)
    last = err.strip().rpartition("\n")[2].replace(str(folder), "FOLDER")
    # Before the command's first line Python ends itself by the signal: 130 to a shell.
    status = 130 if process.returncode == -signal.SIGINT else process.returncode
    return {"interrupted": interrupted, "status": status, "seconds": seconds, "told": last}


if __name__ == "__main__":
    main()
