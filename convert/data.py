"""Text in: files, folders, hub data sets, or text sampled from the model itself; packed into rows of tokens."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import zlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kit.convert.errors import KitError, closest
from kit.convert.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

ROW_LENGTH = 512  # tokens of a held-out row that is sampled from a base model
FILE_TYPES = (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz")
TEXT_COLUMNS = ("text", "content")
CHAT_COLUMNS = ("messages", "conversations")
PROMPT_COLUMNS = ("instruction", "prompt", "question")
CONTEXT_COLUMNS = ("input", "context")
ANSWER_COLUMNS = ("output", "response", "completion", "answer")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
UNDERSTOOD = (
    f"{', '.join((*TEXT_COLUMNS, *CHAT_COLUMNS))}, or one of {'/'.join(PROMPT_COLUMNS)} "
    f"(with {'/'.join(CONTEXT_COLUMNS)} or not) and one of {'/'.join(ANSWER_COLUMNS)}"
)
POOL_CHARACTERS = 2**26  # read at least so much of a data set before drawing documents from it

Part = tuple[str, bool]  # of a document: text, and whether a model that is trained on it learns to write it


class DataConfig(BaseModel):
    """Calibration and training text."""

    model_config = ConfigDict(extra="forbid")

    dataset: str = Field(
        "self",
        description="Hub id, .txt/.jsonl(.gz)/.json/.parquet file, folder of them, or self: sampled from the model.",
    )
    split: str = Field("train", description="Split of a hub data set.")
    num_samples: int = Field(128, ge=1, description="Rows of data.")
    seq_len: int = Field(2048, ge=2, description="Tokens a row.")
    packing: Literal["documents", "concat"] = Field(
        "documents", description="documents: those that share a row do not see each other; concat: they do."
    )
    chat: bool | None = Field(
        None,
        description="Chat template for conversations: true needs it, false never, none where the tokenizer has one.",
    )


class TrainDataConfig(DataConfig):
    """Text that a model is trained on: whole documents, and which of their tokens count."""

    dataset: str = Field(
        "", description="Hub id, .txt/.jsonl(.gz)/.json/.parquet file, or folder of them; --train names it."
    )
    num_samples: int = Field(100_000, ge=1, description="Rows of data, at most.")
    seq_len: int = Field(512, ge=2, description="Tokens a row.")
    packing: Literal["documents", "concat"] = Field(
        "documents",
        description="documents: whole ones that do not see each other, and padding; concat: one stream.",
    )
    loss_on: Literal["answers", "all"] = Field(
        "answers", description="answers: of conversations, and of prompts and answers, only what is answered; all."
    )


@dataclass
class TokenRows:
    """Packed tokens, N rows of T.

    Attributes:
        input_ids: (N, T), int64.
        position_ids: (N, T), int64, from 0 again with each document: so transformers tells packed sequences apart.
        num_documents: documents that the rows hold, whole or in part.
        source: where the text is from.
        sha256: of the token ids.
        learned: (N, T), bool: the tokens that a model trained on the rows learns to write; None: all.
    """

    input_ids: Tensor
    position_ids: Tensor
    num_documents: int
    source: str
    sha256: str
    learned: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return self.input_ids.numel()

    def part(self, rows: slice) -> TokenRows:
        """Some of the rows; what is said of the documents is still said of all."""
        learned = None if self.learned is None else self.learned[rows]
        return replace(self, input_ids=self.input_ids[rows], position_ids=self.position_ids[rows], learned=learned)

    @property
    def labels(self) -> Tensor:
        """`input_ids` with -100 where nothing is to be learned (N, T).

        So it is where a document starts: its first token does not follow from the one before it. As transformers has
        it, labels are not shifted; the model does that.
        """
        ignored = self.position_ids == 0
        return self.input_ids.masked_fill(ignored if self.learned is None else ignored | ~self.learned, -100)

    @property
    def predicting(self) -> Tensor:
        """Tokens whose prediction counts (N, T), bool: the next one is in the row and `labels` has it.

        So neither padding counts, nor what comes after a document's end, nor what is not learned.
        """
        import torch

        return torch.nn.functional.pad(self.labels[:, 1:] != -100, (0, 1))

    def summary(self) -> dict[str, Any]:
        """What the report says about the data."""
        rows, length = self.input_ids.shape
        return {
            "source": self.source,
            "rows": rows,
            "seq_len": length,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "sha256": self.sha256,
            **({} if self.learned is None else {"learned_tokens": int((self.labels != -100).sum())}),
        }


def load_rows(
    config: DataConfig, tokenizer: Any, *, seed: int, model: Any = None, progress: Progress | None = None
) -> TokenRows:
    """Read or sample the rows that a config asks for; those of a `TrainDataConfig` know which tokens are learned.

    Documents are drawn from the data set's first 64 Mi characters (or 64 a token asked for, if that is more), so that a
    hub data set is not downloaded whole. A document starts with BOS where the tokenizer puts it there itself.

    Args:
        config: what and how much.
        tokenizer: the model's.
        seed: of the choice of documents, or of sampling.
        model: the model itself, for `dataset: self`.
        progress: shows sampling.

    Returns:
        (N, T) tokens; fewer rows than asked for if the text ends.

    Raises:
        KitError: if the data cannot be read, or holds less than one row (for training: nothing to learn).
    """
    if config.dataset == "self":
        if model is None:
            raise KitError(
                "to sample text from the model it has to be loaded",
                where="data.dataset: self",
                next_step="name a data set with --dataset",
            )
        return sample_from_model(model, tokenizer, config.num_samples, config.seq_len, seed, progress=progress)
    wanted = config.num_samples * config.seq_len
    train = config if isinstance(config, TrainDataConfig) else None
    answers = train is not None and train.loss_on == "answers"
    texts, characters = [], 0
    for parts in read_parts(config.dataset, config.split, tokenizer, config.chat, answers):
        texts.append(parts)
        characters += sum(len(text) for text, _ in parts)
        if characters >= max(POOL_CHARACTERS, 64 * wanted):
            break
    random.Random(seed).shuffle(texts)
    documents: list[list[int]] = []
    learned: list[list[bool]] | None = None if train is None else []
    found = 0
    for parts in texts:
        if found >= wanted:
            break
        documents.append(_document_ids("".join(text for text, _ in parts), tokenizer))
        if learned is not None:
            learned.append(_learned(parts, documents[-1], tokenizer))
        found += len(documents[-1])
    try:
        if learned is not None and config.packing == "documents":
            padding = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
            rows = pack_whole(
                documents, learned, config.seq_len, config.num_samples, tokenizer.eos_token_id, padding, seed
            )
        else:
            eos = tokenizer.eos_token_id
            rows = pack(documents, config.seq_len, config.num_samples, config.packing, eos, seed, learned)
    except KitError as error:
        error.where = config.dataset
        raise
    local = os.path.exists(Path(config.dataset).expanduser())
    rows.source = Path(config.dataset).name if local else f"{config.dataset} ({config.split})"
    return rows


def read_documents(spec: str, split: str = "train", tokenizer: Any = None, chat: bool | None = None) -> Iterator[str]:
    """Read documents from a file, a folder or the hub.

    A text file is one document: its lines, blank ones empty, joined by two line breaks (as GPTQ papers join the rows of
    WikiText-2). Rows of other files are a document each, empty ones too: a text column, or a conversation or a
    prompt and its answer (of several the first), put through the chat template (without one: joined by blank lines).

    Args:
        spec: a file, a folder (read in order of names), or a hub id.
        split: of a hub data set.
        tokenizer: has the chat template.
        chat: True: rows must be conversations, and the tokenizer have a template; False: no template; None: either.

    Raises:
        KitError: while reading, if something is missing, broken, empty, or has columns that are not understood.
    """
    for parts in read_parts(spec, split, tokenizer, chat):
        yield "".join(text for text, _ in parts)


def read_parts(
    spec: str, split: str = "train", tokenizer: Any = None, chat: bool | None = None, answers: bool = False
) -> Iterator[list[Part]]:
    """Read documents as `read_documents` does, in parts that say what a model should learn to write.

    Args:
        spec: a file, a folder (read in order of names), or a hub id.
        split: of a hub data set.
        tokenizer: has the chat template.
        chat: as for `read_documents`.
        answers: of conversations, and of prompts and answers, only the answers are learned, with what the template puts
            behind each; otherwise, and of plain text, everything.

    Raises:
        KitError: as `read_documents`, and if the chat template changes answers so that they cannot be found.
    """
    path = Path(spec).expanduser()
    if not os.path.exists(path):
        rows = _hub_rows(spec, split)
    elif path.is_dir():
        hidden = (file for file in sorted(path.rglob("*")) if _file_type(file) and file.is_file())
        files = [file for file in hidden if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not files:
            raise _unreadable(spec, f"the folder holds no {'/'.join(FILE_TYPES[:4])} file")
        for file in files:
            yield from read_parts(str(file), split, tokenizer, chat, answers)
        return
    else:
        rows = _file_rows(path)
    blank = True
    for where, row in rows:
        parts = _to_parts(row, where, tokenizer, chat, answers)
        blank = blank and not any(text.strip() for text, _ in parts)
        yield parts
    if blank:
        raise _unreadable(spec, "it holds no text")


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a local .jsonl, .json or .parquet file as they stand there, each with where it is (file and line).

    Raises:
        KitError: while reading, if the file is missing or broken, or is of another kind.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []
        raise _unreadable(str(path), f"there is no such file. {closest(path.name, siblings)}".strip())
    if (_file_type(path) or ".txt").startswith(".txt"):
        raise _unreadable(str(path), "rows with columns are needed, in a .jsonl, .json or .parquet file")
    yield from _file_rows(path)


def pack(
    token_lists: list[list[int]],
    seq_len: int,
    num_rows: int,
    packing: Literal["documents", "concat"],
    eos_token_id: int | None,
    seed: int,
    learned: list[list[bool]] | None = None,
) -> TokenRows:
    """Pack documents into rows of exactly `seq_len` tokens, each closed by `eos_token_id`, in a seeded order.

    A document that reaches over a row's end goes on in the next row as a document of its own. A single document (a text
    file) is cut into rows first, which are then shuffled. What does not fill a row is dropped.

    Args:
        token_lists: the documents' tokens; empty ones are left out.
        seq_len: T.
        num_rows: N, at most.
        packing: `documents`: positions start at 0 with each document and each row; `concat`: with each row only.
        eos_token_id: closes each document that it does not close already.
        seed: of the order.
        learned: for each document, which of its tokens are learned.

    Raises:
        KitError: if there is not one full row.
    """
    import torch

    documents = _closed(token_lists, learned, eos_token_id)
    single = len(documents) == 1
    if single:
        windows = documents[0].split(seq_len, dim=1)
        documents = [window for window in windows if window.shape[1] == seq_len] or documents
    random.Random(seed).shuffle(documents)
    lengths = torch.tensor([0, *(document.shape[1] for document in documents)])
    rows = min(int(lengths.sum()) // seq_len, num_rows)
    if not rows:
        raise KitError(
            f"the data holds {int(lengths.sum()):,} tokens, and one row needs {seq_len:,}",
            where="the data set",
            next_step="lower --seq-len, or give more text",
        )
    input_ids, counts = torch.cat(documents, dim=1)[:, : rows * seq_len].view(2, rows, seq_len)
    input_ids = input_ids.clone()
    starts = lengths.cumsum(0)[:-1]
    starts = starts[starts < rows * seq_len]
    position_ids = torch.arange(seq_len).repeat(rows, 1)
    if packing == "documents":
        last_start = torch.zeros(rows * seq_len, dtype=torch.long)
        last_start[starts] = starts % seq_len
        position_ids -= last_start.view(rows, seq_len).cummax(dim=1).values
    number = 1 if single else len(starts)
    return TokenRows(input_ids, position_ids, number, "", _hash(input_ids), None if learned is None else counts.bool())


def pack_whole(
    token_lists: list[list[int]],
    learned: list[list[bool]],
    seq_len: int,
    num_rows: int,
    eos_token_id: int | None,
    padding: int,
    seed: int,
) -> TokenRows:
    """Pack documents into rows of `seq_len` tokens without cutting any that fits, so that no answer loses its prompt.

    Documents come in a seeded order, each into the fullest row that has room for it (best fit). One that is longer than
    a row is cut into pieces, and pieces in which nothing is learned are left out. Rows end in padding, which is a
    document of its own: no token of another sees it.

    Args:
        token_lists: the documents' tokens; empty ones are left out.
        learned: for each document, which of its tokens are learned.
        seq_len: T.
        num_rows: N, at most.
        eos_token_id: closes each document that it does not close already.
        padding: token that fills rows up.
        seed: of the order.

    Raises:
        KitError: if nothing is learned.
    """
    import torch

    documents = [
        piece
        for document in _closed(token_lists, learned, eos_token_id)
        for piece in document.split(seq_len, dim=1)
        if piece[1, 1:].any()  # the first token of a document is never learned
    ]
    if not documents:
        raise KitError(
            f"in no row of {seq_len:,} tokens there is an answer to learn",
            where="the data set",
            next_step="raise --seq-len, or learn the prompts too (--set train_data.loss_on=all)",
        )
    random.Random(seed).shuffle(documents)
    rows: list[list[Tensor]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in documents:
        length = document.shape[1]
        place = bisect_left(room, (length, 0))
        if place < len(room):
            left, row = room.pop(place)
        elif len(rows) < num_rows:
            left, row = seq_len, len(rows)
            rows.append([])
        else:
            continue
        rows[row].append(document)
        insort(room, (left - length, row))
    ids = torch.full((len(rows), seq_len), padding)
    counts = torch.zeros(len(rows), seq_len, dtype=torch.bool)
    positions = torch.empty(len(rows), seq_len, dtype=torch.long)
    for number, row_documents in enumerate(rows):
        row_of = torch.cat(row_documents, dim=1)
        end = row_of.shape[1]
        ids[number, :end], counts[number, :end] = row_of[0], row_of[1].bool()
        lengths = [*(document.shape[1] for document in row_documents), seq_len - end]
        positions[number] = torch.cat([torch.arange(length) for length in lengths])
    return TokenRows(ids, positions, sum(map(len, rows)), "", _hash(ids), counts)


def _closed(token_lists: list[list[int]], learned: list[list[bool]] | None, eos_token_id: int | None) -> list[Tensor]:
    """Documents as (2, length): tokens, closed by `eos_token_id`, and whether each is learned; empty ones left out.

    The closing token is learned if what it closes is.
    """
    import torch

    closing = [] if eos_token_id is None else [eos_token_id]
    documents = []
    for ids, counts in zip(token_lists, learned or ([True] * len(ids) for ids in token_lists), strict=True):
        if ids:
            more = [] if ids[-1:] == closing else closing
            documents.append(torch.tensor([ids + more, counts + counts[-1:] * len(more)]))
    return documents


def sample_from_model(
    model: Any,
    tokenizer: Any,
    num_rows: int,
    seq_len: int,
    seed: int,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> TokenRows:
    """Sample text from a model: data-free calibration, as in LLM-QAT (arXiv:2305.17888).

    Each row is one document of T tokens: a token drawn uniformly from the vocabulary, then sampling at temperature 1.
    Special tokens are never drawn, so rows do not end early.

    Each token is drawn by inverting the distribution function at a number fixed by the seed, the row and the position:
    rows depend on `batch_size`, device and dtype only by way of rounding in the logits. The global random state is left
    alone, and so is each module's training mode.

    Args:
        model: causal language model.
        tokenizer: says which tokens are special.
        num_rows: N.
        seq_len: T.
        seed: of the sampling.
        batch_size: rows at a time; None: as many as a quarter of the free memory caches, 32 at most on a CPU.
        progress: shows tokens.

    Raises:
        KitError: if the model's logits are not finite.
    """
    import torch

    progress = progress or Progress()
    vocabulary = model.config.get_text_config().vocab_size
    allowed = ordinary_tokens(tokenizer, vocabulary)
    blocked = torch.ones(vocabulary, dtype=torch.bool, device=model.device)
    blocked[allowed] = False
    batch_size = batch_size or _rows_at_once(model, seq_len)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_rows, seq_len, dtype=torch.float64, generator=generator)
    first = torch.tensor(allowed)[(uniform[:, 0] * len(allowed)).long()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), progress.task("sample text from the model, tokens", num_rows * seq_len):
            batches = zip(first.split(batch_size), uniform.split(batch_size), strict=True)
            input_ids = torch.cat([_continue(model, *batch, blocked, progress) for batch in batches])
    finally:
        for module, training in modes:
            module.training = training
    position_ids = torch.arange(seq_len).repeat(num_rows, 1)
    return TokenRows(input_ids, position_ids, num_rows, "text sampled from the model itself", _hash(input_ids))


def _rows_at_once(model: Any, seq_len: int) -> int:
    from kit.convert.inspect import cache_bytes
    from kit.convert.measure import free_memory

    cost = cache_bytes(model.config.get_text_config().to_dict(), model.dtype.itemsize)
    fit = free_memory(str(model.device)) // 4 // (cost["per_token"] * seq_len + cost["constant"])
    return max(1, min(fit, 32 if model.device.type == "cpu" else 256))


def perplexity_windows(text: str, tokenizer: Any, seq_len: int = 2048, max_windows: int | None = None) -> Tensor:
    """Tokenize a text once, without special tokens, and cut it into windows (N, T) that do not overlap.

    Text shorter than a window makes one shorter window; otherwise the last, incomplete one is dropped.

    Raises:
        KitError: if the text has fewer than two tokens.
    """
    import torch

    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise KitError(
            f"perplexity needs two tokens, the text has {len(ids)}", where="--dataset", next_step="give more text"
        )
    if len(ids) < seq_len:
        return ids[None]
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)[:max_windows]


def _file_type(path: Path) -> str | None:
    return next((end for end in FILE_TYPES if path.name.lower().endswith(end)), None)


def _file_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a local file, each with where it is; a text file is one row."""
    file_type = _file_type(path)
    if file_type is None:
        suffix = f"'{path.suffix}' files" if path.suffix else "files without an ending"
        raise _unreadable(str(path), f"{suffix} are not understood")
    try:
        if file_type == ".parquet":
            yield from _parquet_rows(path)
            return
        # Lines are read here, not by datasets, which makes dates of text that looks like one, and names no broken line.
        with (gzip.open if file_type.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as lines:
            if file_type.startswith(".txt"):
                yield str(path), {"text": "\n\n".join(line if line.strip() else "" for line in lines)}
            elif file_type.startswith(".jsonl"):
                yield from _json_lines(path, lines)
            else:
                yield from _json_rows(path, lines.read())
    except UnicodeDecodeError as error:
        raise _unreadable(str(path), f"it is not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(str(path), str(error)) from error


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _unreadable(where, f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise _unreadable(where, "a row has to be a JSON object")
        yield where, row


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a .json file: a list of objects, or an object a line as in .jsonl."""
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, text.split("\n"))
        return
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise _unreadable(str(path), f"not JSON: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise _unreadable(f"{path}, row {number}", "a row has to be a JSON object")
        yield f"{path}, row {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        for row in load_dataset("parquet", data_files=str(path.absolute()), split="train", streaming=True):
            yield str(path), row
    except Exception as error:
        raise _unreadable(str(path), _first_line(error)) from error


def _hub_rows(spec: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a hub data set, downloaded as they are read; `datasets` no longer runs a repository's scripts."""
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", spec) or _file_type(Path(spec)):
        folder = Path(spec).expanduser().parent
        siblings = os.listdir(folder) if folder.is_dir() else []
        raise _unreadable(spec, f"there is no such file or folder. {closest(Path(spec).name, siblings)}".strip())
    from datasets import load_dataset

    try:
        for row in load_dataset(spec, split=split, streaming=True):
            yield f"{spec} ({split})", row
    except Exception as error:
        raise _unreadable(spec, f"no such file, and the hub gave: {_first_line(error)}") from error


def _to_parts(row: dict[str, Any], where: str, tokenizer: Any, chat: bool | None, answers: bool) -> list[Part]:
    """One row as text: its text column, or its conversation through the chat template."""
    messages = _messages(row, where)
    text = next((column for column in TEXT_COLUMNS if column in row), None)
    if chat and messages is None:
        raise KitError(
            "chat needs conversations, and this row holds none", where=where, next_step="set data.chat to none"
        )
    if text is not None and not chat and (row[text] is not None or messages is None):
        return [(_string(row, text, where), True)]
    if messages is None:
        raise KitError(
            f"the columns are not understood: {', '.join(row)}", where=where, next_step=f"rename them to {UNDERSTOOD}"
        )
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise KitError("the tokenizer has no chat template", where="data.chat", next_step="set data.chat to none")
    if chat is False or not template:
        parts: list[Part] = []
        for number, message in enumerate(messages):
            learn = not answers or message["role"] == "assistant"
            parts += [("\n\n" if number else "", not answers), (message["content"], learn)]
        return parts
    full = _render(messages, tokenizer, where)
    return _answers_in(full, messages, tokenizer, where) if answers else [(full, True)]


def _render(messages: list[dict[str, str]], tokenizer: Any, where: str) -> str:
    try:
        # Templates end in a line break after the end token; without it that token closes the document.
        return tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    except Exception as error:
        reason = f"the chat template refuses a row: {_first_line(error)}"
        raise KitError(reason, where=where, next_step="leave the row out, or set data.chat to false") from error


def _answers_in(full: str, messages: list[dict[str, str]], tokenizer: Any, where: str) -> list[Part]:
    """Find the answers in a conversation's text: what does not change when marks stand in their places is not theirs.

    An answer takes with it what the template puts behind the last one: the token that ends a turn.
    """
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not numbers:
        return [(full, False)]
    marked = [{**m, "content": f"\ue000{n}\ue001"} if n in numbers else m for n, m in enumerate(messages)]
    around = re.split("\ue000\\d+\ue001", _render(marked[: numbers[-1] + 1], tokenizer, where))
    closing = around[-1]
    for contents in ([messages[n]["content"] for n in numbers], [messages[n]["content"].strip() for n in numbers]):
        parts: list[Part] = []
        for before, content in zip(around, contents, strict=False):
            ends = bool(parts) and before.startswith(closing)
            parts += [(closing, True)] if ends else []
            parts += [(before[len(closing) :] if ends else before, False), (content, True)]
        parts.append((closing, True))
        found = "".join(text for text, _ in parts)
        if len(around) == len(numbers) + 1 and full.startswith(found):
            return [*parts, (full[len(found) :], False)]
    raise KitError(
        "the chat template changes the answers, so that they cannot be told from the prompts",
        where=where,
        next_step="learn both (--set train_data.loss_on=all), or leave the template out (--set train_data.chat=false)",
    )


def _messages(row: dict[str, Any], where: str) -> list[dict[str, str]] | None:
    """A row's conversation as role and content, or None if it holds none."""
    column = next((column for column in CHAT_COLUMNS if row.get(column)), None)
    if column is not None:
        turns = row[column] if isinstance(row[column], list) else [row[column]]
        for turn in turns:
            if (
                not isinstance(turn, dict)
                or not {"role", "from"} & turn.keys()
                or not {"content", "value"} & turn.keys()
            ):
                raise _unreadable(where, f"column '{column}' is no list of role and content, or of from and value")
        roles = [turn.get("role") or turn.get("from") for turn in turns]
        texts = [_string(turn, "content" if turn.get("content") is not None else "value", where) for turn in turns]
        return [{"role": ROLES.get(role, role), "content": text} for role, text in zip(roles, texts, strict=True)]
    prompt = next((column for column in PROMPT_COLUMNS if column in row), None)
    answer = next((column for column in ANSWER_COLUMNS if column in row), None)
    if prompt is None or answer is None:
        return None
    parts = [_string(row, column, where) for column in (prompt, *CONTEXT_COLUMNS)]
    return [
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": _string(row, answer, where, first=True)},
    ]


def _string(row: dict[str, Any], column: str, where: str, first: bool = False) -> str:
    """A column's text; `first`: of several, as data sets of questions give all answers that are right, the first."""
    value = row.get(column)
    if first and isinstance(value, list) and value:
        value = value[0]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _unreadable(where, f"column '{column}' holds a {type(value).__name__}, not text")
    return value


def _document_ids(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a document, with BOS if the tokenizer starts a text with it (a chat template writes its own)."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_ids(tokenizer)
    return [*opening, *ids] if ids and ids[:1] != opening else ids


def _learned(parts: list[Part], ids: list[int], tokenizer: Any) -> list[bool]:
    """Which of a document's tokens are learned: those that reach into a part that is; BOS is not."""
    if all(learn for _, learn in parts):
        return [True] * len(ids)
    if not tokenizer.is_fast:
        raise KitError(
            "this tokenizer does not tell which characters a token is of, so answers cannot be told from prompts",
            where="train_data.loss_on: answers",
            next_step="learn both with --set train_data.loss_on=all",
        )
    text = "".join(text for text, _ in parts)
    spans = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
    counts = [0]  # learned characters before each
    for part, learn in parts:
        counts += [counts[-1] + learn * (n + 1) for n in range(len(part))]
    learned = [counts[max(end, start + 1)] > counts[start] if start < len(text) else False for start, end in spans]
    return [False] * (len(ids) - len(learned)) + learned


def opening_ids(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer starts a text with it, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []


def ordinary_tokens(tokenizer: Any, vocab_size: int) -> list[int]:
    """Ids in the vocabulary that are no special tokens, sorted."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    ids = set(tokenizer.get_vocab().values()) - special - set(tokenizer.all_special_ids)
    return sorted(token for token in ids if token < vocab_size)


def _continue(model: Any, first: Tensor, uniform: Tensor, blocked: Tensor, progress: Progress) -> Tensor:
    """Sample rows (B, T) from their first tokens (B,): the token at t inverts the distribution at `uniform[:, t]`."""
    import torch

    from kit.modules.cache import carried_cache

    ids: list[Tensor] = [first.to(model.device)]
    cache: dict[str, Any] = {}
    for draw in uniform.to(model.device).T[1:]:
        out = model(ids[-1][:, None], use_cache=True, **cache)
        cache = carried_cache(out)
        logits = out.logits[:, -1].float().masked_fill(blocked, -torch.inf)
        cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1]
        if not total.isfinite().all():
            raise KitError("the model's logits are not finite", where="data.dataset: self", next_step="check the model")
        ids.append(torch.searchsorted(cumulative, (draw * total)[:, None], right=True)[:, 0])
        progress.step(len(first))
    progress.step(len(first))
    return torch.stack(ids, dim=1).cpu()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _unreadable(where: str, reason: str) -> KitError:
    return KitError(
        f"the data cannot be read: {reason}",
        where=where,
        next_step="give a hub id, a .txt/.jsonl/.json/.parquet file, a folder of them, or `self`",
    )


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
