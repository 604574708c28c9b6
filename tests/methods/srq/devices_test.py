"""SRQ, DropBits, RQ and L0 on meshes, under shard_map, and part by part on one CPU."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import quantjax as qj
from quantjax.methods import hard_concrete
from quantjax.methods.l0 import l0
from quantjax.methods.srq import estimators, group_sums, semi_relaxed
from tests import quick

pytestmark = pytest.mark.usefixtures("quick_compilation")

QUANTIZERS = {
    "srq": lambda: qj.srq(4),
    "srq 8": lambda: qj.srq(8),
    "srq mode": lambda: qj.srq(4, estimator="mode", axes="channel"),
    "dropbits": lambda: qj.srq(3, dropbits=True, axes="channel"),
    "dropbits mode": lambda: qj.srq(4, dropbits=True, estimator="mode"),
    "dropbits learned": lambda: qj.srq(3, learn_bits=True),
    "rq": lambda: qj.rq(2),
    "l0": lambda: l0(1e-3),
}
SOFT = ("rq", "l0")  # with a key they give floats, not levels
BOTH = (AxisType.Auto, AxisType.Explicit)
each = pytest.mark.parametrize("name", QUANTIZERS)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def near(found, expected, tolerance):
    """Within a tolerance of the largest number of each array."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1e-3, np.max(np.abs(b), initial=0)))


def programs(quantizer, buffers, key):
    key = None if key is None else jax.random.key(key)

    def apply(kernel, learned):
        state = qj.QuantState(learned, buffers)
        return quantizer.apply({"kernel": kernel}, state, key=key)["kernel"]

    return apply, jax.grad(lambda *args: jnp.sum(apply(*args) ** 3), (0, 1))


def gathered(text, size):
    """The all-gathers of a compiled text whose result has as many elements as that."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    return [dims for dims in found if math.prod(map(int, dims.split(",") if dims else [])) >= size]


def check_mesh(name, key, shape, kind, sizes, spec):
    """Values, gradients and shardings of one device, and nothing that gathers a leaf."""
    quantizer, kernel = QUANTIZERS[name](), normal(*shape)
    learned, buffers = quantizer.init({"kernel": kernel}, jax.random.key(0))
    run = programs(quantizer, buffers, key)
    expected = [quick.jit(fn)(kernel, learned) for fn in run]
    mesh = jax.make_mesh(sizes, ("a", "b")[: len(sizes)], axis_types=(kind,) * len(sizes))
    place, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (spec, ()))
    args = jax.tree.map(
        lambda x: jax.device_put(x, place if x.shape == shape else whole), (kernel, learned)
    )
    compiled = [quick.jit(fn).lower(*args).compile() for fn in run]
    value, grads = (fn(*args) for fn in compiled)
    near(value, expected[0], 1e-6 if name in SOFT and key is not None else 0)
    near(grads[0], expected[1][0], 1e-6)
    near(grads[1], expected[1][1], 1e-5)  # sums, in another order
    for found in (value, grads[0]):
        assert found.sharding.is_equivalent_to(place, 2), found.sharding
    for text in (fn.as_text() for fn in compiled):
        assert not gathered(text, kernel.size // 2)


@pytest.mark.parametrize("kind", BOTH, ids=str)
@pytest.mark.parametrize("name", ["srq", "dropbits", "dropbits mode"])
def test_large_leaves_on_a_mesh(name, kind):
    check_mesh(name, 3, (512, 256), kind, (4, 2), ("a", "b"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH, ids=str)
@pytest.mark.parametrize("shape", [(32, 24), (512, 512)], ids=["small", "large"])
@pytest.mark.parametrize("key", [None, 3], ids=["no key", "key"])
@each
def test_other_leaves_on_other_meshes(name, key, shape, kind):
    for sizes, spec in (((4, 2), ("a", "b")), ((4, 2), (None, "b")), ((8,), ("a",))):
        check_mesh(name, key, shape, kind, sizes, spec)


@each
def test_shard_map_is_jit(name):
    """What is one on all devices has its cotangents summed over them."""
    quantizer, kernel = QUANTIZERS[name](), normal(16, 12)
    learned, buffers = quantizer.init({"kernel": kernel}, jax.random.key(0))
    kind = AxisType.Explicit if name == "dropbits" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    # With a key every device would draw the same numbers for its rows.
    apply, grad = programs(quantizer, buffers, None if name in SOFT else 3)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = rows, jax.tree.map(lambda x: rows if x.shape == kernel.shape else whole, learned)

    def loss(*args):
        return lax.psum(jnp.sum(apply(*args) ** 3), "data")

    mapped = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=whole)
    args = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), (kernel, learned), specs
    )
    near(quick.jit(jax.grad(mapped, (0, 1)))(*args), quick.jit(grad)(kernel, learned), 1e-5)


@pytest.mark.parametrize(
    ("estimator", "masked", "check"),
    [
        ("mode", False, True),
        ("mode", True, True),
        ("expectation", True, True),
        ("expectation", True, False),
    ],
)
def test_shard_map_of_functions(estimator, masked, check):
    """Masks differ by device: theirs and x's cotangents stay, those of alpha, sigma are summed."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    u = jnp.asarray(np.random.default_rng(1).uniform(0.2, 0.8, (8, 1, 3)), jnp.float32)
    args = normal(8, 6), jnp.float32(0.2), jnp.float32(0.07), u, jnp.full(3, 0.6)

    def loss(x, alpha, sigma, u, prob):
        masks = hard_concrete.from_uniform(u, prob) if masked else None
        x_hat = semi_relaxed.quantize(x, alpha, sigma, bits=4, masks=masks, estimator=estimator)
        return jnp.sum(x_hat**3)

    def of_part(*args):
        return lax.psum(loss(*args), "data")

    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = rows, whole, whole, rows, whole
    mapped = jax.shard_map(of_part, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=check)
    found, expected = (quick.jit(jax.grad(fn, range(5)))(*args) for fn in (mapped, loss))
    near(found, expected, 1e-5)


def test_large_arrays_go_part_by_part_where_one_cpu_is_all(monkeypatch):
    x = jnp.ones((3, 2 * group_sums.CHUNK))

    def loops(x):
        fn = jax.grad(lambda x: semi_relaxed.quantize(x, 0.2, 0.07, bits=2).sum())
        return str(jax.make_jaxpr(fn)(x)).count("scan[")

    assert loops(x) == 0  # eight devices: x may be sharded
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert loops(x) == 1
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    assert loops(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))) == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loops(x) == 0


@pytest.mark.parametrize("estimator", ["expectation", "mode"])
def test_slopes_are_the_gradient_of_a_grid_for_every_element(estimator, monkeypatch):
    x = normal(6, group_sums.CHUNK // 4)
    grid = jnp.float32(0.2), jnp.float32(0.07), jnp.float32(-8), jnp.float32(7)

    def found():
        return jax.jit(lambda x: estimators.slopes(x, *grid, estimator))(x)

    def x_hat(alpha, sigma):
        return estimators.on_grid(x, alpha, sigma, *grid[2:], estimator)

    spread = (jnp.full_like(x, number) for number in grid[:2])
    expected = jax.jit(lambda *grid: jax.vjp(x_hat, *grid)[1](jnp.ones_like(x)))(*spread)
    near(found(), expected, 1e-5)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # now part by part
    near(found(), expected, 1e-5)
