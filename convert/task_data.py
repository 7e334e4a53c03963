"""Local files for the tasks of lm-evaluation-harness: which file, which fields, how a row becomes one of the hub's.

A task of the harness is a prompt and a metric over rows of a data set on the hub. Offline, `--data-dir` serves the
rows; the harness's own YAML still makes the prompts and the scores. `SOURCES` says how a row in the plain form
`{query, choices, gold}`, which evaluation files often have, becomes a row with the hub's fields.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.convert.errors import ExitCode, KitError

Row = dict[str, Any]

SPLITS = {"validation": ("validation", "valid", "val", "dev")}  # other names that a split's file may have


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks of the harness to run, and how.

    Args:
        names: tasks, groups or tags of the harness.
        limit: at most so many samples a task (of a group: a subtask), the first ones.
        num_fewshot: examples in the prompt; None is each task's own number.
        data_dir: folder of local files; None downloads as the harness does.
        batch_size: requests a forward pass.
    """

    names: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    data_dir: Path | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        wrong = {
            "--limit": (self.limit, 1),
            "--num-fewshot": (self.num_fewshot, 0),
            "--batch-size": (self.batch_size, 1),
        }
        for option, (value, least) in wrong.items():
            if value is not None and value < least:
                raise KitError(
                    f"{value} is too small", where=option, next_step=f"use {least} or more", exit_code=ExitCode.USAGE
                )


@dataclass(frozen=True)
class Form:
    """One way to write a row: its fields with their types, and how the hub's row is made of it.

    `convert` raises ValueError for a value that it cannot use. `note` says what such a file cannot give back.
    """

    fields: dict[str, type | tuple[type, ...]]
    convert: Callable[[Row], Row] = dict
    note: str = ""


@dataclass(frozen=True)
class Source:
    """The files of one data set: `STEM_SPLIT.jsonl` or `.jsonl.gz`, and the forms that its rows may have.

    Args:
        dataset: last part of the hub id.
        name: configuration on the hub; None: any, and the rows of one are those whose `subset` field says its name.
        stem: first part of the file names.
        forms: the hub's own first.
        subset: field that names the configuration that a row belongs to.
        text: name of a text file that serves instead, by split, and what reads it.
    """

    dataset: str
    name: str | None
    stem: str
    forms: tuple[Form, ...]
    subset: str | None = None
    text: tuple[str, Callable[[str], list[Row]]] | None = None


def _letter(row: Row) -> Row:
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    return {"choices": {"text": row["choices"], "label": letters}, "answerKey": letters[row["gold"]]}


def _arc(row: Row) -> Row:
    return {"question": row["query"].removeprefix("Question: "), **_letter(row)}


def _openbookqa(row: Row) -> Row:
    return {"question_stem": row["query"], **_letter(row)}


def _hellaswag(row: Row) -> Row:
    """Take a cleaned context apart again.

    The harness joins "activity: ctx_a ctx_b", where it makes ctx_b's first letter a capital and the others small, and
    then cleans the text; cleaning twice changes nothing. ctx_b is the fragment that the endings go on from: what
    follows the last full stop, if it begins with a small letter. Other contexts have no ctx_b, or one that a capital
    does not change.
    """
    activity, colon, context = row["query"].partition(": ")
    if not colon:
        raise ValueError("'query' does not read 'activity: context'")
    fragment = re.search(r"(?<=[.!?]) [a-z][^.!?]*$", context)
    end = fragment.start() if fragment else len(context)
    ctx = {"ctx_a": context[:end], "ctx_b": context[end + 1 :]}
    return {"activity_label": activity, **ctx, "endings": row["choices"], "label": str(row["gold"])}


def _piqa(row: Row) -> Row:
    if len(row["choices"]) != 2:
        raise ValueError("'choices' are not two")
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def _boolq(row: Row) -> Row:
    parts = re.fullmatch(r"(?:Passage: )?(.*)\nQuestion: (.*?)\??", row["query"], re.DOTALL)
    if not parts:
        raise ValueError("'query' does not read 'Passage: ...', and on the next line 'Question: ...?'")
    if sorted(row["choices"]) != ["no", "yes"]:
        raise ValueError("'choices' are not 'no' and 'yes'")
    return {"passage": parts[1], "question": parts[2], "label": int(row["choices"][row["gold"]] == "yes")}


