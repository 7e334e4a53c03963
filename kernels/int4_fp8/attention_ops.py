"""Attention over the INT4 cache on Triton: launches, registered with torch.library. Caches are updated in place."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kit.kernels.int4_fp8 import attention_kernel as kernels
from kit.kernels.int4_fp8.attention_reference import Heads
from kit.kernels.int4_fp8.dispatch import ceil_div, launch, power_of_two
from kit.kernels.operations import operation

PROGRAMS = 396  # of `decode` that run at a time on an H100 or H200: three on each of its 132 multiprocessors
NEAR_KEYS = 64  # recent keys a program
PROMPT_ROWS = 32  # pairs (token, head) a program of `prepare`, of prompts
NEAREST_ROWS = 64  # tokens a program of `encode`, of prompts whose codes are the nearest
SHAPED_ROWS = 32  # tokens a program of `encode`, a thread each, where codes are noise-shaped
SHAPED_CHANNELS = 16  # channels whose errors are spread one by one
LOG2E = 1.4426950408889634
NO_LIMIT = 2**30  # keys a query may see, where there is no limit
COMPILED = os.environ.get("TRITON_INTERPRET") != "1"


def unsupported(heads: Heads, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take a layer's heads; None if they can."""
    if dtype != torch.bfloat16:
        return f"the Triton kernels of INT4 attention take bfloat16, got {dtype}"
    if heads.dim not in (64, 128):
        return f"the Triton kernels of INT4 attention take a head dim of 64 or 128, got {heads.dim}"
    if heads.heads % heads.kv_heads or heads.heads // heads.kv_heads > 16:
        found = f"{heads.heads} and {heads.kv_heads}"
        return f"the Triton kernels of INT4 attention take up to 16 query heads a key head, got {found}"
    return None


