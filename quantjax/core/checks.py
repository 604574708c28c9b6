"""Arguments that several methods share: widths, axes, and scales that belong to another leaf."""

from collections.abc import Callable

import jax
import numpy as np

from quantjax.core import paths as paths_lib


def bits(value, least: int = 1, most: int = 16) -> int:
    """Returns a bit-width; raises ValueError unless it is a whole number in least..most."""
    if not (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most):
        raise ValueError(f"bits must be a whole number in {least}..{most}, got {value!r}")
    return value


def number(name: str, value, expected: str, holds: Callable):
    """Raises ValueError if a concrete number (or array) is not as expected; traced ones pass."""
    if isinstance(value, jax.core.Tracer) or callable(value):
        return
    array = np.asarray(value)
    if not np.all(holds(array)):
        shown = repr(value) if array.ndim else array.item()
        raise ValueError(f"{name} must be {expected}, got {shown}")


def axes(value):
    """Returns axes as a sorted tuple; None and functions (path, leaf) -> axes as they are.

    Raises:
      ValueError: not integers counted from the end.
    """
    if value is None or isinstance(value, Callable):
        return value
    value = (value,) if isinstance(value, int) else tuple(value)
    if not all(isinstance(axis, int) and axis < 0 for axis in value):
        raise ValueError(f"axes are counted from the end, such as (-4, -3, -2); got {value}")
    return tuple(sorted(value))


def group_axes(value, path: str, leaf):
    """Returns the axes of one leaf that share a scale: None (all of them) for biases."""
    if not paths_lib.is_weight(path):
        return None
    return axes(value(path, leaf) if isinstance(value, Callable) else value)


def fitting(scale, leaf):
    """Returns `scale`; raises ValueError if it is not the leaf's shape with kept dims."""
    if scale.ndim != leaf.ndim or not all(
        kept in (1, size) for kept, size in zip(scale.shape, leaf.shape, strict=True)
    ):
        raise ValueError(
            f"the state was made for another tree: scales {scale.shape}, leaf {leaf.shape}"
        )
    return scale
