"""Two thousand damaged files: one clear error each, no wrong weights, no memory beyond its due."""

import hashlib
import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.encoded import storage

FLOAT32 = np.dtype("float32")
PATHS = ("a/bias", "a/grid", "a/mask", "b/bits", "b/levels", "b/odd")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """The bytes of a file with every kind of leaf, packed and coded."""
    rng = np.random.default_rng(0)
    mask = rng.random((4, 1, 3)) < 0.7
    coords = np.where(mask, 1.5, 0).astype(np.float32)
    basis = rng.choice([-1, 1], (4, 9, 3)).astype(np.int8)
    skewed = np.minimum(rng.geometric(0.8, (60, 20)) - 1, 7)
    tree = {
        "a": {
            "bias": rng.normal(size=7).astype(np.float32),
            "grid": qj.Grid((skewed - 4).astype(np.int8), jnp.ones((1, 20)), 3, FLOAT32),
            "mask": np.where(rng.random((50, 9)) < 0.05, 1, 0).astype(np.float32),
        },
        "b": {
            "bits": qj.MultiBit(basis, coords, mask, FLOAT32),
            "levels": qj.Table(skewed.astype(np.uint8), jnp.ones((1, 1, 8)), 3, FLOAT32),
            "odd": qj.Grid(jnp.ones((3, 5), jnp.int8), jnp.ones((1, 1)), 2, FLOAT32, 3),
        },
    }
    path = tmp_path_factory.mktemp("intact") / "net"
    qj.save(path, tree, metadata={"name": "net"})
    assert {stored.coder for stored in storage.inspect(path).leaves.values()} >= {"ans", "packed"}
    return path.read_bytes()


def refused(tmp_path, data) -> str:
    """The error of a file, which must name it."""
    path = tmp_path / "broken"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="broken") as caught:
        qj.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def split(data):
    """Header and body of a file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body, hashed=True) -> bytes:
    """A file of them, its digests made anew: damage by someone who can count."""
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    if not hashed or storage.DIGESTS not in header:
        return head + body
    names = sorted(name for name in header if name not in ("__metadata__", storage.DIGESTS))
    spans = [header[name]["data_offsets"] for name in names]
    parts = [head, *(body[start:end] for start, end in spans)]
    digests = b"".join(hashlib.sha256(part).digest() for part in parts)
    start = header[storage.DIGESTS]["data_offsets"][0]
    return head + body[:start] + digests + body[start + len(digests) :]


def rows_of(header):
    return json.loads(header["__metadata__"]["leaves"])


def with_row(data, path, hashed=True, **changes):
    header, body = split(data)
    rows = rows_of(header)
    rows[path] = {k: v for k, v in {**rows[path], **changes}.items() if v is not None}
    header["__metadata__"]["leaves"] = json.dumps(rows)
    return joined(header, body, hashed)


def test_every_truncation(intact, tmp_path):
    rng = np.random.default_rng(1)
    for length in [*range(40), *rng.integers(40, len(intact), 460)]:
        refused(tmp_path, intact[:length])
    refused(tmp_path, intact + b"\0")


def test_flipped_bits(intact, tmp_path):
    rng = np.random.default_rng(2)
    head = 8 + int.from_bytes(intact[:8], "little")
    places = [*rng.integers(0, 8 * head, 600), *rng.integers(8 * head, 8 * len(intact), 700)]
    for place in places:
        data = bytearray(intact)
        data[place // 8] ^= 1 << place % 8
        refused(tmp_path, bytes(data))


def test_damage_of_a_leaf_names_it(intact, tmp_path):
    header, body = split(intact)
    head = len(intact) - len(body)
    for name in PATHS:
        data = bytearray(intact)
        data[head + header[name]["data_offsets"][0]] ^= 1
        assert f"broken: {name} is damaged: its SHA-256 differs" in refused(tmp_path, bytes(data))


ROWS = [
    {"kind": "gird"},
    {"kind": 3},
    {"kind": None},
    {"shape": [10**18]},
    {"shape": [-3, 5]},
    {"shape": [2.5]},
    {"shape": "huge"},
    {"shape": [0]},
    {"shape": [1]},
    {"shape": [7, 7, 7]},
    {"view": [10**18]},
    {"view": [2, 2]},
    {"view": []},
    {"group": [10**9, 10**9]},
    {"group": [3, 3]},
    {"group": []},
    {"bits": 0},
    {"bits": 10**6},
    {"bits": "3"},
    {"bits": 5},
    {"levels": 1},
    {"levels": 10**9},
    {"levels": 6},
    {"coder": "zip"},
    {"coder": ["ans"]},
    {"coder": "huffman"},
    {"scales": "float64"},
    {"scales": "int8"},
    {"scales": "object"},
    {"dtype": "uint8"},
    {"dtype": None, "scales": "float16"},
    {"slots": 0},
    {"slots": 10**12},
    {"most": 10**12},
    {"most": 1},
    {"kept": 10**12},
    {"kept": -1},
    {"kept": 1},
    {"blocks": 3},
    {"blocks": -1},
    {"axis": 5},
]


def test_edited_rows_under_new_digests_never_crash(intact, tmp_path):
    """What still fits together is another leaf, of the size that it declares."""
    refusals = 0
    for path in PATHS[1:]:
        for change in ROWS:
            data = with_row(intact, path, **change)
            (tmp_path / "broken").write_bytes(data)
            message = None
            tracemalloc.start()
            try:
                qj.load(tmp_path / "broken")
            except ValueError as error:
                message = str(error)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2 * len(data) + 2_000_000, (path, change, peak)  # all leaves are small
            assert message is None or ("broken: " in message and "\n" not in message)
            refusals += message is not None
    assert refusals > 130


def test_edited_rows_without_new_digests(intact, tmp_path):
    for path in PATHS[1:]:
        for change in ROWS:
            header, body = split(with_row(intact, path, False, **change))
            message = refused(tmp_path, joined(header, body, hashed=False))
            assert "header is damaged" in message


@pytest.mark.parametrize("hashed", [False, True])
def test_edited_tensors(intact, tmp_path, hashed):
    """Sizes, shapes, dtypes and places of the file's own header."""
    for name in PATHS:
        for change in (
            {"dtype": "F64"},
            {"dtype": "F8_E4M3"},
            {"dtype": "I16"},
            {"dtype": "complex"},
            {"shape": [1]},
            {"shape": [10**15]},
            {"shape": [-1]},
            {"shape": [2**63, 2**63]},
            {"data_offsets": [0, 10**12]},
            {"data_offsets": [5, 1]},
            {"data_offsets": [0, 0]},
        ):
            header, body = split(intact)
            header[name] = {**header[name], **change}
            refused(tmp_path, joined(header, body, hashed))