@operation("kit_int4_attention::prepare", ("recent",))
def _prepare(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_mean: Tensor | None,
    key_scale: Tensor | None,
    signs: Tensor,
    rotate: bool,
    fp8: bool,
    length: Tensor,
    start: Tensor,
    recent: Tensor,
    heads: int,
    new: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = qkv.shape
    _, _, groups, ring, dim = recent.shape
    q = torch.empty(batch, tokens, heads, dim, dtype=torch.float16, device=qkv.device)
    unit = torch.empty(batch, tokens, heads, dtype=torch.float32, device=qkv.device)
    kv = torch.empty(
        (2, batch, groups, tokens, dim) if new else (2, 0, groups, tokens, dim), dtype=qkv.dtype, device=qkv.device
    )
    rows = 16 if tokens * batch * heads < 4096 else PROMPT_ROWS
    launch(
        kernels.prepare, (ceil_div(batch * tokens * heads, rows), 3),
        qkv, cos, sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm,
        qkv if key_mean is None else key_mean, qkv if key_scale is None else key_scale, signs, length, start,
        q, unit, kv[0], kv[1], recent[0], recent[1], tokens, batch, heads, groups, qkv.stride(1), eps, dim**-0.5,
        NORM=q_norm is not None, CENTER=key_mean is not None, SCALE=key_scale is not None, ROTATE=rotate, FP8=fp8,
        NEW=new, RING=ring, DIM=dim, ROWS=rows, COMPILED=COMPILED, num_warps=4, num_stages=1,
        launch_pdl=COMPILED,
    )  # fmt: skip
    return q, unit, kv


@_prepare.register_fake
def _(qkv, cos, sin, q_norm, k_norm, eps, key_mean, key_scale, signs, rotate, fp8, length, start, recent, heads, new):
    batch, tokens, _ = qkv.shape
    _, _, groups, _, dim = recent.shape
    return (
        qkv.new_empty(batch, tokens, heads, dim, dtype=torch.float16),
        qkv.new_empty(batch, tokens, heads, dtype=torch.float32),
        qkv.new_empty((2, batch if new else 0, groups, tokens, dim)),
    )


def prepare(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    options: Heads,
    identity: Tensor,
    length: Tensor,
    start: Tensor,
    recent: Tensor,
    new: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_reference.prepare` in one launch, which also puts the latest keys and values into their ring.

    Args:
        qkv: (B, T, (H + 2G)·D), rows contiguous and evenly spaced.
        identity: (D, D), taken where `options` has no rotation.
        recent: (2, B, G, R, D), updated: token t lies at t mod R.
        new: whether to return keys and values, (2, B, G, T, D); else they are (2, 0, G, T, D).

    Returns:
        Queries, their units, and keys and values.
    """
    if qkv.stride(-1) != 1 or (qkv.shape[0] > 1 and qkv.stride(0) != qkv.shape[1] * qkv.stride(1)):
        qkv = qkv.contiguous()
    o = options
    signs = identity if o.signs is None else o.signs
    return _prepare(
        qkv, cos, sin, o.q_norm, o.k_norm, o.eps, o.key_mean, o.key_scale, signs, o.signs is not None, o.query_fp8,
        length, start, recent, o.heads, new,
    )  # fmt: skip


@operation("kit_int4_attention::encode", ("codes", "meta"))
def encode(
    x: Tensor,
    length: Tensor,
    order: Tensor | None,
    factor: Tensor | None,
    codes: Tensor,
    meta: Tensor,
    tokens: int,
    symmetric: bool,
    ring: bool,
    whole: bool,
    fp8: bool,
) -> tuple[Tensor, Tensor]:
    """Encode keys and values of some layers into their caches, in one launch.

    Args:
        x: (L, 2, B, G, R or T, D): rings that hold token t at t mod R (`ring`), or new tokens.
        length: (1,), the first token's place.
        order, factor: (L, 2, G, D) and (L, 2, G, D, D), or None for the nearest codes.
        codes, meta: (L, 2, B, G, capacity, D / 2) and (L, 2, B, G, capacity), updated.
        tokens: T.
        symmetric: no zero points.
        whole: also return what was encoded, of one layer.
        fp8: keys in e4m3, not in x's dtype.

    Returns:
        Keys as code - zero point, which `meta` has the scales of, and values, each (B, G, T, D); empty unless `whole`.
    """
    layers, _, batch, groups, slots, dim = x.shape
    programs = layers * 2 * batch * groups
    shape = (batch, groups, tokens, dim) if whole else (0,)
    keys = torch.empty(shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype, device=x.device)
    values = torch.empty(shape, dtype=x.dtype, device=x.device)
    if ring and tokens == 1 and order is not None and factor is not None:
        unpacked = torch.empty(programs, dim, dtype=torch.uint8, device=x.device)
        launch(
            kernels.encode_step, (programs,),
            x, length, order, factor, codes, meta, unpacked, batch * groups, groups, slots, meta.shape[-1],
            SYMMETRIC=symmetric, DIM=dim, BLOCK=SHAPED_CHANNELS, COMPILED=COMPILED, num_warps=1, num_stages=1,
            launch_pdl=COMPILED,
        )  # fmt: skip
        return keys, values
    rows = SHAPED_ROWS if order is not None else 16 if tokens <= 16 else NEAREST_ROWS
    room = (ceil_div(tokens, rows) * programs, dim, rows) if order is not None else (0,)
    errors = torch.empty(room, dtype=torch.float32, device=x.device)
    unpacked = torch.empty(room, dtype=torch.uint8, device=x.device)
    launch(
        kernels.encode, (programs * ceil_div(tokens, rows),),
        x, length, length if order is None else order, errors if factor is None else factor, codes, meta, errors,
        unpacked, keys, values, tokens, batch * groups, groups, slots, meta.shape[-1], SYMMETRIC=symmetric,
        SHAPE=order is not None, RING=ring, WHOLE=whole, DIM=dim, BLOCK=SHAPED_CHANNELS, ROWS=rows,
        COMPILED=COMPILED, num_warps=4 if order is None and tokens > 16 else 1, num_stages=1, launch_pdl=COMPILED,
    )  # fmt: skip
    return keys, values


@encode.register_fake
def _(x, length, order, factor, codes, meta, tokens, symmetric, ring, whole, fp8):
    shape = (x.shape[2], x.shape[3], tokens, x.shape[5]) if whole else (0,)
    return x.new_empty(shape, dtype=torch.float8_e4m3fn if fp8 else x.dtype), x.new_empty(shape)


def cut(pairs: int, capacity: int, window: int, dim: int) -> tuple[int, int, int]:
    """How a step is cut: tokens a block, programs for the codes of a key/value head, and programs for its recent keys.

    Blocks are of 64 tokens as long as a program gets one at most: with 128 each takes longer.
    """
    coded, programs = max(capacity - window, 0), max(PROGRAMS // pairs, 1)
    block = 128 if dim == 128 and coded > 64 * programs else 64
    return block, min(ceil_div(coded, block), programs), min(ceil_div(window, NEAR_KEYS), programs)


@operation("kit_int4_attention::decode", ("arrivals",))
def decode(
    q: Tensor,
    unit: Tensor,
    codes: Tensor,
    meta: Tensor,
    recent: Tensor,
    length: Tensor,
    start: Tensor,
    arrivals: Tensor,
    window: int,
    scale: float,
    sliding: int | None,
) -> Tensor:
    """One query token of each row (`attention_reference.attend`), in one launch; the same bits each time.

    Args:
        q, unit: of `prepare`.
        codes, meta: (2, B, G, capacity, D / 2) and (2, B, G, capacity) of one layer.
        recent: (2, B, G, R, D), the current token in it; R is `window`, or 1 without a window.
        length: (1,), tokens before this one; start: (B,).
        arrivals: (B, G) int32 of zeros, which it leaves so.

    Returns:
        (B, 1, H, D).
    """
    batch, _, heads, dim = q.shape
    groups, ring, capacity = recent.shape[2], recent.shape[3], meta.shape[-1]
    queries = heads // groups
    block, coded, near = cut(batch * groups, capacity, window, dim)
    padded = power_of_two(queries)
    parts = torch.empty(batch, groups, coded + near, queries, dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(batch, groups, 2, coded + near, queries, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, 1, heads, dim, dtype=recent.dtype, device=q.device)
    launch(
        kernels.decode, (coded + near, groups, batch),
        q, unit, codes.view(torch.int16), meta, recent, length, start, parts, stats, arrivals, out, capacity,
        batch, groups, scale * LOG2E, NO_LIMIT if sliding is None else sliding, QUERIES=queries, DIM=dim, RING=ring,
        WINDOW=window, SPLITS=coded, NEAR=near, PADDED=padded,
        SLOTS=power_of_two(coded + near), CHUNK=max(8192 // (padded * dim), 1), BT=block, STAGES=3,
        COMPILED=COMPILED, num_warps=dim // 32, num_stages=1, launch_pdl=COMPILED,
    )  # fmt: skip
    return out


@decode.register_fake
def _(q, unit, codes, meta, recent, length, start, arrivals, window, scale, sliding):
    return q.new_empty(q.shape, dtype=recent.dtype)


@operation("kit_int4_attention::prefill")
def prefill(
    q: Tensor,
    unit: Tensor,
    keys: Tensor | None,
    meta: Tensor,
    values: Tensor | None,
    kv: Tensor,
    start: Tensor,
    window: int,
    scale: float,
    sliding: int | None,
) -> Tensor:
    """Attention of the first T tokens of a cache (`attention_reference.attend`), in one launch.

    Args:
        q, unit, kv: of `prepare`.
        keys, values: of `encode`; None if all keys are read as they are.
        meta: (2, B, G, capacity) of the layer.

    Returns:
        (B, T, H, D).
    """
    batch, tokens, heads, dim = q.shape
    groups = kv.shape[2]
    out = torch.empty(batch, tokens, heads, dim, dtype=kv.dtype, device=q.device)
    rows, block = (64, 64) if COMPILED else (32, 32)
    launch(
        kernels.prefill, (ceil_div(tokens, rows), heads, batch),
        q, unit, q if keys is None else keys, meta, q if values is None else values, kv[0], kv[1], start, out,
        tokens, heads, groups, meta.shape[-1], scale * LOG2E, NO_LIMIT if sliding is None else sliding,
        ROUNDED=keys is not None, WINDOW=window, FP8=keys is not None and keys.dtype == torch.float8_e4m3fn,
        DIM=dim, BM=rows, BN=block, STAGES=3, COMPILED=COMPILED, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


@prefill.register_fake
def _(q, unit, keys, meta, values, kv, start, window, scale, sliding):
    return kv.new_empty(q.shape)
