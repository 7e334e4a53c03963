"""Triton kernels of gated linear attention: forward, and its exact backward in two passes.

A program walks over the blocks of one split of a sequence with the state in registers, so that q, k and v are read once
and no state a block goes through memory. Letters and equations: gated_reference.py.
"""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import (
    dot,
    features,
    load_block,
    load_map,
    softmax_pair_gradient,
    split_of,
    state_offsets,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error


@triton.jit
def _decays(log_gate, time, ok, HAS_GATE: tl.constexpr, BT: tl.constexpr):
    """Log gates summed from the block's start through each row, and over the block."""
    if HAS_GATE:
        gate = tl.load(log_gate + time, mask=ok, other=0.0)
        through = tl.cumsum(gate, 0)
        whole = tl.sum(gate, 0)
    else:
        through = tl.zeros([BT], tl.float32)
        whole = 0.0
    return through, whole


@triton.jit
def _causal_decay(through, HAS_GATE: tl.constexpr, BT: tl.constexpr):
    """(BT, BT): what is left of key j at query i >= j, 0 for later keys."""
    rows = tl.arange(0, BT)
    causal = rows[:, None] >= rows[None, :]
    if HAS_GATE:
        decay = tl.where(causal, tl.exp(tl.minimum(through[:, None] - through[None, :], 0.0)), 0.0)
    else:
        decay = tl.where(causal, 1.0, 0.0)
    return decay


@triton.jit
def gated_forward(
    q,
    k,
    v,
    log_gate,
    map_q,
    map_k,
    bounds,
    states,
    sums,
    out,
    mass,
    last_state,
    last_sum,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    gate_batch,
    gate_head,
    out_batch,
    out_head,
    out_time,
    heads,
    group,
    map_group,
    scale,
    num_keys,
    num_splits,
    split_blocks,
    HAS_BOUNDS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_STATE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STORE_LAST: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y_i and its denominator. Shapes as in ops.py; `mass` (B, H, T) fp32."""
    number = tl.program_id(0)
    head = tl.program_id(1)
    value_block = tl.program_id(2)
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys, BT)
    weights_q = load_map(map_q, head, HAS_MAP, DIM, HALF)
    weights_k = load_map(map_k, head // map_group, HAS_MAP, DIM, HALF)
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_gate += row * gate_batch + head.to(tl.int64) * gate_head
    mass += (row * tl.num_programs(1) + head) * num_keys
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(end - start, BT).to(tl.int32))
    at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
    if HAS_STATE:
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
        ok = time < end
        q0, q1 = features(q, time, q_time, ok, weights_q, HAS_MAP, DIM, HALF, PRECISION)
        k0, k1 = features(k, time, k_time, ok, weights_k, HAS_MAP, DIM, HALF, PRECISION)
        values = load_block(v, time, v_time, ok, BV)
        through, whole = _decays(log_gate, time, ok, HAS_GATE, BT)
        x0 = q0.to(values.dtype)
        x1 = q1.to(values.dtype)
        a = dot(x0, tl.trans(k0.to(values.dtype)), PRECISION) + dot(x1, tl.trans(k1.to(values.dtype)), PRECISION)
        a *= _causal_decay(through, HAS_GATE, BT)
        y = dot(x0, state0, PRECISION) + dot(x1, state1, PRECISION)
        if HAS_GATE:
            y *= tl.exp(through)[:, None]
        y += dot(a.to(values.dtype), values, PRECISION)
        if NORMALIZE:
            past = tl.sum(q0 * sum0[None, :], 1) + tl.sum(q1 * sum1[None, :], 1)
            total = tl.sum(a, 1) + past * tl.exp(through)
            y = y / tl.where(total == 0, 1.0, total)[:, None]
            if value_block == 0:
                tl.store(mass + time, total, mask=ok)
        else:
            y *= scale
        columns = tl.arange(0, BV)
        tl.store(out + time[:, None] * out_time + columns[None, :], y.to(out.dtype.element_ty), mask=ok[:, None])
        if HAS_GATE:
            left = tl.exp(whole - through)
            k0 = k0 * left[:, None]
            k1 = k1 * left[:, None]
            state0 *= tl.exp(whole)
            state1 *= tl.exp(whole)
            sum0 *= tl.exp(whole)
            sum1 *= tl.exp(whole)
        state0 += dot(tl.trans(k0.to(values.dtype)), values, PRECISION)
        state1 += dot(tl.trans(k1.to(values.dtype)), values, PRECISION)
        sum0 += tl.sum(k0, 0)
        sum1 += tl.sum(k1, 0)
    if STORE_LAST:  # one split: the state after the sequence
        tl.store(last_state + at, state0)
        tl.store(last_state + at + HALF * V, state1)
        if value_block == 0:
            tl.store(last_sum + at_sum, sum0)
            tl.store(last_sum + at_sum + HALF, sum1)


@triton.jit
def gated_backward_queries(
    q,
    k,
    v,
    log_gate,
    map_q,
    map_k,
    bounds,
    states,
    sums,
    d_out,
    row_weight,
    extra,
    d_q,
    d_map,
    d_gate,
    block_states,
    block_sums,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    gate_batch,
    gate_head,
    out_batch,
    out_head,
    out_time,
    heads,
    group,
    map_group,
    num_rows,
    num_keys,
    num_splits,
    split_blocks,
    num_blocks,
    HAS_BOUNDS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, the query map's gradient, and what dlog_gate needs of the states.

    With r = `row_weight` and e = `extra` (B, H, T), the gradient of the weight of key j at query i is
    dA_ij = r_i (do_i·v_j) + e_i. One value block gives one term of the sums over V: `d_q` is (V blocks, B, H, T, ·),
    `d_gate` (V blocks, B, H, T), `d_map` (V blocks, N·splits, H, DIM, HALF), all fp32 but a lone block's d_q.
    `block_states` (N, blocks, H, 2·HALF, V) keeps the state that every block starts from, for `gated_backward_keys`.
    """
    number = tl.program_id(0)
    head = tl.program_id(1)
    value_block = tl.program_id(2)
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys, BT)
    weights_q = load_map(map_q, head, HAS_MAP, DIM, HALF)
    weights_k = load_map(map_k, head // map_group, HAS_MAP, DIM, HALF)
    rows = (row * tl.num_programs(1) + head) * num_keys
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    d_out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_gate += row * gate_batch + head.to(tl.int64) * gate_head
    row_weight += rows
    extra += rows
    WIDTH: tl.constexpr = DIM if HAS_MAP else 2 * HALF
    d_q += (value_block.to(tl.int64) * num_rows + rows) * WIDTH
    d_gate += value_block.to(tl.int64) * num_rows + rows
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(end - start, BT).to(tl.int32))
    at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
    if HAS_STATE:
        state0 = tl.load(states + at)
        state1 = tl.load(states + at + HALF * V)
        sum0 = tl.load(sums + at_sum)
        sum1 = tl.load(sums + at_sum + HALF)
    else:
        state0 = tl.zeros([HALF, BV], tl.float32)
        state1 = tl.zeros([HALF, BV], tl.float32)
        sum0 = tl.zeros([HALF], tl.float32)
        sum1 = tl.zeros([HALF], tl.float32)
    if HAS_MAP:
        d_weights = tl.zeros([DIM, HALF], tl.float32)
    for block in range(first, last):
        time = start + block * BT + tl.arange(0, BT)
        ok = time < end
        k0, k1 = features(k, time, k_time, ok, weights_k, HAS_MAP, DIM, HALF, PRECISION)
        values = load_block(v, time, v_time, ok, BV)
        d_y = load_block(d_out, time, out_time, ok, BV)
        through, whole = _decays(log_gate, time, ok, HAS_GATE, BT)
        weight = tl.load(row_weight + time, mask=ok, other=0.0)
        da = dot(d_y, tl.trans(values), PRECISION) * weight[:, None]
        d_q0 = dot(d_y, tl.trans(state0), PRECISION) * weight[:, None]
        d_q1 = dot(d_y, tl.trans(state1), PRECISION) * weight[:, None]
        if HAS_EXTRA:
            added = tl.where(value_block == 0, tl.load(extra + time, mask=ok, other=0.0), 0.0)
            da += added[:, None]
            d_q0 += added[:, None] * sum0[None, :]
            d_q1 += added[:, None] * sum1[None, :]
        if HAS_GATE:
            d_q0 *= tl.exp(through)[:, None]
            d_q1 *= tl.exp(through)[:, None]
            q0, q1 = features(q, time, q_time, ok, weights_q, HAS_MAP, DIM, HALF, PRECISION)
            tl.store(d_gate + time, tl.sum(q0 * d_q0, 1) + tl.sum(q1 * d_q1, 1), mask=ok)
            index = (number // num_splits) * num_blocks + block
            kept, kept_sum = state_offsets(index, heads, head, value_block, HALF, V, BV)
            kind = block_states.dtype.element_ty
            tl.store(block_states + kept, state0.to(kind))
            tl.store(block_states + kept + HALF * V, state1.to(kind))
            if value_block == 0:
                tl.store(block_sums + kept_sum, sum0)
                tl.store(block_sums + kept_sum + HALF, sum1)
        da *= _causal_decay(through, HAS_GATE, BT)
        da = da.to(values.dtype)
        d_q0 += dot(da, k0, PRECISION)
        d_q1 += dot(da, k1, PRECISION)
        kind = d_q.dtype.element_ty
        if HAS_MAP:
            x = load_block(q, time, q_time, ok, DIM)
            q0, q1 = features(q, time, q_time, ok, weights_q, HAS_MAP, DIM, HALF, PRECISION)
            d_z = softmax_pair_gradient(q0, q1, d_q0, d_q1).to(values.dtype)
            d_x = dot(d_z, tl.trans(weights_q), PRECISION)
            d_weights += dot(tl.trans(x), d_z, PRECISION)
            columns = tl.arange(0, DIM)
            tl.store(d_q + time[:, None] * DIM + columns[None, :], d_x.to(kind), mask=ok[:, None])
        else:
            columns = tl.arange(0, HALF)
            tl.store(d_q + time[:, None] * WIDTH + columns[None, :], d_q0.to(kind), mask=ok[:, None])
            tl.store(d_q + time[:, None] * WIDTH + columns[None, :] + HALF, d_q1.to(kind), mask=ok[:, None])
        if HAS_GATE:
            left = tl.exp(whole - through)
            k0 = k0 * left[:, None]
            k1 = k1 * left[:, None]
            state0 *= tl.exp(whole)
            state1 *= tl.exp(whole)
            sum0 *= tl.exp(whole)
            sum1 *= tl.exp(whole)
        state0 += dot(tl.trans(k0.to(values.dtype)), values, PRECISION)
        state1 += dot(tl.trans(k1.to(values.dtype)), values, PRECISION)
        sum0 += tl.sum(k0, 0)
        sum1 += tl.sum(k1, 0)
    if HAS_MAP:
        index = (value_block * tl.num_programs(0) + number).to(tl.int64) * heads + head
        cells = tl.arange(0, DIM)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(d_map + index * DIM * HALF + cells, d_weights)


@triton.jit
def gated_backward_keys(
    q,
    k,
    v,
    log_gate,
    map_q,
    map_k,
    bounds,
    d_states,
    d_sums,
    d_out,
    row_weight,
    extra,
    d_k,
    d_v,
    d_map,
    d_gate,
    block_states,
    block_sums,
    first_d_state,
    first_d_sum,
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    gate_batch,
    gate_head,
    out_batch,
    out_head,
    out_time,
    heads,
    group,
    map_group,
    num_rows,
    num_keys,
    num_splits,
    split_blocks,
    num_blocks,
    HAS_BOUNDS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    STORE_FIRST: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv, dlog_gate and the key map's gradient, from the last block to the first.

    dS, the gradient of the state, runs backwards: dS_n = exp(Σg) dS_{n+1} + Σ_i exp(g_1+…+g_i) φq_i (r_i do_i, e_i)ᵀ.
    dlog_gate_t = Σ_{i≥t, j<t} A_ij dA_ij: pairs within the block; queries of the block with earlier keys (left in
    `d_gate` by `gated_backward_queries`); keys of the block with later queries; and <S_n, exp(Σg) dS_{n+1}> for all others.
    So no sum runs over more than a block, and rounding does not build up with T.
    """
    number = tl.program_id(0)
    head = tl.program_id(1)
    value_block = tl.program_id(2)
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys, BT)
    weights_q = load_map(map_q, head, HAS_MAP, DIM, HALF)
    weights_k = load_map(map_k, head // map_group, HAS_MAP, DIM, HALF)
    rows = (row * tl.num_programs(1) + head) * num_keys
    q += row * q_batch + head.to(tl.int64) * q_head
    k += row * k_batch + (head // group).to(tl.int64) * k_head
    v += row * v_batch + (head // group).to(tl.int64) * v_head + value_block * BV
    d_out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    log_gate += row * gate_batch + head.to(tl.int64) * gate_head
    row_weight += rows
    extra += rows
    WIDTH: tl.constexpr = DIM if HAS_MAP else 2 * HALF
    d_k += (value_block.to(tl.int64) * num_rows + rows) * WIDTH
    d_v += rows * V + value_block * BV
    d_gate += value_block.to(tl.int64) * num_rows + rows
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(end - start, BT).to(tl.int32))
    count = tl.maximum(last - first, 0)
    at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
    if HAS_STATE:
        state0 = tl.load(d_states + at)
        state1 = tl.load(d_states + at + HALF * V)
        sum0 = tl.load(d_sums + at_sum)
        sum1 = tl.load(d_sums + at_sum + HALF)
    else:
        state0 = tl.zeros([HALF, BV], tl.float32)
        state1 = tl.zeros([HALF, BV], tl.float32)
        sum0 = tl.zeros([HALF], tl.float32)
        sum1 = tl.zeros([HALF], tl.float32)
    if HAS_MAP:
        d_weights = tl.zeros([DIM, HALF], tl.float32)
    for step in range(count):
        block = last - 1 - step
        time = start + block * BT + tl.arange(0, BT)
        ok = time < end
        q0, q1 = features(q, time, q_time, ok, weights_q, HAS_MAP, DIM, HALF, PRECISION)
        k0, k1 = features(k, time, k_time, ok, weights_k, HAS_MAP, DIM, HALF, PRECISION)
        values = load_block(v, time, v_time, ok, BV)
        d_y = load_block(d_out, time, out_time, ok, BV)
        through, whole = _decays(log_gate, time, ok, HAS_GATE, BT)
        left = tl.exp(whole - through)
        weight = tl.load(row_weight + time, mask=ok, other=0.0)
        decay = tl.trans(_causal_decay(through, HAS_GATE, BT))  # keys x queries
        x0 = k0.to(values.dtype)
        x1 = k1.to(values.dtype)
        a = dot(x0, tl.trans(q0.to(values.dtype)), PRECISION) + dot(x1, tl.trans(q1.to(values.dtype)), PRECISION)
        a *= decay
        da = dot(values, tl.trans(d_y), PRECISION) * weight[None, :]
        d_k0 = dot(values, tl.trans(state0), PRECISION)
        d_k1 = dot(values, tl.trans(state1), PRECISION)
        if HAS_EXTRA:
            added = tl.where(value_block == 0, tl.load(extra + time, mask=ok, other=0.0), 0.0)
            da += added[None, :]
            d_k0 += tl.where(value_block == 0, sum0, 0.0)[None, :]
            d_k1 += tl.where(value_block == 0, sum1, 0.0)[None, :]
        d_values = dot(x0, state0, PRECISION) + dot(x1, state1, PRECISION)
        if HAS_GATE:
            d_values *= left[:, None]
            d_k0 *= left[:, None]
            d_k1 *= left[:, None]
            pairs = a * da
            ends = tl.sum(pairs, 0) - tl.sum(pairs, 1) + tl.load(d_gate + time, mask=ok, other=0.0)
            later = tl.sum(k0 * d_k0, 1) + tl.sum(k1 * d_k1, 1)
            index = (number // num_splits) * num_blocks + block
            kept, kept_sum = state_offsets(index, heads, head, value_block, HALF, V, BV)
            across = tl.sum(tl.load(block_states + kept).to(tl.float32) * state0)
            across += tl.sum(tl.load(block_states + kept + HALF * V).to(tl.float32) * state1)
            if HAS_EXTRA:
                if value_block == 0:
                    across += tl.sum(tl.load(block_sums + kept_sum) * sum0)
                    across += tl.sum(tl.load(block_sums + kept_sum + HALF) * sum1)
            suffix = tl.sum(ends, 0) - tl.cumsum(ends, 0) + ends
            prefix = tl.cumsum(later, 0) - later
            tl.store(d_gate + time, across * tl.exp(whole) + suffix + prefix, mask=ok)
        d_values += dot((a * weight[None, :]).to(values.dtype), d_y, PRECISION)
        da = (da * decay).to(values.dtype)
        d_k0 += dot(da, q0, PRECISION)
        d_k1 += dot(da, q1, PRECISION)
        columns = tl.arange(0, BV)
        tl.store(d_v + time[:, None] * V + columns[None, :], d_values.to(d_v.dtype.element_ty), mask=ok[:, None])
        kind = d_k.dtype.element_ty
        if HAS_MAP:
            x = load_block(k, time, k_time, ok, DIM)
            d_z = softmax_pair_gradient(k0, k1, d_k0, d_k1).to(values.dtype)
            d_x = dot(d_z, tl.trans(weights_k), PRECISION)
            d_weights += dot(tl.trans(x), d_z, PRECISION)
            columns = tl.arange(0, DIM)
            tl.store(d_k + time[:, None] * DIM + columns[None, :], d_x.to(kind), mask=ok[:, None])
        else:
            columns = tl.arange(0, HALF)
            tl.store(d_k + time[:, None] * WIDTH + columns[None, :], d_k0.to(kind), mask=ok[:, None])
            tl.store(d_k + time[:, None] * WIDTH + columns[None, :] + HALF, d_k1.to(kind), mask=ok[:, None])
        weight = weight * tl.exp(through)
        q0 = q0 * weight[:, None]
        q1 = q1 * weight[:, None]
        if HAS_GATE:
            state0 *= tl.exp(whole)
            state1 *= tl.exp(whole)
            sum0 *= tl.exp(whole)
            sum1 *= tl.exp(whole)
        state0 += dot(tl.trans(q0.to(values.dtype)), d_y, PRECISION)
        state1 += dot(tl.trans(q1.to(values.dtype)), d_y, PRECISION)
        if HAS_EXTRA:
            share = tl.load(extra + time, mask=ok, other=0.0) * tl.exp(through)
            fresh0, fresh1 = features(q, time, q_time, ok, weights_q, HAS_MAP, DIM, HALF, PRECISION)
            sum0 += tl.sum(fresh0 * share[:, None], 0)
            sum1 += tl.sum(fresh1 * share[:, None], 0)
    if STORE_FIRST:
        tl.store(first_d_state + at, state0)
        tl.store(first_d_state + at + HALF * V, state1)
        if value_block == 0:
            tl.store(first_d_sum + at_sum, sum0)
            tl.store(first_d_sum + at_sum + HALF, sum1)
    if HAS_MAP:
        index = (value_block * tl.num_programs(0) + number).to(tl.int64) * heads + head
        cells = tl.arange(0, DIM)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(d_map + index * DIM * HALF + cells, d_weights)
