"""Specification of the hybrid attention: a softmax window and a linear past under one denominator.

LoLCATs (arXiv:2410.10254, Eq. 7). With W(i) the last `window_size` positions up to and including i,

    y_i = ( g Σ_{j∈W(i)} exp(s_ij) v_j + λ Σ_{j<W(i)} φq(q_i)·φk(k_j) v_j )
        / ( g Σ_{j∈W(i)} exp(s_ij)     + λ Σ_{j<W(i)} φq(q_i)·φk(k_j)     ),      s_ij = scale · q_i·k_j

Both branches are multiplied by the same exp(-m_i), so the result does not depend on the stabiliser m_i. (The original
code subtracts the maximum from the window branch alone, which changes the function with every row.)

W(i) can also be block-aligned (`terrace`: i's own block of `window_size` positions and the block before it, as LoLCATs'
ThunderKittens kernel has it), and it can hold the first `num_sinks` keys of the sequence for good (attention sinks,
arXiv:2309.17453). Meta memory (Lizard, arXiv:2507.09025) is one logit a head that adds exp(t) to the window's
denominator and no value; several equal tokens are one with the logarithm of their number added.

Letters: B batch, H query heads, G key/value heads, L feature-map key heads (G or H), T queries, P keys before the first
query, D head dim, F feature dim. Arithmetic is fp32, or float64 where the inputs are; time and memory are linear in T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sinks(NamedTuple):
    """Keys that stay in the window for good.

    Attributes:
        k, v: (B, G, S, D).
        visible: (B or 1, T, S), True for queries that see a sink here: their window has left it.
        own: (B or 1, P + T), True for keys that are sinks: they never count as past.
    """

    k: Tensor
    v: Tensor
    visible: Tensor
    own: Tensor


def hedgehog_feature_map(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog features as LoLCATs uses them (arXiv:2402.04347 Eq. 3, arXiv:2410.10254 Appendix A).

    φ(x) = [softmax(Wᵀx) ⊕ softmax(−Wᵀx)]: two separate softmaxes, so φ(q)·φ(k) lies in (0, 2].

    Args:
        x: (B, H, T, D).
        weight: (H, D, F/2), one map a head.

    Returns:
        (B, H, T, F), fp32 (float64 if x is), strictly positive.
    """
    kind = _precise(x)
    z = x.to(kind) @ weight.to(kind)
    return torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1).clamp(min=1e-12)


