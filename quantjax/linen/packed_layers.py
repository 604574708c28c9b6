"""Linen models on packed kernels: the same apply, with `Packed` leaves in its params."""

import contextvars
import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from quantjax.core import qarray
from quantjax.encoded import packed as packed_lib
from quantjax.linen.layers import apart, check_apply

LAYERS = (
    *(nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Embed),
    *(nn.Conv, nn.ConvTranspose, nn.ConvLocal),
)
_inside = contextvars.ContextVar("inside", default=False)


def packed(apply_fn: Callable) -> Callable:
    """Returns `apply_fn` for params whose kernels may be `Packed`.

    Args:
      apply_fn: `model.apply`, or anything that calls it, `quantize_inputs(model.apply, ...)` too;
        not jitted: jit the result instead.

    The returned function has `apply_fn`'s signature. A Dense layer multiplies few rows by its
    packed kernel as it is, Embed decodes the rows that it gives; other layers, and those with a
    `dot_general` of their own, decode theirs where they are called, one at a time. Params may be
    stacked for nn.scan and nn.vmap. Leaves that are encoded, but not packed, are decoded at once.

    Raises:
      ValueError: a jitted `apply_fn`; in the returned function: a Packed leaf (its path is named)
        that belongs to none of Flax's Dense, DenseGeneral, Einsum, Embed and Conv layers.
    """
    check_apply(apply_fn, "apply_fn")

    @functools.wraps(apply_fn)
    def apply(variables, *args, **kwargs):
        with nn.intercept_methods(_outermost):
            return apply_fn(qarray.decode(variables), *args, **kwargs)

    return apply


def _outermost(next_fun, args, kwargs, context):
    """Enters the interceptor below once a model runs, where it is the innermost of all."""
    if _inside.get():
        return next_fun(*args, **kwargs)
    module = context.module
    token = _inside.set(True)
    try:
        with nn.intercept_methods(_at_packed_layers):
            if not _packed_leaves(module):
                return next_fun(*args, **kwargs)
            # Called anew: the interceptors of this very call were chosen before.
            return getattr(module, context.method_name)(*args, **kwargs)
    finally:
        _inside.reset(token)


def _at_packed_layers(next_fun, args, kwargs, context):
    module, method = context.module, context.method_name
    leaves = _packed_leaves(module)
    if not leaves:
        return next_fun(*args, **kwargs)
    if not isinstance(module, LAYERS):
        raise ValueError(
            f"{'/'.join((*module.path, next(iter(leaves))))}: a {type(module).__name__} cannot "
            "multiply by a packed leaf; decode that one, `leaf.decode()`, and leave others packed"
        )
    if method == "setup":  # of Embed: it would compare the shape of what is packed
        return None
    own = module.scope.variables()["params"]
    if method == "__call__" and _multiplies_plainly(module, args, kwargs):
        return _dense(module, own, *args, **kwargs)
    if method == "__call__" and type(module).__call__ is nn.Embed.__call__:
        return _embed(module, leaves["embedding"], *args, **kwargs)
    free = module.clone(parent=None, name=None)
    with apart():
        return free.apply(
            {"params": packed_lib.unpacked(dict(own))}, *args, method=method, **kwargs
        )


def _packed_leaves(module):
    """Returns {name: leaf} of what a module itself owns; nothing of one that is not bound."""
    own = {} if module.scope is None else module.scope.variables().get("params", {})
    return {name: leaf for name, leaf in own.items() if packed_lib.is_packed(leaf)}


def _multiplies_plainly(module, args, kwargs):
    """True for a Dense layer, or a DenseGeneral that is one, on few rows."""
    x = args[0] if args else kwargs.get("inputs")
    if type(module).__call__ is nn.DenseGeneral.__call__:
        plain = isinstance(module.features, int) and module.axis in (-1, (-1,), jnp.ndim(x) - 1)
        plain &= not module.batch_dims
    else:
        plain = type(module).__call__ is nn.Dense.__call__
    if not plain or module.dot_general is not None or module.dot_general_cls is not None:
        return False
    own = module.scope.variables()["params"]
    kernel = own.get("kernel")
    if not packed_lib.is_packed(kernel) or not packed_lib.has_tables(kernel):
        return False
    # Where shapes or names are wrong Flax says so.
    fits = kernel.shape == (jnp.shape(x)[-1], module.features)
    fits &= ("bias" in own) == module.use_bias
    return fits and packed_lib.few(jnp.asarray(x))


def _dense(module, params, inputs):
    kernel, bias = params["kernel"], params.get("bias")
    bias = bias.decode() if packed_lib.is_packed(bias) else bias
    others = [x for x in (inputs, kernel, bias) if x is not None]
    dtype = module.dtype or jnp.result_type(*(x.dtype for x in others))
    y = packed_lib.product(jnp.asarray(inputs, dtype), kernel).astype(dtype)
    return y if bias is None else y + jnp.asarray(bias, dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def _embed(module, table, inputs):
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise ValueError(f"Input type must be an integer, got {inputs.dtype}")
    found = table.take(inputs)
    return found.astype(module.dtype) if module.dtype is not None else found
