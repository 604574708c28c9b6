"""The laws that every quantizer keeps, for quantizers of your own: `check_laws(quantizer)`.

Each law is a function of a quantizer and a tree of params; it raises AssertionError where the law
is broken. `make_params` is the tree that they run on by default. Laws of shardings use all devices
there are; `jax.config.update("jax_num_cpu_devices", 8)` simulates some.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from quantjax.core import paths as paths_lib
from quantjax.core import qarray
from quantjax.core.quantizer import Quantizer, QuantState, owned_paths
from quantjax.encoded import leaves as stored_leaves
from quantjax.encoded import packed as packed_lib
from quantjax.encoded.summary import summary

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
WHOLE = {2, 3, 4, 7, 8, 15, 16, 255, 256}  # levels of ternary, 1, 2, 3, 4, 8 bits
STEPS = 3  # of `update`
OUTSIDE = 1e6  # a weight far off any grid


def make_params(dtype=jnp.float32, seed: int = 0, layers: int = 0) -> dict:
    """Returns a convolution, batch norm and a dense layer; with layers, stacked ones and attention.

    Args:
      dtype: of all leaves.
      seed: of the normal numbers that they hold.
      layers: the leading axis of `Blocks/Dense_0`; 0: no such leaves.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    params = {
        "Conv_0": {"kernel": normal(3, 3, 8, 16), "bias": normal(16)},
        "BatchNorm_0": {"scale": normal(16), "bias": normal(16)},
        "Dense_0": {"kernel": normal(32, 24), "bias": normal(24)},
    }
    if layers:
        del params["Conv_0"]
        params["Blocks"] = {"Dense_0": {"kernel": normal(layers, 16, 8), "bias": normal(layers, 8)}}
        params["Attn"] = {"out": {"kernel": normal(4, 8, 16)}}  # heads, their features, outputs
    return params


def check_laws(quantizer: Quantizer, params=None, *, levels_are_fixed: bool = True) -> None:
    """Checks all laws for a quantizer.

    Args:
      quantizer: whose `init` takes `params`.
      params: a tree of float arrays; None: that of `make_params`, in float32, bfloat16 and float16.
      levels_are_fixed: its levels are numbers of the state, so that applying twice changes nothing
        (law 2); False for gates and the like.

    Raises:
      AssertionError: with the law that is broken.
    """
    trees = [make_params(dtype) for dtype in DTYPES] if params is None else [params]
    for tree in trees:
        law_1_what_you_train_is_what_you_ship(quantizer, tree)
        if levels_are_fixed:
            law_2_applying_twice_changes_nothing(quantizer, tree)
        law_3_the_tree_is_kept(quantizer, tree)
    law_4_gradients_are_finite(quantizer, trees[0])
    with contextlib.suppress(ValueError):  # it may refuse such leaves
        law_4_leaves_of_one_element(quantizer)
    law_4_vmap_over_a_leading_axis(quantizer, trees[0])
    for kind in (AxisType.Auto, AxisType.Explicit):
        law_5_shardings_are_kept(quantizer, trees[0], kind)
    law_6_nbits_is_what_storage_writes(quantizer, trees[0])
    law_7_update_keeps_the_state_and_compiles_once(quantizer, trees[0])


def law_1_what_you_train_is_what_you_ship(
    quantizer: Quantizer, params, *, updates: int = STEPS
) -> None:
    """decode(encode(params, state)) is apply(params, state) bit for bit.

    Asked of half-way weights, too, and again after some updates with what is learned moved.
    """
    key = jax.random.key(0)
    apply, update = jax.jit(quantizer.apply), jax.jit(quantizer.update)
    decode = jax.jit(qarray.decode)
    state = quantizer.init(params, key)

    def check(weights, state, when):
        applied = apply(weights, state)
        decoded = decode(quantizer.encode(weights, state))
        for path, value in _flat(applied).items():
            other = _flat(decoded)[path]
            assert value.dtype == other.dtype, f"law 1: {path} {value.dtype} and {other.dtype}"
            same = _bits(value) == _bits(other)
            assert np.all(same), (
                f"law 1, {when}: {path}: {np.count_nonzero(~same)} of {same.size} weights differ "
                "between apply and decode(encode)"
            )

    check(params, state, "at first")
    check(half_way(apply, params, state), state, "half-way between levels")
    if not updates:
        return
    moved, state = params, _noisy(state)
    for step in range(updates):
        moved = jax.tree.map(lambda leaf: leaf * jnp.asarray(1.25, leaf.dtype), moved)
        state = update(moved, state, key=jax.random.fold_in(key, step))
    check(moved, state, "after updates")
    check(half_way(apply, moved, state), state, "half-way after updates")


