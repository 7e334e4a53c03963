"""Number formats against enumerations of them, peer libraries, and float64 loops written from the formulas."""

import itertools
import math

import pytest
import torch

from kit.kernels.int4_fp8 import (
    cast_fp8,
    dequantize_kv,
    dequantize_weight,
    dequantized_linear,
    hadamard,
    pack_int4,
    per_tensor_factor,
    quantize_kv,
    round_activations,
    shaping_factor,
    table_weight,
    unpack_int4,
)
from kit.kernels.int4_fp8.reference import quantize_activations


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def e4m3_numbers():
    """All 127 finite numbers from 0 on: 4 exponent bits of bias 7, 3 of mantissa, all ones is NaN."""
    return [
        m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
        if (e, m) != (15, 7)
    ]


def round_e4m3(x):
    """Nearest e4m3 number in float64, ties to an even mantissa, saturating."""
    table = torch.tensor(e4m3_numbers(), dtype=torch.float64)
    magnitude = x.double().abs().clamp(max=448)
    upper = torch.searchsorted(table, magnitude).clamp(max=len(table) - 1)
    lower = (upper - 1).clamp(min=0)
    below, above = magnitude - table[lower], table[upper] - magnitude
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return torch.where(take_upper, table[upper], table[lower]) * x.double().sign()


def is_e4m3(x):
    return bool(torch.isin(x.double().abs(), torch.tensor(e4m3_numbers(), dtype=torch.float64)).all())


# ---- packing


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 33])
def test_packing_round_trips_every_code_in_every_place(size):
    codes = (torch.arange(16)[:, None] + torch.arange(size)) % 16 - 8
    packed = pack_int4(codes.to(torch.int8))
    assert packed.dtype == torch.int32
    assert packed.shape == (16, math.ceil(size / 8))
    assert torch.equal(unpack_int4(packed, size), codes.to(torch.int8))


def test_packed_bits_are_where_the_docstring_says():
    codes = torch.tensor([[-8, -7, 7, 0, 1, 2, 3, -1, 5]])
    word = sum((int(c) + 8) << (4 * i) for i, c in enumerate(codes[0, :8]))
    low, high = (int(w) % 2**32 for w in pack_int4(codes)[0])
    assert (low, high) == (word, 13)


@pytest.mark.parametrize("size", [5, 8, 31, 32, 72])
def test_packing_equals_compressed_tensors(size):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (13, size), generator=torch.Generator().manual_seed(size), dtype=torch.int8)
    theirs = helpers.pack_to_int32(codes, 4)
    assert torch.equal(pack_int4(codes), theirs)
    assert torch.equal(unpack_int4(theirs, size), helpers.unpack_from_int32(theirs, 4, codes.shape))


def test_packing_keeps_leading_dimensions():
    codes = torch.randint(-8, 8, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_int4(pack_int4(codes), 20).long(), codes)


# ---- FP8


def test_fp8_rounding_equals_a_float64_table():
    table = e4m3_numbers()
    middles = [(a + b) / 2 for a, b in itertools.pairwise(table)]  # every tie
    x = torch.tensor([*table, *middles, 449.0, 464.0, 1e6, math.inf])
    x = torch.cat([x, -x, normal(4096) * 100, normal(4096, seed=1) * 0.01])
    assert torch.equal(cast_fp8(x).double(), round_e4m3(x))
    assert cast_fp8(torch.tensor(math.nan)).isnan()


