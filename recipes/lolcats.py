"""LoLCATs (arXiv:2410.10254): attention transfer, then low-rank linearizing.

1. Every attention layer becomes a softmax window plus linear attention over what lies before it, under one denominator
   (Eq. 7; kernels/linear_attention). New parameters: feature maps φq, φk and the mixing factor g.
2. `attention_transfer` (Eq. 5): each layer's φ and g are trained until the hybrid gives the outputs of softmax
   attention, on the hidden states of the original model. Layers do not depend on each other, so they are streamed.
3. `low_rank_linearizing` (Eq. 6): LoRA on q, k, v and o with the next-token loss, merged at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kit.convert.errors import ExitCode, KitError
from kit.convert.inspect import cache_bytes
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
    layer_stage,
    train_stage,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kit.convert.stats import ModelStats


ENOUGH_MASS = 0.9  # of the attention in window and sinks; below it a wider window is advised
BALANCE_TOKENS = 1024  # of a row, for the starting value of g: the only T x T scores


class LoraTrainConfig(TrainConfig):
    """Low-rank linearizing: the training loop's options and the adapter's."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    rank: int = Field(8, ge=1, description="Rank of the LoRA adapters.")
    alpha: float = Field(16, gt=0, description="LoRA scale: the update is alpha / rank · B A.")
    target_modules: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"], description="Projections that get an adapter."
    )


class LolcatsConfig(RecipeConfig):
    """Options of the LoLCATs recipe."""

    recipe: Literal["lolcats"] = Field("lolcats", description="This recipe.")
    window_size: int = Field(64, ge=1, description="Keys a query sees through softmax, itself included.")
    feature_dim: int | None = Field(
        None, ge=1, description="Columns of a feature map; φ has twice as many features. None: the head dim."
    )
    feature_map_heads: Literal["kv", "query"] = Field(
        "kv",
        description="One key map and one state a key/value head (keeps GQA's savings) or a query head (as the paper).",
    )
    window_factor: float | None = Field(
        None, gt=0, lt=1, description="Starting value of the mixing factor g (paper: 0.1). None: balanced on the data."
    )
    linear_weight: float = Field(1.0, ge=0, description="Weight of the linear branch; 0 leaves window attention.")
    transfer: TrainConfig = Field(
        default_factory=lambda: TrainConfig(learning_rate=3e-2), description="Attention transfer, for each layer."
    )
    lora: LoraTrainConfig = Field(default_factory=LoraTrainConfig, description="Low-rank linearizing.")


