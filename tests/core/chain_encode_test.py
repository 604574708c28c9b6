"""Masks after a grid: codes are shipped, not floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.methods.l0 import l0

pytestmark = pytest.mark.usefixtures("quick_compilation")

rng = np.random.default_rng(0)
PARAMS = {"Dense_0": {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}}
MASKS = {"Dense_0": {"kernel": rng.random((16, 8)) < 0.5}}
GRIDS = {
    "uniform": (lambda: qj.uniform(4), qj.Grid),
    "per channel": (lambda: qj.uniform(3, axes="channel"), qj.Grid),
    "srq": (lambda: qj.srq(3), qj.Grid),
    "rq": (lambda: qj.rq(3), qj.Grid),
    "focused": (lambda: qj.focused(4), qj.Table),
}
PRUNERS = {
    "pruned": lambda: qj.pruned(MASKS),
    "magnitude": lambda: qj.magnitude(0.3, end=2, every=1),
}


@pytest.mark.parametrize("pruner", PRUNERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_codes_stay_codes_and_what_is_pruned_is_0(grid, pruner):
    make, kind = GRIDS[grid]
    quantizer = qj.chain(make(), PRUNERS[pruner]())
    state = quantizer.init(PARAMS)
    for _ in range(2):
        state = jax.jit(quantizer.update)(PARAMS, state)
    encoded = quantizer.encode(PARAMS, state)
    assert isinstance(encoded["Dense_0"]["kernel"], kind)
    applied = jax.jit(quantizer.apply)(PARAMS, state)
    np.testing.assert_array_equal(
        jax.jit(qj.decode)(encoded)["Dense_0"]["kernel"], applied["Dense_0"]["kernel"]
    )
    pruned = ~np.asarray(state.buffers["Dense_0/kernel"]["1"]["mask"])
    assert not np.any(np.asarray(applied["Dense_0"]["kernel"])[pruned])


def test_what_an_earlier_grid_cannot_hold_stays_float():
    """Zero is no sum of two bases, and gates are fractions."""
    for quantizer in (
        qj.chain(qj.multi_bit(2, axes=-2), qj.pruned(MASKS)),
        qj.chain(qj.uniform(4), l0(1e-3, prob=0.6)),
    ):
        state = quantizer.init(PARAMS)
        encoded = quantizer.encode(PARAMS, state)["Dense_0"]["kernel"]
        assert isinstance(encoded, jax.Array)
        np.testing.assert_array_equal(encoded, quantizer.apply(PARAMS, state)["Dense_0"]["kernel"])
