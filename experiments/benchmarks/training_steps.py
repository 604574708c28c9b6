"""What a training step costs by each method beside float: time, compilation, memory.

    python -m experiments.benchmarks.training_steps [--model lenet5] [--batch 128] [--rounds 30]
        [--methods psg lsq ...] [--precision float32] [--compilations 3] [--write]

Weights and layer inputs at 4 bits (PSG, ALQ, FQ: weights alone), SGD with momentum but for ALQ, on
noise of the data's shape. In every round each method takes one step, in every other round in
reverse order, so that a busy machine slows all alike; every step is waited for, and ratios are
those of the medians. Processor time is that of all threads, whatever else the machine does.
Compilation is in processor seconds of processes of their own, where nothing is compiled yet;
tracing counts. The memory is what the compiled step asks for: arguments, outputs and temporaries,
donated buffers once. The last row is qwix's QAT at 8 bits (its 4 do not run on the CPU) of the same
model in the same step, where qwix is installed. `--write` leaves the record in
experiments/results/benchmarks/.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantjax as qj
from experiments.alq import training
from quantjax.lab import data, models
from quantjax.lab.recipes import benchmark
from quantjax.lab.train import engine, session, tasks

BITS = 4
ALQ_BITS = 8  # of the sketch, as in the paper's tables of LeNet-5 and ResNet-18
ALQ_FEW_BITS = 3  # as in the ablation on MNIST
FQ_BITS = 5
DENSITY = 0.1  # of the weights that FQ quantizes
RATE = 1e-3
LONG = 10**6  # steps: longer than any run
WARM = 3  # steps before those that count
EXAMPLES = 256  # at least: input quantizers fit themselves to as many
SHAPES = {  # of an example
    "lenet5": (28, 28, 1),
    "resnet20": (32, 32, 3),
    "resnet18": (32, 32, 3),
    "text-small": (64,),
}
FLOAT, QWIX = "float", "qwix-int8"
BARS = {  # step / float, by where they hold
    ("lenet5", 128, "float32", "cpu"): {
        "psg": 1.05,
        "uniform": 1.2,
        "lsq": 1.25,
        "srq": 1.6,
        "dropbits": 1.8,
        "alq-basis": 3,
        "fq": 1.1,
    },
    ("resnet18", 256, "bf16", "gpu"): {
        "psg": 1.03,
        "uniform": 1.05,
        "lsq": 1.15,
        "srq": 1.2,
        "dropbits": 1.5,
        "fq": 1.05,
    },
}


class Contender(NamedTuple):
    """How one row trains."""

    task: tasks.Task
    method: engine.Method
    begin: Callable = lambda state: state  # changes the first state


def descent():
    """Returns SGD with momentum and weight decay, of params alone or with grids beside them."""
    decay = optax.add_decayed_weights(1e-4, mask=qj.decay_mask)
    return optax.chain(decay, optax.sgd(RATE, momentum=0.9))


def plain(task, params):
    """Returns float training."""
    del params
    return Contender(task, engine.Method(descent()))


def psg(task, params):
    """Returns PSG towards 4 bits."""
    del params
    target = qj.uniform(BITS, momentum=0.1)
    return Contender(task, engine.Method(qj.psg(RATE, target, strength=150.0, mask=qj.decay_mask)))


def quantized(quantizer, inputs):
    """Returns the maker of training with quantized weights and layer inputs."""
    return lambda task, params: Contender(task, engine.Method(descent(), quantizer, inputs))


def alq(task, params, *, kind, bits):
    """Returns ALQ in a long phase of a kind; its schedule has both kinds, as real ones do."""
    if isinstance(task.model, models.LeNet5):
        quantizer = training.structured(params, bits, conv="kernelwise")
    elif isinstance(task.model, models.TextModel):
        quantizer = qj.multi_bit(bits, "channel")
    else:
        quantizer = training.structured(params, bits, first="channelwise", blocks=(2,))
    (other,) = {"basis", "coordinate"} - {kind}
    schedule = (qj.Phase(kind, LONG, 1e-4), qj.Phase(other, 1, 1e-4))
    method = engine.Method(training.optimizer(params, quantizer, schedule))

    def begin(state):
        return state._replace(params=engine.copied(qj.alq_params(state.opt_state, state.params)))

    return Contender(task, method, begin)


def fq(task, params):
    """Returns FQ after surgery, between two fits of its mixtures."""
    pruned = qj.surgery(DENSITY, end=1).init(params)
    masks = {path: mine["mask"] for path, mine in pruned.buffers.items()}
    quantizer = qj.chain(qj.pruned(masks), qj.focused(FQ_BITS, refit_every=LONG))
    return Contender(task, engine.Method(descent(), quantizer))


def qwix_int8(task, params):
    """Returns qwix's quantization-aware training, whose gradients are floats."""
    import qwix

    del params
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(task.model, qwix.QtProvider([rule]))
    return Contender(task._replace(model=model), engine.Method(descent()))