class Lolcats(Recipe):
    """Softmax window + linear past in every attention layer; constant memory a token, linear time."""

    name = "lolcats"
    paper = "arXiv:2410.10254"
    config_class = LolcatsConfig
    families = ("llama", "mistral", "qwen2", "qwen3")
    bundle_entry = "kit.modules.modeling"
    ablation_note = (
        '"Window only", "linear only" and "attention zeroed" take a branch of the attention away from the converted '
        "model."
    )
    limits = (
        "The recurrent state cannot be rolled back: assisted decoding, prompt look-up and quantized caches are "
        "refused. Text far before the window is seen only through the linear branch; compare the rows above before "
        "you rely on long-range recall."
    )
    config: LolcatsConfig

    def active_stages(self) -> list[Stage]:
        """Stages with no steps are left out."""
        steps = {"attention_transfer": self.config.transfer.steps, "low_rank_linearizing": self.config.lora.steps}
        return [stage for stage in self.stages() if steps[stage.method]]

    def plan(self, model: ModelFacts) -> list[PlanItem]:
        """Check architecture, projections and their shapes; say what the cache will cost.

        Raises:
            KitError: on another architecture, or projections that do not have the shapes that config.json says.
        """
        super().plan(model)
        heads, kv_heads, head_dim = model.heads
        hidden = int(model.config["hidden_size"])
        outputs = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
        expected = {name: (size, hidden) for name, size in outputs.items()} | {"o_proj": (hidden, heads * head_dim)}
        for index in range(model.num_layers):
            for name, shape in expected.items():
                tensor = f"model.layers.{index}.self_attn.{name}.weight"
                if model.shapes.get(tensor) != shape:
                    raise KitError(
                        f"'{tensor}' should have shape {shape}, the file has {model.shapes.get(tensor, 'none')}",
                        where="config.json and the weights",
                        next_step="check that they belong together; q, k, v and o must be separate projections",
                    )
        if self.config.data.seq_len <= self.config.window_size and self.active_stages():
            raise KitError(
                f"rows of {self.config.data.seq_len} tokens never leave a window of {self.config.window_size}",
                where=f"recipe {self.name}: data.seq_len",
                next_step="use a seq_len of several windows, or a smaller window_size",
                exit_code=ExitCode.USAGE,
            )
        before, after = cache_bytes(model.config)["per_token"], cache_bytes(self.build(model))["constant"]
        return [
            PlanItem("converted", f"{model.num_layers} of {model.num_layers} attention layers"),
            PlanItem(
                "cache",
                f"{after / 1e6:,.2f} MB a sequence at any length (fp32 state, bf16 window); before: "
                f"{before / 1e3:,.1f} kB a token, as much at {after / max(before, 1):,.0f} tokens",
            ),
        ]

    def suits(self, stats: ModelStats, model: ModelFacts) -> Suitability | None:
        """Attention mass in the window and on the sinks, mean over layers: what lies elsewhere has to come through φ.

        The sinks count as kept, although they come through φ too: their keys do not depend on the query, so one feature
        can carry them. The configured window is taken if it keeps `ENOUGH_MASS`, else the narrowest measured one that
        does, else the widest.
        """
        masses = {w: m for w in stats.windows if w >= self.config.window_size and (m := stats.window_mass(w, True))}
        if not masses:
            return None  # the text is too short, or the model sees no further than such a window anyway
        means = {window: sum(mass) / len(mass) for window, mass in masses.items()}
        window = next((w for w, mean in means.items() if mean >= ENOUGH_MASS), max(means))
        near = stats.window_mass(window, False) or []
        worst = min(range(len(masses[window])), key=masses[window].__getitem__)
        wider = LolcatsConfig(**self.config.model_dump() | {"window_size": window})
        before, after = cache_bytes(model.config), cache_bytes(Lolcats(wider).build(model))["constant"]
        if not before["per_token"]:
            return None  # every layer has a window of its own: the cache is constant already
        break_even = max(after - before["constant"], 0) / before["per_token"]
        return Suitability(
            score=means[window],
            reason=(
                f"{means[window]:.0%} of the attention lies within {window} tokens and on the first {stats.num_sinks} "
                f"(layer {worst}: {masses[window][worst]:.0%}), {sum(near) / len(near):.0%} within {window} alone: the "
                "linear branch has to carry the sinks, and may lose the rest. The cache stays at "
                f"{after / 1e6:,.2f} MB a sequence, which is worth it beyond {break_even:,.0f} tokens."
            ),
            settings=() if window == self.config.window_size else (f"window_size={window}",),
        )

    def build(self, model: ModelFacts) -> dict[str, Any]:
        """config.json of the linearized model: the family's keys, ours, and transformers' cache layer types."""
        config, family = model.config, model.model_type
        prefix = config["architectures"][0].removesuffix("ForCausalLM")
        return config | {
            "model_type": f"kit_{family}",
            "architectures": [f"Kit{prefix}ForCausalLM"],
            "layer_types": ["hybrid_sliding"] * model.num_layers,
            "sliding_window": self.config.window_size,
            **({"use_sliding_window": True} if "use_sliding_window" in config or family.startswith("qwen") else {}),
            "linear_attention": {
                "feature_dim": self._feature_dim(model),
                "feature_map_heads": self.config.feature_map_heads,
                "window_factor": self.config.window_factor or 0.1,
                "linear_weight": self.config.linear_weight,
            },
        }

    def new_parameters(self, model: ModelFacts) -> int:
        """φq, φk and g of every layer."""
        heads, kv_heads, head_dim = model.heads
        key_maps = kv_heads if self.config.feature_map_heads == "kv" else heads
        return model.num_layers * ((heads + key_maps) * head_dim * self._feature_dim(model) + heads)

    def flops_per_parameter(self) -> float:
        """Teacher pass, attention-only steps (about a fifth of a pass each way), and LoRA steps."""
        row, active = self.config.data.seq_len, {stage.method for stage in self.active_stages()}
        flops = 0.0
        if "attention_transfer" in active:
            flops += (
                super().flops_per_parameter() + 0.6 * self.config.transfer.steps * self.config.transfer.batch_size * row
            )
        if "low_rank_linearizing" in active:
            flops += 4.5 * self.config.lora.steps * self.config.lora.batch_size * row
        return flops

    def _feature_dim(self, model: ModelFacts) -> int:
        return self.config.feature_dim or model.heads[2]

    @layer_stage(propagate="original")
    def attention_transfer(self, layer: Layer) -> dict[str, float]:
        """Train φ and g so that the hybrid's heads give softmax attention's outputs: 1000 · MSE before o_proj."""
        import torch
        import torch.nn.functional as F

        from kit.convert.train import fit
        from kit.modules.modeling import packed_segments

        with _recorded(layer.original.self_attn) as (inputs, targets):
            layer.advance()
        x, y = torch.cat(inputs), torch.cat(targets)
        assert layer.inputs is not None
        attention, rotary, positions = layer.module.self_attn, layer.model.base.rotary_emb, layer.inputs.position_ids

        def error(rows: Tensor) -> Tensor:
            hidden, where = x[rows].to(layer.device), positions[rows].to(layer.device)
            with _recorded(attention, detach=False) as (_, outputs):
                attention(
                    hidden_states=hidden,
                    position_embeddings=rotary(hidden, where),
                    attention_mask=None,
                    segment_ids=packed_segments(where),
                )
            return F.mse_loss(outputs[0].float(), y[rows].to(layer.device).float())

        def relative_error() -> float:
            rows = torch.arange(min(len(x), self.config.transfer.batch_size))
            with torch.no_grad():
                return float(error(rows) / y[rows].float().var())

        before = relative_error()
        if self.config.window_factor is None:
            rows = slice(self.config.transfer.batch_size)
            with torch.no_grad(), _queries_keys(attention) as seen:
                hidden, where = (t[rows, :BALANCE_TOKENS].to(layer.device) for t in (x, positions))
                attention(hidden_states=hidden, position_embeddings=rotary(hidden, where), attention_mask=None)
            _balance(attention, *seen[0])
        losses = fit(
            attention.linear_attention.parameters(),
            lambda rows: 1000 * error(rows),
            len(x),
            self.config.transfer,
            seed=self.config.seed + layer.index,
            device=layer.device,
            name="transfer",
            progress=layer.progress.silent(),
        )
        return {
            "loss_first": losses[0],
            "loss_last": sum(losses[-10:]) / len(losses[-10:]),
            "relative_error_before": before,
            "relative_error": relative_error(),
        }

    @train_stage
    def low_rank_linearizing(self, run: TrainRun) -> dict[str, Any]:
        """LoRA on the projections with the next-token loss; φ and g stay as they are; adapters are merged."""
        from peft import LoraConfig, get_peft_model

        from kit.convert.train import fit

        options = self.config.lora
        adapters = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=options.target_modules)
        model = get_peft_model(run.model, adapters).train()
        rows, device = run.rows, run.device
        labels = rows.labels

        def loss(batch: Tensor) -> Tensor:
            return model(
                input_ids=rows.input_ids[batch].to(device),
                position_ids=rows.position_ids[batch].to(device),
                labels=labels[batch].to(device),
                use_cache=False,
            ).loss

        trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        with run.progress.task("lolcats: low_rank_linearizing, steps", options.steps):
            losses = fit(
                trained,
                loss,
                len(rows.input_ids),
                options,
                seed=self.config.seed,
                device=device,
                name="lora",
                progress=run.progress,
                checkpoint=run.state,
            )
        model.eval()
        model.merge_and_unload()
        return {"losses": losses, "trained_parameters": sum(p.numel() for p in trained)}


