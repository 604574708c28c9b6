"""PSG against the authors' public code, in float64 and float32 (its README says what is what)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from tests.methods import golden

TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
STRENGTH = 150.0


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    with jax.enable_x64(True):
        yield request.param


def close(actual, desired, dtype, scale=None):
    """Relative to the largest entry: distances of weights near their target cancel."""
    desired = np.asarray(desired, np.float64)
    scale = np.max(np.abs(desired)) if scale is None else scale
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        desired,
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype] * scale,
    )


def at_target(quantizer, w):
    params = {"kernel": w}
    state = quantizer.init(params)
    return quantizer.apply(params, state)["kernel"], state, quantizer.encode(params, state)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("layer", ["conv", "fc"])
def test_grid_scale_and_scaled_gradients(layer, bits, dtype):
    arrays = golden.load("psg_scale.npz")
    w = jnp.asarray(arrays[f"{layer}.w"], dtype)
    grad = jnp.asarray(arrays[f"{layer}.grad"], dtype)

    def of(name):
        return arrays[f"{layer}.b{bits}.{name}"]

    target, state, encoded = at_target(qj.uniform(bits), w)
    close(state.buffers["kernel"]["step"].reshape(()), of("delta"), dtype)
    close(qj.symmetric_step(w, bits).reshape(()), of("delta"), dtype)
    close(target, of("wbar"), dtype)
    np.testing.assert_array_equal(encoded["kernel"].codes, of("code"))
    largest = np.max(np.abs(of("wbar")))
    close(qj.position_scale(w, target, eps=0.0), of("scale"), dtype, largest)
    for eps in ("1e-8", "1e-3"):
        scale = qj.position_scale(w, target, eps=float(eps))
        close(scale, of(f"scale_eps{eps}"), dtype, largest)
        directional = qj.position_scale(w, target, eps=float(eps), directional=True)
        at = largest / np.max(of("scale"))  # the quotient magnifies the rounding of w
        close(directional, of(f"s_dir_eps{eps}"), dtype, at)
        transform = qj.scale_by_position(
            qj.uniform(bits), strength=1.0, eps=float(eps), directional=True
        )
        scaled = update_once(transform, w, grad)
        close(scaled, of(f"grad_dir_eps{eps}"), dtype, at * np.max(np.abs(grad)))
    transform = qj.scale_by_position(qj.uniform(bits), strength=STRENGTH, eps=0.0)
    scaled = update_once(transform, w, grad)
    close(scaled, of("grad_scaled"), dtype, STRENGTH * largest * np.max(np.abs(grad)))


def update_once(transform, w, grad):
    params = {"kernel": w}
    return transform.update({"kernel": grad}, transform.init(params), params)[0]["kernel"]


@pytest.mark.parametrize("edge", ["edge_half", "edge_neg", "edge_pos"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ties_and_one_sided_ranges(edge, bits, dtype):
    arrays = golden.load("psg_scale.npz")
    w = jnp.asarray(arrays[f"{edge}.w"], dtype)[None]
    target, state, _ = at_target(qj.uniform(bits), w)
    close(state.buffers["kernel"]["step"].reshape(()), arrays[f"{edge}.b{bits}.delta"], dtype)
    close(target[0], arrays[f"{edge}.b{bits}.wbar"], dtype)


def test_running_range(dtype):
    arrays = golden.load("psg_scale.npz")
    quantizer = qj.uniform(int(arrays["ema.n_bits"]), momentum=0.1)
    params = [{"kernel": jnp.asarray(x, dtype)[None]} for x in arrays["ema.x"]]
    state = quantizer.init(params[0])
    for step, now in enumerate(params):
        state = quantizer.update(now, state)
        buffers = jax.tree.map(lambda leaf: leaf.reshape(()), state.buffers["kernel"])
        close(buffers["low"], arrays["ema.x_min"][step], dtype)
        close(buffers["high"], arrays["ema.x_max"][step], dtype)
        close(buffers["step"], arrays["ema.delta"][step], dtype)
        close(quantizer.apply(now, state)["kernel"][0], arrays["ema.wbar"][step], dtype)


@pytest.mark.parametrize("eps", ["1e-8", "1e-3", "1e-2"])
@pytest.mark.parametrize("delta", ["0.1", "0.5", "1"])
def test_warp(eps, delta, dtype):
    arrays = golden.load("psg_warp.npz")

    def of(name):
        return arrays[f"eps{eps}.delta{delta}.{name}"]

    x, target = jnp.asarray(of("x"), dtype), jnp.asarray(of("xbar"), dtype)
    step, offset = float(delta), jnp.asarray(float(eps), dtype)
    value = qj.warp(x, target, step, offset)
    # The slope reaches 1 / sqrt(eps), which magnifies the rounding of x itself.
    steepest = np.max(np.abs(of("x"))) / np.sqrt(float(eps))
    close(value, of("f"), dtype, steepest)
    close(qj.warp(target, target, step, offset), of("c"), dtype)
    if dtype == "float64":
        slope = jax.vmap(jax.grad(lambda v, t: qj.warp(v, t, step, offset)))(x, target)
        # |x - t| has no slope at the target itself.
        off = np.abs(of("x") - of("xbar")) > 1e-9
        np.testing.assert_allclose(slope[off], of("fprime")[off], rtol=1e-8)
    cell = np.round(of("mid") / step - 0.5) * step
    left = qj.warp(jnp.asarray(of("mid"), dtype), jnp.asarray(cell, dtype), step, offset)
    right = qj.warp(jnp.asarray(of("mid"), dtype), jnp.asarray(cell + step, dtype), step, offset)
    close(left, of("left"), dtype, steepest)
    close(right, of("right"), dtype, steepest)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("running", ["ema", "noema"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("problem", ["quad", "logi"])
def test_three_training_steps(problem, bits, running, optimizer):
    arrays = golden.load("psg_steps.npz")
    prefix = f"f64.{problem}.{optimizer}.{running}.b{bits}"

    def of(name):
        return arrays[f"{prefix}.{name}"]

    with jax.enable_x64(True):
        loss, params, names = PROBLEMS[problem](arrays)
        quantizer = qj.uniform(
            bits, momentum=0.1 if running == "ema" else None, biases=problem == "logi"
        )
        rate, decay = float(of("lr")), float(of("weight_decay"))
        descend = (
            [optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)]
            if optimizer == "sgd"
            else [optax.add_decayed_weights(decay), optax.adam(rate)]
        )
        scale = qj.scale_by_position(quantizer, strength=STRENGTH, eps=0.0)
        chained = optax.chain(scale, *descend)
        state = chained.init(params)
        for step in range(3):
            value, grads = jax.value_and_grad(loss)(params)
            np.testing.assert_allclose(value, of("loss")[step], rtol=1e-12)
            scaled, _ = scale.update(grads, state[0], params)
            updates, state = jax.jit(chained.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
            target = optax.tree.get(state, "target")
            for path, name in names.items():
                close(grads[path], of(f"rawgrad_{name}")[step].T, "float64")
                delta = target.buffers[path]["step"].reshape(())
                close(delta, of(f"delta_{name}")[step], "float64")
                close(scaled[path], of(f"grad_{name}")[step].T, "float64", STRENGTH)
                # Adam makes a step of the mere rounding error of a weight at its target.
                moving = np.abs(of(f"grad_{name}")[: step + 1]).min(axis=0).T > 1e-12
                moving |= optimizer == "sgd"
                assert np.count_nonzero(~moving) <= 2
                close(params[path][moving], of(name)[step].T[moving], "float64")
                params[path] = jnp.asarray(of(name)[step].T)


def quad(arrays):
    a, t = (jnp.asarray(arrays[f"quad.{name}"].T) for name in ("a", "t"))
    params = {"kernel": jnp.asarray(arrays["quad.w0"].T)}
    return lambda p: 0.5 * jnp.sum(a * (p["kernel"] - t) ** 2), params, {"kernel": "w"}


def logi(arrays):
    x, y = jnp.asarray(arrays["logi.x"]), jnp.asarray(arrays["logi.y"])
    params = {"kernel": jnp.asarray(arrays["logi.W0"].T), "bias": jnp.asarray(arrays["logi.b0"])}

    def loss(p):
        logits = x @ p["kernel"] + p["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss, params, {"kernel": "W", "bias": "b"}


PROBLEMS = {"quad": quad, "logi": logi}
