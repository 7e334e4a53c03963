"""INT4 weights, FP8 activations, INT4 keys and values: the number formats and what a kernel computes with them.

Plain PyTorch, fp32 arithmetic; the specification that faster code is checked against. FireQ (arXiv:2505.20839),
sections
3.1 to 3.3. Letters: N output features, K input features, g group size, M tokens, B batch, G key/value heads, T time, D
head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_MIN_SUBNORMAL = 2.0**-9
INT4_MIN, INT4_MAX = -8, 7


# ---- INT4, eight in an int32; INT8, four


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes in [-8, 7] along the last dimension, as compressed-tensors' `pack-quantized` has it.

    Element i of a row is stored as code + 8 in bits 4·(i mod 8) of word i // 8; a last word that is not full ends in
    zeros.

    Args:
        codes: (..., K), any integer dtype.

    Returns:
        (..., ceil(K / 8)), int32.
    """
    return _pack(codes, 4)


def unpack_int4(packed: Tensor, size: int) -> Tensor:
    """Undo `pack_int4`: (..., ceil(size / 8)) int32 -> (..., size) int8."""
    shifts = 4 * torch.arange(8, device=packed.device, dtype=torch.int32)
    nibbles = ((packed[..., None] >> shifts) & 15).to(torch.int8)
    return nibbles.flatten(-2)[..., :size] + INT4_MIN


def pack_int8(codes: Tensor) -> Tensor:
    """The same of codes in [-128, 127], four in a word: (..., K) -> (..., ceil(K / 4)) int32."""
    return _pack(codes, 8)


def unpack_int8(packed: Tensor, size: int) -> Tensor:
    """Undo `pack_int8`: (..., ceil(size / 4)) int32 -> (..., size) int8."""
    return (packed.contiguous().view(torch.uint8) ^ 128).view(torch.int8)[..., :size]


