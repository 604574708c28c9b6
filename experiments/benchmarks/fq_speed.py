"""Focused Quantization of ResNet-50 and ResNet-18 by shape: fits, quantization, idle updates.

    python -m experiments.benchmarks.fq_speed [--density 0.2] [--repeats 5] [--write]

25.5 and 11.7 million random weights, pruned by magnitude, layer by layer. Compilation is timed
apart.
`--write` leaves the record in experiments/results/benchmarks/.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from quantjax.lab.recipes import benchmark

BARS = {"fitted, assigned and quantized, s": 20.0, "idle update, ms per million weights": 1.0}
NETWORKS = {"resnet50": (3, 4, 6, 3), "resnet18": (2, 2, 2, 2)}  # blocks per stage
WIDTHS = (64, 128, 256, 512)


def shapes(network):
    """Returns {path: shape} of the kernels, for ImageNet."""
    bottleneck = network == "resnet50"
    found = [(7, 7, 3, 64)]
    before = 64
    for width, blocks in zip(WIDTHS, NETWORKS[network], strict=True):
        out = 4 * width if bottleneck else width
        for block in range(blocks):
            if bottleneck:
                found += [(1, 1, before, width), (3, 3, width, width), (1, 1, width, out)]
            else:
                found += [(3, 3, before, width), (3, 3, width, width)]
            found += [(1, 1, before, out)] if block == 0 and before != out else []
            before = out
    named = {f"Conv_{i}/kernel": shape for i, shape in enumerate(found)}
    return named | {"Dense_0/kernel": (before, 1000)}


def timed(fn, *args, repeats=1):
    """Returns (result, median seconds) of calls that are compiled already."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        out = jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - began)
    return out, float(np.median(times))


def compiled(fn, *args, **options):
    """Returns (program, processor seconds that compiling took)."""
    began = time.process_time()
    program = jax.jit(fn, **options).lower(*args).compile()
    return program, time.process_time() - began


def measure(network, arguments):
    """Returns the seconds of the parts for one network."""
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[:-1])), jnp.float32)
        for path, shape in shapes(network).items()
    }
    total = sum(leaf.size for leaf in params.values())
    key = jax.random.key(0)
    prune = qj.magnitude(arguments.density)
    quantizer = qj.focused(arguments.bits, refit_every=1000)
    plain = qj.focused(arguments.bits)
    seconds, compiling = {}, {}

    program, compiling["prune"] = compiled(lambda p: prune.apply(p, prune.init(p)), params)
    sparse, seconds["prune (not in the sum)"] = timed(program, params)
    # `init` compiles what it needs at its first call.
    began = time.process_time()
    timed(quantizer.init, sparse, key)
    compiling["fit and assign, and one run"] = time.process_time() - began
    state, seconds["fit and assign"] = timed(quantizer.init, sparse, key, repeats=arguments.repeats)
    program, compiling["quantize"] = compiled(plain.apply, sparse, state)
    _, seconds["quantize"] = timed(program, sparse, state, repeats=arguments.repeats)

    program, compiling["update"] = compiled(quantizer.update, sparse, state, donate_argnums=1)
    idle = []
    state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
    for _ in range(20):
        state, took = timed(program, sparse, state)
        idle.append(took)
    assert int(state.buffers["Conv_0/kernel"]["count"]) == 20  # nothing was due
    recentred = sum(bool(jnp.all(mine["recentred"])) for mine in state.buffers.values())

    work = seconds["fit and assign"] + seconds["quantize"]
    return {
        "weights": total,
        "layers": len(params),
        "recentred layers": recentred,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "processor seconds of compilation": {
            name: round(value, 1) for name, value in compiling.items()
        },
        "fitted, assigned and quantized, s": round(work, 3),
        "idle update, ms per million weights": round(1e9 * np.median(idle) / total, 4),
    }


def main():
    """Times the parts and prints them beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--bits", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    record = {
        "benchmark": "focused quantization by shape",
        "density": arguments.density,
        "bits": arguments.bits,
        "networks": {network: measure(network, arguments) for network in NETWORKS},
        "bars, resnet50": BARS,
    }
    benchmark("fq_speed", record, arguments.write)


if __name__ == "__main__":
    main()