def _balance(attention: Any, q: Tensor, k: Tensor) -> None:
    """Start g where the two branches have the masses that softmax gives them.

    Softmax puts exp(LSE_past) on the keys past the window and exp(LSE_window) on those in it; the hybrid puts φq·Σφk
    and g·exp(LSE_window). They agree, in the mean over queries, at log g = log φq·Σφk − LSE_past. Where a head attends
    to a far token with a large score (an attention sink), g is far below the paper's 0.1, and slow to learn.

    Args:
        attention: a linearized attention layer.
        q: (B, H, T, D) after RoPE.
        k: (B, G, T, D).
    """
    import torch

    from kit.kernels.linear_attention import hedgehog_feature_map

    hybrid = attention.linear_attention
    heads, window = q.shape[1], hybrid.window_size
    total = torch.zeros(heads, device=q.device)
    for row in range(len(q)):  # one row at a time: these are (H, T, T)
        keys = k[row].repeat_interleave(heads // k.shape[1], 0).float()
        past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(-window)
        scores = (q[row].float() @ keys.transpose(-1, -2)) * attention.scaling
        phi_q = hedgehog_feature_map(q[row, None], hybrid.feature_map_q)[0]
        maps = hybrid.feature_map_k.repeat_interleave(heads // hybrid.feature_map_k.shape[0], 0)
        similarity = phi_q @ hedgehog_feature_map(keys[None], maps)[0].transpose(-1, -2)
        log_linear = (similarity * past).sum(-1)[:, window:].log()
        log_softmax = scores.masked_fill(~past, -torch.inf).logsumexp(-1)[:, window:]
        total += (log_linear - log_softmax).mean(-1)
    hybrid.window_factor.copy_(torch.logit((total / len(q)).exp(), eps=1e-6))


@contextmanager
def _queries_keys(attention: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record q (B, H, T, D) and k (B, G, T, D), after RoPE."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = attention.linear_attention.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _recorded(attention: Any, detach: bool = True) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Record what enters an attention layer (B, T, hidden) and its heads' outputs before o_proj (B, T, H·D)."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    keep = (lambda x: x.detach().cpu()) if detach else (lambda x: x)
    hooks = [
        attention.register_forward_pre_hook(
            lambda _, args, kw: inputs.append(keep(kw["hidden_states"])), with_kwargs=True
        ),
        attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(keep(args[0]))),
    ]
    try:
        yield inputs, outputs
    finally:
        for hook in hooks:
            hook.remove()
