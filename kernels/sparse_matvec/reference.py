"""Products that skip inactive channels, in plain PyTorch: the specification of the kernels, and their dense fallback.

Letters: M rows of input (tokens), K input features, N output features, r the rank of the low-rank path.
"""

from __future__ import annotations

import torch
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


# ---- weights in 4 bits


def quantize_int4(weight_t: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Round Wᵀ to the nearest of 16 evenly spaced numbers around 0, one spacing for each output and group of channels.

    Args:
        weight_t: (K, N), N even.
        group_size: channels that share a scale; divides K.

    Returns:
        packed (K, N / 2) uint8: byte c of a row holds the code of output c in its low four bits and that of output
        c + N / 2 in its high ones; and the scales (K / g, N), dtype of weight_t: a weight is (code − 8)·scale.

    Raises:
        ValueError: if the shape does not fit.
    """
    size, outputs = weight_t.shape
    if size % group_size or outputs % 2:
        raise ValueError(f"a weight of {size} inputs and {outputs} outputs has no groups of {group_size} or no halves")
    grouped = weight_t.float().unflatten(0, (-1, group_size))
    scale = (grouped.abs().amax(1) / 7).to(weight_t.dtype)
    codes = (grouped / scale.float().clamp(min=1e-30)[:, None]).round().clamp(-8, 7).flatten(0, 1) + 8
    low, high = codes.to(torch.uint8).chunk(2, 1)
    return (low | high << 4).contiguous(), scale


def dequantize_int4(packed: Tensor, weight_scale: Tensor) -> Tensor:
    """Wᵀ (K, N) of `quantize_int4`, dtype of the scales."""
    codes = torch.cat([packed & 15, packed >> 4], 1).float() - 8
    grouped = codes.unflatten(0, (weight_scale.shape[0], -1)) * weight_scale.float()[:, None]
    return grouped.flatten(0, 1).to(weight_scale.dtype)


def sparse_linear_int4(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """`sparse_linear` with the weights of `quantize_int4`."""
    return sparse_linear(x, dequantize_int4(packed, weight_scale), threshold, scale, bias=bias)
