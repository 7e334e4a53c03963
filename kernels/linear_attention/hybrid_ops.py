"""Launches the hybrid kernels and registers them with torch.library: forward, backward, shapes for torch.compile."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.linear_attention import blocks, hybrid_kernel
from kit.kernels.linear_attention.launch import (
    Blocks,
    check_dims,
    empty_like_heads,
    namespace,
    num_splits,
    over_groups,
    over_value_blocks,
    past_of_splits,
    reserve_descriptors,
    row_products,
    rows_contiguous,
)

NAMESPACE = namespace(__file__, blocks.__file__, hybrid_kernel.__file__)
SINK_ROWS = 16  # a tile of the tensor cores
LONGEST_WINDOW = 1024


class _Cut:
    """How a call is cut: blocks, splits, and how far back the window reaches."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, map_q: Tensor, bounds: Tensor | None, window: int, terrace: bool, backward: bool = False):
        self.features, self.width = 2 * map_q.shape[-1], v.shape[-1]
        self.blocks = Blocks.hybrid(q.dtype, self.features, self.width, backward=backward)
        rows = self.blocks.rows
        if terrace and window % rows:
            rows = math.gcd(window, rows)
            self.blocks = Blocks(rows, self.blocks.values, 4, 1, self.blocks.precision)
        self.sequences = len(k) if bounds is None else bounds.shape[0]
        self.value_blocks = self.width // self.blocks.values
        self.splits, self.split_blocks = num_splits(
            self.sequences * q.shape[1] * self.value_blocks, k.shape[2], rows
        )
        if terrace:
            self.lag, self.far = 2 * (window // rows) - 1, window // rows + 1
        else:
            self.lag, self.far = (window - 2) // rows + 1, max(-(-(window - rows + 1) // rows), 0)
        self.grid = (self.sequences * self.splits, q.shape[1], self.value_blocks)

    def flags(self, q: Tensor, bounds: Any, window: int, terrace: bool, linear: float, near: float, sinks: int) -> dict:
        """The kernels' compile-time arguments."""
        return {
            "HAS_BOUNDS": bounds is not None, "HAS_WINDOW": near > 0, "HAS_LINEAR": linear > 0,
            "SINKS": sinks, "WINDOW": window, "TERRACE": terrace, "LAG": self.lag, "FAR": self.far,
            "DIM": q.shape[-1], "HALF": self.features // 2, "V": self.width, "BV": self.blocks.values,
            "BT": self.blocks.rows, "PRECISION": self.blocks.precision,
            "num_warps": self.blocks.warps, "num_stages": self.blocks.stages,
        }  # fmt: skip

    def past(self, x: Tensor, y: Tensor, maps: Tensor, bounds: Tensor | None, heads: int, **options: Any) -> Any:
        """What each split starts from; see `past_of_splits`."""
        return past_of_splits(
            x, y, cut=self.blocks, maps=maps, heads=heads, features=self.features, splits=self.splits,
            split_blocks=self.split_blocks, bounds=bounds, **options,
        )  # fmt: skip


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else 0.0


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


@torch.library.custom_op(f"{NAMESPACE}::hybrid_forward", mutates_args=())
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
    batch, heads, length = q.shape[:3]
    cut = _Cut(q, k, v, map_q, bounds, window, terrace)
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    out = empty_like_heads(q, cut.width, fill=bounds is not None)
    log_mass = torch.empty(batch, heads, length, **fp32)
    states, sums = torch.empty(0, **fp32), torch.empty(0, **fp32)
    if linear_weight > 0 and cut.splits > 1:
        first = None if state is None or state_sum is None else (state, state_sum)
        past = cut.past(k, v, map_k, bounds, heads, first=first, shift=-cut.lag, skip=num_sinks)
        states, sums = past.states, past.sums
    elif linear_weight > 0 and state is not None and state_sum is not None:
        states, sums = state[:, None].clone(), state_sum[:, None].clone()
    kept = states.numel() > 0
    reserve_descriptors(q.device)
    hybrid_kernel.hybrid_forward[cut.grid](
        q, k, v, map_q, map_k, log_factor, log_mass if meta is None else meta, q if sink_k is None else sink_k,
        q if sink_v is None else sink_v, q if bounds is None else bounds, states if kept else log_mass,
        sums if kept else log_mass, out, log_mass, *_strides(q, k, v, out), heads, heads // k.shape[1],
        heads // map_k.shape[0], scale, _log(linear_weight), k.shape[2] - length, length, k.shape[2], cut.splits,
        cut.split_blocks, HAS_STATE=kept, HAS_META=meta is not None,
        **cut.flags(q, bounds, window, terrace, linear_weight, window_weight, num_sinks),
    )  # fmt: skip
    return out, log_mass


@_forward.register_fake
def _(q, k, v, map_q, map_k, log_factor, meta, sink_k, sink_v, state, state_sum, bounds, window, terrace, num_sinks, scale, linear_weight, window_weight):  # fmt: skip
    log_mass = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return empty_like_heads(q, v.shape[-1], fill=False), log_mass


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of q, k, v, both maps, log g, and the meta logit, sinks' keys and values (empty where absent)."""
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    batch, heads, length = q.shape[:3]
    cut = _Cut(q, k, v, map_q, bounds, window, terrace, backward=True)
    dim, width, half, many = q.shape[-1], cut.width, cut.features // 2, cut.grid[0]
    fp32: Any = {"dtype": torch.float32, "device": q.device}
    make = torch.empty if bounds is None else torch.zeros
    d_out = rows_contiguous(d_out)
    inner = row_products(d_out, out)
    linear = linear_weight > 0
    through_splits = linear and cut.splits > 1
    states, sums = inner, inner
    if through_splits:
        past = cut.past(k, v, map_k, bounds, heads, shift=-cut.lag, skip=num_sinks)
        states, sums = past.states, past.sums
    kind = q.dtype if cut.value_blocks == 1 else torch.float32
    d_q = make(cut.value_blocks, batch, heads, length, dim, dtype=kind, device=q.device)
    shared_kind = torch.float32 if k.shape[1] != heads else kind  # heads' gradients are added up
    d_k = make(cut.value_blocks, batch, heads, length, dim, dtype=shared_kind, device=q.device)
    d_v = make(batch, heads, length, width, dtype=shared_kind if k.shape[1] != heads else v.dtype, device=q.device)
    d_maps = [torch.zeros(cut.value_blocks, many, heads, dim, half, **fp32) if linear else inner for _ in range(2)]
    d_factor = torch.empty(cut.value_blocks, many, heads, **fp32)
    d_meta = torch.empty(cut.value_blocks, many, heads, **fp32) if meta is not None else inner
    d_sink_k = torch.empty(cut.value_blocks, many, heads, SINK_ROWS, dim, **fp32) if num_sinks else inner
    d_sink_v = torch.empty(many, heads, SINK_ROWS, width, **fp32) if num_sinks else inner
    shared = (
        *_strides(q, k, v, d_out), heads, heads // k.shape[1], heads // map_k.shape[0], scale, _log(linear_weight),
        batch * heads * length, 0, length, length, cut.splits, cut.split_blocks,
    )  # fmt: skip
    flags = cut.flags(q, bounds, window, terrace, linear_weight, window_weight, num_sinks)
    at = q if bounds is None else bounds
    reserve_descriptors(q.device)
    hybrid_kernel.hybrid_backward_queries[cut.grid](
        q, k, v, map_q, map_k, log_factor, inner if meta is None else meta, q if sink_k is None else sink_k,
        q if sink_v is None else sink_v, at, states, sums, d_out, log_mass, inner,
        d_q, d_maps[0], d_factor, d_meta, d_sink_k, d_sink_v, *shared, HAS_STATE=through_splits, HAS_META=meta is not None, **flags,
    )  # fmt: skip
    share = (math.log(linear_weight) - log_mass).clamp(max=60.0).exp() if linear else inner
    d_states, d_sums = inner, inner
    if through_splits:
        past = cut.past(
            q, d_out, map_q, bounds, heads, weights=(share, -share * inner), reverse=True, shift=cut.lag
        )
        d_states, d_sums = past.states, past.sums
    hybrid_kernel.hybrid_backward_keys[cut.grid](
        q, k, v, map_q, map_k, log_factor, at, d_states, d_sums, d_out, log_mass, inner, share,
        d_k, d_v, d_maps[1], *shared, HAS_STATE=through_splits, **flags,
    )  # fmt: skip
    nothing = lambda: torch.empty(0, **fp32)  # noqa: E731  (operations may not return one tensor twice)
    over_splits = lambda x: x.unflatten(0, (cut.sequences, cut.splits)).sum(1)  # noqa: E731
    return (
        over_value_blocks(d_q, q),
        over_groups(over_value_blocks(d_k, d_v), k),
        over_groups(d_v, v),
        over_groups(d_maps[0].sum((0, 1))[None], map_q[None])[0] if linear else torch.zeros_like(map_q),
        over_groups(d_maps[1].sum((0, 1))[None], map_k[None])[0] if linear else torch.zeros_like(map_k),
        d_factor.sum((0, 1)),
        nothing() if meta is None else d_meta.sum((0, 1)),
        nothing() if sink_k is None else over_groups(over_splits(d_sink_k.sum(0)), sink_k),
        nothing() if sink_v is None else over_groups(over_splits(d_sink_v), sink_v),
    )


@_backward.register_fake
def _(d_out, out, log_mass, q, k, v, map_q, map_k, log_factor, meta, sink_k, sink_v, bounds, window, terrace, num_sinks, scale, linear_weight, window_weight):  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return torch.empty(0, device=q.device) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return tuple(like(x) for x in (q, k, v, map_q, map_k, log_factor, meta, sink_k, sink_v))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, options = inputs[:9], inputs[12:]
    ctx.save_for_backward(*tensors, inputs[11], *output)
    ctx.options = options


def _differentiate(ctx: Any, d_out: Tensor, *_: Any) -> tuple:
    *tensors, bounds, out, log_mass = ctx.saved_tensors
    grads = _backward(d_out, out, log_mass, *tensors, bounds, *ctx.options)
    grads = [None if x is None else grad for x, grad in zip(tensors, grads, strict=True)]
    return *grads, *[None] * 9


_forward.register_autograd(_differentiate, setup_context=_setup)


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
    check_dims(**{"head dim": q.shape[-1], "value dim": v.shape[-1], "feature dim": 2 * feature_map_q.shape[-1]})
    if not 1 <= window_size <= LONGEST_WINDOW or (terrace and window_size % 16):
        kind = "multiples of 16" if terrace else "sizes"
        raise ValueError(f"the Triton kernels take windows of {kind} from 1 to {LONGEST_WINDOW}, got {window_size}")
    if num_sinks > SINK_ROWS:
        raise ValueError(f"the Triton kernels take at most {SINK_ROWS} sinks, got {num_sinks}")
    maps = [x.to(q.dtype).contiguous() for x in (feature_map_q, feature_map_k)]
    if bounds is not None:
        bounds = bounds.to(device=q.device, dtype=torch.int32).contiguous()
    sinks = (None, None)
    if num_sinks:
        sinks = (_first_keys(k, bounds, num_sinks), _first_keys(v, bounds, num_sinks))
    first: tuple[Tensor | None, Tensor | None] = (None, None)
    if state is not None:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *maps)):
            raise ValueError("hybrid attention cannot be trained from a state on: no gradient would reach what made it")
        first = tuple(  # type: ignore[assignment]
            _query_heads(x, q.shape[1]) for x in (state[..., :-1].float(), state[..., -1].float())
        )
    log_factor = window_factor.float().log() + _log(window_weight)
    out, *_ = _forward(
        q, k, v, *maps, log_factor, None if meta_logit is None else meta_logit.float().contiguous(), *sinks, *first,
        bounds, window_size, terrace, num_sinks, float(scale), float(linear_weight), float(window_weight),
    )  # fmt: skip
    if not return_state:
        return out, None
    return out, _state_after(k, v, maps[1], state, bounds, window_size, num_sinks)


