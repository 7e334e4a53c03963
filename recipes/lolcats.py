"""LoLCATs (arXiv:2410.10254): attention transfer, then low-rank linearizing.

1. Every attention layer becomes a softmax window plus linear attention over what lies before it, under one denominator
   (Eq. 7; kernels/linear_attention). The window holds the first tokens too (sinks). New parameters: feature maps φq, φk
   and the mixing factor g.
2. `attention_transfer` (Eq. 5): each layer's φ and g are trained until the hybrid gives the outputs of softmax
   attention, on the hidden states of the original model. Layers do not depend on each other, so they are streamed.
3. `low_rank_linearizing` (Eq. 6): LoRA on q, k, v and o with the next-token loss, merged at the end.
   `logit_distillation` is this library's addition: all weights, or LoRA, learn the base's logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kit.convert.inspect import cache_bytes
from kit.convert.learned import LearnedConfig, LearnedLinearize, LoraTrainConfig
from kit.convert.recipe import ModelFacts, PlanItem, Suitability

if TYPE_CHECKING:
    from torch import Tensor

    from kit.convert.distill import LayerTeacher
    from kit.convert.stats import ModelStats

ENOUGH_MASS = 0.9  # of the attention in window and sinks; below it a wider window is advised
BALANCE_TOKENS = 1024  # of a row, or two windows, for the starting value of g: the only T x T scores


class LolcatsConfig(LearnedConfig):
    """Options of the LoLCATs recipe."""

    recipe: Literal["lolcats"] = Field("lolcats", description="This recipe.")
    window_factor: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Starting value of the mixing factor g (paper: 0.1). None: balanced on the data of the stages that "
        "train or measure; 0.1 if there is none.",
    )
    linear_weight: float = Field(1.0, ge=0, description="Weight of the linear branch; 0 leaves window attention.")
    lora: LoraTrainConfig = Field(default_factory=LoraTrainConfig, description="Low-rank linearizing.")


class Lolcats(LearnedLinearize):
    """Softmax window with sinks + linear past in every attention layer; constant memory a token, linear time."""

    name = "lolcats"
    paper = "arXiv:2410.10254"
    config_class = LolcatsConfig
    mixer = "hybrid"
    config: LolcatsConfig

    def section(self, model: ModelFacts) -> dict[str, Any]:
        """Feature maps, and how the branches start."""
        return super().section(model) | {
            "window_factor": self.config.window_factor or 0.1,
            "linear_weight": self.config.linear_weight,
        }

    def plan(self, model: ModelFacts) -> list[PlanItem]:
        """As every linearizing recipe.

        Raises:
            KitError: if passes without a window would have no linear branch either, beside what the others raise.
        """
        items = super().plan(model)
        for name, options in (("transfer", self.config.transfer), ("distill", self.config.distill)):
            dropped = options.linear_steps or options.window_dropout or options.window_dropout_end
            if options.steps and dropped and not self.config.linear_weight:
                raise self._usage(
                    "passes without a window need the linear branch, which linear_weight=0 takes away",
                    name,
                    f"leave {name}.linear_steps and {name}.window_dropout at 0, or raise linear_weight",
                )
        return items

    def layer_parameters(self, model: ModelFacts) -> int:
        """The mixing factors."""
        return model.heads[0]

    def suits(self, stats: ModelStats, model: ModelFacts) -> Suitability | None:
        """Attention mass in the window and on the sinks, mean over layers: what lies elsewhere has to come through φ.

        The configured window is taken if it keeps `ENOUGH_MASS`, else the narrowest measured one that does, else the
        widest.
        """
        masses = {w: m for w in stats.windows if w >= self.config.window_size and (m := stats.window_mass(w, True))}
        if not masses:
            return None  # the text is too short, or the model sees no further than such a window anyway
        means = {window: sum(mass) / len(mass) for window, mass in masses.items()}
        window = next((w for w, mean in means.items() if mean >= ENOUGH_MASS), max(means))
        near = stats.window_mass(window, False) or []
        worst = min(range(len(masses[window])), key=masses[window].__getitem__)
        wider = Lolcats(LolcatsConfig(**self.config.model_dump() | {"window_size": window}))
        before, after = cache_bytes(model.config), cache_bytes(wider.build(model))["constant"]
        if not before["per_token"]:
            return None  # every layer has a window of its own: the cache is constant already
        break_even = max(after - before["constant"], 0) / before["per_token"]
        return Suitability(
            score=means[window],
            reason=(
                f"{means[window]:.0%} of the attention lies within {window} tokens and on the first {stats.num_sinks} "
                f"(layer {worst}: {masses[window][worst]:.0%}), {sum(near) / len(near):.0%} within {window} alone: the "
                "linear branch has to carry the rest, and may lose it. The cache stays at "
                f"{after / 1e6:,.2f} MB a sequence, which is worth it beyond {break_even:,.0f} tokens."
            ),
            settings=() if window == self.config.window_size else (f"window_size={window}",),
        )

    @property
    def starts_from_data(self) -> bool:
        """The mixing factor does, unless it is given or has nothing to mix."""
        return self.config.window_factor is None and self.config.linear_weight > 0

    def start(self, teacher: LayerTeacher) -> None:
        """Balance g on the first rows."""
        import torch

        from kit.convert.distill import queries_keys

        if self.config.window_factor is None:
            mixer = teacher.attention.linear_attention
            tokens = max(BALANCE_TOKENS, 2 * self.config.window_size)
            with torch.no_grad(), queries_keys(mixer) as seen:
                teacher.run(**teacher.given(slice(self.config.transfer.batch_size), tokens))
            _balance(teacher.attention, *seen[0][:2])


def _balance(attention: Any, q: Tensor, k: Tensor) -> None:
    """Start g where the two branches have the masses that softmax gives them.

    Softmax puts exp(LSE_past) on the keys past the window and exp(LSE_window) on those in it; the hybrid puts φq·Σφk
    and g·exp(LSE_window). They agree, in the mean over queries, at log g = log φq·Σφk − LSE_past. Where a head attends
    to a far token with a large score, g is far below the paper's 0.1, and slow to learn.

    Args:
        attention: a linearized attention layer.
        q: (B, H, T, D) after RoPE.
        k: (B, G, T, D).
    """
    import torch

    from kit.kernels.linear_attention import hedgehog_feature_map

    hybrid = attention.linear_attention
    heads, window, sinks = q.shape[1], hybrid.window_size, hybrid.num_sinks
    total = torch.zeros(heads, device=q.device)
    for row in range(len(q)):  # one row at a time: these are (H, T, T)
        keys = k[row].repeat_interleave(heads // k.shape[1], 0).float()
        past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(-window)
        past[:, :sinks] = False
        scores = (q[row].float() @ keys.transpose(-1, -2)) * attention.scaling
        phi_q = hedgehog_feature_map(q[row, None], hybrid.feature_map_q)[0]
        maps = hybrid.feature_map_k.repeat_interleave(heads // hybrid.feature_map_k.shape[0], 0)
        similarity = phi_q @ hedgehog_feature_map(keys[None], maps)[0].transpose(-1, -2)
        with_past = slice(window + sinks, None)
        log_linear = (similarity * past).sum(-1)[:, with_past].log()
        log_softmax = scores.masked_fill(~past, -torch.inf).logsumexp(-1)[:, with_past]
        total += (log_linear - log_softmax).mean(-1)
    hybrid.window_factor.copy_(torch.logit((total / len(q)).exp(), eps=1e-6))
