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

BATCH_ROWS = 4


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
    assert layer.inputs is not None
    size = layer.module.get_submodule(name).in_features
    moment = Moment(torch.zeros(size, size, device=layer.device), torch.zeros(size, device=layer.device), 0)
    if targets is not None:
        moment.cross = torch.zeros_like(moment.second)
    seen = slice(0, 0)
    kept: list[Tensor] = []

    def see(x: Tensor) -> None:
        if keep:
            kept.append(x.cpu())
        x = (transform(x) if transform else x).flatten(0, -2).float()
        weighted = add_inputs(moment, x, None if weights is None else weights[seen])
        if targets is not None and moment.cross is not None:
            target = targets[seen].to(x.device).flatten(0, -2).float()
            moment.cross.addmm_((target - x).T, weighted)
        raise _Reached

    with watch_inputs(layer.module, {name: see}), _replayed(layer, replay or {}, lambda: seen):
        for seen, hidden, positions in layer.inputs.batches(BATCH_ROWS, layer.device):  # noqa: B007 (`see` reads it)
            try:
                layer.model.forward(hidden, positions)
            except _Reached:
                continue
    check_finite(layer.index, name, moment)
    moment.inputs = torch.cat(kept) if keep else None
    return moment


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
    """What leaves the layer, from the kept inputs of the last linears of its two blocks."""
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
        add_inputs(moment, x[rows].to(device).flatten(0, -2).float(), None if weights is None else weights[rows])
    return moment


def add_inputs(moment: Moment, x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add inputs (M, K) to a moment; return them times their weights."""
    weighted = x if weights is None else x * weights.to(x.device).flatten()[:, None]
    moment.second.addmm_(weighted.T, x)
    moment.absolute += weighted.abs().sum(0)
    moment.tokens += len(x)
    return weighted


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
