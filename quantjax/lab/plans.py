"""How the rows of a comparison are trained and deployed: a function for each, with its settings.

A plan is a function (bits, total steps, **settings) -> Plan.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import optax

from quantjax.core import checks, paths
from quantjax.core.combinators import chain
from quantjax.core.quantizer import Quantizer, decay_mask, weights
from quantjax.lab.train.engine import Method
from quantjax.methods import proximal as proximal_lib
from quantjax.methods.alq.multibit import multi_bit
from quantjax.methods.alq.schedule import alq_rounds
from quantjax.methods.alq.transformation import alq, alq_state
from quantjax.methods.fq.focused import focused
from quantjax.methods.pruning import magnitude
from quantjax.methods.psg import psg, scale_by_position
from quantjax.methods.srq.semi_relaxed import srq
from quantjax.methods.uniform import uniform, zero

# lambda_s by width. The directional scale's needs no width.
STRENGTHS = {2: 30.0, 3: 80.0, 4: 150.0}
DIRECTIONAL_STRENGTH = 4.0
DENSITY = 0.2  # of the pruned networks
SPARSE_STRENGTH = 60.0  # lambda_s with the target zero
MASK_RATE = 10  # the masks' logits learn that much faster: a short training has to move them


class Plan(NamedTuple):
    """How one row of the comparison is trained and deployed."""

    method: Method | None = None  # None: the full-precision network as it is
    deploy: Quantizer | None = None  # fitted to the final weights; None: the one trained with
    trained: Callable | None = None  # optimizer's state -> state of `deploy`, where it is trained


def full_precision(total: int) -> Method:
    """Returns SGD with momentum, weight decay and a cosine schedule."""
    return Method(momentum(optax.cosine_decay_schedule(0.05, total)))


def rounded(bits, total, *, fit="max"):
    """The full-precision network, rounded."""
    del total
    return Plan(deploy=uniform(bits, fit=fit))


def straight_through(quantizer: Quantizer, total: int, *, rate=0.01) -> Plan:
    """SGD with momentum on weights that a quantizer without learned leaves rounds."""
    return Plan(Method(momentum(optax.cosine_decay_schedule(rate, total)), quantizer))


def learned_grid(quantizer: Quantizer, total: int, *, rate=1e-3) -> Plan:
    """AdamW on weights and on what their quantizer learns."""
    return Plan(Method(optax.chain(adamw(rate, total), faster_masks()), quantizer))


def by(train: Callable, make: Callable, **settings) -> Callable:
    """Returns the plan that trains, as one of the two above, with make(bits)."""
    return partial(_with, train, make, **settings)


def _with(train, make, bits, total, **settings):
    return train(make(bits), total, **settings)


def position_scaled(bits, total, *, rate=0.01, strength=None, fit="error", directional=False):
    """PSG towards one step for a leaf: strength None is that of the width.

    From a trained network the step is to be that of least error, from scratch the running range.
    """
    usual = DIRECTIONAL_STRENGTH if directional else strength_of(bits)
    # Hyperparameters in the state: one compiled step serves every width.
    descent = optax.inject_hyperparams(psg)(
        warmed_up(rate, total),
        uniform(bits, momentum=0.1) if fit == "max" else uniform(bits, fit=fit),
        strength=usual if strength is None else strength,
        directional=directional,
        weight_decay=1e-4 if bits > 2 else 0.0,  # none at 2 bits (appendix C)
    )
    return Plan(Method(descent), uniform(bits, fit=fit))


def position_scaled_sums(bits, total, *, rate=0.01, strength=100.0):
    """PSG towards sums of binary bases, found anew by every step."""
    target = multi_bit(bits, pixels_or_channels)
    descent = psg(warmed_up(rate, total), target, strength=strength, weight_decay=0.0)
    return Plan(Method(descent), target)


def position_scaled_adam(bits, total, *, rate=0.01, eps=1e-4):
    """PSG before Adam's moments (appendix D.1).

    They divide by each weight's own size of gradients, so that of its distance only what eps holds
    against is left: a large eps keeps more of it.
    """
    scale = scale_by_position(uniform(bits, momentum=0.1), strength=1.0)
    descent = optax.chain(scale, optax.adam(optax.cosine_decay_schedule(rate, total), eps=eps))
    return Plan(Method(descent), uniform(bits))


def parq(bits, total, *, rate=1e-3):
    """PARQ; on the grid for the last quarter, where batch statistics and biases settle."""
    target = uniform(bits, fit="error")
    pull = proximal_lib.parq(proximal_lib.annealed(max(1, 3 * total // 4)))
    descent = proximal_lib.proximal(adamw(rate, total), target, pull)
    return Plan(Method(descent), target, proximal_lib.proximal_state)


def dropbits_learned(bits, total, *, rate=1e-3, penalty=1e-2):
    """DropBits with learned widths, which freeze at half."""
    quantizer = srq(bits, learn_bits=True, freeze_after=total // 2, penalty=penalty)
    return learned_grid(quantizer, total, rate=rate)


def pruned(bits, total, *, rate=0.01):
    """Gradual pruning alone, until three quarters: float weights."""
    del bits
    quantizer = _pruned(3 * total // 4, total)
    return Plan(Method(momentum(optax.cosine_decay_schedule(rate, total)), quantizer))


def pruned_and_focused(bits, total, *, rate=0.01):
    """Pruned in the first third, so that the last refits, of 1, 3, 7 and 15 sixteenths, see it."""
    fitted = focused(bits, refit_every=max(1, total // 16))
    quantizer = chain(_pruned(total // 3, total), fitted)
    decay = optax.add_decayed_weights(1e-4, mask=decay_mask)
    descent = optax.sgd(optax.cosine_decay_schedule(rate, total), momentum=0.9)
    return Plan(Method(optax.chain(decay, descent), quantizer))


def sparse_by_position(bits, total, *, rate=0.01, strength=SPARSE_STRENGTH):
    """PSG towards zero, then cut to the density and focused."""
    # No weight decay at a sparsity of 80 percent (table A7).
    descent = psg(warmed_up(rate, total), zero(), strength=strength, weight_decay=0.0)
    return Plan(Method(descent), chain(magnitude(DENSITY, across=True), focused(bits)))


def loss_aware(bits, total, *, average=None, basis_rate=1e-3, coordinate_rate=3e-4):
    """ALQ: a bit more to begin with, pruned to the average in three rounds."""
    checks.bits(bits, most=8)
    target = bits if average is None else average
    start = max(math.ceil(target), min(6, 1 + math.ceil(target)))  # bases cost compilation
    rounds = 3 if total >= 12 else 1
    schedule = alq_rounds(
        max(1, total // (4 * rounds)),
        rounds,
        (target / start) ** (1 / rounds),
        basis_epochs=2,
        basis_rate=basis_rate,
        coordinate_epochs=1,
        coordinate_rate=coordinate_rate,
    )
    quantizer = multi_bit(start, pixels_or_channels)
    parts = {"alq": alq(quantizer, schedule), "rest": optax.adam(1e-4)}
    return Plan(Method(optax.partition(parts, _multi_bit_labels)), quantizer, alq_state)


def pixels_or_channels(path, leaf):
    """Pixelwise groups, channelwise where those would have fewer than 16 weights."""
    del path
    return -2 if leaf.ndim == 2 or leaf.shape[-2] >= 16 else tuple(range(-leaf.ndim, -1))


def strength_of(bits: int) -> float:
    """Returns lambda_s for a width; that of the nearest known one beyond them."""
    return STRENGTHS[min(max(bits, min(STRENGTHS)), max(STRENGTHS))]


def momentum(rate) -> optax.GradientTransformation:
    """Returns SGD with momentum and weight decay."""
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9))


def adamw(rate: float, total: int) -> optax.GradientTransformation:
    """Returns AdamW along a cosine, warmed up, with decay of kernels and embeddings alone."""
    schedule = optax.warmup_cosine_decay_schedule(0.1 * rate, rate, total // 20, max(total, 2))
    return optax.adamw(schedule, weight_decay=0.01, mask=decay_mask)


def warmed_up(rate: float, total: int) -> optax.Schedule:
    """Returns PSG's cosine, whose first tenth rises from a twentieth."""
    return optax.warmup_cosine_decay_schedule(0.05 * rate, rate, total // 10, total)


def faster_masks(factor: float = MASK_RATE) -> optax.GradientTransformation:
    """Multiplies the updates of DropBits' mask logits."""

    def update(updates, state, params=None):
        del params

        def scale(path, leaf):
            return leaf * factor if "mask_logits" in jax.tree_util.keystr(path) else leaf

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _pruned(end, total):
    """Every sparse row keeps the same share of all weights together."""
    return magnitude(DENSITY, end=max(1, end), every=max(1, total // 50), across=True)


def _multi_bit_labels(params):
    flat, rebuild = paths.flatten(params)
    return rebuild({path: "alq" if weights(path, x) else "rest" for path, x in flat.items()})