def _lambada(row: Row) -> Row:
    word = row["continuation"].strip(" ")
    if not word or " " in word:
        raise ValueError("'continuation' is not one word")
    return {"text": f"{row['context'].rstrip(' ')} {word}"}


def _mmlu(row: Row) -> Row:
    if len(row["choices"]) != 4:
        raise ValueError("'choices' are not four")
    return {name: row[name] for name in ("subject", "question", "choices")} | {"answer": row["gold"]}


def wikitext_pages(text: str) -> list[Row]:
    """Cut a raw WikiText file into documents, as `EleutherAI/wikitext_document_level` has them.

    A document opens with a heading of the first level (` = Title = `); headings of lower levels have `= =`. Like there,
    a formula that reads like such a heading opens one too: the test split has 62.
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = re.sub(r"= (?==)", "=", line).strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [{"page": page} for lines in pages if (page := "\n".join(lines)).strip()]


CHOICES: dict[str, type | tuple[type, ...]] = {"query": str, "choices": list, "gold": int}

SOURCES = (
    Source(
        "ai2_arc",
        "ARC-Easy",
        "arc_easy",
        (Form({"question": str, "choices": dict, "answerKey": str}), Form(CHOICES, _arc)),
    ),
    Source(
        "ai2_arc",
        "ARC-Challenge",
        "arc_challenge",
        (Form({"question": str, "choices": dict, "answerKey": str}), Form(CHOICES, _arc)),
    ),
    Source(
        "hellaswag",
        None,
        "hellaswag",
        (
            Form({"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": (str, int)}),
            Form(CHOICES, _hellaswag),
        ),
    ),
    Source("piqa", None, "piqa", (Form({"goal": str, "sol1": str, "sol2": str, "label": int}), Form(CHOICES, _piqa))),
    Source(
        "super_glue",
        "boolq",
        "boolq",
        (
            Form({"passage": str, "question": str, "label": int}),
            Form(
                CHOICES,
                _boolq,
                note="the hub's passages open with the article's title ('Ethanol fuel -- All biomass ...'); these do "
                "not, so that boolq scores differ from published ones",
            ),
        ),
    ),
    Source(
        "openbookqa",
        "main",
        "openbookqa",
        (Form({"question_stem": str, "choices": dict, "answerKey": str}), Form(CHOICES, _openbookqa)),
    ),
    Source(
        "lambada_openai",
        "default",
        "lambada_openai",
        (Form({"text": str}), Form({"context": str, "continuation": str}, _lambada)),
    ),
    Source(
        "mmlu",
        None,
        "mmlu",
        (
            Form({"subject": str, "question": str, "choices": list, "answer": int}),
            Form({"subject": str, "question": str, "choices": list, "gold": int}, _mmlu),
        ),
        subset="subject",
    ),
    Source("gsm8k", "main", "gsm8k", (Form({"question": str, "answer": str}),)),
    Source(
        "wikitext_document_level",
        "wikitext-2-raw-v1",
        "wikitext",
        (Form({"page": str}),),
        text=("wikitext2_raw_{split}.txt", wikitext_pages),
    ),
)


def parse_names(text: str) -> tuple[str, ...]:
    """The names in `--tasks a,b`.

    Raises:
        KitError: exit code 2, if there is none.
    """
    names = tuple(name for part in text.split(",") if (name := part.strip()))
    if not names:
        raise KitError(
            "no task is named", where="--tasks", next_step="name some: arc_easy,piqa", exit_code=ExitCode.USAGE
        )
    return names


def source_of(task: str, dataset: str | None, name: str | None) -> Source:
    """The files that serve a data set; one that `SOURCES` does not know has the task's name and the hub's fields."""
    last = (dataset or "").split("/")[-1].lower()
    for source in SOURCES:
        if source.dataset == last and source.name in (None, name):
            return source
    return Source(last, name, task, (Form({}),))


@dataclass
class TaskData:
    """A folder of local files, each read once.

    Args:
        folder: the folder.

    Raises:
        KitError: if it is no folder.
    """

    folder: Path
    hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of the files read, by name
    used: dict[str, dict[str, str]] = field(default_factory=dict)  # the same, by task
    notes: list[str] = field(default_factory=list)  # what the files cannot give back
    _rows: dict[str, list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise KitError(
                "the data folder is not there",
                where=str(self.folder),
                next_step="give the folder of the tasks' files with --data-dir (docs/evaluation.md names them)",
                exit_code=ExitCode.USAGE,
            )

    def rows(self, task: str, dataset: str | None, name: str | None, split: str) -> list[Row]:
        """The rows of one split of a task's data set, with the hub's fields.

        Raises:
            KitError: if there is no such file, or a line of it lacks a field or holds a value of the wrong kind.
        """
        source = source_of(task, dataset, name)
        file = self._file(source, task, split)
        if file.name not in self._rows:
            self.hashes[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
            self._rows[file.name] = self._read(file, source)
        self.used.setdefault(task, {})[file.name] = self.hashes[file.name]
        rows = self._rows[file.name]
        if source.subset:
            rows = [row for row in rows if row[source.subset] == name]
        if not rows:
            which = f" of {source.subset} '{name}'" if source.subset else ""
            raise _bad_file(file, f"it holds no row{which}", source)
        return rows

    def _file(self, source: Source, task: str, split: str) -> Path:
        stems = [f"{source.stem}_{other}" for other in SPLITS.get(split, (split,))]
        names = [f"{stem}.jsonl{gz}" for stem in stems for gz in ("", ".gz")]
        if source.text:
            names.insert(0, source.text[0].format(split=split))
        for candidate in names:
            if (self.folder / candidate).is_file():
                return self.folder / candidate
        raise KitError(
            f"there is no file for the {split} split of task {task}",
            where=f"{self.folder}: {', '.join(names)}",
            next_step=f"put {names[0]} there: {_expected(source)}",
            exit_code=ExitCode.USAGE,
        )

    def _read(self, file: Path, source: Source) -> list[Row]:
        if file.suffix == ".txt" and source.text:
            try:
                return source.text[1](file.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise _bad_file(file, "it is no UTF-8 text", source) from error
        found = []
        for number, row in _json_lines(file, source):
            form, row = _form_of(row, source, file, number)
            try:
                found.append(form.convert(row))
            except ValueError as error:
                raise _bad_file(file, str(error), source, number) from error
            if form.note and form.note not in self.notes:
                self.notes.append(form.note)
        return found


def _json_lines(file: Path, source: Source) -> Iterator[tuple[int, Row]]:
    """Rows with their line numbers; lines end at line feeds only, as some texts hold U+2028."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise _bad_file(file, "this is no JSON object", source, number)
                yield number, row
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _bad_file(file, f"this is no JSON: {error}", source, number) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _bad_file(file, f"it cannot be read: {error}", source, number + 1) from error


