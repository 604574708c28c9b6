"""The laws of the design, for every quantizer in the library. A new method is one line here."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import quantjax as qj
from quantjax import testing
from quantjax.methods.l0 import l0

QUANTIZERS = {
    "uniform 2": lambda: qj.uniform(2),
    "uniform 3": lambda: qj.uniform(3),
    "uniform 8": lambda: qj.uniform(8),
    "uniform 16": lambda: qj.uniform(16),
    "uniform per channel": lambda: qj.uniform(4, axes="channel"),
    "uniform running": lambda: qj.uniform(4, momentum=0.1),
    "uniform with biases": lambda: qj.uniform(4, biases=True),
    "uniform of least error": lambda: qj.uniform(2, fit="error", axes="channel"),
    "zero": lambda: qj.zero(),
    "lsq": lambda: qj.lsq(2, axes="channel", biases=True),
    "lsq balanced": lambda: qj.lsq(2, balanced=True, fit="mean"),
    "dorefa": lambda: qj.dorefa(3),
    "dorefa 1": lambda: qj.dorefa(1, biases=True),
    "binary": lambda: qj.binary(),
    "ternary": lambda: qj.ternary(biases=True),
    "absmean": lambda: qj.ternary(0.5, scale="all", axes="channel"),
    "partition": lambda: qj.partition(
        {"Conv_0": qj.uniform(8), ".*bias": None, ".*": qj.uniform(3, axes="channel")}
    ),
    "named": lambda: qj.named(
        {"Dense_0/kernel": "embedding"}, qj.uniform(4, axes="channel", biases=True)
    ),
    "rq": lambda: qj.rq(3),
    "rq straight-through": lambda: qj.rq(2, straight_through=True, axes="channel", biases=True),
    "srq 1": lambda: qj.srq(1),
    "srq 4": lambda: qj.srq(4, estimator="mode"),
    "srq 8": lambda: qj.srq(8),
    "srq per channel": lambda: qj.srq(3, axes="channel", biases=True, estimator="mode"),
    "dropbits 2": lambda: qj.srq(2, dropbits=True, estimator="mode"),
    "dropbits 4": lambda: qj.srq(4, dropbits=True, axes="channel", estimator="mode"),
    "dropbits expectation": lambda: qj.srq(3, dropbits=True),
    "dropbits learned": lambda: qj.srq(
        4, learn_bits=True, freeze_after=2, biases=True, estimator="mode"
    ),
    "chain": lambda: qj.chain(qj.uniform(6), qj.uniform(3)),
    "grid and masks": lambda: qj.chain(qj.uniform(4), qj.magnitude(0.3, end=2, every=1)),
    "multi-bit": lambda: qj.multi_bit(2, axes="channel"),
    "magnitude": lambda: qj.magnitude(0.3),
    "magnitude gradual": lambda: qj.magnitude(0.3, across=True, end=2, every=1),
    "surgery": lambda: qj.surgery(0.3, end=2),
    "n of m": lambda: qj.n_m(2, 4, every=2),
    "focused 5": lambda: qj.focused(5, min_separation=0.0, refit_every=1),
    "focused, one mode": lambda: qj.focused(3, min_separation=math.inf, bias="error"),
    "surgery and focused": lambda: qj.chain(qj.surgery(0.3, end=2), qj.focused(4, refit_every=1)),
    "l0": lambda: l0(1e-3, prob=0.6),
    "pruned": lambda: qj.pruned({"Dense_0": {"kernel": PARAMS["Dense_0"]["kernel"] > 0}}),
}
# Applying twice is another thing than once: gates are fractions, too, and tanh squeezes again.
CHANGING = {"l0", "dorefa"}
# On meshes they are asked with -m slow alone: another one of this table runs the same code.
OTHERS_CODE = {
    "uniform 3", "uniform 8", "uniform 16", "uniform with biases", "srq 1", "srq 8", "dropbits 2",
    "surgery and focused", "focused, one mode", "absmean", "dorefa 1",
}  # fmt: skip
PARAMS = testing.make_params()
# Scanned layers beside attention, whose heads stand before or after what a kernel sums over.
LAYERS = {"Blocks": 1}
HEADS = {".*out": (-3, -2), ".*": "channel"}
STACKED = {
    "uniform": lambda: qj.stacked(qj.uniform(4, axes=HEADS, momentum=0.1), LAYERS),
    "partition": lambda: qj.stacked(
        qj.partition({"Dense_0": qj.uniform(8), ".*kernel": qj.srq(3, axes=HEADS)}), LAYERS
    ),
    "dropbits learned": lambda: qj.stacked(
        qj.srq(4, learn_bits=True, freeze_after=2, estimator="mode", axes=HEADS), LAYERS
    ),
    "multi-bit": lambda: qj.stacked(qj.multi_bit(2, axes=HEADS), LAYERS),
    "masks and focused": lambda: qj.stacked(
        qj.chain(qj.magnitude(0.3, end=2, every=1), qj.focused(4, refit_every=1)), LAYERS
    ),
    "attention": lambda: qj.rq(4, axes={".*out": (-3, -2)}),
}
ALL = {name: (make, testing.make_params) for name, make in QUANTIZERS.items()} | {
    f"stacked, {name}": (make, lambda dtype=jnp.float32: testing.make_params(dtype, layers=2))
    for name, make in STACKED.items()
}


@pytest.fixture(params=ALL)
def name(request):
    return request.param


@pytest.fixture
def quantizer(name):
    return ALL[name][0]()


@pytest.fixture
def params_of(name):
    return ALL[name][1]


# Laws that share compiled programs share a test; what fails says which law it is.
@pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.bfloat16, jnp.float32]
)
def test_laws_1_to_3(name, quantizer, params_of, dtype):
    params = params_of(dtype)
    updates = testing.STEPS if dtype == jnp.float32 else 0
    testing.law_1_what_you_train_is_what_you_ship(quantizer, params, updates=updates)
    if name not in CHANGING:
        testing.law_2_applying_twice_changes_nothing(quantizer, params)
    testing.law_3_the_tree_is_kept(quantizer, params)


def test_law_4_gradients_are_finite(quantizer, params_of, quick_programs):
    testing.law_4_gradients_are_finite(quantizer, params_of())


def test_law_4_leaves_of_one_element(name, quantizer, quick_programs):
    if name in ("partition", "pruned", "named") or name.startswith("stacked"):
        pytest.skip("its patterns name other leaves")
    if name == "multi-bit":
        pytest.skip("a group has two elements or more")
    testing.law_4_leaves_of_one_element(quantizer)


def test_law_4_vmap_over_a_leading_axis(quantizer, params_of):
    testing.law_4_vmap_over_a_leading_axis(quantizer, params_of())


def test_law_5_shardings_are_kept(name, quantizer, params_of, quick_programs):
    if name in OTHERS_CODE:
        pytest.skip("the code of another one at other numbers: with -m slow")
    for kind in (AxisType.Auto, AxisType.Explicit):
        testing.law_5_shardings_are_kept(quantizer, params_of(), kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4), (1, 1)])
@pytest.mark.parametrize("size", ["small", "large"])
def test_law_5_on_other_meshes_and_large_leaves(quantizer, params_of, kind, shape, size):
    params = params_of()
    if size == "large":
        params["Dense_0"]["kernel"] = jax.random.normal(jax.random.key(0), (512, 384))
    if size == "large" and "pruned" in repr(quantizer):
        pytest.skip("its masks have a shape")
    testing.law_5_shardings_are_kept(quantizer, params, kind, shape)


def test_laws_6_and_7(quantizer, params_of, quick_programs):
    testing.law_6_nbits_is_what_storage_writes(quantizer, params_of())
    testing.law_7_update_keeps_the_state_and_compiles_once(quantizer, params_of())


def test_the_largest_weight_has_a_gradient():
    """The border belongs to the grid: with the range's own step no weight's gradient is zero."""
    rng = jax.random.key(0)
    for bits in (2, 3, 4, 8, 11):
        for axes in (None, "channel"):
            quantizer = qj.uniform(bits, axes=axes)
            leaves = jax.random.normal(jax.random.fold_in(rng, bits), (40, 31, 7))
            leaves *= jnp.exp(jax.random.normal(rng, (40, 1, 1)))

            def grads(leaf, quantizer=quantizer):
                params = {"kernel": leaf}
                state = quantizer.init(params)
                return jax.grad(lambda p: quantizer.apply(p, state)["kernel"].sum())(params)

            assert bool(jnp.all(jax.jit(jax.vmap(grads))(leaves)["kernel"] == 1)), (bits, axes)


def test_penalty_is_a_finite_scalar(quantizer, params_of, quick_programs):
    state = quantizer.init(params_of())
    for key in (None, jax.random.key(0)):
        penalty = quantizer.penalty(state, key=key)
        assert jnp.shape(penalty) == ()
        assert bool(jnp.isfinite(penalty))
