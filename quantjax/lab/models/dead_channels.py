"""Dead channels leave the network: fewer outputs here, fewer inputs in the next layer.

When all groups of an output channel are pruned (section 5.4.1 of ALQ), the channel is one constant:
its bias, through batch norm and activation. What the constant adds to the next layer moves into
that layer's bias, or into its batch norm's mean, and the channel's arrays go. In the paper
LeNet-5's 20-50-500-10 became 18-45-231-10.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantjax.core import qarray
from quantjax.methods.alq import bases as bases_lib


class Layer(NamedTuple):
    """A layer of a sequential network: convolution or dense, batch norm, activation, pooling."""

    name: str  # its params lie at the top level: kernel [..., inputs, outputs], perhaps bias
    batch_norm: str | None = None  # the name of the one after it
    padded: bool = False  # its input is padded with zeros
    epsilon: float = 1e-5  # of the batch norm


class Reduced(NamedTuple):
    """A network without its dead channels."""

    variables: dict  # the same trees with smaller arrays
    inputs: dict  # {layer: bool [inputs of the kernel]}: which are kept
    outputs: dict  # {layer: bool [outputs]}

    @property
    def widths(self) -> str:
        """The layers' widths, such as 18-45-231-10."""
        return "-".join(str(int(np.count_nonzero(kept))) for kept in self.outputs.values())


