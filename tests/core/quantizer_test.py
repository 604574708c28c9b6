"""Trees, ownership, keys and errors: what every quantizer gets from core/quantizer.py."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax.core import paths
from quantjax.core.quantizer import keep, leafwise, no_penalty
from tests import toys

CONV, DENSE = "Conv_0/kernel", "Dense_0/kernel"


def make_params():
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "Conv_0": {"kernel": leaf(3, 3, 2, 4), "bias": leaf(4)},
        "Dense_0": {"kernel": leaf(6, 5), "bias": leaf(5)},
        "Embed_0": {"embedding": leaf(4, 3)},
        "Norm_0": {"scale": leaf(4), "bias": leaf(4), "kernel": leaf(4)},
    }


def flat(tree):
    return paths.flatten(tree)[0]


def equal(actual, desired):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(np.testing.assert_array_equal, actual, desired)


# Ownership


def test_weights_of_two_or_more_dimensions_are_owned_by_default():
    params = make_params()
    state = qj.uniform(4).init(params)
    assert sorted(state.buffers) == [CONV, DENSE, "Embed_0/embedding"]
    assert state.learned == {}  # no path without learned numbers


def test_biases_are_those_beside_owned_kernels():
    state = qj.uniform(4, biases=True).init(make_params())
    biases = {path for path in state.buffers if path.endswith("bias")}
    assert biases == {"Conv_0/bias", "Dense_0/bias"}  # not that of the norm


def test_owning_nothing_is_an_error_that_lists_the_paths():
    params = {"Norm_0": make_params()["Norm_0"]}
    with pytest.raises(ValueError, match=r"nothing to quantize.*'Norm_0/scale'"):
        qj.uniform(4).init(params)


def test_owned_says_which_leaves_a_state_owns():
    params = make_params()
    state = qj.partition({"Conv_0": qj.uniform(4), "Dense_0": qj.zero()}).init(params)
    mine = qj.owned(state, params)
    assert jax.tree.structure(mine) == jax.tree.structure(params)
    assert {path for path, is_mine in flat(mine).items() if is_mine} == {CONV, DENSE}
    del params["Dense_0"]
    with pytest.raises(ValueError, match=f"another tree.*{DENSE}"):
        qj.owned(state, params)


def test_a_path_in_learned_alone_counts_as_owned():
    params = make_params()
    state = qj.QuantState({DENSE: {"step": jnp.ones(())}}, {})
    assert [path for path, mine in flat(qj.owned(state, params)).items() if mine] == [DENSE]


QUANTIZERS = {
    "leafwise": lambda: qj.uniform(4),
    "partition": lambda: qj.partition({"Conv_0": qj.uniform(8), ".*kernel": qj.zero()}),
    "chain": lambda: qj.chain(toys.dropping(), qj.uniform(4)),
    "chain of partitions": lambda: qj.chain(
        qj.partition({"Conv_0": qj.zero()}), qj.partition({"Dense_0": qj.uniform(2)})
    ),
    "partition of chains": lambda: qj.partition(
        {"Conv_0/kernel": qj.chain(toys.dropping(), qj.uniform(2)), ".*bias": None}
    ),
}


@pytest.fixture(params=QUANTIZERS)
def quantizer(request):
    return QUANTIZERS[request.param]()


def test_leaves_that_are_not_owned_are_the_same_objects(quantizer):
    params = make_params()
    state = quantizer.init(params)
    mine = flat(qj.owned(state, params))
    assert not all(mine.values())
    for tree in (
        quantizer.apply(params, state),
        quantizer.apply(params, state, key=jax.random.key(0)),
        quantizer.encode(params, state),
    ):
        leaves = {
            path: functools.reduce(lambda node, part: node[part], path.split("/"), tree)
            for path in mine
        }
        for path, leaf in flat(params).items():
            assert (leaves[path] is leaf) is not mine[path]


def test_what_is_trained_ships_through_any_composition(quantizer):
    params = make_params()
    state = quantizer.init(params, jax.random.key(0))
    equal(qj.decode(quantizer.encode(params, state)), quantizer.apply(params, state))


def test_a_state_survives_jit_where_dicts_come_back_sorted(quantizer):
    params = make_params()
    state = quantizer.init(params)
    through = jax.jit(lambda state: state)(state)
    equal(jax.jit(quantizer.update)(params, through), quantizer.update(params, state))
    equal(jax.jit(quantizer.apply)(params, through), jax.jit(quantizer.apply)(params, state))


def test_update_moves_buffers_and_returns_learned_as_it_is(quantizer):
    params = make_params()
    state = quantizer.init(params)
    moved = quantizer.update(jax.tree.map(lambda leaf: 2 * leaf, params), state)
    assert moved.learned is state.learned
    before = jax.tree.map(np.asarray, state)
    quantizer.update(params, state)  # the state that is given is not written to
    equal(jax.tree.map(np.asarray, state), before)


def test_defaults_keep_the_state_and_add_nothing_to_the_loss():
    params = make_params()
    state = qj.zero().init(params)
    assert qj.zero().update(params, state, key=jax.random.key(0)) is state
    assert keep(params, state) is state
    assert no_penalty(state, key=None) == 0 == qj.zero().penalty(state)


# Errors of data


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_leaf_that_is_not_finite_is_named_when_encoded(quantizer, bad):
    params = make_params()
    state = quantizer.init(params)
    path = next(path for path in sorted(state.buffers) if path.endswith("kernel"))
    name, last = path.split("/")
    params[name][last] = params[name][last].at[0, 1].set(bad)
    with pytest.raises(ValueError, match=rf"{path}: \d+ of \d+ values are NaN or infinite"):
        quantizer.encode(params, state)


def test_leaves_that_are_not_owned_may_hold_nan():
    params = make_params()
    params["Norm_0"]["scale"] = jnp.full(4, jnp.nan)
    quantizer = qj.uniform(4)
    quantizer.encode(params, quantizer.init(params))


def test_an_empty_leaf_is_named():
    params = {**make_params(), "Dense_0": {"kernel": jnp.zeros((0, 5))}}
    with pytest.raises(ValueError, match=rf"{DENSE}: an empty leaf, shape \(0, 5\)"):
        qj.uniform(4).init(params)


def test_errors_of_a_leafs_own_functions_name_it():
    def fail(*arguments):
        raise ValueError("seven")

    with pytest.raises(ValueError, match=f"{CONV}: seven"):
        leafwise(fail, None, None).init(make_params())
    failing = leafwise(lambda path, leaf, key: ({}, {}), fail, fail, fail)
    params = make_params()
    state = failing.init(params)
    for fn in (failing.apply, failing.encode, failing.update):
        with pytest.raises(ValueError, match=f"{CONV}: seven"):
            fn(params, state)


@pytest.mark.parametrize("use", ["apply", "encode", "update"])
def test_a_state_made_for_a_tree_with_more_leaves(quantizer, use):
    if use == "update" and quantizer.update is keep:
        pytest.skip("it looks at no params")
    params = make_params()
    state = quantizer.init(params)
    lost = sorted(state.buffers)[0]
    del params[lost.split("/")[0]]
    with pytest.raises(ValueError, match=f"made for another tree.*{lost}"):
        getattr(quantizer, use)(params, state)


@pytest.mark.parametrize("use", ["apply", "encode", "update"])
@pytest.mark.parametrize(
    "wrap", [lambda q: q, lambda q: qj.partition({".*": q}), lambda q: qj.chain(q)]
)
def test_a_state_made_for_leaves_of_other_shapes(use, wrap):
    quantizer = wrap(qj.uniform(4, axes=-2))
    params = make_params()
    state = quantizer.init(params)
    params["Dense_0"]["kernel"] = jnp.ones((6, 7))
    with pytest.raises(ValueError, match=f"{DENSE}.*made for another tree.*5.*7"):
        getattr(quantizer, use)(params, state)


# Partition


def test_partition_gives_each_leaf_to_its_quantizer():
    params = make_params()
    members = {"Conv_0": qj.uniform(8), "Embed_0": None, ".*(kernel|embedding)": qj.uniform(3)}
    quantizer = qj.partition(members)
    state = quantizer.init(params)
    assert sorted(state.buffers) == [CONV, DENSE]
    applied = quantizer.apply(params, state)
    for name, bits in (("Conv_0", 8), ("Dense_0", 3)):
        alone = qj.uniform(bits)
        part = {name: params[name]}
        equal(applied[name], alone.apply(part, alone.init(part))[name])
        assert quantizer.encode(params, state)[name]["kernel"].bits == bits
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    moved = quantizer.update(doubled, state)
    equal(moved.buffers, quantizer.init(doubled).buffers)


def test_partition_matches_whole_names():
    params = {
        f"{name}": {"kernel": jnp.ones((2, 2))} for name in ("Conv_1", "Conv_10", "Block_0/Conv_1")
    }
    state = qj.partition({"Conv_1": qj.uniform(4)}).init(params)
    assert list(state.buffers) == ["Conv_1/kernel"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"Conv_1": qj.uniform(4), ".*": None}, r"'Conv_1' matches no path.*Conv_0/kernel"),
        ({".*": qj.uniform(4), "Conv_0": qj.zero()}, r"'Conv_0' is shadowed.*Conv_0/kernel"),
        ({"Norm_0": qj.uniform(4)}, r"pattern 'Norm_0'.*nothing to quantize.*Norm_0/scale"),
        ({"Nothing": None}, r"'Nothing' matches no path"),
    ],
)
def test_patterns_that_do_nothing_are_errors(members, message):
    with pytest.raises(ValueError, match=message):
        qj.partition(members).init(make_params())


@pytest.mark.parametrize("pattern", ["(", "*", "Conv_[0"])
def test_a_pattern_that_is_no_regex_raises_at_construction(pattern):
    with pytest.raises(ValueError, match="regex"):
        qj.partition({pattern: qj.uniform(4), ".*": None}).init(make_params())


def test_a_state_made_by_another_quantizer():
    params = make_params()
    state = qj.uniform(4).init(params)  # owns Conv_0, Dense_0 and Embed_0
    for quantizer in (
        qj.chain(qj.uniform(4), qj.uniform(2)),
        qj.partition({"Conv_0": qj.uniform(4), "Dense_0": None}),
    ):
        with pytest.raises(ValueError, match=r"another"):
            quantizer.apply(params, state)


def test_partition_and_chain_need_members():
    with pytest.raises(ValueError, match="at least one pattern"):
        qj.partition({})
    with pytest.raises(ValueError, match="at least one quantizer"):
        qj.chain()


# Chain


def test_chain_applies_the_second_to_what_the_first_gives():
    params = make_params()
    first, second = qj.uniform(3), qj.uniform(8, axes=-1)
    quantizer = qj.chain(first, second)
    state = quantizer.init(params)
    states = [first.init(params)]
    between = first.apply(params, states[0])
    states.append(second.init(between))
    equal(quantizer.apply(params, state), second.apply(between, states[1]))
    # `update`, too, shows the second what the moved first gives.
    moved = jax.tree.map(lambda leaf: 3 * leaf + 0.1, params)
    states = [first.update(moved, states[0])]
    states.append(second.update(first.apply(moved, states[0]), second.init(between)))
    expected = {p: {"0": states[0].buffers[p], "1": states[1].buffers[p]} for p in state.buffers}
    equal(quantizer.update(moved, state).buffers, expected)


def test_the_state_of_a_chain_is_flat():
    quantizer = qj.chain(toys.dropping(), qj.partition({"Conv_0": qj.uniform(4)}), qj.zero())
    state = quantizer.init(make_params())
    assert list(state.learned[CONV]) == ["0"]  # members that learn nothing have no place there
    assert {path: sorted(members) for path, members in state.buffers.items()} == {
        CONV: ["0", "1", "2"],
        DENSE: ["0", "2"],
        "Embed_0/embedding": ["0", "2"],
    }
    assert state.buffers[CONV]["2"] == {}  # owned, without anything to remember


def test_the_learned_part_of_a_chain_is_trained_through():
    params = make_params()
    quantizer = qj.chain(toys.dropping(), qj.uniform(8))
    state = quantizer.init(params)

    def loss(learned):
        applied = quantizer.apply(params, state._replace(learned=learned))
        return jnp.sum(applied["Dense_0"]["kernel"])

    grads = jax.grad(loss)(state.learned)
    # The grid passes gradients straight through, so that of the gain is the sum of its weights.
    np.testing.assert_allclose(
        grads[DENSE]["0"]["gain"].reshape(()), params["Dense_0"]["kernel"].sum(), rtol=1e-5
    )
    assert float(grads[CONV]["0"]["gain"].reshape(())) == 0


def test_a_chain_keeps_the_encoded_leaf_that_no_later_member_owns():
    params = make_params()
    quantizer = qj.chain(
        qj.uniform(6), qj.partition({"Conv_0": qj.uniform(3)}), qj.partition({"Embed_0": qj.zero()})
    )
    state = quantizer.init(params)
    encoded = quantizer.encode(params, state)
    assert encoded["Dense_0"]["kernel"].bits == 6
    assert encoded["Conv_0"]["kernel"].bits == 3
    # `zero` has no codes of its own, but its values are among those of the 6-bit grid.
    assert encoded["Embed_0"]["embedding"].bits == 6
    assert not encoded["Embed_0"]["embedding"].codes.any()
    equal(qj.decode(encoded), quantizer.apply(params, state))


# Weight decay


def test_decay_mask_is_true_for_weights_only():
    params = make_params()
    quantizer = qj.chain(toys.dropping(), qj.uniform(4))
    trainable = (params, quantizer.init(params).learned, {"Conv_0": {"step": jnp.ones(())}})
    mask = flat(qj.decay_mask(trainable))
    decayed = {path for path, value in mask.items() if value}
    names = [CONV, DENSE, "Embed_0/embedding", "Norm_0/kernel"]
    assert decayed == {f"0/{name}" for name in names}
    tx = optax.add_decayed_weights(0.5, mask=qj.decay_mask)
    nothing = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = tx.update(nothing, tx.init(trainable), trainable)
    for path, leaf in flat(updates).items():
        expected = 0.5 * flat(trainable)[path] * (path in decayed)
        np.testing.assert_array_equal(leaf, expected)


def test_decay_mask_without_weights():
    assert qj.decay_mask({}) == {}  # optax.tree.map_params asks for the layout alone
    assert qj.decay_mask({"kernel": {"value": 1.0}}) == {"kernel": {"value": True}}  # NNX
    with pytest.raises(ValueError, match=re.escape("no kernel or embedding to decay among ['w']")):
        qj.decay_mask({"w": jnp.ones((2, 2))})
