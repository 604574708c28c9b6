"""Uniform leaves as the arrays of qwix, which tokamax and tunix take, and back.

jax.tree.map(to_qarray, encoded, is_leaf=lambda leaf: isinstance(leaf, qj.Grid))
"""

import jax.numpy as jnp
import numpy as np

from quantjax.core import qarray

WIDEST = 8  # bits: qwix's codes take one byte
NAMED = (2, 3, 5, 6, 7)  # widths that qwix knows by name, the others by dtype


def to_qarray(grid: qarray.Grid):
    """Returns a Grid as a `qwix.QArray`, codes in int8 and the width as its `qtype`.

    It is dequantized in the dtype of the steps: the Grid's own dtype, if another, is lost.

    Raises:
      ValueError: no Grid, one that is not valid, or one of more than 8 bits.
      ImportError: qwix is missing.
    """
    if not isinstance(grid, qarray.Grid):
        raise ValueError(f"a QArray holds a uniform grid, not {type(grid).__name__}")
    if grid.bits > WIDEST:
        raise ValueError(f"a QArray holds codes of at most {WIDEST} bits, got {grid.bits}")
    grid.validate()
    bits = max(2, grid.bits)
    qtype = f"int{bits}" if bits in NAMED else jnp.dtype(f"int{bits}")
    codes = jnp.asarray(grid.codes, jnp.int8)
    return _qwix().QArray(qvalue=codes, scale=jnp.asarray(grid.step), qtype=qtype)


def from_qarray(array, dtype=None) -> qarray.Grid:
    """Returns a `qwix.QArray` as a Grid, narrow where the lowest code does not occur.

    Args:
      array: of integers, symmetric, each axis with one scale or with one for every index.
      dtype: of the decoded leaf; None: that of the scales.

    Raises:
      ValueError: no QArray, or one that a Grid cannot hold: floats, unsigned, a zero point, scales
        for tiles of an axis, values that no Grid has.
      ImportError: qwix is missing.
    """
    if not isinstance(array, _qwix().QArray):
        raise ValueError(f"expected a qwix.QArray, got a {type(array).__name__}")
    bits = _bits(array.qtype)
    if array.zero_point is not None and np.any(np.asarray(array.zero_point) != 0):
        raise ValueError("a Grid is symmetric, and this QArray has a zero point")
    if not qarray.kept_dims(array.scale.shape, array.qvalue.shape):
        raise ValueError(
            f"a Grid has one step along an axis or one for every index, and this QArray has "
            f"scales {array.scale.shape} beside {array.qvalue.shape}: tiles"
        )
    codes = array.qvalue.astype(jnp.int8)
    levels = 2**bits
    if bits > 1 and codes.size and int(jnp.min(codes)) > -levels // 2:
        levels -= 1
    dtype = jnp.dtype(array.scale.dtype if dtype is None else dtype)
    return qarray.Grid(codes, array.scale, bits, dtype, levels).validate()


def _bits(qtype) -> int:
    name = qtype if isinstance(qtype, str) else jnp.dtype(qtype).name
    width = name.removeprefix("int")
    if not (name.startswith("int") and width.isdecimal() and int(width) <= WIDEST):
        raise ValueError(f"a Grid holds signed integers of at most {WIDEST} bits, not {name}")
    return int(width)


def _qwix():
    try:
        import qwix
    except ImportError as error:
        raise ImportError("a QArray takes: pip install qwix") from error
    return qwix
