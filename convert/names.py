"""Names of tensors in files, where they are not those of our modules: experts', and GPT-2's.

Of experts: in our modules each is three linears, in files they may be called otherwise, or lie in one tensor.

Our names are `model.layers.L.mlp.experts.E.gate_proj.weight` and so on. The hub's files name Mixtral's parts as its
authors did; and a folder may hold what transformers makes of them while loading, all experts of a layer in one tensor.
"""

from __future__ import annotations

from typing import Any

HUB_NAMES: dict[str, dict[str, str]] = {  # by family: our word in a name, the hub's
    "mixtral": {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "qwen3_moe": {},
}


def hub_names(config: dict[str, Any]) -> dict[str, str]:
    """Words of our names that the hub's files spell otherwise, for the model of a config.json."""
    return HUB_NAMES.get(_family(config), {})


def renamed(name: str, words: dict[str, str]) -> str:
    """A dotted name with some of its words replaced."""
    return ".".join(words.get(word, word) for word in name.split("."))


def spellings(name: str, words: dict[str, str]) -> list[str]:
    """A module's name in a quantization config: the hub's, and the one under which vLLM looks its experts up.

    vLLM asks for gate_proj, up_proj and down_proj in every family.
    """
    return list(dict.fromkeys([renamed(name, words), renamed(name, {"mlp": words.get("mlp", "mlp")})]))


def matrices(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> list[tuple[str, int, tuple[int, ...]]]:
    """What a stored tensor holds, in our names.

    Args:
        name: its name in the file.
        shape: its shape; fused experts are gate_up_proj (E, 2 I, H), gate first, and down_proj (E, H, I).
        config: config.json.

    Returns:
        (name, place of its first number in the stored tensor, shape) of each tensor of ours.
    """
    if _family(config) == "gpt2":  # the hub's files are of the base model, without the language model's prefix
        if name.endswith(".attn.bias"):  # no weight: a causal mask
            return []
        return [(name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}", 0, shape)]
    name = renamed(name, {theirs: ours for ours, theirs in hub_names(config).items()})
    experts, _, kind = name.rpartition(".experts.")
    linears = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
    if _family(config) not in HUB_NAMES or not experts or linears is None or len(shape) != 3:
        return [(name, 0, shape)]
    names = [f"{experts}.experts.{number}.{linear}.weight" for number in range(shape[0]) for linear in linears]
    rows, columns = shape[1] // len(linears), shape[2]
    return [(name, place * rows * columns, (rows, columns)) for place, name in enumerate(names)]


def _family(config: dict[str, Any]) -> str:
    return str(config.get("model_type")).removeprefix("kit_quantized_")
