"""Triton kernels of Hedgehog's feature map: φ(x) = [softmax(Wᵀx) ⊕ softmax(−Wᵀx)] and its gradient."""

from __future__ import annotations

from kit.kernels.linear_attention.blocks import dot, load_block, load_map, softmax_pair, softmax_pair_gradient

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Triton is not installed") from error


@triton.jit
def map_forward(
    x,
    maps,
    out,
    sums,
    x_batch,
    x_head,
    x_time,
    num_rows,
    num_zero,
    HAS_SUMS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(B, H, T, DIM) -> (B, H, T, 2·HALF), contiguous.

    With HAS_SUMS the first `num_zero` rows are zero, and `sums` (B, H, blocks, 2·HALF) fp32 are those of each block.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    time = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    ok = time < num_rows
    weights = load_map(maps, head, DIM, HALF)
    rows = load_block(x + batch * x_batch + head.to(tl.int64) * x_head, time, x_time, ok, DIM)
    first, second = softmax_pair(dot(rows, weights, PRECISION))
    if HAS_SUMS:
        kept = ok & (time >= num_zero)
        first = tl.where(kept[:, None], first, 0.0)
        second = tl.where(kept[:, None], second, 0.0)
    at = ((batch * tl.num_programs(1) + head) * num_rows + time[:, None]) * (2 * HALF) + tl.arange(0, HALF)[None, :]
    tl.store(out + at, first.to(out.dtype.element_ty), mask=ok[:, None])
    tl.store(out + at + HALF, second.to(out.dtype.element_ty), mask=ok[:, None])
    if HAS_SUMS:
        at_sum = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)
        at_sum = sums + at_sum * (2 * HALF) + tl.arange(0, HALF)
        tl.store(at_sum, tl.sum(first, 0))
        tl.store(at_sum + HALF, tl.sum(second, 0))


@triton.jit
def map_backward(
    x,
    maps,
    d_phi,
    d_x,
    d_maps,
    x_batch,
    x_head,
    x_time,
    d_batch,
    d_head,
    d_time,
    num_rows,
    blocks,
    ADD: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_phi (B, H, T, 2·HALF) -> d_x (B, H, T, DIM), and each program's d_maps (B, programs, H, DIM, HALF), fp32.

    With ADD `d_x` holds another gradient, to which this one is added.
    """
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    weights = load_map(maps, head, DIM, HALF)
    x += batch * x_batch + head.to(tl.int64) * x_head
    d_x += batch * d_batch + head.to(tl.int64) * d_head
    rows_before = (batch * tl.num_programs(1) + head) * num_rows
    total = tl.zeros([DIM, HALF], tl.float32)
    wide = tl.arange(0, DIM)
    for step in range(blocks):
        time = (tl.program_id(0).to(tl.int64) * blocks + step) * BT + tl.arange(0, BT)
        ok = time < num_rows
        rows = load_block(x, time, x_time, ok, DIM)
        up, down = softmax_pair(dot(rows, weights, PRECISION))
        d_rows = d_phi + rows_before * (2 * HALF)
        d_up = load_block(d_rows, time, 2 * HALF, ok, HALF).to(tl.float32)
        d_down = load_block(d_rows + HALF, time, 2 * HALF, ok, HALF).to(tl.float32)
        d_z = softmax_pair_gradient(up, down, d_up, d_down).to(rows.dtype)
        total += dot(tl.trans(rows), d_z, PRECISION)
        gradient = dot(d_z, tl.trans(weights), PRECISION)
        if ADD:
            gradient += load_block(d_x, time, d_time, ok, DIM).to(tl.float32)
        at = d_x + time[:, None] * d_time + wide[None, :]
        tl.store(at, gradient.to(d_x.dtype.element_ty), mask=ok[:, None])
    index = (batch * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + head
    tl.store(d_maps + index * (DIM * HALF) + wide[:, None] * HALF + tl.arange(0, HALF)[None, :], total)
