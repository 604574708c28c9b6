"""Sketches and the multi-bit quantizer, against float64 NumPy and the authors' arrays."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import quantjax as qj
from quantjax.methods.alq import bases, multibit
from tests import quick
from tests.methods import golden

# The paper's structures: (golden name, axes and blocks of Flax's layout).
STRUCTURES = {
    "convK": ((-4, -3), 1),
    "convP": (-2, 1),
    "convC": ((-4, -3, -2), 1),
    "fc1": (-2, 1),
    "fc2": (-2, 2),
}
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
sketch = quick.jit(qj.sketch, static_argnames=("bits", "axes", "blocks", "tol"))
nearest_codes = quick.jit(bases.nearest_codes)
nearest_value = quick.jit(bases.nearest_value)


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    with jax.enable_x64(True):
        yield request.param


def to_flax(w):
    """OIHW to HWIO, OI to IO."""
    return np.transpose(w, (2, 3, 1, 0)) if w.ndim == 4 else w.T


def groups_last(name, mb):
    """Returns basis [*groups, K, n], coords and mask [*groups, K] in the golden files' order."""
    basis, coords, mask = (np.asarray(part) for part in (mb.basis, mb.coords, mb.mask))
    if name in ("fc1", "fc2"):
        if name == "fc1":
            basis, coords, mask = basis[None], coords[None], mask[None]
        basis = basis.transpose(2, 0, 3, 1)  # subc, n, O, K
        return basis, coords[:, 0].swapaxes(0, 1), mask[:, 0].swapaxes(0, 1)
    h, w, i, o, count = basis.shape
    basis = basis.reshape(h * w, i, o, count)
    if name == "convK":
        return basis.transpose(2, 1, 3, 0), *(p[0, 0].swapaxes(0, 1) for p in (coords, mask))
    if name == "convP":
        coords, mask = (p[:, :, 0].reshape(h * w, o, count).swapaxes(0, 1) for p in (coords, mask))
        return basis.transpose(2, 0, 3, 1), coords, mask
    basis = basis.transpose(2, 3, 1, 0).reshape(o, 1, count, i * h * w)
    return basis, *(p[0, 0, 0][:, None] for p in (coords, mask))


def tied(like, w, layer, bits):
    """True for groups in which a residual is zero but for rounding: noise decides its sign."""
    w = np.asarray(w, np.float64)
    if layer in ("fc1", "fc2"):
        groups = w.T.reshape(like.shape)
    else:
        groups = w.transpose(3, 2, 0, 1).reshape(*w.shape[:1:-1], -1)
        groups = {"convK": groups, "convP": groups.swapaxes(1, 2)}.get(
            layer, groups.reshape(w.shape[3], 1, -1)
        )
    return np.array(
        [[any(np.any(np.abs(r) < 1e-9) for r in oracle(row, bits)[2]) for row in g] for g in groups]
    )


def close(actual, desired, dtype):
    desired = np.asarray(desired, np.float64)
    scale = np.max(np.abs(desired), initial=0)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), desired, rtol=0, atol=TOLERANCE[dtype] * scale
    )


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("layer", STRUCTURES)
def test_golden_sketches_of_layers(layer, bits, dtype):
    arrays = golden.load("alq_sketch_f64.npz")
    w = jnp.asarray(to_flax(arrays["conv.w" if layer.startswith("conv") else "fc.w"]), dtype)
    axes, blocks = STRUCTURES[layer]
    mb = sketch(w, bits=bits, axes=axes, blocks=blocks).validate()
    expected = {
        x: arrays[f"{layer}.mb{bits}.{x}"] for x in ("B", "alpha", "mask", "num_bin_filter")
    }
    golden_values = np.einsum("gskn,gsk->gsn", expected["B"], expected["alpha"][..., 0])
    basis, coords, mask = groups_last(layer, mb)
    clear = ~tied(golden_values, w, layer, bits)
    assert clear.mean() > 0.6
    close(np.einsum("gskn,gsk->gsn", basis, coords)[clear], golden_values[clear], dtype)
    if dtype == "float64":
        np.testing.assert_array_equal(mask[clear], expected["mask"][..., 0][clear])
        close(coords[clear], expected["alpha"][..., 0][clear], dtype)
    if clear.all():
        assert mask.sum() == expected["num_bin_filter"]
        assert qj.average_bits(mb) == pytest.approx(float(arrays[f"{layer}.mb{bits}.avg_bit"]))


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_golden_sketch_of_a_vector(bits, dtype):
    arrays = golden.load("alq_sketch_f64.npz")
    mb = sketch(jnp.asarray(arrays["vec64.w"], dtype), bits=bits, axes=-1)
    close(mb.decode(), arrays[f"vec64.mb{bits}.recon"], dtype)
    close(mb.coords[0], arrays[f"vec64.mb{bits}.alpha"], dtype)
    np.testing.assert_array_equal(mb.basis, arrays[f"vec64.mb{bits}.B"])


