"""Hybrid attention's queries in Gluon, for Hopper: `chunk_kernel.chunk_outputs` for 128 dims and a window of 64.

A program walks over chunks of 128 queries, 64 a warpgroup. Everything a chunk needs is copied to shared memory while
the chunk before it is computed, each part as soon as its place is free, and products run while others become weights.
"""

from __future__ import annotations

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError as error:  # no Triton, or one without Gluon: the launcher takes the plain Triton kernel
    raise ImportError("Triton has no Gluon") from error

LOG2E = gl.constexpr(1.4426950408889634)
NOTHING = gl.constexpr(-1e30)  # the log of no weight at all
TILE = gl.constexpr(64)  # queries of a warpgroup, keys of a product, and half of D, F and V
CHUNK = gl.constexpr(128)  # queries at a time
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16]))
ROWS = gl.constexpr(gl.SliceLayout(1, SUMS.value))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS.value))
OPERAND = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 2))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
COPY_ROWS = gl.constexpr(gl.SliceLayout(1, COPY.value))
COPY_COLUMNS = gl.constexpr(gl.SliceLayout(0, COPY.value))
# Names before and since Triton 3.7
together = getattr(gl, "thread_barrier", None) or gl.barrier
copy_in = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def again(x):
    """x, of which the compiler does not know that it is x: what is made of it is not kept over a loop's turns."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def narrow(x):
    """fp32 -> bf16, here and now: compilers would move it, and all that x is made of, to where the result is read."""
    asm: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [x], dtype=gl.bfloat16, is_pure=False, pack=2)


@gluon.jit
def settled(x):
    """fp32 that is computed here and now."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def nought(x):
    """Zero, but no compiler knows: addresses that are made of it are not kept over a loop's turns."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def fetch(left, right, pointer, begin, stride, last, NUM: gl.constexpr):
    """Have NUM rows of 128 numbers copied, into two halves of 64 columns; rows are at most `last`."""
    row = gl.minimum(gl.maximum(again(begin) + gl.arange(0, NUM, layout=COPY_ROWS), 0), last).to(gl.int64)
    at = pointer + row[:, None] * stride + gl.arange(0, TILE, layout=COPY_COLUMNS)[None, :]
    nil = nought(begin)
    copy_in(left.index(nil), at)
    copy_in(right.index(nil), at + TILE)


@gluon.jit
def arrived(OUTSTANDING: gl.constexpr):
    """Wait for all groups of copies but the last few, in all threads; products may then read them."""
    async_copy.wait_group(OUTSTANDING)
    fence_async_shared()
    together()


@gluon.jit
def features(z, factor):
    """softmax(±z), times each row's factor, in bf16; see `chunk_kernel._features`."""
    up = gl.exp2(z * LOG2E - (gl.max(z, 1) * LOG2E)[:, None])
    down = gl.exp2((gl.min(z, 1) * LOG2E)[:, None] - z * LOG2E)
    least = (factor * 1e-12)[:, None]
    up = up * (factor / gl.sum(up, 1))[:, None] + least
    return up, down * (factor / gl.sum(down, 1))[:, None] + least


