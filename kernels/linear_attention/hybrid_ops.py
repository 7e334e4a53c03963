"""Hybrid attention on Triton: launches of the window and of its linear past, registered with torch.library."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.linear_attention.blocks import scan_states
from kit.kernels.linear_attention.chunk_kernel import chunk_outputs
from kit.kernels.linear_attention.chunk_ops import chunked_forward, takes
from kit.kernels.linear_attention.feature_kernel import map_backward
from kit.kernels.linear_attention.launch import (
    Blocks,
    empty_heads,
    gradient_like,
    like_or_nothing,
    namespace,
    on_device_of,
    over_groups,
    refuse_dims,
    row_products,
    rows_contiguous,
    triton,
)
from kit.kernels.linear_attention.recurrence_kernel import recurrence
from kit.kernels.linear_attention.recurrence_ops import Recurrence, map_features, map_gradient
from kit.kernels.linear_attention.window_kernel import (
    window_backward_keys,
    window_backward_queries,
    window_forward,
)
from kit.kernels.operations import operation

NAMESPACE = namespace(
    __file__, window_forward, recurrence, map_backward, scan_states, Recurrence.run, row_products, chunk_outputs,
    chunked_forward,
)  # fmt: skip
SINK_ROWS = 16  # a tile of the tensor cores
LONGEST_WINDOW = 1024
TERRACES = (16, 32, 64)
BLOCKS_EACH = 8  # of queries a program of the backward pass, which so adds sinks' gradients up


def _flags(q: Tensor, v: Tensor, bounds: Tensor | None, window: int, terrace: bool, sinks: int) -> dict[str, Any]:
    """Compile-time arguments that the window kernels share."""
    cut = Blocks.window(q.dtype, q.shape[-1], v.shape[-1])
    rows = math.gcd(window, cut.rows) if terrace else cut.rows
    return {
        "HAS_BOUNDS": bounds is not None, "SINKS": sinks, "WINDOW": window, "TERRACE": terrace,
        "LAG": 2 * (window // rows) - 1 if terrace else (window - 2) // rows + 1,
        "DIM": q.shape[-1], "V": v.shape[-1], "BT": rows, "PRECISION": cut.precision,
        "num_warps": cut.warps, "num_stages": cut.stages,
    }  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _past(q: Tensor, bounds: Tensor | None, window: int, terrace: bool, shift: int) -> Recurrence:
    """The recurrence between queries and the keys a window before them: both as views, `shift` rows shorter."""
    if bounds is not None:
        end = torch.maximum(bounds[:, 2] - shift, bounds[:, 1])
        bounds = torch.stack([bounds[:, 0], bounds[:, 1], end], 1).contiguous()
    batch, heads, rows = q.shape[:3]
    return Recurrence(batch, heads, rows - shift, window if terrace else None, None, bounds, terrace)


def _without_sinks(phi_k: Tensor, bounds: Tensor | None, num_sinks: int) -> Tensor:
    """Features (B, L, T, F) with those of each sequence's first keys set to zero, in place."""
    if num_sinks and bounds is None:
        phi_k[:, :, :num_sinks] = 0
    elif num_sinks and bounds is not None:
        places = bounds[:, 1:2].long() + torch.arange(num_sinks, device=phi_k.device)
        rows, inside = bounds[:, :1].long().expand_as(places), places < bounds[:, 2:]
        places = torch.where(inside, places, bounds[:, 1:2].long()).clamp(max=phi_k.shape[2] - 1)
        phi_k.transpose(1, 2)[rows, places] = 0
    return phi_k


