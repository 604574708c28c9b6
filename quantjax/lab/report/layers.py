"""The pictures of one network: bits and weights by layer."""

import math
from collections.abc import Mapping

import numpy as np

from quantjax.core import qarray
from quantjax.lab.report import plots
from quantjax.lab.report.plots import PALETTE, SOFT


def bits(leaves: Mapping):
    """Draws the bits a weight of every encoded leaf, codes alone, a bar each.

    Args:
      leaves: {path: encoded leaf}.
    """
    fig, (ax,) = plots.blank(7.2, 0.9 + 0.28 * len(leaves), layout="constrained")
    widths = [leaf.bits for leaf in leaves.values()]
    rows = np.arange(len(leaves))[::-1]
    ax.barh(rows, widths, height=0.7, color=PALETTE[0])
    for row, width, leaf in zip(rows, widths, leaves.values(), strict=True):
        text = f"{width:.3g}   {math.prod(leaf.shape):,} weights"
        ax.annotate(text, (width, row), (4, 0), va="center", **_text())
    ax.set_yticks(rows, list(leaves))
    ax.set_xlim(0, 1.35 * max(widths) or 1)
    ax.set_xlabel("bits a weight, scales and tables apart")
    ax.tick_params(axis="y", length=0)
    return fig


def weights(leaves: Mapping):
    """Draws how often every level of every encoded leaf occurs, on a logarithmic axis.

    Args:
      leaves: {path: encoded leaf}.
    """
    columns = min(3, len(leaves))
    panels = math.ceil(len(leaves) / columns)
    width = 3.1 * columns if columns > 1 else 5.6
    fig, axes = plots.blank(width, 2.15 * panels, panels, columns)
    for ax, (path, leaf) in zip(axes, leaves.items(), strict=False):
        values, counts = np.unique(np.asarray(leaf.decode(), np.float64), return_counts=True)
        if len(values) > plots.MAX_LEVELS:  # groups with levels of their own
            counts, edges = np.histogram(np.asarray(leaf.decode(), np.float64), 80)
            ax.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=PALETTE[0])
        else:
            ax.vlines(values, 0.5, counts, color=PALETTE[0], lw=2)
        ax.set_yscale("log")
        ax.set_ylim(0.5, 3 * max(1, counts.max()))
        zeros = np.mean(np.asarray(leaf.decode()) == 0)
        kind = type(leaf).__name__
        levels = (
            f"{qarray.alphabet(leaf)} levels" if kind != "MultiBit" else f"{leaf.bits:.3g} bits"
        )
        plots.headings(ax, path, f"{kind}, {levels}, {zeros:.1%} zeros")
        ax.yaxis.minorticks_off()
        ax.set_xlabel("weight")
    for ax in axes[::columns]:
        ax.set_ylabel("weights")
    for ax in axes[len(leaves) :]:
        ax.remove()
    return fig


def _text():
    return {"textcoords": "offset points", "fontsize": 7, "color": SOFT}
