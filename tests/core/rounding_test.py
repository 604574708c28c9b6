import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from quantjax.core import rounding

cheap = settings(derandomize=True, deadline=None, max_examples=100)
WEIGHTS = arrays(np.float32, (8,), elements=st.floats(-100, 100, width=32))
STEPS = st.floats(2**-7, 2**7, width=32)
LOW, HIGH = -8.0, 7.0


def reference(x, step, low, high):
    """Value, d/dx and d/dstep in float64, from the formulas of straight-through estimation."""
    scaled = np.float64(x) / np.float64(step)
    inside = (scaled >= low) & (scaled <= high)
    codes = np.rint(np.clip(scaled, low, high))
    return codes * np.float64(step), 1.0 * inside, np.where(inside, codes - scaled, codes)


def test_ties_go_to_the_even_code():
    x = jnp.arange(-4, 4) + 0.5
    codes = rounding.to_codes(x, jnp.float32(1.0), -10, 10)
    np.testing.assert_array_equal(codes, [-4, -2, -2, 0, 0, 2, 2, 4])


@pytest.mark.parametrize("x", [-0.0, -0.3, -1e-30, 0.0])
def test_there_is_no_negative_zero(x):
    for step in (1.0, 0.7):
        x, step = jnp.float32(x), jnp.float32(step)
        assert not np.signbit(rounding.to_codes(x, step, LOW, HIGH))
        assert not np.signbit(rounding.nearest_on_grid(x, step, LOW, HIGH))
        assert not np.signbit(jax.jit(rounding.nearest_on_grid)(x, step, -0.0, 3.0))


@cheap
@given(x=WEIGHTS, step=STEPS)
def test_codes_are_whole_within_bounds_and_nearest(x, step):
    codes = np.asarray(rounding.to_codes(jnp.asarray(x), jnp.float32(step), LOW, HIGH))
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert codes.min() >= LOW
    assert codes.max() <= HIGH
    levels = np.arange(LOW, HIGH + 1) * np.float64(step)
    distances = np.abs(np.float64(x)[:, None] - levels)
    chosen = np.abs(np.float64(x) - codes * np.float64(step))
    # Near a border, 1 / step rounds: what is chosen may be farther by that much.
    assert np.all(chosen <= distances.min(axis=1) + 1e-6 * (np.abs(x) + step))
    np.testing.assert_array_equal(
        rounding.nearest_on_grid(jnp.asarray(x), jnp.float32(step), LOW, HIGH),
        codes * np.float32(step),
    )


@cheap
@given(x=WEIGHTS, step=STEPS)
def test_gradients_against_their_formulas(x, step):
    x, step = jnp.asarray(x), jnp.full((1,), step, jnp.float32)
    scaled = np.asarray(x * (1 / step))
    border = np.abs(np.abs(scaled - np.rint(scaled)) - 0.5) < 1e-4
    bound = np.minimum(np.abs(scaled - LOW), np.abs(scaled - HIGH)) < 1e-4
    sure = ~(border | bound)  # elsewhere float32 and float64 may choose different sides
    value, dx, dstep = reference(x, step, LOW, HIGH)
    actual, vjp = jax.vjp(lambda x, step: rounding.nearest_on_grid(x, step, LOW, HIGH), x, step)
    np.testing.assert_allclose(actual[sure], value[sure], rtol=1e-6)
    np.testing.assert_array_equal(vjp(jnp.ones(8))[0][sure], dx[sure])
    for i in np.flatnonzero(sure):
        (slope,) = vjp(jnp.zeros(8).at[i].set(1.0))[1]  # one weight's share in the step's gradient
        np.testing.assert_allclose(slope, dstep[i], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("x", "dx", "dstep"),
    [
        (0.75 * 7, 1.0, 0.0),  # on the bound is inside
        (-0.75 * 8, 1.0, 0.0),
        (0.75 * 7.25, 0.0, 7.0),
        (-0.75 * 8.25, 0.0, -8.0),
        (0.75 * 2.25, 1.0, -0.25),
        (0.75 * 2.75, 1.0, 0.25),
        (1e30, 0.0, 7.0),
        (-1e30, 0.0, -8.0),
    ],
)
def test_gradients_at_chosen_points(x, dx, dstep):
    grads = jax.grad(rounding.nearest_on_grid, argnums=(0, 1, 2, 3))(x, 0.75, LOW, HIGH)
    np.testing.assert_allclose(grads, [dx, dstep, 0, 0], atol=1e-6)  # the bounds get none


def test_far_outside_the_grid_the_value_is_its_last_level():
    x = jnp.asarray([1e30, -1e30, jnp.inf, -jnp.inf])
    value = rounding.nearest_on_grid(x, jnp.float32(0.1), LOW, HIGH)
    np.testing.assert_array_equal(value, np.float32(0.1) * np.float32([7, -8, 7, -8]))


def test_steps_broadcast_and_collect_the_gradients_of_their_group():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    step = jnp.asarray([[0.25, 0.3, 0.5]])
    grads = jax.grad(lambda s: rounding.nearest_on_grid(x, s, LOW, HIGH).sum())(step)
    expected = reference(x, step, LOW, HIGH)[2].sum(axis=0, keepdims=True)
    np.testing.assert_allclose(grads, expected, rtol=1e-5, atol=1e-6)


def test_two_compiled_programs_agree_bit_for_bit_on_half_way_values():
    rng = np.random.default_rng(0)
    step = np.float32(rng.uniform(1e-3, 1e-1, 50))[None, :]
    x = np.float32((rng.integers(-9, 9, (400, 50)) + 0.5) * step)

    @jax.jit
    def trained(x, step):  # among other arithmetic that may be fused with it
        w = x * 2.0 / 2.0
        return jnp.tanh(w), rounding.nearest_on_grid(w, step, LOW, HIGH)

    @jax.jit
    def encode(x, step):
        return rounding.to_codes(x, step, LOW, HIGH).astype(jnp.int8)

    @jax.jit
    def decode(codes, step):
        return codes.astype(step.dtype) * step

    shipped = decode(encode(x, step), step)
    value = np.asarray(trained(x, step)[1])
    np.testing.assert_array_equal(value.view(np.uint32), np.asarray(shipped).view(np.uint32))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32")],
)
def test_arithmetic_is_in_float32_or_wider(dtype, expected):
    assert rounding.work_dtype(jnp.dtype(dtype)) == expected
    with jax.enable_x64(True):
        assert rounding.work_dtype(jnp.dtype("float64")) == "float64"
