"""Specification of gated linear attention, and of the recurrences with a gate a channel and with the delta rule.

With log gates g (a scalar a token and head, at most 0) and features φ,

    y_i = scale · Σ_{j≤i} exp(g_{j+1} + … + g_i) φq(q_i)·φk(k_j) v_j                     (normalize=False)
    y_i = Σ_{j≤i} w_ij v_j / Σ_{j≤i} w_ij,   w_ij = exp(g_{j+1} + … + g_i) φq(q_i)·φk(k_j)   (normalize=True)

g = 0 is linear attention (Hedgehog, arXiv:2402.04347; LoLCATs' linear branch, arXiv:2410.10254). A data-dependent g is
the gate of Lizard (arXiv:2507.09025) and of GLA with one gate a head (arXiv:2312.06635). The state is
S_i = Σ_{j≤i} exp(g_{j+1} + … + g_i) φk(k_j) [v_j, 1]ᵀ.

Letters: B batch, T time, H query heads, G key/value heads, L feature-map key heads (G or H), D head dim, V value dim,
F feature dim. Arithmetic is fp32, or float64 where the inputs are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.linear_attention.reference import check_heads, check_state, hedgehog_feature_map

BLOCK = 64


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
    """Attend to the past through a decaying state, block by block (module docstring: the equations and the letters).

    Args:
        q: (B, H, T, D), or features (B, H, T, F) if there are no feature maps.
        k: (B, G, T, D) or (B, G, T, F).
        v: (B, G, T, V).
        log_gate: (B, H, T), or (B, 1, T) for one gate a token; None is no decay.
        feature_map_q: (H, D, F/2), Hedgehog's map of the queries; None: q and k are features.
        feature_map_k: (L, D, F/2).
        scale: multiplies the output; only without `normalize`.
        normalize: divide by the sum of the weights.
        state: (N, H, F, V + 1), what came before each sequence; the last column is the denominator.
        bounds: (N, 3) int: row, start and end of each sequence; None is one sequence a row. What lies in none of them
            is padding: its outputs are zero. See `sequence_bounds`.
        return_state: also return the state after each sequence.

    Returns:
        The output (B, H, T, V) in the dtype of `v`, and the state (N, H, F, V + 1) in fp32 (or None).

    Raises:
        ValueError: on shapes that do not fit, naming them.
    """
    check_gated_shapes(q, k, v, log_gate, feature_map_q, feature_map_k, state, bounds)
    kind = torch.promote_types(v.dtype, torch.float32)
    heads, length = q.shape[1:3]
    gates = torch.zeros(1, 1, 1, dtype=kind, device=q.device) if log_gate is None else log_gate.to(kind)
    gates = gates.expand(len(q), heads, length)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=kind, device=q.device)
    states = []
    with torch.autocast(q.device.type, enabled=False):
        phi_q, phi_k = _features(q, k, feature_map_q, feature_map_k, kind)
        values = F.pad(_expand(v, heads).to(kind), (0, 1), value=1.0)
        if bounds is None:
            flat_q, flat_k, flat_v, flat_gates = (x.flatten(0, 1) for x in (phi_q, phi_k, values, gates))
            first = None if state is None else state.to(kind).flatten(0, 1)
            part, last = _blocks(flat_q, flat_k, flat_v, flat_gates, first)
            out, last = (x.unflatten(0, (-1, heads)) for x in (_divided(part, normalize, scale), last))
            return out.to(v.dtype), last if return_state else None
        for number, (row, start, end) in enumerate(bounds.tolist()):
            at = slice(start, end)
            first = None if state is None else state[number].to(kind)
            part, last = _blocks(phi_q[row, :, at], phi_k[row, :, at], values[row, :, at], gates[row, :, at], first)
            out[row, :, at] = _divided(part, normalize, scale)
            states.append(last)
    return out.to(v.dtype), torch.stack(states) if return_state else None


def check_gated_shapes(q, k, v, log_gate, feature_map_q, feature_map_k, state, bounds) -> None:
    """Refuse shapes of gated attention that do not fit.

    Raises:
        ValueError: naming them.
    """
    check_heads(q, k, v, feature_map_q, feature_map_k)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"gated attention takes a key a query, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if log_gate is not None and log_gate.shape not in (q.shape[:3], (len(q), 1, q.shape[2])):
        raise ValueError(f"log_gate {tuple(log_gate.shape)} is no gate a token and head of q {tuple(q.shape)}")
    features = q.shape[-1] if feature_map_q is None else 2 * feature_map_q.shape[-1]
    check_state(state, len(q) if bounds is None else len(bounds), q.shape[1], features, v.shape[-1])


def _divided(sums: Tensor, normalize: bool, scale: float) -> Tensor:
    """Σ w [v, 1] -> the output."""
    total = sums[..., -1:]
    return sums[..., :-1] / total.where(total != 0, 1.0) if normalize else sums[..., :-1] * scale


def _features(q, k, feature_map_q, feature_map_k, kind) -> tuple[Tensor, Tensor]:
    """φ(q) and φ(k), both (B, H, T, F)."""
    heads = q.shape[1]
    if feature_map_q is None:
        return q.to(kind), _expand(k, heads).to(kind)
    keys = hedgehog_feature_map(_expand(k, feature_map_k.shape[0]), feature_map_k)
    return hedgehog_feature_map(q, feature_map_q), _expand(keys, heads)


def _expand(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _blocks(q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One sequence, (H, T, ·): Σ w_ij [v_j, 1] (H, T, V + 1) and the state after it."""
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[-1], v.shape[-1])
    if not q.shape[1]:
        return q.new_zeros(q.shape[0], 0, v.shape[-1]), state
    parts = []
    blocks = (x.split(BLOCK, 1) for x in (q, k, v, log_gate))
    for q_n, k_n, v_n, gate in zip(*blocks, strict=True):
        through = gate.cumsum(1)
        decay = (through[:, :, None] - through[:, None, :]).clamp(max=0).exp().tril()
        parts.append((q_n @ k_n.mT * decay) @ v_n + through.exp()[..., None] * (q_n @ state))
        left = (through[:, -1:] - through).exp()
        state = through[:, -1:, None].exp() * state + (k_n * left[..., None]).mT @ v_n
    return torch.cat(parts, 1), state


