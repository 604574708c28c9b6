"""Axes of a report's plots: scales, limits, ticks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from quantjax.lab.train.tasks import Metric


class Scale(NamedTuple):
    """How an axis shows a metric."""

    draw: Callable  # (axes, values): sets scale, limits and ticks
    told: str = ""  # of a caption


def scale(metric: Metric) -> Scale:
    """Returns the scale of a metric's unit."""
    return SCALES.get(metric.unit, Scale(_plain_axis))


def _plain_axis(ax, values):
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if values.size else (0, 1)
    margin = 0.12 * (high - low) or max(0.1, 0.1 * abs(high))
    ax.set_ylim(low - margin, high + margin)


def _accuracy_axis(ax, accuracies):
    """Sets scale, limits and ticks for accuracies in percent."""
    from matplotlib import ticker

    worst, best = float(np.min(accuracies)), float(np.max(accuracies))
    # No test set of these sizes resolves less than a hundredth of a percent.
    floor = 0.01
    error_of_worst, error_of_best = max(floor, 100 - worst), max(floor, 100 - best)
    if error_of_worst < 4 * error_of_best:
        margin = max(0.1, 0.12 * (best - worst))
        ax.set_ylim(max(0, worst - margin), min(100.2, best + margin))
        return
    ax.set_yscale("function", functions=(_to_height, _from_height))
    low, high = (float(_to_height(100 - e)) for e in (error_of_worst, error_of_best))
    margin = 0.08 * (high - low)
    bottom, top = (float(_from_height(h)) for h in (max(0.0, low - margin), high + margin))
    ax.set_ylim(bottom, top)
    nice = [0, 20, 50, 70, 80, 90, 95, 97, 98, 99, 99.5, 99.8, 99.9, 99.95]
    ax.yaxis.set_major_locator(ticker.FixedLocator([t for t in nice if bottom <= t <= top]))
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.grid(axis="y", color="#eeeeee", lw=0.8, zorder=0)
    ax.set_axisbelow(True)


SCALES = {
    "percent": Scale(
        _accuracy_axis,
        " Where errors differ more than fourfold, equal distances upwards are equal ratios of the "
        "error.",
    )
}


def _to_height(accuracy):
    return -np.log10(np.maximum(100.0 - np.asarray(accuracy, float), 1e-3) / 100)


def _from_height(height):
    return 100 - 100 * 10.0 ** -np.asarray(height, float)


def losses(ax, values):
    """Makes an axis of losses logarithmic where they differ more than fivefold."""
    from matplotlib import ticker

    positive = [loss for loss in values if 0 < loss < math.inf]
    if positive and max(positive) > 5 * min(positive):
        ax.set_yscale("log")
        ax.set_ylim(min(positive) / 1.3, max(positive) * 1.3)
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())


def sizes(ax):
    """Sets ticks of a logarithmic axis of kB, once its limits are set."""
    from matplotlib import ticker

    low, high = ax.get_xlim()
    wide, narrow = high / low > 300, high / low < 6
    steps = (1,) if wide else (1, 1.5, 2, 3, 4, 5, 6, 8) if narrow else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ax.xaxis.set_major_locator(ticker.FixedLocator([t for t in ticks if low <= t <= high]))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
