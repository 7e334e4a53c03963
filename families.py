"""How transformers' families name what linearization touches: one row a family, and nothing else is said per family.

All of them hand q, k and v to transformers' attention interface once norms of q and k, fused projections, partial RoPE
or learned positions are done with; so what is left to say is where the parts are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Names in transformers' modeling file of a family.

    Attributes:
        prefix: of the class names, ours too (`KitLlamaConfig`).
        module: `transformers.models.<module>`; empty: the model type.
        text: what stands in the names of the config and base model classes behind the prefix.
        causal_lm: what stands behind the prefix in the language model's class name.
        base, layers, attention: attributes of the language model, of its base model, and of a decoder layer.
        embedding, norm: of the base model; positions: its learned positions, if it has some.
        projections: linears before attention.
        output: the linear behind it.
        transposed: linears are stored (inputs, outputs).
        full_every: of so many layers the last one sees everything and the others a sliding window; 0: no such pattern.
        window: sliding window that transformers takes where config.json names none.
        full_first: so many layers see everything where config.json has `use_sliding_window` and no `max_window_layers`.
    """

    prefix: str
    module: str = ""
    text: str = ""
    causal_lm: str = "ForCausalLM"
    base: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    positions: str = ""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    transposed: bool = False
    full_every: int = 0
    window: int | None = None
    full_first: int = 0

    def sliding_window(self, config: Mapping[str, Any]) -> int | None:
        """Keys that a query sees in a layer with a sliding window; None if the model has no such layer."""
        if not config.get("use_sliding_window", not self.full_first):
            return None
        return config.get("sliding_window", self.window) or None

    def layer_types(self, config: Mapping[str, Any]) -> list[str]:
        """What each layer sees, in transformers' words: as config.json has it, or as transformers fills it in."""
        if kinds := config.get("layer_types"):
            return list(kinds)
        count = int(config_value(config, "num_hidden_layers"))
        if self.full_every:
            every = int(config.get("sliding_window_pattern") or self.full_every)
            sliding = [bool((index + 1) % every) for index in range(count)]
        else:
            first = config.get("max_window_layers", self.full_first)
            sliding = [self.sliding_window(config) is not None and index >= first for index in range(count)]
        return ["sliding_attention" if own else "full_attention" for own in sliding]

    def sliding_layers(self, config: Mapping[str, Any]) -> list[bool]:
        """Which layers of a model with a pattern have a sliding window of their own."""
        return [bool(self.full_every) and kind == "sliding_attention" for kind in self.layer_types(config)]

    def shapes(self, heads: int, kv_heads: int, head_dim: int, hidden: int) -> dict[str, tuple[int, int]]:
        """Shapes of an attention layer's weights as they are stored, by name."""
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        if len(self.projections) == 1:
            sizes = [sum(sizes)]
        found = {name: (size, hidden) for name, size in zip(self.projections, sizes, strict=True)}
        found[self.output] = (hidden, heads * head_dim)
        return {name: shape[::-1] if self.transposed else shape for name, shape in found.items()}


TABLE = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", window=4096),
    "qwen2": Family("Qwen2", window=4096, full_first=28),
    "qwen3": Family("Qwen3", window=4096, full_first=28),
    "gemma2": Family("Gemma2", full_every=2, window=4096),
    "gemma3_text": Family("Gemma3", module="gemma3", text="Text", full_every=6, window=4096),
    "phi3": Family("Phi3", projections=("qkv_proj",)),
    "olmo2": Family("Olmo2"),
    "gpt2": Family(
        "GPT2",
        causal_lm="LMHeadModel",
        base="transformer",
        layers="h",
        attention="attn",
        embedding="wte",
        norm="ln_f",
        positions="wpe",
        projections=("c_attn",),
        output="c_proj",
        transposed=True,
    ),
}
LLAMA = TABLE["llama"]
ALIASES = {
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}  # names of GPT-2's config.json


def family_of(model_type: str) -> Family:
    """The row of a model type, ours included; types that are not in the table are taken to name parts as Llama does."""
    return TABLE.get(model_type.removeprefix("kit_"), LLAMA)


def config_value(config: Mapping[str, Any], name: str) -> Any:
    """A value of a config.json under its usual name, or the family's own; None if it is not there."""
    return config.get(name, config.get(ALIASES.get(name, name)))
