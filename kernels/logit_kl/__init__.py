"""KL of two sets of logits and its gradient: Triton on CUDA, PyTorch elsewhere. May overwrite the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from kit.kernels.logit_kl import reference
from kit.kernels.logit_kl.reference import top_k_kl_and_gradient


def kl_and_gradient(
    logits: Tensor, teacher: Tensor, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.kl_and_gradient`; the logits may be overwritten by their gradient."""
    if logits.is_cuda and softcap is None:
        try:
            from kit.kernels.logit_kl.kernel import kl_and_gradient_in_place
        except ImportError:
            return reference.kl_and_gradient(logits, teacher, scale)
        with torch.cuda.device(logits.device):
            return kl_and_gradient_in_place(logits, teacher, scale)
    return reference.kl_and_gradient(logits, teacher, scale, softcap)


__all__ = ["kl_and_gradient", "top_k_kl_and_gradient"]
