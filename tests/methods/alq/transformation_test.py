"""ALQ as an optax transformation: the design's snippet, phases, pruning schedule, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.core import qarray
from quantjax.methods.alq import steps
from quantjax.methods.alq import transformation as alq_lib
from tests import quick


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "Conv_0": {
            "kernel": jnp.asarray(rng.normal(size=(3, 3, 2, 4)), dtype),
            "bias": jnp.asarray(rng.normal(size=4), dtype),
        },
        "Dense_0": {"kernel": jnp.asarray(rng.normal(size=(16, 5)), dtype)},
    }


def make_quantizer(bits=3):
    return qj.partition(
        {
            "Conv_0": qj.multi_bit(bits=bits, axes=(-4, -3, -2)),
            ".*kernel": qj.multi_bit(bits=bits, axes=-2, blocks=2),
        }
    )


def joined(quantizer, schedule, params, **kwargs):
    """As the design's snippet has it."""
    owned = qj.owned(quantizer.init(params), params)
    labels = jax.tree.map(lambda o: "alq" if o else "rest", owned)
    return optax.partition(
        {"alq": qj.alq(quantizer, schedule, **kwargs), "rest": optax.adam(1e-3)}, labels
    )


def loss(params):
    x = jnp.linspace(-1, 1, 2 * 6 * 6 * 2).reshape(2, 6, 6, 2)
    layer = params["Conv_0"]
    x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"].astype(x.dtype),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x + layer["bias"].astype(x.dtype).reshape(1, 1, 1, -1)).mean(axis=1)
    x = x.reshape(2, -1) @ params["Dense_0"]["kernel"].astype(x.dtype)
    return jnp.mean((x - jnp.arange(10.0).reshape(2, 5)) ** 2)


def make_step(tx, traces):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        traces.append(None)
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


@functools.cache
def jitted(name, **fixed):
    return quick.jit(functools.partial(getattr(steps, name), **fixed))


def kept(opt_state):
    buffers = qj.alq_state(opt_state).buffers
    return sum(int(np.count_nonzero(mine["mask"])) for mine in buffers.values())


def test_the_designs_snippet_through_all_phases():
    params = make_params()
    quantizer = make_quantizer(bits=2)
    schedule = qj.alq_rounds(
        4, rounds=2, keep=0.7, basis_epochs=2, coordinate_epochs=2, basis_rate=0.02
    )
    assert [p.kind for p in schedule] == 2 * ["prune", *2 * ["basis"], *2 * ["coordinate"]]
    tx = joined(quantizer, schedule, params)
    opt_state = tx.init(params)
    sketched = quantizer.apply(params, quantizer.init(params))
    params = qj.alq_params(opt_state, params)
    for path in ("Conv_0", "Dense_0"):
        np.testing.assert_array_equal(params[path]["kernel"], sketched[path]["kernel"])
    traces, start, alive = [], float(loss(params)), []
    step = make_step(tx, traces)
    for _ in range(sum(phase.steps for phase in schedule) + 3):
        old = jax.tree.map(np.asarray, params)
        params, opt_state = step(jax.tree.map(jnp.copy, params), opt_state)
        alive.append(kept(opt_state))
        exact = qj.alq_params(opt_state, params)
        for path in ("Conv_0", "Dense_0"):
            new, value = (np.asarray(tree[path]["kernel"]) for tree in (params, exact))
            largest = np.maximum(np.abs(old[path]["kernel"]), np.abs(value))
            assert np.all(np.abs(new - value) <= np.spacing(largest))
    assert len(traces) == 1
    assert exact["Conv_0"]["bias"] is params["Conv_0"]["bias"]
    assert loss(exact) < start  # with half of the coordinates
    # 2 rounds at 0.7, in 4 steps each.
    total = (4 + 2 * 5) * 2
    first, second = round(total * 0.7), round(round(total * 0.7) * 0.7)
    assert alive[:4] == [total - round((total - first) * t / 4) for t in (1, 2, 3, 4)]
    assert alive[20:24] == [first - round((first - second) * t / 4) for t in (1, 2, 3, 4)]
    assert alive[-1] == second
    encoded = quantizer.encode(exact, qj.alq_state(opt_state))
    decoded = qj.decode(encoded)
    for path in ("Conv_0", "Dense_0"):
        encoded[path]["kernel"].validate()
        np.testing.assert_array_equal(decoded[path]["kernel"], exact[path]["kernel"])


