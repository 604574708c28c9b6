"""The interceptor: layer inputs on their way through an `InputQuantizer`."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core.scope import in_filter
from flax.linen import dtypes
from flax.traverse_util import flatten_dict
from jax import lax

from quantjax import inputs
from quantjax.core import passes
from quantjax.core.quantizer import QuantState, at
from quantjax.linen import first_layer

LEARNED, BUFFERS = COLLECTIONS = ("quant", "quant_stats")
RNG_STREAM = "quant"
LAYERS = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
# What a layer may compute with in the place of Flax's own, not linear perhaps.
OF_USERS = (
    *("promote_dtype", "dot_general", "dot_general_cls"),
    *("conv_general_dilated", "conv_general_dilated_cls"),
)

_LIFTED = (
    "Inside nn.scan over layers or nn.vmap, variable_axes must name both collections, for instance "
    "variable_axes={'params': 0, 'quant': 0, 'quant_stats': 0}."
)
_IN_TIME = (
    "a loop over time can read the state of an input quantizer, but not make it, and one state per "
    "step would fit sequences of one length alone. Leave the layer out, with {'cell': None, '.*': "
    "...} for a cell of that name; or fit the state with the cell called in a Python loop, where "
    "one grid serves all steps, and let the loop read it: variable_broadcast=('params', 'quant', "
    "'quant_stats'), or update quant_stats by variable_carry"
)
_apart = contextvars.ContextVar("apart", default=False)
_around = contextvars.ContextVar("around", default=lambda quantize, module, path, x: quantize(x))


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
    every call with `quant_stats` mutable. What a layer sees in one pass, one call of `model.apply`,
    counts once, however often it is called there: its range is the union. A collection that would
    be empty does not exist. An rng stream `quant` makes the pass stochastic. Integer inputs are
    first cast to the dtype of the layer.

    Under nn.scan over layers and nn.vmap, `variable_axes` must name both collections; under
    nn.map_variables (nn.WeightNorm) nothing can be written, so that only `init` fits. Recurrent
    cells have one grid for all steps: fitted where the cell is called in a Python loop, read in
    nn.RNN and nn.scan whose `variable_broadcast` names both collections (`variable_carry` with
    `quant_stats` updates it). A step that loss scaling skips leaves all as it was if the loop keeps
    the old `quant_stats`, as it keeps the params: `jnp.where(is_finite, new, old)`.

    Raises:
      ValueError: a quantizer that is none, or a jitted `apply_fn`; in the returned function: a
        pattern that matches no layer or is wholly shadowed (with the paths of the layers), a layer
        that is neither fitted nor mutable (with its path), nn.jit around a layer, a state that
        nn.RNN would have per step, a cell that hides its layers (OptimizedLSTMCell).
    """
    quantizers = inputs.by_pattern(quantizer)
    check_apply(apply_fn, "apply_fn")

    @functools.wraps(apply_fn)
    def apply(*args, **kwargs):
        seen, loops = {}, []  # paths; the recurrent modules around a layer
        names_of = {}  # a quantizer's state has the same names in every layer
        after = {}  # path of a layer being called: what its output goes through
        rngs = kwargs.get("rngs")
        stochastic = isinstance(rngs, Mapping) and RNG_STREAM in rngs

        def takes(path):
            seen[path] = None
            return inputs.choose(quantizers, where, path)

        def visit(module, path, x):
            chosen = takes(path)
            if chosen is None:
                return x
            if stochastic and not module.scope.has_rng(RNG_STREAM):
                raise ValueError(
                    f"{path}: the rng stream {RNG_STREAM!r} does not reach this layer; inside "
                    f"nn.scan or nn.vmap, split_rngs must name it: {{{RNG_STREAM!r}: True}}"
                )
            x = inputs.as_float(x, module.dtype or module.param_dtype)
            quantize = functools.partial(_quantize, chosen, names_of, after, module, path, loops)
            return _around.get()(quantize, module, path, x)

        def leave(module, path, y, alone):
            del module
            finish = after.pop(path, None)
            return finish(y) if finish is not None and alone else y

        with (
            nn.intercept_methods(_at_recurrence(loops, seen, takes)),
            nn.intercept_methods(_at_passes()),
            nn.intercept_methods(at_layers(visit, leave)),
        ):
            out = apply_fn(*args, **kwargs)
        variables = args[0] if args else kwargs.get("variables")
        inputs.check_patterns(quantizers, where, [*seen, *_known(variables, quantizers, where)])
        return out

    return apply


