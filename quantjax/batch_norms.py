"""Statistics of batch norms over a union of batches: what `linen` and `nnx` have in common."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core import meshes

UNION = COUNT, MEAN, VAR = ("union_count", "union_mean", "union_var")


def arguments(x, use_running_average=None, *, mask=None):
    """Returns the arguments of a batch norm's call in order, however they were given."""
    return x, use_running_average, mask


def empty(mean, var) -> dict:
    """Returns the statistics of nothing, for `joined`; at least float32, sharded as the given."""
    zeros = [jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)) for x in (mean, mean, var)]
    return dict(zip(UNION, zeros, strict=True))


def values_per_channel(path: str, x, channels: set[int], mask, named: bool):
    """Returns how many values of x a mean is taken over: a number, or one per channel.

    Args:
      path: of the batch norm.
      x: its input.
      channels: the axes that are not averaged over.
      mask: which values count, or None.
      named: whether other devices, along a named axis, have more of them.

    Raises:
      ValueError: there is one value, which has no variance.
    """
    axes = tuple(axis for axis in range(x.ndim) if axis not in channels)
    count = math.prod(x.shape[axis] for axis in axes)
    if count < 2 and not named:
        raise ValueError(
            f"{path}: an input of shape {x.shape} gives this batch norm {count} value per channel, "
            "which has no variance; expected batches of two or more examples"
        )
    if mask is None:
        return count
    return jnp.sum(jnp.broadcast_to(mask, x.shape), axes, dtype=jnp.float32)


def joined(union: Mapping, count, mean, var) -> dict:
    """Returns the statistics of a union and `count` more values, whose mean and variance are given.

    mean = sum_i n_i mean_i / sum_i n_i; var = sum_i n_i (var_i + (mean_i - mean)^2) / sum_i n_i
    """
    return meshes.typed_as(dict(union), _joined, dict(union), count, mean, var)


def _joined(union, count, mean, var):
    total = union[COUNT] + count
    share = count / total
    shift = mean - union[MEAN]
    spread = share * (1 - share) * jnp.abs(shift) ** 2
    new = (total, union[MEAN] + share * shift, union[VAR] + share * (var - union[VAR]) + spread)
    return {name: value.astype(union[name].dtype) for name, value in zip(UNION, new, strict=True)}


def settled(old: Mapping, unions: Mapping) -> dict:
    """Returns the statistics of the unions, of the old ones' dtypes and shardings.

    Args:
      old: {path: {"mean": ..., "var": ...}}; those of which nothing was seen stay.
      unions: {path: union} with the same paths.

    Raises:
      ValueError: nothing was seen of any, or a mean or a variance is not finite (not under jit).
    """
    new, seen, finite = _settled(old, unions)
    if not any(isinstance(flag, jax.core.Tracer) for flag in finite.values()):
        seen, finite = jax.device_get((seen, finite))
        if not any(seen.values()):
            raise ValueError(f"the model ran none of its batch norms: {list(old)}")
        bad = [path or "the model itself" for path, fine in finite.items() if not fine]
        if bad:
            raise ValueError(
                f"the statistics of these batch norms are NaN or infinite: {bad}; expected finite "
                "batches and weights, and masks that leave every channel some values"
            )
    else:
        seen = dict.fromkeys(old, True)
    return {
        path: as_before(new[path], old[path]) if seen[path] else dict(old[path]) for path in old
    }


@jax.jit
def _settled(old, unions):
    new = {path: meshes.typed_as(old[path], _chosen, old[path], unions[path]) for path in old}
    seen = {path: jnp.any(union[COUNT] > 0) for path, union in unions.items()}
    finite = {
        path: jnp.all(jnp.isfinite(union[MEAN])) & jnp.all(jnp.isfinite(union[VAR]))
        for path, union in unions.items()
    }
    return new, seen, finite


def _chosen(old, union):
    return {
        name: jnp.where(union[COUNT] > 0, union[key], old[name]).astype(old[name].dtype)
        for name, key in (("mean", MEAN), ("var", VAR))
    }


def as_before(new, old):
    """Returns a tree of arrays that lie on the devices on which those of another tree lie."""

    def place(new, old):
        traced = isinstance(new, jax.core.Tracer)
        if traced or not isinstance(old, jax.Array) or new.sharding == old.sharding:
            return new
        # What was bound to no device is not bound to one afterwards.
        return jax.device_put(new, old.sharding) if old.committed else jnp.asarray(np.asarray(new))

    return jax.tree.map(place, new, old)
