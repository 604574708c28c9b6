"""The methods that `quantjax compare` knows: one entry each, in one table."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import optax

from quantjax.core import checks, paths
from quantjax.core.combinators import chain
from quantjax.core.quantizer import Quantizer, decay_mask, weights
from quantjax.lab.names import nearest_name_error
from quantjax.lab.train.engine import Method
from quantjax.methods.alq.multibit import multi_bit
from quantjax.methods.alq.schedule import alq_rounds
from quantjax.methods.alq.transformation import alq, alq_state
from quantjax.methods.binary import binary
from quantjax.methods.fq.focused import focused
from quantjax.methods.lsq import lsq
from quantjax.methods.proximal import annealed, parq, proximal, proximal_state
from quantjax.methods.pruning import magnitude, surgery
from quantjax.methods.psg import psg, scale_by_position
from quantjax.methods.srq.relaxed import rq
from quantjax.methods.srq.semi_relaxed import srq
from quantjax.methods.ternary import ternary
from quantjax.methods.uniform import uniform, zero

# lambda_s by width, found on 300 held-out digits with three seeds (appendix G of the paper): the
# largest that converged every time, with some room. The directional scale's needs no width.
STRENGTHS = {2: 30.0, 3: 80.0, 4: 150.0}
DIRECTIONAL_STRENGTH = 4.0
DENSITY = 0.2  # of the pruned networks
SPARSE_STRENGTH = 60.0  # lambda_s with the target zero
WIDTHS = range(1, 17)  # that any method has
MASK_RATE = 10  # the masks' logits learn that much faster: a short training has to move them


class Plan(NamedTuple):
    """How one row of the comparison is trained and deployed."""

    method: Method | None = None  # None: the full-precision network as it is
    deploy: Quantizer | None = None  # fitted to the final weights; None: the one trained with
    trained: Callable | None = None  # optimizer's state -> state of `deploy`, where it is trained


class Entry(NamedTuple):
    """A row of the table of methods."""

    title: str
    plan: Callable  # (bits, total steps) -> Plan
    pretrained: bool = False  # starts from the full-precision network, not from its first weights
    widths: range = range(2, 17)  # that it has
    usual: int = 2  # the width of its row if none is asked for
    shared: bool = True  # one compiled step serves all widths
    by_default: bool = True  # in the comparison if no methods are named

    def chosen(self, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        """Returns the widths of its rows: those asked for that it has; its own if it has but one.

        Raises:
          ValueError: a width that no method has.
        """
        for bits in asked or ():
            _check_width(bits, WIDTHS)
        if asked is None or len(self.widths) == 1:
            return (self.usual,)
        return tuple(bits for bits in asked if bits in self.widths)


def full_precision(total: int) -> Method:
    """Returns SGD with momentum, weight decay and a cosine schedule."""
    return Method(_momentum(optax.cosine_decay_schedule(0.05, total)))


def _rounded(bits, total, fit="max"):
    del total
    return Plan(deploy=uniform(bits, fit=fit))


def _straight_through(quantizer, total):
    return Plan(Method(_momentum(optax.cosine_decay_schedule(0.01, total)), quantizer=quantizer))


def _psg(bits, total, directional=False):
    # Hyperparameters in the state: one compiled step serves every width.
    descent = optax.inject_hyperparams(psg)(
        optax.warmup_cosine_decay_schedule(0.0005, 0.01, total // 10, total),
        uniform(bits, momentum=0.1),
        strength=DIRECTIONAL_STRENGTH if directional else strength(bits),
        directional=directional,
        weight_decay=1e-4 if bits > 2 else 0.0,  # none at 2 bits (appendix C)
    )
    return Plan(Method(descent), uniform(bits))


def _psg_adam(bits, total):
    # Before Adam's moments (appendix D.1). They divide by each weight's own size of gradients, so
    # that of its distance only what eps holds against is left: a large eps keeps more of it.
    scale = scale_by_position(uniform(bits, momentum=0.1), strength=1.0)
    descent = optax.chain(scale, optax.adam(optax.cosine_decay_schedule(0.01, total), eps=1e-4))
    return Plan(Method(descent), uniform(bits))


def _adamw(total):
    rate = optax.warmup_cosine_decay_schedule(1e-4, 1e-3, total // 20, max(total, 2))
    return optax.adamw(rate, weight_decay=0.01, mask=decay_mask)


def _learned_grid(quantizer, total):
    return Plan(Method(optax.chain(_adamw(total), faster_masks()), quantizer))


def _by(train, make):
    """Returns the plan (bits, total) that trains with make(bits)."""
    return lambda bits, total: train(make(bits), total)


def _parq(bits, total):
    # On the grid for the last quarter: batch statistics and biases settle there.
    target = uniform(bits, fit="error")
    descent = proximal(_adamw(total), target, parq(annealed(max(1, 3 * total // 4))))
    return Plan(Method(descent), target, proximal_state)


def _rq(bits, total):
    return _learned_grid(rq(bits), total)


def _srq(bits, total, dropbits=False):
    return _learned_grid(srq(bits, dropbits=dropbits, estimator="expectation"), total)


def _dropbits_learned(bits, total):
    quantizer = srq(
        bits, learn_bits=True, freeze_after=total // 2, penalty=1e-2, estimator="expectation"
    )
    return _learned_grid(quantizer, total)


def _pruned(bits, total):
    _check_width(bits, METHODS["pruned"].widths)
    quantizer = surgery(DENSITY, end=max(1, 3 * total // 4))
    return Plan(Method(_momentum(optax.cosine_decay_schedule(0.01, total)), quantizer))


def _focused(bits, total):
    # Pruned in the first third, so that the last refits, of 1, 3, 7 and 15 sixteenths, see it.
    quantizer = chain(
        magnitude(DENSITY, end=max(1, total // 3), every=max(1, total // 50)),
        focused(bits, refit_every=max(1, total // 16)),
    )
    decay = optax.add_decayed_weights(1e-4, mask=decay_mask)
    rate = optax.cosine_decay_schedule(0.01, total)
    return Plan(Method(optax.chain(decay, optax.sgd(rate, momentum=0.9)), quantizer))


def _psg_sparse(bits, total):
    rate = optax.warmup_cosine_decay_schedule(0.0005, 0.01, total // 10, total)
    # No weight decay at a sparsity of 80 percent (table A7).
    descent = psg(rate, zero(), strength=SPARSE_STRENGTH, weight_decay=0.0)
    return Plan(Method(descent), chain(magnitude(DENSITY, across=True), focused(bits)))


def _alq(bits, total, average=None):
    # A bit more to begin with, pruned to the average in three rounds; bases cost compilation.
    checks.bits(bits, most=8)
    target = bits if average is None else average
    start = max(math.ceil(target), min(6, 1 + math.ceil(target)))
    rounds = 3 if total >= 12 else 1
    schedule = alq_rounds(
        max(1, total // (4 * rounds)),
        rounds,
        (target / start) ** (1 / rounds),
        basis_epochs=2,
        coordinate_epochs=1,
        coordinate_rate=3e-4,
    )
    quantizer = multi_bit(start, _pixels_or_channels)
    parts = {"alq": alq(quantizer, schedule), "rest": optax.adam(1e-4)}
    return Plan(Method(optax.partition(parts, _multi_bit_labels)), quantizer, alq_state)


def _pixels_or_channels(path, leaf):
    """Pixelwise groups, channelwise where those would have fewer than 16 weights."""
    del path
    return -2 if leaf.ndim == 2 or leaf.shape[-2] >= 16 else tuple(range(-leaf.ndim, -1))


def _multi_bit_labels(params):
    flat, rebuild = paths.flatten(params)
    return rebuild({path: "alq" if weights(path, x) else "rest" for path, x in flat.items()})


def _momentum(rate):
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9))


def strength(bits: int) -> float:
    """Returns lambda_s for a width; that of the nearest known one beyond them."""
    return STRENGTHS[min(max(bits, min(STRENGTHS)), max(STRENGTHS))]


def faster_masks(factor: float = MASK_RATE) -> optax.GradientTransformation:
    """Multiplies the updates of DropBits' mask logits."""

    def update(updates, state, params=None):
        del params

        def scale(path, leaf):
            return leaf * factor if "mask_logits" in jax.tree_util.keystr(path) else leaf

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


