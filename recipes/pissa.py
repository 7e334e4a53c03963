"""PiSSA (arXiv:2404.02948): A and B start as the largest singular directions of W, W keeps the rest.

Training starts where the weight is strongest, and learns fast; nothing is protected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kit.convert.adapter_recipe import Factors, SpectralAdapterConfig, SpectralRecipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class PissaConfig(SpectralAdapterConfig):
    """Options of PiSSA."""

    recipe: Literal["pissa"] = Field("pissa", description="This recipe.")


class Pissa(SpectralRecipe):
    """A and B start as the largest singular directions of W; no data."""

    name = "pissa"
    paper = "arXiv:2404.02948"
    config_class = PissaConfig
    config: PissaConfig

    def initial_factors(
        self, weight: Tensor, covariance: Tensor | None, rank: int, generator: torch.Generator | None = None
    ) -> Factors:
        """With W = U S Vᵀ: B = U_r S_r^½, A = S_r^½ V_rᵀ, the r largest."""
        from kit.convert.lowrank import split, svd

        u, s, vh = svd(weight)
        return split(u[:, :rank], s[:rank], vh[:rank], weight)

    def takes(self) -> Literal["largest", "smallest"]:
        """The largest."""
        return "largest"

    def spectrum(self, weight: Tensor, covariance: Tensor | None) -> Tensor:
        """Shares of ‖W‖² by singular direction."""
        from torch.linalg import svdvals

        from kit.convert.lowrank import shares

        return shares(svdvals(weight.double()).square())
