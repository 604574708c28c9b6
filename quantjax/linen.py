"""Quantized layer inputs for any Flax Linen model, without editing it.

`quantize_inputs` wraps `model.apply`: an interceptor, entered inside the wrapped call and thus
inside whatever is jitted, hands every Conv and Dense layer its input through an `InputQuantizer`.
The state lives beside the params: collection `quant` holds what is learned, `quant_stats` the
buffers. `calibrate` fits it to data, `calibrate_batch_norm` to batch norm's parameters (PSG).
"""

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from quantjax import inputs, lineage
from quantjax.core.quantizer import QuantState

LEARNED, BUFFERS = COLLECTIONS = ("quant", "quant_stats")
RNG_STREAM = "quant"
LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)

_LIFTED = (
    "Inside nn.scan or nn.vmap, variable_axes must name both collections, for instance "
    "variable_axes={'params': 0, 'quant': 0, 'quant_stats': 0}."
)


def quantize_inputs(apply_fn: Callable, quantizer, where: str = ".*") -> Callable:
    """Returns `apply_fn` with quantized inputs of Conv, ConvTranspose, Dense and DenseGeneral.

    Args:
      apply_fn: `model.apply`, or anything that calls it; not jitted: jit the result instead.
      quantizer: an InputQuantizer, or {pattern: InputQuantizer, or None for layers that stay as
        they are}; the first pattern that matches a layer's path (`Block_0/Conv_1`) takes it, a
        match ending at a `/` or at the path's end.
      where: the pattern of the layers that are considered at all.

    The returned function has `apply_fn`'s signature. A layer that has no state yet fits itself to
    the input it sees, if `mutable` names both collections; afterwards it updates its state in
    every call with `quant_stats` mutable. A collection that would be empty does not exist. An
    rng stream `quant` makes the pass stochastic. Integer inputs are first cast to the dtype
    of the layer. Under nn.scan and nn.vmap, `variable_axes` must name both collections; under
    nn.map_variables (nn.WeightNorm) nothing can be written, so that only `init` fits.

    Raises:
      ValueError: a quantizer that is none, or a jitted `apply_fn`; in the returned function: a
        pattern that matches no layer or is wholly shadowed (with the paths of the layers), a layer
        that is neither fitted nor mutable (with its path), nn.jit around a layer.
    """
    quantizers = inputs.by_pattern(quantizer)
    _check_not_jitted(apply_fn, "apply_fn")

    @functools.wraps(apply_fn)
    def apply(*args, **kwargs):
        seen = {}
        rngs = kwargs.get("rngs")
        stochastic = isinstance(rngs, Mapping) and RNG_STREAM in rngs

        def visit(module, path, x):
            seen[path] = None
            chosen = inputs.choose(quantizers, where, path)
            if chosen is None:
                return x
            if stochastic and not module.scope.has_rng(RNG_STREAM):
                raise ValueError(
                    f"{path}: the rng stream {RNG_STREAM!r} does not reach this layer; inside "
                    f"nn.scan or nn.vmap, split_rngs must name it: {{{RNG_STREAM!r}: True}}"
                )
            return _quantize(chosen, module, path, x)

        with nn.intercept_methods(_at_layers(visit)):
            out = apply_fn(*args, **kwargs)
        variables = args[0] if args else kwargs.get("variables")
        inputs.check_patterns(quantizers, where, [*seen, *_known(variables, quantizers, where)])
        return out

    return apply


def calibrate(apply: Callable, variables: Mapping, batches: Iterable, **kwargs) -> dict:
    """Returns `variables` with the input quantizers fitted to the first batch, updated by others.

    Args:
      apply: what `quantize_inputs` returned.
      variables: of the model; state that it holds already is updated.
      batches: inputs of the model, arrays or trees of arrays; a single array is one batch.
      **kwargs: further arguments of apply, such as `train=False`.

    Raises:
      ValueError: no batches, or `apply` quantizes no inputs.
    """
    _check_not_jitted(apply, "apply")

    @jax.jit
    def fit(variables, batch):
        return _fit(apply, variables, batch, kwargs)

    state = {}
    for batch in [batches] if hasattr(batches, "shape") else batches:
        state = fit({**variables, **state}, batch)
    if not state:
        raise ValueError("calibrate needs at least one batch")
    return {**variables, **state}


def calibrate_batch_norm(apply: Callable, variables: Mapping, x, n=6, **kwargs) -> dict:
    """Returns `variables` with input ranges from batch norm's parameters (PSG, evaluation).

    Args:
      apply: what `quantize_inputs` returned; not jitted, but this function may be.
      variables: of the model; layers keep the state that it holds except as said below. Without
        any, all layers are fitted to x first.
      x: a batch of at least two examples.
      n: how many standard deviations the ranges cover; positive.
      **kwargs: further arguments of apply, such as `train=False`.

    In a fitting pass every nn.BatchNorm gives, instead of its output, constants per channel that
    walk along the batch from shift - n * |scale| to shift + n * |scale|. A layer whose input is
    made of one batch norm's output alone (through activations and pooling) is fitted anew to what
    arrives there: [0, max over channels of shift + n * |scale|] after a ReLU, and the low side as
    well after anything else. All other layers keep the range of calibration: an input that is a
    sum of branches, comes from another layer without batch norm between, or is x itself. What an
    input is made of is read off the jaxpr.

    Raises:
      ValueError: n is not positive, x has a single example, `apply` quantizes no inputs, or no
        layer's input comes from a batch norm alone.
    """
    _check_not_jitted(apply, "apply")
    if not isinstance(n, jax.core.Tracer) and not n > 0:
        raise ValueError(f"n must be positive, got {n!r}")
    return {**variables, **_batch_norm_fit(apply, kwargs)(variables, x, n)}


