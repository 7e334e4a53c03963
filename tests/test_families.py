"""The table of families against transformers itself."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kit.convert.errors import KitError
from kit.convert.inspect import cache_bytes
from kit.convert.recipe import ModelFacts
from kit.families import TABLE, config_value
from kit.recipes import load_recipes

SHAPE = {"hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 3, "vocab_size": 64, "pad_token_id": 0}
SLIDING = {"use_sliding_window": True}
ONE_SIZE = ("gpt2",)  # as many key/value heads as query heads, and their width follows


def facts(family, **change):
    """A model's config.json and shapes, as transformers writes them."""
    more = {} if family in ONE_SIZE else {"num_key_value_heads": 1, "head_dim": 20, "intermediate_size": 64}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SHAPE | more | change))
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return ModelFacts(config, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}), model


@pytest.mark.parametrize("family", TABLE)
def test_names_and_shapes_are_those_of_transformers(family):
    model, real = facts(family)
    row = TABLE[family]
    assert type(real).__name__ == f"{row.prefix}{row.causal_lm}"
    assert real.base_model_prefix == row.base
    base = real.base_model
    layer = getattr(base, row.layers)[0]
    for name in (row.embedding, row.norm, *([row.positions] if row.positions else [])):
        assert hasattr(base, name)
    attention = dict(getattr(layer, row.attention).named_parameters())
    heads = model.heads if family in ONE_SIZE else (3, 1, 20)
    assert model.heads == heads
    shapes = row.shapes(*heads, 48)
    assert {name: tuple(attention[f"{name}.weight"].shape) for name in shapes} == shapes
    assert model.num_layers == 7
    assert "cache" in {item.what for item in load_recipes("lolcats")[0].plan(model)}  # every tensor was found


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_sliding_layers_are_known_without_being_listed(family):
    model, real = facts(family)
    want = [kind == "sliding_attention" for kind in real.config.layer_types]
    assert any(want)
    assert not all(want)
    for config in (model.config, {k: v for k, v in model.config.items() if k != "layer_types"}):
        assert TABLE[family].sliding_layers(config) == want
    pattern = {**model.config, "layer_types": None, "sliding_window_pattern": 3}
    real3 = CONFIG_MAPPING["gemma3_text"](num_hidden_layers=7, sliding_window_pattern=3).layer_types
    assert TABLE["gemma3_text"].sliding_layers(pattern) == [kind == "sliding_attention" for kind in real3]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "more", [{}, {"use_sliding_window": True}, {"use_sliding_window": True, "max_window_layers": 3}]
)
def test_layers_that_see_everything_are_those_that_transformers_says(family, more):
    """Of config.json with few words; the cache grows by two bytes each for their keys and values alone."""
    config = {"model_type": family, "num_hidden_layers": 30, "num_attention_heads": 3, "num_key_value_heads": 1,
              "head_dim": 8, "hidden_size": 24} | more  # fmt: skip
    theirs = CONFIG_MAPPING[family](**config)
    assert TABLE[family].layer_types(config) == theirs.layer_types
    assert TABLE[family].sliding_window(config) == theirs.sliding_window
    assert cache_bytes(config)["per_token"] == theirs.layer_types.count("full_attention") * 2 * 8 * 2


def test_sliding_layers_are_kept_and_the_cache_is_constant():
    model, _ = facts("gemma3_text", sliding_window=32)
    recipe = load_recipes("lolcats", ["window_size=16"])[0]
    built = recipe.build(model)
    assert built["layer_types"] == ["sliding_attention"] * 5 + ["hybrid_sliding", "sliding_attention"]
    assert built["linear_attention"]["mixers"] == ["full"] * 5 + ["hybrid", "full"]
    assert (built["sliding_window"], built["linear_attention"]["window_size"]) == (32, 12)
    items = {item.what: item.value for item in recipe.plan(model)}
    assert items["kept"] == "6 layers with a sliding window of their own"
    assert "at any length" in items["cache"]


def test_values_of_gpt2_are_found_under_their_own_names():
    config = facts("gpt2")[0].config
    assert "hidden_size" not in config
    assert [config_value(config, name) for name in ("hidden_size", "num_hidden_layers", "absent")] == [48, 7, None]


def test_an_unknown_architecture_is_told_which_are_known():
    model = ModelFacts({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, {})
    with pytest.raises(KitError, match="does not know the architecture 'bloom'") as caught:
        load_recipes("lolcats")[0].plan(model)
    for family in TABLE:
        assert family in caught.value.next_step
