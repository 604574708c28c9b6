"""Rounding of SRQ under the multi-class straight-through estimator, in closed form.

Forward is the category of largest probability, backward the derivative of the probabilities that
`categories` has; for one array, or for the leaves of a tree in one program.
"""

import functools

import jax
import jax.numpy as jnp

from quantjax.core import pooled, rounding
from quantjax.methods.srq import bit_masks, categories, group_sums

KNOWN = ("mode", "expectation")


def on_grid(x, alpha, sigma, low, high, estimator, count=None):
    """As `semi_relaxed.quantize` without masks, on the codes low .. high.

    Args:
      count: the number of codes, where known.
    """
    x, alpha, sigma, *ends = group_sums.varying_alike(x, alpha, sigma, low, high)
    return _quantize(x, alpha, sigma, None, tuple(ends), count, estimator)


def slopes(x, alpha, sigma, low, high, estimator):
    """Returns d x_hat / d alpha and d x_hat / d sigma of `on_grid`, for scalars, by element."""
    x, alpha, sigma, *ends = group_sums.varying_alike(x, alpha, sigma, low, high)

    def of_part(x):
        one = jnp.ones_like(x, dtype=alpha.dtype)
        parts = x.astype(alpha.dtype), one, alpha, sigma
        _, by_alpha, by_s = _pull(*parts, None, tuple(ends), None, estimator)
        return by_alpha, -(alpha / sigma) * by_s

    return group_sums.map_parts(of_part, x)


def on_masked_grid(x, alpha, sigma, masks, bits, estimator):
    """As `semi_relaxed.quantize` with masks."""
    return _quantize(
        *group_sums.varying_alike(x, alpha, sigma, masks), None, _cells(bits, masks), estimator
    )


def on_grids(leaves: list[tuple], bits, estimator):
    """Returns x_hat of several leaves, all in one program.

    Args:
      leaves: (x, alpha, sigma, masks, low, high) each; x of one dtype, alpha, sigma, low and high
        of one element; masks [bits - 1], or None in all of them.
      bits: of the masks.
      estimator: one of KNOWN.
    """
    xs, alphas, sigmas, masks, lows, highs = zip(*leaves, strict=True)
    layout = None if masks[0] is None else _cells(bits, masks[0])
    alphas, sigmas = ([number.reshape(()) for number in part] for part in (alphas, sigmas))
    ends = tuple(zip(lows, highs, strict=True))
    return _quantize_all(list(xs), alphas, sigmas, list(masks), ends, layout, estimator)


