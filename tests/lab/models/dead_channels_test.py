"""Networks without their dead channels: the same outputs from smaller arrays."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.lab import models
from quantjax.lab.models import dead_channels
from quantjax.lab.models.dead_channels import Layer

LENET = [Layer(name) for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1")]


def kill(params, layer, dead):
    kernel = np.array(params[layer]["kernel"])
    kernel[..., dead] = 0
    return {**params, layer: {**params[layer], "kernel": jnp.asarray(kernel)}}


def variables_of(model, x):
    """Random weights in the model's shapes; its own initialisers would have to be compiled."""
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.size / x.shape[-1]), x.dtype),
        shapes,
    )


def applied(model, variables, x):
    return jax.jit(model.apply)(variables, x)


def randomized(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (
            jnp.asarray(rng.uniform(0.2, 1.0, x.shape) * rng.choice([-1, 1], x.shape), x.dtype)
            if x.ndim == 1
            else x
        ),
        tree,
    )


def test_lenet_gives_the_same_logits_from_fewer_channels():
    model = models.LeNet5(features=(6, 9, 20))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 28, 28, 1)), jnp.float32)
    params = randomized(variables_of(model, x)["params"], 1)
    dead = {"Conv_0": [1, 4], "Conv_1": [0, 2, 8], "Dense_0": [3, 5, 7, 19]}
    for layer, some in dead.items():
        params = kill(params, layer, some)
    reduced = dead_channels.remove_dead_channels({"params": params}, LENET)
    assert reduced.widths == "4-6-16-10"
    smaller = models.LeNet5(features=(4, 6, 16))
    assert reduced.variables["params"]["Dense_0"]["kernel"].shape == (4 * 4 * 6, 16)
    np.testing.assert_allclose(
        applied(smaller, reduced.variables, x), applied(model, {"params": params}, x), atol=1e-5
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(reduced.variables))
    assert size < sum(leaf.size for leaf in jax.tree.leaves(params))


class Normed(nn.Module):
    """Convolutions without bias, batch norm behind them, zero padding or none."""

    widths: tuple = (6, 8, 5)
    padding: str = "VALID"

    @nn.compact
    def __call__(self, x):
        for features in self.widths:
            x = nn.Conv(features, (3, 3), padding=self.padding, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(("padding", "expected"), [("VALID", "4-6-4-4"), ("SAME", None)])
def test_batch_norm_and_padding(padding, expected):
    model = Normed(padding=padding)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 9, 3)), jnp.float32)
    variables = variables_of(model, x)
    params = randomized(variables["params"], 2)
    stats = jax.tree.map(jnp.abs, randomized(variables["batch_stats"], 3))
    for layer, some in {"Conv_0": [0, 5], "Conv_1": [1, 7], "Conv_2": [2]}.items():
        params = kill(params, layer, some)
    variables = {"params": params, "batch_stats": stats}
    layers = [Layer(f"Conv_{i}", f"BatchNorm_{i}", padded=padding == "SAME") for i in range(3)]
    reduced = dead_channels.remove_dead_channels(variables, [*layers, Layer("Dense_0")])
    widths = tuple(int(n) for n in reduced.widths.split("-"))
    if expected is None:
        # Constants above zero cannot pass zero padding; those at zero can, and the dense layer
        # takes any.
        assert 4 <= widths[0] <= 6
        assert 6 <= widths[1] <= 8
        assert widths[2] == 4
        assert widths[:2] != (6, 8)
    else:
        assert reduced.widths == expected
    smaller = Normed(widths[:3], padding)
    np.testing.assert_allclose(
        applied(smaller, reduced.variables, x), applied(model, variables, x), atol=1e-5
    )


def test_every_layer_keeps_a_channel_and_unmovable_ones():
    x = jnp.ones((2, 28, 28, 1))
    model = models.LeNet5(features=(3, 4, 5))
    params = kill(variables_of(model, x)["params"], "Conv_1", [0, 1, 2, 3])
    reduced = dead_channels.remove_dead_channels({"params": params}, LENET)
    assert reduced.widths == "3-1-5-10"
    # Without bias and batch norm in the next layer a constant has nowhere to go.
    params = kill(randomized(params, 4), "Conv_0", [1])
    params["Conv_0"]["bias"] = jnp.ones(3)
    params["Conv_1"] = {"kernel": params["Conv_1"]["kernel"]}
    reduced = dead_channels.remove_dead_channels({"params": params}, LENET)
    assert reduced.outputs["Conv_0"].all()


