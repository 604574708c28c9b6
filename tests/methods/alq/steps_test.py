"""What must hold of ALQ's steps, whatever the weights and gradients (float64 NumPy oracles)."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import quantjax as qj
from quantjax.methods.alq import steps
from tests import quick

RATE = 0.05
SEEDS = st.integers(0, 2**32 - 1)
few = hypothesis.settings(max_examples=25, deadline=None)


@functools.cache
def jitted(name, **fixed):
    return quick.jit(functools.partial(getattr(steps, name), **fixed))


def random_leaf(seed, groups=4, n=12, bits=3, masked=0.3):
    """A leaf [groups, n] with some masked slots, and gradients of very different sizes."""
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=(groups, 1, bits)) > masked
    coords = np.where(mask, rng.gamma(1.0, 0.3, mask.shape), 0)
    basis = np.where(rng.uniform(size=(groups, n, bits)) > 0.5, 1, -1)
    basis = np.where(mask, basis, 1)
    mb = qj.MultiBit(
        jnp.asarray(basis, jnp.int8), jnp.asarray(coords), jnp.asarray(mask), np.dtype(float)
    )
    grads = rng.normal(size=(3, groups, n)) * 10.0 ** rng.integers(-4, 1, size=(1, groups, 1))
    return mb, [jnp.asarray(grad) for grad in grads]


def decoded(mb):
    return np.einsum("gnk,gk->gn", np.asarray(mb.basis, float), np.asarray(mb.coords)[:, 0])


def warmed(mb, grads):
    """Moments after some coordinate steps' gradients, the leaf unmoved."""
    moments = steps.init_moments(mb)
    for grad in grads[:-1]:
        _, moments = jitted("coordinate_step")(mb, grad, moments, learning_rate=0.0)
    return moments


def quadratic(mb, old, moments, count):
    """Eq. 18 and the ridge of eq. 23, per group, in NumPy."""
    mean, _, largest = (np.asarray(part) for part in moments.weights)
    slope = RATE / (1 - 0.9**count) * mean
    metric = (np.sqrt(largest) + 1e-8) / np.sqrt(1 - 0.999**count)
    step = decoded(mb) - old
    ridge = 0.5 * steps.RIDGE * np.sum(np.asarray(mb.coords) ** 2, axis=(1, 2))
    return np.sum(slope * step + 0.5 * metric * step**2, axis=1) + ridge


@hypothesis.given(seed=SEEDS)
@few
def test_basis_step_never_raises_the_model(seed):
    with jax.enable_x64(True):
        mb, grads = random_leaf(seed)
        moments = warmed(mb, grads)
        new, moved = jitted("basis_step")(mb, grads[-1], moments, learning_rate=RATE)
        old = decoded(mb)
        new.validate()
        before, after = (quadratic(leaf, old, moved, 3) for leaf in (mb, new))
    assert np.all(after <= before + 1e-12 * (1 + np.abs(before)))
    np.testing.assert_array_equal(new.mask, mb.mask)


def test_basis_step_is_optimal_in_each_part():
    with jax.enable_x64(True):
        mb, grads = random_leaf(5, bits=2, masked=0.0)
        moments = warmed(mb, grads)
        new, moved = jitted("basis_step")(mb, grads[-1], moments, learning_rate=RATE)
    mean, _, largest = (np.asarray(part) for part in moved.weights)
    metric = (np.sqrt(largest) + 1e-8) / np.sqrt(1 - 0.999**3)
    target = decoded(mb) - RATE / (1 - 0.9**3) * mean / metric
    signs = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])
    for g in range(4):
        sums = signs @ np.asarray(mb.coords)[g, 0]
        matrix = signs[np.argmin(np.abs(target[g][:, None] - sums), axis=1)]
        gram = matrix.T @ (metric[g][:, None] * matrix) + 1e-6 * np.eye(2)
        coords = np.linalg.solve(gram, matrix.T @ (metric[g] * target[g]))
        np.testing.assert_allclose(decoded(new)[g], matrix @ coords, atol=1e-12)


