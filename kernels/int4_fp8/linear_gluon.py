"""The product of many tokens with a packed INT4 weight, in Gluon.

As in `linear_kernel.many_tokens`, Yᵀ = W Xᵀ on FP8 matrix units, with group scales on fp32 sums. There every warp does
one thing after the other: codes to FP8, the product, its scaling. Here two warpgroups begin products in turns, so that
one converts codes and scales sums while the matrix units have a product of the other's. A warp of its own has the copy
engine fetch codes and tokens into as many buffers as fit, and programs stay for several tiles, so that fetching goes on
while results are written.

A program's tile is 128 rows by 256 tokens, 64 rows a warpgroup; each step, of a group of inputs, is two products of 64
rows with 128 tokens.
"""

from __future__ import annotations

import functools

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:  # no Triton, or one without Gluon: the dispatch takes the plain Triton kernel
    raise ImportError("Triton has no Gluon") from error

from torch import Tensor

from kit.kernels.int4_fp8.linear_kernel import FP8_UNIT as UNIT
from kit.kernels.int4_fp8.linear_kernel import TO_FP8 as WORDS_TO_FP8

TILE = gl.constexpr(64)  # rows whose codes lie together, and of a product
TOKENS = gl.constexpr(128)  # columns of a product
BLOCK = gl.constexpr(256)  # tokens of a tile: two products
GROUP = gl.constexpr(128)  # inputs that share a scale
WARPGROUPS = gl.constexpr(2)  # that multiply
FP8_UNIT = gl.constexpr(UNIT.value)
# Their names since Triton 3.7, or before
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
TO_FP8 = gl.constexpr(WORDS_TO_FP8.value)

# As TO_FP8, of codes less a zero point, four times in $3: a byte of 128 + code - zero point has its top bit set if the
# difference, of at most 15, is not negative; n · 2^-9 is the byte n for all those.
TO_FP8_ZEROS = gl.constexpr("""{
    .reg .b32 bits, plus;
    lop3.b32 bits, $2, 0x0f0f0f0f, 0x80808080, 0xea;
    sub.u32 bits, bits, $3;
    prmt.b32 plus, bits, 0, 0xba98;
    lop3.b32 bits, bits, plus, 0x7f7f7f7f, 0x82;
    lop3.b32 plus, plus, 0x81818181, 0, 0x0c;
    add.u32 $0, bits, plus;
    shr.u32 bits, $2, 4;
    lop3.b32 bits, bits, 0x0f0f0f0f, 0x80808080, 0xea;
    sub.u32 bits, bits, $3;
    prmt.b32 plus, bits, 0, 0xba98;
    lop3.b32 bits, bits, plus, 0x7f7f7f7f, 0x82;
    lop3.b32 plus, plus, 0x81818181, 0, 0x0c;
    add.u32 $1, bits, plus;
}""")

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
ROWS = gl.constexpr(gl.SliceLayout(1, SUMS.value))
COLUMNS = gl.constexpr(gl.SliceLayout(0, SUMS.value))
OPERAND = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 4))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))


def described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """x (rows, contiguous) as the copy engine reads or writes it, `block` at a time, in matrix units' order."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, _layout(block[1], x.element_size()))


@functools.cache
def _layout(width: int, size: int) -> gl.NVMMASharedLayout:
    """Of blocks so many elements wide, of so many bytes each."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(width * size, 128), element_bitwidth=8 * size, rank=2)


@gluon.jit
def place(tile, row_blocks, token_blocks, TOGETHER: gl.constexpr):
    """A tile's block of rows and block of tokens: TOGETHER blocks of tokens go through the weight together."""
    begin = tile // (TOGETHER * row_blocks) * TOGETHER
    width = gl.minimum(token_blocks - begin, TOGETHER)
    inner = tile % (TOGETHER * row_blocks)
    return inner // width, begin + inner % width


