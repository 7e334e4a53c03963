"""Text in: files, folders, hub data sets, or text sampled from the model itself; packed into rows of tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kit.convert.errors import KitError
from kit.convert.progress import Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TEXT_COLUMNS = ("text", "content")
CHAT_COLUMNS = ("messages", "conversations")
PROMPT_COLUMNS = ("instruction", "prompt", "question")
ANSWER_COLUMNS = ("output", "response", "completion", "answer")


class DataConfig(BaseModel):
    """Calibration and training text."""

    model_config = ConfigDict(extra="forbid")

    dataset: str = Field(
        "self", description="Hub id, a .txt/.jsonl/.json/.parquet file (or .gz), a folder, or self: sampled from the model."
    )
    split: str = Field("train", description="Split of a hub data set.")
    num_samples: int = Field(128, ge=1, description="Rows of data.")
    seq_len: int = Field(2048, ge=2, description="Tokens a row.")
    packing: Literal["documents", "concat"] = Field(
        "documents", description="documents: those that share a row do not see each other; concat: they do."
    )


@dataclass
class TokenRows:
    """Packed tokens: `input_ids` and `position_ids`, both (N, T).

    Positions start again at 0 with each document, which is how transformers tells packed sequences apart.
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
        """`input_ids` with -100 where a document starts: its first token does not follow from the one before it."""
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

    Args:
        config: what and how much.
        tokenizer: the model's.
        seed: of the order of documents, or of sampling.
        model: the model itself, for `dataset: self`.
        progress: shows sampling.

    Raises:
        KitError: if the data cannot be read, or holds less than one row.
    """
    if config.dataset == "self":
        return sample_from_model(model, tokenizer, config.num_samples, config.seq_len, seed, progress=progress)
    documents = read_documents(config.dataset, split=config.split, tokenizer=tokenizer)
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents]
    rows = pack(ids, config, eos_token_id=tokenizer.eos_token_id, seed=seed)
    rows.source = Path(config.dataset).name if Path(config.dataset).exists() else f"{config.dataset} ({config.split})"
    return rows


def read_documents(spec: str, *, split: str = "train", tokenizer: Any = None) -> list[str]:
    """Read documents from a file, a folder or the hub.

    A text file is one document: its lines, blank ones empty, joined by two line breaks (which is how GPTQ papers join the
    rows of WikiText-2). Rows of other files are a document each: a text column, or a conversation or a prompt and its
    answer, put through the tokenizer's chat template.

    Raises:
        KitError: if it cannot be read, is empty, or has columns that are not understood.
    """
    path = Path(spec).expanduser()
    if not path.exists():
        return [_to_text(row, spec, tokenizer) for row in _hub_rows(spec, split)]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _reader(file))
        if not files:
            raise _unreadable(spec, "the folder holds no .txt, .jsonl, .json or .parquet file")
        return [text for file in files for text in read_documents(str(file), tokenizer=tokenizer)]
    reader = _reader(path)
    if reader is None:
        raise _unreadable(spec, f"files of type '{path.suffix}' are not understood")
    rows = _rows(path, reader)
    if reader == "text":
        texts = ["\n\n".join(row["text"] if row["text"].strip() else "" for row in rows)]
    else:
        texts = [_to_text(row, spec, tokenizer) for row in rows]
    if not any(text.strip() for text in texts):
        raise _unreadable(spec, "it holds no text")
    return texts


def pack(token_lists: Iterable[list[int]], config: DataConfig, *, eos_token_id: int | None, seed: int) -> TokenRows:
    """Pack documents into rows of exactly `seq_len` tokens, each closed by `eos_token_id`, in a seeded order.

    A document that reaches over a row's end goes on in the next row as a document of its own. A single document (a text
    file) is cut into windows, which are then shuffled. The last, incomplete row is dropped.

    Raises:
        KitError: if there is not one full row.
    """
    import torch

    documents = [list(ids) for ids in token_lists if ids]
    if len(documents) == 1:
        only = documents[0]
        documents = [only[i : i + config.seq_len] for i in range(0, len(only), config.seq_len)]
    elif eos_token_id is not None:
        documents = [ids if ids[-1] == eos_token_id else [*ids, eos_token_id] for ids in documents]
    random.Random(seed).shuffle(documents)
    wanted = config.num_samples * config.seq_len
    ids: list[int] = []
    positions: list[int] = []
    used = 0
    for document in documents:
        if len(ids) >= wanted:
            break
        used += 1
        while document:
            room = config.seq_len - len(ids) % config.seq_len
            part, document = document[:room], document[room:]
            ids += part
            positions += range(len(part))
    rows = min(len(ids) // config.seq_len, config.num_samples)
    if not rows:
        raise KitError(
            f"the data holds {len(ids):,} tokens, less than one row of {config.seq_len:,}",
            where=f"data: {config.dataset}",
            next_step="lower --seq-len, or give more text",
        )
    input_ids, position_ids = (torch.tensor(x[: rows * config.seq_len]).view(rows, -1) for x in (ids, positions))
    if config.packing == "concat":
        position_ids = torch.arange(config.seq_len).expand(rows, -1).contiguous()
    return TokenRows(input_ids, position_ids, used, config.dataset, _hash(input_ids))


def sample_from_model(
    model: Any,
    tokenizer: Any,
    num_rows: int,
    seq_len: int,
    seed: int,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> TokenRows:
    """Sample text from a model: data-free calibration, as in LLM-QAT (arXiv:2305.17888).

    Each row is one document of `seq_len` tokens: a token drawn uniformly from the vocabulary, then sampling at
    temperature 1. Special tokens are never drawn, so rows do not end early. The result depends on seed, device, dtype and
    batch size; the global random state is left alone.

    Args:
        model: causal language model.
        tokenizer: says which tokens are special.
        num_rows: N.
        seq_len: T.
        seed: of the sampling.
        batch_size: rows at a time.
        progress: shows tokens.
    """
    import torch

    progress = progress or Progress()
    vocabulary = min(len(tokenizer), model.config.vocab_size)
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[:vocabulary] = True
    allowed[[i for i in tokenizer.all_special_ids if i < len(allowed)]] = False
    blocked = ~allowed.to(model.device)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    choices = allowed.nonzero().flatten()
    first = choices[torch.randint(len(choices), (num_rows, 1), generator=generator)]
    rows = []
    with torch.no_grad(), progress.task("sample text from the model, tokens", num_rows * seq_len):
        for batch in first.split(batch_size):
            ids = [batch.to(model.device)]
            cache = None
            for _ in range(seq_len - 1):
                out = model(ids[-1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                probabilities = out.logits[:, -1].float().masked_fill(blocked, -torch.inf).softmax(-1).cpu()
                ids.append(torch.multinomial(probabilities, 1, generator=generator).to(model.device))
                progress.step(len(batch))
            rows.append(torch.cat(ids, dim=1).cpu())
    input_ids = torch.cat(rows)
    positions = torch.arange(seq_len).expand(num_rows, -1).contiguous()
    return TokenRows(input_ids, positions, num_rows, "text sampled from the model itself", _hash(input_ids))


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
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    return windows if max_windows is None else windows[:max_windows]


def _reader(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return READERS.get(suffixes[-1]) if suffixes and path.is_file() else None


def _rows(path: Path, reader: str) -> Iterator[dict[str, Any]]:
    """Rows of a local file, through `datasets`, without its cache."""
    from datasets import load_dataset

    options: dict[str, Any] = {"keep_linebreaks": True} if reader == "text" else {}
    try:
        yield from load_dataset(reader, data_files=str(path.absolute()), split="train", streaming=True, **options)
    except Exception as error:
        reason = error.__cause__ or error
        raise _unreadable(str(path), f"{type(reason).__name__}: {str(reason).strip().splitlines()[0]}") from error


def _hub_rows(spec: str, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or _looks_like_file(spec):
        raise _unreadable(spec, "there is no such file or folder")
    try:
        yield from load_dataset(spec, split=split)
    except Exception as error:
        raise _unreadable(spec, f"neither a file nor to be had from the hub ({type(error).__name__})") from error


def _looks_like_file(spec: str) -> bool:
    return any(suffix in READERS for suffix in Path(spec).suffixes)


def _to_text(row: dict[str, Any], spec: str, tokenizer: Any) -> str:
    """One row as text: a text column, or a conversation through the chat template."""
    for column in TEXT_COLUMNS:
        if isinstance(row.get(column), str):
            return row[column]
    for column in CHAT_COLUMNS:
        if isinstance(row.get(column), list):
            roles = {"human": "user", "gpt": "assistant"}
            turns = [(m.get("role") or m.get("from"), m.get("content") or m.get("value")) for m in row[column]]
            return _chat([{"role": roles.get(role, role), "content": text} for role, text in turns], tokenizer)
    prompt = next((row[c] for c in PROMPT_COLUMNS if row.get(c)), None)
    answer = next((row[c] for c in ANSWER_COLUMNS if row.get(c)), None)
    if prompt is None or answer is None:
        known = ", ".join([*TEXT_COLUMNS, *CHAT_COLUMNS, f"{'/'.join(PROMPT_COLUMNS)} with {'/'.join(ANSWER_COLUMNS)}"])
        raise KitError(
            f"columns are not understood: {', '.join(row)}", where=spec, next_step=f"name them as one of: {known}"
        )
    if row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    return _chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": str(answer)}], tokenizer)


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> str:
    if tokenizer is not None and tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return "\n\n".join(message["content"] for message in messages)


def _unreadable(spec: str, reason: str) -> KitError:
    return KitError(
        f"the data cannot be read: {reason}",
        where=spec,
        next_step="give a hub id, a .txt/.jsonl/.json/.parquet file, a folder of them, or `self`",
    )


def _hash(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
