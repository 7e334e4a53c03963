"""Matrix-vector products that read only the weights of active channels.

`sparse_linear` and `sparse_swiglu` take a Triton kernel on a GPU, a compiled one on a CPU, and the masked dense product
of `reference` where neither is there, where a gradient is wanted, or where sparsity does not pay: then the result is
the same and only the time differs.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kit.kernels.sparse_matvec.cpu_kernel import DTYPES as CPU_DTYPES
from kit.kernels.sparse_matvec.cpu_kernel import library
from kit.kernels.sparse_matvec.cpu_kernel import sparse_linear as cpu_linear
from kit.kernels.sparse_matvec.cpu_kernel import sparse_swiglu as cpu_swiglu
from kit.kernels.sparse_matvec.reference import dequantize_int4, keep_mask, quantize_int4
from kit.kernels.sparse_matvec.reference import sparse_linear as dense_linear
from kit.kernels.sparse_matvec.reference import sparse_linear_int4 as dense_linear_int4
from kit.kernels.sparse_matvec.reference import sparse_swiglu as dense_swiglu

try:
    from kit.kernels.sparse_matvec.launch import sparse_linear as gpu_linear
    from kit.kernels.sparse_matvec.launch import sparse_linear_int4 as gpu_linear_int4
    from kit.kernels.sparse_matvec.launch import sparse_swiglu as gpu_swiglu

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

__all__ = [
    "dequantize_int4",
    "keep_mask",
    "pays_on_gpu",
    "quantize_int4",
    "sparse_linear",
    "sparse_linear_int4",
    "sparse_linears",
    "sparse_swiglu",
]

MAX_ROWS = 4  # rows of x that a kernel takes at once
# Share of weights read above which dense is faster (benchmarks/sparse_matvec.py measures it): of one row, and of more,
# which pay on large weights only. The CPU kernel of linears needs no such limit: it is no slower than PyTorch's product
# even where it reads everything; that of SwiGLU takes so many rows in bf16.
GPU_CROSSOVER, GPU_ROWS_CROSSOVER, GPU_ROWS_WEIGHTS = 0.9, 0.8, 2**25
CPU_SWIGLU_ROWS = 1
NAMESPACE = f"kit_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]}"


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    density: float = 0.5,
) -> Tensor:
    """y = W(s⊙x) + U_r S_r V_rᵀ((1−s)⊙x) + b, reading only the rows of weight_t that some row of x keeps.

    Args:
        x: (..., K), bf16, fp16 or fp32.
        weight_t: (K, N) contiguous, Wᵀ: the weights of one input channel side by side. On a GPU one weight must not be
            used on two streams at a time.
        threshold: T of s_i = 1[|x_i|·scale_i > T]; a tensor of one number, fp32, is read on its device.
        scale: (K,) fp32, or None for 1.
        low_rank: ((U_r S_r)ᵀ (r, N) contiguous, V_rᵀ (r, K) contiguous), or None.
        bias: (N,).
        density: share of channels that a token is expected to keep; it decides only between sparse and dense.

    Returns:
        (..., N), dtype of x.
    """
    up_t, down = low_rank or (None, None)
    size, outputs = weight_t.shape
    rank = 0 if down is None else down.shape[0]
    wanted = ((size, outputs), (rank, outputs), (rank, size), (outputs,))
    if x.shape[-1] != size or not _takes(x, (weight_t, up_t, down, bias), wanted, scale, size):
        return dense_linear(x, weight_t, threshold, scale, low_rank=low_rank, bias=bias)
    given, number = (threshold, 0.0) if isinstance(threshold, Tensor) else (None, float(threshold))
    run = _linear_op if torch.compiler.is_compiling() else _linear
    return run(x, weight_t, given, number, scale, up_t, down, bias, density)


def sparse_linears(
    x: Tensor,
    weight_t: Tensor,
    bounds: tuple[int, ...],
    thresholds: Tensor,
    scales: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Two or three `sparse_linear` of the same x side by side, each with a mask of its own: on a GPU one launch.

    Args:
        x: (..., K), bf16, fp16 or fp32.
        weight_t: (K, N) contiguous, the linears' Wᵀ side by side.
        bounds: columns at which the second and the third start, multiples of 256.
        thresholds: (linears,) fp32.
        scales: (linears, K) fp32, or None for 1.
        bias: (N,).

    Returns:
        (..., N), dtype of x.
    """
    size, outputs = weight_t.shape
    takes = _takes(x, (weight_t, bias), ((size, outputs), (outputs,)), None, size) and x.shape[-1] == size
    if HAS_TRITON and x.is_cuda and takes:
        rows = x.reshape(-1, size).contiguous()
        return gpu_linear(rows, weight_t, thresholds, scales, None, bias, bounds=bounds).view(*x.shape[:-1], -1)
    edges = (0, *bounds, outputs)
    return torch.cat(
        [
            dense_linear(
                x, weight_t[:, first:end], thresholds[i], None if scales is None else scales[i],
                bias=None if bias is None else bias[first:end],
            )
            for i, (first, end) in enumerate(pairwise(edges))
        ], -1,
    )  # fmt: skip