def test_updates_are_those_of_the_pure_steps(quick_programs):
    params = {"Dense_0": make_params()["Dense_0"]}
    quantizer = qj.multi_bit(3, axes=-2)
    schedule = (
        qj.Phase("basis", 2, 0.05),
        qj.Phase("coordinate", 2, 0.03),
        qj.Phase("prune", 2, 1e-3, 0.5),
        qj.Phase("basis", 1, 0.05),
        qj.Phase("ste-reconstruction", 1, 0.02),
        qj.Phase("ste-loss-aware", 2, 0.02),
    )
    tx = qj.alq(quantizer, schedule, rate_scale=2.0, preselect=0.5, weight_decay=0.1)
    state = tx.init(params)
    update = quick.jit(tx.update)
    mb = quantizer.encode(params, quantizer.init(params))["Dense_0"]["kernel"]
    moments, w = steps.init_moments(mb), None
    kinds = [phase for phase in schedule for _ in range(phase.steps)]
    now = qj.alq_params(state, params)
    for t, phase in enumerate(kinds):
        grad = jnp.asarray(np.random.default_rng(t).normal(size=mb.shape), jnp.float32)
        updates, state = update({"Dense_0": {"kernel": grad}}, state, now)
        now = optax.apply_updates(now, updates)
        rate = phase.learning_rate * 2
        if phase.kind == "basis":
            mb, moments = jitted("basis_step")(mb, grad, moments, learning_rate=rate)
        elif phase.kind == "coordinate":
            mb, moments = jitted("coordinate_step")(
                mb, grad, moments, learning_rate=rate, weight_decay=0.1
            )
        elif phase.kind == "prune":
            count = 15 - round((15 - 8) * (t - 3) / 2) if t == 4 else None
            alive = int(np.count_nonzero(mb.mask))
            left = {4: 15 - round(7 / 2), 5: 8}[t]
            assert count is None or count == left
            (mb,), (moments,) = jitted("prune_step", preselect=0.5)(
                [mb], [grad], [moments], count=alive - left
            )
        else:
            w = mb.decode() if w is None else w
            step = jitted("straight_through_step", loss_aware=phase.kind == "ste-loss-aware")
            mb, w, moments = step(mb, w, grad, moments, learning_rate=rate)
        exact = qj.alq_params(state, now)["Dense_0"]["kernel"]
        np.testing.assert_allclose(exact, mb.decode(), atol=2e-6)


def test_straight_through_from_the_start_keeps_the_float_weights():
    params = {"kernel": make_params()["Dense_0"]["kernel"]}
    tx = qj.alq(qj.multi_bit(2, -2), [qj.Phase("ste-loss-aware", 5, 0.0)])
    state = tx.init(params)
    np.testing.assert_array_equal(state.floats["kernel"], params["kernel"])
    grads = {"kernel": jnp.ones((16, 5))}
    _, state = quick.jit(tx.update)(grads, state, params)
    np.testing.assert_array_equal(state.floats["kernel"], params["kernel"])
    assert not qj.alq(qj.multi_bit(2, -2), [qj.Phase("basis", 5, 0.0)]).init(params).floats


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_params(dtype):
    params = make_params(dtype)
    quantizer = make_quantizer(bits=2)
    tx = joined(quantizer, [qj.Phase("basis", 3, 0.05)], params)
    opt_state = tx.init(params)
    params = qj.alq_params(opt_state, params)
    step = make_step(tx, [])
    for _ in range(2):
        params, opt_state = step(params, opt_state)
    exact = qj.alq_params(opt_state, params)
    decoded = qj.decode(quantizer.encode(exact, qj.alq_state(opt_state)))
    for path in ("Conv_0", "Dense_0"):
        assert exact[path]["kernel"].dtype == dtype
        np.testing.assert_array_equal(decoded[path]["kernel"], exact[path]["kernel"])


def test_state_is_found_anywhere():
    params = {"kernel": make_params()["Dense_0"]["kernel"]}
    alq = qj.alq(qj.multi_bit(2, -2), [qj.Phase("basis", 3, 0.05)])
    wrapped = (
        optax.chain(optax.clip(1.0), alq),
        optax.MultiSteps(alq, 2),
        optax.partition({"a": alq, "b": optax.sgd(0.1)}, {"kernel": "a"}),
        optax.masked(alq, {"kernel": True}),
    )
    expected = alq.init(params).quant
    for tx in wrapped:
        state = tx.init(params)
        jax.tree.map(np.testing.assert_array_equal, qj.alq_state(state), expected)
        assert qj.alq_params(state, params)["kernel"].shape == (16, 5)
    for none in (optax.adam(0.1).init(params), {}, optax.chain(alq, alq).init(params)):
        with pytest.raises(ValueError, match="expected the state of one alq"):
            qj.alq_state(none)
        with pytest.raises(ValueError, match="expected the state of one alq"):
            qj.alq_params(none, params)


