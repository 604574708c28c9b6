"""ALQ's steps against the authors' corrected code, one step at a time (its README: layouts)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.methods.alq import steps
from quantjax.methods.alq.multibit import from_multi_bit
from quantjax.methods.amsgrad import Moments
from tests import quick
from tests.methods import golden

LAYERS = ("convK", "convP", "convC", "fc1", "fc2")
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
TIED = {"float64": 1e-9, "float32": 3e-6}  # distances that differ by less are equal
ILL = 1e4  # beyond this condition number coordinates are not comparable, only weights


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    with jax.enable_x64(True):
        yield request.param


@functools.cache
def load():
    files = golden.load("alq_steps_inputs.npz"), golden.load("alq_steps_f64.npz")
    return tuple(_read(file) for file in files)


def _read(file):
    with file:
        return dict(file)


class Arrays:
    """The arrays of one sequence at one width."""

    def __init__(self, sequence, bits, dtype):
        self.inputs, self.arrays = load()
        self.sequence, self.prefix, self.dtype = sequence, f"{sequence}.mb{bits}", dtype
        self.modes = list(self.inputs[f"modes.{sequence}"])
        self.rate = float(self.inputs[f"lr.{sequence}"])
        self.decay = float(self.inputs[f"weight_decay.{sequence}"])

    def of(self, layer, name):
        return self.arrays[f"{self.prefix}.{layer}.{name}"]

    def state(self, layer, k):
        """The leaf, its moments and gradient before step k + 1, slots in the golden order."""
        basis, shape = self.of(layer, "B")[k], self.inputs[f"w.{layer}"].shape
        mask = self.of(layer, "mask")[k]
        basis = np.where(np.broadcast_to(mask, basis.shape), basis, 1)
        alpha = np.where(mask, self.of(layer, "alpha")[k], 0)

        def moments(suffix, zero):
            names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            return [self.of(layer, n + suffix)[k - 1] if k else zero for n in names]

        # A masked slot has no moments in the library.
        coords = [
            group(layer, np.where(mask, part, 0))
            for part in (alpha, *moments("_alpha", np.zeros(mask.shape)))
        ]
        alpha, *of_coords = (jnp.asarray(part, self.dtype) for part in coords)
        of_weights = [jnp.asarray(x, self.dtype) for x in moments("", np.zeros(shape))]
        mb = qj.MultiBit(
            jnp.asarray(view(layer, basis), jnp.int8),
            alpha,
            jnp.asarray(group(layer, mask)),
            np.dtype(self.dtype),
            2 if layer == "fc2" else 1,
        )
        mine = steps.AlqMoments(jnp.int32(k), Moments(*of_weights), Moments(*of_coords))
        return mb, mine, jnp.asarray(self.inputs[f"grad.{layer}"][k % 10], self.dtype)


def view(layer, basis):
    """[*groups, K, n] in the golden order to [*view, K] in torch's layout."""
    o, _, count, _ = basis.shape
    if layer == "convK":
        return basis.transpose(0, 1, 3, 2).reshape(o, -1, 3, 3, count)
    if layer == "convP":
        return basis.transpose(0, 3, 1, 2).reshape(o, -1, 3, 3, count)
    if layer == "convC":
        return basis[:, 0].transpose(0, 2, 1).reshape(o, -1, 3, 3, count)
    basis = basis.transpose(0, 1, 3, 2)
    return basis[:, 0] if layer == "fc1" else basis


def group(layer, coords):
    """[*groups, K, 1] in the golden order to [*group, K]."""
    coords = coords[..., 0]
    o, _, count = coords.shape
    if layer == "convK":
        return coords[:, :, None, None]
    if layer == "convP":
        return coords.reshape(o, 1, 3, 3, count)
    if layer == "convC":
        return coords.reshape(o, 1, 1, 1, count)
    return coords if layer == "fc1" else coords[:, :, None]


