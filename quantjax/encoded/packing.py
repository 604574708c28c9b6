"""Codes in exactly the bits they need: streams of bytes, by the same formula on host and device.

All functions take numpy or jax arrays and give back the same kind; under jit they are a few shifts.
Bits are little-endian: the first code lies in the lowest bits of the first byte.
"""

import math

import numpy as np

from quantjax.core.qarray import stream_bytes, width

WIDEST = 16  # bits of a code
TRITS = 5  # symbols of three a byte: 3**5 = 243


def pack(symbols, levels: int):
    """Returns the stream of symbols, uint8 `[stream_bytes(n, levels)]`.

    Args:
      symbols: `[n]` integers in 0..levels-1; what is outside gives a wrong stream, not an error.
      levels: size of the alphabet: three go five to a byte, others `width(levels)` bits each.

    Raises:
      ValueError: levels not in 1..2**16.
    """
    xp = symbols.__array_namespace__()
    if levels == 3:
        digits = _rows(symbols.astype(np.uint8), TRITS)
        weights = [3**i for i in range(TRITS)]
        return sum(digits[:, i] * np.uint8(weight) for i, weight in enumerate(weights))
    bits = _width(levels)
    if bits == 0:
        return xp.zeros(0, np.uint8)
    period = _period(bits)
    codes = _rows(symbols.astype(np.uint16), period)
    columns = []
    for byte in range(bits * period // 8):
        total = xp.zeros(codes.shape[:1], np.uint16)
        for i in range(period):
            shift = bits * i - 8 * byte
            if -bits < shift < 8:
                total = total | _shifted(codes[:, i], shift)
        columns.append(total.astype(np.uint8))
    return xp.stack(columns, axis=1).reshape(-1)[: stream_bytes(symbols.shape[0], levels)]


def unpack(stream, levels: int, count: int):
    """Returns the first `count` symbols of a stream, uint8 or uint16 `[count]`.

    Args:
      stream: what `pack` gives, uint8.
      levels: size of the alphabet, as it was packed.
      count: of symbols.
    """
    xp = stream.__array_namespace__()
    if levels == 3:
        digits = [stream // np.uint8(3**i) % np.uint8(3) for i in range(TRITS)]
        return xp.stack(digits, axis=1).reshape(-1)[:count]
    bits = _width(levels)
    dtype = np.uint8 if bits <= 8 else np.uint16
    if bits == 0:
        return xp.zeros(count, dtype)
    period = _period(bits)
    codes = _rows(stream.astype(np.uint16), bits * period // 8)
    columns = []
    for i in range(period):
        total = xp.zeros(codes.shape[:1], np.uint16)
        for byte in range(codes.shape[1]):
            shift = 8 * byte - bits * i
            if -8 < shift < bits:
                total = total | _shifted(codes[:, byte], shift)
        columns.append((total & np.uint16(2**bits - 1)).astype(dtype))
    return xp.stack(columns, axis=1).reshape(-1)[:count]


def _width(levels: int) -> int:
    if not 1 <= levels <= 2**WIDEST:
        raise ValueError(f"levels must be in 1..2**{WIDEST}, got {levels}")
    return width(levels)


def _period(bits: int) -> int:
    """Returns after how many codes a byte begins with a code again."""
    return 8 // math.gcd(bits, 8)


def _rows(array, length: int):
    """Views an array as rows of `length`, padded with zeros."""
    xp = array.__array_namespace__()
    missing = -array.shape[0] % length
    if missing:
        array = xp.concatenate([array, xp.zeros(missing, array.dtype)])
    return array.reshape(-1, length)


def _shifted(codes, shift: int):
    """Shifts to the left, or to the right where negative."""
    return codes << np.uint16(shift) if shift >= 0 else codes >> np.uint16(-shift)
