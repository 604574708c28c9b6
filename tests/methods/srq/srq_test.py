"""The SRQ quantizer: deployment, DropBits, learned widths, inputs of layers."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.methods import hard_concrete
from quantjax.methods.srq import estimators, semi_relaxed, widths
from tests import quick

PATH = "Dense_0/kernel"


def tree(w):
    return {"Dense_0": {"kernel": jnp.asarray(w, jnp.float32)}}


def of(params):
    return np.asarray(params["Dense_0"]["kernel"])


def dense_grid(bits):
    """Weights all over a grid of interval 1 and beyond."""
    half = 2 ** (bits - 1)
    return tree(np.linspace(-half - 0.9, half - 0.1, 12 * half + 1).reshape(1, -1))


def at(state, alpha=1.0, sigma=0.02, probs=None):
    """The state with the given interval, spread and mask probabilities."""
    learned = dict(state.learned[PATH])
    learned["log_alpha"] = jnp.full_like(learned["log_alpha"], np.log(alpha))
    learned["log_sigma"] = jnp.full_like(learned["log_sigma"], np.log(sigma))
    if probs is not None:
        probs = np.asarray(probs)
        learned["mask_logits"] = jnp.asarray(np.log(probs / (1 - probs)), jnp.float32)
    return state._replace(learned={PATH: learned})


def test_deployment_is_algorithm_1():
    w = np.random.default_rng(0).normal(size=(9, 7))
    quantizer = qj.srq(3, axes=-2)
    state = quantizer.init(tree(w))
    alpha = np.exp(np.asarray(state.learned[PATH]["log_alpha"]))
    assert alpha.shape == (1, 7)
    codes = np.clip(np.round(np.float32(w) / alpha), -4, 3)
    np.testing.assert_allclose(of(quantizer.apply(tree(w), state)), codes * alpha, rtol=1e-6)
    encoded = quantizer.encode(tree(w), state)["Dense_0"]["kernel"]
    np.testing.assert_array_equal(encoded.codes, codes)
    assert encoded.bits == 3


@pytest.mark.parametrize(
    "w",
    [
        np.linspace(-1, 0.5, 50),
        np.append(np.full(999, 0.1), 2.0),  # an outlier
        np.random.default_rng(0).normal(size=2000),
    ],
)
@pytest.mark.parametrize("make", [qj.srq, qj.rq])
def test_first_grid_is_that_of_least_squared_error(make, w):
    learned = make(3).init(tree(w[:, None])).learned[PATH]

    def error(alpha):
        return np.sum((np.clip(np.round(w / alpha), -4, 3) * alpha - w) ** 2)

    best = min(error(alpha) for alpha in np.geomspace(0.005, 1, 2000) * np.abs(w).max())
    assert error(np.exp(np.float64(learned["log_alpha"]).item())) <= 1.02 * best
    np.testing.assert_allclose(learned["log_alpha"] - learned["log_sigma"], np.log(3), rtol=1e-5)


def test_first_mask_probabilities():
    params = tree(np.ones((4, 4)))
    draws = [qj.srq(8, dropbits=True).init(params, jax.random.key(k)) for k in range(30)]
    probs = [jax.nn.sigmoid(state.learned[PATH]["mask_logits"]) for state in draws]
    assert abs(np.mean(probs) - 0.9) < 0.003
    assert 0.005 < np.std(probs) < 0.015
    exact = qj.srq(8, dropbits=True).init(params).learned[PATH]["mask_logits"]
    np.testing.assert_allclose(jax.nn.sigmoid(exact), np.full(7, 0.9), rtol=1e-5)


@pytest.mark.parametrize("estimator", estimators.KNOWN)
def test_the_penalty_counts_what_apply_drops_with_the_same_key(estimator):
    bits, probs = 4, np.array([0.5, 0.35, 0.3])
    params = dense_grid(bits)
    quantizer = qj.srq(bits, learn_bits=True, penalty=2.0, estimator=estimator)
    state = at(quantizer.init(params), probs=probs)
    norms = np.asarray(hard_concrete.prob_nonzero(jnp.asarray(probs)))
    levels = semi_relaxed.bit_levels(bits)

    @jax.jit
    def run(key):
        return quantizer.apply(params, state, key=key), quantizer.penalty(state, key=key)

    seen = set()
    for k in range(40):
        applied, penalty = run(jax.random.key(k))
        # sigma is a fiftieth of the interval: a code is chosen near it if its mask is not zero.
        used = np.unique(np.round(of(applied)).astype(int)) + 2 ** (bits - 1)
        highest = levels[used].max()
        seen.add(highest)
        expected = 0.0 if highest == 0 else 2.0 * norms[highest - 1]
        assert float(penalty) == pytest.approx(expected, rel=1e-5)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("leaf", ["kernel", "bias"])
def test_zeros_move_by_default_and_not_under_eq_3(leaf):
    """A head that starts at zero, and Flax's biases; with masks and without."""
    kernel = jnp.zeros((3, 2)) if leaf == "kernel" else jnp.ones((3, 2))
    params = {"Dense_0": {"kernel": kernel, "bias": jnp.zeros(2)}}

    def slope(key, **kwargs):
        quantizer = qj.srq(3, biases=True, dropbits=key is not None, **kwargs)
        state = quantizer.init(params)
        loss = lambda p: quantizer.apply(p, state, key=key)["Dense_0"][leaf].sum()  # noqa: E731
        return quick.jit(jax.grad(loss))(params)["Dense_0"][leaf]

    for key in (None, jax.random.key(0)):
        assert np.all(np.asarray(slope(key)) > 0.5)
        assert not np.any(slope(key, estimator="mode"))
    signature = inspect.signature(semi_relaxed.quantize)
    assert signature.parameters["estimator"].default == "expectation"


