"""LoRA (arXiv:2106.09685): W x + s · B A x, A random, B zero, both trained. The baseline: it protects nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kit.convert.adapter_recipe import AdapterConfig, AdapterRecipe, Factors

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class LoraConfig(AdapterConfig):
    """Options of LoRA."""

    recipe: Literal["lora"] = Field("lora", description="This recipe.")


class Lora(AdapterRecipe):
    """A random, B zero: the plain adapter, and the baseline of the others."""

    name = "lora"
    paper = "arXiv:2106.09685"
    config_class = LoraConfig
    config: LoraConfig

    def initial_factors(
        self, weight: Tensor, covariance: Tensor | None, rank: int, generator: torch.Generator | None = None
    ) -> Factors:
        """A uniform within ±1 / √in (PEFT's Kaiming initialisation), B = 0."""
        out_features, in_features = weight.shape
        bound = in_features**-0.5
        a = weight.new_empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        return Factors(a, weight.new_zeros(out_features, rank))
