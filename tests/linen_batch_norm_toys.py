"""Toys of the tests of batch norms in Linen models: networks, and variables as if trained."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


class Line(nn.Module):
    """wire(x, norm) with norm a batch norm that, when it trains, keeps the last batch alone."""

    wire: Callable
    momentum: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        kwargs = {"use_running_average": not train, "momentum": self.momentum}
        return self.wire(x, functools.partial(nn.BatchNorm, **kwargs))


def two_layers(x, norm):
    x = nn.relu(norm(name="a")(nn.Dense(5, name="first")(x)))
    return nn.Dense(2)(norm(name="b")(nn.Dense(4, name="second")(x)))


def random_variables(model, x, seed=0, **kwargs):
    """Variables of a trained network, as it were: no statistic and no scale is trivial."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = [key.key for key in path if hasattr(key, "key")][-1]
        if name in ("var", "scale"):
            value = rng.uniform(0.3, 3, leaf.shape)
            value *= rng.choice([-1, 1], leaf.shape) if name == "scale" else 1
        else:
            value = rng.normal(size=leaf.shape)
            value /= np.sqrt(np.prod(leaf.shape[:-1])) if name == "kernel" else 1
        return jnp.asarray(value, leaf.dtype)

    init = functools.partial(model.init, **kwargs)
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, jax.random.key(0), x))


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, dict(found), dict(expected))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.0, name="norm")
        return nn.relu(norm(nn.Dense(x.shape[-1], name="layer")(x))), None


class Stack(nn.Module):
    """Three blocks, one after the other or in a scan."""

    block: type = Block
    axes: tuple = (("params", 0), ("batch_stats", 0))

    @nn.compact
    def __call__(self, x, train=False):
        blocks = nn.scan(
            self.block,
            variable_axes=dict(self.axes),
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )
        return nn.Dense(2)(blocks(name="blocks")(x, train)[0])


REMAT = nn.remat(Block, static_argnums=(2,))
