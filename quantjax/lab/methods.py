"""The methods that `quantjax compare` knows, one entry each; and those from outside."""

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from quantjax.lab import plans
from quantjax.lab.names import nearest_name_error
from quantjax.lab.plans import Plan, by, learned_grid, straight_through
from quantjax.methods.alq.multibit import multi_bit
from quantjax.methods.alq.multibit_input import multi_bit_input
from quantjax.methods.binary import binary
from quantjax.methods.lsq import lsq, lsq_input
from quantjax.methods.srq.relaxed import rq, rq_input
from quantjax.methods.srq.semi_relaxed import srq, srq_input
from quantjax.methods.ternary import ternary
from quantjax.methods.uniform import uniform
from quantjax.methods.uniform_input import uniform_input

WIDTHS = range(1, 17)  # that any method has
ALL = "all"
Start = Literal["trained", "scratch", "none"]


class Entry(NamedTuple):
    """A row of the table of methods."""

    title: str
    plan: Callable  # (bits, total steps, **settings) -> Plan
    start: Start = "trained"  # the full-precision network, its first weights, or no training at all
    widths: range = range(2, 17)  # that it has
    usual: int = 2  # the width of its row if none is asked for
    shared: bool = True  # one compiled step serves all widths
    inputs: Callable = uniform_input  # bits -> quantizer of the layers' inputs, where asked for
    floats: bool = True  # what it trains are float weights, which serve in full precision, too
    note: str = ""  # a sentence that the report adds

    def chosen(self, asked: tuple[int, ...] | None) -> tuple[int, ...]:
        """Returns the widths of its rows: those asked for that it has; its own if it has but one.

        Raises:
          ValueError: a width that no method has.
        """
        for bits in asked or ():
            if not (isinstance(bits, int) and bits in WIDTHS):
                raise ValueError(f"bits must be a whole number in 1..16, got {bits!r}")
        if asked is None or len(self.widths) == 1:
            return (self.usual,)
        return tuple(bits for bits in asked if bits in self.widths)

    def steps(self, epochs_of_a_phase: int) -> int:
        """Returns the steps of its training; all trained rows have as many, with their start's."""
        return (2 if self.start == "scratch" else 1) * epochs_of_a_phase


_WHOLE = range(2, 9)
_COORDINATES = (
    "its bits leave out the coordinates, 32 bits for every base and group; groups are small here, "
    "so that its file is larger than those of other rows of as many bits."
)
METHODS = {
    "sgd": Entry("rounded", plans.rounded, "none"),
    "sgd-least-error": Entry("rounded at least error", partial(plans.rounded, fit="error"), "none"),
    "uniform": Entry("straight-through", by(straight_through, partial(uniform, fit="error"))),
    "ternary": Entry(
        "ternary",
        by(straight_through, lambda bits: ternary()),
        widths=range(2, 3),
        shared=False,
    ),
    "binary": Entry(
        "binary",
        by(straight_through, lambda bits: binary()),
        widths=range(1, 2),
        usual=1,
        shared=False,
    ),
    "lsq": Entry("LSQ", by(learned_grid, lsq), widths=_WHOLE, inputs=lsq_input),
    "lsq-balanced": Entry(
        "LSQ, levels at half steps",
        by(learned_grid, partial(lsq, balanced=True)),
        widths=range(1, 9),
        inputs=lsq_input,
    ),
    "lq-net": Entry(
        "LQ-Net",
        by(straight_through, lambda bits: multi_bit(bits, plans.pixels_or_channels)),
        widths=range(1, 9),
        shared=False,
        inputs=multi_bit_input,
        note=_COORDINATES,
    ),
    "parq": Entry("PARQ", plans.parq),
    "psg": Entry("PSG", plans.position_scaled),
    "psg-multi-bit": Entry(
        "PSG to multi-bit sums",
        plans.position_scaled_sums,
        widths=range(1, 9),
        shared=False,
        note=_COORDINATES,
    ),
    "psg-scratch": Entry("PSG from scratch", partial(plans.position_scaled, fit="max"), "scratch"),
    "psg-directional": Entry(
        "PSG, directional",
        partial(plans.position_scaled, fit="max", directional=True),
        "scratch",
    ),
    "psg-adam": Entry("PSG with Adam", plans.position_scaled_adam, "scratch"),
    "rq": Entry("RQ", by(learned_grid, rq), widths=_WHOLE, shared=False, inputs=rq_input),
    "srq": Entry("SRQ", by(learned_grid, srq), widths=_WHOLE, inputs=srq_input),
    "srq+dropbits": Entry(
        "SRQ, DropBits",
        by(learned_grid, partial(srq, dropbits=True)),
        widths=_WHOLE,
        shared=False,
        inputs=srq_input,
    ),
    "dropbits-learned": Entry(
        "DropBits, learned",
        plans.dropbits_learned,
        widths=_WHOLE,
        usual=3,
        shared=False,
        inputs=srq_input,
    ),
    "pruned": Entry("pruned", plans.pruned, widths=range(32, 33), usual=32),
    "focused": Entry("pruned and focused", plans.pruned_and_focused, widths=range(3, 9), usual=5),
    "psg-sparse": Entry(
        "PSG to zero, focused",
        plans.sparse_by_position,
        widths=range(3, 9),
        usual=5,
    ),
    "alq": Entry(
        "ALQ",
        plans.loss_aware,
        widths=range(1, 9),
        shared=False,
        inputs=multi_bit_input,
        floats=False,
        note=_COORDINATES,
    ),
    "alq-0.5": Entry(
        "ALQ, half a bit",
        partial(plans.loss_aware, average=0.5),
        widths=range(1, 2),
        usual=1,
        shared=False,
        inputs=multi_bit_input,
        floats=False,
        note=_COORDINATES,
    ),
}
# Of rows at their usual widths on the digits, by held-out training images: the record of `quantjax
# run compare_settings --seeds 0 1 2`. Other data and widths have the plans' own.
ON_DIGITS = {
    "uniform": {"rate": 0.03},
    "ternary": {"rate": 0.01},
    "binary": {"rate": 0.03},
    "lq-net": {"rate": 0.01},
    "lsq": {"rate": 0.03},
    "lsq-balanced": {"rate": 0.003},
    "rq": {"rate": 0.01},
    "srq": {"rate": 0.001},
    "srq+dropbits": {"rate": 0.01},
    "dropbits-learned": {"rate": 0.003, "penalty": 0.001},
    "parq": {"rate": 0.03},
    "psg": {"rate": 0.01, "strength": 10.0},
    "psg-multi-bit": {"rate": 0.01, "strength": 100.0},
    "psg-scratch": {"rate": 0.01, "strength": 30.0},
    "psg-directional": {"rate": 0.03, "strength": 2.0},
    "psg-adam": {"rate": 0.003, "eps": 0.0001},
    "pruned": {"rate": 0.003},
    "focused": {"rate": 0.01},
    "psg-sparse": {"rate": 0.01, "strength": 30.0},
    "alq": {"basis_rate": 0.0003, "coordinate_rate": 0.0003},
}
DEFAULT = ("sgd-least-error", "uniform", "lsq", "psg-multi-bit", "srq", "alq", "focused")
QUICK = ("sgd-least-error", "psg", "lsq", "psg-sparse")  # what compiles in seconds


