"""What recipes share that replace softmax attention: which layers, and how they are built.

A recipe says what stands in for attention (`mixer`). Where layers are kept by measurement, the stage
`layer_sensitivity` says how much each of them matters to the logits. What has to be learned too is in
`kit.convert.learned`.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field

from kit.convert.errors import ExitCode, KitError
from kit.convert.inspect import cache_bytes
from kit.convert.recipe import ModelFacts, PlanItem, Recipe, RecipeConfig, SearchRun, Stage, TrainConfig, search_stage
from kit.families import TABLE

Layers = str | list[int] | None


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


def _steps(options: TrainConfig | None) -> int:
    return options.steps if options else 0


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
    window = model.family.sliding_window(model.config)
    windows = [window if kind == "sliding_attention" else None for kind in model.family.layer_types(model.config)]
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