@pytest.mark.parametrize("case", ["const", "n3", "twolevel", "zeros_inside"])
def test_golden_edges(case, dtype):
    arrays = golden.load("alq_sketch_f64.npz")
    of = {x: arrays[f"edge_{case}.{x}"] for x in ("w", "max_bit", "alpha", "dim", "recon")}
    mb = sketch(jnp.asarray(of["w"], dtype), bits=int(of["max_bit"]), axes=-1).validate()
    assert np.count_nonzero(mb.mask) == of["dim"]
    close(mb.coords[0][: int(of["dim"])], of["alpha"], dtype)
    close(mb.decode(), of["recon"], dtype)


def oracle(w, bits, tol=1e-6):
    """Algorithm 1 for one group, with lstsq in float64: bases [n, I], coordinates, residuals."""
    found, residual, coords, residuals = [], w, np.zeros(0), []
    for _ in range(bits):
        if not residual @ residual or residual @ residual < tol * (w @ w):
            break
        residuals.append(residual)
        found.append(np.where(residual >= 0, 1.0, -1.0))
        matrix = np.stack(found, axis=1)
        coords = np.linalg.lstsq(matrix, w, rcond=None)[0]
        residual = w - matrix @ coords
    matrix = np.stack(found, axis=1) if found else np.zeros((len(w), 0))
    return matrix, coords, residuals


GROUPS = st.lists(
    st.one_of(
        st.floats(-2, 2, width=32, allow_subnormal=False), st.sampled_from([0.0, 1.0, -1.0, 0.5])
    ),
    min_size=12,
    max_size=12,
)


@hypothesis.given(values=st.lists(GROUPS, min_size=3, max_size=3))
@hypothesis.settings(max_examples=40, deadline=None)
def test_residual_is_orthogonal_and_coordinates_are_positive(values):
    w = np.asarray(values, np.float64)
    with jax.enable_x64(True):
        mb = sketch(jnp.asarray(w), bits=4, axes=-1).validate()
        residual = w - np.asarray(mb.decode())
    kept = np.asarray(mb.mask)[:, 0]
    size = np.abs(w).sum(axis=1, keepdims=True)
    projections = np.einsum("gnk,gn->gk", np.asarray(mb.basis), residual)
    assert np.all(np.abs(projections[kept]) <= 1e-9 * np.broadcast_to(size, kept.shape)[kept])
    assert np.all(np.asarray(mb.coords)[:, 0][kept] > 0)
    assert np.all(np.diff(np.where(kept, np.asarray(mb.coords)[:, 0], np.inf)[kept.all(1)]) >= 0)
    # No worse than the oracle, unless the noise of a residual that is zero chose its bases.
    for row, left in zip(w, residual, strict=True):
        matrix, coords, residuals = oracle(row, 4)
        if any(np.any(np.abs(r) < 1e-9) for r in residuals[1:]):
            continue
        best = np.sum((row - matrix @ coords) ** 2)
        assert np.sum(left**2) <= best + 2e-6 * np.sum(row**2)


def test_groups_are_independent_of_layout():
    w = np.random.default_rng(0).normal(size=(3, 3, 8, 4))
    with jax.enable_x64(True):
        for axes in (-2, (-4, -3), (-4, -3, -2), (-1, -3)):
            mb = sketch(jnp.asarray(w), bits=3, axes=axes)
            decoded = np.asarray(mb.decode())
            within = tuple(axis % 4 for axis in np.atleast_1d(axes))
            outer = [axis for axis in range(4) if axis not in within]
            one = w.transpose(*outer, *within).reshape(np.prod([w.shape[a] for a in outer]), -1)
            got = decoded.transpose(*outer, *within).reshape(one.shape)
            for row, value in zip(one, got, strict=True):
                matrix, coords, _ = oracle(row, 3)
                np.testing.assert_allclose(value, matrix @ coords, atol=1e-12)


def test_zero_and_constant_groups():
    w = jnp.stack([jnp.zeros(8), jnp.full(8, -0.25), jnp.arange(8.0), jnp.full(8, 1e-42)])
    mb = sketch(w, bits=4, axes=-1).validate()
    np.testing.assert_array_equal(np.asarray(mb.mask).sum(-1)[:, 0], [0, 1, 4, 0])
    np.testing.assert_allclose(mb.decode()[:3], w[:3], rtol=1e-6)
    huge = sketch(jnp.asarray([[1e30, -3e30, 2e30, 5e29]]), bits=4, axes=-1)
    assert np.all(np.isfinite(huge.decode()))
    np.testing.assert_allclose(huge.decode(), [[1e30, -3e30, 2e30, 5e29]], rtol=1e-5)


