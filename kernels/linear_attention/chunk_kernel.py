"""Triton kernels of hybrid attention's forward pass with nothing F wide a token in memory.

The first walks over the keys and keeps the state of linear attention behind every EVERY-th block. The second takes
blocks of queries, all at once: such a state, the blocks of keys that follow it, and the softmax window. Both make
features as they need them. Letters and the equation: reference.py.
"""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import dot, load_map, sequence_of

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)  # the log of no weight at all


@triton.jit
def _features(x, weights, PRECISION: tl.constexpr):
    """softmax(xW) and softmax(-xW), fp32; 1e-12 more, in place of at least 1e-12, costs no instruction."""
    z = dot(x, weights, PRECISION)
    up = tl.exp2(z * LOG2E - (tl.max(z, 1) * LOG2E)[:, None])
    down = tl.exp2((tl.min(z, 1) * LOG2E)[:, None] - z * LOG2E)
    up = up * (1.0 / tl.sum(up, 1))[:, None] + 1e-12
    return up, down * (1.0 / tl.sum(down, 1))[:, None] + 1e-12


@triton.jit
def _products(up, down, keys, weights, PRECISION: tl.constexpr):
    """φq·φk of queries' features and of keys: (queries, keys) fp32."""
    key_up, key_down = _features(keys, weights, PRECISION)
    a = dot(up, tl.trans(key_up.to(up.dtype)), PRECISION)
    return tl.dot(down, tl.trans(key_down.to(up.dtype)), a, input_precision=PRECISION)


@triton.jit
def _absorb(s, values, y, total, top, factor, shift, PRECISION: tl.constexpr):
    """Add softmax attention with scores s·factor + shift to (y, total), in units of exp2(top); all three anew."""
    higher = tl.maximum(top, tl.max(s, 1) * factor + shift)
    p = tl.exp2(s * factor + (shift - higher)[:, None])
    shrink = tl.exp2(top - higher)
    y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision=PRECISION)
    return y, total * shrink + tl.sum(p, 1), higher


