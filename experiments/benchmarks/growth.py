"""What quantizers cost as a layer grows, and as bits grow: training passes and fits.

    python -m experiments.benchmarks.growth [--largest 1e8] [--rounds 5] [--patience 30] [--write]

A pass is `apply`, its gradients and `update`, in one program; PSG's scales a gradient by the
distance to a uniform grid. A fit is `init`. Layers are near squares of 1e4 weights and more, three
times as many and ten times as many in turn, at 4 bits; widths from 2 to 8 bits are of 1e6 weights.
At each size all contenders take turns, and times are medians. Exponents are the slopes of a line
through log time against log weights, from 1e5 weights on, or log bits. What took longer than
`--patience` seconds is not tried larger, what asks for more than half of the memory is left out.
`--write` leaves the record and its picture in experiments/results/benchmarks/.
"""

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantjax as qj
from quantjax.lab.recipes import FOLDER, benchmark
from quantjax.lab.report import plots

BITS, WIDTHS = 4, range(2, 9)
SIZES = tuple(factor * 10**digits for digits in range(4, 9) for factor in (1, 3))
MIDDLE = 10**6  # weights, as bits grow
FROM = 10**5  # weights: of smaller layers the call itself is most of the time
KEPT = 1.28  # deviations: pruned layers keep a fifth of their weights
DENSITY = 0.2
LEAST = 0.01  # seconds of every measurement: quick programs are called several times
REFERENCE = "SGD with momentum"


class Kind(NamedTuple):
    """A quantizer by width."""

    make: Callable  # bits -> Quantizer
    widths: range = WIDTHS  # that it has; none: bits are nothing to it
    pruned: bool = False  # takes pruned weights


KINDS = {
    "uniform": Kind(qj.uniform),
    "LSQ": Kind(qj.lsq),
    "SRQ": Kind(qj.srq),
    "DropBits": Kind(functools.partial(qj.srq, dropbits=True)),
    "multi-bit": Kind(lambda bits: qj.multi_bit(bits, "channel")),
    "FQ": Kind(qj.focused, range(3, 9), pruned=True),
    "magnitude": Kind(lambda bits: qj.magnitude(DENSITY), range(0)),
}
SCALED = "PSG"  # position_scale towards the uniform grid
WAYS = ("pass", "fit")


class Layer(NamedTuple):
    """What one layer's passes take."""

    params: dict
    pruned: dict
    grads: dict
    key: jax.Array


