"""What recipes share that replace softmax attention: which layers, how they are built, and how they are trained.

A recipe says what stands in for attention (`mixer`) and which of these stages it runs with which options:

1. `layer_sensitivity`: how much each layer matters to the logits, where layers are kept by measurement.
2. `attention_transfer`: each layer alone learns what softmax attention gives on the base's hidden states.
3. `logit_distillation`: the whole model learns the base's next-token distributions.
4. `low_rank_linearizing`: LoRA with the next-token loss.

A stage without steps is left out.
"""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kit.convert.errors import ExitCode, KitError
from kit.convert.inspect import cache_bytes
from kit.convert.recipe import (
    Layer,
    ModelFacts,
    PlanItem,
    Recipe,
    RecipeConfig,
    SearchRun,
    Stage,
    TrainConfig,
    TrainRun,
    layer_stage,
    search_stage,
    train_stage,
)
from kit.families import TABLE, family_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from kit.convert.distill import LayerTeacher, WindowDropout
    from kit.convert.passes import Pass
    from kit.convert.teacher import CachedTeacher

    # what is trained, its loss as a function of row numbers, what is to be done when it is trained, and the ids of what
    # is new in it
    Training = tuple[list[Any], Callable[[Tensor], Tensor | Pass], Callable[[], Any], set[int]]

COMPILE_FROM = 1.2e16  # FLOP of a distillation that is worth compiling for: about two minutes of an H100
STATE_BYTES = 12  # of a trained number in the state of a training: it and AdamW's two moments, fp32
TEACHER_TOKENS = 2**20  # of one pass of a cached teacher
SAVE_EVERY = 250  # updates of all weights between two writes of the training's state, three times the model in fp32
Layers = str | list[int] | None


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


class LinearizeConfig(RecipeConfig):
    """Options of every recipe that replaces softmax attention."""

    window_size: int = Field(64, ge=3, description="Keys a query sees through softmax, itself and sinks included.")
    num_sinks: int = Field(4, ge=0, le=16, description="First tokens of a sequence that stay in the window for good.")
    keep_full: Layers = Field(
        None,
        description='Layers that keep softmax attention: a list, "25%" (the most sensitive), or "1/4" (every 4th).',
    )
    keep_window: Layers = Field(
        None, description='Layers that get the window alone: a list, or "25%" (the least sensitive).'
    )
    sensitivity_rows: int = Field(4, ge=1, description="Rows of data that layers' sensitivity is measured on.")


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