@triton.jit
def _rows(pointer, begin, stride, end, MASKED: tl.constexpr, BT: tl.constexpr, WIDTH: tl.constexpr):
    """BT rows from `begin` on of a (T, WIDTH) matrix; with MASKED those from `end` on are zero."""
    index = tl.arange(0, BT)
    at = pointer + begin.to(tl.int64) * stride + index[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(at, mask=(begin + index < end)[:, None], other=0.0)
    return tl.load(at)


@triton.jit
def _slot(row, start, sequence, num_keys, heads, head, CHUNK: tl.constexpr):
    """Where a sequence's kept states begin: sequences lie in order, and each has a slot more than whole chunks."""
    return ((row * num_keys + start) // CHUNK + sequence) * heads + head


@triton.jit
def chunk_states(
    k,
    v,
    map_k,
    bounds,
    first,
    first_sum,
    states,
    sums,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    group,
    num_keys,
    num_zero,
    num_splits,
    split_chunks,
    HAS_BOUNDS: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    LAST_ONLY: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state behind each chunk of EVERY blocks of BT keys, of BV value columns, over one split of one sequence.

    `states` (slots, L, V, 2·HALF) and `sums` (slots, L, 2·HALF) fp32; the first `num_zero` keys do not count.

    Options:
        HAS_FIRST: start from `first` (N, splits, L, V, 2·HALF) and `first_sum` (N, splits, L, 2·HALF), fp32.
        LAST_ONLY: store what the split adds, laid out like these, and nothing else; the last split adds nothing.
    """
    value_block = tl.program_id(0)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    number = tl.program_id(2)
    sequence = number // num_splits
    split = number % num_splits
    row, start, end = sequence_of(bounds, HAS_BOUNDS, sequence, num_keys)
    k += row * k_batch + (head // group).to(tl.int64) * k_head + start * k_time
    v += row * v_batch + (head // group).to(tl.int64) * v_head + start * v_time + value_block * BV
    weights = load_map(map_k, head, DIM, HALF)
    index = tl.arange(0, BT)
    half = tl.arange(0, HALF)
    cells = (value_block * BV + tl.arange(0, BV))[:, None] * (2 * HALF) + half[None, :]
    at_split = (number.to(tl.int64) * heads + head) * (2 * HALF)
    # sums over keys by a product with ones: every row of it is the sum
    ones = tl.full([16, BT], 1.0, k.dtype.element_ty)
    if HAS_FIRST:
        state0 = tl.load(first + at_split * V + cells)
        state1 = tl.load(first + at_split * V + cells + HALF)
        sum0 = tl.zeros([16, HALF], tl.float32) + tl.load(first_sum + at_split + half)[None, :]
        sum1 = tl.zeros([16, HALF], tl.float32) + tl.load(first_sum + at_split + HALF + half)[None, :]
    else:
        state0 = tl.zeros([BV, HALF], tl.float32)
        state1 = tl.zeros([BV, HALF], tl.float32)
        sum0 = tl.zeros([16, HALF], tl.float32)
        sum1 = tl.zeros([16, HALF], tl.float32)
    slot = _slot(row, start, sequence, num_keys, heads, head, EVERY * BT)
    chunks = ((end - start) // (EVERY * BT)).to(tl.int32)
    before = split * split_chunks
    count = tl.maximum(tl.minimum(before + split_chunks, chunks) - before, 0)
    if LAST_ONLY:
        count = tl.where(split == num_splits - 1, 0, count)
    for step in range(count * EVERY):
        block = before * EVERY + step
        keys = _rows(k, block * BT, k_time, 0, False, BT, DIM)
        values = _rows(v, block * BT, v_time, 0, False, BT, BV)
        up, down = _features(keys, weights, PRECISION)
        up = up.to(keys.dtype)
        down = down.to(keys.dtype)
        if num_zero > 0:
            counts = (block * BT + index >= num_zero)[:, None]
            up = tl.where(counts, up, tl.zeros_like(up))
            down = tl.where(counts, down, tl.zeros_like(down))
        state0 = tl.dot(tl.trans(values), up, state0, input_precision=PRECISION)
        state1 = tl.dot(tl.trans(values), down, state1, input_precision=PRECISION)
        sum0 = tl.dot(ones, up, sum0, input_precision=PRECISION)
        sum1 = tl.dot(ones, down, sum1, input_precision=PRECISION)
        if not LAST_ONLY:
            if block % EVERY == EVERY - 1:
                at = (slot + (block // EVERY).to(tl.int64) * heads) * (2 * HALF)
                tl.store(states + at * V + cells, state0.to(states.dtype.element_ty))
                tl.store(states + at * V + cells + HALF, state1.to(states.dtype.element_ty))
                if value_block == 0:
                    tl.store(sums + at + half, tl.sum(sum0, 0) * 0.0625)
                    tl.store(sums + at + HALF + half, tl.sum(sum1, 0) * 0.0625)
    if LAST_ONLY:
        tl.store(states + at_split * V + cells, state0)
        tl.store(states + at_split * V + cells + HALF, state1)
        if value_block == 0:
            tl.store(sums + at_split + half, tl.sum(sum0, 0) * 0.0625)
            tl.store(sums + at_split + HALF + half, tl.sum(sum1, 0) * 0.0625)


@triton.jit
def chunk_outputs(
    q,
    k,
    v,
    map_q,
    map_k,
    log_factor,
    meta,
    sink_k,
    sink_v,
    states,
    sums,
    bounds,
    out,
    log_mass,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    out_batch,
    out_head,
    out_time,
    heads,
    group,
    map_group,
    scale,
    log_linear,
    num_keys,
    HAS_BOUNDS: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_META: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries: y, and the log of its denominator. WINDOW is a multiple of BT, `scale` positive.

    (y, total) are in units of exp2(top). Of the block of keys that the window's edge crosses, each query sees a key
    either with a softmax's weight or with a product of features: one product with its values does for both.
    """
    head = tl.program_id(0)
    block = tl.program_id(1)
    sequence = tl.program_id(2)
    row, start, end = sequence_of(bounds, HAS_BOUNDS, sequence, num_keys)
    length = (end - start).to(tl.int32)
    if block * BT < length:
        q += row * q_batch + head.to(tl.int64) * q_head + start * q_time
        k += row * k_batch + (head // group).to(tl.int64) * k_head + start * k_time
        v += row * v_batch + (head // group).to(tl.int64) * v_head + start * v_time
        out += row * out_batch + head.to(tl.int64) * out_head + start * out_time
        index = tl.arange(0, BT)
        wide = tl.arange(0, HALF)
        place = block * BT + index
        edge = block - WINDOW // BT
        log_g = tl.load(log_factor + head) * LOG2E
        per_score = scale * LOG2E
        x = _rows(q, block * BT, q_time, length, MASKED, BT, DIM)
        # the past, in units of its own factor: the last state that was kept, then whole blocks
        behind = tl.maximum(edge, 0) // EVERY
        at = _slot(row, start, sequence, num_keys, heads // map_group, head // map_group, EVERY * BT)
        at = (at + tl.maximum(behind - 1, 0).to(tl.int64) * (heads // map_group)) * (2 * HALF)
        kept = wide < tl.where(behind > 0, HALF, 0)
        sum0 = tl.load(sums + at + wide, mask=kept, other=0.0)
        sum1 = tl.load(sums + at + HALF + wide, mask=kept, other=0.0)
        up, down = _features(x, load_map(map_q, head, DIM, HALF), PRECISION)
        total = tl.sum(up * sum0[None, :] + down * sum1[None, :], 1)
        up = up.to(x.dtype)
        down = down.to(x.dtype)
        cells = states + at * V + tl.arange(0, V)[:, None] * (2 * HALF) + wide[None, :]
        y = dot(up, tl.trans(tl.load(cells, mask=kept[None, :], other=0.0)), PRECISION)
        y = tl.dot(down, tl.trans(tl.load(cells + HALF, mask=kept[None, :], other=0.0)), y, input_precision=PRECISION)
        weights = load_map(map_k, head // map_group, DIM, HALF)
        if edge > behind * EVERY:
            begin = behind * EVERY * BT
            a = _products(up, down, _rows(k, begin, k_time, 0, False, BT, DIM), weights, PRECISION)
            if SINKS > 0:
                a = tl.where((begin + index >= SINKS)[None, :], a, 0.0)
            values = _rows(v, begin, v_time, 0, False, BT, V)
            y = tl.dot(a.to(values.dtype), values, y, input_precision=PRECISION)
            total += tl.sum(a, 1)
        # the block that the window's edge crosses
        begin = tl.maximum(edge, 0) * BT
        keys = _rows(k, begin, k_time, length, MASKED, BT, DIM)
        values = _rows(v, begin, v_time, length, MASKED, BT, V)
        a = _products(up, down, keys, weights, PRECISION)
        s = dot(x, tl.trans(keys), PRECISION)
        s = tl.where(index[:, None] < tl.where(edge >= 0, index, -1)[None, :], s, -float("inf"))
        has_past = place >= WINDOW + SINKS
        top = tl.where(has_past, log_linear * LOG2E, NOTHING)
        higher = tl.maximum(top, tl.max(s, 1) * per_score + log_g)
        shrink = tl.where(has_past, tl.exp2(top - higher), 0.0)
        beyond = (index[:, None] >= index[None, :]) & (begin + index >= SINKS)[None, :]
        p = tl.exp2(s * per_score + (log_g - higher)[:, None]) + tl.where(beyond, a * shrink[:, None], 0.0)
        y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        # the rest of the window
        for back in tl.static_range(WINDOW // BT - 1, -1, -1):
            begin = tl.maximum(block - back, 0) * BT
            keys = _rows(k, begin, k_time, length, MASKED, BT, DIM)
            values = _rows(v, begin, v_time, length, MASKED, BT, V)
            s = dot(x, tl.trans(keys), PRECISION)
            if back == 0:
                s = tl.where(index[:, None] >= index[None, :], s, -float("inf"))
            else:
                s = tl.where(block >= back, s, -float("inf"))
            y, total, top = _absorb(s, values, y, total, top, per_score, log_g, PRECISION)
        if SINKS > 0:
            sink = tl.arange(0, 16)
            at_sink = (sequence.to(tl.int64) * (heads // group) + head // group) * 16 + sink
            keys = tl.load(sink_k + at_sink[:, None] * DIM + tl.arange(0, DIM)[None, :])
            values = tl.load(sink_v + at_sink[:, None] * V + tl.arange(0, V)[None, :])
            far = (place[:, None] - sink[None, :] >= WINDOW) & (sink < SINKS)[None, :]
            s = tl.where(far, dot(x, tl.trans(keys), PRECISION), -float("inf"))
            y, total, top = _absorb(s, values, y, total, top, per_score, log_g, PRECISION)
        if HAS_META:
            logit = tl.load(meta + head) * LOG2E + log_g
            higher = tl.maximum(top, logit)
            y *= tl.exp2(top - higher)[:, None]
            total = total * tl.exp2(top - higher) + tl.exp2(logit - higher)
            top = higher
        total = tl.maximum(total, 1e-37)  # in fp16 features can be zero
        y *= (1.0 / total)[:, None]
        at_out = out + (block * BT).to(tl.int64) * out_time + index[:, None] * out_time + tl.arange(0, V)[None, :]
        at_mass = log_mass + (row * heads + head) * num_keys + start + place
        if MASKED:
            tl.store(at_out, y.to(out.dtype.element_ty), mask=(place < length)[:, None])
            tl.store(at_mass, (top + tl.log2(total)) / LOG2E, mask=place < length)
        else:
            tl.store(at_out, y.to(out.dtype.element_ty))
            tl.store(at_mass, (top + tl.log2(total)) / LOG2E)
