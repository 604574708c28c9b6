"""Streams beside a packing of single bits, on host and device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantjax.core import qarray
from quantjax.encoded import packing

cheap = settings(derandomize=True, deadline=None, max_examples=100)


def by_bits(symbols, levels):
    """The stream, one bit or one digit at a time."""
    if levels == 3:
        digits = np.resize(np.append(symbols, np.zeros(-len(symbols) % 5, int)), (-1, 5))
        return [int(sum(d * 3**i for i, d in enumerate(row))) for row in digits]
    width = (levels - 1).bit_length()
    bits = [symbol >> i & 1 for symbol in symbols for i in range(width)]
    bits += [0] * (-len(bits) % 8)
    return [
        sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)
    ]


@cheap
@given(levels=st.integers(1, 2**16), count=st.integers(0, 70), seed=st.integers(0, 2**32 - 1))
def test_every_alphabet(levels, count, seed):
    symbols = np.random.default_rng(seed).integers(0, levels, count)
    stream = packing.pack(symbols, levels)
    assert stream.dtype == np.uint8
    assert stream.tolist() == by_bits(symbols.tolist(), levels)
    assert stream.size == qarray.stream_bytes(count, levels)
    found = packing.unpack(stream, levels, count)
    assert found.dtype == (np.uint8 if levels <= 256 else np.uint16)
    np.testing.assert_array_equal(found, symbols)


@pytest.mark.parametrize("levels", [2, 3, 4, 7, 8, 16, 31, 200, 4096, 2**16])
def test_under_jit_it_is_the_same(levels):
    symbols = np.random.default_rng(levels).integers(0, levels, 83)
    stream = jax.jit(packing.pack, static_argnums=1)(jnp.asarray(symbols), levels)
    assert isinstance(stream, jax.Array)
    np.testing.assert_array_equal(stream, packing.pack(symbols, levels))
    found = jax.jit(packing.unpack, static_argnums=(1, 2))(stream, levels, 83)
    np.testing.assert_array_equal(found, symbols)


@pytest.mark.parametrize("levels", [0, 2**16 + 1])
def test_alphabets_out_of_range(levels):
    with pytest.raises(ValueError, match=rf"levels must be in 1..2\*\*16, got {levels}"):
        packing.pack(np.zeros(3, int), levels)
    with pytest.raises(ValueError, match="levels must be"):
        packing.unpack(np.zeros(3, np.uint8), levels, 3)
