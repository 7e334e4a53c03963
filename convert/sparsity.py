"""What recipes of activation sparsity share: options, stages, allocators, the result's config.

A recipe says what is scored and where (`weighted`, `linears`, `neurons`); everything else is here.

1. `trace_greedy` (allocator greedy): in which order a block's linears get sparser.
2. `find_budget` (with ppl_budget): the largest sparsity whose perplexity stays within it.
3. `allocate`: each linear's sparsity.
4. `sparsify`: thresholds, layer by layer, on the outputs of the layers that are sparse already.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from kit.convert.errors import KitError
from kit.convert.recipe import (
    Layer,
    ModelFacts,
    PlanItem,
    Recipe,
    RecipeConfig,
    SearchRun,
    Stage,
    Suitability,
    allocate_stage,
    layer_stage,
    search_stage,
)

if TYPE_CHECKING:
    from kit.convert.stats import InputStats, ModelStats
    from kit.convert.thresholds import Factors

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
ADVISED_ERROR, ADVISED_STEP = 0.2, 0.05  # mean relative error up to which a sparsity is advised, and the grid of those
DENSEST, SPARSEST, PRECISION = 0.0, 0.9, 0.01  # of the search for a perplexity budget


def error_without(measured: InputStats, sparsity: float, by_contribution: bool) -> float:
    """A linear's relative output error without a share of its inputs, between what was measured (linear in the share).

    Args:
        measured: of the linear's site.
        sparsity: the share, smallest first.
        by_contribution: smallest contribution |x_k|·‖W_:k‖ first, where that was measured.
    """
    shares = (measured.cett if by_contribution else None) or measured.droppable
    points = [(0.0, 0.0), *sorted((share, float(error)) for error, share in shares.items()), (1.0, 1.0)]
    for (left, low), (right, high) in pairwise(points):
        if sparsity <= right:
            return low + (high - low) * (sparsity - left) / max(right - left, 1e-9)
    return 1.0


class SparsityConfig(RecipeConfig):
    """Options of every recipe of activation sparsity."""

    sparsity: float = Field(0.5, ge=0, le=0.95, description="Share of the inputs that a token drops, where it may.")
    ppl_budget: float | None = Field(
        None,
        gt=0,
        description="Percent ('1%') that perplexity on the calibration data may grow by: replaces sparsity by the "
        "largest that stays within (the Sparsing Law's PPL-p% rule).",
    )
    allocator: Literal["uniform", "greedy"] = Field(
        "uniform", description="The same sparsity for every linear, or TEAL's greedy allocation inside each block."
    )
    dense_prefill: bool = Field(
        True, description="Prompts run dense and only steps of one token are sparse; false makes every token sparse."
    )

    int4_group: int | None = Field(
        None,
        ge=8,
        description="Also round the weights of sparse linears to 4 bits, to nearest, with a scale for each output and "
        "so many inputs (32 to 128); null keeps them.",
    )

    @field_validator("ppl_budget", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        return value.strip().removesuffix("%") if isinstance(value, str) else value


class SparsityRecipe(Recipe):
    """A method that drops inputs of linears whose score is low.

    Attributes:
        weighted: the score is |x_i|·‖W[:, i]‖₂; else |x_i|.
        linears: whose inputs are masked, by their names in a layer.
        neurons: also mask the neurons of the MLP by their gate.
    """

    weighted: ClassVar[bool] = False
    linears: ClassVar[tuple[str, ...]] = (*ATTENTION, *MLP)
    neurons: ClassVar[bool] = False
    factors: Factors = "weight"

    families = ("llama", "mistral", "qwen2", "qwen3")
    replaces_modules = True
    float32 = True
    bundle_entry = "kit.modules.sparsity"
    limits = (
        "Only steps of one token for each of up to four sequences get faster, and only where the kernels run. "
        "Thresholds fit text like the calibration data."
    )
    config: SparsityConfig

    # ---- planning

    def active_stages(self) -> list[Stage]:
        """Greedy allocation and the perplexity budget are opt-in."""
        left_out = set() if self.config.allocator == "greedy" else {"trace_greedy"}
        if self.config.ppl_budget is None:
            left_out.add("find_budget")
        return [stage for stage in self.stages() if stage.method not in left_out]

    def plan(self, model: ModelFacts) -> list[PlanItem]:
        """Check that every linear is there; say what will be sparse, and when.

        Raises:
            KitError: on another architecture, quantized weights, or a linear that the model lacks.
        """
        super().plan(model)
        if "quantization_config" in model.config:
            raise KitError(
                "the weights are quantized, and these linears are not",
                where="config.json: quantization_config",
                next_step="give the model that it was made from, in bfloat16, float16 or float32",
            )
        for index in range(model.num_layers):
            for name in (*ATTENTION, *MLP):
                if f"model.layers.{index}.{name}.weight" not in model.shapes:
                    raise KitError(
                        f"the model has no tensor 'model.layers.{index}.{name}.weight'",
                        where="the weights",
                        next_step="q, k, v, o, gate, up and down must be separate projections",
                    )
        self._plan_int4(model)
        weights, every = self.skippable(model), sum(self._size(model, name) for name in (*ATTENTION, *MLP))
        target = f"{self.config.sparsity:.0%}"
        if self.config.ppl_budget is not None:
            target = f"the most that perplexity + {self.config.ppl_budget:g} % on the calibration data allows"
        share = sum(weights.values()) / every
        places = ", ".join(name.rpartition(".")[2] for name in weights)
        when = "steps of one token; prompts run dense" if self.config.dense_prefill else "every token"
        return [
            PlanItem("sparsity", f"{target}, {self.config.allocator}, of {places}: {share:.0%} of the layers' weights"),
            PlanItem("sparse tokens", when),
            *([PlanItem("weights", f"4 bits, groups of {self.config.int4_group}")] if self.config.int4_group else []),
        ]

    def _plan_int4(self, model: ModelFacts) -> None:
        """Check that 4-bit weights are possible."""
        group = self.config.int4_group
        if group is None:
            return
        if self.neurons:
            raise KitError(
                f"{self.name} reads the weights of the MLP row by row, in 16 bits",
                where=f"recipe {self.name}: int4_group",
                next_step="take teal, wina or r-sparse, or leave int4_group out",
            )
        for name in self.linears:
            outputs, inputs = model.shapes[f"model.layers.0.{name}.weight"]
            if inputs % group or outputs % 2:
                raise KitError(
                    f"{name} has {inputs} inputs and {outputs} outputs: no groups of {group}",
                    where=f"recipe {self.name}: int4_group",
                    next_step="give a divisor of every linear's inputs, such as 32 or 64",
                )

    def skippable(self, model: ModelFacts) -> dict[str, int]:
        """How many weights of a layer each mask can skip."""
        found = {name: self._size(model, name) for name in self.linears}
        return found | ({"mlp": self._size(model, MLP[1]) + self._size(model, MLP[2])} if self.neurons else {})

    def _size(self, model: ModelFacts, name: str) -> int:
        outputs, inputs = model.shapes[f"model.layers.0.{name}.weight"]
        return outputs * inputs

    def suits(self, stats: ModelStats, model: ModelFacts) -> Suitability | None:
        """1 - the relative output error of a linear without the inputs that the sparsity drops, mean over weights.

        Linears that stay dense make no error. Errors are read off between those at which `stats` has measured how much
        can be dropped.
        """
        weights = self.skippable(model)
        every = sum(self._size(model, name) for name in (*ATTENTION, *MLP))

        def error(sparsity: float) -> float:
            total = 0.0
            for layer in stats.layers:
                for name, size in weights.items():
                    neurons = name == "mlp"
                    measured = layer.inputs["down"] if neurons else layer.input_of(name)
                    total += size * error_without(measured, sparsity, neurons)
            return total / every / len(stats.layers)

        found = error(self.config.sparsity)
        grid = [round(step * ADVISED_STEP, 2) for step in range(1, int(self.config.sparsity / ADVISED_STEP + 1e-9) + 1)]
        enough = max((share for share in grid if error(share) <= ADVISED_ERROR), default=None)
        share = sum(weights.values()) / every
        return Suitability(
            score=max(0.0, 1 - found),
            reason=(
                f"without {self.config.sparsity:.0%} of the inputs of {share:.0%} of the weights, a linear's outputs "
                f"are off by {found:.1%} on average. Only steps of one token for up to four sequences get faster."
            ),
            settings=(f"sparsity={enough:g}",) if enough and enough < self.config.sparsity else (),
        )

    def flops_per_parameter(self) -> float:
        """About five passes over the data, and what is searched."""
        passes = 5 + (5 * 8 if self.config.ppl_budget else 0) + (15 if self.config.allocator == "greedy" else 0)
        return 2.0 * passes * self.config.data.num_samples * self.config.data.seq_len

    def build(self, model: ModelFacts) -> dict[str, Any]:
        """config.json of the sparse model: the family's, our model_type, and what `modules/sparsity.py` reads."""
        prefix = model.config["architectures"][0].removesuffix("ForCausalLM")
        return model.config | {
            "model_type": f"kit_sparse_{model.model_type}",
            "architectures": [f"KitSparse{prefix}ForCausalLM"],
            "sparsity": self.description(),
        }

    def build_for_calibration(self, model: ModelFacts) -> dict[str, Any]:
        """Every token sparse, whatever the result does with prompts."""
        config = self.build(model)
        return config | {"sparsity": config["sparsity"] | {"dense_prefill": False}}

    def description(self) -> dict[str, Any]:
        """The config's key "sparsity"."""
        return {
            "method": self.name,
            "target": self.target,
            "dense_prefill": self.config.dense_prefill,
            "weighted": self.weighted,
            "linears": list(self.linears),
            "neurons": self.neurons,
            "ranks": self.allocation.get("ranks", {}),
            "int4_group": self.config.int4_group,
        }

    @property
    def target(self) -> float:
        """The sparsity: the one that was asked for, or that the budget allows."""
        return float(self.allocation.get("sparsity", self.config.sparsity))

    # ---- stages

    @layer_stage(propagate="original")
    def trace_greedy(self, layer: Layer) -> dict[str, Any]:
        """Record in which order the block's linears get sparser, up to what the sparsity asks for."""
        from kit.convert.sparsity_search import greedy_trace

        limit = self.config.sparsity if self.config.ppl_budget is None else SPARSEST
        trace, error = greedy_trace(layer, self.description(), limit)
        return {"trace": trace, "steps": len(trace), "output_error": error}

    @search_stage
    def find_budget(self, run: SearchRun) -> dict[str, Any]:
        """Bisection of sparsity on the perplexity of the calibration data, everything calibrated anew each time."""
        traces = self._traces(run.stats)
        weights, tried = self.skippable(run.facts), {}

        def allowed(sparsity: float) -> bool:
            tried[f"{sparsity:.3f}"] = value = self._perplexity(run, sparsity, traces, weights)
            run.progress.step(1, sparsity=sparsity, perplexity=value)
            return value <= base * (1 + self.config.ppl_budget / 100)  # type: ignore[operator]

        with run.progress.task(f"{self.name}: find_budget, sparsities", 8):
            base = self._perplexity(run, None, traces, weights)
            low, high = DENSEST, SPARSEST
            if allowed(high):
                low = high
            while high - low > PRECISION:
                middle = round((low + high) / 2, 3)
                low, high = (middle, high) if allowed(middle) else (low, middle)
        return {"sparsity": low, "perplexity_dense": base, "perplexity_by_sparsity": tried}

    def _perplexity(
        self, run: SearchRun, sparsity: float | None, traces: list[list[str]] | None, weights: dict[str, int]
    ) -> float:
        """Of the calibration data with every token sparse; None: with none."""
        from kit.convert.perplexity import streamed_perplexity
        from kit.convert.thresholds import calibrate

        model = run.model()
        for layer in run.layers(model):
            if sparsity is not None:
                drop = self._drops(sparsity, traces, layer.index, weights)
                calibrate(layer, self.description() | {"ranks": {}}, drop)
            last = layer.advance()
        return streamed_perplexity(model, last.hidden, run.rows.labels)

    @allocate_stage
    def allocate(self, stats: dict[str, list[dict]], model: ModelFacts) -> dict[str, Any]:
        """Each mask's sparsity in each layer."""
        weights, traces = self.skippable(model), self._traces(stats)
        return {"drop": [self._drops(self.target, traces, index, weights) for index in range(model.num_layers)]}

    def _traces(self, stats: dict[str, list[dict]]) -> list[list[str]] | None:
        measured = stats.get(f"{self.name}.trace_greedy")
        return [layer["trace"] for layer in measured] if measured else None

    def _drops(
        self, sparsity: float, traces: list[list[str]] | None, index: int, weights: dict[str, int]
    ) -> dict[str, float]:
        if traces is None:
            return dict.fromkeys(weights, sparsity)
        from kit.convert.sparsity_search import read_trace

        return read_trace(traces[index], weights, sparsity)

    @layer_stage
    def sparsify(self, layer: Layer) -> dict[str, float]:
        """Calibrate the layer's masks in the order in which it runs, on what the sparse layers before it give."""
        from kit.convert.thresholds import calibrate

        return calibrate(layer, self.description(), self.allocation["drop"][layer.index], self.factors)
