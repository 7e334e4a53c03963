"""What recipes share whose attention has to be learned: options, what trainings take, and which stages there are.

A recipe says which of these it runs with which options, beside `layer_sensitivity` of every linearizing recipe:

1. `attention_transfer`: each layer alone learns what softmax attention gives on the base's hidden states.
2. `logit_distillation`: the whole model learns the base's next-token distributions.
3. `low_rank_linearizing`: LoRA with the next-token loss.

A stage without steps is left out. The trainings themselves are in `kit.convert.linear_training`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kit.convert.linearize import Linearize, LinearizeConfig
from kit.convert.recipe import (
    SAVE_EVERY,
    Layer,
    ModelFacts,
    PlanItem,
    Stage,
    TrainConfig,
    TrainRun,
    layer_stage,
    train_stage,
)

if TYPE_CHECKING:
    from kit.convert.distill import LayerTeacher

STATE_BYTES = 12  # of a trained number in the state of a training: it and AdamW's two moments, fp32
TEACHER_TOKENS = 2**20  # of one pass of a cached teacher
SAVE_WHOLE_EVERY = 250  # updates of all weights between two writes of the state, three times the model in fp32


class WindowDropoutConfig(TrainConfig):
    """A training loop in which the softmax window can be left out, so that the linear branch learns to do without."""

    linear_steps: int = Field(0, ge=0, description="Of the steps, so many at the start train the linear branch alone.")
    window_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of the other passes without a window, at their start (arXiv:2510.05901)."
    )
    window_dropout_end: float | None = Field(
        None, ge=0, le=1, description="The share at the end; linear between. None: the same."
    )


class TransferConfig(WindowDropoutConfig):
    """Attention transfer: the training loop of each layer."""

    learning_rate: float = Field(3e-2, gt=0, description="Peak learning rate of AdamW.")
    loss: Literal["output", "weights"] = Field(
        "output",
        description="output: 1000 · squared error of the heads' outputs; weights: cross-entropy of attention weights.",
    )


class AdapterConfig(TrainConfig):
    """A training of LoRA adapters."""

    rank: int = Field(8, ge=1, description="Rank of the adapters.")
    alpha: float = Field(16, gt=0, description="LoRA scale: the update is alpha / rank · B A.")
    streamed: bool = Field(
        False,
        description="Adapters are trained with one layer's weights in memory: for models that do not fit. Slow: each "
        "update reads all weights twice.",
    )


class DistillConfig(WindowDropoutConfig, AdapterConfig):
    """Logit distillation: KL to the base's next-token distribution."""

    steps: int = Field(0, ge=0, description="Optimizer updates; 0 skips the stage.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate of AdamW.")
    new_learning_rate: float | None = Field(
        None, gt=0, description="That of what the base does not have: feature maps, gates, factors. None: the same."
    )
    parameters: Literal["all", "lora"] = Field(
        "all", description="all: every weight; lora: adapters on the attention's projections, and what is new."
    )
    compile: bool | None = Field(
        None,
        description="Run decoder layers through torch.compile: about half a minute, then faster steps. None: on a GPU, "
        "where training is long enough to win that back.",
    )
    teacher: Literal["live", "cached"] = Field(
        "live", description="live: the base runs beside the model; cached: it has run before, see top_k."
    )
    top_k: int = Field(
        64, ge=1, description="Of a cached teacher: likeliest tokens of each place on disk; one number for the others."
    )


