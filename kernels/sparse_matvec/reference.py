"""Products that skip inactive channels, in plain PyTorch: the specification of the kernels, and their dense fallback.

Letters: M rows of input (tokens), K input features, N output features, r the rank of the low-rank path.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def keep_mask(x: Tensor, threshold: float | Tensor, scale: Tensor | None = None) -> Tensor:
    """Which channels a token keeps: s_i = 1[|x_i|·scale_i > T] (R-Sparse, arXiv:2504.19449; TEAL without a scale).

    The score is computed in fp32. A NaN is kept, so that it surfaces in the output instead of vanishing.

    Args:
        x: (..., K).
        threshold: T, a number or an fp32 tensor of one; a negative one keeps everything.
        scale: (K,) fp32, or None for 1.

    Returns:
        (..., K) bool.
    """
    score = x.float().abs()
    if scale is not None:
        score = score * scale.float()
    return ~(score <= threshold)


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = W(s⊙x) + U_r S_r V_rᵀ((1−s)⊙x) + b, s from `keep_mask`, row by row (arXiv:2504.19449, eq. 5).

    Products are in the dtype of x, differentiable, and cost the same whatever s is.

    Args:
        x: (..., K).
        weight_t: (K, N), Wᵀ.
        threshold, scale: as for `keep_mask`.
        low_rank: ((U_r S_r)ᵀ (r, N), V_rᵀ (r, K)), or None.
        bias: (N,).

    Returns:
        (..., N), dtype of x.
    """
    keep = keep_mask(x, threshold, scale)
    y = F.linear(x.masked_fill(~keep, 0), weight_t.T, bias)
    if low_rank is not None:
        up_t, down = low_rank
        y = y + F.linear(F.linear(x.masked_fill(keep, 0), down), up_t.T)
    return y


def sparse_swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, thresholds: Tensor) -> Tensor:
    """h = s⊙a⊙(W_up x) with a = SiLU(W_gate x) and s_i = 1[|a_i| > t_i] (CHESS, arXiv:2409.01366, eq. 9; t_i = τ/μ_i).

    The product after it, W_down h, is `sparse_linear` with a threshold of 0. A NaN in a is kept.

    Args:
        x: (..., K).
        gate_weight, up_weight: (N, K).
        thresholds: (N,) fp32; a negative one keeps its channel always.

    Returns:
        (..., N), dtype of x.
    """
    gate = F.silu(F.linear(x, gate_weight))
    return (gate * F.linear(x, up_weight)).masked_fill(~keep_mask(gate, thresholds), 0)
