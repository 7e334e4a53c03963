"""Triton kernels of hybrid attention's window, joined with its linear past under one denominator.

The past of query i are keys that are at least a window behind it, so its share is plain linear attention between q_i
and k_{i - window_size}: recurrence_kernel.py computes it (each query's mean of values, and its mass), and the window
kernel adds it up with the softmax over the window. Letters and the equation: reference.py.
"""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import dot, load_block, sequence_of

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error

NOTHING = tl.constexpr(-1e30)  # the log of no weight at all


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
    return near & (apart + back * BT >= 0)


@triton.jit
def _sinks_far(block, index, sink, SINKS: tl.constexpr, WINDOW: tl.constexpr, TERRACE: tl.constexpr, BT: tl.constexpr):
    """(queries, 16): whether a sink has left the window; no others are sinks."""
    if TERRACE:
        per_window: tl.constexpr = WINDOW // BT
        far = (block // per_window - (sink // WINDOW)[None, :] > 1) & (index[:, None] >= 0)
    else:
        far = block * BT + index[:, None] - sink[None, :] >= WINDOW
    return far & (sink < SINKS)[None, :]


@triton.jit
def _absorb(x, keys, values, seen, scale, log_g, y, total, top, PRECISION: tl.constexpr):
    """Add softmax attention to some keys to (y, total), which are in units of exp(top); all three anew."""
    s = tl.where(seen, dot(x, tl.trans(keys), PRECISION) * scale + log_g, -float("inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp(s - higher[:, None])
    shrink = tl.exp(top - higher)
    y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision=PRECISION)
    return y, total * shrink + tl.sum(p, 1), higher


@triton.jit
def window_forward(
    q,
    k,
    v,
    log_factor,
    meta,
    sink_k,
    sink_v,
    past,
    past_mass,
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
    p_batch,
    p_head,
    p_time,
    out_batch,
    out_head,
    out_time,
    heads,
    group,
    scale,
    log_linear,
    num_before,
    num_queries,
    num_keys,
    past_shift,
    past_rows,
    HAS_BOUNDS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_PAST: tl.constexpr,
    HAS_META: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACE: tl.constexpr,
    LAG: tl.constexpr,
    DIM: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries: y, and the log of its denominator.

    Shapes as in hybrid_ops.py. `past` (B, H, past_rows, V) and `past_mass` (B, H, past_rows) are the linear branch of
    the queries from the sequence's `past_shift`-th on, in the row that lies so much before the query's. `num_before`
    keys come before the first query. LAG is how many blocks back a key in the window can lie.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    row, start, end = sequence_of(bounds, HAS_BOUNDS, tl.program_id(2), num_keys)
    length = (end - start).to(tl.int32)
    index = tl.arange(0, BT)
    place = block * BT + index
    ok = (place < length) & (place >= num_before)
    if block * BT < length:
        log_g = tl.load(log_factor + head)
        rows = start - num_before + place
        q += row * q_batch + head.to(tl.int64) * q_head
        k += row * k_batch + (head // group).to(tl.int64) * k_head + start * k_time
        v += row * v_batch + (head // group).to(tl.int64) * v_head + start * v_time
        x = load_block(q, rows, q_time, ok, DIM)
        columns = tl.arange(0, V)
        y = tl.zeros([BT, V], tl.float32)
        # weights are in units of exp(top)
        if HAS_META:
            top = tl.zeros([BT], tl.float32) + tl.load(meta + head) + log_g
            total = tl.full([BT], 1.0, tl.float32)
        else:
            top = tl.full([BT], NOTHING, tl.float32)
            total = tl.zeros([BT], tl.float32)
        if HAS_WINDOW:
            for back in tl.static_range(LAG + 1):
                key_place = place - back * BT
                there = (key_place >= 0) & (key_place < length)
                keys = load_block(k, key_place, k_time, there, DIM)
                values = load_block(v, key_place, v_time, there, V)
                near = _near(block, back, index, WINDOW, TERRACE, BT) & there[None, :]
                y, total, top = _absorb(x, keys, values, near, scale, log_g, y, total, top, PRECISION)
            if SINKS > 0:
                sink = tl.arange(0, 16)
                at = (tl.program_id(2).to(tl.int64) * (heads // group) + head // group) * 16
                keys = tl.load(sink_k + (at + sink)[:, None] * DIM + tl.arange(0, DIM)[None, :])
                values = tl.load(sink_v + (at + sink)[:, None] * V + columns[None, :])
                far = _sinks_far(block, index, sink, SINKS, WINDOW, TERRACE, BT)
                y, total, top = _absorb(x, keys, values, far, scale, log_g, y, total, top, PRECISION)
        if HAS_PAST:
            has_past = ok & (place - num_before >= past_shift)
            past_row = rows - past_shift
            mass = tl.load(past_mass + (row * heads + head) * past_rows + past_row, mask=has_past, other=0.0)
            past += row * p_batch + head.to(tl.int64) * p_head
            means = load_block(past, past_row, p_time, has_past, V).to(tl.float32)
            log_past = tl.where(mass > 0, log_linear + tl.log(tl.maximum(mass, 1e-37)), NOTHING)
            higher = tl.maximum(top, log_past)
            share = tl.where(mass > 0, tl.exp(log_past - higher), 0.0)
            shrink = tl.exp(top - higher)
            total = total * shrink + share
            y = y * shrink[:, None] + means * share[:, None]
            top = higher
        y = y / tl.where(total == 0, 1.0, total)[:, None]
        out += row * out_batch + head.to(tl.int64) * out_head
        at_out = rows.to(tl.int64)[:, None] * out_time + columns[None, :]
        tl.store(out + at_out, y.to(out.dtype.element_ty), mask=ok[:, None])
        log_total = tl.where(total > 0, top + tl.log(tl.maximum(total, 1e-37)), 0.0)
        tl.store(log_mass + (row * heads + head) * num_queries + rows, log_total, mask=ok)


@triton.jit
def window_backward_queries(
    q,
    k,
    v,
    log_factor,
    meta,
    sink_k,
    sink_v,
    bounds,
    d_out,
    log_mass,
    inner,
    d_q,
    d_factor,
    d_meta,
    d_sink_k,
    d_sink_v,
    dq_batch,
    dq_head,
    dq_time,
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
    scale,
    num_keys,
    blocks_each,
    HAS_BOUNDS: tl.constexpr,
    HAS_META: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACE: tl.constexpr,
    LAG: tl.constexpr,
    DIM: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The window's dq, and the gradients of log g, of the meta logit and of the sinks; `blocks_each` blocks a program.

    With normalised weights P and `inner` D_i = do_i·y_i (B, H, T): ds = P (do·v - D). `d_q` is (B, H, T, DIM); the
    others (N, programs, H, ...), fp32, are one program's terms.
    """
    head = tl.program_id(1)
    row, start, end = sequence_of(bounds, HAS_BOUNDS, tl.program_id(2), num_keys)
    length = (end - start).to(tl.int32)
    index = tl.arange(0, BT)
    wide = tl.arange(0, DIM)
    columns = tl.arange(0, V)
    log_g = tl.load(log_factor + head)
    q += row * q_batch + head.to(tl.int64) * q_head + start * q_time
    k += row * k_batch + (head // group).to(tl.int64) * k_head + start * k_time
    v += row * v_batch + (head // group).to(tl.int64) * v_head + start * v_time
    d_out += row * out_batch + head.to(tl.int64) * out_head + start * out_time
    d_q += row * dq_batch + head.to(tl.int64) * dq_head + start * dq_time
    rows = (row * heads + head) * num_keys + start
    factor_sum = tl.zeros([BT], tl.float32)
    meta_sum = tl.zeros([BT], tl.float32)
    if SINKS > 0:
        sink = tl.arange(0, 16)
        at = (tl.program_id(2).to(tl.int64) * (heads // group) + head // group) * 16
        first_k = tl.load(sink_k + (at + sink)[:, None] * DIM + wide[None, :])
        first_v = tl.load(sink_v + (at + sink)[:, None] * V + columns[None, :])
        d_first_k = tl.zeros([16, DIM], tl.float32)
        d_first_v = tl.zeros([16, V], tl.float32)
    before = tl.program_id(0) * blocks_each
    for step in range(tl.minimum(blocks_each, tl.maximum(tl.cdiv(length, BT) - before, 0))):
        block = before + step
        place = block * BT + index
        ok = place < length
        x = load_block(q, place, q_time, ok, DIM)
        d_y = load_block(d_out, place, out_time, ok, V)
        log_total = tl.load(log_mass + rows + place, mask=ok, other=float("inf"))
        d_total = tl.load(inner + rows + place, mask=ok, other=0.0)
        d_x = tl.zeros([BT, DIM], tl.float32)
        for back in tl.static_range(LAG + 1):
            key_place = place - back * BT
            there = (key_place >= 0) & (key_place < length)
            keys = load_block(k, key_place, k_time, there, DIM)
            values = load_block(v, key_place, v_time, there, V)
            near = _near(block, back, index, WINDOW, TERRACE, BT) & there[None, :]
            s = dot(x, tl.trans(keys), PRECISION) * scale + log_g
            p = tl.where(near, tl.exp(s - log_total[:, None]), 0.0)
            d_s = p * (dot(d_y, tl.trans(values), PRECISION) - d_total[:, None])
            factor_sum += tl.sum(d_s, 1)
            d_x = tl.dot((d_s * scale).to(keys.dtype), keys, d_x, input_precision=PRECISION)
        if SINKS > 0:
            far = _sinks_far(block, index, sink, SINKS, WINDOW, TERRACE, BT)
            s = dot(x, tl.trans(first_k), PRECISION) * scale + log_g
            p = tl.where(far, tl.exp(s - log_total[:, None]), 0.0)
            d_s = p * (dot(d_y, tl.trans(first_v), PRECISION) - d_total[:, None])
            factor_sum += tl.sum(d_s, 1)
            d_s = (d_s * scale).to(x.dtype)
            d_x = tl.dot(d_s, first_k, d_x, input_precision=PRECISION)
            d_first_k = tl.dot(tl.trans(d_s), x, d_first_k, input_precision=PRECISION)
            d_first_v = tl.dot(tl.trans(p.to(x.dtype)), d_y, d_first_v, input_precision=PRECISION)
        if HAS_META:
            d_s = -tl.exp(tl.load(meta + head) + log_g - log_total) * d_total
            factor_sum += d_s
            meta_sum += d_s
        at_q = d_q + place.to(tl.int64)[:, None] * dq_time + wide[None, :]
        tl.store(at_q, d_x.to(d_q.dtype.element_ty), mask=ok[:, None])
    partial = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * heads + head
    tl.store(d_factor + partial, tl.sum(factor_sum, 0))
    if HAS_META:
        tl.store(d_meta + partial, tl.sum(meta_sum, 0))
    if SINKS > 0:
        tl.store(d_sink_k + (partial * 16 + sink[:, None]) * DIM + wide[None, :], d_first_k)
        tl.store(d_sink_v + (partial * 16 + sink[:, None]) * V + columns[None, :], d_first_v)


@triton.jit
def window_backward_keys(
    q,
    k,
    v,
    log_factor,
    bounds,
    d_out,
    log_mass,
    inner,
    d_k,
    d_v,
    dk_batch,
    dk_head,
    dk_time,
    dv_batch,
    dv_head,
    dv_time,
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
    scale,
    num_keys,
    HAS_BOUNDS: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACE: tl.constexpr,
    LAG: tl.constexpr,
    DIM: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The window's dk (B, H, T, DIM) and dv (B, H, T, V), for each query head."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    row, start, end = sequence_of(bounds, HAS_BOUNDS, tl.program_id(2), num_keys)
    length = (end - start).to(tl.int32)
    index = tl.arange(0, BT)
    key_place = block * BT + index
    there = key_place < length
    if block * BT < length:
        log_g = tl.load(log_factor + head)
        q += row * q_batch + head.to(tl.int64) * q_head + start * q_time
        k += row * k_batch + (head // group).to(tl.int64) * k_head + start * k_time
        v += row * v_batch + (head // group).to(tl.int64) * v_head + start * v_time
        d_out += row * out_batch + head.to(tl.int64) * out_head + start * out_time
        rows = (row * heads + head) * num_keys + start
        keys = load_block(k, key_place, k_time, there, DIM)
        values = load_block(v, key_place, v_time, there, V)
        d_keys = tl.zeros([BT, DIM], tl.float32)
        d_values = tl.zeros([BT, V], tl.float32)
        for back in tl.static_range(LAG + 1):
            place = key_place + back * BT
            ok = place < length
            x = load_block(q, place, q_time, ok, DIM)
            d_y = load_block(d_out, place, out_time, ok, V)
            log_total = tl.load(log_mass + rows + place, mask=ok, other=float("inf"))
            d_total = tl.load(inner + rows + place, mask=ok, other=0.0)
            near = tl.trans(_near(block + back, back, index, WINDOW, TERRACE, BT)) & there[:, None]
            s = dot(keys, tl.trans(x), PRECISION) * scale + log_g
            p = tl.where(near, tl.exp(s - log_total[None, :]), 0.0)
            d_s = p * (dot(values, tl.trans(d_y), PRECISION) - d_total[None, :])
            d_values = tl.dot(p.to(d_y.dtype), d_y, d_values, input_precision=PRECISION)
            d_keys = tl.dot((d_s * scale).to(x.dtype), x, d_keys, input_precision=PRECISION)
        at = (start + key_place)[:, None]
        at_k = row * dk_batch + head.to(tl.int64) * dk_head + at * dk_time + tl.arange(0, DIM)[None, :]
        at_v = row * dv_batch + head.to(tl.int64) * dv_head + at * dv_time + tl.arange(0, V)[None, :]
        tl.store(d_k + at_k, d_keys.to(d_k.dtype.element_ty), mask=there[:, None])
        tl.store(d_v + at_v, d_values.to(d_v.dtype.element_ty), mask=there[:, None])