def _pack(codes: Tensor, bits: int) -> Tensor:
    each = 32 // bits
    unsigned = F.pad(codes.to(torch.int64) + 2 ** (bits - 1), (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    words = (unsigned << (bits * torch.arange(each, device=codes.device))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


# ---- weights


def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return (codes - zero_point) · scale.

    Args:
        codes: (N, K), int8.
        scale: (N, K / g); one column is per-channel quantization.
        zero_point: (N, K / g), int8; None is zero.

    Returns:
        (N, K), fp32.
    """
    grouped = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    if zero_point is not None:
        grouped = grouped - zero_point.float()[..., None]
    return (grouped * scale.float()[..., None]).flatten(-2)


def table_weight(codes: Tensor, scale: Tensor, per_tensor: float) -> Tensor:
    """The weight that FireQ's table look-up kernel multiplies with: every product code · scale is rounded to e4m3.

    The kernel holds a table {-8σ, ..., 7σ} of e4m3 numbers for each group, σ = e4m3(scale · T), and multiplies its
    result with 1/T (section 3.1; the authors' accuracy simulation leaves this rounding out).

    Args:
        codes: (N, K), int8.
        scale: (N, K / g).
        per_tensor: the power of two T.

    Returns:
        (N, K), fp32.
    """
    return cast_fp8(dequantize_weight(codes, scale) * per_tensor).float() / per_tensor


def per_tensor_factor(scale: Tensor) -> float:
    """The power of two T that lifts a weight's group scales away from e4m3's smallest number (section 3.2).

    Among 1, 2, ..., 2^14, up to the last that keeps 8 · scale · T within e4m3, the smallest with the least underflow:
    Σ max(7·2^-9 - 7 · scale · T, 0) over groups.

    Args:
        scale: (N, K / g), of either sign.
    """
    largest, scale = float(scale.abs().max()), scale.abs().float()
    best, least = 1.0, float("inf")
    for exponent in range(15):
        factor = 2.0**exponent
        if exponent and 8 * largest * factor > FP8_MAX:
            break
        underflow = float((7 * (FP8_MIN_SUBNORMAL - scale * factor)).clamp(min=0).sum())
        if underflow < least:
            best, least = factor, underflow
    return best


def cast_fp8(x: Tensor) -> Tensor:
    """Round to e4m3, saturating at ±448 (a plain cast turns larger numbers into NaN)."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8)


# ---- activations


def divided(x: Tensor, number: float) -> Tensor:
    """x / number, to the same bits on every device: on a GPU, PyTorch multiplies by 1 / number, and ties turn."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic FP8, one scale a token.

    Args:
        x: (..., K).

    Returns:
        (..., K) e4m3 and (..., 1) fp32, x ≈ e4m3 · scale, scale = max|x| / 448. A row of zeros has scale 1; a NaN or
        an infinity makes its whole row NaN, so that it does not go unseen.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, divided(largest, FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny))
    return cast_fp8(x / scale), torch.where(largest.isfinite(), scale, torch.nan)


def round_activations(x: Tensor) -> Tensor:
    """What FP8 leaves of activations: quantized and dequantized, in the dtype they came in."""
    codes, scale = quantize_activations(x)
    return (codes.float() * scale).to(x.dtype)


def dequantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = X Wᵀ + b with X rounded to FP8 per token, accumulated in fp32.

    Args:
        x: (..., K).
        weight: (N, K), fp32, from `dequantize_weight` or `table_weight`.
        bias: (N,).

    Returns:
        (..., N) in x's dtype.
    """
    codes, scale = quantize_activations(x)
    y = F.linear(codes.float(), weight) * scale
    return (y if bias is None else y + bias.float()).to(x.dtype)


# ---- keys and values


def quantize_kv(x: Tensor, symmetric: bool, order: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """Quantize keys or values to INT4, one scale a token and head, really packed.

    Symmetric: scale = max|x| / 7.5. Asymmetric: scale = (max - min) / 15 over a range that holds 0, and a zero point.
    Scales are bf16 and rounded before the codes are chosen.

    Codes are the nearest, or, with `order` and `factor` from `shaping_factor`, noise-shaped: channel by channel, each
    rounding error spread over the channels to come so that what reads x (queries; the output projection) sees least of
    it. Who reads the cache need not know.

    Args:
        x: (B, G, T, D), D even.
        symmetric: no zero point.
        order: (G, D) integers, the order of the channels.
        factor: (G, D, D).

    Returns:
        (B, G, T, D / 2 + 2 or 3) uint8: element d in the low half of byte d and element d + D/2 in the high half, as
        code + 8; then the scale's two bytes, then the zero point + 8. One tensor, so that everything a cache does with
        its keys (crop, reorder, repeat) keeps scales and codes together.
    """
    x = x.float()
    if symmetric:
        scale = _cache_scale(divided(x.abs().amax(-1, keepdim=True), 7.5))
        zero = torch.zeros_like(scale)
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = _cache_scale(divided(high - low, 15))
        zero = (INT4_MIN - low / scale).round().clamp(INT4_MIN, INT4_MAX)
    if order is None or factor is None:
        codes = (x / scale + zero).round().clamp(INT4_MIN, INT4_MAX)
    else:
        codes = _shaped_codes(x / scale + zero, order, factor)
    codes = codes.nan_to_num().to(torch.int16) - INT4_MIN
    first, second = codes.chunk(2, dim=-1)
    packed = (first | second << 4).to(torch.uint8)
    parts = [packed, scale.to(torch.bfloat16).contiguous().view(torch.uint8)]
    if not symmetric:
        parts.append((zero.nan_to_num() - INT4_MIN).to(torch.uint8))
    return torch.cat(parts, dim=-1)


def shaping_factor(metric: Tensor, damp: float = 0.1) -> tuple[Tensor, Tensor]:
    """Prepare noise shaping for an error that costs eᵀ M e, as GPTQ does for weights (arXiv:2210.17323, Alg. 1).

    Args:
        metric: M (G, D, D), positive semidefinite.
        damp: added to the diagonal, as a share of its mean.

    Returns:
        The channels by falling M_dd, (G, D) int32, and (G, D, D) fp32 with unit diagonal: row i says what of channel
        i's error goes to each later channel, both counted in that order.
    """
    metric = metric.double()
    mean = metric.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    metric = metric + damp * mean[:, None, None] * torch.eye(metric.shape[1], dtype=metric.dtype, device=metric.device)
    order = metric.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    sorted_ = torch.stack([m[o][:, o] for m, o in zip(metric, order, strict=True)])
    upper = torch.linalg.cholesky(torch.linalg.inv(sorted_), upper=True)
    return order.to(torch.int32), (upper / upper.diagonal(dim1=1, dim2=2)[..., None]).float()


def _shaped_codes(x: Tensor, order: Tensor, factor: Tensor) -> Tensor:
    """Codes of x, in units of its scale (B, G, T, D)."""
    index = order.long()[None, :, None].expand_as(x)
    left, codes = x.gather(-1, index), torch.empty_like(x)
    factor = factor.float()
    for channel in range(x.shape[-1]):
        now = left[..., channel]
        code = now.round().clamp(INT4_MIN, INT4_MAX)
        codes[..., channel] = code
        left[..., channel + 1 :] -= (now - code)[..., None] * factor[None, :, None, channel, channel + 1 :]
    return torch.empty_like(codes).scatter_(-1, index, codes)


def dequantize_kv(packed: Tensor, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_kv`: (B, G, T, bytes) uint8 -> (B, G, T, D) in `dtype`."""
    tail = 2 if symmetric else 3
    halves, rest = packed[..., :-tail], packed[..., -tail:]
    scale = rest[..., :2].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    codes = torch.cat([halves & 15, halves >> 4], dim=-1).float() + INT4_MIN
    if not symmetric:
        codes = codes - (rest[..., 2:].float() + INT4_MIN)
    return (codes * scale).to(dtype)


def _cache_scale(scale: Tensor) -> Tensor:
    """Round a scale to bf16, away from zero where it would vanish; a NaN stays one."""
    rounded = scale.to(torch.bfloat16).float()
    return torch.where(rounded == 0, torch.finfo(torch.bfloat16).tiny, rounded)


# ---- rotations


def hadamard(size: int) -> Tensor:
    """Orthonormal Hadamard matrix H of order 2^k · m, H Hᵀ = 1, from Sylvester's and Paley's constructions.

    Paley I gives order q + 1 for a prime q ≡ 3 (mod 4), Paley II 2(q + 1) for a prime q ≡ 1 (mod 4): 12, 20, 28, 36,
    ...

    Returns:
        (size, size), fp64.

    Raises:
        ValueError: if no such construction has this order.
    """
    if size < 1:
        raise ValueError(f"no Hadamard matrix of order {size}")
    core, power = size, 0
    while (block := _paley(core)) is None:
        if core % 2:
            raise ValueError(f"no Hadamard matrix of order {size}: it is not 2^k · m for a known m")
        core, power = core // 2, power + 1
    for _ in range(power):
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    return block / size**0.5


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of entries ±1 that is no Kronecker product, or None."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    for q, doubled in ((order - 1, False), (order // 2 - 1, True)):
        if q < 3 or order % 4 or any(q % d == 0 for d in range(2, int(q**0.5) + 1)) or q % 4 != (1 if doubled else 3):
            continue
        squares = {i * i % q for i in range(1, q)}
        character = torch.tensor([0.0 if i == 0 else (1.0 if i in squares else -1.0) for i in range(q)]).double()
        index = torch.arange(q)
        conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        conference[1:, 1:] = character[(index[:, None] - index) % q]
        conference[0, 1:], conference[1:, 0] = 1.0, (1.0 if doubled else -1.0)
        one = torch.eye(q + 1, dtype=torch.float64)
        if not doubled:
            return conference + one
        plus, minus = (
            torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(),
            torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double(),
        )
        return torch.kron(conference, plus) + torch.kron(one, minus)
    return None
