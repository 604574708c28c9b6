"""Mixtures of two Gaussians, one per mode of a layer's weights, fitted by maximum likelihood.

EM runs on histograms of a fixed size, so that layers of any shape stack and share one compiled
program. Bins are the float's own: a sign, an exponent and a few bits of the mantissa below the
layer's largest magnitude. Each keeps the count, mean and variance of its weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from quantjax.core import order_statistics, random_numbers, rounding

MANTISSA_BITS = 6  # bins are 1/64 to 1/128 of a magnitude wide
OCTAVES = 20  # below the largest magnitude; what is smaller shares a bin
BINS = OCTAVES << MANTISSA_BITS  # per sign
DROPPED = 23 - MANTISSA_BITS  # bits of a float32 number that tell no bins apart
TOLERANCE = 1e-5  # of the largest move of a parameter in an iteration, in standard deviations
ITERATIONS = 2000  # at most
FLOOR = 1e-6  # of a component's variance, in that of the layer


class Mixture(NamedTuple):
    """Two Gaussians, c- and c+ in this order; leading axes are layers."""

    mean: jax.Array  # [..., 2], mean_- <= mean_+
    std: jax.Array  # [..., 2], positive
    weight: jax.Array  # [..., 2], they sum to 1


class Histogram(NamedTuple):
    """A layer's non-zero weights in bins, the negative ones first; leading axes are layers."""

    count: jax.Array  # [..., 2 BINS], float32
    mean: jax.Array  # [..., 2 BINS], of the bin's weights
    variance: jax.Array  # [..., 2 BINS], within the bin


class Moments(NamedTuple):
    """What the weights themselves say of a layer; leading axes are layers."""

    count: jax.Array  # [...], non-zero weights
    negative: jax.Array  # [...], those below zero
    variance: jax.Array  # [...], of the non-zero weights


def histogram(w, mask=None) -> Histogram:
    """Returns the histogram of w where it is not zero and the mask is True.

    Only the sums cross devices; magnitudes below the smallest normal number count as zero, and
    those of more than 20 octaves below the largest as the smallest that has a bin.
    """
    return of_places(*bin_places(w, mask))


