"""INT4 weights as the kernels read them: repacked once, when a checkpoint is loaded. Any device, plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.int4_fp8.reference import INT4_MIN

TILE = 64  # output features whose codes lie together
GROUPS = (128, 64, 32)  # inputs that a kernel multiplies before it applies a scale


@dataclass(frozen=True)
class PackedInt4:
    """An INT4 weight (N, K), in an order of its own. Register `codes`, `scales` and `zeros` as buffers.

    N is padded to whole tiles of 64 and, where a scale spans a whole row, K to whole groups; padding is zero.

    Attributes:
        codes: (tiles, G, 64, g / 2) uint8: code + 8 of input j of a group in the low half of byte j, and of input
            j + g / 2 in the high half.
        scales: (G, N padded), in the dtype of the checkpoint.
        zeros: (G, N padded), in the same dtype, or None.
        out_features: N.
        in_features: K.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    out_features: int
    in_features: int

    @property
    def group(self) -> int:
        """g, inputs a scale."""
        return 2 * self.codes.shape[-1]

    def dequantize(self) -> Tensor:
        """Return the weight, (N, K) fp32: (code - zero) · scale."""
        tiles, groups, rows, _ = self.codes.shape
        values = torch.cat([self.codes & 15, self.codes >> 4], dim=-1).float() + INT4_MIN  # (tiles, G, 64, g)
        values = values.permute(0, 2, 1, 3).reshape(tiles * rows, groups, -1)
        if self.zeros is not None:
            values = values - self.zeros.T.float()[..., None]
        weight = (values * self.scales.T.float()[..., None]).flatten(-2)
        return weight[: self.out_features, : self.in_features]


def kernel_group(in_features: int, groups: int) -> int | None:
    """Inputs that share a scale in the kernels' layout, at most a group of the checkpoint; None if they have none."""
    if groups == 1:
        return GROUPS[0]
    return next((g for g in GROUPS if in_features // groups % g == 0), None)


def prepack(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> PackedInt4:
    """Reorder an INT4 weight for the kernels. Weights that are used together (q, k, v) are concatenated before.

    Args:
        codes: (N, K) int8 in [-8, 7], from `unpack_int4`.
        scale: (N, K / group size).
        zero_point: (N, K / group size) int8, or None.

    Raises:
        ValueError: if the group size is no multiple of 32 and there is more than one group: no kernel takes that.
    """
    outputs, inputs = codes.shape
    size = kernel_group(inputs, scale.shape[1])
    if size is None:
        raise ValueError(f"groups of {inputs // scale.shape[1]}: the kernels take multiples of 32, or one group a row")
    codes = F.pad(codes.to(torch.int16) - INT4_MIN, (0, -inputs % size, 0, -outputs % TILE), value=-INT4_MIN)
    blocks = codes.shape[1] // size
    first, second = codes.view(-1, TILE, blocks, size).transpose(1, 2).chunk(2, dim=-1)  # (tiles, G, 64, g / 2)
    packed = (first | second << 4).to(torch.uint8).contiguous()

    def spread(x: Tensor) -> Tensor:
        repeated = x.repeat_interleave(blocks // x.shape[1], dim=1)
        return F.pad(repeated, (0, 0, 0, -outputs % TILE)).T.contiguous()

    zeros = None if zero_point is None else spread(zero_point.to(scale.dtype))
    return PackedInt4(packed, spread(scale), zeros, outputs, inputs)
