"""SRQ's closed form beside brute force over all categories, and far outside of the grid."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from quantjax.methods.srq import estimators, group_sums, semi_relaxed
from tests import quick
from tests.methods.srq import srq_reference

SIZE = 48
ESTIMATORS = ("mode", "expectation")
COUNT = {
    "none": lambda bits: 0,
    "levels": lambda bits: bits - 1,
    "ends": lambda b: 2 ** (b - 1) - 1,
}
LEVELS = {"levels": srq_reference.levels_by_grids, "ends": srq_reference.pairs_by_ends}


@functools.cache
def program(bits, signed, kind, estimator):
    """Value and cotangents of x, alpha, sigma and masks; one program for each dtype."""

    def run(x, alpha, sigma, masks, cotangent):
        def quantize(x, alpha, sigma, masks):
            return semi_relaxed.quantize(
                x,
                alpha,
                sigma,
                bits=bits,
                signed=signed,
                masks=None if kind == "none" else masks,
                estimator=estimator,
            )

        value, pull = jax.vjp(quantize, x, alpha, sigma, masks)
        return value, *pull(cotangent)

    return jax.jit(run)


def cases(widths):
    configs = [
        (bits, signed, kind, estimator)
        for bits in widths
        for signed, kind in ((True, "none"), (False, "none"), (True, "levels"), (True, "ends"))
        for estimator in ESTIMATORS
        if kind != "ends" or bits <= 5
    ]
    return given(
        config=st.sampled_from(configs),
        seed=st.integers(0, 2**32 - 1),
        alpha=st.floats(-3, 3).map(np.exp),
        ratio=st.floats(np.log(0.1), np.log(4)).map(np.exp),
        reach=st.sampled_from((0.8, 1.0, 1.2)),
    )


several = {"deadline": None, "derandomize": True, "phases": [Phase.generate]}


@cases((2, 3, 4, 8))  # every width is a program of its own
@settings(max_examples=60, **several)
def test_closed_form_is_brute_force(config, seed, alpha, ratio, reach):
    check_closed_form(config, seed, alpha, ratio, reach)


@pytest.mark.slow
@cases(range(2, 9))
@settings(max_examples=500, **several)
def test_closed_form_is_brute_force_at_all_widths(config, seed, alpha, ratio, reach):
    check_closed_form(config, seed, alpha, ratio, reach)


def check_closed_form(config, seed, alpha, ratio, reach):
    bits, signed, kind, estimator = config
    rng = np.random.default_rng(seed)
    # Numbers of float32, so that both precisions start from the same ones.
    alpha = np.float32(alpha)
    sigma = np.float32(alpha * ratio)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    x = np.float32(alpha * (rng.uniform(low, high, SIZE) * reach + rng.normal(size=SIZE)))
    cotangent = np.float32(rng.normal(size=SIZE))
    x[:2] = np.float32(alpha * (low - 2)), np.float32(alpha * (high + 2))
    masks = np.float32(np.clip(rng.uniform(-0.4, 1.4, COUNT[kind](bits)), 0, 1))
    of_code = np.zeros(2**bits, int)
    if kind != "none":
        of_code = LEVELS[kind](bits)
    inputs = x, alpha, sigma, masks, cotangent
    wide = [np.float64(part) for part in inputs]

    def reference(keep):
        x, alpha, sigma, masks, cotangent = wide
        return srq_reference.srq(
            x, alpha, sigma, masks, of_code, cotangent * keep,
            bits=bits, signed=signed, estimator=estimator,
        )  # fmt: skip

    keep = reference(1).tie > 1e-6
    expected = reference(keep)
    run = program(*config)
    # In float32 every element has its own grid: sums over x cancel, by chance nearly to nothing.
    for dtype, tolerance, shape in (("float64", 1e-9, ()), ("float32", 2e-4, (SIZE,))):
        # In float64 it is the formula that is tested, not the compiler.
        compilation = quick.compilation() if dtype == "float64" else contextlib.nullcontext()
        with compilation, jax.enable_x64(dtype == "float64"):
            spread = np.broadcast_to(alpha, shape), np.broadcast_to(sigma, shape)
            group = np.broadcast_to(masks, (*shape, masks.size))
            parts = [jnp.asarray(p, dtype) for p in (x, *spread, group, cotangent * keep)]
            value, *cotangents = [np.asarray(part) for part in run(*parts)]
        assert value.dtype == dtype
        rtol = 1e-6 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(value[keep], expected.value[keep], rtol)
        for name, got in zip(("x", "alpha", "sigma", "masks"), cotangents, strict=True):
            want = getattr(expected, name)
            if name != "x" and not shape:
                want = want.sum(0)
            largest = np.max(np.abs(want), initial=0)
            error = np.max(np.abs(got - want), initial=0)
            bound = tolerance * max(largest, 1) if dtype == "float64" else tolerance * largest
            assert error <= bound, (name, dtype, error, largest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("bits", "kind"), [(2, "none"), (8, "none"), (4, "levels"), (3, "ends")])
def test_far_from_the_grid_all_is_finite(bits, kind, estimator, dtype, quick_programs):
    alpha = 0.125
    near = np.linspace(-(2.0**bits), 2.0**bits, 41)
    far = np.outer([-1, 1], [3e2, 1e3, 1e4]).ravel()
    x = jnp.asarray(alpha * np.concatenate([near, far, near[:1]]), dtype)
    run = program(bits, True, kind, estimator)
    for ratio in (0.01, 0.1, 1.0, 10.0):
        for z in ([0.0], [1.0], [1e-6, 0.5, 0.0]):
            masks = jnp.asarray(np.resize(z, COUNT[kind](bits)), jnp.float32)
            sigma = jnp.float32(alpha * ratio)
            value, *cotangents = run(x, jnp.float32(alpha), sigma, masks, jnp.ones_like(x))
            assert value.dtype == cotangents[0].dtype == dtype
            for part in (value, *cotangents):
                assert bool(jnp.all(jnp.isfinite(part)))
            codes = np.asarray(value, np.float64) / alpha
            if kind == "none":  # the ends of the grid
                assert (codes[-2], codes[-5]) == (2 ** (bits - 1) - 1, -(2 ** (bits - 1)))


def close_to_reference(config, x, alpha, sigma, masks, tolerance):
    """Cotangents of x, alpha, sigma and masks, element by element, relative to the largest."""
    bits, signed, kind, estimator = config
    of_code = np.zeros(2**bits, int)
    if kind != "none":
        of_code = LEVELS[kind](bits)
    cotangent = np.ones_like(x)
    wide = [np.float64(part) for part in (x, alpha, sigma, masks)]
    expected = srq_reference.srq(
        *wide, of_code, cotangent, bits=bits, signed=signed, estimator=estimator
    )
    spread = (jnp.full(x.shape, part, x.dtype) for part in (alpha, sigma))
    group = jnp.broadcast_to(jnp.asarray(masks, x.dtype), (x.size, len(masks)))
    _, *got = program(*config)(jnp.asarray(x), *spread, group, jnp.asarray(cotangent))
    for name, part in zip(("x", "alpha", "sigma", "masks"), got, strict=True):
        want = getattr(expected, name)
        error = np.max(np.abs(np.asarray(part) - want), initial=0)
        assert error <= tolerance * np.max(np.abs(want), initial=0), name


@pytest.mark.parametrize("z", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["none", "levels", "ends"])
def test_expectation_half_way_between_codes(kind, z):
    """Its derivatives do not know to which side such a point is rounded."""
    x = np.arange(-10, 10, dtype=np.float32) + np.float32(0.5)
    masks = np.float32([z, 0.9 * z, z][: COUNT[kind](3)])
    close_to_reference((3, True, kind, "expectation"), x, 1.0, 0.3, masks, 1e-5)


@pytest.mark.parametrize("ratio", [0.01, 0.02, 10.0])
@pytest.mark.parametrize("kind", ["none", "levels"])
def test_expectation_of_sharp_and_of_wide_categories(kind, ratio):
    x = np.float32(np.random.default_rng(0).uniform(-11, 11, 48))
    for masks in ([1, 1, 1], [0, 0, 1e-3], [0.3, 0, 0.7]):
        masks = np.float32(masks[: COUNT[kind](4)])
        close_to_reference((4, True, kind, "expectation"), x, 1.0, ratio, masks, 2e-4)


@pytest.mark.parametrize("kind", ["levels", "ends"])
@pytest.mark.parametrize("ratio", [1e-5, 0.3, 30.0, 1e4])
def test_with_full_masks_the_mode_is_rounding(kind, ratio):
    half = np.arange(-12, 12, dtype=np.float32) + np.float32(0.5)
    beside = [np.nextafter(half, np.float32(end)) for end in (-99, 99)]
    x = np.concatenate([half, *beside, np.linspace(-12, 12, 999), [-1e30, 1e30, -np.inf, np.inf]])
    x = jnp.asarray(x, jnp.float32)
    masks = jnp.ones(COUNT[kind](4))
    got = semi_relaxed.quantize(x, 1.0, ratio, bits=4, masks=masks)
    np.testing.assert_array_equal(got, jnp.clip(jnp.round(x), -8, 7))
    assert not np.any(np.signbit(got[got == 0]))


def test_masks_let_nan_through():
    x = jnp.asarray([jnp.nan, 1.0])
    got = semi_relaxed.quantize(x, 1.0, 0.3, bits=4, masks=jnp.ones(3))
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_shapes(estimator):
    def quantize(x, alpha, masks=None, bits=3):
        return semi_relaxed.quantize(
            x, alpha, jnp.ones_like(alpha), bits=bits, masks=masks, estimator=estimator
        )

    grads = jax.grad(lambda alpha: quantize(jnp.zeros((0, 4)), alpha).sum())(jnp.ones((1, 4)))
    np.testing.assert_array_equal(grads, jnp.zeros((1, 4)))
    for alpha, masks in ((jnp.ones((1, 4)), None), (jnp.ones(()), jnp.ones((2, 1, 2)))):
        with pytest.raises(ValueError, match="larger than x"):
            quantize(jnp.ones(4), alpha, masks)
    with pytest.raises(ValueError, match="at least 2 bits"):
        quantize(jnp.ones(4), jnp.ones(()), jnp.ones(0), bits=1)
    whole = quantize(jnp.arange(4), jnp.float32(0.5))
    np.testing.assert_array_equal(whole, jnp.asarray([0, 1, 1.5, 1.5]))


@pytest.mark.parametrize("kind", ["none", "levels"])
def test_expectation_is_smooth_at_the_edges(kind):
    """One rounding beside a half-way point the gradients are those of the point itself."""
    edges = np.arange(-4, 4, dtype=np.float32) + np.float32(0.5)
    beside = [np.nextafter(edges, np.float32(end)) for end in (-9, 9)]
    masks = jnp.asarray([0.0, 0.7]) if kind == "levels" else jnp.zeros(0)

    @jax.jit
    def run(x, alpha, low, high):
        def quantize(x, alpha):
            if kind == "levels":
                return estimators.on_masked_grid(x, alpha, 0.3 * alpha, masks, 3, "expectation")
            return estimators.on_grid(x, alpha, 0.3 * alpha, low, high, "expectation")

        _, pull = jax.vjp(quantize, x, jnp.broadcast_to(alpha, x.shape))
        return pull(jnp.ones_like(x))

    def grads(x):
        return run(jnp.asarray(x), jnp.float32(1), jnp.float32(-4), jnp.float32(3))

    for expected, *got in zip(grads(edges), *map(grads, beside), strict=True):
        for other in got:
            np.testing.assert_allclose(other, expected, atol=2e-5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_parts_of_an_array_are_the_whole(shape, masked, estimator, monkeypatch, quick_programs):
    """On one CPU large arrays go back part by part: as one array, whatever alpha's rank."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rng = np.random.default_rng(0)
    x, cotangent = jnp.asarray(rng.normal(size=(2, 48, 8)), jnp.float32)
    alpha, sigma = jnp.full(shape, 0.3), jnp.full(shape, 0.1)
    masks = jnp.asarray([0.3, 0.8, 0.0]) if masked else None

    def run(x, alpha, sigma, masks):
        return semi_relaxed.quantize(x, alpha, sigma, bits=4, masks=masks, estimator=estimator)

    found = []
    for chunk in (2**16, 64):
        monkeypatch.setattr(group_sums, "CHUNK", chunk)
        pull = jax.jit(lambda *args: jax.vjp(run, *args)[1](cotangent))
        found.append(pull(x, alpha, sigma, masks))
    assert found[1][1].shape == found[1][2].shape == shape
    for one, parts in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(parts, one, rtol=1e-4, atol=1e-5)
