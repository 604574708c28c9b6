"""SRQ and RQ: whose state it is, encode under jit, float32 in x64 mode, work without jit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.methods.srq import estimators, semi_relaxed

PATH = "Dense_0/kernel"


def tree(w):
    return {"Dense_0": {"kernel": jnp.asarray(w, jnp.float32)}}


def dense_grid(bits):
    """Weights all over a grid of interval 1 and beyond."""
    half = 2 ** (bits - 1)
    return tree(np.linspace(-half - 0.9, half - 0.1, 12 * half + 1).reshape(1, -1))


@pytest.mark.parametrize("width", [0, 5])
def test_a_width_out_of_range(width):
    params = dense_grid(4)
    quantizer = qj.srq(4, learn_bits=True)
    state = quantizer.init(params)
    buffers = {PATH: {**state.buffers[PATH], "width": jnp.asarray(width)}}
    state = state._replace(buffers=buffers)
    for run in (quantizer.apply, quantizer.encode):
        with pytest.raises(ValueError, match=rf"{PATH}: the state has {width} bits, the quantizer"):
            run(params, state)


def kinds(bits):
    found = {"srq": qj.srq(bits), "rq": qj.rq(bits)}
    if bits > 1:
        found["dropbits"] = qj.srq(bits, dropbits=True)
        found["learned"] = qj.srq(bits, learn_bits=True)
        found["frozen"] = qj.srq(bits, learn_bits=True, freeze_after=0)
    return found


@pytest.mark.parametrize(("mine", "other"), [(4, 8), (4, 1), (1, 4), (3, 2), (7, 8)])
def test_a_state_of_another_width(mine, other):
    params = tree(np.random.default_rng(0).normal(size=(5, 3)))
    for name in set(kinds(mine)) & set(kinds(other)):
        quantizer, state = kinds(mine)[name], kinds(other)[name].init(params)
        for run in (quantizer.apply, quantizer.update, quantizer.encode):
            with pytest.raises(ValueError, match=f"{PATH}: the state has {other} bits"):
                run(params, state)
        if name not in ("srq", "rq"):  # the number of masks is no secret in jit
            with pytest.raises(ValueError, match=f"the state has {other} bits"):
                jax.eval_shape(quantizer.apply, params, state)
        else:
            jax.eval_shape(quantizer.apply, params, state)


def test_a_state_of_another_quantizer():
    params = tree(np.random.default_rng(0).normal(size=(5, 3)))
    states = {name: quantizer.init(params) for name, quantizer in kinds(3).items()}
    same = {("srq", "dropbits"), ("learned", "frozen"), ("frozen", "learned")}
    for mine, quantizer in kinds(3).items():
        for other, state in states.items():
            if mine == other or (mine, other) in same:  # without masks DropBits is SRQ
                quantizer.apply(params, state)
                continue
            for run in (quantizer.apply, quantizer.update, quantizer.encode):
                with pytest.raises(ValueError, match="another quantizer"):
                    run(params, state)
                with pytest.raises(ValueError, match="another quantizer"):
                    jax.eval_shape(run, params, state)


@pytest.mark.parametrize("make", [qj.srq, qj.rq])
@pytest.mark.parametrize("bits", [1, 2, np.int64(4), 8])
def test_encode_of_a_fixed_width_jits(make, bits):
    params = tree(np.random.default_rng(0).normal(size=(5, 3)))
    quantizer = make(bits)
    state = quantizer.init(params)
    for found in (
        quantizer.encode(params, state),
        jax.jit(quantizer.encode)(params, state),
        jax.eval_shape(quantizer.encode, params, state),
    ):
        leaf = found["Dense_0"]["kernel"]
        assert type(leaf.bits) is int
        assert (leaf.bits, leaf.codes.dtype) == (bits, np.int8)
    codes = jax.jit(quantizer.encode)(params, state)["Dense_0"]["kernel"].codes
    np.testing.assert_array_equal(codes, quantizer.encode(params, state)["Dense_0"]["kernel"].codes)


def test_learned_widths_do_not_encode_under_jit():
    quantizer, params = qj.srq(4, learn_bits=True), dense_grid(4)
    state = quantizer.init(params)
    for call in (jax.jit(quantizer.encode), lambda *args: jax.eval_shape(quantizer.encode, *args)):
        with pytest.raises(ValueError, match=f"{PATH}: a learned width decides.* outside of jit"):
            call(params, state)


@pytest.mark.parametrize("estimator", estimators.KNOWN)
@pytest.mark.parametrize("kind", ["srq", "dropbits", "learned"])
def test_float32_stays_float32_in_x64_mode(kind, estimator):
    """No array of float64 in apply and its gradients, with a key or without."""
    kwargs = {"srq": {}, "dropbits": {"dropbits": True}, "learned": {"learn_bits": True}}[kind]
    quantizer, params = qj.srq(4, estimator=estimator, **kwargs), dense_grid(2)
    with jax.enable_x64(True):
        state = quantizer.init(params, jax.random.key(0))
        for key in (None, jax.random.key(1)):

            def run(params, learned, key=key):
                now = state._replace(learned=learned)
                return quantizer.apply(params, now, key=key)["Dense_0"]["kernel"]

            def both(params, learned, run=run):
                return run(params, learned), jax.vjp(run, params, learned)[1](of_ones(params))

            text = str(jax.make_jaxpr(both)(params, state.learned))
            assert not re.search(r"f64\[\d", text)
            found = jax.tree.leaves(jax.eval_shape(both, params, state.learned))
            assert {x.dtype.name for x in found} == {"float32"}
            moved = quantizer.update(params, state, key=key)
            assert {x.dtype.name for x in jax.tree.leaves(moved)} <= {"float32", "int32"}


def of_ones(params):
    return jnp.ones_like(params["Dense_0"]["kernel"])


@pytest.mark.parametrize("kind", ["srq", "dropbits", "learned", "rq"])
def test_without_jit_keys_and_gradients_work(kind, quick_programs):
    quantizer, params = kinds(2)[kind], tree([[0.3, -1.2]])
    state = quantizer.init(params, jax.random.key(0))

    def loss(params, learned):
        now = state._replace(learned=learned)
        return of_sum(quantizer.apply(params, now, key=jax.random.key(1)))

    expected = jax.jit(jax.grad(loss, (0, 1)))(params, state.learned)
    with jax.disable_jit():
        found = jax.grad(loss, (0, 1))(params, state.learned)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def of_sum(params):
    return jnp.sum(params["Dense_0"]["kernel"] ** 2)


def test_forward_mode_is_refused():
    for masks in (None, jnp.ones(2)):
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(
                lambda x, masks=masks: semi_relaxed.quantize(x, 0.3, 0.1, bits=3, masks=masks),
                (jnp.ones(3),),
                (jnp.ones(3),),
            )
