"""Training on several devices: batches over the axis `data`, weights in parts over `model`."""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from quantjax.core import paths

DATA, MODEL = AXES = ("data", "model")
# Which axis of a param, counted from the end, lies in parts over which axis of the mesh.
RULES = {".*(kernel|embedding)": {-1: MODEL}}


def make(text: str, axis_type: AxisType = AxisType.Auto) -> Mesh:
    """Returns the mesh of a text such as `data=8` or `data=4,model=2`, of the first devices.

    Raises:
      ValueError: another axis than data and model, no size, or more devices than there are.
    """
    sizes = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)=([1-9]\d*)\s*", part)
        if not found or found[1] in sizes:
            raise ValueError(f"a mesh is written as data=8 or data=4,model=2, got {text!r}")
        sizes[found[1]] = int(found[2])
    unknown = sizes.keys() - set(AXES)
    if unknown:
        raise ValueError(f"a mesh has the axes {DATA} and {MODEL}, got {sorted(unknown)}")
    sizes = {axis: sizes.get(axis, 1) for axis in AXES}
    count = math.prod(sizes.values())
    if count > jax.device_count():
        raise ValueError(f"the mesh {text} needs {count} devices, found {jax.device_count()}")
    if jax.process_count() > 1 and count < jax.device_count():
        raise ValueError(f"of several processes all {jax.device_count()} devices take part")
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, (axis_type,) * 2, devices=jax.devices()[:count])


def check_batch(mesh: Mesh | None, batch_size: int):
    """Raises ValueError for a batch that does not divide over the mesh and the processes."""
    parts = 1 if mesh is None else mesh.shape[DATA]
    if batch_size % parts:
        raise ValueError(f"a batch of {batch_size} does not divide over {DATA}={parts}")


def shardings(tree, params, mesh: Mesh, rules: Mapping | None = None):
    """Returns where the leaves of a tree lie: those that belong to a param as it does.

    A leaf belongs to the param whose path is in its own (moments, masks, steps), and lies in parts
    along the axes that it shares with it and that divide. All else is copied to every device.

    Args:
      tree: arrays.
      params: the model's.
      mesh: with the axes of the rules.
      rules: {pattern of a param's path, as in `qj.partition`: {axis from the end: axis of the
        mesh}}, the first match wins; None: `RULES`.

    Raises:
      ValueError: a rule names another axis than the mesh has.
    """
    rules = RULES if rules is None else rules
    for axis in {axis for rule in rules.values() for axis in rule.values()} - set(mesh.shape):
        raise ValueError(f"a rule names the axis {axis!r}, the mesh has {list(mesh.shape)}")
    shapes = {path: leaf.shape for path, leaf in paths.flatten(params)[0].items()}
    # The longest first: `Block_0/Dense_0/kernel` before `Dense_0/kernel`.
    owners = sorted(shapes, key=len, reverse=True)

    def place_leaf(key_path, leaf):
        where = f"/{jax.tree_util.keystr(key_path, simple=True, separator='/')}/"
        owner = next((path for path in owners if f"/{path}/" in where), None)
        spec = [None] * leaf.ndim
        pattern = None if owner is None else paths.first_match(rules, owner)
        shape = shapes.get(owner, ())
        if pattern is not None and len(shape) == leaf.ndim:
            for axis, name in rules[pattern].items():
                whole = -axis <= leaf.ndim and leaf.shape[axis] == shape[axis]
                if whole and mesh.shape[name] > 1 and shape[axis] % mesh.shape[name] == 0:
                    spec[axis] = name
        # As JAX writes the specs of its results: another spelling would be compiled again.
        while spec and spec[-1] is None and AxisType.Explicit not in mesh.axis_types:
            spec.pop()
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place_leaf, tree)


def replicated(tree, mesh: Mesh):
    """Returns a tree with copies on every device of the mesh; what lies on it already stays."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(leaf):
        on_it = isinstance(leaf, jax.Array) and getattr(leaf.sharding, "mesh", None) == mesh
        return leaf if on_it else place(leaf, everywhere)

    return jax.tree.map(put, tree)


def place(tree, sharding):
    """Returns host or device arrays, the same in every process, where a sharding says.

    Args:
      sharding: one, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(place, tree, sharding)

    def put(leaf):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def gathered(tree, mesh: Mesh | None):
    """Returns a tree of whole arrays on this process's first device; as it is without a mesh."""
    if mesh is None:
        return tree

    def whole(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
            )
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_put(np.asarray(leaf), jax.local_devices()[0])

    return jax.tree.map(whole, tree)


class Feed:
    """Gives the training step its batches: on the device, or each process its part of them."""

    def __init__(self, split, mesh: Mesh | None):
        self._mesh = mesh
        if mesh is None:
            self.arrays = tuple(jnp.asarray(part) for part in split)
        elif jax.process_count() == 1:
            self.arrays = replicated(tuple(split), mesh)
        else:
            self.arrays = tuple(split)

    def batch(self, indices: np.ndarray):
        """Returns (arrays, indices), as steps take them; indices [batch] or [steps, batch]."""
        if self._mesh is None:
            return self.arrays, jnp.asarray(indices)
        spec = PartitionSpec(*[None] * (indices.ndim - 1), DATA)
        sharding = NamedSharding(self._mesh, spec)
        if jax.process_count() == 1:
            return self.arrays, jax.device_put(indices, sharding)
        # Every process reads the rows of its own devices only.
        rows = tuple(
            jax.make_array_from_callback(
                indices.shape + part.shape[1:],
                sharding,
                lambda index, part=part: part[indices[index[: indices.ndim]]],
            )
            for part in self.arrays
        )
        return rows, None
