"""What the launchers of the chunked kernels share: block sizes, splits, states of splits, and the library of operations.

Operations are registered with torch.library, so that torch.compile keeps them as single nodes. Their namespace carries a
hash of these sources: a checkpoint brings its own copy of them, which may differ from the installed one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention.blocks import multiply_rows, scan_states, split_states, triton

STATE_NUMBERS = 16384  # of a state's fp32 numbers, held in one program's registers
SLOTS = 264  # programs that an H100 or H200 runs at a time: two on each of its 132 multiprocessors


def namespace(*files: str) -> str:
    """Name for torch.library: `kit_` and a hash of source files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return f"kit_{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class Blocks:
    """How a shape is cut: rows a block, value columns a program, warps, pipeline stages, the products' precision."""

    rows: int
    values: int
    warps: int
    stages: int
    precision: str

    @classmethod
    def recurrence(cls, dtype: torch.dtype, keys: int, values: int) -> Blocks:
        """The cut of a recurrence with a state of (keys, values); fp32 is IEEE, not TF32."""
        if dtype == torch.float32:
            return cls(16, min(values, 32), 4, 1, "ieee")
        return cls(64, min(values, 64), 4 if keys <= 128 else 8, 2, "tf32")

    @classmethod
    def hybrid(cls, dtype: torch.dtype, features: int, values: int, *, backward: bool) -> Blocks:
        """The cut of hybrid attention with a state of (features, values)."""
        if dtype == torch.float32:
            return cls(16, min(values, 32), 4, 1, "ieee")
        if backward:
            columns = min(values, max(STATE_NUMBERS // features, 16))
            return cls(32, columns, 8 if features * columns > STATE_NUMBERS // 2 else 4, 1, "tf32")
        return cls(64, min(values, 64), 4 if features <= 128 else 8, 1, "tf32")


def check_dims(**dims: int) -> None:
    """Refuse dims that the kernels have no tiles for.

    Raises:
        ValueError: naming the dim.
    """
    for name, size in dims.items():
        if size not in (32, 64, 128, 256):
            raise ValueError(f"the Triton kernels take a {name} of 32, 64, 128 or 256, got {size}")


def num_splits(programs: int, length: int, rows: int) -> tuple[int, int]:
    """How many splits a sequence is cut into, and blocks a split.

    Splits cost a pass over keys and values, so there are none where programs take most of the device, and no more than
    fill it; none is below 512 tokens.
    """
    blocks = max(triton.cdiv(length, rows), 1)
    wanted = 1 if programs > SLOTS // 3 else SLOTS // programs
    size = max(triton.cdiv(blocks, wanted), min(triton.cdiv(512, rows), blocks))
    return triton.cdiv(blocks, size), size


def rows_contiguous(x: Tensor) -> Tensor:
    """The tensor, with its last dimension's numbers side by side and rows that the bulk copy engine can address."""
    size = x.element_size()
    aligned = all(stride * size % 16 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def reserve_descriptors(device: torch.device) -> None:
    """Let kernels make tensor descriptors: Triton asks for the memory at launch."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, device=device, dtype=torch.int8))


def empty_like_heads(x: Tensor, width: int, fill: bool) -> Tensor:
    """An output (B, H, T, width) laid out (B, T, H, width), as projections want it; zeros if padding stays unwritten."""
    batch, heads, length = x.shape[:3]
    make = torch.zeros if fill else torch.empty
    return make(batch, length, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)


@dataclass
class Past:
    """What each split starts from: (N, splits, H, F, V) and (N, splits, H, F), fp32; the same after the last, (N, H, ...)."""

    states: Tensor
    sums: Tensor
    last_state: Tensor
    last_sum: Tensor


def past_of_splits(
    x: Tensor,
    y: Tensor,
    *,
    cut: Blocks,
    maps: Tensor | None,
    heads: int,
    features: int,
    splits: int,
    split_blocks: int,
    bounds: Tensor | None,
    first: tuple[Tensor, Tensor] | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
    reverse: bool = False,
    shift: int = 0,
    skip: int = 0,
    limit: int = 0,
    num_keys: int | None = None,
) -> Past:
    """Sum what splits leave behind and scan it. Arguments as `split_states`; `weights` is (row_weight, extra)."""
    sequences = x.shape[0] if bounds is None else bounds.shape[0]
    dim, width = x.shape[-1], y.shape[-1]
    fp32: Any = {"dtype": torch.float32, "device": x.device}
    states = torch.empty(sequences, splits, heads, features, width, **fp32)
    sums = torch.empty(sequences, splits, heads, features, **fp32)
    row_weight, extra = weights or (sums, sums)
    split_states[(sequences * splits, heads, width // cut.values)](
        x,
        y,
        row_weight,
        extra,
        x if maps is None else maps,
        x if bounds is None else bounds,
        states,
        sums,
        *x.stride()[:3],
        *y.stride()[:3],
        heads,
        heads // x.shape[1],
        heads // y.shape[1],
        1 if maps is None else heads // maps.shape[0],
        x.shape[2] if num_keys is None else num_keys,
        x.shape[2],
        splits,
        split_blocks,
        shift,
        skip,
        limit,
        HAS_BOUNDS=bounds is not None,
        HAS_MAP=maps is not None,
        HAS_WEIGHT=weights is not None,
        DIM=dim,
        HALF=features // 2,
        V=width,
        BV=cut.values,
        BT=cut.rows,
        PRECISION=cut.precision,
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    last_state = torch.empty(sequences, heads, features, width, **fp32)
    last_sum = torch.empty(sequences, heads, features, **fp32)
    for part, last, number in ((states, last_state, 0), (sums, last_sum, 1)):
        scan(part, None, None if first is None else first[number], last, reverse)
    return Past(states, sums, last_state, last_sum)


def scan(parts: Tensor, decays: Tensor | None, first: Tensor | None, last: Tensor, reverse: bool) -> None:
    """Turn what splits add, (N, splits, H, ...), into what they start from, in place; the sum of all goes to `last`.

    Args:
        parts: fp32.
        decays: (N, splits, H), log2 of what is left of the past after a split.
        first: (N, H, ...), before the first split.
        last: (N, H, ...).
        reverse: splits follow each other backwards.
    """
    sequences, splits, heads = parts.shape[:3]
    size = last[0, 0].numel()
    block = min(triton.next_power_of_2(size), 1024)
    scan_states[(sequences, heads, triton.cdiv(size, block))](
        parts, parts if decays is None else decays, last if first is None else first, last, heads, size, splits,
        HAS_DECAY=decays is not None, HAS_FIRST=first is not None, REVERSE=reverse, BLOCK=block, num_warps=4,
    )  # fmt: skip


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y over the last dimension of two (B, H, T, V): (B, H, T) fp32."""
    batch, heads, length, width = x.shape
    out = torch.empty(batch, heads, length, dtype=torch.float32, device=x.device)
    rows = 64
    multiply_rows[(triton.cdiv(length, rows), heads, batch)](
        x, y, out, *x.stride()[:3], *y.stride()[:3], length, WIDTH=width, BT=rows, num_warps=4
    )
    return out


def over_value_blocks(x: Tensor, like: Tensor) -> Tensor:
    """Sum the value blocks' terms (value blocks, ...) in the dtype of a tensor."""
    return (x[0] if len(x) == 1 else x.sum(0)).to(like.dtype)


def over_groups(x: Tensor, like: Tensor) -> Tensor:
    """Sum over the query heads that share a key/value head or a map: (B, H, ...) to the heads and dtype of a tensor."""
    if x.shape[1] != like.shape[1]:
        x = x.unflatten(1, (like.shape[1], -1)).sum(2, dtype=torch.float32)
    return x.to(like.dtype)
