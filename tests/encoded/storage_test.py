"""Files: what comes back, what they cost, what a crash leaves."""

import errno
import json
import os
import stat
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import quantjax as qj
from quantjax.core import qarray
from quantjax.encoded import leaves, storage

FLOAT32 = np.dtype("float32")
cheap = settings(derandomize=True, deadline=None, max_examples=60)

DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def kept_dims(draw, shape):
    return tuple(draw(st.sampled_from([1, n])) for n in shape)


@st.composite
def grids(draw):
    bits = draw(st.integers(1, 16))
    levels = 2**bits - draw(st.booleans()) if bits > 1 else 2
    shape, rng = draw(SHAPES), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    symbols = np.minimum(
        rng.geometric(draw(st.sampled_from([0.01, 0.5, 0.99])), shape) - 1, levels - 1
    )
    step = rng.uniform(0.5, 2, kept_dims(draw, shape)).astype(draw(DTYPES))
    codes = qarray.grid_codes(symbols, levels, bits)
    return qj.Grid(codes, step, bits, jnp.dtype(draw(DTYPES)), levels)


@st.composite
def tables(draw):
    bits, shape = draw(st.integers(1, 9)), draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    codes = rng.integers(0, 2**bits, shape).astype(qarray.code_dtype(bits, signed=False))
    levels = rng.normal(size=(*kept_dims(draw, shape), 2**bits)).astype(draw(DTYPES))
    return qj.Table(codes, levels, bits, jnp.dtype(draw(DTYPES)))


@st.composite
def multibits(draw):
    shape, slots = draw(SHAPES), draw(st.integers(1, 5))
    blocks = draw(st.integers(1, 3))
    view = (*shape[:-1], blocks, shape[-1]) if blocks > 1 else shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    group = (*kept_dims(draw, view), slots)
    mask = rng.random(group) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    coords = np.where(mask, rng.uniform(0, 1, group), 0).astype(draw(DTYPES))
    basis = rng.choice([-1, 1], (*view, slots)).astype(np.int8)
    return qj.MultiBit(basis, coords, mask, jnp.dtype(draw(DTYPES)), blocks)


@st.composite
def arrays(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.normal(size=shape) * 100 * (rng.random(shape) < draw(st.sampled_from([0.02, 1])))
    return values.astype(draw(st.sampled_from(sorted(leaves.DTYPES.values()))))


KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5)
LEAVES = st.one_of(grids(), tables(), multibits(), arrays())
TREES = st.dictionaries(
    KEYS,
    st.recursive(LEAVES, lambda t: st.dictionaries(KEYS, t, max_size=3), max_leaves=6),
    max_size=4,
)


def canonical(leaf):
    """A leaf with the kept slots first in every group and pruned ones as 1: as files have it."""
    if not isinstance(leaf, qj.MultiBit):
        return leaf
    order = np.argsort(~np.asarray(leaf.mask), axis=-1, kind="stable")
    mask, coords = (np.take_along_axis(np.asarray(a), order, -1) for a in (leaf.mask, leaf.coords))
    basis = np.take_along_axis(np.asarray(leaf.basis), np.broadcast_to(order, leaf.basis.shape), -1)
    basis = np.where(mask, basis, 1)
    return qj.MultiBit(basis, coords, mask, leaf.dtype, leaf.blocks, leaf.axis)


def check_equal(found, expected):
    expected = jax.tree.map(canonical, expected, is_leaf=qarray.is_encoded)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@cheap
@given(tree=TREES, coding=st.sampled_from(leaves.CODINGS))
def test_trees_come_back_bit_for_bit(folder, tree, coding):
    path = folder / "tree.safetensors"
    qj.save(path, tree, coding=coding)
    check_equal(qj.load(path), tree)
    check_equal(qj.load(path, like=tree), tree)


@cheap
@given(leaf=LEAVES)
def test_a_leaf_takes_the_bytes_that_nbits_and_summary_say(folder, leaf):
    path = folder / "leaf.safetensors"
    for coding in ("packed", "smallest"):
        qj.save(path, {"leaf": leaf}, coding=coding)
        on_disk = load_file(path) if leaf.dtype != jnp.bfloat16 or qarray.is_encoded(leaf) else None
        nbytes = storage.inspect(path).leaves["leaf"].data.nbytes
        assert on_disk is None or on_disk["leaf"].nbytes == nbytes
        assert qj.summary({"leaf": leaf}, coding=coding).nbytes == nbytes
        if coding == "packed":
            assert 8 * nbytes == qarray.nbits(leaf)
        else:
            assert 8 * nbytes <= qarray.nbits(leaf)
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == 8 + header + nbytes + 2 * 32  # and two digests