def _cells(bits, masks):
    return bit_masks.cells(bits, masks.shape[-1] if masks.ndim else 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _quantize(x, alpha, sigma, masks, limits, layout, estimator):
    """layout: the `Cells` of the masks, or without masks the number of codes, None if traced."""
    del estimator
    return _rounded(x.astype(alpha.dtype), alpha, sigma, masks, limits, layout).astype(x.dtype)


def _forward(x, alpha, sigma, masks, limits, layout, estimator):
    x_hat = _quantize(x, alpha, sigma, masks, limits, layout, estimator)
    return x_hat, (x, alpha, sigma, masks, limits)


def _backward(layout, estimator, saved, cotangent):
    x, alpha, sigma, masks, limits = saved
    groups, shapes = jnp.broadcast_shapes(alpha.shape, sigma.shape), (alpha.shape, sigma.shape)
    one_group, alpha, sigma = _groups(alpha, sigma, masks)

    def pull(x, cotangent):
        parts = x.astype(alpha.dtype), cotangent.astype(alpha.dtype)
        by_x, *others = _pull(*parts, alpha, sigma, masks, limits, layout, estimator)
        return by_x.astype(x.dtype), *others

    sums = 2 + (0 if masks is None else masks.shape[-1])
    by_x, by_alpha, by_s, *by_masks = group_sums.map_and_sum(pull, sums, one_group, x, cotangent)
    of_masks = None
    if masks is not None:
        by_masks = jnp.stack([group_sums.sum_to(part, masks.shape[:-1]) for part in by_masks], -1)
        of_masks = jnp.where(masks == 0, 0, by_masks)
    by_alpha, by_s = (group_sums.sum_to(part, groups) for part in (by_alpha, by_s))
    by_sigma = group_sums.sum_to(-(alpha / sigma) * by_s, shapes[1])
    return by_x, group_sums.sum_to(by_alpha, shapes[0]), by_sigma, of_masks, None


_quantize.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _quantize_all(xs, alphas, sigmas, masks, limits, layout, estimator):
    """As `_quantize`, of lists; every alpha and sigma is a scalar."""
    del estimator
    if masks[0] is None:  # rounding alone fuses with whatever uses it
        parts = zip(xs, alphas, sigmas, masks, limits, strict=True)
        return [
            _rounded(x.astype(alpha.dtype), alpha, *rest, layout).astype(x.dtype)
            for x, alpha, *rest in parts
        ]

    def fn(x, alpha, sigma, masks):
        return (_rounded(x, alpha, sigma, masks, None, layout),)

    found = pooled.map_and_sum(
        fn, [(x,) for x in _wide(xs, alphas)], list(zip(alphas, sigmas, masks, strict=True))
    )
    return [x_hat.astype(x.dtype) for (x_hat,), x in zip(found, xs, strict=True)]


def _forward_all(xs, alphas, sigmas, masks, limits, layout, estimator):
    x_hats = _quantize_all(xs, alphas, sigmas, masks, limits, layout, estimator)
    return x_hats, (xs, alphas, sigmas, masks, limits)


def _backward_all(layout, estimator, saved, cotangents):
    xs, alphas, sigmas, masks, limits = saved
    with_masks = masks[0] is not None

    def fn(x, cotangent, alpha, sigma, low, high, *masks):
        mine = masks[0] if masks else None
        return _pull(x, cotangent, alpha, sigma, mine, (low, high), layout, estimator)

    lists = (alphas, sigmas, *zip(*limits, strict=True), *([masks] if with_masks else []))
    found = pooled.map_and_sum(
        fn,
        list(zip(_wide(xs, alphas), _wide(cotangents, alphas), strict=True)),
        list(zip(*lists, strict=True)),
    )
    by_x, by_alpha, by_sigma, by_masks = [], [], [], []
    for i, (first, of_alpha, of_s, *of_masks) in enumerate(found):
        by_x.append(first.astype(xs[i].dtype))
        by_alpha.append(of_alpha)
        by_sigma.append(-(alphas[i] / sigmas[i]) * of_s)
        by_masks.append(jnp.where(masks[i] == 0, 0, jnp.stack(of_masks)) if with_masks else None)
    return by_x, by_alpha, by_sigma, by_masks, None


_quantize_all.defvjp(_forward_all, _backward_all)


def _rounded(x, alpha, sigma, masks, limits, layout):
    if masks is None:
        return rounding.to_codes(x, alpha, *limits) * alpha
    return categories.masked_mode(x * (1 / alpha), alpha / sigma, layout, _lead(masks)) * alpha


def _pull(x, cotangent, alpha, sigma, masks, limits, layout, estimator):
    """Returns the cotangents by x, and element by element by alpha, alpha / sigma and masks."""
    t, s = x * (1 / alpha), alpha / sigma
    found, to_masks = _estimate(t, s, masks, limits, layout, estimator)
    by_s = cotangent * found.sds
    by_alpha = cotangent * (found.value - t * found.dt) + by_s
    return cotangent * found.dt, by_alpha, by_s, *to_masks(cotangent * alpha)


def _estimate(t, s, masks, limits, layout, estimator):
    """An estimate, and how the cotangent of x_hat / alpha reaches the masks."""
    if masks is not None and estimator == "mode":
        return categories.masked_mode_estimate(t, s, layout, _lead(masks))
    if masks is not None:
        return categories.masked_expectation(t, s, layout, _lead(masks))
    low, high = limits
    if estimator == "mode":
        found = categories.mode(t, s, jnp.clip(jnp.round(t), low, high), low, high)
    else:
        count = (high - low + 1).astype(jnp.int32) if layout is None else layout
        found = categories.expectation(t, s, low, count)
    return found, lambda _: []


def _groups(alpha, sigma, masks):
    """Whether all of x has one grid, and then scalars: a part of x has another rank than x."""
    one = alpha.size == sigma.size == 1 and (masks is None or masks.ndim == 1)
    return (one, alpha.reshape(()), sigma.reshape(())) if one else (one, alpha, sigma)


def _lead(masks):
    """[*group, count] -> [1 + count, *group], the first for the codes that are never masked."""
    masks = jnp.moveaxis(masks, -1, 0)
    return jnp.concatenate([jnp.ones_like(masks, shape=(1, *masks.shape[1:])), masks])


def _wide(xs, alphas):
    return [x.astype(alpha.dtype) for x, alpha in zip(xs, alphas, strict=True)]
