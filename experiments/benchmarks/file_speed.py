"""How long files take: 25 million weights at 4 bits, saved and loaded, packed and entropy coded.

    python -m experiments.benchmarks.file_speed [--rounds 5] [--write]

Medians. Codes are a rounded normal distribution, of a step of half its deviation. `--write` leaves
the record in experiments/results/benchmarks/.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import quantjax as qj
from quantjax.lab.recipes import benchmark

SIDE = 5000
BARS = {"packed": 5.0, "smallest": 30.0}  # seconds, each way


def measure(rounds: int) -> dict:
    """Returns seconds and sizes by coding."""
    codes = np.rint(2 * np.random.default_rng(0).normal(size=(SIDE, SIDE)))
    step = np.full((1, SIDE), 0.01, np.float32)
    leaf = qj.Grid(np.clip(codes, -8, 7).astype(np.int8), step, 4, np.dtype("float32"))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        for coding, bar in BARS.items():
            times = {"save": [], "load": []}
            for _ in range(rounds):
                began = time.perf_counter()
                qj.save(path, {"kernel": leaf}, coding=coding)
                saved = time.perf_counter()
                jax.block_until_ready(qj.load(path))
                times["save"].append(saved - began)
                times["load"].append(time.perf_counter() - saved)
            seconds = {way: round(statistics.median(t), 2) for way, t in times.items()}
            found[coding] = {"seconds": seconds, "bar": bar, "bytes": path.stat().st_size}
    return found


def main():
    """Runs it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    numbers = {"weights": SIDE * SIDE, "rounds": options.rounds, **measure(options.rounds)}
    benchmark("file_speed", numbers, options.write)


if __name__ == "__main__":
    main()
