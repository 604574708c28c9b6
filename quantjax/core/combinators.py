"""Quantizers made of quantizers: by path, one after the other, and by other names."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from quantjax.core import checks, qarray
from quantjax.core import paths as paths_lib
from quantjax.core.quantizer import (
    Quantizer,
    QuantState,
    at,
    described,
    owned_paths,
    restricted,
)

ROLES = (*paths_lib.WEIGHT_NAMES, "bias")


@described
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
    quantizers = checks.patterns(quantizers, "{pattern: Quantizer or None}")
    for pattern, quantizer in quantizers.items():
        if quantizer is not None:
            with at(f"pattern {pattern!r}"):
                checks.quantizer(quantizer)

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
            if quantizers[pattern] is not None:
                yield pattern, quantizers[pattern], restricted(state, mine)

    def over(params, state, fn):
        """Returns {path: what fn gives}; a member sees all leaves of its pattern."""
        flat, rebuild = paths_lib.flatten(params)
        paths_lib.restrict(flat, owned_paths(state))  # all are there
        out = {}
        for pattern, quantizer, part in members(state):
            leaves = {
                path: leaf
                for path, leaf in flat.items()
                if paths_lib.first_match(quantizers, path) == pattern
            }
            if part.buffers or part.learned:
                out |= fn(quantizer, leaves, part)
            else:
                quantizer.apply(leaves, part)  # raises if there are weights all the same
        return out, lambda: rebuild({**flat, **out})

    def apply(params, state, *, key=None):
        return over(params, state, lambda q, leaves, part: q.apply(leaves, part, key=key))[1]()

    def encode(params, state):
        return over(params, state, lambda q, leaves, part: q.encode(leaves, part))[1]()

    def update(params, state, *, key=None):
        moved, _ = over(
            params, state, lambda q, leaves, part: q.update(leaves, part, key=key).buffers
        )
        return state._replace(buffers={**state.buffers, **moved})

    def penalty(state, *, key=None):
        terms = [quantizer.penalty(part, key=key) for _, quantizer, part in members(state)]
        return sum(terms, start=jnp.zeros((), jnp.float32))

    return Quantizer(init, apply, encode, update, penalty)


@described
def chain(*quantizers: Quantizer) -> Quantizer:
    """Applies quantizers one after the other, e.g. pruning and then a grid.

    The state stays flat: `learned[path] = {"0": {...}, "1": {...}}`; member i gets the key
    `fold_in(key, i)`. A leaf is encoded by the last member that encodes it: after a grid, a mask
    alone leaves codes whose pruned ones are 0.

    Raises:
      ValueError: no members.
    """
    if not quantizers:
        raise ValueError("chain needs at least one quantizer")
    for quantizer in quantizers:
        checks.quantizer(quantizer)

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
        by = {}  # path: the member that encoded it, and its state
        for index, quantizer in enumerate(quantizers):
            mine = member(state, index)
            flat, rebuild_params = paths_lib.flatten(params)
            found = paths_lib.flatten(quantizer.encode(params, mine), qarray.is_encoded)[0]
            for path in owned_paths(mine):
                encoded[path] = found[path]
                if qarray.is_encoded(found[path]):
                    by[path] = quantizer, mine
                elif path in by:
                    values = rebuild_params({**flat, path: found[path]})
                    encoded[path] = encoded_again(*by[path], values, path)
            params = after(params, index, mine)
        return rebuild(encoded)

    def encoded_again(quantizer, mine, params, path):
        """Returns a leaf that a later member moved as an earlier one encodes it, if it can."""
        leaf = paths_lib.flatten(params)[0][path]
        found = paths_lib.flatten(quantizer.encode(params, mine), qarray.is_encoded)[0][path]
        if checks.is_concrete(leaf) and not bool(jnp.all(found.decode() == leaf)):
            return leaf
        return found

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
        return sum(terms, start=jnp.zeros((), jnp.float32))

    return Quantizer(init, apply, encode, update, penalty)


@described
def named(names: Mapping[str, str], quantizer: Quantizer) -> Quantizer:
    """Lets a quantizer take leaves that are not called `kernel` or `embedding`.

    Args:
      names: {pattern: "kernel", "embedding" or "bias"}: what leaves that match count as. To the
        quantizer, its patterns and axes they are children of that name (`Attn/wq/kernel`), so
        that patterns of the path itself match, too; params and state keep the path (`Attn/wq`).
        A `bias` beside one such kernel alone is its bias.
      quantizer: any. `decay_mask(trainable, names)` takes the same names.

    Raises:
      ValueError: no patterns, or other names; at `init`, a pattern that matches nothing or is
        wholly shadowed.
    """
    names = checks.patterns(names, "{pattern: name}")
    checks.quantizer(quantizer)
    if any(name not in ROLES for name in names.values()):
        raise ValueError(f"names must be among {ROLES}, got {names}")

    def renamed(paths: Iterable[str]) -> dict[str, str]:
        """Returns {path: the path that the quantizer sees}."""
        patterns = {path: paths_lib.first_match(names, path) for path in paths}
        roles = {
            path: names.get(pattern, paths_lib.role(path)) for path, pattern in patterns.items()
        }
        new = {path: path for path in patterns}
        kernels = {}
        for path, pattern in patterns.items():
            if pattern is not None and roles[path] in paths_lib.WEIGHT_NAMES:
                new[path] = f"{path}/{roles[path]}"
            if roles[path] == "kernel":
                kernels.setdefault(path.rpartition("/")[0], []).append(path)
        for path, role in roles.items():
            beside = kernels.get(path.rpartition("/")[0], [])
            if role == "bias" and len(beside) == 1:
                kernel = new[beside[0]]
                new[path] = kernel[: -len("kernel")] + "bias"
        return new

    def inner(flat):
        new = renamed(flat)
        return {new[path]: leaf for path, leaf in flat.items()}

    def inner_state(state, paths):
        new = renamed(paths)
        return QuantState(*({new[path]: mine for path, mine in part.items()} for part in state))

    def outer(flat, paths):
        old = {new: path for path, new in renamed(paths).items()}
        return {old[path]: leaf for path, leaf in flat.items()}

    def init(params, key=None):
        flat, _ = paths_lib.flatten(params)
        paths_lib.assign(names, flat)
        return QuantState(*(outer(part, flat) for part in quantizer.init(inner(flat), key)))

    def over(params, state, fn):
        flat, rebuild = paths_lib.flatten(params)
        paths_lib.restrict(flat, owned_paths(state))
        return rebuild(outer(fn(inner(flat), inner_state(state, flat)), flat))

    def apply(params, state, *, key=None):
        return over(params, state, lambda leaves, mine: quantizer.apply(leaves, mine, key=key))

    def encode(params, state):
        return over(params, state, quantizer.encode)

    def update(params, state, *, key=None):
        flat, _ = paths_lib.flatten(params)
        moved = quantizer.update(inner(flat), inner_state(state, flat), key=key)
        return state._replace(buffers=outer(moved.buffers, flat))

    def penalty(state, *, key=None):
        return quantizer.penalty(inner_state(state, owned_paths(state)), key=key)

    return Quantizer(init, apply, encode, update, penalty)
