"""Lizard (arXiv:2507.09025): gated linear attention over everything, plus a softmax window with meta memory.

1. Ŷ = Ŷ_gate + α Ŷ_anchor, each with its own denominator. Ŷ_gate is linear attention with Hedgehog's φ and one gate a
   token, γ = sigmoid(w·x): the gate's decay takes the place of RoPE, which is removed. Ŷ_anchor is softmax over a
   window whose denominator has meta tokens too, logits without a value.
2. `attention_transfer`: φ, gate, meta logits and α learn to give softmax attention's outputs (with RoPE).
3. `low_rank_linearizing`: LoRA on q, k and v with the next-token loss. `logit_distillation` is this library's addition.

The paper does not say whether α is learned or how the gate starts: here α is a number a head that starts at 1, and the
gate has a bias, so that it starts slow. Gates stay logarithms, so nothing over- or underflows.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kit.convert.learned import DistillConfig, LearnedConfig, LearnedLinearize, LoraTrainConfig, TransferConfig
from kit.convert.recipe import ModelFacts


class LizardConfig(LearnedConfig):
    """Options of the Lizard recipe."""

    recipe: Literal["lizard"] = Field("lizard", description="This recipe.")
    window_size: int = Field(128, ge=3, description="Keys a query sees through softmax, itself and sinks included.")
    meta_tokens: int = Field(4, ge=1, description="Tokens without a value in the window's denominator.")
    gate_bias: float = Field(
        4.0, description="Starting bias of the gate: 4 keeps half of the weight for 38 tokens, 7 for 760."
    )
    window_rope: bool = Field(False, description="Keep RoPE in the window; the paper removes it everywhere.")
    transfer: TransferConfig = Field(
        default_factory=lambda: TransferConfig(learning_rate=1e-2), description="Attention transfer, for each layer."
    )
    distill: DistillConfig = Field(
        default_factory=lambda: DistillConfig(steps=1000), description="KL to the base's logits."
    )
    lora: LoraTrainConfig = Field(
        default_factory=lambda: LoraTrainConfig(
            steps=0, learning_rate=5e-4, target_modules=["q_proj", "k_proj", "v_proj"]
        ),
        description="LoRA with the next-token loss.",
    )


class Lizard(LearnedLinearize):
    """Gated linear attention plus a softmax window with meta memory in every layer; RoPE removed."""

    name = "lizard"
    paper = "arXiv:2507.09025"
    config_class = LizardConfig
    mixer = "gated"
    config: LizardConfig

    def section(self, model: ModelFacts) -> dict[str, Any]:
        """Feature maps, meta memory, RoPE."""
        return super().section(model) | {
            "meta_tokens": self.config.meta_tokens,
            "window_rope": self.config.window_rope,
            "gate_bias": self.config.gate_bias,
        }

    def layer_parameters(self, model: ModelFacts) -> int:
        """The gate and its bias, meta logits and α."""
        return model.hidden_size + 1 + 2 * model.heads[0]
