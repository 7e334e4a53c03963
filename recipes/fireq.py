"""FireQ (arXiv:2505.20839): INT4 weights, FP8 activations, an INT4 cache; with better rounding than the paper's.

The method moves outliers to where the number formats can hold them, at no cost when the model runs, then rounds:

1. `rotate_residual` (opt-in): a Hadamard rotation of the residual stream, folded into weights.
2. `measure_sensitivity`, `choose_formats` (with a bits budget): what each linear's rounding does to its layer's output;
   the worst get FP8 weights.
3. `quantize`, layer by layer, on the outputs of the layers quantized before it:
   - value rotation: each head's v rows and o columns times a Hadamard matrix;
   - channel scaling: input channels of a linear times s = 1 / mean|W|, the producer's outputs over s (section 3.2);
   - RoPE-aware scaling (section 3.3): keys over s, queries times s, one s for the two channels that RoPE rotates
     into each other; after RoPE, opt-in, the largest channels too;
   - rounding: clipping search, GPTQ with the FP8 rounding of the inputs in its second moment, then in turn scales
     fitted to codes and coordinate descent over codes.
4. `round_head` (opt-in): the output head in INT8.
5. `tune` (opt-in): scales and norm gains trained on the whole model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from kit.convert.errors import ExitCode, KitError
from kit.convert.formats import WeightFormat, kv_scheme, quantization_config, refusals
from kit.convert.names import hub_names, spellings
from kit.convert.recipe import (
    Layer,
    ModelFacts,
    PlanItem,
    Recipe,
    RecipeConfig,
    Stage,
    Suitability,
    TrainConfig,
    TrainRun,
    allocate_stage,
    layer_stage,
    prepare_stage,
    train_stage,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kit.convert.covariance import Moment, RoutedTokens
    from kit.convert.stats import ModelStats
    from kit.convert.streaming import TensorView

ADVISED_BITS = 4.5  # a weight, scales included: room for some linears in FP8
OUTLIER = 2  # times the mean error: a linear that the advice would rather keep in FP8
HEAD_ROWS = 8192  # rows of the output head rounded at a time
KV_SAMPLES = 2048  # tokens a layer on which the scales of keys are chosen
SENSITIVITY_ROWS = 4
EXPONENTS = ((0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.25, 0.5), (0.5, 0.5), (0.25, 0.0), (0.5, 0.0), (0.75, 0.25))


class KvConfig(BaseModel):
    """The cache of keys and values."""

    model_config = ConfigDict(extra="forbid")

    bits: Literal[4] | None = Field(4, description="Bits of a cached number; null keeps the cache in 16 bits.")
    symmetric: bool = Field(False, description="No zero points in the cache (the paper's form).")
    pre_rope: bool = Field(True, description="Scale key channels before RoPE, folded into k_proj and q_proj.")
    post_rope_channels: int = Field(0, ge=0, description="Scale so many key channels a head after RoPE, at run time.")
    center: bool = Field(True, description="Take the mean key from all keys at run time: softmax does not see it.")
    rotate: bool = Field(True, description="Hadamard rotation of queries and keys after RoPE, at run time.")
    window: int = Field(128, ge=0, description="A query reads so many latest keys and values in 16 bits; 0: none.")
    shape: bool = Field(
        True,
        description="Noise-shaped codes: rounding errors go where queries and the output projection see them least.",
    )


class GptqConfig(BaseModel):
    """Error compensation."""

    model_config = ConfigDict(extra="forbid")

    damp: float = Field(0.1, gt=0, le=10, description="Added to the diagonal of H, as a share of its mean.")
    act_order: bool = Field(True, description="Round the most important inputs first; groups stay in place.")
    block_size: int = Field(128, ge=1, description="Columns updated at a time.")
    sequential: bool = Field(True, description="Statistics of o, gate/up and down see the linears rounded before them.")
    match_original: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Share by which weights first move to give the original outputs on the quantized inputs.",
    )
    weigh_tokens: bool = Field(True, description="Count an error relative to the residual stream that it is added to.")
    fit_scales: bool = Field(True, description="Fit group scales to the codes by least squares afterwards.")
    sweeps: int = Field(
        2, ge=0, description="Then so often: coordinate descent over the codes (and scales fitted to them again)."
    )


class TuneConfig(TrainConfig):
    """Group scales and norm gains, trained on the whole model to give the original's next-token distribution."""

    steps: int = Field(
        0, ge=0, description="Optimizer updates; 0 skips the stage, which keeps the whole model in memory."
    )
    batch_size: int = Field(2, ge=1, description="Rows of data an update.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate, relative to each scale and gain.")


class FireqConfig(RecipeConfig):
    """Options of the FireQ recipe."""

    recipe: Literal["fireq"] = Field("fireq", description="This recipe.")
    scheme: Literal["W4AFP8", "W4A16", "FP8"] = Field(
        "W4AFP8", description="INT4 weights with FP8 or 16-bit inputs, or FP8 weights and inputs."
    )
    group_size: int | None = Field(
        None, ge=8, description="Inputs that share a scale. null: 128 where it divides, else 64, else the whole row."
    )
    zero_point: bool = Field(False, description="Asymmetric weights: a zero point a group.")
    signed_scales: bool = Field(
        True, description="A group's odd level, -8, may lie on the positive side (a negative scale)."
    )
    fp8_scales: bool = Field(
        False, description="Group scales in FP8 over a power of two, products by table: the paper's σ_FP8 kernel."
    )
    clip: bool = Field(True, description="Search how far each group's grid reaches for the least squared error.")
    rounding: Literal["gptq", "rtn"] = Field("gptq", description="GPTQ error compensation, or round to nearest.")
    gptq: GptqConfig = Field(default_factory=GptqConfig, description="Options of GPTQ.")
    tune: TuneConfig = Field(default_factory=TuneConfig, description="Training of scales and gains at the end.")
    scaling: Literal["none", "channel", "search"] = Field(
        "channel", description="Input channel scaling: none, 1 / mean|W| (the paper's), or the best of a few exponents."
    )
    rotate_values: bool = Field(True, description="Try a Hadamard rotation of each head's values, folded into v and o.")
    rotate_residual: bool = Field(
        False, description="Hadamard rotation of the residual stream; rewrites the embedding and unties the head."
    )
    kv: KvConfig = Field(default_factory=KvConfig, description="The cache of keys and values.")
    query: Literal["fp8"] | None = Field("fp8", description="Round queries to FP8; null keeps them in 16 bits.")
    head: Literal["int8"] | None = Field(
        None, description="Round the output head to INT8, its inputs in 16 bits; it is untied from the embedding."
    )
    ignore: list[str] = Field(
        default_factory=list, description="Linears that stay as they are: names, or regular expressions behind re:."
    )
    bits_budget: float | None = Field(
        None, gt=4, lt=9, description="Bits a weight on average, scales included; what is left over buys FP8 linears."
    )
    format: Literal["compressed-tensors", "kit"] = Field(
        "compressed-tensors", description="The standard; or ours, whose code travels along, so that the cache does too."
    )
    target: Literal["any", "transformers", "vllm"] = Field("any", description="Engine that has to take the result.")

    @field_validator("ignore")
    @classmethod
    def _are_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from error
        return patterns

    @model_validator(mode="after")
    def _fits_together(self) -> FireqConfig:
        if self.bits_budget is not None and (self.scheme == "FP8" or self.rotate_residual):
            raise ValueError("bits_budget goes with INT4 schemes and without rotate_residual")
        if self.fp8_scales and (self.zero_point or self.scheme != "W4AFP8"):
            raise ValueError("fp8_scales goes with scheme W4AFP8 and without zero_point")
        return self