def linear_state(k: Tensor, v: Tensor, feature_map_k: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Sum what keys and values leave behind: Σ_j φ(k_j) [v_j, 1]ᵀ.

    Args:
        k, v: (B, G, S, D).
        feature_map_k: (L, D, F/2) with L = G or H.
        key_mask: (B, S), False for keys that do not count.

    Returns:
        (B, L, F, D + 1), fp32; the last column is the denominator.
    """
    heads = feature_map_k.shape[0]
    phi_k = hedgehog_feature_map(_expand_heads(k, heads), feature_map_k)
    if key_mask is not None:
        phi_k = phi_k * key_mask[:, None, :, None]
    return phi_k.transpose(-1, -2) @ _with_ones(_expand_heads(v, heads))


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
    sinks: Sinks | None = None,
    meta_logit: Tensor | None = None,
    softcap: float | None = None,
    state: Tensor | None = None,
    key_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend to a softmax window and a linear past (module docstring: the equation and the letters).

    Args:
        q: (B, H, T, D), the queries of the last T positions.
        k, v: (B, G, P + T, D) with P <= window_size - 1: the keys still in the window, then the new ones.
        feature_map_q: (H, D, F/2).
        feature_map_k: (L, D, F/2); L = G keeps one state a key/value head, L = H one a query head.
        window_factor: (H,), the mixing factor g > 0.
        window_size: keys a query sees through softmax, itself included.
        scale: softmax scale, usually 1/sqrt(D).
        linear_weight: λ; 0 leaves window attention exactly.
        window_weight: multiplies g; 0 leaves the linear past alone.
        terrace: block-aligned windows; whole sequences only (P = 0, no state).
        num_sinks: first keys of a sequence that stay in the window and never count as past; whole sequences only.
        sinks: the same keys, given from outside, for calls that go on from earlier keys; instead of `num_sinks`.
        meta_logit: (H,), a logit in the window's denominator.
        softcap: the window's scores are softcap · tanh(s_ij / softcap) (Gemma 2, arXiv:2408.00118); None: s_ij.
        state: (B, L, F, D + 1), the past that has left the window; None for an empty one.
        key_mask: (B, P + T), False for padding. Queries at padded positions get zeros.
        segment_ids: (B, T), non-decreasing; packed sequences that do not see each other. Needs P = 0 and no state.
        return_state: also return the state after these T positions.

    Returns:
        The output (B, H, T, D) in the dtype of `v`, and the new state (or None).

    Raises:
        ValueError: on shapes that do not fit, naming them.
    """
    whole_only = terrace or num_sinks > 0
    per_head = (window_factor, meta_logit)
    check_shapes(
        q, k, v, feature_map_q, feature_map_k, per_head, window_size, state, segment_ids, whole_only=whole_only
    )
    options: dict[str, Any] = {"window_size": window_size, "terrace": terrace, "num_sinks": num_sinks}
    options |= {"linear": linear_weight > 0, "sinks": sinks}
    maps = (feature_map_q, feature_map_k)
    weights = (window_factor, scale, linear_weight, window_weight, meta_logit, softcap)
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the products below to bf16
        if (terrace or num_sinks) and (key_mask is not None or segment_ids is not None):
            out, new = _each_sequence(q, k, v, maps, weights, options, sequence_bounds(key_mask, segment_ids))
        else:
            out, new = _sequences(q, k, v, maps, weights, options, state, key_mask, segment_ids)
        return out.to(v.dtype), new() if return_state else None


def _each_sequence(q, k, v, maps, weights, options, bounds: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """Attend in one sequence after the other: what counts from a sequence's start, counts from each one's own."""
    out, states = torch.zeros(*q.shape[:3], v.shape[-1], dtype=_precise(v), device=q.device), []
    leaving = max(k.shape[2] - (options["window_size"] - 1), 0)  # counted in columns, as a cache keeps its window
    for row, start, end in bounds.tolist():
        q_n, k_n, v_n = (x[row : row + 1, :, start:end] for x in (q, k, v))
        part, _ = _sequences(q_n, k_n, v_n, maps, weights, options, None, None, None)
        out[row, :, start:end] = part[0]
        gone = slice(options["num_sinks"], max(leaving - start, 0))
        states.append((k_n[:, :, gone], v_n[:, :, gone]))
    return out, lambda: torch.cat([linear_state(*kept, maps[1]) for kept in states])


def _sequences(q, k, v, maps, weights, options, state, key_mask, segment_ids) -> tuple[Tensor, Callable[[], Tensor]]:
    """Attend in a batch; also return what computes the state after it."""
    num_queries, num_keys, window_size = q.shape[2], k.shape[2], options["window_size"]
    if not num_queries:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), lambda: linear_state(k[:, :, :0], v[:, :, :0], maps[1])
    sinks: Sinks | None = options["sinks"]
    if sinks is None and options["num_sinks"] and num_queries > window_size:
        sinks = _first_keys(k, v, options)
    places = torch.arange(num_keys, device=q.device)
    past = (places >= options["num_sinks"])[None] if sinks is None else ~sinks.own  # keys that can become past
    blocks = _one_block if num_queries <= window_size else _window_blocks
    layout = blocks(q, k, v, maps[1], options, past, state, key_mask, segment_ids)
    if sinks is not None:
        layout = _with_sinks(layout, sinks)
    out = _attend(layout, *maps, *weights)[:, :, :num_queries]

    def new_state() -> Tensor:
        leaving = max(num_keys - (window_size - 1), 0)
        counted = past if key_mask is None else past & key_mask
        gone = linear_state(k[:, :, :leaving], v[:, :, :leaving], maps[1], counted[:, :leaving])
        return gone if state is None else state + gone

    return out, new_state


class _Blocks(NamedTuple):
    """N blocks of C queries, the S keys that each may see, and the state that each starts from."""

    q: Tensor  # (B, H, N, C, D)
    k: Tensor  # (B, G, N, S, D)
    v: Tensor  # (B, G, N, S, D)
    window_mask: Tensor  # (B or 1, N, C, S)
    linear_mask: Tensor | None  # the same; None when no key of the block is past the window
    state: Tensor | None  # (B, L, N, F, D + 1)
    state_mask: Tensor | None  # (B, N, C): queries whose own segment the state belongs to


def _first_keys(k: Tensor, v: Tensor, options: dict[str, Any]) -> Sinks:
    """The first keys of a whole sequence, for queries whose window has left them."""
    count, size = min(options["num_sinks"], k.shape[2]), options["window_size"]
    places = torch.arange(k.shape[2], device=k.device)
    query, sink = places[:, None], places[:count]
    far = query // size - sink // size > 1 if options["terrace"] else query - sink >= size
    return Sinks(k[:, :, :count], v[:, :, :count], far[None], (places < count)[None])


def _with_sinks(blocks: _Blocks, sinks: Sinks) -> _Blocks:
    """Append the sinks to the keys that every block sees."""
    num_blocks, size, count = blocks.q.shape[2], blocks.q.shape[3], sinks.k.shape[2]
    again = [x[:, :, None].expand(-1, -1, num_blocks, -1, -1) for x in (sinks.k, sinks.v)]
    visible = F.pad(sinks.visible, (0, 0, 0, num_blocks * size - sinks.visible.shape[1]))
    visible = visible.unflatten(1, (num_blocks, size))
    rows = max(len(visible), len(blocks.window_mask))
    window_mask = torch.cat([x.expand(rows, -1, -1, -1) for x in (blocks.window_mask, visible)], -1)
    linear_mask = None if blocks.linear_mask is None else F.pad(blocks.linear_mask, (0, count))
    return blocks._replace(
        k=torch.cat([blocks.k, again[0]], 3),
        v=torch.cat([blocks.v, again[1]], 3),
        window_mask=window_mask,
        linear_mask=linear_mask,
    )


def _one_block(q, k, v, _map, options, past, state, key_mask, segment_ids) -> _Blocks:
    """Few queries (decode, short prompts): one block holds them all, in no need of terraces."""
    num_queries, num_keys, window_size = q.shape[2], k.shape[2], options["window_size"]
    query_pos = torch.arange(num_keys - num_queries, num_keys, device=q.device)
    distance = query_pos[:, None] - torch.arange(num_keys, device=q.device)
    visible = (distance >= 0)[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :] & key_mask[:, None, -num_queries:, None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    linear_mask = None
    if num_keys > window_size and options["linear"]:
        linear_mask = visible & (distance >= window_size) & past[:, None, None, :]
    return _Blocks(
        q[:, :, None],
        k[:, :, None],
        v[:, :, None],
        visible & (distance < window_size),
        linear_mask,
        None if state is None or not options["linear"] else state[:, :, None],
        None if key_mask is None else key_mask[:, None, -num_queries:],
    )


def _window_blocks(q, k, v, feature_map_k, options, past, state, key_mask, segment_ids) -> _Blocks:
    """Many queries: blocks of `window_size`, each seeing itself, the block before, and the state of all others."""
    batch, num_queries, num_keys, size = q.shape[0], q.shape[2], k.shape[2], options["window_size"]
    num_blocks = math.ceil(num_queries / size)
    tail = num_blocks * size - num_queries
    head = size - (num_keys - num_queries)  # empty slots before the past keys, which fill block 0 from the right
    q = F.pad(q, (0, 0, 0, tail)).unflatten(2, (num_blocks, size))
    k, v = (F.pad(x, (0, 0, head, tail)).unflatten(2, (num_blocks + 1, size)) for x in (k, v))
    real = torch.ones(1, num_keys, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    past = F.pad(past, (head, tail)).unflatten(1, (num_blocks + 1, size))
    real = F.pad(real, (head, tail)).unflatten(1, (num_blocks + 1, size))
    segments = None
    if segment_ids is not None:
        padded = F.pad(segment_ids, (0, tail), mode="replicate") if tail else segment_ids
        segments = F.pad(padded, (head, 0), value=-1).unflatten(1, (num_blocks + 1, size))

    query_pos, key_pos = torch.arange(size, device=q.device)[:, None] + size, torch.arange(2 * size, device=q.device)
    distance = query_pos - key_pos
    visible = (distance >= 0) & _pairs(real)[:, :, None, :] & real[:, 1:, :, None]
    if segments is not None:
        visible = visible & (segments[:, 1:, :, None] == _pairs(segments)[:, :, None, :])
    in_window = distance < (2 * size if options["terrace"] else size)
    states, state_mask = None, None
    if options["linear"]:
        states, state_mask = _block_states(k, v, feature_map_k, real & past, segments, state)
        states = states.expand(batch, -1, -1, -1, -1)
    if state_mask is None and key_mask is not None:
        state_mask = real[:, 1:]
    return _Blocks(
        q,
        torch.cat([k[:, :, :-1], k[:, :, 1:]], dim=3),
        torch.cat([v[:, :, :-1], v[:, :, 1:]], dim=3),
        visible & in_window,
        visible & ~in_window & _pairs(past)[:, :, None, :] if options["linear"] else None,
        states,
        state_mask,
    )


def _block_states(k, v, feature_map_k, real, segments, state) -> tuple[Tensor, Tensor | None]:
    """State that each of the N query blocks starts from: all key blocks but its own and the one before.

    With segments, S_n holds only the keys of the segment that is open at the end of key block n - 1, so a query uses it
    exactly when it belongs to that segment.
    """
    num_blocks = k.shape[2] - 1
    counted = real
    if segments is not None:
        open_segment = segments[:, :, -1]
        counted = real & (segments == open_segment[:, :, None])
    counted = counted.expand(k.shape[0], -1, -1)
    batch, blocks_gone = len(k), num_blocks - 1
    keys, values = (x[:, :, :blocks_gone].transpose(1, 2).flatten(0, 1) for x in (k, v))  # (B·(N - 1), G, C, D)
    gone = linear_state(keys, values, feature_map_k, counted[:, :blocks_gone].flatten(0, 1))
    gone = gone.unflatten(0, (batch, blocks_gone)).transpose(1, 2)
    first = torch.zeros_like(gone[:, :, 0]) if state is None else state
    if segments is None:
        return torch.cat([first[:, :, None], first[:, :, None] + gone.cumsum(2)], dim=2), None
    states = [first]
    for n in range(num_blocks - 1):
        same = open_segment[:, n] == open_segment[:, max(n - 1, 0)]  # before block 0 there is nothing to keep
        states.append(gone[:, :, n] + states[-1] * same[:, None, None, None])
    before = F.pad(open_segment[:, : num_blocks - 1], (1, 0), value=-2)
    return torch.stack(states, dim=2), (segments[:, 1:] == before[:, :, None]) & real[:, 1:]


def _attend(
    blocks, feature_map_q, feature_map_k, window_factor, scale, linear_weight, window_weight, meta_logit, softcap
) -> Tensor:
    """Evaluate the equation on every block and return (B, H, N·C, D), fp32."""
    kind = _precise(blocks.v)
    q, k, v = blocks.q.to(kind), blocks.k.to(kind), blocks.v.to(kind)
    heads, size, dim = q.shape[1], q.shape[3], v.shape[4]

    scores = _grouped(q, k.shape[1]) @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(3, (-1, size)).masked_fill(~blocks.window_mask[:, None, :, None], -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    if meta_logit is not None:
        meta = meta_logit.to(kind).unflatten(0, (k.shape[1], -1))[None, :, None, :, None, None]
        top = torch.maximum(top, meta.detach())
    p = torch.exp(scores - top)
    window = _ungrouped(p.flatten(3, 4) @ _with_ones(v), heads, size)  # (B, H, N, C, D + 1)
    if meta_logit is not None:
        memory = _ungrouped(torch.exp(meta - top).flatten(3, 4), heads, size)
        window = torch.cat([window[..., :dim], window[..., dim:] + memory], -1)
    top = _ungrouped(top.flatten(3, 4), heads, size)
    log_window = window_factor.to(kind).log()[None, :, None, None, None] + _log(window_weight)

    linear = _linear_branch(blocks, q, k, v, feature_map_q, feature_map_k)  # (B, H, N, C, D + 1)
    log_linear = torch.full_like(top, _log(linear_weight)).masked_fill(linear[..., -1:] <= 0, -torch.inf)

    # m is the larger of the two branches' log mass: no exponential below can overflow.
    mass = torch.maximum(
        top + log_window + window[..., -1:].clamp(min=1e-38).log(), log_linear + linear[..., -1:].clamp(min=1e-38).log()
    )
    m = mass.detach().clamp(min=torch.finfo(torch.float32).min / 2)
    total = window * torch.exp(top + log_window - m) + linear * torch.exp(log_linear - m)
    out = total[..., :dim] / total[..., dim:].where(total[..., dim:] > 0, 1.0)
    return out.flatten(2, 3)


def _linear_branch(blocks, q, k, v, feature_map_q, feature_map_k) -> Tensor:
    """Σ φq·φk [v, 1] over the state and over the block's own keys past the window; (B, H, N, C, D + 1)."""
    heads, num_blocks, size = q.shape[1:4]
    dim = v.shape[-1]
    if blocks.state is None and blocks.linear_mask is None:
        return torch.zeros(*q.shape[:4], dim + 1, dtype=q.dtype, device=q.device)
    map_heads = feature_map_k.shape[0]
    phi_q = hedgehog_feature_map(q.flatten(2, 3), feature_map_q).unflatten(2, (num_blocks, size))
    phi_q = _grouped(phi_q, map_heads)  # (B, L, N, R·C, F)
    out = torch.zeros((*phi_q.shape[:-1], dim + 1), dtype=q.dtype, device=q.device)
    if blocks.state is not None:
        past = phi_q @ blocks.state
        if blocks.state_mask is not None:
            past = (past.unflatten(3, (-1, size)) * blocks.state_mask[:, None, :, None, :, None]).flatten(3, 4)
        out = out + past
    if blocks.linear_mask is not None:
        keys = _expand_heads(k, map_heads)
        phi_k = hedgehog_feature_map(keys.flatten(2, 3), feature_map_k).unflatten(2, (num_blocks, -1))
        weights = (phi_q @ phi_k.transpose(-1, -2)).unflatten(3, (-1, size))
        weights = (weights * blocks.linear_mask[:, None, :, None]).flatten(3, 4)
        out = out + weights @ _with_ones(_expand_heads(v, map_heads))
    return _ungrouped(out, heads, size)


def sequence_bounds(key_mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
    """Find the sequences in a padded or packed batch.

    Args:
        key_mask: (B, T), False for padding, which lies before or after a row's tokens.
        segment_ids: (B, T), non-decreasing sequence numbers of a packed batch.

    Returns:
        (N, 3) int32 on the CPU's or the mask's device: row, start and end; rows in order, one each with a mask alone.

    Raises:
        ValueError: if a mask has padding between tokens.
    """
    if key_mask is not None:
        real = key_mask.bool()
        if segment_ids is not None:
            raise ValueError("give a key mask or segment ids, not both: padding can be a segment of its own")
        places = torch.arange(real.shape[1], device=real.device)
        start = torch.where(real, places, real.shape[1]).amin(1)
        end = torch.where(real, places + 1, 0).amax(1)
        start = torch.minimum(start, end)
        if not torch.equal(end - start, real.sum(1)):
            raise ValueError("a padding mask must have a row's tokens in one piece, padding only before or after them")
        rows = torch.arange(len(real), device=real.device)
        return torch.stack([rows, start, end], 1).int()
    if segment_ids is None:
        raise ValueError("give a key mask or segment ids")
    change = F.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True)
    rows, start = change.nonzero(as_tuple=True)
    following = torch.cat([start[1:], start.new_zeros(1)])
    end = torch.where(following == 0, segment_ids.shape[1], following)
    return torch.stack([rows, start, end], 1).int()


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(B, H, N, C, X) -> (B, groups, N, R·C, X): the R query heads of a group share its keys."""
    return x.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)


def _ungrouped(x: Tensor, heads: int, size: int) -> Tensor:
    """Undo `_grouped`: (B, groups, N, R·C, X) -> (B, H, N, C, X)."""
    return x.unflatten(3, (heads // x.shape[1], size)).transpose(2, 3).flatten(1, 2)


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads (dim 1) until there are `heads` of them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _with_ones(v: Tensor) -> Tensor:
    return F.pad(v.to(_precise(v)), (0, 1), value=1.0)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pairs(x: Tensor) -> Tensor:
    """(B, N + 1, C) -> (B, N, 2C): each block behind the one before it."""
    return torch.cat([x[:, :-1], x[:, 1:]], dim=2)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


def check_heads(
    q: Tensor, k: Tensor, v: Tensor, feature_map_q: Tensor | None = None, feature_map_k: Tensor | None = None
) -> None:
    """Refuse queries, keys, values and feature maps that do not fit each other.

    Raises:
        ValueError: naming their shapes.
    """
    (batch, heads, _, dim), kv_heads = q.shape, k.shape[1]
    fits = k.shape[:3] == v.shape[:3] and k.shape[0] == batch and k.shape[-1] == dim and heads % kv_heads == 0
    named = {"q": q, "k": k, "v": v}
    if feature_map_q is not None and feature_map_k is not None:
        half = feature_map_q.shape[-1]
        fits = fits and feature_map_q.shape[:2] == (heads, dim) and feature_map_k.shape[1:] == (dim, half)
        fits = fits and feature_map_k.shape[0] in (kv_heads, heads)
        named |= {"feature_map_q": feature_map_q, "feature_map_k": feature_map_k}
    if not fits:
        raise ValueError("shapes do not fit: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items()))


def check_state(state: Tensor | None, batch: int, heads: int, features: int, values: int) -> None:
    """Refuse a state of another shape than (batch, heads, features, values + 1).

    Raises:
        ValueError: naming both.
    """
    wanted = (batch, heads, features, values + 1)
    if state is not None and state.shape != wanted:
        raise ValueError(f"a state of {wanted} is needed, got {tuple(state.shape)}")


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    per_head: tuple[Tensor | None, ...],
    window_size: int,
    state: Tensor | None,
    segment_ids: Tensor | None,
    *,
    whole_only: bool,
) -> None:
    """Refuse shapes of hybrid attention that do not fit; `per_head` are the mixing factor and the meta logit.

    Raises:
        ValueError: naming them.
    """
    if whole_only and (q.shape[2] != k.shape[2] or state is not None):
        raise ValueError("terrace and num_sinks are for whole sequences: they take neither past keys nor a state")
    check_heads(q, k, v, feature_map_q, feature_map_k)
    check_state(state, len(q), len(feature_map_k), 2 * feature_map_k.shape[-1], v.shape[-1])
    for x in per_head:
        if x is not None and x.shape != q.shape[1:2]:
            raise ValueError(f"a number for each of {q.shape[1]} heads is needed, got a tensor of {tuple(x.shape)}")
    past = k.shape[2] - q.shape[2]
    if window_size < 1 or not 0 <= past < window_size:
        raise ValueError(f"{past} past keys do not fit a window of {window_size}: k {tuple(k.shape)}")
    if segment_ids is not None and (past or state is not None):
        raise ValueError("segment_ids are for whole packed sequences: they take neither past keys nor a state")
