"""Paired tests: whether two networks differ by more than chance on the very same test examples."""

import math

import numpy as np
from scipy import stats

LEVEL = 0.05


def p_value(a, b) -> float:
    """Returns the chance of differences this large, or larger, between equally good networks.

    Where the scores of an example are right or wrong this is McNemar's exact test, else its large
    sample form, sum d / sqrt(sum d^2) as a normal value, d the differences.

    Args:
      a, b: [n] scores of the same examples; several seeds one after the other.

    Raises:
      ValueError: they differ in shape.
    """
    a, b = (np.asarray(part, np.float64) for part in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"scores of shapes {a.shape} and {b.shape} are not of the same examples")
    d = (a - b)[a != b]
    if not d.size:
        return 1.0
    if np.all(np.abs(d) == np.abs(d[0])):
        return float(stats.binomtest(int(np.sum(d > 0)), d.size).pvalue)
    return math.erfc(abs(d.sum()) / math.sqrt(2 * np.sum(d * d)))
