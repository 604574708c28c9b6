"""The laws of the design, for every quantizer in the library. A new method is one line here."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax.methods.l0 import l0


def channels(path, leaf):
    del path
    return tuple(range(-leaf.ndim, -1))


QUANTIZERS = {
    "uniform 2": lambda: qj.uniform(2),
    "uniform 3": lambda: qj.uniform(3),
    "uniform 8": lambda: qj.uniform(8),
    "uniform 16": lambda: qj.uniform(16),
    "uniform per channel": lambda: qj.uniform(4, axes=channels),
    "uniform running": lambda: qj.uniform(4, momentum=0.1),
    "uniform with biases": lambda: qj.uniform(4, biases=True),
    "zero": lambda: qj.zero(),
    "partition": lambda: qj.partition(
        {"Conv_0": qj.uniform(8), ".*bias": None, ".*": qj.uniform(3, axes=channels)}
    ),
    "rq": lambda: qj.rq(3),
    "rq straight-through": lambda: qj.rq(2, straight_through=True, axes=channels, biases=True),
    "srq 1": lambda: qj.srq(1),
    "srq 4": lambda: qj.srq(4),
    "srq 8": lambda: qj.srq(8, estimator="expectation"),
    "srq per channel": lambda: qj.srq(3, axes=channels, biases=True),
    "dropbits 2": lambda: qj.srq(2, dropbits=True),
    "dropbits 4": lambda: qj.srq(4, dropbits=True, axes=channels),
    "dropbits expectation": lambda: qj.srq(3, dropbits=True, estimator="expectation"),
    "dropbits learned": lambda: qj.srq(4, learn_bits=True, freeze_after=2, biases=True),
    "chain": lambda: qj.chain(qj.uniform(6), qj.uniform(3)),
    "multi-bit": lambda: qj.multi_bit(2, axes=channels),
    "magnitude": lambda: qj.magnitude(0.3),
    "magnitude gradual": lambda: qj.magnitude(0.3, across=True, end=2, every=1),
    "surgery": lambda: qj.surgery(0.3, end=2),
    "n of m": lambda: qj.n_m(2, 4, every=2),
    "focused 5": lambda: qj.focused(5, min_separation=0.0, refit_every=1),
    "focused, one mode": lambda: qj.focused(3, min_separation=math.inf, bias="error"),
    "surgery and focused": lambda: qj.chain(qj.surgery(0.3, end=2), qj.focused(4, refit_every=1)),
    "l0": lambda: l0(1e-3, prob=0.6),
    "pruned": lambda: qj.pruned({"Dense_0": {"kernel": make_params()["Dense_0"]["kernel"] > 0}}),
}
# Grids fixed by the state, whose levels are the grid: applying twice changes nothing.
IDEMPOTENT = set(QUANTIZERS) - {"l0"}  # its gates are fractions, too
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def make_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "Conv_0": {"kernel": normal(3, 3, 8, 16), "bias": normal(16)},
        "BatchNorm_0": {"scale": normal(16), "bias": normal(16)},
        "Dense_0": {"kernel": normal(32, 24), "bias": normal(24)},
    }


@pytest.fixture(params=QUANTIZERS)
def name(request):
    return request.param


@pytest.fixture
def quantizer(name):
    return QUANTIZERS[name]()


def bits_of(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def half_way(quantizer, params, state):
    """Moves weights to the borders between levels, found by bisection on what `apply` does."""
    values = jax.tree.leaves(quantizer.apply(params, state))
    owned = jax.tree.leaves(qj.owned(state, params))
    leaves, treedef = jax.tree.flatten(params)
    out = []
    for leaf, value, mine in zip(leaves, values, owned, strict=True):
        if mine:
            levels = np.unique(np.asarray(value, np.float64))
            borders = (levels[1:] + levels[:-1]) / 2 if len(levels) > 1 else levels
            flat = np.asarray(leaf).ravel().copy()
            flat[: flat.size // 2] = np.resize(borders, flat.size // 2)
            leaf = jnp.asarray(flat.reshape(leaf.shape), leaf.dtype)
        out.append(leaf)
    return treedef.unflatten(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_law_1_what_you_train_is_what_you_ship(quantizer, dtype):
    params = make_params(dtype)
    state = quantizer.init(params, jax.random.key(0))
    for weights in (params, half_way(quantizer, params, state)):
        applied = jax.jit(quantizer.apply)(weights, state)
        decoded = jax.jit(qj.decode)(quantizer.encode(weights, state))
        for a, b in zip(jax.tree.leaves(applied), jax.tree.leaves(decoded), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_law_2_applying_twice_changes_nothing(name, quantizer, dtype):
    if name not in IDEMPOTENT:
        pytest.skip("levels depend on what is quantized")
    params = make_params(dtype)
    state = quantizer.init(params)
    apply = jax.jit(quantizer.apply)
    once = apply(params, state)
    jax.tree.map(np.testing.assert_array_equal, apply(once, state), once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_law_3_structure_shapes_dtypes_and_unowned_leaves(quantizer, dtype):
    params = make_params(dtype)
    state = quantizer.init(params)
    for key in (None, jax.random.key(1)):
        applied = quantizer.apply(params, state, key=key)
        assert jax.tree.structure(applied) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(applied), jax.tree.leaves(params), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    encoded = quantizer.encode(params, state)
    for tree in (applied, encoded):
        assert tree["BatchNorm_0"]["scale"] is params["BatchNorm_0"]["scale"]


def extreme_params():
    params = make_params()
    kernel = np.array(params["Dense_0"]["kernel"])
    kernel[0, 0], kernel[0, 1] = 1e6, -1e6
    return {
        "far": {**params, "Dense_0": {**params["Dense_0"], "kernel": jnp.asarray(kernel)}},
        "zero": jax.tree.map(jnp.zeros_like, params),
        "tiny": jax.tree.map(lambda leaf: leaf * 1e-40, params),
    }


def test_law_4_gradients_are_finite(quantizer):
    @jax.jit
    def run(weights, learned, buffers):
        def total(weights, learned):
            applied = quantizer.apply(weights, qj.QuantState(learned, buffers))
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(applied))

        return jax.value_and_grad(total, argnums=(0, 1))(weights, learned)

    for what, weights in extreme_params().items():
        for fitted_to in (make_params(), weights):
            for leaf in jax.tree.leaves(run(weights, *quantizer.init(fitted_to))):
                assert bool(jnp.all(jnp.isfinite(leaf))), what


def test_law_4_single_element_leaves(name):
    if name in ("partition", "pruned"):
        pytest.skip("its patterns name other leaves")
    if name == "multi-bit":
        pytest.skip("a group has two elements or more")
    quantizer = QUANTIZERS[name]()
    params = {"Dense_0": {"kernel": jnp.full((1, 1), 0.3), "bias": jnp.full((1,), -0.2)}}
    state = quantizer.init(params)
    decoded = qj.decode(quantizer.encode(params, state))
    grads = jax.grad(lambda p: quantizer.apply(p, state)["Dense_0"]["kernel"].sum())(params)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((decoded, grads)))


def test_law_4_vmap_over_a_leading_axis(quantizer):
    several = [make_params(seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    states = [quantizer.init(params) for params in several]
    stacked_state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    applied = jax.jit(jax.vmap(quantizer.apply))(stacked, stacked_state)
    one_by_one = [jax.jit(quantizer.apply)(p, s) for p, s in zip(several, states, strict=True)]
    jax.tree.map(
        lambda whole, *parts: np.testing.assert_array_equal(whole, np.stack(parts)),
        applied,
        *one_by_one,
    )
    encoded = [quantizer.encode(p, s) for p, s in zip(several, states, strict=True)]
    stacked_codes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *encoded)
    for decoded in (jax.vmap(qj.decode)(stacked_codes), qj.decode(stacked_codes)):
        jax.tree.map(np.testing.assert_array_equal, decoded, applied)


@pytest.mark.parametrize("axis", [0, -1])
def test_law_5_no_leaf_is_gathered(quantizer, axis):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def spec(leaf):
        places = [None] * leaf.ndim
        if leaf.shape[axis] % 8 == 0:
            places[axis] = "d"
        elif leaf.ndim == 4:
            places[2] = "d"
        return NamedSharding(mesh, P(*places))

    params = make_params()
    shardings = jax.tree.map(spec, params)
    params = jax.device_put(params, shardings)
    state = quantizer.init(params)
    for fn in (quantizer.apply, quantizer.update):
        compiled = jax.jit(fn).lower(params, state).compile()
        assert "all-gather" not in compiled.as_text()
    applied = jax.jit(quantizer.apply)(params, state)
    for leaf, sharding in zip(jax.tree.leaves(applied), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def stored_bits(leaf):
    """Counts what storage would write, from the arrays themselves."""
    if isinstance(leaf, qj.Grid):
        stream, scales = leaf.codes.size * leaf.bits, leaf.step
    elif isinstance(leaf, qj.Table):
        stream, scales = leaf.codes.size * leaf.bits, leaf.levels
    elif isinstance(leaf, qj.MultiBit):
        kept = np.asarray(leaf.mask).sum(-1).ravel()
        per_group = np.prod(leaf.basis.shape[:-1]) // kept.size
        stream = sum(per_group * k for k in kept) + kept.size * int(kept.max()).bit_length()
        scales = np.zeros(kept.sum(), leaf.coords.dtype)
    else:
        return leaf.nbytes * 8
    return -(-int(stream) // 8) * 8 + scales.nbytes * 8


def test_law_6_nbits_is_what_storage_writes(quantizer):
    params = make_params()
    encoded = quantizer.encode(params, quantizer.init(params))
    coded = (qj.Grid, qj.Table, qj.MultiBit)
    leaves = jax.tree.leaves(encoded, is_leaf=lambda leaf: isinstance(leaf, coded))
    for leaf in leaves:
        if isinstance(leaf, coded):
            assert leaf.nbits == stored_bits(leaf)
            leaf.validate()
    assert qj.summary(encoded).nbytes * 8 == sum(map(stored_bits, leaves))


def test_law_7_update_keeps_the_state_and_compiles_once(quantizer):
    params = make_params()
    state = quantizer.init(params)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(params, state, key):
        traces.append(None)
        return quantizer.update(params, state, key=key)

    layout = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    moved = jax.tree.map(jnp.copy, state)
    for step in range(3):
        params = jax.tree.map(lambda leaf: leaf * 1.5, params)
        moved = update(params, moved, jax.random.key(step))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), moved) == layout
    assert len(traces) == 1
    jax.tree.map(np.testing.assert_array_equal, moved.learned, state.learned)


def test_penalty_is_a_finite_scalar(quantizer):
    state = quantizer.init(make_params())
    for key in (None, jax.random.key(0)):
        penalty = quantizer.penalty(state, key=key)
        assert jnp.shape(penalty) == ()
        assert bool(jnp.isfinite(penalty))
