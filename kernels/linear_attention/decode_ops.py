"""Decoding steps on Triton, registered with torch.library. They update their state in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention.blocks import load_map
from kit.kernels.linear_attention.decode_kernel import gated_step as gated_step_kernel
from kit.kernels.linear_attention.decode_kernel import hybrid_step as hybrid_step_kernel
from kit.kernels.linear_attention.launch import SLOTS, namespace, on_device_of, refuse_dims, triton
from kit.kernels.linear_attention.reference import check_heads
from kit.kernels.operations import operation

NAMESPACE = namespace(__file__, hybrid_step_kernel, load_map)


@dataclass
class HybridState:
    """What one layer keeps between steps of hybrid attention; every tensor is updated in place.

    They may be parts of larger tensors, if what belongs to one row and head of a ring or sinks, and to one row of the
    states and of a copy of the sums, is contiguous.

    Attributes:
        ring_k: (B, G, window_size + 1, D); the key of position p is in slot p mod (window_size + 1).
        ring_v: (B, G, window_size + 1, V).
        states: (B, L, F, V) fp32, keys that have left the window.
        sums: (2, B, L, F) fp32, their denominators; the copy `position mod 2` is the current one.
        sink_k, sink_v: (B, G, sinks, D) and (B, G, sinks, V), the first keys.
        arrivals: (B, L, V / 32) int32, counters that are 0 between steps.
    """

    ring_k: Tensor
    ring_v: Tensor
    states: Tensor
    sums: Tensor
    sink_k: Tensor
    sink_v: Tensor
    arrivals: Tensor

    @classmethod
    def empty(
        cls, k: Tensor, v: Tensor, *, map_heads: int, features: int, window_size: int, num_sinks: int = 0
    ) -> HybridState:
        """The state before the first token, for keys like k (B, G, ..., D) and values like v (B, G, ..., V)."""
        batch, heads = k.shape[:2]
        fp32: Any = {"dtype": torch.float32, "device": k.device}
        return cls(
            k.new_zeros(batch, heads, window_size + 1, k.shape[-1]),
            v.new_zeros(batch, heads, window_size + 1, v.shape[-1]),
            torch.zeros(batch, map_heads, features, v.shape[-1], **fp32),
            torch.zeros(2, batch, map_heads, features, **fp32),
            k.new_zeros(batch, heads, num_sinks, k.shape[-1]),
            v.new_zeros(batch, heads, num_sinks, v.shape[-1]),
            torch.zeros(batch, map_heads, v.shape[-1] // 32, dtype=torch.int32, device=k.device),
        )


def _cut(width: int, states: int, queries: int) -> tuple[int, int, int]:
    """Value columns, query heads and warps a program, of V, the states of a batch and the query heads of each.

    Few columns and one query head while the device is not full; later whole states, whose feature maps then run once
    (measured on an H100).
    """
    if states * (width // 32) <= SLOTS:
        return 32, 1 if states * (width // 32) * queries <= SLOTS else queries, 4
    return min(width, 128), queries, 4 if queries == 1 else 8


def _check_state(tensors: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Refuse tensors that do not have the shape beside them: the kernels would read and write beyond them.

    Raises:
        ValueError: naming one and its shape.
    """
    for name, (x, shape) in tensors.items():
        if x.shape != shape:
            raise ValueError(f"{name} of {shape} is needed, got {tuple(x.shape)}")


