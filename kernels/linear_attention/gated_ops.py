"""Gated linear attention on Triton: launches of the recurrence, registered with torch.library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention.blocks import scan_states
from kit.kernels.linear_attention.feature_kernel import map_backward
from kit.kernels.linear_attention.launch import (
    Blocks,
    empty_heads,
    like_or_nothing,
    namespace,
    on_device_of,
    over_groups,
    refuse_dims,
    row_products,
    rows_contiguous,
)
from kit.kernels.linear_attention.recurrence_kernel import KEEP_EVERY, gate_gradient, recurrence
from kit.kernels.linear_attention.recurrence_ops import Recurrence, cumulated, map_features, map_gradient
from kit.kernels.operations import operation

NAMESPACE = namespace(__file__, recurrence, map_backward, scan_states, Recurrence.run, row_products)


def _prepare(q: Tensor, v: Tensor, log_gate: Tensor | None, bounds: Tensor | None) -> Recurrence:
    rows = Blocks.recurrence(v.dtype, q.shape[-1], v.shape[-1]).rows
    through = None if log_gate is None else cumulated(log_gate, bounds, rows)
    batch, heads, length = q.shape[:3]
    return Recurrence(batch, heads, length, rows, through, bounds)


@operation(f"{NAMESPACE}::gated_forward")
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
    want_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, the denominators (B, H, T), and the state (N, H, V, F) and its sum (N, H, F) at the end."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    sums: Tensor | None = None
    if map_q is not None and map_k is not None:
        q, _ = map_features(q, map_q)
        if normalize and log_gate is None and bounds is None:
            k, sums = map_features(k, map_k, rows_a_sum=Blocks.recurrence(v.dtype, q.shape[-1], v.shape[-1]).rows)
        else:
            k, _ = map_features(k, map_k)
    call = _prepare(q, v, log_gate, bounds)
    first = None if state is None or state_sum is None else (state, state_sum)
    out, mass, last, last_sum = call.run(
        q, k, v, scale=scale, normalize=normalize, first=first, key_sums=sums, want_last=want_last
    )
    return out, torch.empty(0, device=q.device) if mass is None else mass, last, last_sum


@_forward.register_fake
def _(q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, scale, normalize, want_last):
    batch, heads, rows = q.shape[:3]
    features, width = q.shape[-1] if map_q is None else 2 * map_q.shape[-1], v.shape[-1]
    sequences = batch if bounds is None else bounds.shape[0]
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    return (
        empty_heads((batch, heads, rows, width), v.dtype, v.device, fill=False),
        torch.empty((batch, heads, rows) if normalize else 0, **fp32),
        torch.empty(sequences, heads, width, features, **fp32),
        torch.empty(sequences, heads, features, **fp32),
    )


@torch.library.custom_op(f"{NAMESPACE}::gated_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    out: Tensor,
    mass: Tensor,
    d_last: Tensor | None,
    d_last_sum: Tensor | None,
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
    gate_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of q, k, v, log_gate, both maps (empty where there are none), the first state and its sum.

    With y_i = Σ_j w_ij v_j / m_i: the weights' gradient is dA_ij = r_i do_i·v_j + e_i, r = 1/m and e = -do·y/m
    (r = `scale` and e = 0 if not normalized), and each gradient is a recurrence of its own.
    """
    laid_out = q, k, v
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    x, y = q, k
    if map_q is not None and map_k is not None:
        (q, _), (k, _) = map_features(q, map_q), map_features(k, map_k)
    call = _prepare(q, v, log_gate, bounds)
    d_out = rows_contiguous(d_out.to(v.dtype))
    shape = (call.batch, call.heads, call.rows)
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    if normalize:
        weight = torch.where(mass == 0, 0.0, 1.0 / mass)
        extra = row_products(d_out, out).mul_(weight).neg_()
    else:
        weight, extra = torch.full(shape, scale, **fp32), torch.zeros(shape, **fp32)
    last = None if d_last is None or d_last_sum is None else (d_last.contiguous(), d_last_sum.contiguous())
    added = extra if normalize or last is not None else None
    features, width = q.shape[-1], v.shape[-1]
    parts: list[dict[str, Tensor]] = [{}, {}]
    terms = ("", "")
    if gate_needs_grad:
        assert call.through is not None
        terms = ("q", "k")
        num_terms = features // Blocks.recurrence(v.dtype, width, features).values
        kept = (call.sequences, call.num_kept, call.heads)
        states = torch.empty(*kept, features, width, dtype=v.dtype, device=q.device)
        sums = torch.empty(*kept, features, **fp32)
        rows_q, rows_k = (torch.empty(num_terms, *shape, **fp32) for _ in range(2))
        across = torch.empty(num_terms, *kept, **fp32)
        parts = [
            {"row_products": rows_q, "block_states": states, "block_sums": sums},
            {"row_products": rows_k, "block_states": states, "block_sums": sums, "across": across},
        ]
    first = None if state is None or state_sum is None else (state.mT.contiguous(), state_sum)
    of_queries = None if added is None else ("x", added)
    of_keys = None if added is None else ("y", added)
    d_q, *_ = call.run(
        d_out, v, k, weight=("x", weight), extra=of_queries, first=first, want_last=False,
        like=q, gate_terms=terms[0], companion=q, parts=parts[0],
    )  # fmt: skip
    d_k, _, _, d_sum = call.run(
        v, d_out, q, reverse=True, weight=("y", weight), extra=of_keys, like=k,
        first=None if last is None else (last[0].mT.contiguous(), last[1]), want_last=state is not None,
        gate_terms=terms[1], companion=k, parts=parts[1],
    )  # fmt: skip
    d_v, _, d_state, _ = call.run(
        k, q, d_out, reverse=True, weight=("y", weight), first=last, like=v,
        want_last=state is not None,
    )  # fmt: skip
    d_gate = torch.empty(0, **fp32)
    if gate_needs_grad:
        d_gate = torch.zeros(shape, **fp32)
        with on_device_of(q):
            gate_gradient[(call.sequences * call.num_kept, call.heads)](
                rows_q, rows_k, across, q if bounds is None else bounds, d_gate, d_gate.numel(), call.rows,
                call.num_kept, TERMS=num_terms, HAS_BOUNDS=bounds is not None, CARRY=last is not None,
                ROWS=KEEP_EVERY.value * call.rows_a_block,
                num_warps=4,
            )  # fmt: skip
    nothing = lambda: torch.empty(0, **fp32)  # noqa: E731  (operations may not return one tensor twice)
    d_k, d_v = over_groups(d_k, k), over_groups(d_v, laid_out[2])  # k may be features: maps come after
    d_map_q, d_map_k = nothing(), nothing()
    if map_q is not None and map_k is not None:
        d_q, d_map_q = map_gradient(x, map_q, d_q)
        d_k, d_map_k = map_gradient(y, map_k, d_k)
    d_q, d_k = over_groups(d_q, laid_out[0]), over_groups(d_k, laid_out[1])
    d_sum = d_sum if added is not None else torch.zeros(call.sequences, call.heads, features, **fp32)
    return d_q, d_k, d_v, d_gate, d_map_q, d_map_k, d_state, d_sum


