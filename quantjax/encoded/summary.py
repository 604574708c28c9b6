"""A table of what a tree of encoded leaves holds and costs, and of what stays as it was."""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

from quantjax.core import paths, qarray
from quantjax.encoded import leaves as leaves_lib
from quantjax.encoded import storage


class Row(NamedTuple):
    """One leaf of a summary."""

    path: str
    shape: tuple[int, ...]
    method: str  # the encoded leaf's class and kind, or the dtype of a plain array
    bits: float  # per weight, scales and tables apart
    nbytes: int  # as a file has it, scales and tables included, its share of the header not
    squared_error: float | None  # sum over the leaf; None without float params, or as they are
    relative_error: float | None  # norm of the error over norm of the float leaf
    groups: int | None  # that have scales or tables of their own; None for plain arrays
    coder: str  # how its codes are written: packed, ans, huffman; empty for a plain array


@dataclasses.dataclass(frozen=True)
class Summary:
    """Rows of all leaves; printing it gives a table, as does a notebook cell."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()  # what is allowed but odd

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves together."""
        return sum(row.nbytes for row in self.rows)

    @property
    def compression(self) -> float:
        """How many times smaller than float32."""
        return sum(4 * math.prod(row.shape) for row in self.rows) / max(1, self.nbytes)

    def __rich__(self):
        from rich.table import Table  # the extra `files`

        with_error = any(row.relative_error is not None for row in self.rows)
        table = Table(show_footer=True)
        table.add_column("leaf", "total", overflow="fold")
        table.add_column("shape", justify="right")
        table.add_column("method", f"{self.compression:.1f}x smaller")
        table.add_column("bits", justify="right")
        table.add_column("groups", justify="right")
        table.add_column("coder")
        table.add_column("size", size_text(self.nbytes), justify="right")
        if with_error:
            table.add_column("error", justify="right")
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            groups = "" if row.groups is None else str(row.groups)
            size = size_text(row.nbytes)
            cells = [row.path, shape, row.method, f"{row.bits:.3g}", groups, row.coder, size]
            if with_error:
                known = row.relative_error is not None
                cells.append(f"{row.relative_error:.2%}" if known else "")
            table.add_row(*cells)
        table.caption = "\n".join(self.notes) or None
        return table

    def __str__(self):
        from rich.console import Console

        # Not as in Jupyter, where rich would show it, too.
        console = Console(width=100, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def _repr_html_(self):
        return f"<pre>{self}</pre>"


def summary(encoded, params=None, inputs=None, *, coding: str = "smallest") -> Summary:
    """Returns the rows of a tree of encoded leaves: path, shape, method, bits, groups, size, error.

    Sizes are those of a file: leaves are packed and coded for them (a second per 25 million).

    A leaf that holds several layers and has one group wants `stacked`, one group per head or
    channel wants `axes`. Arrays of two or more dimensions that are not encoded are named in a note.

    Args:
      encoded: what `Quantizer.encode` gives; plain leaves are listed too.
      params: the float tree beside it, for the error columns.
      coding: of the file, as in `save`.
      inputs: variables with the collections of input quantizers; layers whose grid is signed
        though their inputs never were negative are named in a note.

    Raises:
      ValueError: params have other paths, or a leaf (named) cannot be stored.
    """
    leaves = jax.tree_util.tree_flatten_with_path(encoded, is_leaf=qarray.is_encoded)[0]
    named = {paths.path_name(key_path): leaf for key_path, leaf in leaves}
    floats = None
    if params is not None:
        floats = paths.restrict(paths.flatten(params)[0], named, "encoded tree")
    rows = []
    for path, leaf in named.items():
        try:
            rows.append(_row(path, leaf, leaves_lib.store(leaf, coding), floats))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    notes = () if inputs is None else _notes(inputs)
    left = [row.path for row in rows if row.groups is None and len(row.shape) > 1]
    if left:
        notes += (f"not encoded, of two or more dimensions: {', '.join(left)}",)
    return Summary(tuple(rows), notes)


def of_file(found: storage.File, leaves: dict) -> Summary:
    """Returns the rows of a file, with the bytes that its leaves take there.

    Args:
      found: what `inspect` gives.
      leaves: `found.decoded()`.
    """
    rows = tuple(_row(name, leaf, found.leaves[name]) for name, leaf in leaves.items())
    header = found.nbytes - sum(row.nbytes for row in rows)
    notes = (
        f"{found.nbytes:,} bytes in all: {header:,} of them header and digests",
        f"all {1 + len(rows)} SHA-256 digests agree; format {found.version}",
    )
    return Summary(rows, notes)


def _notes(inputs):
    buffers = {}
    for key_path, value in jax.tree_util.tree_flatten_with_path(inputs.get("quant_stats", {}))[0]:
        layer, _, name = paths.path_name(key_path).rpartition("/")
        if name in ("low", "least"):
            buffers.setdefault(layer, {})[name] = np.min(value)
    idle = [
        layer
        for layer, values in buffers.items()
        if values.get("low", 0) < 0 <= values.get("least", -1)
    ]
    if not idle:
        return ()
    return (f"half of a signed grid is idle, inputs are never negative: {', '.join(idle)}",)


def size_text(nbytes: int) -> str:
    """Returns a size as text, in units of 1000 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * scale:  # what three digits round up to the unit
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} B"


def _row(path, leaf, stored, floats=None):
    encoded = qarray.is_encoded(leaf)
    squared = relative = None
    if floats is not None:
        exact = np.asarray(floats[path], np.float64)
        given = np.asarray(leaf.decode() if encoded else leaf, np.float64)
    if floats is not None and (encoded or not np.array_equal(given, exact)):
        squared = float(np.sum((given - exact) ** 2))
        norm = float(np.sum(exact**2))
        relative = math.sqrt(squared / norm) if norm else 0.0
    return Row(
        path=path,
        shape=tuple(leaf.shape),
        method=_method(leaf) if encoded else str(leaf.dtype),
        bits=leaf.bits if encoded else leaf.dtype.itemsize * 8,
        nbytes=stored.data.nbytes,
        squared_error=squared,
        relative_error=relative,
        groups=_groups(leaf) if encoded else None,
        coder=stored.coder,
    )


def _groups(leaf) -> int:
    """Returns how many parts of a leaf have a step, a table or coordinates of their own."""
    if isinstance(leaf, qarray.Grid):
        return leaf.step.size
    scales = leaf.levels if isinstance(leaf, qarray.Table) else leaf.coords
    return math.prod(scales.shape[:-1])


def _method(leaf) -> str:
    name = type(leaf).__name__
    if isinstance(leaf, qarray.Table):
        # Levels that all have one mantissa multiply by a shift.
        mantissas = np.abs(np.frexp(np.asarray(leaf.levels, np.float64))[0])
        largest = mantissas.max(axis=-1, keepdims=True)
        if np.all((mantissas == largest) | (mantissas == 0)):
            return f"{name}, powers of two"
    return name
