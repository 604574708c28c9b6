"""A method from outside the library: a learned step (LSQ), the laws on it, and laws that break."""

import jax
import jax.numpy as jnp
import optax
import pytest

import quantjax as qj
from quantjax import testing

pytestmark = pytest.mark.usefixtures("quick_compilation")


def lsq(bits: int) -> qj.Quantizer:
    """Learned step size quantization (Esser et al. 2020), without its scaling of gradients."""
    limit = 2.0 ** (bits - 1) - 1

    def init(path, leaf, key):
        size = jnp.mean(jnp.abs(leaf.astype(jnp.float32)), keepdims=True)
        return {"log_step": jnp.log(2 * size / jnp.sqrt(limit) + 1e-6)}, {}

    def step_of(learned):  # one number for all its uses, in every program
        return jax.lax.optimization_barrier(jnp.exp(learned["log_step"]))

    def apply(leaf, learned, buffers, key):
        x = leaf.astype(jnp.float32)
        return qj.rounding.nearest_on_grid(x, step_of(learned), -limit, limit).astype(leaf.dtype)

    def encode(leaf, learned, buffers):
        step = step_of(learned)
        codes = qj.rounding.to_codes(leaf.astype(jnp.float32), step, -limit, limit)
        return qj.Grid(codes.astype(jnp.int8), step, bits=bits, dtype=leaf.dtype)

    return qj.leafwise(init, apply, encode)


def test_a_method_from_outside_keeps_the_laws(usual_programs):
    testing.check_laws(lsq(3))


def test_its_step_trains():
    params = {"Dense_0": {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}}
    quantizer = lsq(3)
    state = quantizer.init(params)
    learned = jax.tree.map(lambda log_step: log_step + 1, state.learned)  # far too wide
    tx = optax.adam(0.05)

    @jax.value_and_grad
    def loss(learned):
        applied = quantizer.apply(params, state._replace(learned=learned))
        return jnp.mean((applied["Dense_0"]["kernel"] - params["Dense_0"]["kernel"]) ** 2)

    @jax.jit
    def step(learned, opt_state):
        value, grads = loss(learned)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(learned, updates), opt_state, value

    opt_state, values = tx.init(learned), []
    for _ in range(60):
        learned, opt_state, value = step(learned, opt_state)
        values.append(value)
    assert values[-1] < 0.5 * values[0]


def broken(**parts):
    """A 4-bit grid of which some functions are others."""
    good = qj.uniform(4)
    return good._replace(**parts)


def half_a_step_off(params, state):
    encoded = qj.uniform(4).encode(params, state)
    return jax.tree.map(
        lambda leaf: leaf + 1 if leaf.dtype == jnp.int8 else leaf,
        encoded,
    )


def another_width(params, state, *, key=None):
    return qj.uniform(8).update(params, qj.uniform(8).init(params))


def grows(params, state, *, key=None):
    return state._replace(buffers=jax.tree.map(lambda x: jnp.append(x, x), state.buffers))


def rough(params, state, *, key=None):
    applied = qj.uniform(4).apply(params, state)
    return jax.tree.map(lambda x: jnp.sqrt(jnp.abs(x)), applied)


def gathers(params, state, *, key=None):
    applied = qj.uniform(4).apply(params, state)
    order = jnp.sort(applied["Dense_0"]["kernel"].ravel())
    return {**applied, "Dense_0": {**applied["Dense_0"], "kernel": order.reshape(32, 24)}}


def wide(params, state):
    encoded = qj.uniform(4).encode(params, state)
    step = encoded["Dense_0"]["kernel"].step
    codes = encoded["Dense_0"]["kernel"].codes * 100
    encoded["Dense_0"]["kernel"] = qj.Grid(codes, step, 4, jnp.dtype("float32"))
    return encoded


BROKEN = {
    "law 1": ("law_1_what_you_train_is_what_you_ship", {"encode": half_a_step_off}),
    "law 2": ("law_2_applying_twice_changes_nothing", {"apply": rough}),
    "law 3": (
        "law_3_the_tree_is_kept",
        {"apply": lambda params, state, key=None: params["Dense_0"]},
    ),
    "law 4": ("law_4_gradients_are_finite", {"apply": rough}),
    "law 5": ("law_5_shardings_are_kept", {"apply": gathers}),
    "law 7": ("law_7_update_keeps_the_state_and_compiles_once", {"update": grows}),
}


@pytest.mark.parametrize("law", BROKEN)
def test_a_broken_law_is_named(law):
    name, parts = BROKEN[law]
    check = getattr(testing, name)
    arguments = (testing.AxisType.Auto,) if law == "law 5" else ()
    check(qj.uniform(4), testing.make_params(), *arguments)
    with pytest.raises(AssertionError, match=law):
        check(broken(**parts), testing.make_params(), *arguments)


def test_a_width_that_update_changes_breaks_law_1():
    with pytest.raises((AssertionError, ValueError), match=r"law 1|bits"):
        testing.law_1_what_you_train_is_what_you_ship(
            broken(update=another_width), testing.make_params()
        )


def test_invalid_codes_break_law_6():
    with pytest.raises(ValueError, match=r"codes leave -8\.\.7"):
        testing.law_6_nbits_is_what_storage_writes(broken(encode=wide), testing.make_params())
