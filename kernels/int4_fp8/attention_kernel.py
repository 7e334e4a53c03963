"""Triton kernels of attention over the INT4 cache: preparing queries, keys and values, encoding them, and attending.

Letters: B batch, H query heads, G key/value heads, T tokens, D head dim, R slots of the ring of recent keys. A row of D
codes is read as D/4 words of 16 bits. Word i holds elements 2i, 2i + D/2, 2i + 1 and 2i + 1 + D/2, lowest four bits
first, as `reference.quantize_kv` lays bytes out. A nibble u in the lowest bits of an fp16 number is the subnormal
u · 2^-24, in the next four u · 2^-20: masks turn words into operands of products, and scales make up for the powers.

Positions are read from device memory, so that a CUDA graph of a step can be replayed.

Kernels of a step start before the one before them has ended (programmatic dependent launch). What they read before they
wait for it is at least one more kernel older: the number of tokens, constants, and what they only ask for.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:
    raise ImportError("Triton is not installed") from error

LOW, HIGH = tl.constexpr(2.0**24), tl.constexpr(2.0**20)  # undo the two powers
TINY = tl.constexpr(2.0**-126)
ASK = tl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")  # for the line of 128 bytes at an address


@triton.jit
def ask(at, COMPILED: tl.constexpr):
    """Have lines brought to the L2 cache; changes nothing."""
    if COMPILED:
        tl.inline_asm_elementwise(ASK, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_last(COMPILED: tl.constexpr):
    """Return when the kernel before has ended, and let the next one start."""
    if COMPILED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def round_to_e4m3(x):
    """The e4m3 number nearest to x (fp32), ties to even, saturating at ±448; a NaN stays one."""
    small = (x + 24576.0) - 24576.0  # 1.5 · 2^14: what is left of fp32's mantissa ends at 2^-9
    bits = x.to(tl.int32, bitcast=True)
    wide = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(x) < 0.015625, small, wide)
    rounded = tl.where(rounded > 448.0, 448.0, tl.where(rounded < -448.0, -448.0, rounded))
    return tl.where(x != x, x, rounded)


@triton.jit
def nearest(x):
    """x (fp32, |x| < 2^22) rounded to an integer, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def bf16_of(x):
    """fp32 rounded to what bf16 holds, ties to even (as a cast, but for the interpreter's); a NaN stays one."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, rounded)


@triton.jit
def operand(x, COMPILED: tl.constexpr):
    """x as bf16 for a product; the interpreter, which multiplies bf16 wrongly, gets the same numbers as fp32."""
    return x.to(tl.bfloat16) if COMPILED else bf16_of(x.to(tl.float32))


@triton.jit
def unpack(words, COMPILED: tl.constexpr):
    """Four fp16 tensors of the nibbles of 16-bit words: u · 2^-24, u · 2^-20, u · 2^-24, u · 2^-20."""
    if COMPILED:  # written out, since the compiler would mask each 16 bits on their own
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 $0, $4, 0x000F000F; and.b32 $1, $4, 0x00F000F0; shr.u32 t, $4, 8; "
            "and.b32 $2, t, 0x000F000F; and.b32 $3, t, 0x00F000F0; }",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        upper = words >> 8
        a = (words & 0xF).to(tl.float16, bitcast=True)
        b = (words & 0xF0).to(tl.float16, bitcast=True)
        c = (upper & 0xF).to(tl.float16, bitcast=True)
        d = (upper & 0xF0).to(tl.float16, bitcast=True)
    return a, b, c, d


@triton.jit
def scale_and_zero(meta):
    """A row's scale and zero point + 8, fp32: two bf16 numbers in one word."""
    return (meta << 16).to(tl.float32, bitcast=True), (meta & -65536).to(tl.float32, bitcast=True)


@triton.jit
def normalised(x, y, weight, columns, ok, eps, HALF: tl.constexpr):
    """RMSNorm over both halves of heads, with the roundings of transformers' modules."""
    scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / (2 * HALF) + eps)[:, None]
    first = tl.load(weight + columns).to(tl.float32)[None, :]
    second = tl.load(weight + HALF + columns).to(tl.float32)[None, :]
    return bf16_of(bf16_of(x * scale) * first), bf16_of(bf16_of(y * scale) * second)