@dataclass(frozen=True)
class Site:
    """Linears that read the same input, and what produces it: a norm, or the rows of another linear.

    Attributes:
        linears: their names in the layer.
        producer: its name in the layer.
        expert: the number of the expert that they belong to; its input is what the router sends to it.
    """

    linears: tuple[str, ...]
    producer: str
    expert: int | None = None

    @property
    def reads_norm(self) -> bool:
        """Whether it opens a block; the others close one, and write to the residual stream."""
        return self.producer.endswith("layernorm")

    @property
    def recorded(self) -> str | None:
        """The module at which its input is recorded in the original model; an expert's is computed from that."""
        if self.expert is None:
            return self.linears[0]
        return "mlp.experts" if self.reads_norm else None

    @property
    def router(self) -> str | None:
        """What reads the same input and stays in 16 bits."""
        return "mlp.gate" if self.expert is not None and self.reads_norm else None


NORMS = ("input_layernorm", "post_attention_layernorm")
ATTENTION = (
    Site(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), NORMS[0]),
    Site(("self_attn.o_proj",), "self_attn.v_proj"),
)


def sites_of(model: ModelFacts, index: int) -> tuple[Site, ...]:
    """What is quantized in a layer, in the order in which it runs: attention, then the MLP, or each expert's."""
    experts = range(experts_of(model, index))
    paths: dict[int | None, str] = {number: f"mlp.experts.{number}" for number in experts} or {None: "mlp"}
    sites = list(ATTENTION)
    for number, path in paths.items():
        sites.append(Site((f"{path}.gate_proj", f"{path}.up_proj"), NORMS[1], number))
        sites.append(Site((f"{path}.down_proj",), f"{path}.up_proj", number))
    return tuple(sites)


def experts_of(model: ModelFacts, index: int) -> int:
    """How many experts a layer has; 0 if it has one MLP."""
    name = f"model.layers.{index}.mlp.experts.{{}}.gate_proj.weight"
    return sum(1 for _ in takewhile(lambda number: name.format(number) in model.shapes, count()))


def linears_of(model: ModelFacts, index: int) -> list[str]:
    """The linears of `sites_of`, by their names in the layer."""
    return [name for site in sites_of(model, index) for name in site.linears]


