"""The loss curves of a conversion as a picture beside its report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILE = "kit_losses.png"


def plot_losses(report: dict[str, Any], path: Path) -> bool:
    """Draw the losses of every stage that has some, a panel a stage and a line a layer, into a PNG file.

    Args:
        report: of a conversion; the entries of its stages hold `losses`, a number an update.
        path: the file.

    Returns:
        Whether there was something to draw.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    curves = {
        stage: found
        for stage, entries in report["stages"].items()
        if (found := [(n, entry["losses"]) for n, entry in enumerate(entries) if len(entry.get("losses") or ()) > 1])
    }
    if not curves:
        return False
    figure = Figure(figsize=(6.0 * len(curves), 4.2), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (stage, lines) in zip(panels, curves.items(), strict=True):
        colors = colormaps["viridis"].resampled(max(len(lines), 2))
        for number, (layer, losses) in enumerate(lines):
            ends = number in (0, len(lines) - 1) and len(lines) > 1
            label = f"layer {layer}" if ends else None
            axes.plot(range(1, len(losses) + 1), losses, color=colors(number), linewidth=1, label=label)
        values = [loss for _, losses in lines for loss in losses]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set(title=stage.replace(".", ": ").replace("_", " "), xlabel="update", ylabel="loss")
        axes.grid(alpha=0.25)
        if len(lines) > 1:
            axes.legend(frameon=False, title=f"{len(lines)} layers")
    figure.savefig(path, dpi=130, format="png")
    return True
