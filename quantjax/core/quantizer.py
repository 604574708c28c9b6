"""The one interface of all methods: a quantizer is five pure functions over a tree of params."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    return jnp.zeros(())


class Quantizer(NamedTuple):
    """Pure functions over a tree of params; `key=None` means deterministic, as deployed."""

    init: Callable  # init(params, key=None) -> QuantState
    apply: Callable  # apply(params, state, *, key=None) -> params
    encode: Callable  # encode(params, state) -> params with Grid, Table or MultiBit leaves
    update: Callable = keep  # update(params, state, *, key=None) -> QuantState
    penalty: Callable = no_penalty  # penalty(state, *, key=None) -> scalar


class InputQuantizer(NamedTuple):
    """Quantizes the inputs of layers; the dicts of its state map a name to an array."""

    init: Callable  # init(x) -> QuantState fitted to this batch
    apply: Callable  # apply(x, state, *, key=None, update=False) -> (x_hat, state)


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
) -> Quantizer:
    """Makes a quantizer from functions of one leaf; everything about trees is done here.

    Args:
      init: (path, leaf, key) -> (learned, buffers), two dicts of arrays.
      apply: (leaf, learned, buffers, key) -> leaf.
      encode: (leaf, learned, buffers) -> encoded leaf, or an array.
      update: (leaf, learned, buffers, key) -> buffers, after every optimizer step.
      penalty: (learned, buffers, key) -> scalar.
      biases: also takes the `bias` beside every owned `kernel`.

    The quantizer raises ValueError where it owns nothing, where an owned leaf is empty, where the
    state was made for another tree, and where a leaf to encode is not finite.
    """

    def init_tree(params, key=None):
        flat, _ = paths_lib.flatten(params)
        learned, buffers = {}, {}
        for path in select(flat, biases):
            if not flat[path].size:
                raise ValueError(f"{path}: an empty leaf, shape {flat[path].shape}")
            try:
                mine, buffers[path] = init(path, flat[path], paths_lib.leaf_key(key, path))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if mine:
                learned[path] = mine
        return QuantState(learned, buffers)

    def over(params, state, fn):
        flat, rebuild = paths_lib.flatten(params)
        owned_leaves = paths_lib.restrict(flat, state.buffers)
        out = {}
        for path, leaf in owned_leaves.items():
            try:
                out[path] = fn(path, leaf, state.learned.get(path, {}), state.buffers[path])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        return out, lambda: rebuild({**flat, **out})

    def apply_tree(params, state, *, key=None):
        def one(path, leaf, mine, buffers):
            return apply(leaf, mine, buffers, paths_lib.leaf_key(key, path))

        return over(params, state, one)[1]()

    def encode_tree(params, state):
        def one(path, leaf, mine, buffers):
            del path
            check_finite(leaf)
            return encode(leaf, mine, buffers)

        return over(params, state, one)[1]()

    def update_tree(params, state, *, key=None):
        def one(path, leaf, mine, buffers):
            return update(leaf, mine, buffers, paths_lib.leaf_key(key, path))

        return state._replace(buffers=over(params, state, one)[0])

    def penalty_tree(state, *, key=None):
        terms = [
            penalty(state.learned.get(path, {}), buffers, paths_lib.leaf_key(key, path))
            for path, buffers in state.buffers.items()
        ]
        return sum(terms, start=jnp.zeros(()))

    return Quantizer(
        init_tree,
        apply_tree,
        encode_tree,
        keep if update is None else update_tree,
        no_penalty if penalty is None else penalty_tree,
    )


def select(flat: Mapping, biases: bool) -> list[str]:
    """Returns the paths that a quantizer owns by default.

    Raises:
      ValueError: there are none.
    """
    owned_paths = [path for path, leaf in flat.items() if weights(path, leaf)]
    if biases:
        kernels = {path[: -len("kernel")] for path in owned_paths if path.endswith("kernel")}
        owned_paths += [
            path for path in flat if path.endswith("bias") and path[: -len("bias")] in kernels
        ]
    if not owned_paths:
        raise ValueError(
            "nothing to quantize: no leaf of two or more dimensions is named "
            f"{' or '.join(paths_lib.WEIGHT_NAMES)} among {list(flat)}"
        )
    return owned_paths


def check_finite(leaf):
    """Raises ValueError if a concrete leaf holds NaN or infinity."""
    if isinstance(leaf, jax.core.Tracer):
        return
    bad = int(np.count_nonzero(~np.isfinite(np.asarray(leaf, np.float64))))
    if bad:
        raise ValueError(f"{bad} of {leaf.size} values are NaN or infinite")


def partition(quantizers: Mapping[str, Quantizer | None]) -> Quantizer:
    """Gives each leaf to the quantizer of the first pattern that matches its path.

    Args:
      quantizers: {regex: Quantizer, or None for leaves that stay as they are}. A regex must match
        from the start of the path up to a `/` or its end: `Conv_1` takes neither `Conv_10/kernel`
        nor `Block_0/Conv_1/kernel`.

    Raises:
      ValueError: no patterns, or one that is no regex; at `init`, a pattern that matches nothing,
        is wholly shadowed, or whose quantizer owns none of its leaves.
    """
    quantizers = dict(quantizers)
    if not quantizers:
        raise ValueError("partition needs at least one pattern")
    paths_lib.check_patterns(quantizers)

    def init(params, key=None):
        flat, _ = paths_lib.flatten(params)
        learned, buffers = {}, {}
        for pattern, mine in paths_lib.assign(quantizers, flat).items():
            quantizer = quantizers[pattern]
            if quantizer is None:
                continue
            try:
                state = quantizer.init({path: flat[path] for path in mine}, key)
            except ValueError as error:
                raise ValueError(f"pattern {pattern!r}: {error}") from error
            learned |= state.learned
            buffers |= state.buffers
        return QuantState(learned, buffers)

    def members(state):
        taken = {pattern: [] for pattern in quantizers}
        for path in owned_paths(state):
            pattern = paths_lib.first_match(quantizers, path)
            if quantizers.get(pattern) is None:
                raise ValueError(
                    f"the state was made by another quantizer: {path} is nobody's here"
                )
            taken[pattern].append(path)
        for pattern, mine in taken.items():
            if mine:
                yield quantizers[pattern], _pick(state, mine), mine

    def over(params, state, fn):
        flat, rebuild = paths_lib.flatten(params)
        out = dict(flat)
        for quantizer, part, mine in members(state):
            out |= fn(quantizer, paths_lib.restrict(flat, mine), part)
        return rebuild(out)

    def apply(params, state, *, key=None):
        return over(params, state, lambda q, leaves, part: q.apply(leaves, part, key=key))

    def encode(params, state):
        return over(params, state, lambda q, leaves, part: q.encode(leaves, part))

    def update(params, state, *, key=None):
        flat, _ = paths_lib.flatten(params)
        buffers = dict(state.buffers)
        for quantizer, part, mine in members(state):
            leaves = paths_lib.restrict(flat, mine)
            buffers |= quantizer.update(leaves, part, key=key).buffers
        return state._replace(buffers=buffers)

    def penalty(state, *, key=None):
        terms = [quantizer.penalty(part, key=key) for quantizer, part, _ in members(state)]
        return sum(terms, start=jnp.zeros(()))

    return Quantizer(init, apply, encode, update, penalty)


def chain(*quantizers: Quantizer) -> Quantizer:
    """Applies quantizers one after the other, e.g. pruning and then a grid.

    The state stays flat: `learned[path] = {"0": {...}, "1": {...}}`; member i gets the key
    `fold_in(key, i)`. A leaf is encoded by the last member that owns it.

    Raises:
      ValueError: no members.
    """
    if not quantizers:
        raise ValueError("chain needs at least one quantizer")

    names = [str(index) for index in range(len(quantizers))]

    def member(state, index):
        name = names[index]
        for part in state:
            for path, values in part.items():
                if not set(values) <= set(names):
                    raise ValueError(
                        f"the state was made by another quantizer: {path} has {sorted(values)}, "
                        f"not members {names}"
                    )
        return QuantState(
            *({path: d[name] for path, d in part.items() if name in d} for part in state)
        )

    def after(params, index, mine):
        """Returns what the next member sees: what is deployed, so without a key."""
        last = index == len(quantizers) - 1
        return params if last else quantizers[index].apply(params, mine)

    def member_key(key, index):
        return None if key is None else jax.random.fold_in(key, index)

    def init(params, key=None):
        state = QuantState({}, {})
        for index, quantizer in enumerate(quantizers):
            mine = quantizer.init(params, member_key(key, index))
            for whole, part in zip(state, mine, strict=True):
                for path, values in part.items():
                    whole.setdefault(path, {})[str(index)] = values
            params = after(params, index, mine)
        return state

    def apply(params, state, *, key=None):
        for index, quantizer in enumerate(quantizers):
            params = quantizer.apply(params, member(state, index), key=member_key(key, index))
        return params

    def encode(params, state):
        encoded, rebuild = paths_lib.flatten(params)
        for index, quantizer in enumerate(quantizers):
            mine = member(state, index)
            flat, _ = paths_lib.flatten(params)
            leaves = paths_lib.restrict(flat, owned_paths(mine))
            encoded |= quantizer.encode(leaves, mine)
            params = after(params, index, mine)
        return rebuild(encoded)

    def update(params, state, *, key=None):
        buffers = {path: dict(members) for path, members in state.buffers.items()}
        for index, quantizer in enumerate(quantizers):
            mine = quantizer.update(params, member(state, index), key=member_key(key, index))
            for path, values in mine.buffers.items():
                buffers[path][str(index)] = values
            params = after(params, index, mine)
        return state._replace(buffers=buffers)

    def penalty(state, *, key=None):
        terms = [
            quantizer.penalty(member(state, index), key=member_key(key, index))
            for index, quantizer in enumerate(quantizers)
        ]
        return sum(terms, start=jnp.zeros(()))

    return Quantizer(init, apply, encode, update, penalty)


def owned(state: QuantState, params):
    """Returns the tree of bools that says which leaves of `params` a state owns.

    Raises:
      ValueError: the state was made for another tree.
    """
    flat, rebuild = paths_lib.flatten(params)
    mine = paths_lib.restrict(flat, owned_paths(state))
    return rebuild({path: path in mine for path in flat})


def decay_mask(trainable):
    """Returns True for kernels and embeddings, False for all else, grids included.

    Fits `mask=` of optax's weight decay; under `optax.inject_hyperparams` name that argument in
    `static_args`.

    Raises:
      ValueError: nothing in a tree that has leaves is a kernel or an embedding.
    """
    flat, rebuild = paths_lib.flatten(trainable)
    mask = {path: paths_lib.is_weight(path) for path in flat}
    if flat and not any(mask.values()):
        raise ValueError(f"no kernel or embedding to decay among {list(flat)}")
    return rebuild(mask)


def owned_paths(state: QuantState) -> list[str]:
    """Returns the paths that a state owns."""
    return list(dict.fromkeys([*state.buffers, *state.learned]))


def _pick(state: QuantState, wanted) -> QuantState:
    return QuantState(*({path: part[path] for path in wanted if path in part} for part in state))
