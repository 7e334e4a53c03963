"""Results that commands write into files: never over earlier ones unasked, and never half."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kit.convert.errors import usage_error
from kit.convert.work import disk_errors


def check_files(
    folder: Path | None, names: Iterable[str], *, plot: Path | None = None, replace: bool, resume: bool = False
) -> None:
    """Refuse, before anything is measured, files that cannot be written or are there already.

    Args:
        folder: of `--output`; it may be there.
        names: files that the command writes into it.
        plot: of `--plot`, a PNG file.
        replace: earlier ones may be replaced.
        resume: whether the command has `--resume`.

    Raises:
        KitError: exit code 2.
    """
    if plot and (plot.suffix.lower() != ".png" or not plot.parent.is_dir() or plot.is_dir()):
        raise usage_error("the plot is a PNG file in a folder that exists", f"--plot {plot}", "--plot pareto.png")
    if folder and folder.exists() and not folder.is_dir():
        raise usage_error("there is a file of that name", f"--output {folder}", "name a folder")
    files = [folder / name for name in names] if folder else []
    old = [file for file in (*files, *filter(None, [plot])) if file.exists()]
    if old and not replace:
        going_on = "--resume to go on with them, " if resume else ""
        raise usage_error(
            "results of an earlier run are there", old[0], f"add {going_on}--overwrite, or choose another name"
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a sibling to write, which then becomes `path`; an error leaves the earlier file as it was.

    Raises:
        KitError: if the disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
