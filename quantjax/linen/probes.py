"""Which layers one batch norm alone feeds, found by probes.

Every batch norm gives random numbers, one for an example and a channel, and so does every Conv and
Dense layer in place of its output; then some of these numbers change, and it is looked which
inputs of layers move. Nothing of it depends on the weights, so it runs while a program is traced.
"""

import math
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from jax import lax

from quantjax.linen.layers import (
    BUFFERS,
    COLLECTIONS,
    LEARNED,
    around,
    at_layers,
    check_no_nn_jit,
    layer_of,
)

ROUNDS = 4  # new numbers each time: a ReLU or a maximum may hide what moves
NOTHING, MARKED, UNMARKED = range(3)  # which part of the batch norms' numbers changes


def is_batch_norm(context) -> bool:
    """True where a batch norm is called."""
    if context.method_name != "__call__" or not isinstance(context.module, nn.BatchNorm):
        return False
    check_no_nn_jit(context.module)
    return True


def axes_of(module, y) -> tuple[set[int], int]:
    """Returns the feature axes of a batch norm's output, and the axis of the examples."""
    axes = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
    axes = {axis % y.ndim for axis in axes}
    return axes, next(axis for axis in range(y.ndim) if axis not in axes)


def fed_by_one_batch_norm(apply: Callable, variables: Mapping, x, kwargs: Mapping) -> set[str]:
    """Returns the paths of the layers whose input is made of one batch norm's output alone.

    An element of such an input moves with one channel of one call of a batch norm, and neither
    with x (or arrays of kwargs) nor with the output of another layer; a layer called several
    times is fed by the same batch norm each time. Contractions and norms mix channels.

    Args:
      apply: what `quantize_inputs` returned.
      variables: without collections of input quantizers; only shapes and dtypes count.
      x, kwargs: what `apply` takes besides.

    Raises:
      ValueError: `apply` quantizes no inputs.
    """
    norms = {}  # path of a batch norm: its number
    run = _compiled_probe(apply, variables, x, kwargs, norms)

    def probe(data, seeds, which=NOTHING, bit=-1):
        return jax.tree.map(np.asarray, run(data, *seeds, np.int32(which), np.int32(bit)))

    good, bad = {}, {}
    for number in range(ROUNDS):
        given, other, *seeds = (np.uint32(5 * number + i) for i in range(5))
        start = probe(given, seeds)
        if not start:
            raise ValueError("apply quantizes no inputs: pass what quantize_inputs returned")

        def changes(which, bit=-1, data=given, seeds=tuple(seeds), start=start):
            return _changes(start, probe(data, seeds, which, bit))

        for call, changed in changes(NOTHING, data=other).items():
            bad[call] = bad.get(call, False) | changed.any()
        one, two = changes(MARKED), changes(UNMARKED)
        for call in one:
            bad[call] |= (one[call] & two[call]).any()
            good[call] = good.get(call, False) | (one[call] | two[call]).any()
    layers = {}
    for call in good:
        layer = layer_of(call)
        fine = bool(good[call]) and not bool(bad[call])
        layers[layer] = layers.get(layer, True) and fine
    for bit in range((len(norms) - 1).bit_length()):
        one, two = (_by_layer(changes(which, bit)) for which in (MARKED, UNMARKED))
        for layer in layers:
            layers[layer] &= not (one[layer] and two[layer])
    return {layer for layer, alone in layers.items() if alone}


def _changes(start, found):
    """Returns where calls' inputs differ; NaN counts as different, which is the safe side."""
    return {call: start[call] != found[call] for call in start}


def _by_layer(changed) -> dict[str, bool]:
    found = {}
    for call, where in changed.items():
        found[layer_of(call)] = found.get(layer_of(call), False) or bool(where.any())
    return found


def _compiled_probe(apply, variables, x, kwargs, norms):
    """Returns the compiled function (seeds of numbers, what changes) -> {key of a call: input}."""

    def shape_of(leaf):
        array = isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if array else leaf

    def filled(shapes, seed):
        leaves, treedef = jax.tree.flatten(shapes)
        seeds = [_hash(seed, i) for i in range(len(leaves))]
        return treedef.unflatten(
            [
                _random(seed, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
                for seed, leaf in zip(seeds, leaves, strict=True)
            ]
        )

    variables, arguments = jax.tree.map(shape_of, (variables, (x, kwargs)))

    @jax.jit
    def run(data, base, moved, marks, which, bit):
        calls = 0

        def numbers(module, y):
            """What a batch norm gives: base, or moved where it is to change."""
            nonlocal calls
            calls += 1
            path = "/".join(module.path)
            place = norms.setdefault(path, len(norms))
            axes, batch = axes_of(module, y)
            kept = axes | {batch}
            shape = [size if axis in kept else 1 for axis, size in enumerate(y.shape)]
            # Its variables tell the iterations of a scan over layers apart.
            own = [jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(module.variables)]
            mine = lax.bitcast_convert_type(sum(own, start=jnp.zeros(())), jnp.uint32)

            def draw(seed):
                return _uniform(_hash(_hash(mine, calls), seed), shape)

            marked = draw(marks) > 0
            marked = jnp.where(bit < 0, marked, (place >> jnp.maximum(bit, 0)) & 1 == 1)
            change = jnp.where(marked, which == MARKED, which == UNMARKED)
            found = jnp.where(change, 4 * draw(moved), draw(base))
            return jnp.broadcast_to(found, y.shape).astype(y.dtype)

        def replace(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            return numbers(context.module, y) if is_batch_norm(context) else y

        def output(module, path, y, alone):
            del module, alone
            return _random(_hash(data, zlib.crc32(path.encode())), y)

        def look(quantize, module, path, x):
            del quantize, path
            scope = module.scope
            collection = BUFFERS if scope.is_mutable_collection(BUFFERS) else LEARNED
            call = 0
            while scope.has_variable(collection, f"input_{call}"):
                call += 1
            scope.put_variable(collection, f"input_{call}", x)
            return x

        x, others = filled(arguments, data)
        with (
            nn.intercept_methods(replace),
            nn.intercept_methods(at_layers(lambda module, path, x: x, output)),
            around(look),
        ):
            weights = filled(variables, marks)
            _, state = apply(weights, x, mutable=list(COLLECTIONS), **others)
        found = {}
        for part in state.values():
            found |= flatten_dict(dict(part))
        return found

    # Compiled here, it runs at once, even while another program is traced.
    seed, number = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.uint32, jnp.int32))
    return run.lower(seed, seed, seed, seed, number, number).compile()


def _random(seed, like):
    """Returns an array of the shape and dtype of `like` from a seed."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        draw = jax.random.key(seed)
        return jax.random.split(draw, like.shape) if like.shape else draw
    numbers = _uniform(seed, like.shape)
    return (numbers if jnp.issubdtype(like.dtype, jnp.floating) else numbers > 0).astype(like.dtype)


def _uniform(seed, shape):
    """Returns numbers between -2 and 2: a hash, since a true generator takes long to compile."""
    size = math.prod(shape)
    return _hash(lax.iota(jnp.uint32, size), seed).astype(jnp.float32).reshape(shape) / 2**30 - 2


def _hash(x, seed):
    x = x + jnp.uint32(0x9E3779B9) * jnp.asarray(seed, jnp.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x
