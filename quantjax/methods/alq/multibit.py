"""Multi-bit weights: every group of a leaf a sum of binary bases, alpha_1 b_1 + ... + alpha_I b_I.

`sketch` finds bases and coordinates of float weights; `multi_bit` is the quantizer whose levels
are the sums that a group can form. ALQ trains such sums on the loss.

Groups, in the paper's words and in the axes of torch's and Flax's kernels:

| structure          | one group      | torch OIHW, OI           | Flax HWIO, IO           |
|--------------------|----------------|--------------------------|-------------------------|
| channelwise        | w[c, :, :, :]  | (-3, -2, -1)             | (-4, -3, -2)            |
| kernelwise         | w[c, d, :, :]  | (-2, -1)                 | (-4, -3)                |
| pixelwise          | w[c, :, h, w]  | -3                       | -2                      |
| channelwise, dense | w[c, :]        | -1                       | -2                      |
| subchannelwise(k)  | w[c, d : d+n]  | -1, blocks=k             | -2, blocks=k            |
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from quantjax.core import checks, meshes, paths, qarray, rounding
from quantjax.core.quantizer import Quantizer, described, leafwise
from quantjax.methods.alq import bases as bases_lib
from quantjax.methods.alq.bases import Bases

TOLERANCE = 1e-6  # the residual's share of the squared norm at which a sketch stops
RIDGE = 1e-6  # lambda of eq. 23


def sketch(w, bits: int, axes, *, blocks: int = 1, tol: float = TOLERANCE) -> qarray.MultiBit:
    """Returns the greedy sum of binary bases, refitted at every step (algorithm 1).

    Args:
      w: floats.
      bits: the largest number of bases per group, 1..8.
      axes: the elements along them are a group, counted from the end; other axes are kept.
      blocks: the last of `axes` is viewed as (blocks, n / blocks), each block a group.
      tol: no basis is added to a group whose squared residual is below tol times its squared norm.

    Coordinates ascend; an all-zero group has zero bits, a constant one has one.

    Raises:
      ValueError: bits outside 1..8; axes out of range, repeated or not counted from the end;
        blocks that do not divide; groups of fewer than 2 elements; values that are no floats, not
        finite, or none.
    """
    bits, tol = _check_sketch(bits, tol)
    blocks, last = checks.whole("blocks", blocks, 1), last_axis(axes)
    view, within = _view(jnp.shape(w), axes, blocks)
    w = jnp.asarray(w)
    if not jnp.issubdtype(w.dtype, jnp.floating) or not w.size:
        raise ValueError(f"a sketch needs floats, got {w.dtype} of shape {w.shape}")
    checks.finite(w)
    x = _in_view(w, view, last)
    parts = meshes.shaped_as(x, _sketched(bits, within, tol), x)
    return qarray.MultiBit(*parts, np.dtype(w.dtype), blocks, last if blocks > 1 else -1)


@described
def multi_bit(
    bits: int,
    axes,
    *,
    blocks: int = 1,
    tol: float = TOLERANCE,
    momentum: float | None = None,
) -> Quantizer:
    """Sends every weight to the nearest sum of its group's coordinates.

    Args:
      bits, axes, blocks, tol: as in `sketch`, where the coordinates start; axes may also be
        "tensor" (the whole leaf), "channel" (a kernel's last axis, an embedding's rows are
        groups), {pattern: axes} (first match wins, other leaves are one group), or a function
        (path, leaf) -> axes; with blocks they are plain ones.
      momentum: weight of the refitted coordinates in the running ones, in (0, 1]; None: `update`
        takes those that fit the present weights best, given their bases.

    The buffers are coords and mask [*group, K]. Gradients are straight-through. This is what
    LQ-Net trains, and a target of PSG.

    Raises:
      ValueError: as `sketch`; momentum out of range.
    """
    bits, tol = _check_sketch(bits, tol)
    if momentum is not None:
        checks.number("momentum", momentum, "in (0, 1]", lambda m: (m > 0) & (m <= 1))
    axes, blocks = checks.axes(axes), checks.whole("blocks", blocks, 1)
    by_leaf = axes is None or isinstance(axes, str | Mapping | Callable)
    if by_leaf and blocks > 1:
        raise ValueError(
            f"blocks need plain axes such as -2, got {axes!r}; use partition for several axes"
        )
    axis = -1 if by_leaf else last_axis(axes)

    def place(buffers, leaf):
        """The leaf in its view, in the precision of the arithmetic."""
        coords, shape = buffers["coords"], leaf.shape
        if blocks > 1 and shape[axis] % blocks == 0:
            shape = _split(shape, axis, blocks)
        leaf = _in_view(leaf, shape, axis)
        checks.fitting(coords[..., 0], leaf)
        return leaf.astype(coords.dtype)

    def check(learned, buffers):
        del learned
        checks.width(buffers["coords"].shape[-1], bits)

    def init(path, leaf, key):
        del key
        mine = checks.group_axes(axes, path, leaf)
        mine = tuple(range(-leaf.ndim, 0)) if mine is None else mine
        view, within = _view(leaf.shape, mine, blocks)
        found = _sketch(leaf.reshape(view), bits, within, tol)
        return {}, {"coords": found.coords, "mask": found.mask}

    def apply(leaf, learned, buffers, key):
        del learned, key
        x = place(buffers, leaf)
        return _straight_through(buffers["coords"], x).reshape(leaf.shape).astype(leaf.dtype)

    def encode(leaf, learned, buffers):
        del learned
        x = place(buffers, leaf)
        parts = meshes.shaped_as(x, _nearest, x, buffers["coords"], buffers["mask"])
        return qarray.MultiBit(*parts, np.dtype(leaf.dtype), blocks, axis if blocks > 1 else -1)

    def update(leaf, learned, buffers, key):
        del learned, key
        coords, mask = buffers["coords"], buffers["mask"]
        x = place(buffers, leaf)
        found = Bases(bases_lib.nearest_codes(coords, mask, x), coords, mask)
        fitted = jnp.abs(bases_lib.refit(found, x, None, RIDGE))
        if momentum is not None:
            fitted = momentum * fitted + (1 - momentum) * coords
        return {**buffers, "coords": fitted}

    base = leafwise(init, apply, encode, update, check=check)

    def init_in_view(params, key=None):
        """Coordinates lie as the blocks do, which `leafwise` does not know."""
        state, (flat, _) = base.init(params, key), paths.flatten(params)
        for path, mine in state.buffers.items():
            x = place(mine, flat[path])
            state.buffers[path] = meshes.shaped_as(x, _second, x, mine)
        return state

    return base._replace(init=init_in_view) if blocks > 1 else base


def average_bits(tree) -> float:
    """Returns the bases per weight of a MultiBit or a tree of them, sum n_g I_g / sum n_g."""
    leaves = _leaves(tree)
    return sum(_basis_bits(leaf) for leaf in leaves) / sum(math.prod(leaf.shape) for leaf in leaves)


def storage_bits(tree) -> int:
    """Returns what section 5.4.1 counts: sum n_g I_g + 32 sum I_g + ceil(log2(I_max + 1)) G.

    These are bases, coordinates, and the table of bit-widths per group; I_max is a leaf's largest.
    """
    total = 0
    for leaf in _leaves(tree):
        counts = np.asarray(leaf.mask).sum(axis=-1)
        width = math.ceil(math.log2(counts.max(initial=0) + 1))
        total += _basis_bits(leaf) + 32 * int(counts.sum()) + width * counts.size
    return total


def from_multi_bit(mb: qarray.MultiBit) -> Bases:
    """Returns the bases of an encoded leaf, in its view."""
    like = Bases(mb.basis[..., 0], mb.coords, mb.mask)
    return meshes.typed_as(like, _from_parts, mb.basis, mb.coords, mb.mask)


def last_axis(axes) -> int:
    """Returns the last grouped axis; raises ValueError for axes that are no such choice."""
    plain = axes if isinstance(axes, int | np.integer | Sequence) else ()
    plain = () if isinstance(plain, str) else checks.axes(plain)
    if not plain:
        raise ValueError(f"axes are counted from the end, such as (-4, -3, -2); got {axes!r}")
    return plain[-1]


def _view(shape, axes, blocks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape of the view and the axes of a group in it."""
    last = last_axis(axes)
    axes = checks.axes(axes)
    if axes[0] < -len(shape):
        raise ValueError(f"axes {axes} are out of range for a leaf of shape {shape}")
    if shape[last] % blocks:
        raise ValueError(f"{blocks!r} blocks do not divide axis {last} of {shape}")
    if blocks > 1:
        shape = _split(shape, last, blocks)
        axes = tuple(axis if axis >= last else axis - 1 for axis in axes)
    size = math.prod(shape[axis] for axis in axes)
    if size < 2:
        raise ValueError(f"groups of {size} elements, expected 2 or more: axes {axes} of {shape}")
    return tuple(shape), axes