def test_inject_hyperparams_and_map_params(quick_programs):
    params = {"kernel": make_params()["Dense_0"]["kernel"]}
    quantizer, schedule = qj.multi_bit(2, -2), (qj.Phase("basis", 4, 0.05),)
    injected = optax.inject_hyperparams(qj.alq)(
        quantizer, schedule, rate_scale=optax.constant_schedule(0.5)
    )
    direct = qj.alq(quantizer, (qj.Phase("basis", 4, 0.025),))
    grads = {"kernel": jnp.cos(params["kernel"])}
    states = injected.init(params), direct.init(params)
    assert "rate_scale" in states[0].hyperparams
    (first, _), (second, _) = (
        quick.jit(tx.update)(grads, state, params)
        for tx, state in zip((injected, direct), states, strict=True)
    )
    np.testing.assert_allclose(first["kernel"], second["kernel"], atol=1e-6)
    chained = optax.chain(direct, optax.scale_by_adam())
    state = chained.init(params)
    moved = optax.tree.map_params(chained, lambda leaf: leaf + 1, state)
    jax.tree.map(np.testing.assert_array_equal, moved[0], state[0])
    np.testing.assert_array_equal(moved[1].mu["kernel"], np.ones((16, 5)))


def test_init_under_jit_equals_eager():
    params = make_params()
    tx = joined(make_quantizer(), qj.alq_rounds(2, rounds=1), params)
    a, b = tx.init(params), jax.jit(tx.init)(params)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    find = alq_lib.find_alq
    for path, codes in find(a).codes.items():
        assert np.mean(np.asarray(codes) == np.asarray(find(b).codes[path])) > 0.99
        assert codes.dtype == jnp.uint8


def test_rounds_follow_appendix_c():
    phases = qj.alq_rounds(100)
    assert len(phases) == 6 * 5
    assert phases[:5] == (
        qj.Phase("prune", 100, 1e-3, 0.6),
        qj.Phase("basis", 500, 1e-3),
        qj.Phase("basis", 500, 1e-4),
        qj.Phase("coordinate", 1000, 1e-4),
        qj.Phase("coordinate", 1000, 1e-5),
    )
    longer = qj.alq_rounds(100, 1, start_epochs=2, post_epochs=30, finish_epochs=2)
    assert [p.steps for p in longer[:2]] == [100, 100]
    assert sum(p.steps for p in longer[7:11]) == 3000
    assert longer[-2:] == (
        qj.Phase("ste-loss-aware", 100, 1e-4),
        qj.Phase("ste-loss-aware", 100, 0.95e-4),
    )


def test_a_state_of_another_width_is_an_error(quick_programs):
    params = {"kernel": make_params()["Dense_0"]["kernel"]}
    schedule = [qj.Phase("basis", 3, 0.05)]
    state = qj.alq(qj.multi_bit(3, -2), schedule).init(params)
    tx = qj.alq(qj.multi_bit(2, -2), schedule)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"kernel: the state has 3 bits, the quantizer 2"):
            update(params, state, params)
    with pytest.raises(ValueError, match=r"kernel: the state has 3 bits, the quantizer 2"):
        qj.multi_bit(2, -2).encode(params, qj.alq_state(state))


@pytest.mark.parametrize("name", ["rate_scale", "weight_decay", "b1", "eps", "preselect"])
def test_numbers_that_are_arrays_on_an_explicit_mesh(name, quick_programs):
    """As inject_hyperparams gives them."""
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    params = {"kernel": jax.device_put(make_weights((16, 6)), place)}
    schedule = (qj.Phase("coordinate", 1, 0.05), qj.Phase("prune", 1, 1e-3, 0.5))
    make = optax.inject_hyperparams(qj.alq, static_args=("quantizer", "schedule"))
    value = {"rate_scale": 0.5, "weight_decay": 0.1, "b1": 0.8, "eps": 1e-4, "preselect": 0.7}[name]
    moves = []
    for tx in (
        make(qj.multi_bit(2, -2), schedule, **{name: value}),
        qj.alq(qj.multi_bit(2, -2), schedule, **{name: value}),
    ):
        state = tx.init(params)
        now = qj.alq_params(state, params)
        for _ in range(2):
            updates, state = quick.jit(tx.update)(params, state, now)
            now = optax.apply_updates(now, updates)
        moves.append(now)
    np.testing.assert_allclose(moves[0]["kernel"], moves[1]["kernel"], atol=1e-5)
    assert str(jax.typeof(moves[0]["kernel"])) == "float32[16@a,6@b]"


def bad(kind="basis", count=1, rate=0.1, keep=1.0):
    return [qj.Phase(kind, count, rate, keep)]


