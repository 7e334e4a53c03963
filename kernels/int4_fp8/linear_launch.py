"""Launchers of the Triton kernels of this folder's products: how a shape is cut, and scratch memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kit.kernels.counters import counters_of
from kit.kernels.int4_fp8.dispatch import ceil_div, launch, power_of_two
from kit.kernels.int4_fp8.linear_kernel import expand_rows, few_tokens, few_tokens_int8, group_sums, many_tokens
from kit.kernels.int4_fp8.packing import TILE, PackedInt4
from kit.kernels.int4_fp8.quantize_kernel import norm_rows, quantize_parts, quantize_rows, swiglu_rows
from kit.kernels.int4_fp8.reference import FP8

try:
    from kit.kernels.int4_fp8.linear_gluon import described, many_tokens_async

    HAS_GLUON = True
except ImportError:  # a Triton without it
    HAS_GLUON = False

FEW = 8  # tokens up to which `few_tokens` runs, up to twice as many for weights of at most SMALL groups
SMALL = 2**18
MAX_WIDTH = 65536  # features of a token that a quantizing program holds
PAIRED_UP_TO = 2048  # tokens up to which SwiGLU is done where the product is
PART = 1024  # features of a token that a program of `quantize_parts` holds
ASYNC_TOKENS = 256  # a program of `linear_async`, which has 128 rows
MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True)
class Cut:
    """How a product is cut.

    Attributes:
        rows: of W, a program.
        tokens: columns of a product.
        parts: products a program holds; 0 is the kernel for few tokens.
        warps: of a program.
        stages: of its pipeline.
        splits: of K.
        together: blocks of tokens that run next to each other.
        descriptor: tokens are fetched by the copy engine.
        lines: of 128 bytes of codes that a program asks for before the kernel before it has ended.
    """

    rows: int
    tokens: int
    parts: int
    warps: int
    stages: int
    splits: int = 1
    together: int = 2
    descriptor: bool = False
    lines: int = 0

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, tokens: int, outputs: int, groups: int) -> Cut:
        """The cut for M tokens, N output features padded to tiles and G groups, as benchmarks/int4_fp8.py found it."""
        if tokens <= FEW or (tokens <= 2 * FEW and outputs * groups <= SMALL):
            splits = ceil_div(groups, 32)
            lines = 128 if outputs // 16 * splits <= 4 * MULTIPROCESSORS else 0
            return cls(16, 8 if tokens <= 8 else 16, 0, 4, 3, splits, lines=lines)
        tiles = outputs // TILE
        if tokens <= 32:
            splits = min(max(2, _power_of_two(576 // tiles, groups // 4)), groups)
            return cls(64, 32, 1, 4, 3, splits, descriptor=True)
        if tokens <= 64:
            splits = _power_of_two(400 // tiles, groups // 4)
            return cls(64, 64, 1, 4, 3, splits, lines=256 if splits > 1 else 0)
        if tokens <= 128 and outputs % 128 == 0 and outputs // 128 >= MULTIPROCESSORS:
            return cls(128, 64, 2, 4, 3, descriptor=True)
        single, double = _waves(tokens, tiles)
        if single == 1:
            splits = min(_power_of_two(2 * MULTIPROCESSORS // (tiles * ceil_div(tokens, 128)), groups // 4), 4)
            if splits == 1:
                return cls(64, 64, 2, 4, 4, descriptor=True)
            return cls(64, 128, 1, 4, 3, splits, descriptor=True)
        parts = 1 if 0.55 * single < double else 2
        return cls(64, 128, parts, 4, 3, descriptor=True)


def _waves(tokens: int, tiles: int) -> tuple[int, int]:
    """How often programs of 64 rows by 128 tokens, and by 256, fill the device: two run on a multiprocessor at a time.

    The first take 0.55 of the time of the others; those of `linear_async`, one at a time, 0.89 of it.
    """
    single, double = (ceil_div(tiles * ceil_div(tokens, size), 2 * MULTIPROCESSORS) for size in (128, 256))
    return single, double


def _power_of_two(wanted: int, most: int) -> int:
    """The largest power of two that is not above either number nor 8, and at least 1."""
    return 1 << min(max(min(wanted, most), 1).bit_length() - 1, 3)


def is_async(x: Tensor, weight: PackedInt4, dtype: torch.dtype) -> bool:
    """Whether `linear_async` takes this product and is faster, as benchmarks/int4_fp8.py found.

    It takes groups of 128, rows of x and Y of whole 16 bytes, which the copy engine fetches and writes, and results in
    16 or 32 bits.
    """
    rows, inputs = x.shape
    addresses = x.data_ptr() | weight.codes.data_ptr()
    aligned = inputs % 16 == addresses % 16 == weight.out_features * dtype.itemsize % 16 == 0
    fits = aligned and weight.codes.shape[-1] == TILE and dtype.itemsize in (2, 4)
    if not (HAS_GLUON and x.is_cuda and fits):
        return False
    tiles = weight.codes.shape[0]
    single, double = _waves(rows, tiles)
    programs = ceil_div(tiles, 2) * ceil_div(rows, ASYNC_TOKENS)
    return single > 1 and 0.89 * ceil_div(programs, MULTIPROCESSORS) < min(0.55 * single, double)


def linear(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedInt4,
    bias: Tensor | None,
    dtype: torch.dtype,
    cut: Cut | None = None,
) -> Tensor:
    """Y (M, N) = x_scale · (x Wᵀ) + b of x (M, K) e4m3 and x_scale (M,) fp32; all contiguous, on one device."""
    if cut is None and is_async(x, weight, dtype):
        return linear_async(x, x_scale, weight, bias, dtype)
    return _product(x, x_scale, weight, bias, dtype, cut, paired=False)[0]


def linear_async(
    x: Tensor, x_scale: Tensor, weight: PackedInt4, bias: Tensor | None, dtype: torch.dtype, together: int = 8
) -> Tensor:
    """`linear` by the kernel in Gluon, of weights and results as `is_async` has them.

    Weights go through for `together` blocks of tokens at a time.
    """
    rows, outputs = len(x), weight.out_features
    tiles, groups, _, half = weight.codes.shape
    row_blocks, token_blocks = ceil_div(tiles, 2), ceil_div(rows, ASYNC_TOKENS)
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    launch(
        many_tokens_async, (min(row_blocks * token_blocks, MULTIPROCESSORS),),
        described(x, [ASYNC_TOKENS, 2 * half]), x_scale, described(weight.codes.view(-1, half), [TILE, half]),
        weight.scales, weight.scales if weight.zeros is None else weight.zeros, y if bias is None else bias,
        described(y, [ASYNC_TOKENS // 2, TILE]), rows, outputs, tiles * TILE, groups, row_blocks, token_blocks,
        HAS_ZEROS=weight.zeros is not None, HAS_BIAS=bias is not None, STAGES=4 if dtype.itemsize == 2 else 2,
        TOGETHER=together, num_warps=4, maxnreg=168, launch_pdl=True,
    )  # fmt: skip
    return y


def gated(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedInt4,
    bias: Tensor | None,
    dtype: torch.dtype,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Codes (M, I) and scale of SiLU(gate) · up, of a weight (2 I, K), gates first.

    The product's programs have gates and up's of the same outputs, so that another launch needs but the largest. None
    if 2 I is no whole tiles and, without a given cut, where two launches are faster: K in splits, many tokens.
    """
    chosen = cut or Cut.of(len(x), weight.codes.shape[0] * TILE, weight.codes.shape[1])
    slower = cut is None and (chosen.splits > 1 or len(x) > PAIRED_UP_TO or is_async(x, weight, dtype))
    if slower or weight.out_features % chosen.rows:
        return None
    active, peaks = _product(x, x_scale, weight, bias, dtype, chosen, paired=True)
    width = active.shape[1]
    codes, scale = _made(len(x), width, x)
    block, warps = _shape(width, len(x)) if len(x) >= MULTIPROCESSORS else (PART, 4)
    launch(
        quantize_parts, (len(x), ceil_div(width, block)),
        active, peaks, codes.view(torch.uint8), scale, width, peaks.shape[1],
        PEAKS=power_of_two(peaks.shape[1]), BLOCK=block, PLAIN=not x.is_cuda, num_warps=warps,
        launch_pdl=x.is_cuda,
    )  # fmt: skip
    return codes, scale