def remove_dead_channels(
    variables: Mapping, layers: Sequence[Layer], activation: Callable = jax.nn.relu
) -> Reduced:
    """Returns the network without the channels whose kernels are zero; outputs stay the same.

    Args:
      variables: params (decoded) and perhaps batch_stats of the network in evaluation mode.
      layers: in the order in which they are applied. Between two of them there may be pooling and
        a flattening with channels last; a dense layer behind a convolution may have several inputs
        per channel.
      activation: elementwise, after every layer but the last.

    A channel stays where its constant cannot move: a constant other than zero into a padded layer,
    or into one without bias and batch norm. Every layer keeps at least one channel.

    Raises:
      ValueError: a layer is not among the params, or kernels do not follow one another.
    """
    # NumPy, since every shape is new: nothing is worth compiling.
    params, stats = (
        {name: jax.tree.map(np.asarray, dict(tree)) for name, tree in variables.get(of, {}).items()}
        for of in ("params", "batch_stats")
    )
    for layer in layers:
        if "kernel" not in params.get(layer.name, {}):
            raise ValueError(f"no kernel of {layer.name!r} among {sorted(params)}")
    inputs = {layers[0].name: np.ones(params[layers[0].name]["kernel"].shape[-2], bool)}
    outputs = {}
    for layer, following in itertools.pairwise(layers):
        kernel, after = params[layer.name]["kernel"], params[following.name]["kernel"]
        channels = kernel.shape[-1]
        if after.shape[-2] % channels:
            raise ValueError(
                f"{following.name} takes {after.shape[-2]} inputs, {layer.name} has {channels}"
            )
        dead = ~np.any(kernel != 0, axis=tuple(range(kernel.ndim - 1)))
        constant = np.asarray(activation(_constant(layer, params, stats)))
        movable = following.batch_norm is not None or "bias" in params[following.name]
        dead &= (constant == 0) | (movable and not following.padded)
        if dead.all():
            dead[0] = False
        # [kernel window * positions, channels, outputs]: flattening puts channels last.
        view = after.reshape(*after.shape[:-2], -1, channels, after.shape[-1])
        moved = np.where(dead, constant, 0).astype(np.float64)
        shift = np.einsum("...co,c->...o", view.astype(np.float64), moved)
        _shift(following, params, stats, shift.reshape(-1, after.shape[-1]).sum(axis=0))
        outputs[layer.name] = ~dead
        inputs[following.name] = np.tile(~dead, after.shape[-2] // channels)
    last = layers[-1].name
    outputs[last] = np.ones(params[last]["kernel"].shape[-1], bool)
    for layer in layers:
        kept = outputs[layer.name]
        mine = params[layer.name]
        mine["kernel"] = mine["kernel"][..., inputs[layer.name], :][..., kept]
        for tree in (mine, params.get(layer.batch_norm), stats.get(layer.batch_norm)):
            for name, leaf in (tree or {}).items():
                if name != "kernel":
                    tree[name] = leaf[kept]
    smaller = {"params": params} | ({"batch_stats": stats} if stats else {})
    smaller = {**variables, **jax.tree.map(jnp.asarray, smaller)}
    return Reduced(smaller, inputs, outputs)


def reduced_encoded(encoded: Mapping, reduced: Reduced) -> dict:
    """Returns the encoded params without the dead channels: what ships of the smaller network.

    Args:
      encoded: params {layer: {"kernel": Grid, Table or MultiBit, ...}} of the network from before.
      reduced: of the same network; its biases, which took over what was constant, are shipped.

    Raises:
      ValueError: outputs in blocks, or blocks of inputs that would have unequal sizes.
    """
    smaller = dict(reduced.variables["params"])
    for name, outputs in reduced.outputs.items():
        kernel = _without(encoded[name]["kernel"], np.asarray(reduced.inputs[name]), outputs, name)
        smaller[name] = {**smaller[name], "kernel": kernel}
    return smaller


def _without(leaf, inputs, outputs, name):
    """Returns a leaf with those of its last two axes kept that the masks name."""
    if not isinstance(leaf, qarray.MultiBit):
        parts = [getattr(leaf, field.name) for field in dataclasses.fields(leaf)[:2]]
        table = isinstance(leaf, qarray.Table)
        parts = [_kept(part, inputs, outputs, ends=table and i) for i, part in enumerate(parts)]
        return type(leaf)(*parts, **_static(leaf))
    if leaf.blocks > 1:
        rows = inputs.reshape(leaf.blocks, -1)
        counts = set(rows.sum(axis=1).tolist())
        if leaf.axis != -2 or len(counts) > 1:
            raise ValueError(f"{name}: blocks of {counts} inputs along axis {leaf.axis}")
        # [..., blocks, inputs, outputs, slots]: the same inputs leave one by one.
        whole = leaf.basis.reshape(*leaf.basis.shape[:-4], -1, *leaf.basis.shape[-2:])
        basis = _kept(whole, inputs, outputs, ends=1)
        basis = basis.reshape(*basis.shape[:-3], leaf.blocks, -1, *basis.shape[-2:])
    else:
        basis = _kept(leaf.basis, inputs, outputs, ends=1)
    groups = [_kept(part, inputs, outputs, ends=1) for part in (leaf.coords, leaf.mask)]
    return qarray.MultiBit(basis, *groups, **_static(leaf))


def _static(leaf):
    arrays = {"codes", "step", "levels", "basis", "coords", "mask"}
    if isinstance(leaf, qarray.Grid):
        arrays -= {"levels"}  # their number
    names = {field.name for field in dataclasses.fields(leaf)} - arrays
    return {name: getattr(leaf, name) for name in names}


def _kept(array, inputs, outputs, ends):
    """Takes from the two axes before the last `ends` what is kept; an axis of one stays."""
    array = np.asarray(array)
    for kept, axis in ((inputs, -2 - ends), (outputs, -1 - ends)):
        if array.shape[axis] == kept.size:
            array = np.compress(kept, array, axis=axis)
    return jnp.asarray(array)


def reduced_storage_bits(encoded: Mapping, reduced: Reduced) -> int:
    """Returns `storage_bits` of the MultiBit kernels without the dead channels' weights.

    Args:
      encoded: params whose kernels are MultiBit, {layer: {"kernel": ...}}.
      reduced: of the same network.
    """
    total = 0
    for name, kept in reduced.outputs.items():
        mb: qarray.MultiBit = encoded[name]["kernel"]
        weights = np.broadcast_to(reduced.inputs[name][:, None] & kept, mb.shape)
        weights = weights.reshape(mb.basis.shape[:-1])
        sizes = weights.sum(axis=bases_lib.axes_of(mb.coords), keepdims=True)
        widths = np.where(sizes > 0, np.asarray(mb.mask).sum(axis=-1), 0)
        table = math.ceil(math.log2(widths.max(initial=0) + 1)) * np.count_nonzero(sizes)
        total += int((sizes * widths).sum()) + 32 * int(widths.sum()) + table
    return total


def _constant(layer, params, stats):
    """What a dead channel gives before the activation, [outputs]."""
    mine = params[layer.name]
    out = mine.get("bias", np.zeros(mine["kernel"].shape[-1], mine["kernel"].dtype))
    if layer.batch_norm is not None:
        norm, seen = params.get(layer.batch_norm, {}), stats[layer.batch_norm]
        out = (out - seen["mean"]) / np.sqrt(seen["var"] + layer.epsilon)
        out = out * norm.get("scale", 1) + norm.get("bias", 0)
    return out


def _shift(layer, params, stats, shift):
    mine = params[layer.name]
    if "bias" in mine:
        mine["bias"] = (mine["bias"] + shift).astype(mine["bias"].dtype)
    elif layer.batch_norm is not None:
        seen = stats[layer.batch_norm]
        seen["mean"] = (seen["mean"] - shift).astype(seen["mean"].dtype)
