"""A small transformer for bytes; kernels lie at paths such as `Block_0/query/kernel`.

Queries, keys, values and outputs of attention are plain dense layers, so that a kernel's last axis
is its channels. Embeddings of bytes and of positions are embeddings to quantizers, too.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Block(nn.Module):
    """Causal self-attention, then two dense layers with four times the width between; pre-norm."""

    heads: int = 4
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        """Returns [n, length, width] of [n, length, width]."""
        n, length, width = x.shape
        y = nn.LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        q, k, v = (
            nn.Dense(width, dtype=self.dtype, name=name)(y).reshape(n, length, self.heads, -1)
            for name in ("query", "key", "value")
        )
        seen = np.tril(np.ones((1, 1, length, length), bool))
        y = jax.nn.dot_product_attention(q, k, v, mask=seen).reshape(n, length, width)
        x = x + nn.Dense(width, dtype=self.dtype, name="out")(y)
        y = nn.LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="up")(y))
        return x + nn.Dense(width, dtype=self.dtype, name="down")(y)


class TextModel(nn.Module):
    """A transformer that predicts every next byte: two blocks, 128 wide, four heads.

    Raises:
      ValueError: `heads` does not divide `width`.
    """

    classes: int = 256
    width: int = 128
    blocks: int = 2
    heads: int = 4
    length: int = 64  # of the longest window
    dtype: Any = None

    def __post_init__(self):
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"heads is {self.heads}, expected a divisor of width, {self.width}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Returns the logits [n, length, classes] of what follows x [n, length], integers.

        Raises:
          ValueError: x is no [n, length] of integers, or longer than `length`.
        """
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected integers [n, length]")
        length = x.shape[1]
        if length > self.length:
            raise ValueError(f"windows have {length} bytes, expected at most {self.length}")
        y = nn.Embed(self.classes, self.width, dtype=self.dtype, name="tokens")(x)
        places = nn.Embed(self.length, self.width, dtype=self.dtype, name="positions")
        y = y + places(jnp.arange(length))[None]
        for _ in range(self.blocks):
            y = Block(self.heads, self.dtype)(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm")(y)
        y = nn.Dense(self.classes, dtype=self.dtype, name="logits")(y)
        return y.astype(jnp.promote_types(y.dtype, jnp.float32))