@pytest.mark.parametrize(
    ("schedule", "kwargs", "message"),
    [
        ([], {}, "phases, as alq_rounds gives them"),
        (bad("bases"), {}, "kind must be one of"),
        (bad(count=0), {}, "steps must be"),
        (bad(count=1.5), {}, "steps must be"),
        (bad(rate=-1.0), {}, "learning_rate"),
        (bad("prune", keep=1.2), {}, "keep must be in"),
        (bad("prune", keep=0.0), {}, "keep must be in"),
        (bad(), {"preselect": 0.0}, "share"),
        (bad(), {"b1": 1.0}, "b1"),
        (bad(), {"eps": 0.0}, "eps must be finite and positive"),
        (bad(), {"rate_scale": -1.0}, "rate_scale"),
        (bad(), {"rate_scale": lambda step: 1.0}, "inject_hyperparams"),
        ([("basis", 1, 0.1)], {}, "sequence of Phase"),
        (bad(), {"weight_decay": np.nan}, "weight_decay"),
    ],
)
def test_bad_arguments(schedule, kwargs, message):
    with pytest.raises(ValueError, match=message):
        qj.alq(qj.multi_bit(2, -2), schedule, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0,), {}),
        ((10, 0), {}),
        ((10, 1, 1.5), {}),
        ((10,), {"basis_epochs": -1}),
        ((10,), {"prune_epochs": -1}),
        ((10,), {"finish_epochs": 0.5}),
    ],
)
def test_bad_rounds(args, kwargs):
    with pytest.raises(ValueError, match="must"):
        qj.alq_rounds(*args, **kwargs)


def test_bad_trees():
    params = make_params()
    schedule = [qj.Phase("basis", 3, 0.05)]
    with pytest.raises(ValueError, match=r"leaves \['Conv_0/bias'\]"):
        qj.alq(make_quantizer(), schedule).init(params)
    kernels = {name: {"kernel": layer["kernel"]} for name, layer in params.items()}
    with pytest.raises(ValueError, match="Dense_0"):
        qj.alq(qj.partition({"Conv_0": qj.multi_bit(2, -2), ".*": qj.uniform(4)}), schedule).init(
            kernels
        )
    with pytest.raises(ValueError, match="leave 0 of"):
        qj.alq(make_quantizer(), [qj.Phase("prune", 2, 1e-3, 0.01)]).init(kernels)
    tx = qj.alq(make_quantizer(), schedule)
    state = tx.init(kernels)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(kernels, state)
    with pytest.raises(ValueError, match="Dense_0/kernel"):
        tx.update({"Conv_0": kernels["Conv_0"]}, state, kernels)
    other = {**kernels, "Dense_0": {"kernel": jnp.ones((16, 6))}}
    for grads, given, message in (
        (other, kernels, "Dense_0/kernel: gradients"),
        (kernels, other, "Dense_0/kernel: params"),
        (kernels, {"Conv_0": kernels["Conv_0"]}, r"params lack \['Dense_0/kernel'\]"),
        ({**kernels, "Dense_0": {"kernel": None}}, kernels, "gradients lack"),
        (params, params, r"\['Conv_0/bias'\] are not owned"),
    ):
        with pytest.raises(ValueError, match=message):
            tx.update(grads, state, given)
    with pytest.raises(ValueError, match="Dense_0/kernel"):
        qj.alq_params(state, other)
    with pytest.raises(ValueError, match="Dense_0/kernel"):
        qj.alq_params(state, {"Conv_0": kernels["Conv_0"]})


@pytest.mark.parametrize("spec", [(None, "d"), ("d", None)])
def test_nothing_is_gathered_over_devices(spec, quick_programs):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    params = {"kernel": jax.device_put(make_weights((64, 16)), place)}
    kinds = ("prune", "basis", "coordinate", "ste-loss-aware", "ste-reconstruction")
    tx = qj.alq(qj.multi_bit(2, -2), [qj.Phase(kind, 3, 1e-3, 0.5) for kind in kinds])
    state = tx.init(params)
    compiled = quick.jit(tx.update).lower(params, state, params).compile()
    assert "all-gather" not in compiled.as_text()
    alone = jax.tree.map(np.asarray, params)
    moved, _ = compiled(params, state, params)
    assert moved["kernel"].sharding.is_equivalent_to(place, 2)
    expected, _ = quick.jit(tx.update)(alone, tx.init(alone), alone)
    np.testing.assert_allclose(moved["kernel"], expected["kernel"], atol=1e-6)


def make_weights(shape):
    return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


def test_encoded_leaves_are_multi_bit():
    params = make_params()
    quantizer = make_quantizer()
    encoded = quantizer.encode(params, quantizer.init(params))
    assert isinstance(encoded["Conv_0"]["kernel"], qarray.MultiBit)
    assert qj.average_bits(encoded) == 3.0
