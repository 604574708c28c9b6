"""Random numbers for large leaves: jax.random's own, in operations that fuse with their use."""

import jax
import jax.numpy as jnp
from jax import lax

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry-2x32-20 (Salmon et al. 2011)
PARITY = 0x1BD11BDA


def uniform(key, shape):
    """Returns `jax.random.uniform(key, shape)`, float32 in [0, 1), bit for bit.

    jax.random lowers its rounds as a loop, which takes 0.4 s of one core to compile for every leaf
    that draws, and several passes over memory. Written out they take a tenth of it and no memory.
    One call for all leaves would compile faster still, but methods draw leaf by leaf, inside their
    conditions, and what a leaf draws may not depend on the rest of the tree.

    Args:
      key: of any generator; another one than Threefry draws as it always does.
      shape: a static tuple, of less than 2**32 numbers.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return jax.random.uniform(key, shape, jnp.float32)
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    first, second = _threefry(*jax.random.key_data(key), place)
    bits = (first ^ second) >> 9 | jnp.uint32(0x3F800000)
    return lax.bitcast_convert_type(bits, jnp.float32) - 1


def _threefry(first_key, second_key, place):
    """Returns the block cipher's two words for the counters (0, place)."""
    schedule = first_key, second_key, first_key ^ second_key ^ jnp.uint32(PARITY)
    first, second = jnp.zeros_like(place) + first_key, place + second_key
    for i in range(5):
        for rotation in ROTATIONS[i % 2]:
            first = first + second
            second = (second << rotation | second >> 32 - rotation) ^ first
        first = first + schedule[(i + 1) % 3]
        second = second + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return first, second