@pytest.mark.parametrize(
    ("probs", "width"),
    [
        ([0.9, 0.9, 0.9], 4),
        ([0.9, 0.9, 0.1], 3),
        ([0.9, 0.1, 0.9], 4),  # from the highest level down: a hole below stays
        ([0.9, 0.1, 0.1], 2),
        ([0.1, 0.1, 0.1], 1),
        # A half decides, at every level.
        ([0.55, 0.45, 0.45], 2),
        ([0.65, 0.45, 0.45], 2),
        ([0.45, 0.45, 0.45], 1),
        ([0.45, 0.55, 0.45], 3),
        ([0.65, 0.65, 0.45], 3),
        ([0.45, 0.45, 0.55], 4),
        ([0.45, 0.45, 0.65], 4),
    ],
)
def test_update_writes_the_width(probs, width):
    params = dense_grid(4)
    quantizer = qj.srq(4, learn_bits=True)
    state = quantizer.update(params, at(quantizer.init(params), probs=probs))
    assert widths.of_state(state) == {PATH: width}
    shipped = of(quantizer.apply(params, state))
    low, high = (-1, 1) if width == 1 else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    np.testing.assert_array_equal(np.unique(shipped), np.arange(low, high + 1))
    encoded = quantizer.encode(params, state)["Dense_0"]["kernel"]
    np.testing.assert_array_equal(encoded.decode(), shipped)
    assert encoded.bits == max(2, width)
    assert [widths.name(w) for w in (1, 2, 3)] == ["T", "2", "3"]


def test_the_width_is_frozen_after_so_many_updates():
    params = dense_grid(4)
    quantizer = qj.srq(4, learn_bits=True, freeze_after=2)
    update, apply = jax.jit(quantizer.update), jax.jit(quantizer.apply)
    state = at(quantizer.init(params), probs=[0.9, 0.9, 0.1])
    assert float(quantizer.penalty(state)) > 0
    state = update(params, update(params, state))
    assert float(quantizer.penalty(state)) == 0
    assert float(quantizer.penalty(state, key=jax.random.key(0))) == 0
    state = at(state, probs=[0.1, 0.99, 0.99])
    for _ in range(3):  # nothing that is learned now moves the width
        state = update(params, state)
    assert widths.of_state(state) == {PATH: 3}
    for k in range(20):
        assert set(np.unique(of(apply(params, state, key=jax.random.key(k))))) <= set(range(-4, 4))