def _product(
    x: Tensor,
    x_scale: Tensor,
    weight: PackedInt4,
    bias: Tensor | None,
    dtype: torch.dtype,
    cut: Cut | None,
    paired: bool,
) -> tuple[Tensor, Tensor]:
    """Y and, of paired outputs, peaks (`linear_kernel.store_active`)."""
    rows, inputs, outputs = *x.shape, weight.out_features
    tiles, groups, _, half = weight.codes.shape
    padded = tiles * TILE
    cut = cut or Cut.of(rows, padded, groups)
    y = torch.empty(rows, outputs // 2 if paired else outputs, dtype=dtype, device=x.device)
    plain = not x.is_cuda
    sums, zeros = x_scale, weight.scales
    if weight.zeros is not None:
        zeros, sums = weight.zeros, torch.empty(rows, groups, dtype=torch.float32, device=x.device)
        launch(
            group_sums,
            (rows, ceil_div(groups, 32)),
            x.view(torch.uint8),
            sums,
            inputs,
            groups,
            GROUP=2 * half,
            BG=32,
            PLAIN=plain,
            num_warps=4,
            launch_pdl=not plain,
        )
    step = cut.warps if not cut.parts else 1
    each = ceil_div(ceil_div(groups, step), cut.splits) * step
    splits = ceil_div(groups, each)
    blocks = ceil_div(rows, cut.tokens * max(cut.parts, 1))
    programs = (outputs if paired else padded) // cut.rows * blocks
    partial, counters, peaks = y, y, y
    if paired:
        peaks = torch.empty(rows, outputs // cut.rows, dtype=torch.int32, device=x.device)
    if splits > 1:
        partial = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
        counters = counters_of(weight.codes, programs * max(cut.parts, 1))
    options = {
        "HAS_ZEROS": weight.zeros is not None,
        "HAS_BIAS": bias is not None,
        "EVEN": inputs == groups * 2 * half,
        "SPLITS": splits,
        "BM": cut.tokens,
        "BN": cut.rows,
        "HALF": half,
        "STAGES": cut.stages,
        "PLAIN": plain,
        "LINES": cut.lines,
        "num_warps": cut.warps,
        "launch_pdl": not plain,
    }
    bias = y if bias is None else bias
    grid = (programs, splits)
    if not cut.parts:
        launch(
            few_tokens, grid,
            x.view(torch.uint8), x_scale, weight.codes, weight.scales, zeros, sums, bias, partial, counters, y, peaks,
            rows, inputs, outputs, padded, groups, each, STEP=step, PAIRED=paired, **options,
        )  # fmt: skip
    else:
        given: Any = x.view(torch.uint8) if plain else x
        by_descriptor = cut.descriptor and not plain and inputs % 16 == x.data_ptr() % 16 == 0
        if by_descriptor:
            given = TensorDescriptor(x, [rows, inputs], [inputs, 1], [cut.tokens, 2 * half])
        launch(
            many_tokens, grid,
            given, x_scale, weight.codes, weight.scales, zeros, sums, bias, partial,
            counters, y, peaks, rows, inputs, outputs, padded, groups, each, blocks, PAIRED=paired, PARTS=cut.parts,
            TOGETHER=cut.together, DESCRIPTOR=by_descriptor, **options,
        )  # fmt: skip
    return y, peaks


def linear_int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Y (M, N) of at most 2 FEW tokens x (M, K) and a weight of codes (N, K) int8 and scales (N,); all contiguous."""
    y = torch.empty(len(x), len(codes), dtype=x.dtype, device=x.device)
    launch(
        few_tokens_int8, (ceil_div(len(codes), 16),),
        x, codes, scale, y, len(x), x.shape[1], len(codes), BM=FEW if len(x) <= FEW else 2 * FEW, BN=16, BK=128,
        STEP=4, STAGES=4, PLAIN=not x.is_cuda, num_warps=4, launch_pdl=x.is_cuda,
    )  # fmt: skip
    return y


def expand(weight: PackedInt4) -> tuple[Tensor, Tensor]:
    """The weight rounded to e4m3, (N, K), and a scale a row, (1, N)."""
    tiles, groups, _, half = weight.codes.shape
    device = weight.codes.device
    out = torch.empty(weight.out_features, weight.in_features, dtype=FP8, device=device)
    scale = torch.empty(1, weight.out_features, dtype=torch.float32, device=device)
    has_zeros = weight.zeros is not None
    launch(
        expand_rows, (tiles, ceil_div(groups, 4)),
        weight.codes, weight.scales, weight.zeros if has_zeros else weight.scales, out.view(torch.uint8), scale,
        weight.in_features, weight.out_features, tiles * TILE, groups, HAS_ZEROS=has_zeros, HALF=half, BG=4, BN=TILE,
        PLAIN=not out.is_cuda, num_warps=4, launch_pdl=out.is_cuda,
    )  # fmt: skip
    return out, scale


def _shape(width: int, rows: int) -> tuple[int, int]:
    """Block and warps of a program that holds a token's features; with few tokens it is all that one waits for."""
    block = power_of_two(width)
    return block, min(max(block // (256 if rows < MULTIPROCESSORS else 512), 1), 32 if rows < MULTIPROCESSORS else 16)


def _made(rows: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(rows, width, dtype=FP8, device=like.device)
    return codes, torch.empty(rows, dtype=torch.float32, device=like.device)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_activations` of x (M, K), rows contiguous."""
    codes, scale = _made(x.shape[0], x.shape[1], x)
    block, warps = _shape(x.shape[1], x.shape[0])
    launch(
        quantize_rows,
        (x.shape[0],),
        x,
        codes.view(torch.uint8),
        scale,
        x.stride(0),
        x.shape[1],
        BLOCK=block,
        PLAIN=not x.is_cuda,
        num_warps=warps,
        launch_pdl=x.is_cuda,
    )
    return codes, scale


def norm_quantize(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and x + residual (x itself without one) of x (M, K), contiguous as is residual."""
    codes, scale = _made(x.shape[0], x.shape[1], x)
    block, warps = _shape(x.shape[1], x.shape[0])
    summed = x if residual is None else torch.empty_like(x)
    launch(
        norm_rows, (x.shape[0],),
        x, x if residual is None else residual, weight, summed, codes.view(torch.uint8), scale, eps, x.shape[1],
        HAS_RESIDUAL=residual is not None, BLOCK=block, PLAIN=not x.is_cuda, num_warps=warps,
        launch_pdl=x.is_cuda,
    )  # fmt: skip
    return codes, scale, summed


def swiglu_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale of SiLU(gate) · up; gate_up (M, 2 I), contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes, scale = _made(rows, width, gate_up)
    block, warps = _shape(width, rows)
    launch(
        swiglu_rows,
        (rows,),
        gate_up,
        codes.view(torch.uint8),
        scale,
        width,
        BLOCK=block,
        PLAIN=not gate_up.is_cuda,
        num_warps=warps,
        launch_pdl=gate_up.is_cuda,
    )
    return codes, scale
