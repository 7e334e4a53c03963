"""What a recipe of `kit adapt` is: its options, the factors it starts from, and the plan of an adapter.

An adapter adds s · B A to some of a model's linears, A (r, in) and B (out, r), and trains B and often A. Methods
differ in the A and B that they start from; a recipe says which, for one linear at a time. Nothing here imports torch.

Linears go by their names inside the language model's decoder ("layers.0.self_attn.q_proj"), whatever wraps it.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kit.convert.data import DataConfig, TrainDataConfig
from kit.convert.errors import ExitCode, KitError, closest
from kit.convert.recipe import ModelFacts, PlanItem, Recipe, RecipeConfig, TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CovarianceSource = Literal["none", "knowledge", "training"]
LINEAR = re.compile(r"(?P<tower>.*?)(?P<name>layers\.\d+\..+)\.weight")
OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech")
ROUTED = re.compile(r"\.experts\.|(gate|router)$")


class AdapterTrainConfig(TrainConfig):
    """Training an adapter: AdamW, linear warm-up, cosine decay to a tenth, gradient clipping."""

    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="Share of the steps that warm up.")
    epochs: float | None = Field(None, gt=0, description="Passes over the training data, instead of steps.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice instead of keeping them: less memory, a third more time."
    )


class AdapterConfig(RecipeConfig):
    """Options that every adapter has."""

    data: DataConfig = Field(
        default_factory=DataConfig, description="Text whose knowledge should stay, for methods that look at it."
    )
    rank: int = Field(32, ge=1, description="Rank r of each adapter; at most the smaller side of the linear.")
    alpha: float | None = Field(None, gt=0, description="The adapter is alpha / rank · B A. None: 1 · B A.")
    target_modules: list[str] | None = Field(
        None, description="Linears by the end of their names (q_proj). None: all of the language model's layers."
    )
    training: AdapterTrainConfig = Field(default_factory=AdapterTrainConfig, description="The training loop.")
    train_data: TrainDataConfig = Field(default_factory=TrainDataConfig, description="What the adapter learns.")

    @property
    def scaling(self) -> float:
        """The factor before B A, the same for every linear whatever its rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class SpectralAdapterConfig(AdapterConfig):
    """Options of adapters that take directions of a spectrum."""

    dynamic_rank: bool = Field(
        False, description="Give linears ranks by how compact their spectra are, for the same trained parameters."
    )


@dataclass
class Factors:
    """What an adapter starts from, before the scaling: the linear becomes W - B A, and B A stands beside it.

    Attributes:
        a: A, (r, in) fp32.
        b: B, (out, r) fp32; zero for methods that leave W as it is.
        train_a: whether A is trained.
        notes: what the method had to guard against.
    """

    a: Tensor
    b: Tensor
    train_a: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear of a plan: its sizes, and the rank that it gets (None: known once the covariances are)."""

    name: str
    out_features: int
    in_features: int
    rank: int | None

    def trained(self, rank: int, train_a: bool) -> int:
        """Trained parameters at a rank."""
        return rank * (self.out_features + (self.in_features if train_a else 0))


@dataclass
class AdapterPlan:
    """Which linears are adapted.

    Attributes:
        linears: by name in the decoder, in the model's order.
        train_a: whether the method trains A.
        scaling: s of s · B A.
    """

    linears: dict[str, AdaptedLinear]
    train_a: bool
    scaling: float

    @property
    def trained_parameters(self) -> int | None:
        """Numbers that are trained; None if the ranks are not known yet."""
        if any(linear.rank is None for linear in self.linears.values()):
            return None
        return sum(linear.trained(linear.rank or 0, self.train_a) for linear in self.linears.values())


class AdapterRecipe(Recipe):
    """A recipe that `kit adapt` runs: the factors that one linear's adapter starts from.

    Attributes:
        covariance_of: which data's second moment of inputs the method needs, where that is no matter of options.
        train_a: whether A is trained.
    """

    command: ClassVar[str] = "adapt"
    base_model_relation = "adapter"
    covariance_of: ClassVar[CovarianceSource] = "none"
    train_a: ClassVar[bool] = True
    config: AdapterConfig

    def covariance_source(self) -> CovarianceSource:
        """Which data's covariances the method needs with these options."""
        return self.covariance_of

    @abstractmethod
    def initial_factors(
        self, weight: Tensor, covariance: Tensor | None, rank: int, generator: torch.Generator | None = None
    ) -> Factors:
        """The method: what the adapter of one linear starts from.

        Args:
            weight: W (out, in), fp32.
            covariance: C (in, in) fp32, the mean of x xᵀ over tokens, where `covariance_source` is not "none".
            rank: r, at most min(out, in).
            generator: for methods that draw, on the weight's device.
        """

    def ranks_need_spectra(self) -> bool:
        """Whether ranks depend on the weights or covariances, so that a plan cannot say them."""
        return False

    def plan(self, model: ModelFacts) -> list[PlanItem]:
        """What will be adapted, and how many parameters are trained.

        Raises:
            KitError: as `plan_adapters`.
        """
        plan = plan_adapters(model, self)
        count = plan.trained_parameters
        trained = "known when the ranks are" if count is None else f"{count / 1e6:,.2f} M parameters"
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in plan.linears)
        source = self.covariance_source()
        return [
            PlanItem("adapted", f"{len(plan.linears)} linears: {', '.join(kinds)}"),
            PlanItem("trained", trained + ("" if plan.train_a else ", B only")),
            PlanItem("covariances", "none" if source == "none" else f"of the {source} data"),
        ]