def test_bits_are_counted_as_in_section_5_4_1():
    rng = np.random.default_rng(0)
    tree = {
        "a": sketch(jnp.asarray(rng.normal(size=(40, 10)), jnp.float32), bits=4, axes=-2, blocks=2),
        "b": sketch(jnp.zeros((16, 4)).at[:, 0].set(0.5), bits=4, axes=-2),
        "bias": jnp.zeros(4),
    }
    kept = {name: int(np.count_nonzero(tree[name].mask)) for name in "ab"}
    assert kept == {"a": 80, "b": 1}
    assert qj.storage_bits(tree["a"]) == 20 * 80 + 32 * 80 + 3 * 20
    assert qj.storage_bits(tree) == qj.storage_bits(tree["a"]) + 16 + 32 + 4
    assert qj.average_bits(tree) == (20 * 80 + 16) / (400 + 64)
    with pytest.raises(ValueError, match="MultiBit"):
        qj.average_bits({"bias": jnp.zeros(4)})


@hypothesis.given(
    coords=st.lists(st.floats(0, 2, width=32), min_size=5, max_size=5),
    masked=st.lists(st.booleans(), min_size=5, max_size=5),
    x=st.lists(st.floats(-12, 12, width=32), min_size=6, max_size=6),
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_nearest_sum_beats_every_other(coords, masked, x):
    mask = ~np.asarray([masked])
    coords = np.where(mask, np.asarray([coords], np.float32), 0)
    x = np.asarray(x, np.float32)
    codes = nearest_codes(coords, mask, x)
    value = bases.values(bases.Bases(codes, jnp.asarray(coords), jnp.asarray(mask)))
    np.testing.assert_array_equal(value, nearest_value(coords, x))
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=5)))
    distances = np.abs(signs @ coords[0].astype(np.float64) - x[:, None].astype(np.float64))
    assert np.all(np.abs(np.asarray(value) - x) <= distances.min(axis=1) + 1e-5)
    assert np.all(np.asarray(codes)[:, None] >> np.nonzero(~mask[0])[0] & 1 == 1)


def test_update_is_the_least_squares_refit():
    w = np.random.default_rng(1).normal(size=(30, 4))
    with jax.enable_x64(True):
        quantizer = qj.multi_bit(3, axes=-2)
        params = {"kernel": jnp.asarray(w)}
        state = quantizer.init(params)
        encoded = quantizer.encode(params, state)["kernel"]
        slower = qj.multi_bit(3, axes=-2, momentum=0.5)
        both = quick.jit(lambda p, s: (quantizer.update(p, s), slower.update(p, s)))
        moved, half = both(params, state)
    for column in range(4):
        matrix = np.asarray(encoded.basis)[:, column].astype(float)
        best = np.linalg.lstsq(matrix, w[:, column], rcond=None)[0]
        np.testing.assert_allclose(moved.buffers["kernel"]["coords"][0, column], abs(best), 1e-5)
    old, new, between = (np.asarray(s.buffers["kernel"]["coords"]) for s in (state, moved, half))
    np.testing.assert_allclose(between, (old + new) / 2)


def test_blocks_train_what_they_ship():
    quantizer = qj.multi_bit(4, axes=-2, blocks=2)
    params = {"kernel": jnp.asarray(np.random.default_rng(2).normal(size=(32, 6)), jnp.float32)}
    state = quantizer.init(params)
    encoded = quantizer.encode(params, state)
    encoded["kernel"].validate()
    assert encoded["kernel"].coords.shape == (2, 1, 6, 4)
    applied = jax.jit(quantizer.apply)(params, state)
    np.testing.assert_array_equal(applied["kernel"], jax.jit(qj.decode)(encoded)["kernel"])
    total = quick.jit(jax.grad(lambda p: jnp.sum(2 * quantizer.apply(p, state)["kernel"])))
    gradient = total(params)
    np.testing.assert_array_equal(gradient["kernel"], np.full((32, 6), 2.0))


