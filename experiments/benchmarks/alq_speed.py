"""What ALQ costs: sketches, a basis step of one large layer, and a training step of LeNet-5.

    python -m experiments.benchmarks.alq_speed [--repeats 7] [--write]

Every time is the median of its repeats after compilation; the two LeNet-5 steps alternate, so that
a busy machine slows both alike. Processor seconds are those of all threads, whatever else the
machine does: on two free cores the time on the clock lies between half of them and all. `--write`
leaves the record in experiments/results/benchmarks/.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantjax as qj
from experiments.alq import training
from quantjax.core import paths
from quantjax.lab import models
from quantjax.lab.recipes import benchmark
from quantjax.methods.alq import steps

BITS = 8
BARS = {"sketch s": 8.0, "basis step s": 0.3, "LeNet-5 ratio": 5.0}
BATCH = 128


def timed(fn, *arguments, repeats):
    """Returns the median seconds of fn, on the clock and of the processor, and its temporaries."""
    compiled = jax.jit(fn).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(repeats):
        began = np.array([time.perf_counter(), time.process_time()])
        jax.block_until_ready(compiled(*arguments))
        times.append(np.array([time.perf_counter(), time.process_time()]) - began)
    return np.median(times, axis=0), compiled.memory_analysis().temp_size_in_bytes


def random(seed, shape, scale=1.0):
    """Returns normal float32 weights."""
    return jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=shape), jnp.float32)


def sketch_resnet18(repeats):
    """Sketches every kernel of ResNet-18, pixelwise, dense ones channelwise."""
    model = models.build("resnet18", 1000)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    kernels = [x.shape for p, x in paths.flatten(shapes)[0].items() if p.endswith("kernel")]
    seconds = {}
    for seed, shape in enumerate(dict.fromkeys(kernels)):
        seconds[shape] = timed(
            lambda w: qj.sketch(w, BITS, -2), random(seed, shape), repeats=repeats
        )[0]
    clock, processor = sum(seconds[shape] for shape in kernels)
    return {
        "weights": sum(int(np.prod(shape)) for shape in kernels),
        "leaves": len(kernels),
        "sketch s": round(clock, 3),
        "sketch, processor s": round(processor, 3),
    }


def basis_step(repeats):
    """Times one basis step of a 256x256x3x3 layer, and counts its temporaries."""
    w = random(0, (3, 3, 256, 256))
    mb = jax.jit(lambda w: qj.sketch(w, BITS, -2))(w)

    def step(mb, grad, moments):
        return steps.basis_step(mb, grad, moments, learning_rate=1e-3)

    arguments = mb, random(1, w.shape, 1e-2), steps.init_moments(mb)
    (clock, processor), temporary = timed(step, *arguments, repeats=repeats)
    return {
        "basis step s": round(clock, 4),
        "basis step, processor s": round(processor, 4),
        "temporary MB": round(temporary / 1e6, 1),
        "MB of all candidates of all weights": round(4 * w.size * 2**BITS / 1e6, 1),
    }


def lenet_step(pairs):
    """Times LeNet-5's step in ALQ's basis phase beside the full-precision one."""
    model = models.build("lenet5", 10)
    images, labels = random(0, (BATCH, 28, 28, 1)), jnp.arange(BATCH) % 10
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    quantizer = training.structured(params, BITS, conv="kernelwise")
    phases = (qj.Phase("basis", 10**6, 1e-3), qj.Phase("coordinate", 1, 1e-4))

    def loss(params):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def make(optimizer):
        @jax.jit
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(optimizer.init)(params)
        return step, jax.block_until_ready(step(params, state))

    runs = {
        "full precision": make(optax.adam(1e-3)),
        "basis phase": make(training.optimizer(params, quantizer, phases)),
    }
    times = {name: [] for name in runs}
    for pair in range(pairs):
        for name in list(runs) if pair % 2 else list(runs)[::-1]:
            step, state = runs[name]
            began = time.perf_counter()
            state = jax.block_until_ready(step(*state))
            times[name].append(time.perf_counter() - began)
            runs[name] = step, state
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return {
        "LeNet-5 ms": {name: round(1e3 * value, 1) for name, value in medians.items()},
        "LeNet-5 ratio": round(medians["basis phase"] / medians["full precision"], 2),
    }


def main():
    """Prints the record, and the bars beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    record = {
        "benchmark": "ALQ at 8 bits, compilation apart",
        **sketch_resnet18(arguments.repeats),
        **basis_step(arguments.repeats),
        **lenet_step(5 * arguments.repeats),
        "bars": BARS,
    }
    benchmark("alq_speed", record, arguments.write)


if __name__ == "__main__":
    main()