def test_the_twin_of_learned_widths():
    """`with_widths`: fixed from the start, as far as the grid reached; masks keep to the width."""
    quantizer = qj.srq(4, learn_bits=True, freeze_after=0)
    params = dense_grid(4)
    first = quantizer.init(params)
    for width, most in ((1, 1), (2, 1), (3, 3), (4, 7)):
        state = widths.at_widths(first, 4, {PATH: width})
        state = quantizer.update(params, state)
        assert widths.of_state(state) == {PATH: width}
        grids = [np.exp(s.learned[PATH]["log_alpha"]).item() for s in (first, state)]
        assert grids[1] * most == pytest.approx(grids[0] * 7, rel=1e-5)
        assert float(quantizer.penalty(state, key=jax.random.key(0))) == 0
        wide = tree(2 * of(params))
        codes = np.unique(np.round(of(quantizer.apply(wide, state)) / grids[1])).tolist()
        assert (codes[0], codes[-1]) == ((-1, 1) if width == 1 else (-most - 1, most))
        noisy = of(quantizer.apply(wide, state, key=jax.random.key(1))) / grids[1]
        assert codes[0] <= np.round(noisy).min()
        assert np.round(noisy).max() <= codes[-1]
    with pytest.raises(ValueError, match=rf"{PATH}: width must be in 1\.\.4, got 5"):
        widths.at_widths(first, 4, {PATH: 5})
    with pytest.raises(ValueError, match="widths of"):
        widths.at_widths(first, 4, {"Dense_1/kernel": 2})
    with pytest.raises(ValueError, match="widths of"):
        widths.at_widths(qj.srq(4).init(params), 4, {PATH: 2})


def test_without_learned_bits_the_width_stays():
    params = dense_grid(4)
    quantizer = qj.srq(4, dropbits=True)
    state = at(quantizer.init(params), probs=[0.1, 0.1, 0.1])
    state = quantizer.update(params, state, key=jax.random.key(0))
    assert len(np.unique(of(quantizer.apply(params, state)))) == 16
    assert float(quantizer.penalty(state, key=jax.random.key(0))) == 0


@pytest.mark.usefixtures("few_programs")
def test_one_program_serves_several_widths():
    params = dense_grid(4)
    apply = jax.jit(qj.srq(4).apply)
    for bits in (2, 3, 4, 6):
        state = at(qj.srq(bits).init(params))
        np.testing.assert_array_equal(
            of(apply(params, state)), of(qj.srq(bits).apply(params, state))
        )
    assert apply._cache_size() == 1


