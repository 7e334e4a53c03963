"""Products with INT4 weights and FP8 activations against float64, on the dequantized operands.

Without a GPU the Triton code runs in Triton's interpreter (tests/conftest.py switches it on).
"""

import math

import pytest
import torch
import torch.nn.functional as F

from kit.kernels import counters
from kit.kernels.int4_fp8 import (
    PackedInt4,
    dequantize_weight,
    int4_fp8_linear,
    int8_linear,
    prepack,
    quantize_fp8,
    rms_norm_quantize,
    swiglu_quantize,
)
from kit.kernels.int4_fp8.linear import HAS_TRITON
from kit.kernels.int4_fp8.reference import quantize_activations

if not HAS_TRITON:
    pytest.skip("no Triton", allow_module_level=True)
from kit.kernels.int4_fp8 import linear, linear_launch
from kit.kernels.int4_fp8.linear_launch import Cut

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 3e-4 if DEVICE == "cuda" else 1e-6  # FP8 matrix units add with fewer bits than fp32 within a group
BITS = torch.uint8
NARROW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cuts off where bf16 should round
# N, K, group size, zero points
SHAPES = [
    (64, 256, 128, False),
    (100, 576, 64, True),
    (7, 100, 100, True),
    (130, 256, 32, False),
    (65, 1024, 512, True),
]
CUTS = [
    Cut(16, 8, 0, 2, 2, 1),
    Cut(32, 16, 0, 4, 3, 3),
    Cut(64, 32, 1, 4, 2, 1),
    Cut(64, 32, 1, 4, 3, 2),
    Cut(64, 32, 2, 4, 2, 2),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written reads as NaN."""
    empty = torch.empty

    def fill(*args, **kwargs):
        out = empty(*args, **kwargs)
        if out.dtype == torch.float8_e4m3fn:
            out.view(BITS).fill_(127)
        return out.fill_(math.nan) if out.dtype in (torch.float32, torch.bfloat16, torch.float16) else out

    monkeypatch.setattr(torch, "empty", fill)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def weight(outputs, inputs, size, zeros, seed=0, magnitude=0.01):
    """Codes, scales (some negative), zero points, and the dequantized weight in float64."""
    g = generator(seed)
    codes = torch.randint(-8, 8, (outputs, inputs), generator=g, dtype=torch.int8)
    scale = ((torch.rand(outputs, inputs // size, generator=g) - 0.3) * magnitude).bfloat16()
    zero = torch.randint(-8, 8, scale.shape, generator=g, dtype=torch.int8) if zeros else None
    grouped = codes.double().unflatten(1, (-1, size))
    if zero is not None:
        grouped = grouped - zero.double()[..., None]
    exact = (grouped * scale.double()[..., None]).flatten(1)
    on_device = [None if t is None else t.to(DEVICE) for t in (codes, scale, zero)]
    return prepack(*on_device), exact


def inputs_of(tokens, inputs, seed=1, magnitude=1.0):
    x = torch.randn(tokens, inputs, generator=generator(seed)) * magnitude
    return x.to(DEVICE)


def product(x, exact, bias=None):
    """The formula in float64, on what FP8 left of x."""
    codes, scale = quantize_activations(x.cpu())
    y = (codes.double() * scale.double()) @ exact.T
    return y if bias is None else y + bias.double().cpu()


def close(y, expected, bound=BOUND):
    error = (y.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-300)
    assert error <= bound, f"{error:.1e}"


# ---- packing


@pytest.mark.parametrize(("outputs", "inputs", "size", "zeros"), SHAPES)
def test_packing_keeps_every_number(outputs, inputs, size, zeros):
    packed, exact = weight(outputs, inputs, size, zeros)
    assert torch.equal(packed.dequantize().double().cpu(), exact.float().double())
    assert packed.codes.is_contiguous()
    assert packed.scales.is_contiguous()


def test_bytes_hold_a_code_of_each_half():
    codes = torch.arange(128).remainder(16).sub(8).to(torch.int8).expand(64, 128)
    packed = prepack(codes.roll(1, 1), torch.ones(64, 1))
    assert packed.codes[0, 0, 5].tolist() == [(j + 15) % 16 * 17 for j in range(64)]  # inputs j and j + 64 are equal
    codes = codes.clone()
    codes[:, 64:] = -8
    assert prepack(codes, torch.ones(64, 1)).codes[0, 0, 5].tolist() == [j % 16 for j in range(64)]


def test_groups_that_no_kernel_takes_are_refused():
    with pytest.raises(ValueError, match="groups of 48"):
        prepack(torch.zeros(8, 96, dtype=torch.int8), torch.ones(8, 2))


@pytest.mark.parametrize(("outputs", "inputs", "size", "zeros"), SHAPES)
def test_expanded_weights_are_rounded_once(outputs, inputs, size, zeros):
    packed, exact = weight(outputs, inputs, size, zeros)
    expanded, scale = linear_launch.expand(packed)
    assert expanded.shape == (outputs, inputs)
    assert torch.equal(scale.log2(), scale.log2().round())  # so that dividing by it rounds nothing
    assert expanded.float().abs().max() <= 448
    error = (expanded.double() * scale.T.double()).cpu() - exact
    smallest = scale.T.double().cpu() * 2**-10  # half of the smallest step
    assert bool((error.abs() <= torch.maximum(exact.abs() * 2**-4, smallest) * (1 + 1e-6)).all())


# ---- products


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(("outputs", "inputs", "size", "zeros"), SHAPES)
def test_every_cut_is_the_formula(outputs, inputs, size, zeros, cut):
    packed, exact = weight(outputs, inputs, size, zeros)
    tokens = cut.tokens - 3
    x, bias = inputs_of(tokens, inputs), torch.randn(outputs, generator=generator(2)).to(DEVICE)
    x[1] = 0
    codes, scale = quantize_fp8(x)
    y = linear_launch.linear(codes, scale, packed, bias, torch.float32, cut)
    close(y, product(x, exact, bias))
    y = linear_launch.linear(codes, scale, packed, None, torch.float32, cut)
    close(y, product(x, exact))
    assert not y[1].any()


@pytest.mark.parametrize(
    ("outputs", "inputs", "size", "zeros"),
    [(192, 384, 128, False), *([(333, 640, 128, True), (100, 576, 64, False)] if DEVICE == "cuda" else [])],
)
@pytest.mark.parametrize("tokens", range(1, 301) if DEVICE == "cuda" else [1, 8, 9, 16, 17, 32, 33, 65, 130])
def test_every_number_of_tokens(tokens, outputs, inputs, size, zeros):
    packed, exact = weight(outputs, inputs, size, zeros)
    x = inputs_of(tokens, inputs)
    codes, scale = quantize_fp8(x)
    y = linear_launch.linear(codes, scale, packed, None, torch.float32)
    assert y.shape == (tokens, outputs)
    close(y, product(x, exact))
    assert torch.equal(linear_launch.linear(codes, scale, packed, None, torch.float32), y)


@pytest.mark.parametrize(("of_x", "of_w"), [(1e-30, 1e-2), (1e4, 1e30), (1e30, 1e-30), (1.0, 1e-30)])
@pytest.mark.parametrize("tokens", [3, 20])
def test_extreme_scales(tokens, of_x, of_w):
    packed, exact = weight(70, 256, 128, False, magnitude=of_w)
    x = inputs_of(tokens, 256, magnitude=of_x)
    close(linear_launch.linear(*quantize_fp8(x), packed, None, torch.float32), product(x, exact))


def test_codes_at_their_ends_are_exact():
    """Every code times every e4m3 number, one at a time."""
    numbers = torch.arange(256).to(torch.uint8)
    numbers = numbers[(numbers & 127) != 127].view(torch.float8_e4m3fn)
    codes = torch.zeros(64, 128, dtype=torch.int8)
    codes[:16, 0], codes[16:32, 77] = torch.arange(-8, 8), torch.arange(-8, 8)
    packed = prepack(codes.to(DEVICE), torch.ones(64, 1, device=DEVICE))
    x = torch.zeros(len(numbers), 128, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x.view(torch.uint8)[:, 0] = x.view(torch.uint8)[:, 77] = numbers.view(torch.uint8)
    for part in (x[:254], x[40:56]):
        y = linear_launch.linear(part.to(DEVICE), torch.ones(len(part), device=DEVICE), packed, None, torch.float32)
        assert torch.equal(y.double().cpu(), part.double() @ codes.double().T)


@pytest.mark.parametrize("cut", [Cut(32, 16, 0, 2, 2, 4), Cut(64, 32, 1, 4, 2, 4)], ids=str)
def test_results_are_the_same_bits_each_time_and_scratch_is_left_clean(cut):
    packed, _ = weight(130, 1024, 128, False)
    codes, scale = quantize_fp8(inputs_of(12, 1024))
    counters._counters.clear()
    first = linear_launch.linear(codes, scale, packed, None, torch.float32, cut)
    for _ in range(3):
        assert torch.equal(linear_launch.linear(codes, scale, packed, None, torch.float32, cut), first)
    assert counters._counters
    assert not any(each.any() for each in counters._counters.values())


def test_a_bad_token_makes_its_row_only_nan():
    packed, _ = weight(64, 256, 128, False)
    x = inputs_of(5, 256)
    x[2, 7] = math.nan
    y = linear_launch.linear(*quantize_fp8(x), packed, None, torch.float32)
    assert y.isnan().all(1).tolist() == [False, False, True, False, False]
    assert y[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 16, 17, 300, 2048])
@pytest.mark.parametrize(
    ("outputs", "inputs", "groups"), [(4096, 4096, 32), (28672, 4096, 32), (64, 128, 1), (192, 96, 3)]
)
def test_cuts_fit_the_shape(tokens, outputs, inputs, groups):
    cut = Cut.of(tokens, outputs, groups)
    assert outputs % cut.rows == 0
    assert 1 <= cut.splits <= max(groups, 1)
    assert cut.parts or tokens <= cut.tokens


# ---- quantization


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 77, 256, 600])
def test_quantization_is_the_specification_to_the_bit(width, dtype):
    x = (torch.randn(6, width, generator=generator(0)) * 30).to(dtype).to(DEVICE)
    x[1], x[2, 0], x[3, -1] = 0, math.nan, math.inf
    codes, scale = (t.cpu() for t in linear_launch.quantize(x))
    expected, expected_scale = quantize_activations(x.cpu())
    assert torch.equal(codes.view(BITS)[[0, 1, 4, 5]], expected.view(BITS)[[0, 1, 4, 5]])
    torch.testing.assert_close(scale, expected_scale[:, 0], rtol=0, atol=0, equal_nan=True)


def test_ties_subnormals_and_both_signs_round_as_the_specification():
    x = torch.arange(-1024, 1024) / 1024.0  # among them all ties of the smallest numbers
    x = torch.cat([x, x * 500, torch.tensor([448.0])]).to(DEVICE)[None]
    x.clamp_(-448, 448)
    codes, scale = linear_launch.quantize(x)
    assert scale.item() == 1
    assert torch.equal(codes.view(BITS), quantize_activations(x)[0].view(BITS))


def test_rows_apart_in_memory_are_quantized():
    x = inputs_of(4, 96)[:, :40]
    assert torch.equal(linear_launch.quantize(x)[0].view(BITS).cpu(), quantize_activations(x.cpu())[0].view(BITS))


def same_but_for_ties(codes, scale, x):
    """Codes and scale are x's; sums in another order may move a number across a rounding border."""
    expected, expected_scale = quantize_activations(x)
    assert (codes.view(BITS) == expected.view(BITS)).double().mean() > 0.98
    torch.testing.assert_close(scale, expected_scale[..., 0], rtol=1e-2, atol=0)
    got, wanted = codes.float() * scale[..., None], expected.float() * expected_scale
    torch.testing.assert_close(got, wanted, rtol=0.13, atol=float(expected_scale.max()) * 2**-8)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("width", [77, 256])
def test_norm_and_quantize(width, dtype, with_residual):
    x, residual = (inputs_of(5, width, seed).to(dtype) for seed in (0, 1))
    gain = inputs_of(1, width, 2)[0].to(dtype)
    x[2], residual[2] = 0, 0
    codes, scale, h = linear_launch.norm_quantize(x, gain, 1e-5, residual if with_residual else None)
    wanted = x + residual if with_residual else x
    assert torch.equal(h, wanted)
    exact = wanted.double()
    exact = (exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()).to(dtype)
    same_but_for_ties(codes, scale, gain * exact)


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("width", [77, 256])
def test_swiglu_and_quantize(width, dtype):
    gate_up = inputs_of(5, 2 * width).to(dtype) * 3
    codes, scale = linear_launch.swiglu_quantize(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    same_but_for_ties(codes, scale, (gate.double() / (1 + (-gate.double()).exp())).to(dtype) * up)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize(
    ("width", "inputs", "size", "zeros"), [(64, 256, 128, False), (96, 192, 64, True), (32, 1056, 32, False)]
)
def test_swiglu_where_the_product_is_has_the_same_bits(width, inputs, size, zeros, cut):
    packed, _ = weight(2 * width, inputs, size, zeros, magnitude=0.1)
    bias = torch.randn(2 * width, generator=generator(2)).to(DEVICE)
    x = linear_launch.quantize(inputs_of(7 if not cut.parts else 40, inputs))
    codes, scale = linear_launch.gated(*x, packed, bias, NARROW, cut)
    expected, expected_scale = linear_launch.swiglu_quantize(linear_launch.linear(*x, packed, bias, NARROW, cut))
    assert torch.equal(codes.view(BITS), expected.view(BITS))
    assert torch.equal(scale, expected_scale)


def test_swiglu_is_left_to_another_launch_where_programs_cannot_pair_outputs():
    for width, tokens in ((36, 1), (72, 20)):
        packed, _ = weight(2 * width, 256, 128, False)
        given = linear_launch.quantize(inputs_of(tokens, 256))
        assert linear_launch.gated(*given, packed, None, torch.float32) is None


@pytest.mark.parametrize("tokens", [1, 8, 9, 20])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 128), (100, 576), (33, 1000)])
def test_a_weight_in_int8_is_the_formula(outputs, inputs, tokens):
    g = generator(0)
    codes = torch.randint(-128, 128, (outputs, inputs), generator=g, dtype=torch.int8)
    codes[0, :2] = torch.tensor([-128, 127])
    scale = torch.rand(outputs, generator=g).bfloat16()
    x = inputs_of(tokens, inputs).bfloat16()
    expected = x.cpu().double() @ (codes.double() * scale.double()[:, None]).T
    close(int8_linear(x, codes.to(DEVICE), scale.to(DEVICE)), expected, 4e-3)
    if tokens <= 2 * linear_launch.FEW:
        close(linear_launch.linear_int8(x, codes.to(DEVICE), scale.to(DEVICE)), expected, 4e-3)


