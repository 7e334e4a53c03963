"""Specification of the KL of logits and of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = -1e4  # logarithm that stands for that of 0


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


def top_k_kl_and_gradient(
    logits: Tensor, tokens: Tensor, log_p: Tensor, log_rest: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """KL over the teacher's likeliest tokens and one bucket of all others, and its gradient by the logits.

    With K the kept tokens, r = Σ_{i∉K} p_i, s = Σ_{i∉K} q_i: KL = Σ_{i∈K} p_i (log p_i − log q_i) + r (log r − log s).
    It is never above the KL of the whole distributions, and equals it where all tokens are kept. The gradient is q − p̃,
    where p̃ is p on K, and r spread over the others as q is.

    Args:
        logits: (N, V), before any cap.
        tokens, log_p: (N, k), the kept tokens and their log-probabilities.
        log_rest: (N,), log r; −inf where nothing is left.
        scale: multiplies the gradient.
        softcap: c of c · tanh(logits / c); None: none. The teacher's probabilities have it in them.

    Returns:
        (N,) in fp32, nats; (N, V) in the dtype of `logits`.
    """
    capped = _capped(logits, softcap)
    log_q = capped.log_softmax(-1)
    at = tokens.long()
    kept = log_q.gather(-1, at)
    log_s = log_q.scatter(-1, at, -torch.inf).logsumexp(-1)
    p, r = log_p.exp(), log_rest.exp()
    beyond = torch.where(r > 0, r * (log_rest - log_s.clamp(min=LEAST)), 0.0)
    kl = (p * (log_p.clamp(min=LEAST) - kept)).sum(-1) + beyond
    # q − p̃ is q − r q / s off K, and q − p on it; q / s from logarithms: s may be too small for fp32
    q = log_q.exp()
    on_kept = q.gather(-1, at) - p
    share = log_q.add_((log_rest - log_s.clamp(min=LEAST))[:, None]).exp_()
    gradient = q.sub_(share).scatter_(-1, at, on_kept).mul_(scale)
    if softcap is not None:
        gradient = gradient * (1 - (capped / softcap) ** 2)
    return kl, gradient.to(logits.dtype)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    logits = logits.float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
