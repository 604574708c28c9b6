"""Whose state it is: another width, another quantizer, another tree are errors, not silence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.core.quantizer import keep

PATH = "Dense_0/kernel"


def make_params(dtype=jnp.float32, **more):
    rng = np.random.default_rng(0)
    kernels = {"Dense_0": (6, 4), **more}
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), dtype)}
        for name, shape in kernels.items()
    }


WIDE = {
    "uniform": (lambda bits: qj.uniform(bits), 8),
    "per channel": (lambda bits: qj.uniform(bits, axes="channel", momentum=0.1), 8),
    "rq": (lambda bits: qj.rq(bits), 8),
    "srq": (lambda bits: qj.srq(bits), 8),
    "dropbits": (lambda bits: qj.srq(bits, dropbits=True), 8),
    "multi_bit": (lambda bits: qj.multi_bit(bits, axes=-2), 5),
    "focused": (lambda bits: qj.focused(bits), 8),
    "chain": (lambda bits: qj.chain(qj.magnitude(0.5), qj.uniform(bits)), 8),
    "partition": (lambda bits: qj.partition({"Dense_0": qj.uniform(bits)}), 8),
    "named": (lambda bits: qj.named({"Dense_0": "kernel"}, qj.uniform(bits)), 8),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_state_of_another_width_raises(name, quick_programs):
    make, other = WIDE[name]
    params, mine = make_params(), make(4)
    state = make(other).init(params)
    for call in (mine.apply, mine.update, mine.encode):
        if call is keep:
            continue
        with pytest.raises(ValueError, match=f"the state has {other} bits, the quantizer 4"):
            call(params, state)
    mine.encode(params, mine.init(params))  # the way that the message shows


def test_encode_of_stacked_layers_compares_widths():
    params = make_params(Dense_0=(2, 6, 4))
    wide, narrow = (qj.stacked(qj.uniform(bits), {"Dense_0": 1}) for bits in (8, 4))
    with pytest.raises(ValueError, match="the state has 8 bits, the quantizer 4"):
        narrow.encode(params, wide.init(params))


def test_inside_jit_one_program_serves_all_widths():
    params, apply = make_params(), jax.jit(qj.uniform(4).apply)
    for bits in (2, 4, 8):
        state = qj.uniform(bits).init(params)
        expected = qj.uniform(bits).apply(params, state)
        jax.tree.map(np.testing.assert_array_equal, apply(params, state), expected)
    assert apply._cache_size() == 1


def test_learned_widths_may_be_narrower():
    params = make_params()
    quantizer = qj.srq(4, learn_bits=True)
    state = quantizer.init(params)
    logits = {**state.learned[PATH], "mask_logits": jnp.asarray([3.0, -3.0, -3.0])}
    state = quantizer.update(params, state._replace(learned={PATH: logits}))
    assert quantizer.encode(params, state)["Dense_0"]["kernel"].bits == 2
    wider = qj.srq(3, learn_bits=True)
    with pytest.raises(ValueError, match=r"Dense_0/kernel: .*quantizer"):
        wider.apply(params, quantizer.init(params))


OTHERS = {
    "uniform": lambda: qj.uniform(4),
    "srq": lambda: qj.srq(4),
    "rq": lambda: qj.rq(4),
    "dropbits": lambda: qj.srq(4, dropbits=True),
    "multi_bit": lambda: qj.multi_bit(2, axes=-2),
    "focused": lambda: qj.focused(4),
    "magnitude": lambda: qj.magnitude(0.5, end=5),
    "n_m": lambda: qj.n_m(2, 4, every=2),
    "surgery": lambda: qj.surgery(0.5, end=5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_another_quantizer_raises(name, quick_programs):
    params, other = make_params(), "magnitude" if name == "uniform" else "uniform"
    state = OTHERS[other]().init(params)
    mine = OTHERS[name]()
    for call in (mine.apply, mine.update, mine.encode):
        if call is keep:
            continue
        with pytest.raises(ValueError, match="made by another quantizer"):
            call(params, state)
        with pytest.raises(ValueError, match="made by another quantizer"):
            jax.eval_shape(call, params, state)


KINDS = {
    "leafwise": lambda: qj.uniform(4),
    "partition": lambda: qj.partition({"Dense_0": qj.uniform(4), ".*": qj.uniform(3)}),
    "chain": lambda: qj.chain(qj.magnitude(0.5, end=3, every=1), qj.uniform(4)),
    "stacked": lambda: qj.stacked(qj.uniform(4), {"Dense_.": 0}),
    "named": lambda: qj.named({"Dense_0": "kernel"}, qj.uniform(4)),
    "magnitude": lambda: qj.magnitude(0.5, across=True, end=3, every=1),
    "focused": lambda: qj.focused(4, refit_every=1),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kernel_added_after_init_is_an_error(name, quick_programs):
    quantizer = KINDS[name]()
    state = quantizer.init(make_params(Dense_1=(4, 3)))
    grown = make_params(Dense_1=(4, 3), Dense_2=(3, 3))
    for call in (quantizer.apply, quantizer.update, quantizer.encode):
        with pytest.raises(ValueError, match=r"Dense_2.*would stay float"):
            call(grown, state)


def test_masks_given_by_name_are_exempt_and_so_are_leaves_given_to_none():
    params = make_params(Dense_1=(4, 3))
    pruned = qj.pruned({"Dense_0": {"kernel": jnp.ones((6, 4), bool)}})
    assert pruned.apply(params, pruned.init(make_params()))["Dense_1"] is not None
    some = qj.partition({"Dense_0": qj.uniform(4), ".*": None})
    state = some.init(make_params(Dense_1=(4, 3)))
    some.apply(make_params(Dense_1=(4, 3), Dense_2=(3, 3)), state)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int8, jnp.bool_])
@pytest.mark.parametrize("name", OTHERS)
def test_leaves_that_are_no_floats_are_refused_by_path(name, dtype):
    params = {"Dense_0": {"kernel": jnp.ones((6, 4), dtype)}}
    message = f"{PATH}: .*{jnp.dtype(dtype).name}"
    with pytest.raises(ValueError, match=message):
        OTHERS[name]().init(params)


def test_pruned_refuses_them_too():
    params = {"Dense_0": {"kernel": jnp.ones((6, 4), jnp.complex64)}}
    masks = {"Dense_0": {"kernel": jnp.ones((6, 4), bool)}}
    with pytest.raises(ValueError, match=f"{PATH}: .*complex64"):
        qj.pruned(masks).init(params)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_refused_by_init_and_encode(bad):
    params = make_params()
    state = qj.uniform(4).init(params)
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[1, 2].set(bad)
    for call in (lambda p: qj.uniform(4).init(p), lambda p: qj.uniform(4).encode(p, state)):
        with pytest.raises(ValueError, match=f"{PATH}: 1 of 24 values are NaN or infinite"):
            call(params)


FIXED = {name: OTHERS[name] for name in OTHERS} | {
    "uniform 16": lambda: qj.uniform(np.int64(16)),
    "chain": lambda: qj.chain(qj.magnitude(0.5), qj.uniform(4)),
    "partition": lambda: qj.partition({"Dense_0": qj.uniform(4)}),
    "stacked": lambda: qj.stacked(qj.uniform(4), {"Dense_0": 0}),
}


@pytest.mark.parametrize("name", FIXED)
def test_encode_of_a_fixed_width_has_an_abstract_result(name):
    params, quantizer = make_params(), FIXED[name]()
    state = quantizer.init(params)
    encoded = quantizer.encode(params, state)
    abstract = jax.eval_shape(quantizer.encode, params, state)
    assert jax.tree.structure(abstract) == jax.tree.structure(encoded)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(encoded), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    jitted = jax.jit(quantizer.encode)(params, state)
    jax.tree.map(np.testing.assert_array_equal, jitted, encoded)


def test_learned_widths_say_why_they_do_not_encode_under_jit():
    params, quantizer = make_params(), qj.srq(4, learn_bits=True)
    with pytest.raises(ValueError, match=re.escape(PATH) + ".*outside"):
        jax.jit(quantizer.encode)(params, quantizer.init(params))


@pytest.mark.parametrize("name", [*OTHERS, "chain", "stacked"])
def test_without_jit_all_of_it_works(name, monkeypatch, few_programs, quick_programs):
    monkeypatch.setattr("quantjax.methods.fq.mixture.ITERATIONS", 3)  # each is many operations
    params, quantizer = make_params(), FIXED[name]()
    with jax.disable_jit():
        state = quantizer.init(params, jax.random.key(0))
        state = quantizer.update(params, state, key=jax.random.key(1))
        applied = quantizer.apply(params, state)
        decoded = qj.decode(quantizer.encode(params, state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), applied, decoded)


def test_which_interface_was_mixed_up():
    with pytest.raises(ValueError, match=r"InputQuantizer takes one array.*got dict"):
        qj.uniform_input(4).init(make_params())
    with pytest.raises(ValueError, match=r"tree of params.*InputQuantizers"):
        qj.uniform(4).init(jnp.ones((3, 4)))


def test_help_and_repr_say_what_it_is():
    quantizer = qj.uniform(4, momentum=0.1)
    assert repr(quantizer) == "uniform(4, momentum=0.1)"
    assert quantizer.apply.__qualname__ == "uniform(4, momentum=0.1).apply"
    assert "as deployed" in quantizer.apply.__doc__
    assert repr(qj.stacked(qj.srq(3), {"Block": 1})) == "stacked(srq(3), {'Block': 1})"
    assert repr(qj.srq_input(bits=4)) == "srq_input(bits=4)"
    made = [qj.focused(4), qj.magnitude(0.5), qj.surgery(0.5, end=3), qj.n_m(2, 4), qj.zero()]
    for one in (*made, qj.rq(3), qj.multi_bit(2, -2), qj.rq_input(3), qj.multi_bit_input(2)):
        assert re.match(r"\w+\(.*\)$", repr(one)), one
    masks = {"Dense_0": {"kernel": np.ones((6, 4), bool)}}
    assert repr(qj.pruned(masks)) == "pruned({'Dense_0': {'kernel': 'bool[6, 4]'}})"
    by_path = qj.partition({"b": qj.zero(), "a": None})
    assert repr(by_path) == "partition({'b': zero(), 'a': None})"  # patterns in their order
    assert "Quantizer(init=" in repr(quantizer._replace(init=lambda params, key=None: None))


@pytest.mark.parametrize("name", ["uniform", "dropbits", "chain", "partition", "stacked"])
def test_a_float32_loss_stays_float32_in_x64_mode(name, quick_programs):
    params = make_params()
    with jax.enable_x64(True):
        quantizer = {**FIXED, "dropbits": lambda: qj.srq(4, learn_bits=True)}[name]()
        state = quantizer.init(params)
        for key in (None, jax.random.key(0)):
            assert quantizer.penalty(state, key=key).dtype == jnp.float32
