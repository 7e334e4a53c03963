"""Triton pieces that the chunked kernels share: features of a block, and the running state of a split of a sequence.

Features come in two halves, φ = [φ0 ⊕ φ1]: the halves of raw features, or Hedgehog's softmax(Wᵀx) and softmax(−Wᵀx).
So nothing F wide is ever concatenated, and one code path serves mapped and raw features.

A sequence is cut into `num_splits` splits of whole blocks, so that few long sequences fill the device too. What earlier
splits leave behind is summed by `split_states`, scanned by `scan_states`, and is where each split starts.
"""

# pyright: reportPossiblyUnboundVariable=false
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:  # no Triton on this platform: the dispatch takes the PyTorch path
    raise ImportError("Triton is not installed") from error


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in fp32; b takes the dtype of a."""
    return tl.dot(a, b.to(a.dtype), input_precision=PRECISION)


@triton.jit
def in_two(x, KIND: tl.constexpr):
    """x as the sum of two numbers of a narrower dtype."""
    high = x.to(KIND)
    return high, (x - high.to(tl.float32)).to(KIND)


@triton.jit
def split_of(bounds, HAS_BOUNDS: tl.constexpr, num_splits, num_keys):
    """(row, first key, last key + 1, split) of program 0: bounds are (N, 3) rows, starts and ends; without, a row each."""
    number = tl.program_id(0)
    sequence = number // num_splits
    split = number % num_splits
    if HAS_BOUNDS:
        row = tl.load(bounds + sequence * 3).to(tl.int64)
        start = tl.load(bounds + sequence * 3 + 1).to(tl.int64)
        end = tl.load(bounds + sequence * 3 + 2).to(tl.int64)
    else:
        row = sequence.to(tl.int64)
        start = row * 0
        end = start + num_keys
    return row, start, end, split


@triton.jit
def load_block(pointer, time, stride, ok, WIDTH: tl.constexpr):
    """Rows `time` (BT,) of a (T, WIDTH) matrix; rows that are not ok are zero."""
    columns = tl.arange(0, WIDTH)
    return tl.load(pointer + time.to(tl.int64)[:, None] * stride + columns[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def softmax_pair(z):
    """softmax(z) and softmax(-z) over the last dimension, fp32, at least 1e-12."""
    up = tl.exp(z - tl.max(z, 1)[:, None])
    down = tl.exp(tl.min(z, 1)[:, None] - z)
    up = up / tl.sum(up, 1)[:, None]
    down = down / tl.sum(down, 1)[:, None]
    return tl.maximum(up, 1e-12), tl.maximum(down, 1e-12)


@triton.jit
def softmax_pair_gradient(up, down, d_up, d_down):
    """Gradient with respect to z of the two softmaxes, fp32."""
    from_up = up * (d_up - tl.sum(up * d_up, 1)[:, None])
    from_down = down * (d_down - tl.sum(down * d_down, 1)[:, None])
    return from_up - from_down


@triton.jit
def features(
    pointer, time, stride, ok, map, HAS_MAP: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr
):
    """Both halves of the features of a block, (BT, HALF) fp32; zero where not ok.

    `map` is the (DIM, HALF) feature map, read only with HAS_MAP; without, the rows hold 2·HALF raw features.
    """
    if HAS_MAP:
        x = load_block(pointer, time, stride, ok, DIM)
        first, second = softmax_pair(dot(x, map, PRECISION))
        first = tl.where(ok[:, None], first, 0.0)
        second = tl.where(ok[:, None], second, 0.0)
    else:
        first = load_block(pointer, time, stride, ok, HALF).to(tl.float32)
        second = load_block(pointer + HALF, time, stride, ok, HALF).to(tl.float32)
    return first, second


@triton.jit
def load_map(pointer, head, HAS_MAP: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr):
    """One head's (DIM, HALF) feature map; without maps something that is not read."""
    if HAS_MAP:
        rows = tl.arange(0, DIM)[:, None] * HALF
        map = tl.load(pointer + head.to(tl.int64) * DIM * HALF + rows + tl.arange(0, HALF)[None, :])
    else:
        map = 0.0
    return map