def law_2_applying_twice_changes_nothing(quantizer: Quantizer, params) -> None:
    """apply(apply(params)) is apply(params)."""
    state = quantizer.init(params)
    apply = jax.jit(quantizer.apply)
    once = apply(params, state)
    for path, value in _flat(apply(once, state)).items():
        np.testing.assert_array_equal(value, _flat(once)[path], f"law 2: {path}")


def law_3_the_tree_is_kept(quantizer: Quantizer, params) -> None:
    """Structure, shapes and dtypes stay, and leaves that are not owned are the same objects."""
    state = quantizer.init(params)
    flat, mine = _flat(params), owned_paths(state)

    def check(params, state, key):
        applied, leaves = quantizer.apply(params, state, key=key), _flat(params)
        assert jax.tree.structure(applied) == jax.tree.structure(params), "law 3: structure"
        for path, leaf in _flat(applied).items():
            assert path in mine or leaf is leaves[path], f"law 3: {path} is not owned, but moves"
        return applied

    for key in (None, jax.random.key(1)):
        applied = jax.eval_shape(check, params, state, key)
        assert _layout(applied) == _layout(params), "law 3: shapes and dtypes"
    encoded = quantizer.encode(params, state)
    for path, leaf in paths_lib.flatten(encoded, qarray.is_encoded)[0].items():
        assert path in mine or leaf is flat[path], f"law 3: {path} is not owned, but encoded"
        assert leaf.shape == flat[path].shape, f"law 3: {path} has another shape"


def law_4_gradients_are_finite(quantizer: Quantizer, params) -> None:
    """Values and gradients are finite, with a key and without, far off the grid and at zero."""

    @jax.jit
    def run(weights, learned, buffers, key):
        def total(weights, learned, key):
            state = QuantState(learned, buffers)
            applied = quantizer.apply(weights, state, key=key)
            return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(applied))

        grad = jax.value_and_grad(total, argnums=(0, 1))
        return grad(weights, learned, None), grad(weights, learned, key)

    mine = owned_paths(quantizer.init(params))

    def far(path, leaf):
        return leaf.at[(0,) * leaf.ndim].set(OUTSIDE).at[(-1,) * leaf.ndim].set(-OUTSIDE)

    flat, rebuild = paths_lib.flatten(params)
    extremes = {
        "far": rebuild({path: far(path, x) if path in mine else x for path, x in flat.items()}),
        "zero": jax.tree.map(jnp.zeros_like, params),
        "tiny": jax.tree.map(lambda leaf: leaf * 1e-40, params),
    }
    for what, weights in extremes.items():
        for fitted_to in (params, weights):
            found = run(weights, *quantizer.init(fitted_to), jax.random.key(3))
            for leaf in jax.tree.leaves(found):
                assert bool(jnp.all(jnp.isfinite(leaf))), f"law 4: not finite for {what} weights"


def law_4_leaves_of_one_element(quantizer: Quantizer) -> None:
    """A leaf of one element has a value that decodes and a finite gradient."""
    params = {"Dense_0": {"kernel": jnp.full((1, 1), 0.3), "bias": jnp.full((1,), -0.2)}}
    state = quantizer.init(params)
    decoded = qarray.decode(quantizer.encode(params, state))
    grads = jax.grad(lambda p: quantizer.apply(p, state)["Dense_0"]["kernel"].sum())(params)
    for leaf in jax.tree.leaves((decoded, grads)):
        assert bool(jnp.all(jnp.isfinite(leaf))), "law 4: one element"