def test_weights_grids_and_masks_train_together():
    """A regression whose weights need three levels: the width falls, then the error at it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    wanted = jnp.asarray(rng.choice([-0.5, 0, 0.5], size=(16, 4)), jnp.float32)
    y = x @ wanted
    quantizer = qj.srq(3, learn_bits=True, freeze_after=200, penalty=0.3, estimator="expectation")
    params = tree(wanted + rng.normal(size=wanted.shape) * 0.1)
    state = at(quantizer.init(params, jax.random.key(0)), alpha=0.6, sigma=0.2)
    tx = optax.adam(0.02)

    @jax.jit
    def step(trainable, opt_state, state, key):
        def loss(trainable):
            params, learned = trainable
            now = state._replace(learned=learned)
            w = quantizer.apply(params, now, key=key)["Dense_0"]["kernel"]
            return jnp.mean((x @ w - y) ** 2) + quantizer.penalty(now, key=key)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, opt_state = tx.update(grads, opt_state)
        trainable = optax.apply_updates(trainable, updates)
        params, learned = trainable
        return (
            trainable,
            opt_state,
            quantizer.update(params, state._replace(learned=learned)),
            value,
        )

    def error(params, state):
        return float(jnp.mean((x @ quantizer.apply(params, state)["Dense_0"]["kernel"] - y) ** 2))

    before = error(params, state)
    trainable, opt_state = (params, state.learned), tx.init((params, state.learned))
    for k in range(500):
        trainable, opt_state, state, _ = step(trainable, opt_state, state, jax.random.key(k))
    assert widths.of_state(state)[PATH] < 3
    assert error(trainable[0], state) < 0.5 * before


def test_inputs_take_the_grid_of_their_signs():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 5)), jnp.float32)
    for quantizer, batch, limits in (
        (qj.srq_input(3), x, (-4, 3)),
        (qj.srq_input(3), jnp.abs(x), (0, 7)),
        (qj.srq_input(3, signed=True), jnp.abs(x), (-4, 3)),
        (qj.srq_input(3, signed=False), x, (0, 7)),
    ):
        state = quantizer.init(batch)
        assert (float(state.buffers["low"]), float(state.buffers["high"])) == limits
        x_hat, _ = quantizer.apply(batch, state)
        alpha = np.exp(state.learned["log_alpha"])
        expected = np.clip(np.round(np.asarray(batch) / alpha), *limits) * alpha
        np.testing.assert_allclose(x_hat, expected, rtol=1e-5)


def test_idle_halves_of_signed_grids_are_said_once_in_the_summary():
    signed = qj.srq_input(3, signed=True)
    stats = {
        "Conv_0": signed.init(jnp.asarray([-1.0, 2.0])).buffers,
        "Conv_1": signed.init(jnp.asarray([0.0, 2.0])).buffers,
        "Dense_0": qj.srq_input(3).init(jnp.asarray([0.0, 2.0])).buffers,
    }
    weights = tree(np.ones((2, 2)))
    encoded = qj.srq(3).encode(weights, qj.srq(3).init(weights))
    text = str(qj.summary(encoded, inputs={"quant_stats": stats}))
    assert text.count("half of a signed grid is idle") == 1
    assert "Conv_1" in text
    assert "Conv_0" not in text
    assert "idle" not in str(qj.summary(encoded))
    _, state = signed.apply(
        jnp.asarray([-0.5]),
        qj.QuantState(signed.init(jnp.ones(2)).learned, stats["Conv_1"]),
        update=True,
    )
    stats["Conv_1"] = state.buffers  # a later batch has negative inputs after all
    assert qj.summary(encoded, inputs={"quant_stats": stats}).notes == ()


def test_input_grids_are_learned():
    quantizer = qj.srq_input(2, estimator="expectation")  # eq. 3 as written hardly moves them
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 3, 200), jnp.float32)
    state = quantizer.init(x)
    learned = {name: value + 0.7 for name, value in state.learned.items()}  # twice too coarse
    tx = optax.adam(0.02)

    @jax.jit
    def step(learned, opt_state):
        def loss(learned):
            x_hat, _ = quantizer.apply(x, state._replace(learned=learned))
            return jnp.mean((x_hat - x) ** 2)

        value, grads = jax.value_and_grad(loss)(learned)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(learned, updates), opt_state, value

    opt_state, losses = tx.init(learned), []
    for _ in range(150):
        learned, opt_state, value = step(learned, opt_state)
        losses.append(float(value))
    assert min(losses) < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qj.srq(0), r"bits must be a whole number in 1\.\.8, got 0"),
        (lambda: qj.srq(9), r"bits must be a whole number in 1\.\.8, got 9"),
        (lambda: qj.srq(1, dropbits=True), "DropBits needs at least 2 bits"),
        (lambda: qj.srq(3, freeze_after=5), "needs learn_bits=True"),
        (lambda: qj.srq(3, learn_bits=True, freeze_after=-1), "must be >= 0"),
        (lambda: qj.srq(3, learn_bits=True, penalty=-1.0), "penalty must be finite and >= 0"),
        (lambda: qj.srq(3, estimator="mean"), "estimator must be one of"),
        (lambda: qj.srq(3, temperature=0.0), "temperature must be positive"),
        (lambda: qj.srq(3, gamma=0.1), "gamma must be negative"),
        (lambda: qj.srq(3, zeta=1.0), "zeta must be above 1"),
        (lambda: qj.srq_input(3, estimator="mean"), "estimator must be one of"),
        (lambda: semi_relaxed.quantize(1.0, 0.0, 1.0, bits=3), "alpha must be positive"),
        (lambda: semi_relaxed.quantize(1.0, 1.0, -1.0, bits=3), "sigma must be positive"),
        (
            lambda: semi_relaxed.quantize(1.0, 1.0, 1.0, bits=4, masks=jnp.ones(5)),
            "4 bits have 3 masks of bit levels or 7 of end points, got 5",
        ),
        (
            lambda: semi_relaxed.quantize(1.0, 1.0, 1.0, bits=4, signed=False, masks=jnp.ones(3)),
            "masks need a signed grid",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_state_of_other_leaves():
    quantizer = qj.srq(4, axes=-2)
    state = quantizer.init(tree(np.ones((3, 5))))
    with pytest.raises(ValueError, match=PATH):
        quantizer.apply(tree(np.ones((3, 4))), state)
