"""PSG beside its equations in float64 NumPy: the warp (A1-A5), the scales (6, A8), the chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantjax as qj

cheap = settings(derandomize=True, deadline=None, max_examples=100)


def make_params(dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = {"Conv_0": (3, 3, 2, 4), "Dense_0": (6, 5), "Dense_1": (5, 3)}
    params = {
        name: {"kernel": scale * rng.normal(size=shape), "bias": rng.normal(size=shape[-1])}
        for name, shape in shapes.items()
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def grads_like(params, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


def to_target(w, bits, low=None, high=None):
    """The nearest level of the narrow symmetric grid over max|w|, in float64."""
    w = np.float64(w)
    largest = max(-w.min(), w.max(), 0) if low is None else max(-low, high)
    limit = 2 ** (bits - 1) - 1
    step = largest / limit
    return np.clip(np.rint(w / step), -limit, limit) * step


def scale_once(grads, params, quantizer, **options):
    transform = qj.scale_by_position(quantizer, **options)
    return transform.update(grads, transform.init(params), params)


# The warp


@cheap
@given(
    step=st.floats(0.01, 10),
    eps=st.floats(1e-8, 1.0),
    cell=st.integers(-20, 20),
    at=st.floats(0, 1),
)
def test_the_warp_is_continuous_and_has_the_slope_of_its_metric(step, eps, cell, at):
    with jax.enable_x64(True):
        # From the left and from the right of the border between two cells (A2 = A3).
        border = (cell + 0.5) * step
        left, right = (float(qj.warp(border, t * step, step, eps)) for t in (cell, cell + 1))
        assert left == pytest.approx(right, rel=1e-9, abs=1e-9)
        # c(t) = 4 t / step (sqrt(step / 2 + eps) - sqrt(eps)), and 0 at the origin (A5).
        offset = 4 * cell * (np.sqrt(step / 2 + eps) - np.sqrt(eps))
        target = cell * step
        assert float(qj.warp(target, target, step, eps)) == pytest.approx(offset, abs=1e-9)
        # f'(x) = 1 / sqrt(|x - t| + eps), positive everywhere.
        x = target + (at - 0.5) * step
        if abs(x - target) > 1e-6 * step:
            slope = float(jax.grad(qj.warp)(x, target, step, eps))
            assert slope == pytest.approx((abs(x - target) + eps) ** -0.5, rel=1e-6)


@pytest.mark.parametrize(("step", "eps"), [(0.5, 1e-2), (1.0, 0.3), (0.1, 1e-1)])
def test_the_warp_is_the_integral_of_its_metric_and_increases(step, eps):
    """An oracle that knows neither A1 nor A5: f(x) is the length of 0..x in the metric."""
    # The middles of fine intervals, none across a border or a target.
    fine = 2000
    u = (np.arange(8 * fine) + 0.5) * step / fine
    length = np.cumsum(1 / np.sqrt(np.abs(u - np.rint(u / step) * step) + eps)) * step / fine
    x = (np.arange(8 * fine) + 1) * step / fine
    with jax.enable_x64(True):
        target = np.rint(x / step) * step
        value = np.asarray(qj.warp(x, target, step, eps))
        mirrored = np.asarray(qj.warp(-x, -target, step, eps))
    np.testing.assert_allclose(value, length, rtol=1e-4)
    np.testing.assert_allclose(mirrored, -value, rtol=1e-12)
    assert np.all(np.diff(value) > 0)


# The scales


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3, 0.5])
@pytest.mark.parametrize("strength", [1.0, 150.0])
def test_position_scale(eps, strength):
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(2, 7, 5))
    distance = np.abs(x - target)
    with jax.enable_x64(True):
        independent = qj.position_scale(x, target, strength=strength, eps=eps)
        directional = qj.position_scale(x, target, strength=strength, eps=eps, directional=True)
    np.testing.assert_allclose(independent, strength * (distance + eps), rtol=1e-12)
    expected = (distance + eps) / (distance.max() + eps)
    np.testing.assert_allclose(directional, strength * expected, rtol=1e-12)
    # The weight farthest from its target has scale 1.
    assert np.asarray(directional).max() == strength


def test_position_scale_defaults():
    x = jnp.asarray([1.0, 2.0])
    np.testing.assert_array_equal(qj.position_scale(x, x), jnp.full(2, 1e-8))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_weights_at_their_targets(eps):
    x = jnp.linspace(-1, 1, 5)
    np.testing.assert_array_equal(
        qj.position_scale(x, x, strength=3.0, eps=eps), jnp.full(5, 3 * eps)
    )
    np.testing.assert_array_equal(
        qj.position_scale(x, x, strength=3.0, eps=eps, directional=True), jnp.full(5, 3.0)
    )


# scale_by_position


@pytest.mark.parametrize("directional", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_gradient_is_scaled_by_the_distance_of_its_weight(bits, directional):
    with jax.enable_x64(True):
        params = make_params(jnp.float64)
        params["Dense_1"]["kernel"] *= 100  # the maximum of A8 is that of the leaf
        grads = grads_like(params)
        scaled, _ = scale_once(
            grads, params, qj.uniform(bits), strength=7.0, eps=1e-3, directional=directional
        )
        for name, layer in params.items():
            assert scaled[name]["bias"] is grads[name]["bias"]  # not owned
            w, grad = np.asarray(layer["kernel"]), np.asarray(grads[name]["kernel"])
            s = np.abs(w - to_target(w, bits)) + 1e-3
            s = s / s.max() if directional else s
            np.testing.assert_allclose(scaled[name]["kernel"], 7 * s * grad, rtol=1e-9, atol=1e-12)


def test_the_distance_of_bfloat16_weights_is_measured_in_float32():
    params = make_params(jnp.bfloat16)
    grads = jax.tree.map(jnp.ones_like, params)
    scaled, _ = scale_once(grads, params, qj.uniform(4), strength=1.0, eps=0.0)
    for name in params:
        w = np.float64(params[name]["kernel"])
        target = to_target(w, 4)
        exact = np.abs(w - target)
        assert scaled[name]["kernel"].dtype == jnp.bfloat16
        # A bfloat16 has 8 bits: half a unit in its last place is 2^-9.
        actual = np.float64(scaled[name]["kernel"])
        np.testing.assert_allclose(actual, exact, rtol=2**-8, atol=1e-6)
        # That would not hold beside a target in bfloat16: the test can tell.
        cast = np.float64(jnp.asarray(target, jnp.bfloat16))
        assert np.max(np.abs(np.abs(w - cast) - exact) / (exact + 1e-6)) > 0.05


def test_everything_at_its_target_with_eps_zero_is_finite():
    params = jax.tree.map(jnp.zeros_like, make_params())
    grads = grads_like(params)
    scaled, _ = scale_once(grads, params, qj.uniform(4), strength=150.0, eps=0.0)
    kernels = [layer["kernel"] for layer in scaled.values()]
    assert all(not kernel.any() for kernel in kernels)
    scaled, _ = scale_once(grads, params, qj.uniform(4), strength=150.0, eps=0.0, directional=True)
    for name, layer in scaled.items():
        np.testing.assert_allclose(layer["kernel"], 150 * grads[name]["kernel"])


def test_sparse_training_scales_by_magnitude():
    params, grads = make_params(), grads_like(make_params())
    scaled, state = scale_once(grads, params, qj.zero(), strength=200.0, eps=0.0)
    for name, layer in params.items():
        expected = 200 * np.abs(layer["kernel"]) * grads[name]["kernel"]
        np.testing.assert_allclose(scaled[name]["kernel"], expected, rtol=1e-6)
    assert state.target.buffers["Dense_0/kernel"] == {}


def test_first_and_last_layer_at_eight_bits():
    params, grads = make_params(), grads_like(make_params())
    quantizer = qj.partition(
        {"Conv_0|Dense_1": qj.uniform(8, momentum=0.1), ".*kernel": qj.uniform(2, momentum=0.1)}
    )
    scaled, state = scale_once(grads, params, quantizer, strength=1.0, eps=0.0)
    for name, bits in (("Conv_0", 8), ("Dense_0", 2), ("Dense_1", 8)):
        w = params[name]["kernel"]
        assert float(state.target.buffers[f"{name}/kernel"]["limit"].max()) == 2 ** (bits - 1) - 1
        distance = np.abs(w - to_target(w, bits))
        expected = distance * np.float64(grads[name]["kernel"])
        np.testing.assert_allclose(scaled[name]["kernel"], expected, atol=2e-6)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_the_target_moves_before_the_distance_is_taken(momentum):
    params = make_params()
    quantizer = qj.uniform(4, momentum=momentum)
    transform = qj.scale_by_position(quantizer, strength=1.0, eps=0.0)
    state = transform.init(params)
    moved = jax.tree.map(lambda leaf: 3 * leaf, params)
    ones = jax.tree.map(jnp.ones_like, params)
    scaled, after = transform.update(ones, state, moved)
    share = 1.0 if momentum is None else momentum
    old, new = (np.float64(tree["Dense_0"]["kernel"]) for tree in (params, moved))
    low = share * new.min() + (1 - share) * old.min()
    high = share * new.max() + (1 - share) * old.max()
    buffers = after.target.buffers["Dense_0/kernel"]
    np.testing.assert_allclose([buffers["low"].min(), buffers["high"].max()], [low, high], 1e-6)
    distance = np.abs(new - to_target(new, 4, low, high))
    np.testing.assert_allclose(scaled["Dense_0"]["kernel"], distance, atol=1e-5)


# Arguments


def test_strength_by_pattern():
    params, grads = make_params(), grads_like(make_params())
    plain, _ = scale_once(grads, params, qj.uniform(4), strength=1.0)
    scaled, _ = scale_once(
        grads, params, qj.uniform(4), strength={"Conv_0": 0.0, "Dense_1": 3.0, ".*": 5.0}
    )
    for name, strength in (("Conv_0", 0), ("Dense_0", 5), ("Dense_1", 3)):
        expected = strength * plain[name]["kernel"]
        np.testing.assert_allclose(scaled[name]["kernel"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ({"Conv_1": 1.0, ".*": 2.0}, "'Conv_1' matches no path.*Conv_0/kernel"),
        ({".*bias": 1.0, ".*": 2.0}, "'.*bias' matches no path"),  # biases are not owned
        ({".*": 2.0, "Conv_0": 1.0}, "'Conv_0' is shadowed"),
        ({"Conv_0": 1.0, "Dense_0": 2.0}, r"no strength for \['Dense_1/kernel'\]"),
        ({}, "no strength for"),
    ],
)
def test_patterns_of_strength_that_do_not_fit(strength, message):
    transform = qj.scale_by_position(qj.uniform(4), strength=strength)
    with pytest.raises(ValueError, match=message):
        transform.init(make_params())


@pytest.mark.parametrize("factory", [qj.scale_by_position, lambda q, **k: qj.psg(0.1, q, **k)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, "strength must be finite and not negative, got -1.0"),
        ({"strength": float("nan")}, "strength .* got nan"),
        ({"strength": float("inf")}, "strength .* got inf"),
        ({"strength": {"Conv_0": 1.0, "Dense_0": -2.0}}, "strength of 'Dense_0' .* got -2.0"),
        ({"strength": 1.0, "eps": -1e-8}, "eps must be finite and not negative, got -1e-08"),
        ({"strength": 1.0, "eps": float("nan")}, "eps .* got nan"),
    ],
)
def test_bad_numbers_raise_at_construction(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        factory(qj.uniform(4), **arguments)


def test_a_state_made_for_another_tree():
    params = make_params()
    transform = qj.scale_by_position(qj.uniform(4), strength=1.0)
    state = transform.init(params)
    del params["Dense_0"]
    with pytest.raises(ValueError, match=r"another tree.*Dense_0/kernel"):
        transform.update(params, state, params)
    with pytest.raises(ValueError, match="nothing to quantize"):
        transform.init({"Norm_0": {"scale": jnp.ones(3)}})
    with pytest.raises(ValueError, match="needs params"):
        transform.update(params, state)


def test_a_tree_without_leaves_gets_a_scalar():
    state = qj.scale_by_position(qj.uniform(4), strength=1.0).init({})
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(), ()]  # target and count


# The recommended chain


@pytest.mark.parametrize("directional", [False, True])
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_psg_is_scaling_then_weight_decay_then_momentum(momentum, directional):
    """Five steps beside a loop in NumPy, on f(w) = sum a (w - goal)^2 / 2."""
    rng = np.random.default_rng(0)
    w, a, goal = rng.normal(size=(3, 6, 5))
    rate, decay, strength, eps = 0.05, 0.01, 4.0, 1e-3
    with jax.enable_x64(True):
        tx = qj.psg(
            rate,
            qj.uniform(3, momentum=momentum),
            strength=strength,
            momentum=0.9,
            weight_decay=decay,
            eps=eps,
            directional=directional,
        )
        params = {"kernel": jnp.asarray(w)}
        state = tx.init(params)
        step = jax.jit(tx.update)
        low, high, velocity = w.min(), w.max(), np.zeros_like(w)
        for _ in range(5):
            grad = a * (w - goal)
            share = 1.0 if momentum is None else momentum
            low, high = share * w.min() + (1 - share) * low, share * w.max() + (1 - share) * high
            s = np.abs(w - to_target(w, 3, low, high)) + eps
            s = s / s.max() if directional else s
            velocity = 0.9 * velocity + strength * s * grad + decay * w
            w = w - rate * velocity
            updates, state = step({"kernel": jnp.asarray(grad)}, state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params["kernel"], w, rtol=1e-10, atol=1e-12)


def test_psg_decays_what_its_mask_says():
    params = make_params()
    nothing = jax.tree.map(jnp.zeros_like, params)
    for mask, decayed in ((None, True), (qj.decay_mask, False)):
        tx = qj.psg(1.0, qj.uniform(4), strength=1.0, weight_decay=0.5, mask=mask)
        updates, _ = tx.update(nothing, tx.init(params), params)
        np.testing.assert_allclose(
            updates["Dense_0"]["bias"], -0.5 * params["Dense_0"]["bias"] * decayed
        )
        np.testing.assert_allclose(updates["Dense_0"]["kernel"], -0.5 * params["Dense_0"]["kernel"])


# Appendix F


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 6),
    bits=st.integers(2, 5),
    eps=st.sampled_from([1e-8, 1e-3, 1.0]),
)
def test_appendix_f_descent_never_increases_a_convex_loss(seed, size, bits, eps):
    """f(x') - f(x) <= sum (s^2 - 2 s) g^2 / (2 L), for s of eq. A8 and steps of 1 / L."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size)) * rng.uniform(0.01, 1, size)
    A, b = root @ root.T, rng.normal(size=size)
    L = np.linalg.eigvalsh(A)[-1]

    def f(x):
        return 0.5 * x @ A @ x - b @ x

    x = 3 * rng.normal(size=size)
    with jax.enable_x64(True):
        scale = qj.scale_by_position(qj.uniform(bits), strength=1.0, eps=eps, directional=True)
        state = scale.init({"kernel": jnp.asarray(x)[:, None]})
        for _ in range(4):
            grad = A @ x - b
            params, grads = ({"kernel": jnp.asarray(value)[:, None]} for value in (x, grad))
            scaled, state = scale.update(grads, state, params)
            scaled = np.asarray(scaled["kernel"])[:, 0]
            s = scaled / np.where(grad == 0, 1, grad)
            assert np.all((s > 0) & (s <= 1 + 1e-12))
            moved = x - scaled / L
            slack = 1e-12 * (1 + abs(f(x)))
            assert f(moved) - f(x) <= np.sum((s**2 - 2 * s) * grad**2) / (2 * L) + slack
            assert f(moved) <= f(x) + slack
            x = moved


# Schedules of the strength, and states that are not the target's


@pytest.mark.parametrize("by_pattern", [False, True])
def test_a_schedule_of_the_strength_counts_its_own_steps(by_pattern):
    params = make_params()
    grads = grads_like(params)
    schedule = optax.piecewise_constant_schedule(2.0, {2: 5.0})
    strength = {"Dense_0": schedule, ".*": 3.0} if by_pattern else schedule
    transform = qj.scale_by_position(qj.uniform(4), strength=strength)
    one = qj.scale_by_position(qj.uniform(4), strength=1.0)
    expected, _ = jax.jit(one.update)(grads, one.init(params), params)
    state, update = transform.init(params), jax.jit(transform.update)
    assert state.count.dtype == jnp.int32
    for step in range(4):
        assert int(state.count) == step
        scaled, state = update(grads, state, params)
        now = 2.0 if step < 2 else 10.0
        others = 3.0 if by_pattern else now
        for layer, value in (("Dense_0", now), ("Conv_0", others), ("Dense_1", others)):
            np.testing.assert_allclose(
                scaled[layer]["kernel"], value * expected[layer]["kernel"], rtol=1e-5, atol=1e-6
            )
            np.testing.assert_array_equal(scaled[layer]["bias"], grads[layer]["bias"])


def test_psg_and_inject_hyperparams_take_a_schedule_of_the_strength():
    params = make_params()
    grads = grads_like(params)

    def schedule(step):
        return 1.0 + step

    direct = qj.psg(0.1, qj.uniform(4), strength=schedule)
    injected = optax.inject_hyperparams(qj.psg)(0.1, qj.uniform(4), strength=schedule)
    states = direct.init(params), injected.init(params)
    assert "strength" in states[1].hyperparams
    for _ in range(3):
        first, a = jax.jit(direct.update)(grads, states[0], params)
        second, b = jax.jit(injected.update)(grads, states[1], params)
        states = a, b
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-8), first, second
        )