@given(leaf=multibits())
@settings(derandomize=True, deadline=None, max_examples=10)
def test_moved_slots_decode_to_the_same(leaf):
    found = leaves.restore(leaves.store(leaf))
    np.testing.assert_array_equal(found.decode(), jax.tree.map(jnp.asarray, leaf).decode())


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        return nn.Dense(3)(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def variables():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    return Net().init(jax.random.key(1), x)


def test_a_network_with_quantized_inputs_ships_whole(variables, tmp_path):
    x = jax.random.normal(jax.random.key(2), (2, 5, 5, 2))
    apply = qj.linen.quantize_inputs(Net().apply, qj.srq_input(4))
    quantizer = qj.srq(3, dropbits=True)
    variables = qj.linen.calibrate(apply, variables, x)
    encoded = quantizer.encode(variables["params"], quantizer.init(variables["params"]))
    qj.save(tmp_path / "net", {**variables, "params": encoded}, metadata={"accuracy": 98.5})
    found = qj.load(tmp_path / "net")
    assert set(found) == {"params", "batch_stats", "quant", "quant_stats"}
    shipped = {**variables, "params": qj.decode(encoded)}
    np.testing.assert_array_equal(
        apply({**found, "params": qj.decode(found["params"])}, x), apply(shipped, x)
    )
    assert storage.inspect(tmp_path / "net").metadata == {"accuracy": 98.5}


def test_the_structure_of_like(variables, tmp_path):
    params = variables["params"]
    quantizer = qj.uniform(4)
    encoded = quantizer.encode(params, quantizer.init(params))
    qj.save(tmp_path / "net", {"params": encoded})
    for like in (
        flax.core.freeze({"params": params}),
        {"params": encoded},
        jax.eval_shape(lambda: {"params": params}),
    ):
        found = qj.load(tmp_path / "net", like=like)
        assert type(found) is type(like)
        check_equal(found["params"]["Conv_0"]["kernel"], encoded["Conv_0"]["kernel"])
    state = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    encoded = quantizer.encode(state, quantizer.init(state))
    qj.save(tmp_path / "nnx", encoded)
    found = qj.load(tmp_path / "nnx", like=state)
    assert jax.tree.structure(found) == jax.tree.structure(encoded)
    assert set(qj.load(tmp_path / "nnx")) == {"kernel", "bias"}


def test_another_network(variables, tmp_path):
    qj.save(tmp_path / "net", variables)
    like = {**variables, "params": {**variables["params"], "Dense_1": {"kernel": jnp.ones((2, 2))}}}
    with pytest.raises(
        ValueError, match=r"net is of another network: it lacks params/Dense_1/kernel$"
    ):
        qj.load(tmp_path / "net", like=like)
    with pytest.raises(ValueError, match="it has besides batch_stats/BatchNorm_0/mean, batch"):
        qj.load(tmp_path / "net", like={"params": variables["params"]})
    with pytest.raises(ValueError, match=r"another shape params/Dense_0/bias \(3,\), not \(4,\)"):
        qj.load(
            tmp_path / "net",
            like=jax.tree.map(lambda a: jnp.ones(4) if a.shape == (3,) else a, variables),
        )


@pytest.mark.parametrize("floats", leaves.FLOATS)
def test_narrow_floats_are_read_as_what_they_were(variables, tmp_path, floats):
    qj.save(tmp_path / "net", variables, floats=floats)
    found = qj.load(tmp_path / "net")
    check_equal(found, jax.tree.map(lambda a: a.astype(floats).astype(a.dtype), variables))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert (
        sum(s.data.nbytes for s in storage.inspect(tmp_path / "net").leaves.values()) < whole / 1.9
    )
    with pytest.raises(ValueError, match="big: a value does not fit into float16"):
        qj.save(tmp_path / "net", {"big": jnp.full(3, 1e5)}, floats="float16")


def test_what_a_pruned_leaf_costs(tmp_path):
    """At one percent density 0.08 bits a weight, and its values."""
    rng = np.random.default_rng(0)
    w = np.where(rng.random((300, 1000)) < 0.01, rng.normal(size=(300, 1000)), 0).astype(np.float32)
    qj.save(tmp_path / "net", {"kernel": w})
    stored = storage.inspect(tmp_path / "net").leaves["kernel"]
    assert stored.row["kind"] == "sparse"
    kept = np.count_nonzero(w)
    assert 0.075 < 8 * (stored.data.nbytes - 4 * kept) / w.size < 0.085
    np.testing.assert_array_equal(qj.load(tmp_path / "net")["kernel"], w)


# What cannot be stored


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.asarray([1.0, jnp.nan]), "a/w: not all of its values are finite"),
        (jnp.asarray([1.0, jnp.inf]), "a/w: not all of its values are finite"),
        ("text", "a/w: a str cannot be stored"),
        (3.0, "a/w: a float cannot be stored"),
        (None, "a/w: a NoneType cannot be stored"),
        (np.asarray(["x"]), "a/w: files hold no <U1"),
        (np.ones(2, complex), "a/w: files hold no complex128"),
        (jax.random.key(0), "a/w: a random key cannot be stored"),
        (qj.Grid(jnp.full((2, 2), 9), jnp.ones((1, 1)), 3, FLOAT32), "a/w: codes leave -4..3"),
    ],
    ids=str,
)
def test_leaves_that_cannot_be_stored_are_named(tmp_path, leaf, message):
    with pytest.raises(ValueError, match=message):
        qj.save(tmp_path / "net", {"a": {"w": leaf}, "b": jnp.ones(2)})
    assert not list(tmp_path.iterdir())


