"""Launches the gated kernels and registers them with torch.library: forward, backward, shapes for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention import blocks, gated_kernel
from kit.kernels.linear_attention.launch import (
    Blocks,
    check_dims,
    empty_like_heads,
    namespace,
    num_splits,
    over_groups,
    over_value_blocks,
    past_of_splits,
    row_products,
    rows_contiguous,
)

NAMESPACE = namespace(__file__, blocks.__file__, gated_kernel.__file__)


def _cut(q: Tensor, v: Tensor, map_q: Tensor | None) -> tuple[Blocks, int]:
    features = q.shape[-1] if map_q is None else 2 * map_q.shape[-1]
    return Blocks.of(q.dtype, features, v.shape[-1]), features


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _gate(log_gate: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, int]]:
    return (other, (0, 0)) if log_gate is None else (log_gate, log_gate.stride()[:2])


@torch.library.custom_op(f"{NAMESPACE}::gated_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    map_q: Tensor | None,
    map_k: Tensor | None,
    state: Tensor | None,
    state_sum: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the denominators (B, H, T), what splits start from, and the state after each sequence."""
    batch, heads, length = q.shape[:3]
    cut, features = _cut(q, v, map_q)
    width, fp32 = v.shape[-1], {"dtype": torch.float32, "device": q.device}
    sequences = batch if bounds is None else bounds.shape[0]
    value_blocks = width // cut.values
    splits, split_blocks = num_splits(sequences * heads * value_blocks, length, cut.rows)
    out = empty_like_heads(q, width, fill=bounds is not None)
    mass = torch.empty(batch, heads, length, **fp32) if normalize else torch.empty(0, **fp32)
    if splits > 1:
        first = None if state is None or state_sum is None else (state, state_sum)
        past = past_of_splits(
            k, v, cut=cut, maps=map_k, heads=heads, features=features, splits=splits, split_blocks=split_blocks,
            bounds=bounds, log_gate=log_gate, first=first,
        )  # fmt: skip
        states, sums, last_state, last_sum = past.states, past.sums, past.last_state, past.last_sum
    else:
        last_state = torch.empty(sequences, heads, features, width, **fp32)
        last_sum = torch.empty(sequences, heads, features, **fp32)
        states = torch.empty(0, **fp32) if state is None else state[:, None].clone()
        sums = torch.empty(0, **fp32) if state_sum is None else state_sum[:, None].clone()
    gate, gate_strides = _gate(log_gate, last_sum)
    gated_kernel.gated_forward[(sequences * splits, heads, value_blocks)](
        q, k, v, gate, q if map_q is None else map_q, k if map_k is None else map_k, q if bounds is None else bounds,
        states if states.numel() else last_state, sums if sums.numel() else last_sum, out, mass if normalize else out,
        last_state, last_sum, *_strides(q, k, v), *gate_strides, *_strides(out),
        heads, heads // k.shape[1], 1 if map_k is None else heads // map_k.shape[0], scale, length, splits, split_blocks,
        HAS_BOUNDS=bounds is not None, HAS_GATE=log_gate is not None, HAS_MAP=map_q is not None,
        HAS_STATE=states.numel() > 0, NORMALIZE=normalize, STORE_LAST=splits == 1,
        DIM=q.shape[-1], HALF=features // 2, V=width, BV=cut.values, BT=cut.rows, PRECISION=cut.precision,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out, mass, states, sums, last_state, last_sum


@_forward.register_fake
def _(q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, scale, normalize):
    batch, heads, length = q.shape[:3]
    cut, features = _cut(q, v, map_q)
    width, sequences = v.shape[-1], batch if bounds is None else bounds.shape[0]
    splits, _ = num_splits(sequences * heads * (width // cut.values), length, cut.rows)
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    kept = splits > 1 or state is not None
    return (
        empty_like_heads(q, width, fill=False),
        torch.empty((batch, heads, length) if normalize else 0, **fp32),
        torch.empty((sequences, splits, heads, features, width) if kept else 0, **fp32),
        torch.empty((sequences, splits, heads, features) if kept else 0, **fp32),
        torch.empty(sequences, heads, features, width, **fp32),
        torch.empty(sequences, heads, features, **fp32),
    )


@torch.library.custom_op(f"{NAMESPACE}::gated_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    out: Tensor,
    mass: Tensor,
    states: Tensor,
    sums: Tensor,
    d_last: Tensor | None,
    d_last_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    map_q: Tensor | None,
    map_k: Tensor | None,
    bounds: Tensor | None,
    scale: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of q, k, v, log_gate, both maps (empty where there are none), the first state and its sum."""
    batch, heads, length = q.shape[:3]
    cut, features = _cut(q, v, map_q)
    dim, width, half = q.shape[-1], v.shape[-1], features // 2
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    sequences = batch if bounds is None else bounds.shape[0]
    value_blocks = width // cut.values
    splits, split_blocks = num_splits(sequences * heads * value_blocks, length, cut.rows)
    num_blocks = -(-length // cut.rows)
    make = torch.empty if bounds is None else torch.zeros
    d_out = rows_contiguous(d_out)
    ends = None if d_last is None or d_last_sum is None else (d_last.contiguous(), d_last_sum.contiguous())
    if normalize:
        weight = torch.where(mass == 0, 0.0, 1.0 / mass)
        extra = row_products(d_out, out).mul_(weight).neg_()
    else:
        weight = torch.full((batch, heads, length), scale, **fp32)
        extra = torch.zeros_like(weight)
    kind = q.dtype if value_blocks == 1 else torch.float32
    d_q = make(value_blocks, batch, heads, length, dim, dtype=kind, device=q.device)
    d_k = make(value_blocks, batch, heads, length, dim, dtype=kind, device=q.device)
    d_v = make(batch, heads, length, width, dtype=v.dtype, device=q.device)
    gated, mapped, kept = log_gate is not None, map_q is not None, states.numel() > 0
    d_gate = make(value_blocks, batch, heads, length, **fp32) if gated else weight
    d_maps = [
        torch.empty(value_blocks, sequences * splits, heads, dim, half, **fp32) if mapped else weight for _ in range(2)
    ]
    block_states = torch.empty(sequences, num_blocks, heads, features, width, dtype=q.dtype, device=q.device) if gated else weight  # fmt: skip
    block_sums = torch.empty(sequences, num_blocks, heads, features, **fp32) if gated else weight
    gate, gate_strides = _gate(log_gate, weight)
    shared = (
        *_strides(q, k, v), *gate_strides, *_strides(d_out), heads, heads // k.shape[1],
        1 if map_k is None else heads // map_k.shape[0], batch * heads * length, length, splits, split_blocks, num_blocks,
    )  # fmt: skip
    flags: dict[str, Any] = {
        "HAS_BOUNDS": bounds is not None, "HAS_GATE": gated, "HAS_MAP": mapped, "HAS_EXTRA": normalize or ends is not None,
        "DIM": dim, "HALF": half, "V": width, "BV": cut.values, "BT": cut.rows, "PRECISION": cut.precision,
        "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip
    inputs = (q, k, v, gate, q if map_q is None else map_q, k if map_k is None else map_k, q if bounds is None else bounds)
    grid = (sequences * splits, heads, value_blocks)
    gated_kernel.gated_backward_queries[grid](
        *inputs, states if kept else weight, sums if kept else weight, d_out, weight, extra,
        d_q, d_maps[0], d_gate, block_states, block_sums, *shared, HAS_STATE=kept, **flags,
    )  # fmt: skip
    first_d = torch.empty(sequences, heads, features, width, **fp32)
    first_d_sum = torch.empty(sequences, heads, features, **fp32)
    d_states, d_sums = (weight, weight) if ends is None else ends
    if splits > 1:
        past = past_of_splits(
            q, d_out, cut=cut, maps=map_q, heads=heads, features=features, splits=splits, split_blocks=split_blocks,
            bounds=bounds, log_gate=log_gate, first=ends, weights=(weight, extra), reverse=True,
        )  # fmt: skip
        d_states, d_sums, first_d, first_d_sum = past.states, past.sums, past.last_state, past.last_sum
    gated_kernel.gated_backward_keys[grid](
        *inputs, d_states, d_sums, d_out, weight, extra,
        d_k, d_v, d_maps[1], d_gate, block_states, block_sums, first_d, first_d_sum, *shared,
        HAS_STATE=splits > 1 or ends is not None, STORE_FIRST=splits == 1, **flags,
    )  # fmt: skip
    nothing = lambda: torch.empty(0, **fp32)  # noqa: E731  (operations may not return one tensor twice)
    return (
        over_value_blocks(d_q, q),
        over_groups(over_value_blocks(d_k, d_v), k),
        over_groups(d_v, v),
        over_value_blocks(d_gate, weight) if gated else nothing(),
        nothing() if map_q is None else over_groups(d_maps[0].sum((0, 1))[None], map_q[None])[0],
        nothing() if map_k is None else over_groups(d_maps[1].sum((0, 1))[None], map_k[None])[0],
        first_d,
        first_d_sum,
    )


@_backward.register_fake
def _(d_out, out, mass, states, sums, d_last, d_last_sum, q, k, v, log_gate, map_q, map_k, bounds, scale, normalize):
    heads, features = q.shape[1], _cut(q, v, map_q)[1]
    sequences = len(q) if bounds is None else bounds.shape[0]
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    like = lambda x: torch.empty(0, **fp32) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)  # noqa: E731
    return (
        *(like(x) for x in (q, k, v, log_gate, map_q, map_k)),
        torch.empty(sequences, heads, features, v.shape[-1], **fp32),
        torch.empty(sequences, heads, features, **fp32),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, log_gate, map_q, map_k, state, _, bounds, scale, normalize = inputs
    out, mass, states, sums, _, _ = output
    ctx.save_for_backward(q, k, v, log_gate, map_q, map_k, bounds, out, mass, states, sums)
    ctx.options, ctx.has_state = (scale, normalize), state is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, _1: Any, _2: Any, _3: Any, d_last: Any, d_last_sum: Any) -> tuple:
    q, k, v, log_gate, map_q, map_k, bounds, out, mass, states, sums = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    if d_last is not None or d_last_sum is not None:
        shape = (len(q) if bounds is None else len(bounds), q.shape[1], states.shape[3] if states.numel() else _cut(q, v, map_q)[1])
        d_last = torch.zeros(*shape, v.shape[-1], device=q.device) if d_last is None else d_last
        d_last_sum = torch.zeros(*shape, device=q.device) if d_last_sum is None else d_last_sum
    d_q, d_k, d_v, d_gate, d_map_q, d_map_k, d_state, d_sum = _backward(
        d_out, out, mass, states, sums, d_last, d_last_sum, q, k, v, log_gate, map_q, map_k, bounds, *ctx.options
    )
    absent = lambda x, d: None if x is None else d  # noqa: E731
    first = (d_state, d_sum) if ctx.has_state else (None, None)
    return d_q, d_k, d_v, absent(log_gate, d_gate), absent(map_q, d_map_q), absent(map_k, d_map_k), *first, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None = None,
    feature_map_q: Tensor | None = None,
    feature_map_k: Tensor | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = True,
    state: Tensor | None = None,
    bounds: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `gated_reference.gated_linear_attention`, on Triton; feature dim and V of 32, 64, 128 or 256.

    Raises:
        ValueError: on other dims, naming them.
    """
    mapped = feature_map_q is not None
    check_dims(**({"head dim": q.shape[-1]} if mapped else {}), **{"value dim": v.shape[-1]})
    check_dims(**{"feature dim": 2 * feature_map_q.shape[-1] if feature_map_q is not None else q.shape[-1]})
    gate = None
    if log_gate is not None:
        gate = log_gate.float().expand(len(q), q.shape[1], q.shape[2])
        gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    maps = (None, None)
    if feature_map_q is not None and feature_map_k is not None:
        maps = (feature_map_q.to(q.dtype).contiguous(), feature_map_k.to(q.dtype).contiguous())
    first = (None, None) if state is None else (state[..., :-1].float().contiguous(), state[..., -1].float().contiguous())
    out, _, _, _, last, last_sum = _forward(
        rows_contiguous(q), rows_contiguous(k), rows_contiguous(v), gate, *maps, *first,
        None if bounds is None else bounds.to(device=q.device, dtype=torch.int32).contiguous(), float(scale), normalize,
    )  # fmt: skip
    return out, torch.cat([last, last_sum[..., None]], -1) if return_state else None
