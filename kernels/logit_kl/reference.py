"""Specification of the KL of logits and of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_and_gradient(
    logits: Tensor, teacher: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """KL(softmax(teacher) ‖ softmax(logits)) of each row, and the gradient of its sum, times `scale`, by the logits.

    With p and q the two distributions, KL = Σ p (log p − log q) and its gradient is q − p; where logits are capped,
    c · tanh(z / c), times the cap's slope.

    Args:
        logits, teacher: (N, V), before any cap.
        scale: multiplies the gradient.
        softcap: c, of both; None: none.

    Returns:
        (N,) in fp32, nats; (N, V) in the dtype of `logits`.
    """
    capped = _capped(logits, softcap)
    log_q, log_p = capped.log_softmax(-1), _capped(teacher, softcap).log_softmax(-1)
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    gradient = log_q.exp_().sub_(p).mul_(scale)
    if softcap is not None:
        gradient = gradient * (1 - (capped / softcap) ** 2)
    return kl, gradient.to(logits.dtype)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