# ---- dispatch


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (0, 256), (2, 20, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dispatch_keeps_leading_dims_and_dtype(shape, dtype):
    packed, exact = weight(100, 256, 64, True)
    bias = torch.randn(100, generator=generator(2)).to(DEVICE)
    x = torch.randn(*shape, generator=generator(3)).to(dtype).to(DEVICE)
    y = int4_fp8_linear(x, packed, bias)
    assert y.shape == (*shape[:-1], 100)
    assert y.dtype == dtype
    expected = product(x.reshape(-1, 256), exact, bias).view(y.shape)
    if x.numel():
        close(y, expected, 3e-3 if dtype == torch.bfloat16 else BOUND)
    again = int4_fp8_linear(quantize_fp8(x), packed, bias, dtype, exact=False)  # too few tokens for that
    assert torch.equal(again, y)


def test_fused_weights_are_the_parts_side_by_side():
    g = generator(0)
    codes = [torch.randint(-8, 8, (n, 256), generator=g, dtype=torch.int8).to(DEVICE) for n in (70, 30)]
    scales = [torch.rand(n, 2, generator=g).to(DEVICE) for n in (70, 30)]
    x = inputs_of(4, 256)
    whole = int4_fp8_linear(x, prepack(torch.cat(codes), torch.cat(scales)))
    parts = [int4_fp8_linear(x, prepack(c, s)) for c, s in zip(codes, scales, strict=True)]
    torch.testing.assert_close(whole, torch.cat(parts, -1), rtol=1e-5, atol=1e-5)


def block(x, residual, gain, first, second):
    """What a transformer's MLP does."""
    codes, scale, h = rms_norm_quantize(x, gain, 1e-5, residual)
    gate_up = int4_fp8_linear((codes, scale), first, dtype=x.dtype)
    return h + int4_fp8_linear(swiglu_quantize(gate_up), second, dtype=x.dtype)


def test_compiled_graphs_hold_the_operations_as_single_nodes():
    first, second = weight(64, 96, 96, False)[0], weight(96, 32, 32, True)[0]
    x, residual, gain = (inputs_of(*shape).bfloat16() for shape in ((6, 96), (6, 96), (1, 96)))
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        arguments = (x.view(2, 3, 96), residual.view(2, 3, 96), gain[0], first, second)
        y = torch.compile(block, backend=backend, fullgraph=True)(*arguments)
        torch.testing.assert_close(y, block(*arguments))
        fake = torch.compile(block, backend="aot_eager", fullgraph=True)(*arguments)  # shapes and dtypes of the fakes
    assert torch.equal(fake, y)
    assert sum(".linear" in name for name in seen) == 2
    assert sum("norm_quantize" in name for name in seen) == 1
    assert sum("swiglu_quantize" in name for name in seen) == 1


def test_the_mlp_is_that_of_dequantized_weights():
    size, hidden = 96, 64
    first, exact_first = weight(2 * hidden, size, 32, False, magnitude=0.3)
    second, exact_second = weight(size, hidden, 32, False, seed=5, magnitude=0.3)
    x, residual, gain = inputs_of(6, size), inputs_of(6, size, 2), inputs_of(1, size, 3)[0]
    h = (x + residual).double().cpu()
    normed = gain.double().cpu() * h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gate, up = (normed @ exact_first.T).chunk(2, dim=-1)
    expected = h + F.silu(gate) * up @ exact_second.T
    close(block(x, residual, gain, first, second), expected, 0.08)  # FP8 rounds twice, by 0.03 each


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 12, 40, 300])
def test_a_replayed_graph_reads_its_inputs_anew(tokens):
    packed, exact = weight(256, 1024, 128, False)
    x = inputs_of(tokens, 1024)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int4_fp8_linear(x, packed)
    for seed in (5, 6):
        x.copy_(inputs_of(tokens, 1024, seed))
        graph.replay()
        close(y, product(x, exact))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_many_tokens_may_take_the_rounded_weight():
    packed, exact = weight(256, 512, 128, True)
    x, bias = inputs_of(2048, 512), torch.randn(256, device=DEVICE)
    y = int4_fp8_linear(quantize_fp8(x), packed, bias, exact=False)
    error = (y.double().cpu() - product(x, exact, bias)).norm() / product(x, exact, bias).norm()
    assert 1e-3 < error < 0.035


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_an_older_gpu_multiplies_dequantized_weights_and_says_so_once(monkeypatch):
    packed, exact = weight(100, 256, 64, True)
    x = inputs_of(5, 256)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    linear._is_hopper.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Hopper") as said:
            found = [int4_fp8_linear(x, packed) for _ in range(2)]
        assert len(said) == 1
    finally:
        linear._is_hopper.cache_clear()
    for y in found:
        close(y, product(x, exact))


def test_a_packed_weight_is_made_of_what_a_module_registers():
    packed, exact = weight(100, 256, 64, True)
    copies = [t.clone() for t in (packed.codes, packed.scales, packed.zeros)]
    again = PackedInt4(*copies, packed.out_features, packed.in_features)
    x = inputs_of(3, 256)
    assert torch.equal(int4_fp8_linear(x, again), int4_fp8_linear(x, packed))
    close(int4_fp8_linear(x, again), product(x, exact))
    assert torch.equal(again.dequantize().cpu(), dequantize_weight_of(packed))


def dequantize_weight_of(packed):
    tiles, groups, rows, half = packed.codes.shape
    codes = PackedInt4(packed.codes, torch.ones_like(packed.scales), None, tiles * rows, groups * 2 * half).dequantize()
    exact = dequantize_weight(codes.to(torch.int8), packed.scales.T, packed.zeros.T.to(torch.int8))
    return exact[: packed.out_features, : packed.in_features].cpu()