@operation(f"{NAMESPACE}::hybrid_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_k: Tensor,
    log_factor: Tensor,
    meta: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    state: Tensor | None,
    state_sum: Tensor | None,
    bounds: Tensor | None,
    window: int,
    terrace: bool,
    num_sinks: int,
    scale: float,
    linear_weight: float,
    window_weight: float,
) -> tuple[Tensor, Tensor]:
    """Return the output and the log of the denominators (B, H, T)."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    if min(linear_weight, window_weight) > 0 and state is None and takes(q, k, v, map_k, window, terrace, scale):
        maps_and_window = map_q, map_k, log_factor, meta, sink_k, sink_v
        return chunked_forward(q, k, v, *maps_and_window, bounds, window, num_sinks, scale, linear_weight)
    batch, heads, length = q.shape[:3]
    before = k.shape[2] - length
    out = empty_heads((batch, heads, length, v.shape[-1]), v.dtype, v.device, fill=bounds is not None)
    log_mass = torch.zeros(batch, heads, length, dtype=torch.float32, device=q.device)
    mass: Tensor | None = log_mass
    shift, past = 0, v
    has_past = linear_weight > 0 and (state is not None or length > window - before)
    if has_past:
        shift = window - before if state is None else 0
        call = _past(q, bounds, window, terrace, shift)
        rows = max(length - (window - before), 0)
        phi_q, _ = map_features(q[:, :, shift:], map_q)
        values, first, key_sums = v[:, :, :rows], None, None
        if bounds is None:
            block = window if terrace else Blocks.recurrence(v.dtype, phi_q.shape[-1], v.shape[-1]).rows
            phi_k, key_sums = map_features(k[:, :, :rows], map_k, num_sinks, block)
        else:
            phi_k = _without_sinks(map_features(k[:, :, :rows], map_k)[0], call.bounds, num_sinks)
        if state is not None and state_sum is not None:  # keys before the first one in the window are in it already
            pad, first = (0, 0, length - rows, 0), (state, state_sum)
            phi_k, values, key_sums = F.pad(phi_k, pad), F.pad(values, pad), None
        past, mass, *_ = call.run(phi_q, phi_k, values, normalize=True, first=first, key_sums=key_sums, want_last=False)
    assert mass is not None
    flags = _flags(q, v, bounds, window, terrace, num_sinks)
    sequences = batch if bounds is None else bounds.shape[0]
    with on_device_of(q):
        window_forward[(triton.cdiv(k.shape[2], flags["BT"]), heads, sequences)](
            q, k, v, log_factor, log_mass if meta is None else meta, q if sink_k is None else sink_k,
            q if sink_v is None else sink_v, past, mass, q if bounds is None else bounds, out, log_mass,
            *_strides(q, k, v, past, out), heads, heads // k.shape[1], scale,
            math.log(linear_weight) if linear_weight > 0 else 0.0, before, length, k.shape[2], shift, past.shape[2],
            HAS_WINDOW=window_weight > 0, HAS_PAST=has_past, HAS_META=meta is not None, **flags,
        )  # fmt: skip
    return out, log_mass


@_forward.register_fake
def _(q, k, v, *options):
    log_mass = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return empty_heads((*q.shape[:3], v.shape[-1]), v.dtype, v.device, fill=False), log_mass


@torch.library.custom_op(f"{NAMESPACE}::hybrid_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    out: Tensor,
    log_mass: Tensor,
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
    terrace: bool,
    num_sinks: int,
    scale: float,
    linear_weight: float,
    window_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of q, k, v, both maps, log g, and the meta logit (empty where absent).

    The past's weights are a_ij = s_i φq_i·φk_j with s_i = λ exp(-log mass_i), and da_ij = s_i (do_i·v_j - D_i).
    """
    laid_out = q, k, v
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    d_out = rows_contiguous(d_out.to(v.dtype))
    inner = row_products(d_out, out)
    d_maps = [torch.zeros_like(map_q), torch.zeros_like(map_k)]
    if window_weight > 0:
        window_grads = _window_backward(
            d_out, log_mass, inner, q, k, v, log_factor, meta, sink_k, sink_v, bounds, window, terrace, num_sinks, scale
        )
    else:
        absent = inner.new_zeros(0)
        likes = [absent if x is None else x for x in (q, k, v, log_factor, meta)]
        window_grads = [torch.zeros_like(x) for x in likes]
    d_q, d_k, d_v, *others = window_grads
    if linear_weight > 0 and q.shape[2] > window:
        add_to = d_q[:, :, window:], d_k[:, :, :-window], d_v[:, :, :-window]
        d_maps = _past_backward(
            add_to, d_out, log_mass, inner, q, k, v, map_q, map_k, bounds, window, terrace, num_sinks, linear_weight
        )
    grads = (over_groups(x, like) for x, like in zip((d_q, d_k, d_v), laid_out, strict=True))
    return *grads, *d_maps, *others  # type: ignore[return-value]


