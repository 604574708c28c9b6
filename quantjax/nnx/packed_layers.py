"""NNX models on packed kernels: variables that hold `Packed` and give arrays.

Every layer reads its kernel as `self.kernel[...]`, which decodes, one layer at a time. Linear
layers become a class of the same name that multiplies few rows by the packed kernel as it is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from quantjax.core import paths, qarray
from quantjax.encoded import packed as packed_lib
from quantjax.nnx.derived import derived


class PackedKernel(nnx.Variable):
    """A kernel that stays packed; no nnx.Param, so that an optimizer does not see bytes."""

    @property
    def packed(self) -> packed_lib.Packed:
        """The packed leaf itself."""
        return self.get_raw_value()

    def get_value(self, *, index=...):
        """Returns the decoded kernel, or a part of it."""
        leaves = jax.tree.leaves(self.packed)
        if not all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
            return self.packed  # a description of it, while a model is printed
        value = self.packed.decode()
        return value if index is ... else value[index]


def packed(model: nnx.Module, params) -> nnx.Module:
    """Returns a clone of `model` with other params, those of them packed that are `Packed`.

    Args:
      model: any NNX module, one of `quantize_inputs`, too.
      params: what `pack` made of `quantizer.encode(nnx.state(model, nnx.Param), state)`, or nested
        dicts of a file with these paths; leaves that are encoded, but not packed, are decoded.
        Params that it lacks stay as they are.

    Raises:
      ValueError: no NNX model, or a path or shape that is not among the model's params.
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"expected an NNX model, got {model!r}; model.apply of a Linen model goes to "
            "quantjax.linen.packed"
        )
    model = nnx.clone(model)
    leaves, _ = paths.flatten(params, is_leaf=_is_leaf)
    places = {
        "/".join(map(str, (*path, name))): (module, name)
        for path, module in nnx.iter_modules(model)
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param | PackedKernel)
    }
    for path, leaf in leaves.items():
        if path not in places:
            raise ValueError(f"{path} is none of the model's params: {list(places)}")
        old = getattr(*places[path])
        shape = old[...].shape
        if tuple(leaf.shape) != shape:
            raise ValueError(f"{path} has shape {tuple(leaf.shape)}, the model's {shape}")
        kept = packed_lib.is_packed(leaf)
        kind = nnx.Param if isinstance(old, PackedKernel) else type(old)
        new = PackedKernel(leaf) if kept else kind(packed_lib.unpacked(leaf))
        # A tied weight lies in several places, of which params name one.
        for module, name in places.values():
            if getattr(module, name) is not old:
                continue
            setattr(module, name, new)
            if kept and name == "kernel" and type(module).__call__ is nnx.Linear.__call__:
                module.__class__ = _multiplying(type(module))
    return model


def _is_leaf(leaf):
    return packed_lib.is_packed(leaf) or qarray.is_encoded(leaf)


@functools.cache
def _multiplying(cls: type) -> type:
    """Returns a class of Linear layers that multiply few rows by a packed kernel."""

    def call(self, inputs, *args, **kwargs):
        kernel = self.kernel.packed if isinstance(self.kernel, PackedKernel) else None
        few = packed_lib.few(jnp.asarray(inputs))
        plain = self.dot_general is lax.dot_general and not args and not kwargs
        if kernel is None or not (few and plain and packed_lib.has_tables(kernel)):
            return cls.__call__(self, inputs, *args, **kwargs)
        bias = None if self.bias is None else self.bias[...]
        # A scalar in the kernel's place: promotion asks for its dtype alone.
        stand_in = jnp.zeros((), kernel.dtype)
        x, _, bias = self.promote_dtype((inputs, stand_in, bias), dtype=self.dtype)
        y = packed_lib.product(x, kernel).astype(x.dtype)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

    return derived(cls, _multiplying, call)