# qwix comes last: it replaces functions of JAX while it traces, and JAX keeps what it has traced.
METHODS = {
    FLOAT: plain,
    "psg": psg,
    "uniform": quantized(qj.uniform(BITS), qj.uniform_input(BITS)),
    "lsq": quantized(qj.lsq(BITS), qj.lsq_input(BITS)),
    "srq": quantized(qj.srq(BITS), qj.srq_input(BITS)),
    "srq-mode": quantized(qj.srq(BITS, estimator="mode"), qj.srq_input(BITS, estimator="mode")),
    "dropbits": quantized(qj.srq(BITS, dropbits=True), qj.srq_input(BITS)),
    "alq-basis": functools.partial(alq, kind="basis", bits=ALQ_BITS),
    "alq-coordinate": functools.partial(alq, kind="coordinate", bits=ALQ_BITS),
    "alq-basis-3-bits": functools.partial(alq, kind="basis", bits=ALQ_FEW_BITS),
    "fq": fq,
    QWIX: qwix_int8,
}


def noise(shape, batch) -> data.Dataset | data.Text:
    """Returns noisy images of ten classes, or a text of noise."""
    rng = np.random.default_rng(0)
    count = max(batch, EXAMPLES)
    x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    if len(shape) == 1:
        windows = data.Windows(x, np.roll(x, -1, axis=1))
        return data.Text("noise", windows, windows)
    split = data.Split(x, rng.integers(0, 10, count, dtype=np.int32))
    channels = shape[-1]
    return data.Dataset("noise", split, split, 10, (0.5,) * channels, (0.25,) * channels)


class Step(NamedTuple):
    """A compiled step, and what it is called with."""

    run: Any  # the compiled program
    state: engine.TrainState
    rest: tuple  # training arrays, indices
    compile_seconds: float  # of the processor

    @property
    def megabytes(self) -> float:
        """What the step asks for: donated buffers are arguments and outputs at once."""
        asked = self.run.memory_analysis()
        total = asked.argument_size_in_bytes + asked.output_size_in_bytes
        return (total + asked.temp_size_in_bytes - asked.alias_size_in_bytes) / 1e6


def prepare(name: str, task: tasks.Task, batch: int) -> Step:
    """Compiles the step of one method."""
    variables = task.init(0)
    contender = METHODS[name](task, variables["params"])
    state = engine.init_state(contender.task, variables, contender.method, 0)
    state = contender.begin(state)
    arrays = tuple(jnp.asarray(array) for array in contender.task.dataset.train)
    rest = arrays, jnp.arange(batch, dtype=jnp.int32)
    jax.block_until_ready(state)
    began = time.process_time()
    step = engine.make_steps(contender.task, contender.method).one
    run = step.lower(state, *rest).compile()
    return Step(run, state, rest, time.process_time() - began)


def make_task(arguments) -> tasks.Task:
    """Returns the task of the command line."""
    dataset = noise(SHAPES[arguments.model], arguments.batch)
    dtype = session.PRECISIONS[arguments.precision]
    model = models.build(arguments.model, dataset.classes, dtype)
    kind = tasks.next_token if isinstance(dataset, data.Text) else tasks.classification
    return kind(model, dataset)