METHODS = {
    "sgd": Entry("SGD, rounded", _rounded),
    "sgd-least-error": Entry(
        "SGD, rounded at least error", partial(_rounded, fit="error"), by_default=False
    ),
    "uniform": Entry(
        "straight-through", _by(_straight_through, partial(uniform, fit="error")), pretrained=True
    ),
    "ternary": Entry(
        "ternary",
        _by(_straight_through, lambda bits: ternary()),
        True,
        range(2, 3),
        shared=False,
        by_default=False,
    ),
    "binary": Entry(
        "binary",
        _by(_straight_through, lambda bits: binary()),
        True,
        range(1, 2),
        1,
        shared=False,
        by_default=False,
    ),
    "lsq": Entry("LSQ", _by(_learned_grid, lsq), True, range(2, 9)),
    "lsq-balanced": Entry(
        "LSQ, levels at half steps",
        _by(_learned_grid, partial(lsq, balanced=True)),
        True,
        range(1, 9),
        by_default=False,
    ),
    "lq-net": Entry(
        "LQ-Net",
        _by(_straight_through, lambda bits: multi_bit(bits, _pixels_or_channels)),
        True,
        range(1, 9),
        shared=False,
        by_default=False,
    ),
    "parq": Entry("PARQ", _parq, True, by_default=False),
    "psg": Entry("PSG", _psg),
    "psg-directional": Entry("PSG, directional", lambda bits, total: _psg(bits, total, True)),
    "psg-adam": Entry("PSG with Adam", _psg_adam),
    "rq": Entry("RQ", _rq, True, range(2, 9), shared=False),
    "srq": Entry("SRQ", _srq, True, range(2, 9)),
    "srq+dropbits": Entry(
        "SRQ, DropBits", partial(_srq, dropbits=True), True, range(2, 9), shared=False
    ),
    "dropbits-learned": Entry(
        "DropBits, learned", _dropbits_learned, True, range(2, 9), 3, shared=False
    ),
    "pruned": Entry("pruned", _pruned, True, range(32, 33), 32),
    "focused": Entry("pruned and focused", _focused, True, range(3, 9), 5),
    "psg-sparse": Entry("PSG to zero, focused", _psg_sparse, True, range(3, 9), 5),
    "alq": Entry("ALQ", _alq, True, range(1, 9), 2, shared=False),
    "alq-0.5": Entry(
        "ALQ, half a bit", partial(_alq, average=0.5), True, range(1, 2), 1, False, False
    ),
}
QUICK = ("sgd", "psg", "srq", "psg-sparse")  # what compiles in seconds
DEFAULT = tuple(name for name, entry in METHODS.items() if entry.by_default)


def _check_width(bits, widths: range):
    if not (isinstance(bits, int) and bits in widths):
        allowed = f"{widths[0]}..{widths[-1]}" if len(widths) > 1 else f"{widths[0]} alone"
        raise ValueError(f"bits must be a whole number in {allowed}, got {bits!r}")


def find(name: str) -> Entry:
    """Returns the entry of a method; raises ValueError with the nearest names."""
    if name not in METHODS:
        raise nearest_name_error("method", name, METHODS)
    return METHODS[name]
