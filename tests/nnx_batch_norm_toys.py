"""NNX models with batch norms, and what their tests compare with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EPSILON = 1e-5


def data(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


class Net(nnx.Module):
    def __init__(self, rngs, **kwargs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, **kwargs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.hidden = nnx.Linear(4, 5, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(5, rngs=rngs, **kwargs)])
        self.out = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        return self.out(nnx.relu(self.norms[0](self.hidden(self.drop(x)))))


class Line(nnx.Module):
    """wire(model, x) with layers of four channels, in evaluation mode."""

    def __init__(self, wire, layer=None, **kwargs):
        rngs = nnx.Rngs(0)
        self.wire = wire
        self.layer = layer(rngs) if layer else nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs, **kwargs)
        self.other = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.more = nnx.Linear(4, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.wire(self, x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, momentum=0.0)

    def __call__(self, x):
        return nnx.relu(self.norm(self.layer(x)))


class Stack(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.vmap(Block)(rngs.split(3))

    def __call__(self, x):
        axes = {"in_axes": (nnx.Carry, 0), "out_axes": nnx.Carry}
        return nnx.scan(lambda x, block: block(x), **axes)(x, self.blocks)


def randomized(model, seed=0):
    """Statistics and parameters of a trained network, as it were; scales of both signs."""
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        for name in ("bias", "mean"):
            if isinstance(variable := getattr(module, name, None), nnx.Variable):
                variable[...] = jnp.asarray(rng.normal(size=variable.shape), variable.dtype)
        for name in ("var", "scale"):
            if isinstance(variable := getattr(module, name, None), nnx.Variable):
                sign = rng.choice([-1, 1], variable.shape) if name == "scale" else 1
                drawn = rng.uniform(0.3, 3, variable.shape) * sign
                variable[...] = jnp.asarray(drawn, variable.dtype)
    return model


def stats(norm):
    return {"mean": norm.mean[...], "var": norm.var[...]}


def union_of(stats, sizes):
    n = np.asarray(sizes, np.float64)[:, None] / sum(sizes)
    mean, var = (np.stack([np.asarray(s[k], np.float64) for s in stats]) for k in ("mean", "var"))
    center = (n * mean).sum(0)
    return {"mean": center, "var": (n * (var + (mean - center) ** 2)).sum(0)}


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(close, dict(found), dict(expected))


def values(model):
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {"/".join(map(str, path)): leaf[...] for path, leaf in flat}


def straight(model, x):
    return nnx.relu(model.norm(model.layer(x)))