class Fireq(Recipe):
    """INT4 weights, FP8 activations and an INT4 cache, in compressed-tensors' format."""

    name = "fireq"
    paper = "arXiv:2505.20839"
    config_class = FireqConfig
    families = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
    replaces_modules = True
    float32 = True
    base_model_relation = "quantized"
    ablation_note = (
        '"16-bit keys and values" leaves the cache unrounded; "weights only" leaves queries and inputs unrounded too.'
    )
    limits = (
        "Loaded by other readers than `kit.load`, weights are unpacked to 16 bits, and how keys are prepared for the "
        "INT4 cache (kit_cache.safetensors) is not applied. A loaded model cannot be trained further or saved again."
    )
    config: FireqConfig

    # ---- planning

    @property
    def bundle_entry(self) -> str | None:  # type: ignore[override]
        """Code travels only with our own format."""
        return "kit.modules.quantized" if self.config.format == "kit" else None

    def needs_data(self) -> bool:
        """Plain rounding looks at weights only."""
        c = self.config
        keys = c.kv.bits and (c.kv.pre_rope or c.kv.post_rope_channels or c.kv.center or c.kv.shape)
        trained = c.tune.steps > 0 or c.bits_budget is not None
        return c.rounding == "gptq" or c.scaling == "search" or bool(keys) or trained

    def active_stages(self) -> list[Stage]:
        """Rotation and the bits budget are opt-in."""
        left_out = set() if self.config.rotate_residual else {"rotate_residual"}
        if self.config.bits_budget is None:
            left_out |= {"measure_sensitivity", "choose_formats"}
        if not self.config.head:
            left_out.add("round_head")
        if not self.config.tune.steps:
            left_out.add("tune")
        return [stage for stage in self.stages() if stage.method not in left_out]

    def flops_per_parameter(self) -> float:
        """About four passes over the data."""
        return 2.0 * 4 * self.config.data.num_samples * self.config.data.seq_len if self.needs_data() else 100.0

    def plan(self, model: ModelFacts) -> list[PlanItem]:
        """Choose every linear's format; say what it costs and which engines take it.

        Raises:
            KitError: on a group size that does not divide, a pattern that matches nothing, a budget that is too
                small, a Hadamard matrix that is not known, or an engine (`target`) that would not take the result.
        """
        super().plan(model)
        if "quantization_config" in model.config:
            raise KitError(
                "the weights are already quantized",
                where="config.json: quantization_config",
                next_step="give the model that it was made from, in bfloat16, float16 or float32",
            )
        formats = self.formats(model)
        shapes = {name: model.shapes[f"{name}.weight"] for name in formats}
        config = self._quantization_config(model, formats)
        weights = sum(n * k for n, k in shapes.values())
        bits = sum(
            form.bits_per_weight(shapes[name]) * n * k for name, form in formats.items() for n, k in [shapes[name]]
        )
        if self.config.bits_budget is not None and bits / weights > self.config.bits_budget:
            raise KitError(
                f"INT4 alone takes {bits / weights:.3f} bits a weight, scales included",
                where=f"recipe {self.name}: bits_budget",
                next_step="raise the budget, or use a larger group_size",
                exit_code=ExitCode.USAGE,
            )
        self._check_head_dim(model.heads[2])
        items = []
        for form in dict.fromkeys(formats.values()):
            names = [name for name, other in formats.items() if other == form]
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            items.append(PlanItem(str(form), f"{len(names)} linears: {kinds}"))
        items.append(PlanItem("weights", f"{bits / weights:.3f} bits each, scales included; {self._inputs()}"))
        if experts := self._experts(model):
            items.append(PlanItem("experts", experts))
        if self.config.kv.bits:
            kind = "symmetric" if self.config.kv.symmetric else "with zero points"
            latest = f"; the latest {self.config.kv.window} tokens in 16 bits" if self.config.kv.window else ""
            items.append(PlanItem("cache", f"INT4 {kind}, a scale a token and head, two numbers a byte{latest}"))
        if self.config.head:
            untied = f"; untying it adds {self._head_size(model) / 1e6:,.1f} MB" if self._head_size(model) else ""
            items.append(PlanItem("head", f"{self._head_format()['lm_head']}, 16-bit inputs{untied}"))
        if self.config.rotate_residual:
            items.append(PlanItem("rotation", self._rotation_cost(model)))
        every = dict.fromkeys(self._linears(model)) | formats
        reasons = refusals(config, shapes, self.config.signed_scales, every)
        for engine, found in reasons.items():
            if found and self.config.target == engine:
                raise KitError(
                    f"{engine} would not take the result: {'; '.join(found)}",
                    where=f"recipe {self.name}: target",
                    next_step="change what the reasons name, or leave --target out",
                    exit_code=ExitCode.USAGE,
                )
            unpacked = "loads it (with compressed-tensors); unpacks to 16 bit, so no faster there"
            if experts and self.config.scheme != "W4A16":
                unpacked += "; inputs of experts stay in 16 bits"
            note = "; ".join(found) if found else {
                "transformers": unpacked,
                "vllm": "loads it; INT4-FP8 runs on Hopper only" if self.config.scheme == "W4AFP8" else "loads it",
            }[engine]  # fmt: skip
            items.append(PlanItem(f"for {engine}", f"no: {note}" if found else note))
        return items

    def _check_head_dim(self, head_dim: int) -> None:
        """Refuse rotations of heads that no known Hadamard matrix fits, and an odd number of cached channels."""
        kv = self.config.kv
        options = [
            *(["rotate_values=false"] if self.config.rotate_values and self.config.scheme != "FP8" else []),
            *(["kv.rotate=false"] if kv.bits and kv.rotate else []),
        ]
        if options:
            advice = f"add {' '.join('--set ' + option for option in options)}"
            _require_hadamard(head_dim, where="config.json: head_dim", next_step=advice)
        if kv.bits and head_dim % 2:
            raise KitError(
                f"an INT4 cache packs two numbers a byte, and heads of {head_dim} are odd",
                where="config.json: head_dim",
                next_step="add --set kv.bits=null",
                exit_code=ExitCode.USAGE,
            )

    def formats(self, model: ModelFacts) -> dict[str, WeightFormat]:
        """Each quantized linear's format, by its name in the model.

        Raises:
            KitError: if the group size does not divide, a linear is missing, or a pattern matches nothing.
        """
        ignored = dict.fromkeys(self.config.ignore, 0)
        words = hub_names(model.config)
        formats: dict[str, WeightFormat] = {}
        uneven: list[str] = []
        for name in self._linears(model):
            shape = model.shapes.get(f"{name}.weight")
            if shape is None or len(shape) != 2:
                raise KitError(
                    f"there is no '{name}.weight' to quantize",
                    where="config.json and the weights",
                    next_step="check that they belong together; projections must be separate linears",
                )
            called = {name, *spellings(name, words)}
            if matched := [pattern for pattern in ignored if any(_is_meant(name, pattern) for name in called)]:
                ignored.update(dict.fromkeys(matched, 1))
                continue
            group = self.config.group_size or next((size for size in (128, 64) if shape[1] % size == 0), None)
            if group and shape[1] % group:
                uneven.append(f"{name} has {shape[1]} inputs")
            formats[name] = WeightFormat(4, group, self.config.zero_point)
            if self.config.scheme == "FP8" or name in self.allocation.get("fp8", ()):
                formats[name] = WeightFormat(8)
        if uneven and self.config.scheme != "FP8":
            raise KitError(
                f"groups of {self.config.group_size} do not divide: {'; '.join(uneven[:7])}"
                + (f" and {len(uneven) - 7} more" if len(uneven) > 7 else ""),
                where=f"recipe {self.name}: group_size",
                next_step="use a size that divides, or leave it out: it is then chosen for each linear",
                exit_code=ExitCode.USAGE,
            )
        if not formats:
            raise KitError(
                "every linear is ignored: nothing is left to quantize",
                where=f"recipe {self.name}: ignore",
                next_step="leave some linears out of the patterns",
                exit_code=ExitCode.USAGE,
            )
        if unused := [pattern for pattern, hits in ignored.items() if not hits]:
            raise KitError(
                f"'{unused[0]}' matches no linear",
                where=f"recipe {self.name}: ignore",
                next_step="write a full name (model.layers.0.mlp.down_proj) or re: and an expression (re:.*down_proj)",
                exit_code=ExitCode.USAGE,
            )
        return formats

    def suits(self, stats: ModelStats, model: ModelFacts) -> Suitability | None:
        """1 - the relative output error of a linear by plain rounding, mean over linears.

        Of INT4 weights, of FP8 inputs, or of both (independent errors: squares add), as the scheme has it.
        """
        errors: dict[str, float] = {}
        for layer in stats.layers:
            for name, weight in layer.weights.items():
                int4 = 0.0 if self.config.scheme == "FP8" else weight.int4_output_error
                fp8 = 0.0 if self.config.scheme == "W4A16" else layer.input_of(name).fp8_error
                errors[f"{layer.index}.{name}"] = (int4**2 + fp8**2) ** 0.5
        mean = sum(errors.values()) / len(errors)
        worst = max(errors, key=errors.__getitem__)
        far = [name for name, error in errors.items() if error > OUTLIER * mean]
        advice = f" {len(far)} of {len(errors)} stand out: FP8 for such costs few bits." if far else ""
        return Suitability(
            score=max(0.0, 1 - mean),
            reason=(
                f"rounded to nearest ({self.config.scheme}), a linear's outputs are off by {mean:.1%} on average, by "
                f"{errors[worst]:.1%} at worst (layers.{worst}); calibration takes part of that away.{advice}"
            ),
            settings=(f"bits_budget={ADVISED_BITS}",) if far and self.config.scheme != "FP8" else (),
        )

    def build(self, model: ModelFacts) -> dict[str, Any]:
        """config.json with its quantization_config; a model_type of our own where the standard is left."""
        config = model.config | {"quantization_config": self._quantization_config(model, self.formats(model))}
        if self._own_head():
            config["tie_word_embeddings"] = False
        if self.config.format == "kit":
            prefix = config["architectures"][0].removesuffix("ForCausalLM")
            config |= {
                "model_type": f"kit_quantized_{model.model_type}",
                "architectures": [f"KitQuantized{prefix}ForCausalLM"],
            }
        return config

    def result_bytes(self, model: ModelFacts) -> int:
        """Packed linears, and everything else in 16 bits."""
        formats, bits = self.formats(model) | self._head_format(), 0.0
        for name, shape in model.shapes.items():
            count = 1
            for size in shape:
                count *= size
            form = formats.get(name.removesuffix(".weight"))
            bits += count * (form.bits_per_weight(shape) if form else 16)
        added = self._head_size(model) * (1 if self.config.head else 2) if self._own_head() else 0
        return int(bits / 8) + added

    def _quantization_config(self, model: ModelFacts, formats: dict[str, WeightFormat]) -> dict[str, Any]:
        c = self.config
        routers = [f"model.layers.{i}.mlp.gate" for i in range(model.num_layers) if experts_of(model, i)]
        extra: dict[str, Any] = {"query": c.query, "table": c.fp8_scales}
        if c.kv.bits:
            extra |= {"center": c.kv.center, "rotate": c.kv.rotate, "shape": c.kv.shape, "window": c.kv.window}
            extra["post_rope"] = c.kv.post_rope_channels > 0
        return quantization_config(
            formats | self._head_format(),
            untouched=[
                *([] if c.head else ["lm_head"]),
                *routers,
                *(name for name in self._linears(model) if name not in formats),
            ],
            fp8_inputs=c.scheme != "W4A16",
            kv=kv_scheme(model.heads[2], c.kv.symmetric) if c.kv.bits else None,
            extra=extra,
            method=c.format,
            words=hub_names(model.config),
        )

    def _linears(self, model: ModelFacts) -> list[str]:
        return [
            f"model.layers.{index}.{name}" for index in range(model.num_layers) for name in linears_of(model, index)
        ]

    def _experts(self, model: ModelFacts) -> str:
        """How many experts there are, and how many tokens each will see; nothing if there are none."""
        numbers = [number for index in range(model.num_layers) if (number := experts_of(model, index))]
        if not numbers:
            return ""
        text = f"{max(numbers)} in each of {len(numbers)} layers"
        if self.needs_data():
            tokens = self.config.data.num_samples * self.config.data.seq_len * model.config["num_experts_per_tok"]
            hidden = int(model.config["hidden_size"])
            text += f", {tokens // max(numbers):,} tokens each on average; below {hidden:,}, all tokens calibrate it"
        return text

    def _inputs(self) -> str:
        inputs = "16-bit inputs" if self.config.scheme == "W4A16" else "FP8 inputs, a scale a token"
        return inputs + (", FP8 queries" if self.config.query else "")

    def _own_head(self) -> bool:
        """Whether the output head becomes another matrix than the embedding."""
        return self.config.rotate_residual or self.config.head is not None

    def _head_format(self) -> dict[str, WeightFormat]:
        return {"lm_head": WeightFormat(8, integer=True)} if self.config.head else {}

    def _head_size(self, model: ModelFacts) -> int:
        """Numbers that untying the head adds."""
        tied = "lm_head.weight" not in model.shapes
        return int(model.config["vocab_size"]) * int(model.config["hidden_size"]) if tied else 0

    def _rotation_cost(self, model: ModelFacts) -> str:
        hidden = int(model.config["hidden_size"])
        where, advice = f"recipe {self.name}: rotate_residual", "leave the residual stream as it is"
        _require_hadamard(hidden, where=where, next_step=f"{advice} (rotate_residual=false)")
        added = 2 * self._head_size(model)
        return f"residual stream by a Hadamard matrix of {hidden}; untying the head adds {added / 1e6:,.1f} MB"

    # ---- stages, in order

    @prepare_stage
    def rotate_residual(self, view: TensorView) -> dict[str, Any]:
        """R1 for what lies outside the layers: embedding E Q, and the head with the final norm's gain folded in."""
        embedding = view.read("model.embed_tokens.weight").float()
        head = view.read("lm_head.weight").float() if "lm_head.weight" in view else embedding
        gain = view.read("model.norm.weight").float()
        rotation = self._residual_rotation(embedding.shape[1])
        view.write("model.embed_tokens.weight", embedding @ rotation)
        view.write("lm_head.weight", (head * gain) @ rotation)
        view.write("model.norm.weight", gain.new_ones(gain.shape))
        return {}

    @layer_stage(propagate="original")
    def measure_sensitivity(self, layer: Layer) -> dict[str, float]:
        """What rounding one linear to INT4 or FP8 does to the layer's output: ‖Δy‖² / ‖y‖², for each of them."""
        import copy

        import torch

        from kit.convert.streaming import Activations

        assert layer.inputs is not None
        few = slice(0, SENSITIVITY_ROWS)
        inputs = Activations(layer.inputs.hidden[few], layer.inputs.position_ids[few])
        plain = layer.model.advance(inputs).hidden.double()
        formats = self._in_layer(layer)
        errors: dict[str, float] = {}
        for name, form in formats.items():
            linear = layer.module.get_submodule(name)
            for kind in (form, WeightFormat(8)):
                _replace(layer.module, name, self._round(copy.deepcopy(linear), kind, None, name)[0])
                with torch.no_grad():
                    difference = layer.model.advance(inputs).hidden.double() - plain
                errors[f"{name} {kind.bits}"] = float(difference.square().sum() / plain.square().sum())
            _replace(layer.module, name, linear)
        return errors

    @allocate_stage
    def choose_formats(self, stats: dict[str, list[dict[str, float]]], model: ModelFacts) -> dict[str, Any]:
        """Spend the budget where a bit takes away most error: linears from INT4 to FP8, best ratio first."""
        assert self.config.bits_budget is not None
        formats = self.formats(model)
        shapes = {name: model.shapes[f"{name}.weight"] for name in formats}
        total = sum(n * k for n, k in shapes.values())
        spent = sum(formats[name].bits_per_weight(shape) * shape[0] * shape[1] for name, shape in shapes.items())
        wishes = []
        for index, errors in enumerate(stats[f"{self.name}.measure_sensitivity"]):
            for linear in linears_of(model, index):
                if (name := f"model.layers.{index}.{linear}") not in shapes:
                    continue
                n, k = shapes[name]
                price = (WeightFormat(8).bits_per_weight((n, k)) - formats[name].bits_per_weight((n, k))) * n * k
                wishes.append(((errors[f"{linear} 4"] - errors[f"{linear} 8"]) / price, price, name))
        chosen = []
        for _, price, name in sorted(wishes, reverse=True):
            if spent + price <= self.config.bits_budget * total:
                spent += price
                chosen.append(name)
        return {"fp8": sorted(chosen), "bits_per_weight": spent / total}

    @layer_stage(propagate="both")
    def quantize(self, layer: Layer) -> dict[str, Any]:
        """Fold scales and rotations, then round this layer's linears in the order in which they run."""
        import torch

        from kit.convert.covariance import RoutedTokens, input_moment, record_inputs, replayed_outputs
        from kit.kernels.int4_fp8 import round_activations
        from kit.modules.quantized import quantize_attention

        _check_finite(layer)
        options, sites = self.config.gptq, sites_of(layer.facts, layer.index)
        targets: dict[str, Tensor] = {}
        moments: dict[str, Moment] = {}
        weights: dict[str, Tensor] = {}
        routed: RoutedTokens | None = None
        with torch.no_grad():
            if self.config.rotate_residual:
                self._rotate_layer(layer.module, sites)
            if layer.inputs is not None:
                recorded = dict.fromkeys(site.recorded for site in sites if site.recorded)
                with _RecordedAttention(layer.module) as seen:
                    targets, layer.original_outputs = record_inputs(layer, [*recorded, NORMS[1]])
                weights = self._token_weights(targets.pop(NORMS[1]), layer.original_outputs.hidden, sites)
                moments, routed = self._original_moments(layer, sites, targets, weights)
            formats = self._in_layer(layer)
            metrics = self._fold(layer.module, sites, formats, moments, targets, layer.facts)
            quantization = self._quantization_config(layer.facts, self.formats(layer.facts))
            quantize_attention(layer.module, layer.model.model.config, quantization)
            if self.config.kv.bits and layer.inputs is not None:
                metrics |= self._encode_cache(layer.module.self_attn, seen, layer.facts)
            transform = round_activations if self.config.scheme != "W4A16" else None
            sequential = layer.inputs is not None and self.config.rounding == "gptq" and options.sequential
            replay: dict[str, Tensor] = {}
            entering: RoutedTokens | None = None
            for site in sites:
                first, names = site.linears[0], [name for name in site.linears if name in formats]
                moment = moments.get(first)
                if sequential and site.expert is None:
                    moment = input_moment(
                        layer,
                        first,
                        transform=transform,
                        targets=targets[first] if options.match_original else None,
                        weights=weights.get(first),
                        replay=replay,
                        keep=not site.reads_norm,
                    )
                    if moment.inputs is not None:
                        replay[first] = moment.inputs
                elif sequential and names:
                    if entering is None:
                        originals = targets["mlp.experts"] if options.match_original else None
                        routed = entering = RoutedTokens.of_layer(layer, replay, originals)
                    moment = entering.moment(first, transform=transform, weights=weights.get(first))
                for name in names:
                    linear, where = layer.module.get_submodule(name), f"layer {layer.index}: {name}"
                    rounded, metrics[f"{name} error"] = self._round(linear, formats[name], moment, where)
                    _replace(layer.module, name, rounded)
            if replay:
                layer.outputs = replayed_outputs(layer, replay)
            if routed is not None and (starved := routed.starved()):
                metrics["starved experts"] = {str(number): seen for number, seen in starved.items()}
                layer.progress.log(_few_tokens(layer.index, starved, routed.tokens))
            errors = [value for name, value in metrics.items() if name.endswith(" error")]
            metrics["error"] = sum(errors) / max(len(errors), 1)
        return metrics

    @prepare_stage
    def round_head(self, view: TensorView) -> dict[str, Any]:
        """Round the output head to INT8, one scale a token of the vocabulary; the embedding stays as it is."""
        import torch

        from kit.kernels.int4_fp8 import pack_int8

        weight = view.read("lm_head.weight" if "lm_head.weight" in view else "model.embed_tokens.weight")
        packed, scales, lost, power = [], [], 0.0, 0.0
        for part in weight.split(HEAD_ROWS):
            part = part.float()
            scale = (part.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16).float()
            scale = torch.where(scale == 0, 1.0, scale)
            codes = (part / scale).round().clamp(-128, 127)
            packed.append(pack_int8(codes.to(torch.int8)))
            scales.append(scale)
            lost += float((codes * scale - part).square().sum())
            power += float(part.square().sum())
        view.write("lm_head.weight_packed", torch.cat(packed))
        view.write("lm_head.weight_scale", torch.cat(scales))
        view.write("lm_head.weight_shape", torch.tensor(weight.shape))
        return {"lm_head": lost / max(power, 1e-30)}

    @train_stage
    def tune(self, run: TrainRun) -> dict[str, Any]:
        """Train group scales and norm gains, codes fixed, by KL(original ‖ quantized) of the next token.

        What is trained is relative, s = s₀ (1 + δ), so that one learning rate fits all. Roundings pass gradients
        straight through. (Scales end to end with fixed codes: EfficientQAT, arXiv:2407.11062, section 3.3, there with
        the next-token loss.)
        """
        import torch
        from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

        from kit.convert.rounding import Grid, round_scale
        from kit.convert.streaming import streamed_hidden
        from kit.convert.train import bf16_is_fast, fit
        from kit.modules.quantized import QuantizedLinear

        rows, device, model = run.rows, run.device, run.model
        with run.progress.task("fireq: outputs of the original", 1):
            original = run.original()
            teacher, head = streamed_hidden(original, rows.input_ids, rows.position_ids), original.head()
        trained: list[tuple[Any, str]] = []
        for module in list(model.modules()):
            if isinstance(module, QuantizedLinear):
                trained.append((module, "weight_scale"))
            elif isinstance(getattr(module, "weight", None), torch.nn.Parameter) and module.weight.ndim == 1:
                trained.append((module, "weight"))
        for module, name in trained:
            register_parametrization(module, name, _relative(getattr(module, name).detach()))

        def loss(batch: Tensor) -> Tensor:
            ids, positions = (x[batch].to(device) for x in (rows.input_ids, rows.position_ids))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16_is_fast(device)):
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            with torch.no_grad():
                expected = head(teacher[batch].to(device)).float().log_softmax(-1)
            found = logits.float().log_softmax(-1)
            return torch.nn.functional.kl_div(
                found.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="batchmean"
            )

        options = self.config.tune
        with run.progress.task("fireq: tune, steps", options.steps):
            losses = fit(
                [module.parametrizations[name].original for module, name in trained],
                loss,
                len(rows.input_ids),
                options,
                seed=self.config.seed,
                device=device,
                name="tune",
                progress=run.progress,
                checkpoint=run.state,
            )
        grid = Grid(None, fp8_scales=self.config.fp8_scales)
        for module, name in trained:
            remove_parametrizations(module, name, leave_parametrized=True)
            module.requires_grad_(False)
            found = getattr(module, name)
            int4 = name == "weight_scale" and module.int4
            found.copy_(round_scale(found, grid) if int4 else found.bfloat16())
        return {"losses": losses, "trained_parameters": sum(getattr(m, n).numel() for m, n in trained)}

    def _original_moments(
        self, layer: Layer, sites: tuple[Site, ...], targets: dict[str, Tensor], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Moment], RoutedTokens | None]:
        """Moments of inputs in the original model, by each site's first linear, as far as they are needed.

        Returns:
            The moments, and the tokens that the experts' are of.
        """
        from kit.convert.covariance import RoutedTokens, moment_of

        moments: dict[str, Moment] = {}
        routed: RoutedTokens | None = None
        every = self.config.scaling == "search" or self.config.rounding == "rtn" or not self.config.gptq.sequential
        for site in sites if every else ATTENTION[1:] if self.config.rotate_values else ():
            first = site.linears[0]
            if site.expert is None:
                moments[first] = moment_of(targets[first], weights.get(first), layer.device)
                continue
            routed = routed or RoutedTokens(layer, targets["mlp.experts"])
            moments[first] = routed.moment(first, weights=weights.get(first))
        return moments, routed

    def _token_weights(self, middle: Tensor, end: Tensor, sites: tuple[Site, ...]) -> dict[str, Tensor]:
        """What each token's error counts at o and down: 1 / ‖h‖², h the residual stream that it is added to.

        The next norm divides by ‖h‖. Without this the few tokens of massive activations decide everything.
        """
        found: dict[str, Tensor] = {}
        for block, hidden in (("self_attn.", middle), ("mlp.", end)):
            weight = 1 / hidden.float().square().mean(-1).clamp(min=1e-30)
            weight = weight / weight.mean()
            closing = [s for s in sites if not s.reads_norm and s.producer.startswith(block)]
            found |= {s.linears[0]: weight if s.expert is None else weight.flatten() for s in closing}
        return found if self.config.gptq.weigh_tokens else {}

    def _in_layer(self, layer: Layer) -> dict[str, WeightFormat]:
        """Formats of this layer's linears, by their names in the layer."""
        prefix = f"model.layers.{layer.index}."
        formats = self.formats(layer.facts)
        names = linears_of(layer.facts, layer.index)
        return {name: formats[prefix + name] for name in names if prefix + name in formats}

    # ---- folds

    def _residual_rotation(self, size: int) -> Tensor:
        """Q = D H: a Hadamard matrix behind random signs, the same for all layers."""
        import torch

        from kit.kernels.int4_fp8 import hadamard

        generator = torch.Generator().manual_seed(self.config.seed)
        signs = torch.randint(2, (size, 1), generator=generator) * 2.0 - 1.0
        return (signs * hadamard(size)).float()

    def _rotate_layer(self, module: Any, sites: tuple[Site, ...]) -> None:
        """R1 inside a layer: norm gains into what reads them, readers W Q, writers Qᵀ W."""
        gains = {name: module.get_submodule(name).weight for name in NORMS}
        rotation = self._residual_rotation(len(gains[NORMS[0]])).to(gains[NORMS[0]].device)
        reads = {name: gains[site.producer] for site in sites if site.reads_norm for name in site.linears}
        reads |= {site.router: gains[site.producer] for site in sites if site.router}
        for name, gain in reads.items():
            weight = module.get_submodule(name).weight
            weight.copy_((weight * gain) @ rotation)
        for gain in gains.values():
            gain.fill_(1.0)
        for linear in (module.get_submodule(site.linears[0]) for site in sites if not site.reads_norm):
            linear.weight.copy_(rotation.T @ linear.weight)
            if linear.bias is not None:
                linear.bias.copy_(rotation.T @ linear.bias)

    def _fold(
        self,
        module: Any,
        sites: tuple[Site, ...],
        formats: dict[str, WeightFormat],
        moments: dict[str, Moment],
        targets: dict[str, Tensor],
        facts: ModelFacts,
    ) -> dict[str, Any]:
        """Rotate values and scale input channels, all sites of a producer together; moments and targets follow.

        Returns:
            What was chosen.
        """
        chosen: dict[str, Any] = {}
        if self.config.scheme == "FP8":
            return chosen
        linears = {name for site in sites for name in site.linears}
        for producer in dict.fromkeys(site.producer for site in sites):
            readers = [site for site in sites if site.producer == producer]
            names = [name for site in readers for name in site.linears]
            if any(name not in formats for name in (*names, producer) if name in linears):
                continue  # something here stays as it is
            first = names[0]
            parts = [
                _Part([module.get_submodule(name).weight for name in site.linears], moments.get(site.linears[0]))
                for site in readers
            ]
            forms = [[formats[name] for name in site.linears] for site in readers]
            if producer == "self_attn.v_proj" and self.config.rotate_values:
                (part,) = parts
                rotated, values = self._rotated_values(module, part.moment, facts)
                rotate = (
                    part.moment is None
                    or self._best([rotated], forms, facts, heads=True)[0]
                    < (self._best(parts, forms, facts, heads=True)[0])
                )
                chosen["rotated values"] = float(rotate)
                if rotate:
                    part.weights[0].copy_(rotated.weights[0])
                    module.get_submodule(producer).weight.copy_(values)
                    if (bias := module.get_submodule(producer).bias) is not None:
                        bias.copy_(self._rotate_heads(bias[:, None], facts)[:, 0])
                    if rotated.moment is not None:
                        part.moment = moments[first] = rotated.moment
                    if first in targets:
                        _rotate_last(targets[first], facts.heads[2])
            if self.config.scaling == "none":
                continue
            heads = producer == "self_attn.v_proj"
            _, factor, chosen[f"{first} scaling"] = self._best(parts, forms, facts, heads=heads)
            if router := readers[0].router:  # by powers of two, so that it computes the same, bit for bit
                factor = factor.log2().round().exp2()
                module.get_submodule(producer).weight.div_(factor)
                module.get_submodule(router).weight.mul_(factor)
            else:
                factor = _divide_producer(module.get_submodule(producer), factor, facts)
            for weight in (weight for part in parts for weight in part.weights):
                weight.mul_(factor)
            for site, part in zip(readers, parts, strict=True):
                if part.moment is not None:
                    moments[site.linears[0]] = part.moment.scaled(1 / factor)
            if (recorded := readers[0].recorded) in targets:
                targets[recorded] /= factor.cpu()
        return chosen

    def _best(
        self, parts: list[_Part], forms: list[list[WeightFormat]], facts: ModelFacts, *, heads: bool
    ) -> tuple[float, Any, float]:
        """The channel scaling of least output error by plain rounding: (error, factor (K,), index of its exponents).

        Candidates are s = mean|x|^a / mean|W|^b; the paper's is a = 0, b = 1.

        Args:
            parts: what reads the channels: the weights of each site.
            forms: their formats.
            facts: of the model.
            heads: query heads that share a value head share their scales.
        """
        import torch

        from kit.convert.rounding import Grid, fit_grid, output_error, round_to_nearest

        shared = self._share_heads if heads else (lambda x, _: x)
        size = torch.stack([torch.cat([w.abs() for w in part.weights]).mean(0) for part in parts]).mean(0)
        size = shared(size, facts).clamp(min=1e-6 * float(size.mean()) + 1e-30)
        candidates: tuple[tuple[float, float], ...] = EXPONENTS
        moments = [part.moment for part in parts if part.moment is not None]
        if self.config.scaling != "search" or not moments:
            candidates = ((0.0, 1.0),) if self.config.scaling == "channel" else ((0.0, 0.0),)
            if not moments:
                return 0.0, _normalised(size ** -candidates[0][1]), 0.0
        active = torch.stack([moment.absolute / moment.tokens for moment in moments]).mean(0)
        active = shared(active, facts)
        active = active.clamp(min=1e-6 * float(active.mean()) + 1e-30)
        best: tuple[float, Any, float] | None = None
        for number, (a, b) in enumerate(candidates):
            factor, error = _normalised(active**a / size**b), 0.0
            for part, moment, each in zip(parts, moments, forms, strict=True):
                scaled = moment.scaled(1 / factor)
                for weight, form in zip(part.weights, each, strict=True):
                    if form.bits == 8:
                        continue
                    grid = Grid(form.group_size, form.zero_point, clip=False, signed=self.config.signed_scales)
                    target = weight * factor
                    rounded = round_to_nearest(target, *fit_grid(target, grid)).dequantize()
                    power = float(((weight @ moment.second) * weight).sum())
                    error += output_error(target, rounded, scaled.second) * power
            if best is None or error < best[0]:
                best = error, factor, float(number)
        assert best is not None
        return best

    def _rotate_heads(self, rows: Tensor, facts: ModelFacts) -> Tensor:
        """H times each head's rows of a (heads · D, K) matrix."""
        from kit.kernels.int4_fp8 import hadamard

        matrix = hadamard(facts.heads[2]).to(rows.device, rows.dtype)
        return (matrix @ rows.unflatten(0, (-1, facts.heads[2]))).flatten(0, 1)

    def _rotated_values(self, module: Any, moment: Moment | None, facts: ModelFacts) -> tuple[_Part, Any]:
        """o columns with the moment of o's input, and v rows, after each head's values are rotated (H is symmetric or
        not: v' = H v, so o' = o Hᵀ)."""
        from kit.convert.covariance import Moment

        o, v = module.self_attn.o_proj.weight, module.self_attn.v_proj.weight
        if moment is not None:
            second = self._rotate_heads(self._rotate_heads(moment.second, facts).T.contiguous(), facts)
            # E|x| of a rotated channel is not known; a Gaussian's is, from its second moment
            absolute = (second.diagonal() * moment.tokens * 2 / 3.141592653589793).clamp(min=0).sqrt()
            moment = Moment(second, absolute, moment.tokens)
        return _Part([self._rotate_heads(o.T.contiguous(), facts).T], moment), self._rotate_heads(v, facts)

    def _share_heads(self, x: Tensor, facts: ModelFacts) -> Tensor:
        """The mean of o's input channels (H · D) over the query heads that share a value head, spread out again."""
        heads, kv_heads, head_dim = facts.heads
        shared = x.view(kv_heads, heads // kv_heads, head_dim).mean(1, keepdim=True)
        return shared.expand(-1, heads // kv_heads, -1).reshape(-1)

    def _encode_cache(self, attention: Any, seen: _RecordedAttention, facts: ModelFacts) -> dict[str, float]:
        """Choose how keys and values are encoded: what costs the scores q·k least, by E q qᵀ and calibration keys.

        RoPE-aware scaling (section 3.3): before RoPE each rotary pair is divided by m^e, m its largest length over
        tokens and e searched (the paper: 1); after it, opt-in, the largest channels of each head and their partners
        are brought to the median size. Then the mean, and the noise shaping: for keys by E q qᵀ, for values by o_projᵀ
        o_proj.
        """
        import torch

        from kit.kernels.int4_fp8 import dequantize_kv, hadamard, quantize_kv, shaping_factor

        heads, kv_heads, head_dim = facts.heads
        half, options, encoder = head_dim // 2, self.config.kv, attention.quantization
        k, queries = seen.keys(), seen.query_moment()  # (G, T, D) and (G, D, D), after RoPE
        mean = k.mean(1) if options.center else torch.zeros_like(k[:, 0])
        rotation = hadamard(head_dim).to(k.device, k.dtype) if options.rotate else torch.eye(head_dim, device=k.device)

        def metric(scale: Tensor) -> Tensor:
            return rotation.T @ (queries / scale[:, :, None] / scale[:, None]) @ rotation

        def loss(scale: Tensor) -> float:
            keys = ((k - mean[:, None]) * scale[:, None]) @ rotation
            weights = metric(scale)
            shaping = shaping_factor(weights) if options.shape else (None, None)
            rounded = dequantize_kv(quantize_kv(keys[None], options.symmetric, *shaping), options.symmetric, k.dtype)[0]
            return float((((rounded - keys) @ weights) * (rounded - keys)).sum())

        pairs = (k[..., :half].square() + k[..., half:].square()).amax(1).sqrt()  # (G, D/2), m
        if shared := getattr(attention, "k_norm", None) is not None:  # one gain for all heads
            pairs = pairs.amax(0, keepdim=True).expand_as(pairs)
        pairs = pairs.clamp(min=1e-6 * float(pairs.max()) + 1e-30)
        exponents = (0.0, 0.25, 0.5, 0.75, 1.0) if options.pre_rope else (0.0,)
        scales = [_normalised(pairs**-exponent).repeat(1, 2) for exponent in exponents]
        losses = [loss(scale) for scale in scales]
        best = min(range(len(scales)), key=losses.__getitem__)
        found = {"key scaling": exponents[best], "key loss, unscaled": losses[0], "key loss": losses[best]}
        total = before = scales[best]
        if options.post_rope_channels:
            after = _after_rope((k - mean[:, None]) * before[:, None], options.post_rope_channels)
            if (lost := loss(before * after)) < losses[best]:
                total, found["key loss"] = before * after, lost
            encoder.key_scale.copy_(total / before)
        if options.center:
            encoder.key_mean.copy_(mean * before)
        if options.shape:
            o = attention.o_proj.weight.float().view(-1, kv_heads, heads // kv_heads, head_dim)
            for name, weights in (("key", metric(total)), ("value", torch.einsum("nghd,nghe->gde", o, o))):
                order, factor = shaping_factor(weights)
                getattr(encoder, f"{name}_order").copy_(order)
                getattr(encoder, f"{name}_factor").copy_(factor)
        _scale_key_rows(attention, before, shared, heads // kv_heads)
        return found

    # ---- rounding

    def _round(self, linear: Any, form: WeightFormat, moment: Moment | None, where: str) -> tuple[Any, float]:
        """Return the linear on its grid, and its relative output error (of its weight, without a moment)."""
        import torch

        from kit.convert.rounding import (
            Grid,
            Rounded,
            descend,
            fit_grid,
            fit_scales,
            follow_targets,
            gptq,
            output_error,
            round_to_nearest,
        )
        from kit.kernels.int4_fp8 import cast_fp8, pack_int4
        from kit.modules.quantized import QuantizedLinear

        weight = linear.weight.float()
        made = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            form.arguments(),
            self.config.scheme != "W4A16",
            self.config.fp8_scales and form.bits == 4,
        ).to(weight.device)
        if made.bias is not None:
            made.bias.copy_(linear.bias)
        second = torch.eye(len(weight[0]), device=weight.device) if moment is None else moment.second
        if form.bits == 8:
            scale = (weight.abs().amax(1, keepdim=True) / 448).to(torch.bfloat16).float()
            scale = torch.where(scale == 0, 1.0, scale)
            made.weight.copy_(cast_fp8(weight / scale))
            made.weight_scale.copy_(scale)
            return made, output_error(weight, made.dequantize(), second)
        options = self.config.gptq
        if moment is not None and moment.cross is not None and options.match_original:
            weight = weight + options.match_original * follow_targets(weight, second, moment.cross, options.damp)
        grid = Grid(
            form.group_size, form.zero_point, self.config.clip, self.config.signed_scales, self.config.fp8_scales
        )
        scale, zero = fit_grid(weight, grid, None if moment is None else moment.second.diagonal())
        if moment is None or self.config.rounding == "rtn":
            rounded = round_to_nearest(weight, scale, zero)
        else:
            try:
                rounded, _ = gptq(
                    weight,
                    second,
                    scale,
                    zero,
                    damp=options.damp,
                    act_order=options.act_order,
                    block_size=options.block_size,
                )
            except ValueError as error:
                raise KitError(
                    str(error), where=where, next_step="use more or other calibration text, or rounding=rtn"
                ) from error
            for sweep in range(options.sweeps + 1):
                if sweep:
                    rounded = descend(weight, rounded, second, damp=options.damp, block_size=options.block_size)
                if options.fit_scales:
                    rounded = Rounded(rounded.codes, fit_scales(weight, rounded, second, grid, options.damp), zero)
        made.weight_packed.copy_(pack_int4(rounded.codes))
        made.weight_shape.copy_(torch.tensor(weight.shape))
        made.weight_scale.copy_(rounded.scale)
        if rounded.zero_point is not None:
            made.weight_zero_point.copy_(pack_int4(rounded.zero_point.T).T)
        return made, output_error(weight, made.dequantize(), second)


@dataclass
class _Part:
    """What reads some channels: the weights (N, K) of a site, and the moment of its input."""

    weights: list[Any]
    moment: Moment | None


class _RecordedAttention:
    """While a layer runs: keys after RoPE of the first tokens, and the second moment of queries after RoPE.

    It stands in for the cache, so that transformers hands it the keys.
    """

    def __init__(self, module: Any) -> None:
        self.attention = module.self_attn
        self._keys: list[Tensor] = []
        self._moment: Any = 0.0
        self._heads = 1
        self._cos_sin: Any = None

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the attention layer calls as its cache's."""
        self._heads = k.shape[1]
        if sum(part.shape[1] for part in self._keys) < KV_SAMPLES:
            self._keys.append(k.float().transpose(0, 1).flatten(1, 2))
        return k, v

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        from kit.modules.cache import cache_argument

        self._cos_sin = kwargs["position_embeddings"]
        return args, {**kwargs, cache_argument(kwargs): self}

    def _see_queries(self, module: Any, args: Any, output: Tensor) -> None:
        import torch

        cos, sin = (x.unsqueeze(2).float() for x in self._cos_sin)
        q = output.unflatten(-1, (-1, cos.shape[-1])).flatten(2, -2).float()  # (B, T, H, D)
        first, second = q.chunk(2, dim=-1)
        q = (q * cos + torch.cat([-second, first], dim=-1) * sin).flatten(0, 1)
        self._moment = self._moment + torch.einsum("thd,the->hde", q, q)

    def __enter__(self) -> _RecordedAttention:
        source = getattr(self.attention, "q_norm", None) or self.attention.q_proj
        self._handles = [
            self.attention.register_forward_pre_hook(self._before, with_kwargs=True),
            source.register_forward_hook(self._see_queries),
        ]
        return self

    def __exit__(self, *args: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def keys(self) -> Tensor:
        """(G, T, D) fp32."""
        import torch

        return torch.cat(self._keys, dim=1)[:, :KV_SAMPLES]

    def query_moment(self) -> Tensor:
        """Σ q qᵀ over tokens and the query heads of each key/value head, (G, D, D) fp32."""
        return self._moment.unflatten(0, (self._heads, -1)).sum(1)


def _require_hadamard(size: int, *, where: str, next_step: str) -> None:
    """Refuse a size for which no Hadamard matrix is known; planning on powers of two does not load torch."""
    if size & (size - 1) == 0:
        return
    from kit.kernels.int4_fp8 import hadamard

    try:
        hadamard(size)
    except ValueError as error:
        raise KitError(str(error), where=where, next_step=next_step, exit_code=ExitCode.USAGE) from error


def _relative(start: Tensor) -> Any:
    """A parametrization p = start · (1 + δ), δ = 0 at first."""
    import torch

    class Relative(torch.nn.Module):
        def forward(self, delta: Tensor) -> Tensor:
            return start * (1 + delta)

        def right_inverse(self, value: Tensor) -> Tensor:
            return torch.zeros_like(value)

    return Relative()


def _rotate_last(x: Tensor, head_dim: int) -> None:
    """Rotate each head's part of the last dimension, in place: x Hᵀ."""
    from kit.kernels.int4_fp8 import hadamard

    matrix = hadamard(head_dim).to(x.device, x.dtype)
    x.copy_((x.unflatten(-1, (-1, head_dim)) @ matrix.T).flatten(-2))


def _after_rope(keys: Tensor, count: int) -> Tensor:
    """Scales (G, D), bf16 numbers, that bring the `count` largest channels of keys (G, T, D) to the median size."""
    import torch

    half = keys.shape[-1] // 2
    largest = keys.abs().amax(1)
    top = largest.topk(min(count, half), dim=-1).indices
    median = largest.median(dim=-1, keepdim=True).values
    scale = torch.ones_like(largest)
    for channels in (top, (top + half) % (2 * half)):
        scale.scatter_(1, channels, (median / largest.gather(1, channels).clamp(min=1e-30)).clamp(max=1.0))
    return scale.bfloat16().float()


def _scale_key_rows(attention: Any, scale: Tensor, shared: bool, queries_a_key: int) -> None:
    """Multiply keys with `scale` (G, D) and divide queries by it: in the gains of k_norm and q_norm, or in the rows."""
    if shared:
        attention.k_norm.weight.mul_(scale[0])
        attention.q_norm.weight.div_(scale[0])
        return
    for linear, factor in (
        (attention.k_proj, scale.flatten()),
        (attention.q_proj, 1 / scale.repeat_interleave(queries_a_key, dim=0).flatten()),
    ):
        linear.weight.mul_(factor[:, None])
        if linear.bias is not None:
            linear.bias.mul_(factor)


def _divide_producer(producer: Any, factor: Tensor, facts: ModelFacts) -> Tensor:
    """Divide what a norm or a linear puts out by `factor`; return the factor that was really taken out.

    A norm's gain stays a bf16 number, so that writing the file does not undo the fold by rounding.
    """
    import torch

    if producer.weight.ndim == 1:
        gain = producer.weight.clone()
        producer.weight.copy_((gain / factor).bfloat16())
        return torch.where(producer.weight == 0, 1.0, gain / producer.weight)
    rows = factor
    if len(factor) != len(producer.weight):  # o reads each value head once a query head
        heads, kv_heads, head_dim = facts.heads
        rows = factor.view(kv_heads, heads // kv_heads, head_dim)[:, 0].flatten()
    producer.weight.div_(rows[:, None])
    if producer.bias is not None:
        producer.bias.div_(rows)
    return factor


def _normalised(scale: Tensor) -> Tensor:
    """Divide by the geometric mean over the last dimension."""
    return scale / scale.log().mean(-1, keepdim=True).exp()


def _replace(module: Any, name: str, other: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, other)


def _is_meant(name: str, pattern: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name


def _few_tokens(index: int, starved: dict[int, int], tokens: int) -> str:
    """The warning that names starved experts and the tokens that each saw."""
    numbers, seen = (
        ", ".join(map(str, values[:-1])) + " and " * (len(values) > 1) + str(values[-1])
        for values in (list(starved), list(starved.values()))
    )
    experts = "experts" if len(starved) > 1 else "expert"
    return f"layer {index}: {experts} {numbers} saw {seen} of {tokens:,} tokens, and are calibrated on all of them too"


def _check_finite(layer: Layer) -> None:
    for name, tensor in layer.module.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise KitError(
                "a weight is NaN or infinite",
                where=f"model.layers.{layer.index}.{name}",
                next_step="download the checkpoint again, or ask its authors",
            )
