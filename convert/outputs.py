"""Results that commands write into files: never over earlier ones unasked, and never half."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from kit.convert import work
from kit.convert.errors import usage_error


def check_files(
    folder: Path | None, names: Iterable[str], *, plot: Path | None = None, overwrite: bool, resume: bool | None = None
) -> None:
    """Refuse, before anything is measured, files that cannot be written or are there already.

    Args:
        folder: of `--output`; it may be there.
        names: files that the command writes into it.
        plot: of `--plot`, a PNG file.
        overwrite: earlier ones may be replaced.
        resume: so they may in a folder that a run goes on in; None if the command has no `--resume`.

    Raises:
        KitError: exit code 2.
    """
    if plot and (plot.suffix.lower() != ".png" or not plot.parent.is_dir() or plot.is_dir()):
        raise usage_error("the plot is a PNG file in a folder that exists", f"--plot {plot}", "--plot pareto.png")
    if folder and folder.exists() and not folder.is_dir():
        raise usage_error("there is a file of that name", f"--output {folder}", "name a folder")
    for place, option in ((folder, "--output"), (plot and plot.parent, "--plot")):
        there = next((p for p in (place, *place.parents) if p.exists()), place) if place else None
        if there and not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise usage_error(f"nothing can be written into '{there}'", f"{option} {place}", "choose another place")
    files = [folder / name for name in names] if folder else []
    old = [file for file in (*files, *filter(None, [plot])) if file.exists()]
    if old and not (overwrite or (resume and folder)):
        going_on = "--resume to go on with them, " if folder and resume is not None else ""
        raise usage_error(
            "results of an earlier run are there", old[0], f"add {going_on}--overwrite, or choose another name"
        )


def replacing(path: Path) -> AbstractContextManager[Path]:
    """`work.replacing` of a command that does not resume."""
    return work.replacing(path, "run the same command again")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