@contextlib.contextmanager
def around(fn: Callable):
    """Inside, fn(quantize, module, path, x) gives what a layer takes, in place of quantize(x)."""
    token = _around.set(fn)
    try:
        yield
    finally:
        _around.reset(token)


@contextlib.contextmanager
def apart():
    """Inside, layers are called as they are: what goes through them has been quantized already."""
    token = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(token)


def check_apply(fn, name):
    """Raises ValueError for a model, a quantizer or a jitted function in place of `model.apply`."""
    if isinstance(fn, nn.Module):
        raise ValueError(f"{name} is the model itself: pass model.apply")
    if any(base.__module__.startswith("flax.nnx") for base in type(fn).__mro__):
        raise ValueError(f"{name} is a model of NNX: it goes to quantjax.nnx")
    if not callable(fn):
        raise ValueError(
            f"{name} must be model.apply or a function that calls it, got {fn!r}; models of NNX go "
            "to quantjax.nnx, quantizers are the second argument"
        )
    # A compiled function would keep, or lack, what the interceptor does while it is traced.
    if hasattr(fn, "lower"):
        raise ValueError(f"{name} is jitted already: pass the function itself and jit the result")


def check_no_nn_jit(module):
    """Raises ValueError, with the module's path, inside of nn.jit."""
    if any(part.startswith("jit(") for part in module.scope.debug_path):
        raise ValueError(
            f"{'/'.join(module.path)}: nn.jit keeps compiled programs between calls and would mix "
            "up float and quantized ones; take it out of the model and jit the whole function"
        )


def of_users(module) -> list[str]:
    """Returns the names of the functions that a layer computes with and that are not Flax's."""
    usual = (None, dtypes.promote_dtype)
    return [name for name in OF_USERS if getattr(module, name, None) not in usual]


def layer_of(key) -> str:
    """Returns the path of the layer that a variable belongs to."""
    return "/".join(key[:-1])


def at_layers(visit, after=lambda module, path, y, alone: y):
    """An interceptor: `visit(module, path, x)` gives every layer's input, `after` its output.

    That gets (module, path, y, alone), the last True where no other interceptor made y.
    """
    active = set()

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        layer = context.method_name == "__call__" and isinstance(module, LAYERS)
        if not layer or _apart.get():
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        # A subclass that calls super().__call__ arrives twice; its input counts once.
        if path in active or not (args or "inputs" in kwargs):
            return next_fun(*args, **kwargs)
        check_no_nn_jit(module)
        if args:
            args = (visit(module, path, args[0]), *args[1:])
        else:
            kwargs = {**kwargs, "inputs": visit(module, path, kwargs["inputs"])}
        active.add(path)
        try:
            alone = next_fun is context.orig_method
            return after(module, path, next_fun(*args, **kwargs), alone)
        finally:
            active.discard(path)

    return intercept


def _at_passes():
    """An interceptor: where a model's outermost call ends, a pass ends for all statistics."""
    depth = 0

    def intercept(next_fun, args, kwargs, context):
        nonlocal depth
        if _apart.get():
            return next_fun(*args, **kwargs)
        depth += 1
        try:
            out = next_fun(*args, **kwargs)
        finally:
            depth -= 1
        scope = context.module.scope
        if depth == 0 and scope is not None and scope.root.is_mutable_collection(BUFFERS):
            variables = scope.root.variables().get(BUFFERS, {})
            _write(scope.root, BUFFERS, passes.end(dict(variables)))
        return out

    return intercept


def _at_recurrence(loops, seen, takes):
    """An interceptor: notes loops over time, and raises where a cell hides its layers."""

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        recurrent = isinstance(module, nn.RNN | nn.RNNCellBase)
        if context.method_name != "__call__" or not recurrent:
            return next_fun(*args, **kwargs)
        path = "/".join(module.path)
        loops.append(module)
        try:
            out = next_fun(*args, **kwargs)
        finally:
            loops.pop()
        inside = [layer for layer in seen if layer.startswith(f"{path}/" if path else "")]
        if isinstance(module, nn.RNNCellBase) and not inside and takes(path) is not None:
            raise ValueError(
                f"{path or 'the model itself'}: {type(module).__name__} multiplies without Dense "
                "layers, and its inputs would stay float. Use nn.LSTMCell, whose params are the "
                f"same, or leave it out with {{{path!r}: None, '.*': ...}}"
            )
        return out

    return intercept


