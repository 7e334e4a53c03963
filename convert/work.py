"""The work folder of one conversion: finished steps are committed here, so that a killed run can go on.

It stands beside the output (`.NAME.kit-work`), on the same file system, and is deleted when the conversion is complete.
A step is finished when its metrics file exists: tensors are written first, each file through a temporary name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.convert.errors import ExitCode, KitError

if TYPE_CHECKING:
    from torch import Tensor

GO_ON = "run the same command with --resume: finished layers are kept"


@contextmanager
def disk_errors(path: Path, again: str = GO_ON) -> Iterator[None]:
    """Turn a full disk or an unwritable folder into a KitError that says what to do; `again` once there is space."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "os error 28" in str(error)
        full = full or "os error 27" in str(error) or "No space left" in str(error)
        if full:
            raise KitError(
                "no space left to write the result",
                where=str(path),
                next_step=f"free some space, then {again}",
            ) from error
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise KitError(
                "the output folder cannot be written", where=str(path), next_step="choose another place with -o"
            ) from error
        raise


@contextmanager
def replacing(path: Path, again: str = GO_ON) -> Iterator[Path]:
    """Give a sibling to write, which then becomes `path`; an error leaves the earlier file as it was.

    Raises:
        KitError: if the disk is full or the folder cannot be written; `again` is what to do once there is space.
    """
    part = path.with_name(f".{path.name}.part")
    with disk_errors(path, again):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def fingerprint(parts: dict[str, Any]) -> str:
    """Hash of everything that decides a result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class WorkFolder:
    """Committed steps of a conversion into `output`.

    Args:
        output: the folder that the conversion will make.
        parts: everything that decides the result, by name; a resumed run must have the same.
        resume: go on from committed steps.
        overwrite: throw committed steps away.

    Raises:
        KitError: if steps are there and neither was asked for, or if they belong to another conversion.
    """

    def __init__(self, output: Path, parts: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = output.parent / f".{output.name}.kit-work"
        known = self.path / "fingerprint.json"
        if self.path.exists() and not resume:
            if known.exists() and not overwrite:
                raise KitError(
                    "an unfinished conversion into this folder is there",
                    where=str(self.path),
                    next_step="add --resume to go on with it, or --overwrite to start again",
                    exit_code=ExitCode.USAGE,
                )
            shutil.rmtree(self.path)
        parts = json.loads(json.dumps(parts, sort_keys=True, default=str))
        if known.exists():
            old = json.loads(known.read_text())
            changed = sorted(name for name in parts.keys() | old.keys() if parts.get(name) != old.get(name))
            if changed:
                raise KitError(
                    f"cannot resume: {', '.join(changed)} changed since the conversion began",
                    where=str(known),
                    next_step="use the same model, recipe and versions, or --overwrite to start again",
                    exit_code=ExitCode.USAGE,
                )
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            _write(known, json.dumps(parts, indent=1).encode())
        self.output = self.path / "output"
        shutil.rmtree(self.output, ignore_errors=True)

    def metrics(self, step: str) -> dict[str, Any] | None:
        """Metrics of a finished step, None if it is not finished."""
        file = self.path / f"{step}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def tensors(self, step: str) -> Path:
        """The file that holds a step's tensors."""
        return self.path / f"{step}.safetensors"

    def commit(self, step: str, tensors: dict[str, Tensor], metrics: dict[str, Any]) -> Path:
        """Write a step's tensors, then its metrics, which makes it finished."""
        from safetensors.torch import save_file

        file = self.tensors(step)
        with replacing(file) as part:
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part, metadata={"format": "pt"})
        with disk_errors(file):
            _write(self.path / f"{step}.json", json.dumps(metrics).encode())
        return file

    def remove(self) -> None:
        """Delete the folder: the conversion is complete."""
        shutil.rmtree(self.path, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def put_in_place(finished: Path, output: Path) -> None:
    """Move a finished folder to its final name; an old output stays until the new one is there."""
    old = output.parent / f".{output.name}.kit-old"
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(output, old)
    os.replace(finished, output)
    shutil.rmtree(old, ignore_errors=True)


def restore_old(output: Path) -> None:
    """Undo a replacement that was killed half-way: bring the old output back."""
    old = output.parent / f".{output.name}.kit-old"
    if old.exists() and not output.exists():
        os.replace(old, output)