class Linearize(Recipe):
    """Base of the recipes that replace softmax attention.

    Attributes:
        mixer: what stands in for it; a kind of `kit.modules.linear_attention`.
    """

    families = tuple(TABLE)
    bundle_entry = "kit.modules.modeling"
    ablation_note = (
        '"Window only", "linear only" and "attention zeroed" take a branch of the attention away from the converted '
        'layers; "linear only" sees every key through φ, the near ones too.'
    )
    limits = (
        "The recurrent state cannot be rolled back: assisted decoding, prompt look-up and quantized caches are "
        "refused. Text far before the window is seen only through the linear branch; compare the rows above before "
        "you rely on long-range recall."
    )
    mixer: ClassVar[str]
    config: LinearizeConfig

    def active_stages(self) -> list[Stage]:
        """Stages with no steps, or nothing to choose, are left out."""
        steps = {
            "layer_sensitivity": int(any(_is_share(v) for v in (self.config.keep_full, self.config.keep_window))),
            "attention_transfer": _steps(getattr(self.config, "transfer", None)),
            "logit_distillation": _steps(getattr(self.config, "distill", None)),
            "low_rank_linearizing": _steps(getattr(self.config, "lora", None)),
        }
        if self.starts_from_data and any(steps.values()):
            steps["attention_transfer"] = 1
        return [stage for stage in self.stages() if steps.get(stage.method, 1)]

    @property
    def starts_from_data(self) -> bool:
        """Whether new parameters get starting values from data (`start`), where there is some for another stage."""
        return False

    def needs_data(self) -> bool:
        """Only if a stage is active."""
        return bool(self.active_stages())

    def kinds(self, model: ModelFacts) -> list[str]:
        """What each layer becomes; what is still to be measured counts as converted.

        Layers that have a sliding window of their own between others that have none stay as they are.

        Raises:
            KitError: if an option names layers that there are not, or the same one twice.
        """
        num_layers = model.num_layers
        full, window = (
            self.allocation[name] if name in self.allocation else self._listed(name, num_layers)
            for name in ("keep_full", "keep_window")
        )
        if both := set(full) & set(window):
            raise self._usage(f"layer {min(both)} cannot be both", "keep_window", "name each layer once")
        kinds = [self.mixer] * num_layers
        for layers, kind in ((window, "window"), (full, "full")):
            for index in layers:
                kinds[index] = kind
        return _with_sliding(model, kinds)

    def _listed(self, name: str, num_layers: int) -> list[int]:
        """The layers that an option names outright.

        Raises:
            KitError: if it cannot be read.
        """
        value: Layers = getattr(self.config, name)
        if value is None or _is_share(value):
            return []
        if isinstance(value, str):
            if name == "keep_full" and (period := re.fullmatch(r"1/([1-9]\d*)", value)):
                return list(range(int(period[1]) - 1, num_layers, int(period[1])))
            raise self._usage(
                f"'{value}' names no layers", name, "write a list such as [0,7,15], a share such as 25%, or 1/4"
            )
        if wrong := [index for index in value if not 0 <= index < num_layers]:
            raise self._usage(f"there is no layer {wrong[0]}", name, f"layers are 0 to {num_layers - 1}")
        return sorted(set(value))

    def _usage(self, problem: str, option: str, advice: str) -> KitError:
        where = f"recipe {self.name}: {option}"
        return KitError(problem, where=where, next_step=advice, exit_code=ExitCode.USAGE)

    def section(self, model: ModelFacts) -> dict[str, Any]:
        """The options in config.json beside layers and sinks."""
        return {}

    def cache_window(self, kinds: list[str]) -> int:
        """Keys that a query sees in the near window, itself included, in layers of these kinds.

        transformers caches one fewer.
        """
        return self.config.window_size - self.config.num_sinks

    def build(self, model: ModelFacts) -> dict[str, Any]:
        """config.json of the linearized model: the family's keys, ours, and transformers' cache layer types."""
        return self._built(model, self.kinds(model))

    def _built(self, model: ModelFacts, kinds: list[str]) -> dict[str, Any]:
        config, family = model.config, model.model_type
        kept = model.family.sliding_layers(config)
        types = {True: "sliding_attention", False: "full_attention"}
        near = self.cache_window(kinds)
        window = {"window_size": near} if any(kept) else {}
        return config | {
            "model_type": f"kit_{family}",
            "architectures": [f"Kit{model.family.prefix}ForCausalLM"],
            "layer_types": [
                types[own] if kind == "full" else "hybrid_sliding" for kind, own in zip(kinds, kept, strict=True)
            ],
            # one window for all of transformers' cache layers: beside layers that keep a wider one, ours keep as many
            "sliding_window": max(model.family.sliding_window(config) or 0, near) if any(kept) else near,
            **({"use_sliding_window": True} if "use_sliding_window" in config or family.startswith("qwen") else {}),
            "linear_attention": {
                "mixers": kinds,
                "num_sinks": self.config.num_sinks,
                "base_windows": _base_windows(model),
                **window,
                **self.section(model),
            },
        }

    def plan(self, model: ModelFacts) -> list[PlanItem]:
        """Check architecture, projections and their shapes, and options; say what the cache will cost.

        Raises:
            KitError: on another architecture, projections that do not have the shapes that config.json says, or
                options that do not fit.
        """
        super().plan(model)
        _check_projections(model)
        if self.config.num_sinks > self.config.window_size - 2:
            raise self._usage(
                f"{self.config.num_sinks} sinks leave no window of {self.config.window_size}",
                "num_sinks",
                "use a larger window_size, or fewer sinks",
            )
        if self.config.data.seq_len <= self.config.window_size and self.needs_data():
            raise KitError(
                f"rows of {self.config.data.seq_len} tokens never leave a window of {self.config.window_size}",
                where=f"recipe {self.name}: data.seq_len",
                next_step="use a seq_len of several windows, or a smaller window_size",
                exit_code=ExitCode.USAGE,
            )
        kinds, sliding = self.kinds(model), model.family.sliding_layers(model.config)
        free = [index for index, kind in enumerate(kinds) if not sliding[index] and kind == self.mixer]
        count = len(sliding) - sum(sliding)
        shares = [_share(value, count) for value in (self.config.keep_full, self.config.keep_window)]
        if sum(shares) > len(free):
            raise self._usage("more layers are kept than there are", "keep_full", "keep fewer layers")
        for index, kind in zip(free, ["full"] * shares[0] + ["window"] * shares[1], strict=False):
            kinds[index] = kind  # which ones they will be does not matter here
        window = kinds.count("window") * (self.mixer != "window")
        full = kinds.count("full")
        before = cache_bytes(model.config)["per_token"]
        after = cache_bytes(self._built(model, kinds))
        grows = f" and {after['per_token'] / 1e3:,.1f} kB a token" if after["per_token"] else ""
        saved = before - after["per_token"]
        at = f"as much at {after['constant'] / saved:,.0f} tokens" if saved > 0 else "never less"
        return [
            PlanItem("converted", f"{model.num_layers - full} of {model.num_layers} attention layers"),
            *([PlanItem("kept", f"{sum(sliding)} layers with a sliding window of their own")] if any(sliding) else []),
            *([PlanItem("window only", f"{window} of them")] if window else []),
            PlanItem(
                "cache",
                f"{after['constant'] / 1e6:,.2f} MB a sequence{grows or ' at any length'} (fp32 state, bf16 window); "
                f"before: {before / 1e3:,.1f} kB a token, {at}",
            ),
        ]

    def activations(self, stage: Stage, model: ModelFacts) -> int:
        """As of every recipe; the measurement of sensitivity carries a stream for each layer, on a few rows."""
        if stage.method != "layer_sensitivity":
            return super().activations(stage, model)
        rows = min(self.config.sensitivity_rows, self.config.data.num_samples)
        return (model.num_layers + 2) * rows * self.config.data.seq_len * model.hidden_size

    @search_stage
    def layer_sensitivity(self, run: SearchRun) -> dict[str, Any]:
        """Give each layer alone a window with sinks, and measure KL(base ‖ so changed) of the logits.

        One pass over the layers: at each of them all models that differ in an earlier one go on side by side.

        Returns:
            `sensitivity`: the KL of each layer, in nats a token; `keep_full`, `keep_window`: the layers chosen.
        """
        from kit.convert.sensitivity import window_sensitivity

        facts = run.facts
        sliding = facts.family.sliding_layers(facts.config)
        config = self._built(facts, _with_sliding(facts, ["window"] * facts.num_layers))
        rows = slice(self.config.sensitivity_rows)
        found = window_sensitivity(run, config, run.rows.input_ids[rows], run.rows.position_ids[rows], self.name)
        ranked = sorted((i for i in range(len(found)) if not sliding[i]), key=lambda index: -found[index])
        listed = self._listed("keep_window", len(found))
        free = [index for index in ranked if index not in listed]
        full = self._listed("keep_full", len(found)) or free[: _share(self.config.keep_full, len(ranked))]
        rest = [index for index in reversed(ranked) if index not in full]
        window = listed or rest[: _share(self.config.keep_window, len(ranked))]
        return {"sensitivity": found, "keep_full": sorted(full), "keep_window": sorted(window)}


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
        modules = [name.removesuffix(".weight") for name in model.shapes if name.endswith(".weight")]
        for target in (self.config.lora.steps and self.config.lora.target_modules) or ():
            if not any(f".{name}".endswith(f".{target}") for name in modules):
                raise self._usage(
                    f"the model has no '{target}'",
                    "lora.target_modules",
                    f"null takes all of the attention's: {', '.join((*model.family.projections, model.family.output))}",
                )
        return items

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

        Weights that are trained are fp32.
        """
        if stage.kind != "train" or self._is_streamed(stage):
            return 0
        own, adapters, new = self._trained(stage, model)
        copied = bool(own) and self.config.distill.teacher == "live"
        weights = 4 * own if own else bytes_each * model.num_parameters
        return weights + bytes_each * own * copied + 4 * self.new_parameters(model) + 12 * (own + new) + 16 * adapters

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
            state = _state_bytes(new / max(self.kinds(model).count(self.mixer), 1), self.config.transfer.steps, 25)
            return 4 * new, 4 * new + state
        own, adapters, new = self._trained(stage, model)
        kept = 4 * (own + new) + bytes_each * (sum(map(prod, self._adapted(stage, model))) if adapters else 0)
        trained = own + adapters + new
        if stage.method == "low_rank_linearizing":
            return kept, max(_state_bytes(trained, self.config.lora.steps, 25), STATE_BYTES * trained + kept)
        state = max(_state_bytes(trained, self.config.distill.steps, SAVE_EVERY), STATE_BYTES * trained + kept)
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
        from kit.convert.distill import LayerTeacher, WindowDropout
        from kit.convert.train import fit

        mixer = layer.model.attention(layer.module).linear_attention
        parameters = [] if mixer is None else list(mixer.parameters())
        if not parameters:
            return {}
        options, seed = self.config.transfer, self.config.seed + layer.index
        teacher = LayerTeacher(layer)
        before = teacher.relative_error(options.batch_size)
        dropout = WindowDropout(*_dropout(options), seed=seed)

        def loss(rows: Tensor) -> Pass:
            given = teacher.given(rows)
            packed = given["segment_ids"] is not None
            if options.loss == "weights":
                return dropout.passed(mixer, rows, teacher.weight_error, packed=packed, **given)
            error = lambda **given: 1000 * teacher.output_error(**given)  # noqa: E731
            return dropout.passed(mixer, rows, error, packed=packed, targets=teacher.targets[rows], **given)

        if options.linear_steps < options.steps or not options.steps:
            self.start(teacher)
        if not options.steps:
            return {"relative_error_before": before, "relative_error": teacher.relative_error(options.batch_size)}
        losses = fit(
            parameters,
            loss,
            len(teacher.inputs),
            options,
            seed=seed,
            device=layer.device,
            name="transfer",
            progress=layer.progress.silent(),
            checkpoint=layer.state,
            at_step=dropout.at_step,
        )
        return {
            "losses": losses,
            "loss_first": losses[0],
            "loss_last": sum(losses[-10:]) / len(losses[-10:]),
            "relative_error_before": before,
            "relative_error": teacher.relative_error(options.batch_size),
        }

    @train_stage
    def logit_distillation(self, run: TrainRun) -> dict[str, Any]:
        """Train the model on KL(base ‖ model) of the next token; the base is the model with all that is new off."""
        from kit.convert.distill import WindowDropout
        from kit.convert.teacher import CachedTeacher

        options, rows = self.config.distill, run.rows
        dropout = WindowDropout(*_dropout(options), seed=self.config.seed)
        teacher = None
        if options.teacher == "cached":  # before the model is in memory
            teacher = CachedTeacher(run.state)
            teacher.fill(run.original, rows, options.top_k, run.progress)
        make = self._streamed_distillation if options.streamed else self._resident_distillation
        trained, loss, finish, new = make(run, dropout, teacher)
        rate = options.new_learning_rate
        rates = None if rate is None else [rate if id(p) in new else options.learning_rate for p in trained]
        with (
            self._compiled(run, trained, loss),
            run.progress.task(f"{self.name}: logit_distillation, steps", options.steps),
        ):
            losses = _fit(run, trained, loss, options, self.config.seed, "distill", SAVE_EVERY, dropout.at_step, rates)
        finish()
        return {
            "losses": losses,
            "trained_parameters": sum(p.numel() for p in trained),
            "tokens": _tokens(options, rows),
        }

    def _compiled(self, run: TrainRun, trained: list[Any], loss: Callable[[Tensor], Any]) -> Any:
        """Context in which distillation runs: with compiled layers, if it is long enough for that."""
        from contextlib import nullcontext

        import torch

        from kit.convert.distill import compiled_layers
        from kit.convert.train import autocast

        options, device = self.config.distill, run.device
        wanted = options.compile
        if wanted is None and not options.streamed and device != "cpu":
            size = sum(p.numel() for p in run.model.parameters())
            wanted = 8.0 * size * _tokens(options, run.rows) > COMPILE_FROM
        if not wanted:
            return nullcontext()

        def attempt() -> None:
            made = loss(torch.arange(min(options.micro_batch_size or options.batch_size, len(run.rows.input_ids))))
            try:
                with autocast(device):
                    made.value(**{name: x.to(device) for name, x in made.inputs.items()}).backward()
            finally:
                for parameter in trained:
                    parameter.grad = None

        return compiled_layers(run.model, attempt, run.progress.log)

    def _resident_distillation(self, run: TrainRun, dropout: WindowDropout, teacher: CachedTeacher | None) -> Training:
        """Logit distillation with the whole model in memory."""
        from contextlib import nullcontext

        import torch

        from kit.convert.distill import logit_loss
        from kit.convert.teacher import TopLogits
        from kit.modules.linear_attention import Mixer

        options, model, rows = self.config.distill, run.model, run.rows
        new = [p for module in model.modules() if isinstance(module, Mixer) for p in module.parameters()]
        ours = {id(p) for p in new}
        base_weights, off, finish, run_in = None, nullcontext, _nothing, None
        if options.parameters == "lora":
            peft, trained = _with_adapters(model, options.rank, options.alpha, None)
            trained, off, finish = trained + new, peft.disable_adapter, peft.merge_and_unload
        else:
            run_in = model.dtype
            if teacher is None:
                base_weights = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in ours}
            trained = list(model.float().parameters())
        loss_of, predicting = logit_loss(model, base_weights, off, run_in), rows.predicting
        for parameter in trained:
            parameter.requires_grad_(True)

        def value(input_ids: Tensor, counts: Tensor, position_ids: Tensor | None = None, **known: Tensor) -> Tensor:
            return loss_of(input_ids, position_ids, counts, TopLogits(**known) if known else None)

        def loss(batch: Tensor) -> Pass:
            where = rows.position_ids[batch]
            packed = bool((where != torch.arange(where.shape[1])).any())
            inputs = {"input_ids": rows.input_ids[batch], "counts": predicting[batch]}
            inputs |= {"position_ids": where} if packed else {}
            inputs |= {} if teacher is None else teacher(batch)._asdict()
            return dropout.passed(model, batch, value, packed=packed, **inputs)

        return trained, loss, finish, ours

    def _streamed_distillation(self, run: TrainRun, dropout: WindowDropout, teacher: CachedTeacher | None) -> Training:
        """Logit distillation with one layer's weights in memory."""
        from kit.convert.distill import logit_kl, top_k_loss

        predicting = run.rows.predicting

        def compare_of(batch: Tensor) -> Any:
            counts = predicting[batch].to(run.device)
            known = None if teacher is None else teacher(batch)

            def compare(hidden: Tensor, head: Tensor, cap: float | None, base: Tensor | None) -> Tensor:
                if known is not None:
                    return top_k_loss(hidden, head, known, cap, counts)
                assert base is not None
                return logit_kl(hidden, head, base, head, cap, counts)

            return compare

        options = self.config.distill
        return _streamed(run, options, None, True, self.config.seed, compare_of, teacher is None, dropout)

    @train_stage
    def low_rank_linearizing(self, run: TrainRun) -> dict[str, Any]:
        """LoRA on the projections with the next-token loss; what is new stays as it is; adapters are merged."""
        options = self.config.lora
        trained, loss, finish, _ = (self._streamed_lora if options.streamed else self._resident_lora)(run)
        with run.progress.task(f"{self.name}: low_rank_linearizing, steps", options.steps):
            losses = _fit(run, trained, loss, options, self.config.seed, "lora")
        finish()
        return {"losses": losses, "trained_parameters": sum(p.numel() for p in trained)}

    def _resident_lora(self, run: TrainRun) -> Training:
        """LoRA with the whole model in memory."""
        options, rows, device = self.config.lora, run.rows, run.device
        model, trained = _with_adapters(run.model, options.rank, options.alpha, options.target_modules)
        labels = rows.labels

        def loss(batch: Tensor) -> Tensor:
            return model(
                input_ids=rows.input_ids[batch].to(device),
                position_ids=rows.position_ids[batch].to(device),
                labels=labels[batch].to(device),
                use_cache=False,
            ).loss

        def finish() -> None:
            model.eval()
            model.merge_and_unload()

        model.train()
        return trained, loss, finish, set()

    def _streamed_lora(self, run: TrainRun) -> Training:
        """LoRA with one layer's weights in memory."""
        from kit.convert.distill import top_k_loss
        from kit.convert.teacher import labels_as_teacher

        labels, predicting = run.rows.labels, run.rows.predicting

        def compare_of(batch: Tensor) -> Any:
            known, counts = labels_as_teacher(labels[batch]), predicting[batch].to(run.device)
            return lambda hidden, head, cap, _: top_k_loss(hidden, head, known, cap, counts)

        options = self.config.lora
        return _streamed(run, options, options.target_modules, False, self.config.seed, compare_of, False, None)


