"""Launchers of the Triton kernels: how a shape is cut, and scratch memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kit.kernels.sparse_matvec.kernel import dropped_rows, linear_rows, swiglu_rows, triton

PROGRAMS = 640  # that an H100's 132 multiprocessors hold at once, as `linear_rows` is cut

_counters: dict[tuple[int | None, int, int], Tensor] = {}


@dataclass(frozen=True)
class Cut:
    """How `linear_rows` is cut: columns a program, groups of warps, rows a step, warps, splits of K (None: fill)."""

    columns: int = 256
    groups: int = 4
    depth: int = 16
    warps: int = 4
    splits: int | None = None

    @classmethod
    def of(cls, rows: int) -> Cut:
        """What fits into registers for M rows of input."""
        return cls(depth=16 if rows == 1 else 8)

    def fill(self, inputs: int, outputs: int) -> Cut:
        """Set splits: enough to fill the device once, each a whole number of steps."""
        if self.splits is not None:
            return self
        tiles = triton.cdiv(outputs, self.columns)
        steps = triton.cdiv(inputs, self.depth * self.groups)
        return replace(self, splits=triton.cdiv(steps, triton.cdiv(steps, max(PROGRAMS // tiles, 1))))


def counters_of(weight_t: Tensor, tiles: int) -> Tensor:
    """Counters of a weight, zero between calls. The same weight must not run on two streams at a time."""
    key = (weight_t.device.index, weight_t.data_ptr(), tiles)
    if key not in _counters:
        made = torch.zeros(tiles, dtype=torch.int32, device=weight_t.device)
        if made.is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # it lives in the graph, which also zeroes it
        _counters[key] = made
    return _counters[key]


def sparse_linear(
    x: Tensor,
    weight_t: Tensor,
    threshold: float | Tensor,
    scale: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    cut: Cut | None = None,
) -> Tensor:
    """`reference.sparse_linear` of x (M, K), M ≤ 4, in fp32 sums; all tensors contiguous, of x's dtype, scale fp32."""
    rows, size, outputs = *x.shape, weight_t.shape[1]
    cut = (cut or Cut.of(rows)).fill(size, outputs)
    step, tiles = cut.depth * cut.groups, triton.cdiv(outputs, cut.columns)
    chunk = triton.cdiv(triton.cdiv(size, step), cut.splits) * step
    splits = max(triton.cdiv(size, chunk), 1)
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
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
        x, weight_t, scale, threshold, up_t, hidden, x if bias is None else bias, partial,
        counters_of(weight_t, tiles), y, size, outputs, rank, chunk, triton.cdiv(rank, splits), splits, M=rows,
        HAS_SCALE=has_scale, HAS_TENSOR=has_tensor, HAS_RANK=rank > 0, HAS_BIAS=bias is not None,
        EVEN=outputs % cut.columns == 0, BN=cut.columns, ROWS=cut.groups, DEPTH=cut.depth, num_warps=cut.warps,
    )  # fmt: skip
    return y


def sparse_swiglu(
    x: Tensor, gate_weight: Tensor, up_weight: Tensor, thresholds: Tensor, block: tuple[int, int, int] | None = None
) -> Tensor:
    """`reference.sparse_swiglu` of x (M, K), M ≤ 4, in fp32 to the end; all contiguous, thresholds fp32.

    `block` is (rows of the weights, input features, warps) a program.
    """
    rows, size, outputs = *x.shape, gate_weight.shape[0]
    height, width, warps = block or ({1: 8, 2: 4}.get(rows, 2), min(triton.next_power_of_2(size), 1024), 4)
    h = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    swiglu_rows[(triton.cdiv(outputs, height),)](
        x, gate_weight, up_weight, thresholds, h, size, outputs, M=rows, BN=height, BK=width, num_warps=warps
    )
    return h
