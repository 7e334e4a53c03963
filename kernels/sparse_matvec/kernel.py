"""Triton kernels: products that read the weights of active channels only.

`linear_rows` gives each program a tile of output columns and a range of input channels, compares the score there (no
pass compacts indices), and predicates its loads. Partial sums go to memory in fp32; the last program to finish a tile
adds them up in a fixed order, so results are deterministic. A counter tells which program that is.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:  # no Triton on this platform: the dispatch takes the PyTorch path
    raise ImportError("Triton is not installed") from error


@triton.jit
def load_kept(x, scale, k, ok, limit, HAS_SCALE: tl.constexpr):
    """x at channels k in fp32, zero where dropped, and which are kept; a NaN is."""
    value = tl.load(x + k, mask=ok, other=0.0).to(tl.float32)
    score = tl.abs(value)
    if HAS_SCALE:
        score *= tl.load(scale + k, mask=ok, other=0.0)
    keep = ok & ((score > limit) | (score != score))
    return tl.where(keep, value, 0.0), keep


@triton.jit
def linear_rows(
    x,
    weight,
    scale,
    threshold,
    up,
    hidden,
    bias,
    partial,
    counters,
    out,
    num_inputs,
    num_outputs,
    rank,
    chunk,
    rank_chunk,
    splits,
    M: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TENSOR: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """out = x_kept @ weight + hidden @ up + bias.

    Args:
        x: (M, K).
        weight: (K, N).
        scale: (K,) fp32, read with HAS_SCALE.
        threshold: a number, or with HAS_TENSOR one in memory, fp32.
        up, hidden: (r, N), and (M, r) fp32, read with HAS_RANK.
        bias: (N,), read with HAS_BIAS.
        partial: (splits, M, N) fp32, scratch.
        counters: (N / BN,) int32, zero before and after.
        out: (M, N).
        chunk, rank_chunk: channels, and rows of `up`, a split.
        EVEN: N is a multiple of BN.
        BN, ROWS, DEPTH: a step reads DEPTH rows of BN columns for each of ROWS groups of warps, which add up what they
            have read only at the end.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    limit = threshold
    if HAS_TENSOR:
        limit = tl.load(threshold)
    columns = tile * BN + tl.arange(0, BN)
    inside = (columns < num_outputs) | EVEN
    # Tiles are (ROWS, DEPTH, BN). Triton spreads warps over the first dimension, so sums over DEPTH stay in a thread.
    local = tl.arange(0, ROWS)[:, None] + tl.arange(0, DEPTH)[None, :] * ROWS
    acc0 = tl.zeros([ROWS, BN], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    weight += split.to(tl.int64) * chunk * num_outputs
    last = tl.minimum((split + 1) * chunk, num_inputs)
    for first in range(split * chunk, last, DEPTH * ROWS):
        k = first + local
        ok = k < last
        x0, keep = load_kept(x, scale, k, ok, limit, HAS_SCALE)
        if M > 1:
            x1, keep1 = load_kept(x + num_inputs, scale, k, ok, limit, HAS_SCALE)
            keep = keep | keep1
        if M > 2:
            x2, keep2 = load_kept(x + 2 * num_inputs, scale, k, ok, limit, HAS_SCALE)
            keep = keep | keep2
        if M > 3:
            x3, keep3 = load_kept(x + 3 * num_inputs, scale, k, ok, limit, HAS_SCALE)
            keep = keep | keep3
        at = weight + (local * num_outputs)[:, :, None] + columns[None, None, :]
        read = keep[:, :, None]
        if not EVEN:
            read = read & inside[None, None, :]
        w = tl.load(at, mask=read, other=0.0, eviction_policy="evict_first").to(tl.float32)
        weight += DEPTH * ROWS * num_outputs
        acc0 += tl.sum(w * x0[:, :, None], 1)
        if M > 1:
            acc1 += tl.sum(w * x1[:, :, None], 1)
        if M > 2:
            acc2 += tl.sum(w * x2[:, :, None], 1)
        if M > 3:
            acc3 += tl.sum(w * x3[:, :, None], 1)
    if HAS_RANK:
        last = tl.minimum((split + 1) * rank_chunk, rank)
        for first in range(split * rank_chunk, last, DEPTH * ROWS):
            k = first + local
            ok = k < last
            read = ok[:, :, None] & inside[None, None, :]
            w = tl.load(up + (k * num_outputs)[:, :, None] + columns[None, None, :], mask=read, other=0.0).to(
                tl.float32
            )
            acc0 += tl.sum(w * tl.load(hidden + k, mask=ok, other=0.0)[:, :, None], 1)
            if M > 1:
                acc1 += tl.sum(w * tl.load(hidden + rank + k, mask=ok, other=0.0)[:, :, None], 1)
            if M > 2:
                acc2 += tl.sum(w * tl.load(hidden + 2 * rank + k, mask=ok, other=0.0)[:, :, None], 1)
            if M > 3:
                acc3 += tl.sum(w * tl.load(hidden + 3 * rank + k, mask=ok, other=0.0)[:, :, None], 1)
    at = split * M * num_outputs + columns
    tl.store(partial + at, tl.sum(acc0, 0), mask=inside, cache_modifier=".cg")
    if M > 1:
        tl.store(partial + at + num_outputs, tl.sum(acc1, 0), mask=inside, cache_modifier=".cg")
    if M > 2:
        tl.store(partial + at + 2 * num_outputs, tl.sum(acc2, 0), mask=inside, cache_modifier=".cg")
    if M > 3:
        tl.store(partial + at + 3 * num_outputs, tl.sum(acc3, 0), mask=inside, cache_modifier=".cg")
    tl.debug_barrier()  # all warps have stored before the counter tells so
    if tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1:
        add_partials(partial, bias, out, columns, inside, num_outputs, splits, M, HAS_BIAS, BN)
        tl.store(counters + tile, 0)


@triton.jit
def add_partials(
    partial, bias, out, columns, inside, num_outputs, splits, M: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr
):
    """out = Σ over splits of partial (splits, M, N), in one order, plus bias."""
    for row in tl.static_range(M):
        total = tl.zeros([BN], tl.float32)
        for first in range(0, splits, 16):
            part = first + tl.arange(0, 16)
            at = ((part * M + row) * num_outputs)[:, None] + columns[None, :]
            ok = (part < splits)[:, None] & inside[None, :]
            total += tl.sum(tl.load(partial + at, mask=ok, other=0.0, cache_modifier=".cg"), 0)
        if HAS_BIAS:
            total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * num_outputs + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dropped_rows(
    x,
    scale,
    threshold,
    down,
    hidden,
    num_inputs,
    rank,
    HAS_SCALE: tl.constexpr,
    HAS_TENSOR: tl.constexpr,
    BK: tl.constexpr,
):
    """hidden (M, r) fp32 = (x without its kept channels) @ down (r, K) transposed. Grid (r, M)."""
    row = tl.program_id(0)
    token = tl.program_id(1)
    limit = threshold
    if HAS_TENSOR:
        limit = tl.load(threshold)
    x += token * num_inputs
    down += row.to(tl.int64) * num_inputs
    acc = tl.zeros([BK], tl.float32)
    for first in range(0, num_inputs, BK):
        k = first + tl.arange(0, BK)
        ok = k < num_inputs
        value = tl.load(x + k, mask=ok, other=0.0).to(tl.float32)
        score = tl.abs(value)
        if HAS_SCALE:
            score *= tl.load(scale + k, mask=ok, other=0.0)
        acc += tl.where(score <= limit, value, 0.0) * tl.load(down + k, mask=ok, other=0.0).to(tl.float32)
    tl.store(hidden + token * rank + row, tl.sum(acc))


@triton.jit
def activated(acc, limit):
    """SiLU of gates, zero where it is not above the limit, and which are kept; a NaN is."""
    gate = tl.sum(acc, 1)
    gate = gate / (1.0 + tl.exp(-gate))
    size = tl.abs(gate)
    keep = (size > limit) | (size != size)
    return tl.where(keep, gate, 0.0), keep


@triton.jit
def load_inputs(x, k, ok):
    """(1, BK) of x in fp32."""
    return tl.load(x + k, mask=ok, other=0.0).to(tl.float32)[None, :]


@triton.jit
def swiglu_rows(
    x,
    gate,
    up,
    thresholds,
    out,
    num_inputs,
    num_outputs,
    M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out (M, N) = kept SiLU(x gateᵀ) · (x upᵀ); a program's gates tell which of its rows of `up` it reads.

    Args:
        x: (M, K).
        gate, up: (N, K).
        thresholds: (N,) fp32.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = rows < num_outputs
    limit = tl.load(thresholds + rows, mask=inside, other=0.0)
    at = rows.to(tl.int64)[:, None] * num_inputs
    acc0 = tl.zeros([BN, BK], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for first in range(0, num_inputs, BK):
        k = first + tl.arange(0, BK)
        ok = k < num_inputs
        w = tl.load(
            gate + at + k[None, :], mask=inside[:, None] & ok[None, :], other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        acc0 += w * load_inputs(x, k, ok)
        if M > 1:
            acc1 += w * load_inputs(x + num_inputs, k, ok)
        if M > 2:
            acc2 += w * load_inputs(x + 2 * num_inputs, k, ok)
        if M > 3:
            acc3 += w * load_inputs(x + 3 * num_inputs, k, ok)
    a0, keep = activated(acc0, limit)
    if M > 1:
        a1, keep1 = activated(acc1, limit)
        keep = keep | keep1
    if M > 2:
        a2, keep2 = activated(acc2, limit)
        keep = keep | keep2
    if M > 3:
        a3, keep3 = activated(acc3, limit)
        keep = keep | keep3
    keep = keep & inside
    acc0 = tl.zeros([BN, BK], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for first in range(0, num_inputs, BK):
        k = first + tl.arange(0, BK)
        ok = k < num_inputs
        w = tl.load(
            up + at + k[None, :], mask=keep[:, None] & ok[None, :], other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        acc0 += w * load_inputs(x, k, ok)
        if M > 1:
            acc1 += w * load_inputs(x + num_inputs, k, ok)
        if M > 2:
            acc2 += w * load_inputs(x + 2 * num_inputs, k, ok)
        if M > 3:
            acc3 += w * load_inputs(x + 3 * num_inputs, k, ok)
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(out + rows, (a0 * tl.sum(acc0, 1)).to(kind), mask=inside)
    if M > 1:
        tl.store(out + num_outputs + rows, (a1 * tl.sum(acc1, 1)).to(kind), mask=inside)
    if M > 2:
        tl.store(out + 2 * num_outputs + rows, (a2 * tl.sum(acc2, 1)).to(kind), mask=inside)
    if M > 3:
        tl.store(out + 3 * num_outputs + rows, (a3 * tl.sum(acc3, 1)).to(kind), mask=inside)
