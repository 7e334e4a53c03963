"""Triton pieces that the chunked kernels share: blocks of rows, Hedgehog's features, the scan of what splits add.

A sequence is cut into `num_splits` splits of whole blocks, so that few long sequences fill the device too. What each
split adds to the state is computed on its own, then scanned (`scan_states`): that is where each split starts.
"""

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
def as_rows(x, KIND: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, n) in a narrower dtype whose rows add up to x (n,) fp32: what is rounded off is in a row of its own."""
    row = tl.arange(0, ROWS)[:, None]
    high = x.to(KIND)
    low = (x - high.to(tl.float32)).to(KIND)
    return tl.where(row == 0, high[None, :], tl.where(row == 1, low[None, :], tl.zeros_like(low)[None, :]))


@triton.jit
def sequence_of(bounds, HAS_BOUNDS: tl.constexpr, sequence, num_keys):
    """(row, first key, last key + 1) of a sequence; bounds are (N, 3) rows, starts and ends, else a row each."""
    if HAS_BOUNDS:
        row = tl.load(bounds + sequence * 3).to(tl.int64)
        start = tl.load(bounds + sequence * 3 + 1).to(tl.int64)
        end = tl.load(bounds + sequence * 3 + 2).to(tl.int64)
    else:
        row = sequence.to(tl.int64)
        start = row * 0
        end = start + num_keys
    return row, start, end


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
    up *= (1.0 / tl.sum(up, 1))[:, None]
    down *= (1.0 / tl.sum(down, 1))[:, None]
    return tl.maximum(up, 1e-12), tl.maximum(down, 1e-12)


@triton.jit
def softmax_pair_gradient(up, down, d_up, d_down):
    """Gradient with respect to z of the two softmaxes, fp32."""
    from_up = up * (d_up - tl.sum(up * d_up, 1)[:, None])
    from_down = down * (d_down - tl.sum(down * d_down, 1)[:, None])
    return from_up - from_down


@triton.jit
def load_map(pointer, head, DIM: tl.constexpr, HALF: tl.constexpr):
    """One head's (DIM, HALF) feature map."""
    rows = tl.arange(0, DIM)[:, None] * HALF
    return tl.load(pointer + head.to(tl.int64) * DIM * HALF + rows + tl.arange(0, HALF)[None, :])


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