def named(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names, where `all` stands for the whole table; no name twice."""
    every = [name for given in names for name in (METHODS if given == ALL else (given,))]
    return tuple(dict.fromkeys(every))


def find(name: str) -> Entry:
    """Returns the entry of a method, by its name or as `module:attribute`.

    From outside come an `Entry`, or a function (bits, total steps) -> Plan, whose row continues
    from the trained network. Modules are looked for in the working directory, too.

    Raises:
      ValueError: an unknown name, with the nearest ones; a module or an attribute that cannot be
        imported, or that is neither.
    """
    if ":" in name:
        return _from_outside(name)
    if name not in METHODS:
        raise nearest_name_error("method", name, [*METHODS, ALL])
    return METHODS[name]


def settings_on(dataset: str, name: str, bits: int) -> dict:
    """Returns the settings of a method's plan on a data set, where they were searched there."""
    searched = dataset == "digits" and name in ON_DIGITS and bits == METHODS[name].usual
    return ON_DIGITS[name] if searched else {}


def plan_of(name: str, bits: int, total: int, **settings) -> Plan:
    """Returns the plan of a method at a width.

    Raises:
      ValueError: as `find`; a width that it does not have; a function from outside that fails, or
        that returns no Plan.
    """
    entry = find(name)
    if bits not in entry.widths:
        low, high = entry.widths[0], entry.widths[-1]
        allowed = f"{low}..{high}" if low < high else f"{low} alone"
        raise ValueError(f"bits must be a whole number in {allowed}, got {bits!r}")
    plan = entry.plan(bits, total, **settings)
    if not isinstance(plan, Plan):
        raise ValueError(
            f"{name} returned {plan!r} for {bits} bits, expected a quantjax.lab.plans.Plan"
        )
    return plan


def _from_outside(name: str) -> Entry:
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:  # an installed command has its own folder there instead
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a module raises while it is imported
        raise ValueError(
            f"method {name!r}: cannot import {module!r}: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(found, attribute):
        raise ValueError(f"method {name!r}: {found.__file__} has no {attribute!r}")
    found = getattr(found, attribute)
    if isinstance(found, Entry):
        return found
    if not callable(found):
        raise ValueError(
            f"method {name!r} is {found!r}, expected a function (bits, total steps) -> Plan or an "
            "Entry of quantjax.lab.methods"
        )
    return Entry(attribute, found, widths=WIDTHS, shared=False)
