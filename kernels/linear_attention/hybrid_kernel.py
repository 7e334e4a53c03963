"""Triton kernels of hybrid attention: a softmax window and a linear past under one denominator, in one pass.

A program walks over the blocks of one split of a sequence. Block n of queries meets blocks n, n - 1, …, n - LAG of keys
pair by pair, through softmax or linearly as distance says, and all earlier keys through the state in its registers.
Features are computed from q and k in the kernel. Letters and the equation: reference.py.
"""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import (
    dot,
    features,
    in_two,
    in_two,
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

NOTHING = tl.constexpr(-1e30)  # the log of no weight at all
MOST = tl.constexpr(60.0)  # exp of more than this is never needed: an empty past is multiplied by it


@triton.jit
def _near(block, back, index, WINDOW: tl.constexpr, TERRACE: tl.constexpr, BT: tl.constexpr):
    """(queries, keys): whether keys `back` blocks before the queries' block are in the window.

    By distance; or, in a terrace, whether they lie in the same block of WINDOW positions or in the one before it.
    """
    apart = index[:, None] - index[None, :]
    if TERRACE:
        per_window: tl.constexpr = WINDOW // BT
        near = (block // per_window - (block - back) // per_window <= 1) & (apart < BT)
    else:
        near = apart < WINDOW - back * BT
    return near


@triton.jit
def _sinks_far(block, index, sink, WINDOW: tl.constexpr, TERRACE: tl.constexpr, BT: tl.constexpr):
    """(queries, sinks): whether a sink has left the window."""
    if TERRACE:
        per_window: tl.constexpr = WINDOW // BT
        far = (block // per_window - (sink // WINDOW)[None, :] > 1) & (index[:, None] >= 0)
    else:
        far = block * BT + index[:, None] - sink[None, :] >= WINDOW
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
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys)
    sequence = number // num_splits
    log_g = tl.load(log_factor + head)
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_mass += (row * tl.num_programs(1) + head) * num_queries + start - num_past
    length = (end - start).to(tl.int32)
    index = tl.arange(0, BT)
    q_rows = tl.make_tensor_descriptor(q + start * q_time, [length - num_past, DIM], [q_time, 1], [BT, DIM])
    k_rows = tl.make_tensor_descriptor(k + start * k_time, [length, DIM], [k_time, 1], [BT, DIM])
    v_rows = tl.make_tensor_descriptor(v + start * v_time, [length, BV], [v_time, 1], [BT, BV])
    wq_rows = tl.make_tensor_descriptor(map_q + head * DIM * HALF, [DIM, HALF], [HALF, 1], [DIM, HALF])
    wk_rows = tl.make_tensor_descriptor(map_k + (head // map_group) * DIM * HALF, [DIM, HALF], [HALF, 1], [DIM, HALF])
    out += (start - num_past) * out_time
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(length, BT))
    columns = tl.arange(0, BV)
    if SINKS > 0:
        sink = tl.arange(0, 16)
        at = (sequence.to(tl.int64) * (heads // group) + head // group) * 16
        sinks_k = tl.load(sink_k + (at + sink)[:, None] * DIM + tl.arange(0, DIM)[None, :])
        sinks_v = tl.load(sink_v + (at + sink)[:, None] * V + value_block * BV + columns[None, :])
    if HAS_LINEAR:
        lane = tl.arange(0, 16)[:, None]
        ones = tl.where(lane == 0, tl.full([16, BT], 1.0, tl.float32), 0.0).to(q.dtype.element_ty)
        sum0 = tl.zeros([16, HALF], tl.float32)  # the rows add up: products with them run on the tensor cores
        sum1 = tl.zeros([16, HALF], tl.float32)
        if HAS_STATE:
            at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
            state0 = tl.trans(tl.load(states + at))
            state1 = tl.trans(tl.load(states + at + HALF * V))
            sum0 += tl.where(lane == 0, tl.load(sums + at_sum)[None, :], 0.0)
            sum1 += tl.where(lane == 0, tl.load(sums + at_sum + HALF)[None, :], 0.0)
        else:
            state0 = tl.zeros([BV, HALF], tl.float32)
            state1 = tl.zeros([BV, HALF], tl.float32)
    for block in range(first, last):
        place = block * BT + index
        ok = (place < length) & (place >= num_past)
        x = q_rows.load([block * BT - num_past, 0])
        # weights are in units of exp(top)
        if HAS_META:
            top = tl.zeros([BT], tl.float32) + tl.load(meta + head) + log_g
            total = tl.full([BT], 1.0, tl.float32)
        else:
            top = tl.full([BT], NOTHING, tl.float32)
            total = tl.zeros([BT], tl.float32)
        if HAS_LINEAR:
            q0, q1 = softmax_pair(dot(x, wq_rows.load([0, 0]), PRECISION))
            q0 = q0.to(x.dtype)
            q1 = q1.to(x.dtype)
            high, low = in_two(sum0, x.dtype)
            past = dot(high, tl.trans(q0), PRECISION) + dot(low, tl.trans(q0), PRECISION)
            high, low = in_two(sum1, x.dtype)
            past += dot(high, tl.trans(q1), PRECISION) + dot(low, tl.trans(q1), PRECISION)
            past = tl.sum(past, 0)
            y = dot(q0, tl.trans(state0.to(x.dtype)), PRECISION)
            y = tl.dot(q1, tl.trans(state1.to(x.dtype)), y, input_precision=PRECISION)
            higher = tl.maximum(top, tl.where(past > 0, log_linear, NOTHING))
            total = total * tl.exp(top - higher) + past * tl.exp(tl.minimum(log_linear - higher, 0.0))
            y *= tl.exp(tl.minimum(log_linear - higher, 0.0))[:, None]
            top = higher
        else:
            y = tl.zeros([BT, BV], tl.float32)
        for back in tl.static_range(LAG + 1):
            key_place = place - back * BT
            there = (key_place >= 0) & (key_place < length)
            keys = k_rows.load([block * BT - back * BT, 0])
            values = v_rows.load([block * BT - back * BT, 0])
            near = _near(block, back, index, WINDOW, TERRACE, BT)
            if back == 0:
                pairs = there[None, :] & (index[:, None] >= index[None, :])
            else:
                pairs = there[None, :] & (index[:, None] >= 0)
            if HAS_LINEAR and back >= FAR:
                counted = (there & (key_place >= SINKS))[:, None]
                k0, k1 = softmax_pair(dot(keys, wk_rows.load([0, 0]), PRECISION))
                k0 = tl.where(counted, k0, 0.0)
                k1 = tl.where(counted, k1, 0.0)
                k0 = k0.to(keys.dtype)
                k1 = k1.to(keys.dtype)
                a = tl.dot(q1, tl.trans(k1), dot(q0, tl.trans(k0), PRECISION), input_precision=PRECISION)
                a = tl.where(pairs & (near == 0), a, 0.0)
                higher = tl.maximum(top, tl.where(tl.max(a, 1) > 0, log_linear, NOTHING))
            else:
                higher = top
            if HAS_WINDOW:
                s = tl.where(pairs & near, dot(x, tl.trans(keys), PRECISION) * scale + log_g, -float("inf"))
                higher = tl.maximum(higher, tl.max(s, 1))
                p = tl.exp(s - higher[:, None])
                if HAS_LINEAR and back >= FAR:
                    p += a * tl.exp(tl.minimum(log_linear - higher, 0.0))[:, None]
            elif HAS_LINEAR and back >= FAR:
                p = a * tl.exp(tl.minimum(log_linear - higher, 0.0))[:, None]
            if HAS_WINDOW or (HAS_LINEAR and back >= FAR):
                shrink = tl.exp(top - higher)
                total = total * shrink + tl.sum(p, 1)
                y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision=PRECISION)
                top = higher
        if SINKS > 0:
            if HAS_WINDOW:
                far = _sinks_far(block, index, sink, WINDOW, TERRACE, BT) & (sink < SINKS)[None, :]
                s = tl.where(far, dot(x, tl.trans(sinks_k), PRECISION) * scale + log_g, -float("inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                p = tl.exp(s - higher[:, None])
                shrink = tl.exp(top - higher)
                total = total * shrink + tl.sum(p, 1)
                y = tl.dot(p.to(sinks_v.dtype), sinks_v, y * shrink[:, None], input_precision=PRECISION)
                top = higher
        y = y / tl.where(total == 0, 1.0, total)[:, None]
        at_out = place.to(tl.int64)[:, None] * out_time + columns[None, :]
        tl.store(out + at_out, y.to(out.dtype.element_ty), mask=ok[:, None])
        if value_block == 0:
            log_total = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-37)), 0.0)
            tl.store(log_mass + place, log_total, mask=ok)
        if HAS_LINEAR:  # keys of block n - LAG leave the window's reach
            if FAR > LAG:  # else they are what the last step back has met
                counted = (there & (key_place >= SINKS))[:, None]
                k0, k1 = softmax_pair(dot(keys, wk_rows.load([0, 0]), PRECISION))
                k0 = tl.where(counted, k0, 0.0)
                k1 = tl.where(counted, k1, 0.0)
                k0 = k0.to(keys.dtype)
                k1 = k1.to(keys.dtype)
            sum0 = tl.dot(ones, k0, sum0, input_precision=PRECISION)
            sum1 = tl.dot(ones, k1, sum1, input_precision=PRECISION)
            state0 = tl.dot(tl.trans(values), k0, state0, input_precision=PRECISION)
            state1 = tl.dot(tl.trans(values), k1, state1, input_precision=PRECISION)


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
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys)
    sequence = number // num_splits
    log_g = tl.load(log_factor + head)
    rows = (row * tl.num_programs(1) + head) * num_queries
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    d_out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_mass += rows + start - num_past
    inner += rows + start - num_past
    d_q += (value_block.to(tl.int64) * num_rows + rows + start - num_past) * DIM
    partial = (value_block * tl.num_programs(0) + number).to(tl.int64) * heads + head
    length = (end - start).to(tl.int32)
    index = tl.arange(0, BT)
    q_rows = tl.make_tensor_descriptor(q + start * q_time, [length - num_past, DIM], [q_time, 1], [BT, DIM])
    k_rows = tl.make_tensor_descriptor(k + start * k_time, [length, DIM], [k_time, 1], [BT, DIM])
    v_rows = tl.make_tensor_descriptor(v + start * v_time, [length, BV], [v_time, 1], [BT, BV])
    o_rows = tl.make_tensor_descriptor(d_out + start * out_time, [length - num_past, BV], [out_time, 1], [BT, BV])
    wq_rows = tl.make_tensor_descriptor(map_q + head * DIM * HALF, [DIM, HALF], [HALF, 1], [DIM, HALF])
    wk_rows = tl.make_tensor_descriptor(map_k + (head // map_group) * DIM * HALF, [DIM, HALF], [HALF, 1], [DIM, HALF])
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(length, BT))
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
        lane = tl.arange(0, 16)[:, None]
        ones = tl.where(lane == 0, tl.full([16, BT], 1.0, tl.float32), 0.0).to(q.dtype.element_ty)
        sum0 = tl.zeros([16, HALF], tl.float32)
        sum1 = tl.zeros([16, HALF], tl.float32)
        if HAS_STATE:
            at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
            state0 = tl.trans(tl.load(states + at))
            state1 = tl.trans(tl.load(states + at + HALF * V))
            sum0 += tl.where(lane == 0, tl.load(sums + at_sum)[None, :], 0.0)
            sum1 += tl.where(lane == 0, tl.load(sums + at_sum + HALF)[None, :], 0.0)
        else:
            state0 = tl.zeros([BV, HALF], tl.float32)
            state1 = tl.zeros([BV, HALF], tl.float32)
    for block in range(first, last):
        place = block * BT + index
        ok = (place < length) & (place >= num_past)
        x = q_rows.load([block * BT - num_past, 0])
        d_y = o_rows.load([block * BT - num_past, 0])
        log_total = tl.load(log_mass + place, mask=ok, other=float("inf"))
        d_total = tl.load(inner + place, mask=ok, other=0.0) * lone
        d_x = tl.zeros([BT, DIM], tl.float32)
        if HAS_LINEAR:
            share = tl.exp(tl.minimum(log_linear - log_total, MOST))
            d_q0 = (dot(d_y, state0, PRECISION) - d_total[:, None] * tl.sum(sum0, 0)[None, :]) * share[:, None]
            d_q1 = (dot(d_y, state1, PRECISION) - d_total[:, None] * tl.sum(sum1, 0)[None, :]) * share[:, None]
        for back in tl.static_range(LAG + 1):
            key_place = place - back * BT
            there = (key_place >= 0) & (key_place < length)
            keys = k_rows.load([block * BT - back * BT, 0])
            values = v_rows.load([block * BT - back * BT, 0])
            near = _near(block, back, index, WINDOW, TERRACE, BT)
            if back == 0:
                pairs = there[None, :] & (index[:, None] >= index[None, :])
            else:
                pairs = there[None, :] & (index[:, None] >= 0)
            d_p = dot(d_y, tl.trans(values), PRECISION) - d_total[:, None]
            if HAS_WINDOW:
                s = dot(x, tl.trans(keys), PRECISION) * scale + log_g
                p = tl.where(pairs & near, tl.exp(s - log_total[:, None]), 0.0)
                d_s = p * d_p
                factor_sum += tl.sum(d_s, 1)
                d_x = tl.dot((d_s * scale).to(keys.dtype), keys, d_x, input_precision=PRECISION)
            if HAS_LINEAR:
                if back >= FAR:
                    counted = (there & (key_place >= SINKS))[:, None]
                    k0, k1 = softmax_pair(dot(keys, wk_rows.load([0, 0]), PRECISION))
                    k0 = tl.where(counted, k0, 0.0).to(keys.dtype)
                    k1 = tl.where(counted, k1, 0.0).to(keys.dtype)
                    d_a = tl.where(pairs & (near == 0), d_p * share[:, None], 0.0).to(values.dtype)
                    d_q0 += dot(d_a, k0, PRECISION)
                    d_q1 += dot(d_a, k1, PRECISION)
        if SINKS > 0:
            if HAS_WINDOW:
                far = _sinks_far(block, index, sink, WINDOW, TERRACE, BT) & (sink < SINKS)[None, :]
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
            q0, q1 = softmax_pair(dot(x, wq_rows.load([0, 0]), PRECISION))
            d_z = softmax_pair_gradient(q0, q1, d_q0, d_q1).to(x.dtype)
            d_x += dot(d_z, tl.trans(wq_rows.load([0, 0])), PRECISION)
            d_weights += dot(tl.trans(x), d_z, PRECISION)
            if FAR > LAG:  # else they are what the last step back has met
                counted = (there & (key_place >= SINKS))[:, None]
                k0, k1 = softmax_pair(dot(keys, wk_rows.load([0, 0]), PRECISION))
                k0 = tl.where(counted, k0, 0.0).to(keys.dtype)
                k1 = tl.where(counted, k1, 0.0).to(keys.dtype)
            state0 = tl.dot(tl.trans(values), k0, state0, input_precision=PRECISION)
            state1 = tl.dot(tl.trans(values), k1, state1, input_precision=PRECISION)
            sum0 = tl.dot(ones, k0, sum0, input_precision=PRECISION)
            sum1 = tl.dot(ones, k1, sum1, input_precision=PRECISION)
        at_q = place.to(tl.int64)[:, None] * DIM + wide[None, :]
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
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys)
    log_g = tl.load(log_factor + head)
    rows = (row * tl.num_programs(1) + head) * num_queries
    rows_k = (row * tl.num_programs(1) + head) * num_keys
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    d_out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_mass += rows + start - num_past
    inner += rows + start - num_past
    share += rows + start - num_past
    d_k += (value_block.to(tl.int64) * num_rows + rows_k + start) * DIM
    d_v += (rows_k + start) * V + value_block * BV
    length = (end - start).to(tl.int32)
    index = tl.arange(0, BT)
    q_rows = tl.make_tensor_descriptor(q + start * q_time, [length - num_past, DIM], [q_time, 1], [BT, DIM])
    k_rows = tl.make_tensor_descriptor(k + start * k_time, [length, DIM], [k_time, 1], [BT, DIM])
    v_rows = tl.make_tensor_descriptor(v + start * v_time, [length, BV], [v_time, 1], [BT, BV])
    o_rows = tl.make_tensor_descriptor(d_out + start * out_time, [length - num_past, BV], [out_time, 1], [BT, BV])
    wq_rows = tl.make_tensor_descriptor(map_q + head * DIM * HALF, [DIM, HALF], [HALF, 1], [DIM, HALF])
    wk_rows = tl.make_tensor_descriptor(map_k + (head // map_group) * DIM * HALF, [DIM, HALF], [HALF, 1], [DIM, HALF])
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(length, BT))
    count = tl.maximum(last - first, 0)
    columns = tl.arange(0, BV)
    wide = tl.arange(0, DIM)
    lone = tl.where(value_block == 0, 1.0, 0.0)
    if HAS_LINEAR:
        d_weights = tl.zeros([DIM, HALF], tl.float32)
        lane = tl.arange(0, 16)[:, None]
        sum0 = tl.zeros([16, HALF], tl.float32)
        sum1 = tl.zeros([16, HALF], tl.float32)
        if HAS_STATE:
            at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
            state0 = tl.trans(tl.load(d_states + at))
            state1 = tl.trans(tl.load(d_states + at + HALF * V))
            sum0 += tl.where(lane == 0, tl.load(d_sums + at_sum)[None, :], 0.0)
            sum1 += tl.where(lane == 0, tl.load(d_sums + at_sum + HALF)[None, :], 0.0)
        else:
            state0 = tl.zeros([BV, HALF], tl.float32)
            state1 = tl.zeros([BV, HALF], tl.float32)
    for step in range(count):
        block = last - 1 - step
        key_place = block * BT + index
        there = key_place < length
        keys = k_rows.load([block * BT, 0])
        values = v_rows.load([block * BT, 0])
        d_keys = tl.zeros([BT, DIM], tl.float32)
        d_values = tl.zeros([BT, BV], tl.float32)
        if HAS_LINEAR:
            counted = (there & (key_place >= SINKS))[:, None]
            k0, k1 = softmax_pair(dot(keys, wk_rows.load([0, 0]), PRECISION))
            x0 = tl.where(counted, k0, 0.0).to(keys.dtype)
            x1 = tl.where(counted, k1, 0.0).to(keys.dtype)
            d_values = tl.dot(x0, tl.trans(state0.to(x0.dtype)), d_values, input_precision=PRECISION)
            d_values = tl.dot(x1, tl.trans(state1.to(x1.dtype)), d_values, input_precision=PRECISION)
            d_k0 = dot(values, state0, PRECISION) + tl.sum(sum0, 0)[None, :] * lone
            d_k1 = dot(values, state1, PRECISION) + tl.sum(sum1, 0)[None, :] * lone
        for back in tl.static_range(LAG + 1):
            place = key_place + back * BT
            ok = (place < length) & (place >= num_past)
            x = q_rows.load([block * BT + back * BT - num_past, 0])
            d_y = o_rows.load([block * BT + back * BT - num_past, 0])
            d_total = tl.load(inner + place, mask=ok, other=0.0) * lone
            near = tl.trans(_near(block + back, back, index, WINDOW, TERRACE, BT))
            if back == 0:
                pairs = ok[None, :] & (index[None, :] >= index[:, None])
            else:
                pairs = ok[None, :] & there[:, None]
            d_p = dot(values, tl.trans(d_y), PRECISION) - d_total[None, :]
            if HAS_WINDOW:
                log_total = tl.load(log_mass + place, mask=ok, other=float("inf"))
                s = dot(keys, tl.trans(x), PRECISION) * scale + log_g
                p = tl.where(pairs & near, tl.exp(s - log_total[None, :]), 0.0)
                d_values = tl.dot(p.to(d_y.dtype), d_y, d_values, input_precision=PRECISION)
                d_keys = tl.dot((p * d_p * scale).to(x.dtype), x, d_keys, input_precision=PRECISION)
            if HAS_LINEAR:
                if back >= FAR:
                    part = tl.load(share + place, mask=ok, other=0.0)
                    q0, q1 = softmax_pair(dot(x, wq_rows.load([0, 0]), PRECISION))
                    linear = pairs & (near == 0)
                    a = dot(x0, tl.trans(q0.to(x.dtype)), PRECISION) + dot(x1, tl.trans(q1.to(x.dtype)), PRECISION)
                    a = tl.where(linear, a * part[None, :], 0.0)
                    d_values = tl.dot(a.to(d_y.dtype), d_y, d_values, input_precision=PRECISION)
                    d_a = tl.where(linear, d_p * part[None, :], 0.0).to(x.dtype)
                    d_k0 += dot(d_a, q0, PRECISION)
                    d_k1 += dot(d_a, q1, PRECISION)
        if HAS_LINEAR:
            d_z = softmax_pair_gradient(k0, k1, d_k0, d_k1)
            d_z = tl.where(counted, d_z, 0.0).to(keys.dtype)
            d_keys += dot(d_z, tl.trans(wk_rows.load([0, 0])), PRECISION)
            d_weights += dot(tl.trans(keys), d_z, PRECISION)
            if FAR > LAG:
                part = tl.load(share + place, mask=ok, other=0.0)
                q0, q1 = softmax_pair(dot(x, wq_rows.load([0, 0]), PRECISION))
            d_total = tl.load(inner + place, mask=ok, other=0.0)
            q0 = (q0 * part[:, None]).to(x.dtype)  # the next block of keys sees the last step's queries through dS
            q1 = (q1 * part[:, None]).to(x.dtype)
            high, low = in_two(-d_total, x.dtype)
            terms = tl.where(lane == 0, high[None, :], tl.where(lane == 1, low[None, :], tl.zeros_like(low)[None, :]))
            state0 = tl.dot(tl.trans(d_y), q0, state0, input_precision=PRECISION)
            state1 = tl.dot(tl.trans(d_y), q1, state1, input_precision=PRECISION)
            sum0 = tl.dot(terms, q0, sum0, input_precision=PRECISION)
            sum1 = tl.dot(terms, q1, sum1, input_precision=PRECISION)
        tl.store(d_k + key_place.to(tl.int64)[:, None] * DIM + wide[None, :], d_keys.to(d_k.dtype.element_ty), mask=there[:, None])
        at_v = key_place.to(tl.int64)[:, None] * V + columns[None, :]
        tl.store(d_v + at_v, d_values.to(d_v.dtype.element_ty), mask=there[:, None])
    if HAS_LINEAR:
        partial = (value_block * tl.num_programs(0) + number).to(tl.int64) * heads + head
        cells = wide[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(d_map + partial * (DIM * HALF) + cells, d_weights)