def _past_backward(
    add_to, d_out, log_mass, inner, q, k, v, map_q, map_k, bounds, window, terrace, num_sinks, linear_weight
) -> list[Tensor]:
    """Gradients of the maps; what the past gives q (but the first window), k and v (but the last) joins `add_to`."""
    call = _past(q, bounds, window, terrace, window)
    rows = q.shape[2] - window
    log_mass, inner, d_out = log_mass[:, :, window:], inner[:, :, window:], d_out[:, :, window:]
    queries, keys, values = q[:, :, window:], k[:, :, :rows], v[:, :, :rows]
    share = (math.log(linear_weight) - log_mass).clamp(max=60.0).exp()
    extra = -share * inner
    phi_q, phi_k = map_features(queries, map_q)[0], map_features(keys, map_k)[0]
    phi_k = _without_sinks(phi_k, call.bounds, num_sinks)
    d_v, *_ = call.run(
        phi_k, phi_q, d_out, reverse=True, weight=("y", share), like=values, add_to=add_to[2], want_last=False
    )
    if d_v is not add_to[2]:
        add_to[2].add_(over_groups(d_v, values))
    d_phi, *_ = call.run(
        values, d_out, phi_q, reverse=True, weight=("y", share), extra=("y", extra), like=phi_k, want_last=False
    )
    d_phi = _without_sinks(over_groups(d_phi, phi_k), call.bounds, num_sinks)
    _, d_map_k = map_gradient(keys, map_k, d_phi, add_to[1])
    del d_phi  # before the other one is made: training's memory peaks here
    d_phi, *_ = call.run(d_out, values, phi_k, weight=("x", share), extra=("x", extra), like=phi_q, want_last=False)
    _, d_map_q = map_gradient(queries, map_q, d_phi, add_to[0])
    return [d_map_q, d_map_k]


def _window_backward(
    d_out, log_mass, inner, q, k, v, log_factor, meta, sink_k, sink_v, bounds, window, terrace, num_sinks, scale
) -> list[Tensor]:
    """What the window gives q, k, v, log g and the meta logit."""
    batch, heads, length = q.shape[:3]
    dim, width = q.shape[-1], v.shape[-1]
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    flags = _flags(q, v, bounds, window, terrace, num_sinks)
    sequences = batch if bounds is None else bounds.shape[0]
    num_blocks = triton.cdiv(length, flags["BT"])
    blocks_each = BLOCKS_EACH if num_sinks else 1
    programs = triton.cdiv(num_blocks, blocks_each)
    fill, shared_heads = bounds is not None, k.shape[1] != heads  # heads' gradients are added up in fp32
    d_q = gradient_like(q, fill)
    if shared_heads:
        make = torch.zeros if fill else torch.empty
        d_k, d_v = make(batch, heads, length, dim, **fp32), make(batch, heads, length, width, **fp32)
    else:
        d_k, d_v = gradient_like(k, fill), gradient_like(v, fill)
    d_factor = torch.empty(sequences, programs, heads, **fp32)
    d_meta = d_factor if meta is None else torch.empty_like(d_factor)
    d_sink_k = torch.empty(sequences, programs, heads, SINK_ROWS, dim, **fp32) if num_sinks else inner
    d_sink_v = torch.empty(sequences, programs, heads, SINK_ROWS, width, **fp32) if num_sinks else inner
    at = q if bounds is None else bounds
    shared = (*_strides(q, k, v, d_out), heads, heads // k.shape[1], scale, length)
    with on_device_of(q):
        window_backward_queries[(programs, heads, sequences)](
            q, k, v, log_factor, inner if meta is None else meta, q if sink_k is None else sink_k,
            q if sink_v is None else sink_v, at, d_out, log_mass, inner, d_q, d_factor, d_meta, d_sink_k, d_sink_v,
            *_strides(d_q), *shared, blocks_each, HAS_META=meta is not None, **flags,
        )  # fmt: skip
    flags.pop("SINKS")
    with on_device_of(q):
        window_backward_keys[(num_blocks, heads, sequences)](
            q, k, v, log_factor, at, d_out, log_mass, inner, d_k, d_v, *_strides(d_k, d_v), *shared, **flags
        )
    for d_x, d_sinks in ((d_k, d_sink_k), (d_v, d_sink_v)) if num_sinks else ():
        _add_to_first_keys(d_x, d_sinks.sum(1)[:, :, :num_sinks], bounds)
    d_meta = torch.empty(0, **fp32) if meta is None else d_meta.sum((0, 1))
    return [d_q, over_groups(d_k, k), over_groups(d_v, v), d_factor.sum((0, 1)), d_meta]


@_backward.register_fake
def _(d_out, out, log_mass, q, k, v, map_q, map_k, log_factor, meta, *options):
    return tuple(like_or_nothing(x, q.device) for x in (q, k, v, map_q, map_k, log_factor, meta))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:9], inputs[11], *output)
    ctx.options = inputs[12:]


