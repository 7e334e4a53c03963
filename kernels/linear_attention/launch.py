"""What the launchers of the chunked kernels share: block sizes, splits, layouts, and the names of operations.

Operations are registered with torch.library, so that torch.compile keeps them as single nodes. Their namespace carries
a hash of these sources: a checkpoint brings its own copy of them, which may differ from the installed one.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention.blocks import multiply_rows, scan_states, triton

SLOTS = 264  # programs that an H100 or H200 runs at a time: two on each of its 132 multiprocessors


def namespace(file: str, *functions: Any) -> str:
    """Name for torch.library: `kit_` and a hash of a file and of those that define some functions or kernels."""
    files = sorted({file, *(getattr(function, "fn", function).__code__.co_filename for function in functions)})
    return "kit_" + hashlib.sha256(b"".join(Path(name).read_bytes() for name in files)).hexdigest()[:12]


@functools.cache
def since_ampere(device: torch.device) -> bool:
    """Whether a CUDA device is NVIDIA's, and at least of the generation Ampere."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


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
    def chunk_states(cls, dtype: torch.dtype, values: int) -> Blocks:
        """The cut of hybrid attention's states of up to 128 features; its blocks of queries have as many rows."""
        if dtype == torch.float32:
            return cls(16, min(values, 32), 4, 1, "ieee")
        return cls(64, values, 8 if values == 128 else 4, 3, "tf32")

    @classmethod
    def window(cls, dtype: torch.dtype, dim: int, values: int) -> Blocks:
        """The cut of a softmax window: all value columns in one program."""
        if dtype == torch.float32:
            return cls(16, values, 4, 1, "ieee")
        return cls(64, values, 4 if max(dim, values) <= 128 else 8, 1, "tf32")


def refuse_dims(**dims: int) -> str | None:
    """Why the kernels have no tiles for some dims, naming the first of those; None if they have."""
    for name, size in dims.items():
        if size not in (32, 64, 128, 256):
            return f"the Triton kernels take a {name} of 32, 64, 128 or 256, got {size}"
    return None


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
    """The tensor, with its last dimension's numbers side by side and rows at whole vectors."""
    size = x.element_size()
    aligned = all(stride * size % 16 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)


def like_or_nothing(x: Tensor | None, device: torch.device) -> Tensor:
    """A tensor laid out like another, or an empty one: a gradient, where torch.compile asks for its shape."""
    if x is None:
        return torch.empty(0, dtype=torch.float32, device=device)
    return torch.empty_like(x)


def gradient_like(x: Tensor, fill: bool) -> Tensor:
    """An empty gradient of a tensor (zeros if padding stays unwritten), in its layout: autograd would copy others."""
    return torch.zeros_like(x) if fill else torch.empty_like(x)


def on_device_of(x: Tensor) -> Any:
    """A context for launches: Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(x)


def empty_heads(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, fill: bool) -> Tensor:
    """An output (B, H, T, V) laid out (B, T, H, V), as projections want it; zeros if padding stays unwritten."""
    batch, heads, rows, width = shape
    make = torch.zeros if fill else torch.empty
    return make(batch, rows, heads, width, dtype=dtype, device=device).transpose(1, 2)


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
    with on_device_of(parts):
        scan_states[(sequences, heads, triton.cdiv(size, block))](
            parts, parts if decays is None else decays, last if first is None else first, last, heads, size, splits,
            HAS_DECAY=decays is not None, HAS_FIRST=first is not None, REVERSE=reverse, BLOCK=block, num_warps=4,
        )  # fmt: skip


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y over the last dimension of two (B, H, T, V): (B, H, T) fp32."""
    batch, heads, length, width = x.shape
    out = torch.empty(batch, heads, length, dtype=torch.float32, device=x.device)
    rows = 64
    with on_device_of(x):
        multiply_rows[(triton.cdiv(length, rows), heads, batch)](
            x, y, out, *x.stride()[:3], *y.stride()[:3], length, WIDTH=width, BT=rows, num_warps=4
        )
    return out


def over_groups(x: Tensor, like: Tensor) -> Tensor:
    """Sum over query heads that share a key/value head or a map: (B, H, ...) to heads, dtype and layout of `like`."""
    if x.shape[1] != like.shape[1]:
        x = x.unflatten(1, (like.shape[1], -1)).sum(2, dtype=torch.float32)
    same = x.dtype == like.dtype and x.stride() == torch.empty_like(like, device="meta").stride()
    return x if same else torch.empty_like(like).copy_(x)
