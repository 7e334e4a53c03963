"""Thresholds, channel scales and low-rank factors of sparse linears, from the activations of one resident layer.

Names of a layer's masks are those of the linears ("self_attn.q_proj"), and "mlp" for one over the neurons of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kit.convert.errors import KitError
from kit.convert.recipe import Layer
from kit.convert.streaming import Activations
from kit.modules.sparsity import (
    SparseInt4Linear,
    SparseLinear,
    counted,
    masks_of,
    skipped_weights,
    sparsify_layer,
    token_window,
)

BATCH_ROWS = 4
SITES = (  # masks that see the same input, in the order in which the layer runs
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
Factors = Literal["data", "weight"]


class ScoreHistogram:
    """How often each score occurs, pooled over tokens and channels: one bin for each non-negative bfloat16 number.

    Bins are less than 0.8 % wide wherever the scores lie, need no range beforehand, and their edges are thresholds that
    a bfloat16 checkpoint stores exactly.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2**15, dtype=torch.long)

    def add(self, scores: Tensor) -> None:
        """Count scores of any shape, fp32 and not negative.

        Raises:
            ValueError: if one is NaN or infinite.
        """
        if not bool(scores.isfinite().all()):
            raise ValueError("a score is NaN or infinite")
        bins = scores.float().contiguous().view(torch.int32).flatten() >> 16
        self.counts += bins.bincount(minlength=2**15).cpu()

    def threshold(self, share: float) -> float:
        """The bfloat16 number T for which the share of scores below it is nearest to `share`; 0 for a share of 0."""
        below = torch.cat([torch.zeros(1, dtype=torch.long), self.counts.cumsum(0)])
        edge = int((below.double() - share * float(below[-1])).abs().argmin())
        return float(torch.tensor(edge << 16, dtype=torch.int32).view(torch.float32))


class _Reached(Exception):
    """The last module's input is there: the rest of the layer need not run."""


@torch.no_grad()
def watch(layer: Layer, see: dict[nn.Module, Callable[[Tensor], None]], rows: Activations | None = None) -> None:
    """Run a layer's inputs up to the last of some modules and show what enters each.

    Args:
        layer: the resident layer.
        see: called with each module's input.
        rows: what enters the layer; None: `layer.inputs`.
    """
    inputs = rows or layer.inputs
    assert inputs is not None
    waiting: set[nn.Module] = set()

    def hook(module: nn.Module, args: Any) -> None:
        see[module](args[0])
        waiting.discard(module)
        if not waiting:
            raise _Reached

    handles = [module.register_forward_pre_hook(hook) for module in see]
    try:
        for _, hidden, positions in inputs.batches(BATCH_ROWS, layer.device):
            waiting |= set(see)
            try:
                layer.model.forward(hidden, positions)
            except _Reached:
                continue
    finally:
        for handle in handles:
            handle.remove()


def install(layer: Layer, sparsity: dict[str, Any]) -> None:
    """Put sparse modules into a resident layer and set the scales of their masks; they keep everything so far.

    A scale is ‖W[:, i]‖₂ (R-Sparse, WINA), over its mean, so that scores have the size of activations, and rounded to
    bfloat16.
    """
    sparsify_layer(layer.module, sparsity | {"dense_prefill": False}, layer.index)
    for name, mask in masks_of(layer.module).items():
        if mask.scale is not None:
            norms = layer.module.get_submodule(name).weight.float().norm(dim=0)
            mask.scale.data = (norms / norms.mean().clamp(min=1e-30)).bfloat16().float()


def histograms(layer: Layer, names: Iterable[str]) -> dict[str, ScoreHistogram]:
    """The scores of some masks, as the layer runs now.

    Raises:
        KitError: naming the linear, if a score is not finite.
    """
    masks = masks_of(layer.module)
    found = {name: ScoreHistogram() for name in names}
    watch(layer, {masks[name]: _counter(layer, name, found[name], masks[name].scores) for name in found})
    return found


def _counter(
    layer: Layer, name: str, histogram: ScoreHistogram, scores: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], None]:
    def see(x: Tensor) -> None:
        try:
            histogram.add(scores(x))
        except ValueError as error:
            raise KitError(
                "an activation is NaN or infinite",
                where=f"layer {layer.index}: input of {name}",
                next_step="check the model's weights, and that it gives sensible text (`kit chat`)",
            ) from error

    return see


def neuron_weights(layer: Layer) -> Tensor:
    """μ_i = mean over tokens of |W_up x|_i (CHESS, arXiv:2409.01366), (neurons,)."""
    up = layer.module.mlp.up_proj
    total, tokens = torch.zeros(up.out_features, device=layer.device), 0

    def see(x: Tensor) -> None:
        nonlocal tokens
        total.add_(nn.functional.linear(x, up.weight, up.bias).float().abs().flatten(0, -2).sum(0))
        tokens += x.shape[:-1].numel()

    watch(layer, {up: see})
    return total / tokens


class NeuronScores:
    """Stands for a mask of an MLP while it is calibrated: importance = |SiLU(W_gate x)_i| · μ_i, threshold τ."""

    def __init__(self, layer: Layer) -> None:
        self.mask, self.weights = layer.module.mlp.mask, neuron_weights(layer)

    def histogram(self, layer: Layer) -> ScoreHistogram:
        """Of the importance."""
        found = ScoreHistogram()
        watch(layer, {self.mask: _counter(layer, "mlp", found, lambda gate: gate.float().abs() * self.weights)})
        return found

    def set(self, threshold: float) -> None:
        """t_i = τ / μ_i, rounded to bfloat16; a neuron whose μ is 0 gives nothing and is always dropped."""
        self.mask.threshold.data = (threshold / self.weights.clamp(min=1e-30)).bfloat16().float()


