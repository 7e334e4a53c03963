"""Launchers of the Triton kernels: how a shape is cut, and scratch memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kit.kernels.counters import counters_of
from kit.kernels.sparse_matvec.kernel import dropped_rows, int4_rows, linear_rows, swiglu_rows, triton

MULTIPROCESSORS = 132  # of the H100 that cuts were chosen on
MAX_CHUNK = 2048  # input channels that a program lists at once


@dataclass(frozen=True)
class Cut:
    """How `linear_rows` is cut: columns a program, groups of warps, rows a step, warps, and programs for the device.

    `chunk` is how many channels a program lists; None makes as many programs as `programs` says.
    """

    columns: int = 256
    groups: int = 2
    depth: int = 16
    warps: int = 2
    programs: int = 4 * MULTIPROCESSORS
    chunk: int | None = None

    @classmethod
    def of(cls, rows: int, outputs: int, bounds: tuple[int, ...] = ()) -> Cut:
        """What was fastest on an H100 for M rows of input (benchmarks/sparse_matvec.py --sweep).

        Args:
            rows: M.
            outputs: N.
            bounds: columns where another linear starts: programs must not reach across.
        """
        wide = all(bound % 512 == 0 for bound in bounds)
        if rows == 1:
            return cls(512, 2, 8, 4) if outputs >= 8192 and wide else cls()
        three = 3 * MULTIPROCESSORS
        return cls(512, 2, 8, 4, three) if wide else cls(256, 4, 8, 4, three)

    def fill(self, inputs: int, outputs: int) -> int:
        """The chunk: at least two steps, of which sparsity leaves about one; a multiple of 16."""
        if self.chunk is None:
            splits = max(self.programs // triton.cdiv(outputs, self.columns), 1)
            chunk = max(triton.cdiv(inputs, splits), 2 * self.depth * self.groups)
        else:
            chunk = self.chunk
        return min(triton.cdiv(chunk, 16) * 16, MAX_CHUNK)


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    cut: Cut | None = None,
    bounds: tuple[int, ...] = (),
) -> Tensor:
    """`reference.sparse_linear` of x (M, K), M ≤ 4, in fp32 sums; all tensors contiguous, of x's dtype, scale fp32.

    With `bounds`, weight_t is that of two or three linears side by side, of which the second and third start at these
    columns, multiples of the cut's; threshold is a tensor of as many numbers, scale (linears, K).
    """
    rows, size, outputs = *x.shape, weight_t.shape[1]
    cut = cut or Cut.of(rows, outputs, bounds)
    segments = 1 + len(bounds)
    second, third = (*(bound // cut.columns for bound in bounds), outputs, outputs)[:2]
    chunk, tiles = cut.fill(size, outputs), triton.cdiv(outputs, cut.columns)
    splits = triton.cdiv(size, chunk)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    index = torch.empty(segments, size, dtype=torch.int32, device=x.device)
    values = torch.empty(segments, rows, size, dtype=torch.float32, device=x.device)
    partial = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    has_scale, has_tensor = scale is not None, isinstance(threshold, Tensor)
    scale = x if scale is None else scale
    up_t, hidden, rank = x, x, 0
    if low_rank is not None and low_rank[1].shape[0]:
        up_t, down = low_rank
        rank = down.shape[0]
        hidden = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
        dropped_rows[(rank, rows)](
            x, scale, threshold, down, hidden, size, rank, HAS_SCALE=has_scale, HAS_TENSOR=has_tensor,
            BK=min(triton.next_power_of_2(size), 4096), num_warps=8,
        )  # fmt: skip
    linear_rows[(tiles, splits)](
        x, weight_t, scale, threshold, up_t, hidden, x if bias is None else bias, index, values, partial,
        counters_of(weight_t, tiles), y, size, outputs, rank, chunk, triton.cdiv(rank, splits), splits, second,
        third, SEGMENTS=segments, M=rows, HAS_SCALE=has_scale, HAS_TENSOR=has_tensor, HAS_RANK=rank > 0,
        HAS_BIAS=bias is not None, EVEN=outputs % cut.columns == 0, BN=cut.columns, ROWS=cut.groups,
        DEPTH=cut.depth, CHUNK=triton.next_power_of_2(chunk), num_warps=cut.warps,
    )  # fmt: skip
    return y


def sparse_linear_int4(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """`reference.sparse_linear_int4` of x (M, K), M ≤ 4, in fp32 sums; all contiguous; columns of a cut are bytes."""
    rows, size, half = *x.shape, packed.shape[1]
    group = size // weight_scale.shape[0]
    cut = cut or (Cut(depth=8, chunk=128) if rows == 1 else Cut(256, 4, 8, 4))
    tiles = triton.cdiv(half, cut.columns)
    chunk = max(min(triton.cdiv(cut.fill(size, half), group), MAX_CHUNK // group), 1) * group
    splits = triton.cdiv(size, chunk)
    y = torch.empty(rows, 2 * half, dtype=x.dtype, device=x.device)
    index = torch.empty(size, dtype=torch.int32, device=x.device)
    values = torch.empty(rows, size, dtype=torch.float32, device=x.device)
    ends = torch.empty(weight_scale.shape[0], dtype=torch.int32, device=x.device)
    partial = torch.empty(splits, rows, 2 * half, dtype=torch.float32, device=x.device)
    int4_rows[(tiles, splits)](
        x, packed, weight_scale, x if scale is None else scale, threshold, x if bias is None else bias, index, values,
        ends, partial, counters_of(packed, tiles), y, size, half, chunk, splits, M=rows, HAS_SCALE=scale is not None,
        HAS_TENSOR=isinstance(threshold, Tensor), HAS_BIAS=bias is not None,
        EVEN=half % cut.columns == 0 and packed.data_ptr() % 8 == 0, GROUP=group, BN=cut.columns,
        ROWS=cut.groups, DEPTH=cut.depth, CHUNK=triton.next_power_of_2(chunk), num_warps=cut.warps,
    )  # fmt: skip
    return y


def sparse_swiglu(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, thresholds: Tensor, block: tuple[int, int, int] | None = None
) -> Tensor:
    """`reference.sparse_swiglu` of x (M, K), M ≤ 4, in fp32 to the end; all contiguous, thresholds fp32.

    `block` is (rows of the weights, input features, warps) a program.
    """
    rows, size, outputs = *x.shape, gate_weight.shape[0]
    height, width, warps = block or ((4, 2048, 4) if rows == 1 else (4 if rows == 2 else 2, 1024, 4))
    width = min(triton.next_power_of_2(size), width)
    h = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    swiglu_rows[(triton.cdiv(outputs, height),)](
        x, gate_weight, up_weight, thresholds, h, size, outputs, M=rows, BN=height, BK=width, num_warps=warps
    )
    return h