def close(actual, desired, dtype, scale=None):
    desired = np.asarray(desired, np.float64)
    scale = np.max(np.abs(desired), initial=1e-30) if scale is None else scale
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), desired, rtol=0, atol=TOLERANCE[dtype] * scale
    )


def by_size(mb, *parts):
    """Slots ordered by coordinate, the masked ones last."""
    key = np.where(np.asarray(mb.mask), np.asarray(mb.coords), np.inf)
    order = np.argsort(key, axis=-1, kind="stable")
    return [np.take_along_axis(np.asarray(part), order, axis=-1) for part in parts]


def clear_groups(arrays, layer, k):
    """False for groups in which two sums are equally near to a target: rounding chooses bases."""
    mb, moments, grad = arrays.state(layer, k)
    decoded = arrays.of(layer, "w_FP" if arrays.modes[k] == "ste" else "w_hat")[k]
    grad = np.asarray(grad, np.float64)
    mean, square, largest = (np.asarray(part, np.float64) for part in moments.weights)
    mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
    metric = (np.sqrt(np.maximum(largest, square)) + 1e-8) / np.sqrt(1 - 0.999 ** (k + 1))
    step = arrays.rate / (1 - 0.9 ** (k + 1)) * mean / metric
    target = (decoded - step).reshape(mb.basis.shape[:-1])
    coords, mask = np.asarray(mb.coords, np.float64), np.asarray(mb.mask)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=mask.shape[-1])))
    # One candidate for every choice of the kept slots.
    sums = np.where(np.all(mask[..., None, :] | (signs > 0), -1), coords @ signs.T, np.inf)
    two = np.sort(np.abs(target[..., None] - sums), axis=-1)[..., :2]
    near = two[..., 1] - two[..., 0] < TIED[arrays.dtype] * np.abs(decoded).max()
    axes = tuple(axis for axis, n in enumerate(coords.shape[:-1]) if n == 1)
    return ~near.any(axis=axes, keepdims=True)


def check(arrays, layer, k, mb, moments):
    """Compares the leaf and its moments after step k with the golden ones."""
    expected, golden_moments, _ = arrays.state(layer, k)
    mode = arrays.modes[k - 1]
    mb.validate()
    clear = np.ones(mb.mask.shape[:-1], bool)
    if mode in ("basis", "ste"):
        clear = clear_groups(arrays, layer, k - 1)
        assert clear.mean() > 0.3  # the tiny groups' sums coincide
    golden_values = arrays.of(layer, "w_hat")[k]
    close(decode(expected), golden_values, arrays.dtype)
    compared = np.broadcast_to(clear, mb.basis.shape[:-1]).reshape(golden_values.shape)
    scale = np.max(np.abs(golden_values))
    close(np.asarray(decode(mb))[compared], golden_values[compared], arrays.dtype, scale)
    for part, other in zip(moments.weights, golden_moments.weights, strict=True):
        close(part, other, arrays.dtype)
    name = f"{arrays.prefix}.{layer}.cond.s{k}"
    if mode != "prune" and name in arrays.arrays:
        clear = clear & (group(layer, arrays.arrays[name][..., None, None])[..., 0] < ILL)
    mine = by_size(mb, mb.mask, mb.coords, *moments.coords)
    theirs = by_size(expected, expected.mask, expected.coords, *golden_moments.coords)
    for part, other in zip(mine, theirs, strict=True):
        close(part[clear], other[clear], arrays.dtype, np.abs(other).max())


decode = quick.jit(qj.decode)
keep_largest = quick.jit(steps.keep_largest)


@quick.jit
def increments(coords, moments, count, rate):
    slope, metric = steps.amsgrad.model(moments, count, rate, 0.9, 0.999, 1e-8)
    return steps.increments(coords, slope, metric)


@functools.cache
def jitted(name, **fixed):
    return quick.jit(functools.partial(getattr(steps, name), **fixed))


