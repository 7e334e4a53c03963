"""Batched generation and scoring of texts of unequal length: padded, and as if each ran alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.convert.data import opening_ids


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, with BOS where the tokenizer starts texts with it and the text does not bring its own."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    opening = opening_ids(tokenizer)
    return ids if opening and ids[:1] == opening else [*opening, *ids]


def pad(rows: Sequence[Sequence[int]], fill: int, side: str, device: Any = None) -> tuple[Tensor, Tensor]:
    """Rows of tokens as a rectangle.

    Args:
        rows: N lists of tokens.
        fill: the id that pads.
        side: "left" or "right": where padding goes.
        device: of the result.

    Returns:
        (N, T) ids; (N, T) attention mask, 1 on tokens.
    """
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, *, temperature: float = 0.0
) -> list[tuple[str, bool]]:
    """Continue a batch of prompts; what the checkpoint's own settings say of sampling and penalties is left aside.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        prompts: texts.
        max_new_tokens: at most.
        temperature: 0 takes the most likely token; else sampled with torch's global random state.

    Returns:
        For each prompt the new text, and whether it ended by itself.
    """
    from transformers import GenerationConfig

    stops = model.generation_config.eos_token_id
    stops = tokenizer.eos_token_id if stops is None else stops
    ends = set(stops if isinstance(stops, list) else [stops]) - {None}
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=fill,
        **sampling,
    )
    ids, mask = pad([encode(tokenizer, prompt) for prompt in prompts], fill, "left", model.device)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    found = []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        found.append((tokenizer.decode(row[:end], skip_special_tokens=True), end is not None))
    return found


@torch.no_grad()
def score(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int, bool]]:
    """Log-likelihoods of continuations.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        pairs: (context, continuation); the two are tokenized as one text and cut where the context's tokens end, as
            lm-evaluation-harness does it. Neither is empty.

    Returns:
        For each pair: log-likelihood of the continuation in nats, its tokens, whether each is the most likely one.
    """
    rows, starts = [], []
    for context, continuation in pairs:
        kept = len(context) - len(context.rstrip())  # blanks belong to the word that follows
        context, continuation = context[: len(context) - kept], context[len(context) - kept :] + continuation
        rows.append(encode(tokenizer, context + continuation))
        starts.append(len(encode(tokenizer, context)))
    ids, mask = pad(rows, 0, "right", model.device)
    first = max(min(starts) - 1, 0)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, first:-1]
    found = []
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        log_p = F.log_softmax(logits[number, start - 1 - first : len(row) - 1 - first].float(), dim=-1)
        want = torch.tensor(row[start:], device=log_p.device)
        greedy = bool((log_p.argmax(-1) == want).all())
        found.append((float(log_p.gather(-1, want[:, None]).sum()), len(want), greedy))
    return found
