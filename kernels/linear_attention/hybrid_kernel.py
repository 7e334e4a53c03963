"""Triton kernels of hybrid attention: a softmax window and a linear past under one denominator, in one pass.

A program walks over the blocks of one split of a sequence. Block n of queries meets blocks n, n - 1, …, n - LAG of keys
pair by pair, through softmax or linearly as distance says, and all earlier keys through the state in its registers.
Features are computed from q and k in the kernel. Letters and the equation: reference.py.
"""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import (
    dot,
    features,
    load_block,
    load_map,
    softmax_pair,
    softmax_pair_gradient,
    split_of,
    state_offsets,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

MOST = tl.constexpr(60.0)  # exp of more than this is never needed: an empty past is multiplied by it


@triton.jit
def _near(block, back, time, key_time, WINDOW: tl.constexpr, TERRACE: tl.constexpr, BT: tl.constexpr):
    """(queries, keys): whether key j >= 0 steps back is in the window: by distance, or this window's block or the last."""
    if TERRACE:
        per_window: tl.constexpr = WINDOW // BT
        near = (block // per_window - (block - back) // per_window <= 1) & (time[:, None] >= 0) & (key_time[None, :] >= 0)
    else:
        near = time[:, None] - key_time[None, :] < WINDOW
    return near


@triton.jit
def _sinks_far(block, time, start, sink, WINDOW: tl.constexpr, TERRACE: tl.constexpr, BT: tl.constexpr):
    """(queries, sinks): whether a sink has left the window."""
    if TERRACE:
        per_window: tl.constexpr = WINDOW // BT
        far = (block // per_window - (sink // WINDOW)[None, :] > 1) & (time[:, None] >= 0)
    else:
        far = time[:, None] - (start + sink)[None, :] >= WINDOW
    return far


@triton.jit
def hybrid_forward(
    q,
    k,
    v,
    map_q,
    map_k,
    log_factor,
    meta,
    sink_k,
    sink_v,
    bounds,
    states,
    sums,
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
    num_past,
    num_queries,
    num_keys,
    num_splits,
    split_blocks,
    HAS_BOUNDS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_META: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACE: tl.constexpr,
    LAG: tl.constexpr,
    FAR: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y_i, and the log of its denominator for the backward pass. Shapes as in hybrid_ops.py.

    LAG is how many blocks back a key in the window can lie, FAR the first block back that can hold one past it.
    """
    number = tl.program_id(0)
    head = tl.program_id(1)
    value_block = tl.program_id(2)
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys, BT)
    sequence = number // num_splits
    weights_q = load_map(map_q, head, HAS_LINEAR, DIM, HALF)
    weights_k = load_map(map_k, head // map_group, HAS_LINEAR, DIM, HALF)
    log_g = tl.load(log_factor + head)
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_mass += (row * tl.num_programs(1) + head) * num_queries
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(end - start, BT).to(tl.int32))
    columns = tl.arange(0, BV)
    if SINKS > 0:
        sink = tl.arange(0, 16)
        at = (sequence.to(tl.int64) * (heads // group) + head // group) * 16
        sinks_k = tl.load(sink_k + (at + sink)[:, None] * DIM + tl.arange(0, DIM)[None, :])
        sinks_v = tl.load(sink_v + (at + sink)[:, None] * V + value_block * BV + columns[None, :])
    if HAS_LINEAR:
        if HAS_STATE:
            at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
            state0 = tl.load(states + at)
            state1 = tl.load(states + at + HALF * V)
            sum0 = tl.load(sums + at_sum)
            sum1 = tl.load(sums + at_sum + HALF)
        else:
            state0 = tl.zeros([HALF, BV], tl.float32)
            state1 = tl.zeros([HALF, BV], tl.float32)
            sum0 = tl.zeros([HALF], tl.float32)
            sum1 = tl.zeros([HALF], tl.float32)
    for block in range(first, last):
        time = start + block * BT + tl.arange(0, BT)
        ok = (time < end) & (time >= num_past)
        x = load_block(q, time - num_past, q_time, ok, DIM)
        if HAS_META:
            top = tl.zeros([BT], tl.float32) + tl.load(meta + head)
            total = tl.full([BT], 1.0, tl.float32)
        else:
            top = tl.full([BT], -1e30, tl.float32)
            total = tl.zeros([BT], tl.float32)
        y = tl.zeros([BT, BV], tl.float32)
        if HAS_LINEAR:
            q0, q1 = softmax_pair(dot(x, weights_q, PRECISION))
            past = tl.sum(q0 * sum0[None, :], 1) + tl.sum(q1 * sum1[None, :], 1)
            q0 = q0.to(x.dtype)
            q1 = q1.to(x.dtype)
            y_past = dot(q0, state0, PRECISION) + dot(q1, state1, PRECISION)
        for back in tl.static_range(LAG + 1):
            key_time = time - back * BT
            there = (key_time >= start) & (key_time < end)
            values = load_block(v, key_time, v_time, there, BV)
            near = _near(block, back, time, key_time, WINDOW, TERRACE, BT)
            if back == 0:
                pairs = there[None, :] & (time[:, None] >= key_time[None, :])
            else:
                pairs = there[None, :] & (time[:, None] >= start)
            if HAS_WINDOW:
                keys = load_block(k, key_time, k_time, there, DIM)
                s = dot(x, tl.trans(keys), PRECISION) * scale
                s = tl.where(pairs & near, s, -float("inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                p = tl.exp(s - higher[:, None])
                shrink = tl.exp(top - higher)
                total = total * shrink + tl.sum(p, 1)
                y = y * shrink[:, None] + dot(p.to(values.dtype), values, PRECISION)
                top = higher
            if HAS_LINEAR:
                if back >= FAR:
                    counted = there & (key_time >= start + SINKS)
                    k0, k1 = features(k, key_time, k_time, counted, weights_k, True, DIM, HALF, PRECISION)
                    a = dot(q0, tl.trans(k0.to(q0.dtype)), PRECISION) + dot(q1, tl.trans(k1.to(q0.dtype)), PRECISION)
                    a = tl.where(pairs & (near == 0), a, 0.0)
                    past += tl.sum(a, 1)
                    y_past += dot(a.to(values.dtype), values, PRECISION)
        if SINKS > 0:
            if HAS_WINDOW:
                far = _sinks_far(block, time, start, sink, WINDOW, TERRACE, BT) & (sink < SINKS)[None, :]
                s = dot(x, tl.trans(sinks_k), PRECISION) * scale
                s = tl.where(far, s, -float("inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                p = tl.exp(s - higher[:, None])
                shrink = tl.exp(top - higher)
                total = total * shrink + tl.sum(p, 1)
                y = y * shrink[:, None] + dot(p.to(sinks_v.dtype), sinks_v, PRECISION)
                top = higher
        if HAS_LINEAR:
            far_log = log_linear + tl.log(tl.maximum(past, 1e-37))
            far_log = tl.where(past > 0, far_log, -1e30)
        else:
            far_log = tl.full([BT], -1e30, tl.float32)
        if HAS_WINDOW:
            near_log = top + log_g + tl.log(tl.maximum(total, 1e-37))
            peak = tl.maximum(near_log, far_log)
            log_total = peak + tl.log(tl.exp(near_log - peak) + tl.exp(far_log - peak))
            y *= tl.exp(top + log_g - log_total)[:, None]
        else:
            log_total = tl.where(far_log > -1e29, far_log, 0.0)
        if HAS_LINEAR:
            y += y_past * tl.exp(tl.minimum(log_linear - log_total, MOST))[:, None]
        at_out = (time - num_past)[:, None] * out_time + columns[None, :]
        tl.store(out + at_out, y.to(out.dtype.element_ty), mask=ok[:, None])
        if value_block == 0:
            tl.store(log_mass + time - num_past, log_total, mask=ok)
        if HAS_LINEAR:  # keys of block n - LAG leave the window's reach
            if FAR > LAG:  # else they are what the last step back has met
                key_time = time - LAG * BT
                counted = (key_time >= start + SINKS) & (key_time < end)
                values = load_block(v, key_time, v_time, counted, BV)
                k0, k1 = features(k, key_time, k_time, counted, weights_k, True, DIM, HALF, PRECISION)
            state0 += dot(tl.trans(k0.to(values.dtype)), values, PRECISION)
            state1 += dot(tl.trans(k1.to(values.dtype)), values, PRECISION)
            sum0 += tl.sum(k0, 0)
            sum1 += tl.sum(k1, 0)


@triton.jit
def hybrid_backward_queries(
    q,
    k,
    v,
    map_q,
    map_k,
    log_factor,
    meta,
    sink_k,
    sink_v,
    bounds,
    states,
    sums,
    d_out,
    log_mass,
    inner,
    d_q,
    d_map,
    d_factor,
    d_meta,
    d_sink_k,
    d_sink_v,
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
    num_rows,
    num_past,
    num_queries,
    num_keys,
    num_splits,
    split_blocks,
    HAS_BOUNDS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_META: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACE: tl.constexpr,
    LAG: tl.constexpr,
    FAR: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, and the gradients of the query map, of log g, of the meta logit and of the sinks.

    With normalised weights P (softmax) and A (linear), `inner` D_i = do_i·y_i and dP_ij = do_i·v_j - D_i: ds = P dP, and
    dφq_i = Σ_j λ exp(-log mass_i) dP_ij φk_j. One value block gives one term of each sum: outputs have a leading dimension
    of value blocks, d_q (V blocks, B, H, T, DIM), the others (V blocks, N·splits, H, ...), fp32 but a lone d_q.
    """
    number = tl.program_id(0)
    head = tl.program_id(1)
    value_block = tl.program_id(2)
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys, BT)
    sequence = number // num_splits
    weights_q = load_map(map_q, head, HAS_LINEAR, DIM, HALF)
    weights_k = load_map(map_k, head // map_group, HAS_LINEAR, DIM, HALF)
    log_g = tl.load(log_factor + head)
    rows = (row * tl.num_programs(1) + head) * num_queries
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    d_out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_mass += rows
    inner += rows
    d_q += (value_block.to(tl.int64) * num_rows + rows) * DIM
    partial = (value_block * tl.num_programs(0) + number).to(tl.int64) * heads + head
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(end - start, BT).to(tl.int32))
    columns = tl.arange(0, BV)
    wide = tl.arange(0, DIM)
    lone = tl.where(value_block == 0, 1.0, 0.0)
    factor_sum = tl.zeros([BT], tl.float32)
    meta_sum = tl.zeros([BT], tl.float32)
    if SINKS > 0:
        sink = tl.arange(0, 16)
        at = (sequence.to(tl.int64) * (heads // group) + head // group) * 16
        sinks_k = tl.load(sink_k + (at + sink)[:, None] * DIM + wide[None, :])
        sinks_v = tl.load(sink_v + (at + sink)[:, None] * V + value_block * BV + columns[None, :])
        d_sinks_k = tl.zeros([16, DIM], tl.float32)
        d_sinks_v = tl.zeros([16, BV], tl.float32)
    if HAS_LINEAR:
        d_weights = tl.zeros([DIM, HALF], tl.float32)
        if HAS_STATE:
            at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
            state0 = tl.load(states + at)
            state1 = tl.load(states + at + HALF * V)
            sum0 = tl.load(sums + at_sum)
            sum1 = tl.load(sums + at_sum + HALF)
        else:
            state0 = tl.zeros([HALF, BV], tl.float32)
            state1 = tl.zeros([HALF, BV], tl.float32)
            sum0 = tl.zeros([HALF], tl.float32)
            sum1 = tl.zeros([HALF], tl.float32)
    for block in range(first, last):
        time = start + block * BT + tl.arange(0, BT)
        ok = (time < end) & (time >= num_past)
        x = load_block(q, time - num_past, q_time, ok, DIM)
        d_y = load_block(d_out, time - num_past, out_time, ok, BV)
        log_total = tl.load(log_mass + time - num_past, mask=ok, other=float("inf"))
        d_total = tl.load(inner + time - num_past, mask=ok, other=0.0) * lone
        d_x = tl.zeros([BT, DIM], tl.float32)
        if HAS_LINEAR:
            share = tl.exp(tl.minimum(log_linear - log_total, MOST))
            d_q0 = dot(d_y, tl.trans(state0), PRECISION) - d_total[:, None] * sum0[None, :]
            d_q1 = dot(d_y, tl.trans(state1), PRECISION) - d_total[:, None] * sum1[None, :]
            d_q0 *= share[:, None]
            d_q1 *= share[:, None]
        for back in tl.static_range(LAG + 1):
            key_time = time - back * BT
            there = (key_time >= start) & (key_time < end)
            values = load_block(v, key_time, v_time, there, BV)
            near = _near(block, back, time, key_time, WINDOW, TERRACE, BT)
            if back == 0:
                pairs = there[None, :] & (time[:, None] >= key_time[None, :])
            else:
                pairs = there[None, :] & (time[:, None] >= start)
            d_p = dot(d_y, tl.trans(values), PRECISION) - d_total[:, None]
            if HAS_WINDOW:
                keys = load_block(k, key_time, k_time, there, DIM)
                s = dot(x, tl.trans(keys), PRECISION) * scale + log_g
                p = tl.where(pairs & near, tl.exp(s - log_total[:, None]), 0.0)
                d_s = p * d_p
                factor_sum += tl.sum(d_s, 1)
                d_x += dot((d_s * scale).to(keys.dtype), keys, PRECISION)
            if HAS_LINEAR:
                if back >= FAR:
                    counted = there & (key_time >= start + SINKS)
                    k0, k1 = features(k, key_time, k_time, counted, weights_k, True, DIM, HALF, PRECISION)
                    d_a = tl.where(pairs & (near == 0), d_p * share[:, None], 0.0).to(values.dtype)
                    d_q0 += dot(d_a, k0, PRECISION)
                    d_q1 += dot(d_a, k1, PRECISION)
        if SINKS > 0:
            if HAS_WINDOW:
                far = _sinks_far(block, time, start, sink, WINDOW, TERRACE, BT) & (sink < SINKS)[None, :]
                s = dot(x, tl.trans(sinks_k), PRECISION) * scale + log_g
                p = tl.where(far, tl.exp(s - log_total[:, None]), 0.0)
                d_s = p * (dot(d_y, tl.trans(sinks_v), PRECISION) - d_total[:, None])
                factor_sum += tl.sum(d_s, 1)
                d_s = (d_s * scale).to(x.dtype)
                d_x += dot(d_s, sinks_k, PRECISION)
                d_sinks_k += dot(tl.trans(d_s), x, PRECISION)
                d_sinks_v += dot(tl.trans(p.to(x.dtype)), d_y, PRECISION)
        if HAS_META:
            d_s = -tl.exp(tl.load(meta + head) + log_g - log_total) * d_total
            factor_sum += d_s
            meta_sum += d_s
        if HAS_LINEAR:
            q0, q1 = softmax_pair(dot(x, weights_q, PRECISION))
            d_z = softmax_pair_gradient(q0, q1, d_q0, d_q1).to(x.dtype)
            d_x += dot(d_z, tl.trans(weights_q), PRECISION)
            d_weights += dot(tl.trans(x), d_z, PRECISION)
            if FAR > LAG:  # else they are what the last step back has met
                key_time = time - LAG * BT
                counted = (key_time >= start + SINKS) & (key_time < end)
                values = load_block(v, key_time, v_time, counted, BV)
                k0, k1 = features(k, key_time, k_time, counted, weights_k, True, DIM, HALF, PRECISION)
            state0 += dot(tl.trans(k0.to(values.dtype)), values, PRECISION)
            state1 += dot(tl.trans(k1.to(values.dtype)), values, PRECISION)
            sum0 += tl.sum(k0, 0)
            sum1 += tl.sum(k1, 0)
        at_q = (time - num_past)[:, None] * DIM + wide[None, :]
        tl.store(d_q + at_q, d_x.to(d_q.dtype.element_ty), mask=ok[:, None])
    tl.store(d_factor + partial, tl.sum(factor_sum, 0))
    if HAS_META:
        tl.store(d_meta + partial, tl.sum(meta_sum, 0))
    if SINKS > 0:
        cells = sink[:, None] * DIM + wide[None, :]
        tl.store(d_sink_k + partial * (16 * DIM) + cells, d_sinks_k)
        cells = sink[:, None] * V + value_block * BV + columns[None, :]
        mine = (number.to(tl.int64) * heads + head) * (16 * V)
        tl.store(d_sink_v + mine + cells, d_sinks_v)
    if HAS_LINEAR:
        cells = wide[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(d_map + partial * (DIM * HALF) + cells, d_weights)


@triton.jit
def hybrid_backward_keys(
    q,
    k,
    v,
    map_q,
    map_k,
    log_factor,
    bounds,
    d_states,
    d_sums,
    d_out,
    log_mass,
    inner,
    share,
    d_k,
    d_v,
    d_map,
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
    num_rows,
    num_past,
    num_queries,
    num_keys,
    num_splits,
    split_blocks,
    HAS_BOUNDS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_STATE: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACE: tl.constexpr,
    LAG: tl.constexpr,
    FAR: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv and the key map's gradient, from the last block of keys to the first.

    Queries more than LAG blocks on reach a key through dS = Σ_i λ exp(-log mass_i) φq_i (do_i, -D_i)ᵀ, which runs backwards
    in registers. `share` (B, H, T) is λ exp(-log mass); d_k (V blocks, B, H, keys, DIM), d_v (B, H, keys, V).
    """
    number = tl.program_id(0)
    head = tl.program_id(1)
    value_block = tl.program_id(2)
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys, BT)
    weights_q = load_map(map_q, head, HAS_LINEAR, DIM, HALF)
    weights_k = load_map(map_k, head // map_group, HAS_LINEAR, DIM, HALF)
    log_g = tl.load(log_factor + head)
    rows = (row * tl.num_programs(1) + head) * num_queries
    rows_k = (row * tl.num_programs(1) + head) * num_keys
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    d_out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_mass += rows
    inner += rows
    share += rows
    d_k += (value_block.to(tl.int64) * num_rows + rows_k) * DIM
    d_v += rows_k * V + value_block * BV
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(end - start, BT).to(tl.int32))
    count = tl.maximum(last - first, 0)
    columns = tl.arange(0, BV)
    wide = tl.arange(0, DIM)
    lone = tl.where(value_block == 0, 1.0, 0.0)
    if HAS_LINEAR:
        d_weights = tl.zeros([DIM, HALF], tl.float32)
        if HAS_STATE:
            at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
            state0 = tl.load(d_states + at)
            state1 = tl.load(d_states + at + HALF * V)
            sum0 = tl.load(d_sums + at_sum)
            sum1 = tl.load(d_sums + at_sum + HALF)
        else:
            state0 = tl.zeros([HALF, BV], tl.float32)
            state1 = tl.zeros([HALF, BV], tl.float32)
            sum0 = tl.zeros([HALF], tl.float32)
            sum1 = tl.zeros([HALF], tl.float32)
    for step in range(count):
        block = last - 1 - step
        key_time = start + block * BT + tl.arange(0, BT)
        there = key_time < end
        keys = load_block(k, key_time, k_time, there, DIM)
        values = load_block(v, key_time, v_time, there, BV)
        d_keys = tl.zeros([BT, DIM], tl.float32)
        d_values = tl.zeros([BT, BV], tl.float32)
        if HAS_LINEAR:
            counted = (there & (key_time >= start + SINKS))[:, None]
            k0, k1 = softmax_pair(dot(keys, weights_k, PRECISION))
            x0 = tl.where(counted, k0, 0.0).to(keys.dtype)
            x1 = tl.where(counted, k1, 0.0).to(keys.dtype)
            d_values += dot(x0, state0, PRECISION) + dot(x1, state1, PRECISION)
            d_k0 = dot(values, tl.trans(state0), PRECISION) + sum0[None, :] * lone
            d_k1 = dot(values, tl.trans(state1), PRECISION) + sum1[None, :] * lone
        for back in tl.static_range(LAG + 1):
            time = key_time + back * BT
            ok = (time < end) & (time >= num_past)
            x = load_block(q, time - num_past, q_time, ok, DIM)
            d_y = load_block(d_out, time - num_past, out_time, ok, BV)
            d_total = tl.load(inner + time - num_past, mask=ok, other=0.0) * lone
            near = tl.trans(_near(block + back, back, time, key_time, WINDOW, TERRACE, BT))
            if back == 0:
                pairs = ok[None, :] & (time[None, :] >= key_time[:, None])
            else:
                pairs = ok[None, :] & there[:, None]
            d_p = dot(values, tl.trans(d_y), PRECISION) - d_total[None, :]
            if HAS_WINDOW:
                log_total = tl.load(log_mass + time - num_past, mask=ok, other=float("inf"))
                s = dot(keys, tl.trans(x), PRECISION) * scale + log_g
                p = tl.where(pairs & near, tl.exp(s - log_total[None, :]), 0.0)
                d_values += dot(p.to(d_y.dtype), d_y, PRECISION)
                d_keys += dot((p * d_p * scale).to(x.dtype), x, PRECISION)
            if HAS_LINEAR:
                if back >= FAR:
                    part = tl.load(share + time - num_past, mask=ok, other=0.0)
                    q0, q1 = softmax_pair(dot(x, weights_q, PRECISION))
                    linear = pairs & (near == 0)
                    a = dot(x0, tl.trans(q0.to(x.dtype)), PRECISION) + dot(x1, tl.trans(q1.to(x.dtype)), PRECISION)
                    a = tl.where(linear, a * part[None, :], 0.0)
                    d_values += dot(a.to(d_y.dtype), d_y, PRECISION)
                    d_a = tl.where(linear, d_p * part[None, :], 0.0).to(x.dtype)
                    d_k0 += dot(d_a, q0, PRECISION)
                    d_k1 += dot(d_a, q1, PRECISION)
        if HAS_LINEAR:
            d_z = softmax_pair_gradient(k0, k1, d_k0, d_k1)
            d_z = tl.where(counted, d_z, 0.0).to(keys.dtype)
            d_keys += dot(d_z, tl.trans(weights_k), PRECISION)
            d_weights += dot(tl.trans(keys), d_z, PRECISION)
            if FAR > LAG:
                part = tl.load(share + time - num_past, mask=ok, other=0.0)
                q0, q1 = softmax_pair(dot(x, weights_q, PRECISION))
            d_total = tl.load(inner + time - num_past, mask=ok, other=0.0)
            q0 = q0 * part[:, None]  # the next block of keys sees the last step's queries through dS
            q1 = q1 * part[:, None]
            state0 += dot(tl.trans(q0.to(x.dtype)), d_y, PRECISION)
            state1 += dot(tl.trans(q1.to(x.dtype)), d_y, PRECISION)
            sum0 -= tl.sum(q0 * d_total[:, None], 0)
            sum1 -= tl.sum(q1 * d_total[:, None], 0)
        tl.store(d_k + key_time[:, None] * DIM + wide[None, :], d_keys.to(d_k.dtype.element_ty), mask=there[:, None])
        at_v = key_time[:, None] * V + columns[None, :]
        tl.store(d_v + at_v, d_values.to(d_v.dtype.element_ty), mask=there[:, None])
    if HAS_LINEAR:
        partial = (value_block * tl.num_programs(0) + number).to(tl.int64) * heads + head
        cells = wide[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(d_map + partial * (DIM * HALF) + cells, d_weights)
