"""Models under other names: the text model inside another, GPT-2 as the hub has it, configs of few words."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from kit.convert.checkpoint import load, open_checkpoint
from kit.convert.errors import KitError
from kit.convert.inspect import inspect
from kit.convert.pipeline import Options, convert, plan
from kit.convert.progress import Progress
from kit.recipes import load_recipes

LONG = ["window_size=40", "num_sinks=0"]
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 16,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def ids(length=30):
    return torch.randint(4, 96, (2, length), generator=torch.Generator().manual_seed(1))


def tokenizer_into(folder, make_model):
    source = make_model()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())


@pytest.mark.parametrize("places", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_gemma_3_is_converted(make_model, tmp_path, logits_without_kit, places):
    """With a window as long as the text the result gives the logits that the whole model gives for text."""
    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=95)
    whole = Gemma3ForConditionalGeneration(config).eval()
    for parameter in whole.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    folder = tmp_path / "gemma"
    whole.save_pretrained(folder)
    tokenizer_into(folder, make_model)
    stored = load_file(folder / "model.safetensors")
    stored = {name.replace("language_model.model.", places): tensor for name, tensor in stored.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    recipes = load_recipes("lolcats", [*LONG, "transfer.steps=0", "lora.steps=0"])
    report = convert(checkpoint, recipes, Options(tmp_path / "out", device="cpu", eval_tokens=64), Progress())
    with torch.no_grad():
        want = whole(ids()).logits
        model = load(str(tmp_path / "out"), dtype="float32")
        torch.testing.assert_close(model(ids()).logits, want, atol=1e-4, rtol=1e-4)
    assert type(model).__name__ == "KitGemma3ForCausalLM"
    torch.testing.assert_close(logits_without_kit(tmp_path / "out", ids(), True), want, atol=1e-4, rtol=1e-4)
    rows = {row["name"]: row for row in report["evaluation"]["rows"]}
    assert rows["converted"]["kl"] < 1e-3
    new = sum(p.numel() for name, p in model.named_parameters() if "linear_attention" in name)
    assert inspect(checkpoint, [])["parameters"] == sum(p.numel() for p in model.parameters()) - new


def test_values_that_a_config_leaves_to_transformers_are_filled_in(tmp_path):
    from kit.convert.text_tower import text_tower

    folder = tmp_path / "g"
    folder.mkdir()
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7, "sliding_window": 32},
        "vision_config": VISION | {"model_type": "siglip_vision_model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {"language_model.model.norm.weight": torch.ones(64), "vision_tower.x": torch.ones(3)},
        folder / "model.safetensors",
    )
    tower = text_tower(open_checkpoint(str(folder)))
    assert list(tower.tensors) == ["model.norm.weight"]
    assert (tower.config["num_attention_heads"], tower.config["head_dim"]) == (8, 256)
    assert tower.config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert torch.equal(tower.read("model.norm.weight"), torch.ones(64))


def test_gpt2_under_the_hubs_names(make_model, tmp_path):
    """Without the language model's prefix, with masks among the weights."""
    folder = make_model("gpt2", num_key_value_heads=3)
    want = AutoModelForCausalLM.from_pretrained(folder).eval()
    stored = load_file(folder / "model.safetensors")
    assert all(name.startswith("transformer.") for name in stored)
    hub = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    hub |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(3)}
    save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.tensors.keys() == stored.keys()
    recipes = load_recipes("lolcats", [*LONG, "transfer.steps=0", "lora.steps=0"])
    convert(checkpoint, recipes, Options(tmp_path / "out", device="cpu", eval_tokens=64), Progress())
    with torch.no_grad():
        torch.testing.assert_close(
            load(str(tmp_path / "out"), dtype="float32")(ids()).logits, want(ids()).logits, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "qwen2"])
def test_a_config_without_a_sliding_window_has_transformers_own(make_model, tmp_path, family):
    folder = make_model(family)
    config = json.loads((folder / "config.json").read_text())
    for key in ("sliding_window", "use_sliding_window", "layer_types", "_sliding_window_pattern"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(folder))
    theirs = checkpoint.load_config()
    found = load_recipes("window", LONG)[0]
    items = plan(checkpoint, [found], Options(tmp_path / "out", device="cpu", eval_tokens=0))
    assert any(item.what == "cache" for item in items)
    from kit.convert.recipe import ModelFacts

    built = found.build(ModelFacts.of(checkpoint))
    sliding = (
        [kind == "sliding_attention" for kind in theirs.layer_types or []] if hasattr(theirs, "layer_types") else []
    )
    if family == "mistral":
        assert built["linear_attention"]["base_windows"] == [theirs.sliding_window] * 3
    elif any(sliding):
        assert built["linear_attention"]["base_windows"] == [4096 if own else None for own in sliding]
        assert built["sliding_window"] == theirs.sliding_window == 4096
    else:
        assert built["linear_attention"]["base_windows"] is None


def test_other_models_that_take_images_are_refused_with_what_is_supported(make_model, tmp_path):
    folder = make_model()
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlavaForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KitError, match="no causal language model") as error:
        plan(open_checkpoint(str(folder)), load_recipes("window", LONG), Options(tmp_path / "o", device="cpu"))
    assert "llama, mistral, qwen2, qwen3, gemma2, gemma3_text, phi3, olmo2, gpt2" in error.value.next_step