def test_activation_codes_are_the_float64_rounding():
    x = normal(32, 64) * 50
    x[:, 0] = 448  # so that the scale is exactly 1
    codes, scale = quantize_activations(x)
    assert torch.equal(scale, torch.ones(32, 1))
    assert torch.equal(codes.double(), round_e4m3(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_gpu_rounds_as_a_cpu_does(symmetric):
    x = normal(64, 4, 128).bfloat16()  # short mantissas: many of the quotients are ties
    for got, want in zip(quantize_activations(x.cuda()), quantize_activations(x), strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
    x = x.float()[None]
    assert torch.equal(quantize_kv(x.cuda(), symmetric).cpu(), quantize_kv(x, symmetric))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4, 1e37])
def test_activation_error_is_within_the_format(magnitude):
    """Half a unit in the last place, 2^-4 of the number, or half the smallest number, 2^-10 of the scale."""
    x = normal(3, 5, 64) * magnitude
    codes, scale = quantize_activations(x)
    exact_scale = x.double().abs().amax(-1, keepdim=True) / 448
    torch.testing.assert_close(scale.double(), exact_scale, rtol=1e-6, atol=0)
    error = (codes.double() * scale.double() - x.double()).abs()
    assert bool((error <= torch.maximum(x.double().abs() * 2**-4, exact_scale * 2**-10) * (1 + 1e-5)).all())
    assert bool((codes.float().abs().amax(-1) == 448).all())
    rounded = round_e4m3(x.double() / exact_scale) * exact_scale
    torch.testing.assert_close(round_activations(x).double(), rounded, rtol=1e-5, atol=0)


def test_rows_of_zeros_and_of_nan():
    x = normal(4, 8)
    x[0], x[1, 3], x[2, 5] = 0, math.nan, math.inf
    codes, scale = quantize_activations(x)
    assert float(scale[0]) == 1
    rounded = codes.float() * scale
    assert bool((rounded[0] == 0).all())
    assert bool(rounded[1:3].isnan().all())
    assert bool(rounded[3].isfinite().all())
    assert torch.equal(round_activations(x).isnan(), rounded.isnan())
    y = dequantized_linear(x, torch.ones(2, 8))
    assert y.isnan().tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]


def test_a_row_of_the_smallest_denormals_stays_finite():
    assert bool(round_activations(torch.tensor([[0.0, 1e-44]])).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_activations_keep_their_dtype(dtype):
    x = normal(4, 16).to(dtype)
    rounded = round_activations(x)
    assert rounded.dtype == dtype
    assert float((rounded - x).abs().max()) <= float(x.abs().max()) * 2**-4


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zero_point", [False, True])
def test_linear_equals_float64_on_the_dequantized_operands(bias, zero_point):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (24, 256), generator=g, dtype=torch.int8)
    scale, offset = torch.rand(24, 4, generator=g) * 0.01 + 1e-3, torch.randint(-8, 8, (24, 4), generator=g)
    x, b = normal(2, 7, 256, seed=1), normal(24, seed=2) if bias else None
    weight = dequantize_weight(codes, scale, offset.to(torch.int8) if zero_point else None)
    exact = torch.empty(24, 256, dtype=torch.float64)
    for column in range(256):
        shift = offset[:, column // 64] if zero_point else 0
        exact[:, column] = (codes[:, column] - shift).double() * scale[:, column // 64].double()
    torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=0)
    x_codes, x_scale = quantize_activations(x)
    expected = (x_codes.double() * x_scale.double()) @ exact.T + (0 if b is None else b.double())
    y = dequantized_linear(x, weight, b)
    assert y.dtype == x.dtype
    assert float((y.double() - expected).norm() / expected.norm()) <= 1e-5


# ---- table weights


@pytest.mark.parametrize("magnitude", [1e-4, 1e-2, 1.0])
def test_table_products_are_e4m3_numbers_over_t(magnitude):
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(6, 2)
    scale = normal(6, 2).abs() * magnitude
    factor = per_tensor_factor(scale)
    table = table_weight(codes, scale, factor)
    assert is_e4m3(table.double() * factor)
    exact = dequantize_weight(codes, scale).double()
    assert torch.equal(table.double() * factor, round_e4m3(exact * factor))


@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1e-4, 1e-2, 1.0, 40.0, 1e3])
@pytest.mark.parametrize("sign", [1, -1])
def test_per_tensor_factor(magnitude, sign):
    """The definition, written as a search over all admissible powers."""
    scale = (torch.rand(16, 4, generator=torch.Generator().manual_seed(3)) + 0.1) * magnitude * sign
    factor = per_tensor_factor(scale)
    assert math.log2(factor) in range(15)
    values = [abs(float(s)) for s in scale.flatten()]
    powers = [2.0**e for e in range(15) if e == 0 or 8 * max(values) * 2**e <= 448]
    assert factor in powers
    lost = {t: sum(max(7 * 2.0**-9 - 7 * s * t, 0) for s in values) for t in powers}
    assert lost[factor] == pytest.approx(min(lost.values()), rel=1e-5)
    assert all(lost[t] > lost[factor] for t in powers if t < factor)