@operation(f"{NAMESPACE}::hybrid_step", ("ring_k", "ring_v", "states", "sums", "sink_k", "sink_v", "arrivals"))
def _hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_k: Tensor,
    log_factor: Tensor,
    meta: Tensor | None,
    position: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    states: Tensor,
    sums: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    arrivals: Tensor,
    scale: float,
    linear_weight: float,
    window_weight: float,
) -> Tensor:
    batch, heads, dim = q.shape
    map_heads, width, window = map_k.shape[0], v.shape[-1], ring_k.shape[2] - 1
    out = torch.empty(batch, heads, width, dtype=v.dtype, device=q.device)
    group = heads // map_heads
    columns, queries, warps = _cut(width, batch * map_heads, group)
    early = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] >= 9
    parts = [x.stride()[:2] for x in (ring_k, ring_v, sink_k, sink_v)]
    with on_device_of(q):
        hybrid_step_kernel[(width // columns, heads // queries, batch)](
            q, k, v, map_q, map_k, log_factor, log_factor if meta is None else meta, sink_k if sink_k.numel() else q,
            sink_v if sink_v.numel() else q, position, ring_k, ring_v, states, sums, arrivals, out,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *(size for part in parts for size in part),
            states.stride(0), *sums.stride()[:2], *arrivals.stride()[:2], k.shape[1], map_heads, scale,
            math.log(linear_weight) if linear_weight > 0 else 0.0,
            HAS_WINDOW=window_weight > 0, HAS_LINEAR=linear_weight > 0, HAS_META=meta is not None,
            SINKS=sink_k.shape[2], WINDOW=window, KEYS=max(triton.next_power_of_2(window + sink_k.shape[2]), 16),
            QUERIES=queries, PARTS=group // queries, DIM=dim, HALF=map_q.shape[-1], V=width, BV=columns,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", STATE_PRECISION="tf32x3" if q.is_cuda else "ieee",
            EARLY=early, num_warps=warps, launch_pdl=early,
        )  # fmt: skip
    return out


@_hybrid_step.register_fake
def _(q, k, v, *options):
    return v.new_empty(q.shape[0], q.shape[1], v.shape[-1])


def hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    log_window_factor: Tensor,
    state: HybridState,
    position: Tensor,
    *,
    scale: float,
    linear_weight: float = 1.0,
    window_weight: float = 1.0,
    meta_logit: Tensor | None = None,
) -> Tensor:
    """One token of hybrid attention for each sequence, in one launch (`reference.hybrid_attention` has the equation).

    Args:
        q: (B, H, D), after RoPE.
        k, v: (B, G, D) and (B, G, V).
        feature_map_q, feature_map_k: (H, D, F/2) and (L, D, F/2), in the dtype that prefill used.
        log_window_factor: (H,) fp32, log g.
        state: what came before; updated.
        position: (B,) int32 on the device, tokens that each sequence had before this one. The caller adds 1 after the
            last layer.
        scale, linear_weight, window_weight, meta_logit: as for `hybrid_attention`.

    Returns:
        (B, H, V).

    Raises:
        ValueError: on shapes that do not fit or that are not supported, naming them.
    """
    check_heads(q[:, :, None], k[:, :, None], v[:, :, None], feature_map_q, feature_map_k)
    (batch, heads, dim), kv_heads, width = q.shape, k.shape[1], v.shape[-1]
    slots, sinks, (map_heads, _, half) = state.ring_k.shape[2], state.sink_k.shape[2], feature_map_k.shape
    _check_state(
        {
            "ring_k": (state.ring_k, (batch, kv_heads, slots, dim)),
            "ring_v": (state.ring_v, (batch, kv_heads, slots, width)),
            "sink_k": (state.sink_k, (batch, kv_heads, sinks, dim)),
            "sink_v": (state.sink_v, (batch, kv_heads, sinks, width)),
            "states": (state.states, (batch, map_heads, 2 * half, width)),
            "sums": (state.sums, (2, batch, map_heads, 2 * half)),
            "arrivals": (state.arrivals, (batch, map_heads, width // 32)),
            "position": (position, (batch,)),
            "log_window_factor": (log_window_factor, (heads,)),
        }
    )
    dims = {"head dim": q.shape[-1], "value dim": v.shape[-1], "feature dim": 2 * feature_map_q.shape[-1]}
    if reason := refuse_dims(**dims):
        raise ValueError(reason)
    if q.shape[1] > 16 * len(feature_map_k) or state.ring_k.shape[2] > 512:
        raise ValueError(
            "hybrid_step takes at most 16 query heads a state and windows of at most 511, got "
            f"{q.shape[1] // len(feature_map_k)} and {state.ring_k.shape[2] - 1}"
        )
    log_factor = log_window_factor
    if window_weight not in (0, 1):
        log_factor = log_factor + math.log(window_weight)
    meta = None if meta_logit is None else meta_logit.float()
    map_q, map_k = feature_map_q, feature_map_k
    if linear_weight > 0:
        map_q, map_k = map_q.contiguous(), map_k.contiguous()
    return _hybrid_step(
        q, k, v, map_q, map_k, log_factor, meta, position, state.ring_k,
        state.ring_v, state.states, state.sums, state.sink_k, state.sink_v, state.arrivals, scale, linear_weight,
        window_weight,
    )  # fmt: skip


@operation(f"{NAMESPACE}::gated_step", ("states", "sums"))
def _gated_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    map_q: Tensor | None,
    map_k: Tensor | None,
    position: Tensor,
    states: Tensor,
    sums: Tensor,
    scale: float,
    normalize: bool,
) -> Tensor:
    batch, heads, dim = q.shape
    width, (num_states, features) = v.shape[-1], states.shape[1:3]
    out = torch.empty(batch, heads, width, dtype=v.dtype, device=q.device)
    columns, _, warps = _cut(width, batch * num_states, 1)
    with on_device_of(q):
        gated_step_kernel[(width // columns, num_states, batch)](
            q, k, v, sums if log_gate is None else log_gate, q if map_q is None else map_q,
            k if map_k is None else map_k, position, states, sums, out,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *((0, 0) if log_gate is None else log_gate.stride()), states.stride(0), *sums.stride()[:2],
            num_states // k.shape[1], 1 if map_k is None else num_states // map_k.shape[0], scale,
            HAS_GATE=log_gate is not None, HAS_MAP=map_q is not None, NORMALIZE=normalize,
            QUERIES=heads // num_states, DIM=dim, HALF=features // 2, V=width, BV=columns,
            num_warps=warps,
        )  # fmt: skip
    return out


@_gated_step.register_fake
def _(q, k, v, *options):
    return v.new_empty(q.shape[0], q.shape[1], v.shape[-1])


def gated_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    states: Tensor,
    sums: Tensor,
    position: Tensor,
    feature_map_q: Tensor | None = None,
    feature_map_k: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """One token of gated linear attention for each sequence, in one launch (`gated_reference` has the equation).

    Args:
        q: (B, H, D), or features (B, H, F) without maps.
        k, v: (B, G, D) and (B, G, V).
        log_gate: (B, N) fp32, or None.
        states: (B, N, F, V) fp32, updated; N is H, or with maps L if the heads that share one share their gate too.
        sums: (2, B, N, F) fp32, updated; the copy `position mod 2` is the current one. Parts as in `HybridState`.
        position: (B,) int32 on the device, as for `hybrid_step`.
        feature_map_q, feature_map_k: (H, D, F/2) and (L, D, F/2).
        scale, normalize: as for `gated_linear_attention`.

    Returns:
        (B, H, V).

    Raises:
        ValueError: on shapes that do not fit or that are not supported, naming them.
    """
    check_heads(q[:, :, None], k[:, :, None], v[:, :, None], feature_map_q, feature_map_k)
    batch, heads, features = *q.shape[:2], q.shape[2] if feature_map_q is None else 2 * feature_map_q.shape[-1]
    shared = feature_map_k is not None and states.ndim == 4 and states.shape[1] == len(feature_map_k)
    num_states = len(feature_map_k) if shared else heads  # type: ignore[arg-type]
    state = {
        "states": (states, (batch, num_states, features, v.shape[-1])),
        "sums": (sums, (2, batch, num_states, features)),
    }
    gate_shape = {} if log_gate is None else {"log_gate": (log_gate, (batch, num_states))}
    _check_state({**state, **gate_shape, "position": (position, (batch,))})
    if reason := refuse_dims(**{"head dim": q.shape[-1], "value dim": v.shape[-1], "feature dim": states.shape[2]}):
        raise ValueError(reason)
    gate = None if log_gate is None else log_gate.float()
    return _gated_step(q, k, v, gate, feature_map_q, feature_map_k, position, states, sums, scale, normalize)
