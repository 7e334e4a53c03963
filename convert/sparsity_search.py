"""Choices made by running a layer, or the model: which linears are sparsest, and sparse against low rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.convert.recipe import Layer, SearchRun
from kit.convert.streaming import Activations
from kit.convert.thresholds import (
    BATCH_ROWS,
    Factors,
    NeuronScores,
    ScoreHistogram,
    add_dropped,
    calibrate,
    histograms,
    install,
    low_rank,
    relative_error,
    watch,
)
from kit.modules.sparsity import SparseLinear, SparseMLP, masks_of

STEP = 0.05  # of one linear's sparsity
MOST = 0.95  # no linear gets sparser
JUDGE_TOKENS = 1024  # the last rows of the calibration data: a block's sparsities are judged on them
RATIOS = (1.0, 0.95, 0.85, 0.6)  # that the search tries
PIECE = 128  # tokens whose mean loss is one sample, where a gain is told from noise


class Block:
    """A resident layer whose masks can be set to any sparsity, and the error that it then makes."""

    def __init__(self, layer: Layer, sparsity: dict[str, Any]) -> None:
        """Install masks that keep everything and collect scores of the untouched layer.

        Args:
            layer: the resident layer, with inputs.
            sparsity: the config's key "sparsity"; `ranks` are left out.
        """
        assert layer.inputs is not None
        self.layer = layer
        install(layer, sparsity | {"ranks": {}})
        self.masks = masks_of(layer.module)
        rows, length = layer.inputs.hidden.shape[:2]
        judged = max(min(JUDGE_TOKENS // length, rows // 2), 1)
        self.judged = _rows(layer.inputs, slice(rows - judged, rows))
        self.neurons = NeuronScores(layer) if "mlp" in self.masks else None
        self.scores: dict[str, ScoreHistogram] = histograms(layer, [name for name in self.masks if name != "mlp"])
        if self.neurons:
            self.scores["mlp"] = self.neurons.histogram(layer)
        self.dense = layer.model.advance(self.judged, BATCH_ROWS).hidden

    @property
    def weights(self) -> dict[str, int]:
        """How many weights each mask can skip."""
        found = {}
        for name in self.masks:
            module = self.layer.module.get_submodule(name)
            parts = (module.up_proj, module.down_proj) if isinstance(module, SparseMLP) else (module,)
            found[name] = sum(part.weight.numel() for part in parts)
        return found

    def set(self, name: str, drop: float) -> None:
        """Set one mask's threshold."""
        threshold = self.scores[name].threshold(drop)
        if name == "mlp" and self.neurons:
            self.neurons.set(threshold)
        else:
            self.masks[name].threshold.data.fill_(threshold)

    def error(self) -> float:
        """Of the layer's outputs on the judged rows (see `relative_error`)."""
        outputs = self.layer.model.advance(self.judged, BATCH_ROWS).hidden
        return relative_error(outputs, self.dense)


def _rows(inputs: Activations, rows: slice) -> Activations:
    return Activations(inputs.hidden[rows], inputs.position_ids[rows])


# ---- which linears are sparsest


@torch.no_grad()
def greedy_trace(layer: Layer, sparsity: dict[str, Any], limit: float) -> tuple[list[str], float]:
    """TEAL's greedy allocation in a block (arXiv:2408.14690, algorithm 1), by error a skipped weight.

    Sparsities start at 0. The step of `STEP` that costs the least error for each weight that it skips is taken, until
    the block skips `limit` of the weights that masks can skip. A cost is computed again only when it would be the
    least: costs grow as a linear gets sparser.

    Returns:
        The names in the order of their steps, and the error at the end.
    """
    block = Block(layer, sparsity)
    weights, drops = block.weights, dict.fromkeys(block.masks, 0.0)
    cost: dict[str, float] = dict.fromkeys(drops, 0.0)
    fresh: set[str] = set()
    trace, error = [], 0.0
    errors: dict[str, float] = {}

    def step(name: str) -> float:
        return min(drops[name] + STEP, MOST)

    while mean_sparsity(drops, weights) < limit - 1e-9:
        name = min((n for n in drops if drops[n] < MOST - 1e-9), key=cost.__getitem__)
        if name not in fresh:
            block.set(name, step(name))
            errors[name] = block.error()
            block.set(name, drops[name])
            cost[name] = (errors[name] - error) / weights[name]
            fresh.add(name)
            continue
        drops[name], error = step(name), errors[name]
        block.set(name, drops[name])
        trace.append(name)
        fresh.clear()
    return trace, error


