"""Uniform leaves as qwix has them, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.encoded.qwix import from_qarray, to_qarray

FLOAT32 = np.dtype("float32")


def grid(bits, levels=None, axes=(1, 6), dtype="float32"):
    levels = 2**bits if levels is None else levels
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, levels, (5, 6)) - levels // 2
    codes[0, :2] = (-(levels // 2), levels - 1 - levels // 2)
    step = jnp.asarray(rng.uniform(0.5, 1, axes), jnp.float32)
    dtype = jnp.dtype(dtype)
    return qj.Grid(
        jnp.asarray(codes, jnp.int8 if bits <= 8 else jnp.int16), step, bits, dtype, levels
    )


@pytest.fixture(scope="module")
def qwix():
    return pytest.importorskip("qwix", reason="qwix is not installed")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("narrow", [False, True])
def test_there_and_back(qwix, bits, narrow):
    leaf = grid(bits, 2**bits - narrow)
    array = to_qarray(leaf)
    np.testing.assert_array_equal(qwix.dequantize(array), leaf.decode())
    back = from_qarray(array)
    assert (back.bits, back.levels, back.dtype) == (bits, leaf.levels, FLOAT32)
    np.testing.assert_array_equal(back.codes, leaf.codes)
    np.testing.assert_array_equal(back.step, leaf.step)


def test_one_bit_and_another_dtype(qwix):
    leaf = grid(1, axes=(1, 1), dtype="bfloat16")
    array = to_qarray(leaf)
    expected = leaf.codes * leaf.step
    np.testing.assert_array_equal(qwix.dequantize(array), expected)
    assert from_qarray(array).dtype == FLOAT32
    assert from_qarray(array, "bfloat16").decode().dtype == jnp.bfloat16


@pytest.mark.parametrize("qtype", ["int2", "int3", jnp.int4, jnp.int8])
def test_what_qwix_quantizes(qwix, qtype):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    array = qwix.quantize(weights, qtype, channelwise_axes=[1])
    np.testing.assert_array_equal(from_qarray(array).decode(), qwix.dequantize(array))


def test_what_does_not_fit(qwix):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    with pytest.raises(ValueError, match="at most 8 bits, got 9"):
        to_qarray(grid(9))
    with pytest.raises(ValueError, match="not ArrayImpl"):
        to_qarray(weights)
    with pytest.raises(ValueError, match=r"expected a qwix\.QArray, got a Grid"):
        from_qarray(grid(4))
    tiled = qwix.quantize(weights, jnp.int4, tiled_axes={0: 4})
    with pytest.raises(ValueError, match=r"scales \(2, 1\) beside \(8, 4\): tiles"):
        from_qarray(tiled)
    shifted = qwix.quantize(weights + 1, jnp.int4, calibration_method="minmax")
    with pytest.raises(ValueError, match="has a zero point"):
        from_qarray(shifted)
    for qtype, name in (("nf4", "nf4"), (jnp.float8_e4m3fn, "float8_e4m3fn")):
        with pytest.raises(ValueError, match=f"not {name}"):
            from_qarray(qwix.quantize(weights, qtype))
