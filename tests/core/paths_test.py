import binascii
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from quantjax.core import paths

cheap = settings(derandomize=True, deadline=None, max_examples=100)
NAMES = st.sampled_from(["Conv_1", "Conv_10", "Block_0", "kernel", "bias", "a.b", "x+y", "1"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


class Layer(NamedTuple):
    kernel: float
    bias: float


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"Conv_0": {"kernel": 1.0, "bias": 2.0}}, ["Conv_0/bias", "Conv_0/kernel"]),
        ({"Conv_0": {"kernel": {"value": 1.0}}}, ["Conv_0/kernel"]),  # as NNX has it
        ({"value": 1.0}, ["value"]),  # a lone name stays
        ({"value": {"value": 1.0}}, ["value"]),
        ({"value": {"kernel": 1.0}}, ["value/kernel"]),  # only the last part is dropped
        ([1.0, {"a": 2.0}], ["0", "1/a"]),
        (Layer(1.0, 2.0), ["kernel", "bias"]),
        ({"Conv_0/kernel": 1.0}, ["Conv_0/kernel"]),  # a flat dict keeps its keys
        (1.0, [""]),
        ({}, []),
    ],
)
def test_path_names(tree, expected):
    flat, rebuild = paths.flatten(tree)
    assert list(flat) == expected
    assert rebuild(flat) == tree


def test_paths_of_an_nnx_model():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert sorted(paths.flatten(state)[0]) == ["bias", "kernel"]


def test_rebuild_puts_the_same_objects_in_their_places():
    tree = {"b": [jnp.ones(2), None], "a": Layer(jnp.zeros(1), jnp.zeros(2))}
    flat, rebuild = paths.flatten(tree)
    again = rebuild(dict(reversed(flat.items())))  # the order of the dict does not matter
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    same = zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True)
    assert all(a is b for a, b in same)


def test_two_leaves_of_one_path_are_an_error_that_names_it():
    tree = {"a": {"b": 1.0}, "a/b": 2.0, "c": 3.0}
    with pytest.raises(ValueError, match=re.escape("same path: ['a/b']")):
        paths.flatten(tree)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("Conv_1", "Conv_1/kernel", True),
        ("Conv_1", "Conv_1", True),
        ("Conv_1", "Conv_10/kernel", False),
        ("Conv_1", "Block_0/Conv_1/kernel", False),
        (".*Conv_1", "Block_0/Conv_1/kernel", True),
        ("Conv_.*", "Conv_10/kernel", True),
        ("Conv_1|Dense_0", "Dense_0/kernel", True),
        ("Conv_1|Dense_0", "Dense_01/kernel", False),
        ("Conv_1|Dense_0", "Conv_10/kernel", False),  # the rule holds for both alternatives
        (".*bias", "Dense_0/bias", True),
        (".*bias", "Dense_0/bias_scale", False),
        (".*", "anything/at/all", True),
        ("", "Conv_1/kernel", False),
        ("Conv_1/", "Conv_1/kernel", False),
        ("(?i:conv_1)", "Conv_1/kernel", True),
    ],
)
def test_matches(pattern, path, expected):
    assert paths.matches(pattern, path) is expected


@cheap
@given(literal=PATHS, path=PATHS)
def test_a_literal_pattern_takes_itself_and_what_lies_below(literal, path):
    below = path == literal or path.startswith(literal + "/")
    assert paths.matches(re.escape(literal), path) is below


ALL = ["Conv_1/kernel", "Conv_10/kernel", "Dense_0/kernel", "Dense_0/bias"]


def test_assign_gives_each_path_to_the_first_pattern():
    taken = paths.assign(["Conv_1", ".*kernel"], ALL)
    assert taken == {"Conv_1": ALL[:1], ".*kernel": ALL[1:3]}  # and the bias to none
    assert paths.first_match(["Conv_1", ".*kernel"], ALL[0]) == "Conv_1"
    assert paths.first_match(["Conv_1", ".*kernel"], ALL[3]) is None


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["Conv_2"], "'Conv_2' matches no path"),
        ([".*", "Conv"], "'Conv' matches no path"),  # a prefix is no match
        ([".*kernel", "Conv_1"], "'Conv_1' is shadowed"),
        ([".*kernel", "Conv_1", "Nothing"], "'Conv_1' is shadowed"),
    ],
)
def test_patterns_without_paths_are_errors_that_list_them(patterns, message):
    with pytest.raises(ValueError, match=message) as error:
        paths.assign(patterns, ALL)
    assert all(path in str(error.value) for path in ALL)


def test_a_leafs_key_is_folded_from_the_crc_of_its_path():
    key = jax.random.key(3)
    expected = jax.random.fold_in(key, binascii.crc32(b"Conv_0/kernel"))
    actual = paths.leaf_key(key, "Conv_0/kernel")
    np.testing.assert_array_equal(jax.random.key_data(actual), jax.random.key_data(expected))
    assert paths.leaf_key(None, "Conv_0/kernel") is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("kernel", True),
        ("Dense_0/kernel", True),
        ("Embed_0/embedding", True),
        ("Dense_0/bias", False),
        ("Dense_0/kernel_scale", False),
        ("kernel/scale", False),
        ("Dense_0/mykernel", False),
    ],
)
def test_what_is_a_weight(path, expected):
    assert paths.is_weight(path) is expected


def test_restrict_names_what_is_missing():
    flat = {"a": 1, "b": 2}
    assert paths.restrict(flat, ["b"]) == {"b": 2}
    with pytest.raises(ValueError, match=r"made for another tree: \['c'\] not among \['a', 'b'\]"):
        paths.restrict(flat, ["a", "c"])
