"""Encoded leaves: arrays of codes that decode themselves.

All axes are counted from the end, so that stacking, vmap and scan over a leading axis work.
Arithmetic is in float32 (or the wider type of the scales), cast to `dtype` last.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


def _encoded(*static):
    """Registers a frozen dataclass as a pytree whose fields named in `static` are metadata."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        data = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return register


def code_dtype(bits: int, *, signed: bool = True):
    """Returns the smallest integer dtype that holds codes of `bits` bits."""
    return np.dtype(f"{'int' if signed else 'uint'}{8 if bits <= 8 else 16}")


@_encoded("bits", "dtype", "levels")
class Grid:
    """A uniform grid: integer codes times a step.

    Codes reach from -(levels // 2) upwards: 2**bits levels, or one less for a narrow grid, which
    is symmetric. Three levels are stored five to a byte, others at `bits` bits each.

    Invariants, checked by `validate`:
      codes is an integer array of at most `levels` levels, which fit in `bits` bits, signed;
      step is a positive, finite float array with the rank of codes, each dimension 1 or equal.
    """

    codes: jax.Array  # [*shape], int8 or int16
    step: jax.Array  # [*group], float
    bits: int
    dtype: np.dtype
    levels: int | None = None  # None: 2**bits

    def __post_init__(self):
        if self.levels is None:
            object.__setattr__(self, "levels", 2**self.bits)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded leaf."""
        return self.codes.shape

    @property
    def nbits(self) -> int:
        """The number of bits that storage writes: one padded stream of codes, and the steps."""
        return 8 * stream_bytes(self.codes.size, self.levels) + _bits_of(self.step)

    def decode(self):
        """Returns `codes * step` in `dtype`."""
        return (self.codes.astype(self.step.dtype) * self.step).astype(self.dtype)

    def validate(self) -> "Grid":
        """Returns itself; raises ValueError, naming the invariant, if one is broken."""
        low = -(self.levels // 2)
        high = low + self.levels - 1
        codes, step = np.asarray(self.codes), np.asarray(self.step, np.float64)
        _check(np.issubdtype(codes.dtype, np.integer), f"codes are {codes.dtype}, not integers")
        _check_float("step", self.step)
        outside = codes.size and (codes.min() < low or codes.max() > high)
        fits = 2 ** (self.bits - 1) < self.levels <= 2**self.bits
        _check(fits, f"{self.levels} levels of {self.bits} bits")
        _check(not outside, f"codes leave {low}..{high}, the range of {self.levels} levels")
        _check(kept_dims(step.shape, codes.shape), f"step {step.shape} beside codes {codes.shape}")
        _check(np.all(np.isfinite(step) & (step > 0)), "steps are not all positive and finite")
        return self


@_encoded("bits", "dtype")
class Table:
    """An index into a table of levels.

    Invariants, checked by `validate`:
      codes is an unsigned integer array below 2**bits;
      levels is finite, its last axis 2**bits long, the others as codes' shape with kept dims.
    """

    codes: jax.Array  # [*shape], uint8 or uint16
    levels: jax.Array  # [*group, 2**bits], float
    bits: int
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded leaf."""
        return self.codes.shape

    @property
    def nbits(self) -> int:
        """The number of bits that storage writes: one padded stream of codes, and the tables."""
        return 8 * stream_bytes(self.codes.size, 2**self.bits) + _bits_of(self.levels)

    def decode(self):
        """Returns the level of every code in `dtype`."""
        index = self.codes.astype(jnp.int32)[..., None]
        return jnp.take_along_axis(self.levels, index, axis=-1)[..., 0].astype(self.dtype)

    def validate(self) -> "Table":
        """Returns itself; raises ValueError, naming the invariant, if one is broken."""
        codes, levels = np.asarray(self.codes), np.asarray(self.levels, np.float64)
        _check(
            np.issubdtype(codes.dtype, np.unsignedinteger),
            f"codes are {codes.dtype}, not unsigned integers",
        )
        _check_float("levels", self.levels)
        _check(not codes.size or codes.max() < 2**self.bits, f"codes reach 2**{self.bits}")
        _check(levels.shape[-1:] == (2**self.bits,), f"{levels.shape[-1:]} levels, not 2**bits")
        _check(
            kept_dims(levels.shape[:-1], codes.shape), f"levels {levels.shape}, codes {codes.shape}"
        )
        _check(np.all(np.isfinite(levels)), "levels are not all finite")
        return self


