"""Second moments of the inputs of linear layers, collected while a resident layer runs.

H = Σ x xᵀ over tokens is what GPTQ, scale searches and covariance-oriented adapters need of calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kit.convert.errors import KitError
from kit.convert.recipe import Layer
from kit.convert.streaming import Activations
from kit.modules.experts import Expert

BATCH_ROWS = 4
TOKENS = 4096  # that pass through an expert at a time
EXPERTS = "mlp.experts"


@dataclass
class Moment:
    """What is kept of a linear's inputs (K features).

    Attributes:
        second: Σ x xᵀ, (K, K) fp32.
        absolute: Σ |x|, (K,) fp32.
        tokens: how many inputs were seen.
        cross: Σ (t - x) xᵀ, (K, K) fp32, t the same token's input in the original model; None if that was not asked
            for.
        inputs: (N, T, K) on the CPU, what entered the linear; None if that was not asked for.
    """

    second: Tensor
    absolute: Tensor
    tokens: int
    cross: Tensor | None = None
    inputs: Tensor | None = None

    def scaled(self, factor: Tensor) -> Moment:
        """The moment of x · factor, factor (K,)."""
        outer = factor[:, None] * factor
        cross = None if self.cross is None else self.cross * outer
        return Moment(self.second * outer, self.absolute * factor.abs(), self.tokens, cross)


class _Reached(Exception):
    """The last linear's input is there: the rest of the layer need not run."""


@torch.no_grad()
def input_moment(
    layer: Layer,
    name: str,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    replay: dict[str, Tensor] | None = None,
    keep: bool = False,
) -> Moment:
    """Run a layer's inputs up to one of its linears and collect the moment of what enters it.

    Args:
        layer: the resident layer.
        name: the linear, by its name in the layer.
        transform: applied to inputs first (FP8 rounding).
        targets: (N, T, K), the linear's inputs in the original model, for `Moment.cross`.
        weights: (N, T), what each token counts; None is 1.
        replay: kept inputs of the last linear of the attention block, which then stands for the block.
        keep: also return the inputs.

    Raises:
        KitError: naming the linear, if an input is not finite.
    """
    size = layer.module.get_submodule(name).in_features
    moment = Moment(torch.zeros(size, size, device=layer.device), torch.zeros(size, device=layer.device), 0)
    kept: list[Tensor] = []

    def see(x: Tensor, rows: slice) -> None:
        if keep:
            kept.append(x.cpu())
        chosen = None if weights is None else weights[rows]
        add_inputs(moment, transform(x) if transform else x, chosen, None if targets is None else targets[rows])

    _run_up_to(layer, name, see, replay or {})
    check_finite(layer.index, name, moment)
    moment.inputs = torch.cat(kept) if keep else None
    return moment


def _run_up_to(layer: Layer, name: str, see: Callable[[Tensor, slice], None], replay: dict[str, Tensor]) -> None:
    """Run a layer's inputs up to one of its modules and show what enters it, with the rows that it is of."""
    assert layer.inputs is not None
    rows = slice(0, 0)

    def reached(x: Tensor) -> None:
        see(x, rows)
        raise _Reached

    with watch_inputs(layer.module, {name: reached}), _replayed(layer, replay, lambda: rows):
        for rows, hidden, positions in layer.inputs.batches(BATCH_ROWS, layer.device):  # noqa: B007 (`reached` reads it)
            try:
                layer.model.forward(hidden, positions)
            except _Reached:
                continue


@torch.no_grad()
def record_inputs(layer: Layer, names: list[str]) -> tuple[dict[str, Tensor], Activations]:
    """Run the original stream through the untouched layer and keep what enters some of its modules.

    Args:
        layer: the resident layer; `original_inputs`, or else `inputs`, run through it.
        names: linears or norms, by their names in the layer.

    Returns:
        Each module's inputs (N, T, K) on the CPU, and the layer's outputs.
    """
    inputs = layer.original_inputs or layer.inputs
    assert inputs is not None
    kept: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda x: kept[name].append(x.cpu())

    with watch_inputs(layer.module, {name: keep(name) for name in names}):
        outputs = layer.model.advance(inputs, BATCH_ROWS)
    return {name: torch.cat(parts) for name, parts in kept.items()}, outputs


@torch.no_grad()
def replayed_outputs(layer: Layer, inputs: dict[str, Tensor]) -> Activations:
    """What leaves the layer, from the kept inputs of the last linears of its blocks, or of one of them."""
    assert layer.inputs is not None
    outputs, seen = torch.empty_like(layer.inputs.hidden), slice(0, 0)
    with _replayed(layer, inputs, lambda: seen):
        for seen, hidden, positions in layer.inputs.batches(BATCH_ROWS, layer.device):
            outputs[seen] = layer.model.forward(hidden, positions).to(outputs.device)
    return Activations(outputs, layer.inputs.position_ids)