def _quantize(quantizer, names_of, after, module, path, loops, x):
    """Quantizes one layer's input, with the state in the layer's own scope.

    `after[path]` becomes a function of the layer's output, where the quantizer has `scalars`.
    """
    scope, own_path, path = module.scope, path, path or "the model itself"
    if quantizer not in names_of:
        with at(path):
            names_of[quantizer] = dict(
                zip(COLLECTIONS, jax.eval_shape(quantizer.init, x), strict=True)
            )
    names = names_of[quantizer]
    missing = [
        (collection, name)
        for collection in COLLECTIONS
        for name in names[collection]
        if not scope.has_variable(collection, name)
    ]
    _check_loops(loops, path, bool(missing), scope)
    key = scope.make_rng(RNG_STREAM) if scope.has_rng(RNG_STREAM) else None
    if not missing:
        state = QuantState(
            *({name: scope.get_variable(c, name) for name in names[c]} for c in COLLECTIONS)
        )
        update = scope.is_mutable_collection(BUFFERS)
        with at(path):
            x_hat, state = quantizer.apply(x, state, key=key, update=update)
        if update:
            _write(scope, BUFFERS, passes.called(state.buffers))
            if scope.is_mutable_collection(LEARNED):  # fitted again where it is the fitting pass
                _write(scope, LEARNED, state.learned)
        params = None if quantizer.scalars is None else _params(module)
        if params is not None:
            values, slopes = quantizer.scalars
            known = x, x_hat, values(x, *state), state.buffers, params
            after[own_path] = functools.partial(first_layer.output, _layer(module), slopes, *known)
        return x_hat
    frozen = [c for c in COLLECTIONS if names[c] and not scope.is_mutable_collection(c)]
    lifted = f"Inside recurrent cells: {_IN_TIME}." if loops else _LIFTED
    if len(missing) < sum(map(len, names.values())):
        raise ValueError(
            f"{path}: the input quantizer's state lacks {['/'.join(m) for m in missing]}. Pass on "
            f"both collections, {' and '.join(COLLECTIONS)}, as the fitting call of this quantizer "
            f"returned them. {lifted}"
        )
    if frozen:
        raise ValueError(
            f"{path}: the input quantizer is not fitted, and {' and '.join(frozen)} cannot be "
            "written here. Fit it with `_, quant = apply(variables, batch, mutable="
            f"{list(COLLECTIONS)})`, then call `apply({{**variables, **quant}}, batch)`. {lifted}"
        )
    with at(path):
        state = quantizer.init(lax.stop_gradient(x))
    _write(scope, LEARNED, state.learned)
    _write(scope, BUFFERS, passes.called(state.buffers, fitting=True))
    return quantizer.apply(x, state, key=key, update=False)[0]


def _params(module):
    """Returns the kernel and perhaps the bias of a layer that is linear in them, or None."""
    if type(module) not in LAYERS or of_users(module) or getattr(module, "mask", None) is not None:
        return None
    params = {}
    for name in ("kernel", "bias") if module.use_bias else ("kernel",):
        # In a box (nn.with_partitioning) lies one array, in what is encoded or packed more.
        leaves = jax.tree.leaves(module.scope.get_variable("params", name))
        if len(leaves) != 1 or not jnp.issubdtype(leaves[0].dtype, jnp.floating):
            return None
        params[name] = leaves[0]
    return params


def _layer(module):
    """Returns (params, x) -> y, a layer with a bias where there is one."""
    free = module.clone(parent=None, name=None)

    def layer(params, x):
        with apart():
            return free.clone(use_bias="bias" in params).apply({"params": params}, x)

    return layer


def _check_loops(loops, path, missing, scope):
    """Raises ValueError where a loop over time would make a state, or has one for every step."""
    for loop in loops:
        if not isinstance(loop, nn.RNN):
            around_cell = scope.debug_path[max(0, len(loop.path) - 1) :]
            if missing and any(part.startswith("scan(") for part in around_cell):
                raise ValueError(f"{path}: {_IN_TIME}")
            continue
        stepwise = any(
            in_filter(names, collection) and axis is not None
            for names, axis in loop.variable_axes.items()
            for collection in COLLECTIONS
        )
        if missing or stepwise:
            raise ValueError(f"{path}: {_IN_TIME}")
        broadcast = in_filter(loop.variable_broadcast, BUFFERS)
        if broadcast and scope.is_mutable_collection(BUFFERS):
            raise ValueError(
                f"{path}: nn.RNN reads this state by variable_broadcast and cannot update it. Keep "
                "quant_stats out of `mutable`, or name it in variable_carry instead"
            )


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

    fitted = [layer_of(key) for collection in COLLECTIONS for key in keys(collection)]
    kernels = [layer_of(key) for key in keys("params") if key[-1] == "kernel"]
    return fitted + [path for path in kernels if inputs.choose(quantizers, where, path) is None]