def test_storage_counts_what_is_left():
    rng = np.random.default_rng(0)
    params = {
        "Dense_0": {"kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)},
        "Dense_1": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)},
    }
    params = kill(params, "Dense_0", [2])
    quantizer = qj.multi_bit(2, -2)
    encoded = quantizer.encode(params, quantizer.init(params))
    decoded = {"params": qj.decode(encoded)}
    reduced = dead_channels.remove_dead_channels(decoded, [Layer("Dense_0"), Layer("Dense_1")])
    assert reduced.widths == "3-3"
    bases, coordinates, tables = 3 * 8 * 2 + 3 * 3 * 2, 3 * 2 + 3 * 2, 2 * 3 + 2 * 3
    assert dead_channels.reduced_storage_bits(encoded, reduced) == bases + 32 * coordinates + tables
    assert qj.storage_bits(encoded) > dead_channels.reduced_storage_bits(encoded, reduced)


PARTS = {
    "blocks": {
        "Dense_0": qj.multi_bit(2, axes=-2, blocks=2),
        "Conv_1": qj.multi_bit(2, axes=(-4, -3)),
        "Dense_1": qj.multi_bit(2, axes=-2),
        ".*kernel": qj.multi_bit(2, axes=(-4, -3, -2)),
    },
    "grids": {"Dense_1": qj.lsq(2, balanced=True, axes="channel"), ".*kernel": qj.uniform(3)},
    "channels": {".*kernel": qj.uniform(3, axes="channel")},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_what_is_encoded_ships_without_its_dead_channels(parts, tmp_path):
    model = models.LeNet5(features=(6, 9, 20))
    x = jnp.zeros((3, 28, 28, 1))
    params = randomized(variables_of(model, x)["params"], 1)
    quantizer = qj.partition(parts)
    encoded = quantizer.encode(params, quantizer.init(params))
    for layer, some in {"Conv_0": [1, 4], "Conv_1": [0, 2, 8], "Dense_0": [3, 19]}.items():
        encoded[layer]["kernel"] = killed(encoded[layer]["kernel"], some)
    reduced = dead_channels.remove_dead_channels({"params": qj.decode(encoded)}, LENET)
    assert reduced.widths == "4-6-18-10"
    smaller = dead_channels.reduced_encoded(encoded, reduced)
    qj.save(tmp_path / "whole", encoded)
    qj.save(tmp_path / "small", smaller)
    assert (tmp_path / "small").stat().st_size < (tmp_path / "whole").stat().st_size
    for found in (smaller, qj.load(tmp_path / "small")):
        jax.tree.map(np.testing.assert_array_equal, qj.decode(found), reduced.variables["params"])


def killed(leaf, channels):
    """Returns a leaf whose channels decode to zero."""
    if isinstance(leaf, qj.MultiBit):
        coords, mask = (np.array(np.broadcast_to(a, a.shape)) for a in (leaf.coords, leaf.mask))
        coords[..., channels, :], mask[..., channels, :] = 0, False
        return dataclasses.replace(leaf, coords=jnp.asarray(coords), mask=jnp.asarray(mask))
    codes = np.array(leaf.codes)
    codes[..., channels] = 0
    return dataclasses.replace(leaf, codes=jnp.asarray(codes))


def test_blocks_that_would_be_uneven():
    leaf = qj.sketch(jnp.ones((6, 2)), 1, -2, blocks=2)
    reduced = dead_channels.Reduced(
        {"params": {"a": {}}}, {"a": np.arange(6) > 0}, {"a": np.ones(2, bool)}
    )
    with pytest.raises(ValueError, match=r"a: blocks of \{2, 3\} inputs along axis -2"):
        dead_channels.reduced_encoded({"a": {"kernel": leaf}}, reduced)


def test_bad_layers():
    params = {"Dense_0": {"kernel": jnp.ones((8, 4))}, "Dense_1": {"kernel": jnp.ones((5, 3))}}
    with pytest.raises(ValueError, match="no kernel of 'Dense_2'"):
        dead_channels.remove_dead_channels({"params": params}, [Layer("Dense_2")])
    with pytest.raises(ValueError, match="Dense_1 takes 5 inputs, Dense_0 has 4"):
        dead_channels.remove_dead_channels({"params": params}, [Layer("Dense_0"), Layer("Dense_1")])
