"""What SRQ costs beside a learned-step (LSQ) fake quantizer, as ratios within one run.

    python -m experiments.benchmarks.srq_cost [--rounds 7] [--write]

Value and all gradients on a (128, 28, 28, 32) float32 activation at 4 bits; DropBits against SRQ on
a weight of 2.4 million elements. The programs take turns, so that a busy machine slows all alike;
ratios are of the medians. Memory is the temporary memory that the compiled program asks for.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.lab.recipes import benchmark
from quantjax.methods.srq import relaxed, semi_relaxed

ACTIVATION = (128, 28, 28, 32)
WEIGHT = (3, 3, 512, 512)


@jax.custom_vjp
def learned_step(x, step):
    """LSQ's fake quantizer on codes 0 .. 15, without its gradient scale."""
    return jnp.clip(jnp.round(x / step), 0, 15) * step


def _forward(x, step):
    return learned_step(x, step), (x, step)


def _backward(saved, cotangent):
    x, step = saved
    scaled = x / step
    inside = (scaled >= 0) & (scaled <= 15)
    codes = jnp.clip(jnp.round(scaled), 0, 15)
    by_step = jnp.sum(cotangent * jnp.where(inside, codes - scaled, codes))
    return jnp.where(inside, cotangent, 0), by_step


learned_step.defvjp(_forward, _backward)


def categories(x, alpha, sigma):
    """The mode by forming all categories, under eq. 3."""
    codes = jnp.arange(16.0)
    mass = jnp.exp(relaxed.log_categories(x, alpha, sigma, codes))
    share = mass / jnp.sum(mass, axis=-1, keepdims=True)
    best = jnp.argmax(share, axis=-1)
    one_hot = jax.nn.one_hot(best, 16)
    chosen = one_hot * (share - jax.lax.stop_gradient(share)) + one_hot
    return jnp.sum(chosen * codes * alpha, axis=-1)


def with_gradients(fn):
    """Returns (*args, cotangent) -> value and the cotangents of all args."""

    def run(*args):
        value, pull = jax.vjp(fn, *args[:-1])
        return value, pull(args[-1])

    return run


def srq(estimator):
    """SRQ of an activation at 4 bits."""
    return lambda x, alpha, sigma: semi_relaxed.quantize(
        x, alpha, sigma, bits=4, signed=False, estimator=estimator
    )


def weight(bits, masked):
    """SRQ of a weight, with DropBits or without."""
    if not masked:
        return lambda x, alpha, sigma, masks: semi_relaxed.quantize(
            x, alpha, sigma, bits=bits, estimator="mode"
        )
    return lambda x, alpha, sigma, masks: semi_relaxed.quantize(
        x, alpha, sigma, bits=bits, masks=masks, estimator="mode"
    )


def measure(programs: dict, rounds: int) -> dict:
    """Returns {name: (median seconds, temporary bytes)}; the programs take turns."""
    compiled, found = {}, {name: [] for name in programs}
    for name, (fn, args) in programs.items():
        compiled[name] = jax.jit(with_gradients(fn)).lower(*args).compile()
        jax.block_until_ready(compiled[name](*args))
    for _ in range(rounds):
        for name, (_, args) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            found[name].append(time.perf_counter() - began)
    return {
        name: (float(np.median(times)), compiled[name].memory_analysis().temp_size_in_bytes)
        for name, times in found.items()
    }


def main():
    """Times everything and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    x = jnp.asarray(np.maximum(rng.normal(size=ACTIVATION), 0), jnp.float32)
    ct = jnp.asarray(rng.normal(size=ACTIVATION), jnp.float32)
    alpha, sigma = jnp.float32(0.2), jnp.float32(0.2 / 3)
    found = measure(
        {
            "LSQ": (learned_step, (x, alpha, ct)),
            "SRQ mode": (srq("mode"), (x, alpha, sigma, ct)),
            "SRQ expectation": (srq("expectation"), (x, alpha, sigma, ct)),
        },
        arguments.rounds,
    )
    found |= measure({"categories": (categories, (x, alpha, sigma, ct))}, 2)

    w = jnp.asarray(rng.normal(size=WEIGHT), jnp.float32)
    ct = jnp.asarray(rng.normal(size=WEIGHT), jnp.float32)
    for bits in (4, 8):
        step = jnp.float32(3 / 2 ** (bits - 1))
        args = (w, step, step / 3, jnp.linspace(0.7, 1, bits - 1), ct)
        found |= measure(
            {
                f"SRQ weight {bits}": (weight(bits, False), args),
                f"DropBits weight {bits}": (weight(bits, True), args),
            },
            arguments.rounds,
        )

    def ratio(name, base):
        return round(found[name][0] / found[base][0], 2)

    record = {
        "benchmark": "SRQ beside a learned-step quantizer",
        "ms": {name: round(1e3 * value[0], 1) for name, value in found.items()},
        "temporary MB": {name: round(value[1] / 1e6, 2) for name, value in found.items()},
        "ratios": {
            "mode / LSQ (bar 5)": ratio("SRQ mode", "LSQ"),
            "expectation / LSQ (bar 8)": ratio("SRQ expectation", "LSQ"),
            "categories / mode (bar at least 10)": ratio("categories", "SRQ mode"),
            "DropBits / SRQ, 4 bits (bar 4)": ratio("DropBits weight 4", "SRQ weight 4"),
            "DropBits / SRQ, 8 bits (bar 8)": ratio("DropBits weight 8", "SRQ weight 8"),
        },
    }
    benchmark("srq_cost", record, arguments.write)


if __name__ == "__main__":
    main()
