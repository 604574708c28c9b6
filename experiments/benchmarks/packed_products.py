"""Products with packed kernels beside dense ones, decoding, and the memory of a packed network.

    python -m experiments.benchmarks.packed_products [--rounds 11] [--write]

Everything runs on one device. Within a round all contenders take turns, forwards in every other
round and backwards in between, so that a busy machine slows all alike; ratios are those of the
medians, dense float32 over packed. The memory is that of a fresh process: four layers of 8192 x
8192 at batch 1, from its resident size after importing everything and running one small program to
its peak after the forward pass. On a shared machine run it at a high priority, as root under
`nice -n -15`. `--write` leaves the record in experiments/results/benchmarks/.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import quantjax as qj
from quantjax.core import qarray
from quantjax.encoded import packed as packed_lib
from quantjax.lab.recipes import benchmark

FLOAT32 = np.dtype("float32")
DENSE = "dense float32"
FILLING = "filling as much with a constant"  # what new memory alone costs
SIDES, BATCHES = (4096, 8192), (1, 4)
LEVELS = {"1 bit": 2, "ternary": 3, "2 bits": 4, "3 bits": 8, "4 bits": 16}
BARS = {  # times faster than dense float32 at batch 1
    "4096": {"1 bit": 2.5, "ternary": 1.7, "2 bits": 1.4},
    "8192": {"1 bit": 4.0, "ternary": 3.0, "2 bits": 2.0, "3 bits": 1.0, "4 bits": 1.0},
}
DECODING_BAR = 500  # MB of float32 a second
MEMORY_BAR = 250  # MB
ROWS = (1, 2, 4, 8, 16)  # of the search for where decoding overtakes the table
LAYERS, WIDTH = 4, 8192  # of the network whose memory is measured


def grid(levels, side, rng):
    """Returns a packed square kernel of random codes."""
    bits = (levels - 1).bit_length()
    codes = qarray.grid_codes(rng.integers(0, levels, (side, side), np.uint8), levels, bits)
    step = np.full((1, side), 0.01, np.float32)
    return qj.pack({"kernel": qj.Grid(codes, step, bits, FLOAT32, levels)})["kernel"]


def bases(slots, side, rng):
    """Returns a packed square kernel of random bases, a group per output."""
    basis = 2 * rng.integers(0, 2, (side, side, slots), np.int8) - 1
    coords = np.full((1, side, slots), 0.01, np.float32)
    leaf = qj.MultiBit(basis, coords, np.ones(coords.shape, bool), FLOAT32)
    return qj.pack({"kernel": leaf})["kernel"]


def kernels(side):
    """Returns {name: packed kernel}."""
    rng = np.random.default_rng(side)
    found = {name: grid(levels, side, rng) for name, levels in LEVELS.items()}
    return found | {"2 bases": bases(2, side, rng)}


def medians(contenders, rounds):
    """Returns {name: median milliseconds} of {name: (compiled function, arguments)}."""
    times = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            fn, args = contenders[name]
            began = time.perf_counter()
            jax.block_until_ready(fn(*args))
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: round(float(np.median(taken)), 3) for name, taken in times.items()}


def compiled(fn, *args):
    """Returns (program, arguments) after one call."""
    program = jax.jit(fn).lower(*args).compile()
    jax.block_until_ready(program(*args))
    return program, args


def products(side, batch, packed, dense, rounds):
    """Returns milliseconds and ratios of one product."""
    x = jnp.asarray(np.random.default_rng(batch).normal(size=(batch, side)), jnp.float32)
    half = jnp.bfloat16
    contenders = {
        DENSE: compiled(jnp.matmul, x, dense),
        "dense bfloat16": compiled(jnp.matmul, x.astype(half), dense.astype(half)),
    }
    contenders |= {name: compiled(packed_lib.product, x, k) for name, k in packed.items()}
    found = medians(contenders, rounds)
    ratios = {name: round(found[DENSE] / taken, 2) for name, taken in found.items()}
    record = {"ms": found, "times faster than dense float32": ratios}
    if batch == 1:
        record["bars"] = BARS[str(side)]
        record["missed"] = [k for k, bar in BARS[str(side)].items() if ratios[k] < bar]
    return record


def decoding(packed, rounds):
    """Returns MB of float32 that a second of decoding gives."""
    contenders = {name: compiled(packed_lib.Packed.decode, k) for name, k in packed.items()}
    shape = packed["1 bit"].shape
    contenders[FILLING] = compiled(lambda x: jnp.broadcast_to(x, shape), jnp.float32(1))
    found = medians(contenders, rounds)
    size = 4e-6 * np.prod(shape)
    return {name: round(float(size / (1e-3 * taken))) for name, taken in found.items()}


def crossover(packed, rounds):
    """Returns milliseconds by table and by decoding, for some numbers of rows."""
    record = {}
    for name, kernel in packed.items():
        contenders = {}
        for rows in ROWS:
            x = jnp.ones((rows, kernel.shape[0]))
            for way, few in (("table", rows), ("decode", 0)):
                with mock.patch.object(packed_lib, "FEW", few):
                    # A function of its own: jax would find the other way's program again.
                    product = lambda x, kernel: packed_lib.product(x, kernel)  # noqa: E731
                    contenders[rows, way] = compiled(product, x, kernel)
        found = medians(contenders, rounds)
        ways = ("table", "decode")
        record[name] = {f"{rows} rows": [found[rows, way] for way in ways] for rows in ROWS}
    return {"ms by table, by decoding": record}


class Mlp(nn.Module):
    """Layers of one width."""

    @nn.compact
    def __call__(self, x):
        """Returns [batch, WIDTH]."""
        for _ in range(LAYERS):
            x = nn.relu(nn.Dense(WIDTH)(x))
        return x


def forward(way):
    """Prints the MB that a forward pass takes in this process above its base, and their parts."""
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))
    with open("/proc/self/statm") as file:
        base = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    rng = np.random.default_rng(0)

    def kernel():
        if way == "dense":
            return jnp.asarray(rng.standard_normal((WIDTH, WIDTH), np.float32))
        words = np.frombuffer(rng.bytes(WIDTH * WIDTH // 4), np.uint8).reshape(-1, WIDTH)
        scales = jnp.full((1, WIDTH), 0.01)
        return qj.Packed((jnp.asarray(words),), scales, qj.Grid, 4, WIDTH, FLOAT32)

    layers = {f"Dense_{i}": {"kernel": kernel(), "bias": jnp.zeros(WIDTH)} for i in range(LAYERS)}
    apply = qj.linen.packed(Mlp().apply)
    x = jnp.ones((1, WIDTH))
    out = jax.jit(apply)({"params": layers}, x)
    assert bool(jnp.isfinite(out).all())
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(layers))
    parts = {"above the base": peak - base, "weights": weights, "base": base}
    print(json.dumps({name: round(size / 1e6, 1) for name, size in parts.items()}))


def memory():
    """Returns MB above the base, packed and dense, each from a process of its own."""
    record = {}
    for way in ("packed at 2 bits", "dense"):
        command = [sys.executable, "-m", "experiments.benchmarks.packed_products"]
        command += ["--forward", way.split()[0]]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        record[way] = json.loads(done.stdout.splitlines()[-1])
    return record | {"bar": MEMORY_BAR}


def main():
    """Measures products, decoding, the crossover and the memory, beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--forward", choices=("packed", "dense"), help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.forward:
        forward(arguments.forward)
        return

    rounds = arguments.rounds
    record = {
        "benchmark": "products with packed kernels, and a packed network's memory",
        "rounds": rounds,
        "forward pass of 4 x 8192 x 8192 at batch 1, MB": memory(),
        "products": {},
        "decoding, MB of float32 a second": {"bar": DECODING_BAR},
    }
    for side in SIDES:
        packed = kernels(side)
        dense = jax.random.normal(jax.random.key(side), (side, side))
        for batch in BATCHES:
            found = products(side, batch, packed, dense, rounds)
            record["products"][f"{side} x {side}, batch {batch}"] = found
        record["decoding, MB of float32 a second"][str(side)] = decoding(packed, rounds)
        if side == SIDES[0]:
            some = {name: packed[name] for name in ("1 bit", "2 bits", "4 bits")}
            record["crossover, 4096 x 4096"] = crossover(some, rounds)
    record |= {"load average of the machine": os.getloadavg()[0], "niceness": os.nice(0)}
    benchmark("packed_products", record, arguments.write)


if __name__ == "__main__":
    main()
