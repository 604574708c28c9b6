"""Paired tests, against scipy's and against counting."""

import numpy as np
import pytest
from scipy import stats

from quantjax.lab.report import paired


@pytest.mark.parametrize(("b", "c"), [(0, 1), (3, 12), (40, 40), (10, 200)])
def test_right_and_wrong_is_mcnemars_exact_test(b, c):
    """Only examples that one network alone has right count."""
    mine = np.concatenate([np.ones(b), np.zeros(c), np.ones(50), np.zeros(7)])
    other = np.concatenate([np.zeros(b), np.ones(c), np.ones(50), np.zeros(7)])
    expected = min(1, 2 * stats.binom.cdf(min(b, c), b + c, 0.5))
    for scale in (1, 100):
        assert paired.p_value(scale * mine, scale * other) == pytest.approx(expected)
        assert paired.p_value(scale * other, scale * mine) == pytest.approx(expected)


def test_equal_networks_are_not_told_apart():
    scores = np.random.default_rng(0).random(20)
    assert paired.p_value(scores, scores) == 1
    assert paired.p_value(np.zeros(0), np.zeros(0)) == 1


def test_losses_have_the_level_they_are_tested_at():
    """Of equal networks one in twenty is told apart; of different ones nearly all."""
    rng = np.random.default_rng(1)
    a, b = rng.gamma(2, size=(2, 1000, 200))
    told = np.mean([paired.p_value(x, y) < paired.LEVEL for x, y in zip(a, b, strict=True)])
    assert 0.03 < told < 0.075
    assert (
        np.mean([paired.p_value(x, x + 0.1 * y) < 1e-6 for x, y in zip(a, b, strict=True)]) > 0.99
    )


def test_other_examples_raise():
    with pytest.raises(ValueError, match="not of the same examples"):
        paired.p_value(np.zeros(3), np.zeros(4))
