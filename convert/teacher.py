"""A teacher's next-token distributions, computed once with one layer in memory, and kept on disk for a training.

Of each token's distribution the likeliest next tokens are kept, and how much is left for all others together.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kit.convert.distill import LOGITS_AT_ONCE
from kit.convert.learned import TEACHER_TOKENS
from kit.convert.streaming import StreamedModel, streamed_hidden
from kit.convert.work import replacing

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit.convert.data import TokenRows
    from kit.convert.progress import Progress


class TopLogits(NamedTuple):
    """What is kept of a teacher's distributions.

    Attributes:
        tokens: (B, T, k), int32: the likeliest next tokens.
        log_p: (B, T, k), fp32: their log-probabilities.
        log_rest: (B, T), fp32: log-probability of all others together; −inf where there are none.
    """

    tokens: Tensor
    log_p: Tensor
    log_rest: Tensor


class CachedTeacher:
    """Files that hold `TopLogits` of all rows, each of as many rows as one pass over the layers takes.

    Args:
        stem: of the files: `<stem>.teacher-0000.safetensors` and so on.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.starts: list[int] = []
        self._files: list[Any] = []

    def fill(self, model: Callable[[], StreamedModel], rows: TokenRows, top_k: int, progress: Progress) -> None:
        """Run the teacher on all rows; files that a killed run has finished are taken as they are.

        Args:
            model: makes the teacher; called only if a file is missing.
            rows: N rows of T tokens.
            top_k: k; the vocabulary's size at most.
            progress: shows rows.

        Raises:
            KitError: if the disk is full.
        """
        count, length = rows.input_ids.shape
        size = max(TEACHER_TOKENS // length, 1)  # of one pass, and of one file
        self.starts, self._files = [], []
        teacher: StreamedModel | None = None
        with progress.task("teacher, rows", count):
            for number, start in enumerate(range(0, count, size)):
                part = rows.part(slice(start, start + size))
                file = self.stem.with_name(f"{self.stem.name}.teacher-{number:04d}.safetensors")
                if not file.exists():
                    teacher = teacher or model()
                    with replacing(file) as unfinished:
                        save_file(_distributions(teacher, part, top_k)._asdict(), unfinished)
                self.starts.append(start)
                self._files.append(safe_open(file, framework="pt"))
                progress.step(len(part.input_ids))

    def __call__(self, rows: Tensor) -> TopLogits:
        """What is kept for some rows (B,), on the CPU."""
        found: list[list[Tensor]] = [[], [], []]
        for row in rows.tolist():
            at = bisect_right(self.starts, row) - 1
            for parts, name in zip(found, TopLogits._fields, strict=True):
                parts.append(self._files[at].get_slice(name)[row - self.starts[at]])
        return TopLogits(*map(torch.stack, found))


@torch.no_grad()
def _distributions(teacher: StreamedModel, rows: TokenRows, top_k: int) -> TopLogits:
    hidden = streamed_hidden(teacher, rows.input_ids, rows.position_ids).flatten(0, 1)
    head = teacher.head()
    weight: Any = head[1].weight
    vocabulary = len(weight)
    parts = []
    for chunk in hidden.split(max(LOGITS_AT_ONCE // vocabulary, 1)):
        log_p = head(chunk.to(teacher.device)).float().log_softmax(-1)
        kept, tokens = log_p.topk(min(top_k, vocabulary), -1)
        rest = log_p.scatter_(-1, tokens, -torch.inf).logsumexp(-1)
        parts.append(TopLogits(tokens.int().cpu(), kept.cpu(), rest.cpu()))
    shape = rows.input_ids.shape
    return TopLogits(*(torch.cat(each).unflatten(0, shape) for each in zip(*parts, strict=True)))


def labels_as_teacher(labels: Tensor) -> TopLogits:
    """Next tokens as certain distributions, so that their KL is the next-token loss.

    Args:
        labels: (B, T), not shifted, as transformers has them; what is ignored has to count nothing.
    """
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1)).clamp(min=0)
    certain = torch.zeros(labels.shape)
    return TopLogits(following[..., None].int(), certain[..., None], torch.full(labels.shape, -torch.inf))