def _query_heads(state: Tensor, heads: int) -> Tensor:
    """(N, L, F, ...) states of key maps for each query head."""
    return state.repeat_interleave(heads // state.shape[1], 1).contiguous()


def _first_keys(x: Tensor, bounds: Tensor | None, count: int) -> Tensor:
    """(N, G, 16, D): the first keys of each sequence and zeros; a shorter sequence's others are never met."""
    if bounds is None:
        chosen = x[:, :, :count]
    else:
        places = (bounds[:, 1:2] + torch.arange(count, device=x.device)).clamp(max=x.shape[2] - 1)
        chosen = x.transpose(1, 2)[bounds[:, :1].long(), places.long()].transpose(1, 2)
    return F.pad(chosen, (0, 0, 0, SINK_ROWS - chosen.shape[2])).contiguous()


@torch.no_grad()
def _state_after(
    k: Tensor, v: Tensor, map_k: Tensor, state: Tensor | None, bounds: Tensor | None, window: int, num_sinks: int
) -> Tensor:
    """(N, L, F, D + 1): all keys but each sequence's last window - 1, and its sinks."""
    heads, features = map_k.shape[0], 2 * map_k.shape[-1]
    cut = Blocks.hybrid(k.dtype, features, v.shape[-1], backward=False)
    sequences = len(k) if bounds is None else bounds.shape[0]
    splits, split_blocks = num_splits(sequences * heads * (v.shape[-1] // cut.values), k.shape[2], cut.rows)
    first = None if state is None else (state[..., :-1].float().contiguous(), state[..., -1].float().contiguous())
    past = past_of_splits(
        k, v, cut=cut, maps=map_k, heads=heads, features=features, splits=splits, split_blocks=split_blocks,
        bounds=bounds, first=first, skip=num_sinks, limit=window - 1,
    )  # fmt: skip
    return torch.cat([past.last_state, past.last_sum[..., None]], -1)
