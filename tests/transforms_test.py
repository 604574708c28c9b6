"""What every optax transformation of the library must do. A new one is one line here."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quantjax as qj

pytestmark = pytest.mark.usefixtures("quick_compilation")


def alq_and_sgd():
    phases = (qj.Phase("basis", 300, 0.05), qj.Phase("coordinate", 300, 0.01))
    parts = {"alq": qj.alq(qj.multi_bit(2, axes=-2), phases), "rest": optax.sgd(0.1)}

    def labels(params):
        return jax.tree.map_with_path(
            lambda path, leaf: "alq" if path[-1].key == "kernel" else "rest", params
        )

    return optax.partition(parts, labels)


# Whole optimizers; eps is large, so that a toy's weights pass the grid's levels in few steps.
TRANSFORMS = {
    "scale_by_position": lambda: optax.chain(
        qj.scale_by_position(qj.uniform(4), strength=2.0, eps=0.1), optax.sgd(0.1)
    ),
    "scale_by_position directional": lambda: optax.chain(
        qj.scale_by_position(qj.uniform(4, momentum=0.1), strength=1.0, eps=0.1, directional=True),
        optax.sgd(0.1),
    ),
    "scale_by_position sparse": lambda: optax.chain(
        qj.scale_by_position(qj.zero(), strength=2.0, eps=0.1), optax.sgd(0.1)
    ),
    "scale_by_position by layer": lambda: optax.chain(
        qj.scale_by_position(
            qj.partition({"Conv_0": qj.uniform(8), ".*kernel": qj.uniform(3)}),
            strength={"Conv_0": 1.0, ".*": 2.0},
            eps=0.1,
        ),
        optax.sgd(0.1),
    ),
    "psg": lambda: qj.psg(0.1, qj.uniform(4), strength=2.0, eps=0.1),
    "scaled before Adam": lambda: optax.chain(
        qj.scale_by_position(qj.uniform(4), strength=2.0), optax.adam(0.01)
    ),
    "scale_by_position of a schedule": lambda: optax.chain(
        qj.scale_by_position(qj.uniform(4), strength=optax.linear_schedule(1.0, 2.0, 10), eps=0.1),
        optax.sgd(0.1),
    ),
    "alq": alq_and_sgd,
    "proximal": lambda: qj.proximal(optax.sgd(0.1), qj.uniform(4), qj.hard()),
    "parq": lambda: qj.proximal(optax.adam(0.01), qj.uniform(4), qj.parq(qj.annealed(20))),
}
# What costs too much for all tests: sharding alone.
SHARDED = TRANSFORMS | {
    f"scale_by_position toward {name}": functools.partial(
        lambda make: qj.scale_by_position(make(), strength=2.0), make
    )
    for name, make in {
        "multi_bit": lambda: qj.multi_bit(2, "channel"),
        "surgery": lambda: qj.surgery(0.3, end=3),
        "n_m": lambda: qj.n_m(2, 4, every=1),
        "magnitude and focused": lambda: qj.chain(
            qj.magnitude(0.5), qj.focused(4, min_separation=0.0, refit_every=1)
        ),
        "srq": lambda: qj.srq(3),
    }.items()
}
SHARDED["projected_amsgrad"] = lambda: qj.projected_amsgrad(0.1, lambda point, metric: point)
# Factories for inject_hyperparams: (factory, arguments).
INJECTED = {
    "scale_by_position": (qj.scale_by_position, (qj.uniform(4),), {"strength": 2.0}),
    "psg": (qj.psg, (0.1, qj.uniform(4)), {"strength": 2.0, "directional": True}),
    "psg with a schedule": (qj.psg, (lambda t: 0.1 / (1 + t), qj.uniform(4)), {"strength": 2.0}),
}


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"Conv_0": (3, 3, 8, 16), "Dense_0": (32, 24)}
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), dtype),
            "bias": jnp.asarray(rng.normal(size=shape[-1:]), dtype),
        }
        for name, shape in shapes.items()
    }
    params["BatchNorm_0"] = {"scale": jnp.ones(16, dtype), "bias": jnp.zeros(16, dtype)}
    return params


@pytest.fixture(params=TRANSFORMS)
def transform(request):
    return TRANSFORMS[request.param]()


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(transform, dtype):
    params = make_params(dtype)
    grads = jax.tree.map(jnp.ones_like, params)
    state = transform.init(params)
    updates, moved = jax.jit(transform.update)(grads, state, params)
    assert dtypes(updates) == dtypes(params)
    assert dtypes(moved) == dtypes(state)


def test_extra_args_are_accepted(transform):
    params = make_params()
    chained = optax.with_extra_args_support(transform)
    state = chained.init(params)
    chained.update(params, state, params, value=jnp.ones(()), grad=params)


def test_params_must_be_given(transform):
    params = make_params()
    with pytest.raises(ValueError, match="params"):
        transform.update(params, transform.init(params))


def test_no_second_compilation_with_donated_buffers(transform):
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        traces.append(None)
        updates, state = transform.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = transform.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams(name, usual_programs):
    factory, args, kwargs = INJECTED[name]
    params = make_params()
    grads = jax.tree.map(jnp.cos, params)
    direct = factory(*args, **kwargs)
    injected = optax.inject_hyperparams(factory)(*args, **kwargs)
    states = direct.init(params), injected.init(params)
    assert "strength" in states[1].hyperparams
    for _ in range(2):
        expected, first = jax.jit(direct.update)(grads, states[0], params)
        actual, second = jax.jit(injected.update)(grads, states[1], params)
        states = first, second
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9), actual, expected
        )


def test_tree_map_params(transform):
    params = make_params()
    chained = optax.chain(transform, optax.scale_by_adam())
    state = chained.init(params)
    moved = optax.tree.map_params(chained, lambda leaf: leaf + 1, state)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    for leaf in jax.tree.leaves(moved[-1].mu):
        np.testing.assert_array_equal(leaf, jnp.ones_like(leaf))
    targets = (optax.tree.get(tree, "target") for tree in (state, moved))
    jax.tree.map(np.testing.assert_array_equal, *targets)


def test_multi_steps(transform):
    params = make_params()
    every = optax.MultiSteps(transform, every_k_schedule=2)
    state = every.init(params)
    update = jax.jit(every.update)
    first, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(first))
    second, state = update(
        jax.tree.map(lambda leaf: 3 * jnp.ones_like(leaf), params), state, params
    )
    expected, _ = jax.jit(transform.update)(
        jax.tree.map(lambda leaf: 2 * jnp.ones_like(leaf), params), transform.init(params), params
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), second, expected)


@pytest.mark.parametrize("split", [optax.partition, optax.multi_transform])
def test_partition(split):
    params = make_params()
    quantizer = qj.uniform(4)
    labels = jax.tree.map(
        lambda mine: "psg" if mine else "rest", qj.owned(quantizer.init(params), params)
    )
    scale = qj.scale_by_position(quantizer, strength=3.0)
    joined = split({"psg": scale, "rest": optax.identity()}, labels)
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(joined.update)
    actual, _ = update(grads, joined.init(params), params)
    expected, _ = jax.jit(scale.update)(grads, scale.init(params), params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual, expected
    )


def quadratic(params):
    return 0.5 * sum(jnp.sum((layer["kernel"] - 0.4) ** 2) for layer in params.values())


def log_cosh(params):
    distances = [layer["kernel"] - 0.4 for layer in params.values()]
    return sum(jnp.sum(jnp.log(jnp.cosh(distance))) for distance in distances)


@pytest.mark.parametrize("loss", [quadratic, log_cosh])
def test_converges_on_a_toy_target(transform, loss):
    rng = np.random.default_rng(1)
    params = {
        name: {"kernel": jnp.asarray(rng.uniform(-1, 2, size=(4, 6)), jnp.float32)}
        for name in ("Conv_0", "Dense_0")
    }
    state = transform.init(params)

    @jax.jit
    def step(params, state):
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    start = loss(params)
    for _ in range(1000):
        params, state = step(params, state)
    assert loss(params) < 0.2 * start


MESHES = [pytest.param((4, 2), id="4x2")] + [
    pytest.param(shape, marks=pytest.mark.slow, id="x".join(map(str, shape)))
    for shape in ((8,), (2, 4), (1,))
]


def spread(tree, shape, kind):
    """Lays leaves over a mesh, large ones over two axes where it has two, along the last ones."""
    names = ("a", "b")[: len(shape)]
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)

    def place(leaf):
        spec = [None] * leaf.ndim
        spec[-1] = names[-1]
        if leaf.ndim == 2 and len(names) == 2:
            spec[-2] = names[0]
        return jax.device_put(leaf, NamedSharding(mesh, P(*spec)))

    return jax.tree.map(place, tree)


def waves(tree, step):
    return jax.tree.map(lambda leaf: jnp.cos(leaf + step), tree)


def types(tree):
    return [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", SHARDED)
def test_sharding_is_kept_on_eight_devices(name, shape, kind):
    transform, alone = SHARDED[name](), make_params()
    params = spread(alone, shape, kind)
    state, state_alone = transform.init(params), transform.init(alone)
    update = jax.jit(transform.update)
    compiled = update.lower(params, state, params).compile()
    assert "all-gather" not in compiled.as_text()
    for step in range(2):
        grads, grads_alone = (waves(tree, step) for tree in (params, alone))
        updates, new = update(grads, state, params)
        expected, state_alone = update(grads_alone, state_alone, alone)
        if kind == AxisType.Explicit:
            assert types(updates) == types(params)
            assert types(new) == types(state)
        for leaf, old in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert leaf.sharding.is_equivalent_to(old.sharding, old.ndim)
        # An update of alq is a difference of weights, and as exact as they are.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6), updates, expected
        )
        state = new


ALQ_KINDS = ("prune", "basis", "coordinate", "ste-loss-aware", "ste-reconstruction")


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        (AxisType.Explicit, 1),
        (AxisType.Explicit, 4),
        (AxisType.Auto, 1),
        pytest.param(AxisType.Auto, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_phase_of_alq_keeps_shardings(shape, kind, blocks):
    alone = {name: {"kernel": make_params()[name]["kernel"]} for name in ("Conv_0", "Dense_0")}
    schedule = [qj.Phase(name, 1, 1e-2, 0.6) for name in ALQ_KINDS]
    transform = qj.alq(qj.multi_bit(2, -2, blocks=blocks), schedule)
    params = spread(alone, shape, kind)
    state, state_alone = transform.init(params), transform.init(alone)
    params, alone = qj.alq_params(state, params), qj.alq_params(state_alone, alone)
    update = jax.jit(transform.update)
    assert "all-gather" not in update.lower(params, state, params).compile().as_text()
    before = types((params, state))
    for step in range(len(schedule)):
        grads, grads_alone = (waves(tree, step) for tree in (params, alone))
        updates, state = update(grads, state, params)
        expected, state_alone = update(grads_alone, state_alone, alone)
        if kind == AxisType.Explicit:
            assert types((updates, state)) == before
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), updates, expected)
        params, alone = optax.apply_updates(params, updates), optax.apply_updates(alone, expected)
    masks = (qj.alq_state(tree).buffers["Dense_0/kernel"]["mask"] for tree in (state, state_alone))
    np.testing.assert_array_equal(*masks)
