"""Small quantizers that make visible which key, state and leaf reach a quantizer's functions."""

import jax
import jax.numpy as jnp

from quantjax.core import rounding
from quantjax.core.quantizer import InputQuantizer, Quantizer, QuantState, leafwise


def drop_mask(key, shape):
    return jnp.ones(shape) if key is None else 1.0 * jax.random.bernoulli(key, 0.5, shape)


def dropping() -> Quantizer:
    """Drops weights at random; its penalty counts what the same key keeps.

    `init` and `update` leave a uniform number of their own key in the buffers.
    """

    def init(path, leaf, key):
        del path
        shape = jnp.zeros(leaf.shape, jnp.int8)
        drawn = jnp.zeros(()) if key is None else jax.random.uniform(key)
        learned = {"gain": jnp.ones((1,) * leaf.ndim, leaf.dtype)}
        return learned, {"like": shape, "count": jnp.zeros((), jnp.int32), "drawn": drawn}

    def apply(leaf, learned, buffers, key):
        del buffers
        return leaf * learned["gain"] * drop_mask(key, leaf.shape).astype(leaf.dtype)

    def encode(leaf, learned, buffers):
        return apply(leaf, learned, buffers, None)

    def update(leaf, learned, buffers, key):
        del leaf, learned
        drawn = buffers["drawn"] if key is None else jax.random.uniform(key)
        return {**buffers, "count": buffers["count"] + 1, "drawn": drawn}

    def penalty(learned, buffers, key):
        del learned
        return jnp.sum(drop_mask(key, buffers["like"].shape))

    return leafwise(init, apply, encode, update, penalty)


def learned_step(bits: int, penalty: float = 0.0) -> Quantizer:
    """A uniform grid whose step is trained (LSQ without its gradient scale)."""
    limit = 2.0 ** (bits - 1) - 1

    def init(path, leaf, key):
        del path, key
        step = 2 * jnp.mean(jnp.abs(leaf), keepdims=True) / jnp.sqrt(limit)
        return {"step": step}, {"limit": jnp.full_like(step, limit)}

    def apply(leaf, learned, buffers, key):
        del key
        limit = buffers["limit"]
        return rounding.nearest_on_grid(leaf, learned["step"], -limit, limit)

    return leafwise(
        init,
        apply,
        encode=lambda leaf, learned, buffers: apply(leaf, learned, buffers, None),
        penalty=lambda learned, buffers, key: penalty * jnp.sum(learned["step"]),
    )


def learned_input(bits: int) -> InputQuantizer:
    """A uniform grid of layer inputs whose step is trained; its buffer counts the updates."""
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1

    def init(x):
        step = 2 * jnp.mean(jnp.abs(x)) / jnp.sqrt(high)
        return QuantState({"step": step}, {"count": jnp.zeros((), jnp.int32)})

    def apply(x, state, *, key=None, update=False):
        del key
        moved = state._replace(buffers={"count": state.buffers["count"] + update})
        return rounding.nearest_on_grid(x, state.learned["step"], low, high), moved

    return InputQuantizer(init, apply)
