"""Text in: files, folders, hub data sets, or text sampled from the model itself; packed into rows of tokens."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kit.convert.errors import KitError, closest
from kit.convert.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass
class TokenRows:
    """Packed tokens, N rows of T.

    Attributes:
        input_ids: (N, T), int64.
        position_ids: (N, T), int64, from 0 again with each document: so transformers tells packed sequences apart.
        num_documents: documents that the rows hold, whole or in part.
        source: where the text is from.
        sha256: of the token ids.
    """

    input_ids: Tensor
    position_ids: Tensor
    num_documents: int
    source: str
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return self.input_ids.numel()

    @property
    def labels(self) -> Tensor:
        """`input_ids` with -100 where a document starts: its first token does not follow from the one before it (N, T).

        As transformers has it, labels are not shifted; the model does that.
        """
        return self.input_ids.masked_fill(self.position_ids == 0, -100)

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
        }


def load_rows(
    config: DataConfig, tokenizer: Any, *, seed: int, model: Any = None, progress: Progress | None = None
) -> TokenRows:
    """Read or sample the rows that a config asks for.

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
        KitError: if the data cannot be read, or holds less than one row.
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
    texts, characters = [], 0
    for text in read_documents(config.dataset, config.split, tokenizer, config.chat):
        texts.append(text)
        characters += len(text)
        if characters >= max(POOL_CHARACTERS, 64 * wanted):
            break
    random.Random(seed).shuffle(texts)
    documents: list[list[int]] = []
    found = 0
    for text in texts:
        if found >= wanted:
            break
        documents.append(_document_ids(text, tokenizer))
        found += len(documents[-1])
    try:
        rows = pack(documents, config.seq_len, config.num_samples, config.packing, tokenizer.eos_token_id, seed)
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
    prompt and its answer, put through the chat template (without one: joined by blank lines).

    Args:
        spec: a file, a folder (read in order of names), or a hub id.
        split: of a hub data set.
        tokenizer: has the chat template.
        chat: True: rows must be conversations, and the tokenizer have a template; False: no template; None: either.

    Raises:
        KitError: while reading, if something is missing, broken, empty, or has columns that are not understood.
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
            yield from read_documents(str(file), split, tokenizer, chat)
        return
    else:
        rows = _file_rows(path)
    blank = True
    for where, row in rows:
        text = _to_text(row, where, tokenizer, chat)
        blank = blank and not text.strip()
        yield text
    if blank:
        raise _unreadable(spec, "it holds no text")


def pack(
    token_lists: list[list[int]],
    seq_len: int,
    num_rows: int,
    packing: Literal["documents", "concat"],
    eos_token_id: int | None,
    seed: int,
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

    Raises:
        KitError: if there is not one full row.
    """
    import torch

    closing = [] if eos_token_id is None else [eos_token_id]
    documents = [torch.tensor(ids if ids[-1:] == closing else ids + closing) for ids in token_lists if ids]
    single = len(documents) == 1
    if single:
        documents = [window for window in documents[0].split(seq_len) if len(window) == seq_len] or documents
    random.Random(seed).shuffle(documents)
    lengths = torch.tensor([0, *map(len, documents)])
    rows = min(int(lengths.sum()) // seq_len, num_rows)
    if not rows:
        raise KitError(
            f"the data holds {int(lengths.sum()):,} tokens, and one row needs {seq_len:,}",
            where="the data set",
            next_step="lower --seq-len, or give more text",
        )
    input_ids = torch.cat(documents)[: rows * seq_len].view(rows, seq_len)
    starts = lengths.cumsum(0)[:-1]
    starts = starts[starts < rows * seq_len]
    position_ids = torch.arange(seq_len).repeat(rows, 1)
    if packing == "documents":
        last_start = torch.zeros(rows * seq_len, dtype=torch.long)
        last_start[starts] = starts % seq_len
        position_ids -= last_start.view(rows, seq_len).cummax(dim=1).values
    return TokenRows(input_ids, position_ids, 1 if single else len(starts), "", _hash(input_ids))


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
    allowed = ordinary_tokens(tokenizer, model.config.get_text_config().vocab_size)
    blocked = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool, device=model.device)
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

    cost = cache_bytes(model.config.to_dict(), model.dtype.itemsize)
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


def _to_text(row: dict[str, Any], where: str, tokenizer: Any, chat: bool | None) -> str:
    """One row as text: its text column, or its conversation through the chat template."""
    messages = _messages(row, where)
    text = next((column for column in TEXT_COLUMNS if column in row), None)
    if chat and messages is None:
        raise KitError(
            "chat needs conversations, and this row holds none", where=where, next_step="set data.chat to none"
        )
    if text is not None and not chat and (row[text] is not None or messages is None):
        return _string(row, text, where)
    if messages is None:
        raise KitError(
            f"the columns are not understood: {', '.join(row)}", where=where, next_step=f"rename them to {UNDERSTOOD}"
        )
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise KitError("the tokenizer has no chat template", where="data.chat", next_step="set data.chat to none")
    if chat is False or not template:
        return "\n\n".join(message["content"] for message in messages)
    try:
        # Templates end in a line break after the end token; without it that token closes the document.
        return tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    except Exception as error:
        reason = f"the chat template refuses a row: {_first_line(error)}"
        raise KitError(reason, where=where, next_step="leave the row out, or set data.chat to false") from error


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
        {"role": "assistant", "content": _string(row, answer, where)},
    ]


def _string(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
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
