"""Texts beside the points of a plot, placed so that they cover each other as little as can be."""

import math

import numpy as np

LEADER = "#c9c9c9"


def place(ax, x, y, texts, text_colors, lines, *written):
    """Writes each text beside its point, where it covers no other text or point, and few lines.

    Args:
      ax: axes in data coordinates that are drawn on.
      x, y, texts, text_colors: of the points.
      lines: (x, y) of the lines that are drawn.
      *written: texts already there.
    """
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=2.2, foreground="white")]
    fig = ax.figure
    fig.draw_without_rendering()  # the layout decides where points are
    renderer = fig.canvas.get_renderer()
    pixels = ax.transData.transform(np.column_stack([x, y]))
    frame = ax.get_window_extent(renderer)
    unit = fig.dpi / 72
    taken = [(px - 5 * unit, py - 5 * unit, px + 5 * unit, py + 5 * unit) for px, py in pixels]
    taken += [tuple(text.get_window_extent(renderer).extents) for text in written]
    drawn = []  # spots along the lines
    for line in lines:
        corners = ax.transData.transform(np.column_stack(line))
        far = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(corners, axis=0).T))])
        spots = np.linspace(0, far[-1], 1 + int(far[-1] / (4 * unit)))
        drawn.append(np.column_stack([np.interp(spots, far, side) for side in corners.T]))
    drawn = np.concatenate(drawn)
    # Near places first: beside, above, below; then farther ones, with a leader.
    places = [(9, 0), (-9, 0), (0, 10), (0, -10), (9, 9), (9, -9), (-9, 9), (-9, -9)]
    places += [(side * 14, rise) for rise in (18, -18, 27, -27, 36, -36) for side in (1, -1)]
    for i in np.argsort(-pixels[:, 1], kind="stable"):
        best, least = None, math.inf
        label = ax.text(0, 0, texts[i], fontsize=8)
        extent = label.get_window_extent(renderer)
        label.remove()
        width, height = extent.width, extent.height
        for cost, (dx, dy) in enumerate(places):
            left = pixels[i, 0] + dx * unit - width * (0.5 - 0.5 * np.sign(dx))
            bottom = pixels[i, 1] + dy * unit - height / 2
            box = (left, bottom, left + width, bottom + height)
            outside = left + width > frame.x1 or left < frame.x0
            outside = outside or bottom < frame.y0 or bottom + height > frame.y1
            covered = np.all((drawn > box[:2]) & (drawn < box[2:]), axis=1).sum()
            total = cost + min(covered, 6)
            total += 1000 * (outside + sum(_overlap(box, other) for other in taken))
            if total < least:
                best, least = (dx, dy, box), total
        dx, dy, box = best
        taken.append(box)
        arrow = {"arrowstyle": "-", "color": LEADER, "lw": 0.8, "shrinkA": 1, "shrinkB": 5}
        ax.annotate(
            texts[i],
            (x[i], y[i]),
            (dx, dy),
            textcoords="offset points",
            ha=("right", "center", "left")[int(np.sign(dx)) + 1],
            va="center",
            fontsize=8,
            color=text_colors[i],
            arrowprops=arrow if abs(dy) > 10 else None,
            path_effects=halo,
            zorder=4,
        )


def _overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