@triton.jit(do_not_specialize=["num_tokens", "batch_size"])
def prepare(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    key_mean,
    key_scale,
    rotation,
    length,
    start,
    q_out,
    q_scale,
    k_out,
    v_out,
    recent_k,
    recent_v,
    num_tokens,
    batch_size,
    heads,
    kv_heads,
    qkv_stride,
    eps,
    rotation_scale,
    NORM: tl.constexpr,
    CENTER: tl.constexpr,
    SCALE: tl.constexpr,
    ROTATE: tl.constexpr,
    FP8: tl.constexpr,
    NEW: tl.constexpr,
    RING: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """RoPE, and what the cache wants of keys and queries; queries to FP8; the latest keys and values into the ring.

    A program has ROWS pairs (token, head) of queries (program_id(1) = 0), keys (1) or values (2).

    Args:
        qkv: (B·T, (H + 2G)·DIM), rows `qkv_stride` apart.
        cos, sin: (positions, DIM / 2).
        q_norm, k_norm: (DIM,) gains of RMSNorm on heads (NORM).
        key_mean, key_scale: (G, DIM) (CENTER, SCALE).
        rotation: (DIM, DIM) of ±1, times `rotation_scale` (ROTATE).
        length: (1,) int32, tokens in the cache before these.
        start: (B,) int32, the first real token of each row: left padding comes before it.
        q_out: (B·T, H, DIM) fp16, multiples of q_scale (B·T, H) fp32; e4m3 numbers (FP8).
        k_out, v_out: (B, G, T, DIM) (NEW).
        recent_k, recent_v: (B, G, RING, DIM), token t at t mod RING.
    """
    kind = tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    group = tl.where(kind == 0, heads, kv_heads)
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = pair // group
    head = pair % group
    ok = row < num_tokens * batch_size
    if tl.program_id(0) * ROWS < num_tokens * batch_size * group:
        batch = row // num_tokens
        token = row % num_tokens
        columns = tl.arange(0, HALF)
        wide = tl.arange(0, DIM)
        column = tl.where(kind == 0, head, tl.where(kind == 1, heads + head, heads + kv_heads + head)) * DIM
        source = qkv + row.to(tl.int64)[:, None] * qkv_stride + column[:, None]
        place = tl.load(length) + token  # in the cache
        kept = ok & (token >= num_tokens - RING)
        in_ring = ((batch * kv_heads + head).to(tl.int64) * RING + place % RING)[:, None] * DIM + wide[None, :]
        in_new = ((batch * kv_heads + head).to(tl.int64) * num_tokens + token)[:, None] * DIM + wide[None, :]
        if kind == 2:
            wait_for_last(COMPILED)
            value = tl.load(source + wide[None, :], mask=ok[:, None], other=0.0)
            tl.store(recent_v + in_ring, value, mask=kept[:, None])
            if NEW:
                tl.store(v_out + in_new, value, mask=ok[:, None])
        else:
            upper = tl.load(rotation + columns[:, None] * DIM + wide[None, :])
            lower = tl.load(rotation + (HALF + columns[:, None]) * DIM + wide[None, :])
            shared = head // (heads // kv_heads) if kind == 0 else head
            at = shared[:, None] * DIM + columns[None, :]
            if CENTER:
                mean_x, mean_y = tl.load(key_mean + at), tl.load(key_mean + HALF + at)
            if SCALE:
                first, second = tl.load(key_scale + at).to(tl.float32), tl.load(key_scale + HALF + at).to(tl.float32)
            position = tl.maximum(place - tl.load(start + batch, mask=ok, other=0), 0)
            angle = position.to(tl.int64)[:, None] * HALF + columns[None, :]
            c = tl.load(cos + angle, mask=ok[:, None], other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=ok[:, None], other=0.0).to(tl.float32)
            wait_for_last(COMPILED)
            x = tl.load(source + columns[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
            y = tl.load(source + HALF + columns[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
            if NORM:
                x, y = normalised(x, y, q_norm if kind == 0 else k_norm, columns, ok, eps, HALF)
            # each product is rounded, as transformers' are
            x, y = bf16_of(bf16_of(x * c) - bf16_of(y * s)), bf16_of(bf16_of(y * c) + bf16_of(x * s))
            if CENTER:
                if kind == 1:
                    x, y = bf16_of(x - mean_x.to(tl.float32)), bf16_of(y - mean_y.to(tl.float32))
            if SCALE:
                if kind == 0:
                    x, y = bf16_of(tl.div_rn(x, first)), bf16_of(tl.div_rn(y, second))
                else:
                    x, y = bf16_of(x * first), bf16_of(y * second)
            # without a rotation this is a product with the identity, which is exact: it joins the halves
            z = tl.dot(operand(x, COMPILED), operand(upper, COMPILED))
            z = tl.dot(operand(y, COMPILED), operand(lower, COMPILED), z)
            if ROTATE:
                z = bf16_of(z * rotation_scale)
            if kind == 0:
                largest = tl.max(tl.abs(z), 1)
                if FP8:
                    scale = tl.where(largest == 0, 1.0, tl.maximum(tl.div_rn(largest, 448.0), TINY))
                    code = round_to_e4m3(tl.div_rn(z, scale[:, None]))
                else:  # a power of two, so that nothing is rounded
                    exponent = tl.maximum(largest, TINY).to(tl.int32, bitcast=True) & 0x7F800000
                    scale = exponent.to(tl.float32, bitcast=True)
                    code = z / scale[:, None]
                where = pair.to(tl.int64)
                tl.store(q_out + where[:, None] * DIM + wide[None, :], code.to(tl.float16), mask=ok[:, None])
                tl.store(q_scale + where, scale, mask=ok)
            else:
                key = bf16_of(z).to(tl.bfloat16)
                tl.store(recent_k + in_ring, key, mask=kept[:, None])
                if NEW:
                    tl.store(k_out + in_new, key, mask=ok[:, None])


@triton.jit
def range_of(low, high, nothing, SYMMETRIC: tl.constexpr):
    """Scales and zero points of rows from `low` to `high`; `nothing` is NaN of a row that has one, or an infinity."""
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(high, -low), 7.5)
    else:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        scale = tl.div_rn(high - low, 15.0)
    scale = bf16_of(scale + nothing)
    scale = tl.where(scale == 0, TINY, scale)
    zero = tl.zeros_like(scale)
    if not SYMMETRIC:
        zero = tl.minimum(tl.maximum(nearest(-8.0 - tl.div_rn(low, scale)), -8.0), 7.0)
    return scale, zero


@triton.jit
def code_of(value):
    """The code of a number in units of its scale, -8 ... 7 in fp32."""
    return tl.minimum(tl.maximum(nearest(value), -8.0), 7.0)


@triton.jit
def word_of(scale, zero):
    """A row's scale and zero point, which is -8 ... 7, as `scale_and_zero` reads them."""
    return ((scale.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | ((zero + 8.0).to(tl.int32, bitcast=True) & -65536)


@triton.jit(do_not_specialize=["num_tokens", "kv_rows", "slots"])
def encode(
    x,
    length,
    order,
    factor,
    codes,
    meta,
    errors,
    unpacked,
    whole_keys,
    whole_values,
    num_tokens,
    kv_rows,
    kv_heads,
    slots,
    capacity,
    SYMMETRIC: tl.constexpr,
    SHAPE: tl.constexpr,
    RING: tl.constexpr,
    WHOLE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """INT4 codes of tokens `length` to `length + num_tokens - 1`; a program has ROWS tokens of a head's keys or values.
    Grid (P · T / ROWS,): a second axis ends at 65,535, which 32 layers of 8 heads reach with 128 rows.

    Noise shaping goes by blocks of BLOCK channels: within a block, error after error; what earlier blocks leave to a
    later one is a product. Tokens are columns there, so that a thread has all channels of a token.

    Args:
        x: (P, slots, DIM) bf16, P = layers · 2 · B · G; a ring that has token t at t mod slots (RING), or new tokens.
        length: (1,) int32.
        order: (layers · 2 · G, DIM) int32, and factor (layers · 2 · G, DIM, DIM), of `shaping_factor` (SHAPE).
        codes: (P, capacity, DIM / 2) uint8.
        meta: (P, capacity) int32, scale and zero point + 8, two bf16 numbers.
        errors: (programs, DIM, ROWS) fp32, and unpacked, the same in uint8: room to work in (SHAPE).
        whole_keys, whole_values: (B, G, T, DIM), of one layer: code - zero point, and that times the scale (WHOLE).
        kv_rows: B·G.
    """
    blocks = tl.cdiv(num_tokens, ROWS)
    p = (tl.program_id(0) // blocks).to(tl.int64)
    HALF: tl.constexpr = DIM // 2
    now = tl.load(length)
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    ok = token < num_tokens
    slot = (now + token) % slots if RING else token
    source = x + (p * slots + slot)[:, None] * DIM
    half = tl.arange(0, HALF)[None, :]
    wait_for_last(COMPILED)
    first = tl.load(source + half, mask=ok[:, None], other=0.0).to(tl.float32)
    second = tl.load(source + HALF + half, mask=ok[:, None], other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(first, 1), tl.min(second, 1))
    high = tl.maximum(tl.max(first, 1), tl.max(second, 1))
    scale, zero = range_of(low, high, tl.sum(first * 0.0, 1) + tl.sum(second * 0.0, 1), SYMMETRIC)
    if SHAPE:
        which = (p // kv_rows) * kv_heads + p % kv_heads
        order += which * DIM
        factor += which * DIM * DIM
        column = tl.arange(0, ROWS)
        room = tl.program_id(0).to(tl.int64) * (DIM * ROWS) + column
        mine = x + (p * slots + slot) * DIM
        inner = tl.arange(0, BLOCK)
        for block in range(DIM // BLOCK):
            spreading = tl.zeros([BLOCK, ROWS], tl.float32)
            for before in range(block):
                error = tl.load(errors + room[None, :] + (before * BLOCK + inner)[:, None] * ROWS)
                spread = tl.load(factor + (before * BLOCK + inner)[None, :] * DIM + (block * BLOCK + inner)[:, None])
                spreading = tl.dot(spread.to(tl.float32), error, spreading, input_precision="tf32x3")
            tl.store(errors + room[None, :] + (block * BLOCK + inner)[:, None] * ROWS, spreading)
            tl.debug_barrier()  # what was stored is read by other threads
            lost, found = (), ()
            for step in tl.static_range(BLOCK):
                at = block * BLOCK + step
                channel = tl.load(order + at)
                value = tl.load(mine + channel, mask=ok, other=0.0).to(tl.float32)
                value = tl.div_rn(value, scale) + zero - tl.load(errors + room + at * ROWS)
                for before in tl.static_range(step):
                    value -= lost[before] * tl.load(factor + (block * BLOCK + before) * DIM + at).to(tl.float32)
                code = code_of(value)
                lost = lost + (value - code,)  # type: ignore[assignment]  # noqa: RUF005 (Triton has no stars)
                found = found + (code,)  # type: ignore[assignment]  # noqa: RUF005
            for step in tl.static_range(BLOCK):  # not before: loads must not wait for stores that they might read
                at = block * BLOCK + step
                tl.store(errors + room + at * ROWS, lost[step])
                byte = (found[step] + 8.0).to(tl.int32).to(tl.uint8)  # type: ignore[attr-defined]
                tl.store(unpacked + room + tl.load(order + at) * ROWS, byte)
            tl.debug_barrier()
        channel = tl.arange(0, HALF)[:, None]
        lower = tl.trans(tl.load(unpacked + room[None, :] + channel * ROWS)).to(tl.int32)
        upper = tl.trans(tl.load(unpacked + room[None, :] + (HALF + channel) * ROWS)).to(tl.int32)
    else:
        lower = (code_of(tl.div_rn(first, scale[:, None]) + zero[:, None]) + 8.0).to(tl.int32)
        upper = (code_of(tl.div_rn(second, scale[:, None]) + zero[:, None]) + 8.0).to(tl.int32)
    place = p * capacity + now + token
    tl.store(codes + place[:, None] * HALF + half, (lower | (upper << 4)).to(tl.uint8), mask=ok[:, None])
    tl.store(meta + place, word_of(scale, zero), mask=ok)
    if WHOLE:
        zero += 8.0
        at = ((p % kv_rows) * num_tokens + token)[:, None] * DIM + half
        x0, x1 = lower.to(tl.float32) - zero[:, None], upper.to(tl.float32) - zero[:, None]
        if p < kv_rows:
            tl.store(whole_keys + at, x0.to(whole_keys.dtype.element_ty), mask=ok[:, None])
            tl.store(whole_keys + HALF + at, x1.to(whole_keys.dtype.element_ty), mask=ok[:, None])
        else:
            tl.store(whole_values + at, bf16_of(x0 * scale[:, None]).to(tl.bfloat16), mask=ok[:, None])
            tl.store(whole_values + HALF + at, bf16_of(x1 * scale[:, None]).to(tl.bfloat16), mask=ok[:, None])


@triton.jit(do_not_specialize=["kv_rows", "slots"])
def encode_step(
    x,
    length,
    order,
    factor,
    codes,
    meta,
    unpacked,
    kv_rows,
    kv_heads,
    slots,
    capacity,
    SYMMETRIC: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """`encode` with noise shaping of the one token at place `length` of rings. Grid (P,), one warp each.

    Channels lie across the warp, in `order`: who has the next one tells its error to all others, which take their
    share at once. An error travels as an integer, whose sum over a warp is a single instruction.

    Args:
        unpacked: (P, DIM) uint8, room to work in.
        BLOCK: channels whose factors are asked for at a time.
    """
    p = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = DIM // 2
    which = (p // kv_rows) * kv_heads + p % kv_heads
    index = tl.arange(0, DIM)
    now = tl.load(length)
    channel = tl.load(order + which * DIM + index)
    factor += which * DIM * DIM
    wait_for_last(COMPILED)
    x += (p * slots + now % slots) * DIM
    value = tl.load(x + channel).to(tl.float32)
    scale, zero = range_of(tl.min(value, 0), tl.max(value, 0), tl.sum(value * 0.0, 0), SYMMETRIC)
    value = tl.div_rn(value, scale) + zero
    for block in range(DIM // BLOCK):
        later = index >= block * BLOCK
        for step in tl.static_range(BLOCK):
            at = block * BLOCK + step
            share = tl.load(factor + at * DIM + index, mask=later, other=0.0).to(tl.float32)
            lost = (value - code_of(value)).to(tl.int32, bitcast=True)
            error = tl.sum(tl.where(index == at, lost, 0), 0).to(tl.float32, bitcast=True)
            value = tl.where(index > at, value - error * share, value)
    room = unpacked + p * DIM
    tl.store(room + channel, (code_of(value) + 8.0).to(tl.int32).to(tl.uint8))
    tl.debug_barrier()  # what was stored is read by other threads
    half = tl.arange(0, HALF)
    place = p * capacity + now
    tl.store(codes + place * HALF + half, tl.load(room + half) | (tl.load(room + HALF + half) << 4))
    tl.store(meta + place, word_of(scale, zero))


@triton.jit
def softmax_step(s, highest, total):
    """One block of the running softmax, in powers of two: p, the new maximum and total, and what the old ones count."""
    new = tl.maximum(highest, tl.max(s, 1))
    base = tl.where(new == -float("inf"), 0.0, new)  # of rows that have seen nothing
    p = tl.exp2(s - base[:, None])
    kept = tl.exp2(highest - base)
    return p, new, total * kept + tl.sum(p, 1), kept


@triton.jit(do_not_specialize=["batch_size", "sliding"])
def decode(
    q,
    q_scale,
    codes,
    meta,
    recent,
    length,
    start,
    parts,
    stats,
    arrivals,
    out,
    capacity,
    batch_size,
    kv_heads,
    scale,
    sliding,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    RING: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    NEAR: tl.constexpr,
    PADDED: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """One query token of each row: the latest WINDOW keys from the ring, those before them from their codes.

    Programs 0 to SPLITS - 1 share the codes and SPLITS to SPLITS + NEAR - 1 the ring; the QUERIES heads of a key/value
    head are rows of one product. Who arrives last at a head joins the parts, always in the same order.

    Args:
        q, q_scale: of `prepare`, for one token a row.
        codes: (2, B, G, capacity, DIM / 4) int16, keys and values, and meta (2, B, G, capacity) int32, of `encode`.
        recent: (2, B, G, RING, DIM), the current token in it.
        length: (1,) int32, tokens before this one; start: (B,) int32.
        parts: (B, G, SPLITS + NEAR, QUERIES, DIM) fp32, and stats (B, G, 2, SPLITS + NEAR, QUERIES): room to work in.
        arrivals: (B, G) int32, zeros before and after.
        out: (B, H, DIM).
        scale: of the scores, times log2(e).
        sliding: keys that a query may see, its own included.
        PADDED, SLOTS, CHUNK: of `join_parts`.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    ALL: tl.constexpr = SPLITS + NEAR
    QUARTER: tl.constexpr = DIM // 4
    pair = batch * kv_heads + head
    pairs = batch_size.to(tl.int64) * kv_heads
    row = tl.arange(0, 16)  # rows of a tile of the tensor cores; QUERIES of them are real
    real = row < QUERIES
    wide = tl.arange(0, DIM)
    quarter = tl.arange(0, QUARTER)
    now = tl.load(length)
    seen_from = tl.maximum(tl.load(start + batch), now + 1 - sliding)
    q += (pair * QUERIES + row)[:, None] * DIM
    end = tl.maximum(now + 1 - WINDOW, 0)  # tokens before it are read as codes, from `first_block` on
    first_block = tl.minimum(seen_from, end) // BT
    each = tl.cdiv(tl.cdiv(end, BT) - first_block, max(SPLITS, 1))
    low = first_block + split * each
    high = tl.minimum(low + each, tl.cdiv(end, BT))
    if split < SPLITS:
        lines = (pair * capacity + low * BT) * (DIM // 2) + tl.arange(0, BT * DIM // 256) * 128
        if low < high:
            ask(codes.to(tl.pointer_type(tl.uint8)) + lines, COMPILED)
            ask(codes.to(tl.pointer_type(tl.uint8)) + pairs * capacity * (DIM // 2) + lines, COMPILED)
            few = pair * capacity + low * BT + tl.arange(0, BT // 32) * 32
            ask(meta + few, COMPILED)
            ask(meta + pairs * capacity + few, COMPILED)
    wait_for_last(COMPILED)
    row_scale = tl.load(q_scale + pair * QUERIES + row, mask=real, other=0.0) * scale
    highest = tl.full([16], -float("inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    part = parts + ((pair * ALL + split) * QUERIES + row)[:, None] * DIM
    if split < SPLITS:
        q0 = tl.load(q + 2 * quarter[None, :], mask=real[:, None], other=0.0)
        q1 = tl.load(q + DIM // 2 + 2 * quarter[None, :], mask=real[:, None], other=0.0)
        q2 = tl.load(q + 1 + 2 * quarter[None, :], mask=real[:, None], other=0.0)
        q3 = tl.load(q + DIM // 2 + 1 + 2 * quarter[None, :], mask=real[:, None], other=0.0)
        q_sum = tl.sum(q0.to(tl.float32) + q1.to(tl.float32) + q2.to(tl.float32) + q3.to(tl.float32), 1) / LOW
        q1 = (q1.to(tl.float32) * (HIGH / LOW)).to(tl.float16)  # so that all four products count alike
        q3 = (q3.to(tl.float32) * (HIGH / LOW)).to(tl.float16)
        row_scale = row_scale * LOW
        zeros = tl.zeros([16], tl.float32)
        o0 = tl.zeros([16, QUARTER], tl.float32)
        o1 = tl.zeros([16, QUARTER], tl.float32)
        o2 = tl.zeros([16, QUARTER], tl.float32)
        o3 = tl.zeros([16, QUARTER], tl.float32)
        base = pair * capacity
        values = pairs * capacity  # from keys to values
        for block in tl.range(low, high, num_stages=STAGES):
            token = block * BT + tl.arange(0, BT)
            ok = (token < end) & (token >= seen_from)
            at = base + token
            words = tl.load(codes + at[:, None] * QUARTER + quarter[None, :])
            key_scale, key_zero = scale_and_zero(tl.load(meta + at))
            value_words = tl.load(codes + (values + at)[:, None] * QUARTER + quarter[None, :])
            value_scale, value_zero = scale_and_zero(tl.load(meta + values + at))
            u0, u1, u2, u3 = unpack(words, COMPILED)
            s = tl.dot(q0, tl.trans(u0))
            s = tl.dot(q1, tl.trans(u1), s)
            s = tl.dot(q2, tl.trans(u2), s)
            s = tl.dot(q3, tl.trans(u3), s)
            s = (s - q_sum[:, None] * key_zero[None, :]) * (row_scale[:, None] * key_scale[None, :])
            p, highest, total, kept = softmax_step(tl.where(ok[None, :], s, -float("inf")), highest, total)
            # values' scales go to the weights, which fp16 holds once they are counted in the block's largest
            value_scale = tl.where(ok, value_scale, 0.0)
            largest = tl.maximum(tl.max(value_scale, 0), TINY)
            weight = (p * (value_scale / largest)[None, :]).to(tl.float16)
            zeros = zeros * kept + largest * tl.sum(weight.to(tl.float32) * value_zero[None, :], 1)
            u0, u1, u2, u3 = unpack(value_words, COMPILED)
            o0 = o0 * kept[:, None] + largest * tl.dot(weight, u0)
            o1 = o1 * kept[:, None] + largest * tl.dot(weight, u1)
            o2 = o2 * kept[:, None] + largest * tl.dot(weight, u2)
            o3 = o3 * kept[:, None] + largest * tl.dot(weight, u3)
        if high > low:
            tl.store(part + 2 * quarter[None, :], o0 * LOW - zeros[:, None], mask=real[:, None])
            tl.store(part + DIM // 2 + 2 * quarter[None, :], o1 * HIGH - zeros[:, None], mask=real[:, None])
            tl.store(part + 1 + 2 * quarter[None, :], o2 * LOW - zeros[:, None], mask=real[:, None])
            tl.store(part + DIM // 2 + 1 + 2 * quarter[None, :], o3 * HIGH - zeros[:, None], mask=real[:, None])
    else:
        BN: tl.constexpr = min(BT, 64)
        blocks = tl.cdiv(tl.minimum(RING, now + 1), BN)
        each = tl.cdiv(blocks, max(NEAR, 1))
        low = (split - SPLITS) * each
        query = operand(tl.load(q + wide[None, :], mask=real[:, None], other=0.0), COMPILED)
        o = tl.zeros([16, DIM], tl.float32)
        for block in tl.range(low, tl.minimum(low + each, blocks), num_stages=1):
            slot = block * BN + tl.arange(0, BN)
            token = now - (now - slot + RING) % RING  # the latest that lies in this slot
            ok = (slot < RING) & (token >= seen_from)
            at = recent + (pair * RING + slot)[:, None] * DIM + wide[None, :]
            key = tl.load(at, mask=ok[:, None], other=0.0)
            value = tl.load(at + pairs * RING * DIM, mask=ok[:, None], other=0.0)
            s = tl.dot(query, tl.trans(operand(key, COMPILED))) * row_scale[:, None]
            p, highest, total, kept = softmax_step(tl.where(ok[None, :], s, -float("inf")), highest, total)
            o = o * kept[:, None] + tl.dot(operand(p, COMPILED), operand(value, COMPILED))
        tl.store(part + wide[None, :], o, mask=real[:, None])
    stat = stats + pair * (2 * ALL * QUERIES) + split * QUERIES + row
    tl.store(stat, highest, mask=real)
    tl.store(stat + ALL * QUERIES, total, mask=real)
    tl.debug_barrier()  # all threads have stored before one says so
    if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == ALL - 1:
        tl.store(arrivals + pair, 0)
        join_parts(parts, stats, out, pair, QUERIES, PADDED, DIM, ALL, SLOTS, CHUNK)


@triton.jit
def join_parts(
    parts,
    stats,
    out,
    pair,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,
    DIM: tl.constexpr,
    ALL: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """out = Σ 2^(highest - most) part / Σ 2^(highest - most) total over the parts of one key/value head's queries.

    PADDED and SLOTS are the powers of two from QUERIES and ALL on; CHUNK parts are read at a time.
    """
    wide = tl.arange(0, DIM)
    query = tl.arange(0, PADDED)
    slot = tl.arange(0, SLOTS)
    stats += pair * (2 * ALL * QUERIES)
    parts += pair * (ALL * QUERIES * DIM)
    at = stats + slot[:, None] * QUERIES + query[None, :]
    there = (slot < ALL)[:, None] & (query < QUERIES)[None, :]
    highest = tl.load(at, mask=there, other=-float("inf"), cache_modifier=".cg")
    totals = tl.load(at + ALL * QUERIES, mask=there, other=0.0, cache_modifier=".cg")
    most = tl.max(highest, 0)
    most = tl.where(most == -float("inf"), 0.0, most)
    total = tl.sum(totals * tl.exp2(highest - most[None, :]), 0)
    o = tl.zeros([PADDED, DIM], tl.float32)
    for first in tl.range(0, ALL, CHUNK, loop_unroll_factor=4, num_stages=1):
        n = first + tl.arange(0, CHUNK)
        ok = (n < ALL)[:, None] & (query < QUERIES)[None, :]
        row = n[:, None] * QUERIES + query[None, :]
        peak = tl.load(stats + row, mask=ok, other=-float("inf"), cache_modifier=".cg")
        some = peak != -float("inf")  # parts of no keys are not written
        place = parts + row[:, :, None] * DIM + wide[None, None, :]
        part = tl.load(place, mask=some[:, :, None], other=0.0, cache_modifier=".cg")
        weight = tl.exp2(peak - most[None, :])
        o += tl.sum(part * weight[:, :, None], 0)
    o = o / tl.where(total == 0, 1.0, total)[:, None]
    target = out + (pair * QUERIES + query)[:, None] * DIM + wide[None, :]
    tl.store(target, bf16_of(o).to(tl.bfloat16), mask=(query < QUERIES)[:, None])


@triton.jit(do_not_specialize=["num_tokens", "sliding"])
def prefill(
    q,
    q_scale,
    whole_keys,
    meta,
    whole_values,
    key,
    value,
    start,
    out,
    num_tokens,
    heads,
    kv_heads,
    capacity,
    scale,
    sliding,
    ROUNDED: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Causal attention of the first tokens of a cache: each query reads its latest WINDOW keys as they are, the others
    as their codes have it (all as they are without ROUNDED).

    Products with codes are of e4m3 numbers (FP8), which both operands are, so that nothing is rounded.

    Args:
        q, q_scale: (B·T, H, DIM) and (B·T, H), of `prepare`.
        whole_keys, whole_values: (B, G, T, DIM), of `encode`; meta: (B, G, capacity) the keys' scales.
        key, value: (B, G, T, DIM), of `prepare`.
        out: (B, T, H, DIM).
        scale, sliding: as for `decode`.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    pair = batch * kv_heads + head // (heads // kv_heads)
    row = block * BM + tl.arange(0, BM)
    wide = tl.arange(0, DIM)[None, :]
    ok = row < num_tokens
    place = (batch * num_tokens + row) * heads + head
    query = tl.load(q + place[:, None] * DIM + wide, mask=ok[:, None], other=0.0)
    row_scale = tl.load(q_scale + place, mask=ok, other=0.0) * scale
    seen_from = tl.load(start + batch)
    base = pair * num_tokens
    highest = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    o = tl.zeros([BM, DIM], tl.float32)
    first = tl.maximum(tl.maximum(seen_from, block * BM + 1 - sliding), 0)
    near = first
    if ROUNDED:
        near = tl.maximum(block * BM + 1 - WINDOW, first)
        coded = query.to(tl.float8e4nv) if FP8 else operand(query, COMPILED)
        meta += pair * capacity
        inner = 0  # up to here every row sees every key
        if (first == 0) & ((block + 1) * BM <= sliding):
            inner = tl.maximum(block * BM + 1 - WINDOW, 0) // BN * BN
        for at in tl.range(0, inner, BN, num_stages=STAGES):
            token = at + tl.arange(0, BN)
            k = tl.load(whole_keys + (base + token)[:, None] * DIM + wide)
            key_scale, _ = scale_and_zero(tl.load(meta + token))
            v = tl.load(whole_values + (base + token)[:, None] * DIM + wide)
            s = tl.dot(coded, tl.trans(k if FP8 else operand(k, COMPILED))) * (row_scale[:, None] * key_scale[None, :])
            p, highest, total, kept = softmax_step(s, highest, total)
            o = tl.dot(operand(p, COMPILED), operand(v, COMPILED), o * kept[:, None])
        end = tl.minimum((block + 1) * BM, num_tokens) - WINDOW
        for at in tl.range(tl.maximum(first // BN * BN, inner), end, BN, num_stages=STAGES):
            token = at + tl.arange(0, BN)
            inside = token < num_tokens
            k = tl.load(whole_keys + (base + token)[:, None] * DIM + wide, mask=inside[:, None], other=0.0)
            key_scale, _ = scale_and_zero(tl.load(meta + token, mask=inside, other=0))
            v = tl.load(whole_values + (base + token)[:, None] * DIM + wide, mask=inside[:, None], other=0.0)
            s = tl.dot(coded, tl.trans(k if FP8 else operand(k, COMPILED))) * (row_scale[:, None] * key_scale[None, :])
            distance = row[:, None] - token[None, :]
            visible = (distance >= WINDOW) & (distance < sliding) & (token >= seen_from)[None, :]
            p, highest, total, kept = softmax_step(tl.where(visible, s, -float("inf")), highest, total)
            o = tl.dot(operand(p, COMPILED), operand(v, COMPILED), o * kept[:, None])
    query = operand(query, COMPILED)
    for at in tl.range(near // BN * BN, tl.minimum((block + 1) * BM, num_tokens), BN, num_stages=STAGES):
        token = at + tl.arange(0, BN)
        inside = token < num_tokens
        k = tl.load(key + (base + token)[:, None] * DIM + wide, mask=inside[:, None], other=0.0)
        v = tl.load(value + (base + token)[:, None] * DIM + wide, mask=inside[:, None], other=0.0)
        s = tl.dot(query, tl.trans(operand(k, COMPILED))) * row_scale[:, None]
        distance = row[:, None] - token[None, :]
        visible = (distance >= 0) & (distance < sliding) & (token >= seen_from)[None, :]
        if ROUNDED:
            visible = visible & (distance < WINDOW)
        p, highest, total, kept = softmax_step(tl.where(visible, s, -float("inf")), highest, total)
        o = tl.dot(operand(p, COMPILED), operand(v, COMPILED), o * kept[:, None])
    o = o / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + place[:, None] * DIM + wide, bf16_of(o).to(tl.bfloat16), mask=ok[:, None])
