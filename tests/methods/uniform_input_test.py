"""The asymmetric grid of layer inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import quantjax as qj

cheap = settings(derandomize=True, deadline=None, max_examples=100)
FLOATS = st.floats(-100, 100, width=32, allow_subnormal=False)
INPUTS = arrays(np.float32, (3, 4), elements=FLOATS)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def grid_of(state):
    return {name: float(value) for name, value in state.buffers.items()}


@cheap
@given(x=INPUTS, bits=st.integers(1, 8))
def test_values_lie_on_a_grid_that_holds_zero(x, bits):
    quantizer = qj.uniform_input(bits)
    state = quantizer.init(jnp.asarray(x))
    grid = grid_of(state)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    assert (grid["low"], grid["high"], grid["levels"]) == (low, high, 2**bits - 1)
    if high - low > 1e-30:
        np.testing.assert_allclose(grid["step"], (high - low) / (2**bits - 1), rtol=1e-6)
        np.testing.assert_allclose(grid["zero_point"], -low / grid["step"], atol=0.5001)
    assert grid["zero_point"] == round(grid["zero_point"])
    assert 0 <= grid["zero_point"] <= 2**bits - 1
    with_zero = np.append(x.ravel(), np.float32(0))
    value = np.asarray(quantizer.apply(jnp.asarray(with_zero), state)[0])
    assert value[-1] == 0
    assert not np.signbit(value[-1])
    levels = (np.arange(2**bits) - grid["zero_point"]) * grid["step"]
    off = np.abs(value[:, None] - levels)
    assert off.min(axis=1).max() <= 1e-6 * np.abs(levels).max()
    best = np.abs(np.float64(with_zero)[:, None] - levels).min(axis=1)
    chosen = np.abs(np.float64(with_zero) - value)
    assert np.all(chosen <= best + 2e-6 * (np.abs(levels).max() + grid["step"]))


@pytest.mark.parametrize(
    ("x", "zero_point"),
    [([0.0, 1.0, 3.0], 0), ([2.0, 3.0], 0), ([-1.0, 0.0, -3.0], 15), ([-2.0, -3.0], 15)],
)
def test_one_sided_data_spend_all_codes_on_their_side(x, zero_point):
    quantizer = qj.uniform_input(4)
    x = jnp.asarray(x)
    state = quantizer.init(x)
    assert grid_of(state)["zero_point"] == zero_point
    assert grid_of(state)["step"] == np.float32(3 / 15)
    np.testing.assert_allclose(quantizer.apply(x, state)[0], x, atol=1e-6)


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0, 1e-42])
def test_constant_batches(value):
    quantizer = qj.uniform_input(3)
    x = jnp.full((4, 2), value)
    x_hat, state = quantizer.apply(x, quantizer.init(x), update=True)
    np.testing.assert_allclose(x_hat, x, atol=1e-6)
    assert np.isfinite(list(grid_of(state).values())).all()
    if abs(value) < 1:
        assert grid_of(state)["step"] == 1  # there is no range


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_the_running_range(momentum):
    quantizer = qj.uniform_input(4, momentum=momentum)
    batches = [(seed + 1) * normal(8, 3, seed=seed) + seed for seed in range(4)]
    state = quantizer.init(batches[0])
    low, high = np.float64(batches[0].min()), np.float64(batches[0].max())
    step = jax.jit(lambda x, state: quantizer.apply(x, state, update=True))
    for batch in batches[1:]:
        x_hat, state = step(batch, state)
        # The range includes zero, of the batch as of the mean.
        low = momentum * min(0, float(batch.min())) + (1 - momentum) * low
        high = momentum * max(0, float(batch.max())) + (1 - momentum) * high
        grid = grid_of(state)
        np.testing.assert_allclose([grid["low"], grid["high"]], [low, high], rtol=1e-5)
        np.testing.assert_allclose(grid["step"], (high - low) / 15, rtol=1e-5)
        assert grid["zero_point"] == np.rint(-low / ((high - low) / 15))
        # A batch is quantized in the range that it has moved.
        np.testing.assert_allclose(x_hat, quantizer.apply(batch, state)[0], atol=1e-6)
    assert step._cache_size() == 1


def test_without_update_the_state_stays():
    quantizer = qj.uniform_input(4)
    state = quantizer.init(normal(8, 3))
    for key in (None, jax.random.key(0)):
        _, after = quantizer.apply(10 * normal(8, 3, seed=1), state, key=key)
        assert after.buffers is state.buffers
        assert after.learned == {}


def test_gradients_pass_inside_the_grid_and_not_through_the_range():
    quantizer = qj.uniform_input(4, momentum=0.5)
    state = quantizer.init(jnp.asarray([-1.0, 2.0]))
    x = jnp.asarray([-1.5, -0.9, 0.0, 1.9, 2.5])

    def total(x, update):
        return quantizer.apply(x, state, update=update)[0].sum()

    np.testing.assert_array_equal(jax.grad(total)(x, False), [0, 1, 1, 1, 0])
    # Now from -1.25 to 2.25, its codes from -1.1667 on; the extremes, too, get 0 or 1.
    np.testing.assert_array_equal(jax.grad(total)(x, True), [0, 1, 1, 1, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_kept_and_ranges_are_float32(dtype):
    quantizer = qj.uniform_input(8)
    x = normal(50, 2).astype(dtype)
    x_hat, state = quantizer.apply(x, quantizer.init(x), update=True)
    assert x_hat.dtype == dtype
    assert {value.dtype for value in state.buffers.values()} == {jnp.dtype("float32")}
    assert {value.shape for value in state.buffers.values()} == {()}
    wide = quantizer.apply(x.astype(jnp.float32), state)[0]
    np.testing.assert_array_equal(x_hat, wide.astype(dtype))


@pytest.mark.usefixtures("few_programs")
def test_one_program_serves_all_widths():
    x = normal(8, 3)
    apply = jax.jit(lambda x, state: qj.uniform_input(4).apply(x, state, update=True))
    for bits in (1, 2, 8):
        own = qj.uniform_input(bits)
        state = own.init(x)
        expected = jax.jit(lambda x, state, own=own: own.apply(x, state, update=True))(x, state)
        jax.tree.map(np.testing.assert_array_equal, apply(x, state), expected)
    assert apply._cache_size() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, r"in 1\.\.16, got 0"),
        ({"bits": 17}, "got 17"),
        ({"bits": 4, "momentum": 0}, r"momentum must be in \(0, 1\], got 0"),
        ({"bits": 4, "momentum": -0.1}, "got -0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        qj.uniform_input(**arguments)


# other ranges than the whole one


def squared_error(quantizer, x, state):
    return float(np.sum((np.float64(quantizer.apply(x, state)[0]) - np.float64(x)) ** 2))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["relu", "normal", "gelu"])
def test_fit_error_cuts_what_reaches_too_far(kind, bits):
    x = {"relu": jax.nn.relu, "normal": lambda x: x, "gelu": jax.nn.gelu}[kind](normal(400, 20))
    whole, cut = qj.uniform_input(bits), qj.uniform_input(bits, fit="error")
    state = cut.init(x)
    assert squared_error(cut, x, state) <= 1.001 * squared_error(whole, x, whole.init(x))
    best = np.inf
    farthest = float(jnp.max(jnp.abs(x)))
    for fraction in np.geomspace(1, 1 / 64, 200):
        tried = whole.init(jnp.clip(x, -fraction * farthest, fraction * farthest))
        best = min(best, squared_error(whole, x, tried))
    assert squared_error(cut, x, state) <= 1.05 * best
    if kind == "relu":
        assert state.buffers["zero_point"] == 0


def test_fit_as_a_percentile():
    x = jnp.arange(1001.0) - 200
    state = qj.uniform_input(8, fit=99.0).init(x)
    np.testing.assert_allclose(state.buffers["low"], -190, atol=2)
    np.testing.assert_allclose(state.buffers["high"], 790, atol=2)
    one_sided = qj.uniform_input(8, fit=90.0).init(jnp.abs(x))
    assert one_sided.buffers["low"] == 0


@pytest.mark.parametrize("fit", ["error", 99.0])
def test_other_fits_are_running_means_over_passes(fit):
    quantizer = qj.uniform_input(4, fit=fit, momentum=0.25)
    batches = [(seed + 1) * normal(200, 3, seed=seed) for seed in range(3)]
    state = quantizer.init(batches[0])
    low, high = state.buffers["low"], state.buffers["high"]
    for x in batches[1:]:
        alone = quantizer.init(x).buffers
        low, high = 0.75 * low + 0.25 * alone["low"], 0.75 * high + 0.25 * alone["high"]
        state = jax.jit(lambda x, s: quantizer.apply(x, s, update=True)[1])(x, state)
        np.testing.assert_allclose(state.buffers["low"], low, rtol=1e-5)
        np.testing.assert_allclose(state.buffers["high"], high, rtol=1e-5)


@pytest.mark.parametrize("fit", ["range ", "max", 50, 100.0, 0.99])
def test_unknown_fits(fit):
    with pytest.raises(ValueError, match="fit "):
        qj.uniform_input(4, fit=fit)


def test_fits_do_not_mix():
    x = normal(20, 3)
    with pytest.raises(ValueError, match="another quantizer"):
        qj.uniform_input(4).apply(x, qj.uniform_input(4, fit="error").init(x))
    with pytest.raises(ValueError, match="another quantizer"):
        qj.uniform_input(4, fit="error").apply(x, qj.uniform_input(4).init(x))