@gluon.jit(do_not_specialize=["strips"])
def chunk_outputs_async(
    q,
    k,
    v,
    map_q,
    map_k,
    log_factor,
    states,
    sums,
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
    out_batch,
    out_head,
    out_time,
    heads,
    group,
    map_group,
    scale,
    log_linear,
    num_keys,
    strips,
    HAS_BOUNDS: gl.constexpr,
):
    """Arguments as `chunk_outputs` has them. Each of `strips` programs of a sequence and head takes a part of it.

    The chunk c has the queries from 128 c + 64 on; c = -1 is the first.
    """
    strip = gl.program_id(0)
    head = gl.program_id(1)
    sequence = gl.program_id(2)
    row = sequence.to(gl.int64)
    start = row * 0
    end = start + num_keys
    if HAS_BOUNDS:
        row = gl.load(bounds + sequence * 3).to(gl.int64)
        start = gl.load(bounds + sequence * 3 + 1).to(gl.int64)
        end = gl.load(bounds + sequence * 3 + 2).to(gl.int64)
    length = (end - start).to(gl.int32)
    last = length - 1
    q += row * q_batch + head.to(gl.int64) * q_head + start * q_time
    k += row * k_batch + (head // group).to(gl.int64) * k_head + start * k_time
    v += row * v_batch + (head // group).to(gl.int64) * v_head + start * v_time
    out += row * out_batch + head.to(gl.int64) * out_head + start * out_time
    log_mass += (row * heads + head) * num_keys + start
    map_heads = heads // map_group
    slot = ((row * num_keys + start) // CHUNK + sequence) * map_heads + head // map_group
    chunks = (length + TILE - 1) // CHUNK + 1
    each = (chunks + strips - 1) // strips
    first = strip * each - 1
    stop = gl.minimum(first + each, chunks - 1)

    x_0 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    x_1 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    keys_0 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    keys_1 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    keys2_0 = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, TILE], SHARED)
    keys2_1 = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, TILE], SHARED)
    values_0 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    values_1 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    values2_0 = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, TILE], SHARED)
    values2_1 = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, TILE], SHARED)
    state_0 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    state_1 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    phi_0 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    phi_1 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    maps_0 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)
    maps_1 = gl.allocate_shared_memory(gl.bfloat16, [1, CHUNK, TILE], SHARED)

    local = gl.arange(0, CHUNK, layout=COPY_ROWS)[:, None] * TILE + gl.arange(0, TILE, layout=COPY_COLUMNS)[None, :]
    if first < stop:
        copy_in(maps_0.index(0), map_q + head * (CHUNK * TILE) + local)
        copy_in(maps_1.index(0), map_k + head // map_group * (CHUNK * TILE) + local)
        fetch(x_0, x_1, q, first * CHUNK + TILE, q_time, last, CHUNK)
        fetch(keys_0, keys_1, k, first * CHUNK, k_time, last, CHUNK)
        fetch(keys2_0, keys2_1, k, first * CHUNK + CHUNK, k_time, last, TILE)
        async_copy.commit_group()
        fetch(values_0, values_1, v, first * CHUNK, v_time, last, CHUNK)
        fetch(values2_0, values2_1, v, first * CHUNK + CHUNK, v_time, last, TILE)
        async_copy.commit_group()
        fetch(
            state_0,
            state_1,
            states + (slot + gl.maximum(first, 0) * map_heads) * (CHUNK * CHUNK),
            0,
            CHUNK,
            CHUNK,
            CHUNK,
        )
        async_copy.commit_group()

    log_g = gl.load(log_factor + head) * LOG2E
    log_past = log_linear * LOG2E
    per_score = scale * LOG2E
    index = gl.arange(0, CHUNK, layout=ROWS)
    column = gl.arange(0, TILE, layout=COLUMNS)
    one = gl.full([CHUNK], 1.0, gl.float32, ROWS)
    none = gl.zeros([CHUNK, TILE], gl.float32, SUMS)
    for chunk in range(first, stop):
        nil = nought(chunk)
        following = gl.minimum(chunk + 1, stop - 1)
        place = chunk * CHUNK + TILE + index
        query = (chunk + index)[:, None]
        key = (again(chunk) + column)[None, :]  # of the first block; the next is TILE further
        arrived(2)
        # the softmax window: scores of three blocks of keys, of which a query sees parts
        s0 = warpgroup_mma(
            x_0.index(nil), keys_0.index(nil).slice(0, TILE).permute((1, 0)), none, use_acc=False, is_async=True
        )
        s0 = warpgroup_mma(x_1.index(nil), keys_1.index(nil).slice(0, TILE).permute((1, 0)), s0, is_async=True)
        s1 = warpgroup_mma(
            x_0.index(nil), keys_0.index(nil).slice(TILE, TILE).permute((1, 0)), none, use_acc=False, is_async=True
        )
        s1 = warpgroup_mma(x_1.index(nil), keys_1.index(nil).slice(TILE, TILE).permute((1, 0)), s1, is_async=True)
        s2 = warpgroup_mma(x_0.index(nil), keys2_0.index(nil).permute((1, 0)), none, use_acc=False, is_async=True)
        s2 = warpgroup_mma(x_1.index(nil), keys2_1.index(nil).permute((1, 0)), s2, is_async=True)
        z = warpgroup_mma(x_0.index(nil), maps_0.index(nil).slice(0, TILE), none, use_acc=False, is_async=True)
        z = warpgroup_mma(x_1.index(nil), maps_0.index(nil).slice(TILE, TILE), z, is_async=True)
        s0 = warpgroup_mma_wait(6, [s0])
        s0 = gl.where(query < key - gl.where(chunk >= 0, 0, 2 * CHUNK), s0, -float("inf"))
        peak = gl.max(s0, 1)
        s1 = warpgroup_mma_wait(4, [s1])
        key = (again(chunk) + column)[None, :]
        s1 = gl.where((query >= key + gl.where(chunk >= 0, 0, 2 * CHUNK)) & (query < key + TILE), s1, -float("inf"))
        peak = gl.maximum(peak, gl.max(s1, 1))
        s2 = warpgroup_mma_wait(2, [s2])
        key = (again(chunk) + column)[None, :]
        s2 = gl.where(query >= key + TILE, s2, -float("inf"))
        peak = gl.maximum(peak, gl.max(s2, 1))
        has_past = place >= TILE
        top = gl.maximum(gl.where(has_past, log_past, NOTHING), peak * per_score + log_g)
        shift = (log_g - top)[:, None]
        s0 = gl.exp2(s0 * per_score + shift)
        s1 = gl.exp2(s1 * per_score + shift)
        s2 = gl.exp2(s2 * per_score + shift)
        total = settled(gl.sum(s0 + s1 + s2, 1))
        p0 = gl.convert_layout(narrow(s0), OPERAND)
        p1 = gl.convert_layout(narrow(s1), OPERAND)
        p2 = gl.convert_layout(narrow(s2), OPERAND)
        factor = gl.where(has_past, gl.exp2(log_past - top), 0.0)
        arrived(1)
        y0 = warpgroup_mma(p0, values_0.index(nil).slice(0, TILE), none, use_acc=False, is_async=True)
        y1 = warpgroup_mma(p0, values_1.index(nil).slice(0, TILE), none, use_acc=False, is_async=True)
        y0 = warpgroup_mma(p1, values_0.index(nil).slice(TILE, TILE), y0, is_async=True)
        y1 = warpgroup_mma(p1, values_1.index(nil).slice(TILE, TILE), y1, is_async=True)
        y0 = warpgroup_mma(p2, values2_0.index(nil), y0, is_async=True)
        y1 = warpgroup_mma(p2, values2_1.index(nil), y1, is_async=True)
        # features
        z = warpgroup_mma_wait(6, [z])
        at_sum = sums + (slot + gl.maximum(chunk, 0) * map_heads) * CHUNK + column
        sum0 = gl.load(at_sum)
        sum1 = gl.load(at_sum + TILE)
        up, down = features(z, factor)
        total += settled(gl.sum(up * sum0[None, :] + down * sum1[None, :], 1))
        up = gl.convert_layout(narrow(up), OPERAND)
        down = gl.convert_layout(narrow(down), OPERAND)
        y0, y1 = warpgroup_mma_wait(0, [y0, y1])
        z_k = warpgroup_mma(keys_0.index(nil), maps_1.index(nil).slice(0, TILE), none, use_acc=False, is_async=True)
        z_k = warpgroup_mma(keys_1.index(nil), maps_1.index(nil).slice(TILE, TILE), z_k, is_async=True)
        z_k = warpgroup_mma_wait(0, [z_k])
        key_up, key_down = features(z_k, one)
        phi_0.index(nil).store(narrow(key_up))
        phi_1.index(nil).store(narrow(key_down))
        arrived(0)
        fetch(x_0, x_1, q, following * CHUNK + TILE, q_time, last, CHUNK)
        fetch(keys_0, keys_1, k, following * CHUNK, k_time, last, CHUNK)
        fetch(keys2_0, keys2_1, k, following * CHUNK + CHUNK, k_time, last, TILE)
        async_copy.commit_group()
        # products of features where keys are a window or more behind, and the state
        a0 = warpgroup_mma(up, phi_0.index(nil).slice(0, TILE).permute((1, 0)), none, use_acc=False, is_async=True)
        a0 = warpgroup_mma(down, phi_1.index(nil).slice(0, TILE).permute((1, 0)), a0, is_async=True)
        a1 = warpgroup_mma(up, phi_0.index(nil).slice(TILE, TILE).permute((1, 0)), none, use_acc=False, is_async=True)
        a1 = warpgroup_mma(down, phi_1.index(nil).slice(TILE, TILE).permute((1, 0)), a1, is_async=True)
        y0 = warpgroup_mma(up, state_0.index(nil).slice(0, TILE).permute((1, 0)), y0, is_async=True)
        y1 = warpgroup_mma(up, state_0.index(nil).slice(TILE, TILE).permute((1, 0)), y1, is_async=True)
        y0 = warpgroup_mma(down, state_1.index(nil).slice(0, TILE).permute((1, 0)), y0, is_async=True)
        y1 = warpgroup_mma(down, state_1.index(nil).slice(TILE, TILE).permute((1, 0)), y1, is_async=True)
        a0 = warpgroup_mma_wait(6, [a0])
        a0 = gl.where(query >= key, a0, 0.0)
        total += gl.sum(a0, 1)
        p0 = gl.convert_layout(narrow(a0), OPERAND)
        a1 = warpgroup_mma_wait(4, [a1])
        a1 = gl.where(query >= key + TILE, a1, 0.0)
        total += gl.sum(a1, 1)
        p1 = gl.convert_layout(narrow(a1), OPERAND)
        y0 = warpgroup_mma(p0, values_0.index(nil).slice(0, TILE), y0, is_async=True)
        y1 = warpgroup_mma(p0, values_1.index(nil).slice(0, TILE), y1, is_async=True)
        y0 = warpgroup_mma(p1, values_0.index(nil).slice(TILE, TILE), y0, is_async=True)
        y1 = warpgroup_mma(p1, values_1.index(nil).slice(TILE, TILE), y1, is_async=True)
        y0, y1 = warpgroup_mma_wait(0, [y0, y1])
        together()
        fetch(values_0, values_1, v, following * CHUNK, v_time, last, CHUNK)
        fetch(values2_0, values2_1, v, following * CHUNK + CHUNK, v_time, last, TILE)
        async_copy.commit_group()
        at_state = states + (slot + gl.maximum(following, 0) * map_heads) * (CHUNK * CHUNK)
        fetch(state_0, state_1, at_state, 0, CHUNK, CHUNK, CHUNK)
        async_copy.commit_group()
        place = again(chunk) * CHUNK + TILE + index
        ok = (place >= 0) & (place < length)
        inverse = 1.0 / total
        at = out + place.to(gl.int64)[:, None] * out_time + column[None, :]
        gl.store(at, (y0 * inverse[:, None]).to(gl.bfloat16), mask=ok[:, None])
        gl.store(at + TILE, (y1 * inverse[:, None]).to(gl.bfloat16), mask=ok[:, None])
        gl.store(log_mass + place, (top + gl.log2(total)) / LOG2E, mask=ok)
    async_copy.wait_group(0)
