"""The one interface of all methods: a quantizer is five pure functions over a tree of params."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quantjax.core import checks, meshes
from quantjax.core import paths as paths_lib


class QuantState(NamedTuple):
    """What a quantizer knows about its leaves; a path in either dict marks ownership."""

    learned: dict  # {path: {name: float array}}: what an optimizer trains
    buffers: dict  # {path: {name: array of any dtype}}: ranges, masks, widths, counts


def keep(params, state: QuantState, *, key=None) -> QuantState:
    """The `update` of quantizers whose buffers never move."""
    del params, key
    return state


def no_penalty(state: QuantState, *, key=None):
    """The `penalty` of quantizers that add nothing to the loss."""
    del state, key
    return jnp.zeros((), jnp.float32)  # in x64 mode, too: the loss keeps its dtype


class Quantizer(NamedTuple):
    """Pure functions over a tree of params; `key=None` means deterministic, as deployed."""

    init: Callable  # init(params, key=None) -> QuantState
    apply: Callable  # apply(params, state, *, key=None) -> params
    encode: Callable  # encode(params, state) -> params with Grid, Table or MultiBit leaves
    update: Callable = keep  # update(params, state, *, key=None) -> QuantState
    penalty: Callable = no_penalty  # penalty(state, *, key=None) -> scalar

    def __repr__(self):
        return _made_by(self)


class Scalars(NamedTuple):
    """How what an input quantizer learns reaches x_hat, where it does so by scalars alone."""

    values: Callable  # values(x, learned, buffers) -> tuple of scalars; looks at x's shape alone
    slopes: Callable  # slopes(x, values, buffers) -> d x_hat / d value of each, of x's shape


class InputQuantizer(NamedTuple):
    """Quantizes the inputs of layers; the dicts of its state map a name to an array."""

    init: Callable  # init(x) -> QuantState fitted to this batch
    apply: Callable  # apply(x, state, *, key=None, update=False) -> (x_hat, state)
    scalars: Scalars | None = None  # of apply, and the state it returns; first layers are cheaper

    def __repr__(self):
        return _made_by(self)


HELP = {
    (Quantizer, "init"): "Returns the QuantState of a tree of params.",
    (Quantizer, "apply"): "Returns the params as deployed, or with a key as a training pass has "
    "them; differentiable in params and state.learned.",
    (Quantizer, "encode"): "Returns the params with owned leaves as Grid, Table or MultiBit.",
    (Quantizer, "update"): "Returns the state with its buffers moved; once after every step.",
    (Quantizer, "penalty"): "Returns a scalar to add to the loss.",
    (InputQuantizer, "init"): "Returns the QuantState fitted to a layer's input, one array.",
    (InputQuantizer, "apply"): "Returns the quantized input and the state, moved if `update`.",
}


def described(factory: Callable) -> Callable:
    """Decorates what returns a quantizer: `repr` and `help` then tell how it was made."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        made = factory(*args, **kwargs)
        told = [_told(value) for value in args]
        told += [f"{name}={_told(value)}" for name, value in kwargs.items()]
        text = f"{factory.__name__}({', '.join(told)})"
        fields = {
            name: _named(fn, f"{text}.{name}", HELP[type(made), name])
            for name, fn in made._asdict().items()
            if (type(made), name) in HELP and fn not in (keep, no_penalty)
        }
        return made._replace(**fields)

    return make


def _told(value) -> str:
    """Returns a value as text, arrays by dtype and shape."""
    if not any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value)):
        return repr(value)

    def short(leaf):
        return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else leaf

    return repr(jax.tree.map(short, value))


def _named(fn, name, doc):
    @functools.wraps(fn)
    def named(*args, **kwargs):
        return fn(*args, **kwargs)

    # Compiled programs have the short name: those that are kept on disk are files of that name.
    named.__name__, named.__qualname__ = name.rsplit(".", 1)[-1], name
    named.__doc__ = doc
    return named


def _made_by(quantizer) -> str:
    name, suffix = quantizer.init.__qualname__, ".init"
    if name.endswith(suffix) and "<locals>" not in name:
        return name.removesuffix(suffix)
    return f"{type(quantizer).__name__}(init={name}, ...)"


def weights(path: str, leaf) -> bool:
    """The default selection: kernels and embeddings of two or more dimensions."""
    return paths_lib.is_weight(path) and leaf.ndim >= 2