@hypothesis.given(seed=SEEDS)
@few
def test_coordinate_step_moves_the_weights_as_eq_21_says(seed):
    with jax.enable_x64(True):
        mb, grads = random_leaf(seed)
        moments = warmed(mb, grads)
        new, moved = jitted("coordinate_step")(mb, grads[-1], moments, learning_rate=0.5)
        new.validate()  # coordinates not negative, masked ones zero
    basis = np.asarray(mb.basis, float)
    grad = np.einsum("gnk,gn->gk", basis, np.asarray(grads[-1]))[:, None] * np.asarray(mb.mask)
    mean = 0.9 * np.asarray(moments.coords.mean) + 0.1 * grad
    square = 0.999 * np.asarray(moments.coords.square) + 0.001 * grad**2
    largest = np.maximum(np.asarray(moments.coords.largest), square)
    step = 0.5 / (1 - 0.9**3) * mean / ((np.sqrt(largest) + 1e-8) / np.sqrt(1 - 0.999**3))
    coords = np.asarray(mb.coords) - step * np.asarray(mb.mask)
    # Turning bases of negative coordinates leaves the weights as they are.
    np.testing.assert_allclose(
        decoded(new), np.einsum("gnk,gk->gn", basis, coords[:, 0]), atol=1e-12
    )
    turned = coords < 0
    np.testing.assert_allclose(moved.coords.mean, np.where(turned, -mean, mean), atol=1e-15)
    np.testing.assert_array_equal(
        np.asarray(new.basis), np.where(turned & np.asarray(mb.mask), -basis, basis)
    )


@hypothesis.given(seed=SEEDS, count=st.integers(0, 12), preselect=st.sampled_from([0.05, 0.3, 1.0]))
@few
def test_pruning_removes_the_count_and_the_least(seed, count, preselect):
    with jax.enable_x64(True):
        leaves, grads = zip(*(random_leaf(seed + i, groups=3 + i) for i in range(2)), strict=True)
        alive = sum(int(np.count_nonzero(leaf.mask)) for leaf in leaves)
        count = min(count, alive - 1)
        moments = [warmed(leaf, some) for leaf, some in zip(leaves, grads, strict=True)]
        new, moved = jitted("prune_step", preselect=preselect)(
            list(leaves), [some[-1] for some in grads], moments, count=count
        )
        rises = []
        for leaf, mine in zip(leaves, moved, strict=True):
            slope, metric = steps.amsgrad.model(mine.coords, 3, 1e-3, 0.9, 0.999, 1e-8)
            rises.append(np.asarray(steps.increments(leaf.coords, slope, metric)))
    assert alive - sum(int(np.count_nonzero(leaf.mask)) for leaf in new) == count
    chosen, removed = [], []
    for before, after, rise in zip(leaves, new, rises, strict=True):
        after.validate()
        kept = np.asarray(after.mask)
        np.testing.assert_array_equal(after.coords, np.where(kept, before.coords, 0))
        # The leaf's own preselection, by rank.
        mask = np.asarray(before.mask)
        first = int(np.floor(preselect * mask.sum() + 3 * 0.618034 % 1))
        ranked = np.sort(rise[mask])
        selected = mask & (rise <= (ranked[first - 1] if first else -np.inf))
        chosen.append(np.stack([rise[selected], kept[selected]]))
        removed.append(np.stack([rise[mask & ~selected], kept[mask & ~selected]]))
    inside, outside = (np.concatenate(parts, axis=1) for parts in (chosen, removed))
    for rise, kept in (inside, outside):
        if (kept == 0).any() and (kept == 1).any():
            assert rise[kept == 0].max() <= rise[kept == 1].min()
    if (outside[1] == 0).any():
        assert (inside[1] == 0).all()  # the rest ranks after the preselection


@hypothesis.given(seed=SEEDS)
@few
def test_masked_coordinates_stay_zero_for_ever(seed):
    with jax.enable_x64(True):
        mb, grads = random_leaf(seed, masked=0.6)
        hypothesis.assume(np.count_nonzero(mb.mask) > 2)
        moments, w = steps.init_moments(mb), mb.decode()
        mask = np.asarray(mb.mask)
        for round_ in range(2):
            for name in ("basis_step", "coordinate_step"):
                mb, moments = jitted(name)(mb, grads[round_], moments, learning_rate=RATE)
            mb, w, moments = jitted("straight_through_step", loss_aware=bool(round_))(
                mb, w, grads[2], moments, learning_rate=RATE
            )
            (mb,), (moments,) = jitted("prune_step", preselect=1.0)(
                [mb], [grads[2]], [moments], count=1 - round_
            )
            assert np.all(np.asarray(mb.coords)[~mask] == 0)
            for part in moments.coords:
                assert np.all(np.asarray(part)[~mask] == 0)
            mask = mask & np.asarray(mb.mask)


