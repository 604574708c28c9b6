"""Networks as StableHLO: a function of the inputs alone, weights inside, that JAX alone runs.

Weights lie in the artifact once, as packed as in a file (not entropy coded), and are decoded in the
graph. In a process that knows nothing of quantjax, with `pip install jax flatbuffers`:

    jax.export.deserialize(open("model.stablehlo", "rb").read()).call(images)

JAX runs an artifact with releases up to six months newer, or three weeks older, than the one that
wrote it; a file of `save` is what lasts. `call` has no gradient and no vmap.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax import lax
from jax.extend.core import jaxpr_as_fun

from quantjax.core import checks, qarray
from quantjax.encoded import leaves as leaves_lib
from quantjax.encoded import packed as packed_lib
from quantjax.encoded import packing

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN = (*PLATFORMS, "rocm")
SLACK = 1.01  # times the file's bytes may a leaf take that decodes several times faster
LARGEST = 2**31 - 2**20  # bytes of weights: flatbuffers end at 2 GiB


def export(
    apply: Callable,
    variables,
    example,
    *,
    batch: int | None = None,
    platforms: tuple[str, ...] = PLATFORMS,
) -> bytes:
    """Returns `apply` with its variables as a serialized `jax.export.Exported`.

    Args:
      apply: `apply(variables, x)`, of any framework, with arrays in the place of encoded leaves.
        What `pack` gives comes to it as it is: `linen.packed(apply)` and up to four rows, `batch`,
        leave products to tables.
      variables: any tree: `{"params": encoded, "batch_stats": ..., "quant": ...}`.
      example: x, or its ShapeDtypeStructs, any tree of arrays whose first axis is the batch.
      batch: rows that the artifact takes; None: any number, a symbol while it is traced.
      platforms: that the one artifact runs on, of cpu, cuda, tpu and rocm.

    Raises:
      ValueError: an unknown platform, an input without rows, a leaf (named) that cannot be
        shipped, 2 GiB of weights, or a network that asks how many rows there are without `batch`.
      ImportError: flatbuffers is missing.
    """
    try:
        import flatbuffers  # noqa: F401  JAX asks for it only when all work is done
    except ImportError as error:
        raise ImportError('an artifact takes: pip install "quantjax[export]"') from error
    if not platforms:
        raise ValueError(f"no platform is given; known are {', '.join(KNOWN)}")
    for platform in platforms:
        checks.choice("platform", platform, KNOWN)
    if hasattr(apply, "apply"):
        raise ValueError("apply is the model itself: pass model.apply")
    held = by_name(variables, lambda _, leaf: _held(leaf))
    trace = traced(apply, variables, example, batch)
    used = {name: held[name] for name in trace.used}
    if sum(array.nbytes for leaf in used.values() for array in leaf.arrays) > LARGEST:
        raise ValueError("an artifact ends at 2 GiB, and the packed weights alone are larger")

    def network(x):
        # Without the barrier XLA folds the decoding, and compiles floats into its program.
        arrays = lax.optimization_barrier({name: leaf.arrays for name, leaf in used.items()})
        leaves = [
            used[name].decode(arrays[name]) if name in used else jnp.zeros(spec.shape, spec.dtype)
            for name, spec in trace.leaves.items()
        ]
        return trace.out_tree.unflatten(trace.call(*leaves, *jax.tree.leaves(x)))

    with _without_source_paths():
        exported = jax_export.export(jax.jit(network), platforms=platforms)(trace.inputs)
    return bytes(exported.serialize())


def by_name(variables, function) -> dict:
    """Returns `function(path, leaf)` of every leaf, by path, which its ValueErrors then name."""
    pairs = jax.tree_util.tree_flatten_with_path(variables, is_leaf=qarray.is_encoded)[0]
    found = {}
    for key_path, leaf in pairs:
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        try:
            found[name] = function(name, leaf)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


class Trace(NamedTuple):
    """A network as a function of flat arrays: leaves, decoded, then inputs."""

    call: Callable  # returns a flat list, too
    leaves: dict[str, jax.ShapeDtypeStruct]
    used: list[str]  # names of leaves that it reads
    inputs: Any  # tree of ShapeDtypeStruct
    out_tree: jax.tree_util.PyTreeDef


def traced(apply: Callable, variables, example, batch: int | None) -> Trace:
    """Returns the trace of `apply` for `batch` rows, or for a symbol of them where it is None.

    Args:
      apply, variables, example, batch: as in `export`.

    Raises:
      ValueError: as `export`.
    """
    if batch is not None:
        batch = checks.whole("batch", batch, 1)
    inputs = _specs(example, batch)
    leaves = by_name(variables, lambda _, leaf: _spec(leaf))
    treedef = jax.tree.structure(variables, is_leaf=qarray.is_encoded)
    flat_inputs, input_tree = jax.tree.flatten(inputs)

    def flat(*arrays):
        tree = treedef.unflatten(arrays[: len(leaves)])
        return apply(tree, input_tree.unflatten(arrays[len(leaves) :]))

    specs = (*leaves.values(), *flat_inputs)
    try:
        closed, out = jax.make_jaxpr(flat, return_shape=True)(*specs)
    except jax.errors.InconclusiveDimensionOperation as error:
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"the network asks how many rows its batch has: give their number, batch=N ({first})"
        ) from error
    read = {id(var) for var in closed.jaxpr.outvars}
    for eqn in reversed(closed.jaxpr.eqns):
        if eqn.effects or read & {id(var) for var in eqn.outvars}:
            read |= {id(var) for var in eqn.invars}
    used = [name for name, var in zip(leaves, closed.jaxpr.invars, strict=False) if id(var) in read]
    return Trace(jaxpr_as_fun(closed), leaves, used, inputs, jax.tree.structure(out))


def _spec(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))


def _specs(example, batch):
    rows = batch if batch is not None else jax_export.symbolic_shape("batch")[0]

    def spec(key_path, leaf):
        leaf = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)
        if not leaf.shape:
            name = jax.tree_util.keystr(key_path) or "the input"
            raise ValueError(f"{name} is a scalar: inputs have the batch as their first axis")
        return _spec(jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype))

    return jax.tree_util.tree_map_with_path(spec, example)


class _Held(NamedTuple):
    arrays: tuple  # what lies in the artifact
    decode: Callable  # of those arrays, in the graph


def _held(leaf) -> _Held:
    if not qarray.is_encoded(leaf):
        return _Held((leaves_lib.plain(leaf),), lambda held: held[0])
    leaf.validate()
    if leaf.shape and 0 not in leaf.shape:
        words = packed_lib.pack(leaf)
        if words.nbytes <= SLACK * leaf.nbits / 8:
            arrays, treedef = jax.tree.flatten(words)
            arrays = tuple(map(np.asarray, arrays))
            return _Held(arrays, lambda held: treedef.unflatten(held).decode())
    return (_held_bases if isinstance(leaf, qarray.MultiBit) else _held_codes)(leaf)


def _held_codes(leaf) -> _Held:
    levels, shape = qarray.alphabet(leaf), leaf.shape
    grid = isinstance(leaf, qarray.Grid)
    bits, dtype = leaf.bits, leaf.dtype
    stream = packing.pack(np.asarray(qarray.symbols(leaf)).ravel(), levels)

    def decode(held):
        stream, scales = held
        symbols = packing.unpack(stream, levels, math.prod(shape)).reshape(shape)
        if grid:
            codes = qarray.grid_codes(symbols, levels, bits)
            return qarray.Grid(codes, scales, bits, dtype, levels).decode()
        return qarray.Table(symbols, scales, bits, dtype).decode()

    return _Held((stream, np.asarray(leaf.step if grid else leaf.levels)), decode)


def _held_bases(leaf) -> _Held:
    """Slot by slot the bases of the groups that keep it: pruned ones take no room."""
    basis, coords, mask = qarray.kept_first(leaf)
    view, group = basis.shape[:-1], mask.shape[:-1]
    # Groups first, then the weights of a group.
    order = sorted(range(len(view)), key=lambda axis: group[axis] == 1)
    groups = math.prod(group)
    size = math.prod(view) // max(1, groups)
    basis = basis.transpose(*order, len(view)).reshape(groups, size, -1)
    mask, coords = mask.reshape(groups, -1), coords.reshape(groups, -1)
    counts, slots = mask.sum(axis=-1), mask.shape[-1]
    kept = [int(n) for n in mask.sum(axis=0)]
    bits = [(basis[mask[:, k], :, k] > 0).ravel() for k in range(slots)]
    values = np.concatenate([coords[mask[:, k], k] for k in range(slots)])
    streams = packing.pack(counts, slots + 1), packing.pack(np.concatenate(bits), 2)
    shape, dtype = leaf.shape, leaf.dtype

    def decode(held):
        counts, bits, values = held
        counts = packing.unpack(counts, slots + 1, groups)
        bits = packing.unpack(bits, 2, sum(kept) * size).reshape(-1, size)
        signs = 2 * bits.astype(values.dtype) - 1
        total, start = jnp.zeros((groups, size), values.dtype), 0
        for k, n in enumerate(kept):
            part = values[start : start + n, None] * signs[start : start + n]
            if 0 < n < groups:
                has = counts > k
                part = jnp.where(has[:, None], part[jnp.cumsum(has) - 1], 0)
            total = total + part if n else total
            start += n
        total = total.reshape([view[axis] for axis in order]).transpose(np.argsort(order))
        return total.reshape(shape).astype(dtype)

    return _Held((*streams, values), decode)


@contextlib.contextmanager
def _without_source_paths():
    """Keeps the paths of source files, which JAX writes beside every operation, out of it."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
