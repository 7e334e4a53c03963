"""The FireQ recipe on tiny random models: formats that others read, the cache, errors before weights load."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import kit
from kit.convert.checkpoint import open_checkpoint
from kit.convert.errors import KitError
from kit.convert.evaluate import evaluate
from kit.convert.inspect import cache_bytes
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.kernels.int4_fp8 import unpack_int8
from kit.modules.cache import carried_cache
from kit.recipes import load_recipes
from kit.recipes.fireq import Fireq

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.randint(4, 96, (2, 40), generator=torch.Generator().manual_seed(1))
PLAIN = ("kv.bits=null", "query=null")


@pytest.fixture
def quantize(make_model, tmp_path):
    """A function that quantizes a tiny model and returns (source folder, output folder, report)."""
    text = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(4, 96, (2000,), generator=generator).tolist()
    text.write_text(" ".join(f"w{word}" for word in words))

    def run(*overrides, preset="fireq", family="llama", name="out", resume=False, source=None):
        source = source or make_model(family, dtype=torch.bfloat16, **SHAPE)
        data = [f"data.dataset={text}", "data.num_samples=8", "data.seq_len=64"] if preset != "rtn" else []
        recipes = load_recipes(preset, ["group_size=16", *data, *overrides])
        options = Options(tmp_path / name, eval_tokens=0, device="cpu", resume=resume)
        return source, tmp_path / name, convert(open_checkpoint(str(source)), recipes, options, Progress())

    return run


@torch.no_grad()
def kl(base, model):
    reference, other = (m(IDS).logits.float().log_softmax(-1) for m in (base, model))
    return float((reference.exp() * (reference - other)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_folds_keep_the_function_and_rounding_beats_plain_rounding(quantize, family):
    sampled = ["data.dataset=self"] if family == "qwen2" else []  # the fixture's tokenizer reads no text as Qwen2's
    source, out, _ = quantize(*PLAIN, *sampled, family=family)
    _, plain, _ = quantize(preset="rtn", family=family, name="rtn", source=source)
    base = kit.load(str(source), dtype="float32")
    assert kl(base, kit.load(str(out), dtype="float32")) < 0.9 * kl(base, kit.load(str(plain), dtype="float32"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("scheme=W4A16",),
        ("scheme=FP8",),
        ("bits_budget=6",),
        ("head=int8",),
    ],
    ids=str,
)
def test_compressed_tensors_reads_the_standard_format(quantize, logits_without_kit, overrides):
    _, out, _ = quantize(*PLAIN, *overrides)
    theirs = logits_without_kit(out, IDS).float()
    with torch.no_grad():
        ours = kit.load(str(out), dtype="float32")(IDS).logits.float()
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert float(error.median()) < 1e-2  # one input that tips over to the next FP8 number moves a token by more
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) > 0.95


def test_zero_points_are_packed_as_the_library_packs_them(quantize):
    """compressed-tensors 0.20 cannot load its own zero points through transformers; its decompressor reads ours."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    _, out, report = quantize(*PLAIN, "zero_point=true")
    assert "packed zero points" in json.dumps(report["plan"])
    group = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate({k: v for k, v in group.items() if k != "format"})
    stored, name = load_file(out / "model.safetensors"), "model.layers.1.mlp.up_proj"
    parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(name + ".")}
    theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    ours = kit.load(str(out), dtype="float32").get_submodule(name).dequantize()
    assert bool(stored[f"{name}.weight_zero_point"].any())
    torch.testing.assert_close(theirs.float(), ours, rtol=1e-2, atol=1e-6)


