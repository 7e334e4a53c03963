"""The product of many tokens in Gluon against float64, on the dequantized operands. Gluon has no interpreter."""

import math

import pytest
import torch

from kit.kernels.int4_fp8 import int4_fp8_linear, int4_fp8_swiglu, prepack, quantize_fp8
from kit.kernels.int4_fp8.linear import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("no Triton", allow_module_level=True)
from kit.kernels.int4_fp8 import linear_launch
from kit.kernels.int4_fp8.linear_launch import is_async, linear, linear_async

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_hopper = pytest.mark.skipif(not (GPU and linear_launch.HAS_GLUON), reason="needs a Hopper GPU and Gluon")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written reads as NaN."""
    empty = torch.empty

    def fill(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.dtype in (torch.float32, torch.bfloat16, torch.float16) else out

    monkeypatch.setattr(torch, "empty", fill)


def weight(outputs, inputs, size=128, zeros=False, dtype=torch.bfloat16, magnitude=0.02):
    """A weight, scales of both signs, and what it is in float64."""
    g = torch.Generator().manual_seed(outputs + inputs)
    codes = torch.randint(-8, 8, (outputs, inputs), generator=g, dtype=torch.int8)
    scale = ((torch.rand(outputs, inputs // size, generator=g) - 0.3) * magnitude).to(dtype)
    zero = torch.randint(-8, 8, scale.shape, generator=g, dtype=torch.int8) if zeros else None
    packed = prepack(*(None if t is None else t.to(DEVICE) for t in (codes, scale, zero)))
    exact = codes.double().unflatten(1, (-1, size)) - (0 if zero is None else zero.double()[..., None])
    return packed, (exact * scale.double()[..., None]).flatten(1).to(DEVICE)


def inputs_of(tokens, inputs, seed=1):
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))
    return quantize_fp8(x.to(DEVICE))


def product(x, exact, bias=None):
    y = (x[0].double() * x[1].double()[:, None]) @ exact.T
    return y if bias is None else y + bias.double()


def error(y, expected):
    return float((y.double() - expected).norm() / expected.norm())


@on_hopper
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "size", "zeros", "dtype"),
    [
        (256, 128, 128, 128, False, torch.float32),  # a single group
        (256, 128, 384, 128, True, torch.float32),
        (1, 64, 1280, 128, False, torch.bfloat16),  # half of the rows of a tile
        (300, 1096, 1152, 128, False, torch.float16),  # 17.1 tiles of rows
        (77, 200, 1040, 1040, False, torch.bfloat16),  # a last group of 16 inputs
        (600, 4096, 1024, 256, True, torch.bfloat16),
        (2049, 200, 640, 128, True, torch.float32),
        (513, 17152, 384, 128, False, torch.bfloat16),  # more tiles than programs
    ],
)
def test_products_are_the_formula(tokens, outputs, inputs, size, zeros, dtype):
    packed, exact = weight(outputs, inputs, size, zeros, dtype)
    x, bias = inputs_of(tokens, inputs), torch.randn(outputs, device=DEVICE).to(dtype)
    y = linear_async(*x, packed, bias, torch.float32)
    assert error(y, product(x, exact, bias)) < 1e-4
    assert torch.equal(linear_async(*x, packed, bias, torch.float32, together=1), y)
    y = linear_async(*x, packed, None, torch.bfloat16)
    assert error(y, product(x, exact)) < 3e-3


@on_hopper
def test_every_code_less_every_zero_point_is_exact():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(16)
    zeros = torch.arange(-8, 8, dtype=torch.int8).repeat_interleave(16)
    whole = torch.zeros(256, 128, dtype=torch.int8)
    whole[:, 77] = codes
    packed = prepack(whole.to(DEVICE), torch.ones(256, 1, device=DEVICE), zeros[:, None].to(DEVICE))
    x = torch.zeros(200, 128, dtype=torch.uint8)
    x[:, 77] = torch.arange(200) % 127  # e4m3 numbers
    x = x.view(torch.float8_e4m3fn)
    y = linear_async(x.to(DEVICE), torch.ones(200, device=DEVICE), packed, None, torch.float32)
    assert torch.equal(y.cpu(), x[:, 77].float()[:, None] * (codes - zeros).float()[None])


@on_hopper
def test_nan_and_scales_at_their_ends_stay_where_they_are():
    for magnitude in (1e-30, 1e30):
        packed, exact = weight(192, 512, dtype=torch.float32, magnitude=magnitude)
        codes, scale = inputs_of(140, 512)
        codes.view(torch.uint8)[3, 5] = 127
        y = linear_async(codes, scale, packed, None, torch.float32)
        assert y.isnan().all(1).nonzero().flatten().tolist() == [3]
        rest = torch.arange(140, device=DEVICE) != 3
        assert error(y[rest], product((codes, scale), exact)[rest]) < 1e-4


@on_hopper
def test_a_replayed_graph_reads_its_inputs_anew():
    packed, exact = weight(8448, 256)  # 264 programs
    x = torch.randn(512, 256, device=DEVICE)
    assert is_async(quantize_fp8(x)[0], packed, x.dtype)
    int4_fp8_linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int4_fp8_linear(x, packed)
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert error(y, product(quantize_fp8(x), exact)) < 1e-4


@on_hopper
def test_compiled_code_calls_it():
    packed, exact = weight(8448, 256)
    x = torch.randn(512, 256, device=DEVICE)
    y = torch.compile(int4_fp8_linear, backend="aot_eager", fullgraph=True)(x, packed)
    assert error(y, product(quantize_fp8(x), exact)) < 1e-4


@on_hopper
def test_swiglu_of_it_is_another_launch():
    """What the plain kernel would have done in one, within the rounding of gates and ups to bf16."""
    packed, exact = weight(8448, 256)
    x = inputs_of(512, 256)
    assert is_async(x[0], packed, torch.bfloat16)
    assert linear_launch.gated(*x, packed, None, torch.bfloat16) is None
    codes, scale = int4_fp8_swiglu(x, packed)
    gate, up = product(x, exact).chunk(2, 1)
    assert error(codes.double() * scale.double()[:, None], torch.nn.functional.silu(gate) * up) < 0.04  # FP8's rounding


def test_it_is_left_to_the_plain_kernel_what_the_copy_engine_refuses_or_that_is_faster(monkeypatch):
    here = bool(GPU and linear_launch.HAS_GLUON)
    fine, x = weight(8448, 256)[0], inputs_of(512, 256)[0]
    assert is_async(x, fine, torch.bfloat16) == here
    assert not is_async(x[:128], fine, torch.bfloat16)
    assert not is_async(x, weight(4096, 256)[0], torch.bfloat16)  # half of the multiprocessors
    assert not is_async(x, weight(8449, 256)[0], torch.bfloat16)  # rows of Y of 16,898 bytes
    assert not is_async(x, weight(8448, 256, 64)[0], torch.bfloat16)
    assert not is_async(x.view(-1)[8:-248].view(-1, 256), fine, torch.bfloat16)  # it begins at 8 bytes
    monkeypatch.setattr(linear_launch, "HAS_GLUON", False)
    assert not is_async(x, fine, torch.bfloat16)


@on_hopper
def test_without_gluon_the_product_is_the_same(monkeypatch):
    packed, exact = weight(8448, 256)
    x = inputs_of(512, 256)
    monkeypatch.setattr(linear_launch, "HAS_GLUON", False)
    assert error(linear(*x, packed, None, torch.float32), product(x, exact)) < 1e-4
    assert linear_launch.gated(*x, packed, None, torch.bfloat16) is not None