@triton.jit
def state_offsets(number, heads, head, value_block, HALF: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Where the upper half of a state (2·HALF, V) and its denominator (2·HALF,) lie; states are (number, heads, ...)."""
    index = number.to(tl.int64) * heads + head
    rows = tl.arange(0, HALF)[:, None] * V
    columns = value_block * BV + tl.arange(0, BV)[None, :]
    return index * (2 * HALF * V) + rows + columns, index * (2 * HALF) + tl.arange(0, HALF)


@triton.jit
def split_states(
    x,
    y,
    row_weight,
    extra,
    maps,
    bounds,
    states,
    denominators,
    x_batch,
    x_head,
    x_time,
    y_batch,
    y_head,
    y_time,
    heads,
    x_group,
    y_group,
    map_group,
    num_keys,
    num_rows,
    num_splits,
    split_blocks,
    shift,
    skip,
    limit,
    HAS_BOUNDS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the blocks of a split add to the state: Σ φ(x_t) [y_t, 1]ᵀ, or with HAS_WEIGHT φ(x_t) [r_t y_t, e_t]ᵀ.

    Args:
        x: (B, X, T, DIM), or raw features (B, X, T, 2·HALF).
        y: (B, Y, T, V).
        row_weight, extra: (B, H, T) fp32, r and e above.
        maps: (M, DIM, HALF).
        bounds: (N, 3).
        states, denominators: outputs (N, splits, H, 2·HALF, V) and (N, splits, H, 2·HALF), fp32.
        x_group, y_group, map_group: query heads a head of x, of y, a map.
        num_keys, num_rows: T, and rows of `row_weight` and `extra`.
        shift: blocks by which the split's range is moved (the window's lag).
        skip: terms at the start of each sequence that do not count (sinks).
        limit: terms at the end of each sequence that do not count.
    """
    number = tl.program_id(0)
    head = tl.program_id(1)
    value_block = tl.program_id(2)
    row, start, end, split = split_of(bounds, HAS_BOUNDS, num_splits, num_keys)
    map = load_map(maps, head // map_group, HAS_MAP, DIM, HALF)
    x += row * x_batch + (head // x_group).to(tl.int64) * x_head
    y += row * y_batch + (head // y_group).to(tl.int64) * y_head + value_block * BV
    rows = (row * tl.num_programs(1) + head) * num_rows
    first = tl.maximum(split * split_blocks + shift, 0)
    last = tl.minimum((split + 1) * split_blocks + shift, tl.cdiv(end - start, BT).to(tl.int32))
    count = tl.maximum(last - first, 0)
    state0 = tl.zeros([HALF, BV], tl.float32)
    state1 = tl.zeros([HALF, BV], tl.float32)
    sum0 = tl.zeros([HALF], tl.float32)
    sum1 = tl.zeros([HALF], tl.float32)
    for step in range(count):
        block = first + step
        time = start + block * BT + tl.arange(0, BT)
        ok = time < end
        counted = (time >= start + skip) & (time < end - limit)
        phi0, phi1 = features(x, time, x_time, ok & counted, map, HAS_MAP, DIM, HALF, PRECISION)
        values = load_block(y, time, y_time, ok, BV)
        if HAS_WEIGHT:
            weight = tl.load(row_weight + rows + time, mask=ok, other=0.0)
            added = tl.load(extra + rows + time, mask=ok, other=0.0)
            sum0 += tl.sum(phi0 * added[:, None], 0)
            sum1 += tl.sum(phi1 * added[:, None], 0)
            phi0 = phi0 * weight[:, None]
            phi1 = phi1 * weight[:, None]
        else:
            sum0 += tl.sum(phi0, 0)
            sum1 += tl.sum(phi1, 0)
        state0 += dot(tl.trans(phi0.to(values.dtype)), values, PRECISION)
        state1 += dot(tl.trans(phi1.to(values.dtype)), values, PRECISION)
    at, at_sum = state_offsets(number, heads, head, value_block, HALF, V, BV)
    tl.store(states + at, state0)
    tl.store(states + at + HALF * V, state1)
    if value_block == 0:
        tl.store(denominators + at_sum, sum0)
        tl.store(denominators + at_sum + HALF, sum1)


@triton.jit
def scan_states(
    states,
    decays,
    first,
    last,
    heads,
    size,
    num_splits,
    HAS_DECAY: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn what splits add into what they start from, in place; the sum of all goes to `last`.

    Args:
        states: (N, splits, H, size) fp32.
        decays: (N, splits, H) fp32, log2 of the decay over each split.
        first, last: (N, H, size) fp32, before the first split and after the last.
    """
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    one = (sequence * heads + head) * size + at
    running = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        running = tl.load(first + one, mask=ok, other=0.0)
    for step in range(num_splits):
        split = num_splits - 1 - step if REVERSE else step
        index = (sequence * num_splits + split) * heads + head
        added = tl.load(states + index * size + at, mask=ok, other=0.0)
        tl.store(states + index * size + at, running, mask=ok)
        if HAS_DECAY:
            running *= tl.exp2(tl.load(decays + index))
        running += added
    tl.store(last + one, running, mask=ok)


@triton.jit
def multiply_rows(
    x,
    y,
    out,
    x_batch,
    x_head,
    x_time,
    y_batch,
    y_head,
    y_time,
    num_rows,
    WIDTH: tl.constexpr,
    BT: tl.constexpr,
):
    """Σ x·y over the last dimension: (B, H, T, WIDTH) twice -> (B, H, T) fp32."""
    time = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    ok = time < num_rows
    a = load_block(x + batch * x_batch + head * x_head, time, x_time, ok, WIDTH).to(tl.float32)
    b = load_block(y + batch * y_batch + head * y_head, time, y_time, ok, WIDTH).to(tl.float32)
    tl.store(out + (batch * tl.num_programs(1) + head) * num_rows + time, tl.sum(a * b, 1), mask=ok)