@torch.no_grad()
def test_decoding_with_the_packed_cache_equals_one_pass(quantize):
    _, out, _ = quantize("kv.window=16")
    assert (out / "kit_cache.safetensors").exists()
    model = kit.load(str(out), dtype="float32")
    whole = model(IDS, use_cache=False).logits
    state = model(IDS[:, :30], use_cache=True)
    logits, cache = [state.logits], carried_cache(state)
    for position in range(30, 40):
        state = model(IDS[:, position : position + 1], use_cache=True, **cache)
        logits.append(state.logits)
    cache = next(iter(cache.values()))
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=2e-3, rtol=2e-3)
    assert cache.layers[0].keys.dtype == torch.uint8
    assert cache.layers[0].keys.shape == (2, 2, 40, 16 // 2 + 3)
    assert cache.layers[0].latest[0].shape == (2, 2, 15, 16)


def test_our_own_format_brings_its_code(quantize, logits_without_kit):
    _, out, _ = quantize("format=kit")
    assert not (out / "kit_cache.safetensors").exists()
    with torch.no_grad():
        ours = kit.load(str(out), dtype="float32")(IDS).logits
    torch.testing.assert_close(logits_without_kit(out, IDS, trust_remote_code=True), ours)


def test_a_killed_run_resumes_to_the_same_bytes(quantize, make_model, monkeypatch):
    source, out, _ = quantize(name="whole")
    original, calls = Fireq.quantize, []

    def killed(self, layer):
        calls.append(layer.index)
        if layer.index == 1:
            raise KeyboardInterrupt
        return original(self, layer)

    killed._kit_stage = original._kit_stage
    monkeypatch.setattr(Fireq, "quantize", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(name="again", source=source)
    monkeypatch.setattr(Fireq, "quantize", original)
    _, again, _ = quantize(name="again", source=source, resume=True)
    assert calls == [0, 1]
    for file in ("model.safetensors", "kit_cache.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes()


def test_what_is_ignored_and_the_embedding_stay_bit_equal(quantize):
    source, out, _ = quantize("ignore=[re:.*down_proj]")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        assert torch.equal(before[name], after[name])
    assert "lm_head" in json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]


def test_tuning_brings_the_model_nearer_to_its_original_and_changes_no_code(quantize):
    options = ("rounding=rtn", "data.num_samples=31")  # much to gain, and rows enough not to learn them by heart
    source, out, _ = quantize(*options)
    _, tuned, report = quantize(*options, "tune.steps=30", name="tuned", source=source)
    losses = report["stages"]["fireq.tune"][0]["losses"]
    assert sum(losses[-4:]) < sum(losses[:4])
    base = kit.load(str(source), dtype="float32")
    assert kl(base, kit.load(str(tuned), dtype="float32")) < kl(base, kit.load(str(out), dtype="float32"))
    before, after = load_file(out / "model.safetensors"), load_file(tuned / "model.safetensors")
    for name in before:
        if name.endswith(("weight_packed", "embed_tokens.weight")):
            assert torch.equal(before[name], after[name])
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_rotating_the_residual_stream_unties_the_head(quantize):
    source, out, _ = quantize("rotate_residual=true", *PLAIN)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    base = kit.load(str(source), dtype="float32")
    assert kl(base, kit.load(str(out), dtype="float32")) < 0.5


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_in_int8_is_untied_and_holds_what_it_held(quantize, make_model, tied):
    source = make_model("llama", dtype=torch.bfloat16, **(SHAPE | {"tie_word_embeddings": tied}))
    _, out, _ = quantize("head=int8", *PLAIN, source=source)
    _, plain, _ = quantize(*PLAIN, source=source, name="plain")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    stored, before = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(stored[name], before[name])
    head = before[name if tied else "lm_head.weight"].double()
    scale = stored["lm_head.weight_scale"].double()
    rounded = unpack_int8(stored["lm_head.weight_packed"], head.shape[1]).double() * scale
    assert "lm_head.weight" not in stored
    assert ((rounded - head).abs() <= 0.501 * scale + 1e-9).all()
    other = {key: value for key, value in load_file(plain / "model.safetensors").items() if "lm_head" not in key}
    assert all(torch.equal(value, stored[key]) for key, value in other.items())
    base = kit.load(str(source), dtype="float32")
    assert kl(base, kit.load(str(out), dtype="float32")) < kl(base, kit.load(str(plain), dtype="float32")) + 0.02


def test_a_budget_buys_fp8_linears(quantize):
    _, out, report = quantize("bits_budget=6.5", *PLAIN)
    chosen = report["allocation"]["fireq"]
    assert chosen["fp8"]
    assert chosen["bits_per_weight"] <= 6.5
    stored = load_file(out / "model.safetensors")
    assert stored[f"{chosen['fp8'][0]}.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("group_size=48",), "do not divide"),
        (("ignore=[re:.*nothing]",), "matches no linear"),
        (("ignore=[re:.*]",), "nothing is left"),
        (('ignore=["re:*down"]',), "no regular expression"),
        (("bits_budget=4.1",), "bits a weight"),
        (("target=vllm",), "groups of 128 only"),
    ],
)
def test_bad_options_stop_before_the_weights(quantize, overrides, message):
    with pytest.raises(KitError, match=message):
        quantize(*overrides)


def test_a_nan_names_its_tensor_and_nothing_is_written(quantize, make_model):
    source = make_model(dtype=torch.bfloat16, **SHAPE)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KitError, match=r"NaN") as error:
        quantize(source=source, preset="rtn")
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value)


