"""What a chain ships: codes of its grid, though a mask or pruning comes after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj

GRIDS = {
    "uniform": (lambda: qj.uniform(4), qj.Grid),
    "uniform per channel": (lambda: qj.uniform(3, axes="channel"), qj.Grid),
    "srq": (lambda: qj.srq(3), qj.Grid),
    "focused": (lambda: qj.focused(4, min_separation=0.0), qj.Table),
}
MASKS = {
    "pruned": lambda: qj.pruned({"Dense_0": {"kernel": np.arange(192).reshape(16, 12) % 3 > 0}}),
    "magnitude": lambda: qj.magnitude(0.4),
    "gradual": lambda: qj.magnitude(0.4, end=2, every=1),
}


def make_params(dtype=jnp.float32):
    kernel = np.random.default_rng(0).normal(size=(16, 12))
    return {"Dense_0": {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.ones(12, dtype)}}


def assert_ships(quantizer, params, state):
    """Law 1, bit for bit; returns the encoded kernel."""
    encoded = quantizer.encode(params, state)
    applied = jax.jit(quantizer.apply)(params, state)["Dense_0"]["kernel"]
    decoded = jax.jit(qj.decode)(encoded)["Dense_0"]["kernel"]
    assert decoded.dtype == applied.dtype
    size = applied.dtype.itemsize
    np.testing.assert_array_equal(*(np.asarray(x).view(f"u{size}") for x in (decoded, applied)))
    return encoded["Dense_0"]["kernel"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_mask_after_a_grid_leaves_codes(grid, mask, dtype):
    make, kind = GRIDS[grid]
    params = make_params(dtype)
    quantizer = qj.chain(make(), MASKS[mask]())
    state = quantizer.init(params)
    for _ in range(2):
        leaf = assert_ships(quantizer, params, state)
        assert isinstance(leaf, kind)
        leaf.validate()
        (buffers,) = state.buffers.values()
        state = quantizer.update(params, state)
    left_out = ~np.asarray(buffers["1"]["mask"])
    assert np.mean(left_out) > 0.1
    assert np.all(np.asarray(leaf.decode())[left_out] == 0)


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_that_the_code_cannot_say_ships_as_floats(mask):
    """No sum of two bases is 0: the pruned weights have no code."""
    params = make_params()
    quantizer = qj.chain(qj.multi_bit(2, "channel"), MASKS[mask]())
    state = quantizer.update(params, quantizer.init(params))
    state = quantizer.update(params, state)
    leaf = assert_ships(quantizer, params, state)
    assert isinstance(leaf, jax.Array)


def test_a_mask_that_keeps_everything_leaves_sums_of_bases():
    params = make_params()
    quantizer = qj.chain(qj.multi_bit(2, "channel"), qj.magnitude(1.0))
    leaf = assert_ships(quantizer, params, quantizer.init(params))
    assert isinstance(leaf, qj.MultiBit)