def moment_of(x: Tensor, weights: Tensor | None, device: str) -> Moment:
    """The moment of recorded inputs (N, T, K), tokens weighted by (N, T)."""
    size = x.shape[-1]
    moment = Moment(torch.zeros(size, size, device=device), torch.zeros(size, device=device), 0)
    for start in range(0, len(x), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        add_inputs(moment, x[rows].to(device), None if weights is None else weights[rows])
    return moment


class RoutedTokens:
    """Which tokens a layer's experts are calibrated on, and what enters the experts' linears for them.

    An expert sees the tokens that the router sends to it. One that gets fewer than its input has features (H) would
    have a singular second moment: it is starved, and all tokens of the layer pass through it as well, each counting
    the same and together what is missing, so that H tokens count in all.

    Attributes:
        seen: how many tokens each expert got, (E,).
        tokens: M, how many there are.
    """

    def __init__(self, layer: Layer, hidden: Tensor, targets: Tensor | None = None) -> None:
        """Route tokens.

        Args:
            layer: the resident layer, with its router at mlp.gate and `Experts` at mlp.experts.
            hidden: (M, H) on the CPU, what enters the experts.
            targets: the same in the original model, for `Moment.cross`.
        """
        self._layer, self._hidden, self._targets = layer, hidden, targets
        routes = [layer.module.mlp.gate(x.to(layer.device))[1:] for x in hidden.split(TOKENS)]
        weights, experts = (torch.cat(parts).cpu() for parts in zip(*routes, strict=True))
        self._weights, self._experts, self.tokens = weights.float(), experts, len(hidden)
        self.seen = experts.flatten().bincount(minlength=len(layer.module.mlp.experts))
        # the linears stay as they are when rounded ones take their places in the layer
        self._originals = [Expert(e.gate_proj, e.up_proj, e.down_proj, e.act_fn) for e in layer.module.mlp.experts]

    @classmethod
    def of_layer(cls, layer: Layer, replay: dict[str, Tensor], targets: Tensor | None) -> RoutedTokens:
        """The tokens that enter a layer's experts.

        Args:
            layer: the resident layer.
            replay: as for `input_moment`.
            targets: (M, H), what enters the experts in the original model.
        """
        parts: list[Tensor] = []
        _run_up_to(layer, EXPERTS, lambda x, _: parts.append(x.cpu()), replay)
        return cls(layer, torch.cat(parts), targets)

    def starved(self) -> dict[int, int]:
        """The experts that got fewer tokens than the input has features, and how many they got."""
        return {number: int(seen) for number, seen in enumerate(self.seen) if seen < self._hidden.shape[1]}

    @torch.no_grad()
    def moment(
        self, name: str, *, transform: Callable[[Tensor], Tensor] | None = None, weights: Tensor | None = None
    ) -> Moment:
        """The moment of what enters one linear of an expert.

        Args:
            name: the linear, by its name in the layer ("mlp.experts.3.down_proj").
            transform: applied to inputs first.
            weights: (M,), what an error of the layer's output counts at each token; an expert's error reaches it times
                the router's weight. None: all tokens count the same, whatever the router's weight.

        Raises:
            KitError: naming the linear, if an input is not finite.
        """
        number = int(name.removeprefix(f"{EXPERTS}.").partition(".")[0])
        expert, device = self._layer.module.mlp.experts[number], self._layer.device
        chosen = self._experts == number
        counts = chosen.any(-1).float()
        if weights is not None:
            counts = (self._weights * chosen).square().sum(-1)
            counts *= self.seen[number] / counts.sum().clamp(min=1e-30)
        counts += max(self._hidden.shape[1] - int(self.seen[number]), 0) / self.tokens
        if weights is not None:
            counts *= weights

        def entering(expert: Expert, x: Tensor) -> Tensor:
            return expert.inner(x) if name.endswith("down_proj") else x

        size = self._layer.module.get_submodule(name).in_features
        moment = Moment(torch.zeros(size, size, device=device), torch.zeros(size, device=device), 0)
        for rows in counts.nonzero()[:, 0].split(TOKENS):
            x, target = entering(expert, self._hidden[rows].to(device)), None
            if self._targets is not None:
                target = entering(self._originals[number], self._targets[rows].to(device))
            add_inputs(moment, transform(x) if transform else x, counts[rows], target)
        check_finite(self._layer.index, name, moment)
        return moment


def add_inputs(moment: Moment, x: Tensor, weights: Tensor | None = None, targets: Tensor | None = None) -> None:
    """Add inputs (..., K) to a moment, tokens weighted by (...)."""
    x = x.flatten(0, -2).float()
    weighted = x if weights is None else x * weights.to(x.device).flatten()[:, None]
    moment.second.addmm_(weighted.T, x)
    moment.absolute += weighted.abs().sum(0)
    moment.tokens += len(x)
    if targets is not None:
        moment.cross = torch.zeros_like(moment.second) if moment.cross is None else moment.cross
        moment.cross.addmm_((targets.to(x.device).flatten(0, -2).float() - x).T, weighted)


@contextmanager
def watch_inputs(module: nn.Module, see: dict[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call a function with each input of some linears, by their names in the module."""
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, call=call: call(args[0]))
        for name, call in see.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replayed(layer: Layer, inputs: dict[str, Tensor], rows: Callable[[], slice]) -> Iterator[None]:
    """Let blocks consist of their last linear, run on inputs that were kept: nothing before it is computed.

    Args:
        layer: the resident layer.
        inputs: (N, T, K) by the linear's name in the layer ("self_attn.o_proj", "mlp.down_proj").
        rows: which of the N are being run.
    """
    blocks = []
    for name, kept in inputs.items():
        block, linear = layer.module.get_submodule(name.rpartition(".")[0]), layer.module.get_submodule(name)

        def forward(*args: Any, linear: Any = linear, kept: Tensor = kept, **kwargs: Any) -> Tensor:
            return linear(kept[rows()].to(layer.device))

        def attend(*args: Any, forward: Any = forward, **kwargs: Any) -> tuple[Tensor, None]:
            return forward(), None  # no attention weights

        block.forward = attend if name.startswith("self_attn.") else forward
        blocks.append(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def check_finite(index: int, name: str, moment: Moment) -> None:
    """Refuse a moment that is not finite.

    Raises:
        KitError: naming the layer and the linear.
    """
    if not bool(moment.second.isfinite().all()):
        raise KitError(
            "an activation is NaN or infinite",
            where=f"layer {index}: input of {name}",
            next_step="check the model's weights, and that it gives sensible text (`kit chat`)",
        )
