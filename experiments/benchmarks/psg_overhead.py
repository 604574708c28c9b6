"""What `scale_by_position` adds to a ResNet-32 training step, as a ratio within one run.

    python -m experiments.benchmarks.psg_overhead [--batch 128] [--pairs 20] [--write]

The two steps alternate, so that a busy machine slows both alike; the ratio is that of the
medians. `--write` leaves the record in experiments/results/benchmarks/.
"""

import argparse
import time

import jax
import numpy as np
import optax

import quantjax as qj
from quantjax.lab import data, models
from quantjax.lab.recipes import benchmark
from quantjax.lab.train import engine, tasks

BAR = 1.05


def main():
    """Times both steps and prints their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (arguments.batch, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 100, arguments.batch, dtype=np.int32)
    split = data.Split(images, labels)
    dataset = data.Dataset("noise", split, split, 100, (0.5,) * 3, (0.25,) * 3)
    task = tasks.classification(models.build("resnet32", 100), dataset, augment=True)
    variables = task.init(0)
    descend = [optax.add_decayed_weights(1e-4), optax.sgd(0.01, momentum=0.9)]
    target = qj.uniform(4, momentum=0.1, biases=True)
    chains = {
        "SGD": optax.chain(*descend),
        "PSG": optax.chain(qj.scale_by_position(target, strength=150.0), *descend),
    }
    indices = np.arange(arguments.batch, dtype=np.int32)
    runs, times = {}, {name: [] for name in chains}
    for name, chain in chains.items():
        method = engine.Method(chain)
        began = time.perf_counter()
        step = engine.make_steps(task, method).one
        state = jax.block_until_ready(
            step(engine.init_state(task, variables, method, 0), (images, labels), indices)[0]
        )
        runs[name] = step, state
        print(f"{name}: compiled and ran once in {time.perf_counter() - began:.1f} s")
    for pair in range(arguments.pairs):
        for name in list(chains) if pair % 2 else list(chains)[::-1]:
            step, state = runs[name]
            began = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, (images, labels), indices))
            times[name].append(time.perf_counter() - began)
            runs[name] = step, state
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratio = medians["PSG"] / medians["SGD"]
    record = {
        "benchmark": "scale_by_position in a ResNet-32 step",
        "batch": arguments.batch,
        "pairs": arguments.pairs,
        "median ms": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "ratio": round(ratio, 4),
        "bar": BAR,
    }
    benchmark("psg_overhead", record, arguments.write)


if __name__ == "__main__":
    main()
