"""Toys of the Linen tests: input quantizers, layers, and a fitted model."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

import quantjax as qj
from quantjax import linen as qnn
from quantjax.core import rounding
from quantjax.methods.uniform_input import uniform_input

BOTH = ["quant", "quant_stats"]


def learned_step(bits=4, noise=0.0):
    """A learned-step quantizer without buffers; with a key it dithers before rounding."""
    low, high = -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)

    def init(x):
        step = 2 * jnp.mean(jnp.abs(x)).astype(jnp.float32) / jnp.sqrt(high)
        return qj.QuantState({"step": step}, {})

    def apply(x, state, *, key=None, update=False):
        del update
        y = x.astype(jnp.float32)
        if key is not None:
            y = y + noise * jax.random.normal(key, x.shape)
        y = rounding.nearest_on_grid(y, state.learned["step"], low, high)
        return y.astype(x.dtype), state

    return qj.InputQuantizer(init, apply)


def counting():
    """Passes x through and counts its updates: tells which calls updated, and how often."""

    def init(x):
        del x
        return qj.QuantState({}, {"count": jnp.zeros((), jnp.int32)})

    def apply(x, state, *, key=None, update=False):
        del key
        return x, state._replace(buffers={"count": state.buffers["count"] + update})

    return qj.InputQuantizer(init, apply)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(3)(x)


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(2)(x.mean((1, 2)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(x.shape[-1])(x)), None


def stack(axes, rngs=("params",)):
    split = dict.fromkeys(rngs, True)
    return nn.scan(Block, variable_axes=axes, split_rngs=split, length=3)


class Scanned(nn.Module):
    axes: tuple = ("params", "quant", "quant_stats")
    rngs: tuple = ("params",)

    @nn.compact
    def __call__(self, x):
        return stack(dict.fromkeys(self.axes, 0), self.rngs)()(x)[0]


def data(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def init(model, x, **kwargs):
    return jax.jit(functools.partial(model.init, **kwargs))(jax.random.key(1), x)


def fitted(model, x, quantizer=None, **kwargs):
    variables = init(model, x, **kwargs)
    apply = qnn.quantize_inputs(model.apply, quantizer or uniform_input(4))
    return apply, variables, apply(variables, x, mutable=BOTH, **kwargs)[1]
