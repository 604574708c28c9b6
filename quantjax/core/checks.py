"""Arguments and states that several methods check: widths, counts, axes, and what fits what."""

import math
import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core import paths as paths_lib

BY_NAME = ("tensor", "channel")


def bits(value, least: int = 1, most: int = 16) -> int:
    """Returns a bit-width as an int; raises ValueError unless it is whole and in least..most."""
    return whole("bits", value, least, most)


def whole(name: str, value, least: int, most: int | None = None) -> int:
    """Returns a count as an int, NumPy's integers too.

    Raises:
      ValueError: no whole number, or outside least..most.
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        span = f"in {least}..{most}" if most is not None else f"from {least} on"
        raise ValueError(f"{name} must be a whole number {span}, got {value!r}")
    return number


def number(name: str, value, expected: str, holds: Callable):
    """Raises ValueError if a concrete number (or array) is not as expected; others pass."""
    if callable(value) or not is_concrete(value):
        return
    array = np.asarray(value)
    if not np.all(holds(array)):
        shown = repr(value) if array.ndim else array.item()
        raise ValueError(f"{name} must be {expected}, got {shown}")


def choice(name: str, value, known: tuple):
    """Raises ValueError unless a value is one of those known."""
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def names(learned: dict, buffers: dict, of_learned, of_buffers):
    """Raises ValueError if the state of a leaf has other arrays than its quantizer's."""
    found, expected = (set(learned), set(buffers)), (set(of_learned), set(of_buffers))
    if found != expected:
        raise ValueError(
            "the state was made by another quantizer: it has "
            f"{sorted({*learned, *buffers})}, this one {sorted({*of_learned, *of_buffers})}"
        )


def momentum(value):
    """Raises ValueError unless the weight of the present in a running mean is None or in (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"momentum must be in (0, 1], got {value!r}")


def quantizer(value):
    """Returns a Quantizer of weights; raises ValueError for anything else."""
    has = [name for name in ("init", "apply", "encode", "update") if hasattr(value, name)]
    if len(has) == 4:
        return value
    hint = {
        ("init", "apply"): "; an InputQuantizer goes to linen.quantize_inputs, nnx.quantize_inputs",
        ("init", "update"): "; an optimizer goes into optax.chain",
    }
    told = "an optimizer" if has == ["init", "update"] else repr(value)
    raise ValueError(f"expected a Quantizer, got {told}{hint.get(tuple(has), '')}")


def state(value):
    """Returns a QuantState; raises ValueError for anything else."""
    if not (hasattr(value, "learned") and hasattr(value, "buffers")):
        raise ValueError(
            "expected the QuantState that `init` or `update` returned (after the params), got "
            f"{type(value).__name__}"
        )
    return value


def patterns(value, what: str) -> dict:
    """Returns {pattern: ...} as a dict; raises ValueError for anything but a filled mapping."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"expected {what} with at least one pattern, got {value!r}")
    paths_lib.check_patterns(value)
    return dict(value)


def is_concrete(value) -> bool:
    """True for what can be looked at here: neither traced nor partly on other processes."""
    if isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def width(found, expected: int, most: int | None = None):
    """Compares the bit-width of a concrete state with the quantizer's own; traced ones pass.

    Args:
      found: of the state, an array.
      expected: the quantizer's.
      most: narrower ones are allowed down to 1, as learned widths are, up to this.

    Raises:
      ValueError: the state has another width.
    """
    if not is_concrete(found):
        return
    widths = sorted({int(value) for value in np.ravel(np.asarray(found))})
    allowed = range(1, most + 1) if most is not None else (expected,)
    wrong = [value for value in widths if value not in allowed]
    if wrong:
        raise ValueError(
            f"the state has {'/'.join(map(str, wrong))} bits, the quantizer {expected}: make a new "
            "state with `init` (inputs: `calibrate`), or use the quantizer that made this one"
        )


def width_of_codes(most):
    """Returns the bits of a signed code whose largest is `most`, for `width`; traced ones as is."""
    if not is_concrete(most):
        return most
    return np.vectorize(lambda code: int(code).bit_length() + 1)(np.asarray(most, np.float64))


def axes(value):
    """Returns a choice of axes in the form that `group_axes` takes.

    Args:
      value: None or "tensor" (the whole leaf), "channel", axes counted from the end,
        {pattern: any of these} (the first match wins, leaves without one are one group), or a
        function (path, leaf) -> axes.

    Raises:
      ValueError: none of these.
    """
    if value is None or isinstance(value, Callable):
        return value
    if isinstance(value, str):
        if value not in BY_NAME:
            raise ValueError(f"axes by name are 'tensor' or 'channel', got {value!r}")
        return value
    if isinstance(value, Mapping):
        paths_lib.check_patterns(value)
        return {pattern: axes(mine) for pattern, mine in value.items()}
    value = (value,) if isinstance(value, int | np.integer) else tuple(value)
    if not all(isinstance(axis, int | np.integer) and axis < 0 for axis in value):
        raise ValueError(
            "axes are 'tensor', 'channel', counted from the end such as (-4, -3, -2), "
            f"{{pattern: axes}} or a function (path, leaf) -> axes; got {value}"
        )
    if len(set(value)) < len(value):
        raise ValueError(f"axes are repeated: {value}")
    return tuple(sorted(int(axis) for axis in value))


def group_axes(value, path: str, leaf):
    """Returns the axes of one leaf that share a scale: all of them for biases.

    "channel" keeps the last axis of a kernel, and the rows of an embedding, its last axis but one.

    Raises:
      ValueError: axes that the leaf does not have.
    """
    if not paths_lib.is_weight(path):
        return None
    if isinstance(value, Callable):
        value = axes(value(path, leaf))
    if isinstance(value, Mapping):
        pattern = paths_lib.first_match(value, path)
        return None if pattern is None else group_axes(value[pattern], path, leaf)
    if value == "channel":
        kept = -2 if paths_lib.role(path) == "embedding" else -1
        return tuple(axis for axis in range(-leaf.ndim, 0) if axis != kept)
    if value is None or value == "tensor":
        return None
    if value and value[0] < -leaf.ndim:
        raise ValueError(f"axes {value} are out of range for a leaf of shape {leaf.shape}")
    return value


def fitting(scale, leaf):
    """Returns `scale`; raises ValueError if it is not the leaf's shape with kept dims."""
    if scale.ndim != leaf.ndim or not all(
        kept in (1, size) for kept, size in zip(scale.shape, leaf.shape, strict=True)
    ):
        raise ValueError(
            f"the state was made for another tree: scales {scale.shape}, leaf {leaf.shape}"
        )
    return scale


def finite(leaf):
    """Raises ValueError if a concrete leaf holds NaN or infinity."""
    if not is_concrete(leaf):
        return
    # Counted on the device: only a number crosses from a large or sharded leaf.
    bad = int(jnp.count_nonzero(~jnp.isfinite(leaf)))
    if bad:
        raise ValueError(f"{bad} of {math.prod(leaf.shape)} values are NaN or infinite")
