"""Triton kernels that quantize activations to FP8, alone or behind an RMSNorm or a SwiGLU. One program a token, but
where its largest magnitude is known.

They start before the kernel before them has ended, and let the next one do so (programmatic dependent launch): a
product's programs then spread over a device that is all but idle, and ask for their weights meanwhile.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as error:  # no Triton on this platform: the dispatch takes the PyTorch path
    raise ImportError("Triton is not installed") from error

MAX = tl.constexpr(448.0)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def e4m3_bits(x, PLAIN: tl.constexpr):
    """The nearest e4m3 numbers, ties to even, of |x| <= 448, as bytes; PLAIN does without a conversion instruction."""
    if not PLAIN:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    size = tl.abs(x)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    steps = size / tl.exp2((exponent - 3).to(tl.float32))  # in [0, 16), in units of the last place
    down = tl.floor(steps)
    rest = steps - down
    odd = down - 2 * tl.floor(down / 2)
    number = down + tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1)), 1.0, 0.0)
    bits = (number + (exponent + 6).to(tl.float32) * 8).to(tl.uint8)  # a full mantissa carries into the exponent
    bits = tl.where(x != x, 127, bits)
    return tl.where((x.to(tl.int32, bitcast=True) < 0) & (x == x), bits + 128, bits).to(tl.uint8)


@triton.jit
def wait_for_others(PLAIN: tl.constexpr):
    """Return when the last kernel has ended, and let the next one start.

    Not before: programs of a product that came among those of another product would crowd on some multiprocessors.
    """
    if not PLAIN:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def magnitude_bits(x):
    """The bits of |x| (fp32), ordered as the magnitudes are; a NaN is above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def silu(x, kind: tl.constexpr):
    """SiLU of x (fp32), rounded to `kind`, in fp32."""
    return (x / (1.0 + tl.exp(-x))).to(kind).to(tl.float32)


@triton.jit
def store_quantized(x, bits, out, scale, token, k, ok, width, PLAIN: tl.constexpr):
    """Quantize fp32 numbers of a token, `bits` those of its largest magnitude: `reference.quantize_activations`."""
    largest = bits.to(tl.float32, bitcast=True)
    factor = tl.maximum(tl.div_rn(largest, MAX), 1.1754943508222875e-38)
    factor = tl.where(bits == 0, 1.0, factor)
    codes = tl.minimum(tl.maximum(tl.div_rn(x, tl.zeros_like(x) + factor), -MAX), MAX)
    tl.store(out + token * width + k, e4m3_bits(codes, PLAIN), mask=ok)
    tl.store(scale + token, tl.where(bits >= INFINITY_BITS, float("nan"), factor))


@triton.jit
def quantize_rows(x, out, scale, stride, width, BLOCK: tl.constexpr, PLAIN: tl.constexpr):
    """x (M, K), rows `stride` apart -> e4m3 bytes (M, K) and fp32 (M,). Grid (M,)."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    ok = k < width
    wait_for_others(PLAIN)
    values = tl.load(x + token * stride + k, mask=ok, other=0.0).to(tl.float32)
    store_quantized(values, tl.max(magnitude_bits(values)), out, scale, token, k, ok, width, PLAIN)


@triton.jit
def norm_rows(
    x,
    residual,
    weight,
    summed,
    out,
    scale,
    eps,
    width,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """h = x + residual, then weight · h / √(mean h² + eps), quantized; rounded as `linear.rms_norm_quantize` says.

    x, residual and summed (M, K), weight (K,), out e4m3 bytes (M, K), scale (M,). Grid (M,).
    """
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    ok = k < width
    kind: tl.constexpr = x.dtype.element_ty
    gain = tl.load(weight + k, mask=ok, other=0.0).to(tl.float32)
    wait_for_others(PLAIN)
    h = tl.load(x + token * width + k, mask=ok, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h = (h + tl.load(residual + token * width + k, mask=ok, other=0.0).to(tl.float32)).to(kind)
        tl.store(summed + token * width + k, h, mask=ok)
        h = h.to(tl.float32)
    root = 1.0 / tl.sqrt_rn(tl.sum(h * h) / width + eps)
    normed = (h * root).to(kind).to(tl.float32)
    normed = (normed * gain).to(kind).to(tl.float32)
    store_quantized(normed, tl.max(magnitude_bits(normed)), out, scale, token, k, ok, width, PLAIN)


@triton.jit
def swiglu_rows(gate_up, out, scale, width, BLOCK: tl.constexpr, PLAIN: tl.constexpr):
    """gate_up (M, 2 I) -> e4m3 bytes (M, I) of SiLU(gate) · up, and fp32 (M,). Grid (M,)."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    ok = k < width
    kind: tl.constexpr = gate_up.dtype.element_ty
    wait_for_others(PLAIN)
    gate = tl.load(gate_up + token * 2 * width + k, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * width + width + k, mask=ok, other=0.0).to(tl.float32)
    active = (silu(gate, kind) * up).to(kind).to(tl.float32)
    store_quantized(active, tl.max(magnitude_bits(active)), out, scale, token, k, ok, width, PLAIN)


@triton.jit
def quantize_parts(
    x,
    peaks,
    out,
    scale,
    width,
    num_peaks,
    PEAKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """x (M, K) -> e4m3 bytes (M, K) and fp32 (M,), by the largest of `peaks` (M, num_peaks). Grid (M, K / BLOCK)."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = k < width
    peak = tl.arange(0, PEAKS)
    wait_for_others(PLAIN)
    bits = tl.load(peaks + token * num_peaks + peak, mask=peak < num_peaks, other=0)
    values = tl.load(x + token * width + k, mask=ok, other=0.0).to(tl.float32)
    store_quantized(values, tl.max(bits), out, scale, token, k, ok, width, PLAIN)  # all store the same scale