def test_a_quantized_model_is_neither_saved_nor_quantized_again(quantize, tmp_path):
    _, out, _ = quantize()
    with pytest.raises(ValueError, match="kit quantize"):
        kit.load(str(out)).save_pretrained(tmp_path / "saved")
    with pytest.raises(KitError, match="already quantized"):
        quantize(source=out, name="twice")


FP8_CACHE = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "group_size": None,
    "dynamic": False,
    "symmetric": True,
}  # fmt: skip  (as llm-compressor writes it)
CACHE_SCALES = {"k_scale": 0.02, "v_scale": 0.01}


class RoundingCache(DynamicCache):
    """transformers' cache, of the nearest e4m3 multiples of fixed scales."""

    def update(self, k, v, *args, **kwargs):
        rounded = (
            (x.double() / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale
            for x, scale in zip((k, v), CACHE_SCALES.values(), strict=True)
        )
        return super().update(*(x.to(k.dtype) for x in rounded), *args, **kwargs)


def with_cache_scheme(out, scheme):
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (out / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def test_another_tool_s_fp8_cache_is_computed(quantize):
    _, out, _ = quantize(*PLAIN, "scheme=FP8")
    model = kit.load(str(out), dtype="float32")
    name = next(iter(carried_cache(model(IDS[:, :2], use_cache=True))))
    want, plain = model(IDS, **{name: RoundingCache()}).logits, model(IDS).logits
    tensors = load_file(out / "model.safetensors")
    for layer in range(3):
        for scale, value in CACHE_SCALES.items():
            tensors[f"model.layers.{layer}.self_attn.{scale}"] = torch.tensor([value])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with_cache_scheme(out, FP8_CACHE)
    model = kit.load(str(out), dtype="float32")
    assert float((want - plain).norm() / plain.norm()) > 0.01
    torch.testing.assert_close(model(IDS, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
    state = model(IDS[:, :30], use_cache=True)
    rest = model(IDS[:, 30:], use_cache=True, **carried_cache(state)).logits
    torch.testing.assert_close(torch.cat([state.logits, rest], 1), want, atol=1e-4, rtol=1e-4)
    assert cache_bytes(json.loads((out / "config.json").read_text()))["per_token"] == 3 * 2 * 2 * 16 * 2


@pytest.mark.parametrize("change", [{"dynamic": True}, {"strategy": "attn_head"}, {"num_bits": 4, "type": "int"}])
def test_other_caches_are_refused_before_weights_load(quantize, monkeypatch, change):
    _, out, _ = quantize(*PLAIN)
    with_cache_scheme(out, FP8_CACHE | change)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    checkpoint = open_checkpoint(str(out))
    for load in (lambda: kit.load(str(out)), lambda: evaluate({"x": checkpoint}), lambda: checkpoint.check_runs({})):
        with pytest.raises(KitError, match=r"kv_cache_scheme \(num_bits") as caught:
            load()
        assert "quantize the original" in caught.value.next_step
