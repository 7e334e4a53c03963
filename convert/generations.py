"""Greedy continuations of held-out text, and how much of them repeats: what perplexity does not see."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from kit.convert.errors import ExitCode, KitError
from kit.convert.progress import Progress

PROMPT_TOKENS, NEW_TOKENS = 64, 128
BATCH_SIZE = 8
LOOP_TOKENS, LOOP_TURNS = 32, 3  # a loop is that long, and goes round that often


def settings(number: int, num_tokens: int, source: str) -> dict[str, Any]:
    """What the report says about the continuations.

    Raises:
        KitError: if so many held-out tokens do not hold so many prompts.
    """
    if number * PROMPT_TOKENS > num_tokens:
        raise KitError(
            f"{number} prompts of {PROMPT_TOKENS} tokens need {number * PROMPT_TOKENS:,} held-out tokens, "
            f"there are {num_tokens:,}",
            where="--generations",
            next_step="ask for fewer, or raise --num-tokens, or give a --dataset or more of its windows",
            exit_code=ExitCode.USAGE,
        )
    return {"prompts": number, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "from": source}


def prompts(tokens: Tensor, number: int) -> Tensor:
    """Prompts (number, 64), evenly spaced in held-out tokens of any shape."""
    pieces = tokens.flatten()[: tokens.numel() // PROMPT_TOKENS * PROMPT_TOKENS].view(-1, PROMPT_TOKENS)
    return pieces[torch.arange(number) * len(pieces) // number]


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Tensor, progress: Progress) -> dict[str, Any]:
    """Continue prompts (N, P) greedily, 128 tokens at most.

    Returns:
        `repetition` (mean over texts), `degenerate` (share of texts), and `samples`: `prompt` and `text` of each.
    """
    from transformers import GenerationConfig

    stops = model.generation_config.eos_token_id
    ends = set(stops) if isinstance(stops, list) else {stops}
    # What a checkpoint's own settings say of sampling or penalties would hide what is measured here.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=stops,
        pad_token_id=next(iter(ends)) or 0,
    )
    texts: list[list[int]] = []
    for batch in prompts.split(BATCH_SIZE):
        ids = batch.to(model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        for row in out[:, ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            texts.append(row[:end])
            progress.step()
    decoded = [tokenizer.decode(text, skip_special_tokens=True) for text in texts]
    bad = [loops(text) or not words.strip() for text, words in zip(texts, decoded, strict=True)]
    return {
        "repetition": sum(map(repetition, texts)) / len(texts),
        "degenerate": sum(bad) / len(bad),
        "samples": [
            {"prompt": tokenizer.decode(prompt), "text": text} for prompt, text in zip(prompts, decoded, strict=True)
        ],
    }


def repetition(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of n-grams that were there before: 1 - distinct / all (seq-rep-n, arXiv:1908.04319); 0 if there is none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(tokens: Sequence[Hashable]) -> bool:
    """Whether a text ends going round: its last tokens, at least 32, are one block three times or more."""
    for period in range(1, len(tokens) // LOOP_TURNS + 1):
        same = 0
        while same < len(tokens) - period and tokens[-1 - same] == tokens[-1 - same - period]:
            same += 1
        if same + period >= max(LOOP_TURNS * period, LOOP_TOKENS):
            return True
    return False
