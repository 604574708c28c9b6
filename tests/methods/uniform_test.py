"""Uniform grids against NumPy in float64: brute force over levels, ranges by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import quantjax as qj

cheap = settings(derandomize=True, deadline=None, max_examples=100)
# XLA flushes subnormal numbers to zero; a test of their own has them.
FLOATS = st.floats(-100, 100, width=32, allow_subnormal=False)
WEIGHTS = arrays(np.float32, (3, 4), elements=FLOATS)
STEPS = st.floats(2**-6, 2**6, width=32)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def farther_than_nearest(x, value, levels):
    """How much farther `value` lies from x than the nearest of `levels`."""
    x, value = np.float64(x)[..., None], np.float64(value)[..., None]
    return np.max(np.abs(x - value).min(-1) - np.abs(x - np.float64(levels)).min(-1))


# symmetric_step


@pytest.mark.parametrize("axes", [None, -1, (-2,), (-4, -3, -2), (-1, -2, -3, -4)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_symmetric_step(bits, axes):
    w = normal(3, 3, 2, 4)
    largest = np.max(np.abs(np.float64(w)), axis=axes, keepdims=True)
    step = qj.symmetric_step(w, bits, axes)
    assert step.shape == largest.shape
    np.testing.assert_allclose(step, largest / (2 ** (bits - 1) - 1), rtol=1e-6)


def test_symmetric_step_of_narrow_dtypes_is_float32():
    for dtype in (jnp.bfloat16, jnp.float16):
        assert qj.symmetric_step(normal(3, 3, dtype=dtype), 3).dtype == jnp.float32


# nearest

KINDS = {
    "signed": ({}, lambda b: range(-(2 ** (b - 1)), 2 ** (b - 1))),
    "unsigned": ({"signed": False}, lambda b: range(2**b)),
    "narrow": ({"narrow": True}, lambda b: range(1 - 2 ** (b - 1), 2 ** (b - 1))),
}


@pytest.mark.parametrize("kind", KINDS)
@cheap
@given(x=WEIGHTS, step=STEPS, bits=st.integers(1, 6))
def test_nearest_is_the_nearest_level_in_value(kind, x, step, bits):
    options, codes = KINDS[kind]
    bits = max(2, bits) if kind == "narrow" else bits
    value = np.asarray(qj.nearest(jnp.asarray(x), np.float32(step), bits=bits, **options))
    levels = np.float32(list(codes(bits))) * np.float32(step)
    assert np.all(np.isin(value, levels))
    # 1 / step is rounded: close to a border the other side may be chosen.
    assert farther_than_nearest(x, value, levels) <= 1e-6 * (np.abs(x).max() + step)


def test_nearest_at_ties_ends_and_one_bit():
    x = jnp.asarray([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(qj.nearest(x, 1.0, bits=8), [-2, -2, 0, 0, 2, 2])
    np.testing.assert_array_equal(qj.nearest(x, 1.0, bits=2), [-2, -2, 0, 0, 1, 1])
    np.testing.assert_array_equal(qj.nearest(x, 1.0, bits=2, narrow=True), [-1, -1, 0, 0, 1, 1])
    np.testing.assert_array_equal(qj.nearest(x, 1.0, bits=2, signed=False), [0, 0, 0, 0, 2, 2])
    np.testing.assert_array_equal(qj.nearest(x, 1.0, bits=1), [-1, -1, 0, 0, 0, 0])
    np.testing.assert_array_equal(qj.nearest(x, 1.0, bits=1, signed=False), [0, 0, 0, 0, 1, 1])


def test_nearest_passes_gradients_inside_the_grid_only():
    x = jnp.asarray([-9.0, -8.4, -7.6, 0.0, 6.9, 7.1, 90.0])
    grads = jax.grad(lambda x: qj.nearest(x, 1.0, bits=4).sum())(x)
    np.testing.assert_array_equal(grads, [0, 0, 1, 1, 1, 0, 0])
    step = jnp.full((1,), 0.5)
    slope = jax.grad(lambda s: qj.nearest(jnp.asarray([1.1]), s, bits=4).sum())(step)
    np.testing.assert_allclose(slope, [2 - 2.2], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_nearest_keeps_the_dtype_and_computes_in_float32(dtype):
    x = normal(200, dtype=dtype)
    value = qj.nearest(x, 0.01, bits=12)
    assert value.dtype == dtype
    expected = qj.nearest(x.astype(jnp.float32), 0.01, bits=12).astype(dtype)
    np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(
    ("bits", "options"),
    [(0, {}), (17, {}), (-3, {}), (2.0, {}), ("4", {}), (True, {}), (1, {"narrow": True})],
)
def test_bits_out_of_range(bits, options):
    with pytest.raises(ValueError, match=f"bits must be a whole number in .*got {bits!r}"):
        qj.nearest(jnp.ones(3), 1.0, bits=bits, **options)


def test_narrow_needs_signed():
    with pytest.raises(ValueError, match="narrow=True needs signed=True"):
        qj.nearest(jnp.ones(3), 1.0, bits=4, narrow=True, signed=False)


# uniform


def params_of(*leaves):
    return {f"Dense_{i}": {"kernel": leaf} for i, leaf in enumerate(leaves)}


def fitted(quantizer, leaf):
    params = params_of(leaf)
    state = quantizer.init(params)
    return params, state, state.buffers["Dense_0/kernel"]


@cheap
@given(w=WEIGHTS, bits=st.integers(2, 8), axis=st.sampled_from([None, -1, -2]))
def test_uniform_rounds_to_the_nearest_level_of_its_range(w, bits, axis):
    quantizer = qj.uniform(bits, axes=axis)
    params, state, buffers = fitted(quantizer, jnp.asarray(w))
    limit = 2 ** (bits - 1) - 1
    low = np.minimum(np.min(np.float64(w), axis=axis, keepdims=True), 0)
    high = np.maximum(np.max(np.float64(w), axis=axis, keepdims=True), 0)
    np.testing.assert_array_equal(buffers["low"], low)
    np.testing.assert_array_equal(buffers["high"], high)
    np.testing.assert_array_equal(buffers["limit"], np.full_like(low, limit))
    step = np.maximum(-low, high) / limit
    step = np.where(step < np.finfo(np.float32).tiny, 1, step)
    np.testing.assert_allclose(buffers["step"], step, rtol=1e-6)
    value = quantizer.apply(params, state)["Dense_0"]["kernel"]
    levels = np.arange(-limit, limit + 1) * np.float64(buffers["step"])[..., None]
    worst = farther_than_nearest(w, value, np.broadcast_to(levels, (*w.shape, 2 * limit + 1)))
    assert worst <= 1e-6 * (1 + np.abs(w).max())
    grid = quantizer.encode(params, state)["Dense_0"]["kernel"].validate()
    assert (grid.bits, grid.dtype) == (bits, w.dtype)
    spanned = np.abs(w).max() >= limit * np.finfo(np.float32).tiny
    assert np.abs(grid.codes).max() == (limit if spanned else 0)  # narrow, and used to its ends
    np.testing.assert_array_equal(grid.decode(), value)


def test_axes_as_a_function_and_one_step_for_biases():
    def axes(path, leaf):
        return -2 if path.startswith("Dense_0") else tuple(range(-leaf.ndim, 0))

    params = {
        "Dense_0": {"kernel": normal(3, 4), "bias": normal(4)},
        "Dense_1": {"kernel": normal(5, 2), "bias": normal(2)},
    }
    state = qj.uniform(3, axes=axes, biases=True).init(params)
    shapes = {path: buffers["step"].shape for path, buffers in state.buffers.items()}
    assert shapes == {
        "Dense_0/kernel": (1, 4),
        "Dense_0/bias": (1,),
        "Dense_1/kernel": (1, 1),
        "Dense_1/bias": (1,),
    }
    step = state.buffers["Dense_0/bias"]["step"]
    np.testing.assert_allclose(step[0], np.abs(params["Dense_0"]["bias"]).max() / 3, rtol=1e-6)


@pytest.mark.parametrize("momentum", [None, 0.1, 1.0])
@pytest.mark.parametrize("axes", [None, -2])
def test_update_follows_the_range(momentum, axes):
    quantizer = qj.uniform(4, axes=axes, momentum=momentum)
    leaves = [(seed + 1) * normal(6, 5, seed=seed) for seed in range(5)]
    _, state, _ = fitted(quantizer, leaves[0])
    kept = {"axis": axes, "keepdims": True}
    low, high = np.min(np.float64(leaves[0]), **kept), np.max(np.float64(leaves[0]), **kept)
    share = 1.0 if momentum is None else momentum
    for leaf in leaves[1:]:
        state = jax.jit(quantizer.update)(params_of(leaf), state)
        low = share * np.min(np.float64(leaf), **kept) + (1 - share) * low
        high = share * np.max(np.float64(leaf), **kept) + (1 - share) * high
        buffers = state.buffers["Dense_0/kernel"]
        np.testing.assert_allclose(buffers["low"], low, rtol=1e-5)
        np.testing.assert_allclose(buffers["high"], high, rtol=1e-5)
        np.testing.assert_allclose(buffers["step"], np.maximum(-low, high) / 7, rtol=1e-5)


def test_the_grid_stays_where_it_is_until_it_is_updated():
    quantizer = qj.uniform(3)
    params, state, buffers = fitted(quantizer, normal(6, 5))
    far = jax.tree.map(lambda leaf: 10 * leaf, params)
    value, pull = jax.vjp(lambda p: quantizer.apply(p, state)["Dense_0"]["kernel"], far)
    bound = 3 * np.float32(buffers["step"])
    w = far["Dense_0"]["kernel"]
    assert np.abs(value).max() == bound
    (grads,) = pull(jnp.ones_like(value))
    np.testing.assert_array_equal(grads["Dense_0"]["kernel"], np.abs(w) <= bound)


@pytest.mark.parametrize("scale", [0.0, 1e-42])
def test_a_leaf_without_range_has_step_one(scale):
    quantizer = qj.uniform(4)
    params, state, buffers = fitted(quantizer, scale * jnp.ones((2, 3)))
    np.testing.assert_array_equal(buffers["step"], [[1.0]])
    moved = quantizer.update(params, state)
    np.testing.assert_array_equal(moved.buffers["Dense_0/kernel"]["step"], [[1.0]])
    assert not quantizer.apply(params, state)["Dense_0"]["kernel"].any()
    assert not quantizer.encode(params, state)["Dense_0"]["kernel"].validate().codes.any()


@pytest.mark.usefixtures("few_programs")
def test_one_program_serves_all_widths():
    params = params_of(normal(4, 5))
    one = qj.uniform(4)
    apply, update = jax.jit(one.apply), jax.jit(one.update)
    for bits in (2, 3, 8, 16):
        own = qj.uniform(bits)
        state = own.init(params)
        for mine, others in (
            (apply(params, state), jax.jit(own.apply)(params, state)),
            (update(params, state), jax.jit(own.update)(params, state)),
        ):
            jax.tree.map(np.testing.assert_array_equal, mine, others)
        assert own.encode(params, state)["Dense_0"]["kernel"].bits == bits
    assert apply._cache_size() == update._cache_size() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, r"bits must be a whole number in 2\.\.16, got 1"),
        ({"bits": 17}, "got 17"),
        ({"bits": 4.0}, "got 4.0"),
        ({"bits": 4, "momentum": 0.0}, r"momentum must be in \(0, 1\], got 0.0"),
        ({"bits": 4, "momentum": 1.5}, "got 1.5"),
        ({"bits": 4, "momentum": float("nan")}, "got nan"),
        ({"bits": 4, "axes": 0}, r"counted from the end.*got \(0,\)"),
        ({"bits": 4, "axes": (-1, 1)}, r"got \(-1, 1\)"),
        ({"bits": 4, "axes": (-1.0,)}, "counted from the end"),
    ],
)
def test_bad_arguments_raise_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        qj.uniform(**arguments)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (-3, "out of range for a leaf of shape"),
        (lambda path, leaf: 0, "counted from the end"),
    ],
)
def test_axes_that_do_not_fit_a_leaf_name_it(axes, message):
    with pytest.raises(ValueError, match=f"Dense_0/kernel: .*{message}"):
        qj.uniform(4, axes=axes).init(params_of(normal(2, 3)))


def test_the_step_takes_axes_by_name():
    w = normal(3, 4, 5)
    np.testing.assert_array_equal(
        qj.symmetric_step(w, np.int8(8), "channel"), qj.symmetric_step(w, 8, (-3, -2))
    )
    np.testing.assert_array_equal(qj.symmetric_step(w, 4, "tensor"), qj.symmetric_step(w, 4))


# zero


def test_zero_sends_owned_leaves_to_zero_and_has_no_grid():
    params = {"Dense_0": {"kernel": normal(2, 3, dtype=jnp.bfloat16), "bias": normal(3)}}
    state = qj.zero().init(params)
    assert state == ({}, {"Dense_0/kernel": {}})
    for tree in (qj.zero().apply(params, state), qj.zero().encode(params, state)):
        assert tree["Dense_0"]["bias"] is params["Dense_0"]["bias"]
        np.testing.assert_array_equal(tree["Dense_0"]["kernel"], jnp.zeros((2, 3), jnp.bfloat16))
        assert tree["Dense_0"]["kernel"].dtype == jnp.bfloat16


# the step of least squared error


@pytest.mark.parametrize("axes", [None, "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fit_error_is_never_worse_than_the_range_and_is_kept(bits, axes):
    w = normal(40, 30)
    errors = {}
    for fit in ("max", "error"):
        quantizer = qj.uniform(bits, axes=axes, fit=fit)
        params, state, buffers = fitted(quantizer, w)
        value = np.float64(quantizer.apply(params, state)["Dense_0"]["kernel"])
        errors[fit] = np.sum((value - np.float64(w)) ** 2, axis=0 if axes else None)
        grid = quantizer.encode(params, state)["Dense_0"]["kernel"].validate()
        np.testing.assert_array_equal(grid.decode(), np.float32(value))
    assert np.all(errors["error"] <= errors["max"] * (1 + 1e-6))
    if bits <= 4:
        assert errors["error"].sum() < (0.95 if axes else 0.7) * errors["max"].sum()
    assert set(buffers) == {"limit", "step"}
    moved = quantizer.update(params_of(3 * w), state)
    jax.tree.map(np.testing.assert_array_equal, moved, state)


def test_fit_error_is_found_in_jit_as_without():
    params = params_of(normal(6, 5))
    quantizer = qj.uniform(3, fit="error")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        jax.jit(quantizer.init)(params),
        quantizer.init(params),
    )


def test_fits_do_not_mix():
    params = params_of(normal(6, 5))
    by_range, by_error = qj.uniform(3), qj.uniform(3, fit="error")
    for mine, other in ((by_range, by_error), (by_error, by_range)):
        with pytest.raises(ValueError, match="another quantizer"):
            mine.apply(params, other.init(params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "mse"}, r"fit must be one of \('max', 'error'\), got 'mse'"),
        ({"fit": "error", "momentum": 0.1}, "momentum=0.1 needs fit='max'"),
    ],
)
def test_unknown_fits(options, message):
    with pytest.raises(ValueError, match=message):
        qj.uniform(4, **options)
