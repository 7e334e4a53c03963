"""Products with INT4 weights and FP8 activations, and the quantization of what they read.

On a Hopper GPU these are Triton kernels; elsewhere, and for shapes that no kernel takes, PyTorch computes the same from
the dequantized weight. All can be captured in a CUDA graph, and torch.compile keeps each as a single node.
"""

from __future__ import annotations

import hashlib
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.int4_fp8.packing import PackedInt4
from kit.kernels.int4_fp8.reference import FP8, quantize_activations
from kit.kernels.operations import operation

try:
    from kit.kernels.int4_fp8.linear_launch import FEW, MAX_WIDTH
    from kit.kernels.int4_fp8.linear_launch import expand as gpu_expand
    from kit.kernels.int4_fp8.linear_launch import gated as gpu_gated
    from kit.kernels.int4_fp8.linear_launch import linear as gpu_linear
    from kit.kernels.int4_fp8.linear_launch import linear_int8 as gpu_linear_int8
    from kit.kernels.int4_fp8.linear_launch import norm_quantize as gpu_norm_quantize
    from kit.kernels.int4_fp8.linear_launch import quantize as gpu_quantize
    from kit.kernels.int4_fp8.linear_launch import swiglu_quantize as gpu_swiglu_quantize

    HAS_TRITON = True
except ImportError:
    HAS_TRITON, FEW, MAX_WIDTH = False, 0, 0

EXPANDED_FROM = 2048  # tokens that make up for writing the weight out in FP8
EXPANDED_ROWS = 8192  # of a weight in INT8, in 16 bits at a time
NAMESPACE = f"kit_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic FP8, one scale a token, by the rule of the checkpoint (`reference.quantize_activations`).

    Args:
        x: (..., K), bf16, fp16 or fp32.

    Returns:
        (..., K) e4m3 and (...,) fp32.
    """
    return _quantize(x)


def int4_fp8_linear(
    x: Tensor | tuple[Tensor, Tensor],
    weight: PackedInt4,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    exact: bool = True,
) -> Tensor:
    """Y = X Wᵀ + b, X in FP8 with a scale a token, W in INT4 with a scale a group, sums in fp32.

    Results do not differ between runs. One weight must not be used on two streams at a time.

    Args:
        x: (..., K), which is quantized first, or what `quantize_fp8`, `rms_norm_quantize` or `swiglu_quantize` gave.
        weight: from `prepack`.
        bias: (N,).
        dtype: of the result, where x is quantized; else it is x's.
        exact: False lets a GPU round the weight to FP8 from 2,048 tokens on, one scale a row (FireQ's kernel rounds
            such products too, to a scale a tensor), for cuBLAS: faster, with 2.6 % of error of its own, as much as the
            rounding of x.

    Returns:
        (..., N).
    """
    if isinstance(x, Tensor):
        dtype = x.dtype
        x = quantize_fp8(x)
    codes, scale = x
    return _linear(
        codes, scale, weight.codes, weight.scales, weight.zeros, weight.out_features, weight.in_features, bias, dtype,
        exact,
    )  # fmt: skip


def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Y = X Wᵀ, W in INT8 with a scale a row: up to 16 tokens in bf16 on our kernel, else in x's dtype by parts of W.

    Args:
        x: (..., K).
        codes: (N, K) int8.
        scale: (N,).

    Returns:
        (..., N) in x's dtype.
    """
    return _linear_int8(x, codes, scale)


def int4_fp8_swiglu(
    x: tuple[Tensor, Tensor],
    weight: PackedInt4,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """`swiglu_quantize` of `int4_fp8_linear`, the same numbers; SwiGLU is done where the product is, as far as
    that is faster.

    Args:
        x: (..., K) e4m3 and (...,) fp32.
        weight: (2 I, K), gates first.
        bias, dtype, exact: as for `int4_fp8_linear`.

    Returns:
        (..., I) e4m3 and (...,) fp32.
    """
    codes, scale = x
    return _linear_swiglu(
        codes, scale, weight.codes, weight.scales, weight.zeros, weight.out_features, weight.in_features, bias, dtype,
        exact,
    )  # fmt: skip


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Add a residual, normalise and quantize, in one launch, with the roundings of transformers' RMSNorm.

    h = x + residual; n = weight · round(h / √(mean h² + eps)), rounded to x's dtype at each step; then `quantize_fp8`.

    Args:
        x: (..., K).
        weight: (K,), the gain.
        eps: added to the mean square.
        residual: (..., K) of x's dtype, or None.

    Returns:
        (..., K) e4m3, (...,) fp32, and with a residual also h, (..., K).
    """
    if residual is None:
        return _norm_quantize(x, weight, eps)
    return _add_norm_quantize(x, weight, eps, residual)


def swiglu_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU(gate) · up and quantize, in one launch, with the roundings of transformers' MLP.

    Args:
        gate_up: (..., 2 I), gates first, as fused gate and up projections give them.

    Returns:
        (..., I) e4m3 and (...,) fp32.
    """
    return _swiglu_quantize(gate_up)


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    hopper = HAS_TRITON and torch.cuda.get_device_capability(device)[0] == 9
    if not hopper:
        warnings.warn(
            "the INT4-FP8 kernels need Triton and a Hopper GPU: weights are dequantized for every product instead",
            stacklevel=2,
        )
    return hopper


def _on_kernels(x: Tensor, width: int) -> bool:
    return x.is_cuda and x.numel() > 0 and width <= MAX_WIDTH and _is_hopper(x.device)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _operation(function: Any) -> Any:
    return operation(f"{NAMESPACE}::{function.__name__.strip('_')}")(function)


@_operation
def _linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zeros: Tensor | None,
    outputs: int,
    inputs: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    exact: bool,
) -> Tensor:
    packed = PackedInt4(weight, weight_scale, zeros, outputs, inputs)
    if _on_kernels(codes, 0):
        x, x_scale = _rows(codes), scale.reshape(-1).contiguous()
        if not exact and len(x) >= EXPANDED_FROM and dtype == torch.bfloat16 and outputs % 16 == inputs % 16 == 0:
            y = _expanded(x, x_scale, packed, bias)
        else:
            y = gpu_linear(x, x_scale, packed, bias, dtype)
        return y.view(*codes.shape[:-1], outputs)
    y = F.linear(codes.float(), packed.dequantize()) * scale[..., None]
    return (y if bias is None else y + bias.float()).to(dtype)