def test_names(intact, tmp_path):
    for name in PATHS:
        header, body = split(intact)
        header["other"] = header.pop(name)
        refused(tmp_path, joined(header, body, hashed=False))
        if name in rows_of(header):  # a plain array of another name is another file
            refused(tmp_path, joined(header, body))
        header, body = split(intact)
        del header[name]
        refused(tmp_path, joined(header, body))
        text = json.dumps(split(intact)[0])
        twice = text.replace('"a/bias"', f'"{name}"') if name != "a/bias" else text
        twice = twice.replace(
            "{", '{"a/bias": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, ', 1
        )
        data = len(twice.encode()).to_bytes(8, "little") + twice.encode() + body
        refused(tmp_path, data)
    header, body = split(intact)
    header["a/grid/below"] = header.pop("a/bias")
    assert "lies below a leaf" in refused(tmp_path, joined(header, body))
    header, body = split(intact)
    header["x"] = header.pop(storage.DIGESTS)
    assert "0 bytes of digests" in refused(tmp_path, joined(header, body))


def test_metadata(intact, tmp_path):
    for key, value, message in (
        ("quantjax", "0", "is no version"),
        ("quantjax", "one", "is no version"),
        ("quantjax", "7", "from a newer quantjax"),
        ("leaves", "[", "broken: "),
        ("leaves", "[]", "leaves is no dict"),
        ("leaves", '{"a/grid": 3}', "a/grid has no row"),
        ("leaves", "[" * 100_000, "broken: "),
        ("leaves", '{"nowhere": {}}', "no tensors of"),
        ("leaves", '{"a/grid": {}, "a/grid": {}}', "names twice"),
        ("metadata", "{", "broken: "),
        ("empty", "{", "broken: "),
        ("empty", "3", "empty is no list"),
        ("empty", "[3]", "empty is no list"),
        ("empty", '["a/grid/x"]', "lies below a leaf"),
    ):
        header, body = split(intact)
        header["__metadata__"][key] = value
        assert message in refused(tmp_path, joined(header, body))
    header, body = split(intact)
    del header["__metadata__"]["quantjax"]
    assert "none of quantjax's" in refused(tmp_path, joined(header, body))


def test_a_bomb_of_one_symbol(tmp_path, monkeypatch):
    """A leaf of zeros costs a table however large it says it is."""
    path = tmp_path / "zeros"
    qj.save(path, {"w": qj.Grid(jnp.zeros((100, 10), jnp.int8), jnp.ones((1, 1)), 2, FLOAT32, 3)})
    assert storage.inspect(path).leaves["w"].coder == "ans"
    assert "beyond all memory" in refused(
        tmp_path, with_row(path.read_bytes(), "w", shape=[10**7, 10**7])
    )
    monkeypatch.setattr(storage, "memory", lambda: 3999)
    with pytest.raises(ValueError, match="zeros: w is damaged: with it 4000 bytes are declared"):
        qj.load(path)