def one_step(arrays, layer, k):
    mb, moments, grad = arrays.state(layer, k)
    if arrays.modes[k] == "basis":
        return jitted("basis_step")(mb, grad, moments, learning_rate=arrays.rate)
    step = jitted("coordinate_step")
    return step(mb, grad, moments, learning_rate=arrays.rate, weight_decay=arrays.decay)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("sequence", ["basis_lr1e-3", "basis_lr5e-2", "coord_lr1e-3", "coord_wd"])
@pytest.mark.parametrize("layer", LAYERS)
def test_basis_and_coordinate_steps(layer, sequence, bits, dtype):
    arrays = Arrays(sequence, bits, dtype)
    for k in range(3):
        check(arrays, layer, k + 1, *one_step(arrays, layer, k))


@pytest.mark.parametrize("sequence", ["cycle", "cycle2"])
@pytest.mark.parametrize("layer", LAYERS)
def test_moments_are_carried_across_phases(layer, sequence, dtype):
    arrays = Arrays(sequence, 6, dtype)
    for k, mode in enumerate(arrays.modes):
        if mode != "prune":
            check(arrays, layer, k + 1, *one_step(arrays, layer, k))


@pytest.mark.parametrize("sequence", ["prune", "cycle"])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_prune_steps(bits, sequence, dtype):
    arrays = Arrays(sequence, bits, dtype)
    for k in range(len(arrays.modes)):
        if arrays.modes[k] != "prune":
            continue
        leaves, moments, grads = zip(*(arrays.state(layer, k) for layer in LAYERS), strict=True)
        count = len(arrays.arrays[f"{arrays.prefix}.list_prune.s{k + 1}"])
        new, moved = jitted("prune_step", preselect=1.0)(
            list(leaves), list(grads), list(moments), count=count, learning_rate=arrays.rate
        )
        alive = [sum(int(np.count_nonzero(leaf.mask)) for leaf in some) for some in (leaves, new)]
        assert alive[0] - alive[1] == count
        rises = []
        for layer, leaf, mine in zip(LAYERS, leaves, moved, strict=True):
            rise = np.where(leaf.mask, increments(leaf.coords, mine.coords, k + 1, arrays.rate), 0)
            close(rise, group(layer, arrays.of(layer, f"delta_loss.s{k + 1}")), dtype)
            rises.append(jnp.asarray(rise))
        # The public code rounds a leaf's share at random: its counts are given.
        first = [int(arrays.of(layer, f"num_top.s{k + 1}")) for layer in LAYERS]
        masks = keep_largest(rises, [leaf.mask for leaf in leaves], first, count)
        for layer, leaf, mine, mask in zip(LAYERS, leaves, moved, masks, strict=True):
            mask = np.asarray(mask)
            kept = np.asarray(leaf.coords) * mask
            check(
                arrays,
                layer,
                k + 1,
                qj.MultiBit(leaf.basis, kept, mask, leaf.dtype, leaf.blocks, leaf.axis),
                mine._replace(coords=Moments(*(np.asarray(x) * mask for x in mine.coords))),
            )


@pytest.mark.parametrize("bits", [6])
@pytest.mark.parametrize("layer", LAYERS)
def test_straight_through_steps(layer, bits, dtype):
    arrays = Arrays("ste", bits, dtype)
    floats = arrays.of(layer, "w_FP")
    for k in range(3):
        mb, moments, grad = arrays.state(layer, k)
        step = jitted("straight_through_step", loss_aware=True)
        w = jnp.asarray(floats[k], dtype)
        mb, w, moments = step(mb, w, grad, moments, learning_rate=arrays.rate)
        close(w, floats[k + 1], dtype)
        check(arrays, layer, k + 1, mb, moments)


def test_masks_and_bases_survive_the_codes():
    arrays = Arrays("cycle", 4, "float32")
    mb, _, _ = arrays.state("convK", 6)
    assert not mb.mask.all()
    bases = from_multi_bit(mb)
    np.testing.assert_array_equal(
        np.where(mb.mask, steps.bases_lib.unpack(bases.codes, 4), 1), mb.basis
    )
