"""Focused Quantization's protocol: a dense network, surgery, then training with refits.

The parts of `psg.protocol.Protocol` train the dense network; here it is pruned by dynamic network
surgery, and then trained with its masks held and its weights quantized (algorithm 1).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import optax

import quantjax as qj
from experiments.psg.protocol import Protocol
from quantjax.core.quantizer import QuantState
from quantjax.encoded import entropy
from quantjax.lab import recipes
from quantjax.lab.deploy import deploy
from quantjax.lab.train import engine

SURGERY_SHARE = 0.75  # of the pruning steps; then the masks stay
DECAY = 1e-4


class Pruned(NamedTuple):
    """A network with masks that no longer move."""

    variables: dict  # pruned weights are zero
    masks: dict  # {path: bool array}

    @property
    def density(self) -> float:
        """The share of kept weights."""
        kept = sum(int(np.count_nonzero(mask)) for mask in self.masks.values())
        return kept / sum(mask.size for mask in self.masks.values())


class Focused(NamedTuple):
    """A network trained in its quantized form."""

    variables: dict  # float weights
    quantizer: qj.Quantizer
    state: QuantState


def prune(
    parts: Protocol,
    variables: Mapping,
    density: float | Mapping[str, float],
    *,
    epochs: float,
    rate: float,
    seed: int,
) -> Pruned:
    """Prunes by surgery while training; the rate falls to zero along a cosine.

    Args:
      density: of every kernel, or {pattern: that of the kernels it matches}.
      parts, variables, epochs, rate, seed: as of `focus`.
    """
    total = _steps(parts, epochs)
    end = max(1, int(SURGERY_SHARE * total))
    shares = density if isinstance(density, Mapping) else {".*": density}
    quantizer = qj.partition({name: qj.surgery(share, end=end) for name, share in shares.items()})
    name = f"surgery of {', '.join(shares)}, {epochs:g} epochs at {rate:g}"
    end = fit(parts, name, quantizer, variables, epochs=epochs, rate=rate, seed=seed)
    masks = {path: mine["mask"] for path, mine in end.state.buffers.items()}
    sparse = {**end.variables, "params": quantizer.apply(end.params, end.state)}
    return Pruned(sparse, masks)


def focus(
    parts: Protocol, start: Pruned, bits: int, *, epochs: float, rate: float, seed: int
) -> Focused:
    """Trains quantized weights; the components are fitted anew after 1, 2, 4, ... epochs."""
    quantizer = qj.chain(
        qj.pruned(start.masks),
        qj.focused(bits, refit_every=_steps(parts, 1)),
    )
    name = f"focused, {epochs:g} epochs at {rate:g}"  # one program for all widths
    end = fit(parts, name, quantizer, start.variables, epochs=epochs, rate=rate, seed=seed)
    variables = {name: end.variables[name] for name in start.variables}
    return Focused(variables, quantizer, end.state)


def fit(
    parts: Protocol,
    name: str,
    quantizer: qj.Quantizer,
    variables: Mapping,
    *,
    epochs: float,
    rate: float,
    seed: int,
) -> engine.TrainState:
    """Trains with a quantizer; the rate falls to zero along a cosine.

    Quantizers of one name must differ in their states alone: they share a program.
    """
    total = _steps(parts, epochs)
    method = engine.Method(optimizer(optax.cosine_decay_schedule(rate, total)), quantizer)
    return engine.fit(
        parts.task,
        method,
        variables,
        total,
        batch_size=parts.batch_size,
        seed=seed,
        steps=engine.shared_steps(parts.compiled, name, parts.task, method),
        label=name,
    )


def measured(parts: Protocol, result: Focused) -> dict:
    """Returns the accuracy of what ships, its file, and the compression of quantized weights."""
    shipped = deploy(result.variables, result.quantizer, result.state)
    ratios = entropy.compression(shipped.encoded)
    apart = entropy.compression(shipped.encoded, tables=False)
    layers = {}
    for path, mine in result.state.buffers.items():
        fitted = mine["1"]
        layers[path] = {
            "recentred": bool(np.all(fitted["recentred"])),
            "bias": int(np.ravel(fitted["bias"])[0]),
            "alpha": round(float(np.ravel(result.state.learned[path]["1"]["alpha"])[0]), 4),
        }
    told = {"model": parts.model, "dataset": parts.task.dataset.name}
    return {
        "file": recipes.Network({**shipped.variables, "params": shipped.encoded}, told),
        "low precision": parts.accuracy(shipped.variables),
        "density": round(ratios.density, 4),
        "compression by symbol entropy": round(apart.entropy, 2),
        "compression with levels": {
            name: round(getattr(ratios, name), 2) for name in ("fixed", "huffman", "ans", "entropy")
        },
        "layers": layers,
    }


def optimizer(rate) -> optax.GradientTransformation:
    """Returns SGD with momentum 0.9; kernels decay, grids do not."""
    decay = optax.add_decayed_weights(DECAY, mask=qj.decay_mask)
    return optax.chain(decay, optax.sgd(rate, momentum=0.9))


def _steps(parts: Protocol, epochs: float) -> int:
    return parts.context.steps(epochs, len(parts.task.dataset.train.labels) // parts.batch_size)