def test_is_a_target_of_psg():
    params = {"kernel": jnp.asarray(np.random.default_rng(4).normal(size=(16, 3)), jnp.float32)}
    quantizer = qj.multi_bit(2, -2, momentum=0.5)
    transform = qj.scale_by_position(quantizer, strength=3.0, eps=0.0)
    updates, state = quick.jit(transform.update)(
        {"kernel": jnp.ones((16, 3))}, transform.init(params), params
    )
    target = quantizer.apply(params, state.target)["kernel"]
    distance = np.abs(np.asarray(params["kernel"]) - np.asarray(target))
    np.testing.assert_allclose(updates["kernel"], 3 * distance, atol=1e-6)


def test_axes_by_leaf():
    by_rank = qj.multi_bit(2, axes=lambda path, leaf: (-4, -3) if leaf.ndim == 4 else -2)
    params = {"a": {"kernel": jnp.ones((5, 5, 2, 3))}, "b": {"kernel": jnp.ones((6, 3))}}
    state = jax.jit(by_rank.init)(params)
    shapes = [state.buffers[f"{x}/kernel"]["coords"].shape for x in "ab"]
    assert shapes == [(1, 1, 2, 3, 2), (1, 3, 2)]


def test_no_array_of_all_candidates_of_all_weights():
    w = jax.ShapeDtypeStruct((3, 3, 256, 64), jnp.float32)
    compiled = quick.jit(lambda w: qj.sketch(w, 8, -2)).lower(w).compile()
    # 2**8 floats per weight would be 256 times the leaf.
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 4 * np.prod(w.shape)


@pytest.mark.parametrize(
    ("bits", "axes", "blocks", "message"),
    [
        (0, -2, 1, "1..8, got 0"),
        (9, -2, 1, "1..8, got 9"),
        (True, -2, 1, "1..8"),
        (4, (0, -2), 1, "counted from the end"),
        (4, (), 1, "counted from the end"),
        (4, (-2, -2), 1, "repeated"),
        (4, -3, 1, "out of range"),
        (4, -2, 3, "do not divide"),
        (4, -2, 0, "blocks must be a whole number from 1"),
        (4, -2, 8, "groups of 1"),
    ],
)
def test_bad_arguments(bits, axes, blocks, message):
    with pytest.raises(ValueError, match=message):
        qj.sketch(jnp.ones((8, 4)), bits, axes, blocks=blocks)
    with pytest.raises(ValueError, match=message):
        qj.multi_bit(bits, axes, blocks=blocks).init({"kernel": jnp.ones((8, 4))})


def test_bad_state_and_data():
    quantizer = qj.multi_bit(2, axes=-2)
    state = quantizer.init({"kernel": jnp.ones((8, 4))})
    with pytest.raises(ValueError, match="another tree"):
        quantizer.apply({"kernel": jnp.ones((8, 5))}, state)
    for strange in (jnp.ones((8, 4), int), jnp.ones((8, 0))):
        with pytest.raises(ValueError, match="needs floats"):
            qj.sketch(strange, 2, -2)
    for axes in (1, (), (-2, 1)):
        with pytest.raises(ValueError, match="counted from the end"):
            qj.multi_bit(2, axes)
    for axes in (None, 1.0, "channel"):
        with pytest.raises(ValueError, match="counted from the end"):
            qj.sketch(jnp.ones((8, 4)), 2, axes)
    with pytest.raises(ValueError, match="NaN"):
        qj.sketch(jnp.full((8, 4), jnp.nan), 2, -2)
    with pytest.raises(ValueError, match=r"kernel: .*NaN"):
        quantizer.init({"kernel": jnp.full((8, 4), jnp.inf)})
    with pytest.raises(ValueError, match="partition"):
        qj.multi_bit(2, lambda path, leaf: -2, blocks=2)
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match="momentum"):
            qj.multi_bit(2, -2, momentum=momentum)
    with pytest.raises(ValueError, match="tol"):
        qj.sketch(jnp.ones((8, 4)), 2, -2, tol=1.0)
    assert multibit.TOLERANCE == 1e-6


# Axes by name, widths, abstract values, meshes


def kernels():
    rng = np.random.default_rng(0)
    return {
        "Conv_0": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)},
        "Embed_0": {"embedding": jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)},
        "query": {"kernel": jnp.asarray(rng.normal(size=(8, 2, 4)), jnp.float32)},
    }


