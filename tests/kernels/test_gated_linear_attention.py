"""The blockwise specification of gated attention, and the token-by-token ones, against quadratic float64 sums."""

import pytest
import torch

from kit.kernels.linear_attention import (
    channel_gated_linear_attention,
    gated_delta_rule,
    gated_linear_attention,
    hedgehog_feature_map,
    sequence_bounds,
)

B, H, G, D, V = 2, 4, 2, 8, 6


def make(length=150, gate=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return {
        "q": r(B, H, length, D),
        "k": r(B, G, length, D),
        "v": r(B, G, length, V),
        "log_gate": -gate * torch.rand(B, H, length, generator=g, dtype=torch.float64),
        "feature_map_q": r(H, D, 5),
        "feature_map_k": r(G, D, 5),
    }


def quadratic(x, normalize=True, scale=1.0, reals=None):
    """Every pair at once: w_ij = exp(Σ g) φq·φk, from the definition."""
    repeat = lambda t: t.repeat_interleave(H // t.shape[1], 1)  # noqa: E731
    phi_q = hedgehog_feature_map(x["q"], x["feature_map_q"])
    phi_k = repeat(hedgehog_feature_map(x["k"], x["feature_map_k"]))
    total = x["log_gate"].cumsum(-1)
    weights = (phi_q @ phi_k.mT) * (total[..., :, None] - total[..., None, :]).clamp(max=0).exp()
    weights = weights.tril()
    if reals is not None:
        weights = weights * (reals[:, None, :, None] == reals[:, None, None, :]) * (reals >= 0)[:, None, None, :]
    out = weights @ repeat(x["v"])
    mass = weights.sum(-1, keepdim=True)
    return out / torch.where(mass > 0, mass, 1.0) if normalize else scale * out


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("gate", [0.0, 0.3, 30.0])
def test_equals_the_sum_over_all_pairs(length, gate):
    x = make(length, gate)
    torch.testing.assert_close(gated_linear_attention(**x)[0], quadratic(x))
    got = gated_linear_attention(**x, normalize=False, scale=0.3)[0]
    torch.testing.assert_close(got, quadratic(x, False, 0.3))


def test_a_state_carries_a_sequence_on():
    x = make(100)
    want, whole = gated_linear_attention(**x, return_state=True)
    cut = lambda a, b: {n: t[:, :, a:b] if n in ("q", "k", "v", "log_gate") else t for n, t in x.items()}  # noqa: E731
    first, state = gated_linear_attention(**cut(0, 37), return_state=True)
    second, last = gated_linear_attention(**cut(37, 100), state=state, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 2), want)
    torch.testing.assert_close(last, whole)


def test_padded_and_packed_sequences_are_on_their_own():
    x = make(90)
    mask = torch.arange(90) >= torch.tensor([[13], [0]])
    got = gated_linear_attention(**x, bounds=sequence_bounds(mask))[0]
    reals = torch.where(mask, 0, -1)
    torch.testing.assert_close(got, quadratic(x, reals=reals) * mask[:, None, :, None])
    segments = torch.arange(90).expand(2, -1) // torch.tensor([[30], [71]])
    got = gated_linear_attention(**x, bounds=sequence_bounds(None, segments))[0]
    torch.testing.assert_close(got, quadratic(x, reals=segments))


def test_gradcheck():
    x = make(70)
    x = {n: t[:1] if n in ("q", "k", "v", "log_gate") else t for n, t in x.items()}
    call = lambda *values: gated_linear_attention(*values)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in x.values()], fast_mode=True)


def test_sequence_bounds_of_masks_and_segments():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert sequence_bounds(mask).tolist() == [[0, 2, 4], [1, 0, 3], [2, 0, 0]]
    segments = torch.tensor([[0, 0, 1, 1], [4, 5, 5, 5]])
    assert sequence_bounds(None, segments).tolist() == [[0, 0, 2], [0, 2, 4], [1, 0, 1], [1, 1, 4]]
    with pytest.raises(ValueError, match="in one piece"):
        sequence_bounds(torch.tensor([[True, False, True]]))
    with pytest.raises(ValueError, match="give a key mask or segment ids"):
        sequence_bounds()


def test_channel_gates_of_one_value_are_scalar_gates():
    x = make(40)
    k, v = (x[n].repeat_interleave(2, 1) for n in ("k", "v"))
    gates = x["log_gate"][..., None].expand(-1, -1, -1, D)
    out, state = channel_gated_linear_attention(x["q"], k, v, gates, scale=0.5)
    want, _ = gated_linear_attention(x["q"], k, v, x["log_gate"], normalize=False, scale=0.5)
    torch.testing.assert_close(out, want)
    decay = (gates.flip(2).cumsum(2).flip(2) - gates).exp()
    torch.testing.assert_close(state, (k * decay).mT @ v)


def test_the_delta_rule_solves_its_triangular_system():
    """y = q·Σ k_j u_j with u = (1 + tril(β decay K Kᵀ, -1))⁻¹ β (v), which is how the recurrence unrolls (no state)."""
    x = make(30)
    k, v = (x[n].repeat_interleave(2, 1) for n in ("k", "v"))
    k = k / k.norm(dim=-1, keepdim=True)
    beta = torch.rand(B, H, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out, _ = gated_delta_rule(x["q"], k, v, beta, x["log_gate"], scale=0.7)
    total = x["log_gate"].cumsum(-1)
    decay = (total[..., :, None] - total[..., None, :]).clamp(max=0).exp()
    lower = (beta[..., None] * decay * (k @ k.mT)).tril(-1) + torch.eye(30, dtype=torch.float64)
    u = torch.linalg.solve_triangular(lower, beta[..., None] * v, upper=False)
    want = 0.7 * (decay * (x["q"] @ k.mT)).tril() @ u
    torch.testing.assert_close(out, want)