@gluon.jit
def fetch(
    x,
    codes,
    x_buffers,
    code_buffers,
    full,
    empty,
    num_groups,
    row_blocks,
    token_blocks,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """One warp: have each step's tokens and codes copied, once both warpgroups are done with what was there."""
    step = 0
    for tile in range(gl.program_id(0), row_blocks * token_blocks, gl.num_programs(0)):
        row_block, token_block = place(tile, row_blocks, token_blocks, TOGETHER)
        for group in range(num_groups):
            slot = step % STAGES
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            fence_async_shared()
            mbarrier.expect(bar, BLOCK * GROUP + WARPGROUPS * TILE * GROUP // 2)
            copy_in(x, [token_block * BLOCK, group * GROUP], bar, x_buffers.index(slot))
            for part in gl.static_range(WARPGROUPS):
                at = [((row_block * WARPGROUPS + part) * num_groups + group) * TILE, 0]
                copy_in(codes, at, bar, code_buffers.index(slot * WARPGROUPS + part))
            step += 1


@gluon.jit
def operand_of(buffer, zero, HAS_ZEROS: gl.constexpr):
    """(64, 64) bytes in shared memory -> (64, 128) e4m3: (codes - zero) / FP8_UNIT.

    No assembly here is pure: it stays in its place among products.
    """
    words = buffer.load(OPERAND)
    if HAS_ZEROS:
        four = (zero.to(gl.int32) + 8) * 0x01010101
        four, words = gl.broadcast(gl.convert_layout(four, gl.SliceLayout(1, OPERAND))[:, None], words)
        low, high = gl.inline_asm_elementwise(
            TO_FP8_ZEROS, "=r,=r,r,r,r,r,r", [words, four], dtype=(gl.uint8, gl.uint8), is_pure=False, pack=4
        )
    else:
        low, high = gl.inline_asm_elementwise(
            TO_FP8, "=r,=r,r", [words], dtype=(gl.uint8, gl.uint8), is_pure=False, pack=4
        )
    whole = gl.join(low, high).permute(0, 2, 1).reshape(TILE, GROUP)
    return gl.convert_layout(whole, OPERAND, assert_trivial=True).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def product_of(operand, x, PART: gl.constexpr, product, turn, GANG: gl.constexpr):
    """The product with a part of a step's tokens, put where `product` was; it begins after the other warpgroup's."""
    mbarrier.wait(turn.index(GANG), (PART + GANG + 1) % 2)  # the first of all does not wait
    values = x.slice(PART * TOKENS, TOKENS).permute((1, 0))
    product = warpgroup_mma(operand, values, product, use_acc=False, is_async=True)
    mbarrier.arrive(turn.index(1 - GANG), count=1)
    return warpgroup_mma_wait(0, [product])


@gluon.jit
def add_scaled(total, product, scale):
    """total + product · scale. Assembly: the compiler would move sums behind the next product, and wait for it."""
    scale, product = gl.broadcast(scale[:, None], product)
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale, total], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def write(total, x_scale, bias, out, buffer, rows, row, token, num_outputs, HAS_BIAS: gl.constexpr):
    """Write sums (64, TOKENS) as Y, times token scales, plus bias; the copy engine does it while the warps go on.

    Args:
        x_scale: of the tokens, in shared memory.
        buffer: (TOKENS, 64), which no copy but the last but one reads.
        rows: of W, and row the first.
    """
    total *= x_scale.load(COLUMNS)[None, :]
    if HAS_BIAS:
        total += gl.load(bias + rows, mask=rows < num_outputs, other=0.0).to(gl.float32)[:, None]
    tma.store_wait(1)
    buffer.store(total.to(out.dtype).permute((1, 0)))
    fence_async_shared()
    copy_out(out, [token, row], buffer)


@gluon.jit
def multiply(
    x_scale,
    scales,
    zeros,
    bias,
    out,
    x_buffers,
    code_buffers,
    scale_buffers,
    out_buffers,
    full,
    empty,
    turn,
    num_tokens,
    num_outputs,
    padded,
    num_groups,
    row_blocks,
    token_blocks,
    GANG: gl.constexpr,
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """One warpgroup, GANG of WARPGROUPS: its rows of every tile."""
    step = 0
    nothing = gl.zeros([TILE, TOKENS], gl.float32, SUMS)
    for tile in range(gl.program_id(0), row_blocks * token_blocks, gl.num_programs(0)):
        row_block, token_block = place(tile, row_blocks, token_blocks, TOGETHER)
        row = (row_block * WARPGROUPS + GANG) * TILE
        rows = row + gl.arange(0, TILE, layout=ROWS)
        at = rows
        ok = rows < padded
        scale = gl.load(scales + at, mask=ok, other=0.0)
        zero = scale
        if HAS_ZEROS:
            zero = gl.load(zeros + at, mask=ok, other=0.0)
        token = token_block * BLOCK
        tokens = token + gl.arange(0, BLOCK, layout=LINE)
        x_scales = gl.load(x_scale + tokens, mask=tokens < num_tokens, other=0.0)
        total0 = nothing
        total1 = nothing
        product = nothing
        for group in range(num_groups):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            operand = operand_of(code_buffers.index(slot * WARPGROUPS + GANG), zero, HAS_ZEROS)
            wide = scale.to(gl.float32) * FP8_UNIT
            at += padded
            ahead = ok & (group + 1 < num_groups)
            scale = gl.load(scales + at, mask=ahead, other=0.0)
            if HAS_ZEROS:
                zero = gl.load(zeros + at, mask=ahead, other=0.0)
            product = product_of(operand, x_buffers.index(slot), 0, product, turn, GANG)
            total0 = add_scaled(total0, product, wide)
            product = product_of(operand, x_buffers.index(slot), 1, product, turn, GANG)
            mbarrier.arrive(empty.index(slot), count=1)
            total1 = add_scaled(total1, product, wide)
            step += 1
        kept = scale_buffers.index(GANG)
        kept.store(x_scales)
        for part in gl.static_range(BLOCK // TOKENS):
            write(
                total0 if part == 0 else total1, kept.slice(part * TOKENS, TOKENS), bias, out,
                out_buffers.index(2 * GANG + part), rows, row, token + part * TOKENS, num_outputs, HAS_BIAS,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "row_blocks", "token_blocks"])
def many_tokens_async(
    x,
    x_scale,
    codes,
    scales,
    zeros,
    bias,
    out,
    num_tokens,
    num_outputs,
    padded,
    num_groups,
    row_blocks,
    token_blocks,
    HAS_ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):
    """Y of a weight in groups of 128. Grid: as many programs as run at once.

    Args:
        x: (M, K) e4m3, described in blocks (BLOCK, 128).
        x_scale: (M,) fp32.
        codes: of a `PackedInt4`, described as (tiles · G · 64, 64) in blocks (64, 64).
        scales, zeros: of a `PackedInt4`; zeros are read with HAS_ZEROS.
        bias: (N,), read with HAS_BIAS.
        out: (M, N), described in blocks (TOKENS, 64).
    """
    x_buffers = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK, GROUP], x.layout)
    code_buffers = gl.allocate_shared_memory(codes.dtype, [STAGES * WARPGROUPS, TILE, GROUP // 2], codes.layout)
    scale_buffers = gl.allocate_shared_memory(gl.float32, [WARPGROUPS, BLOCK], PLAIN)
    out_buffers = gl.allocate_shared_memory(out.dtype, [2 * WARPGROUPS, TOKENS, TILE], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WARPGROUPS):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    gdc_wait()
    gdc_launch_dependents()  # their programs find no room before these end, but then start at once
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    x_scale, scales, zeros, bias, out, x_buffers, code_buffers, scale_buffers, out_buffers, full, empty,
                    turn, num_tokens, num_outputs, padded, num_groups, row_blocks, token_blocks, 0, HAS_ZEROS, HAS_BIAS,
                    STAGES, TOGETHER,
                ),
            ),
            (
                multiply,
                (
                    x_scale, scales, zeros, bias, out, x_buffers, code_buffers, scale_buffers, out_buffers, full, empty,
                    turn, num_tokens, num_outputs, padded, num_groups, row_blocks, token_blocks, 1, HAS_ZEROS, HAS_BIAS,
                    STAGES, TOGETHER,
                ),
            ),
            (
                fetch,
                (
                    x, codes, x_buffers, code_buffers, full, empty, num_groups, row_blocks, token_blocks, STAGES,
                    TOGETHER,
                ),
            ),
        ],
        [4, 1],
        [240, 24],  # registers of a thread
    )  # fmt: skip
