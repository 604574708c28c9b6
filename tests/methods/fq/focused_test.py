"""Focused Quantization beside brute force over its levels and its rules in float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import quantjax as qj
from quantjax.methods.fq import focused, shift
from tests.methods import golden

SHAPE = (12, 4)
BIG = (60, 80)  # few shapes: every one compiles a fit of its own
PATH = "Dense_0/kernel"
# Multiples of 2**-12 below 64 and means that are multiples of 2**-10: all differences are exact.
WEIGHTS = arrays(np.int32, SHAPE, elements=st.integers(-(2**18), 2**18)).map(lambda k: k / 2**12)
MEANS = st.lists(st.integers(-(2**13), 2**13), min_size=2, max_size=2).map(
    lambda k: np.sort(np.array(k) / 2**10)
)
PLAIN = {"min_separation": math.inf}


def tree(w):
    return {"Dense_0": {"kernel": jnp.asarray(w)}}


def sparse(*shape, seed=0, density=0.2, dtype=jnp.float32, scale=1.0, noise="normal"):
    rng = np.random.default_rng(seed)
    w = scale * (rng.standard_t(4, shape) if noise == "t" else rng.normal(size=shape))
    return jnp.asarray(np.where(np.abs(w) >= np.quantile(np.abs(w), 1 - density), w, 0), dtype)


def buffers_of(state):
    return {name: np.asarray(part) for name, part in state.buffers[PATH].items()}


def shift_set(bits, bias):
    """FQ 2 without zero."""
    return {s * 2.0 ** (e - bias) for e in range(2 ** (bits - 1)) for s in (-1, 1)}


def level_sets(bits, mean, std, bias, recentred):
    """FQ 7 and 9, one set per component."""
    if not recentred:
        both = shift_set(bits, bias)
        least = min(map(abs, both))
        both -= {-least, least}
        return {v for v in both if v < 0}, {v for v in both if v > 0}
    inner = shift_set(bits - 1, bias)
    minus, plus = ({m + s * v for v in inner} for m, s in zip(mean, std, strict=True))
    return minus - {max(minus)}, plus - {min(plus)}


quantize = jax.jit(focused._quantize)  # one program for all widths and choices


def state_with(bits, mean, std, bias, recentred, component):
    one = (1,) * len(SHAPE)
    shaped = {
        "mean": np.float32(mean if recentred else [0, 0]),
        "std": np.float32(std if recentred else [1, 1]),
        "border": np.float32([-3e38, 0]),
        "bias": np.int32(bias),
        "limit": np.int32(2 ** (bits - 1) - 1),
        "recentred": np.bool_(recentred),
        "inside": np.bool_(False),
    }
    buffers = {name: jnp.asarray(v).reshape(one + v.shape) for name, v in shaped.items()}
    return buffers | {"component": jnp.asarray(component if recentred else 0 * component, jnp.int8)}


# Levels


def test_the_supplements_example():
    minus, plus = focused.focused_levels(3, 1.0, [-1, 1], [4, 4], 0)
    assert (minus.tolist(), plus.tolist()) == ([-9, -5, 3], [-3, 5, 9])
    minus, plus = focused.focused_levels(3, 0.5, [-1, 1], [3.1, 5.6], 0)  # 4, nearest in log2
    assert (minus.tolist(), plus.tolist()) == ([-4.5, -2.5, 1.5], [-1.5, 2.5, 4.5])


@pytest.mark.parametrize("bits", range(3, 7))
@pytest.mark.parametrize("bias", [-2, 0, 3])
def test_levels_are_those_of_the_notes(bits, bias):
    assert focused.shift_levels(bits, bias).tolist() == sorted(shift_set(bits, bias))
    found = focused.focused_levels(bits, 1.0, [-0.5, 0.75], [0.25, 0.5], bias)
    expected = level_sets(bits, [-0.5, 0.75], [0.25, 0.5], bias, True)
    for levels, exact in zip(found, expected, strict=True):
        assert len(exact) == 2 ** (bits - 1) - 1
        np.testing.assert_array_equal(levels, np.float32(sorted(exact)))


@pytest.mark.usefixtures("few_programs")
@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    w=WEIGHTS,
    mean=MEANS,
    std=st.tuples(st.integers(-4, 2), st.integers(-4, 2)),
    bits=st.integers(3, 5),
    bias=st.integers(0, 6),
    recentred=st.booleans(),
    component=arrays(np.int8, SHAPE, elements=st.sampled_from([-1, 1])),
)
def test_nearest_in_value_is_what_brute_force_finds(w, mean, std, bits, bias, recentred, component):
    """Exactly, ties included; far weights saturate; zeros stay and nothing else becomes one."""
    std = 2.0 ** np.array(std)
    buffers = state_with(bits, mean, std, bias, recentred, component)
    found = np.float64(quantize(jnp.float32(w), jnp.ones((1, 1)), buffers))
    sets = level_sets(bits, mean, std, bias, recentred)
    positive = component > 0 if recentred else w > 0
    assert np.all(found[w == 0] == 0)
    for mine, levels in zip((~positive, positive), sets, strict=True):
        mine = mine & (w != 0)
        levels = np.array(sorted(levels))
        distance = np.abs(w[mine][:, None] - levels)
        assert np.all(np.isin(found[mine], levels))
        np.testing.assert_array_equal(np.abs(w[mine] - found[mine]), distance.min(-1))
    assert quantize._cache_size() == 1


@pytest.mark.parametrize("recentred", [False, True])
def test_ties_go_away_from_the_mean_and_far_weights_to_the_last_level(recentred):
    mean, std = [-2.0, 2.0], [1.0, 1.0]
    #  levels of c+: 2 - 2, 2 - 1, 2 + 1, 2 + 2, 2 + 4 (..); plain: 1 .. 64 for bits 4, bias 1
    w = np.zeros(SHAPE, np.float32)
    w[0] = (3.5, 2.0, 1e6, -1e6) if recentred else (1.5, 3.0, 1e6, -1e6)
    component = np.ones(SHAPE, np.int8)
    buffers = state_with(4, mean, std, 0 if recentred else 1, recentred, component)
    found = np.asarray(quantize(w, jnp.ones((1, 1)), buffers))[0]
    assert found.tolist() == ([4, 3, 10, -2] if recentred else [2, 4, 64, -64])


# Fits


refit = jax.jit(qj.focused(5, refit_every=1).update)  # of all widths: they are in the state


def fitted(w, bits=5, key=None, **options):
    quantizer = qj.focused(bits, **options)
    return quantizer, quantizer.init(tree(w), key)


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
@pytest.mark.parametrize("noise", ["normal", "t"])
@pytest.mark.parametrize("options", [{}, PLAIN])
def test_the_bias_is_the_largest_that_lets_few_weights_saturate(bits, noise, options):
    w = sparse(*BIG, noise=noise, scale=0.03)
    _, state = fitted(w, bits, **options)
    mine = buffers_of(state)
    recentred = bool(mine["recentred"])
    assert recentred is not bool(options)
    x = np.float64(w)
    plus = mine["component"] > 0 if recentred else x > 0
    v = (x - np.where(plus, mine["mean"][..., 1], mine["mean"][..., 0])) / np.where(
        plus, mine["std"][..., 1], mine["std"][..., 0]
    )
    v = np.abs(v[x != 0])
    top = 2 ** (bits - 2) - 1 if recentred else 2 ** (bits - 1) - 1
    allowed = v.size / 2 ** (bits + 1)
    found = int(mine["bias"].item())
    assert np.sum(v > 2.0 ** (top - found)) <= allowed
    assert np.sum(v > 2.0 ** (top - found - 1)) > allowed


@pytest.mark.parametrize("seed", range(3))
def test_the_bias_of_least_error_is_not_worse(seed):
    w = sparse(*BIG, noise="t", seed=seed)
    errors = {}
    for bias in ("overflow", "error"):
        quantizer, state = fitted(w, 4, bias=bias)
        out = np.float64(quantizer.apply(tree(w), state)["Dense_0"]["kernel"])
        errors[bias] = np.sum((out - np.float64(w)) ** 2)
        if bias == "error":
            for other in (-1, 1):
                moved = {**state.buffers[PATH], "bias": state.buffers[PATH]["bias"] + other}
                out = quantizer.apply(tree(w), state._replace(buffers={PATH: moved}))
                error = np.sum((np.float64(out["Dense_0"]["kernel"]) - np.float64(w)) ** 2)
                assert errors["error"] <= error * (1 + 1e-6)
    assert errors["error"] <= errors["overflow"] * (1 + 1e-6)


def test_the_choice_per_layer():
    """W of a fit to the weights themselves, beside 2: two modes, and one."""
    rng = np.random.default_rng(0)
    for w in (sparse(*BIG), jnp.asarray(rng.normal(size=BIG), jnp.float32)):
        mixture = focused.fit_mixture(w)
        kept = np.float64(w)[np.asarray(w) != 0]
        (low, high), (narrow, wide) = np.float64(mixture.mean), np.float64(mixture.std)
        separation = ((low - high) ** 2 + (narrow - wide) ** 2) / kept.var()
        for border in (2.0, 0.9 * separation, 1.1 * separation):
            _, state = fitted(w, min_separation=border)
            assert bool(buffers_of(state)["recentred"]) is bool(separation >= border)


def test_the_fit_is_the_mixture():
    w = sparse(*BIG)
    _, state = fitted(w)
    mine, mixture = buffers_of(state), focused.fit_mixture(w)
    np.testing.assert_allclose(mine["mean"].ravel(), mixture.mean, rtol=1e-5)
    np.testing.assert_array_equal(mine["std"].ravel(), 2.0 ** np.rint(np.log2(mixture.std)))
    np.testing.assert_array_equal(
        mine["component"],
        np.where(np.asarray(w) == 0, 0, focused.assign(None, w, mixture)),
    )


def test_a_weight_that_comes_back_takes_the_component_of_its_value():
    w = np.array(sparse(*BIG))
    quantizer, state = fitted(jnp.asarray(w))
    assert w[0, 0] == 0 == buffers_of(state)["component"][0, 0]
    mean = buffers_of(state)["mean"].ravel()
    for value, component in ((0.5, 1), (-0.5, 0)):
        w[0, 0] = value
        applied = float(quantizer.apply(tree(w), state)["Dense_0"]["kernel"][0, 0])
        minus, plus = shift.table(state.buffers[PATH], 5)
        assert np.any(applied == (np.asarray(plus) if component else np.asarray(minus)))
        assert abs(applied - mean[component]) <= abs(mean[component])


def test_components_are_drawn_with_a_key_and_stay():
    rng = np.random.default_rng(0)  # two modes that overlap
    w = jnp.asarray(np.concatenate([rng.normal(m, 0.6, (30, 80)) for m in (-1, 1)]), jnp.float32)
    drawn = [
        buffers_of(fitted(w, key=k)[1])["component"]
        for k in (None, *jax.random.split(jax.random.key(0)))
    ]
    different = [np.mean(a != b) for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2]))]
    assert all(0.01 < share < 0.3 for share in different)
    quantizer, state = fitted(w, key=jax.random.key(1))
    once, again = (quantizer.apply(tree(w), state, key=jax.random.key(k)) for k in (2, 3))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    start = qj.focused(5, refit_every=1).init(tree(w))
    refits = [refit(tree(w), start, key=key) for key in jax.random.split(jax.random.key(4))]
    refits = [buffers_of(state)["component"] for state in refits]
    assert 0.01 < np.mean(refits[0] != refits[1]) < 0.3


def test_refits_after_n_2n_4n_steps():
    quantizer = qj.focused(4, refit_every=2)
    state = quantizer.init(tree(sparse(*BIG)))
    moved, key = [], jax.random.key(0)
    for step in range(1, 32):
        w = tree(sparse(*BIG, seed=step, scale=1 + step / 10))
        new = refit(w, state, key=key)
        before, after = buffers_of(state), buffers_of(new)
        same = all(np.array_equal(before[name], after[name]) for name in ("mean", "component"))
        if not same:
            moved.append(step)
            fresh = buffers_of(quantizer.init(w, key))
            for name in ("mean", "std", "bias", "component", "border"):
                np.testing.assert_allclose(after[name], fresh[name], rtol=1e-5)
        state = new
    assert moved == [2, 6, 14, 30]


def test_without_refits_nothing_moves():
    quantizer, state = fitted(sparse(*BIG))
    assert quantizer.update(tree(sparse(*BIG, seed=1)), state) is state


# Gradients and codes


def test_gradients():
    w = sparse(*BIG)
    quantizer, state = fitted(w)
    learned = {PATH: {"alpha": jnp.full((1, 1), 1.5)}}
    g = np.random.default_rng(1).normal(size=BIG).astype(np.float32)

    def loss(params, learned):
        return jnp.sum(
            g * quantizer.apply(params, state._replace(learned=learned))["Dense_0"]["kernel"]
        )

    dw, dalpha = jax.jit(jax.grad(loss, (0, 1)))(tree(w), learned)
    np.testing.assert_array_equal(dw["Dense_0"]["kernel"], np.where(np.asarray(w) == 0, 0, g))
    plain = np.float64(quantizer.apply(tree(w), state)["Dense_0"]["kernel"])
    assert float(dalpha[PATH]["alpha"].item()) == pytest.approx(np.sum(g * plain), rel=1e-4)


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("options", [{}, PLAIN])
def test_symbols(bits, options):
    w = sparse(*BIG)
    quantizer, state = fitted(w, bits, **options)
    state = state._replace(learned={PATH: {"alpha": jnp.full((1, 1), 1.25)}})
    leaf = quantizer.encode(tree(w), state)["Dense_0"]["kernel"].validate()
    assert leaf.bits == bits
    assert leaf.levels.shape == (1, 1, 2**bits)
    codes, levels = np.asarray(leaf.codes), np.asarray(leaf.levels).ravel()
    np.testing.assert_array_equal(codes == 0, np.asarray(w) == 0)
    assert levels[0] == 0
    assert codes.max() <= 2**bits - 2  # 2**bits - 1 symbols with zero
    mine = buffers_of(state)
    expected = level_sets(
        bits,
        np.float64(mine["mean"].ravel()),
        mine["std"].ravel(),
        mine["bias"].item(),
        not options,
    )
    exact = np.concatenate([sorted(part) for part in expected])
    np.testing.assert_array_equal(levels[1:-1], np.float32(1.25) * np.float32(exact))
    np.testing.assert_array_equal(np.float32(exact), exact)  # levels are exact in float32
    kind = qj.summary({"k": leaf}).rows[0].method
    assert kind == ("Table, powers of two" if options else "Table")
    np.testing.assert_array_equal(
        quantizer.apply(tree(w), state)["Dense_0"]["kernel"], leaf.decode()
    )


@pytest.mark.usefixtures("few_programs")
def test_one_program_serves_all_widths():
    w = tree(sparse(*BIG))
    quantizer = qj.focused(5, refit_every=1)
    apply, update = jax.jit(quantizer.apply), jax.jit(quantizer.update)
    for bits in (3, 4, 5):
        other = qj.focused(bits, refit_every=1)
        state = other.init(w)
        out = apply(w, state)["Dense_0"]["kernel"]
        assert len(np.unique(out)) <= 2**bits - 1
        np.testing.assert_array_equal(out, other.apply(w, state)["Dense_0"]["kernel"])
        moved = update(w, state)  # a fit to the same weights, then: nothing new but the counts
        for name in ("bias", "component", "limit", "recentred", "std"):
            np.testing.assert_array_equal(moved.buffers[PATH][name], state.buffers[PATH][name])
        assert (int(moved.buffers[PATH]["count"]), int(moved.buffers[PATH]["wait"])) == (0, 2)
    assert apply._cache_size() == update._cache_size() == 1


# Shifts and additions


@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("options", [{}, PLAIN])
def test_shifts_and_additions_are_the_float_product(bits, options):
    w = sparse(*BIG, density=0.5, scale=0.05)
    _, state = fitted(w, bits, **options)
    x = np.random.default_rng(0).integers(-(2**11), 2**11, (7, 60))
    y, exponent = shift.shift_dot(x, w, state.buffers[PATH])
    assert y.dtype == np.int64
    weights = np.float64(focused._quantize(w, jnp.ones((1, 1)), state.buffers[PATH]))
    # Products of 12 and 24 bits and sums of 60 of them: float64 holds them exactly.
    np.testing.assert_array_equal(y * 2.0**exponent, x @ weights)
    single, exponent = shift.shift_dot(np.ones((1, 1), int), w[:1], _rows(state, 1))
    np.testing.assert_array_equal(single[0] * 2.0**exponent, weights[0])


def _rows(state, count):
    mine = state.buffers[PATH]
    return {**mine, "component": mine["component"][:count]}


def test_operations_are_counted():
    w = sparse(*BIG, density=0.5)
    kept = int(np.count_nonzero(w))
    _, state = fitted(w)
    assert shift.operations(w, state.buffers[PATH]) == (kept, 2 * kept + 160, 160)
    _, state = fitted(w, **PLAIN)
    assert shift.operations(w, state.buffers[PATH]) == (kept, kept, 0)


def test_shift_dot_wants_integers_that_fit():
    w = sparse(*BIG, density=0.5)
    _, state = fitted(w)
    with pytest.raises(ValueError, match="integers, got float64"):
        shift.shift_dot(np.ones((1, 60)), w, state.buffers[PATH])
    with pytest.raises(ValueError, match="do not fit into 64"):
        shift.shift_dot(np.full((1, 60), 2**50), w, state.buffers[PATH])


# Bad input

rng = np.random.default_rng(0)
ODD = {
    "no negative": np.abs(rng.normal(size=SHAPE)),
    "no positive": -np.abs(rng.normal(size=SHAPE)),
    "15 non-zero": np.where(np.arange(48).reshape(SHAPE) < 15, rng.normal(size=SHAPE), 0),
    "all pruned": np.zeros(SHAPE),
    "all equal": np.full(SHAPE, 0.3),
    "subnormal": np.full(SHAPE, 1e-40),
    "huge": rng.normal(size=SHAPE) * 1e30,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_layers_are_plain_shift_and_the_summary_says_so(name):
    w = jnp.asarray(ODD[name], jnp.float32)
    quantizer = qj.focused(5, refit_every=1)
    first = quantizer.init(tree(w), jax.random.key(0))
    for state in (first, refit(tree(w), first, key=jax.random.key(1))):
        assert not buffers_of(state)["recentred"].any()
        encoded = quantizer.encode(tree(w), state)
        encoded["Dense_0"]["kernel"].validate()
        row = qj.summary(encoded, tree(w)).rows[0]
        assert row.method == "Table, powers of two"
        out = np.asarray(qj.decode(encoded)["Dense_0"]["kernel"])
        assert np.all(np.isfinite(out))
        normal = np.abs(ODD[name]) > 1e-37
        assert np.all(np.abs(out - w)[normal] <= np.abs(np.asarray(w))[normal] / 2)
        assert np.all(out[~normal] == 0)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_modes_that_are_one_value_each(bits):
    """Their levels are float32 numbers still, all different, and as near as those can be."""
    w = np.where(np.arange(48).reshape(SHAPE) % 3, 0.3, -0.7).astype(np.float32)
    quantizer, state = fitted(jnp.asarray(w), bits)
    mine = buffers_of(state)
    assert mine["recentred"].all()
    means, bias = np.float64(mine["mean"].ravel()), mine["bias"].item()
    for i, exact in enumerate(level_sets(bits, means, mine["std"].ravel(), bias, True)):
        levels = shift.table(state.buffers[PATH], bits)[i].ravel()
        np.testing.assert_array_equal(levels, sorted(exact))
    out = np.asarray(quantizer.apply(tree(w), state)["Dense_0"]["kernel"])
    np.testing.assert_allclose(out, w, rtol=1e-6)


def test_sixteen_weights_of_both_signs_are_recentred():
    w = np.zeros(SHAPE, np.float32)
    w.ravel()[:16] = np.linspace(1, 2, 16) * np.resize([-1, 1], 16)
    assert buffers_of(fitted(jnp.asarray(w))[1])["recentred"].all()


def test_nan_is_not_hidden():
    w = sparse(*BIG).at[0, 0].set(jnp.nan)
    quantizer, state = fitted(sparse(*BIG))
    with pytest.raises(ValueError, match=f"{PATH}: 1 of 4800 values are NaN"):
        quantizer.init(tree(w))
    out = np.asarray(quantizer.apply(tree(w), state)["Dense_0"]["kernel"])
    assert np.isnan(out[0, 0])
    assert np.isfinite(out).sum() == 4799
    with pytest.raises(ValueError, match=f"{PATH}: 1 of 4800 values are NaN"):
        quantizer.encode(tree(w), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 2}, r"bits must be a whole number in 3\.\.8, got 2"),
        ({"bits": 9}, r"3\.\.8, got 9"),
        ({"bits": 1, **PLAIN}, r"2\.\.8, got 1"),
        ({"bits": 4.0}, r"got 4\.0"),
        ({"bits": 4, "min_separation": -1.0}, "min_separation must not be negative"),
        ({"bits": 4, "refit_every": 0}, "refit_every"),
        ({"bits": 4, "bias": "best"}, '"overflow" or "error"'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        qj.focused(**arguments)


def test_a_state_of_another_tree():
    quantizer, state = fitted(sparse(*BIG))
    with pytest.raises(ValueError, match=f"{PATH}: the state was made for another tree"):
        quantizer.apply(tree(sparse(60, 81)), state)


# A trained network


def test_five_bits_cost_a_trained_layer_little():
    """Pruned to 20 percent, the error is a small part of what pruning leaves."""
    arrays = golden.load("ResNet82_state_dict.npz")
    w = jnp.asarray(arrays["layer3.4.conv2.weight"].transpose(2, 3, 1, 0))
    quantizer = qj.chain(qj.magnitude(0.2), qj.focused(5))
    params = tree(w)
    state = quantizer.init(params)
    kept = np.float64(
        qj.magnitude(0.2).apply(params, qj.magnitude(0.2).init(params))["Dense_0"]["kernel"]
    )
    out = np.float64(quantizer.apply(params, state)["Dense_0"]["kernel"])
    assert np.sum((out - kept) ** 2) < 0.01 * np.sum(kept**2)


# States, abstract values, without jit


def two_layers():
    rng = np.random.default_rng(0)
    return {
        f"Dense_{i}": {"kernel": jnp.asarray(rng.normal(size=(12, 6)), jnp.float32)}
        for i in range(2)
    }


@pytest.mark.parametrize("bits", [3, 6])
def test_a_state_of_another_width_or_quantizer_is_an_error(bits):
    params = two_layers()
    quantizer = qj.focused(4, refit_every=1)
    state = qj.focused(bits).init(params)
    for call in (quantizer.apply, quantizer.encode, quantizer.update):
        with pytest.raises(ValueError, match=f"Dense_0/kernel: the state has {bits} bits.* 4"):
            call(params, state)
        with pytest.raises(ValueError, match=r"Dense_0/kernel: .*another quantizer"):
            call(params, qj.magnitude(0.5).init(params))


def test_a_kernel_added_after_init_is_an_error():
    params = two_layers()
    quantizer = qj.focused(4, refit_every=1)
    state = quantizer.init({"Dense_0": params["Dense_0"]})
    for call in (quantizer.apply, quantizer.encode, quantizer.update):
        with pytest.raises(ValueError, match=r"does not know \['Dense_1/kernel'\]"):
            call(params, state)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int8])
def test_kernels_that_are_no_floats_are_refused(dtype):
    with pytest.raises(ValueError, match=f"Dense_0/kernel: .*{jnp.dtype(dtype)}"):
        qj.focused(4).init({"Dense_0": {"kernel": jnp.ones((4, 4), dtype)}})


def test_encode_jits_and_has_an_abstract_form():
    params = two_layers()
    quantizer = qj.focused(np.int64(4), min_separation=0.0, refit_every=np.int32(2))
    state = quantizer.init(params)
    eager = quantizer.encode(params, state)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(quantizer.encode)(params, state), eager)
    abstract = jax.eval_shape(quantizer.encode, params, state)
    assert jax.tree.structure(abstract) == jax.tree.structure(eager)
    assert abstract["Dense_0"]["kernel"].bits == 4


@pytest.mark.parametrize("bias", [pytest.param("overflow", marks=pytest.mark.slow), "error"])
def test_without_jit_all_is_the_same(bias, monkeypatch, few_programs, quick_programs):
    monkeypatch.setattr("quantjax.methods.fq.mixture.ITERATIONS", 3)  # each is many operations
    params = {"Dense_0": two_layers()["Dense_0"]}
    quantizer = qj.focused(4, min_separation=math.inf, refit_every=1, bias=bias)

    def run():
        state = quantizer.update(params, quantizer.init(params), key=jax.random.key(1))
        return state, quantizer.apply(params, state), qj.decode(quantizer.encode(params, state))

    expected = run()
    with jax.disable_jit():
        actual = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), actual, expected)


def test_fit_and_encode_on_an_explicit_mesh():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    alone = {"kernel": two_layers()["Dense_0"]["kernel"]}
    params = jax.device_put(alone, place)
    quantizer = qj.focused(4, min_separation=0.0)
    key = jax.random.key(0)
    state = quantizer.init(params, key)
    assert str(jax.typeof(state.buffers["kernel"]["component"])) == "int8[12@a,6@b]"
    expected = quantizer.init(alone, key)
    np.testing.assert_array_equal(
        *(each.buffers["kernel"]["component"] for each in (state, expected))
    )
    encoded = quantizer.encode(params, state)["kernel"]
    assert str(jax.typeof(encoded.codes)) == "uint8[12@a,6@b]"
    applied = jax.jit(quantizer.apply)(params, state)["kernel"]
    np.testing.assert_array_equal(jax.device_get(encoded).decode(), applied)
