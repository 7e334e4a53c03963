"""The learned part of a linearized attention layer, and its place in transformers' cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kit.kernels.linear_attention import hybrid_attention


class HybridLinearAttention(nn.Module):
    """Hedgehog feature maps and the mixing factor of a softmax window with a linear past (LoLCATs, arXiv:2410.10254).

    Parameters (H query heads, L key maps, D head dim, `feature_dim` = F/2):
        feature_map_q: (H, D, feature_dim).
        feature_map_k: (L, D, feature_dim); L is the number of key/value heads (`feature_map_heads="kv"`, one state for
            each of them) or of query heads (`"query"`, as in the paper).
        window_factor: (H,), the logit a of the mixing factor g = sigmoid(a).

    `linear_weight` and `window_weight` scale the branches: 1 and 1 normally, 0 to take one away.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        window_size: int,
        feature_dim: int,
        feature_map_heads: str = "kv",
        window_factor: float = 0.1,
        linear_weight: float = 1.0,
        window_weight: float = 1.0,
    ) -> None:
        super().__init__()
        key_maps = num_key_value_heads if feature_map_heads == "kv" else num_heads
        self.window_size = window_size
        self.initial_window_factor = window_factor
        self.linear_weight, self.window_weight = linear_weight, window_weight
        self.feature_map_q = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim))
        self.feature_map_k = nn.Parameter(torch.empty(key_maps, head_dim, feature_dim))
        self.window_factor = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity maps (cut to `feature_dim` columns) and the configured mixing factor, as LoLCATs starts."""
        with torch.no_grad():
            for weight in (self.feature_map_q, self.feature_map_k):
                weight.copy_(torch.eye(*weight.shape[1:], device=weight.device).expand_as(weight))
            self.window_factor.copy_(torch.logit(torch.full_like(self.window_factor, self.initial_window_factor)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Attend: q (B, H, T, D), k and v (B, G, P + T, D), both after RoPE. See `hybrid_attention` for the options.

        Returns:
            The output (B, H, T, D) and, with `return_state=True`, the new state (B, L, F, D + 1) in fp32.
        """
        return hybrid_attention(
            q,
            k,
            v,
            self.feature_map_q,
            self.feature_map_k,
            self.window_factor.float().sigmoid(),
            window_size=self.window_size,
            scale=scale,
            linear_weight=self.linear_weight,
            window_weight=self.window_weight,
            **options,
        )


class CacheSlot:
    """One layer of transformers' cache: the window's keys, kept by transformers, and the recurrent state, kept by us.

    `hybrid_sliding` layers hold both. Dynamic and static layers return the keys of a step in the same order, first the
    oldest one still in the window, so `num_past` and the slice to valid keys are all that differs.

    Args:
        cache: the model's `past_key_values`.
        layer_idx: which layer.
        window_size: the window, in keys.

    Raises:
        ValueError: if the cache was not built from this model's config.
    """

    def __init__(self, cache: Any, layer_idx: int, window_size: int) -> None:
        self.cache, self.layer_idx = cache, layer_idx
        layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        if not hasattr(layer, "recurrent_states"):
            raise ValueError(
                f"layer {layer_idx} needs a cache with a recurrent state, got {type(layer).__name__}\n"
                f"  where: past_key_values ({type(cache).__name__})\n"
                "  next:  pass DynamicCache(config=model.config), or leave past_key_values out"
            )
        self.layer = layer
        self.num_seen = cache.get_seq_length(layer_idx)
        self.num_past = min(self.num_seen, window_size - 1)

    @property
    def state(self) -> Tensor | None:
        """(B, L, F, D + 1), fp32: all that has left the window."""
        return self.layer.recurrent_states[0] if self.layer.is_recurrent_states_initialized[0] else None

    def store(self, state: Tensor) -> None:
        """Keep the state for the next step."""
        self.cache.update_recurrent_state(state, self.layer_idx)


ABLATIONS = {"window only": (0.0, 1.0), "linear only": (1.0, 0.0), "attention zeroed": (0.0, 0.0)}


@contextmanager
def branch_weights(model: nn.Module, linear: float, window: float) -> Iterator[None]:
    """Scale the two branches of every hybrid layer while the context is open; see `ABLATIONS`."""
    layers = [module for module in model.modules() if isinstance(module, HybridLinearAttention)]
    before = [(layer.linear_weight, layer.window_weight) for layer in layers]
    for layer in layers:
        layer.linear_weight, layer.window_weight = layer.linear_weight * linear, layer.window_weight * window
    try:
        yield
    finally:
        for layer, weights in zip(layers, before, strict=True):
            layer.linear_weight, layer.window_weight = weights
