"""Work on meshes whose axes are Explicit, as `jax.make_mesh` makes them.

There every operation states how its result is sharded, and some (sort, gather, scatter, reshapes,
choices between arrays of unequal shardings) raise. Here a function runs as on Auto axes, where the
compiler chooses, and its results are typed as the arrays that they belong to.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes


def explicit_mesh(tree):
    """Returns the mesh with Explicit axes that an array of the tree lies on, or None."""
    for leaf in jax.tree.leaves(tree):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def one_device(tree) -> bool:
    """True where one device is all there is, so that leaves may be cut up and joined.

    Under jit nobody can see whether an array lies on several devices: only their number tells.
    """
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return jax.device_count() == 1 and not manual and explicit_mesh(tree) is None


def typed_as(like, fn: Callable, *args):
    """Returns fn(*args), whose results lie as the arrays of `like` do; a tree of its structure.

    Args:
      like: arrays; those on no mesh stand for copies on every device.
      fn: pure, and the same object from call to call, since programs are kept by it.
      args: trees of arrays, or None.
    """
    mesh = explicit_mesh((like, args))
    if mesh is None:
        return fn(*args)
    leaves, treedef = jax.tree.flatten(like)
    return _run(fn, treedef, tuple(_place(leaf, mesh) for leaf in leaves), *args)


def placed(spec: PartitionSpec, mesh, fn: Callable, *args):
    """Returns fn(*args), one array, sharded as `spec` says on a mesh with Explicit axes."""
    return _run(fn, jax.tree.structure(0), (NamedSharding(mesh, spec),), *args)


def shaped_as(leaf, fn: Callable, *args):
    """Returns fn(*args), each result sharded along the axes that it shares with a leaf.

    Results of the leaf's rank (or more: axes of their own at the end) whose leading axes are
    the leaf's or 1 long are its groups or its elements. All others are copied to every device.

    Args:
      leaf: an array.
      fn, args: as in `typed_as`.
    """
    mesh = explicit_mesh((leaf, args))
    if mesh is None:
        return fn(*args)
    # Without shardings there are none to disagree about.
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    shapes, treedef = jax.tree.flatten(jax.eval_shape(fn, *plain))
    spec = tuple(_place(leaf, mesh).spec)

    def place(shape):
        lead = shape[: leaf.ndim]
        if len(lead) < leaf.ndim or any(
            n not in (1, size) for n, size in zip(lead, leaf.shape, strict=True)
        ):
            return NamedSharding(mesh, PartitionSpec())
        kept = [s if n == size else None for n, size, s in zip(lead, leaf.shape, spec, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*kept, *[None] * (len(shape) - leaf.ndim)))

    return _run(fn, treedef, tuple(place(found.shape) for found in shapes), *args)


def part(array, index: tuple[int, ...]):
    """Returns array[index] for leading axes, sharded along the others as before."""
    if not index:
        return array
    mesh = explicit_mesh(array)
    if mesh is None:
        return array[index]
    spec = tuple(_place(array, mesh).spec)[len(index) :]
    _, treedef = jax.tree.flatten(array)
    places = (NamedSharding(mesh, PartitionSpec(*spec)),)
    return _run(_take(index), treedef, places, array)


@functools.cache
def _take(index):
    return lambda array: array[index]


def _place(leaf, mesh):
    sharding = jax.typeof(leaf).sharding
    return NamedSharding(mesh, PartitionSpec()) if sharding.mesh.empty else sharding


# Unused arguments are kept: they alone may say on which devices it runs.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True)
def _run(fn, treedef, shardings, *args):
    # In jit even where the caller is not: arrays on one device may stand beside those on a mesh.
    return auto_axes(fn, out_sharding=treedef.unflatten(shardings))(*args)