class SpectralRecipe(AdapterRecipe):
    """An adapter recipe that takes the largest or the smallest directions of a spectrum."""

    config: SpectralAdapterConfig

    @abstractmethod
    def takes(self) -> Literal["largest", "smallest"]:
        """Which directions the method takes."""

    @abstractmethod
    def spectrum(self, weight: Tensor, covariance: Tensor | None) -> Tensor:
        """The energy of each direction as a share of all, falling, (min(out, in) or in,) fp64.

        Args and shapes as in `initial_factors`.
        """

    def rank_of(self, spectrum: Tensor) -> int | None:
        """The rank that options other than `rank` give one linear; None: `rank` says it."""
        return None

    def ranks_need_spectra(self) -> bool:
        """Dynamic ranks do."""
        return self.config.dynamic_rank


def plan_adapters(model: ModelFacts, recipe: AdapterRecipe) -> AdapterPlan:
    """Choose the linears of a model that get an adapter, from names and shapes alone.

    Args:
        model: config.json, and the tensors' names as they are on disk.
        recipe: its options name the targets and the rank.

    Raises:
        KitError: if the language model's decoder layers are not found, or hold no linear that was named.
    """
    config, late = recipe.config, recipe.ranks_need_spectra()
    found = decoder_linears(model)
    linears = {
        name: AdaptedLinear(name, *found[name], rank=None if late else min(config.rank, *found[name]))
        for name in select_targets(list(found), config.target_modules)
    }
    return AdapterPlan(linears, recipe.train_a, config.scaling)


def decoder_linears(model: ModelFacts) -> dict[str, tuple[int, int]]:
    """The matrices in the language model's decoder layers, as (out, in), by their names in the decoder.

    Towers for images and sound are left out, and so are routers and experts: PEFT adapts single linears, and
    transformers holds a layer's experts in one tensor.

    Raises:
        KitError: if there are no such layers, or several towers that could be the language model.
    """
    towers: dict[str, dict[str, tuple[int, int]]] = {}
    for tensor, shape in model.shapes.items():
        match = LINEAR.fullmatch(tensor)
        if match and len(shape) == 2 and not OTHER_TOWERS.search(match["tower"]) and not ROUTED.search(match["name"]):
            towers.setdefault(match["tower"], {})[match["name"]] = (shape[0], shape[1])
    if len(towers) != 1:
        raise KitError(
            f"{'no' if not towers else 'more than one'} language model with decoder layers in it"
            + (f": {', '.join(sorted(towers))}" if towers else ""),
            where="the names of the model's tensors",
            next_step="adapters need linears named ...layers.N.NAME; `kit inspect MODEL` shows what the model is",
        )
    return towers.popitem()[1]


def select_targets(names: list[str], target_modules: list[str] | None) -> list[str]:
    """The names that a list of endings asks for ("q_proj", "mlp.down_proj"); None asks for all.

    Raises:
        KitError: exit code 2, naming an ending that no name has.
    """
    if target_modules is None:
        return names
    for ending in target_modules:
        if not any(f".{name}".endswith(f".{ending}") for name in names):
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise KitError(
                f"no linear of the model is called '{ending}'",
                where="target_modules",
                next_step=f"{closest(ending, known)}there are: {', '.join(known)}",
                exit_code=ExitCode.USAGE,
            )
    return [name for name in names if any(f".{name}".endswith(f".{ending}") for ending in target_modules)]


def rank_for_parameters(plan: AdapterPlan, budget: int) -> int:
    """The rank, the same for all linears, whose trained parameters come nearest to a budget.

    With a plan that trains B only and the budget of LoRA of rank r this is r · Σ(in + out) / Σ out where no linear is
    too small: KORE's 235 for LoRA's 128 on Llama-2-7B. A linear's own rank stays at most its smaller side.
    """

    def trained(rank: int) -> int:
        return sum(
            linear.trained(min(rank, linear.out_features, linear.in_features), plan.train_a)
            for linear in plan.linears.values()
        )

    largest = max(min(linear.out_features, linear.in_features) for linear in plan.linears.values())
    above = bisect_left(range(largest), budget, lo=1, key=trained)
    return min((rank for rank in (above - 1, above) if rank >= 1), key=lambda rank: abs(trained(rank) - budget))
