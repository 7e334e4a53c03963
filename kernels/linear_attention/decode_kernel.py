"""Triton kernels of one decoding step: feature maps, the state, the window's ring and the output in one launch a layer.

The ring holds window_size + 1 keys: the key that leaves the window and the one that enters it have a slot each, so no
program overwrites what another still reads. Sums have two copies for the same reason: a step reads one, and writes the
other. Positions are read from device memory, so a CUDA graph of a step can be replayed.
"""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import load_map

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error


@triton.jit
def map_row(x, map):
    """φ of one vector (DIM,) fp32 with a (DIM, HALF) map: both halves, (HALF,) fp32."""
    z = tl.sum(x[:, None] * map.to(tl.float32), 0)
    up = tl.exp(z - tl.max(z, 0))
    down = tl.exp(tl.min(z, 0) - z)
    return tl.maximum(up / tl.sum(up, 0), 1e-12), tl.maximum(down / tl.sum(down, 0), 1e-12)


@triton.jit
def hybrid_step(
    q,
    k,
    v,
    map_q,
    map_k,
    log_factor,
    meta,
    sink_k,
    sink_v,
    position,
    ring_k,
    ring_v,
    states,
    sums,
    out,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    key_heads,
    map_heads,
    scale,
    log_linear,
    HAS_WINDOW: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_META: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    """One token of each sequence; a program has BV value columns of one state and of the QUERIES heads that read it.

    Args:
        q: (B, H, DIM), H = L·QUERIES.
        k, v: (B, G, DIM) and (B, G, V).
        map_q, map_k: (H, DIM, HALF), (L, DIM, HALF).
        log_factor, meta: (H,) fp32.
        sink_k, sink_v: (B, G, SINKS, DIM) and (B, G, SINKS, V): written while the first tokens pass, read later.
        position: (B,) int32, tokens seen before this one.
        ring_k, ring_v: (B, G, WINDOW + 1, DIM) and (B, G, WINDOW + 1, V), updated.
        states, sums: (B, L, 2·HALF, V) and (2, B, L, 2·HALF) fp32, updated.
        out: (B, H, V).
    """
    value_block = tl.program_id(0)
    map_head = tl.program_id(1)
    batch = tl.program_id(2)
    key_head = map_head // (map_heads // key_heads)
    seen = tl.load(position + batch)
    wide = tl.arange(0, DIM)
    half = tl.arange(0, HALF)
    columns = value_block * BV + tl.arange(0, BV)
    new_k = tl.load(k + batch.to(tl.int64) * k_batch + key_head * k_head + wide).to(tl.float32)
    new_v = tl.load(v + batch.to(tl.int64) * v_batch + key_head * v_head + columns).to(tl.float32)
    ring = (batch.to(tl.int64) * key_heads + key_head) * (WINDOW + 1)
    ring_k += ring * DIM
    ring_v += ring * V
    if SINKS > 0:
        sinks = (batch.to(tl.int64) * key_heads + key_head) * SINKS
        sink_k += sinks * DIM
        sink_v += sinks * V
    state_head = batch.to(tl.int64) * map_heads + map_head
    if HAS_LINEAR:
        at = states + state_head * (2 * HALF * V) + half[:, None] * V + columns[None, :]
        state0 = tl.load(at)
        state1 = tl.load(at + HALF * V)
        stride = tl.num_programs(2).to(tl.int64) * map_heads * (2 * HALF)
        at_sum = sums + (seen % 2) * stride + state_head * (2 * HALF) + half
        sum0 = tl.load(at_sum)
        sum1 = tl.load(at_sum + HALF)
        if seen - WINDOW >= SINKS:  # a key leaves the window
            slot = (seen - WINDOW) % (WINDOW + 1)
            old_k = tl.load(ring_k + slot * DIM + wide).to(tl.float32)
            old_v = tl.load(ring_v + slot * V + columns).to(tl.float32)
            k0, k1 = map_row(old_k, load_map(map_k, map_head, True, DIM, HALF))
            state0 += k0[:, None] * old_v[None, :]
            state1 += k1[:, None] * old_v[None, :]
            sum0 += k0
            sum1 += k1
            tl.store(at, state0)
            tl.store(at + HALF * V, state1)
        if value_block == 0:
            at_sum = sums + ((seen + 1) % 2) * stride + state_head * (2 * HALF) + half
            tl.store(at_sum, sum0)
            tl.store(at_sum + HALF, sum1)
    slots = tl.arange(0, SLOTS)
    back = (seen - slots) % (WINDOW + 1)  # how long ago a slot was written: 0 is this step's
    back = tl.where(back < 0, back + WINDOW + 1, back)
    there = (slots <= WINDOW) & (back > 0) & (back < WINDOW) & (back <= seen)
    if HAS_WINDOW:
        keys = tl.load(ring_k + slots[:, None] * DIM + wide[None, :], mask=there[:, None], other=0.0).to(tl.float32)
        values = tl.load(ring_v + slots[:, None] * V + columns[None, :], mask=there[:, None], other=0.0).to(tl.float32)
    for query in tl.static_range(QUERIES):
        head = map_head * QUERIES + query
        x = tl.load(q + batch.to(tl.int64) * q_batch + head * q_head + wide).to(tl.float32)
        top = -1e30
        total = 0.0
        y = tl.zeros([BV], tl.float32)
        if HAS_WINDOW:
            log_g = tl.load(log_factor + head)
            s = tl.sum(keys * x[None, :], 1) * scale + log_g
            s = tl.where(there, s, -float("inf"))
            now = tl.sum(new_k * x, 0) * scale + log_g
            top = tl.maximum(tl.max(s, 0), now)
            if HAS_META:
                memory = tl.load(meta + head) + log_g
                top = tl.maximum(top, memory)
            p = tl.exp(s - top)
            total = tl.sum(p, 0) + tl.exp(now - top)
            if HAS_META:
                total += tl.exp(memory - top)
            y = tl.sum(p[:, None] * values, 0) + tl.exp(now - top) * new_v
            for sink in tl.static_range(SINKS):
                if seen - sink >= WINDOW:
                    first_k = tl.load(sink_k + sink * DIM + wide).to(tl.float32)
                    first_v = tl.load(sink_v + sink * V + columns).to(tl.float32)
                    s_sink = tl.sum(first_k * x, 0) * scale + log_g
                    higher = tl.maximum(top, s_sink)
                    y = y * tl.exp(top - higher) + tl.exp(s_sink - higher) * first_v
                    total = total * tl.exp(top - higher) + tl.exp(s_sink - higher)
                    top = higher
        if HAS_LINEAR:
            q0, q1 = map_row(x, load_map(map_q, head, True, DIM, HALF))
            past = tl.sum(q0 * sum0 + q1 * sum1, 0)
            higher = tl.maximum(top, tl.where(past > 0, log_linear, -1e30))
            share = tl.where(past > 0, tl.exp(tl.minimum(log_linear - higher, 0.0)), 0.0)
            y_past = tl.sum(q0[:, None] * state0 + q1[:, None] * state1, 0)
            y = y * tl.exp(top - higher) + share * y_past
            total = total * tl.exp(top - higher) + share * past
        y = y / tl.where(total == 0, 1.0, total)
        at_out = (batch.to(tl.int64) * map_heads * QUERIES + head) * V + columns
        tl.store(out + at_out, y.to(out.dtype.element_ty))
    first_of_group = map_head % (map_heads // key_heads) == 0
    slot = seen % (WINDOW + 1)
    if first_of_group:
        tl.store(ring_v + slot * V + columns, new_v.to(ring_v.dtype.element_ty))
        if value_block == 0:
            tl.store(ring_k + slot * DIM + wide, new_k.to(ring_k.dtype.element_ty))
        if SINKS > 0:
            if seen < SINKS:
                tl.store(sink_v + seen * V + columns, new_v.to(sink_v.dtype.element_ty))
                if value_block == 0:
                    tl.store(sink_k + seen * DIM + wide, new_k.to(sink_k.dtype.element_ty))


@triton.jit
def gated_step(
    q,
    k,
    v,
    log_gate,
    map_q,
    map_k,
    position,
    states,
    sums,
    out,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    gate_batch,
    gate_head,
    heads,
    group,
    map_group,
    scale,
    HAS_GATE: tl.constexpr,
    HAS_MAP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    """One token of gated linear attention: S ← exp(g) S + φ(k) vᵀ, y = φ(q) S over φ(q) Σ; layouts as `hybrid_step`."""
    value_block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    wide = tl.arange(0, DIM)
    half = tl.arange(0, HALF)
    columns = value_block * BV + tl.arange(0, BV)
    q += batch.to(tl.int64) * q_batch + head * q_head
    k += batch.to(tl.int64) * k_batch + (head // group) * k_head
    new_v = tl.load(v + batch.to(tl.int64) * v_batch + (head // group) * v_head + columns).to(tl.float32)
    if HAS_MAP:
        q0, q1 = map_row(tl.load(q + wide).to(tl.float32), load_map(map_q, head, True, DIM, HALF))
        k0, k1 = map_row(tl.load(k + wide).to(tl.float32), load_map(map_k, head // map_group, True, DIM, HALF))
    else:
        q0 = tl.load(q + half).to(tl.float32)
        q1 = tl.load(q + half + HALF).to(tl.float32)
        k0 = tl.load(k + half).to(tl.float32)
        k1 = tl.load(k + half + HALF).to(tl.float32)
    left = 1.0
    if HAS_GATE:
        left = tl.exp(tl.load(log_gate + batch.to(tl.int64) * gate_batch + head * gate_head))
    state_head = batch.to(tl.int64) * heads + head
    at = states + state_head * (2 * HALF * V) + half[:, None] * V + columns[None, :]
    state0 = tl.load(at) * left + k0[:, None] * new_v[None, :]
    state1 = tl.load(at + HALF * V) * left + k1[:, None] * new_v[None, :]
    tl.store(at, state0)
    tl.store(at + HALF * V, state1)
    seen = tl.load(position + batch)
    stride = tl.num_programs(2).to(tl.int64) * heads * (2 * HALF)
    at_sum = sums + state_head * (2 * HALF) + half
    sum0 = tl.load(at_sum + (seen % 2) * stride) * left + k0
    sum1 = tl.load(at_sum + (seen % 2) * stride + HALF) * left + k1
    if value_block == 0:
        tl.store(at_sum + ((seen + 1) % 2) * stride, sum0)
        tl.store(at_sum + ((seen + 1) % 2) * stride + HALF, sum1)
    y = tl.sum(q0[:, None] * state0 + q1[:, None] * state1, 0)
    if NORMALIZE:
        total = tl.sum(q0 * sum0 + q1 * sum1, 0)
        y = y / tl.where(total == 0, 1.0, total)
    else:
        y = y * scale
    tl.store(out + state_head * V + columns, y.to(out.dtype.element_ty))