def test_groups_without_gradients_are_left_alone():
    with jax.enable_x64(True):
        mb, grads = random_leaf(0, masked=0.0)
        grad = grads[0].at[0].set(0.0).at[1].set(1e-9)
        new, _ = jitted("basis_step")(mb, grad, steps.init_moments(mb), learning_rate=RATE)
        w = mb.decode()
        ste, moved, _ = jitted("straight_through_step", loss_aware=True)(
            mb, w, grad, steps.init_moments(mb), learning_rate=RATE
        )
    for leaf in (new, ste):
        np.testing.assert_array_equal(leaf.basis[:2], mb.basis[:2])
        np.testing.assert_array_equal(leaf.coords[:2], mb.coords[:2])
        assert np.any(np.asarray(leaf.coords[2:]) != np.asarray(mb.coords[2:]))
    assert np.all(np.asarray(moved[2:]) != np.asarray(w[2:]))


def test_reconstruction_baseline_is_plain_least_squares():
    with jax.enable_x64(True):
        mb, grads = random_leaf(1, bits=2, masked=0.0)
        w = jnp.asarray(np.random.default_rng(9).normal(size=mb.shape))
        new, moved, _ = jitted("straight_through_step", loss_aware=False)(
            mb, w, grads[0], steps.init_moments(mb), learning_rate=RATE
        )
    signs = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])
    for g, row in enumerate(np.asarray(moved)):
        nearest = np.argmin(np.abs(row[:, None] - signs @ np.asarray(mb.coords)[g, 0]), axis=1)
        coords = np.linalg.lstsq(signs[nearest].astype(float), row, rcond=None)[0]
        np.testing.assert_allclose(decoded(new)[g], signs[nearest] @ coords, atol=1e-6)


def test_no_array_of_all_candidates_of_all_weights():
    mb = jax.eval_shape(lambda w: qj.sketch(w, 8, -2), jnp.zeros((3, 3, 512, 16)))
    moments = jax.eval_shape(steps.init_moments, mb)
    grad = jax.ShapeDtypeStruct(mb.shape, jnp.float32)
    compiled = jitted("basis_step").lower(mb, grad, moments, learning_rate=1e-3).compile()
    every_candidate = 4 * 2**8 * np.prod(mb.shape)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * every_candidate


def test_prune_step_says_how_many_are_left():
    mb = qj.sketch(jnp.asarray(np.random.default_rng(0).normal(size=(8, 4))), 2, -2)
    arguments = ([mb], [jnp.ones((8, 4))], [steps.init_moments(mb)])
    for count in (8, 9, -1):
        with pytest.raises(ValueError, match=rf"leaves {8 - count} of them"):
            steps.prune_step(*arguments, count=count, preselect=1.0)
    for preselect in (0.0, 1.5):
        with pytest.raises(ValueError, match="share"):
            steps.prune_step(*arguments, count=1, preselect=preselect)


def removed(rises, masks, first, count):
    """By sorting: a leaf's own smallest first, then by the rise, then by the place."""
    order = []
    for leaf, (rise, mask) in enumerate(zip(rises, masks, strict=True)):
        alive = [(r, i) for i, (r, m) in enumerate(zip(rise.flat, mask.flat, strict=True)) if m]
        for place, (r, i) in enumerate(sorted(alive)):
            order.append((place >= first[leaf], r, leaf, i))
    gone = sorted(order)[:count]
    left = [mask.copy() for mask in masks]
    for _, _, leaf, i in gone:
        left[leaf].flat[i] = False
    return left


@pytest.mark.parametrize("seed", range(6))
def test_the_least_increments_go_and_of_equal_ones_the_first(seed):
    rng = np.random.default_rng(seed)
    shapes = [(3, 1, 2), (5, 4), (7,)]
    few = np.asarray([-2.0, -0.0, 0.0, 1e-30, 0.5, np.inf], np.float32)  # many ties
    rises = [
        rng.choice(few, shape) if seed % 2 else rng.normal(size=shape).astype(np.float32)
        for shape in shapes
    ]
    masks = [rng.random(shape) < 0.8 for shape in shapes]
    alive = sum(mask.sum() for mask in masks)
    keep = jax.jit(steps.keep_largest)
    for first in ([0, 0, 0], [2, 1, 3], [99, 99, 99]):
        for count in (0, 1, 4, 9, int(alive) - 1):
            kept = keep(rises, masks, [float(n) for n in first], count)
            for mask, expected in zip(kept, removed(rises, masks, first, count), strict=True):
                np.testing.assert_array_equal(mask, expected)
