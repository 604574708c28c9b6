"""Functions that run as on Auto axes, and how their results lie on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from quantjax.core import meshes


def sorts(x, scale):
    """What raises on Explicit axes: a sort over a sharded axis, and results of other shapes."""
    order = jnp.sort(x, axis=0)
    return {"leaf": order * scale, "group": order.max(0, keepdims=True), "count": jnp.int32(3)}


@jax.custom_vjp
def doubled(x):
    return jnp.sort(x.ravel())[jnp.argsort(jnp.argsort(x.ravel()))].reshape(x.shape) * 2


doubled.defvjp(lambda x: (doubled(x), None), lambda _, ct: (jnp.sort(ct, axis=0) * 2,))


@pytest.fixture(params=[(4, 2), (1, 1)])
def leaf(request):
    mesh = jax.make_mesh(request.param, ("a", "b"), devices=jax.devices()[: np.prod(request.param)])
    assert AxisType.Explicit in mesh.axis_types
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    return jax.device_put(x, NamedSharding(mesh, P("a", "b")))


def specs(tree):
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


@pytest.mark.parametrize("jit", [True, False])
def test_results_are_sharded_along_the_axes_they_share_with_the_leaf(leaf, jit):
    def run(x, scale):
        return meshes.shaped_as(x, sorts, x, scale)

    found = (jax.jit(run) if jit else run)(leaf, jnp.float32(2))
    assert specs(found) == {"leaf": P("a", "b"), "group": P(None, "b"), "count": P()}
    expected = sorts(np.asarray(leaf), np.float32(2))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    moved = (jax.jit if jit else lambda f: f)(
        lambda x, old: meshes.typed_as(old, sorts, x, jnp.float32(1))
    )(leaf, found)
    assert specs(moved) == specs(found)


def test_gradients_and_vmap_go_through(leaf):
    def run(x):
        return meshes.typed_as(x, doubled, x)

    grad = jax.jit(jax.grad(lambda x: jnp.sum(run(x) ** 2)))(leaf)
    assert jax.typeof(grad) == jax.typeof(leaf)
    np.testing.assert_allclose(grad, 8 * np.sort(np.asarray(leaf), 0), rtol=1e-6)
    layers = jnp.stack([leaf, 2 * leaf])
    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(layers), 2 * np.asarray(layers))


def test_without_a_mesh_nothing_is_wrapped():
    x = jnp.ones((2, 3))
    assert meshes.typed_as(x, lambda x: x, x) is x
    assert meshes.part(x, ()) is x


def test_a_layer_keeps_the_sharding_of_its_other_axes():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    layers = jnp.arange(96.0).reshape(4, 4, 6)
    for place in (P("a", None, "b"), P(None, "a", "b")):
        x = jax.device_put(layers, NamedSharding(mesh, place))
        for index in ((2,), (2, 1)):
            found = meshes.part(x, index)
            np.testing.assert_array_equal(found, layers[index])
            assert jax.typeof(found).sharding.spec == P(*place[len(index) :])


def test_a_program_is_kept_by_its_function(leaf):
    traces = []

    def fn(x):
        traces.append(None)
        return x + 1

    for _ in range(3):
        meshes.typed_as(leaf, fn, leaf)
    assert len(traces) == 1
