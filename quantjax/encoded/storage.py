"""Networks as files: one safetensors file, read without pickle and checked byte by byte.

Every leaf is a tensor named by its path. Plain arrays keep their dtype and shape; encoded leaves
are streams of bytes, and the file's metadata say how to read them: `quantjax` is the version of the
format, `leaves` the JSON of `leaves.Stored.row` by path. The tensor `quantjax.sha256` has a digest
per row: of the file's header, then of every other tensor in the order of the names.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core import checks, qarray
from quantjax.encoded import leaves as leaves_lib
from quantjax.encoded.leaves import DTYPES, Stored
from quantjax.encoded.packed import is_packed

VERSION = 1
DIGESTS = "quantjax.sha256"
SHOWN = 8  # paths in a message


class File(NamedTuple):
    """What a file holds, its digests compared."""

    version: int
    metadata: dict
    leaves: dict[str, Stored]  # by path
    empty: tuple[str, ...]  # paths of dicts that hold nothing
    nbytes: int  # of the whole file
    path: Path

    def decoded(self) -> dict:
        """Returns {path: leaf}; raises ValueError, with the leaf's name, where one is damaged."""
        declared, leaves = 0, {}
        for read in (False, True):  # what is declared is added up before memory is taken for any
            for name, stored in self.leaves.items():
                try:
                    declared += 0 if read else leaves_lib.declared_bytes(stored)
                    if declared > memory():
                        raise ValueError(
                            f"with it {declared} bytes are declared, beyond all memory"
                        )
                    if read:
                        leaves[name] = leaves_lib.restore(stored)
                except (ValueError, OverflowError, MemoryError) as error:
                    raise ValueError(f"{self.path}: {name} is damaged: {error}") from None
        return leaves

    def tree(self, leaves: dict, like=None):
        """Returns decoded leaves as nested dicts, or in the structure of `like`, as `load` has it.

        Raises:
          ValueError: other paths or shapes than `like`.
        """
        if like is not None:
            return _like(like, leaves, self.path)
        return _nested(leaves, self.empty, self.path)


def save(path, tree, *, metadata: dict | None = None, coding="smallest", floats=None) -> None:
    """Writes a tree as one safetensors file, beside its place first, so that a crash harms nothing.

    Args:
      path: of the file; an old one is replaced when the new one is complete.
      tree: any nesting of dicts (FrozenDict, nnx.State) of encoded leaves and arrays, say
        `{"params": encoded, "batch_stats": ..., "quant_stats": ...}`.
      metadata: what JSON can say of the network; `inspect` gives it back.
      coding: "smallest": every leaf packed or entropy coded, whichever is smaller; "packed",
        "ans" or "huffman" for all encoded leaves.
      floats: "bfloat16" or "float16" for arrays that are float32 and not encoded; they are read as
        float32 again. None: all as they are.

    Raises:
      ValueError: a leaf that cannot be stored (its path is named), unknown coding or floats,
        metadata that JSON cannot say.
      OSError: the folder cannot be written; an old file is as it was.
    """
    replace(Path(path), to_bytes(tree, metadata=metadata, coding=coding, floats=floats))


def to_bytes(tree, *, metadata: dict | None = None, coding="smallest", floats=None) -> bytes:
    """Returns the file that `save` writes, whose arguments it takes.

    Raises:
      ValueError: as `save`.
    """
    checks.choice("coding", coding, leaves_lib.CODINGS)
    if floats is not None:
        checks.choice("floats", floats, leaves_lib.FLOATS)
    flat, empty = flatten(tree)
    stored = {}
    for name, leaf in flat.items():
        try:
            stored[name] = leaves_lib.store(leaf, coding, floats)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return bytes(_serialized(stored, metadata or {}, empty))


def load(path, like=None):
    """Returns the tree of a file: nested dicts, or the structure of `like`.

    Every digest is compared before anything is decoded.

    Args:
      path: of a file that `save` has written.
      like: a tree with the same paths and shapes, encoded or not (arrays, ShapeDtypeStructs):
        params of a model, a FrozenDict, an nnx.State.

    Raises:
      OSError: no file that can be read.
      ValueError: none of quantjax's files, damaged, from a newer version, or of another network
        than `like`; the file and, where known, the leaf are named.
    """
    found = inspect(path)
    return found.tree(found.decoded(), like)