def leafwise(
    init: Callable,
    apply: Callable,
    encode: Callable,
    update: Callable | None = None,
    penalty: Callable | None = None,
    *,
    biases: bool = False,
    owns: Callable | None = None,
    check: Callable | None = None,
    apply_all: Callable | None = None,
) -> Quantizer:
    """Makes a quantizer from functions of one leaf; everything about trees is done here.

    Args:
      init: (path, leaf, key) -> (learned, buffers), two dicts of arrays.
      apply: (leaf, learned, buffers, key) -> leaf.
      encode: (leaf, learned, buffers) -> encoded leaf, or an array.
      update: (leaf, learned, buffers, key) -> buffers, after every optimizer step.
      penalty: (learned, buffers, key) -> scalar.
      biases: also takes the `bias` beside every owned `kernel`.
      owns: {path: leaf} -> the paths that it takes; None: kernels and embeddings of two or more
        dimensions.
      check: (learned, buffers) raises ValueError for a state that is not this quantizer's, as
        far as its numbers are concrete (`checks.width`).
      apply_all: {path: (leaf, learned, buffers, key)} -> {path: leaf} of those that it takes, with
        the values of `apply`; used where one device is all there is, for methods whose leaves
        compile faster in one program (`pooled`).

    On Explicit meshes init, apply, update and penalty run as on Auto ones, and their results are
    sharded as the leaf and its state are. The quantizer raises ValueError where it owns nothing,
    where an owned leaf is empty, not finite or of a dtype that is no float's, where the state was
    made for another tree or by another quantizer, and where the tree has weights that the state
    does not know.
    """
    if owns is None:
        owns = functools.partial(default_paths, biases=biases)

    def init_tree(params, key=None):
        flat, _ = paths_lib.flatten(params)
        mine = owns(flat)
        if not mine:
            raise ValueError(_nothing(flat))
        learned, buffers = {}, {}
        keys = paths_lib.leaf_keys(key, mine)
        for path in mine:
            leaf = flat[path]
            with at(path):
                _check_leaf(leaf)
                fn = functools.partial(init, path)
                found, buffers[path] = meshes.shaped_as(leaf, fn, leaf, keys[path])
            if found:
                learned[path] = found
        return QuantState(learned, buffers)

    def gather(params, state, key=None):
        """Returns {path: (leaf, learned, buffers, key)}, and what puts leaves in their place."""
        checks.state(state)
        flat, rebuild = paths_lib.flatten(params)
        leaves = paths_lib.restrict(flat, state.buffers)
        unknown = [path for path in owns(flat) if path not in state.buffers]
        if unknown:
            raise ValueError(
                f"the state does not know {unknown}, and they would stay float: make a new state "
                "with `init`, or give such leaves to None in a partition"
            )
        keys = paths_lib.leaf_keys(key, leaves)
        parts = {
            path: (leaf, state.learned.get(path, {}), state.buffers[path], keys[path])
            for path, leaf in leaves.items()
        }
        if check is not None:
            each(parts, lambda leaf, learned, buffers, key: check(learned, buffers))
        return parts, lambda out: rebuild({**flat, **out})

    def each(parts, fn):
        out = {}
        for path, mine in parts.items():
            with at(path):
                out[path] = fn(*mine)
        return out

    def apply_tree(params, state, *, key=None):
        parts, rebuild = gather(params, state, key)
        with_others = apply_all is not None and meshes.one_device(params)
        together = apply_all(parts) if with_others else {}
        alone = {path: mine for path, mine in parts.items() if path not in together}
        out = each(alone, lambda leaf, *mine: meshes.typed_as(leaf, apply, leaf, *mine))
        return rebuild({**together, **out})

    def encode_tree(params, state):
        def one(leaf, learned, buffers, key):
            del key
            checks.finite(leaf)
            return encode(leaf, learned, buffers)

        parts, rebuild = gather(params, state)
        return rebuild(each(parts, one))

    def update_tree(params, state, *, key=None):
        def one(leaf, learned, buffers, key):
            return meshes.typed_as(buffers, update, leaf, learned, buffers, key)

        moved = each(gather(params, state, key)[0], one)
        return state._replace(buffers=moved)

    def penalty_tree(state, *, key=None):
        total = jnp.zeros((), jnp.float32)
        keys = paths_lib.leaf_keys(key, checks.state(state).buffers)
        for path, buffers in state.buffers.items():
            mine = state.learned.get(path, {})
            with at(path):
                total += meshes.typed_as(total, penalty, mine, buffers, keys[path])
        return total

    return Quantizer(
        init_tree,
        apply_tree,
        encode_tree,
        keep if update is None else update_tree,
        no_penalty if penalty is None else penalty_tree,
    )


