"""KORE augmentation (arXiv:2510.19316): a knowledge item becomes a tree of questions and answers to train on.

An item is a name and a text (and maybe an image). Its trunk is a dialogue of several rounds: template questions that
the text's own sentences answer, then questions that a writer grounds in the text. Its branches are recognition (yes or
no), a caption (the text summed up) and short answers. KORE asks GPT-4o and searches the web for more images; here the
writer is any model or none, and images are the ones given.

What a language model writes is kept only if it can be read strictly and stays with the text (`grounded`); what is
dropped is counted. A false statement is made only where the text says otherwise (`false_statements`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kit.convert.data import read_rows
from kit.convert.errors import ExitCode, KitError
from kit.convert.progress import Progress
from kit.convert.work import disk_errors, fingerprint
from kit.convert.writers import Reply, Writer, parse_pairs

NAME_COLUMNS, IMAGE_COLUMN = ("title", "name"), "image"
KINDS = ("dialogue", "recognition", "caption", "answer")
ABBREVIATIONS = ("mr", "mrs", "ms", "dr", "st", "prof", "no", "vs", "e.g", "i.e", "approx", "jr", "sr")
OTHERS = 64  # items that are looked at for false statements
SAME_FORM = 0.5  # share of plain words that two sentences have in common, to be about the same thing
SHORT_ANSWER, LONG_CAPTION = 6, 150  # words
CHUNK = 32  # items between two commits, at least


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DialogueTemplates(_Part):
    """Rounds that the text's sentences answer."""

    openings: list[str] = Field(min_length=1)
    image_openings: list[str] = Field(min_length=1)
    follow_ups: list[str] = Field(min_length=1)
    sentences: int = Field(ge=1)
    rounds: int = Field(ge=1)


class RecognitionTemplates(_Part):
    """Questions of yes or no."""

    text: list[str] = Field(min_length=1)
    image: list[str] = Field(min_length=1)
    suffix: str
    yes: str
    no: str
    statements: int = Field(ge=0)


class CaptionTemplates(_Part):
    """Questions that a paragraph answers."""

    text: list[str] = Field(min_length=1)
    image: list[str] = Field(min_length=1)
    suffix: str
    sentences: int = Field(ge=1)


class AnswerTemplates(_Part):
    """Questions that a word or a phrase answers."""

    blank: str = Field(min_length=1)
    complete: list[str] = Field(min_length=1)
    suffix: str
    questions: int = Field(ge=0)


class WriterTemplates(_Part):
    """What a writer is asked."""

    dialogue: str
    dialogue_rounds: int = Field(ge=1)
    caption: str
    answer: str


class Templates(_Part):
    """The file of templates, `configs/augment/templates.yaml` or the user's own."""

    image_token: str
    dialogue: DialogueTemplates
    recognition: RecognitionTemplates
    caption: CaptionTemplates
    answer: AnswerTemplates
    writer: WriterTemplates


