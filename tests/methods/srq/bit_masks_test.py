"""Which codes share a mask, and the price of the highest one that is left."""

import jax.numpy as jnp
import numpy as np
import pytest

from quantjax.methods import hard_concrete
from quantjax.methods.srq import bit_masks
from tests.methods.srq import srq_reference


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_and_pairs(bits):
    np.testing.assert_array_equal(bit_masks.bit_levels(bits), srq_reference.levels_by_grids(bits))
    if bits > 1:
        np.testing.assert_array_equal(bit_masks.end_pairs(bits), srq_reference.pairs_by_ends(bits))


def test_three_bits():
    assert bit_masks.bit_levels(3).tolist() == [2, 2, 1, 0, 0, 0, 2, 2]
    assert bit_masks.end_pairs(3).tolist() == [1, 2, 3, 0, 0, 0, 2, 1]


def test_every_code_is_in_one_cell():
    for bits in range(2, 9):
        for count in {bits - 1, 2 ** (bits - 1) - 1}:
            cells = bit_masks.cells(bits, count)
            codes = [n for a, b in zip(cells.low, cells.high, strict=True) for n in range(a, b + 1)]
            assert codes == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
            assert set(cells.mask.tolist()) == set(range(count + 1))


def test_penalty_counts_the_highest_mask_that_is_left():
    probs = jnp.asarray([0.3, 0.6, 0.9])
    norms = np.asarray(hard_concrete.prob_nonzero(probs))
    for masks, expected in (
        ([1.0, 1.0, 1.0], norms[2]),
        ([1.0, 0.2, 0.0], norms[1]),
        ([0.4, 0.0, 0.0], norms[0]),
        ([0.0, 0.5, 0.0], norms[1]),
        ([0.0, 0.0, 0.0], 0.0),
    ):
        assert float(bit_masks.bit_penalty(masks, probs)) == pytest.approx(float(expected))
    groups = bit_masks.bit_penalty([[1.0, 1, 1], [1.0, 0, 0]], jnp.stack([probs, probs]))
    assert float(groups) == pytest.approx(float(norms[2] + norms[0]))


def test_bad_input():
    with pytest.raises(ValueError, match=r"masks \(2,\) beside probabilities \(3,\)"):
        bit_masks.bit_penalty(jnp.ones(2), jnp.full(3, 0.5))
    with pytest.raises(ValueError, match=r"probabilities must be inside \(0, 1\)"):
        bit_masks.bit_penalty(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"bits must be a whole number in 1\.\.8, got 9"):
        bit_masks.bit_levels(9)
    with pytest.raises(
        ValueError, match="4 bits have 3 masks of bit levels or 7 of end points, got 5"
    ):
        bit_masks.cells(4, 5)
