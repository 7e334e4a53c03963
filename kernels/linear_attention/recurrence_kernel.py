"""The Triton kernel of gated linear attention. One recurrence serves the forward pass and every gradient.

    out_i = ρ_i Σ_j D_ij (x_i·y_j) z_j,       D_ij the decay between i and j, over j ≤ i, or backwards over j ≥ i

is y for (x, y, z) = (q, k, v); dq for (do, v, k); and, backwards, dk for (v, do, q) and dv for (k, q, do). So the
gradients are as exact and as fast as the forward pass, and nothing quadratic or F·V wide a token is ever stored.

A program walks over the blocks of one split of a sequence with its columns of the state, Σ D z_j y_jᵀ, in registers.
All products are transposed, so that the state is an operand without going through shared memory.
"""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import as_rows, dot, load_block, sequence_of

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error


KEEP_EVERY = tl.constexpr(4)  # blocks a state that is kept for the gate's gradient


@triton.jit
def cumulate_gates(
    log_gate, bounds, out, gate_batch, gate_head, num_keys, num_splits, HAS_BOUNDS: tl.constexpr, BT: tl.constexpr
):
    """Sum log gates (B, H, T) within each block, in base 2: (B, H, T) fp32. A split is one block."""
    head = tl.program_id(1)
    block = tl.program_id(0) % num_splits
    row, start, end = sequence_of(bounds, HAS_BOUNDS, tl.program_id(0) // num_splits, num_keys)
    time = start + block * BT + tl.arange(0, BT)
    ok = time < end
    gate = tl.load(log_gate + row * gate_batch + head.to(tl.int64) * gate_head + time, mask=ok, other=0.0)
    at = (row * tl.num_programs(1) + head) * num_keys + time
    tl.store(out + at, tl.cumsum(gate * 1.4426950408889634, 0), mask=ok)


@triton.jit
def gate_gradient(
    rows_q,
    rows_k,
    across,
    bounds,
    out,
    num_rows,
    num_keys,
    num_groups,
    TERMS: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    CARRY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dlog_gate_t = Σ_{i≥t, j<t} A_ij dA_ij, for the ROWS tokens between two states that are kept.

    `across` (terms, N, groups, H) is that sum for the first of them. A token that t passes takes its sum `rows_q`
    (terms, B, H, T), q·dq, out and brings `rows_k`, k·dk, in. What rounding leaves of it at the next state, or at the
    end of a sequence (but with CARRY, where later keys may follow), is spread over the tokens: it would grow with them.
    """
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    sequence = tl.program_id(0) // num_groups
    group = tl.program_id(0) % num_groups
    row, start, end = sequence_of(bounds, HAS_BOUNDS, sequence, num_keys)
    index = tl.arange(0, ROWS)
    begin = start + group * ROWS
    ok = begin + index < end
    follows = begin + ROWS < end
    at = (row * heads + head) * num_keys + begin + index
    here = 0.0
    there = 0.0
    passed = tl.zeros([ROWS], tl.float32)
    for term in tl.static_range(TERMS):
        place = (term * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * heads + head
        here += tl.load(across + place)
        there += tl.load(across + place + heads, mask=follows, other=0.0)
        passed += tl.load(rows_k + at + term * num_rows, mask=ok, other=0.0)
        passed -= tl.load(rows_q + at + term * num_rows, mask=ok, other=0.0)
    left = there - here - tl.sum(passed, 0)
    if CARRY:
        left = tl.where(follows, left, 0.0)
    each = left / tl.minimum(end - begin, ROWS).to(tl.float32)
    tl.store(out + at, here + tl.cumsum(passed, 0) - passed + each * index, mask=ok)


@triton.jit
def recurrence(
    x,
    y,
    z,
    through,
    row_weight,
    extra,
    companion,
    key_sums,
    bounds,
    states,
    sums,
    out,
    mass,
    row_products,
    block_states,
    block_sums,
    across,
    decays,
    last_state,
    last_sum,
    x_batch,
    x_head,
    x_time,
    y_batch,
    y_head,
    y_time,
    z_batch,
    z_head,
    z_time,
    c_batch,
    c_head,
    c_time,
    out_batch,
    out_head,
    out_time,
    heads,
    x_group,
    y_group,
    z_group,
    c_group,
    scale,
    num_rows,
    num_keys,
    num_splits,
    split_blocks,
    sum_blocks,
    num_kept,
    REVERSE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
    TERRACE: tl.constexpr,
    STATE_ONLY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SUMS_GIVEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EXTRA: tl.constexpr,
    GATE_TERMS: tl.constexpr,
    ADD: tl.constexpr,
    STORE_LAST: tl.constexpr,
    SKIP_END: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of one head, BV columns of z. Shapes in recurrence_ops.py; x and y have 2·HALF features, z V columns.

    Options:
        TERRACE: queries do not see keys of their own block.
        SKIP_END: the last split adds nothing: nobody asks for the state after it.
        STATE_ONLY: no outputs, only what the split adds to the state (`states`, `sums`).
        NORMALIZE: divide by `mass`, the same sum with z = 1, and store it.
        SUMS_GIVEN: `key_sums` (Y's batch, Y, sum_blocks, 2·HALF) holds the sum of each block of y.
        WEIGHTED: `row_weight` (B, H, T) belongs to queries ("x") or to keys ("y"): it multiplies their products.
        EXTRA: `extra` e (B, H, T) adds to the products: e_i z_j for queries ("x"), e_j z_j for keys ("y").
        ADD: `out` holds another gradient, to which this one is added.
        GATE_TERMS: parts of the gate's gradient, "q" or "k": `row_products`, companion_i · out_i. "q" also keeps the
            state that each KEEP_EVERY-th block starts from (`block_states`, `block_sums`), of which "k" makes `across`.
    """
    value_block = tl.program_id(0)
    head = tl.program_id(1)
    number = tl.program_id(2)
    sequence = number // num_splits
    split = number % num_splits
    row, start, end = sequence_of(bounds, HAS_BOUNDS, sequence, num_keys)
    rows = (row * heads + head) * num_keys
    y += row * y_batch + (head // y_group).to(tl.int64) * y_head
    z += row * z_batch + (head // z_group).to(tl.int64) * z_head + value_block * BV
    x += row * x_batch + (head // x_group).to(tl.int64) * x_head
    out += row * out_batch + head.to(tl.int64) * out_head + value_block * BV
    companion += row * c_batch + (head // c_group).to(tl.int64) * c_head + value_block * BV
    terms = value_block.to(tl.int64) * num_rows + rows
    first = split * split_blocks
    last = tl.minimum(first + split_blocks, tl.cdiv(end - start, BT).to(tl.int32))
    count = tl.maximum(last - first, 0)
    if SKIP_END:
        count = tl.where(split == (0 if REVERSE else num_splits - 1), 0, count)
    columns = tl.arange(0, BV)
    at_state = ((number.to(tl.int64) * heads + head) * V + value_block * BV) * (2 * HALF)
    cells = columns[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    at_sum = (number.to(tl.int64) * heads + head) * V + value_block * BV + columns
    at_key_sum = (number.to(tl.int64) * heads + head) * (2 * HALF) + tl.arange(0, HALF)
    if HAS_STATE:
        state0 = tl.load(states + at_state + cells)
        state1 = tl.load(states + at_state + cells + HALF)
    else:
        state0 = tl.zeros([BV, HALF], tl.float32)
        state1 = tl.zeros([BV, HALF], tl.float32)
    # what divides: the same state for z = 1. What extras need: the same state for x = y = 1, here
    # a (16, ·) matrix whose rows add up: products with it run on the tensor cores.
    lane = tl.arange(0, 16)[:, None]
    if NORMALIZE:
        if HAS_STATE:
            sum0 = tl.load(sums + at_key_sum)
            sum1 = tl.load(sums + at_key_sum + HALF)
        else:
            sum0 = tl.zeros([HALF], tl.float32)
            sum1 = tl.zeros([HALF], tl.float32)
    if EXTRA != "":
        value_sum = tl.zeros([16, BV], tl.float32)
        if HAS_STATE:
            value_sum += tl.where(lane == 0, tl.load(sums + at_sum)[None, :], 0.0)
    index = tl.arange(0, BT)
    over_split = 0.0
    for step in range(count):
        block = last - 1 - step if REVERSE else first + step
        begin = start + block * BT
        time = begin + index
        ok = time < end
        if MASKED:
            y0 = load_block(y, time, y_time, ok, HALF)
            y1 = load_block(y + HALF, time, y_time, ok, HALF)
            values = load_block(z, time, z_time, ok, BV)
        else:
            y0 = tl.load(y + time[:, None] * y_time + tl.arange(0, HALF)[None, :])
            y1 = tl.load(y + HALF + time[:, None] * y_time + tl.arange(0, HALF)[None, :])
            values = tl.load(z + time[:, None] * z_time + columns[None, :])
        if HAS_GATE:
            decay = tl.load(through + rows + time, mask=ok, other=0.0)
            whole = tl.load(through + rows + tl.minimum(begin + BT, end) - 1)
            if MASKED:
                decay = tl.where(ok, decay, whole)
            of_keys = tl.exp2(decay) if REVERSE else tl.exp2(whole - decay)
            of_queries = tl.exp2(whole - decay) if REVERSE else tl.exp2(decay)
        if WEIGHTED != "":
            weight = tl.load(row_weight + rows + time, mask=ok, other=0.0)
        if EXTRA != "":
            added = tl.load(extra + rows + time, mask=ok, other=0.0)
        if SUMS_GIVEN:
            at = (row * (heads // y_group) + head // y_group) * sum_blocks + block
            block_sum0 = tl.load(key_sums + at * (2 * HALF) + tl.arange(0, HALF))
            block_sum1 = tl.load(key_sums + at * (2 * HALF) + tl.arange(0, HALF) + HALF)
        if not STATE_ONLY:
            if MASKED:
                x0 = load_block(x, time, x_time, ok, HALF)
                x1 = load_block(x + HALF, time, x_time, ok, HALF)
            else:
                x0 = tl.load(x + time[:, None] * x_time + tl.arange(0, HALF)[None, :])
                x1 = tl.load(x + HALF + time[:, None] * x_time + tl.arange(0, HALF)[None, :])
            if REVERSE:
                seen = index[:, None] >= index[None, :]
            else:
                seen = index[:, None] <= index[None, :]
            if MASKED:
                seen = seen & ok[:, None]
            if TERRACE:
                seen = seen & (index[:, None] < 0)
            # keys x queries
            products = tl.dot(y1, tl.trans(x1), dot(y0, tl.trans(x0), PRECISION), input_precision=PRECISION)
            a = products
            if WEIGHTED == "x":
                a *= weight[None, :]
            if WEIGHTED == "y":
                a *= weight[:, None]
            if EXTRA == "x":
                a += added[None, :]
            if EXTRA == "y":
                a += added[:, None]
            if HAS_GATE:
                if REVERSE:
                    between = decay[:, None] - decay[None, :]
                else:
                    between = decay[None, :] - decay[:, None]
                between = tl.exp2(tl.where(seen, between, -float("inf")))
                a *= between
            else:
                a = tl.where(seen, a, 0.0)
            result = dot(state0.to(x0.dtype), tl.trans(x0), PRECISION)
            result = tl.dot(state1.to(x0.dtype), tl.trans(x1), result, input_precision=PRECISION)
            if WEIGHTED == "x":
                result *= weight[None, :]
            if EXTRA == "x":
                result += tl.sum(value_sum, 0)[:, None] * added[None, :]
            if EXTRA == "y":
                result += tl.sum(value_sum, 0)[:, None]
            if HAS_GATE:
                result *= of_queries[None, :]
            result = tl.dot(tl.trans(values), a.to(values.dtype), result, input_precision=PRECISION)
            if NORMALIZE:
                total = dot(as_rows(sum0, x0.dtype, BT), tl.trans(x0), PRECISION)
                total = tl.dot(as_rows(sum1, x0.dtype, BT), tl.trans(x1), total, input_precision=PRECISION)
                if HAS_GATE:
                    total *= of_queries[None, :]
                total = tl.sum(total + a, 0)
            if NORMALIZE:
                result *= (1.0 / tl.where(total == 0, 1.0, total))[None, :]
                if value_block == 0:
                    tl.store(mass + rows + time, total, mask=ok)
            else:
                result *= scale
            block_out = out + time[:, None] * out_time + columns[None, :]
            if GATE_TERMS != "":  # loaded no earlier, as its registers are worth more than the wait
                beside = load_block(companion, time, c_time, ok, BV)
                tl.store(row_products + terms + time, tl.sum(tl.trans(result) * beside.to(tl.float32), 1), mask=ok)
            if ADD:
                result += tl.trans(tl.load(block_out, mask=ok[:, None], other=0.0)).to(tl.float32)
            if MASKED:
                tl.store(block_out, tl.trans(result).to(out.dtype.element_ty), mask=ok[:, None])
            else:
                tl.store(block_out, tl.trans(result).to(out.dtype.element_ty))
            if GATE_TERMS == "q":
                if block % KEEP_EVERY == 0:
                    kept = (sequence.to(tl.int64) * num_kept + block // KEEP_EVERY) * heads + head
                    at = block_states + (kept * V + value_block * BV) * (2 * HALF) + cells
                    tl.store(at, state0.to(block_states.dtype.element_ty))
                    tl.store(at + HALF, state1.to(block_states.dtype.element_ty))
                    if EXTRA != "":
                        tl.store(block_sums + kept * V + value_block * BV + columns, tl.sum(value_sum, 0))
        if NORMALIZE or EXTRA != "":
            counted = added if EXTRA == "y" else tl.where(ok, 1.0, 0.0)
            if HAS_GATE:
                counted *= of_keys
            if EXTRA != "":
                counts = as_rows(counted, y0.dtype, 16)
                if HAS_GATE:
                    value_sum *= tl.exp2(whole)
                value_sum = tl.dot(counts, values, value_sum, input_precision=PRECISION)
            if SUMS_GIVEN:
                sum0 += block_sum0
                sum1 += block_sum1
            elif NORMALIZE:
                if HAS_GATE:
                    sum0 *= tl.exp2(whole)
                    sum1 *= tl.exp2(whole)
                counts = as_rows(counted, y0.dtype, BT)
                sum0 += tl.sum(dot(counts, y0, PRECISION), 0)
                sum1 += tl.sum(dot(counts, y1, PRECISION), 0)
        if HAS_GATE:
            state0 *= tl.exp2(whole)
            state1 *= tl.exp2(whole)
            if WEIGHTED == "y":
                of_keys *= weight
            values = (values.to(tl.float32) * of_keys[:, None]).to(y0.dtype)
        elif WEIGHTED == "y":
            values = (values.to(tl.float32) * weight[:, None]).to(y0.dtype)
        state0 = tl.dot(tl.trans(values), y0, state0, input_precision=PRECISION)
        state1 = tl.dot(tl.trans(values), y1, state1, input_precision=PRECISION)
        if GATE_TERMS == "k":
            if block % KEEP_EVERY == 0:
                kept = (sequence.to(tl.int64) * num_kept + block // KEEP_EVERY) * heads + head
                at = block_states + (kept * V + value_block * BV) * (2 * HALF) + cells
                over = tl.sum(tl.load(at).to(tl.float32) * state0 + tl.load(at + HALF).to(tl.float32) * state1)
                if EXTRA != "":
                    kept_sum = tl.load(block_sums + kept * V + value_block * BV + columns)
                    over += tl.sum(kept_sum * tl.sum(value_sum, 0))
                stride = (tl.num_programs(2) // num_splits).to(tl.int64) * heads * num_kept
                tl.store(across + value_block * stride + kept, over)
        if STATE_ONLY:
            if HAS_GATE:
                over_split += whole
    if STATE_ONLY:
        if HAS_GATE:
            if value_block == 0:
                tl.store(decays + number.to(tl.int64) * heads + head, over_split)
    if STATE_ONLY or STORE_LAST:
        tl.store(last_state + at_state + cells, state0)
        tl.store(last_state + at_state + cells + HALF, state1)
        if NORMALIZE:
            if value_block == 0:
                tl.store(last_sum + at_key_sum, sum0)
                tl.store(last_sum + at_key_sum + HALF, sum1)
        if EXTRA != "":
            tl.store(last_sum + at_sum, tl.sum(value_sum, 0))
