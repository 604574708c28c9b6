"""Every kind of leaf as one array of bytes, and the row of a file's header that reads it back."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core import checks, qarray
from quantjax.encoded import entropy, packing

PACKED = "packed"
FLOATS = ("bfloat16", "float16")
CODINGS = ("smallest", PACKED, *entropy.CODERS)
DTYPES = {"BOOL": "bool", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
DTYPES |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}


class Stored(NamedTuple):
    """A leaf as a file holds it."""

    row: dict  # what the header says: kind, shape, widths, coder; empty for a plain array
    data: np.ndarray  # uint8 [bytes]; a plain array keeps its shape and dtype

    @property
    def coder(self) -> str:
        """How the symbols are written; empty for a plain array."""
        return self.row.get("coder", PACKED) if "kind" in self.row else ""


def store(leaf, coding: str = "smallest", floats: str | None = None) -> Stored:
    """Returns the leaf as a file holds it.

    Args:
      leaf: Grid, Table, MultiBit, or a plain array.
      coding: "packed", "ans" or "huffman" for the symbols of the leaf; "smallest": packed or by
        ANS, and a plain array with many zeros as their pattern and the other values.
      floats: "bfloat16" or "float16" in the place of float32, for plain arrays.

    Raises:
      ValueError: unknown coding or floats, an encoded leaf that is not valid, an array that is
        not finite (in the narrower floats) or of a dtype that files do not have.
    """
    checks.choice("coding", coding, CODINGS)
    if floats is not None:
        checks.choice("floats", floats, FLOATS)
    if isinstance(leaf, qarray.Grid | qarray.Table):
        leaf.validate()
        return _store_codes(leaf, coding)
    if isinstance(leaf, qarray.MultiBit):
        leaf.validate()
        return _store_bases(leaf, coding)
    array = plain(leaf)
    narrow = _narrowed(array, floats)
    row = {} if narrow is array else {"kind": "cast", "dtype": array.dtype.name}
    candidates = [Stored(row, narrow), *_store_sparse(narrow, array.dtype, coding)]
    return min(candidates, key=lambda stored: stored.data.nbytes)


def restore(stored: Stored):
    """Returns the leaf that `store` was given; pruned slots of a MultiBit come last in their group.

    Raises:
      ValueError: the row and the bytes do not belong together.
    """
    row, data = stored
    if not row:
        return _array(data)
    kind = row.get("kind")
    _require(kind in READERS, f"its kind is {kind!r}, not one of {', '.join(READERS)}")
    bytes_are = kind == "cast" or (data.dtype == np.uint8 and data.ndim == 1)
    _require(bytes_are, f"a {kind} is no {data.dtype}{data.shape}")
    leaf = READERS[kind](row, data)
    return leaf.validate() if qarray.is_encoded(leaf) else leaf


def declared_bytes(stored: Stored) -> int:
    """Returns the bytes of the decoded leaf in float32, as the row declares it."""
    shape = next((key for key in ("shape", "view") if key in stored.row), None)
    return 4 * math.prod(_shape(stored.row, shape) if shape else stored.data.shape)


def _store_codes(leaf, coding):
    levels = qarray.alphabet(leaf)
    grid = isinstance(leaf, qarray.Grid)
    scales = np.asarray(leaf.step if grid else leaf.levels)
    symbols = np.asarray(qarray.symbols(leaf)).ravel()
    group = scales.shape if grid else scales.shape[:-1]
    row = {"kind": "grid" if grid else "table", "shape": list(leaf.shape), "bits": leaf.bits}
    if grid and levels < 2**leaf.bits:
        row["levels"] = levels
    if any(n != 1 for n in group):
        row["group"] = list(group)
    stream, coder = _write(symbols, levels, coding)
    return Stored(row | coder | _dtypes(leaf.dtype, scales.dtype), _joined(stream, scales))


def _read_grid(row, data):
    shape, bits = _shape(row, "shape"), _integer(row, "bits", 1, packing.WIDEST)
    levels = _integer(row, "levels", 2, 2**bits, default=2**bits)
    stream, step = _tail(data, _shape(row, "group", (1,) * len(shape)), _scales(row))
    symbols = _symbols(row, stream, levels, math.prod(shape))
    codes = qarray.grid_codes(symbols, levels, bits).reshape(shape)
    return qarray.Grid(_array(codes), _array(step), bits=bits, dtype=_dtype(row), levels=levels)


def _read_table(row, data):
    shape, bits = _shape(row, "shape"), _integer(row, "bits", 1, packing.WIDEST)
    group = _shape(row, "group", (1,) * len(shape))
    stream, levels = _tail(data, (*group, 2**bits), _scales(row))
    codes = _symbols(row, stream, 2**bits, math.prod(shape)).reshape(shape)
    return qarray.Table(_array(codes), _array(levels), bits=bits, dtype=_dtype(row))


def _store_bases(leaf, coding):
    basis, coords, kept = qarray.kept_first(leaf)
    bits = (basis[np.broadcast_to(kept, basis.shape)] > 0).astype(np.uint8)
    counts = kept.sum(axis=-1).ravel()
    most = int(counts.max(initial=0))
    row = {"kind": "multibit", "view": list(basis.shape[:-1]), "group": list(kept.shape[:-1])}
    row |= {"slots": leaf.mask.shape[-1], "most": most, "kept": int(counts.sum())}
    if leaf.blocks > 1:
        row |= {"blocks": leaf.blocks, "axis": leaf.axis}
    row |= _dtypes(leaf.dtype, coords.dtype)
    packed = packing.pack(np.concatenate([_places(counts, most), bits]), 2)
    coded, coder = _write(counts, most + 1, coding)
    apart = np.concatenate([coded, packing.pack(bits, 2)])
    if not coder or (coding == "smallest" and packed.size <= apart.size):
        return Stored(row, _joined(packed, coords[kept]))
    return Stored(row | coder, _joined(apart, coords[kept]))


def _read_bases(row, data):
    view, group = _shape(row, "view"), _shape(row, "group")
    _require(qarray.kept_dims(group, view), f"its groups are {group} beside {view}")
    slots, most = _integer(row, "slots", 1, 2**16), _integer(row, "most", 0, 2**16 - 1)
    groups = math.prod(group)
    kept = _integer(row, "kept", 0, groups * min(most, slots))
    stream, values = _tail(data, (kept,), _scales(row))
    count, width = math.prod(view) // max(1, groups) * kept, most.bit_length()
    if _coder(row) == PACKED:
        flat = _symbols(row, stream, 2, width * groups + count)
        counts = flat[: width * groups].reshape(groups, width) @ (1 << np.arange(width))
        bits = flat[width * groups :]
    else:
        stream, bases = _tail(stream, (packing.stream_bytes(count, 2),), np.dtype(np.uint8))
        counts = _symbols(row, stream, most + 1, groups)
        bits = packing.unpack(bases, 2, count)
    fits = counts.sum(dtype=np.int64) == kept and counts.max(initial=0) <= slots
    _require(fits, f"its slots do not add up to {kept}")
    mask = np.arange(slots) < counts.reshape(*group, 1)
    coords = np.zeros(mask.shape, values.dtype)
    coords[mask] = values
    basis = np.ones((*view, slots), np.int8)
    basis[np.broadcast_to(mask, basis.shape)] = 2 * bits.astype(np.int8) - 1
    blocks, axis = _integer(row, "blocks", 1, 2**31, 1), _integer(row, "axis", -len(view), -1, -1)
    parts = map(_array, (basis, coords, mask))
    return qarray.MultiBit(*parts, dtype=_dtype(row), blocks=blocks, axis=axis)


def _places(counts, most):
    """Returns the binary places of counts up to `most`, the lowest first."""
    return ((counts[:, None] >> np.arange(most.bit_length())) & 1).astype(np.uint8).ravel()


def plain(leaf) -> np.ndarray:
    """Returns an array as NumPy's; raises ValueError for what no file holds, NaN and infinity."""
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
        raise ValueError(
            f"a {type(leaf).__name__} cannot be stored: it is no array and no encoded leaf, as "
            "`encode` gives them"
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ValueError("a random key cannot be stored: take jax.random.key_data of it")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ValueError("it lies on devices of other processes: gather it first")
    array = np.asarray(leaf)
    if array.dtype.name not in DTYPES.values():
        raise ValueError(f"files hold no {array.dtype}, only {', '.join(DTYPES.values())}")
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.all(np.isfinite(array)):
        raise ValueError("not all of its values are finite")
    return array


def _narrowed(array, floats):
    if floats is None or array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(floats)
    _require(np.all(np.isfinite(narrow)), f"a value does not fit into {floats}")
    return narrow


def _store_sparse(array, dtype, coding):
    """Returns the pattern of what is not zero and the other values, where it could be smaller."""
    if coding != "smallest" or not jnp.issubdtype(array.dtype, jnp.floating):
        return []
    kept = (array.ravel() != 0) | np.signbit(array.ravel())
    if kept.all():
        return []
    row = {"kind": "sparse", "shape": list(array.shape), "kept": int(kept.sum())}
    stream, coder = _write(kept.astype(np.uint8), 2, coding)
    row |= coder | _dtypes(dtype, array.dtype)
    return [Stored(row, _joined(stream, array.ravel()[kept]))]


def _read_sparse(row, data):
    shape = _shape(row, "shape")
    count = math.prod(shape)
    stream, values = _tail(data, (_integer(row, "kept", 0, count),), _scales(row))
    pattern = _symbols(row, stream, 2, count) > 0
    _require(np.count_nonzero(pattern) == values.size, "its pattern has another number of values")
    array = np.zeros(count, _dtype(row))
    array[pattern] = values
    return _array(array.reshape(shape))


def _read_cast(row, data):
    return _array(data.astype(_dtype(row)))


READERS = {
    "grid": _read_grid,
    "table": _read_table,
    "multibit": _read_bases,
    "sparse": _read_sparse,
    "cast": _read_cast,
}


def _write(symbols, levels, coding):
    """Returns the stream of symbols and what the row says of its coder."""
    packed = packing.pack(symbols, levels)
    # A table that alone takes as much as the codes is not tried.
    if coding == PACKED or (coding == "smallest" and packed.size <= 2 * levels):
        return packed, {}
    coder = "ans" if coding == "smallest" else coding
    coded = np.frombuffer(entropy.encode(symbols, levels, coder), np.uint8)
    if coding == "smallest" and packed.size <= coded.size:
        return packed, {}
    return coded, {"coder": coder}


def _symbols(row, stream, levels, count):
    if _coder(row) != PACKED:
        return entropy.decode(stream.tobytes(), levels, count, _coder(row))
    expected = packing.stream_bytes(count, levels)
    _require(stream.size == expected, f"its codes take {stream.size} bytes, not {expected}")
    return packing.unpack(stream, levels, count)


def _tail(data, shape, dtype):
    """Returns what comes before, and the array that the data end with."""
    start = data.size - math.prod(shape) * dtype.itemsize
    _require(start >= 0, f"its {data.size} bytes are too few")
    return data[:start], np.frombuffer(data[start:].tobytes(), dtype).reshape(shape)


def _joined(stream, array):
    return np.concatenate([stream, np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)])


