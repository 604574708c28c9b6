"""The pictures of a report: the metric against size, weights on their levels, learning curves.

They are `matplotlib.figure.Figure` objects, drawn by Agg; pyplot and its global state stay out.
"""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from quantjax.core import paths, qarray
from quantjax.lab.report import axes as axes_lib
from quantjax.lab.report import labels
from quantjax.lab.report import rows as rows_lib

INK, SOFT, FAINT = "#1a1a1a", "#666666", "#c9c9c9"
# Okabe and Ito's colours that stand out from white, then three of Tol's: safe for the colour-blind.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933",
    "#332288",
)  # fmt: skip
MARKERS = "osD^vP<X>"
MAX_LEVELS = 64  # more lines than that are a grey area, not a grid


def check():
    """Raises ValueError where no picture can be drawn."""
    try:
        png(blank(1, 1)[0])
    except (ImportError, ValueError) as error:
        raise ValueError(f"matplotlib cannot draw the report: {error}") from None


def colors(results: Sequence) -> dict[str, tuple[str, str]]:
    """Returns a colour and a marker for each method; full precision is a star in ink."""
    low = dict.fromkeys(result.method for result in results if result.bits < 32)
    looks = {
        # After nine methods colours come again, with other markers.
        method: (PALETTE[i % len(PALETTE)], MARKERS[(i + i // len(PALETTE)) % len(MARKERS)])
        for i, method in enumerate(low)
    }
    full = (result.method for result in results if result.bits >= 32)
    return looks | dict.fromkeys(full, (INK, "*"))


def name(result) -> str:
    """Returns `PSG, 4 bits`; the title alone for full precision."""
    bits = f"{result.bits:.3g}"
    return result.title if result.bits >= 32 else f"{result.title}, {bits} bit{'s'[bits == '1' :]}"


def pareto(results: Sequence):
    """Draws the metric of quantized networks against size (kB, log), and the Pareto front.

    An axis of accuracies is logarithmic in the error where errors differ more than fourfold.
    Returns None when no network has a finite metric.
    """
    metric, looks = results[0].metric, colors(results)
    results = [result for result in results if math.isfinite(result.quantized)]
    if not results:
        return None
    fig, (ax,) = blank(9.3, 5.0, layout="constrained")
    x = np.array([result.nbytes / 1000 for result in results])
    y = np.array([result.quantized for result in results])
    ax.set_xscale("log")
    reach = np.nan_to_num([rows_lib.spread(result, "quantized") for result in results])
    axes_lib.scale(metric).draw(ax, np.concatenate([y - reach, y + reach]))
    ax.set_xlim(x.min() / 1.6, x.max() * 1.45)
    axes_lib.sizes(ax)

    front = pareto_front(x, metric.sign * y)
    corners_x = [*x[front], ax.get_xlim()[1]]
    corners_y = [*y[front], y[front[-1]]]
    steps = np.repeat(corners_x, 2)[1:], np.repeat(corners_y, 2)[:-1]
    ax.plot(*steps, color="#dcdcdc", lw=4, zorder=1)
    lines = [steps]
    for method, (color, marker) in looks.items():
        mine = sorted((i for i, r in enumerate(results) if r.method == method), key=x.__getitem__)
        if not mine:
            continue
        size = 150 if marker == "*" else 46
        if reach.any():
            look = {"elinewidth": 1, "capsize": 2, "alpha": 0.7, "zorder": 2}
            ax.errorbar(x[mine], y[mine], reach[mine], fmt="none", ecolor=color, **look)
        ax.plot(x[mine], y[mine], color=color, lw=0.9, alpha=0.55, zorder=2)
        lines.append((x[mine], y[mine]))
        ax.scatter(
            x[mine], y[mine], s=size, c=color, marker=marker, edgecolors="white", lw=0.8, zorder=3
        )
    texts = [r.title if r.bits >= 32 else f"{r.title} {r.bits:.3g}" for r in results]
    ax.set_xlabel("size of the encoded network, kB")
    lower = "" if metric.sign > 0 else ", lower is better"
    ax.set_ylabel(rows_lib.axis(metric, "the quantized network") + lower)
    front_label = ax.annotate(
        "Pareto front", (1, corners_y[-1]), (0, 4), xycoords=ax.get_yaxis_transform(),
        textcoords="offset points", ha="right", fontsize=8, color=SOFT,
    )  # fmt: skip
    text_colors = [_darker(looks[r.method][0]) for r in results]
    labels.place(ax, x, y, texts, text_colors, lines, front_label)
    return fig


def pareto_front(size, score) -> list[int]:
    """Returns the points that no other beats in size and score, higher is better, by size.

    Of equal points the first is taken.
    """
    front = []
    for i in np.lexsort((-np.asarray(score), size)):
        if not front or score[i] > score[front[-1]]:
            front.append(int(i))
    return front


class Picture(NamedTuple):
    """What a histogram shows."""

    weights: np.ndarray  # [n], float64
    levels: np.ndarray  # [at most MAX_LEVELS], sorted; empty: none to draw
    path: str
    unit: str  # "weight", or "weight / step" where groups have steps of their own
    note: str  # "" or which part of the leaf this is


def picture(result) -> Picture | None:
    """Returns the weights and levels of the largest quantized leaf; None without float weights.

    Without encoded leaves it is the largest kernel or embedding, without levels. Leaves whose
    groups have grids of their own are shown in units of the step (Grid), or by one group (Table;
    MultiBit: the group of median width).
    """
    encoded, params = _flat(result.encoded), _flat(result.params)
    among = [path for path, leaf in encoded.items() if qarray.is_encoded(leaf)]
    among = among or [path for path in params if paths.is_weight(path)] or list(params)
    if not among:
        return None
    path = max(among, key=lambda path: math.prod(params[path].shape))
    leaf, weights = encoded.get(path), np.asarray(params[path], np.float64)
    none = np.zeros(0)
    if isinstance(leaf, qarray.Grid):
        codes, step = np.asarray(leaf.codes), np.asarray(leaf.step, np.float64)
        levels = np.arange(int(codes.min()), int(codes.max()) + 1)
        levels = levels if len(levels) <= MAX_LEVELS else none
        if step.size > 1:
            return Picture((weights / step).ravel(), levels, path, "weight / step", "")
        return Picture(weights.ravel(), levels * step.ravel(), path, "weight", "")
    if not qarray.is_encoded(leaf):
        return Picture(weights.ravel(), none, path, "weight", "")

    values = np.asarray(leaf.decode(), np.float64)
    if isinstance(leaf, qarray.Table):
        group, middle = leaf.levels.shape[:-1], 0
        levels = np.unique(np.asarray(leaf.levels, np.float64))
    else:
        # The view splits an axis into blocks; a reshape of the leaf gives it.
        values, weights = (a.reshape(leaf.basis.shape[:-1]) for a in (values, weights))
        group = leaf.coords.shape[:-1]
        widths = np.asarray(leaf.mask).sum(axis=-1).ravel()
        middle = np.argsort(widths, kind="stable")[len(widths) // 2]
        levels = np.unique(values)
    if len(levels) <= MAX_LEVELS:
        return Picture(weights.ravel(), levels, path, "weight", "")
    inside = np.broadcast_to(np.arange(math.prod(group)).reshape(group), values.shape) == middle
    if isinstance(leaf, qarray.Table):
        levels = np.unique(np.asarray(leaf.levels, np.float64).reshape(math.prod(group), -1)[0])
    else:
        levels = np.unique(values[inside])
    if len(levels) > MAX_LEVELS or math.prod(group) == 1:
        return Picture(weights.ravel(), none, path, "weight", "")
    return Picture(weights[inside], levels, path, "weight", f"1 of {math.prod(group):,} groups")


def histograms(pictures: Sequence[tuple]):
    """Draws one histogram per (result, Picture) pair, with a line at every level."""
    looks = colors([result for result, _ in pictures])
    columns = min(3, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    fig, axes = blank(3.1 * columns if columns > 1 else 5.6, 2.15 * rows, rows, columns)
    for ax, (result, shown) in zip(axes, pictures, strict=False):
        counts, edges = np.histogram(shown.weights, _edges(shown))
        # Half a weight is the floor of the log axis, so that bars of one weight are seen.
        color = SOFT if result.bits >= 32 else looks[result.method][0]
        for level in shown.levels:
            ax.axvline(level, color=INK, alpha=0.28, lw=0.8, zorder=3)
        ax.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=color, zorder=2)
        ax.set_yscale("log")
        ax.set_ylim(0.5, 3 * max(1, counts.max()))
        ax.set_xlim(edges[0], edges[-1])
        text = f"{shown.path}, {shown.weights.size:,} weights"
        headings(ax, name(result), text + (f" ({shown.note})" if shown.note else ""))
        ax.set_xlabel(shown.unit)
        ax.yaxis.minorticks_off()
    for ax in axes[::columns]:
        ax.set_ylabel("weights per bin")
    for ax in axes[len(pictures) :]:
        ax.remove()
    return fig


def curves(results: Sequence):
    """Draws training loss and metric by step, a pair of panels for each method that trained.

    Full precision is repeated in grey. Returns None when no result has a curve.
    """
    looks, metric = colors(results), results[0].metric
    full = next((r.curve for r in results if r.bits >= 32 and r.curve), ())
    # One training may serve several rows: {method: {curve: [results]}}.
    trained = {}
    for result in results:
        if result.curve and (result.bits >= 32 or result.curve != full):
            trained.setdefault(result.method, {}).setdefault(result.curve, []).append(result)
    low = {method: mine for method, mine in trained.items() if next(iter(mine)) != full}
    trained = low or trained
    if not trained:
        return None
    columns = min(4, 2 * len(trained))
    rows = math.ceil(len(trained) / 2)
    fig, axes = blank(2.33 * columns, 2.35 * rows, rows, columns)
    points = [point for mine in trained.values() for curve in mine for point in curve]
    points += full
    for i, (method, mine) in enumerate(trained.items()):
        loss, score = axes[2 * i : 2 * i + 2]
        for ax, column in ((loss, 1), (score, 2)):
            if full and full not in mine:
                _line(ax, full, column, color="#b4b4b4", lw=2.2, label="full precision")
            for style, (curve, served) in enumerate(mine.items()):
                dash = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))[style % 4]
                bits = ", ".join(f"{row.bits:.3g}" for row in served)
                label = "full precision" if served[0].bits >= 32 else f"{bits} bits"
                _line(ax, curve, column, color=looks[method][0], lw=1.5, ls=dash, label=label)
            ax.set_xlabel("step")
        axes_lib.losses(loss, [point[1] for point in points])
        axes_lib.scale(metric).draw(score, [point[2] for point in points])
        headings(loss, next(iter(mine.values()))[0].title, "training loss")
        headings(score, "", rows_lib.axis(metric, "the float weights"))
        # What is judged saturates, which leaves room beside the curves.
        score.legend(loc="best", fontsize=7, labelcolor=INK, handlelength=2.4, frameon=False)
    for ax in axes[2 * len(trained) :]:
        ax.remove()
    return fig


def png(fig) -> bytes:
    """Returns a figure as PNG, three pixels where a page has two."""
    out = io.BytesIO()
    # Light compression: twice as fast as the default, a few kB more.
    fig.savefig(out, format="png", dpi=160, pil_kwargs={"compress_level": 3})
    return out.getvalue()


def blank(width, height, rows=1, columns=1, layout=None):
    """Returns a white figure, in inches, and the list of its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure((width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(fig)
    axes = list(fig.subplots(rows, columns, squeeze=False).ravel())
    if layout is None:
        # Fixed margins, in inches: a constrained layout draws everything twice.
        left, right, bottom, top, across, down = 0.62, 0.12, 0.46, 0.44, 0.42, 0.78
        panel_width = (width - left - right - across * (columns - 1)) / columns
        panel_height = (height - bottom - top - down * (rows - 1)) / rows
        fig.subplots_adjust(
            left=left / width,
            right=1 - right / width,
            bottom=bottom / height,
            top=1 - top / height,
            wspace=across / panel_width,
            hspace=down / panel_height,
        )
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(FAINT)
        ax.tick_params(which="both", color=FAINT, labelcolor=SOFT, labelsize=8 if rows < 2 else 7)
        for axis in (ax.xaxis, ax.yaxis):
            axis.label.set(color=SOFT, fontsize=8)
    return fig, axes


def headings(ax, title, text):
    """Writes a title and a line of text above the axes."""
    ax.set_title(title, loc="left", color=INK, fontsize=9, fontweight="bold", pad=15)
    look = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 7}
    ax.annotate(text, (0, 1), (0, 4), color=SOFT, **look)


def _flat(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=qarray.is_encoded)[0]
    return {paths.path_name(key_path): leaf for key_path, leaf in leaves}


def _edges(shown):
    """Returns edges of about 120 bins; a grid's levels lie in the middle of theirs."""
    low, high = (float(f(np.append(shown.weights, shown.levels))) for f in (np.min, np.max))
    margin = 0.03 * (high - low) or max(1e-3, abs(low))
    low, high = low - margin, high + margin
    gaps = np.diff(shown.levels)
    if len(gaps) and np.allclose(gaps, gaps[0]):
        odd = 2 * round(60 * float(gaps[0]) / (high - low)) + 1
        bin_width = float(gaps[0]) / odd
        first = shown.levels[0] - bin_width / 2
        below = math.ceil((first - low) / bin_width)
        count = below + math.ceil((high - first) / bin_width)
        return first + bin_width * np.arange(-below, count - below + 1)
    return np.linspace(low, high, 122)


def _line(ax, curve, column, **look):
    steps, values = zip(*((point[0], point[column]) for point in curve), strict=True)
    marker = "o" if len(curve) == 1 else None
    ax.plot(steps, values, marker=marker, ms=4, **look)


def _darker(color):
    """Returns the colour mixed with black, for text that is read on white."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return tuple(0.68 * part / 255 for part in (red, green, blue))
