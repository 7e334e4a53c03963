"""Plot what checkpoints cost against how good they are: bytes and decode speed, the Pareto front marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kit.convert.errors import ExitCode, KitError

QUALITIES = (("perplexity", "perplexity"), ("kl", "KL to base (nats)"), ("self_perplexity", "perplexity, own text"))
COSTS = (  # key, axis, unit, and the sign that makes lower better
    ("bytes", "weights (MiB)", 2.0**-20, 1),
    ("decode_tokens_per_second", "decode (tokens/s)", 1.0, -1),
)


def pareto_front(costs: np.ndarray) -> np.ndarray:
    """Which points no other point beats.

    Args:
        costs: (N, 2), lower is better.

    Returns:
        (N,), bool: False where another point is as low in both and lower in one.
    """
    no_worse = (costs[:, None] <= costs[None]).all(-1)
    better = (costs[:, None] < costs[None]).any(-1)
    return np.logical_not((no_worse & better).any(0))


def plot_pareto(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw quality against bytes, and against decode speed where it was measured, into a PNG file.

    Quality is perplexity on the data set where it was measured, else KL to the base (which is 0 for the base itself),
    else perplexity on the base's own text. Rows without bytes, such as ablations, are left out.

    Raises:
        KitError: if no row has both a quality and a cost, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    key, title = next((q for q in QUALITIES if any(q[0] in row for row in rows)), QUALITIES[0])
    if key == "kl":
        rows = [row | {"kl": 0.0} if row["name"] == "base" else row for row in rows]
    panels = []
    for cost in COSTS:
        if shown := [row for row in rows if cost[0] in row and np.isfinite(row.get(key, np.nan))]:
            panels.append((*cost, shown))
    if not panels:
        raise KitError(
            "there is nothing to plot: no row has both quality and bytes",
            where=str(path),
            next_step="measure perplexity (--dataset) or agreement (--base)",
            exit_code=ExitCode.USAGE,
        )
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    drawn = []
    for number, (cost_key, label, unit, sign, shown) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        points = np.array([[row[cost_key] * unit, row[key]] for row in shown], dtype=np.float64)
        front = pareto_front(points * [sign, 1])
        axes.plot(*points[front][np.argsort(points[front, 0])].T, color="tab:blue", linewidth=1, zorder=1)
        axes.scatter(*points[front].T, color="tab:blue", zorder=2, label="Pareto front")
        axes.scatter(*points[~front].T, facecolor="white", edgecolor="tab:gray", zorder=2)
        if points[:, 1].min() > 0 and points[:, 1].max() > 10 * points[:, 1].min():
            axes.set_yscale("log")
        axes.margins(0.15)
        axes.set(xlabel=label, ylabel=title)
        axes.grid(alpha=0.25)
        axes.legend(loc="best", frameon=False)
        drawn.append((axes, points, [row["name"] for row in shown]))
    canvas.draw()  # settles where the axes lie, which the labels depend on
    for axes, points, names in drawn:
        label_points(axes, canvas.get_renderer(), points, names)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise KitError(
            f"the plot cannot be written: {error}", where=str(path), next_step="name another file"
        ) from error


def label_points(axes: Any, renderer: Any, points: np.ndarray, names: list[str]) -> list[Any]:
    """Write each name at the nearest place inside the axes where it covers no point and no other name.

    Args:
        axes: drawn once already.
        renderer: of its canvas; it measures texts.
        points: (N, 2), in the axes' data.
        names: of the points.

    Returns:
        The texts.
    """
    from matplotlib.transforms import Bbox

    pixels = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in pixels]
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent(renderer))
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    style = {"fontsize": 8, "ha": "center", "va": "center", "textcoords": "offset points", "in_layout": False}
    texts = []
    for point, name in zip(points, names, strict=True):
        text = axes.annotate(name, point, xytext=(0, 0), **style)
        at_point = text.get_window_extent(renderer)
        best = None
        for gap, (x, y) in ((gap, side) for gap in range(8, 400, 8) for side in sides):
            shift = np.array([x * (at_point.width / 2 + gap), y * (at_point.height / 2 + gap)])
            box = at_point.translated(*shift)
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1:
                best = best or (gap, shift, box)  # a crowded plot without a free place: a covered one
                if not any(box.overlaps(other) for other in taken):
                    best = gap, shift, box
                    break
        gap, shift, box = best or (0, np.zeros(2), at_point)
        text.set_position(shift * 72 / axes.figure.dpi)
        taken.append(box)
        if gap > 16:  # too far to tell whose name it is
            line = {"arrowstyle": "-", "color": "tab:gray", "linewidth": 0.5, "shrinkA": 8}
            axes.annotate("", point, xytext=text.get_position(), textcoords="offset points", arrowprops=line)
        texts.append(text)
    return texts