def mean_sparsity(drops: dict[str, float], weights: dict[str, int]) -> float:
    """The share of skippable weights that is skipped."""
    return sum(drops[name] * weights[name] for name in drops) / sum(weights[name] for name in drops)


def read_trace(trace: list[str], weights: dict[str, int], target: float) -> dict[str, float]:
    """Each mask's sparsity where the mean of the block reaches `target`; the last step is taken in part.

    Args:
        trace: of `greedy_trace`.
        weights: how many weights each mask can skip.
        target: mean sparsity.
    """
    drops, total = dict.fromkeys(weights, 0.0), sum(weights.values())
    for name in trace:
        missing = (target - mean_sparsity(drops, weights)) * total / weights[name]
        step = min(STEP, MOST - drops[name])
        drops[name] += max(min(step, missing), 0.0)
        if missing <= step:
            break
    return drops


# ---- sparse against low rank


def budget_rank(shape: tuple[int, ...], sparsity: float, ratio: float) -> int:
    """r = N·K·(1 − s)(1 − ρ) / (N + K): the low-rank path may read what the sparse part leaves of the budget."""
    outputs, inputs = shape
    return int(outputs * inputs * (1 - sparsity) * (1 - ratio) / (outputs + inputs) + 1e-9)


def kept_share(sparsity: float, ratio: float) -> float:
    """(1 − s)ρ, the share of inputs that the sparse part keeps."""
    return (1 - sparsity) * ratio


@dataclass
class Setting:
    """A linear's threshold and low-rank factors at one ratio."""

    threshold: Tensor
    up: Tensor | None = None
    down: Tensor | None = None