def _state_bytes(trained: float, steps: int, save_every: int) -> float:
    """The most that the state of a training takes: the old one stays until the new one is written."""
    return STATE_BYTES * trained * (2 if steps > save_every else 1)


def _nothing() -> None:
    """Leave a model as it is."""


def _streamed(
    run: TrainRun,
    options: AdapterConfig,
    targets: list[str] | None,
    mixers: bool,
    seed: int,
    compare_of: Callable[[Tensor], Any],
    teacher: bool,
    dropout: WindowDropout | None,
) -> Training:
    """What a `StreamedTraining` trains, its loss as a function of row numbers, and what is to be done at its end."""
    from contextlib import nullcontext

    from kit.convert.streamed_training import StreamedTraining

    rows = run.rows
    training = StreamedTraining(
        run.streamed(), rank=options.rank, alpha=options.alpha, targets=targets, mixers=mixers, seed=seed
    )

    def loss(batch: Tensor) -> Tensor:
        return training.loss(
            rows.input_ids[batch],
            rows.position_ids[batch],
            compare_of(batch),
            teacher=teacher,
            rows_at_once=options.micro_batch_size,
            branches=lambda layer: nullcontext() if dropout is None else dropout.applied(layer, batch),
        )

    def finish() -> None:
        run.changed = training.merged()

    return training.parameters, loss, finish, {id(p) for layer in training.mixers for p in layer.values()}


