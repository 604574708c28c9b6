"""Any quantizer, layer by layer, where one leaf holds several layers."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantjax.core import checks, meshes, qarray
from quantjax.core import paths as paths_lib
from quantjax.core.quantizer import (
    Quantizer,
    QuantState,
    described,
    owned_paths,
    restricted,
)


@described
def stacked(quantizer: Quantizer, axes: Mapping[str, int]) -> Quantizer:
    """Quantizes layer by layer where leaves hold several layers, as nn.scan and nnx.vmap make them.

    Each layer has its own grid, mixture, width, density and masks: every array of the state has
    the leading axes of its leaf. Leaves that match no pattern are quantized as they are. What a
    quantizer does over several leaves at once (`magnitude(across=True)`) it does within a layer.

    Args:
      quantizer: any; it sees leaves without their leading axes.
      axes: {pattern: how many leading axes count layers}, the first match wins.

    `encode` gives leaves stacked again; of learned widths, all have codes of the widest one.

    Raises:
      ValueError: no patterns, or numbers below 0; at `init`, a pattern that matches nothing or is
        wholly shadowed, a leaf that has fewer axes.
    """
    checks.quantizer(quantizer)
    axes = checks.patterns(axes, "{pattern: leading axes}")
    axes = {pattern: checks.whole(f"axes of {pattern!r}", n, 0) for pattern, n in axes.items()}

    def depth(path):
        pattern = paths_lib.first_match(axes, path)
        return 0 if pattern is None else axes[pattern]

    def init(params, key=None):
        flat, _ = paths_lib.flatten(params)
        paths_lib.assign(axes, flat)
        groups = _groups(flat, depth)
        states = {lead: [] for lead in groups}
        for i in range(max(map(math.prod, groups))):
            # The whole tree: patterns of a partition may be about leaves of any depth.
            tree = {}
            for lead, paths in groups.items():
                at = _place(min(i, math.prod(lead) - 1), lead)
                tree |= {path: meshes.part(flat[path], at) for path in paths}
            state = quantizer.init(tree, None if key is None else jax.random.fold_in(key, i))
            for lead, paths in groups.items():
                if i < math.prod(lead):
                    states[lead].append(restricted(state, paths))
        learned, buffers = {}, {}
        for lead, parts in states.items():
            joined = jax.tree.map(lambda *arrays, lead=lead: _stack(arrays, lead), *parts)
            learned |= joined.learned
            buffers |= joined.buffers
        return QuantState(learned, buffers)

    @functools.cache
    def applied(lead):
        return _vmapped(lambda leaves, state, key: quantizer.apply(leaves, state, key=key), lead)

    @functools.cache
    def updated(lead):
        def one(leaves, state, key):
            return quantizer.update(leaves, state, key=key).buffers

        return _in_turn(one, lead)

    def over(params, state, fn):
        """Returns {path: what fn gives}, group by group, and how to rebuild the tree."""
        flat, rebuild = paths_lib.flatten(params)
        paths_lib.restrict(flat, owned_paths(state))
        out = {}
        for lead, paths in _groups(flat, depth).items():
            leaves = {path: flat[path] for path in paths}
            part = restricted(state, paths)
            if not (part.buffers or part.learned):
                first = {path: meshes.part(leaf, (0,) * len(lead)) for path, leaf in leaves.items()}
                quantizer.apply(first, part)  # raises if there are weights all the same
                continue
            found = fn(lead, leaves, part)
            out |= {path: found[path] for path in owned_paths(part)}
        return out, lambda: rebuild({**flat, **out})

    def apply(params, state, *, key=None):
        def one(lead, leaves, part):
            fn = applied(lead)
            return meshes.typed_as(leaves, fn, leaves, part, _keys(key, lead))

        return over(params, state, one)[1]()

    def update(params, state, *, key=None):
        def one(lead, leaves, part):
            fn = updated(lead)
            return meshes.typed_as(part.buffers, fn, leaves, part, _keys(key, lead))

        return state._replace(buffers=over(params, state, one)[0])

    def encode(params, state):
        def one(lead, leaves, part):
            layers = []
            for i in range(math.prod(lead)):
                at = _place(i, lead)
                mine = jax.tree.map(lambda leaf, at=at: meshes.part(leaf, at), (leaves, part))
                layers.append(paths_lib.flatten(quantizer.encode(*mine), qarray.is_encoded)[0])
            return {
                path: _stack_encoded([layer[path] for layer in layers], lead)
                for path in owned_paths(part)
            }

        return over(params, state, one)[1]()

    def penalty(state, *, key=None):
        total = jnp.zeros((), jnp.float32)
        firsts = {
            path: jax.tree.leaves((state.learned.get(path), state.buffers.get(path)))[:1]
            for path in owned_paths(state)
        }
        arrays = {path: found[0] for path, found in firsts.items() if found}
        for lead, paths in _groups(arrays, depth).items():
            fn = _vmapped(lambda state, key: quantizer.penalty(state, key=key), lead)
            total += jnp.sum(fn(restricted(state, paths), _keys(key, lead)))
        return total

    return Quantizer(init, apply, encode, update, penalty)


def _groups(flat, depth):
    """Returns {leading shape: paths}: what is mapped together."""
    groups = {}
    for path, leaf in flat.items():
        if leaf.ndim < depth(path):
            raise ValueError(f"{path}: {depth(path)} leading axes, but shape {leaf.shape}")
        groups.setdefault(leaf.shape[: depth(path)], []).append(path)
    return groups


def _place(i, lead):
    return tuple(int(index) for index in np.unravel_index(i, lead)) if lead else ()


def _keys(key, lead):
    """Returns a key per layer, [*lead]; the key itself where there is one layer alone."""
    if key is None or not lead:
        return key
    numbers = jnp.arange(math.prod(lead), dtype=jnp.uint32).reshape(lead)
    return _vmapped(lambda number: jax.random.fold_in(key, number), lead)(numbers)


def _vmapped(fn, lead):
    for _ in lead:
        fn = jax.vmap(fn)
    return fn


def _in_turn(fn, lead):
    """Maps fn one layer after the other: vmap would run both branches of every cond."""
    for _ in lead:
        fn = functools.partial(lambda inner, *args: lax.map(lambda a: inner(*a), args), fn)
    return fn


def _stack(arrays, lead):
    return jnp.stack(arrays).reshape(lead + jnp.shape(arrays[0])) if lead else arrays[0]


def _stack_encoded(layers, lead):
    first = layers[0]
    if not qarray.is_encoded(first):
        return _stack(layers, lead)
    if "bits" in {field.name for field in dataclasses.fields(first)}:
        widest = {"bits": max(layer.bits for layer in layers)}
        if isinstance(first, qarray.Grid):
            widest["levels"] = max(layer.levels for layer in layers)
        layers = [dataclasses.replace(layer, **widest) for layer in layers]
    return jax.tree.map(lambda *arrays: _stack(arrays, lead), *layers)