class SplitSearch:
    """ρ of every linear, by descent on what the whole sparse model loses: KL to the dense one (R-Sparse, algorithm 1).

    The paper evolves ρ and its code was not released. The error of a linear's or a block's output misleads: low rank
    for o_proj lowers it and raises the KL. So one ratio is sought for each kind of linear in each of some bands of
    layers: from no low rank at all, one group at a time goes down `RATIOS` as long as the KL falls by more than its
    standard error, on rows that factors were not fitted to.
    """

    def __init__(
        self, run: SearchRun, sparsity: dict[str, Any], drops: list[dict[str, float]], factors: Factors, bands: int
    ) -> None:
        """Run the dense model, then calibrate the sparse one and every ratio, layer by layer.

        Args:
            run: the model and the rows: the last third judges, factors are fitted to the others.
            sparsity: the config's key "sparsity".
            drops: the sparsity of each linear of each layer, low-rank path included.
            factors: how low-rank paths are fitted.
            bands: of layers that share a ratio.
        """
        self.run, self.sparsity = run, sparsity | {"ranks": {}}
        rows = len(run.rows.input_ids)
        judged = max(rows // 3, 1)
        self.judged = replace(run, rows=run.rows.part(slice(rows - judged, rows)))
        fitted = replace(run, rows=run.rows.part(slice(0, max(rows - judged, 1))))
        model = run.model()
        for layer in self.judged.layers(model):
            last = layer.advance()
        self.dense = last.hidden
        self.settings: list[dict[tuple[str, float], Setting]] = []
        for layer in fitted.layers(run.model()):
            self.settings.append(self._calibrate(layer, drops[layer.index], factors))
            run.progress.step(1)
        edges = [round(len(drops) * i / bands) for i in range(bands + 1)]
        self.groups = [
            [(index, name) for index in range(first, end) if (name, RATIOS[1]) in self.settings[index]]
            for name in drops[0]
            for first, end in pairwise(edges)
        ]
        self.genes: dict[tuple[int, str], float] = {
            (index, name): 1.0 for index, found in enumerate(self.settings) for name, ratio in found if ratio == 1.0
        }

    def _calibrate(self, layer: Layer, drop: dict[str, float], factors: Factors) -> dict[tuple[str, float], Setting]:
        """Every ratio's setting for what the sparse layers before this one give; the layer is left without low rank."""
        inputs: dict[str, list[Tensor]] = {name: [] for name in drop if drop[name] > 0}
        calibrate(layer, self.sparsity, drop)
        linears: dict[str, SparseLinear] = {name: layer.module.get_submodule(name) for name in inputs}

        def keep(name: str) -> Callable[[Tensor], None]:
            return lambda x: inputs[name].append(x)

        watch(layer, {linears[name].mask: keep(name) for name in inputs})
        found = {(name, 1.0): Setting(masks_of(layer.module)[name].threshold.data.clone()) for name in drop}
        for name, linear in linears.items():
            scores = ScoreHistogram()
            for x in inputs[name]:
                scores.add(linear.mask.scores(x))
            for ratio in RATIOS[1:]:
                rank = budget_rank((linear.out_features, linear.in_features), drop[name], ratio)
                if rank:
                    found[name, ratio] = _fit(
                        linear, inputs[name], scores, kept_share(drop[name], ratio), rank, factors
                    )
            linear.mask.threshold.data = found[name, 1.0].threshold.clone()
        return found

    @torch.no_grad()
    def losses(self, genes: dict[tuple[int, str], float]) -> Tensor:
        """KL(dense ‖ sparse) in nats a token, a mean over each piece of the judged rows (pieces,)."""
        model = self.run.model()
        for layer in self.judged.layers(model):
            install(layer, self.sparsity)
            for (name, ratio), setting in self.settings[layer.index].items():
                if genes[layer.index, name] == ratio:
                    _put(layer.module.get_submodule(name), setting)
            last = layer.advance()
        head, found = model.head(), []
        for sparse, dense in zip(last.hidden, self.dense, strict=True):
            for x, y in zip(sparse.split(PIECE), dense.split(PIECE), strict=True):
                target = head(y.to(model.device)).float().log_softmax(-1)
                logits = head(x.to(model.device)).float().log_softmax(-1)
                found.append(F.kl_div(logits, target, log_target=True, reduction="sum") / len(x))
        return torch.stack(found).cpu()

    def descend(self) -> dict[str, Any]:
        """Search.

        Returns:
            `ratios`: ρ of each linear of each layer; `kl_sparse` with ρ = 1, `kl_split`, `tried`.
        """
        best = first = self.losses(self.genes)
        tried = 1
        for group in self.groups:
            for ratio in RATIOS[1:]:
                genes = self.genes | {place: ratio for place in group if (place[1], ratio) in self.settings[place[0]]}
                if genes == self.genes:
                    break
                losses, tried = self.losses(genes), tried + 1
                gain = best - losses
                self.run.progress.step(1, kl=float(losses.mean()))
                if float(gain.mean()) <= float(gain.std() / len(gain) ** 0.5):
                    break
                best, self.genes = losses, genes
        ratios: list[dict[str, float]] = [{} for _ in self.settings]
        for (index, name), ratio in self.genes.items():
            ratios[index][name] = ratio
        return {"ratios": ratios, "kl_sparse": float(first.mean()), "kl_split": float(best.mean()), "tried": tried}


@torch.no_grad()
def _fit(
    linear: SparseLinear, inputs: list[Tensor], scores: ScoreHistogram, kept: float, rank: int, factors: Factors
) -> Setting:
    """Threshold that keeps a share, and factors for what it drops; the linear's own threshold is changed."""
    linear.mask.threshold.data.fill_(scores.threshold(1 - kept))
    second = None
    if factors == "data":
        second = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        for x in inputs:
            add_dropped(second, x, linear)
    up, down = low_rank(linear.weight, second, rank)
    return Setting(linear.mask.threshold.data.clone(), up, down)


def _put(linear: SparseLinear, setting: Setting) -> None:
    linear.mask.threshold.data = setting.threshold.clone()
    for name, factor in (("low_rank_up", setting.up), ("low_rank_down", setting.down)):
        value = None if factor is None else nn.Parameter(factor, requires_grad=False)
        linear.register_parameter(name, value)
