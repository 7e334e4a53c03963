"""Sparse modules against the formulas in float64; NaN; odd shapes; what is counted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kit.convert.sparsity_search import budget_rank, mean_sparsity, read_trace
from kit.convert.thresholds import ScoreHistogram, add_dropped, low_rank, relative_error
from kit.modules.sparsity import InputMask, SparseLinear, SparseMLP, counted, skipped_weights


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def linear(inputs=37, outputs=23, bias=True, weighted=True, rank=5, threshold=0.6, seed=0):
    torch.manual_seed(seed)
    mask = InputMask(inputs, weighted, dense_prefix=0)
    mask.threshold.fill_(threshold)
    if weighted:
        mask.scale.copy_(torch.rand(inputs) + 0.5)
    module = SparseLinear(nn.Linear(inputs, outputs, bias=bias), mask, rank)
    for factor in module.low_rank or ():
        nn.init.normal_(factor)
    return module


def by_hand(module, x):
    """Token by token, channel by channel, in float64."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]).double():
        scale = torch.ones_like(token) if module.mask.scale is None else module.mask.scale.double()
        y = torch.zeros(module.out_features, dtype=torch.float64) if module.bias is None else module.bias.double()
        for i, value in enumerate(token):
            if abs(value) * scale[i] > module.mask.threshold.double():
                y = y + module.weight[:, i].double() * value
            elif module.low_rank:
                up, down = module.low_rank
                y = y + up.double().T @ (down[:, i].double() * value)
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("rank", [0, 5])
def test_a_sparse_linear_is_its_formula(batch, tokens, rank):
    module, x = linear(rank=rank), torch.randn(batch, tokens, 37)
    assert torch.allclose(module(x).double(), by_hand(module, x), atol=1e-5)


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, 1.0), (1e9, 0.0)])
def test_all_and_nothing(threshold, kept):
    module, x = linear(rank=0, threshold=threshold), torch.randn(2, 3, 37)
    expected = F.linear(x * kept, module.weight, module.bias)
    assert torch.equal(module(x), expected)
    assert torch.allclose(module(x[:, :1]), expected[:, :1], atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("rank", [0, 5])
def test_nan_surfaces(tokens, rank):
    module, x = linear(rank=rank, threshold=1e9), torch.randn(1, tokens, 37)
    x[0, -1, 3] = torch.nan
    assert module(x)[0, -1].isnan().all()
    assert tokens == 1 or module(x)[0, :-1].isfinite().all()


def test_a_gradient_reaches_what_is_kept_and_the_weight():
    module, x = linear(rank=0), torch.randn(1, 1, 37)
    with torch.enable_grad():
        x.requires_grad_()
        module(x).sum().backward()
    kept = (x.abs() * module.mask.scale > module.mask.threshold).float()
    assert torch.allclose(x.grad, module.weight.sum(0) * kept, atol=1e-6)


class Gated(nn.Module):
    def __init__(self, hidden=24, inner=41, act=None):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj, self.act_fn = nn.Linear(inner, hidden, bias=False), act or nn.SiLU()


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU()])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_sparse_mlp_is_its_formula(tokens, act):
    torch.manual_seed(0)
    mlp = Gated(act=act)
    mask = InputMask(41, False, channelwise=True, dense_prefix=0)
    mask.threshold.copy_(torch.rand(41) * 0.2)
    x = torch.randn(2, tokens, 24)
    gate = act(mlp.gate_proj(x).double())
    inner = torch.where(gate.abs() > mask.threshold.double(), gate * mlp.up_proj(x).double(), 0.0)
    expected = inner @ mlp.down_proj.weight.double().T
    assert 0.1 < float((inner == 0).float().mean()) < 0.9
    assert torch.allclose(SparseMLP(mlp, mask)(x).double(), expected, atol=1e-6)


def test_what_is_counted_is_what_is_dropped():
    model = nn.ModuleDict({"a": linear(rank=0), "b": nn.Linear(5, 7)})
    x = torch.randn(2, 9, 37)
    model["a"].mask.dense_prefix = 4  # the first four tokens are not sparse, and do not count
    with counted(model) as counts:
        model["a"](x)
        dropped, skipped = skipped_weights(model, counts)
    share = float((x[:, 4:].abs() * model["a"].mask.scale <= model["a"].mask.threshold).float().mean())
    assert dropped == {"a": pytest.approx(share)}
    assert skipped == pytest.approx(share * 37 * 23 / (37 * 23 + 35))
    assert model["a"].mask.counted is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_thresholds_are_pooled_quantiles(share):
    torch.manual_seed(0)
    scores = torch.randn(50_000).abs() * torch.rand(50_000) * 3
    histogram = ScoreHistogram()
    for part in scores.split(7_001):
        histogram.add(part)
    threshold = histogram.threshold(share)
    assert torch.tensor(threshold).bfloat16().float() == threshold
    assert float((scores <= threshold).float().mean()) == pytest.approx(share, abs=3e-3)
    assert threshold == 0 or share > 0


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_low_rank_factors_are_the_best_for_the_dropped_inputs(shape):
    """No factors of this rank leave less of Σ‖Wx − BAx‖² than what the singular values of W X say (Eckart-Young)."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    x = torch.randn(500, shape[1]) * torch.rand(shape[1]) ** 3
    up, down = low_rank(weight, x.T @ x, 4)
    left = float((x.double() @ (weight - up.T @ down).double().T).square().sum())
    best = float(torch.linalg.svdvals(x.double() @ weight.double().T)[4:].square().sum())
    assert left == pytest.approx(best, rel=1e-3)
    up, down = low_rank(weight, None, 4)
    left = float((weight - up.T @ down).square().sum())
    assert left == pytest.approx(float(torch.linalg.svdvals(weight)[4:].square().sum()), rel=1e-4)


def test_the_rank_fits_the_budget():
    for sparsity, ratio in ((0.5, 0.95), (0.25, 0.3), (0.65, 1.0)):
        rank = budget_rank((192, 576), sparsity, ratio)
        read = 192 * 576 * (1 - sparsity) * ratio + rank * (192 + 576)
        assert 0 <= 192 * 576 * (1 - sparsity) - read < 192 + 576


def test_a_trace_is_read_off_where_the_mean_reaches_the_target():
    weights = {"a": 100, "b": 300}
    trace = ["a", "b", "a", "b", "b", "a"]
    for target in (0.0, 0.03, 0.1):
        drops = read_trace(trace, weights, target)
        assert mean_sparsity(drops, weights) == pytest.approx(target)
    assert read_trace(trace, weights, 0.01)["b"] == 0


def test_errors_and_factors_count_tokens_alike():
    """One token of massive activations decides nothing."""
    torch.manual_seed(0)
    dense = torch.randn(2, 50, 16)
    outputs = dense + 0.1 * torch.randn_like(dense)
    scale = torch.ones(2, 50, 1)
    scale[0, 0] = 1e4
    assert relative_error(outputs * scale, dense * scale) == pytest.approx(relative_error(outputs, dense), rel=1e-4)
    by_hand = ((outputs - dense).double().square().sum(-1) / dense.double().square().sum(-1)).mean()
    assert relative_error(outputs, dense) == pytest.approx(float(by_hand), rel=1e-5)
    module, x = linear(threshold=1e9), torch.randn(3, 7, 37)  # everything is dropped
    second = torch.zeros(37, 37)
    add_dropped(second, x * torch.logspace(0, 4, 7)[:, None], module)
    rows = (x / x.norm(dim=-1, keepdim=True)).flatten(0, 1)
    assert torch.allclose(second, rows.T @ rows, atol=1e-5)