def search_batch_norm_range(
    apply: Callable,
    variables: Mapping,
    x,
    score: Callable,
    candidates: Iterable[float] = (2, 3, 4, 5, 6, 8, 10, 12),
    **kwargs,
) -> tuple[dict, float]:
    """Returns `calibrate_batch_norm`'s variables for the best n, and that n.

    Args:
      score: score(variables) -> float, higher is better; measured on training data. NaN is worst.
      candidates: the values of n to try; of equals the first wins.

    The other arguments are those of `calibrate_batch_norm`, compiled once for all candidates.

    Raises:
      ValueError: no candidates, and as `calibrate_batch_norm`.
    """
    _check_not_jitted(apply, "apply")
    fit = _batch_norm_fit(apply, kwargs)
    best = None
    for n in candidates:
        if not n > 0:
            raise ValueError(f"n must be positive, got {n!r}")
        fitted = {**variables, **fit(variables, x, float(n))}
        value = float(score(fitted))
        value = -np.inf if np.isnan(value) else value
        if best is None or value > best[0]:
            best = value, fitted, n
    if best is None:
        raise ValueError("search_batch_norm_range needs at least one candidate")
    return best[1:]


def _at_layers(visit):
    """An interceptor that passes the input of every layer through `visit(module, path, x)`."""
    active = set()

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, LAYERS):
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        # A subclass that calls super().__call__ arrives twice; its input counts once.
        if path in active or not (args or "inputs" in kwargs):
            return next_fun(*args, **kwargs)
        _check_no_nn_jit(module)
        if args:
            args = (visit(module, path, args[0]), *args[1:])
        else:
            kwargs = {**kwargs, "inputs": visit(module, path, kwargs["inputs"])}
        active.add(path)
        try:
            return next_fun(*args, **kwargs)
        finally:
            active.discard(path)

    return intercept


def _quantize(quantizer, module, path, x):
    """Quantizes one layer's input, with the state in the layer's own scope."""
    scope, path = module.scope, path or "the model itself"
    x = inputs.as_float(x, module.dtype or module.param_dtype)
    names = dict(zip(COLLECTIONS, jax.eval_shape(quantizer.init, x), strict=True))
    missing = [
        (collection, name)
        for collection in COLLECTIONS
        for name in names[collection]
        if not scope.has_variable(collection, name)
    ]
    key = scope.make_rng(RNG_STREAM) if scope.has_rng(RNG_STREAM) else None
    if not missing:
        state = QuantState(
            *({name: scope.get_variable(c, name) for name in names[c]} for c in COLLECTIONS)
        )
        update = scope.is_mutable_collection(BUFFERS)
        x_hat, state = quantizer.apply(x, state, key=key, update=update)
        if update:
            _write(scope, BUFFERS, state.buffers)
        return x_hat
    frozen = [c for c in COLLECTIONS if names[c] and not scope.is_mutable_collection(c)]
    if len(missing) < sum(map(len, names.values())):
        raise ValueError(
            f"{path}: the input quantizer's state lacks {['/'.join(m) for m in missing]}. Pass on "
            f"both collections, {' and '.join(COLLECTIONS)}, as the fitting call returned them. "
            f"{_LIFTED}"
        )
    if frozen:
        raise ValueError(
            f"{path}: the input quantizer is not fitted, and {' and '.join(frozen)} cannot be "
            "written here. Fit it with `_, quant = apply(variables, batch, mutable="
            f"{list(COLLECTIONS)})`, then call `apply({{**variables, **quant}}, batch)`. {_LIFTED}"
        )
    state = quantizer.init(lax.stop_gradient(x))
    _write(scope, LEARNED, state.learned)
    _write(scope, BUFFERS, state.buffers)
    return quantizer.apply(x, state, key=key, update=False)[0]


def _write(scope, collection, values):
    for name, value in values.items():
        scope.put_variable(collection, name, value)


def _known(variables, quantizers, where):
    """The layers that need not be called for their pattern to count: fitted, or left alone."""
    if not isinstance(variables, Mapping):
        return []

    def keys(collection):
        tree = variables.get(collection)
        return flatten_dict(tree) if isinstance(tree, Mapping) else {}

    fitted = [_layer(key) for collection in COLLECTIONS for key in keys(collection)]
    kernels = [_layer(key) for key in keys("params") if key[-1] == "kernel"]
    return fitted + [path for path in kernels if inputs.choose(quantizers, where, path) is None]


def _layer(key) -> str:
    return "/".join(key[:-1])


