"""The methods that `quantjax compare` knows: one entry each, in one table."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from quantjax.core.quantizer import Quantizer
from quantjax.lab.engine import Method
from quantjax.lab.names import nearest_name_error
from quantjax.methods.psg import psg, scale_by_position
from quantjax.methods.uniform import uniform

# lambda_s by width; found on held-out digits, lower widths want more (appendix G of the paper).
STRENGTHS = {4: 100.0, 3: 60.0, 2: 20.0}


class Plan(NamedTuple):
    """How one row of the comparison is trained and deployed."""

    method: Method
    deploy: Quantizer | None = None  # fitted to the final weights; None: the one trained with


class Entry(NamedTuple):
    """A row of the table of methods."""

    title: str
    about: str
    plan: Callable  # (bits, rate) -> Plan; rate: the schedule of SGD's learning rate
    per_width: bool = True  # False: the training knows no width and serves all of them


def _sgd(bits, rate):
    return Plan(Method(_momentum(rate)), uniform(bits))


def _straight_through(bits, rate):
    return Plan(Method(_momentum(rate), quantizer=uniform(bits)))


def _psg(bits, rate, directional=False):
    # Hyperparameters in the state: one compiled step serves every width.
    chain = optax.inject_hyperparams(psg)(
        rate,
        uniform(bits, momentum=0.1),
        strength=2.0 if directional else _strength(bits),
        directional=directional,
        weight_decay=1e-4 if bits > 2 else 0.0,
    )
    return Plan(Method(chain), uniform(bits))


def _psg_adam(bits, rate):
    chain = optax.chain(
        optax.inject_hyperparams(scale_by_position)(
            uniform(bits, momentum=0.1), strength=_strength(bits)
        ),
        optax.adam(lambda count: 0.1 * rate(count)),
    )
    return Plan(Method(chain), uniform(bits))


def _momentum(rate):
    return optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, momentum=0.9))


def _strength(bits):
    return STRENGTHS[min(max(bits, min(STRENGTHS)), max(STRENGTHS))]


METHODS = {
    "sgd": Entry("SGD, then rounding", "trained without regard to the grid", _sgd, False),
    "uniform": Entry("straight-through", "rounded in every forward pass", _straight_through),
    "psg": Entry("PSG", "gradients scaled by the distance to the grid", _psg),
    "psg-directional": Entry(
        "PSG, directional",
        "the same, relative to the largest distance of a layer",
        lambda bits, rate: _psg(bits, rate, directional=True),
    ),
    "psg-adam": Entry("PSG with Adam", "scaled before Adam's moments", _psg_adam),
}


def find(name: str) -> Entry:
    """Returns the entry of a method; raises ValueError with the nearest names."""
    if name not in METHODS:
        raise nearest_name_error("method", name, METHODS)
    return METHODS[name]