def test_per_tensor_factor_lifts_underflow():
    scale = torch.tensor([[2.0**-12, 2.0**-8]])
    assert per_tensor_factor(scale) == 8
    codes = torch.ones(1, 2, dtype=torch.int8)
    assert table_weight(codes, scale, 1)[0, 0] == 0
    assert table_weight(codes, scale, 8)[0, 0] == 2.0**-12


# ---- keys and values


def kv_steps(packed, symmetric, size):
    """Scales as stored, read byte by byte."""
    low, high = packed[..., size // 2].int(), packed[..., size // 2 + 1].int()
    return ((high << 24) | (low << 16)).view(torch.float32)[..., None].double()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("offset", [0.0, 3.0, -20.0])
def test_kv_error_is_at_most_half_a_step(symmetric, size, offset):
    x = normal(2, 3, 11, size) * normal(2, 3, 11, 1, seed=1).exp() + offset
    packed = quantize_kv(x, symmetric)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, 11, size // 2 + (2 if symmetric else 3))
    step = kv_steps(packed, symmetric, size)
    reach = x.double().abs().amax(-1, keepdim=True)
    exact = reach / 7.5
    if not symmetric:
        exact = (x.double().amax(-1, keepdim=True).clamp(min=0) - x.double().amin(-1, keepdim=True).clamp(max=0)) / 15
    torch.testing.assert_close(step, exact, rtol=2**-8 * 1.001, atol=0)
    error = (dequantize_kv(packed, symmetric, torch.float32).double() - x.double()).abs()
    assert bool((error <= step / 2 + 15 * (step - exact).abs() + 1e-6 * reach).all())


def test_asymmetric_kv_is_finer_where_numbers_have_one_sign():
    x = normal(1, 1, 32, 16).abs()
    errors = [float((dequantize_kv(quantize_kv(x, s), s, torch.float32) - x).square().sum()) for s in (False, True)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_kv_layout(symmetric):
    """Element d in the low half of byte d, element d + D/2 in the high half, code + 8; on a grid of whole numbers."""
    x = (
        torch.tensor([-8, -5, 0, 7, 3, -1, 2, 5]).float()
        if not symmetric
        else torch.tensor([-7.5, -5, 0, 7, 3, -1, 2, 5])
    )
    codes = [-8, -5, 0, 7, 3, -1, 2, 5]
    packed = quantize_kv(x[None, None, None], symmetric)[0, 0, 0].tolist()
    assert packed[:4] == [(codes[d] + 8) | (codes[d + 4] + 8) << 4 for d in range(4)]
    assert packed[4:6] == [0x80, 0x3F]  # 1.0 in bf16, low byte first
    assert packed[6:] == ([] if symmetric else [8])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shaped", [False, True])
def test_kv_zeros_nan_and_extremes(symmetric, shaped):
    x = normal(1, 1, 6, 8)
    x[..., 0, :], x[..., 1, 2], x[..., 2, 3] = 0, math.nan, math.inf
    x[..., 3, :] *= 1e-40
    x[..., 4, :] *= 1e37
    factors = shaping_factor(torch.eye(8)[None]) if shaped else (None, None)
    y = dequantize_kv(quantize_kv(x, symmetric, *factors), symmetric, torch.float32)[0, 0]
    assert bool((y[0] == 0).all())
    assert bool(y[1].isnan().all())
    assert not bool(y[2].isfinite().any())
    assert bool(y[3:].isfinite().all())
    assert float((y[4] - x[0, 0, 4]).abs().max() / x[0, 0, 4].abs().max()) < 0.1


def test_kv_survives_cache_surgery():
    x = normal(3, 2, 9, 16)
    packed, whole = quantize_kv(x, True), dequantize_kv(quantize_kv(x, True), True, torch.bfloat16)
    assert whole.dtype == torch.bfloat16
    picked = packed[torch.tensor([2, 0])][:, :, 3:7]
    assert torch.equal(dequantize_kv(picked, True, torch.bfloat16), whole[torch.tensor([2, 0])][:, :, 3:7])


def anisotropic(heads, size, seed=0):
    """Metrics with correlated channels of very different weight."""
    root = normal(heads, size, size, seed=seed) * torch.logspace(0, -2, size)
    return root @ root.mT + 0.01 * torch.eye(size)


def shaped_by_hand(x, metric, symmetric, damp):
    """One vector: round a channel, move the rest to the conditional optimum, drop the channel from the inverse."""
    size = len(x)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = float(x.abs().max()) / 7.5 if symmetric else (high - low) / 15
    scale = float(torch.tensor(scale, dtype=torch.float32).bfloat16())
    zero = 0 if symmetric else min(max(round(-8 - low / scale), -8), 7)
    metric = metric.double() + damp * float(metric.double().diagonal().mean()) * torch.eye(size).double()
    inverse = torch.linalg.inv(metric)
    left, codes = x.double() / scale + zero, [0] * size
    for channel in sorted(range(size), key=lambda d: -float(metric[d, d])):
        codes[channel] = min(max(round(float(left[channel])), -8), 7)
        error = (left[channel] - codes[channel]) / inverse[channel, channel]
        left = left - error * inverse[channel]
        inverse = inverse - torch.outer(inverse[:, channel], inverse[channel]) / inverse[channel, channel]
    return (torch.tensor(codes).double() - zero) * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("damp", [0.1, 0.01])
def test_noise_shaping_equals_a_float64_loop(symmetric, damp):
    x, metric = normal(2, 3, 5, 16, seed=4), anisotropic(3, 16)
    y = dequantize_kv(quantize_kv(x, symmetric, *shaping_factor(metric, damp)), symmetric, torch.float32)
    for b in range(2):
        for head in range(3):
            for t in range(5):
                expected = shaped_by_hand(x[b, head, t], metric[head], symmetric, damp)
                torch.testing.assert_close(y[b, head, t].double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_noise_shaping_beats_nearest_rounding(symmetric):
    x, metric = normal(2, 2, 64, 32, seed=5), anisotropic(2, 32)

    def cost(*factors):
        e = dequantize_kv(quantize_kv(x, symmetric, *factors), symmetric, torch.float32).double() - x.double()
        return float(torch.einsum("bgtd,gde,bgte->", e, metric.double(), e))

    assert cost(*shaping_factor(metric)) < 0.7 * cost()


def test_noise_shaping_with_a_round_metric_is_nearest_rounding():
    x = normal(1, 2, 16, 8)
    factors = shaping_factor(3 * torch.eye(8).expand(2, 8, 8))
    assert torch.equal(quantize_kv(x, True, *factors), quantize_kv(x, True))


def test_shaping_factor_properties():
    metric = anisotropic(2, 12, seed=7)
    order, factor = shaping_factor(metric)
    assert order.dtype == torch.int32
    assert factor.dtype == torch.float32
    for head in range(2):
        diagonal = metric[head].diagonal()[order[head].long()]
        assert bool((diagonal.diff() <= 0).all())
        assert torch.equal(factor[head].tril(), torch.eye(12))


# ---- rotations


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 64, 576])
def test_hadamard_is_orthonormal(size):
    h = hadamard(size)
    assert h.dtype == torch.float64
    torch.testing.assert_close(h @ h.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(h.abs(), torch.full_like(h, size**-0.5), rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [52, 3, 6, 7])
def test_hadamard_of_an_unknown_order(size):
    with pytest.raises(ValueError, match=str(size)):
        hadamard(size)


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_token_of_one_head(symmetric):
    x = normal(1, 1, 1, 16)
    rounded = dequantize_kv(quantize_kv(x, symmetric), symmetric, torch.float32)
    assert float((rounded - x).abs().max()) <= float(x.abs().max()) / 7
