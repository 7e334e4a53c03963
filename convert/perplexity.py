"""What the losses of a text's windows say: perplexity of a token and of a word, and by position in the window."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from kit.convert.streaming import StreamedModel

BUCKETS = 8  # of positions in a window


def measures(losses: Tensor, words: int) -> dict[str, Any]:
    """Every figure that the windows of a data set give.

    Args:
        losses: (N, T - 1), nats: that of a window's second token, third, ...; the first has no context and no loss.
        words: words in the windows' text, as `count_words` counts them.

    Returns:
        `perplexity`, as GPTQ papers print it: exp of the mean loss a token; its standard error from the spread between
        windows; `word_perplexity`: exp(total nats / words); `perplexity_by_position`; `window_losses`: the mean loss of
        each window, in nats a token.
    """
    losses = losses.double()
    mean, error = mean_and_error(losses.mean(-1))
    found: dict[str, Any] = {"perplexity": _exp(mean), "perplexity_stderr": _exp(mean) * error}
    if words:
        found["word_perplexity"] = _exp(float(losses.sum()) / words)
    found["perplexity_by_position"] = by_position(losses)
    found["window_losses"] = losses.mean(-1).tolist()
    return found


def by_position(losses: Tensor, buckets: int = BUCKETS) -> list[dict[str, Any]]:
    """Perplexity by how many tokens of its window a token follows.

    Args:
        losses: (N, T - 1), nats: that of a window's second token, third, ...
        buckets: equal parts of the window; fewer where the window has fewer tokens.

    Returns:
        `start`, `end`: the bucket's tokens have at least `start` tokens before them, and fewer than `end`;
        `perplexity`: exp of their mean loss; `tokens`: how many they are, in all windows; `window_losses`: their mean
        loss in each window, in nats a token.
    """
    length = losses.shape[-1] + 1
    edges = sorted({round(length * i / buckets) for i in range(buckets + 1)})
    found = []
    for start, end in pairwise(edges):
        part = losses[:, max(start, 1) - 1 : end - 1]
        if part.numel():
            means = part.double().mean(-1)
            bucket = {"start": start, "end": end, "perplexity": _exp(float(means.mean())), "tokens": part.numel()}
            found.append({**bucket, "window_losses": means.tolist()})
    return found


def count_words(windows: Tensor, tokenizer: Any) -> int:
    """Words, split at whitespace, in the text of windows (N, T) that follow one another."""
    return len(tokenizer.decode(windows.flatten(), clean_up_tokenization_spaces=False).split())


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error (nan for a single value)."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def _exp(nats: float) -> float:
    """exp, or infinity where a broken model's loss leaves float64's range."""
    return math.exp(nats) if nats < 700 else math.inf


def streamed_perplexity(model: StreamedModel, hidden: Tensor, labels: Tensor) -> float:
    """Perplexity from what leaves the last layer of a streamed model.

    Args:
        model: whose final norm and head are applied.
        hidden: (N, T, hidden).
        labels: (N, T) as `TokenRows.labels`: not shifted, -100 where a token is not predicted.
    """
    import torch
    import torch.nn.functional as F

    head, total, count = model.head(), 0.0, 0
    with torch.no_grad():
        for row, target in zip(hidden, labels, strict=True):
            logits = head(row[:-1].to(model.device)).float()
            total += float(F.cross_entropy(logits, target[1:].to(logits.device), ignore_index=-100, reduction="sum"))
            count += int((target[1:] != -100).sum())
    return _exp(total / max(count, 1))
