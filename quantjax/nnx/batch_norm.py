"""Batch norms of NNX models: statistics measured anew, and folding into the layer before."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from quantjax import batch_norms, folding
from quantjax.core import paths
from quantjax.nnx.derived import derived
from quantjax.nnx.input_layers import ActQuant

LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear)
# What a layer computes with, unless a user put in something that may not be linear in the kernel.
USUAL = {"dot_general": lax.dot_general, "conv_general_dilated": lax.conv_general_dilated}


def reestimate_batch_norm(model: nnx.Module, batches: Iterable, **kwargs) -> nnx.Module:
    """Returns a clone of `model` with the mean and variance that its batch norms meet.

    Args:
      model: any NNX module with the weights that it shall have, one of `quantize_inputs`,
        `quantize_weights` or `packed`, too.
      batches: inputs of the model, arrays or trees of arrays; a single array is one batch. Take
        them as large as in training; one of another size compiles again.
      **kwargs: further arguments of the model.

    Each batch goes through the model once, in evaluation mode (without dropout, input quantizers
    stay as they are), but normalised everywhere by its own statistics, without momentum. A mean
    and a variance are those of all values that a batch norm got, whatever the sizes of batches and
    however often it is called in a pass:

      mean = sum_i n_i mean_i / sum_i n_i
      var = sum_i n_i (var_i + (mean_i - mean)^2) / sum_i n_i

    Nothing else of the clone changes, and its modes are the model's. Batch norms that the model
    does not run keep their statistics.

    Raises:
      ValueError: no NNX model; no batches, no batch norm that runs, or one (its path is named) that
        gets a single value per channel, or whose statistics are not finite (that not under jit).
    """
    _check_model(model, "reestimate_batch_norm")
    collecting = nnx.clone(model)
    collecting.eval()
    norms = _norms(collecting)
    if not norms:
        raise ValueError("the model has no nnx.BatchNorm")
    for path, norm in norms.items():
        norm.__class__ = _collecting(type(norm))
        norm.union_path, norm.momentum, norm.use_fast_variance = path, 0.0, False
        for name, value in batch_norms.empty(norm.mean[...], norm.var[...]).items():
            setattr(norm, name, type(norm.mean)(value))
        norm.mean[...] = jnp.zeros_like(norm.mean[...])
        norm.var[...] = jnp.zeros_like(norm.var[...])
    graph, unions, rest = nnx.split(collecting, _is_union, ...)

    @jax.jit
    def seen(unions, rest, batch):
        model = nnx.merge(graph, unions, rest)
        model(batch, **kwargs)
        return nnx.state(model, _is_union)

    start = unions
    for batch in [batches] if hasattr(batches, "shape") else batches:
        unions = seen(unions, rest, batch)
    if unions is start:
        raise ValueError("reestimate_batch_norm needs at least one batch")
    nnx.update(collecting, unions)
    model = nnx.clone(model)
    own = _norms(model)
    old = {path: {"mean": norm.mean[...], "var": norm.var[...]} for path, norm in own.items()}
    found = {
        path: {name: getattr(norm, name)[...] for name in batch_norms.UNION}
        for path, norm in norms.items()
    }
    for path, stats in batch_norms.settled(old, found).items():
        own[path].mean[...], own[path].var[...] = stats["mean"], stats["var"]
    return model


def fold_batch_norm(model: nnx.Module, x, **kwargs) -> nnx.Module:
    """Returns a clone of `model` with batch norms folded into the layers before; equal outputs.

    Args:
      model: any NNX module with float weights, before quantization.
      x: an input of the model, an array or a tree; only shapes and dtypes count.
      **kwargs: further arguments of the model.

    Where, in evaluation mode, a batch norm gets what an nnx.Conv, nnx.Linear or nnx.ConvTranspose
    gives, nothing between, and nothing else gets it,

      kernel' = kernel s along its last axis, bias' = bias s, with s = scale / sqrt(var + epsilon)

    and the batch norm is left to add bias - mean': with mean' = mean s, var' = var s^2 and
    scale' = sqrt(var' + epsilon) it divides and multiplies by the same (one without scale by 1,
    its var' is 1 - epsilon). So it stays a batch norm of what the layer now gives, which may be
    trained, calibrated or measured anew. Layers made by nnx.vmap and run by nnx.scan along axis 0
    are folded, too.

    Others stay: those before a layer (pre-activation), behind pooling or an activation, of a layer
    whose output goes elsewhere as well (a residual sum), called twice or with shared variables,
    with a kernel that is transposed (`transpose_kernel`), packed, or multiplied by a user's
    function, or run by nnx.vmap.

    Every output channel's weights are now scaled by a factor of its own: quantize them with a
    step for each, `axes="channel"`, and then `reestimate_batch_norm`.

    Raises:
      ValueError: no NNX model, or no batch norm can be folded (with the reasons).
    """
    _check_model(model, "fold_batch_norm")
    marked = nnx.clone(model)
    marked.eval()
    variables_of, why = {}, {}
    for path, module in _modules(marked).items():
        if isinstance(module, (nnx.BatchNorm, *LAYERS)):
            _let_mark(module, variables_of, why, path)
    graph, state = nnx.split(marked)

    def run(state, x):
        return nnx.merge(graph, state)(x, **kwargs)

    program = jax.make_jaxpr(run)(folding.shapes(state), folding.shapes(x))
    leaves, _ = paths.flatten(state)
    places = {path: place for place, path in enumerate(leaves)}
    pairs, reasons = folding.pairs(program, places, variables_of, why)
    if not pairs:
        folding.refuse(reasons)
    model = nnx.clone(model)
    modules = _modules(model)

    def values(path):
        return {name: getattr(modules[path], name)[...] for name in variables_of[path]}

    epsilons = {norm: modules[norm].epsilon for norm in pairs}
    for path, changed in folding.changed(pairs, values, epsilons).items():
        for name, value in changed.items():
            getattr(modules[path], name)[...] = value
    return model


class _Collecting(nnx.BatchNorm):
    """Uses its input's statistics, whatever it is told, and joins them to its union.

    Between a user's class and nnx.BatchNorm, where super().__call__ finds it.
    """

    def __call__(self, x, use_running_average=None, *, mask=None):
        del use_running_average
        axes = self.axis if isinstance(self.axis, tuple | list) else (self.axis,)
        channels = {axis % x.ndim for axis in axes}
        count = batch_norms.values_per_channel(
            self.union_path or "the model itself", x, channels, mask, self.axis_name is not None
        )
        y = super().__call__(x, False, mask=mask)
        union = {name: getattr(self, name)[...] for name in batch_norms.UNION}
        union = batch_norms.joined(union, count, self.mean[...], self.var[...])
        for name, value in union.items():
            getattr(self, name)[...] = value
        return y


@functools.cache
def _collecting(cls: type) -> type:
    bases = (_Collecting,) if cls is nnx.BatchNorm else (cls, _Collecting)
    return type(cls.__name__, bases, {})


def _is_union(path, value):
    del value
    return path[-1] in batch_norms.UNION


def _let_mark(module, variables_of, why, path):
    """Makes a layer or batch norm mark what it reads, takes and gives; notes what is known of it.

    Args:
      module, path: the layer or batch norm; its class is changed.
      variables_of: to be filled, {path: {name: path of the variable}}.
      why: to be filled, {path of what can not be folded: the reason}.
    """
    norm = isinstance(module, nnx.BatchNorm)
    names = folding.NORM_VARIABLES if norm else folding.LAYER_VARIABLES
    names = tuple(name for name in names if getattr(module, name) is not None)
    reason = _why_norm(module) if norm else _why_layer(module)
    for name in names:
        value, *more = jax.tree.leaves(getattr(module, name).get_raw_value())
        if more or not jnp.issubdtype(value.dtype, jnp.floating):
            reason = f"its {name} is no array of floats; fold before quantization"
    if reason is not None:
        why[path] = reason
    variables_of[path] = {name: f"{path}/{name}".removeprefix("/") for name in names}
    module.__class__ = _marking_norm(type(module)) if norm else _marking_layer(type(module))
    module.fold_path, module.fold_names = path, names


@functools.cache
def _marking_layer(cls: type) -> type:
    def call(self, *args, **kwargs):
        return _marked_call(cls, self, *args, **kwargs)

    return derived(cls, _marking_layer, call)


@functools.cache
def _marking_norm(cls: type) -> type:
    def call(self, *args, **kwargs):
        flax_own = cls.__call__ is nnx.BatchNorm.__call__
        given = batch_norms.arguments(*args, **kwargs)[1] if flax_own else None
        if given is not None and not given:
            raise ValueError(
                f"{self.fold_path or 'the model itself'}: this batch norm is called with "
                "use_running_average=False, and would use the statistics of the batch; give "
                "fold_batch_norm what evaluation takes"
            )
        args, kwargs = folding.with_input_marked(self.fold_path, args, kwargs)
        return _marked_call(cls, self, *args, **kwargs)

    return derived(cls, _marking_norm, call)


def _marked_call(cls, module, *args, **kwargs):
    for name in module.fold_names:
        folding.mark(getattr(module, name)[...], module.fold_path, name)
    return folding.mark(cls.__call__(module, *args, **kwargs), module.fold_path, folding.OUTPUT)


def _why_norm(module) -> str | None:
    """Returns why a batch norm can not be folded, if it tells."""
    if type(module).__call__ is not nnx.BatchNorm.__call__:
        return f"{type(module).__name__} has a __call__ of its own"
    if module.promote_dtype is not dtypes.promote_dtype:
        return "it computes with a user's promote_dtype"
    if module.axis not in (-1, (-1,)):
        return f"its channels lie along axis {module.axis}, expected -1"
    return None


def _why_layer(module) -> str | None:
    """Returns why nothing can be folded into a layer, if it tells."""
    base = next(base for base in LAYERS if isinstance(module, base))
    if type(module).__call__ is not base.__call__:
        return f"{type(module).__name__} has a __call__ of its own"
    promote = module.promote_dtype
    promote = promote.promote if isinstance(promote, ActQuant) else promote
    own = [name for name, usual in USUAL.items() if getattr(module, name, usual) is not usual]
    own += ["promote_dtype"] if promote is not dtypes.promote_dtype else []
    if own:
        return f"it computes with a user's {own[0]}"
    return "its kernel is transposed" if getattr(module, "transpose_kernel", False) else None


def _norms(model) -> dict:
    return {p: m for p, m in _modules(model).items() if isinstance(m, nnx.BatchNorm)}


def _modules(model) -> dict:
    """Returns {path: module}; one used in several places has the first of its paths."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _check_model(model, name):
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"expected an NNX model, got {model!r}; model.apply of a Linen model goes to "
            f"quantjax.linen.{name}"
        )
