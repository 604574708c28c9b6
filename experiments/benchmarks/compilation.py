"""What a training step of ResNet-20 at W4A4 costs to compile, in processor seconds.

    python -m experiments.benchmarks.compilation [--model resnet20] [--rounds 3] [--write]

Each method compiles in processes of its own, where nothing is compiled yet; tracing counts. What
is told is the median of the rounds, in each of which all methods have their turn. On a busy machine
seconds of a processor grow: ratios are to be read on a quiet one.
The step is at batch 32, its time the least of all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax

import quantjax as qj
from quantjax.lab import models
from quantjax.lab.recipes import benchmark

BITS, BATCH, SIDE, STEPS = 4, 32, 32, 8
METHODS = {
    "float": None,
    "uniform": lambda: (qj.uniform(BITS), qj.uniform_input(BITS)),
    "LSQ": lambda: (qj.lsq(BITS), qj.lsq_input(BITS)),
    "SRQ mode": lambda: (
        qj.srq(BITS, estimator="mode"),
        qj.srq_input(BITS, estimator="mode"),
    ),
    "SRQ expectation": lambda: (qj.srq(BITS), qj.srq_input(BITS)),
    "SRQ expectation, DropBits": lambda: (qj.srq(BITS, dropbits=True), qj.srq_input(BITS)),
}
BARS = {"SRQ expectation": 4, "SRQ expectation, DropBits": 5}


def measure(name: str, model_name: str) -> dict:
    """Returns the processor seconds to compile one step, and the seconds that it takes."""
    model = models.build(model_name, 10)
    images = jax.random.normal(jax.random.key(0), (BATCH, SIDE, SIDE, 3))
    labels = jnp.arange(BATCH) % 10
    variables = jax.jit(model.init)(jax.random.key(1), images)
    params, rest = variables["params"], {"batch_stats": variables["batch_stats"]}
    quantizer, state, learned, quant = None, None, {}, {}
    apply, key = model.apply, jax.random.key(2)
    if METHODS[name] is not None:
        quantizer, inputs = METHODS[name]()
        apply = qj.linen.quantize_inputs(model.apply, inputs)
        state = jax.jit(quantizer.init)(params, key)
        learned = state.learned
        fitted = jax.jit(lambda v, x: apply(v, x, mutable=["quant", "quant_stats"])[1])(
            variables, images
        )
        quant = fitted.get("quant", {})
        rest |= {"quant_stats": fitted["quant_stats"]}
    tx = optax.sgd(0.01, momentum=0.9)
    trainable = (params, learned, quant)

    def step(trainable, state, rest, opt_state, images, labels, key):
        def loss_fn(trainable):
            params, learned, quant = trainable
            if quantizer is not None:
                params = quantizer.apply(params, state._replace(learned=learned), key=key)
            everything = {"params": params, "quant": quant, **rest}
            logits, moved = apply(everything, images, train=True, mutable=list(rest))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, moved

        grads, moved = jax.grad(loss_fn, has_aux=True)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        if quantizer is not None:
            state = quantizer.update(trainable[0], state._replace(learned=trainable[1]), key=key)
        return trainable, state, moved, opt_state

    args = trainable, state, rest, tx.init(trainable), images, labels, key
    began = time.process_time()
    compiled = jax.jit(step).lower(*args).compile()
    seconds = time.process_time() - began
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return {"compile, processor s": round(seconds, 1), "step, ms": round(1e3 * min(times))}


def main():
    """Measures every method in its own process and prints the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=METHODS, help="measures one method in this process")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.model)))
        return
    command = [sys.executable, "-m", "experiments.benchmarks.compilation"]
    command += ["--model", arguments.model, "--only"]
    every = {name: [] for name in METHODS}
    for _ in range(arguments.rounds):
        for name, rows in every.items():
            done = subprocess.run([*command, name], check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, rows[-1], file=sys.stderr, flush=True)
    found = {
        name: {
            column: how(row[column] for row in rows)
            for column, how in (("compile, processor s", statistics.median), ("step, ms", min))
        }
        for name, rows in every.items()
    }
    alone = found["float"]["compile, processor s"]
    ratios = {name: round(row["compile, processor s"] / alone, 2) for name, row in found.items()}
    record = {
        "benchmark": f"compilation of a step, {arguments.model}, W{BITS}A{BITS}, batch {BATCH}",
        **found,
        "compilation / float": ratios,
        "bars": BARS,
        "rounds": arguments.rounds,
    }
    benchmark("compilation", record, arguments.write)


if __name__ == "__main__":
    main()
