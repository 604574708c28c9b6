"""Encoded leaves that stay packed in memory, and products with them.

Codes are packed along the kernel's second to last axis, the one that a product contracts: 8, 5, 4
or 2 codes a byte for 2, 3, 4 or up to 16 levels. Five to eight levels are a plane of 2 bits and one
of 1 bit, more levels take a byte or two a code. All axes are counted from the end.

A product of few rows never decodes. The codes of a byte belong to inputs next to one another, so
256 partial sums of them are all that a byte can mean: a table per group of inputs, in which every
output looks its byte up, group by group.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from quantjax.core import meshes, qarray
from quantjax.core.paths import flatten

FEW = 4  # rows: up to here a table is faster than decoding (experiments/benchmarks/packed_products)
BLOCKS = 16  # of inputs with coordinates of their own: beyond, products decode


@dataclasses.dataclass(frozen=True)
class Plane:
    """How the digits of one plane lie in its words."""

    base: int
    per: int  # digits a word
    weight: int = 1  # of a digit in its symbol

    @property
    def dtype(self):
        """The words' dtype: two bytes for symbols beyond 256."""
        return np.dtype(np.uint8 if self.base**self.per <= 256 else np.uint16)


def planes(levels: int) -> tuple[Plane, ...]:
    """Returns the planes of an alphabet of that many symbols, at most 2**16."""
    if levels in (2, 3):
        return (Plane(levels, 8 if levels == 2 else 5),)
    if levels <= 4:
        return (Plane(4, 4),)
    if levels <= 8:
        return (Plane(4, 4), Plane(2, 8, weight=4))
    return (Plane(16, 2),) if levels <= 16 else (Plane(256 if levels <= 256 else 2**16, 1),)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A Grid, Table or MultiBit whose codes lie packed in words; make it by `pack`.

    A leaf of one dimension is packed along it, as a kernel of one output.
    """

    words: tuple[jax.Array, ...]  # a plane each, uint8 or uint16 [..., ceil(rows / per), outputs]
    scales: jax.Array  # step, levels, or coordinates [*group, K], 0 where pruned
    kind: type = dataclasses.field(metadata={"static": True})
    levels: int = dataclasses.field(metadata={"static": True})  # of a symbol
    rows: int = dataclasses.field(metadata={"static": True})  # of the packed axis, of a block
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    vector: bool = dataclasses.field(default=False, metadata={"static": True})
    blocks: int = dataclasses.field(default=1, metadata={"static": True})
    axis: int = dataclasses.field(default=-1, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the decoded leaf."""
        *lead, _, outputs = self.words[0].shape
        if self.kind is qarray.MultiBit:
            lead = lead[:-1]  # bases lie before the packed axis
        view = (*lead, self.rows, outputs)[: -1 if self.vector else None]
        if self.blocks > 1:
            at = len(view) + self.axis - 1
            view = (*view[:at], view[at] * view[at + 1], *view[at + 2 :])
        return tuple(view)

    @property
    def ndim(self) -> int:
        """Dimensions of the decoded leaf."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padded rows and scales included."""
        return sum(array.nbytes for array in (*self.words, self.scales))

    def symbols(self):
        """Returns the symbols in 0..levels-1, uint8 or uint16 `[..., rows, outputs]`."""
        total = 0
        for plane, words in zip(planes(self.levels), self.words, strict=True):
            digits = _digits(words, plane, self.rows)
            total = total + digits * digits.dtype.type(plane.weight)
        return total[..., 0] if self.vector else total

    def take(self, index):
        """Returns the rows of a leaf of two dimensions at integers `index`, decoded, as decode has.

        Out of range are NaN, as `jnp.take` has them; negative ones count from the end. A MultiBit
        decodes as a whole.
        """
        if self.kind is qarray.MultiBit or self.vector or len(self.shape) != 2:
            return jnp.take(self.decode(), index, axis=0)
        index = jnp.asarray(index).astype(jnp.int32)
        index = jnp.where(index < 0, index + self.rows, index)
        inside = ((index >= 0) & (index < self.rows))[..., None]
        index = jnp.clip(index, 0, self.rows - 1)
        total = 0
        for plane, words in zip(planes(self.levels), self.words, strict=True):
            place = (index % plane.per)[..., None]
            powers = jnp.asarray(plane.base ** np.arange(plane.per), jnp.int32)
            found = jnp.take(words, index // plane.per, axis=0).astype(jnp.int32)
            total = total + found // powers[place] % plane.base * plane.weight
        scales = self.scales
        grouped = scales.shape[0] > 1
        scales = jnp.take(scales, index, axis=0) if grouped else scales[0]
        if self.kind is qarray.Grid:
            codes = (total - self.levels // 2).astype(scales.dtype)
            values = codes * jnp.broadcast_to(scales, codes.shape)
        else:
            scales = jnp.broadcast_to(scales, (*total.shape, self.levels))
            values = jnp.take_along_axis(scales, total[..., None], axis=-1)[..., 0]
        return jnp.where(inside, values, jnp.nan).astype(self.dtype)

    def decode(self):
        """Returns what the encoded leaf decodes to, bit for bit."""
        symbols = self.symbols()
        if self.kind is qarray.Grid:
            codes = symbols.astype(jnp.int32) - self.levels // 2
            return (codes.astype(self.scales.dtype) * self.scales).astype(self.dtype)
        if self.kind is qarray.Table:
            index = symbols.astype(jnp.int32)[..., None]
            return jnp.take_along_axis(self.scales, index, axis=-1)[..., 0].astype(self.dtype)
        total, at = 0, -2 if self.vector else -3
        for k in range(self.scales.shape[-1]):  # in the order of MultiBit.decode
            signs = 2 * jnp.take(symbols, k, axis=at).astype(self.scales.dtype) - 1
            total = total + self.scales[..., k] * signs
        return total.reshape(self.shape).astype(self.dtype)


def _digits(words, plane, rows):
    """Returns the digits of words [..., rows, outputs], unsigned."""
    if plane.per == 1:
        return words
    # Products and shifts in the place of divisions, which processors do one by one: exact for
    # bytes, and above(per) is 0.
    powers = plane.base ** np.arange(plane.per + 1)
    factors = -(-(2**16) // powers).astype(np.int32).reshape((1,) * (words.ndim - 1) + (-1, 1))
    above = (words[..., None, :].astype(jnp.int32) * factors) >> 16
    digits = above[..., :-1, :] - plane.base * above[..., 1:, :]
    digits = digits.reshape(*words.shape[:-2], -1, words.shape[-1])
    return digits[..., :rows, :].astype(plane.dtype)


def is_packed(leaf) -> bool:
    """True for Packed."""
    return isinstance(leaf, Packed)


def pack(encoded):
    """Returns the tree with its encoded leaves packed; other leaves are the same objects.

    Packed leaves jit, donate, scan and vmap over leading axes, and shard along all but the packed
    axis. A MultiBit packs the slots that its fullest group keeps, so under jit, where masks are
    not known, it packs all.

    Raises:
      ValueError: an encoded leaf, named, without elements or dimensions.
    """
    flat, rebuild = flatten(
        encoded, is_leaf=lambda leaf: qarray.is_encoded(leaf) or is_packed(leaf)
    )
    done = {}
    for path, leaf in flat.items():
        if qarray.is_encoded(leaf) and (not leaf.shape or 0 in leaf.shape):
            raise ValueError(f"{path}: shape {leaf.shape} has nothing to pack")
        done[path] = _pack(leaf) if qarray.is_encoded(leaf) else leaf
    return rebuild(done)


def unpacked(tree):
    """Returns the tree with Packed and encoded leaves decoded; others are the same objects."""
    return qarray.decode(
        jax.tree.map(
            lambda leaf: leaf.decode() if is_packed(leaf) else leaf, tree, is_leaf=is_packed
        )
    )


def _pack(leaf):
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(leaf)):
        leaf = jax.tree.map(np.asarray, leaf)  # NumPy compiles nothing for every shape
    if isinstance(leaf, qarray.MultiBit):
        return _pack_bases(leaf)
    levels = qarray.alphabet(leaf)
    scales = leaf.step if isinstance(leaf, qarray.Grid) else leaf.levels
    symbols = qarray.symbols(leaf)
    vector = symbols.ndim == 1
    symbols = symbols[:, None] if vector else symbols
    return Packed(
        _words(symbols, levels),
        jnp.asarray(scales),
        kind=type(leaf),
        levels=levels,
        rows=symbols.shape[-2],
        dtype=leaf.dtype,
        vector=vector,
    )


def _pack_bases(leaf):
    xp = leaf.basis.__array_namespace__()
    basis, coords, mask = (
        qarray.kept_first(leaf) if xp is np else (leaf.basis, leaf.coords, leaf.mask)
    )
    coords = xp.where(mask, coords, 0)
    vector = basis.ndim == 2
    bits = xp.moveaxis((basis > 0).astype(np.uint8), -1, -2 if vector else -3)
    bits = bits[..., None] if vector else bits
    return Packed(
        _words(bits, 2),
        jnp.asarray(coords),
        kind=qarray.MultiBit,
        levels=2,
        rows=bits.shape[-2],
        dtype=leaf.dtype,
        vector=vector,
        blocks=leaf.blocks,
        axis=leaf.axis,
    )


def _words(symbols, levels):
    xp = symbols.__array_namespace__()
    words, rest = [], symbols
    for plane in reversed(planes(levels)):
        digits = (rest // plane.weight).astype(plane.dtype)
        rest = rest - digits * rest.dtype.type(plane.weight)
        missing = -digits.shape[-2] % plane.per
        digits = xp.pad(digits, [(0, 0)] * (digits.ndim - 2) + [(0, missing), (0, 0)])
        digits = digits.reshape(*digits.shape[:-2], -1, plane.per, digits.shape[-1])
        total = sum(digits[..., i, :] * plane.dtype.type(plane.base**i) for i in range(plane.per))
        words.append(jnp.asarray(total))
    return tuple(reversed(words))


def product(x, packed: Packed):
    """Returns `x @ kernel` of a kernel [inputs, outputs] that stays packed.

    Up to four rows of x look partial sums up in tables, more decode the kernel. Differentiable in
    x. Sums are in float32 at least.

    Args:
      x: [..., inputs], float.
      packed: of two dimensions.

    Raises:
      ValueError: another shape.
    """
    if not is_packed(packed):
        raise ValueError(f"expected a leaf of what `pack` returned, got {type(packed).__name__}")
    if packed.ndim != 2 or x.shape[-1:] != packed.shape[:1]:
        raise ValueError(f"x {x.shape} and a packed leaf {packed.shape} have no product")
    mesh = meshes.explicit_mesh((x, packed))
    if mesh is None:
        return _product(x, packed)
    lead, outputs = jax.typeof(x).sharding.spec[:-1], jax.typeof(packed.words[0]).sharding.spec[-1]
    return meshes.placed(PartitionSpec(*lead, outputs), mesh, _product, x, packed)


def _product(x, packed):
    dtype = jnp.promote_types(x.dtype, packed.dtype)
    if few(x) and has_tables(packed):
        work = jnp.promote_types(dtype, jnp.float32)
        flat = x.reshape(-1, x.shape[-1]).astype(work)
        out = _by_tables(flat, packed)
        return out.reshape(*x.shape[:-1], packed.shape[-1]).astype(dtype)
    return jnp.matmul(x.astype(dtype), packed.decode().astype(dtype))


def few(x) -> bool:
    """True where x has at most four rows; those of a symbolic batch (`jax.export`) are many."""
    rows = math.prod(x.shape[:-1])
    return isinstance(rows, int) and rows <= FEW


def has_tables(packed: Packed) -> bool:
    """True for kernels whose partial sums fit into tables: others are decoded for products.

    These have at most 16 levels, and scales per output, per input or alone; a Table one codebook
    and no planes; a MultiBit groups along the inputs, at most 16 blocks of them.
    """
    scales = packed.scales
    if packed.ndim != 2 or packed.levels > 16:
        return False
    if packed.kind is qarray.Grid:
        return 1 in scales.shape
    if packed.kind is qarray.Table:
        return scales.size == packed.levels and len(packed.words) == 1
    inner = scales.shape[-3] == 1
    return inner and (packed.blocks == 1 or (packed.axis == -2 and packed.blocks <= BLOCKS))


def _by_tables(x, packed):
    """Returns [rows, outputs] of x [rows, inputs]."""
    scales = packed.scales.astype(x.dtype)
    if packed.kind is qarray.MultiBit:
        return _bases_by_tables(x, packed, scales)
    if packed.kind is qarray.Table:
        return _looked_up(x, packed.words[0], planes(packed.levels)[0], scales.ravel())
    per_input = scales.shape[0] > 1
    if per_input:
        x = x * scales.T
    total = 0
    for i, (plane, words) in enumerate(zip(planes(packed.levels), packed.words, strict=True)):
        values = plane.weight * np.arange(plane.base) - (packed.levels // 2 if i == 0 else 0)
        total = total + _looked_up(x, words, plane, jnp.asarray(values, x.dtype))
    return total if per_input else total * scales


def _bases_by_tables(x, packed, scales):
    signs = jnp.asarray([-1, 1], x.dtype)
    words = packed.words[0].reshape(packed.blocks, -1, *packed.words[0].shape[-2:])
    scales = scales.reshape(packed.blocks, -1, scales.shape[-1])  # [blocks, outputs or 1, K]
    total = 0
    for block, part in enumerate(jnp.split(x, packed.blocks, axis=-1)):
        for k in range(scales.shape[-1]):
            sums = _looked_up(part, words[block, k], planes(2)[0], signs)
            total = total + scales[block, None, :, k] * sums
    return total


def _looked_up(x, words, plane, values):
    """Returns x @ values[digits of words], [rows, outputs]: a table for every word's inputs."""
    missing = -x.shape[-1] % plane.per
    groups = jnp.pad(x, ((0, 0), (0, missing))).reshape(x.shape[0], -1, plane.per)
    # An entry for every byte, ternary ones that do not occur too: there is nothing to clip then.
    digits = np.arange(256)[:, None] // plane.base ** np.arange(plane.per)
    table = values[digits % plane.base]  # [256, per]
    # One fused loop: a dot of so few terms takes three times as long.
    sums = sum(groups[:, :, i].T[..., None] * table[None, None, :, i] for i in range(plane.per))

    def add(total, group):
        sums, word = group
        return total + jnp.take(sums, word, axis=-1, mode="clip"), None

    # Zeros that vary as the sums do inside of shard_map.
    first = jnp.where(False, jnp.take(sums[0], words[0], axis=-1, mode="clip"), 0)
    return lax.scan(add, first, (sums, words))[0]