class LoraTrainConfig(AdapterConfig):
    """Low-rank linearizing: the training loop's options and the adapter's."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    target_modules: list[str] | None = Field(
        None,
        description="Linears that get an adapter. None: the attention's projections, whatever the family calls them.",
    )


class LearnedConfig(LinearizeConfig):
    """Options of every recipe whose attention has to be learned."""

    feature_dim: int | None = Field(
        None, ge=1, description="Columns of a feature map; φ has twice as many features. None: the head dim."
    )
    feature_map_heads: Literal["kv", "query"] = Field(
        "kv",
        description="One key map and one state a key/value head (keeps GQA's savings) or a query head (as the papers).",
    )
    transfer: TransferConfig = Field(default_factory=TransferConfig, description="Attention transfer, for each layer.")
    distill: DistillConfig = Field(default_factory=DistillConfig, description="KL to the base's logits.")
    lora: LoraTrainConfig = Field(
        default_factory=lambda: LoraTrainConfig(steps=0), description="LoRA with the next-token loss."
    )


class LearnedLinearize(Linearize):
    """Base of the recipes whose attention has to be learned."""

    when_too_large = (
        "train adapters with one layer in memory: --set distill.parameters=lora --set distill.streamed=true "
        "--set lora.streamed=true; or leave stages out (distill.steps=0, lora.steps=0)"
    )
    config: LearnedConfig

    def section(self, model: ModelFacts) -> dict[str, Any]:
        """Feature maps."""
        return {"feature_dim": self._feature_dim(model), "feature_map_heads": self.config.feature_map_heads}

    def plan(self, model: ModelFacts) -> list[PlanItem]:
        """As every linearizing recipe; a LoRA stage must find what it adapts.

        Raises:
            KitError: on linears for LoRA that the model has not, beside what the other recipes raise.
        """
        items = super().plan(model)
        distill = self.config.distill
        if distill.steps and distill.streamed and distill.parameters == "all":
            raise self._usage(
                "all weights cannot be trained with one layer in memory: their gradients and moments do not fit",
                "distill.streamed",
                "add distill.parameters=lora, or leave distill.streamed at false",
            )
        if distill.steps and distill.streamed and distill.compile:
            raise self._usage(
                "layers that come and go cannot stay compiled",
                "distill.compile",
                "leave it out, or leave distill.streamed at false",
            )
        if size := self._teacher_bytes():
            items.append(PlanItem("teacher's logits", f"{size / 1e9:,.2f} GB on disk ({distill.top_k} a token)"))
        passes = [options for options in (distill, self.config.lora) if options.steps and options.streamed]
        if passes:
            each = 2 * 2 * model.num_parameters / 1e9
            items.append(
                PlanItem(
                    "streamed training", f"{sum(o.steps for o in passes):,} updates read {each:,.1f} GB each (bf16)"
                )
            )
        self._check_targets(model)
        return items

    def _check_targets(self, model: ModelFacts) -> None:
        """Refuse linears for LoRA that the model has not, or not in its layers where these alone are trained."""
        lora, family = self.config.lora, model.family
        place = f"{family.base}.{family.layers}." if lora.streamed else ""
        linears = [
            f".{name}"
            for name, shape in model.shapes.items()
            if len(shape) == 2 and name.startswith(place) and name.endswith(".weight")
        ]
        for target in (lora.steps and lora.target_modules) or ():
            if not any(name.endswith(f".{target}.weight") for name in linears):
                raise self._usage(
                    f"the model has no linear '{target}'{' in its layers' if place else ''}",
                    "lora.target_modules",
                    f"null takes all of the attention's: {', '.join((*family.projections, family.output))}",
                )

    def _feature_dim(self, model: ModelFacts) -> int:
        return self.config.feature_dim or model.heads[2]

    def layer_parameters(self, model: ModelFacts) -> int:
        """Parameters of a converted layer beside its feature maps."""
        return 0

    def new_parameters(self, model: ModelFacts) -> int:
        """φq, φk and the rest of every converted layer."""
        heads, kv_heads, head_dim = model.heads
        key_maps = kv_heads if self.config.feature_map_heads == "kv" else heads
        converted = self.kinds(model).count(self.mixer)
        maps = (heads + key_maps) * head_dim * self._feature_dim(model)
        return converted * (maps + self.layer_parameters(model))

    def _trained(self, stage: Stage, model: ModelFacts) -> tuple[int, int, int]:
        """What a train stage trains: numbers of the model's own, of adapters, and new ones."""
        new = self.new_parameters(model)
        if stage.method == "logit_distillation" and self.config.distill.parameters == "all":
            return model.num_parameters, 0, new
        distills = stage.method == "logit_distillation"
        options = self.config.distill if distills else self.config.lora
        adapters = options.rank * sum(sum(shape) for shape in self._adapted(stage, model))
        return 0, adapters, new if distills else 0

    def _adapted(self, stage: Stage, model: ModelFacts) -> list[tuple[int, ...]]:
        """Shapes of the weights that get an adapter."""
        names = self.config.lora.target_modules if stage.method == "low_rank_linearizing" else None
        names = names or [f"{model.family.attention}.{n}" for n in (*model.family.projections, model.family.output)]
        ends = tuple(f".{name}.weight" for name in names)
        return [shape for name, shape in model.shapes.items() if name.endswith(ends)]

    def _is_streamed(self, stage: Stage) -> bool:
        options = self.config.distill if stage.method == "logit_distillation" else self.config.lora
        return stage.kind == "train" and options.streamed

    def whole_model_bytes(self, stage: Stage, model: ModelFacts, bytes_each: int) -> float:
        """Weights; gradients and AdamW's moments (fp32) of what is trained; a copy of the base where it runs beside.

        Weights that are trained are fp32; where the model computes in less, it runs on rounded ones, whose gradients
        are all there before the first is made wide.
        """
        if stage.kind != "train" or self._is_streamed(stage):
            return 0
        own, adapters, new = self._trained(stage, model)
        copies = 2 * (bytes_each < 4) + (self.config.distill.teacher == "live")
        weights = (4 + bytes_each * copies) * own if own else bytes_each * model.num_parameters
        return weights + 4 * self.new_parameters(model) + 12 * (own + new) + 16 * adapters

    def streamed_bytes(self, stage: Stage, model: ModelFacts, bytes_each: int) -> float:
        """Of a streamed training: what enters each layer, what is trained with gradients and moments, and the head."""
        if not self._is_streamed(stage):
            return 0
        options = self.config.distill if stage.method == "logit_distillation" else self.config.lora
        _, adapters, new = self._trained(stage, model)
        tokens = options.batch_size * self.config.data.seq_len
        head = int(model.config["vocab_size"]) * model.hidden_size
        hidden = (model.num_layers + 3) * tokens * model.hidden_size
        return bytes_each * (hidden + head) + 16 * (adapters + new)

    def disk_bytes(self, stage: Stage, model: ModelFacts, bytes_each: int) -> tuple[float, float]:
        """Changed tensors stay; while they are made, so do the state of the training (twice while it is written anew),
        and what is kept of the teacher.
        """
        if stage.kind == "search":
            return 0, 0
        if stage.method == "attention_transfer":
            new = self.new_parameters(model)
            state = _state_bytes(
                new / max(self.kinds(model).count(self.mixer), 1), self.config.transfer.steps, SAVE_EVERY
            )
            return 4 * new, 4 * new + state
        own, adapters, new = self._trained(stage, model)
        kept = 4 * (own + new) + bytes_each * (sum(map(prod, self._adapted(stage, model))) if adapters else 0)
        trained = own + adapters + new
        if stage.method == "low_rank_linearizing":
            return kept, max(_state_bytes(trained, self.config.lora.steps, SAVE_EVERY), STATE_BYTES * trained + kept)
        state = max(_state_bytes(trained, self.config.distill.steps, SAVE_WHOLE_EVERY), STATE_BYTES * trained + kept)
        return kept, state + self._teacher_bytes()

    def _teacher_bytes(self) -> int:
        """Files of a cached teacher."""
        data, distill = self.config.data, self.config.distill
        tokens = data.num_samples * data.seq_len
        return tokens * (8 * distill.top_k + 4) if distill.steps and distill.teacher == "cached" else 0

    def activations(self, stage: Stage, model: ModelFacts) -> int:
        """Of attention transfer: what enters and leaves a layer and its attention; of a cached teacher: a layer."""
        if stage.method == "attention_transfer":
            heads, _, head_dim = model.heads
            rows = self.stage_rows(stage, self.config.data.num_samples)
            return rows * self.config.data.seq_len * (3 * model.hidden_size + heads * head_dim)
        if stage.method == "logit_distillation" and self.config.distill.teacher == "cached":
            data = self.config.data
            return 2 * min(data.num_samples * data.seq_len, max(TEACHER_TOKENS, data.seq_len)) * model.hidden_size
        return super().activations(stage, model)

    def flops_per_parameter(self) -> float:
        """Teacher pass, attention-only steps (about a fifth of a pass each way), and whole-model steps."""
        row, active = self.config.data.seq_len, {stage.method for stage in self.active_stages()}
        transfer, distill, lora = self.config.transfer, self.config.distill, self.config.lora
        flops = 0.0
        if "attention_transfer" in active:
            flops += 2.0 * self.config.data.num_samples * row + 0.6 * transfer.steps * transfer.batch_size * row
        if "logit_distillation" in active:
            cached = distill.teacher == "cached"
            each = (8 if distill.parameters == "all" else 6.5) - 2 * cached + 2 * distill.streamed
            flops += each * distill.steps * distill.batch_size * row
            flops += 2.0 * cached * self.config.data.num_samples * row
        if "low_rank_linearizing" in active:
            flops += (4.5 + 2 * lora.streamed) * lora.steps * lora.batch_size * row
        return flops

    def stage_rows(self, stage: Stage, num_rows: int) -> int:
        """Attention transfer takes no more rows than its steps need."""
        transfer = self.config.transfer
        needed = max(transfer.steps, 1) * transfer.batch_size
        return min(num_rows, needed) if stage.method == "attention_transfer" else num_rows

    def start(self, teacher: LayerTeacher) -> None:
        """Set parameters from data before a layer is trained, where a recipe does that."""

    @layer_stage(propagate="original")
    def attention_transfer(self, layer: Layer) -> dict[str, Any]:
        """Train what is new in a layer until its heads give softmax attention's outputs, or its weights."""
        from kit.convert.linear_training import transfer

        return transfer(layer, self.config.transfer, self.config.seed + layer.index, self.start)

    @train_stage
    def logit_distillation(self, run: TrainRun) -> dict[str, Any]:
        """Train the model on KL(base ‖ model) of the next token; the base is the model with all that is new off."""
        from kit.convert.linear_training import distill

        return distill(run, self.config.distill, self.config.seed, f"{self.name}: logit_distillation, steps")

    @train_stage
    def low_rank_linearizing(self, run: TrainRun) -> dict[str, Any]:
        """LoRA on the projections with the next-token loss; what is new stays as it is; adapters are merged."""
        from kit.convert.linear_training import low_rank

        return low_rank(run, self.config.lora, self.config.seed, f"{self.name}: low_rank_linearizing, steps")


def _state_bytes(trained: float, steps: int, save_every: int) -> float:
    """The most that the state of a training takes: the old one stays until the new one is written."""
    return STATE_BYTES * trained * (2 if steps > save_every else 1)
