"""Packed leaves beside the encoded ones that they are, and products beside float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax.core import qarray
from quantjax.encoded import packed as packed_lib
from tests.encoded.storage_test import grids, multibits, tables

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = np.dtype("float32")
cheap = settings(derandomize=True, deadline=None, max_examples=15)


def grid(levels, shape=(37, 30), step=None, seed=0):
    bits = max(1, (levels - 1).bit_length())
    symbols = np.random.default_rng(seed).integers(0, levels, shape)
    step = np.full((1,) * len(shape), 0.25, np.float32) if step is None else step
    return qj.Grid(qarray.grid_codes(symbols, levels, bits), step, bits, FLOAT32, levels)


def table(bits, group=(1, 1)):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (37, 30)).astype(np.uint8)
    levels = rng.normal(size=(*group, 2**bits)).astype(np.float32)
    return qj.Table(codes, levels, bits, FLOAT32)


def sums(axes, blocks=1, kept=0.8):
    w = jnp.asarray(np.random.default_rng(1).normal(size=(36, 30)), jnp.float32)
    leaf = qj.sketch(w, 3, axes, blocks=blocks)
    mask = np.random.default_rng(2).random(leaf.mask.shape) < kept
    coords = jnp.where(mask, leaf.coords, 0)
    return dataclasses.replace(leaf, coords=coords, mask=leaf.mask & mask)


STEPS = np.arange(1, 38, dtype=np.float32)
KERNELS = {
    "1 bit": (grid(2), True),
    "ternary": (grid(3), True),
    "2 bits": (grid(4), True),
    "5 levels": (grid(5), True),
    "narrow 3 bits": (grid(7), True),
    "3 bits": (grid(8), True),
    "9 levels": (grid(9), True),
    "4 bits": (grid(16), True),
    "5 bits": (grid(32), False),
    "8 bits": (grid(256), False),
    "12 bits": (grid(4096), False),
    "a step per output": (grid(16, step=STEPS[None, :30]), True),
    "a step per input": (grid(8, step=STEPS[:, None]), True),
    "a step per weight": (grid(4, step=np.outer(STEPS, STEPS[:30])), False),
    "2-bit table": (table(2), True),
    "3-bit table": (table(3), False),
    "4-bit table": (table(4), True),
    "tables per output": (table(2, (1, 30)), False),
    "bases": (sums(-2), True),
    "bases of a leaf": (sums((-2, -1)), True),
    "bases in blocks": (sums(-2, 4), True),
    "bases in many blocks": (sums(-2, 18), False),
    "bases per input": (sums(-1), False),
    "no bases left": (sums(-2, kept=0.0), True),
}
each = pytest.mark.parametrize(("leaf", "has_tables"), KERNELS.values(), ids=KERNELS)


@cheap
@given(leaf=st.one_of(grids(), tables(), multibits()))
def test_any_leaf_decodes_to_the_same_bits(leaf):
    packed = qj.pack({"k": leaf})["k"]
    assert (packed.shape, packed.dtype) == (leaf.shape, leaf.dtype)
    expected = jax.tree.map(jnp.asarray, leaf).decode()
    np.testing.assert_array_equal(packed.decode(), expected)


@each
def test_decoding_under_jit_is_the_same(leaf, has_tables):
    packed = qj.pack({"k": leaf})["k"]
    assert packed_lib.has_tables(packed) is has_tables
    decode = jax.jit(lambda leaf: leaf.decode())
    np.testing.assert_array_equal(decode(packed), decode(leaf))
    np.testing.assert_array_equal(jax.jit(qj.pack)({"k": leaf})["k"].decode(), decode(leaf))


@pytest.mark.parametrize("levels", [2, 3, 4, 7, 8, 15, 16, 255, 256])
@pytest.mark.parametrize("rows", [1, 37, 40])
def test_memory_is_that_of_the_file_but_for_padded_rows(levels, rows):
    leaf = grid(levels, (rows, 6))
    packed = qj.pack({"k": leaf})["k"]
    assert all(words.dtype == np.uint8 for words in packed.words)
    padded = 40 if rows > 1 else {3: 5, 4: 4, 15: 2, 16: 2, 255: 1, 256: 1}.get(levels, 8)
    whole = dataclasses.replace(leaf, codes=np.zeros((padded, 6), np.int8))
    assert packed.nbytes <= whole.nbits / 8


@each
@pytest.mark.parametrize("rows", [(), (1,), (2, 2), (5,)])
def test_products(leaf, has_tables, rows):
    del has_tables
    packed = qj.pack({"k": leaf})["k"]
    x = np.random.default_rng(3).normal(size=(*rows, leaf.shape[0])).astype(np.float32)
    kernel = np.asarray(jax.tree.map(jnp.asarray, leaf).decode(), np.float64)
    found = jax.jit(packed_lib.product)(x, packed)
    bound = np.abs(x.astype(np.float64)) @ np.abs(kernel)  # what rounding is relative to
    assert found.dtype == np.float32
    assert np.all(np.abs(found - x @ kernel) <= 2e-6 * bound + 1e-30)


@pytest.mark.parametrize(
    "leaf", [grid(3), grid(8), table(4), sums(-2, 4)], ids=["ternary", "3 bits", "table", "bases"]
)
def test_gradients_are_those_of_the_decoded_kernel(leaf):
    packed = qj.pack({"k": leaf})["k"]
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, leaf.shape[0])), jnp.float32)

    def grads(product):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(product(x)))))(x)

    found = grads(lambda x: packed_lib.product(x, packed))
    kernel = jax.tree.map(jnp.asarray, leaf).decode()
    np.testing.assert_allclose(found, grads(lambda x: x @ kernel), rtol=1e-4, atol=1e-4)


def test_dtypes_promote_as_in_a_dot():
    packed = qj.pack({"k": dataclasses.replace(grid(4), dtype=jnp.dtype("bfloat16"))})["k"]
    for dtype, expected in ((jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.float32)):
        assert packed_lib.product(jnp.ones((1, 37), dtype), packed).dtype == expected


@pytest.mark.parametrize(
    "leaf", [grid(7, (3, 21, 5)), grid(2, (3, 21, 5))], ids=["planes", "1 bit"]
)
def test_stacked_kernels_scan_vmap_and_donate(leaf):
    leaf = dataclasses.replace(leaf, step=np.asarray([[[0.5]], [[1.0]], [[2.0]]], np.float32))
    packed = qj.pack({"k": leaf})["k"]
    x = jnp.ones((2, 21))
    expected = jnp.einsum("ri,lio->lro", x, jax.tree.map(jnp.asarray, leaf).decode())
    _, scanned = jax.lax.scan(lambda c, k: (c, packed_lib.product(x, k)), 0, packed)
    np.testing.assert_allclose(scanned, expected, rtol=1e-6)
    mapped = jax.vmap(packed_lib.product, (None, 0))(x, packed)
    np.testing.assert_allclose(mapped, expected, rtol=1e-6)
    same = jax.jit(lambda k: k, donate_argnums=0)(packed)
    np.testing.assert_array_equal(same.decode(), jax.tree.map(jnp.asarray, leaf).decode())
    assert same.shape == leaf.shape


def test_leaves_of_one_dimension_and_plain_ones():
    bias = jnp.ones(3)
    tree = qj.pack({"k": grid(4, (13,)), "bias": bias})
    assert tree["bias"] is bias
    assert tree["k"].shape == (13,)
    np.testing.assert_array_equal(packed_lib.unpacked(tree)["k"], grid(4, (13,)).decode())
    again = qj.pack(tree)
    assert again["k"] is tree["k"]


@pytest.mark.parametrize(
    "leaf",
    [grid(3), grid(8), grid(4096), grid(4, step=STEPS[:, None]), table(3), table(2, (37, 1))],
    ids=["ternary", "planes", "12 bits", "steps", "table", "tables"],
)
def test_rows_are_taken_without_the_others(leaf):
    packed = qj.pack({"k": leaf})["k"]
    index = jnp.asarray([[0, 36, 5], [7, 7, 12]])
    expected = jnp.asarray(jax.tree.map(jnp.asarray, leaf).decode())[index]
    np.testing.assert_array_equal(jax.jit(lambda p, i: p.take(i))(packed, index), expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_outputs_stay_sharded_and_nothing_is_gathered(kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    packed = qj.pack({"k": grid(4, (40, 64), np.ones((1, 64), np.float32))})["k"]

    def spread(array):
        return jax.device_put(array, NamedSharding(mesh, P(None, "model")))

    sharded = jax.tree.map(spread, packed)
    x = jax.device_put(jnp.ones((1, 40)), NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        compiled = jax.jit(packed_lib.product).lower(x, sharded).compile()
    assert "all-gather" not in compiled.as_text()
    found = compiled(x, sharded)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)
    np.testing.assert_allclose(found, packed_lib.product(jnp.ones((1, 40)), packed), rtol=1e-6)


def test_shard_map_over_outputs():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    packed = qj.pack({"k": grid(3, (40, 64), np.ones((1, 64), np.float32))})["k"]
    split = jax.shard_map(
        packed_lib.product, mesh=mesh, in_specs=(P(), P(None, "model")), out_specs=P(None, "model")
    )
    x = jnp.arange(40.0)[None]
    np.testing.assert_allclose(split(x, packed), packed_lib.product(x, packed), rtol=1e-6)


def test_a_symbolic_batch_decodes():
    packed = qj.pack({"k": grid(4)})["k"]
    rows = jax.export.symbolic_shape("rows")[0]
    spec = jax.ShapeDtypeStruct((rows, 37), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: packed_lib.product(x, packed)))(spec)
    x = jnp.ones((2, 37))
    np.testing.assert_allclose(exported.call(x), packed_lib.product(x, packed), rtol=1e-5)


def test_bad_input():
    packed = qj.pack({"k": grid(4)})["k"]
    with pytest.raises(ValueError, match=r"x \(2, 36\) and a packed leaf \(37, 30\)"):
        packed_lib.product(jnp.ones((2, 36)), packed)
    with pytest.raises(ValueError, match=r"a packed leaf \(2, 5, 3\) have no product"):
        packed_lib.product(jnp.ones((2, 5)), qj.pack({"k": grid(4, (2, 5, 3))})["k"])
    with pytest.raises(ValueError, match=r"a/k: shape \(0, 3\) has nothing to pack"):
        qj.pack({"a": {"k": grid(4, (0, 3))}})
    with pytest.raises(ValueError, match="a/k: a Packed cannot be stored"):
        qj.save("absent", {"a": {"k": packed}})
