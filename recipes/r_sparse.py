"""R-Sparse (arXiv:2504.19449): what a threshold drops still goes through a low-rank copy of the weight.

y = W(s⊙x) + U_r S_r V_rᵀ((1−s)⊙x), s_i = 1[|x_i|·‖W[:, i]‖₂ > T]. Of the weights that a sparsity s leaves, a share ρ is
read by the sparse part and 1 − ρ by the low-rank one; `search_split` finds ρ for every linear.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kit.convert.recipe import ModelFacts, SearchRun, Stage, allocate_stage, search_stage
from kit.convert.sparsity import SparsityConfig, SparsityRecipe

if TYPE_CHECKING:
    from kit.convert.stats import ModelStats


class SplitConfig(BaseModel):
    """The split of each linear's budget between sparse and low rank."""

    model_config = ConfigDict(extra="forbid")

    ratio: float | None = Field(
        None, ge=0, le=1, description="ρ of every linear (the paper's uniform baseline: 0.95); null searches."
    )
    bands: int = Field(3, ge=1, description="Of layers: linears of one kind in one band share a ratio in the search.")
    factors: Literal["data", "weight"] = Field(
        "data",
        description="Low-rank factors that fit what the mask drops on the calibration data, or the weight's own SVD "
        "(the paper's).",
    )


class RSparseConfig(SparsityConfig):
    """Options of R-Sparse."""

    recipe: Literal["r-sparse"] = Field("r-sparse", description="This recipe.")
    split: SplitConfig = Field(default_factory=SplitConfig, description="Sparse against low rank.")


class RSparse(SparsityRecipe):
    """WINA's score, and a low-rank path for the inputs that are dropped."""

    name = "r-sparse"
    paper = "arXiv:2504.19449"
    config_class = RSparseConfig
    weighted = True
    config: RSparseConfig

    @property
    def factors(self) -> Literal["data", "weight"]:  # type: ignore[override]
        """How low-rank paths are fitted."""
        return self.config.split.factors

    def active_stages(self) -> list[Stage]:
        """The split is searched unless a ratio is given, after every linear has its sparsity."""
        stages = {stage.method: stage for stage in super().active_stages()}
        order = ["trace_greedy", "find_budget", "allocate", "search_split", "choose_ranks", "sparsify"]
        if self.config.split.ratio is not None:
            order.remove("search_split")
        return [stages[name] for name in order if name in stages]

    def flops_per_parameter(self) -> float:
        """The search runs the model on a third of the rows for every group of linears."""
        data, split = self.config.data, self.config.split
        tried = 5 + 8 * split.bands / 3 if split.ratio is None else 0
        return super().flops_per_parameter() + 2.0 * tried * data.num_samples * data.seq_len

    def new_parameters(self, model: ModelFacts) -> int:
        """At most what a ratio of the paper's size would add; the search decides."""
        share = (1 - self.config.sparsity) * (
            1 - (0.95 if self.config.split.ratio is None else self.config.split.ratio)
        )
        return int(model.num_layers * share * sum(self.skippable(model).values()))

    def suits(self, stats: ModelStats, model: ModelFacts) -> None:
        """Nothing: what a low-rank path wins back is not measured, so `wina` stands for both."""

    @search_stage
    def search_split(self, run: SearchRun) -> dict[str, Any]:
        """Find ρ of each kind of linear in each band of layers, by the KL of the whole model to the dense one."""
        from kit.convert.sparsity_search import SplitSearch

        split = self.config.split
        tries = len(self.linears) * split.bands
        with run.progress.task(f"{self.name}: search_split", run.facts.num_layers + tries):
            return SplitSearch(run, self.description(), self.allocation["drop"], self.factors, split.bands).descend()

    @allocate_stage
    def choose_ranks(self, stats: dict[str, list[dict]], model: ModelFacts) -> dict[str, Any]:
        """Turn each ρ into the share that the mask drops and the rank of what replaces it."""
        from kit.convert.sparsity_search import budget_rank, kept_share

        drop: list[dict[str, float]] = []
        ranks: dict[str, list[int]] = {name: [] for name in self.linears}
        for index, sparsities in enumerate(self.allocation["drop"]):
            drop.append({})
            for name, sparsity in sparsities.items():
                ratio = self.config.split.ratio
                if ratio is None:
                    ratio = self.allocation["ratios"][index][name]
                rank = budget_rank(model.shapes[f"model.layers.{index}.{name}.weight"], sparsity, ratio)
                ranks[name].append(rank if sparsity else 0)
                drop[-1][name] = 1 - kept_share(sparsity, ratio) if ranks[name][-1] else sparsity
        return {"drop": drop, "ranks": ranks}
