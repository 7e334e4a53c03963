"""Hedgehog (arXiv:2402.04347): linear attention alone, whose feature maps learn softmax's attention weights.

1. φ(x) = [softmax(Wᵀx) ⊕ softmax(−Wᵀx)] for queries and keys of every head, after RoPE (Eq. 3 and its stable form),
   W a D x D matrix that starts as the identity. No window: y_i = Σ_{j≤i} φq_i·φk_j v_j / Σ_{j≤i} φq_i·φk_j.
2. `attention_transfer` (Eq. 4): cross-entropy of these attention weights with softmax's as labels, layer by layer.
3. The paper then fine-tunes on the task. Here the model learns its base's logits (`logit_distillation`); LoRA with
   the next-token loss is there too.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kit.convert.learned import DistillConfig, LearnedConfig, LearnedLinearize, TransferConfig


class HedgehogConfig(LearnedConfig):
    """Options of the Hedgehog recipe."""

    recipe: Literal["hedgehog"] = Field("hedgehog", description="This recipe.")
    transfer: TransferConfig = Field(
        default_factory=lambda: TransferConfig(loss="weights", learning_rate=1e-2),
        description="Attention transfer, for each layer.",
    )
    distill: DistillConfig = Field(
        default_factory=lambda: DistillConfig(steps=1000), description="KL to the base's logits."
    )


class Hedgehog(LearnedLinearize):
    """Linear attention in every layer: no window, a state of constant size."""

    name = "hedgehog"
    paper = "arXiv:2402.04347"
    config_class = HedgehogConfig
    mixer = "linear"
    ablation_note = '"Attention zeroed" takes the attention of the converted layers away.'
    config: HedgehogConfig

    def cache_window(self, kinds: list[str]) -> int:
        """One cached key: it tells how long the sequence is. Layers that get a window alone need theirs."""
        return super().cache_window(kinds) if "window" in kinds else 2
