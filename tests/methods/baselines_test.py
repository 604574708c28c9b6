"""Binary, ternary and DoReFa weights, PACT's and DoReFa's inputs, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import quantjax as qj

PATH = "Dense_0/kernel"
cheap = settings(derandomize=True, deadline=None, max_examples=60)
WEIGHTS = arrays(np.float32, (4, 6), elements=st.floats(-4, 4, width=32, allow_subnormal=False))


def params_of(leaf):
    return {"Dense_0": {"kernel": jnp.asarray(leaf)}}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def value_of(quantizer, w):
    params = params_of(w)
    state = quantizer.init(params)
    value = quantizer.apply(params, state)["Dense_0"]["kernel"]
    encoded = quantizer.encode(params, state)["Dense_0"]["kernel"].validate()
    np.testing.assert_array_equal(encoded.decode(), value)
    return np.asarray(value), encoded


def gradient_of(quantizer, w):
    params, state = params_of(w), quantizer.init(params_of(w))
    grads = jax.grad(lambda p: quantizer.apply(p, state)["Dense_0"]["kernel"].sum())(params)
    return np.asarray(grads["Dense_0"]["kernel"])


# binary


@cheap
@given(w=WEIGHTS, axes=st.sampled_from([None, "channel", -1]))
def test_binary_is_the_sign_times_the_mean_magnitude(w, axes):
    value, encoded = value_of(qj.binary(axes=axes), w)
    over = {None: None, "channel": 0, -1: -1}[axes]
    size = np.abs(np.float64(w)).mean(axis=over, keepdims=True)
    np.testing.assert_allclose(value, np.where(w < 0, -1, 1) * size, rtol=1e-6, atol=1e-30)
    assert isinstance(encoded, qj.MultiBit)
    assert encoded.coords.shape[-1] == 1


def test_binary_has_the_least_error_of_one_bit():
    w = normal(50, 7)
    value, _ = value_of(qj.binary(axes=None), w)
    best = np.sum((value - w) ** 2)
    for scale in (0.9, 1.1):
        assert best < np.sum((scale * value - w) ** 2)
    sketched, _ = value_of(qj.multi_bit(1, (-2, -1)), w)
    np.testing.assert_allclose(value, sketched, rtol=1e-5)


# ternary


@cheap
@given(w=WEIGHTS, threshold=st.floats(0.3, 1.2), axes=st.sampled_from([None, "channel"]))
def test_ternary_is_twn(w, threshold, axes):
    """Eq. 5 and 6: the threshold from the mean, the scale from what lies above it."""
    value, encoded = value_of(qj.ternary(threshold, axes=axes), w)
    over = 0 if axes else None
    size = np.abs(np.float64(w))
    delta = threshold * size.mean(axis=over, keepdims=True)
    if np.any(np.abs(size - delta) < 1e-6 * (1 + delta)):
        return  # float32 decides
    kept = size > delta
    total = np.where(kept, size, 0).sum(axis=over, keepdims=True)
    scale = total / np.maximum(kept.sum(axis=over, keepdims=True), 1)
    np.testing.assert_allclose(value, np.sign(w) * kept * scale, rtol=1e-5, atol=1e-30)
    assert set(np.unique(encoded.codes)) <= {-1, 0, 1}


def test_absmean_is_round_and_clip():
    w = normal(30, 20)
    value, _ = value_of(qj.ternary(0.5, scale="all"), w)
    scale = np.abs(np.float64(w)).mean()
    np.testing.assert_allclose(value, np.clip(np.round(w / scale), -1, 1) * scale, rtol=1e-5)


def test_update_takes_scales_of_the_present_weights():
    for quantizer in (qj.binary(), qj.ternary(), qj.ternary(0.5, scale="all"), qj.dorefa(3)):
        first, later = params_of(normal(6, 5)), params_of(3 * normal(6, 5, seed=1))
        moved = jax.jit(quantizer.update)(later, quantizer.init(first))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, quantizer.init(later)
        )


@pytest.mark.parametrize("make", [qj.binary, qj.ternary, lambda: qj.dorefa(1)])
def test_gradients_are_straight_through(make):
    np.testing.assert_array_equal(gradient_of(make(), 5 * normal(6, 5)), np.ones((6, 5)))


# DoReFa


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_dorefa_of_eq_9(bits):
    with jax.enable_x64(True):
        w = normal(40, 30, dtype=np.float64)
        value, encoded = value_of(qj.dorefa(bits), w)
        n = 2**bits - 1
        squeezed = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
        np.testing.assert_allclose(value, 2 * np.round(squeezed * n) / n - 1, atol=1e-12)
        assert encoded.bits == bits
        slope = (1 - np.tanh(w) ** 2) / np.abs(np.tanh(w)).max()
        np.testing.assert_allclose(gradient_of(qj.dorefa(bits), w), slope, rtol=1e-9)


def test_dorefa_of_one_bit_is_eq_7():
    w = normal(40, 30)
    value, _ = value_of(qj.dorefa(1), w)
    np.testing.assert_allclose(value, np.sign(w) * np.abs(w).mean(), rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_dorefa_inputs(bits):
    x = jnp.asarray(normal(200) + 0.5)
    quantizer = qj.dorefa_input(bits)
    state = quantizer.init(x)
    n = 2**bits - 1
    np.testing.assert_allclose(
        quantizer.apply(x, state)[0], np.round(np.clip(x, 0, 1) * n) / n, atol=1e-6
    )
    slope = jax.grad(lambda x: quantizer.apply(x, state)[0].sum())(x)
    np.testing.assert_array_equal(slope, (x >= 0) & (x <= 1))


# PACT


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("signed", [False, True])
def test_pact_values_and_gradients(bits, signed):
    """Eq. 1 to 3, and the L2 term of its section 3."""
    if signed and bits == 1:
        pytest.skip("three levels take two bits")
    with jax.enable_x64(True):
        x, cotangent = 2 * normal(60, dtype=np.float64), normal(60, seed=1, dtype=np.float64)
        decay, bound = 0.01, 1.5
        quantizer = qj.pact_input(bits, decay=decay, signed=signed)
        state = quantizer.init(jnp.asarray(x))
        largest = np.abs(x).max() if signed else x.max()
        np.testing.assert_allclose(state.learned["clip"], largest)

        def total(x, bound):
            state_of = state._replace(learned={"clip": bound})
            return jnp.sum(cotangent * quantizer.apply(x, state_of)[0])

        places = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        clipped = np.clip(x, -bound if signed else 0, bound)
        value = quantizer.apply(
            jnp.asarray(x), state._replace(learned={"clip": bound * jnp.ones(())})
        )[0]
        np.testing.assert_allclose(value, np.round(clipped * places / bound) * bound / places)
        by_x, by_bound = jax.grad(total, (0, 1))(jnp.asarray(x), jnp.asarray(bound))
        np.testing.assert_allclose(by_x, cotangent * (clipped == x))
        slope = np.where(x >= bound, 1, np.where(signed & (x <= -bound), -1, 0))
        np.testing.assert_allclose(by_bound, np.sum(cotangent * slope) + decay * bound)


def test_pact_starts_where_it_is_told_and_finds_signs():
    x = jnp.asarray([-1.0, 0.5, 2.0])
    assert qj.pact_input(4, clip=6.0).init(x).learned["clip"] == 6
    assert qj.pact_input(4).init(x).buffers["low"] == -7
    assert qj.pact_input(4).init(jnp.abs(x)).buffers["low"] == 0
    assert qj.pact_input(4).init(jnp.zeros(3)).learned["clip"] == 1


def test_a_bound_below_zero_grows_again():
    x = jnp.asarray([0.5, 2.0])
    quantizer = qj.pact_input(4, decay=0.0)
    state = quantizer.init(x)

    def loss(bound):
        x_hat, _ = quantizer.apply(x, state._replace(learned={"clip": bound}))
        return jnp.sum((x_hat - x) ** 2)

    bound = jnp.asarray(-0.1)
    for _ in range(100):
        bound = bound - 0.05 * jax.grad(loss)(bound)
    assert bound > 1.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qj.ternary(0.0), "threshold must be positive, got 0"),
        (lambda: qj.ternary(scale="mean"), "scale must be one of"),
        (lambda: qj.binary(axes="rows"), "axes by name"),
        (lambda: qj.dorefa(0), "bits must be a whole number in 1..8"),
        (lambda: qj.dorefa_input(17), "bits"),
        (lambda: qj.pact_input(1, signed=True), "bits must be a whole number in 2..8"),
        (lambda: qj.pact_input(1), "bits must be a whole number in 2..8"),
        (lambda: qj.pact_input(2, clip=-1.0), "clip must be positive"),
        (lambda: qj.pact_input(2, decay=-1.0), "decay must be finite and >= 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