@_backward.register_fake
def _(d_out, out, mass, d_last, d_last_sum, q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, *options):
    sequences, gate_needs_grad = len(q) if bounds is None else bounds.shape[0], options[-1]
    features = q.shape[-1] if map_q is None else 2 * map_q.shape[-1]
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    return (
        *(like_or_nothing(x, q.device) for x in (q, k, v, log_gate if gate_needs_grad else None, map_q, map_k)),
        torch.empty(sequences, q.shape[1], v.shape[-1], features, **fp32),
        torch.empty(sequences, q.shape[1], features, **fp32),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, scale, normalize, _ = inputs
    out, mass, _, _ = output
    ctx.save_for_backward(*tensors, out, mass)
    ctx.options = (scale, normalize)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, _: Any, d_last: Tensor | None, d_last_sum: Tensor | None) -> tuple:
    q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, out, mass = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    if d_last is not None or d_last_sum is not None:
        features = q.shape[-1] if map_q is None else 2 * map_q.shape[-1]
        shape = (len(q) if bounds is None else len(bounds), q.shape[1])
        d_last = q.new_zeros(*shape, v.shape[-1], features, dtype=torch.float32) if d_last is None else d_last
        d_last_sum = q.new_zeros(*shape, features, dtype=torch.float32) if d_last_sum is None else d_last_sum
    gate_needs_grad = log_gate is not None and ctx.needs_input_grad[3]
    grads = _backward(
        d_out, out, mass, d_last, d_last_sum, q, k, v, log_gate, map_q, map_k, state, state_sum, bounds, *ctx.options,
        gate_needs_grad,
    )  # fmt: skip
    inputs = (q, k, v, log_gate if gate_needs_grad else None, map_q, map_k, state, state_sum)
    return *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)), *[None] * 4


_forward.register_autograd(_differentiate, setup_context=_setup)


def unsupported(q: Tensor, v: Tensor, feature_map_q: Tensor | None) -> str | None:
    """Why the kernels cannot take a shape; None if they can."""
    features = q.shape[-1] if feature_map_q is None else 2 * feature_map_q.shape[-1]
    return refuse_dims(**{"head dim": q.shape[-1], "value dim": v.shape[-1], "feature dim": features})


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
    """As `gated_reference.gated_linear_attention`, on Triton; D, V and F of 32, 64, 128 or 256.

    Raises:
        ValueError: on other dims, naming them.
    """
    if reason := unsupported(q, v, feature_map_q):
        raise ValueError(reason)
    if return_state and not normalize:
        raise ValueError("return_state needs normalize=True: without it there are no denominators to carry")
    gate = None
    if log_gate is not None:
        gate = log_gate.float().expand(q.shape[:3])
        gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    maps: tuple[Tensor | None, Tensor | None] = (None, None)
    if feature_map_q is not None and feature_map_k is not None:
        maps = (feature_map_q.to(q.dtype).contiguous(), feature_map_k.to(q.dtype).contiguous())
    first: tuple[Tensor | None, Tensor | None] = (None, None)
    if state is not None:
        first = (state[..., :-1].mT.float().contiguous(), state[..., -1].float().contiguous())
    out, _, last, last_sum = _forward(
        q, k, v, gate, *maps, *first,
        None if bounds is None else bounds.to(device=q.device, dtype=torch.int32).contiguous(), float(scale), normalize,
        return_state,
    )  # fmt: skip
    if not return_state:
        return out, None
    return out, torch.cat([last.mT, last_sum[..., None]], -1)
