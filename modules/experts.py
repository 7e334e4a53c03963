"""Mixture-of-experts layers whose experts are linears of their own, as checkpoints store them.

transformers holds all experts of a layer in two tensors; here each is an `Expert`, whose linears are quantized like any
others. The router, and whatever else the layer has, stay the family's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One gated MLP: down_proj(act(gate_proj(x)) · up_proj(x)), H -> I -> H features, of any linears."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def inner(self, x: Tensor) -> Tensor:
        """What enters down_proj, (M, H) -> (M, I)."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        """(M, H) -> (M, H)."""
        return self.down_proj(self.inner(x))


class Experts(nn.ModuleList):
    """All experts of a layer; stands in for transformers' module, with its forward and, at first, its weights.

    Args:
        fused: transformers' module: gate_up_proj (E, 2 I, H), gate first, and down_proj (E, H, I).
    """

    def __init__(self, fused: Any) -> None:
        gate, up = fused.gate_up_proj.data.chunk(2, dim=1)
        weights = zip(gate, up, fused.down_proj.data, strict=True)
        super().__init__(Expert(_linear(g), _linear(u), _linear(d), fused.act_fn) for g, u, d in weights)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Σ weight · expert(x) over the experts that the router chose for each token.

        Args:
            hidden_states: (M, H).
            top_k_index: (M, k), the experts of each token.
            top_k_weights: (M, k), what each one counts.

        Returns:
            (M, H).
        """
        out = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == number)
            y = self[number](hidden_states[tokens]) * top_k_weights[tokens, places, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out


def separate_experts(model: nn.Module) -> nn.Module:
    """Put `Experts` where a model has fused ones of the usual layout: gate before up, no biases, nothing transposed."""
    for name, module in list(model.named_modules()):
        fused = getattr(module, "gate_up_proj", None)
        usual = isinstance(fused, nn.Parameter) and fused.ndim == 3 and module.is_concatenated and module.has_gate
        if usual and not (module.has_bias or module.is_transposed):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Experts(module))
    return model


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