def _differentiate(ctx: Any, d_out: Tensor, *_: Any) -> tuple:
    *tensors, sink_k, sink_v, bounds, out, log_mass = ctx.saved_tensors
    grads = _backward(d_out, out, log_mass, *tensors, sink_k, sink_v, bounds, *ctx.options)
    grads = [None if x is None else grad for x, grad in zip(tensors, grads, strict=True)]
    return *grads, *[None] * 11


_forward.register_autograd(_differentiate, setup_context=_setup)


def unsupported(
    q: Tensor, v: Tensor, feature_map_q: Tensor, window_size: int, terrace: bool = False, num_sinks: int = 0
) -> str | None:
    """Why the kernels cannot take a shape; None if they can."""
    dims = {"head dim": q.shape[-1], "value dim": v.shape[-1], "feature dim": 2 * feature_map_q.shape[-1]}
    if reason := refuse_dims(**dims):
        return reason
    if terrace and window_size not in TERRACES:
        return f"the Triton kernels take terraces of {TERRACES}, got {window_size}"
    if not 1 <= window_size <= LONGEST_WINDOW:
        return f"the Triton kernels take windows from 1 to {LONGEST_WINDOW}, got {window_size}"
    if num_sinks > SINK_ROWS:
        return f"the Triton kernels take at most {SINK_ROWS} sinks, got {num_sinks}"
    return None


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    window_factor: Tensor,
    *,
    window_size: int,
    scale: float,
    linear_weight: float = 1.0,
    window_weight: float = 1.0,
    terrace: bool = False,
    num_sinks: int = 0,
    meta_logit: Tensor | None = None,
    state: Tensor | None = None,
    bounds: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.hybrid_attention`, on Triton; D and F of 32, 64, 128 or 256, windows of at most 1,024.

    Raises:
        ValueError: on other dims or windows, naming them.
    """
    if reason := unsupported(q, v, feature_map_q, window_size, terrace, num_sinks):
        raise ValueError(reason)
    maps = [x.to(q.dtype).contiguous() for x in (feature_map_q, feature_map_k)]
    if bounds is not None:
        bounds = bounds.to(device=q.device, dtype=torch.int32).contiguous()
    sinks: tuple[Tensor | None, Tensor | None] = (None, None)
    if num_sinks and window_weight > 0:
        sinks = (_first_keys(k.detach(), bounds, num_sinks), _first_keys(v.detach(), bounds, num_sinks))
    first: tuple[Tensor | None, Tensor | None] = (None, None)
    learned = (q, k, v, *maps, window_factor, meta_logit, state)
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned)
    if trained and (state is not None or k.shape[2] != q.shape[2]):
        raise ValueError("hybrid attention cannot be trained from a state on: no gradient would reach what made it")
    if state is not None:
        group = q.shape[1] // state.shape[1]
        whole = state.float().repeat_interleave(group, 1)
        first = (whole[..., :-1].mT.contiguous(), whole[..., -1].contiguous())
    meta = None if meta_logit is None or window_weight == 0 else meta_logit.float().contiguous()
    log_factor = window_factor.float().log() + (math.log(window_weight) if window_weight > 0 else 0.0)
    out, *_ = _forward(
        q, k, v, *maps, log_factor, meta, *sinks, *first,
        bounds, window_size, terrace, num_sinks, float(scale), float(linear_weight), float(window_weight),
    )  # fmt: skip
    if not return_state:
        return out, None
    return out, _state_after(k, v, maps[1], state, bounds, window_size, num_sinks)


def _first_keys(x: Tensor, bounds: Tensor | None, count: int) -> Tensor:
    """(N, G, 16, D): the first keys of each sequence and zeros; a shorter sequence's others are never met."""
    if bounds is None:
        chosen = x[:, :, :count]
    else:
        places = (bounds[:, 1:2] + torch.arange(count, device=x.device)).clamp(max=x.shape[2] - 1)
        chosen = x.transpose(1, 2)[bounds[:, :1].long(), places.long()].transpose(1, 2)
    return F.pad(chosen, (0, 0, 0, SINK_ROWS - chosen.shape[2])).contiguous()


def _add_to_first_keys(d_x: Tensor, d_sinks: Tensor, bounds: Tensor | None) -> None:
    """Add (N, H, S, D) to the rows of d_x (B, H, T, D) that `_first_keys` took, in place."""
    if bounds is None:
        count = min(d_sinks.shape[2], d_x.shape[2])
        d_x[:, :, :count] += d_sinks[:, :, :count]
        return
    places = (bounds[:, 1:2] + torch.arange(d_sinks.shape[2], device=d_x.device)).clamp(max=d_x.shape[2] - 1).long()
    rows = bounds[:, :1].long().expand_as(places)
    d_x.transpose(1, 2).index_put_((rows, places), d_sinks.transpose(1, 2).to(d_x.dtype), accumulate=True)


@operation(f"{NAMESPACE}::hybrid_state")
def _state(
    k: Tensor,
    v: Tensor,
    map_k: Tensor,
    state: Tensor | None,
    state_sum: Tensor | None,
    bounds: Tensor | None,
    rows: int,
    num_sinks: int,
) -> tuple[Tensor, Tensor]:
    """Return what the first `rows` keys leave behind, (N, L, V, F) and (N, L, F), sinks left out."""
    k, v = rows_contiguous(k), rows_contiguous(v)
    if bounds is not None:
        end = bounds[:, 2].clamp(max=rows)
        bounds = torch.stack([bounds[:, 0], torch.minimum(bounds[:, 1], end), end], 1).contiguous()
    phi_k = _without_sinks(map_features(k[:, :, :rows], map_k)[0], bounds, num_sinks)
    call = Recurrence(len(k), len(map_k), rows, bounds=bounds)
    first = None if state is None or state_sum is None else (state, state_sum)
    _, _, last, last_sum = call.run(phi_k, phi_k, v[:, :, :rows], normalize=True, first=first, want_out=False)
    return last, last_sum


@_state.register_fake
def _(k, v, map_k, state, state_sum, bounds, rows, num_sinks):
    shape = (len(k) if bounds is None else bounds.shape[0], len(map_k))
    last = torch.empty(*shape, v.shape[-1], 2 * map_k.shape[-1], dtype=torch.float32, device=k.device)
    return last, torch.empty(*shape, 2 * map_k.shape[-1], dtype=torch.float32, device=k.device)


def _state_after(
    k: Tensor, v: Tensor, map_k: Tensor, state: Tensor | None, bounds: Tensor | None, window: int, num_sinks: int
) -> Tensor:
    """(N, L, F, D + 1): all keys but those in the last window - 1 rows, and sinks; no gradient flows through it."""
    rows = max(k.shape[2] - (window - 1), 0)
    if rows == 0:
        shape = (len(k) if bounds is None else bounds.shape[0], len(map_k), 2 * map_k.shape[-1], v.shape[-1] + 1)
        return torch.zeros(shape, device=k.device) if state is None else state
    first: tuple[Tensor | None, Tensor | None] = (None, None)
    if state is not None:
        first = (state[..., :-1].mT.float().contiguous(), state[..., -1].float().contiguous())
    last, last_sum = _state(*(x.detach() for x in (k, v, map_k)), *first, bounds, rows, num_sinks)
    return torch.cat([last.mT, last_sum[..., None]], -1)
