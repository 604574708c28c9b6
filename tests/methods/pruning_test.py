"""Pruning against sorting in NumPy, surgery against its equation, and what may go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import quantjax as qj
from quantjax.core.quantizer import keep

cheap = settings(derandomize=True, deadline=None, max_examples=100)
FEW = st.sampled_from([0.0, -0.0, 0.25, -0.25, 1.0, -3.0, 1e-30])  # many ties
MANY = st.floats(-10, 10, width=32, allow_subnormal=False)


def tree(*leaves):
    return {f"Dense_{i}": {"kernel": jnp.asarray(leaf)} for i, leaf in enumerate(leaves)}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def mask_of(state, index=0):
    return np.asarray(state.buffers[f"Dense_{index}/kernel"]["mask"])


def largest(sizes, density):
    """The mask of the round(density * size) largest and of all that equal the last of them."""
    kept = min(max(1, int(np.rint(np.float32(density) * sizes.size))), sizes.size)
    return sizes >= np.sort(sizes, axis=None)[::-1][kept - 1]


# magnitude


@cheap
@given(
    w=arrays(np.float32, (4, 6), elements=st.one_of(FEW, MANY)),
    density=st.floats(0.015625, 1, width=32),
)
def test_magnitude_keeps_what_sorting_keeps(w, density):
    state = qj.magnitude(density).init(tree(w))
    np.testing.assert_array_equal(mask_of(state), largest(np.abs(w), density))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_density_is_exact_without_ties(density, dtype):
    w = jnp.asarray(np.random.default_rng(0).permutation(1600).reshape(40, 40) + 1) / 64
    quantizer = qj.magnitude(density)
    params = tree(w.astype(dtype))
    applied = quantizer.apply(params, quantizer.init(params))["Dense_0"]["kernel"]
    sizes = np.asarray(w.astype(dtype), np.float64)
    np.testing.assert_array_equal(np.asarray(applied, np.float64), sizes * largest(sizes, density))
    if dtype == jnp.float32:
        assert np.count_nonzero(applied) == round(density * 1600)


def test_across_leaves():
    first, second = normal(30, 20), 3 * normal(10, 40, seed=1)
    state = qj.magnitude(0.2, across=True).init(tree(first, second))
    sizes = np.abs(np.concatenate([first.ravel(), second.ravel()]))
    expected = largest(sizes, 0.2)
    np.testing.assert_array_equal(mask_of(state, 0).ravel(), expected[:600])
    np.testing.assert_array_equal(mask_of(state, 1).ravel(), expected[600:])
    apart = qj.magnitude(0.2).init(tree(first, second))
    assert mask_of(apart, 0).sum() == 120
    assert mask_of(state, 0).sum() < 60


def test_across_leaves_of_two_dtypes():
    first, second = normal(30, 20), normal(10, 40, seed=1, dtype=jnp.bfloat16)
    state = qj.magnitude(0.3, across=True).init(tree(first, second))
    wide = np.abs(np.concatenate([first.ravel(), np.asarray(second, np.float32).ravel()]))
    masks = np.concatenate([mask_of(state, 0).ravel(), mask_of(state, 1).ravel()])
    np.testing.assert_array_equal(masks, largest(wide, 0.3))


@pytest.mark.parametrize("across", [False, True])
def test_the_gradual_schedule(across):
    """Cubic from 1 to the density, moved at begin, begin + every, ... and end alone."""
    quantizer = qj.magnitude(0.1, across=across, begin=3, end=10, every=3)
    params = tree(normal(50, 20))
    state = quantizer.init(params)
    assert mask_of(state).all()
    update = jax.jit(quantizer.update)
    seen = []
    for step in range(1, 14):
        params = tree(normal(50, 20, seed=step))
        state = update(params, state)
        seen.append(int(mask_of(state).sum()))
        if step in (3, 6, 9, 10):
            now = 0.1 + 0.9 * (1 - (step - 3) / 7) ** 3
            expected = largest(np.abs(params["Dense_0"]["kernel"]), now)
            np.testing.assert_array_equal(mask_of(state), expected)
            moved = mask_of(state)
        else:
            assert step < 3 or np.array_equal(mask_of(state), moved)
    assert seen[:3] == [1000] * 3
    assert seen[-4:] == [100] * 4


def test_all_zero_leaves_stay():
    params = tree(jnp.zeros((4, 4)))
    quantizer = qj.magnitude(0.5)
    np.testing.assert_array_equal(
        quantizer.apply(params, quantizer.init(params))["Dense_0"]["kernel"], 0
    )


# surgery


def surgery_step(w, mask, density, low, high):
    """Guo et al., eq. 3, with both thresholds multiples of the exact one."""
    w = np.abs(np.float32(w))
    kept = int(np.rint(np.float32(density) * w.size))
    t = np.sort(w, axis=None)[::-1][kept - 1]
    return (w >= np.float32(high) * t) | (mask & (w >= np.float32(low) * t))


def test_surgery_is_its_equation_and_splices():
    quantizer = qj.surgery(0.3, end=8, low=0.8, high=1.2, every=2)
    weights = normal(20, 30)
    state = quantizer.init(tree(weights))
    mask = largest(np.abs(np.asarray(weights)), 0.3)
    np.testing.assert_array_equal(mask_of(state), mask)
    update = jax.jit(quantizer.update)
    came_back = 0
    for step in range(1, 12):
        weights = weights + 0.3 * normal(20, 30, seed=step)
        state = update(tree(weights), state)
        if step <= 8 and step % 2 == 0:
            new = surgery_step(weights, mask, 0.3, 0.8, 1.2)
            came_back += np.sum(new & ~mask)
            mask = new
        np.testing.assert_array_equal(mask_of(state), mask)
    assert came_back > 10


def test_surgery_moves_with_a_decaying_probability():
    quantizer = qj.surgery(0.3, end=400, decay=0.05, power=1.0)
    update = jax.jit(quantizer.update)
    params = [tree(normal(10, 10, seed=seed)) for seed in range(2)]
    moves = []
    for seed in range(2):
        state = quantizer.init(params[0])
        for step in range(400):
            new = update(params[step % 2], state, key=jax.random.key(1000 * seed + step))
            moves.append((step, not np.array_equal(mask_of(new), mask_of(state))))
            state = new
    # A move shows where the last one was on the other weights: compare with a simulation.
    rng = np.random.default_rng(0)
    simulated = []
    for _ in range(300):
        at = 0
        for step in range(400):
            if rng.random() < 1 / (1 + 0.05 * (step + 1)):
                simulated.append((step, step % 2 != at))
                at = step % 2
    for low, high in ((0, 40), (40, 120), (120, 400)):
        share = np.sum([m for s, m in moves if low <= s < high]) / 2
        expected = np.sum([m for s, m in simulated if low <= s < high]) / 300
        assert abs(share - expected) < 4 * np.sqrt(expected / 2) + 1
    early, late = (np.sum([m for s, m in moves if (s < 200) is first]) for first in (True, False))
    assert early > 2 * late > 0


def test_a_cut_weight_recovers_in_training():
    """The gradient reaches it, its magnitude grows, and surgery lets it in again."""
    quantizer = qj.surgery(0.5, end=1000)
    params = tree(jnp.asarray([[3.0, 1.0, 0.01, 0.001]]))
    state = quantizer.init(params)
    assert mask_of(state).tolist() == [[True, True, False, False]]

    @jax.jit
    def step(params, state):
        def loss(params):
            w = quantizer.apply(params, state)["Dense_0"]["kernel"]
            return jnp.sum((w - jnp.asarray([[3.0, 0.1, 2.0, 0.0]])) ** 2)

        params = optax.apply_updates(
            params, jax.tree.map(lambda g: -0.05 * g, jax.grad(loss)(params))
        )
        return params, quantizer.update(params, state)

    for _ in range(60):
        params, state = step(params, state)
    assert mask_of(state).tolist() == [[True, False, True, False]]


# n of m


@cheap
@given(w=arrays(np.float32, (10, 3), elements=st.one_of(FEW, MANY)), n=st.integers(1, 4))
def test_n_of_m_is_a_stable_sort_of_every_group(w, n):
    mask = mask_of(qj.n_m(n, 4).init(tree(w)))
    for column in range(3):
        for start in (0, 4, 8):  # the last group is shorter
            sizes = np.abs(w[start : start + 4, column])
            best = np.argsort(-sizes, kind="stable")[:n]
            assert np.flatnonzero(mask[start : start + 4, column]).tolist() == sorted(best)


@pytest.mark.parametrize("axis", [-1, -2, -3, -4])
def test_n_of_m_along_any_axis_of_a_convolution(axis):
    w = normal(4, 8, 4, 8)
    mask = np.moveaxis(mask_of(qj.n_m(2, 4, axis=axis).init(tree(w))), axis, -1)
    groups = mask.reshape(*mask.shape[:-1], -1, 4)
    assert np.all(groups.sum(-1) == 2)
    sizes = np.moveaxis(np.abs(np.asarray(w)), axis, -1).reshape(groups.shape)
    assert np.all(np.where(groups, sizes, np.inf).min(-1) > np.where(groups, 0, sizes).max(-1))


def test_n_of_m_taken_anew():
    quantizer = qj.n_m(2, 4, every=2)
    state = quantizer.init(tree(normal(8, 3)))
    before = mask_of(state)
    other = tree(normal(8, 3, seed=1))
    state = quantizer.update(other, state)
    np.testing.assert_array_equal(mask_of(state), before)
    state = quantizer.update(other, state)
    np.testing.assert_array_equal(mask_of(state), mask_of(quantizer.init(other)))


# pruned, gradients, targets


def test_pruned_takes_the_masks_of_another_state():
    params = tree(normal(8, 6), normal(6, 5, seed=1))
    other = qj.magnitude(0.2)
    state = other.init(params)
    masks = {path: buffers["mask"] for path, buffers in state.buffers.items()}
    quantizer = qj.pruned(masks)
    jax.tree.map(
        np.testing.assert_array_equal,
        quantizer.apply(params, quantizer.init(params)),
        other.apply(params, state),
    )
    one = qj.pruned({"Dense_1": {"kernel": masks["Dense_1/kernel"]}})
    applied = one.apply(params, one.init(params))
    assert applied["Dense_0"]["kernel"] is params["Dense_0"]["kernel"]


def test_the_gradient_reaches_every_weight_and_nothing_is_negative_zero():
    params = tree(-jnp.abs(normal(8, 6)))
    quantizer = qj.magnitude(0.2)
    state = quantizer.init(params)
    grads = jax.grad(lambda p: 2.0 * quantizer.apply(p, state)["Dense_0"]["kernel"].sum())(params)
    np.testing.assert_array_equal(grads["Dense_0"]["kernel"], 2.0)
    applied = np.asarray(quantizer.encode(params, state)["Dense_0"]["kernel"])
    assert not np.any(np.signbit(applied[applied == 0]))


def test_masks_are_targets_of_position_scaled_gradients():
    params = tree(normal(8, 6))
    quantizer = qj.magnitude(0.5)
    transform = qj.scale_by_position(quantizer, strength=2.0, eps=0.0)
    grads = jax.tree.map(jnp.ones_like, params)
    scaled, _ = transform.update(grads, transform.init(params), params)
    w = np.asarray(params["Dense_0"]["kernel"])
    expected = 2 * np.where(largest(np.abs(w), 0.5), 0, np.abs(w))
    np.testing.assert_allclose(scaled["Dense_0"]["kernel"], expected, rtol=1e-6)


def test_a_chain_with_a_grid_keeps_zeros():
    params = tree(normal(16, 16))
    quantizer = qj.chain(qj.magnitude(0.25), qj.uniform(4))
    state = quantizer.init(params)
    decoded = np.asarray(qj.decode(quantizer.encode(params, state))["Dense_0"]["kernel"])
    assert np.all(decoded[~largest(np.abs(np.asarray(params["Dense_0"]["kernel"])), 0.25)] == 0)


# Bad input


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("make", [qj.magnitude, lambda density: qj.surgery(density, end=10)])
def test_density_out_of_range(make, density):
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got"):
        make(density)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qj.magnitude(0.1, begin=5, end=5), "end must come after begin"),
        (lambda: qj.magnitude(0.1, begin=-1), "begin must be a whole number from 0"),
        (lambda: qj.magnitude(0.1, every=0), "every must be a whole number from 1"),
        (lambda: qj.surgery(0.1, end=5, low=1.1, high=0.9), "in order, 0 <= low <= high, got 1.1"),
        (lambda: qj.surgery(0.1, end=2.5), "end must be a whole number"),
        (lambda: qj.surgery(0.1, end=5, decay=-1.0), "decay and power"),
        (lambda: qj.n_m(5, 4), "1 <= n <= m, got 5 and 4"),
        (lambda: qj.n_m(2, 4, axis=0), "counted from the end"),
        (lambda: qj.pruned({}), "at least one mask"),
        (lambda: qj.pruned({"a": jnp.asarray([0.5])}), "a: a mask holds True and False"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_errors_name_the_leaf():
    params = tree(normal(4, 4))
    with pytest.raises(ValueError, match=r"Dense_0/kernel: a mask of shape \(2, 2\).*\(4, 4\)"):
        qj.pruned({"Dense_0": {"kernel": np.ones((2, 2), bool)}}).init(params)
    with pytest.raises(ValueError, match=r"without a leaf: \['Dense_1/kernel'\]"):
        qj.pruned({"Dense_1": {"kernel": np.ones((2, 2), bool)}}).init(params)
    with pytest.raises(ValueError, match="Dense_0/kernel: no axis -3"):
        qj.n_m(2, 4, axis=-3).init(params)
    quantizer = qj.magnitude(0.5)
    with pytest.raises(ValueError, match="Dense_0/kernel: the state was made for another tree"):
        quantizer.apply(tree(normal(4, 5)), quantizer.init(params))
    with pytest.raises(ValueError, match=r"Dense_0/kernel: 1 of 16 values are NaN"):
        quantizer.encode(tree(normal(4, 4).at[0, 0].set(jnp.nan)), quantizer.init(params))


PRUNERS = {
    "magnitude": lambda: qj.magnitude(0.5),
    "gradual": lambda: qj.magnitude(0.5, across=True, end=2, every=1),
    "surgery": lambda: qj.surgery(0.5, end=3),
    "n of m": lambda: qj.n_m(2, 4, every=1),
    "pruned": lambda: qj.pruned({"Dense_0": {"kernel": np.arange(60).reshape(10, 6) % 3 == 0}}),
}


@pytest.fixture(params=PRUNERS)
def pruner(request):
    return PRUNERS[request.param]()


def test_without_jit_all_is_the_same(pruner):
    params = tree(normal(10, 6))

    def run():
        state = pruner.init(params)
        moved = pruner.update(tree(normal(10, 6, seed=1)), state, key=jax.random.key(1))
        return moved, pruner.apply(params, moved), pruner.encode(params, moved)

    expected = run()
    with jax.disable_jit():
        actual = run()
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_encode_jits_and_has_an_abstract_form(pruner):
    params = tree(normal(10, 6))
    state = pruner.init(params)
    expected = pruner.encode(params, state)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(pruner.encode)(params, state), expected)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    abstract = jax.eval_shape(pruner.encode, params, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == shapes


def test_the_state_of_another_quantizer_is_an_error_by_path(pruner):
    params = tree(normal(10, 6))
    state = qj.uniform(4).init(params)
    moves = () if pruner.update is keep else (pruner.update,)
    for call in (pruner.apply, pruner.encode, *moves):
        with pytest.raises(ValueError, match=r"Dense_0/kernel: .*another quantizer"):
            call(params, state)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int8])
def test_leaves_that_are_no_floats_are_refused(pruner, dtype):
    params = tree(jnp.ones((10, 6), dtype))
    with pytest.raises(ValueError, match=f"Dense_0/kernel: .*{jnp.dtype(dtype)}"):
        pruner.init(params)


def test_a_kernel_added_after_init_is_an_error_but_for_named_masks():
    params = tree(normal(10, 6))
    grown = tree(normal(10, 6), normal(4, 4))
    for name, make in PRUNERS.items():
        quantizer = make()
        state = quantizer.init(params)
        for call in (quantizer.apply, quantizer.encode, quantizer.update):
            if name == "pruned" or call is keep:
                call(grown, state)
            else:
                with pytest.raises(ValueError, match=r"does not know \['Dense_1/kernel'\]"):
                    call(grown, state)


def test_numpy_integers_are_counts():
    params = tree(normal(10, 6))
    one = np.int64(1)
    for quantizer in (
        qj.magnitude(0.5, begin=np.int32(0), end=2 * one, every=one),
        qj.surgery(0.5, end=3 * one, every=one),
        qj.n_m(2 * one, 4 * one, axis=-2 * one, every=one),
    ):
        quantizer.update(params, quantizer.init(params))
    for make in (
        lambda: qj.n_m(True, 4),
        lambda: qj.n_m(1.0, 4),
        lambda: qj.magnitude(0.5, every=True),
    ):
        with pytest.raises(ValueError, match="must be a whole number from"):
            make()


def test_masks_lie_as_their_leaves_do():
    mesh = jax.make_mesh((4, 2), ("a", "b"))  # Explicit
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    w = normal(32, 24)
    params = tree(jax.device_put(w, place))
    for masks in (np.asarray(w) > 0, w > 0, params["Dense_0"]["kernel"] > 0):
        quantizer = qj.pruned({"Dense_0": {"kernel": masks}})
        mask = quantizer.init(params).buffers["Dense_0/kernel"]["mask"]
        assert str(jax.typeof(mask)) == "bool[32@a,24@b]"
        np.testing.assert_array_equal(mask, np.asarray(w) > 0)


@pytest.mark.parametrize("m", [3, 4, 16])
def test_groups_that_straddle_devices_are_not_gathered(m):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    w = normal(24, 6)
    params = tree(jax.device_put(w, place))
    quantizer = qj.n_m(2, m, every=1)
    state = quantizer.init(params)
    compiled = jax.jit(quantizer.update).lower(params, state).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_array_equal(
        mask_of(compiled(params, state)), mask_of(quantizer.init(tree(w)))
    )


def test_quantizers_say_what_they_are():
    assert repr(qj.magnitude(0.25)) == "magnitude(0.25)"
    assert qj.n_m(2, 4).apply.__qualname__ == "n_m(2, 4).apply"