def _expanded(x: Tensor, x_scale: Tensor, weight: PackedInt4, bias: Tensor | None) -> Tensor:
    """Y (M, N) bf16 of x (M, K) and the weight rounded to FP8."""
    expanded, scale = gpu_expand(weight)
    y = torch._scaled_mm(x, expanded.T, x_scale[:, None], scale, out_dtype=torch.bfloat16, use_fast_accum=True)
    return y if bias is None else y + bias.to(y.dtype)


@_linear.register_fake
def _(codes, scale, weight, weight_scale, zeros, outputs, inputs, bias, dtype, exact):
    return codes.new_empty(*codes.shape[:-1], outputs, dtype=dtype)


@_operation
def _linear_int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    rows = _rows(x)
    if _on_kernels(x, 0) and x.dtype == torch.bfloat16 and len(rows) <= 2 * FEW:
        return gpu_linear_int8(rows, codes, scale).view(*x.shape[:-1], len(codes))
    y = x.new_empty(*x.shape[:-1], len(codes))
    for first in range(0, len(codes), EXPANDED_ROWS):
        part = slice(first, first + EXPANDED_ROWS)
        y[..., part] = F.linear(x, codes[part].to(x.dtype)) * scale[part]
    return y


@_linear_int8.register_fake
def _(x, codes, scale):
    return x.new_empty(*x.shape[:-1], len(codes))


@_operation
def _linear_swiglu(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zeros: Tensor | None,
    outputs: int,
    inputs: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    tokens = codes.numel() // inputs
    if _on_kernels(codes, 0) and (exact or tokens < EXPANDED_FROM):
        packed = PackedInt4(weight, weight_scale, zeros, outputs, inputs)
        made = gpu_gated(_rows(codes), scale.reshape(-1).contiguous(), packed, bias, dtype)
        if made is not None:
            return made[0].view(*codes.shape[:-1], outputs // 2), made[1].view(codes.shape[:-1])
    y = _linear(codes, scale, weight, weight_scale, zeros, outputs, inputs, bias, dtype, exact)
    return _swiglu_quantize(y)


@_linear_swiglu.register_fake
def _(codes, scale, weight, weight_scale, zeros, outputs, inputs, bias, dtype, exact):
    return _fake_quantized(codes, outputs // 2)


def _fake_quantized(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(*x.shape[:-1], width, dtype=FP8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _reference_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = quantize_activations(x)
    return codes, scale[..., 0].contiguous()


@_operation
def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    if not _on_kernels(x, x.shape[-1]):
        return _reference_quantize(x)
    rows = x.reshape(-1, x.shape[-1])
    codes, scale = gpu_quantize(rows if rows.stride(-1) == 1 else rows.contiguous())
    return codes.view(x.shape), scale.view(x.shape[:-1])


@_quantize.register_fake
def _(x):
    return _fake_quantized(x, x.shape[-1])


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    unit = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return _reference_quantize((weight * unit).to(x.dtype))


@_operation
def _norm_quantize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not _on_kernels(x, x.shape[-1]):
        return _normed(x, weight, eps)
    codes, scale, _ = gpu_norm_quantize(_rows(x), weight.contiguous(), eps, None)
    return codes.view(x.shape), scale.view(x.shape[:-1])


@_norm_quantize.register_fake
def _(x, weight, eps):
    return _fake_quantized(x, x.shape[-1])


@_operation
def _add_norm_quantize(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not _on_kernels(x, x.shape[-1]):
        h = x + residual
        return *_normed(h, weight, eps), h
    codes, scale, h = gpu_norm_quantize(_rows(x), weight.contiguous(), eps, _rows(residual))
    return codes.view(x.shape), scale.view(x.shape[:-1]), h.view(x.shape)


@_add_norm_quantize.register_fake
def _(x, weight, eps, residual):
    return *_fake_quantized(x, x.shape[-1]), x.new_empty(x.shape)


@_operation
def _swiglu_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    width = gate_up.shape[-1] // 2
    if not _on_kernels(gate_up, width):
        gate, up = gate_up.chunk(2, dim=-1)
        return _reference_quantize(F.silu(gate) * up)
    codes, scale = gpu_swiglu_quantize(_rows(gate_up))
    return codes.view(*gate_up.shape[:-1], width), scale.view(gate_up.shape[:-1])


@_swiglu_quantize.register_fake
def _(gate_up):
    return _fake_quantized(gate_up, gate_up.shape[-1] // 2)