def set_threshold(layer: Layer, name: str, drop: float) -> None:
    """Set one mask's threshold so that it drops a share of what it sees, pooled over tokens and channels."""
    if name == "mlp":
        neurons = NeuronScores(layer)
        neurons.set(neurons.histogram(layer).threshold(drop))
        return
    threshold = histograms(layer, [name])[name].threshold(drop)
    masks_of(layer.module)[name].threshold.data.fill_(threshold)


def low_rank(weight: Tensor, second: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the product that stands in for W on dropped inputs.

    Args:
        weight: W (N, K).
        second: Σ x xᵀ of the dropped inputs, (K, K) fp32: the factors minimise Σ ‖W x − B A x‖², which U_r U_rᵀ W does,
            U_r the leading eigenvectors of W second Wᵀ. None: the leading singular vectors of W (R-Sparse's form).
        rank: r.

    Returns:
        Bᵀ (r, N) and A (r, K), fp32.
    """
    weight = weight.float()
    if second is None:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return (u[:, :rank] * s[:rank]).T.contiguous(), v[:rank].contiguous()
    vectors = output_directions(weight, second, rank)
    return vectors.T.contiguous(), vectors.T @ weight


def output_directions(weight: Tensor, second: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of W second Wᵀ, (N, r), from the smaller of W second Wᵀ and second^½ Wᵀ W second^½."""
    if weight.shape[0] <= weight.shape[1]:
        return torch.linalg.eigh(weight @ second @ weight.T).eigenvectors[:, -rank:].flip(-1)
    values, vectors = torch.linalg.eigh(second)
    product = weight @ (vectors * values.clamp(min=0).sqrt())
    inner = torch.linalg.eigh(product.T @ product).eigenvectors[:, -rank:].flip(-1)
    return torch.linalg.qr(product @ inner).Q


def set_low_rank(layer: Layer, name: str, factors: Factors) -> None:
    """Fit a linear's low-rank path to the inputs that its mask drops (`data`), or take it from the weight alone."""
    linear: SparseLinear | SparseInt4Linear = layer.module.get_submodule(name)
    if linear.low_rank_up is None or linear.low_rank_down is None:
        return
    second = None
    if factors == "data":
        second = torch.zeros(linear.in_features, linear.in_features, device=layer.device)

        def see(x: Tensor) -> None:
            add_dropped(second, x, linear)

        watch(layer, {linear.mask: see})
    up, down = low_rank(linear.weight, second, linear.low_rank_up.shape[0])
    linear.low_rank_up.data, linear.low_rank_down.data = up, down


def add_dropped(second: Tensor, x: Tensor, linear: SparseLinear | SparseInt4Linear) -> None:
    """Add Σ x xᵀ / ‖token‖² of what a linear's mask drops from inputs (..., K) to `second` (K, K).

    Tokens count alike: a few of massive activations would otherwise be all that the factors fit.
    """
    tokens = x.float().flatten(0, -2)
    dropped = linear.mask.scores(tokens) <= linear.mask.threshold.float()
    rows = tokens.masked_fill(~dropped, 0) / tokens.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    second.addmm_(rows.T, rows)


@torch.no_grad()
def calibrate(
    layer: Layer, sparsity: dict[str, Any], drop: dict[str, float], factors: Factors = "weight"
) -> dict[str, float]:
    """Make a resident layer sparse: every mask calibrated on what the masks before it let through.

    Args:
        layer: the resident layer, with inputs; `layer.outputs` is set to what leaves it, all tokens sparse.
        sparsity: the config's key "sparsity".
        drop: the share of inputs that each mask drops.
        factors: how low-rank paths are fitted.

    Returns:
        Metrics: `NAME sparsity`, the share of inputs that was dropped; `weights_skipped`; `output_error` of what
        leaves the layer (see `relative_error`).
    """
    assert layer.inputs is not None
    dense = layer.model.advance(layer.inputs, BATCH_ROWS)
    install(layer, sparsity)
    for site in SITES:
        for name in site:
            if name in drop:
                set_threshold(layer, name, drop[name])
        for name in site:
            if name in drop and name != "mlp":
                set_low_rank(layer, name, factors)
    with token_window(layer.module, 0), counted(layer.module) as counts:
        layer.outputs = layer.model.advance(layer.inputs, BATCH_ROWS)
    dropped, skipped = skipped_weights(layer.module, counts)
    metrics = {f"{name.rpartition('.')[2]} sparsity": share for name, share in dropped.items()}
    metrics["weights_skipped"] = skipped
    metrics["output_error"] = relative_error(layer.outputs.hidden, dense.hidden)
    return metrics


def relative_error(outputs: Tensor, dense: Tensor) -> float:
    """Mean over tokens of ‖outputs − dense‖² / ‖dense‖²: what the norms that read the residual stream see of the error.

    A sum over tokens would be the error of the few that carry massive activations.

    Args:
        outputs, dense: (..., hidden).
    """
    error = (outputs.float() - dense.float()).square().sum(-1)
    return float((error / dense.float().square().sum(-1).clamp(min=1e-30)).mean())
