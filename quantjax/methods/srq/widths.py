"""Bit-widths of a network with SRQ's grids: what they are, and a network at chosen ones."""

from collections.abc import Mapping

import jax.numpy as jnp

from quantjax.core import checks
from quantjax.core.quantizer import QuantState


def of_state(state: QuantState) -> dict[str, int]:
    """Returns the bit-width of every leaf by path; 1 is ternary, see `name`."""
    return {
        path: int(buffers.get("width", int(buffers["high"]).bit_length() + 1))
        for path, buffers in state.buffers.items()
    }


def at_widths(state: QuantState, bits: int, chosen: Mapping[str, int]) -> QuantState:
    """Returns the first state of `srq(bits, learn_bits=True)` at other widths; 1 is ternary.

    Grids become coarser, so that they reach as far. With `freeze_after=0` the widths stay: the
    twin of a network whose widths were learned.

    Raises:
      ValueError: a width outside 1..bits; a path without a width, or without a learned one.
    """
    if sorted(chosen) != sorted(path for path in state.buffers if "width" in state.buffers[path]):
        raise ValueError(f"widths of {sorted(chosen)} for a state of {sorted(state.buffers)}")
    learned, buffers = {}, {}
    for path, width in chosen.items():
        checks.number(f"{path}: width", width, f"in 1..{bits}", lambda w: (w >= 1) & (w <= bits))
        mine = state.buffers[path]
        low, high = limits(jnp.asarray(width), mine["low"].dtype)
        finer = jnp.log(mine["high"] / high)
        grid = {name: state.learned[path][name] + finer for name in ("log_alpha", "log_sigma")}
        learned[path] = {**state.learned[path], **grid}
        width = jnp.asarray(width, mine["width"].dtype)
        buffers[path] = {**mine, "width": width, "low": low, "high": high}
    return QuantState(learned, buffers)


def name(width: int) -> str:
    """Returns a width as the paper's tables have it: T for ternary."""
    return "T" if width == 1 else str(width)


def limits(width, dtype):
    """The lowest and the highest code of a width; 1 is ternary, -1 .. 1."""
    half = 2 ** (width - 1).astype(dtype)
    return jnp.where(width == 1, -1, -half), jnp.where(width == 1, 1, half - 1)
