"""Which weights share a step, by name, by pattern and by number."""

import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.core import checks


def step_shapes(axes, **leaves):
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in leaves.items()}
    state = qj.uniform(4, axes=axes).init(params)
    return [state.buffers[f"{name}/kernel"]["step"].shape for name in sorted(leaves)]


@pytest.mark.parametrize("whole", [None, "tensor"])
def test_the_whole_leaf(whole):
    assert step_shapes(whole, a=(3, 3, 2, 5), b=(4, 6)) == [(1, 1, 1, 1), (1, 1)]


def test_channels_are_the_last_axis_of_a_kernel_and_the_rows_of_an_embedding():
    assert step_shapes("channel", a=(3, 3, 2, 5), b=(4, 6)) == [(1, 1, 1, 5), (1, 6)]
    table = {"Embed_0": {"embedding": jnp.ones((7, 4))}}
    state = qj.uniform(4, axes="channel").init(table)
    assert state.buffers["Embed_0/embedding"]["step"].shape == (7, 1)


def test_by_pattern_the_first_match_wins_and_the_rest_is_one_group():
    axes = {"out": (-3, -2), "q.*": lambda path, leaf: -leaf.ndim, "d": "channel", "dead": None}
    shapes = {"out": (8, 4, 6), "query": (8, 4, 6), "d": (4, 6), "other": (4, 6), "dead": (2, 2)}
    found = step_shapes(axes, **shapes)
    expected = {"out": (1, 1, 6), "query": (1, 4, 6), "d": (1, 6), "other": (1, 1), "dead": (1, 1)}
    assert found == [expected[name] for name in sorted(shapes)]


def test_nothing_is_inferred_from_shapes():
    """Query and output of attention with 8 heads are both (8, 8, 8)."""
    axes = {"out": (-3, -2), "query": -3}
    assert step_shapes(axes, out=(8, 8, 8), query=(8, 8, 8)) == [(1, 1, 8), (1, 8, 8)]


@pytest.mark.parametrize(
    "factory", [qj.uniform, qj.srq, qj.rq, qj.multi_bit], ids=lambda f: f.__name__
)
def test_every_quantizer_with_axes_takes_them_by_name(factory):
    params = {"Dense_0": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))}}

    def groups(axes):
        encoded = factory(2, axes=axes).encode(params, factory(2, axes=axes).init(params))
        return qj.summary(encoded).rows[0].groups

    assert groups("channel") == groups({".*": "channel"}) == groups((-2,)) == 4
    assert groups("tensor") == groups({"Conv_0": "channel"}) == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("channels", "'tensor' or 'channel', got 'channels'"),
        (0, "counted from the end"),
        ({"a": "rows"}, "got 'rows'"),
        ({"[": None}, "no regex"),
        ((-1, -1), "repeated"),
    ],
)
def test_bad_axes_raise_at_construction(axes, message):
    with pytest.raises(ValueError, match=message):
        qj.uniform(4, axes=axes)


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert checks.bits(np.int64(4)) == 4
    assert type(checks.bits(np.uint8(4))) is int
    for wrong in (4.0, "4", True, np.bool_(True), None, np.float32(4)):
        with pytest.raises(ValueError, match="whole number"):
            checks.bits(wrong)
