"""What a model is, from config.json and tensor headers alone, and which recipes take it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from kit.convert.checkpoint import Checkpoint
from kit.convert.errors import KitError
from kit.convert.recipe import ModelFacts, Recipe
from kit.families import config_value

if TYPE_CHECKING:
    from kit.convert.stats import ModelStats

PARTS = {"attention": (".self_attn.", ".attention.", ".attn."), "mlp": (".mlp.", ".feed_forward."), "norm": ("norm.",)}


def inspect(checkpoint: Checkpoint, recipes: list[Recipe]) -> dict[str, Any]:
    """Describe a model without reading weights.

    Args:
        checkpoint: the model.
        recipes: recipes to try on it, with the options of their presets.

    Returns:
        Architecture, shapes, parameters by part, dtypes, tied weights, cache bytes, and for each recipe None if it
        applies or the reason why not.
    """
    facts = ModelFacts.of(checkpoint)
    heads, kv_heads, head_dim = facts.heads
    parts: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        parts[_part(name)] = parts.get(_part(name), 0) + info.numel
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.numel
    return {
        "source": checkpoint.source,
        "model_type": facts.model_type,
        "architecture": (checkpoint.config.get("architectures") or ["unknown"])[0],
        "layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "query_heads": heads,
        "key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocabulary": checkpoint.config["vocab_size"],
        "context": config_value(checkpoint.config, "max_position_embeddings"),
        "parameters": checkpoint.num_parameters,
        "parameters_by_part": parts,
        "parameters_by_dtype": dtypes,
        "bytes": checkpoint.nbytes,
        "tied_embeddings": checkpoint.tied_embeddings,
        "cache_bytes": cache_bytes(checkpoint.config),
        "recipes": {recipe.name: _refusal(recipe, facts) for recipe in recipes},
    }


def recommend(checkpoint: Checkpoint, recipes: list[Recipe], stats: ModelStats) -> list[dict[str, Any]]:
    """Rank the recipes that take a model, each by its own judgement of the measured figures.

    Args:
        checkpoint: the model.
        recipes: recipes to ask, with the options that they would run with.
        stats: from `kit.convert.stats.measure`.

    Returns:
        Best first: `recipe`, `score`, `reason`, `command`; recipes that refuse the model or do not judge are left out.
    """
    facts, found = ModelFacts.of(checkpoint), []
    for recipe in recipes:
        if _refusal(recipe, facts) is None and (judged := recipe.suits(stats, facts)):
            options = [part for setting in judged.settings for part in ("--set", setting)]
            command = shlex.join(["kit", recipe.command, checkpoint.source, "-r", recipe.name, *options, "-o", "OUT"])
            found.append({"recipe": recipe.name, "score": judged.score, "reason": judged.reason, "command": command})
    return sorted(found, key=lambda each: -each["score"])


def cache_bytes(config: dict[str, Any], bytes_each: int = 2) -> dict[str, int]:
    """What the cache of one sequence costs: bytes for each further token, and a part that does not grow.

    Args:
        config: config.json.
        bytes_each: bytes a cached key or value number; the recurrent state is fp32.
    """
    facts = ModelFacts(config, {})
    heads, kv_heads, head_dim = facts.heads
    keys_and_values = 2 * kv_heads * head_dim * bytes_each
    quantization = config.get("quantization_config") or {}
    kv = quantization.get("kv_cache_scheme")
    if kv and kv["num_bits"] == 4:  # FP8 numbers are held in 16 bits
        each = head_dim * kv["num_bits"] // 8 + 2 + (not kv["symmetric"])  # numbers, scale, zero point
        keys_and_values = 2 * kv_heads * each
    window, linear = config.get("sliding_window"), config.get("linear_attention")
    latest = (quantization.get("kit") or {}).get("window") or 0  # tokens kept in 16 bits beside the packed cache
    found = {"per_token": 0, "constant": 2 * kv_heads * head_dim * bytes_each * max(latest - 1, 0) * facts.num_layers}
    kinds = config.get("layer_types") or ["sliding_attention" if window else "full_attention"] * facts.num_layers
    if not config.get("layer_types") and any(sliding := facts.family.sliding_layers(config)):
        kinds = ["sliding_attention" if own else "full_attention" for own in sliding]
    mixers = (linear or {}).get("mixers") or ["hybrid"] * len(kinds)
    for kind, mixer in zip(kinds, mixers, strict=True):
        if kind == "full_attention" or not window:
            found["per_token"] += keys_and_values
        else:
            found["constant"] += keys_and_values * (window - 1)
        if kind == "hybrid_sliding" and linear:
            if mixer != "linear":
                found["constant"] += 2 * kv_heads * linear.get("num_sinks", 0) * head_dim * 4
            if mixer != "window" and linear.get("linear_weight", 1):
                state_heads = kv_heads if linear["feature_map_heads"] == "kv" else heads
                found["constant"] += state_heads * 2 * linear["feature_dim"] * (head_dim + 1) * 4
    return found


def _part(name: str) -> str:
    if any(mark in name for mark in ("embed_tokens", "lm_head", ".wte.", ".wpe.")):
        return "embedding and head"
    if "linear_attention" in name:
        return "linear attention"
    return next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), "other")


def _refusal(recipe: Recipe, facts: ModelFacts) -> str | None:
    try:
        recipe.plan(facts)
    except KitError as error:
        return error.what
    return None
