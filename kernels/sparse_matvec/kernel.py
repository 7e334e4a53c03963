"""Triton kernels: products that read the weights of active channels only.

`linear_rows` gives each program a tile of output columns and a range of input channels. It compares the scores there,
lists the channels that are kept, and reads their weights only, many rows at a time. Partial sums go to memory in fp32;
the last program to finish a tile adds them up in a fixed order, so results are deterministic. A counter tells which
program that is.

Reading fast needs many loads in flight, and ptxas, left to itself, issues them one by one as registers allow. So the
weights of a step are loaded before a barrier and what they are multiplied with after it: no product can come first.
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
def add_rows(w, values, j, ok, num_values, acc0, acc1, acc2, acc3, M: tl.constexpr):
    """Add rows w (ROWS, DEPTH, BN), each times its value in (M, num_values) at j, to sums (ROWS, BN) of M tokens."""
    tl.debug_barrier()
    wide = w.to(tl.float32)
    acc0 += tl.sum(wide * tl.load(values + j, mask=ok, other=0.0)[:, :, None], 1)
    if M > 1:
        acc1 += tl.sum(wide * tl.load(values + num_values + j, mask=ok, other=0.0)[:, :, None], 1)
    if M > 2:
        acc2 += tl.sum(wide * tl.load(values + 2 * num_values + j, mask=ok, other=0.0)[:, :, None], 1)
    if M > 3:
        acc3 += tl.sum(wide * tl.load(values + 3 * num_values + j, mask=ok, other=0.0)[:, :, None], 1)
    return acc0, acc1, acc2, acc3


@triton.jit
def list_kept(
    x, scale, threshold, index, values, ends, begin, last, num_inputs,
    M: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_TENSOR: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the channels from begin to last that some token keeps, and x there, to index and values at begin onwards.

    With a GROUP, write to ends at each of that many channels where its kept ones end. All programs of a range write the
    same numbers to the same places.

    Returns:
        How many they are.
    """
    limit = threshold
    if HAS_TENSOR:
        limit = tl.load(threshold)
    k = begin + tl.arange(0, CHUNK)
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
    place = tl.cumsum(keep.to(tl.int32), 0)
    at = begin + place - 1
    tl.store(index + at, k, mask=keep)
    tl.store(values + at, x0, mask=keep)
    if M > 1:
        tl.store(values + num_inputs + at, x1, mask=keep)
    if M > 2:
        tl.store(values + 2 * num_inputs + at, x2, mask=keep)
    if M > 3:
        tl.store(values + 3 * num_inputs + at, x3, mask=keep)
    if GROUP:
        tl.store(ends + k // GROUP, place, mask=ok & ((k % GROUP == GROUP - 1) | (k == last - 1)))
    tl.debug_barrier()
    return tl.max(place, 0)


@triton.jit(do_not_specialize=["rank", "rank_chunk", "splits", "second", "third"])
def linear_rows(
    x,
    weight,
    scale,
    threshold,
    up,
    hidden,
    bias,
    index,
    values,
    partial,
    counters,
    out,
    num_inputs,
    num_outputs,
    rank,
    chunk,
    rank_chunk,
    splits,
    second,
    third,
    SEGMENTS: tl.constexpr,
    M: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TENSOR: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out = x_kept @ weight + hidden @ up + bias.

    Args:
        x: (M, K).
        weight: (K, N).
        scale: (K,) fp32, read with HAS_SCALE.
        threshold: a number, or with HAS_TENSOR one in memory, fp32.
        up, hidden: (r, N), and (M, r) fp32, read with HAS_RANK.
        bias: (N,), read with HAS_BIAS.
        index, values: (K,) int32 and (M, K) fp32, scratch: the kept channels of each split.
        partial: (splits, M, N) fp32, scratch.
        counters: (N / BN,) int32, zero before and after.
        out: (M, N).
        chunk, rank_chunk: channels, and rows of `up`, a split.
        second, third: tiles at which the second and the third of SEGMENTS start: linears side by side, which read the
            same x by thresholds (SEGMENTS,) and scales (SEGMENTS, K) of their own; index and values are one for each.
        EVEN: N is a multiple of BN.
        BN, ROWS, DEPTH: a step reads DEPTH rows of BN columns for each of ROWS groups of warps, which add up what they
            have read only at the end.
        CHUNK: a power of two, at least chunk.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    if SEGMENTS > 1:
        segment = tl.where(tile >= second, 1, 0) + tl.where(tile >= third, 1, 0)
        scale += segment * num_inputs
        threshold += segment
        index += segment * num_inputs
        values += segment * M * num_inputs
    columns = tile * BN + tl.arange(0, BN)
    inside = (columns < num_outputs) | EVEN
    # Tiles are (ROWS, DEPTH, BN). Triton spreads warps over the first dimension, so sums over DEPTH stay in a thread.
    local = tl.arange(0, ROWS)[:, None] + tl.arange(0, DEPTH)[None, :] * ROWS
    acc0 = tl.zeros([ROWS, BN], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    begin = split * chunk
    last = tl.minimum(begin + chunk, num_inputs)
    count = list_kept(
        x, scale, threshold, index, values, index, begin, last, num_inputs, M, HAS_SCALE, HAS_TENSOR, 0, CHUNK
    )
    for first in range(0, count, DEPTH * ROWS):
        j = first + local
        row = tl.load(index + begin + tl.minimum(j, count - 1)).to(tl.int64)
        at = weight + (row * num_outputs)[:, :, None] + columns[None, None, :]
        if EVEN:
            w = tl.load(at, eviction_policy="evict_first")
        else:
            w = tl.load(at, mask=inside[None, None, :], other=0.0, eviction_policy="evict_first")
        acc0, acc1, acc2, acc3 = add_rows(w, values + begin, j, j < count, num_inputs, acc0, acc1, acc2, acc3, M)
    if HAS_RANK:
        last = tl.minimum((split + 1) * rank_chunk, rank)
        for first in range(split * rank_chunk, last, DEPTH * ROWS):
            j = first + local
            ok = j < last
            at = up + (j * num_outputs)[:, :, None] + columns[None, None, :]
            w = tl.load(at, mask=ok[:, :, None] & inside[None, None, :], other=0.0)
            acc0, acc1, acc2, acc3 = add_rows(w, hidden, j, ok, rank, acc0, acc1, acc2, acc3, M)
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
def add_nibbles(low, high, value, low_scale, high_scale, acc_low, acc_high):
    """Add codes (ROWS, DEPTH, BN) from 0 to 15, less 8, times value (ROWS, DEPTH) and scales (BN,) to sums."""
    eights = 8.0 * tl.sum(value, 1)[:, None]
    acc_low += (tl.sum(low * value[:, :, None], 1) - eights) * low_scale.to(tl.float32)[None, :]
    acc_high += (tl.sum(high * value[:, :, None], 1) - eights) * high_scale.to(tl.float32)[None, :]
    return acc_low, acc_high


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["packed"])
def int4_rows(
    x,
    packed,
    weight_scale,
    scale,
    threshold,
    bias,
    index,
    values,
    ends,
    partial,
    counters,
    out,
    num_inputs,
    half,
    chunk,
    splits,
    M: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TENSOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`linear_rows` of weights in 4 bits, without a low-rank path.

    Args:
        packed: (K, N / 2) uint8: byte c of a row holds the codes of output c in its low bits, of c + N / 2 in its high.
        weight_scale: (K / GROUP, N): a weight is (code - 8) times the scale of its group of channels.
        ends: (K / GROUP,) int32, scratch: how many channels of its chunk are kept up to each group's end.
        half: N / 2.
        chunk: a multiple of GROUP.
        EVEN: half is a multiple of BN, and packed aligned to 8 bytes.
        BN: columns of `packed` a program; the others are those of `linear_rows`.

    A thread loads 8 bytes, not the 16 that it could (hence nothing is known of packed's alignment but what EVEN says):
    sums of 32 columns take so many registers that too few warps run at once.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    columns = tile * BN + tl.arange(0, BN)
    inside = (columns < half) | EVEN
    local = tl.arange(0, ROWS)[:, None] + tl.arange(0, DEPTH)[None, :] * ROWS
    low0 = tl.zeros([ROWS, BN], tl.float32)
    low1, low2, low3 = low0, low0, low0
    high0, high1, high2, high3 = low0, low0, low0, low0
    begin = split * chunk
    last = tl.minimum(begin + chunk, num_inputs)
    list_kept(x, scale, threshold, index, values, ends, begin, last, num_inputs, M, HAS_SCALE, HAS_TENSOR, GROUP, CHUNK)
    start = 0
    for group in range(begin // GROUP, (last + GROUP - 1) // GROUP):
        end = tl.load(ends + group)
        at = weight_scale + group * 2 * half + columns
        low_scale = tl.load(at, mask=inside, other=0.0)
        high_scale = tl.load(at + half, mask=inside, other=0.0)
        for first in range(start, end, DEPTH * ROWS):
            j = first + local
            ok = j < end
            row = tl.load(index + begin + tl.minimum(j, end - 1)).to(tl.int64)
            from_row = packed + (row * half)[:, :, None] + columns[None, None, :]
            if EVEN:
                codes = tl.load(tl.multiple_of(from_row, (1, 1, 8)), eviction_policy="evict_first")
            else:
                codes = tl.load(from_row, mask=inside[None, None, :], other=0, eviction_policy="evict_first")
            tl.debug_barrier()
            low, high = (codes & 15).to(tl.float32), (codes >> 4).to(tl.float32)
            value = tl.load(values + begin + j, mask=ok, other=0.0)
            low0, high0 = add_nibbles(low, high, value, low_scale, high_scale, low0, high0)
            if M > 1:
                value = tl.load(values + num_inputs + begin + j, mask=ok, other=0.0)
                low1, high1 = add_nibbles(low, high, value, low_scale, high_scale, low1, high1)
            if M > 2:
                value = tl.load(values + 2 * num_inputs + begin + j, mask=ok, other=0.0)
                low2, high2 = add_nibbles(low, high, value, low_scale, high_scale, low2, high2)
            if M > 3:
                value = tl.load(values + 3 * num_inputs + begin + j, mask=ok, other=0.0)
                low3, high3 = add_nibbles(low, high, value, low_scale, high_scale, low3, high3)
        start = end
    at = partial + split * M * 2 * half + columns
    tl.store(at, tl.sum(low0, 0), mask=inside, cache_modifier=".cg")
    tl.store(at + half, tl.sum(high0, 0), mask=inside, cache_modifier=".cg")
    if M > 1:
        tl.store(at + 2 * half, tl.sum(low1, 0), mask=inside, cache_modifier=".cg")
        tl.store(at + 3 * half, tl.sum(high1, 0), mask=inside, cache_modifier=".cg")
    if M > 2:
        tl.store(at + 4 * half, tl.sum(low2, 0), mask=inside, cache_modifier=".cg")
        tl.store(at + 5 * half, tl.sum(high2, 0), mask=inside, cache_modifier=".cg")
    if M > 3:
        tl.store(at + 6 * half, tl.sum(low3, 0), mask=inside, cache_modifier=".cg")
        tl.store(at + 7 * half, tl.sum(high3, 0), mask=inside, cache_modifier=".cg")
    tl.debug_barrier()  # all warps have stored before the counter tells so
    if tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1:
        add_partials(partial, bias, out, columns, inside, 2 * half, splits, M, HAS_BIAS, BN)
        add_partials(partial, bias, out, columns + half, inside, 2 * half, splits, M, HAS_BIAS, BN)
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
