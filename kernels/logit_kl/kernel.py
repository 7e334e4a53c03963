"""The KL of logits and its gradient in one launch: a program a row, which reads both rows twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _rows(logits, teacher, kl, vocabulary, row_stride, teacher_stride, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    teacher += row * teacher_stride
    top_q, top_p, sum_q, sum_p = -float("inf"), -float("inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        a = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
        b = tl.load(teacher + at, mask=inside, other=-float("inf")).to(tl.float32)
        new_q, new_p = tl.maximum(top_q, tl.max(a, 0)), tl.maximum(top_p, tl.max(b, 0))
        sum_q = sum_q * tl.exp(top_q - new_q) + tl.sum(tl.exp(a - new_q), 0)
        sum_p = sum_p * tl.exp(top_p - new_p) + tl.sum(tl.exp(b - new_p), 0)
        top_q, top_p = new_q, new_p
    log_q, log_p, total = top_q + tl.log(sum_q), top_p + tl.log(sum_p), 0.0
    for start in range(0, vocabulary, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < vocabulary
        a = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32) - log_q
        b = tl.load(teacher + at, mask=inside, other=0.0).to(tl.float32) - log_p
        p = tl.exp(b)
        total += tl.sum(tl.where(inside, p * (b - a), 0.0), 0)
        tl.store(logits + at, ((tl.exp(a) - p) * scale).to(logits.dtype.element_ty), mask=inside)
    tl.store(kl + row, total)


def kl_and_gradient_in_place(logits: Tensor, teacher: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `reference.kl_and_gradient` without a cap; the gradient takes the place of the logits (rows contiguous)."""
    kl = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _rows[(len(logits),)](
            logits, teacher, kl, logits.shape[1], logits.stride(0), teacher.stride(0), scale, BLOCK=BLOCK, num_warps=8
        )
    return kl, logits
