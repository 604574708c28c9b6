"""Batch norms folded into the layer before, for models that ship integers."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from quantjax import batch_norms, folding
from quantjax.core import paths
from quantjax.linen.layers import check_apply, of_users
from quantjax.linen.probes import axes_of, is_batch_norm

LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense)


def fold_batch_norm(apply: Callable, variables: Mapping, x, **kwargs) -> dict:
    """Returns `variables` with batch norms folded into the layers before; equal outputs.

    Args:
      apply: `model.apply`, or anything that calls it; not jitted.
      variables: of the model: float weights, before quantization.
      x: an input of the model, an array or a tree; only shapes and dtypes count.
      **kwargs: further arguments of apply, for evaluation, such as `train=False`.

    Where a batch norm gets what an nn.Conv, nn.Dense or nn.ConvTranspose gives, nothing between,
    and nothing else gets it,

      kernel' = kernel s along its last axis, bias' = bias s, with s = scale / sqrt(var + epsilon)

    and the batch norm is left to add bias - mean': with mean' = mean s, var' = var s^2 and
    scale' = sqrt(var' + epsilon) it divides and multiplies by the same (one without scale by 1,
    its var' is 1 - epsilon). So it stays a batch norm of what the layer now gives, which may be
    trained, calibrated or measured anew. The model itself stays as it is. Blocks under nn.remat,
    and stacked along axis 0 by nn.scan, are folded, too.

    Others stay: those before a layer (pre-activation), behind pooling or an activation, of a layer
    whose output goes elsewhere as well (a residual sum), called twice or with shared variables,
    with a kernel that is transposed (`transpose_kernel`) or multiplied by a user's function, or
    under nn.vmap.

    Every output channel's weights are now scaled by a factor of its own: quantize them with a
    step for each, `axes="channel"`, and then `reestimate_batch_norm`.

    Raises:
      ValueError: no batch norm can be folded (with the reasons), or one is in training mode (with
        its path).
    """
    check_apply(apply, "apply")
    variables_of, epsilons, why = {}, {}, {}

    def run(variables, x):
        with nn.intercept_methods(_marking(variables_of, epsilons, why)):
            return apply(variables, x, **kwargs)

    program = jax.make_jaxpr(run)(folding.shapes(variables), folding.shapes(x))
    leaves, rebuild = paths.flatten(variables)
    places = {path: place for place, path in enumerate(leaves)}
    pairs, reasons = folding.pairs(program, places, variables_of, why)
    if not pairs:
        folding.refuse(reasons)

    def values(path):
        return {name: leaves[leaf] for name, leaf in variables_of[path].items()}

    for path, changed in folding.changed(pairs, values, epsilons).items():
        leaves |= {variables_of[path][name]: value for name, value in changed.items()}
    return rebuild(leaves)


def _marking(variables_of: dict, epsilons: dict, why: dict):
    """An interceptor: marks variables, inputs and outputs of layers and batch norms.

    Args:
      variables_of: to be filled, {path: {name: path of the variable}}.
      epsilons: to be filled, {path of a batch norm: its epsilon}.
      why: to be filled, {path of what can not be folded: the reason}.
    """

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        norm = is_batch_norm(context)
        layer = context.method_name == "__call__" and isinstance(module, LAYERS)
        path = "/".join(module.path)
        if not (norm or layer):
            return next_fun(*args, **kwargs)
        reason = _of_norm(module, args, kwargs) if norm else _of_layer(module)
        variables_of[path] = {}
        for name in folding.NORM_VARIABLES if norm else folding.LAYER_VARIABLES:
            collection = "batch_stats" if name in ("mean", "var") else "params"
            if not module.scope.has_variable(collection, name):
                continue
            # In a box (nn.with_partitioning) lies one array, in what is encoded or packed more.
            value, *more = jax.tree.leaves(module.scope.get_variable(collection, name))
            if more or not jnp.issubdtype(value.dtype, jnp.floating):
                reason = reason or f"its {name} is no array of floats; fold before quantization"
            folding.mark(value, path, name)
            variables_of[path][name] = "/".join((collection, *module.path, name))
        if reason is not None:
            why[path] = reason
        if norm:
            epsilons[path] = module.epsilon
            args, kwargs = folding.with_input_marked(path, args, kwargs)
        return folding.mark(next_fun(*args, **kwargs), path, folding.OUTPUT)

    return intercept


def _of_norm(module, args, kwargs) -> str | None:
    """Returns why a batch norm can not be folded, if its call tells.

    Raises:
      ValueError: it is in training mode.
    """
    if type(module).__call__ is not nn.BatchNorm.__call__:
        return f"{type(module).__name__} has a __call__ of its own"
    x, given, _ = batch_norms.arguments(*args, **kwargs)
    if not (module.use_running_average if given is None else given):
        raise ValueError(
            f"{'/'.join(module.path) or 'the model itself'}: this batch norm uses the statistics "
            "of the batch; give fold_batch_norm what evaluation takes, such as train=False"
        )
    if axes_of(module, x)[0] != {x.ndim - 1}:
        return f"its channels lie along axis {module.axis}, expected the last"
    return None


def _of_layer(module) -> str | None:
    """Returns why nothing can be folded into a layer, if it tells."""
    base = next(base for base in LAYERS if isinstance(module, base))
    if type(module).__call__ is not base.__call__:
        return f"{type(module).__name__} has a __call__ of its own"
    own = of_users(module)
    if own:
        return f"it computes with a user's {own[0]}"
    return "its kernel is transposed" if getattr(module, "transpose_kernel", False) else None
