"""Choices about one layer's masks, made by running it: which linears are sparsest, and sparse against low rank."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kit.convert.recipe import Layer
from kit.convert.streaming import Activations
from kit.convert.thresholds import (
    BATCH_ROWS,
    Factors,
    NeuronScores,
    ScoreHistogram,
    add_dropped,
    histograms,
    install,
    low_rank,
    relative_error,
    watch,
)
from kit.modules.sparsity import SparseLinear, SparseMLP, masks_of

STEP = 0.05  # of one linear's sparsity
MOST = 0.95  # no linear gets sparser
JUDGE_TOKENS = 1024  # the last rows of the calibration data: candidates are judged on them
FIT_TOKENS = 4096  # before those: low-rank factors are fitted to them while candidates are compared
RATIOS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.3)
PARENTS = 4


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
        self.fitted = _rows(layer.inputs, slice(0, max(min(FIT_TOKENS // length, rows - judged), 1)))
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


class SplitSearch:
    """ρ of every linear of a block, found by evolution on the error of the block's output (R-Sparse, algorithm 1).

    A gene is an index into `RATIOS`. The first generation holds ρ = 1 everywhere (no low rank), the ratio that is best
    for each linear by itself, the paper's uniform 0.95, and variations of these. The best `PARENTS` survive, so the
    result is never worse on the judged rows than no low rank at all.
    """

    def __init__(self, layer: Layer, sparsity: dict[str, Any], drops: dict[str, float], factors: Factors) -> None:
        """Install masks and record what enters each linear.

        Args:
            layer: the resident layer, with inputs.
            sparsity: the config's key "sparsity".
            drops: the sparsity of each linear, low-rank path included.
            factors: how low-rank paths are fitted.
        """
        self.block, self.drops, self.factors = Block(layer, sparsity), drops, factors
        self.names = [name for name in self.block.masks if drops[name] > 0]
        self.linears: dict[str, SparseLinear] = {n: layer.module.get_submodule(n) for n in self.names}
        inputs: dict[str, list[Tensor]] = {name: [] for name in self.names}

        def keep(name: str) -> Callable[[Tensor], None]:
            return lambda x: inputs[name].append(x)

        watch(layer, {self.linears[name].mask: keep(name) for name in self.names}, self.block.fitted)
        self.inputs = inputs
        self._settings: dict[tuple[str, int], tuple[Tensor, Tensor | None, Tensor | None, float]] = {}
        self._errors: dict[tuple[int, ...], float] = {}

    def setting(self, name: str, gene: int) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        """Threshold, low-rank factors, and the linear's own squared error on the fitted rows, for one ratio."""
        if (name, gene) not in self._settings:
            linear, sparsity = self.linears[name], self.drops[name]
            rank = budget_rank(tuple(linear.weight.shape), sparsity, RATIOS[gene])
            self.block.set(name, 1 - kept_share(sparsity, RATIOS[gene]) if rank else sparsity)
            second = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
            for x in self.inputs[name]:
                add_dropped(second, x, linear)
            missing, up, down = linear.weight.float(), None, None
            if rank:
                up, down = low_rank(linear.weight, second if self.factors == "data" else None, rank)
                missing = missing - up.T @ down
            error = float((missing @ second * missing).sum())
            self._settings[name, gene] = (linear.mask.threshold.data.clone(), up, down, error)
        return self._settings[name, gene]

    def error(self, genes: tuple[int, ...]) -> float:
        """Of the block's output on the judged rows."""
        if genes not in self._errors:
            for name, gene in zip(self.names, genes, strict=True):
                threshold, up, down, _ = self.setting(name, gene)
                linear = self.linears[name]
                linear.mask.threshold.data = threshold.clone()
                for key, factor in (("low_rank_up", up), ("low_rank_down", down)):
                    value = None if factor is None else nn.Parameter(factor, requires_grad=False)
                    linear.register_parameter(key, value)
            self._errors[genes] = self.block.error()
        return self._errors[genes]

    @torch.no_grad()
    def run(self, generations: int, population: int, seed: int) -> tuple[dict[str, float], dict[str, float]]:
        """Search.

        Args:
            generations: how often the best are varied.
            population: blocks tried in each.
            seed: of the variations.

        Returns:
            ρ of each linear, and metrics: `error_sparse` with ρ = 1, `error_split`, `tried`.
        """
        if not self.names:
            return dict.fromkeys(self.drops, 1.0), {"error_sparse": 0.0, "tried": 0.0, "error_split": 0.0}
        draw, count = random.Random(seed), len(RATIOS)
        alone = tuple(min(range(count), key=lambda g, n=name: self.setting(n, g)[3]) for name in self.names)  # type: ignore[misc]
        none = (0,) * len(self.names)
        living = [none, alone, (RATIOS.index(0.95),) * len(self.names)]
        for _ in range(generations):
            while len(living) < population:
                living.append(_child(draw.choice(living[:PARENTS]), draw.choice(living[:PARENTS]), draw))
            living = sorted(dict.fromkeys(living), key=self.error)[:PARENTS]
        best = min([none, *living], key=self.error)
        ratios = {name: RATIOS[gene] for name, gene in zip(self.names, best, strict=True)}
        ratios |= {name: 1.0 for name in self.drops if name not in ratios}
        found = {"error_sparse": self.error(none), "tried": float(len(self._errors)), "error_split": self.error(best)}
        return ratios, found


def _child(one: tuple[int, ...], other: tuple[int, ...], draw: random.Random) -> tuple[int, ...]:
    """Genes of either parent, of which at least one moves by one or two."""
    genes = [draw.choice(pair) for pair in zip(one, other, strict=True)]
    for place in {draw.randrange(len(genes)), draw.randrange(len(genes))}:
        genes[place] = min(max(genes[place] + draw.choice((-2, -1, 1, 2)), 0), len(RATIOS) - 1)
    return tuple(genes)