def _fit(apply, variables, x, kwargs) -> dict:
    """Returns the collections after one call in which they are mutable.

    Raises:
      ValueError: there are none.
    """
    _, state = apply(variables, x, mutable=list(COLLECTIONS), **kwargs)
    if not state:
        raise ValueError("apply quantizes no inputs: pass what quantize_inputs returned")
    return dict(state)


def _check_not_jitted(fn, name):
    # A compiled function would keep, or lack, what the interceptor does while it is traced.
    if hasattr(fn, "lower"):
        raise ValueError(f"{name} is jitted already: pass the function itself and jit the result")


def _batch_norm_fit(apply, kwargs):
    """Returns the compiled fit(variables, x, n) -> the state of the layers."""

    @jax.jit
    def fit(variables, x, n):
        params = {name: values for name, values in variables.items() if name not in COLLECTIONS}
        seen = {name: variables[name] for name in COLLECTIONS if name in variables}
        seen = seen or _fit(apply, variables, x, kwargs)
        with nn.intercept_methods(_replace_batch_norms(n)):
            fresh = _fit(apply, params, x, kwargs)
        alone = _fed_by_one_batch_norm(apply, {**params, **seen}, x, kwargs)
        if not alone:
            raise ValueError(
                "no layer's input comes from one batch norm alone: there is nothing to fit to"
            )

        def merge(seen, fresh):
            fresh = flatten_dict(fresh)
            return unflatten_dict(
                {
                    key: fresh[key] if _layer(key) in alone else value
                    for key, value in flatten_dict(seen).items()
                }
            )

        return {name: merge(seen[name], fresh[name]) for name in seen}

    return fit


def _check_no_nn_jit(module):
    if any(part.startswith("jit(") for part in module.scope.debug_path):
        raise ValueError(
            f"{'/'.join(module.path)}: nn.jit keeps compiled programs between calls and would mix "
            "up float and quantized ones; take it out of the model and jit the whole function"
        )


def _is_batch_norm(context):
    if context.method_name != "__call__" or not isinstance(context.module, nn.BatchNorm):
        return False
    _check_no_nn_jit(context.module)
    return True


def _replace_batch_norms(n):
    """An interceptor: batch norms give shift + t * |scale|, t from -n to n along the batch."""

    def intercept(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if not _is_batch_norm(context):
            return y
        module = context.module
        axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
        axes = {axis % y.ndim for axis in axes}
        batch = next(axis for axis in range(y.ndim) if axis not in axes)
        if y.shape[batch] < 2:
            raise ValueError(
                f"{'/'.join(module.path)}: the batch norm ranges need at least two examples"
            )

        def param(name, used, default):
            if not used:
                return jnp.full([1] * y.ndim, default, jnp.float32)
            value = nn.meta.unbox(module.scope.get_variable("params", name))
            shape = [size if axis in axes else 1 for axis, size in enumerate(y.shape)]
            return value.astype(jnp.float32).reshape(shape)

        t = n * jnp.linspace(-1, 1, y.shape[batch])
        t = t.reshape([-1 if axis == batch else 1 for axis in range(y.ndim)])
        scale, shift = param("scale", module.use_scale, 1), param("bias", module.use_bias, 0)
        return jnp.broadcast_to(shift + t * jnp.abs(scale), y.shape).astype(y.dtype)

    return intercept


def _fed_by_one_batch_norm(apply, variables, x, kwargs) -> set[str]:
    """Returns the paths of the layers whose input is made of one batch norm's output alone."""
    leaves, treedef = jax.tree.flatten((x, kwargs))
    dynamic = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    count = 0

    def mark_batch_norms(next_fun, args, kwargs, context):
        nonlocal count
        y = next_fun(*args, **kwargs)
        if not _is_batch_norm(context):
            return y
        count += 1  # A batch norm called twice gives two values, and their sum is a sum.
        return lineage.mark(y, f"{count}:{'/'.join(context.module.path)}")

    def look_at_input(module, path, x):
        del module
        return lineage.look(x, path)

    def marked(variables, arrays):
        arrays = iter(arrays)
        x, others = treedef.unflatten(
            [next(arrays) if d else leaf for leaf, d in zip(leaves, dynamic, strict=True)]
        )
        with (
            nn.intercept_methods(mark_batch_norms),
            nn.intercept_methods(_at_layers(look_at_input)),
        ):
            return apply(variables, x, **others)

    arrays = [leaf for leaf, d in zip(leaves, dynamic, strict=True) if d]
    jaxpr = jax.make_jaxpr(marked)(variables, arrays).jaxpr
    sources = [frozenset()] * len(jax.tree.leaves(variables))
    sources += [frozenset({lineage.DATA})] * len(arrays)

    def norm(marks):
        # The path of the only batch norm, whichever of its calls; None for anything else.
        (only,) = marks if len(marks) == 1 else (lineage.DATA,)
        return None if only == lineage.DATA else only.split(":", 1)[1]

    norms = {
        path: {norm(marks) for marks in calls}
        for path, calls in lineage.trace(jaxpr, sources).items()
    }
    return {path for path, found in norms.items() if len(found) == 1 and None not in found}
