"""Learned steps against the paper's formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.methods import lsq

PATH = "Dense_0/kernel"


def params_of(leaf):
    return {"Dense_0": {"kernel": jnp.asarray(leaf)}}


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def grads_of(quantizer, w, step, cotangent):
    """Returns the gradients of sum(cotangent * w_hat) by weights and step."""
    params, state = params_of(w), quantizer.init(params_of(w))

    def total(params, step):
        learned = {PATH: {"step": step}}
        return jnp.sum(
            cotangent
            * quantizer.apply(params, state._replace(learned=learned))["Dense_0"]["kernel"]
        )

    by_params, by_step = jax.jit(jax.grad(total, (0, 1)))(params, step)
    return np.asarray(by_params["Dense_0"]["kernel"]), np.asarray(by_step)


@pytest.mark.parametrize("axes", [None, "channel"])
@pytest.mark.parametrize(
    ("bits", "balanced"), [(2, False), (3, False), (8, False), (1, True), (2, True)]
)
def test_gradients_are_those_of_the_paper(bits, balanced, axes):
    """Eq. 3 and the scale of section 2.2."""
    with jax.enable_x64(True):
        w, cotangent = normal(40, 6, dtype=np.float64), normal(40, 6, seed=1, dtype=np.float64)
        quantizer = qj.lsq(bits, balanced=balanced, axes=axes)
        shape = (1, 6) if axes else (1, 1)
        step = 0.3 * 2.0 ** (2 - bits) * (1 + np.arange(np.prod(shape)).reshape(shape) / 10)
        by_w, by_step = grads_of(quantizer, w, jnp.asarray(step), cotangent)
        # Qn, Qp of the paper: the outermost levels in steps.
        half = 0.5 if balanced else 0.0
        least, most = -(2 ** (bits - 1)) + half, 2 ** (bits - 1) - 1 + half
        scaled = w / step
        levels = np.clip(np.round(scaled - half) + half, least, most)
        inside = (scaled >= least) & (scaled <= most)
        np.testing.assert_allclose(by_w, cotangent * inside, atol=1e-12)
        slope = np.where(inside, levels - scaled, levels) * cotangent
        count = w.size / step.size
        expected = slope.sum(axis=(0, 1) if axes is None else 0, keepdims=True)
        np.testing.assert_allclose(by_step, expected / np.sqrt(count * most), rtol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_papers_start(bits):
    w = normal(30, 20)
    state = qj.lsq(bits, fit="mean").init(params_of(w))
    expected = 2 * np.abs(np.float64(w)).mean() / np.sqrt(2 ** (bits - 1) - 1)
    np.testing.assert_allclose(state.learned[PATH]["step"], [[expected]], rtol=1e-6)
    x = jnp.abs(jnp.asarray(w))
    state = qj.lsq_input(bits, fit="mean").init(x)
    expected = 2 * np.abs(np.float64(w)).mean() / np.sqrt(2**bits - 1)
    np.testing.assert_allclose(state.learned["step"], expected, rtol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_of_inputs(bits, signed):
    with jax.enable_x64(True):
        x, cotangent = normal(5, 4, 3, dtype=np.float64), normal(5, 4, 3, seed=1, dtype=np.float64)
        quantizer = qj.lsq_input(bits, signed=signed)
        state = quantizer.init(jnp.asarray(x))
        step = 0.4

        def total(x, step):
            return jnp.sum(
                cotangent * quantizer.apply(x, state._replace(learned={"step": step}))[0]
            )

        by_x, by_step = jax.grad(total, (0, 1))(jnp.asarray(x), jnp.asarray(step))
        least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        scaled = x / step
        levels = np.clip(np.round(scaled), least, most)
        inside = (scaled >= least) & (scaled <= most)
        np.testing.assert_allclose(by_x, cotangent * inside)
        expected = np.sum(np.where(inside, levels - scaled, levels) * cotangent)
        np.testing.assert_allclose(by_step, expected / np.sqrt(12 * most), rtol=1e-9)


def test_balanced_levels_lie_at_half_steps():
    w = jnp.asarray([[-9.0, -0.2, 0.0, 0.3, 1.4, 9.0]])
    quantizer = qj.lsq(2, balanced=True)
    state = quantizer.init(params_of(w))._replace(learned={PATH: {"step": jnp.ones((1, 1))}})
    value = quantizer.apply(params_of(w), state)["Dense_0"]["kernel"]
    np.testing.assert_array_equal(value, [[-1.5, -0.5, 0.5, 0.5, 1.5, 1.5]])
    table = quantizer.encode(params_of(w), state)["Dense_0"]["kernel"].validate()
    np.testing.assert_array_equal(table.levels, [[[-1.5, -0.5, 0.5, 1.5]]])
    np.testing.assert_array_equal(table.decode(), value)


def test_one_balanced_bit_starts_as_the_mean_magnitude():
    w = normal(50, 40)
    quantizer = qj.lsq(1, balanced=True)
    value = quantizer.apply(params_of(w), quantizer.init(params_of(w)))["Dense_0"]["kernel"]
    np.testing.assert_allclose(np.abs(value), np.abs(w).mean(), rtol=0.04)
    np.testing.assert_array_equal(np.sign(value), np.sign(w))


def test_a_step_that_crosses_zero_counts_by_its_size():
    w = normal(6, 5)
    quantizer = qj.lsq(3)
    state = quantizer.init(params_of(w))
    turned = state._replace(learned=jax.tree.map(jnp.negative, state.learned))
    ours, theirs = (quantizer.apply(params_of(w), s)["Dense_0"]["kernel"] for s in (state, turned))
    np.testing.assert_array_equal(ours, theirs)
    zero = state._replace(learned=jax.tree.map(jnp.zeros_like, state.learned))
    assert np.isfinite(quantizer.apply(params_of(w), zero)["Dense_0"]["kernel"]).all()
    quantizer.encode(params_of(w), zero)["Dense_0"]["kernel"].validate()


def test_scale_gradient():
    grad = jax.grad(lambda x: lsq.scale_gradient(x, 0.25) ** 2)(3.0)
    assert grad == 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qj.lsq(9), "bits must be a whole number in 1..8"),
        (lambda: qj.lsq(2, fit="max"), r"fit must be one of \('error', 'mean'\), got 'max'"),
        (lambda: qj.lsq_input(0), "bits"),
        (lambda: qj.lsq_input(2, fit="range"), "fit must be one of"),
        (lambda: qj.lsq(2, axes=0), "axes"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_of_another_quantizer():
    params = params_of(normal(6, 5))
    with pytest.raises(ValueError, match=r"Dense_0/kernel: .*another quantizer"):
        qj.lsq(3).apply(params, qj.uniform(3).init(params))
    with pytest.raises(ValueError, match="the state has 2 bits, the quantizer 4"):
        qj.lsq(4).encode(params, qj.lsq(2).init(params))