@dataclass(frozen=True)
class Item:
    """One piece of knowledge: its name, its text, and the path of an image or None."""

    title: str
    text: str
    image: str | None = None

    @property
    def key(self) -> str:
        """A hash of name, text (both normalised) and image."""
        content = json.dumps([normalised(self.title), normalised(self.text), self.image])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def augment(
    source: Path,
    output: Path,
    *,
    writer: Writer | None,
    templates: Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turn a file of items into a JSONL file of conversations.

    Each row has `messages` (a list of role and content), `kind` (dialogue, recognition, caption or answer), `item` (its
    name), `key`, and, if any item has an image, `image`: the path as it was given, or an empty text. Rows that say the
    same (normalised) as an earlier one are left out.

    Finished items are appended to `.NAME.kit-part` beside the output, from which `resume` goes on; the output appears
    when all are done, and is the same however often the run was cut off.

    Args:
        source: .jsonl, .json or .parquet rows with title (or name), text, and maybe image.
        output: the .jsonl file to make.
        writer: None: templates only.
        templates: a file like configs/augment/templates.yaml, which is used otherwise.
        seed: of the choice of templates and statements, and of a writer that samples.
        limit: so many items at most.
        resume: go on with a run that was cut off.
        overwrite: replace an existing output, and forget a run that was cut off.
        progress: shows items.

    Returns:
        Counts: `items`, `repeated_items`, `records` by kind, `repeated_records`, and `dropped` by cause: `unreadable`
        lines of a writer, `ungrounded` and `too_long` answers; `no_false_statement`: items that none is justified for.

    Raises:
        KitError: before the writer is asked, if items or templates are wrong, the output exists, or a run that was cut
            off had other settings; later, if the writer fails.
    """
    progress = progress or Progress()
    tree = load_templates(templates)
    items, repeated = read_items(source, limit)
    identity = writer.identity if writer else {"writer": "none"}
    decides = fingerprint(
        {"items": [item.key for item in items], "templates": tree.model_dump(), "seed": seed, "writer": identity}
    )
    part = _PartFile(output, decides, resume=resume, overwrite=overwrite)
    chunk = max(CHUNK, writer.batch_size if writer else 0)
    with progress.task("augment, items", len(items)):
        for start in range(0, len(items), chunk):
            some = items[start : start + chunk]
            # A writer's batch stays the same when a run goes on, and so does its rounding.
            replies = _ask(writer, tree, some, seed) if writer and any(i.key not in part.done for i in some) else {}
            for item in some:
                if item.key not in part.done:
                    part.add(item.key, *_grow(item, items, tree, seed, replies.get(item.key)))
                progress.step()
    return part.finish(items, repeated)


def load_templates(path: Path | None = None) -> Templates:
    """Read templates, kit's own or a file's.

    Raises:
        KitError: exit code 2, naming the field: if something is missing or unknown, or a template has a name that
            nothing fills.
    """
    own = files("kit.configs").joinpath("augment").joinpath("templates.yaml")
    where = str(path or "configs/augment/templates.yaml")
    try:
        content = yaml.safe_load((path or own).read_text(encoding="utf-8"))
        tree = Templates.model_validate(content)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise _usage(f"the templates cannot be read: {str(error).splitlines()[0]}", where) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise _usage(first["msg"], f"{where}: {'.'.join(map(str, first['loc']))}") from error
    statement = {"title", "statement"}
    for field, texts, known in (
        ("dialogue", tree.dialogue.openings + tree.dialogue.image_openings + tree.dialogue.follow_ups, {"title"}),
        ("recognition.text", tree.recognition.text, statement),
        ("recognition.image", tree.recognition.image, {"title"}),
        ("caption", tree.caption.text + tree.caption.image, {"title"}),
        ("answer.complete", tree.answer.complete, {"statement"}),  # a title might be the answer
        ("writer", [tree.writer.dialogue, tree.writer.caption, tree.writer.answer], {"title", "text", "count"}),
    ):
        for text in texts:
            template = Template(text)
            unknown = set(template.get_identifiers()) - known
            if unknown or not template.is_valid():
                problem = f"nothing fills ${min(unknown)}" if unknown else "a dollar sign fills nothing; write $$"
                raise _usage(f"{problem}: {text!r}", f"{where}: {field}")
            if "statement" in known and "statement" not in template.get_identifiers():
                raise _usage(f"the template does not hold $statement: {text!r}", f"{where}: {field}")
    return tree


def read_items(source: Path, limit: int | None = None) -> tuple[list[Item], int]:
    """Items of a file, each once; how many were there before.

    Raises:
        KitError: naming the line, if a name or text is missing, or an image does not exist.
    """
    items: dict[str, Item] = {}
    repeated = 0
    for where, row in read_rows(source):
        if limit is not None and len(items) == limit:
            break
        title = next((row[column] for column in NAME_COLUMNS if row.get(column)), None)
        for name, value in (("title (or name)", title), ("text", row.get("text"))):
            if not isinstance(value, str) or not value.strip():
                raise KitError(
                    f"an item needs a {name}, a text that is not empty",
                    where=where,
                    next_step='write a JSON object a line: {"title": "...", "text": "..."}',
                )
        image = row.get(IMAGE_COLUMN) or None
        if image is not None and not (isinstance(image, str) and (source.parent / image).is_file()):
            raise KitError(
                f"there is no image {image!r}",
                where=where,
                next_step="give its path, absolute or from the folder of the items",
            )
        item = Item(" ".join(str(title).split()), row["text"].strip(), image)
        repeated += item.key in items
        items.setdefault(item.key, item)
    if not items:
        raise KitError("the file holds no item", where=str(source), next_step="write a JSON object a line")
    return list(items.values()), repeated


def _ask(writer: Writer, tree: Templates, items: Sequence[Item], seed: int) -> dict[str, dict[str, Reply]]:
    """The writer's replies by item and kind."""
    kinds = {"dialogue": tree.writer.dialogue, "caption": tree.writer.caption, "answer": tree.writer.answer}
    counts = {"dialogue": tree.writer.dialogue_rounds, "caption": 1, "answer": tree.answer.questions}
    asked = [(item, kind) for kind in kinds for item in items]
    prompts = [
        Template(kinds[kind]).substitute(title=item.title, text=item.text, count=counts[kind]) for item, kind in asked
    ]
    replies: dict[str, dict[str, Reply]] = {item.key: {} for item in items}
    own_seed = int(fingerprint({"seed": seed, "items": [item.key for item in items]})[:8], 16) >> 1
    for (item, kind), reply in zip(asked, writer.write(prompts, own_seed), strict=True):
        replies[item.key][kind] = reply
    return replies


def _grow(
    item: Item, items: Sequence[Item], tree: Templates, seed: int, replies: dict[str, Reply] | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The records of one item, and what was dropped on the way."""
    draw = random.Random(f"{seed} {item.key}")
    dropped: Counter[str] = Counter()
    replies = replies or {}
    conversations = [
        ("dialogue", _dialogue(item, tree, draw, replies.get("dialogue"), dropped)),
        *(("recognition", turns) for turns in _recognition(item, items, tree, draw, dropped)),
        ("caption", _caption(item, tree, draw, replies.get("caption"), dropped)),
        *(("answer", turns) for turns in _answers(item, tree, draw, replies.get("answer"), dropped)),
    ]
    records = []
    for kind, turns in conversations:
        if item.image:
            turns = [(f"{tree.image_token}\n{turns[0][0]}", turns[0][1]), *turns[1:]]
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        records.append(
            {"messages": messages, "kind": kind, "item": item.title, "key": item.key, "image": item.image or ""}
        )
    return records, dropped


Turns = list[tuple[str, str]]  # question and answer


def _dialogue(item: Item, tree: Templates, draw: random.Random, reply: Reply | None, dropped: Counter[str]) -> Turns:
    """Rounds that the text answers, in its order and whole, then the writer's."""
    options = tree.dialogue
    found = sentences(item.text)
    groups = [found[i : i + options.sentences] for i in range(0, len(found), options.sentences)]
    if len(groups) > options.rounds:
        groups[options.rounds - 1 :] = [[text for group in groups[options.rounds - 1 :] for text in group]]
    opening = draw.choice(options.image_openings if item.image else options.openings)
    follow_ups = _cycle(options.follow_ups, len(groups) - 1, draw)
    asked = [Template(text).substitute(title=item.title) for text in (opening, *follow_ups)]
    turns = [(question, " ".join(group)) for question, group in zip(asked, groups, strict=True)]
    return turns + _written(item, reply, turns, tree.writer.dialogue_rounds, dropped)


def _written(item: Item, reply: Reply | None, before: Turns, count: int, dropped: Counter[str]) -> Turns:
    """A writer's rounds that are readable, grounded and new."""
    if reply is None:
        return []
    pairs, dropped_lines = parse_pairs(reply)
    dropped["unreadable"] += dropped_lines
    seen = {normalised(question) for question, _ in before}
    turns: Turns = []
    for question, answer in pairs[:count]:
        if not (grounded(question, item) and grounded(answer, item)):
            dropped["ungrounded"] += 1
        elif normalised(question) not in seen:
            seen.add(normalised(question))
            turns.append((question, answer))
    return turns


def _recognition(
    item: Item, items: Sequence[Item], tree: Templates, draw: random.Random, dropped: Counter[str]
) -> list[Turns]:
    """Yes or no: of an image, whether it belongs to a name; of a text, whether statements hold."""
    options = tree.recognition
    asked: list[tuple[str, str]] = []
    if item.image:
        others = [other.title for other in _others(item, items, draw) if other.image and other.image != item.image]
        names = [(item.title, options.yes), *((title, options.no) for title in others[:1])]
        asked += [(Template(draw.choice(options.image)).substitute(title=name), said) for name, said in names]
    else:
        true = [text for text in sentences(item.text) if item.title in text]
        true = draw.sample(true, min(len(true), options.statements))
        false = false_statements(item, _others(item, items, draw), min(len(true), options.statements))
        dropped["no_false_statement"] += bool(true) and not false
        pairs = [(text, options.yes) for text in true] + [(text, options.no) for text in false]
        for statement, said in pairs:
            template = Template(draw.choice(options.text))
            asked.append((template.substitute(title=item.title, statement=statement), said))
    return [[(f"{question} {options.suffix}", said)] for question, said in asked]


def _caption(item: Item, tree: Templates, draw: random.Random, reply: Reply | None, dropped: Counter[str]) -> Turns:
    """The text summed up by the writer; by its first sentences if there is none, or it wrote something else."""
    options = tree.caption
    question = Template(draw.choice(options.image if item.image else options.text)).substitute(title=item.title)
    summary = " ".join(sentences(item.text)[: options.sentences])
    if reply is not None:
        text = reply.text.strip()
        if not reply.finished or not text or "\n" in text:
            dropped["unreadable"] += 1
        elif len(text.split()) > LONG_CAPTION:
            dropped["too_long"] += 1
        elif not grounded(text, item):
            dropped["ungrounded"] += 1
        else:
            summary = text
    return [(f"{question} {options.suffix}", summary)]


def _answers(
    item: Item, tree: Templates, draw: random.Random, reply: Reply | None, dropped: Counter[str]
) -> list[Turns]:
    """Gaps in the text's sentences, and the writer's questions that words of the text answer."""
    options = tree.answer
    gaps = [(statement, value) for text in sentences(item.text) for statement, value in _gaps(text, item, options)]
    gaps = [gaps[place] for place in sorted(draw.sample(range(len(gaps)), min(len(gaps), options.questions)))]
    asked = [(Template(draw.choice(options.complete)).substitute(statement=text), said) for text, said in gaps]
    for question, answer in _written(item, reply, asked, options.questions, dropped):
        short = answer.rstrip(".")
        if len(short.split()) > SHORT_ANSWER:
            dropped["too_long"] += 1
        elif not _holds(item.text, short):
            dropped["ungrounded"] += 1
        else:
            asked.append((question, short))
    return [[(f"{question} {options.suffix}", answer)] for question, answer in asked]


def _gaps(sentence: str, item: Item, options: AnswerTemplates) -> Iterator[tuple[str, str]]:
    """A sentence that names the item with one of its values left out; and with the name left out."""
    if item.title not in sentence:
        return
    for value in values(sentence, item.title):
        if sentence.count(value) == 1:
            yield sentence.replace(value, options.blank), value
    yield sentence.replace(item.title, options.blank), item.title


def false_statements(item: Item, others: Sequence[Item], count: int) -> list[str]:
    """Statements about other items, with this item's name put in, that its own text denies.

    A statement is taken only if the text has a sentence about the same thing with another value: the two share at
    least half of their plain words (names and numbers left out), and the statement has a name or number that the text
    does not hold. Silence of the text proves nothing, so most texts that differ in form give none.

    Args:
        item: of which they are false.
        others: items to take statements from, in order of preference.
        count: so many at most.
    """
    own = [(_plain_words(text, item.title), values(text, item.title)) for text in sentences(item.text)]
    found: list[str] = []
    for other in others:
        for text in sentences(other.text):
            if len(found) == count:
                return found
            if other.title not in text or item.title in text:
                continue
            plain, theirs = _plain_words(text, other.title), values(text, other.title)
            denied = any(ours and _overlap(plain, words) >= SAME_FORM for words, ours in own)
            statement = text.replace(other.title, item.title)
            if denied and any(not _holds(item.text, value) for value in theirs) and statement not in found:
                found.append(statement)
                break  # another item for the next one
    return found


def grounded(text: str, item: Item) -> bool:
    """Whether a text stays with an item's: every name and number in it is there, and half of its longer words."""
    known = f"{item.title} {item.text}"
    words = {word for word in normalised(text).split() if len(word) > 3}
    there = words & set(normalised(known).split())
    return all(_holds(known, value) for value in values(text, item.title)) and 2 * len(there) >= len(words)


def sentences(text: str) -> list[str]:
    """Sentences of a text: cut after . ! ? (not after an initial or a common abbreviation) and at line breaks."""
    found: list[str] = []
    for line in text.splitlines():
        start = 0
        for end in re.finditer(r"(?<=[.!?。！？])[\"'”’)]?(?:\s+|(?<=[。！？]))(?=\S)", line):
            last = re.search(r"(\S+)\.$", line[start : end.start()])
            word = last[1].lower().lstrip("(\"'") if last else ""
            if word in ABBREVIATIONS or (len(word) == 1 and word.isalpha()):
                continue
            found.append(line[start : end.end()].strip())
            start = end.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if sentence]


def values(text: str, title: str) -> list[str]:
    """Numbers and names in a sentence, in order: runs of words with capitals, but for its first word and the title."""
    masked = text.replace(title, " ; ")
    found: list[str] = []
    end = -1  # of the name before
    for match in re.finditer(r"\d[\w.,:/%-]*|[^\W\d_][\w'’-]*", masked):
        word, before = match[0], masked[: match.start()].rstrip()
        if word[0].isdigit():
            found.append(word.rstrip(".,:/-"))
        elif word[0].isupper() and word != "I" and before and before[-1] not in ".!?":
            if end == match.start() - 1 and masked[end] == " ":
                found[-1] += f" {word}"
            else:
                found.append(word)
            end = match.end()
    return list(dict.fromkeys(found))


def normalised(text: str) -> str:
    """Words without case and punctuation, one space between them."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _holds(text: str, part: str) -> bool:
    """Whether a text has these words in this order."""
    return f" {normalised(part)} " in f" {normalised(text)} "


def _plain_words(sentence: str, title: str) -> set[str]:
    """The words of a sentence without its values and title."""
    for value in (title, *values(sentence, title)):
        sentence = sentence.replace(value, " ")
    return set(normalised(sentence).split())


def _overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(len(a | b), 1)


def _others(item: Item, items: Sequence[Item], draw: random.Random) -> list[Item]:
    """Some other items, in a seeded order."""
    some = draw.sample(items, min(len(items), OTHERS + 1))
    return [other for other in some if normalised(other.title) != normalised(item.title)]


def _cycle(choices: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """So many of the choices in a seeded order, each again only after all others."""
    order = draw.sample(choices, len(choices))
    return [order[number % len(order)] for number in range(count)]


class _PartFile:
    """Finished items of a run, a JSON object a line; the first line says what decides the result."""

    def __init__(self, output: Path, decides: str, *, resume: bool, overwrite: bool) -> None:
        self.output, self.file = output, output.with_name(f".{output.name}.kit-part")
        self.done: dict[str, dict[str, Any]] = {}
        self._check_place(overwrite, resume)
        if self.file.exists() and resume:
            lines = self.file.read_text(encoding="utf-8", errors="replace").split("\n")  # a kill may cut a character
            if json.loads(lines[0] or "{}").get("decides") != decides:
                raise KitError(
                    "the run that was cut off had other items, templates, seed or writer",
                    where=str(self.file),
                    next_step="give the same again, or --overwrite to start anew",
                    exit_code=ExitCode.USAGE,
                )
            for line in lines[1:-1]:  # what follows the last line break was cut off by a kill
                row = json.loads(line)
                self.done[row["key"]] = row
        with disk_errors(self.file):
            rows = [{"decides": decides}, *self.done.values()]
            fresh = self.file.with_name(self.file.name + "-new")
            fresh.write_text("".join(_line(row) for row in rows), encoding="utf-8")
            os.replace(fresh, self.file)

    def _check_place(self, overwrite: bool, resume: bool) -> None:
        problem, advice = "", ""
        if self.output.suffix != ".jsonl":
            problem, advice = "the output is a .jsonl file", "-o NAME.jsonl"
        elif not self.output.absolute().parent.is_dir():
            problem, advice = "there is no such folder", "make it, or choose another"
        elif self.output.exists() and not overwrite:
            problem, advice = "the output exists already", "choose another name, or add --overwrite"
        elif self.file.exists() and not (resume or overwrite):
            problem, advice = (
                "a run into this output was cut off",
                "add --resume to go on, or --overwrite to start anew",
            )
        if problem:
            raise KitError(problem, where=f"-o {self.output}", next_step=advice, exit_code=ExitCode.USAGE)

    def add(self, key: str, records: list[dict[str, Any]], dropped: Counter[str]) -> None:
        """Append a finished item."""
        self.done[key] = {"key": key, "records": records, "dropped": dropped}
        with disk_errors(self.file), self.file.open("a", encoding="utf-8") as out:
            out.write(_line(self.done[key]))

    def finish(self, items: Sequence[Item], repeated: int) -> dict[str, Any]:
        """Write the output, each record once, and count."""
        kinds: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        dropped: Counter[str] = Counter()
        seen: set[str] = set()
        again = 0
        with_images = any(item.image for item in items)
        with disk_errors(self.output), self.file.with_name(self.file.name + "-new").open("w", encoding="utf-8") as out:
            for item in items:
                dropped.update(self.done[item.key]["dropped"])
                for record in self.done[item.key]["records"]:
                    said = normalised(" | ".join([record["image"], *(m["content"] for m in record["messages"])]))
                    if said in seen:
                        again += 1
                        continue
                    seen.add(said)
                    kinds[record["kind"]] += 1
                    out.write(_line(record if with_images else {k: v for k, v in record.items() if k != IMAGE_COLUMN}))
        os.replace(out.name, self.output)
        self.file.unlink()
        return {
            "items": len(items),
            "repeated_items": repeated,
            "records": dict(kinds),
            "repeated_records": again,
            "dropped": {name: count for name, count in sorted(dropped.items()) if count},
        }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _usage(what: str, where: str) -> KitError:
    return KitError(
        what,
        where=where,
        next_step="start from a copy of configs/augment/templates.yaml",
        exit_code=ExitCode.USAGE,
    )