def law_4_vmap_over_a_leading_axis(quantizer: Quantizer, params) -> None:
    """vmap of apply and of decode over models is each model on its own."""
    several = [jax.tree.map(lambda leaf, s=s: leaf * s, params) for s in (1, -0.5, 3)]
    states = [quantizer.init(params) for params in several]
    encoded = [quantizer.encode(p, s) for p, s in zip(several, states, strict=True)]
    stacked, stacked_state = (_stack(trees) for trees in (several, states))
    applied = jax.jit(jax.vmap(quantizer.apply))(stacked, stacked_state)
    apply = jax.jit(quantizer.apply)
    alone = _stack([apply(p, s) for p, s in zip(several, states, strict=True)])
    jax.tree.map(np.testing.assert_array_equal, applied, alone)
    for decoded in (jax.vmap(qarray.decode)(_stack(encoded)), qarray.decode(_stack(encoded))):
        jax.tree.map(np.testing.assert_array_equal, decoded, applied)


def law_5_shardings_are_kept(
    quantizer: Quantizer, params, kind=AxisType.Explicit, shape: tuple[int, int] | None = None
) -> None:
    """On a mesh the types of params and state stay, and nothing is gathered.

    Values are those on one device. Owned leaves are sharded over their last two axes, or over one
    of them if only that divides.

    Args:
      quantizer, params: as for the other laws.
      kind: of the mesh's axes.
      shape: of the mesh; None: (n / 2, 2) of all n devices, or (1, 1).
    """
    count = jax.device_count()
    shape = shape or ((count // 2, 2) if count % 2 == 0 else (1, 1))
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(kind, kind), devices=devices)

    def spread(leaf):
        places = [None] * leaf.ndim
        for axis, name in zip((-2, -1), ("a", "b"), strict=True):
            if leaf.ndim >= 2 and leaf.shape[axis] % mesh.shape[name] == 0:
                places[axis] = name
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*places)))

    on_mesh = jax.tree.map(spread, params)
    key = jax.random.key(0)
    state, alone = quantizer.init(on_mesh, key), quantizer.init(params, key)
    # Fits that iterate stop elsewhere when sums differ in the last bit (EM by 1e-4 here).
    _close("init", state, alone, 1e-3)
    # The states are not quite those of one device: sums may differ in the last bit.
    copied = jax.tree.map(jnp.asarray, jax.device_get(state))
    for name, fn in _both_passes(quantizer):
        compiled = fn.lower(on_mesh, state, key).compile()
        assert "all-gather" not in compiled.as_text(), f"law 5: {name} gathers"
        found = compiled(on_mesh, state, key)
        like = (on_mesh, on_mesh) if name == "apply" else state
        if kind == AxisType.Explicit:
            assert _types(found) == _types(like), f"law 5: types after {name}"
        elif name == "apply":
            for leaf, old in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
                assert leaf.sharding.is_equivalent_to(old.sharding, old.ndim), "law 5: sharding"
        _close(name, found, fn(params, copied, key))


@functools.lru_cache(maxsize=4)  # both kinds of mesh share the programs of one device
def _both_passes(quantizer):
    def apply(params, state, key):
        return quantizer.apply(params, state), quantizer.apply(params, state, key=key)

    def update(params, state, key):
        return quantizer.update(params, state, key=key)

    return ("apply", jax.jit(apply)), ("update", jax.jit(update))


def law_6_nbits_is_what_storage_writes(quantizer: Quantizer, params) -> None:
    """nbits counts the bytes that a packed leaf takes in a file, which decode to the same leaf."""
    encoded = quantizer.encode(params, quantizer.init(params))
    leaves = jax.tree.leaves(encoded, is_leaf=qarray.is_encoded)
    for leaf in leaves:
        stored = stored_leaves.store(leaf, coding="packed")
        written = 8 * stored.data.nbytes
        assert qarray.nbits(leaf) == written, f"law 6: {qarray.nbits(leaf)}, not {written}"
        back = stored_leaves.restore(stored)
        np.testing.assert_array_equal(*map(qarray.decode, (back, leaf)), err_msg="law 6: decode")
        if qarray.is_encoded(leaf):
            _packed_leaf_is_as_small(leaf)
    smallest = sum(stored_leaves.store(leaf).data.nbytes for leaf in leaves)
    assert summary(encoded).nbytes == smallest, "law 6: summary"


