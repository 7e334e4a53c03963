"""Launches of hybrid attention's forward pass with features made where they are used (chunk_kernel.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention.chunk_kernel import chunk_outputs, chunk_states
from kit.kernels.linear_attention.launch import (
    Blocks,
    empty_heads,
    num_splits,
    on_device_of,
    scan,
    since_ampere,
    triton,
)

EVERY = 2  # blocks of queries from one kept state to the next


def takes(q: Tensor, k: Tensor, v: Tensor, map_k: Tensor, window: int, terrace: bool, scale: float) -> bool:
    """Whether these kernels take a call that has a window and a linear past, but no state to start from."""
    dims, features = (q.shape[-1], v.shape[-1]), 2 * map_k.shape[-1]
    if q.dtype == torch.float32:
        fit = max(*dims, features) <= 128
    else:  # compiled for 64 features, Triton 3.6 reads memory that is not ours
        fit = features == 128 and max(dims) <= 128 and min(dims) >= 64
    fit = fit and (not q.is_cuda or since_ampere(q.device))
    return fit and scale > 0 and not terrace and window % _rows(q) == 0 and k.shape[2] == q.shape[2] > window


def _rows(q: Tensor) -> int:
    return Blocks.chunk_states(q.dtype, 64).rows


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_k: Tensor,
    log_factor: Tensor,
    meta: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    bounds: Tensor | None,
    window: int,
    num_sinks: int,
    scale: float,
    linear_weight: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log of the denominators (B, H, T); letters and shapes as in hybrid_ops.py."""
    batch, heads, length = q.shape[:3]
    width, rows = v.shape[-1], _rows(q)
    sequences = batch if bounds is None else bounds.shape[0]
    out = empty_heads((batch, heads, length, width), v.dtype, v.device, fill=bounds is not None)
    make = torch.empty if bounds is None else torch.zeros
    log_mass = make(batch, heads, length, dtype=torch.float32, device=q.device)
    states, sums = _states(k, v, map_k, bounds, sequences, rows, num_sinks)
    with on_device_of(q):
        chunk_outputs[(heads, triton.cdiv(length, rows), sequences)](
            q, k, v, map_q, map_k, log_factor, log_mass if meta is None else meta, q if sink_k is None else sink_k,
            q if sink_v is None else sink_v, states, sums, q if bounds is None else bounds, out, log_mass,
            *(stride for x in (q, k, v, out) for stride in x.stride()[:3]), heads, heads // k.shape[1],
            heads // len(map_k), scale, math.log(linear_weight), length,
            HAS_BOUNDS=bounds is not None, MASKED=bounds is not None or length % rows != 0, HAS_META=meta is not None,
            SINKS=num_sinks, WINDOW=window, DIM=q.shape[-1], HALF=map_k.shape[-1], V=width, BT=rows, EVERY=EVERY,
            PRECISION="tf32" if rows == 64 else "ieee", num_warps=4, num_stages=1,
        )  # fmt: skip
    return out, log_mass


def _states(
    k: Tensor, v: Tensor, map_k: Tensor, bounds: Tensor | None, sequences: int, rows: int, num_sinks: int
) -> tuple[Tensor, Tensor]:
    """The states that `chunk_states` keeps, and their sums of keys."""
    heads, keys, width, length = len(map_k), 2 * map_k.shape[-1], v.shape[-1], k.shape[2]
    cut = Blocks.chunk_states(v.dtype, width)
    slots_each = cut.warps // 4 * (width // cut.values)
    splits, split_chunks = num_splits(sequences * heads * slots_each, length, EVERY * rows)
    slots = k.shape[0] * length // (EVERY * rows) + sequences
    fp32: Any = {"dtype": torch.float32, "device": k.device}
    states = torch.empty(slots, heads, width, keys, dtype=v.dtype, device=k.device)
    sums = torch.empty(slots, heads, keys, **fp32)

    def launch(into: tuple[Tensor, Tensor], first: tuple[Tensor, Tensor] | None, last_only: bool) -> None:
        with on_device_of(k):
            chunk_states[(width // cut.values, heads, sequences * splits)](
                k, v, map_k, k if bounds is None else bounds, *(first or into), *into,
                *k.stride()[:3], *v.stride()[:3], heads // k.shape[1], length, num_sinks, splits, split_chunks,
                HAS_BOUNDS=bounds is not None, HAS_FIRST=first is not None, LAST_ONLY=last_only, DIM=k.shape[-1],
                HALF=keys // 2, V=width, BV=cut.values, BT=cut.rows, EVERY=EVERY, PRECISION=cut.precision,
                num_warps=cut.warps, num_stages=cut.stages,
            )  # fmt: skip

    first: tuple[Tensor, Tensor] | None = None
    if splits > 1:
        first = (torch.empty(sequences, splits, heads, width, keys, **fp32),
                 torch.empty(sequences, splits, heads, keys, **fp32))  # fmt: skip
        launch(first, None, True)
        for part in first:
            scan(part, None, None, torch.empty_like(part[:, 0]), False)
    launch((states, sums), first, False)
    return states, sums