def _split(shape, axis: int, blocks: int):
    at = len(shape) + axis
    return (*shape[:at], blocks, shape[at] // blocks, *shape[at + 1 :])


def _in_view(leaf, shape, axis: int):
    """Returns the leaf in its view; on Explicit meshes a sharded axis is sharded by its blocks."""
    mesh = meshes.explicit_mesh(leaf)
    if shape == leaf.shape or mesh is None:
        return leaf.reshape(shape)
    spec, at = list(jax.typeof(leaf).sharding.spec), leaf.ndim + axis
    names = spec[at] if isinstance(spec[at], tuple) else (spec[at],)
    devices = math.prod(mesh.shape[name] for name in names if name is not None)
    spec[at : at + 1] = [spec[at] if shape[at] % devices == 0 else None, None]
    return jnp.reshape(leaf, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def _second(x, buffers):
    del x  # says where the buffers lie
    return buffers


# One program each, since encoding happens outside jit.
@jax.jit
def _nearest(x, coords, mask):
    """Returns basis, coords and mask of the nearest sums."""
    return _parts(Bases(bases_lib.nearest_codes(coords, mask, x), coords, mask))


@functools.cache
def _sketched(bits: int, within, tol: float):
    return jax.jit(lambda x: _parts(_sketch(x, bits, within, tol)))


def _parts(bases: Bases):
    basis = bases_lib.unpack(bases.codes, bases.coords.shape[-1])
    return basis, bases.coords, bases.mask


def _check_sketch(bits, tol) -> tuple[int, float]:
    bits = checks.bits(bits, most=bases_lib.MOST_BITS)
    checks.number("tol", tol, "in [0, 1)", lambda tol: (tol >= 0) & (tol < 1))
    return bits, float(tol)


@jax.jit
def _from_parts(basis, coords, mask) -> Bases:
    codes = bases_lib.pack(basis) | bases_lib.masked_bits(mask)
    return Bases(codes, jnp.where(mask, coords, 0), mask)


@functools.partial(jax.jit, static_argnames=("bits", "axes", "tol"))
def _sketch(w, bits: int, axes, tol: float) -> Bases:
    dtype = rounding.work_dtype(w.dtype)
    x = w.astype(dtype)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    # Groups of size 1 in magnitude: no square overflows or vanishes.
    usable = (largest >= jnp.finfo(dtype).tiny) & jnp.isfinite(largest)
    x = jnp.where(usable, x / jnp.where(usable, largest, 1), 0)
    norm = bases_lib.total(x * x, axes)
    size = jnp.full_like(norm, x.size // norm.size)
    residual, codes, open_ = x, jnp.zeros(x.shape, jnp.uint8), usable
    lower, inverses, scaled, kept = [], [], [], []
    for i in range(bits):
        left = bases_lib.total(residual * residual, axes)
        open_ = open_ & (left > 0) & (left >= tol * norm)
        # sign(0) = +1; a residual that is zero but for rounding must not decide by its noise.
        positive = residual >= -32 * jnp.finfo(dtype).eps
        codes = codes | jnp.where(positive, jnp.uint8(1 << i), jnp.uint8(0))
        # B^T B, one row more; entries are whole numbers.
        row = []
        for j in range(i):
            same = bases_lib.is_set(codes, i) == bases_lib.is_set(codes, j)
            row.append(bases_lib.total(jnp.where(same, 1, -1).astype(dtype), axes))
        factors, inverse = bases_lib.factor_row([*row, size], lower, inverses)
        open_ = open_ & (inverse > 0)
        lower.append([jnp.where(open_, factor, 0) for factor in factors])
        inverses.append(jnp.where(open_, inverse, 0))
        # The residual is orthogonal to the earlier bases, so b_i w is b_i residual.
        scaled.append(bases_lib.total(jnp.abs(residual), axes) * inverses[-1])
        kept.append(open_)
        coords = bases_lib.back_substitute(lower, scaled)
        residual = x
        for k, coord in enumerate(coords):
            residual = residual - bases_lib.signed(codes, k, coord)
        codes, residual, lower = jax.lax.optimization_barrier((codes, residual, lower))
    return _ascending(codes, coords, kept, largest)


def _ascending(codes, coords, kept, scale) -> Bases:
    """Signs restored, zeros dropped, slots sorted with the dropped ones last."""
    count = len(coords)
    coords = jnp.stack(coords, axis=-1)
    mask = jnp.stack(kept, axis=-1) & (coords != 0)
    found, _ = bases_lib.restore_signs(Bases(codes, coords, mask))
    rank = jnp.where(mask, found.coords, jnp.inf)
    slots = jax.lax.broadcasted_iota(jnp.uint8, mask.shape, mask.ndim - 1)
    rank, order = jax.lax.sort((rank, slots), num_keys=1)
    mask = jnp.isfinite(rank)
    codes = jnp.zeros_like(found.codes)
    for k in range(count):
        codes = codes | ((found.codes >> order[..., k]) & jnp.uint8(1)) << jnp.uint8(k)
    coords = jnp.where(mask, rank * scale[..., None], 0)
    return Bases(codes | bases_lib.masked_bits(mask), coords, mask)


@jax.custom_jvp
def _straight_through(coords, x):
    return bases_lib.nearest_value(coords, x)


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return bases_lib.nearest_value(*primals), tangents[1]


def _leaves(tree):
    leaves = jax.tree.leaves(tree, is_leaf=qarray.is_encoded)
    found = [leaf for leaf in leaves if isinstance(leaf, qarray.MultiBit)]
    if not found:
        raise ValueError("no MultiBit leaf to count")
    return found


def _basis_bits(leaf) -> int:
    kept = np.asarray(leaf.mask)
    size = leaf.basis[..., 0].size // max(1, kept[..., 0].size)
    return size * int(np.count_nonzero(kept))
