"""CorDA (arXiv:2406.05223): the weight is decomposed as it acts on data, and A and B start as a part of it.

With C the covariance of a linear's inputs and W C = U S Vᵀ, the adapter starts as B A = U_r U_rᵀ W, and the linear
keeps (I - U_r U_rᵀ) W:

- knowledge-preserved (`kpm`): C is of data whose knowledge should stay; the r smallest directions are trained.
- instruction-previewed (`ipm`): C is of the training data; the r largest are, which learns faster.

The paper computes A = S_r^½ V_rᵀ C⁻¹. Since V_rᵀ C⁻¹ = S_r⁻¹ U_rᵀ W, no inverse is needed: A = S_r^-½ U_rᵀ W,
B = U_r S_r^½.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kit.convert.adapter_recipe import CovarianceSource, Factors, SpectralAdapterConfig, SpectralRecipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_RATIO = 1e3  # of a row of A to its column of B


class CordaConfig(SpectralAdapterConfig):
    """Options of CorDA."""

    recipe: Literal["corda"] = Field("corda", description="This recipe.")
    mode: Literal["kpm", "ipm"] = Field(
        "kpm", description="kpm: keep the knowledge of `data`; ipm: learn the training data faster."
    )
    damping: float = Field(
        0.01, ge=0, description="Added to the diagonal of C, as a share of its mean (the paper's code: 0.01)."
    )
    split: Literal["paper", "balanced"] = Field(
        "paper", description="paper: B A is split by S^½; balanced: A and B of equal norms, whatever S is."
    )


class Corda(SpectralRecipe):
    """A and B start as the part of W that matters least for kept knowledge (kpm), or most for the task (ipm)."""

    name = "corda"
    paper = "arXiv:2406.05223"
    config_class = CordaConfig
    config: CordaConfig

    def covariance_source(self) -> CovarianceSource:
        """The knowledge's (kpm) or the training data's (ipm)."""
        return "knowledge" if self.config.mode == "kpm" else "training"

    def initial_factors(
        self, weight: Tensor, covariance: Tensor | None, rank: int, generator: torch.Generator | None = None
    ) -> Factors:
        """With W C = U S Vᵀ: B = U_r S_r^½, A = S_r^-½ U_rᵀ W.

        Any S gives the same B A. One that is next to nothing beside its row of U_rᵀ W would make A explode, and is
        raised to a floor.
        """
        import torch

        from kit.convert.lowrank import split, svd

        u, s, _ = svd(self._product(weight, covariance))
        taken = slice(None, rank) if self.takes() == "largest" else slice(len(s) - rank, None)
        u, s = u[:, taken], s[taken]
        rows = u.T @ weight.double()
        if self.config.split == "balanced":
            left, values, vh = torch.linalg.svd(rows, full_matrices=False)
            return split(u @ left, values, vh, weight)
        floor = rows.norm(dim=1) / LARGEST_RATIO
        notes = []
        if low := int((s < floor).sum()):
            notes.append(
                f"{low} of {rank} singular values of W C are next to 0 and were raised; split=balanced needs none"
            )
        root = s.maximum(floor).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return Factors((rows / root[:, None]).float(), (u * root).float(), notes=tuple(notes))

    def takes(self) -> Literal["largest", "smallest"]:
        """The smallest (kpm) or the largest (ipm)."""
        return "smallest" if self.config.mode == "kpm" else "largest"

    def spectrum(self, weight: Tensor, covariance: Tensor | None) -> Tensor:
        """Shares of ‖W C‖² by singular direction."""
        from torch.linalg import svdvals

        from kit.convert.lowrank import shares

        return shares(svdvals(self._product(weight, covariance)).square())

    def _product(self, weight: Tensor, covariance: Tensor | None) -> Tensor:
        """W C in float64 (its smallest directions are the point), C of mean diagonal 1, then damped.

        The scale of C does not change U; it only moves norm between A and B.
        """
        assert covariance is not None
        c = covariance.double()
        c = c / c.diagonal().mean().clamp(min=1e-30)
        c.diagonal().add_(self.config.damping)
        return weight.double() @ c