def channel_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, *, scale: float = 1.0, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gated linear attention with a gate for each channel of k (GLA, arXiv:2312.06635 Eq. 3), token by token.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_tᵀ,  y_t = scale · S_tᵀ q_t.

    Args:
        q, k, log_gate: (B, H, T, K).
        v: (B, H, T, V).
        scale: multiplies the output.
        state: (B, H, K, V), fp32; None is zero.

    Returns:
        (B, H, T, V) in the dtype of `v`, and the state after the last token.
    """
    kind = torch.promote_types(v.dtype, torch.float32)
    x, y, z, gate = (t.to(kind) for t in (q, k, v, log_gate))
    if state is None:
        state = x.new_zeros(*x.shape[:2], x.shape[-1], z.shape[-1])
    out = []
    for t in range(x.shape[2]):
        state = gate[:, :, t, :, None].exp() * state + y[:, :, t, :, None] * z[:, :, t, None]
        out.append(scale * torch.einsum("bhk,bhkv->bhv", x[:, :, t], state))
    return torch.stack(out, 2).to(v.dtype), state


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
    """Gated delta rule (Gated DeltaNet, arXiv:2412.06464 Eq. 10), token by token; keys should have length 1.

    S_t = exp(g_t) (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,  y_t = scale · S_tᵀ q_t.

    Args:
        q, k: (B, H, T, K).
        v: (B, H, T, V).
        beta, log_gate: (B, H, T).
        scale: multiplies the output.
        state: (B, H, K, V), fp32; None is zero.

    Returns:
        (B, H, T, V) in the dtype of `v`, and the state after the last token.
    """
    kind = torch.promote_types(v.dtype, torch.float32)
    x, y, z, rate, gate = (t.to(kind) for t in (q, k, v, beta, log_gate))
    if state is None:
        state = x.new_zeros(*x.shape[:2], x.shape[-1], z.shape[-1])
    out = []
    for t in range(x.shape[2]):
        state = gate[:, :, t, None, None].exp() * state
        error = z[:, :, t] - torch.einsum("bhk,bhkv->bhv", y[:, :, t], state)
        state = state + y[:, :, t, :, None] * (rate[:, :, t, None] * error)[:, :, None]
        out.append(scale * torch.einsum("bhk,bhkv->bhv", x[:, :, t], state))
    return torch.stack(out, 2).to(v.dtype), state