def bin_places(w, mask=None):
    """Returns what a leaf's histogram is made of, [2 BINS, 3], and the first bin.

    That is the count of every bin, and mean and variance of the places in it, which are 0..1.
    Sums are of whole numbers: the same however a leaf is spread over devices.
    """
    w = w.astype(jnp.float32)
    size = jnp.abs(w)
    mine = size >= jnp.finfo(jnp.float32).tiny
    mine = mine if mask is None else mine & jnp.asarray(mask, bool)
    key = order_statistics.magnitude_keys(jnp.where(mine, size, 0))
    lowest = jnp.maximum(jnp.max(key >> DROPPED) - BINS + 1, 0)
    beyond = jnp.maximum(key - (lowest << DROPPED), 0)
    index = (beyond >> DROPPED) + jnp.where(w > 0, BINS, 0)
    # So few bits of a place, and of its square, that no sum overflows with all weights in one bin.
    room = max(31 - w.size.bit_length(), 0)
    bits, less = min(DROPPED, room), min(DROPPED, room // 2)
    place = beyond & ((1 << DROPPED) - 1)
    fine, coarse = place >> (DROPPED - bits), place >> (DROPPED - less)
    each = jnp.stack([jnp.ones_like(key), fine, coarse, coarse * coarse], axis=-1)
    sums = jnp.zeros((2 * BINS, 4), jnp.int32).at[index].add(jnp.where(mine[..., None], each, 0))
    sums = sums.astype(jnp.float32)
    _, mean, about, square = jnp.moveaxis(sums / jnp.maximum(sums[:, :1], 1), -1, 0)
    middle = 0.5 if bits < DROPPED else 0  # what was cut off, on average
    parts = sums[:, 0], (mean + middle) / 2**bits, (square - about**2) / 4**less
    return jnp.stack(parts, axis=-1), lowest


def of_places(places, lowest) -> Histogram:
    """Returns the histograms of `bin_places`, stacked along leading axes or not."""
    count, mean, variance = jnp.moveaxis(places, -1, 0)
    bins = lax.broadcasted_iota(jnp.int32, (*lowest.shape, BINS), lowest.ndim) + lowest[..., None]
    starts = order_statistics.magnitude_of(bins << DROPPED)
    width = order_statistics.magnitude_of((bins + 1) << DROPPED) - starts
    starts, width = jnp.concatenate([-starts, starts], -1), jnp.concatenate([-width, width], -1)
    return Histogram(count, starts + mean * width, jnp.maximum(variance, 0) * width**2)


_histogram = jax.jit(histogram)


def moments(hist: Histogram) -> Moments:
    """Returns the counts and the variance of all weights of a histogram."""
    count = jnp.sum(hist.count, axis=-1)
    return Moments(count, jnp.sum(hist.count[..., :BINS], axis=-1), _gaussian(hist, 1.0)[1])


@jax.jit
def fit(hist: Histogram) -> Mixture:
    """Returns the mixtures of maximum likelihood, by EM started from the two signs (FQ 4).

    Layers without negative or without positive weights give a finite mixture without meaning.
    """
    total = jnp.sum(hist.count, axis=-1)[..., None]
    mean, variance, _ = _gaussian(hist, 1.0)
    number = jnp.finfo(jnp.float32)  # it tells nothing narrower apart
    floor = jnp.maximum(FLOOR * variance, (number.eps * mean) ** 2)
    floor = jnp.maximum(floor, number.tiny)[..., None]

    def maximize(positive):
        """Returns the parameters, each [..., 2], given the posterior of c+ of every bin."""
        parts = [_gaussian(hist, share) for share in (1 - positive, positive)]
        mean, variance, count = (jnp.stack(values, axis=-1) for values in zip(*parts, strict=True))
        return Mixture(mean, jnp.sqrt(jnp.maximum(variance, floor)), count / jnp.maximum(total, 1))

    def posterior(now: Mixture):
        """Returns that of c+ of every bin; a bin's variance counts as distance."""
        mean, std, weight = (value[..., None, :] for value in now)
        square = (hist.mean[..., None] - mean) ** 2 + hist.variance[..., None]
        score = jnp.log(jnp.maximum(weight, 1e-30)) - jnp.log(std) - 0.5 * square / std**2
        return jax.nn.sigmoid(score[..., 1] - score[..., 0])

    def iterate(carry):
        now, _, steps = carry
        new = maximize(posterior(now))
        moves = [
            (new.mean - now.mean) / now.std,
            jnp.log(new.std / now.std),
            new.weight - now.weight,
        ]
        return new, jnp.nanmax(jnp.abs(jnp.stack(moves))), steps + 1

    def unsettled(carry):
        _, moved, steps = carry
        return (moved > TOLERANCE) & (steps < ITERATIONS)

    first = maximize(jnp.broadcast_to(jnp.arange(2 * BINS) >= BINS, hist.count.shape))
    first = first._replace(weight=jnp.full_like(first.weight, 0.5))
    mixture, _, _ = lax.while_loop(unsettled, iterate, (first, jnp.inf, 0))
    ordered = jnp.argsort(mixture.mean, axis=-1)
    return Mixture(*(jnp.take_along_axis(value, ordered, axis=-1) for value in mixture))


def fit_mixture(w, mask=None) -> Mixture:
    """Returns the mixture of the non-zero weights of one leaf, where the mask is True.

    Args:
      w: floats of any shape.
      mask: of w's shape, or None.

    Raises:
      ValueError: a mask of another shape.
    """
    if mask is not None and jnp.shape(mask) != jnp.shape(w):
        raise ValueError(f"a mask of shape {jnp.shape(mask)} beside weights {jnp.shape(w)}")
    hist = _histogram(jnp.asarray(w), mask)
    return jax.tree.map(lambda value: value[0], fit(jax.tree.map(lambda value: value[None], hist)))


def separation(mixture: Mixture, variance):
    """Returns W = ((mean_- - mean_+)**2 + (std_- - std_+)**2) / variance (FQ 7), 0 without any."""
    low, high = mixture.mean[..., 0], mixture.mean[..., 1]
    narrow, wide = mixture.std[..., 0], mixture.std[..., 1]
    distance = (low - high) ** 2 + (narrow - wide) ** 2
    return jnp.where(variance > 0, distance / jnp.where(variance > 0, variance, 1), 0)


def assign(key, w, mixture: Mixture):
    """Returns the component of every weight, -1 for c- and 1 for c+, int8 of w's shape (FQ 5).

    Args:
      key: samples from the posterior; None takes the component of the larger one.
      w: floats of any shape.
      mixture: of one layer.
    """
    if key is None:
        return draw(jax.random.key(0), w, odds(mixture), False)
    return draw(key, w, odds(mixture), True)


class Odds(NamedTuple):
    """log(weight_+ Normal_+(x)) - log(weight_- Normal_-(x)) = (a z + b) z + c; axes are layers."""

    a: jax.Array
    b: jax.Array
    c: jax.Array
    middle: jax.Array  # z = (x - middle) / unit
    unit: jax.Array


def odds(mixture: Mixture) -> Odds:
    """Returns the log ratio of the components, in standard deviations from the means' middle."""
    low, high = mixture.mean[..., 0], mixture.mean[..., 1]
    less, more = (jnp.maximum(mixture.weight[..., i], 1e-30) for i in (0, 1))
    middle, unit = 0.5 * (low + high), jnp.max(mixture.std, axis=-1)
    low, high = (low - middle) / unit, (high - middle) / unit
    narrow, wide = mixture.std[..., 0] / unit, mixture.std[..., 1] / unit
    ratio = jnp.log(more * narrow / (less * wide))
    return Odds(
        0.5 / narrow**2 - 0.5 / wide**2,
        high / wide**2 - low / narrow**2,
        0.5 * (low / narrow) ** 2 - 0.5 * (high / wide) ** 2 + ratio,
        middle,
        unit,
    )


def draw(key, w, of: Odds, sampled):
    """Returns `assign`'s components, given the odds of a layer; sampled: a bool, traced or not."""
    z = (w.astype(rounding.work_dtype(w.dtype)) - of.middle) / of.unit
    score = (of.a * z + of.b) * z + of.c
    border = jnp.where(sampled, random_numbers.uniform(key, w.shape), 0.5)
    return jnp.where(border < jax.nn.sigmoid(score), 1, -1).astype(jnp.int8)


def regions(mixture: Mixture):
    """Returns (border [..., 2], inside [...]), where the larger posterior is that of c+.

    It is where (border[0] < x < border[1]) == inside; a border that does not exist is the largest
    float. Comparisons with stored numbers give the same choice in every compiled program.
    """
    a, b, c, middle, unit = odds(mixture)
    root = b**2 - 4 * a * c
    # Roots without cancellation; a = 0 sends one of them to infinity.
    q = -0.5 * (b + jnp.where(b < 0, -1, 1) * jnp.sqrt(jnp.maximum(root, 0)))
    first, second = q / jnp.where(a == 0, 0, a), c / q  # no negative zero
    none = (root <= 0) | (q == 0)
    first, second = jnp.where(none, -jnp.inf, first), jnp.where(none, jnp.inf, second)
    inside = jnp.where(none, c > 0, a < 0)
    ends = jnp.stack([jnp.minimum(first, second), jnp.maximum(first, second)], axis=-1)
    largest = jnp.finfo(ends.dtype).max
    return jnp.clip(ends * unit[..., None] + middle[..., None], -largest, largest), inside


def _gaussian(hist: Histogram, share):
    """Returns mean, variance and count of the weights, each bin counted by its share."""
    counts = hist.count * share
    total = jnp.sum(counts, axis=-1)
    some = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    mean = jnp.sum(counts * hist.mean, axis=-1) / some
    square = (hist.mean - mean[..., None]) ** 2 + hist.variance
    return mean, jnp.sum(counts * square, axis=-1) / some, total