def _packed_leaf_is_as_small(leaf):
    """In memory as in a file, but for rows that fill up a byte, where a byte holds whole codes."""
    found = packed_lib.pack({"leaf": leaf})["leaf"]
    np.testing.assert_array_equal(*map(packed_lib.unpacked, (found, leaf)), "law 6: packed")
    if isinstance(leaf, qarray.MultiBit) or qarray.alphabet(leaf) not in WHOLE:
        return
    rows = leaf.shape[-2] if len(leaf.shape) > 1 else leaf.shape[0]
    levels = qarray.alphabet(leaf)
    per = max(plane.per for plane in packed_lib.planes(levels))
    codes = math.prod(leaf.shape) // rows * -(-rows // per) * per
    padded = qarray.stream_bytes(codes, levels) + found.scales.nbytes
    assert found.nbytes <= padded, f"law 6: {found.nbytes} bytes packed, {padded} in a file"


def law_7_update_keeps_the_state_and_compiles_once(quantizer: Quantizer, params) -> None:
    """update keeps the layout and what is learned; the next step compiles nothing."""
    state = quantizer.init(params)
    after = jax.eval_shape(quantizer.update, params, state, key=jax.random.key(0))
    assert _layout(after) == _layout(state), "law 7: update changes the layout of the state"
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(params, state, key):
        traces.append(None)
        return quantizer.update(params, state, key=key)

    moved = jax.tree.map(jnp.copy, state)
    for step in range(STEPS):
        params = jax.tree.map(lambda leaf: leaf * 1.5, params)
        moved = update(params, moved, jax.random.key(step))
    assert len(traces) == 1, "law 7: update compiles again"
    jax.tree.map(np.testing.assert_array_equal, moved.learned, state.learned)


def half_way(apply, params, state):
    """Returns params, half of each owned leaf's weights on the borders between its levels."""
    values, mine = _flat(apply(params, state)), owned_paths(state)
    flat, rebuild = paths_lib.flatten(params)
    for path in mine:
        levels = np.unique(np.asarray(values[path], np.float64))
        borders = (levels[1:] + levels[:-1]) / 2 if len(levels) > 1 else levels
        leaf = np.asarray(flat[path]).ravel().copy()
        leaf[: leaf.size // 2] = np.resize(borders, leaf.size // 2)
        flat[path] = jnp.asarray(leaf.reshape(flat[path].shape), flat[path].dtype)
    return rebuild(flat)


def _noisy(state: QuantState) -> QuantState:
    """Moves what is learned, as training would: widths change, grids grow and shrink."""
    leaves, treedef = jax.tree.flatten(state.learned)
    rng = np.random.default_rng(7)
    moved = [leaf + jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return state._replace(learned=treedef.unflatten(moved))


def _close(what, found, expected, tolerance=1e-5):
    for (key_path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected), strict=True
    ):
        a, b = (np.asarray(jax.device_get(x)) for x in (a, b))
        if not np.issubdtype(a.dtype, np.inexact) and a.dtype.kind != "V":
            np.testing.assert_array_equal(a, b, f"law 5: {what} {key_path}")
        else:
            a, b = a.astype(np.float64), b.astype(np.float64)
            np.testing.assert_allclose(
                a, b, tolerance, 0.1 * tolerance, err_msg=f"law 5: {what} {key_path}"
            )


def _types(tree):
    return [str(jax.typeof(leaf)) for leaf in jax.tree.leaves(tree)]


def _layout(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def _bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def _flat(tree):
    return paths_lib.flatten(tree)[0]


def _stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
