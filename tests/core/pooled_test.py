"""Leaves in one program: as each of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.core import meshes, pooled


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_map_and_sum(backend, monkeypatch):
    """In a loop, or as accelerators do it; leaves below, at and above the size of a part."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(0)
    shapes = [(3,), (pooled.PART,), (5, 7, 200), (2, 1, 3)]
    arrays = [tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for _ in range(2)) for s in shapes]
    numbers = [(jnp.asarray(float(i)), jnp.asarray([1.0, i])) for i in range(len(shapes))]

    def fn(x, y, number, pair):
        return x + number, x * y, y * pair[1]

    found = jax.jit(lambda: pooled.map_and_sum(fn, arrays, numbers))()
    for (x, y), (number, pair), (first, *sums) in zip(arrays, numbers, found, strict=True):
        np.testing.assert_array_equal(first, x + number)
        np.testing.assert_allclose(sums[0], jnp.sum(x * y), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(sums[1], jnp.sum(y * pair[1]), rtol=1e-4, atol=1e-4)


QUANTIZERS = {
    "expectation": qj.srq(3),
    "mode": qj.srq(4, estimator="mode"),
    "with biases": qj.srq(3, biases=True),
    "some per channel": qj.srq(3, axes={"Dense_1": "channel", ".*": "tensor"}),
    "dropbits": qj.srq(3, dropbits=True),
    "dropbits mode": qj.srq(4, dropbits=True, estimator="mode"),
    "learned": qj.srq(3, learn_bits=True, freeze_after=0),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_srq_of_many_leaves_is_that_of_each(name, monkeypatch, quick_programs):
    quantizer = QUANTIZERS[name]
    rng = np.random.default_rng(0)
    shapes = ((3, 3, 4, 40), (40, 150), (7, 5))
    params = {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
        }
        for i, shape in enumerate(shapes)
    }
    pulls = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)
    state = quantizer.init(params, jax.random.key(0))
    key = jax.random.key(1) if "mask_logits" in state.learned["Dense_0/kernel"] else None

    @jax.jit
    def run(params, learned):
        def total(params, learned):
            values = quantizer.apply(params, state._replace(learned=learned), key=key)
            return sum(map(jnp.vdot, *map(jax.tree.leaves, (values, pulls)))), values

        return jax.grad(total, (0, 1), has_aux=True)(params, learned)

    (by_params, by_learned), values = run(params, state.learned)
    monkeypatch.setattr(meshes, "one_device", lambda tree: True)
    run = jax.jit(run.__wrapped__)
    (found_params, found_learned), found = run(params, state.learned)
    jax.tree.map(np.testing.assert_array_equal, found, values)
    near = {"rtol": 1e-5, "atol": 1e-6}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **near), found_params, by_params)
    # Sums over thousands of terms of both signs, in another order.
    near = {"rtol": 1e-3, "atol": 1e-3}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **near), found_learned, by_learned)


def test_half_precision_leaves_keep_their_dtype(monkeypatch):
    monkeypatch.setattr(meshes, "one_device", lambda tree: True)
    params = {f"Dense_{i}": {"kernel": jnp.ones((8, 4), jnp.bfloat16)} for i in range(2)}
    quantizer = qj.srq(3)
    state = quantizer.init(params)
    grads = jax.grad(lambda p: sum(jnp.sum(x) for x in jax.tree.leaves(quantizer.apply(p, state))))(
        params
    )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", ["expectation", "dropbits mode"])
def test_only_where_one_device_is_all_there_is(name, monkeypatch):
    """Eight simulated devices: nothing is concatenated, which would gather what they hold."""
    params = {f"Dense_{i}": {"kernel": jnp.ones((8, 4))} for i in range(2)}
    quantizer = QUANTIZERS[name]
    state, key = quantizer.init(params), jax.random.key(0)
    text = str(jax.make_jaxpr(lambda p: quantizer.apply(p, state, key=key))(params))
    assert str(pooled.PART) not in text
    assert not meshes.one_device(params)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert meshes.one_device(params)