def inputwise(init: Callable, apply: Callable, check: Callable | None = None) -> InputQuantizer:
    """Makes an input quantizer from pure functions of one array.

    Args:
      init: x -> QuantState.
      apply: (x, state, key, update) -> (x_hat, state); update is True or False.
      check: as in `leafwise`.

    Meshes are met as `leafwise` does. Raises ValueError for anything but one array.
    """
    moving, still = (
        functools.partial(lambda update, x, state, key: apply(x, state, key, update), update)
        for update in (True, False)
    )

    def init_input(x):
        _check_input(x)
        return meshes.shaped_as(x, init, x)

    def apply_input(x, state, *, key=None, update=False):
        _check_input(x)
        checks.state(state)
        with at(None):
            if check is not None:
                check(*state)
            return meshes.typed_as((x, state), moving if update else still, x, state, key)

    return InputQuantizer(init_input, apply_input)


def default_paths(flat: Mapping, biases: bool = False) -> list[str]:
    """Returns the paths that a quantizer owns by default: weights, and on request their biases."""
    owned = [path for path, leaf in flat.items() if weights(path, leaf)]
    if biases:
        kernels = {path[: -len("kernel")] for path in owned if path.endswith("kernel")}
        owned += [
            path for path in flat if path.endswith("bias") and path[: -len("bias")] in kernels
        ]
    return owned


def owned(state: QuantState, params):
    """Returns the tree of bools that says which leaves of `params` a state owns.

    Raises:
      ValueError: the state was made for another tree.
    """
    flat, rebuild = paths_lib.flatten(params)
    mine = paths_lib.restrict(flat, owned_paths(state))
    return rebuild({path: path in mine for path in flat})


def decay_mask(trainable, names: Mapping[str, str] | None = None):
    """Returns True for kernels and embeddings, False for all else, grids included.

    Fits `mask=` of optax's weight decay; under `optax.inject_hyperparams` name that argument in
    `static_args`.

    Args:
      trainable: params, or (params, learned, ...).
      names: {pattern: "kernel" or "embedding"}: further leaves of the params that are weights, as
        in `named`.

    Raises:
      ValueError: nothing in a tree that has leaves is a weight.
    """
    names = dict(names or {})
    paths_lib.check_patterns(names)
    flat, rebuild = paths_lib.flatten(trainable)

    def is_weight(path):
        # In (params, learned, ...) paths begin with the place in the tuple.
        inner = path.split("/", 1)[-1] if path.startswith("0/") else path
        return paths_lib.is_weight(path) or (
            names.get(paths_lib.first_match(names, inner)) in paths_lib.WEIGHT_NAMES
        )

    mask = {path: is_weight(path) for path in flat}
    if flat and not any(mask.values()):
        raise ValueError(
            f"no kernel or embedding to decay among {list(flat)}. Weights of other names: "
            "decay_mask(trainable, names={pattern: 'kernel'}); where another optimizer of an "
            "optax.partition owns all weights, this one needs no decay"
        )
    return rebuild(mask)


def owned_paths(state: QuantState) -> list[str]:
    """Returns the paths that a state owns."""
    return list(dict.fromkeys([*checks.state(state).buffers, *state.learned]))


def restricted(state: QuantState, wanted) -> QuantState:
    """Returns the state of some paths."""
    return QuantState(*({path: part[path] for path in wanted if path in part} for part in state))


@contextlib.contextmanager
def at(path: str | None):
    """Errors inside name the path; a name that the state lacks is another quantizer's state."""
    where = f"{path}: " if path else ""
    try:
        yield
    except KeyError as error:
        raise ValueError(
            f"{where}the state was made by another quantizer, it has no {error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _check_leaf(leaf):
    if not leaf.size:
        raise ValueError(f"an empty leaf, shape {leaf.shape}")
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"quantizers take floats, this leaf is {leaf.dtype}; a partition leaves it out by None"
        )
    checks.finite(leaf)


def _check_input(x):
    if isinstance(x, Mapping) or not hasattr(x, "ndim"):
        raise ValueError(
            f"an InputQuantizer takes one array, the input of a layer, got {type(x).__name__}; "
            "trees of params go to a Quantizer such as uniform, srq or multi_bit"
        )


def _nothing(flat):
    if list(flat) == [""]:
        return "expected a tree of params, got a single array; layer inputs go to InputQuantizers"
    return (
        "nothing to quantize: no leaf of two or more dimensions is named "
        f"{' or '.join(paths_lib.WEIGHT_NAMES)} among {list(flat)}. Leaves of other names: "
        "named({pattern: 'kernel'}, quantizer)"
    )
