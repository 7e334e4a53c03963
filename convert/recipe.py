"""What a recipe is: a described config and an ordered list of stages.

A recipe is a class with a name, a pydantic config and methods marked as stages. The pipeline runs the stages in the
order in which they are written, so a recipe file reads top to bottom in the paper's order:

    class MyMethod(Recipe):
        '''One line: what it does.'''
        name = "my-method"
        config_class = MyConfig

        @layer_stage
        def fit_each_layer(self, layer: Layer) -> dict[str, float]: ...

Nothing here imports torch, so that listing and planning recipes is quick.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from kit.convert.data import DataConfig
from kit.convert.errors import KitError
from kit.families import Family, config_value, family_of

if TYPE_CHECKING:
    from kit.convert.checkpoint import Checkpoint
    from kit.convert.data import TokenRows
    from kit.convert.progress import Progress
    from kit.convert.stats import ModelStats
    from kit.convert.streaming import Activations, StreamedModel

StageKind = Literal["prepare", "layer", "search", "allocate", "train"]


class RecipeConfig(BaseModel):
    """Options that every recipe has. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    recipe: str = Field(description="Name of the recipe that these options are for.")
    seed: int = Field(0, description="Seed of data order, sampling and initialisation.")
    data: DataConfig = Field(default_factory=DataConfig, description="Calibration and training text.")


SAVE_EVERY = 25  # updates between two writes of a training's state


class TrainConfig(BaseModel):
    """One training loop: AdamW, linear warm-up, cosine decay to a tenth, gradient clipping."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(200, ge=0, description="Optimizer updates; 0 skips the stage.")
    batch_size: int = Field(8, ge=1, description="Rows of data an update.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="Share of the steps that warm up.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    micro_batch_size: int | None = Field(
        None, ge=1, description="Rows a forward pass; smaller saves memory, the update stays the same."
    )


@dataclass(frozen=True)
class Stage:
    """One step of a recipe: its kind, its method's name, and for layer stages what the next layer is fed."""

    kind: StageKind
    method: str
    propagate: Literal["original", "transformed", "both"] = "transformed"


def _mark(kind: StageKind, **options: Any) -> Callable:
    def decorate(function: Callable) -> Callable:
        function._kit_stage = Stage(kind, function.__name__, **options)  # type: ignore[attr-defined]
        return function

    return decorate


def prepare_stage(function: Callable) -> Callable:
    """Mark `method(self, view: TensorView)`: cross-layer folds, reading and writing tensors by name."""
    return _mark("prepare")(function)


def layer_stage(
    function: Callable | None = None, *, propagate: Literal["original", "transformed", "both"] = "transformed"
):
    """Mark `method(self, layer: Layer) -> dict[str, float]`: one decoder layer resident, changed in place.

    It returns metrics for the report; progress shows the last of them. `losses`, a number an update, are drawn.

    Args:
        function: the method.
        propagate: what the next layer is fed: this layer's outputs after the change, or those of the original model;
            "both" (recipes that replace modules) also hands over the original stream as `layer.original_inputs`.
    """
    decorate = _mark("layer", propagate=propagate)
    return decorate if function is None else decorate(function)


def allocate_stage(function: Callable) -> Callable:
    """Mark `method(self, stats: dict[str, list[dict]], model: ModelFacts) -> dict`: choices from layers' metrics."""
    return _mark("allocate")(function)


def search_stage(function: Callable) -> Callable:
    """Mark `method(self, run: SearchRun) -> dict`: choices (as of allocate stages) from running the streamed model."""
    return _mark("search")(function)


def train_stage(function: Callable) -> Callable:
    """Mark `method(self, run: TrainRun) -> dict[str, Any]`: the whole converted model, changed in place."""
    return _mark("train")(function)


