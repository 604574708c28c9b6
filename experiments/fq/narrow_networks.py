"""Channels leave a network before its weights do: training is faster, and positions are cheaper.

A layer's channels with the smallest product of norms, of the weights into it and of those out of
it, are cut, and `dead_channels` takes them out. What is trained and encoded then goes back into
the shapes that the model had, zeros around it.
"""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import quantjax as qj
from quantjax.lab.models import dead_channels

LENET5 = tuple(dead_channels.Layer(name) for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1"))
PAIRS = tuple((layer.name, after.name) for layer, after in itertools.pairwise(LENET5))


def narrowed(variables: Mapping, widths: tuple[int, ...]) -> dead_channels.Reduced:
    """Returns LeNet-5 with at most so many channels in all layers but the last."""
    params = jax.tree.map(np.array, variables["params"])
    for (name, after), width in zip(PAIRS, widths, strict=True):
        kernel = params[name]["kernel"]
        out = _by_channel(params[after]["kernel"], kernel.shape[-1])
        size = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), axis=0)
        size *= np.linalg.norm(out, axis=(0, 2))
        kernel[..., np.argsort(size)[: max(0, size.size - width)]] = 0
    return dead_channels.remove_dead_channels({"params": params}, LENET5)


def features(params: Mapping) -> tuple[int, ...]:
    """Returns the widths of all layers but the last, as the model takes them."""
    return tuple(params[name]["kernel"].shape[-1] for name, _ in PAIRS)


def without_loose_ends(masks: Mapping) -> dict:
    """Returns the masks without weights into a channel that nothing reads, or out of a dead one.

    Masks of biases come beside: a bias is kept where its channel has weights.
    """
    masks = {path: np.array(mask) for path, mask in masks.items()}
    for names in (*PAIRS, *reversed(PAIRS)):  # forwards deaths spread, backwards disuse
        kernel, after = (masks[f"{name}/kernel"] for name in names)
        out = _by_channel(after, kernel.shape[-1])  # a view
        alive = kernel.reshape(-1, kernel.shape[-1]).any(axis=0) & out.any(axis=(0, 2))
        kernel &= alive
        out &= alive[:, None]
    for layer in LENET5:
        kernel = masks[f"{layer.name}/kernel"]
        masks[f"{layer.name}/bias"] = kernel.reshape(-1, kernel.shape[-1]).any(axis=0)
    return masks


def widened(encoded: Mapping, reduced: dead_channels.Reduced) -> dict:
    """Returns the encoded params (Grid kernels) in the shapes from before `narrowed`."""
    whole = {}
    for name, outputs in reduced.outputs.items():
        inputs, leaf = reduced.inputs[name], encoded[name]["kernel"]
        window = leaf.shape[:-2]
        codes = np.zeros((*window, inputs.size, outputs.size), leaf.codes.dtype)
        codes[..., np.flatnonzero(inputs)[:, None], np.flatnonzero(outputs)] = leaf.codes
        bias = np.zeros(outputs.size, np.float32)
        bias[outputs] = encoded[name]["bias"]
        grid = qj.Grid(
            jnp.asarray(codes), leaf.step, bits=leaf.bits, dtype=leaf.dtype, levels=leaf.levels
        )
        whole[name] = {"kernel": grid, "bias": jnp.asarray(bias)}
    return whole


def _by_channel(kernel, channels):
    """Returns the view [window and positions, channels, outputs]; flattening puts channels last."""
    return kernel.reshape(-1, channels, kernel.shape[-1])