def layer(size: int) -> Layer:
    """Returns a near square of normal weights, and gradients."""
    rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)
    rng = np.random.default_rng(size)
    weights = rng.standard_normal((rows, size // rows), np.float32)
    pruned = np.where(np.abs(weights) > KEPT, weights, np.float32(0))
    grads = rng.standard_normal(weights.shape, np.float32)
    trees = ({"kernel": jnp.asarray(leaf)} for leaf in (weights, pruned, grads))
    return Layer(*trees, jax.random.key(0))


def training_pass(quantizer):
    """Returns (params, state, cotangent, key) -> quantized params, gradients, the next state."""

    def run(params, state, cotangent, key):
        def apply(params, learned):
            return quantizer.apply(params, state._replace(learned=learned), key=key)

        quantized, pull = jax.vjp(apply, params, state.learned)
        return quantized, pull(cotangent), quantizer.update(params, state, key=key)

    return run


def programs(bits: int, size: int, names, way: str) -> Iterator[tuple]:
    """Yields name, function and arguments of what is measured."""
    mine = layer(size)
    for name in names:
        if name in KINDS:
            kind = KINDS[name]
            quantizer = kind.make(bits)
            params = mine.pruned if kind.pruned else mine.params
            if way == "fit":
                yield name, quantizer.init, (params, mine.key)
            else:
                state = jax.jit(quantizer.init)(params, mine.key)
                yield name, training_pass(quantizer), (params, state, mine.grads, mine.key)
        elif way == "pass":
            target = qj.uniform(bits)
            scale = qj.scale_by_position(target, strength=1.0)
            tx = scale if name == SCALED else optax.sgd(0.1, momentum=0.9)
            state = jax.jit(tx.init)(mine.params)
            yield name, tx.update, (mine.grads, state, mine.params)


class Program(NamedTuple):
    """A compiled program and what it is called with."""

    run: Any
    args: tuple
    calls: int  # of one measurement


def fits_in_memory(run) -> bool:
    """Returns whether a program asks for at most half of the machine's memory."""
    asked = run.memory_analysis()
    total = asked.argument_size_in_bytes + asked.output_size_in_bytes + asked.temp_size_in_bytes
    return 2 * total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def ready(fn, args) -> Program | None:
    """Compiles a program and calls it once; None if it asks for too much memory."""
    run = jax.jit(fn).lower(*args).compile()
    if not fits_in_memory(run):
        return None
    seconds = called(Program(run, args, 1))
    if seconds < LEAST:
        seconds = called(Program(run, args, 1))  # the first call is slower
    return Program(run, args, max(1, round(LEAST / seconds)))


def called(program: Program) -> float:
    """Returns the seconds of a call, the mean of several in a row."""
    began = time.perf_counter()
    for _ in range(program.calls):
        jax.block_until_ready(program.run(*program.args))
    return (time.perf_counter() - began) / program.calls


def medians(bits: int, size: int, names, way: str, rounds: int) -> dict[str, float]:
    """Returns {name: median seconds}, of contenders that take turns."""
    contenders = {}
    for name, fn, args in programs(bits, size, names, way):
        program = ready(fn, args)
        if program is None:
            print(f"{name}, {size} weights: too much memory", file=sys.stderr)
        else:
            contenders[name] = program
    times = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            times[name].append(called(contenders[name]))
    return {name: float(np.median(taken)) for name, taken in times.items()}


def by_size(way: str, arguments) -> dict[str, dict[int, float]]:
    """Returns {name: {weights: seconds}} at 4 bits."""
    found = {name: {} for name in (*KINDS, SCALED, REFERENCE)}
    names = list(found)
    for size in (size for size in SIZES if size <= arguments.largest):
        seconds = medians(BITS, size, names, way, arguments.rounds)
        for name, taken in seconds.items():
            found[name][size] = taken
        names = [name for name in seconds if seconds[name] <= arguments.patience]
        print(f"{way}, {size} weights: done", file=sys.stderr, flush=True)
    return {name: line for name, line in found.items() if line}


def by_bits(way: str, arguments) -> dict[str, dict[int, float]]:
    """Returns {name: {bits: seconds}} at some weights."""
    size = min(MIDDLE, int(arguments.largest))
    found = {name: {} for name in (*KINDS, SCALED)}
    for bits in WIDTHS:
        names = [name for name in found if name == SCALED or bits in KINDS[name].widths]
        for name, taken in medians(bits, size, names, way, arguments.rounds).items():
            found[name][bits] = taken
        print(f"{way}, {bits} bits: done", file=sys.stderr, flush=True)
    return {name: line for name, line in found.items() if line}


def exponent(line: dict[int, float], least: int = 0) -> float | None:
    """Returns the slope of log seconds against the logarithm of what grows; None below two."""
    points = [(x, seconds) for x, seconds in line.items() if x >= least]
    if len(points) < 2:
        return None
    slope = np.polyfit(*np.log(np.array(points)).T, 1)[0]
    return round(float(slope), 3)


def picture(lines: dict, exponents: dict, size: int):
    """Draws passes above fits, as layers grow and as bits grow; both axes are logarithmic."""
    fig, axes = plots.blank(13.0, 8.0, rows=2, columns=2, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    looks = dict(
        zip((*KINDS, SCALED), zip(plots.PALETTE, plots.MARKERS, strict=True), strict=False)
    )
    looks[REFERENCE] = plots.INK, "*"
    for ax, (title, found) in zip(axes, lines.items(), strict=True):
        grows = "n" if "weights" in title else "b"
        for name, line in found.items():
            color, marker = looks[name]
            slope = exponents[title][name]
            told = name if slope is None else f"{name}, ${grows}^{{{slope:.2f}}}$"
            values = np.array(list(line.values())) * 1e3
            ax.plot(list(line), values, color=color, marker=marker, ms=5, lw=1.3, label=told)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_ylabel("ms per call")
        ax.grid(color=plots.FAINT, lw=0.5, alpha=0.6)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
        _x_axis(ax, title, grows, size)
    return fig


def _x_axis(ax, title, grows, size):
    what = "training pass" if title.startswith("pass") else "fit"
    if grows == "n":
        ax.set_title(f"{what}, {BITS} bits", fontsize=10)
        ax.set_xlabel("weights of the layer")
        return
    ax.set_title(f"{what}, {size:,} weights", fontsize=10)
    ax.set_xlabel("bits")
    ax.set_xticks(list(WIDTHS), [str(bits) for bits in WIDTHS])
    ax.set_xticks([], minor=True)


def main(argv=None):
    """Measures everything and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=float, default=1e8, help="weights of the largest layer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds of one call")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.largest < SIZES[0]:
        parser.error(f"--largest must be at least {SIZES[0]}")

    measures = {"weights": (by_size, FROM), "bits": (by_bits, 0)}
    lines, exponents = {}, {}
    for way in WAYS:
        for grows, (measure, least) in measures.items():
            title = f"{way} by {grows}"
            lines[title] = measure(way, arguments)
            exponents[title] = {name: exponent(line, least) for name, line in lines[title].items()}
    size = min(MIDDLE, int(arguments.largest))
    record = {
        "benchmark": f"growth with weights at {BITS} bits, and with bits at {size} weights",
        "rounds": arguments.rounds,
        "exponents": exponents,
        "ms": {
            title: {
                name: {f"{x}": float(f"{1e3 * seconds:.4g}") for x, seconds in line.items()}
                for name, line in found.items()
            }
            for title, found in lines.items()
        },
    }
    benchmark("growth", record, arguments.write)
    if arguments.write:
        (FOLDER / "results" / "benchmarks" / "growth.png").write_bytes(
            plots.png(picture(lines, exponents, size))
        )


if __name__ == "__main__":
    main()
