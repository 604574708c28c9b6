"""Training of multi-bit networks by ALQ: structures of the layers, phases, what comes out."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

import quantjax as qj
from quantjax.core import paths, qarray
from quantjax.core.quantizer import Quantizer
from quantjax.lab import data
from quantjax.lab.train import checkpoints, engine, evaluation, tasks
from quantjax.methods.alq.transformation import find_alq

CONV_AXES = {"channelwise": (-4, -3, -2), "kernelwise": (-4, -3), "pixelwise": -2}


class Point(NamedTuple):
    """Where the training stood."""

    kind: str  # of the phase
    step: int
    loss: float  # mean training loss since the last point
    bits: float  # average bit-width
    score: float  # accuracy on the validation split, percent


class Outcome(NamedTuple):
    """What ALQ gave: the network of the best epoch after the last pruning."""

    variables: dict  # params at their exact multi-bit values
    encoded: dict  # params with MultiBit leaves
    history: tuple[Point, ...]

    @property
    def bits(self) -> float:
        """Average bit-width of the multi-bit weights."""
        return qj.average_bits(self.encoded)

    @property
    def kilobytes(self) -> float:
        """Storage of the weights as section 5.4.1 counts, in units of 1000 bytes."""
        return qj.storage_bits(self.encoded) / 8e3


def structured(
    params,
    bits: int,
    *,
    conv: str = "pixelwise",
    first: str | None = None,
    blocks: Sequence[int] = (2, 1),
) -> Quantizer:
    """Returns `multi_bit` by the paper's structures (appendix C) for a network's kernels.

    Args:
      params: of the network; layers in the order of their paths.
      bits: 1..8.
      conv: channelwise, kernelwise or pixelwise: of the convolutions.
      first: of the first convolution; None: as the others.
      blocks: subchannels of the dense layers, the last one's last; 1, which is channelwise, where
        they do not divide the inputs.
    """
    kernels = {p: x for p, x in paths.flatten(params)[0].items() if p.endswith("kernel")}
    dense = [path for path, leaf in kernels.items() if leaf.ndim == 2]
    convs = [path for path in kernels if path not in dense]
    # Of the least depth: the paths of blocks come before that of the layer that feeds them.
    foremost = min(convs, key=lambda path: path.count("/"), default=None)
    parts = {}
    for path in convs:
        structure = first if first is not None and path == foremost else conv
        parts[re.escape(path)] = qj.multi_bit(bits, _axes(kernels[path].shape, structure))
    missing = max(0, len(dense) - len(blocks))
    counts = [*blocks[:1]] * missing + [*blocks][max(0, len(blocks) - len(dense)) :]
    for path, count in zip(dense, counts, strict=True):
        count = count if kernels[path].shape[0] % count == 0 else 1
        parts[re.escape(path)] = qj.multi_bit(bits, -2, blocks=count)
    return qj.partition(parts)


def optimizer(params, quantizer: Quantizer, schedule: Sequence, rest_rate=1e-4, **kwargs):
    """Returns ALQ for what the quantizer owns, joined with Adam for the rest."""
    owned = jax.tree.leaves(qj.owned(jax.eval_shape(quantizer.init, params), params))
    labels = jax.tree.unflatten(
        jax.tree.structure(params), ["alq" if mine else "rest" for mine in owned]
    )
    parts = {"alq": qj.alq(quantizer, schedule, **kwargs), "rest": optax.adam(rest_rate)}
    return optax.partition(parts, labels)


def train(
    task: tasks.Task,
    validation: data.Split,
    variables: Mapping,
    quantizer: Quantizer,
    schedule: Sequence[qj.Phase],
    *,
    batch_size: int,
    seed: int,
    every: int | None = None,
    **kwargs,
) -> Outcome:
    """Trains by a schedule of phases and returns the best network after the last pruning.

    Args:
      task, variables, batch_size, seed, every: as in `engine.train`.
      validation: chooses the network, among those at the reports.
      quantizer, schedule: as `alq` takes them.
      kwargs: for `alq`.
    """
    params = variables["params"]
    method = engine.Method(optimizer(params, quantizer, schedule, **kwargs))
    state = engine.init_state(task, variables, method, seed)
    # Gradients are to be taken at the sketch.
    state = state._replace(params=engine.copied(qj.alq_params(state.opt_state, state.params)))
    evaluate = evaluation.make_evaluate(task)
    ends = np.cumsum([phase.steps for phase in schedule])
    pruned = max([end for end, p in zip(ends, schedule, strict=True) if p.kind == "prune"] or [0])
    total = int(ends[-1])

    def exact(state):
        """Returns the variables at their multi-bit values, and those of the quantizer."""
        params = qj.alq_params(state.opt_state, state.params)
        return {**state.variables, "params": params}, qj.alq_state(state.opt_state)

    seen = checkpoints.Seen([], {"best": engine.copied(exact(state))})

    def observe(report):
        now = exact(report.state)
        score = evaluate(now[0], validation).accuracy
        kind = schedule[min(np.searchsorted(ends, report.steps), len(schedule) - 1)].kind
        bits = round(_average_bits(report.state.opt_state), 4)
        eligible = [point for point in map(Point._make, seen.history) if point.step > pruned]
        if report.steps >= min(pruned + 1, total) and score > max(
            [point.score for point in eligible], default=-1.0
        ):
            seen.kept["best"] = engine.copied(now)
        seen.history.append(Point(kind, report.steps, report.loss, bits, score))

    engine.run(
        task,
        engine.make_steps(task, method),
        state,
        total,
        batch_size=batch_size,
        seed=seed,
        every=every,
        label="alq",
        observe=observe,
        seen=seen,
    )
    variables, quant = seen.kept["best"]
    history = tuple(map(Point._make, seen.history))
    return Outcome(variables, quantizer.encode(variables["params"], quant), history)


def by_layer(encoded) -> dict:
    """Returns {path: average bit-width} of the MultiBit leaves (figure 2)."""
    leaves = jax.tree_util.tree_flatten_with_path(encoded, is_leaf=qarray.is_encoded)[0]
    named = {paths.path_name(key_path): leaf for key_path, leaf in leaves}
    return {p: round(x.bits, 3) for p, x in named.items() if isinstance(x, qj.MultiBit)}


def _axes(shape, structure):
    if structure not in CONV_AXES:
        raise ValueError(f"structure must be one of {sorted(CONV_AXES)}, got {structure!r}")
    axes = CONV_AXES[structure]
    within = np.prod([shape[axis] for axis in np.atleast_1d(axes)])
    return axes if within > 1 else CONV_AXES["channelwise"]  # 1x1 kernels, single channels


def _average_bits(opt_state) -> float:
    state = find_alq(opt_state)
    kept, weights = 0, 0
    for path, codes in state.codes.items():
        mask = state.quant.buffers[path]["mask"]
        kept += int(np.count_nonzero(mask)) * (codes.size // max(1, mask[..., 0].size))
        weights += codes.size
    return kept / weights
