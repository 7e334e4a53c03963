"""MiLoRA (arXiv:2406.09044): A and B start as the smallest singular directions of W, W keeps the rest.

Training starts where the weight is weakest, so that its principal part stays; no data is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kit.convert.adapter_recipe import Factors, SpectralAdapterConfig, SpectralRecipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MiloraConfig(SpectralAdapterConfig):
    """Options of MiLoRA."""

    recipe: Literal["milora"] = Field("milora", description="This recipe.")


class Milora(SpectralRecipe):
    """A and B start as the smallest singular directions of W; no data."""

    name = "milora"
    paper = "arXiv:2406.09044"
    config_class = MiloraConfig
    config: MiloraConfig

    def initial_factors(
        self, weight: Tensor, covariance: Tensor | None, rank: int, generator: torch.Generator | None = None
    ) -> Factors:
        """With W = U S Vᵀ: B = U_r S_r^½, A = S_r^½ V_rᵀ, the r smallest."""
        from kit.convert.lowrank import split, svd

        u, s, vh = svd(weight)
        return split(u[:, -rank:], s[-rank:], vh[-rank:], weight)

    def takes(self) -> Literal["largest", "smallest"]:
        """The smallest."""
        return "smallest"

    def spectrum(self, weight: Tensor, covariance: Tensor | None) -> Tensor:
        """Shares of ‖W‖² by singular direction."""
        from torch.linalg import svdvals

        from kit.convert.lowrank import shares

        return shares(svdvals(weight.double()).square())
