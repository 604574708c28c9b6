"""Encoded leaves: invariants, decoding against loops in NumPy, sizes counted by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import quantjax as qj
from quantjax.core import qarray

FLOAT32 = np.dtype("float32")
INF, NAN = float("inf"), float("nan")


def grid(seed=0, group=(1, 4), dtype=FLOAT32):
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(-4, 4, (5, 4)), jnp.int8)
    return qj.Grid(codes, jnp.asarray(rng.uniform(0.1, 1, group), jnp.float32), 3, dtype)


def table(seed=0, group=(5, 1), dtype=FLOAT32):
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(0, 4, (5, 4)), jnp.uint8)
    return qj.Table(codes, jnp.asarray(rng.normal(size=(*group, 4)), jnp.float32), 2, dtype)


def multibit(seed=0, view=(5, 2, 3), group=(5, 2, 1), dtype=FLOAT32, **static):
    """Three slots, a third of them pruned."""
    rng = np.random.default_rng(seed)
    basis = jnp.asarray(rng.choice([-1, 1], (*view, 3)), jnp.int8)
    mask = jnp.asarray(rng.uniform(size=(*group, 3)) > 0.33)
    coords = jnp.where(mask, jnp.asarray(rng.uniform(0.1, 1, mask.shape), jnp.float32), 0)
    return qj.MultiBit(basis, coords, mask, dtype, **static)


def split(seed=0, dtype=FLOAT32):
    return multibit(seed, dtype=dtype, blocks=2, axis=-1)


MAKERS = {"grid": grid, "table": table, "multibit": multibit, "blocks": split}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def decoded_by_hand(leaf):
    """In float64 and without broadcasting tricks: one element after the other."""
    if isinstance(leaf, qj.MultiBit):
        basis, coords = np.float64(leaf.basis), np.float64(leaf.coords) * np.asarray(leaf.mask)
        out = np.zeros(basis.shape[:-1])
        for at in np.ndindex(out.shape):
            group = tuple(0 if n == 1 else i for i, n in zip(at, coords.shape, strict=False))
            out[at] = sum(coords[group][k] * basis[at][k] for k in range(coords.shape[-1]))
        return out.reshape(leaf.shape)
    codes = np.asarray(leaf.codes)
    out = np.zeros(codes.shape)
    scale = leaf.step if isinstance(leaf, qj.Grid) else leaf.levels
    for at in np.ndindex(out.shape):
        group = tuple(0 if n == 1 else i for i, n in zip(at, scale.shape, strict=False))
        if isinstance(leaf, qj.Grid):
            out[at] = int(codes[at]) * float(scale[group])
        else:
            out[at] = float(scale[group][codes[at]])
    return out


@pytest.mark.parametrize(
    "leaf",
    [
        grid(),
        grid(group=(1, 1)),
        grid(group=(5, 4)),
        table(),
        table(group=(1, 1)),
        table(group=(1, 4)),
        table(group=(5, 4)),
        multibit(),
        multibit(group=(1, 1, 1)),
        multibit(view=(4, 6), group=(1, 6)),
        multibit(view=(7,), group=(1,)),
        multibit(blocks=2, axis=-1),
        multibit(view=(2, 3, 4), group=(2, 1, 4), blocks=2, axis=-2),
        multibit(view=(4, 3, 2, 2), group=(4, 1, 1, 1), blocks=4, axis=-3),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_decode(leaf, compiled):
    leaf.validate()
    decode = jax.jit(qj.decode) if compiled else qj.decode
    value = decode(leaf)
    assert value.shape == leaf.shape
    assert value.dtype == FLOAT32
    np.testing.assert_allclose(value, decoded_by_hand(leaf), rtol=1e-6, atol=1e-6)


def test_pruned_slots_do_not_count_whatever_their_coordinates():
    mask = jnp.asarray([[[True, False]]])
    leaf = qj.MultiBit(jnp.ones((1, 3, 2), jnp.int8), jnp.asarray([[[0.5, 9.0]]]), mask, FLOAT32)
    np.testing.assert_array_equal(leaf.decode(), [[0.5] * 3])


def test_a_block_view_has_the_shape_of_its_leaf():
    # The leaf [6, 5]: axis -2 is viewed as (2 blocks, 3).
    view = multibit(view=(2, 3, 5), group=(2, 1, 5), blocks=2, axis=-2)
    assert view.shape == (6, 5)
    flat = multibit(view=(2, 3, 5), group=(2, 1, 5))
    np.testing.assert_array_equal(view.decode(), flat.decode().reshape(6, 5))


def test_arithmetic_is_in_float32_and_the_cast_comes_last(make):
    narrow = jnp.dtype("bfloat16")
    leaf = make(dtype=narrow)
    assert leaf.decode().dtype == narrow
    expected = np.asarray(make().decode()).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(leaf.decode(), expected)


def test_stacking_vmap_and_scan_over_a_leading_axis(make):
    leaves = [make(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *leaves)
    expected = np.stack([leaf.decode() for leaf in leaves])
    assert stacked.shape == expected.shape
    scanned = jax.lax.scan(lambda carry, leaf: (carry, leaf.decode()), None, stacked)[1]
    for decoded in (stacked.decode(), jax.vmap(qj.decode)(stacked), scanned):
        np.testing.assert_array_equal(decoded, expected)
    twice = jax.tree.map(lambda part: jnp.stack([part, part]), stacked)
    np.testing.assert_array_equal(
        jax.vmap(jax.vmap(qj.decode))(twice), np.stack([expected, expected])
    )


def test_decode_of_a_tree_leaves_other_leaves_alone(make):
    leaf, plain = make(), jnp.ones(3)
    tree = {"a": leaf, "b": [plain, None], "c": 2.5}
    decoded = qj.decode(tree)
    assert decoded["b"][0] is plain
    assert decoded["c"] is tree["c"]
    np.testing.assert_array_equal(decoded["a"], leaf.decode())


def test_leaves_are_pytrees_that_tree_maps_may_fill_with_anything(make):
    leaf = make()
    shapes = jax.tree.map(lambda part: part.shape, leaf)  # no check stands in the way
    assert type(shapes) is type(leaf)
    assert shapes.dtype == leaf.dtype
    with pytest.raises(dataclasses.FrozenInstanceError):
        leaf.dtype = np.float16
    static = [field.name for field in dataclasses.fields(leaf)]
    arrays = len(jax.tree.leaves(leaf))
    for name, value in zip(static[arrays:], (9, np.dtype("float16"), -2), strict=False):
        other = dataclasses.replace(leaf, **{name: value})
        assert jax.tree.structure(other) != jax.tree.structure(leaf)  # so jit sees another type
    assert qarray.is_encoded(leaf)
    assert not qarray.is_encoded(jnp.ones(2))


# Invariants


def test_valid_leaves_pass_and_come_back(make):
    leaf = make()
    assert leaf.validate() is leaf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": jnp.ones((5, 4))}, "codes are float32, not integers"),
        ({"codes": jnp.full((5, 4), 4)}, "codes leave -4..3, the range of 8 levels"),
        ({"codes": jnp.full((5, 4), -5)}, "codes leave -4..3"),
        ({"bits": 2, "levels": 4}, "codes leave -2..1"),
        ({"levels": 7}, "codes leave -3..3"),
        ({"bits": 2}, "8 levels of 2 bits"),
        ({"levels": 4}, "4 levels of 3 bits"),
        ({"step": jnp.ones(())}, "step .* beside codes"),
        ({"step": jnp.ones(4)}, "step .* beside codes"),
        ({"step": jnp.ones((1, 3))}, "step .* beside codes"),
        ({"step": jnp.zeros((1, 4))}, "steps are not all positive"),
        ({"step": jnp.full((1, 4), -1.0)}, "steps are not all positive"),
        ({"step": jnp.full((1, 4), NAN)}, "steps are not all positive and finite"),
        ({"step": jnp.full((1, 4), INF)}, "steps are not all positive and finite"),
    ],
)
def test_broken_grids(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(grid(), **changes).validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": jnp.ones((5, 4), jnp.int8)}, "codes are int8, not unsigned"),
        ({"codes": jnp.full((5, 4), 4, jnp.uint8)}, r"codes reach 2\*\*2"),
        ({"bits": 3}, r"levels, not 2\*\*bits"),
        ({"levels": jnp.ones((5, 1, 8))}, r"levels, not 2\*\*bits"),
        ({"levels": jnp.ones(4)}, "levels .*, codes"),
        ({"levels": jnp.ones((4, 1, 4))}, "levels .*, codes"),
        ({"levels": jnp.full((5, 1, 4), NAN)}, "levels are not all finite"),
        ({"levels": jnp.full((5, 1, 4), INF)}, "levels are not all finite"),
    ],
)
def test_broken_tables(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(table(), **changes).validate()


GROUP = (5, 2, 1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basis": jnp.ones((5, 2, 3, 3))}, "basis is float32, not int8"),
        ({"basis": jnp.zeros((5, 2, 3, 3), jnp.int8)}, "not all -1 or 1"),
        ({"basis": jnp.full((5, 2, 3, 3), -128, jnp.int8)}, "not all -1 or 1"),
        ({"mask": jnp.ones(GROUP)}, "mask is float32, not bool"),
        ({"mask": jnp.ones((5, 2, 1, 2), bool)}, "coords .* beside mask"),
        ({"coords": jnp.ones((1, 1, 1, 3)), "mask": jnp.ones((1, 1, 1, 2), bool)}, "beside mask"),
        ({"coords": jnp.ones((5, 2, 1, 2)), "mask": jnp.ones((5, 2, 1, 2), bool)}, "beside basis"),
        ({"coords": jnp.ones((5, 3)), "mask": jnp.ones((5, 3), bool)}, "coords .* beside basis"),
        ({"coords": jnp.ones((4, 2, 1, 3)), "mask": jnp.ones((4, 2, 1, 3), bool)}, "beside basis"),
        ({"coords": jnp.full(GROUP, NAN), "mask": jnp.ones(GROUP, bool)}, "not all finite"),
        ({"coords": jnp.full(GROUP, -0.5), "mask": jnp.ones(GROUP, bool)}, "coords are negative"),
        ({"coords": jnp.ones(GROUP), "mask": jnp.zeros(GROUP, bool)}, "masked coords are not zero"),
        ({"axis": 1}, "axis 1 is not counted from the end"),
        ({"blocks": 3}, "2 blocks along the view, not 3"),
        ({"axis": -2}, "5 blocks along the view, not 2"),
    ],
)
def test_broken_sums_of_bases(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(split(), **changes).validate()


@pytest.mark.parametrize(
    "leaf",
    [
        dataclasses.replace(grid(), step=jnp.ones((1, 4), jnp.int32)),
        dataclasses.replace(table(), levels=jnp.ones((5, 1, 4), jnp.int32)),
        dataclasses.replace(split(), coords=jnp.ones(GROUP, int), mask=jnp.ones(GROUP, bool)),
        dataclasses.replace(split(), axis=-3),  # the view has no axis -4
    ],
    ids=["step", "levels", "coords", "axis"],
)
def test_scales_are_floats_and_axes_exist(leaf):
    with pytest.raises(ValueError, match=r"float|axis"):
        leaf.validate()


# Sizes


@pytest.mark.parametrize(
    ("leaf", "bits"),
    [
        # 20 codes of 3 bits are 60, padded to 64; four float32 steps.
        (grid(), 64 + 4 * 32),
        (grid(group=(1, 1)), 64 + 32),
        # 20 codes of 2 bits are 40; 5 tables of 4 levels.
        (table(), 40 + 5 * 4 * 32),
        (table(group=(1, 1)), 40 + 4 * 32),
        # 33 codes of 9 bits are 297, padded to 304; a bfloat16 step.
        (
            qj.Grid(jnp.zeros((3, 11), jnp.int16), jnp.ones((1, 1), jnp.bfloat16), 9, FLOAT32),
            304 + 16,
        ),
    ],
)
def test_sizes_of_codes(leaf, bits):
    assert leaf.nbits == qarray.nbits(leaf) == bits


@pytest.mark.parametrize(
    ("mask", "bits", "average"),
    [
        # Two groups of 7 weights. Kept 3 and 1: 7 * 4 basis bits, two counts of 2 bits (0..3).
        ([[1, 1, 1], [0, 1, 0]], 32 + 4 * 32, 2.0),
        # Kept 1 and 0: 7 basis bits and two counts of one bit make 9, padded to 16.
        ([[0, 0, 1], [0, 0, 0]], 16 + 32, 0.5),
        # Kept 2 and 2: 28 basis bits, two counts of 2 bits.
        ([[1, 1, 0], [0, 1, 1]], 32 + 4 * 32, 2.0),
        # Nothing kept: not a single bit.
        ([[0, 0, 0], [0, 0, 0]], 0, 0.0),
    ],
)
def test_sizes_of_sums_of_bases(mask, bits, average):
    mask = jnp.asarray(mask, bool)[None]
    basis = jnp.ones((7, 2, 3), jnp.int8)
    leaf = qj.MultiBit(basis, 1.0 * mask, mask, FLOAT32).validate()
    assert leaf.nbits == bits
    assert leaf.bits == average


def test_sizes_of_plain_arrays():
    assert qarray.nbits(jnp.ones((3, 5))) == 480
    assert qarray.nbits(jnp.ones(7, jnp.bfloat16)) == 112


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [
        (2, True, "int8"),
        (8, True, "int8"),
        (9, True, "int16"),
        (16, True, "int16"),
        (8, False, "uint8"),
        (9, False, "uint16"),
    ],
)
def test_dtypes_of_codes(bits, signed, expected):
    assert qarray.code_dtype(bits, signed=signed) == expected
