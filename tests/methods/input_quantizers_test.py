"""What holds for every quantizer of layer inputs: first grids, states, passes, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import quantjax as qj
from quantjax.core import passes
from tests import quick

QUANTIZERS = {
    "uniform": qj.uniform_input,
    "srq": qj.srq_input,
    "rq": qj.rq_input,
    "multi_bit": qj.multi_bit_input,
    "lsq": qj.lsq_input,
    "pact": qj.pact_input,
}
each = pytest.mark.parametrize("make", QUANTIZERS.values(), ids=QUANTIZERS)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def init(make, bits=2, **kwargs):
    return quick.jit(make(bits, **kwargs).init)


@functools.cache
def update(make, bits=2, **kwargs):
    return quick.jit(functools.partial(make(bits, **kwargs).apply, update=True))


def after(state, **kwargs):
    return state._replace(buffers=passes.called(state.buffers, **kwargs))


def near(found, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), found, expected)


def squared_error(x, step, low, bits):
    x = np.asarray(x, np.float64)
    return np.sum((np.clip(np.round(x / step), low, low + 2**bits - 1) * step - x) ** 2)


def test_the_first_grids():
    """From 1000 even numbers in -1 .. 3; 0 .. 3 for those without signs."""
    x = jnp.linspace(-1, 3, 1001)
    assert qj.uniform_input(3).init(x).buffers["step"] == np.float32(4 / 7)
    assert qj.uniform_input(3).init(jnp.abs(x)).buffers["step"] == np.float32(3 / 7)
    tails = jnp.append(jnp.tile(jnp.asarray([1.0, -1.0]), 5000), 50.0)
    for make in (qj.srq_input, qj.rq_input, qj.lsq_input):
        for bits, batch, low in (
            (3, x, -4),
            (3, jnp.abs(x), 0),
            (2, tails, -2),
            (1, jnp.abs(x), 0),
        ):
            learned = init(make, bits)(batch).learned
            step = learned["step"] if "step" in learned else np.exp(learned["log_alpha"])
            best = min(squared_error(batch, s, low, bits) for s in np.geomspace(0.02, 60, 2000))
            assert squared_error(batch, float(step), low, bits) <= 1.01 * best
            if "log_sigma" in learned:
                np.testing.assert_allclose(np.exp(learned["log_sigma"]), step / 3, rtol=1e-5)
    # Even numbers have even levels: at the middles of four parts of -1 .. 3.
    buffers = init(qj.multi_bit_input)(x).buffers
    np.testing.assert_allclose(buffers["ref"], 1, atol=2e-2)
    np.testing.assert_allclose(np.sort(buffers["coords"]), [0.5, 1], atol=2e-2)


@each
def test_a_state_of_another_width_is_an_error_where_it_can_be_seen(make):
    x = normal(4, 3)
    four, two = make(4), make(2)
    state = init(make, 4)(x)
    for new in (False, True):
        with pytest.raises(ValueError, match=r"the state has 4 bits, the quantizer 2: .*calibrate"):
            two.apply(x, state, update=new)
    if make is not qj.multi_bit_input:  # there shapes tell, in jit, too
        served = jax.jit(two.apply)(x, state)[0]
        np.testing.assert_array_equal(served, jax.jit(four.apply)(x, state)[0])
    assert make(np.int64(2)).init(x).buffers.keys() == two.init(x).buffers.keys()


def test_a_state_of_another_quantizer_is_an_error():
    x = normal(4, 3)
    with pytest.raises(ValueError, match=r"made by another quantizer, it has no 'levels'"):
        qj.uniform_input(2).apply(x, qj.srq_input(2).init(x))
    with pytest.raises(ValueError, match=r"made by another quantizer, it has no 'coords'"):
        qj.multi_bit_input(2).apply(x, qj.uniform_input(2).init(x))
    with pytest.raises(ValueError, match=r"takes one array, the input of a layer, got dict"):
        qj.srq_input(2).init({"Dense_0": {"kernel": x}})
    assert repr(qj.srq_input(2, signed=True)) == "srq_input(2, signed=True)"


@each
def test_several_calls_of_the_first_pass_are_fitted_together(make):
    x, y = normal(40, 3), 5 * normal(60, 3, seed=1) - 1
    state = after(init(make)(x), fitting=True)
    _, state = update(make)(y, state)
    both = init(make)(jnp.concatenate([x, y]))
    names = ("low", "high", "step", "levels", "ref", "coords", "least", "count")
    loose = 0.01 if make is qj.multi_bit_input else 1e-5
    near(state.learned, both.learned)
    for name in both.buffers.keys() & set(names):
        np.testing.assert_allclose(state.buffers[name], both.buffers[name], loose, loose)


@pytest.mark.parametrize("make", [qj.uniform_input, qj.multi_bit_input])
@pytest.mark.parametrize("momentum", [0.25, 1.0])
def test_several_calls_of_a_later_pass_count_once(make, momentum):
    first, x, y = normal(40, 3), 3 * normal(40, 3, seed=1), 5 * normal(60, 3, seed=2) - 1
    move = update(make, momentum=momentum)
    state = init(make)(first)
    _, once = move(jnp.concatenate([x, y]), state)
    _, twice = move(x, state)
    _, twice = move(y, after(twice))
    names = ("low", "high", "step", "ref", "coords")
    for name in once.buffers.keys() & set(names):
        np.testing.assert_allclose(twice.buffers[name], once.buffers[name], 1e-4, 1e-5)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(twice), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_steps_of_rq_are_passes():
    x = normal(4, 3)
    _, state = update(qj.rq_input)(x, init(qj.rq_input)(x))
    _, state = update(qj.rq_input)(x, after(state))
    assert state.buffers["count"] == 1


@each
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_statistics_skip_what_is_not_finite(make, value):
    x, y = normal(40, 3), 2 * normal(40, 3, seed=1)
    holes = jnp.arange(120).reshape(40, 3) % 7 == 0
    bad = jnp.where(holes, value, y)
    good = y[~holes]
    state = init(make)(x)
    found, expected = init(make)(bad), init(make)(good)
    near(found, expected, 1e-3, 1e-3)
    found, expected = update(make)(bad, state)[1], update(make)(good, state)[1]
    near(found, expected, 1e-3, 1e-3)
    _, same = update(make)(jnp.full((40, 3), value), state)
    near(same.learned, state.learned)
    names = ("low", "high", "step", "levels", "least", "ref", "coords", "zero_point")
    for name in state.buffers.keys() & set(names):
        np.testing.assert_allclose(same.buffers[name], state.buffers[name], rtol=1e-6)
    # A call without finite values leaves the pass to those after it.
    _, later = update(make)(y, after(same))
    for name in state.buffers.keys() & set(names):
        expected = update(make)(y, state)[1].buffers[name]
        np.testing.assert_allclose(later.buffers[name], expected, 1e-5, 1e-6)


@each
def test_with_an_axis_name_all_devices_have_one_state(make, quick_programs):
    x, y = normal(16, 3), 3 * normal(16, 3, seed=1)
    here, there = make(2), make(2, axis_name="batch")
    split = jax.tree.map(lambda a: a.reshape(8, 2, 3), (x, y))

    def run(x, y):
        return there.apply(y, there.init(x), update=True)[1]

    found = jax.pmap(run, axis_name="batch")(*split)
    expected = quick.jit(lambda x, y: here.apply(y, here.init(x), update=True)[1])(x, y)
    for i in (0, 7):
        near(jax.tree.map(lambda leaf, i=i: leaf[i], found), expected)
    mesh = jax.make_mesh((8,), ("batch",))
    data, whole = PartitionSpec("batch"), PartitionSpec()
    if make in (qj.uniform_input, qj.multi_bit_input):  # no custom_vjp: any jax takes it
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(data, data), out_specs=whole)
        x, y = (jax.device_put(a, NamedSharding(mesh, data)) for a in (x, y))
        near(jax.jit(mapped)(x, y), expected)


@each
@pytest.mark.parametrize("shape", [(16, 3), (256, 520)])
def test_explicit_meshes(make, shape, quick_programs):
    sharding = NamedSharding(jax.make_mesh((8,), ("batch",)), PartitionSpec("batch"))
    quantizer, x = make(2), normal(*shape)
    there = jax.device_put(x, sharding)
    state, sharded = init(make)(x), quantizer.init(there)
    near(sharded, state)
    run = quick.jit(quantizer.apply, static_argnames="update")
    for new in (False, True):
        expected = run(2 * x, state, update=new)
        compiled = run.lower(there, sharded, update=new).compile()
        assert "all-gather" not in compiled.as_text()
        for fn in (run, quantizer.apply) if shape[0] == 16 else (run,):
            found = fn(2 * there, sharded, update=new)
            assert jax.typeof(found[0]) == jax.typeof(there)
            assert jax.tree.map(jax.typeof, found[1]) == jax.tree.map(jax.typeof, sharded)
            near(found, expected)
