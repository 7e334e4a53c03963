"""The folder of `kit eval -o FOLDER`: results.json, and a log of samples that a resumed run reads back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kit.convert.errors import ExitCode, KitError
from kit.convert.outputs import replacing
from kit.convert.work import disk_errors

RESULTS, SETTINGS = "results.json", "run.json"
ENCODING: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # of half a surrogate: JSON's own escape


class SampleLog:
    """The finished samples of one model on one task, a JSON object a line, written as they finish.

    Args:
        file: where they stand; None keeps them in memory only.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.samples: dict[int, dict[str, Any]] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").split("\n"):
                try:
                    sample = json.loads(line)
                    self.samples[sample["doc_id"]] = sample
                except ValueError:  # the line that a kill cut off
                    continue
            self.sort()

    def find(self, doc_id: int, requests: str) -> dict[str, Any] | None:
        """The finished sample of a document, if the model was asked the very same: `requests` is a hash of it."""
        sample = self.samples.get(doc_id)
        return sample if sample and sample["requests"] == requests else None

    def add(self, sample: dict[str, Any]) -> None:
        """Append a finished sample."""
        self.samples[sample["doc_id"]] = sample
        if self.file is not None:
            with disk_errors(self.file), self.file.open("a", **ENCODING) as out:
                out.write(_line(sample))

    def sort(self) -> None:
        """Write the file again in order of documents, one line each."""
        if self.file is not None and self.samples:
            _write(self.file, "".join(_line(self.samples[doc_id]) for doc_id in sorted(self.samples)))


class EvalFolder:
    """What an evaluation leaves.

    Args:
        path: the folder, made if need be.
        resume: keep the samples that are there.
        overwrite: what an earlier evaluation left may be deleted once the new one writes.

    Raises:
        KitError: exit code 2, if results are there and neither was asked for, or `path` is a file.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path = path
        self._opened: dict[str, dict[str, Any]] = {}
        if path.exists() and not path.is_dir():
            raise KitError(
                "the output is a file", where=str(path), next_step="give a folder with -o", exit_code=ExitCode.USAGE
            )
        old = [file for file in (path / RESULTS, path / SETTINGS, *path.glob("samples_*.jsonl")) if file.exists()]
        if old and not resume and not overwrite:
            raise KitError(
                "the folder holds the results of an evaluation",
                where=str(path),
                next_step="add --resume to go on with it, --overwrite to start again, or choose another folder",
                exit_code=ExitCode.USAGE,
            )
        self._old = old if not resume else []
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)

    def _clear(self) -> None:
        """Delete what is to be replaced; not before there is something else, or a refused command would lose it."""
        with disk_errors(self.path):
            for file in self._old:
                file.unlink(missing_ok=True)
        self._old = []

    def samples(self, model: str, task: str, settings: dict[str, Any]) -> SampleLog:
        """The log of one model on one task.

        Args:
            model: the model's name.
            task: the task's name.
            settings: everything that decides the answers, by name; a resumed run must have the same.

        Raises:
            KitError: exit code 2, if samples are there that were made with other settings, or another model of this
                run has the same name.
        """
        self._clear()
        file = self.path / f"samples_{_safe(model)}_{_safe(task)}.jsonl"
        index = self.path / SETTINGS
        known: dict[str, Any] = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
        settings = json.loads(json.dumps(settings, default=str))
        if self._opened.setdefault(file.name, settings) != settings:
            raise KitError(
                f"two models are called {model}, and their samples would be mixed",
                where=str(file),
                next_step="rename one's folder, or evaluate them into two folders",
                exit_code=ExitCode.USAGE,
            )
        old = known.get(file.name, settings) if file.exists() else settings
        changed = sorted(name for name in settings.keys() | old.keys() if settings.get(name) != old.get(name))
        if changed:
            raise KitError(
                f"cannot resume: {', '.join(changed)} changed since these samples were made",
                where=str(file),
                next_step="evaluate with the same model, settings and versions, or --overwrite to start again",
                exit_code=ExitCode.USAGE,
            )
        _write(index, json.dumps({**known, file.name: settings}, indent=1) + "\n")
        return SampleLog(file)

    def write(self, result: dict[str, Any]) -> None:
        """Write results.json."""
        self._clear()
        _write(self.path / RESULTS, json.dumps(result, indent=1) + "\n")


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-")


def _line(sample: dict[str, Any]) -> str:
    return json.dumps(sample, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, **ENCODING)