def now() -> np.ndarray:
    """Returns seconds on the clock, and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, np.ndarray]:
    """Returns {name: seconds on the clock and of the processor [rounds, 2]}.

    Raises:
      FloatingPointError: a loss is not finite; such steps may take another time.
    """
    states = {name: step.state for name, step in steps.items()}
    times = {name: [] for name in steps}
    for number in range(WARM + rounds):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            began = now()
            states[name], loss = jax.block_until_ready(
                steps[name].run(states[name], *steps[name].rest)
            )
            times[name].append(now() - began)
            if not np.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss is {loss} in round {number}")
    return {name: np.array(taken[WARM:]) for name, taken in times.items()}


def measure(names, arguments) -> dict[str, dict]:
    """Returns times and memory of some methods, float among them, beside float's."""
    task = make_task(arguments)
    steps = {}
    for name in names:
        steps[name] = prepare(name, task, arguments.batch)
        print(f"{name}: compiled", file=sys.stderr, flush=True)
    times = take_turns(steps, arguments.rounds)
    memory = {name: step.megabytes for name, step in steps.items()}
    medians = {name: np.median(taken, axis=0) for name, taken in times.items()}
    rows = {}
    for name in names:
        clock, processor = medians[name] / medians[FLOAT]
        by_round = np.percentile((times[name] / times[FLOAT])[:, 0], (25, 75))
        rows[name] = {
            "step, ms": round(float(1e3 * medians[name][0]), 2),
            "step / float": round(float(clock), 3),
            "quartiles by round": [round(float(ratio), 3) for ratio in by_round],
            "processor / float": round(float(processor), 3),
            "memory, MB": round(memory[name], 1),
            "memory / float": round(memory[name] / memory[FLOAT], 2),
        }
    return rows


def compilations(names, arguments) -> dict[str, dict]:
    """Returns the medians of compiling each method in processes of its own, which take turns."""
    command = [sys.executable, "-m", "experiments.benchmarks.training_steps"]
    command += ["--model", arguments.model, "--batch", str(arguments.batch)]
    command += ["--precision", arguments.precision, "--compile"]
    seconds = {name: [] for name in names}
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    for _ in range(arguments.compilations):
        for name in names:
            done = subprocess.run(
                [*command, name], check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            seconds[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {seconds[name][-1]:.1f} s to compile", file=sys.stderr, flush=True)
    if not arguments.compilations:
        return {name: {} for name in names}
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        name: {
            "compilation, processor s": round(median, 1),
            "compilation / float": round(median / medians[FLOAT], 2),
        }
        for name, median in medians.items()
    }


def chosen(asked) -> list[str]:
    """Returns the rows in order, float first; says why one is left out."""
    names = [name for name in METHODS if name == FLOAT or asked is None or name in asked]
    if QWIX in names and importlib.util.find_spec("qwix") is None:
        print(f"{QWIX} is left out: qwix is not installed", file=sys.stderr)
        names.remove(QWIX)
    return names


def arguments_of(argv=None):
    """Returns the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="lenet5")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="beside float; all if none")
    parser.add_argument("--precision", choices=session.PRECISIONS, default="float32")
    parser.add_argument("--compilations", type=int, default=3, help="of every method; may be 0")
    parser.add_argument("--compile", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true")
    return parser.parse_args(argv)


def main(argv=None):
    """Measures every method and prints the record."""
    arguments = arguments_of(argv)
    if arguments.compile:
        step = prepare(arguments.compile, make_task(arguments), arguments.batch)
        print(json.dumps(step.compile_seconds))
        return
    names = chosen(arguments.methods)
    # Before this process takes the device's memory.
    compiled = compilations(names, arguments)
    rows = measure(names, arguments)
    backend = jax.default_backend()
    place = arguments.model, arguments.batch, arguments.precision, backend
    bars = {name: bar for name, bar in BARS.get(place, {}).items() if name in rows}
    record = {
        "benchmark": f"training steps of {arguments.model} by method, beside float",
        "batch": arguments.batch,
        "precision": arguments.precision,
        "rounds": arguments.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "rows": {name: row | compiled[name] for name, row in rows.items()},
        "bars, step / float": bars,
        "missed": [name for name, bar in bars.items() if rows[name]["step / float"] > bar],
    }
    if QWIX in names:
        record["qwix"] = importlib.metadata.version("qwix")
    told = [arguments.model, *([arguments.precision] * (arguments.precision != "float32"))]
    told += [backend] * (backend != "cpu")
    benchmark(f"training_steps-{'-'.join(told)}", record, arguments.write)


if __name__ == "__main__":
    main()
