"""The transformer for text: shapes, dtypes, what each byte sees, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import quantjax as qj
from quantjax.lab import models
from quantjax.lab.data import text

SMALL = models.TextModel(classes=11, width=16, blocks=2, heads=4, length=12)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 12)), jnp.int32)


@pytest.fixture(scope="module")
def variables():
    """Of random numbers, biases and scales too: `init` takes seconds to compile."""
    rng = np.random.default_rng(1)

    def values(path, leaf):
        centre = float(path[-1].key == "scale")
        return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(values, _shapes(SMALL, (3, 12)))


def _shapes(model, shape=(2, 64), dtype=jnp.int32):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


def test_parameters_and_logits():
    model = models.build("text-small", classes=256)
    params = flatten_dict(_shapes(model)["params"], sep="/")
    block = 2 * 2 * 128 + 4 * (128 * 128 + 128) + 2 * 128 * 512 + 512 + 128
    expected = (256 + 64) * 128 + 2 * block + 2 * 128 + 128 * 256 + 256
    assert sum(leaf.size for leaf in params.values()) == expected
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}
    for layer in ("query", "key", "value", "out"):
        assert params[f"Block_1/{layer}/kernel"].shape == (128, 128)
    assert params["Block_0/up/kernel"].shape == params["Block_0/down/kernel"].shape[::-1]
    assert params["tokens/embedding"].shape == params["logits/kernel"].shape[::-1] == (256, 128)
    x = jax.ShapeDtypeStruct((5, 40), jnp.int32)  # shorter than the longest
    logits = jax.eval_shape(lambda v, x: model.apply(v, x, train=True), _shapes(model), x)
    assert (logits.shape, logits.dtype) == ((5, 40, 256), jnp.float32)


def test_kernels_and_embeddings_are_quantized(variables):
    params = variables["params"]
    state = jax.eval_shape(qj.lsq(bits=2).init, params)
    owned = {p for p in flatten_dict(params, sep="/") if p.endswith(("kernel", "embedding"))}
    assert set(state.learned) == owned
    assert len(owned) == 2 + 2 * 6 + 1


def test_a_byte_sees_itself_and_those_before(variables, tokens):
    apply = jax.jit(SMALL.apply)
    logits = apply(variables, tokens)
    for place in (0, 5, 11):
        other = tokens.at[:, place].set((tokens[:, place] + 1) % 11)
        changed = np.abs(apply(variables, other) - logits).max(axis=(0, 2))
        np.testing.assert_array_equal(changed[:place], 0)
        assert (changed[place:] > 1e-5).all()
    np.testing.assert_allclose(apply(variables, tokens[:, :7]), logits[:, :7], atol=1e-5)


def _reference(params, tokens):
    """The forward pass of SMALL in NumPy and float64, head by head."""
    params = {k: np.asarray(v, np.float64) for k, v in flatten_dict(params, sep="/").items()}

    def dense(name, x):
        return x @ params[f"{name}/kernel"] + params[f"{name}/bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * params[f"{name}/scale"] + params[f"{name}/bias"]

    x = params["tokens/embedding"][tokens] + params["positions/embedding"]
    for block in ("Block_0", "Block_1"):
        y = norm(f"{block}/attention_norm", x)
        q, k, v = (dense(f"{block}/{name}", y) for name in ("query", "key", "value"))
        heads = []
        for at in (slice(i, i + 4) for i in range(0, 16, 4)):
            scores = q[..., at] @ np.swapaxes(k[..., at], 1, 2) / 2
            scores[:, ~np.tri(12, dtype=bool)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., at])
        x = x + dense(f"{block}/out", np.concatenate(heads, -1))
        y = dense(f"{block}/up", norm(f"{block}/mlp_norm", x))
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + dense(f"{block}/down", y)
    return dense("logits", norm("norm", x))


def test_it_equals_a_float64_forward_pass(variables, tokens):
    logits = jax.jit(SMALL.apply)(variables, tokens)
    expected = _reference(variables["params"], np.asarray(tokens))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(variables, tokens):
    half = SMALL.clone(dtype=jnp.bfloat16)
    assert _shapes(half, (3, 12)) == _shapes(SMALL, (3, 12))
    logits = jax.jit(SMALL.apply)(variables, tokens)
    rounded = jax.jit(half.apply)(variables, tokens)
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.abs(logits - rounded).max()) < 0.1 * float(jnp.abs(logits).max())


def test_it_learns_a_text_that_repeats(quick_programs):
    content = text.windows("here", b"to be or not to be, " * 100, stride=5, length=12)
    x, y = (jnp.asarray(part[:64], jnp.int32) for part in content)
    model = models.TextModel(width=32, blocks=1, heads=4, length=12)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, opt_state):
        def loss_fn(params):
            logits = model.apply({"params": params}, x, train=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = tx.init(params), []
    for _ in range(30):
        params, opt_state, loss = step(params, opt_state)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(256), abs=1)
    assert losses[-1] < 1


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 8, 8, 1), jnp.float32, r"x is float32 \[2, 8, 8, 1\], expected integers"),
        ((2, 8), jnp.float32, "x is float32"),
        ((8,), jnp.int32, r"int32 \[8\]"),
        ((2, 65), jnp.int32, "windows have 65 bytes, expected at most 64"),
    ],
)
def test_wrong_inputs(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        _shapes(models.TextModel(), shape, dtype)


def test_heads_divide_the_width():
    for heads in (0, 5):
        with pytest.raises(ValueError, match=f"heads is {heads}, expected a divisor of width, 128"):
            models.TextModel(heads=heads)


def test_names_and_shapes_of_examples():
    assert models.default_model("tiny_shakespeare") == "text-small"
    assert models.default_model("mine", (64,)) == "text-small"
    assert models.build("text-small", 256, shape=(64,)).classes == 256
    assert models.build("lenet5", 10, shape=(28, 28, 1)).classes == 10
    with pytest.raises(ValueError, match=r"'lenet5' takes images \[h, w, c\], the examples are"):
        models.build("lenet5", 256, shape=(64,))
    with pytest.raises(ValueError, match=r"takes bytes \[length\], the examples are \[8, 8, 1\]"):
        models.build("text-small", 10, shape=(8, 8, 1))
