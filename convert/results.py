"""What a report is made from: kit_report.json, and what `kit eval --json` and `kit compare --json` printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from kit.convert.errors import ExitCode, KitError, closest
from kit.convert.figures import Node

OPEN = ConfigDict(extra="allow", strict=True)


class Position(TypedDict):
    """Perplexity of the tokens between two positions of a window."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    start: int
    end: int
    perplexity: float


class Mqar(TypedDict):
    """Recall of key-value pairs."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    length: int
    pairs: int
    accuracy: float


class Needle(TypedDict):
    """Recall of a fact at a depth (0 start, 1 end) of the context."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    length: int
    depth: float
    accuracy: float


class Recall(TypedDict):
    """Synthetic recall over context length."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    mqar: NotRequired[list[Mqar] | None]
    needle: NotRequired[list[Needle] | None]


class Sample(TypedDict):
    """One generated text."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    prompt: str
    text: str


class Generations(TypedDict):
    """Generated texts and what is wrong with them, as shares."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    repetition: NotRequired[float | None]
    degenerate: NotRequired[float | None]
    samples: NotRequired[list[Sample] | None]


class Task(TypedDict):
    """A task of the evaluation harness."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    metrics: dict[str, Any]
    num_samples: NotRequired[int | None]
    num_fewshot: NotRequired[int | None]
    correct: NotRequired[list[float] | None]


class Row(TypedDict):
    """One model or ablation."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    name: str
    perplexity: NotRequired[float | None]
    word_perplexity: NotRequired[float | None]
    self_perplexity: NotRequired[float | None]
    kl: NotRequired[float | None]
    top1: NotRequired[float | None]
    top5: NotRequired[float | None]
    prefill_tokens_per_second: NotRequired[float | None]
    decode_tokens_per_second: NotRequired[float | None]
    peak_memory_bytes: NotRequired[float | None]
    bytes: NotRequired[float | None]
    cache_bytes: NotRequired[dict[str, float] | None]
    perplexity_by_position: NotRequired[list[Position] | None]
    sparse_tokens: NotRequired[float | None]
    weights_skipped: NotRequired[float | None]
    dropped_inputs: NotRequired[dict[str, list[float]] | None]
    recall: NotRequired[Recall | None]
    generations: NotRequired[Generations | None]
    tasks: NotRequired[dict[str, Task] | None]


class Comparison(TypedDict):
    """A difference a − b with its 95 % interval."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    significant: bool
    samples: NotRequired[int | None]


class Results(TypedDict):
    """What `kit eval --json` and `kit compare --json` print."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    settings: NotRequired[dict[str, Any] | None]
    rows: list[Row]
    comparisons: NotRequired[list[Comparison] | None]


class Report(TypedDict):
    """kit_report.json, as far as a page cannot be made without it."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    model: dict[str, Any]
    recipes: list[dict[str, Any]]
    plan: NotRequired[dict[str, Any]]
    stages: NotRequired[dict[str, list[dict[str, Any]]]]
    data: NotRequired[list[dict[str, Any]]]
    environment: NotRequired[dict[str, Any]]
    cost: NotRequired[dict[str, Any]]
    verification: NotRequired[dict[str, Any]]
    command: NotRequired[str]
    evaluation: NotRequired[Results]


@dataclass(frozen=True)
class Inputs:
    """What a report is made from.

    Attributes:
        name: of the converted checkpoint's folder.
        report: kit_report.json.
        recipe_yaml: kit_recipe.yaml as it stands; None where there is none.
        measurements: each holds `settings`, `rows` and maybe `comparisons`; the later ones were given, the first is the
            conversion's own evaluation, where it made one.
    """

    name: str
    report: Node
    recipe_yaml: str | None
    measurements: list[Node]


def read_inputs(folder: Path, results: Iterable[Path] = ()) -> Inputs:
    """Read and check what a report is made from.

    Args:
        folder: a converted checkpoint.
        results: files that `kit eval --json` or `kit compare --json` printed.

    Raises:
        KitError: if a file is missing, is no JSON, or lacks a field; says which.
    """
    file = folder / "kit_report.json"
    if not file.is_file():
        known = [path.name for path in folder.parent.glob("*/") if (path / "kit_report.json").is_file()]
        raise KitError(
            "there is no report of a conversion" if folder.is_dir() else "there is no such folder",
            where=str(file if folder.is_dir() else folder),
            next_step=f"{closest(folder.name, known)}give a folder that `kit convert` or `kit quantize` wrote",
            exit_code=ExitCode.USAGE,
        )
    report = Node.document("kit_report.json", _read(file, TypeAdapter(Report), "`kit convert` writes it"))
    evaluation = report.get("evaluation")
    measurements = [evaluation] if evaluation else []
    files = list(dict.fromkeys(results))
    for path in files:
        same_name = sum(other.name == path.name for other in files) > 1
        value = _read(path, TypeAdapter(Results), "give what `kit eval --json` or `kit compare --json` printed")
        measurements.append(Node.document(str(path) if same_name else path.name, value))
    recipe = folder / "kit_recipe.yaml"
    return Inputs(
        name=folder.resolve().name,
        report=report,
        recipe_yaml=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
        measurements=measurements,
    )


def _read(file: Path, schema: TypeAdapter, next_step: str) -> Any:
    def wrong(what: str, where: str = str(file)) -> KitError:
        return KitError(what, where=where, next_step=next_step, exit_code=ExitCode.USAGE)

    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        siblings = [path.name for path in file.parent.glob("*.json")] if file.parent.is_dir() else []
        raise KitError(
            f"the results cannot be read: {error.strerror}",
            where=str(file),
            next_step=closest(file.name, siblings) + next_step,
            exit_code=ExitCode.USAGE,
        ) from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise wrong(f"this is not JSON: {error}") from error
    try:
        schema.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise wrong(f"a field is not as it should be: {where}: {first['msg']}", f"{file}, {where}") from error
    return value
