"""Projected AMSGrad on a box, a sphere and multi-bit sums, beside a float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from tests import quick

TARGET = np.random.default_rng(0).normal(size=(6, 4))
SCALE = np.random.default_rng(1).uniform(0.5, 2.0, size=(6, 4))


def loss(params):
    return 0.5 * jnp.sum(SCALE * (params["w"] - TARGET) ** 2)


def descend(transform, params, steps):
    @quick.jit
    def step(params, state):
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = transform.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return np.asarray(params["w"]), state


def box(target, metric):
    del metric
    return jax.tree.map(lambda x: jnp.clip(x, -0.5, 0.5), target)


def sphere(target, metric):
    """The nearest point in the metric, (H + mu)^-1 H target, by bisection of mu."""

    def one(x, h):
        low, high = -jnp.min(h), jnp.sum(h) * 10 + jnp.linalg.norm(h * x)

        def halved(_, ends):
            low, high = ends
            mid = (low + high) / 2
            far = jnp.linalg.norm(h * x / (h + mid)) > 1
            return jnp.where(far, mid, low), jnp.where(far, high, mid)

        low, high = jax.lax.fori_loop(0, 60, halved, (low, high))
        x = h * x / (h + (low + high) / 2)
        return x / jnp.linalg.norm(x)

    return jax.tree.map(one, target, metric)


def oracle(x, grads, rate, project):
    """Eq. 8 in float64 NumPy, with the bias corrections of the issue."""
    m, v, top = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    for t, grad in enumerate(grads(x), start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        top = np.maximum(top, v)
        metric = (np.sqrt(top) + 1e-8) / np.sqrt(1 - 0.999**t)
        x = project(x - rate / (1 - 0.9**t) * m / metric)
        yield x


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_steps_equal_the_oracle(dtype):
    given = np.random.default_rng(2).normal(size=(5, 6, 4))
    expected = list(oracle(np.zeros((6, 4)), lambda x: given, 0.3, lambda x: x.clip(-0.5, 0.5)))
    with jax.enable_x64(dtype == "float64"):
        transform = qj.projected_amsgrad(0.3, box)
        params = {"w": jnp.zeros((6, 4), dtype)}
        state = transform.init(params)
        for grad, point in zip(given, expected, strict=True):
            updates, state = transform.update({"w": jnp.asarray(grad, dtype)}, state, params)
            params = optax.apply_updates(params, updates)
            tolerance = 1e-12 if dtype == "float64" else 1e-6
            np.testing.assert_allclose(params["w"], point, atol=tolerance)


def test_box_reaches_the_constrained_minimum():
    found, _ = descend(qj.projected_amsgrad(0.05, box), {"w": jnp.zeros((6, 4))}, 300)
    np.testing.assert_allclose(found, TARGET.clip(-0.5, 0.5), atol=1e-3)


def test_sphere_reaches_a_stationary_point():
    start = {"w": jnp.full((6, 4), 24**-0.5)}
    schedule = optax.exponential_decay(0.05, 100, 0.3)
    found, _ = descend(qj.projected_amsgrad(schedule, sphere), start, 500)
    np.testing.assert_allclose(np.linalg.norm(found), 1, atol=1e-6)
    gradient = SCALE * (found - TARGET)
    tangential = gradient - np.sum(gradient * found) * found
    assert np.linalg.norm(tangential) < 0.02 * np.linalg.norm(gradient)
    assert np.sum(gradient * found) < 0  # the minimum, not the far side


def test_multi_bit_set_is_never_left_and_descended_on():
    quantizer = qj.multi_bit(5, axes=-2)
    start = {"kernel": jnp.asarray(-TARGET, jnp.float32)}
    state = quantizer.init(start)
    start = quantizer.apply(start, state)

    def project(target, metric):
        del metric  # sums are chosen weight by weight
        return quantizer.apply(target, state)

    transform = qj.projected_amsgrad(1.5, project)
    params, moments = start, transform.init(start)
    step = quick.jit(transform.update)
    for _ in range(60):
        grads = {"kernel": SCALE * (params["kernel"] - TARGET).astype(jnp.float32)}
        updates, moments = step(grads, moments, params)
        params = optax.apply_updates(params, updates)
    on_set = quantizer.apply(params, state)["kernel"]
    np.testing.assert_allclose(params["kernel"], on_set, atol=1e-6)
    before, after = (
        np.sum(SCALE * (np.asarray(x) - TARGET) ** 2) for x in (start["kernel"], params["kernel"])
    )
    assert after < 0.01 * before


def test_trees_with_tuples_and_half_precision():
    params = ({"a": jnp.ones(3, jnp.bfloat16)}, (jnp.ones(2), jnp.ones(())))
    transform = qj.projected_amsgrad(0.1, lambda target, metric: target)
    updates, state = transform.update(params, transform.init(params), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert state.mean[0]["a"].dtype == jnp.float32
    jax.tree.map(lambda x: np.testing.assert_allclose(x, -0.1, rtol=1e-2), updates)


@pytest.mark.parametrize(
    ("rate", "kwargs"),
    [(-1.0, {}), (np.nan, {}), (0.1, {"b1": 1.0}), (0.1, {"b2": -0.1}), (0.1, {"eps": 0.0})],
)
def test_bad_numbers(rate, kwargs):
    with pytest.raises(ValueError, match="must be"):
        qj.projected_amsgrad(rate, box, **kwargs)


def test_params_must_be_given():
    transform = qj.projected_amsgrad(0.1, box)
    params = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="params"):
        transform.update(params, transform.init(params))
