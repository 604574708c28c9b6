"""RQ beside equations 1 and 2 in float64 NumPy, from given Gumbel noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import quantjax as qj
from quantjax.methods.srq import relaxed
from tests.methods.srq import srq_reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 40


def inputs(bits, signed=True, seed=0):
    rng = np.random.default_rng(seed)
    low = -(2 ** (bits - 1)) if signed else 0
    x = rng.uniform(low - 1, low + 2**bits, SIZE).astype(np.float32) * np.float32(0.3)
    gumbel = rng.gumbel(size=(SIZE, 2**bits)).astype(np.float32)
    return x, np.float32(0.3), np.float32(0.12), gumbel


def equation_2(x, alpha, sigma, gumbel, low, temperature):
    """Sums the relaxed sample; the masses of eq. 1 as differences of sigmoids, in float64."""
    x, alpha, sigma, gumbel = (np.float64(part) for part in (x, alpha, sigma, gumbel))
    grid = alpha * (low + np.arange(gumbel.shape[-1]))
    upper = expit((grid + alpha / 2 - x[:, None]) / sigma)
    mass = upper - expit((grid - alpha / 2 - x[:, None]) / sigma)
    logits = (np.log(mass) + gumbel) / temperature
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return share @ grid, share, grid


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("signed", [True, False])
def test_value_and_gradients(bits, signed):
    x, alpha, sigma, gumbel = inputs(bits, signed)
    low = -(2 ** (bits - 1)) if signed else 0

    def total(x, alpha, sigma):
        x_hat = relaxed.quantize(x, alpha, sigma, gumbel, bits=bits, temperature=0.8, signed=signed)
        return jnp.sum(x_hat), x_hat

    grads, x_hat = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(x, alpha, sigma)
    expected, _, _ = equation_2(x, alpha, sigma, gumbel, low, 0.8)
    np.testing.assert_allclose(x_hat, expected, rtol=1e-4, atol=1e-5)
    h = 1e-6
    for i, grad in enumerate(grads):
        left, right = ([x, alpha, sigma] for _ in range(2))
        left[i], right[i] = np.float64(left[i]) - h, np.float64(right[i]) + h
        slope = equation_2(*right, gumbel, low, 0.8)[0] - equation_2(*left, gumbel, low, 0.8)[0]
        slope = slope / (2 * h) if i == 0 else slope.sum() / (2 * h)
        np.testing.assert_allclose(grad, slope, rtol=2e-3, atol=2e-3)


def test_straight_through_takes_the_sampled_category_and_the_gradient_of_its_share():
    """Appendix E: the value is a level; the cotangent of its share is that of x_hat times it."""
    x, alpha, sigma, gumbel = inputs(2)

    def run(x):
        return relaxed.quantize_straight_through(x, alpha, sigma, gumbel, bits=2, temperature=0.8)

    x_hat, pull = jax.vjp(run, x)
    _, share, grid = equation_2(x, alpha, sigma, gumbel, -2, 0.8)
    best = share.argmax(1)
    np.testing.assert_allclose(x_hat, grid[best], rtol=1e-6)
    h = 1e-6
    rows = np.arange(SIZE)
    ends = [equation_2(np.float64(x) + d, alpha, sigma, gumbel, -2, 0.8)[1] for d in (h, -h)]
    slope = grid[best] * (ends[0][rows, best] - ends[1][rows, best]) / (2 * h)
    np.testing.assert_allclose(pull(jnp.ones(SIZE))[0], slope, rtol=2e-3, atol=2e-3)


def test_samples_follow_the_categories():
    """The largest perturbed category is a sample of eq. 1, whatever the temperature."""
    n = 40_000
    alpha, sigma, x = 1.0, 1 / 3, 0.4
    gumbel = jax.random.gumbel(jax.random.key(0), (n, 4))
    x_hat = relaxed.quantize_straight_through(
        jnp.full(n, x), alpha, sigma, gumbel, bits=2, temperature=1.0
    )
    _, share, grid = equation_2(np.array([x]), alpha, sigma, np.zeros((1, 4)), -2, 1.0)
    for level, expected in zip(grid, share[0], strict=True):
        found = np.mean(np.asarray(x_hat) == level)
        assert abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_far_from_the_grid_all_is_finite(dtype):
    x = jnp.asarray([-1e4, -30.0, 0.1, 30.0, 1e4], dtype)
    gumbel = jax.random.gumbel(jax.random.key(0), (5, 8))

    @jax.jit
    def run(sigma):
        def quantize(x, alpha, sigma):
            return relaxed.quantize(x, alpha, sigma, gumbel, bits=3, temperature=1.0)

        value, pull = jax.vjp(quantize, x, jnp.float32(1), sigma)
        return value, *pull(jnp.ones_like(value))

    for sigma in (0.01, 10.0):
        for part in run(jnp.float32(sigma)):
            assert bool(jnp.all(jnp.isfinite(part)))


def kernel(w):
    return {"Dense_0": {"kernel": jnp.asarray(w, jnp.float32)}}


def test_without_a_key_weights_are_rounded():
    quantizer = qj.rq(3)
    params = kernel(np.random.default_rng(0).normal(size=(6, 5)))
    state = quantizer.init(params)
    alpha = float(np.exp(state.learned["Dense_0/kernel"]["log_alpha"]).squeeze())
    codes = np.clip(np.round(np.asarray(params["Dense_0"]["kernel"]) / alpha), -4, 3)
    rounded = quantizer.apply(params, state)["Dense_0"]["kernel"]
    np.testing.assert_allclose(rounded, codes * alpha, rtol=1e-6)
    noisy = quantizer.apply(params, state, key=jax.random.key(0))["Dense_0"]["kernel"]
    assert np.any(np.abs(np.asarray(noisy) / alpha - np.round(np.asarray(noisy) / alpha)) > 0.01)
    levels = qj.rq(3, straight_through=True).apply(params, state, key=jax.random.key(0))
    levels = np.asarray(levels["Dense_0"]["kernel"]) / alpha
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)


def test_annealing_is_moved_by_update():
    """Appendix F: max(0.5, start exp(-t / 100000)), in steps of 1000."""
    schedule = relaxed.annealed(2.0)
    for step, expected in ((0, 2.0), (999, 2.0), (1000, 2 * np.exp(-0.01)), (10**6, 0.5)):
        assert float(schedule(jnp.asarray(step))) == pytest.approx(expected)
    quantizer = qj.rq(2, temperature=lambda step: jnp.where(step < 2, 5.0, 0.01))
    params = kernel(np.random.default_rng(0).normal(size=(8, 8)))
    state = quantizer.init(params)
    key = jax.random.key(3)
    off_grid = []
    alpha = float(np.exp(state.learned["Dense_0/kernel"]["log_alpha"]).squeeze())
    for _ in range(4):
        x_hat = np.asarray(quantizer.apply(params, state, key=key)["Dense_0"]["kernel"]) / alpha
        off_grid.append(np.abs(x_hat - np.round(x_hat)).mean())
        state = quantizer.update(params, state)
    assert off_grid[0] == off_grid[1] > 0.05
    assert off_grid[2] == off_grid[3] < 0.01


def test_inputs():
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 2, (7, 5)), jnp.float32)
    quantizer = qj.rq_input(2, temperature=relaxed.annealed(1.0))
    state = quantizer.init(x)
    assert (float(state.buffers["low"]), float(state.buffers["high"])) == (0, 3)
    rounded, same = quantizer.apply(x, state)
    assert len(np.unique(rounded)) <= 4
    assert int(same.buffers["count"]) == 0
    noisy, moved = quantizer.apply(x, state, key=jax.random.key(0), update=True)
    assert int(moved.buffers["count"]) == 1
    assert np.any(np.asarray(noisy) != np.asarray(rounded))


@pytest.mark.parametrize("make", [qj.rq, qj.rq_input])
def test_bad_input(make):
    with pytest.raises(ValueError, match=r"bits must be a whole number in 1\.\.8, got 0"):
        make(0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        make(2, temperature=0.0)
    with pytest.raises(ValueError, match=r"gumbel noise \(3, 8\) for x \(3,\) at 2 bits"):
        relaxed.quantize(jnp.ones(3), 1.0, 1.0, jnp.ones((3, 8)), bits=2, temperature=1.0)


def test_reference_agrees_with_the_other_one():
    """The categories of this file's oracle and of SRQ's brute force are the same."""
    x, alpha, sigma, gumbel = inputs(3)
    _, share, _ = equation_2(x, alpha, sigma, 0 * gumbel, -4, 1.0)
    top = np.sort(share, axis=1)
    other = srq_reference.srq(
        np.float64(x), np.float64(alpha), np.float64(sigma), np.zeros(0), np.zeros(8, int),
        np.ones(SIZE), bits=3, signed=True, estimator="mode",
    )  # fmt: skip
    np.testing.assert_allclose(other.tie, top[:, -1] - top[:, -2], rtol=1e-6, atol=1e-12)
