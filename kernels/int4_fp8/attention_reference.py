"""Attention over the INT4 cache, the specification: what happens to heads, what is encoded, what a query reads.

Plain PyTorch, any device. Letters: B batch, H query heads, G key/value heads, T new tokens, N tokens in the cache
before them, D head dim, R slots of the ring of recent keys and values, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kit.kernels.int4_fp8.reference import INT4_MIN, quantize_activations, quantize_kv


@dataclass(frozen=True)
class Heads:
    """What one attention layer does to its queries and keys.

    Attributes:
        heads, kv_heads, dim: H, G and D.
        q_norm, k_norm: (D,), gains of an RMSNorm on heads before RoPE, or None.
        eps: of that norm.
        key_mean: (G, D), taken from keys after RoPE, or None.
        key_scale: (G, D), multiplies keys after RoPE and divides queries, or None.
        signs: (D, D) of ±1 in the dtype of the model: √D times a rotation of keys and queries, or None.
        query_fp8: round queries to FP8, one scale a token and head.
    """

    heads: int
    kv_heads: int
    dim: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    key_mean: Tensor | None = None
    key_scale: Tensor | None = None
    signs: Tensor | None = None
    query_fp8: bool = True


def prepare(
    qkv: Tensor, cos: Tensor, sin: Tensor, options: Heads, length: Tensor, start: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split a product into heads, apply RoPE and what the cache wants of keys, round queries.

    Roundings to the dtype of qkv are those of transformers' modules.

    Args:
        qkv: (B, T, (H + 2G)·D), queries, keys, values.
        cos, sin: (positions, D / 2); a token's position is its place in the cache, less its row's `start`.
        length: (1,), N.
        start: (B,), the place of each row's first real token: padding on the left comes before it.

    Returns:
        Queries (B, T, H, D) and (B, T, H), the numbers and what they are multiples of; keys and values (B, G, T, D).
    """
    h, g, d, dtype = options.heads, options.kv_heads, options.dim, qkv.dtype
    q, k, v = (x.unflatten(-1, (-1, d)) for x in qkv.split([h * d, g * d, g * d], dim=-1))
    place = length + torch.arange(qkv.shape[1], device=qkv.device)
    position = (place[None] - start[:, None]).clamp(min=0).long()
    c, s = (x[position].to(dtype)[:, :, None] for x in (cos, sin))
    if options.q_norm is not None and options.k_norm is not None:
        q, k = (_rms_norm(x, w, options.eps) for x, w in ((q, options.q_norm), (k, options.k_norm)))
    q, k = _rope(q, c, s), _rope(k, c, s)
    if options.key_mean is not None:
        k = (k.float() - options.key_mean.float()).to(dtype)
    if options.key_scale is not None:
        scale = options.key_scale.float()
        k = (k.float() * scale).to(dtype)
        q = (q.float() / scale.repeat_interleave(h // g, dim=0)).to(dtype)
    if options.signs is not None:
        q, k = ((x.float() @ options.signs.float() * d**-0.5).to(dtype) for x in (q, k))
    if options.query_fp8:
        codes, unit = quantize_activations(q)
        q, unit = codes.to(torch.float16), unit[..., 0]
    else:  # a power of two, so that nothing of bf16 is rounded
        unit = torch.exp2(q.float().abs().amax(-1).clamp(min=2.0**-126).log2().floor())
        q = (q.float() / unit[..., None]).to(torch.float32 if dtype == torch.float32 else torch.float16)
    return q, unit, k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def encode(
    x: Tensor, symmetric: bool, order: Tensor | None = None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize_kv` with scales apart from codes, so that rows of codes lie at whole vectors.

    Args:
        x: (B, G, T, D).

    Returns:
        Codes (B, G, T, D / 2) uint8, and (B, G, T) int32: the scale in bf16 in the lower 16 bits, the zero point + 8 in
        bf16 in the upper.
    """
    packed = quantize_kv(x, symmetric, order, factor)
    half = x.shape[-1] // 2
    scale = packed[..., half : half + 2].contiguous().view(torch.int16)[..., 0].to(torch.int32) & 0xFFFF
    zero = torch.full_like(scale, -INT4_MIN) if symmetric else packed[..., half + 2].to(torch.int32)
    upper = zero.to(torch.bfloat16).view(torch.int16).to(torch.int32) << 16
    return packed[..., :half].contiguous(), scale | upper


def decode_meta(meta: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points + 8 of `encode`, fp32."""
    lower = meta.to(torch.int16).view(torch.bfloat16).float()
    upper = (meta >> 16).to(torch.int16).view(torch.bfloat16).float()
    return lower, upper


def decode_kv(codes: Tensor, meta: Tensor) -> Tensor:
    """Undo `encode`: (..., T, D / 2) and (..., T) -> (..., T, D) fp32."""
    scale, zero = decode_meta(meta)
    return (torch.cat([codes & 15, codes >> 4], dim=-1).float() - zero[..., None]) * scale[..., None]


def from_ring(recent: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens that lie in a ring (..., R, D) after `count` tokens: (..., n, D) in order, and their places (n,)."""
    slots = recent.shape[-2]
    places = torch.arange(max(count - slots, 0), count, device=recent.device)
    return recent[..., places % max(slots, 1), :], places


def attend(
    q: Tensor,
    unit: Tensor,
    coded: tuple[Tensor, Tensor] | None,
    recent: tuple[Tensor, Tensor],
    places: Tensor,
    start: Tensor,
    window: int,
    scale: float,
    sliding: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Softmax attention in which a query reads the latest `window` keys as they are and earlier ones from codes.

    Args:
        q, unit: T queries of `prepare`, for the last places.
        coded: keys and values (B, G, S, D) of the places 0 ... S - 1, decoded; None if `window` says that none is read.
        recent: keys and values (B, G, n, D) of some places, as they are.
        places: (n,) of `recent`; the last is that of the last query.
        start: (B,), places before it are padding.
        window: keys, the query's own included.
        scale: of the scores.
        sliding: keys that a query may see at all.
        dtype: to compute in.

    Returns:
        (B, T, H, D); queries that see no key give 0.
    """
    heads, groups = q.shape[2], recent[0].shape[1]
    last = int(places[-1])
    query = (q.to(dtype) * unit.to(dtype)[..., None]).transpose(1, 2)
    at = torch.arange(last + 1 - q.shape[1], last + 1, device=q.device)
    keys, values, seen = [], [], []
    for (k, v), of, near in (((coded, torch.arange(last + 1, device=q.device), False),) if coded else ()) + (
        (recent, places, True),
    ):
        n = k.shape[2]
        distance = at[:, None] - of[None, :n]
        visible = (distance >= 0) & ((distance < window) if near else (distance >= window))
        if sliding is not None:
            visible = visible & (distance < sliding)
        keys.append(k.to(dtype))
        values.append(v.to(dtype))
        seen.append(visible[None] & (of[None, None, :n] >= start[:, None, None]))
    key, value = (torch.cat(x, 2).repeat_interleave(heads // groups, 1) for x in (keys, values))
    visible = torch.cat(seen, -1)[:, None]
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
    weights = torch.where(visible.any(-1, keepdim=True), scores, 0.0).softmax(-1) * visible
    return (weights @ value).transpose(1, 2)