def _fit(
    run: TrainRun,
    trained: list[Any],
    loss: Callable[[Tensor], Tensor | Pass],
    options: AdapterConfig,
    seed: int,
    name: str,
    save_every: int | None = None,
    at_step: Callable[[int], None] | None = None,
    rates: list[float] | None = None,
) -> list[float]:
    """`fit` for a train stage: rows count by the predictions in them; a streamed loss splits its batch itself."""
    from kit.convert.train import SAVE_EVERY as OFTEN
    from kit.convert.train import fit

    return fit(
        trained,
        loss,
        len(run.rows.input_ids),
        options.model_copy(update={"micro_batch_size": None}) if options.streamed else options,
        seed=seed,
        device=run.device,
        name=name,
        progress=run.progress,
        row_weights=run.rows.predicting.sum(1),
        checkpoint=run.state,
        save_every=save_every or OFTEN,
        at_step=at_step,
        rates=rates,
    )


def _steps(options: TrainConfig | None) -> int:
    return options.steps if options else 0


def _dropout(options: WindowDropoutConfig) -> tuple[tuple[float, float], int, int]:
    """Arguments of `WindowDropout`: shares, steps, steps without any window."""
    end = options.window_dropout if options.window_dropout_end is None else options.window_dropout_end
    return (options.window_dropout, end), options.steps, options.linear_steps