def _dtypes(dtype, scales):
    """Returns the dtypes of a leaf as its row has them: float32 goes without saying."""
    named = {"dtype": np.dtype(dtype).name, "scales": scales.name}
    return {key: name for key, name in named.items() if name != "float32"}


def _dtype(row, key="dtype"):
    name = row.get(key, "float32")
    _require(
        name in DTYPES.values() and jnp.issubdtype(name, jnp.floating), f"its {key} is {name!r}"
    )
    return jnp.dtype(name)


def _scales(row):
    return _dtype(row, "scales")


def _coder(row):
    coder = row.get("coder", PACKED)
    _require(coder in (PACKED, *entropy.CODERS), f"its coder is {coder!r}")
    return coder


def _shape(row, key, default=None):
    shape = row.get(key, default)
    whole = isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape)
    _require(whole, f"its {key} is {shape!r}")
    return tuple(shape)


def _integer(row, key, least, most, default=None):
    number = row.get(key, default)
    whole = type(number) is int and least <= number <= most
    _require(whole, f"its {key} is {number!r}, not in {least}..{most}")
    return number


def _array(array):
    """Returns a JAX array, or NumPy's where JAX has no such dtype (float64 without x64)."""
    known = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if known else array


def _require(holds, message):
    if not holds:
        raise ValueError(message)
