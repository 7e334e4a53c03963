"""KORE's constraint (arXiv:2510.19316; LoRA-Null v2, arXiv:2503.02659): train only where kept knowledge has no input.

With C the covariance of a linear's inputs on data that should stay, and U its r smallest eigenvectors, A's rows lie in
the span of U, which such inputs hardly reach: A C ≈ 0. A is frozen and only B is trained, so B A x ≈ 0 stays true for
them whatever B becomes.

The adapter starts as B A = W U Uᵀ and the linear keeps W (I - U Uᵀ) (`init: residual`, the paper); or as A = Uᵀ, B = 0,
with W untouched (`init: zero`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from kit.convert.adapter_recipe import Factors, SpectralAdapterConfig, SpectralRecipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class KoreConfig(SpectralAdapterConfig):
    """Options of KORE."""

    recipe: Literal["kore"] = Field("kore", description="This recipe.")
    init: Literal["residual", "zero"] = Field(
        "residual", description="residual: B A = W U Uᵀ, as the paper; zero: A = Uᵀ, B = 0."
    )
    rank_energy: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Instead of rank: as many directions as hold at most this share of the inputs' energy.",
    )

    @model_validator(mode="after")
    def _one_rule_for_ranks(self) -> KoreConfig:
        if self.rank_energy is not None and self.dynamic_rank:
            raise ValueError("rank_energy and dynamic_rank both choose the ranks; use one")
        return self


class Kore(SpectralRecipe):
    """A spans what inputs of the kept data hardly reach, and is frozen; B is trained."""

    name = "kore"
    paper = "arXiv:2510.19316"
    config_class = KoreConfig
    covariance_of = "knowledge"
    train_a = False
    config: KoreConfig

    def initial_factors(
        self, weight: Tensor, covariance: Tensor | None, rank: int, generator: torch.Generator | None = None
    ) -> Factors:
        """B A = W U Uᵀ, from the thin SVD W U = P Σ Qᵀ: B = P Σ^½, A = Σ^½ Qᵀ Uᵀ; no SVD of (out, in) is needed."""
        from torch.linalg import eigh

        from kit.convert.lowrank import split, svd

        assert covariance is not None
        null = eigh(covariance.double()).eigenvectors[:, :rank]  # eigenvalues rise
        if self.config.init == "zero":
            return Factors(null.T.float(), weight.new_zeros(len(weight), rank), train_a=False)
        p, s, qh = svd(weight.double() @ null)
        return split(p, s, qh @ null.T, weight, train_a=False)

    def takes(self) -> Literal["largest", "smallest"]:
        """The smallest."""
        return "smallest"

    def spectrum(self, weight: Tensor, covariance: Tensor | None) -> Tensor:
        """Shares of the inputs' energy by eigenvector of C."""
        from torch.linalg import eigvalsh

        from kit.convert.lowrank import shares

        assert covariance is not None
        return shares(eigvalsh(covariance.double()).flip(0))

    def rank_of(self, spectrum: Tensor) -> int | None:
        """The most of the smallest eigenvectors that hold at most `rank_energy`, one at least."""
        if self.config.rank_energy is None:
            return None
        return max(1, int((spectrum.flip(0).cumsum(0) <= self.config.rank_energy).sum()))

    def ranks_need_spectra(self) -> bool:
        """By energy, and dynamic ranks."""
        return self.config.rank_energy is not None or super().ranks_need_spectra()