def _form_of(row: Row, source: Source, file: Path, number: int) -> tuple[Form, Row]:
    """The form of a row (with several, the one that it lacks least of), with its values checked."""
    form = min(source.forms, key=lambda form: len(form.fields.keys() - row.keys()))
    for name, kind in form.fields.items():
        if name not in row:
            raise _bad_file(file, f"field '{name}' is missing", source, number)
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            kinds = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
            raise _bad_file(file, f"field '{name}' is {type(row[name]).__name__}, not {kinds}", source, number)
    if "choices" in form.fields and form.fields["choices"] is list:
        choices = row["choices"]
        if not choices or not all(isinstance(choice, str) and choice for choice in choices):
            raise _bad_file(file, "field 'choices' is not a list of texts", source, number)
        answer = "gold" if "gold" in form.fields else "answer"
        if not 0 <= row[answer] < len(choices):
            raise _bad_file(file, f"field '{answer}' is {row[answer]}, with {len(choices)} choices", source, number)
    return form, row


def _expected(source: Source) -> str:
    fields = " or ".join("{" + ", ".join(form.fields) + "}" for form in source.forms if form.fields)
    rows = f"a JSON object a line, {fields or 'with the fields that the data set has on the hub'}"
    return f"the raw WikiText file, or {source.stem} with {rows}" if source.text else rows


def _bad_file(file: Path, what: str, source: Source, line: int | None = None) -> KitError:
    return KitError(
        what,
        where=str(file) if line is None else f"{file}, line {line}",
        next_step=f"make it {_expected(source)}",
        exit_code=ExitCode.USAGE,
    )
