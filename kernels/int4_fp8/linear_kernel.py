"""Triton kernels of products with packed INT4 weights.

Tokens are the columns of every product, Yᵀ = W Xᵀ, so codes go from shared memory through registers into the matrix
units, and group scales, which belong to rows, multiply fp32 sums: no product of code and scale is ever rounded. A tile
of codes is (rows, g / 2) bytes; low halves are a group's first inputs, high halves the others (`packing`), so that both
come out whole, and join along K without moving between threads.

Kernels start before the one before them has ended (programmatic dependent launch): they ask for their weights, which
nobody writes, wait for what they read or write of others, and let the next one start when they have read all weights,
or before they do: its programs then come as soon as there is room, and ask for weights meanwhile.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:  # no Triton on this platform: the dispatch takes the PyTorch path
    raise ImportError("Triton is not installed") from error

from kit.kernels.int4_fp8.quantize_kernel import e4m3_bits, magnitude_bits, silu, wait_for_others

TILE = tl.constexpr(64)  # rows whose codes lie together
EARLY_UP_TO = tl.constexpr(8)  # tokens of `few_tokens` with which the next kernel starts early: with 16 that crowds
COUNTS = ["num_tokens", "num_groups", "groups_each", "token_blocks"]  # a new value compiles nothing anew

# Four bytes -> their low and their high codes in fp16. A byte b below 0x64 is the fp16 number 1024 + b; the byte of a
# high half is 16 times its code.
TO_FP16 = tl.constexpr("""{
    .reg .b32 low, high, shift, sixteenth;
    and.b32 low, $4, 0x0f0f0f0f;
    and.b32 high, $4, 0xf0f0f0f0;
    prmt.b32 $0, low, 0x64646464, 0x4140;
    prmt.b32 $1, low, 0x64646464, 0x4342;
    prmt.b32 $2, high, 0x64646464, 0x4140;
    prmt.b32 $3, high, 0x64646464, 0x4342;
    mov.b32 shift, 0xe408e408;
    add.rn.f16x2 $0, $0, shift;
    add.rn.f16x2 $1, $1, shift;
    mov.b32 shift, 0xd480d480;
    mov.b32 sixteenth, 0x2c002c00;
    fma.rn.f16x2 $2, $2, sixteenth, shift;
    fma.rn.f16x2 $3, $3, sixteenth, shift;
}""")

# Four e4m3 numbers -> fp16.
X_TO_FP16 = tl.constexpr("""{
    .reg .b16 first, second;
    mov.b32 {first, second}, $2;
    cvt.rn.f16x2.e4m3x2 $0, first;
    cvt.rn.f16x2.e4m3x2 $1, second;
}""")

# Four bytes -> their low and their high codes, times 2^-9, in e4m3: the byte n <= 8 is the number n · 2^-9. Of a code
# c + 8 with its top bit set, c is the three bits below; else -c is 8 less those, their complement plus one. `plus` is
# all ones in the first case.
TO_FP8 = tl.constexpr("""{
    .reg .b32 bits, plus;
    shl.b32 bits, $2, 4;
    prmt.b32 plus, bits, 0, 0xba98;
    lop3.b32 bits, $2, plus, 0x07070707, 0x82;
    lop3.b32 plus, plus, 0x81818181, 0, 0x0c;
    add.u32 $0, bits, plus;
    shr.u32 bits, $2, 4;
    prmt.b32 plus, $2, 0, 0xba98;
    lop3.b32 bits, bits, plus, 0x07070707, 0x82;
    lop3.b32 plus, plus, 0x81818181, 0, 0x0c;
    add.u32 $1, bits, plus;
}""")
# Four int8 -> bf16. 0x43 over seven bits n is the bf16 number 128 + n, and over a sign bit alone 128 or 256.
BYTES_TO_BF16 = tl.constexpr("""{
    .reg .b32 low, sign, first, second;
    and.b32 low, $2, 0x7f7f7f7f;
    and.b32 sign, $2, 0x80808080;
    prmt.b32 first, low, 0x43434343, 0x4140;
    prmt.b32 second, sign, 0x43434343, 0x4140;
    sub.rn.bf16x2 $0, first, second;
    prmt.b32 first, low, 0x43434343, 0x4342;
    prmt.b32 second, sign, 0x43434343, 0x4342;
    sub.rn.bf16x2 $1, first, second;
}""")
FP8_UNIT = tl.constexpr(512.0)  # what codes in e4m3 were divided by

ASK = tl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")


@triton.jit
def rows_of(tile, local, num_outputs, BN: tl.constexpr, PAIRED: tl.constexpr):
    """The rows of W that a program has: BN that lie together or, PAIRED, BN / 2 gates and the same of up's.

    They come in turns of 8: a gate and its up are then 8 rows apart, where one thread has the sums of both.
    """
    if PAIRED:
        return tile * (BN // 2) + local // 16 * 8 + local % 8 + local % 16 // 8 * (num_outputs // 2)
    return tile * BN + local


@triton.jit
def ask_and_wait(
    codes,
    tile,
    first,
    last,
    num_groups,
    num_outputs,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    LINES: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Ask for a program's first LINES lines of 128 bytes of codes, then wait for the last kernel.

    Args:
        tile: counts BN rows.
        first, last: groups that the program reads.
    """
    if LINES > 0:
        GROUP_LINES: tl.constexpr = BN * HALF // 128 if BN < TILE else TILE * HALF // 128
        line = tl.arange(0, LINES)
        group = tl.minimum(first + line // GROUP_LINES, last - 1)
        row = rows_of(tile, line % GROUP_LINES * 128 // HALF, num_outputs, BN, PAIRED)
        block = (row // TILE).to(tl.int64) * num_groups + group
        at = codes + block * (TILE * HALF) + (row % TILE) * HALF
        tl.inline_asm_elementwise(ASK, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
    gdc_wait()


@triton.jit
def codes_plain(words):
    """(steps, rows, g / 2) bytes -> (steps, rows, g) codes in fp32, in their order: what the assembly does."""
    nibbles = tl.join(words & 15, words >> 4).permute(0, 1, 3, 2)
    return nibbles.reshape(words.shape[0], words.shape[1], 2 * words.shape[2]).to(tl.float32) - 8.0


@triton.jit
def e4m3_plain(x):
    """e4m3 bytes as fp32."""
    exponent = ((x >> 3) & 15).to(tl.float32)
    mantissa = (x & 7).to(tl.float32)
    size = tl.where(exponent == 0, mantissa * 0.001953125, (8.0 + mantissa) * tl.exp2(exponent - 10.0))
    size = tl.where((x & 127) == 127, float("nan"), size)
    return tl.where(x > 127, -size, size)


@triton.jit
def codes_fp16(words, PLAIN: tl.constexpr):
    """(steps, rows, g / 2) bytes -> (steps, rows, g) fp16."""
    if PLAIN:
        return codes_plain(words)
    first, second = tl.inline_asm_elementwise(
        TO_FP16, "=r,=r,=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
    )
    return tl.join(first, second).permute(0, 1, 3, 2).reshape(words.shape[0], words.shape[1], 2 * words.shape[2])


@triton.jit
def inputs_fp16(x, PLAIN: tl.constexpr):
    """e4m3 bytes -> fp16."""
    if PLAIN:
        return e4m3_plain(x)
    return tl.inline_asm_elementwise(X_TO_FP16, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def codes_fp8(words, PLAIN: tl.constexpr):
    """(rows, g / 2) bytes -> (rows, g) e4m3, divided by FP8_UNIT."""
    if PLAIN:
        return codes_plain(words[None, :, :]).reshape(words.shape[0], 2 * words.shape[1]) / FP8_UNIT
    first, second = tl.inline_asm_elementwise(
        TO_FP8, "=r,=r,r", [words], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
    )
    whole = tl.join(first, second).permute(0, 2, 1).reshape(words.shape[0], 2 * words.shape[1])
    return whole.to(tl.float8e4nv, bitcast=True)


@triton.jit
def store_rows(acc, x_scale, bias, out, rows, tokens, num_tokens, num_outputs, HAS_BIAS: tl.constexpr):
    """Write sums (rows, tokens) as Y, times token scales, plus bias."""
    acc *= tl.load(x_scale + tokens, mask=tokens < num_tokens, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < num_outputs, other=0.0).to(tl.float32)[:, None]
    at = tokens.to(tl.int64)[None, :] * num_outputs + rows[:, None]
    ok = (rows < num_outputs)[:, None] & (tokens < num_tokens)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=ok)


@triton.jit
def store_active(acc, x_scale, bias, out, peaks, tile, rows, tokens, num_tokens, num_outputs, HAS_BIAS: tl.constexpr):
    """Write SiLU(gate) · up of sums (gates and then up's, tokens) as `quantize_kernel.swiglu_rows` rounds it.

    Args:
        out: (M, I).
        peaks: (M, tiles) int32, the bits of the largest magnitude in each tile.
    """
    there = tokens < num_tokens
    acc *= tl.load(x_scale + tokens, mask=there, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + rows).to(tl.float32)[:, None]
    kind: tl.constexpr = out.dtype.element_ty
    HALF_ROWS: tl.constexpr = acc.shape[0] // 2
    both = acc.to(kind).to(tl.float32).reshape(HALF_ROWS // 8, 2, 8, acc.shape[1]).permute(0, 2, 3, 1)
    gate, up = tl.split(both)
    active = (silu(gate, kind) * up).reshape(HALF_ROWS, acc.shape[1])
    row = tile * HALF_ROWS + tl.arange(0, HALF_ROWS)
    at = tokens.to(tl.int64)[None, :] * (num_outputs // 2) + row[:, None]
    tl.store(out + at, active.to(kind), mask=there[None, :])
    peak = tl.max(magnitude_bits(active.to(kind).to(tl.float32)), 0)
    tl.store(peaks + tokens * (num_outputs // acc.shape[0]) + tile, peak, mask=there)


@triton.jit
def finish(
    acc,
    x_scale,
    bias,
    partial,
    counter,
    out,
    peaks,
    tile,
    rows,
    tokens,
    split,
    num_tokens,
    num_outputs,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """Write Y, or what `store_active` makes of it (PAIRED); with splits of K this split's part.

    The program that comes last at a tile adds all parts, in one order.
    """
    if SPLITS == 1:
        if PAIRED:
            store_active(acc, x_scale, bias, out, peaks, tile, rows, tokens, num_tokens, num_outputs, HAS_BIAS)
        else:
            store_rows(acc, x_scale, bias, out, rows, tokens, num_tokens, num_outputs, HAS_BIAS)
    else:
        part = num_tokens * num_outputs
        at = tokens[None, :] * num_outputs + rows[:, None]
        ok = (rows < num_outputs)[:, None] & (tokens < num_tokens)[None, :]
        tl.store(partial + split * part + at, acc, mask=ok, cache_modifier=".cg")
        tl.debug_barrier()  # all warps have stored before the counter tells so
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros(acc.shape, tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(partial + other * part + at, mask=ok, other=0.0, cache_modifier=".cg")
            if PAIRED:
                store_active(total, x_scale, bias, out, peaks, tile, rows, tokens, num_tokens, num_outputs, HAS_BIAS)
            else:
                store_rows(total, x_scale, bias, out, rows, tokens, num_tokens, num_outputs, HAS_BIAS)
            tl.store(counter, 0)


@triton.jit(do_not_specialize=COUNTS[:3])
def few_tokens(
    x,
    x_scale,
    codes,
    scales,
    zeros,
    sums,
    bias,
    partial,
    counters,
    out,
    peaks,
    num_tokens,
    num_inputs,
    num_outputs,
    padded,
    num_groups,
    groups_each,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIRED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    LINES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Y for M <= BM, bound by reading codes. Grid (N padded / BN, SPLITS), or (N / BN, SPLITS) if PAIRED: then the
    outputs are gates and up's, and the result is what `store_active` makes of them.

    Each of STEP warps multiplies a group of its own, with fp16 operands (exact: codes and e4m3 numbers are fp16
    numbers); what they have summed is added at the end.

    Args:
        x: (M, K) e4m3 bytes.
        x_scale: (M,) fp32.
        codes, scales, zeros: of a `PackedInt4`.
        sums: (M, G) fp32, the sum of x over each group; read with HAS_ZEROS.
        bias: (N,), read with HAS_BIAS.
        partial: (SPLITS, M, N) fp32, scratch.
        counters: a tile each, int32, zero before and after.
        out: (M, N), or (M, N / 2) if PAIRED.
        peaks: of `store_active`.
        EVEN: K is a whole number of groups.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = rows_of(tile, tl.arange(0, BN), num_outputs, BN, PAIRED)
    tokens = tl.arange(0, BM)
    there = tokens < num_tokens
    lane = tl.arange(0, STEP)
    byte = tl.arange(0, HALF)
    k = tl.arange(0, 2 * HALF)
    first = split * groups_each
    last = tl.minimum(first + groups_each, num_groups)
    block = (rows // TILE).to(tl.int64) * num_groups * (TILE * HALF) + (rows % TILE) * HALF
    at = codes + block[None, :, None] + byte[None, None, :] + (lane * (TILE * HALF))[:, None, None]
    x_at = x + (tokens * num_inputs)[None, :, None] + k[None, None, :] + (lane * (2 * HALF))[:, None, None]
    row_at = rows[None, :] + (lane * padded)[:, None]
    sum_at = sums + (tokens * num_groups)[None, :] + lane[:, None]
    acc = tl.zeros([STEP, BN, BM], tl.float32)
    scale = tl.load(scales + first * padded + row_at, mask=(first + lane < last)[:, None], other=0.0)
    if not PLAIN:
        ask_and_wait(codes, tile, first, last, num_groups, num_outputs, BN, HALF, LINES, PAIRED)
        if BM <= EARLY_UP_TO:
            gdc_launch_dependents()
    for group in tl.range(first, last, STEP, num_stages=STAGES):
        inside = group + lane < last
        ahead = group + STEP
        next_scale = tl.load(scales + ahead * padded + row_at, mask=(ahead + lane < last)[:, None], other=0.0)
        words = tl.load(at + group * (TILE * HALF), mask=inside[:, None, None], other=0)
        ok = inside[:, None, None] & there[None, :, None]
        if not EVEN:
            ok = ok & (((group + lane) * (2 * HALF))[:, None, None] + k[None, None, :] < num_inputs)
        values = inputs_fp16(tl.load(x_at + group * (2 * HALF), mask=ok, other=0), PLAIN)
        product = tl.dot(codes_fp16(words, PLAIN), values.permute(0, 2, 1), input_precision="ieee")
        if HAS_ZEROS:
            zero = tl.load(zeros + group * padded + row_at, mask=inside[:, None], other=0.0).to(tl.float32)
            total = tl.load(sum_at + group, mask=inside[:, None] & there[None, :], other=0.0)
            product -= zero[:, :, None] * total[:, None, :]
        acc += product * scale.to(tl.float32)[:, :, None]
        scale = next_scale
    if not PLAIN and BM > EARLY_UP_TO:
        gdc_launch_dependents()
    total = tl.sum(acc, 0)
    finish(
        total, x_scale, bias, partial, counters + tile, out, peaks, tile, rows, tokens, split, num_tokens, num_outputs,
        HAS_BIAS, SPLITS, PAIRED,
    )  # fmt: skip


@triton.jit
def bytes_bf16(words, PLAIN: tl.constexpr):
    """int8 -> bf16."""
    if PLAIN:
        return words.to(tl.float32)
    return tl.inline_asm_elementwise(BYTES_TO_BF16, "=r,=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit(do_not_specialize=["num_tokens"])
def few_tokens_int8(
    x,
    codes,
    scales,
    out,
    num_tokens,
    num_inputs,
    num_outputs,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Y (M, N) for M <= BM, inputs of 16 bits and a weight in INT8, bound by reading it. Grid (N / BN,).

    As in `few_tokens`, each of STEP warps multiplies BK inputs of its own; bf16 holds codes as they are.

    Args:
        x: (M, K) bf16.
        codes: (N, K) int8, and scales (N,).
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.arange(0, BM)
    inside = rows < num_outputs
    k = (tl.arange(0, STEP) * BK)[:, None] + tl.arange(0, BK)[None, :]
    at = codes + rows.to(tl.int64)[None, :, None] * num_inputs + k[:, None, :]
    x_at = x + (tokens * num_inputs)[None, :, None] + k[:, None, :]
    acc = tl.zeros([STEP, BN, BM], tl.float32)
    scale = tl.load(scales + rows, mask=inside, other=0.0).to(tl.float32)
    wait_for_others(PLAIN)
    for start in tl.range(0, num_inputs, STEP * BK, num_stages=STAGES):
        there = (start + k < num_inputs)[:, None, :]
        words = tl.load(at + start, mask=there & inside[None, :, None], other=0)
        values = tl.load(x_at + start, mask=there & (tokens < num_tokens)[None, :, None], other=0.0)
        if PLAIN:
            values = values.to(tl.float32)
        acc = tl.dot(bytes_bf16(words, PLAIN), values.permute(0, 2, 1), acc, input_precision="ieee")
    total = tl.sum(acc, 0) * scale[:, None]
    ok = inside[:, None] & (tokens < num_tokens)[None, :]
    tl.store(out + tokens[None, :] * num_outputs + rows[:, None], total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def many_part(
    x,
    start,
    row,
    k,
    sums,
    group,
    num_inputs,
    num_groups,
    operand,
    zero,
    scale,
    acc,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Add one group's product with some tokens to their sums."""
    if DESCRIPTOR:
        values = x.load([start, group * GROUP])
    else:
        at = x + row.to(tl.int64)[:, None] * num_inputs + (group * GROUP + k)[None, :]
        if EVEN:
            values = tl.load(at)
        else:
            values = tl.load(at, mask=(group * GROUP + k < num_inputs)[None, :], other=0.0)
    if PLAIN:
        values = e4m3_plain(values.to(tl.uint8, bitcast=True))
    product = tl.dot(operand, values.T, input_precision="ieee")
    if HAS_ZEROS:
        total = tl.load(sums + row * num_groups + group)
        product -= zero[:, None] * (total / FP8_UNIT)[None, :]
    return acc + product * scale[:, None]


@triton.jit(do_not_specialize=COUNTS)
def many_tokens(
    x,
    x_scale,
    codes,
    scales,
    zeros,
    sums,
    bias,
    partial,
    counters,
    out,
    peaks,
    num_tokens,
    num_inputs,
    num_outputs,
    padded,
    num_groups,
    groups_each,
    token_blocks,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIRED: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
    TOGETHER: tl.constexpr,
    LINES: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Y on FP8 matrix units. Grid (N padded / BN · M / (PARTS · BM), SPLITS); arguments as for `few_tokens`.

    Two parts of BM tokens share the operand that codes became; what they need of registers is one product at a time.
    TOGETHER blocks of tokens run next to each other, so that they find a weight's codes in the cache.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tiles = tl.num_programs(0) // token_blocks
    start = pid // (TOGETHER * tiles) * TOGETHER
    width = tl.minimum(token_blocks - start, TOGETHER)
    inner = pid % (TOGETHER * tiles)
    tile = inner // width
    first_token = (start + inner % width) * (BM * PARTS)
    tokens = first_token + tl.arange(0, BM)
    rows = rows_of(tile, tl.arange(0, BN), num_outputs, BN, PAIRED)
    byte = tl.arange(0, HALF)
    k = tl.arange(0, 2 * HALF)
    first = split * groups_each
    last = tl.minimum(first + groups_each, num_groups)
    block = (rows // TILE).to(tl.int64) * num_groups * (TILE * HALF) + (rows % TILE) * HALF
    at = codes + block[:, None] + byte[None, :]
    row = tl.minimum(tokens, num_tokens - 1)  # tokens that are not there repeat the last: no masks
    row1 = tl.minimum(tokens + BM, num_tokens - 1)
    acc = tl.zeros([BN, BM], tl.float32)
    acc1 = acc
    scale = tl.load(scales + first * padded + rows)
    if not PLAIN:
        ask_and_wait(codes, tile, first, last, num_groups, num_outputs, BN, HALF, LINES, PAIRED)
    for group in tl.range(first, last, num_stages=STAGES):
        next_scale = tl.load(scales + tl.minimum(group + 1, last - 1) * padded + rows)
        operand = codes_fp8(tl.load(at + group * (TILE * HALF)), PLAIN)
        wide = scale.to(tl.float32) * FP8_UNIT
        zero = wide
        if HAS_ZEROS:
            zero = tl.load(zeros + group * padded + rows).to(tl.float32)
        acc = many_part(
            x, first_token, row, k, sums, group, num_inputs, num_groups, operand, zero, wide, acc, 2 * HALF, HAS_ZEROS,
            EVEN, DESCRIPTOR, PLAIN,
        )  # fmt: skip
        if PARTS == 2:
            acc1 = many_part(
                x, first_token + BM, row1, k, sums, group, num_inputs, num_groups, operand, zero, wide, acc1, 2 * HALF,
                HAS_ZEROS, EVEN, DESCRIPTOR, PLAIN,
            )  # fmt: skip
        scale = next_scale
    if not PLAIN:
        gdc_launch_dependents()
    counter = counters + pid * PARTS
    finish(
        acc, x_scale, bias, partial, counter, out, peaks, tile, rows, tokens, split, num_tokens, num_outputs, HAS_BIAS,
        SPLITS, PAIRED,
    )  # fmt: skip
    if PARTS == 2:
        finish(
            acc1, x_scale, bias, partial, counter + 1, out, peaks, tile, rows, tokens + BM, split, num_tokens,
            num_outputs, HAS_BIAS, SPLITS, PAIRED,
        )  # fmt: skip


@triton.jit
def group_sums(x, sums, num_inputs, num_groups, GROUP: tl.constexpr, BG: tl.constexpr, PLAIN: tl.constexpr):
    """sums (M, G) fp32: e4m3 bytes x (M, K) summed over groups. Grid (M, G / BG)."""
    wait_for_others(PLAIN)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BG + tl.arange(0, BG)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = e4m3_plain(tl.load(x + token * num_inputs + k, mask=k < num_inputs, other=0))
    tl.store(sums + token * num_groups + group, tl.sum(values, 1), mask=group < num_groups)


@triton.jit
def expand_rows(
    codes,
    scales,
    zeros,
    out,
    out_scale,
    num_inputs,
    num_outputs,
    padded,
    num_groups,
    HAS_ZEROS: tl.constexpr,
    HALF: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The weight in e4m3, (N, K), with a scale a row, (N,): (code - zero) · scale, rounded.

    Grid (N padded / BN, G / BG). A row's scale is that of its largest group, so that no product is above 448.
    """
    wait_for_others(PLAIN)
    tile = tl.program_id(0)
    rows = tile * BN + tl.arange(0, BN)
    largest = tl.zeros([BN], tl.float32)
    for start in range(0, num_groups, 16):
        every = start + tl.arange(0, 16)
        block = tl.load(scales + every[:, None] * padded + rows[None, :], mask=(every < num_groups)[:, None], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(block.to(tl.float32)), 0))
    # A code is at most 8, and 16 from its zero; a power of two keeps the quotient exact.
    unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(largest, 1e-36) * (16.0 if HAS_ZEROS else 8.0) / 448.0)))
    k = tl.arange(0, 2 * HALF)
    inside = rows < num_outputs
    for sub in tl.static_range(BG):
        group = tl.minimum(tl.program_id(1) * BG + sub, num_groups - 1)
        block = (rows // TILE).to(tl.int64) * num_groups * (TILE * HALF) + group * (TILE * HALF) + (rows % TILE) * HALF
        words = tl.load(codes + block[None, :, None] + tl.arange(0, HALF)[None, None, :])
        values = codes_fp16(words, PLAIN).reshape(BN, 2 * HALF).to(tl.float32)
        if HAS_ZEROS:
            values -= tl.load(zeros + group * padded + rows).to(tl.float32)[:, None]
        values *= (tl.load(scales + group * padded + rows).to(tl.float32) / unit)[:, None]
        at = rows.to(tl.int64)[:, None] * num_inputs + (group * (2 * HALF) + k)[None, :]
        ok = inside[:, None] & (group * (2 * HALF) + k < num_inputs)[None, :]
        tl.store(out + at, e4m3_bits(values, PLAIN), mask=ok)
    tl.store(out_scale + rows, unit, mask=inside)  # all programs of a row store the same
