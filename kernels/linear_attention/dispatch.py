"""Which implementation an operation of linear attention runs on.

`backend` is None to choose, "triton" to insist (an error says what the kernels cannot take), or "reference".
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kit.kernels.linear_attention.gated_reference import channel_gated_linear_attention as channel_gated_reference
from kit.kernels.linear_attention.gated_reference import check_gated_shapes
from kit.kernels.linear_attention.gated_reference import gated_delta_rule as delta_rule_reference
from kit.kernels.linear_attention.gated_reference import gated_linear_attention as gated_reference
from kit.kernels.linear_attention.reference import check_shapes, sequence_bounds
from kit.kernels.linear_attention.reference import hybrid_attention as hybrid_reference

HALVES = (torch.float16, torch.bfloat16)


class TritonOps(NamedTuple):
    """The operations on Triton, and what tells why they cannot take a shape."""

    gated: Callable
    gated_unsupported: Callable
    hybrid: Callable
    hybrid_unsupported: Callable


class StepOps(NamedTuple):
    """The decoding steps on Triton, and what `hybrid_step` updates."""

    hybrid_step: Callable
    gated_step: Callable
    HybridState: Callable


def _triton() -> TritonOps | None:
    """The Triton operations, or None where Triton is not installed.

    It is not cached, and returns a tuple, for torch.compile, which traces through it.
    """
    try:
        from kit.kernels.linear_attention.gated_ops import gated_linear_attention as gated
        from kit.kernels.linear_attention.gated_ops import unsupported as gated_unsupported
        from kit.kernels.linear_attention.hybrid_ops import hybrid_attention as hybrid
        from kit.kernels.linear_attention.hybrid_ops import unsupported as hybrid_unsupported
    except ImportError:
        return None
    return TritonOps(gated, gated_unsupported, hybrid, hybrid_unsupported)


def _chosen(backend: str | None, v: Tensor) -> TritonOps | None:
    """The Triton operations if they are to be used on a device and dtype.

    Raises:
        ValueError: on an unknown backend.
        ImportError: if Triton is asked for and not installed.
    """
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend is None, 'triton' or 'reference', got {backend!r}")
    if backend == "triton":
        if _triton() is None:
            raise ImportError("backend='triton' needs Triton, which is not installed here")
        return _triton()
    return _triton() if backend is None and v.is_cuda and v.dtype == torch.bfloat16 else None


def step_ops(v: Tensor) -> StepOps | None:
    """The decoding steps if they are to be used for values like these, else None."""
    return _step_ops(v.device) if v.is_cuda and v.dtype == torch.bfloat16 else None


@functools.cache
def _step_ops(device: torch.device) -> StepOps | None:
    """The decoding steps of a device; they need NVIDIA's, from Ampere on: others share too little memory."""
    try:
        from kit.kernels.linear_attention.decode_ops import HybridState, gated_step, hybrid_step
        from kit.kernels.linear_attention.launch import since_ampere
    except ImportError:
        return None
    return StepOps(hybrid_step, gated_step, HybridState) if since_ampere(device) else None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"{reason}; the PyTorch path is taken, which is slower", stacklevel=3)


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    window_factor: Tensor,
    *,
    window_size: int,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to a softmax window and a linear past; `reference.hybrid_attention` has the equation and all options.

    Triton takes calls of more queries than the window holds, head and feature dims of 32, 64, 128 or 256, and masks
    with padding only before or after a row's tokens.

    Raises:
        ValueError: on shapes that do not fit, or that `backend="triton"` cannot take, naming them.
    """
    ops = _chosen(backend, v)
    maps = (feature_map_q, feature_map_k)
    state, segments = options.get("state"), segment_ids
    whole_only = options.get("terrace", False) or options.get("num_sinks", 0) > 0
    per_head = (window_factor, options.get("meta_logit"))
    check_shapes(q, k, v, *maps, per_head, window_size, state, segments, whole_only=whole_only)
    bounds = None
    if ops is not None:
        learned = (q, k, v, *maps, window_factor, options.get("meta_logit"), state)
        reason = ops.hybrid_unsupported(
            q, v, feature_map_q, window_size, options.get("terrace", False), options.get("num_sinks", 0)
        )
        reason = reason or _unsupported_masks(
            q, k, state, learned, key_mask, segments, options.get("return_state", False)
        )
        if reason is None and (key_mask is not None or segments is not None):
            try:
                bounds = sequence_bounds(key_mask, segments)
            except ValueError as error:
                reason = str(error)
        if options.get("softcap") is not None:
            reason = "the Triton kernels do not cap scores"
        given = options.get("sinks") is not None
        if given and backend == "triton":
            reason = "the Triton kernels take the sinks of whole sequences only"
        if _falls_back(backend, reason) or (backend is None and (given or q.shape[2] <= window_size)):
            ops = None
    if ops is None:
        masks: dict[str, Any] = {"key_mask": key_mask, "segment_ids": segments}
        return hybrid_reference(
            q, k, v, feature_map_q, feature_map_k, window_factor, window_size=window_size, **masks, **options
        )
    q, k = q.to(v.dtype), k.to(v.dtype)
    for name in ("sinks", "softcap"):
        options.pop(name, None)
    return ops.hybrid(q, k, v, *maps, window_factor, window_size=window_size, bounds=bounds, **options)


def _falls_back(backend: str | None, reason: str | None) -> bool:
    """Whether the kernels cannot take a call for a reason: then they are left, or, if they were asked for, refuse.

    Raises:
        ValueError: with backend "triton".
    """
    if reason is None:
        return False
    if backend == "triton":
        raise ValueError(reason)
    _warn_once(reason)
    return True


def _unsupported_masks(q, k, state, learned, key_mask, segment_ids, return_state: bool) -> str | None:
    """Why the hybrid kernels cannot take a call's masks, state and gradients together; None if they can."""
    carried = state is not None or k.shape[2] != q.shape[2]
    if carried and key_mask is not None:
        return "the Triton kernels take no key mask with past keys or a state"
    if key_mask is not None and segment_ids is not None:
        return "the Triton kernels take a key mask or segment ids, not both"
    if return_state and segment_ids is not None:
        return "the Triton kernels return no state of packed sequences"
    if carried and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned):
        return "the Triton kernels cannot be trained from a state on"
    return None


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None = None,
    feature_map_q: Tensor | None = None,
    feature_map_k: Tensor | None = None,
    *,
    backend: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend through a decaying state; `gated_reference.gated_linear_attention` has the equation and all options.

    Raises:
        ValueError: on shapes that do not fit, or that `backend="triton"` cannot take, naming them.
    """
    ops = _chosen(backend, v)
    check_gated_shapes(q, k, v, log_gate, feature_map_q, feature_map_k, options.get("state"), options.get("bounds"))
    if ops is not None:
        reason = ops.gated_unsupported(q, v, feature_map_q)
        if options.get("return_state") and not options.get("normalize", True):
            reason = "the Triton kernels return a state with normalize=True only: else they know no denominators"
        if _falls_back(backend, reason):
            ops = None
    if ops is None:
        return gated_reference(q, k, v, log_gate, feature_map_q, feature_map_k, **options)
    return ops.gated(q.to(v.dtype), k.to(v.dtype), v, log_gate, feature_map_q, feature_map_k, **options)


def channel_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, scale: float = 1.0, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated linear attention with a gate for each channel of k, as in `gated_reference`.

    In 16 bits on CUDA it is flash-linear-attention's kernel where that library is installed, PyTorch elsewhere.
    """
    if v.is_cuda and v.dtype in HALVES:
        try:
            from fla.ops.gla import chunk_gla
        except ImportError:
            chunk_gla = None
        if chunk_gla is not None:
            q, k, v, log_gate = (x.transpose(1, 2) for x in (q, k, v, log_gate))
            out, last = chunk_gla(q, k, v, log_gate, scale=scale, initial_state=state, output_final_state=True)
            return out.transpose(1, 2), last
    return channel_gated_reference(q, k, v, log_gate, scale=scale, state=state)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_gate: Tensor,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule, as in `gated_reference`; flash-linear-attention's kernel in 16 bits on CUDA if installed."""
    if v.is_cuda and v.dtype in HALVES:
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        except ImportError:
            chunk_gated_delta_rule = None
        if chunk_gated_delta_rule is not None:
            q, k, v, beta, log_gate = (x.transpose(1, 2) for x in (q, k, v, beta, log_gate))
            out, last = chunk_gated_delta_rule(
                q, k, v, g=log_gate, beta=beta, scale=scale, initial_state=state, output_final_state=True
            )
            return out.transpose(1, 2), last
    return delta_rule_reference(q, k, v, beta, log_gate, scale=scale, state=state)