@pytest.mark.parametrize(
    "make", [qj.uniform, lambda bits: qj.multi_bit(bits, -2), qj.focused, qj.srq]
)
def test_a_state_of_another_width_is_an_error(make):
    params = {"Dense_0": {"kernel": make_params()["Dense_0"]["kernel"]}}
    wide = qj.scale_by_position(make(6), strength=1.0).init(params)
    with pytest.raises(ValueError, match=r"Dense_0/kernel: the state has 6 bits.*4"):
        qj.scale_by_position(make(4), strength=1.0).update(params, wide, params)


def test_psg_of_a_state_of_another_width_is_an_error():
    params = make_params()
    state = qj.psg(0.1, qj.uniform(8), strength=1.0).init(params)
    with pytest.raises(ValueError, match="the state has 8 bits, the quantizer 4"):
        qj.psg(0.1, qj.uniform(4), strength=1.0).update(params, state, params)


@pytest.mark.parametrize("make", [lambda: qj.uniform(4), qj.zero, lambda: qj.magnitude(0.5)])
def test_a_kernel_added_after_init_is_an_error(make):
    params = make_params()
    transform = qj.scale_by_position(make(), strength=1.0)
    state = transform.init(params)
    grown = {**params, "Dense_9": params["Dense_0"]}
    with pytest.raises(ValueError, match=r"does not know.*Dense_9/kernel"):
        transform.update(grown, state, grown)
    with_bias = {**params, "Norm": {"scale": jnp.ones(3)}}  # no weight: nobody's
    updates, _ = transform.update(with_bias, state, with_bias)
    assert updates["Norm"]["scale"] is with_bias["Norm"]["scale"]