def inspect(path) -> File:
    """Returns what a file holds, leaves not decoded yet, after comparing all digests.

    Raises:
      As `load`.
    """
    data = Path(path).read_bytes()
    try:
        header, tensors = _parsed(data)
        told = header.get("__metadata__", {})
        version = _version(told)
        _compare(data, tensors)
        rows, metadata, empty = (
            _told(told, key, kind)
            for key, kind in (("leaves", dict), ("metadata", dict), ("empty", list))
        )
        for name in [name for name, row in rows.items() if not isinstance(row, dict)]:
            raise ValueError(f"its header is damaged: {name} has no row")
        if lost := sorted(set(rows) - set(tensors)):
            raise ValueError(f"it has no tensors of {lost}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    stored = {name: Stored(rows.get(name, {}), tensor) for name, tensor in sorted(tensors.items())}
    return File(version, metadata, stored, tuple(empty), len(data), Path(path))


def memory() -> int:
    """Returns the bytes of the machine's memory: no honest network needs more."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _serialized(stored, metadata, empty) -> bytearray:
    from safetensors.numpy import save as serialize  # the extra `files`

    rows = {name: leaf.row for name, leaf in stored.items() if leaf.row}
    told = {"leaves": rows, "metadata": metadata, "empty": empty}
    told = {"quantjax": str(VERSION)} | {key: _json(value) for key, value in told.items() if value}
    arrays = {name: np.require(leaf.data, requirements="C") for name, leaf in stored.items()}
    arrays[DIGESTS] = np.zeros((1 + len(stored), 32), np.uint8)
    data = bytearray(serialize(arrays, metadata=told))
    header, tensors = _parsed(data)
    start = 8 + _header_bytes(data) + header[DIGESTS]["data_offsets"][0]
    digests = _digests(data, tensors)
    data[start : start + len(digests)] = digests
    return data


def _digests(data, tensors) -> bytes:
    """Returns the digests of the header and of all tensors but that of the digests."""
    parts = [memoryview(data)[: 8 + _header_bytes(data)]]
    parts += [
        tensors[name].reshape(-1).view(np.uint8) for name in sorted(tensors) if name != DIGESTS
    ]
    return b"".join(hashlib.sha256(part).digest() for part in parts)


def _compare(data, tensors):
    """Takes the digests out of the tensors; raises ValueError, with the name, where one differs."""
    names = ["its header", *(name for name in sorted(tensors) if name != DIGESTS)]
    found = _digests(data, tensors)
    given = tensors.pop(DIGESTS, np.zeros(0, np.uint8)).tobytes()
    if len(given) != len(found):
        raise ValueError(f"it is damaged: {len(given)} bytes of digests, not {len(found)}")
    for i, name in enumerate(names):
        if given[32 * i : 32 * i + 32] != found[32 * i : 32 * i + 32]:
            raise ValueError(f"{name} is damaged: its SHA-256 differs from the one in the file")


def _header_bytes(data) -> int:
    return int.from_bytes(data[:8], "little")


def _parsed(data):
    """Returns the header and {name: array} of a safetensors file."""
    from safetensors import SafetensorError, deserialize  # the extra `files`

    try:
        found = deserialize(bytes(data))
        header = json.loads(data[8 : 8 + _header_bytes(data)], object_pairs_hook=_unique)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"no safetensors file, or a damaged one: {error}") from None
    tensors = {}
    for name, tensor in found:
        if tensor["dtype"] not in DTYPES:
            raise ValueError(f"{name} is of dtype {tensor['dtype']}, which quantjax does not write")
        array = np.frombuffer(tensor["data"], jnp.dtype(DTYPES[tensor["dtype"]]))
        tensors[name] = array.reshape(tensor["shape"])
    return header, tensors


def _version(told) -> int:
    version = told.get("quantjax")
    if version is None:
        raise ValueError("a safetensors file, but none of quantjax's: its metadata name no version")
    if not version.isdecimal() or int(version) < 1:
        raise ValueError(f"its header is damaged: {version!r} is no version")
    if int(version) > VERSION:
        raise ValueError(
            f"it is of version {version} of the format, from a newer quantjax; this one reads "
            f"versions up to {VERSION}: pip install --upgrade quantjax"
        )
    return int(version)


def _told(told, key, kind):
    """Returns what the metadata say under a key; an empty one where they say nothing."""
    value = json.loads(told.get(key, "null"), object_pairs_hook=_unique)
    value = kind() if value is None else value
    if not isinstance(value, kind) or (kind is list and not all(isinstance(v, str) for v in value)):
        raise ValueError(f"its header is damaged: {key} is no {kind.__name__}")
    return value


def _unique(pairs) -> dict:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"names twice: {sorted({n for n in names if names.count(n) > 1})}")
    return dict(pairs)


def _json(value) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be what JSON can say: {error}") from None


def replace(path: Path, data):
    """Writes a file beside its place and renames it; raises OSError, an old file as it was."""
    path = path.resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", str(path))
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _is_leaf(node) -> bool:
    nothing = isinstance(node, Mapping) and not node
    return nothing or node is None or qarray.is_encoded(node) or is_packed(node)


def flatten(tree):
    """Returns {path: leaf} as files name them, and the paths of empty dicts."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]
    flat = {_name(key_path): leaf for key_path, leaf in pairs}
    if DIGESTS in flat or ("" in flat and not isinstance(flat[""], Mapping)):
        raise ValueError(f"a tree is a dict of leaves, none of them named {DIGESTS}")
    empty = [name for name, leaf in flat.items() if isinstance(leaf, Mapping)]
    return {name: leaf for name, leaf in flat.items() if name not in empty}, empty


def _name(key_path) -> str:
    """Returns the path of a leaf; `/` and `~` in a key are written as JSON pointers have them."""
    last = key_path[-1] if key_path else None
    if len(key_path) > 1 and isinstance(last, jax.tree_util.GetAttrKey) and last.name == "value":
        key_path = key_path[:-1]  # NNX's
    parts = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)


def _nested(flat, empty, path):
    tree = {}
    for name, leaf in [*flat.items(), *((name, None) for name in empty)]:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in name.split("/")]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {name} lies below a leaf")
        if leaf is not None:
            node[last] = leaf
        elif name:
            node[last] = {}
    return tree


def _like(like, flat, path):
    pairs, treedef = jax.tree_util.tree_flatten_with_path(
        like, is_leaf=lambda leaf: qarray.is_encoded(leaf) or is_packed(leaf)
    )
    expected = {_name(key_path): leaf for key_path, leaf in pairs}
    wrong = {
        "lacks": sorted(set(expected) - set(flat)),
        "has besides": sorted(set(flat) - set(expected)),
        "has in another shape": [
            f"{name} {flat[name].shape}, not {tuple(leaf.shape)}"
            for name, leaf in expected.items()
            if name in flat and flat[name].shape != tuple(leaf.shape)
        ],
    }
    if told := "; it ".join(f"{what} {_few(names)}" for what, names in wrong.items() if names):
        raise ValueError(f"{path} is of another network: it {told}")
    return treedef.unflatten([flat[name] for name in expected])


def _few(names) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