@dataclass
class ModelFacts:
    """What planning knows of a model: config.json and the tensors' names and shapes, no weights."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelFacts:
        """Facts of an opened checkpoint."""
        return cls(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()})

    @property
    def model_type(self) -> str:
        """The architecture's name in config.json."""
        return str(self.config.get("model_type"))

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(config_value(self.config, "num_hidden_layers"))

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(config_value(self.config, "hidden_size"))

    @property
    def family(self) -> Family:
        """How the model names its parts."""
        return family_of(self.model_type)

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(map(prod, self.shapes.values()))

    @property
    def active_parameters(self) -> int:
        """Numbers that a token meets on its way: of a layer's experts, only those that the router picks for it."""
        experts = self.config.get("num_local_experts") or self.config.get("num_experts") or 1
        share = int(self.config.get("num_experts_per_tok") or 1) / int(experts)
        return int(sum(prod(shape) * (share if ".experts." in name else 1) for name, shape in self.shapes.items()))

    @property
    def heads(self) -> tuple[int, int, int]:
        """(query heads, key/value heads, head dim)."""
        heads = int(config_value(self.config, "num_attention_heads"))
        kv_heads = int(self.config.get("num_key_value_heads") or heads)
        return heads, kv_heads, int(self.config.get("head_dim") or self.hidden_size // heads)


@dataclass
class Layer:
    """One decoder layer in a layer stage.

    Attributes:
        index: which layer.
        module: the layer as the converted model has it, weights loaded; change it in place.
        original: the same layer of the model before this recipe, or None unless the stage propagates "original".
        inputs: hidden states that enter the layer, (N, T, hidden), with positions; None if the recipe needs no data.
        model: runs the layer on a batch: `model.forward(hidden, position_ids)`.
        original_model: the same for `original`.
        device: where the layer lives.
        progress: report steps and losses here.
        facts: the whole model's config and shapes before this recipe.
        original_inputs: what enters the layer in the model before this recipe (stages that propagate "both").
        original_outputs: set it to what leaves the untouched layer for those, if the stage ran it anyway.
        outputs: set it to what leaves the changed layer, if the stage knows it.
        state: file in which `fit(checkpoint=...)` keeps this layer's training, so that a killed one goes on.
    """

    index: int
    module: Any
    original: Any
    inputs: Activations | None
    model: StreamedModel
    original_model: StreamedModel | None
    device: str
    progress: Progress
    facts: ModelFacts
    original_inputs: Activations | None = None
    original_outputs: Activations | None = None
    outputs: Activations | None = None
    state: Path | None = None

    def advance(self) -> Activations:
        """Run all inputs through the layer that feeds the next one (once; the pipeline takes the same result)."""
        if self.outputs is None:
            assert self.inputs is not None
            self.outputs = (self.original_model or self.model).advance(self.inputs)
        return self.outputs


@dataclass
class TrainRun:
    """A train stage: change `model` in place (it must have no adapters left at the end), or hand over `changed`.

    Attributes:
        streamed: makes the converted model, one layer resident at a time.
        rows: the calibration rows.
        device: where the model lives.
        progress: report steps and losses here.
        original: makes the model before this recipe, one layer resident at a time: a teacher.
        state: file in which `fit(checkpoint=...)` keeps a training, so that a killed one goes on where it was.
        changed: where the stage does without `model`: the tensors that it changed, layer by layer, by full name.
    """

    streamed: Callable[[], StreamedModel]
    rows: TokenRows
    device: str
    progress: Progress
    original: Callable[[], StreamedModel]
    state: Path
    changed: Iterator[dict[str, Any]] | None = None

    @cached_property
    def model(self) -> Any:
        """The whole converted model, in memory from here on."""
        return self.streamed().resident()


@dataclass
class SearchRun:
    """The model before this recipe, for a search stage: any layer may be changed while it is resident.

    Attributes:
        rows: the calibration rows.
        device: where resident layers live.
        progress: report steps here.
        model: makes the model before this recipe, one layer resident at a time.
        stats: what the layer stages so far have measured, as allocate stages get it.
        facts: the model's config and shapes.
    """

    rows: TokenRows
    device: str
    progress: Progress
    model: Callable[[], StreamedModel]
    stats: dict[str, list[dict]]
    facts: ModelFacts

    def layers(self, model: StreamedModel) -> Iterator[Layer]:
        """Make the layers of a model resident in turn; each gets what left the one before it (`layer.advance`)."""
        inputs = model.embed(self.rows.input_ids, self.rows.position_ids)
        for index in range(len(model)):
            with model.layer(index) as module:
                layer = Layer(index, module, None, inputs, model, None, self.device, self.progress, self.facts)
                yield layer
                inputs = layer.advance()


@dataclass
class PlanItem:
    """One line of a recipe's plan."""

    what: str
    value: str


@dataclass(frozen=True)
class Suitability:
    """A recipe's own judgement of a model that was measured on text (`kit inspect MODEL --stats`).

    Attributes:
        score: 0 to 1: the share of what the layers compute that the recipe's form keeps before any calibration or
            training, by the recipe's own measure. A heuristic that ranks; no forecast of perplexity.
        reason: the figures behind it, and what to watch, in a sentence or two.
        settings: options (`key=value`) that these figures call for.
    """

    score: float
    reason: str
    settings: tuple[str, ...] = ()


class Recipe(ABC):
    """A method: its config, what it asks of a model, its stages, and how its result is rebuilt from disk."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    command: ClassVar[str] = "convert"  # of `kit`, that runs it
    config_class: ClassVar[type[RecipeConfig]]
    families: ClassVar[tuple[str, ...]] = ()
    ablation_note: ClassVar[str] = ""  # for the card: what the ablation rows of its table are
    limits: ClassVar[str] = ""  # for the card: what the result cannot do
    when_too_large: ClassVar[str] = "use a machine with more memory"  # for a model that train stages cannot hold
    base_model_relation: ClassVar[Literal["finetune", "quantized", "adapter"]] = "finetune"  # on the hub
    bundle_entry: str | None = None  # module whose code travels with the checkpoint
    float32: ClassVar[bool] = False  # layer stages compute in float32 on a GPU too
    replaces_modules: ClassVar[bool] = (
        False  # layer stages get the layer as it was and leave the result's modules in it
    )

    def __init__(self, config: RecipeConfig) -> None:
        self.config = config
        self.allocation: dict[str, Any] = {}

    def set_batch_size(self, batch_size: int) -> None:
        """Use one batch size in every training loop of this recipe."""
        for name in type(self.config).model_fields:
            if isinstance(options := getattr(self.config, name), TrainConfig):
                options.batch_size = batch_size

    @classmethod
    def stages(cls) -> list[Stage]:
        """The marked methods, base classes first, in the order in which they are written."""
        found: dict[str, Stage] = {}
        for base in reversed(cls.__mro__):
            found |= {n: f._kit_stage for n, f in vars(base).items() if hasattr(f, "_kit_stage")}
        return list(found.values())

    def active_stages(self) -> list[Stage]:
        """The stages that this config runs (a stage of no steps may be left out)."""
        return self.stages()

    def plan(self, model: ModelFacts) -> list[PlanItem]:
        """Check everything that can fail cheaply and describe what will happen.

        Raises:
            KitError: if the model cannot be converted with this config.
        """
        kinds = ("ForCausalLM", "LMHeadModel")
        if not any(str(name).endswith(kinds) for name in model.config.get("architectures") or []):
            known = f" of one of: {', '.join(self.families)}" if self.families else ""
            raise KitError(
                "the model is no causal language model, or does not say so",
                where="config.json: architectures",
                next_step="convert a checkpoint whose architectures name a ...ForCausalLM or ...LMHeadModel class"
                + known,
            )
        if self.families and model.model_type not in self.families:
            raise KitError(
                f"recipe {self.name} does not know the architecture '{model.model_type}'",
                where="config.json: model_type",
                next_step=f"use one of: {', '.join(self.families)}; `kit recipes ls` lists other recipes",
            )
        return []

    def suits(self, stats: ModelStats, model: ModelFacts) -> Suitability | None:
        """Judge how well the recipe fits a model that was measured; None if the figures do not tell.

        Asked only of recipes whose `plan` takes the model.
        """
        return None

    def build(self, model: ModelFacts) -> dict[str, Any]:
        """Return the config.json of the result, from which its modules are rebuilt (with `allocation`)."""
        return model.config

    def build_for_calibration(self, model: ModelFacts) -> dict[str, Any]:
        """Return the config under which layers that are done feed the next ones, where the result's runs otherwise."""
        return self.build(model)

    def needs_data(self) -> bool:
        """Whether the stages look at text; without it layer stages have no `inputs` and train stages cannot run."""
        return True

    def stage_rows(self, stage: Stage, num_rows: int) -> int:
        """How many of the rows a layer stage looks at, where it needs fewer than the others."""
        return num_rows

    def result_bytes(self, model: ModelFacts) -> int | None:
        """Bytes of the written tensors, where the dtype does not say; None: every parameter takes the dtype's."""
        return None

    def new_parameters(self, model: ModelFacts) -> int:
        """How many parameters the recipe adds, for size estimates."""
        return 0

    def whole_model_bytes(self, stage: Stage, model: ModelFacts, bytes_each: int) -> float:
        """Memory of a stage that holds the whole model, activations apart; 0 if it does not.

        Args:
            stage: one of this recipe's.
            model: the model before this recipe.
            bytes_each: of a number in the dtype that stages compute in.
        """
        return bytes_each * (model.num_parameters + self.new_parameters(model)) if stage.kind == "train" else 0

    def streamed_bytes(self, stage: Stage, model: ModelFacts, bytes_each: int) -> float:
        """Memory that a stage takes beside the layers that are resident and the activations between them."""
        return 0

    def disk_bytes(self, stage: Stage, model: ModelFacts, bytes_each: int) -> tuple[float, float]:
        """Files of a stage in the work folder: what it leaves there until the end, and the most that it has there."""
        kept = 0.0
        if stage.kind == "train":
            kept = bytes_each * model.num_parameters
        elif stage.kind == "layer":
            kept = (self.result_bytes(model) or 0) if self.replaces_modules else 4 * self.new_parameters(model)
        return kept, kept

    def activations(self, stage: Stage, model: ModelFacts) -> int:
        """Numbers of activations that a stage holds at most, in memory or on disk.

        Of a layer: what enters and leaves it, what enters it in another model, and what enters and leaves its
        attention's heads.
        """
        if stage.kind not in ("layer", "search") or not self.needs_data():
            return 0
        heads, _, head_dim = model.heads
        return self.config.data.num_samples * self.config.data.seq_len * (4 * model.hidden_size + heads * head_dim)

    def flops_per_parameter(self) -> float:
        """Floating-point operations a model parameter, for the time estimate: two for each token of each pass."""
        return 2.0 * self.config.data.num_samples * self.config.data.seq_len