def test_other_bad_input(tmp_path):
    tree = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"coding must be one of .*, got 'zip'"):
        qj.save(tmp_path / "net", tree, coding="zip")
    with pytest.raises(ValueError, match=r"floats must be one of .*, got 'int8'"):
        qj.save(tmp_path / "net", tree, floats="int8")
    with pytest.raises(ValueError, match="metadata must be what JSON can say"):
        qj.save(tmp_path / "net", tree, metadata={"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="a tree is a dict of leaves"):
        qj.save(tmp_path / "net", jnp.ones(2))
    with pytest.raises(FileNotFoundError, match=r"no such folder.*missing"):
        qj.save(tmp_path / "missing" / "net", tree)
    with pytest.raises(IsADirectoryError, match="a folder, not a file"):
        qj.save(tmp_path, tree)
    with pytest.raises(FileNotFoundError, match="net"):
        qj.load(tmp_path / "net")
    with pytest.raises(IsADirectoryError):
        qj.load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_encoding_before_a_fit_says_so():
    x = jnp.ones((2, 5, 5, 2))
    variables = Net().init(jax.random.key(1), x)
    apply = qj.linen.quantize_inputs(Net().apply, qj.srq_input(4))
    with pytest.raises(ValueError, match="fit"):
        apply(variables, x)


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_full_disk_or_a_crash_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "net"
    qj.save(path, {"w": jnp.ones(2)})
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "write":
            patch.setattr(storage, "open", lambda *args: FullFile(), raising=False)
        else:
            patch.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            qj.save(path, {"w": jnp.zeros(2000)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class FullFile:
    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(PermissionError):
        qj.save(tmp_path / "net", {"w": jnp.ones(2)})


def test_links_and_modes_are_kept(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "net")
    qj.save(tmp_path / "link", {"w": jnp.ones(2)})
    assert (tmp_path / "link").is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == 0o666 & ~umask


def test_files_of_others(tmp_path):
    save_file({"w": np.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other: a safetensors file, but none of quantjax's"):
        qj.load(tmp_path / "other")
    (tmp_path / "text").write_text("no tensors at all, only text, and some of it")
    with pytest.raises(ValueError, match="text: no safetensors file, or a damaged one"):
        qj.load(tmp_path / "text")
    save_file({"w": np.ones(2)}, tmp_path / "newer", metadata={"quantjax": "2", "leaves": "?"})
    with pytest.raises(ValueError, match=r"newer: it is of version 2 .* from a newer quantjax"):
        qj.load(tmp_path / "newer")


def test_a_file_is_a_safetensors_file_that_others_read(variables, tmp_path):
    path = tmp_path / "net"
    qj.save(path, variables, metadata={"model": "Net"})
    found = load_file(path)
    np.testing.assert_array_equal(
        found["params/Dense_0/kernel"], variables["params"]["Dense_0"]["kernel"]
    )
    with safe_open(path, framework="np") as file:
        told = file.metadata()
    assert (told["quantjax"], json.loads(told["metadata"])) == ("1", {"model": "Net"})


def version_1() -> dict:
    """The tree of version1.safetensors, every kind and coder in it, made of whole numbers."""
    n = np.arange(600)
    skewed = (n * n % 11 % 5).reshape(20, 30)
    step = (1 + n[:30].reshape(1, 30) % 4) / np.float32(8)
    mask = (n[:12].reshape(4, 1, 3) % 5) > 0
    coords = np.where(mask, np.float32(0.5) * (1 + n[:12].reshape(4, 1, 3) % 3), 0)
    basis = (2 * (n[:60].reshape(4, 5, 3) % 7 % 2) - 1).astype(np.int8)
    return {
        "params": {
            "packed": qj.Grid(
                (n[:35].reshape(5, 7) % 16 - 8).astype(np.int8), step[:, :1], 4, FLOAT32
            ),
            "narrow": qj.Grid(
                (n[:21] % 3 - 1).reshape(3, 7).astype(np.int8), step[:, :1], 2, FLOAT32, 3
            ),
            "coded": qj.Grid((np.minimum(skewed, 3) - 2).astype(np.int8), step, 2, FLOAT32),
            "table": qj.Table(skewed.astype(np.uint8), step[:, None, :8], 3, np.dtype("float16")),
            "sums": qj.MultiBit(basis, coords, mask, FLOAT32),
            "sparse": np.where(n % 50 == 0, n, 0).astype(np.float32),
            "bias": np.float32(0.25) * n[1:6].astype(np.float32),
        },
        "empty": {},
    }


def test_files_of_version_1_are_read_for_ever():
    path = Path(__file__).parent / "version1.safetensors"
    check_equal(qj.load(path), version_1())
    assert {leaf.coder for leaf in storage.inspect(path).leaves.values()} == {"", "ans", "packed"}