def _tokens(options: TrainConfig, rows: Any) -> int:
    return options.steps * min(options.batch_size, len(rows.input_ids)) * rows.input_ids.shape[1]


def _with_adapters(model: Any, rank: int, alpha: float, targets: list[str] | None) -> tuple[Any, list[Any]]:
    """A model with LoRA adapters, and their parameters."""
    from peft import LoraConfig, get_peft_model

    family = family_of(model.config.model_type)
    targets = targets or [f"{family.attention}.{name}" for name in (*family.projections, family.output)]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=family.transposed)
    adapted = get_peft_model(model, config)
    return adapted, [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]


def _is_share(value: Layers) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value) is not None


def _share(value: Layers, num_layers: int) -> int:
    """How many layers a share is: 25% of 30 are 8."""
    return round(float(value[:-1]) / 100 * num_layers + 1e-9) if isinstance(value, str) and _is_share(value) else 0


def _with_sliding(model: ModelFacts, kinds: list[str]) -> list[str]:
    """The kinds, with layers kept that have a sliding window of their own."""
    sliding = model.family.sliding_layers(model.config)
    return ["full" if own else kind for kind, own in zip(kinds, sliding, strict=True)]


def _base_windows(model: ModelFacts) -> list[int | None] | None:
    """The sliding windows that the layers of a model have already; None if none has one."""
    config = model.config
    if not (window := model.family.sliding_window(config)):
        return None
    if any(sliding := model.family.sliding_layers(config)):
        return [window if own else None for own in sliding]
    first = (
        config.get("max_window_layers", 0) if model.model_type.startswith("qwen") else 0
    )  # those before see everything
    kinds = config.get("layer_types") or [
        "full_attention" if index < first else "sliding_attention" for index in range(model.num_layers)
    ]
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    return windows if any(windows) else None


def _check_projections(model: ModelFacts) -> None:
    """Refuse a model whose projections do not have the shapes that config.json says.

    Raises:
        KitError: naming the first.
    """
    family = model.family
    for index in range(model.num_layers):
        for name, shape in family.shapes(*model.heads, model.hidden_size).items():
            tensor = f"{family.base}.{family.layers}.{index}.{family.attention}.{name}.weight"
            if model.shapes.get(tensor) != shape:
                raise KitError(
                    f"'{tensor}' should have shape {shape}, the file has {model.shapes.get(tensor, 'none')}",
                    where="config.json and the weights",
                    next_step="check that they belong together; every layer must have "
                    + ", ".join((*family.projections, family.output)),
                )
