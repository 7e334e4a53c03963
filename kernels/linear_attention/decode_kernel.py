"""Triton kernels of one decoding step: feature maps, the state, the window's ring and the output in one launch a layer.

The ring holds window_size + 1 keys: the key that leaves the window and the one that enters it have a slot each, so no
program overwrites what another still reads. Sums have two copies for the same reason: a step reads one, and writes the
other. Where several programs share a state, each with one of its query heads, the last that has read it writes it.
Positions are read from device memory, so a CUDA graph of a step can be replayed. On Hopper a step starts before the
kernel before it has ended, and until then only asks for memory (programmatic dependent launch).
"""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import dot, load_map, softmax_pair

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError("Triton is not installed") from error


ASK = tl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")


@triton.jit
def ask(pointer, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Have a (ROWS, WIDTH) matrix brought to the L2 cache. Nothing is read, so it may still be written."""
    LINE: tl.constexpr = 128 * 8 // pointer.dtype.element_ty.primitive_bitwidth
    for line in tl.static_range((WIDTH + LINE - 1) // LINE):
        at = pointer + tl.arange(0, ROWS).to(tl.int64) * stride + line * LINE
        tl.inline_asm_elementwise(ASK, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


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
    arrivals,
    out,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    ring_k_batch,
    ring_k_head,
    ring_v_batch,
    ring_v_head,
    sink_k_batch,
    sink_k_head,
    sink_v_batch,
    sink_v_head,
    states_batch,
    sums_copy,
    sums_batch,
    arrivals_batch,
    arrivals_head,
    key_heads,
    map_heads,
    scale,
    log_linear,
    HAS_WINDOW: tl.constexpr,
    HAS_LINEAR: tl.constexpr,
    HAS_META: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
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
        states, sums: (B, L, 2·HALF, V) and (2, B, L, 2·HALF) fp32, updated. These, rings and sinks may be parts of
            larger tensors: what lies in one row of the batch and head is contiguous.
        arrivals: (B, L, V / BV or more) int32, 0 between steps: how many programs have read a part of a state.
        out: (B, H, V).
        PARTS: programs that share a part of a state, with QUERIES of its query heads each.
        KEYS: WINDOW + SINKS or more, a power of 2.
        EARLY: it is launched before the kernel before it has ended, and asks for the state and the maps while it waits.
    """
    value_block = tl.program_id(0)
    part = tl.program_id(1)
    map_head = part // PARTS
    first = part % PARTS == 0
    batch = tl.program_id(2).to(tl.int64)
    key_head = map_head // (map_heads // key_heads)
    wide = tl.arange(0, DIM)
    half = tl.arange(0, HALF)
    columns = value_block * BV + tl.arange(0, BV)
    query = tl.arange(0, 16)  # rows of a tile of the tensor cores; QUERIES of them are real
    real = query < QUERIES
    heads = part * QUERIES + query
    ring_k += batch * ring_k_batch + key_head * ring_k_head
    ring_v += batch * ring_v_batch + key_head * ring_v_head
    states += batch * states_batch + map_head * (2 * HALF * V)
    if EARLY:
        if HAS_LINEAR:
            ask(states + value_block * BV, V, 2 * HALF, BV)
            ask(map_k + map_head.to(tl.int64) * DIM * HALF, HALF, DIM, HALF)
            for number in tl.static_range(QUERIES):
                ask(map_q + (part * QUERIES + number).to(tl.int64) * DIM * HALF, HALF, DIM, HALF)
        gdc_wait()
        gdc_launch_dependents()
    # Everything is read before anything is written, so that loads need not wait for stores, and what the position
    # does not decide is read first, so that it is under way while the position comes.
    seen = tl.load(position + batch)
    k += batch * k_batch + key_head * k_head
    v += batch * v_batch + key_head * v_head
    q += batch * q_batch
    x = tl.load(q + heads[:, None] * q_head + wide[None, :], mask=real[:, None], other=0.0)
    if HAS_LINEAR:
        at = states + half[:, None] * V + columns[None, :]
        state0 = tl.load(at)
        state1 = tl.load(at + HALF * V)
        of_keys = load_map(map_k, map_head, DIM, HALF)
        at_sum = sums + batch * sums_batch + map_head * (2 * HALF) + half
        sum0 = tl.load(at_sum + (seen % 2) * sums_copy)
        sum1 = tl.load(at_sum + (seen % 2) * sums_copy + HALF)
        leaves = seen - WINDOW >= SINKS
        slot = (seen + 1) % (WINDOW + 1)  # of the key that leaves the window, if one does
        old_k = tl.load(ring_k + slot * DIM + wide).to(tl.float32)
        old_v = tl.load(ring_v + slot * V + columns).to(tl.float32)
    if HAS_WINDOW:  # by age: this step's key, those of the ring, then sinks that have left the window
        age = tl.arange(0, KEYS)
        slots = seen % (WINDOW + 1) - age
        slots = tl.where(slots < 0, slots + WINDOW + 1, slots)
        at_k = tl.where((age == 0)[:, None], k + wide[None, :], ring_k + slots[:, None] * DIM + wide[None, :])
        at_v = tl.where((age == 0)[:, None], v + columns[None, :], ring_v + slots[:, None] * V + columns[None, :])
        there = (age < WINDOW) & (age <= seen)
        if SINKS > 0:
            sink = age - WINDOW
            sink_k += batch * sink_k_batch + key_head * sink_k_head
            sink_v += batch * sink_v_batch + key_head * sink_v_head
            is_sink = (sink >= 0) & (sink < SINKS)
            at_k = tl.where(is_sink[:, None], sink_k + sink[:, None] * DIM + wide[None, :], at_k)
            at_v = tl.where(is_sink[:, None], sink_v + sink[:, None] * V + columns[None, :], at_v)
            there = there | (is_sink & (seen - sink >= WINDOW))
        keys = tl.load(at_k, mask=there[:, None], other=0.0)
        values = tl.load(at_v, mask=there[:, None], other=0.0)
        log_g = tl.load(log_factor + heads, mask=real, other=0.0)
        s = dot(x, tl.trans(keys), PRECISION) * scale + log_g[:, None]
        s = tl.where(there[None, :], s, -float("inf"))
        top = tl.max(s, 1)
        if HAS_META:
            memory = tl.load(meta + heads, mask=real, other=0.0) + log_g
            top = tl.maximum(top, memory)
        p = tl.exp(s - top[:, None])
        total = tl.sum(p, 1)
        y = dot(p.to(values.dtype), values, PRECISION)
        if HAS_META:
            total += tl.exp(memory - top)
    else:
        top = tl.full([16], -1e30, tl.float32)
        total = tl.zeros([16], tl.float32)
        y = tl.zeros([16, BV], tl.float32)
    if HAS_LINEAR:
        k0, k1 = map_row(old_k, of_keys)
        k0 = tl.where(leaves, k0, 0.0)
        k1 = tl.where(leaves, k1, 0.0)
        # Queries meet the state as it was, and the key that enters it on its own: neither waits for the other.
        if QUERIES == 1:
            row = tl.load(q + part * q_head + wide).to(tl.float32)
            q0, q1 = map_row(row, load_map(map_q, part, DIM, HALF))
            past = tl.sum(q0 * (sum0 + k0) + q1 * (sum1 + k1), 0)
            share = tl.sum(q0 * k0 + q1 * k1, 0)
            y_past = tl.sum(q0[:, None] * state0 + q1[:, None] * state1, 0) + share * old_v
            y_past = y_past[None, :]
        else:
            z = tl.zeros([16, HALF], tl.float32)
            for number in tl.static_range(QUERIES):
                row = tl.load(q + (part * QUERIES + number) * q_head + wide).to(tl.float32)
                weights = load_map(map_q, part * QUERIES + number, DIM, HALF).to(tl.float32)
                z += tl.where(query[:, None] == number, tl.sum(row[:, None] * weights, 0)[None, :], 0.0)
            q0, q1 = softmax_pair(z)
            past = tl.sum(q0 * (sum0 + k0)[None, :] + q1 * (sum1 + k1)[None, :], 1)
            share = tl.sum(q0 * k0[None, :] + q1 * k1[None, :], 1)
            y_past = tl.dot(q0, state0, input_precision=STATE_PRECISION)
            y_past = tl.dot(q1, state1, y_past, input_precision=STATE_PRECISION) + share[:, None] * old_v[None, :]
        last = True
        if PARTS > 1:
            tl.debug_barrier()  # all of the program has read the state by now
            arrivals += batch * arrivals_batch + map_head * arrivals_head + value_block
            last = tl.atomic_add(arrivals, 1, sem="acq_rel") == PARTS - 1
        higher = tl.maximum(top, tl.where(past > 0, log_linear, -1e30))
        share = tl.where(past > 0, tl.exp(tl.minimum(log_linear - higher, 0.0)), 0.0)
        y = y * tl.exp(top - higher)[:, None] + share[:, None] * y_past
        total = total * tl.exp(top - higher) + share * past
        if last:
            tl.store(at, state0 + k0[:, None] * old_v[None, :])
            tl.store(at + HALF * V, state1 + k1[:, None] * old_v[None, :])
            if PARTS > 1:
                tl.store(arrivals, 0)
        if (value_block == 0) & first:
            tl.store(at_sum + ((seen + 1) % 2) * sums_copy, sum0 + k0)
            tl.store(at_sum + ((seen + 1) % 2) * sums_copy + HALF, sum1 + k1)
    y = y / tl.where(total == 0, 1.0, total)[:, None]
    at_out = (batch * map_heads * PARTS * QUERIES + heads)[:, None] * V + columns[None, :]
    tl.store(out + at_out, y.to(out.dtype.element_ty), mask=real[:, None])
    if (map_head % (map_heads // key_heads) == 0) & first:
        slot = seen % (WINDOW + 1)
        new_k = tl.load(k + wide)
        new_v = tl.load(v + columns)
        tl.store(ring_v + slot * V + columns, new_v)
        if value_block == 0:
            tl.store(ring_k + slot * DIM + wide, new_k)
        if SINKS > 0 and HAS_WINDOW:
            if seen < SINKS:
                tl.store(sink_v + seen * V + columns, new_v)
                if value_block == 0:
                    tl.store(sink_k + seen * DIM + wide, new_k)


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
    states_batch,
    sums_copy,
    sums_batch,
    group,
    map_group,
    scale,
    HAS_GATE: tl.constexpr,
    HAS_MAP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    """One token of gated linear attention: S ← exp(g) S + φ(k) vᵀ, y = φ(q) S over φ(q) Σ; layouts as `hybrid_step`.

    A program has BV value columns of one state, whose `group` and `map_group` neighbours share keys and a map of keys,
    and of the QUERIES heads that read it.
    """
    value_block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    wide = tl.arange(0, DIM)
    half = tl.arange(0, HALF)
    columns = value_block * BV + tl.arange(0, BV)
    q += batch * q_batch + head * QUERIES * q_head
    k += batch * k_batch + (head // group) * k_head
    new_v = tl.load(v + batch * v_batch + (head // group) * v_head + columns).to(tl.float32)
    if HAS_MAP:
        k0, k1 = map_row(tl.load(k + wide).to(tl.float32), load_map(map_k, head // map_group, DIM, HALF))
    else:
        k0 = tl.load(k + half).to(tl.float32)
        k1 = tl.load(k + half + HALF).to(tl.float32)
    left = 1.0
    if HAS_GATE:
        left = tl.exp(tl.load(log_gate + batch * gate_batch + head * gate_head))
    at = states + batch * states_batch + head * (2 * HALF * V) + half[:, None] * V + columns[None, :]
    state0 = tl.load(at) * left + k0[:, None] * new_v[None, :]
    state1 = tl.load(at + HALF * V) * left + k1[:, None] * new_v[None, :]
    tl.store(at, state0)
    tl.store(at + HALF * V, state1)
    seen = tl.load(position + batch)
    at_sum = sums + batch * sums_batch + head * (2 * HALF) + half
    sum0 = tl.load(at_sum + (seen % 2) * sums_copy) * left + k0
    sum1 = tl.load(at_sum + (seen % 2) * sums_copy + HALF) * left + k1
    if value_block == 0:
        tl.store(at_sum + ((seen + 1) % 2) * sums_copy, sum0)
        tl.store(at_sum + ((seen + 1) % 2) * sums_copy + HALF, sum1)
    out += (batch * tl.num_programs(1) + head) * (QUERIES * V)
    for number in tl.static_range(QUERIES):
        row = q + number * q_head
        if HAS_MAP:
            map = load_map(map_q, head * QUERIES + number, DIM, HALF)
            q0, q1 = map_row(tl.load(row + wide).to(tl.float32), map)
        else:
            q0 = tl.load(row + half).to(tl.float32)
            q1 = tl.load(row + half + HALF).to(tl.float32)
        y = tl.sum(q0[:, None] * state0 + q1[:, None] * state1, 0)
        if NORMALIZE:
            total = tl.sum(q0 * sum0 + q1 * sum1, 0)
            y = y / tl.where(total == 0, 1.0, total)
        else:
            y = y * scale
        tl.store(out + number * V + columns, y.to(out.dtype.element_ty))
