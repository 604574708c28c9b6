"""SRQ by brute force in float64 NumPy: all 2**bits categories, their softmax and its derivatives.

The categories are formed in logs, since differences of sigmoids fail outside the grid.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit


class Reference(NamedTuple):
    value: np.ndarray
    x: np.ndarray  # cotangents, all by element of x
    alpha: np.ndarray
    sigma: np.ndarray
    masks: np.ndarray
    tie: np.ndarray  # the largest share less the second largest


def softplus(v):
    return np.logaddexp(0, v)


def levels_by_grids(bits):
    """Every code's level, told from the grids themselves: those of 2, 3, .. bits, one by one."""
    codes = list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    levels = np.zeros(len(codes), int)
    seen = {-1, 0, 1}
    for width in range(2, bits + 1):
        grid = set(range(-(2 ** (width - 1)), 2 ** (width - 1)))
        for n in grid - seen:
            levels[codes.index(n)] = width - 1
        seen |= grid
    return levels


def pairs_by_ends(bits):
    """Figure 3a: the outermost two codes get the first mask, and so on until -1, 0, 1 remain."""
    left, right, k = 0, 2**bits - 1, 1
    pairs = np.zeros(2**bits, int)
    zero = 2 ** (bits - 1)
    while left < right:
        for i in (left, right):
            if abs(i - zero) > 1:
                pairs[i] = k
        left, right, k = left + 1, right - 1, k + 1
    return pairs


def srq(x, alpha, sigma, masks, of_code, cotangent, *, bits, signed, estimator):
    """of_code: which of (1, *masks) a code is under."""
    n = np.arange(2**bits) - (2 ** (bits - 1) if signed else 0.0)
    t, k = x[:, None] / alpha, alpha / sigma
    right, left = k * (t - n - 0.5), k * (n - 0.5 - t)
    z = np.append(1.0, masks)[of_code]
    with np.errstate(divide="ignore"):
        log_mass = np.log(-np.expm1(-k)) - softplus(right) - softplus(left) + np.log(z)
    log_share = log_mass - np.logaddexp.reduce(log_mass, axis=1, keepdims=True)
    share = np.exp(log_share)

    best = log_mass.argmax(1)
    rows = np.arange(x.size)

    def through_softmax(slope):  # which does not change with a constant: the best has 0
        slope = slope - slope[rows, best][:, None]
        return share * (slope - (share * slope).sum(1, keepdims=True))

    dt = through_softmax(k * (expit(left) - expit(right)))
    dk = through_softmax(
        1 / np.expm1(k) - ((t - n - 0.5) * expit(right)) - (n - 0.5 - t) * expit(left)
    )
    if estimator == "mode":  # the cotangent of r_imax alone: that of x_hat times g_imax
        into = np.zeros_like(share)
        into[rows, best] = alpha * n[best]
        direct = n[best]
    else:
        # The shares' derivatives add up to 0: levels may be counted from the best one.
        into = alpha * (n - n[best][:, None])
        direct = share @ n
    into = into * cotangent[:, None]
    of_masks = np.zeros((x.size, len(masks)))
    for i, mask in enumerate(masks):
        if mask > 0:  # of a zero mask it is 0 by definition
            mine = (of_code == i + 1) * share / mask
            of_masks[:, i] = (into * (mine - share * mine.sum(1, keepdims=True))).sum(1)
    top = np.sort(share, axis=1)
    return Reference(
        value=alpha * n[best],
        x=(into * dt).sum(1) / alpha,
        alpha=cotangent * direct + (into * (-t / alpha * dt + dk / sigma)).sum(1),
        sigma=(into * dk).sum(1) * -alpha / sigma**2,
        masks=of_masks,
        tie=top[:, -1] - top[:, -2],
    )