@pytest.mark.parametrize(
    ("axes", "groups"),
    [
        ("channel", [(1, 1, 1, 4), (5, 1), (1, 1, 4)]),
        ("tensor", [(1, 1, 1, 1), (1, 1), (1, 1, 1)]),
        (None, [(1, 1, 1, 1), (1, 1), (1, 1, 1)]),
        ((-2,), [(3, 3, 1, 4), (1, 6), (8, 1, 4)]),
        (np.int64(-2), [(3, 3, 1, 4), (1, 6), (8, 1, 4)]),
        ({"query": -3, ".*kernel": "channel"}, [(1, 1, 1, 4), (1, 1), (1, 2, 4)]),
        (
            lambda path, leaf: -3 if path.startswith("query") else "channel",
            [(1, 1, 1, 4), (5, 1), (1, 2, 4)],
        ),
    ],
)
def test_groups_are_named_by_axes(axes, groups):
    params = kernels()
    quantizer = qj.multi_bit(np.int64(2), axes)
    state = quantizer.init(params)
    for mine, group in zip(state.buffers.values(), groups, strict=True):
        assert mine["coords"].shape == (*group, 2)
    decoded = qj.decode(quantizer.encode(params, state))
    jax.tree.map(np.testing.assert_array_equal, decoded, quick.jit(quantizer.apply)(params, state))


@pytest.mark.parametrize("axes", ["channel", {".*": -2}, lambda path, leaf: -2, None])
def test_blocks_need_plain_axes(axes):
    with pytest.raises(ValueError, match="blocks need plain axes"):
        qj.multi_bit(2, axes, blocks=2)


def test_names_that_are_none_and_groups_of_one():
    with pytest.raises(ValueError, match="'tensor' or 'channel', got 'rows'"):
        qj.multi_bit(2, "rows")
    with pytest.raises(ValueError, match="counted from the end"):
        qj.sketch(jnp.ones((4, 4)), 2, "channel")
    with pytest.raises(ValueError, match=r"Dense_0/kernel: groups of 1 elements"):
        qj.multi_bit(2, "channel").init({"Dense_0": {"kernel": jnp.ones((1, 4))}})


@pytest.mark.parametrize("bits", [1, 3])
def test_a_state_of_another_width_is_an_error(bits):
    params = kernels()
    quantizer = qj.multi_bit(2, "channel")
    state = qj.multi_bit(bits, "channel").init(params)
    for call in (quantizer.apply, quantizer.encode, quantizer.update):
        for fn in (call, jax.jit(call)):  # how many slots there are is no number but a shape
            with pytest.raises(ValueError, match=f"Conv_0/kernel: the state has {bits} bits.* 2"):
                fn(params, state)
        with pytest.raises(ValueError, match=r"Conv_0/kernel: .*another quantizer"):
            call(params, qj.uniform(2).init(params))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int8])
def test_kernels_that_are_no_floats_are_refused(dtype):
    params = {"Dense_0": {"kernel": jnp.ones((4, 4), dtype)}}
    with pytest.raises(ValueError, match=f"Dense_0/kernel: .*{jnp.dtype(dtype)}"):
        qj.multi_bit(2, "channel").init(params)
    with pytest.raises(ValueError, match=f"a sketch needs floats, got {jnp.dtype(dtype)}"):
        qj.sketch(params["Dense_0"]["kernel"], 2, -2)


def test_encode_jits_and_has_an_abstract_form():
    params = kernels()
    quantizer = qj.multi_bit(2, "channel")
    state = quantizer.init(params)
    eager = quantizer.encode(params, state)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(quantizer.encode)(params, state), eager)
    abstract = jax.eval_shape(quantizer.encode, params, state)
    assert jax.tree.structure(abstract) == jax.tree.structure(eager)


@pytest.mark.parametrize("blocks", [1, 4])
def test_sketch_and_encode_on_an_explicit_mesh(blocks):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    spread = jax.device_put(w, place)
    view = "4@a,4,6@b" if blocks > 1 else "16@a,6@b"
    group = "4@a,1,6@b" if blocks > 1 else "1,6@b"
    mb = qj.sketch(spread, 2, -2, blocks=blocks)
    assert str(jax.typeof(mb.basis)) == f"int8[{view},2]"
    assert str(jax.typeof(mb.coords)) == f"float32[{group},2]"
    alone = qj.sketch(w, 2, -2, blocks=blocks)
    np.testing.assert_array_equal(mb.basis, alone.basis)
    np.testing.assert_allclose(mb.coords, alone.coords, rtol=1e-5)
    quantizer = qj.multi_bit(2, -2, blocks=blocks)
    state = quantizer.init({"kernel": spread})
    assert str(jax.typeof(state.buffers["kernel"]["coords"])) == f"float32[{group},2]"
    moved = quick.jit(quantizer.update)({"kernel": spread}, state)
    encoded = quantizer.encode({"kernel": spread}, moved)["kernel"]
    assert str(jax.typeof(encoded.basis)) == f"int8[{view},2]"
    applied = quick.jit(quantizer.apply)({"kernel": spread}, moved)["kernel"]
    np.testing.assert_array_equal(jax.device_get(encoded).decode(), applied)