@_encoded("dtype", "blocks", "axis")
class MultiBit:
    """A sum of binary bases: `sum_k mask_k coords_k basis_k`.

    The view is the leaf's shape, with `axis` split into (blocks, n / blocks) if blocks > 1. A
    group is what shares coordinates: the axes of length 1 in coords. Slots keep their places when
    some are pruned.

    Invariants, checked by `validate`:
      basis is int8, all -1 or 1;
      coords is float, mask bool, both of one shape: the view with kept dims, then K;
      coords are finite, not negative, and zero where the mask is False;
      axis is negative; with blocks > 1 the view's axis - 1 has that length.
    """

    basis: jax.Array  # [*view, K], int8
    coords: jax.Array  # [*group, K], float
    mask: jax.Array  # [*group, K], bool
    dtype: np.dtype
    blocks: int = 1
    axis: int = -1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded leaf."""
        view = list(self.basis.shape[:-1])
        if self.blocks > 1:
            at = len(view) + self.axis - 1
            view[at : at + 2] = [view[at] * view[at + 1]]
        return tuple(view)

    @property
    def bits(self) -> float:
        """The average bit-width: sum of n_g I_g over sum of n_g."""
        return float(np.count_nonzero(np.asarray(self.mask)) / max(1, self.coords[..., 0].size))

    @property
    def nbits(self) -> int:
        """The number of bits that storage writes: one padded stream, and the coordinates.

        The stream holds a basis bit per weight and kept slot, and every group's count of slots.
        """
        kept = np.asarray(self.mask)
        group_size = self.basis[..., 0].size // max(1, kept[..., 0].size)
        counts = kept.sum(axis=-1)
        width = math.ceil(math.log2(int(counts.max(initial=0)) + 1))
        stream = group_size * int(counts.sum()) + width * counts.size
        return 8 * stream_bytes(stream, 2) + int(counts.sum()) * self.coords.dtype.itemsize * 8

    def decode(self):
        """Returns the masked sum over the slots in `dtype`."""
        kept = jnp.where(self.mask, self.coords, 0)
        # Slot by slot: the order of a reduction is the compiler's, and quantizers must agree.
        total = jnp.zeros(self.basis.shape[:-1], kept.dtype)
        for k in range(self.basis.shape[-1]):
            total = total + kept[..., k] * self.basis[..., k].astype(kept.dtype)
        return total.reshape(self.shape).astype(self.dtype)

    def validate(self) -> "MultiBit":
        """Returns itself; raises ValueError, naming the invariant, if one is broken."""
        basis, mask = np.asarray(self.basis), np.asarray(self.mask)
        coords = np.asarray(self.coords, np.float64)
        _check(basis.dtype == np.int8, f"basis is {basis.dtype}, not int8")
        _check(np.all(np.abs(basis) == 1), "basis entries are not all -1 or 1")
        _check(mask.dtype == np.bool_, f"mask is {mask.dtype}, not bool")
        _check_float("coords", self.coords)
        _check(coords.shape == mask.shape, f"coords {coords.shape} beside mask {mask.shape}")
        same_slots = coords.shape[-1:] == basis.shape[-1:]
        kept = same_slots and kept_dims(coords.shape[:-1], basis.shape[:-1])
        _check(kept, f"coords {coords.shape} beside basis {basis.shape}")
        _check(np.all(np.isfinite(coords)), "coords are not all finite")
        _check(np.all(coords >= 0), "coords are negative")
        _check(np.all(coords[~mask] == 0), "masked coords are not zero")
        _check(self.axis < 0, f"axis {self.axis} is not counted from the end")
        if self.blocks > 1:
            view = basis.shape[:-1]
            _check(-self.axis < len(view), f"axis {self.axis} - 1 is not in the view {view}")
            length = view[self.axis - 1]
            _check(length == self.blocks, f"{length} blocks along the view, not {self.blocks}")
        return self


ENCODED = (Grid, Table, MultiBit)


def is_encoded(leaf) -> bool:
    """True for Grid, Table and MultiBit."""
    return isinstance(leaf, ENCODED)


def decode(tree):
    """Returns the tree with every encoded leaf decoded; other leaves are the same objects."""
    return jax.tree.map(
        lambda leaf: leaf.decode() if is_encoded(leaf) else leaf, tree, is_leaf=is_encoded
    )


def nbits(leaf) -> int:
    """Returns the bits of a leaf, encoded or plain."""
    return leaf.nbits if is_encoded(leaf) else _bits_of(leaf)


def stream_bytes(count: int, levels: int) -> int:
    """Returns the bytes of a stream of `count` symbols below `levels`, padded once at its end."""
    return math.ceil(count / 5) if levels == 3 else math.ceil(count * width(levels) / 8)


def width(levels: int) -> int:
    """Returns the bits of one symbol below `levels`; 0 where there is one symbol only."""
    return (levels - 1).bit_length()


def alphabet(leaf) -> int:
    """Returns the number of symbols of a Grid or a Table."""
    return leaf.levels if isinstance(leaf, Grid) else 2**leaf.bits


def symbols(leaf):
    """Returns the codes of a Grid or a Table as 0..alphabet-1, uint8 or uint16 `[*shape]`."""
    dtype = code_dtype(leaf.bits, signed=False)
    if isinstance(leaf, Grid):
        return (leaf.codes.astype(np.int32) + leaf.levels // 2).astype(dtype)
    return leaf.codes.astype(dtype)


def grid_codes(symbols, levels: int, bits: int):
    """Returns the codes of a Grid from `symbols`."""
    return (symbols.astype(np.int32) - levels // 2).astype(code_dtype(bits))


def kept_first(leaf: MultiBit):
    """Returns basis, coords and mask of a MultiBit, NumPy, kept slots first in every group.

    Slots that no group keeps are left out, but for one. Sums stay the same: the order is stable.
    """
    mask = np.asarray(leaf.mask)
    slots = max(1, int(mask.sum(axis=-1).max(initial=0)))
    order = np.argsort(~mask, axis=-1, kind="stable")[..., :slots]
    basis = np.asarray(leaf.basis)
    of_weights = np.broadcast_to(order, (*basis.shape[:-1], slots))
    coords, mask = (np.take_along_axis(np.asarray(a), order, -1) for a in (leaf.coords, mask))
    return np.take_along_axis(basis, of_weights, axis=-1), coords, mask


def _bits_of(array) -> int:
    return array.size * array.dtype.itemsize * 8


def kept_dims(group, shape) -> bool:
    """True for a shape of the same rank, each dimension 1 or equal."""
    return len(group) == len(shape) and all(g in (1, n) for g, n in zip(group, shape, strict=True))


def _check_float(name, array):
    _check(jnp.issubdtype(array.dtype, jnp.floating), f"{name} are {array.dtype}, not float")


def _check(holds, message):
    if not holds:
        raise ValueError(message)