def sparse_linear_int4(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """`sparse_linear` with weights in 4 bits: a GPU reads an eighth of them at a sparsity of 50 %.

    Elsewhere than on a GPU, and for more than a few rows, the weights are unpacked and multiplied densely.

    Args:
        x: (..., K), bf16, fp16 or fp32.
        packed, weight_scale: (K, N / 2) uint8 and (K / g, N) of x's dtype, from `quantize_int4`.
        threshold, scale, bias: as for `sparse_linear`.

    Returns:
        (..., N), dtype of x.
    """
    size, outputs = packed.shape[0], 2 * packed.shape[1]
    like_x, wanted = (weight_scale, bias), ((weight_scale.shape[0], outputs), (outputs,))
    fits = packed.device == x.device and packed.is_contiguous() and size % weight_scale.shape[0] == 0
    if HAS_TRITON and x.is_cuda and x.shape[-1] == size and fits and _takes(x, like_x, wanted, scale, size):
        given, number = (threshold, 0.0) if isinstance(threshold, Tensor) else (None, float(threshold))
        run = _linear_int4_op if torch.compiler.is_compiling() else _linear_int4
        return run(x, packed, weight_scale, given, number, scale, bias)
    return dense_linear_int4(x, packed, weight_scale, threshold, scale, bias=bias)


def sparse_swiglu(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, thresholds: Tensor, *, density: float = 0.5
) -> Tensor:
    """h = s⊙SiLU(W_gate x)⊙(W_up x), s_i = 1[|SiLU(W_gate x)_i| > t_i], reading only the kept rows of up_weight.

    Args:
        x: (..., K), bf16, fp16 or fp32.
        gate_weight, up_weight: (N, K) contiguous.
        thresholds: (N,) fp32.
        density: share of channels that a token is expected to keep; it decides only between sparse and dense.

    Returns:
        (..., N), dtype of x; multiply by W_down with `sparse_linear` and a threshold of 0.
    """
    outputs = gate_weight.shape[0]
    wanted = (outputs, x.shape[-1])
    if not _takes(x, (gate_weight, up_weight), (wanted, wanted), thresholds, outputs):
        return dense_swiglu(x, gate_weight, up_weight, thresholds)
    run = _swiglu_op if torch.compiler.is_compiling() else _swiglu
    return run(x, gate_weight, up_weight, thresholds, density)


def _takes(
    x: Tensor,
    like_x: tuple[Tensor | None, ...],
    wanted: tuple[tuple[int, ...], ...],
    fp32: Tensor | None,
    size: int,
) -> bool:
    """Whether the kernels, which see addresses only, take these tensors; PyTorch takes, or refuses, all others.

    They take few rows, one dtype and device, contiguous tensors of the `wanted` shapes, `size` fp32 numbers, no grad.
    """
    if x.numel() > MAX_ROWS * x.shape[-1] or x.numel() == 0:
        return False
    if fp32 is not None and (
        fp32.dtype != torch.float32 or fp32.device != x.device or fp32.shape != (size,) or not fp32.is_contiguous()
    ):
        return False
    gradient = torch.is_grad_enabled()
    if gradient and x.requires_grad:
        return False
    for t, shape in zip(like_x, wanted, strict=True):
        if t is not None and (
            t.dtype != x.dtype
            or t.device != x.device
            or t.shape != shape
            or not t.is_contiguous()
            or (gradient and t.requires_grad)
        ):
            return False
    return True


def pays_on_gpu(x: Tensor, density: float, weights: int) -> bool:
    """Whether the Triton kernel runs and is faster: rows share what they read, 1 − (1 − d)^M of so many weights."""
    rows = x.numel() // x.shape[-1]
    union = 1 - (1 - density) ** rows
    limit = GPU_CROSSOVER if rows == 1 else GPU_ROWS_CROSSOVER
    return x.is_cuda and HAS_TRITON and union <= limit and (rows == 1 or weights >= GPU_ROWS_WEIGHTS)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in CPU_DTYPES and library() is not None


def _linear(
    x: Tensor,
    weight_t: Tensor,
    given: Tensor | None,
    number: float,
    scale: Tensor | None,
    up_t: Tensor | None,
    down: Tensor | None,
    bias: Tensor | None,
    density: float,
) -> Tensor:
    threshold = number if given is None else given
    low_rank = None if up_t is None or down is None else (up_t, down)
    if _on_cpu(x):
        return cpu_linear(x.contiguous(), weight_t, float(threshold), scale, low_rank, bias)
    if pays_on_gpu(x, density, weight_t.numel()):
        y = gpu_linear(x.reshape(-1, x.shape[-1]).contiguous(), weight_t, threshold, scale, low_rank, bias)
        return y.view(*x.shape[:-1], -1)
    return dense_linear(x, weight_t, threshold, scale, low_rank=low_rank, bias=bias)


def _swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor, thresholds: Tensor, density: float) -> Tensor:
    if (x.dtype == torch.float32 or x.numel() <= CPU_SWIGLU_ROWS * x.shape[-1]) and _on_cpu(x):
        return cpu_swiglu(x.contiguous(), gate_weight, up_weight, thresholds)
    if pays_on_gpu(x, density, 2 * gate_weight.numel()):
        h = gpu_swiglu(x.reshape(-1, x.shape[-1]).contiguous(), gate_weight, up_weight, thresholds)
        return h.view(*x.shape[:-1], -1)
    return dense_swiglu(x, gate_weight, up_weight, thresholds)


def _linear_int4(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    given: Tensor | None,
    number: float,
    scale: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    threshold = number if given is None else given
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return gpu_linear_int4(rows, packed, weight_scale, threshold, scale, bias).view(*x.shape[:-1], -1)


# torch.compile keeps these as single nodes; eager calls skip the dispatcher, which costs more than a small product.
_linear_op = torch.library.custom_op(f"{NAMESPACE}::sparse_linear", _linear, mutates_args=())
_linear_int4_op = torch.library.custom_op(f"{NAMESPACE}::sparse_linear_int4", _linear_int4, mutates_args=())
_swiglu_op = torch.library.custom_op(f"{NAMESPACE}::sparse_swiglu", _swiglu, mutates_args=())


@_linear_op.register_fake
def _(x, weight_t, given, number, scale, up_t, down, bias, density):
    return x.new_empty(*x.shape[:-1], weight_t.shape[1])


@_linear_int4_op.register_fake
def _(x, packed, weight_scale, given, number, scale, bias):
    return x.new_empty(*x.shape[:-1], 2 * packed.shape[1])


@_swiglu_op.register_fake
def _(x, gate_weight, up_weight, thresholds, density):
    return x.new_empty(*x.shape[:-1], gate_weight.shape[0])
