"""Figures against their definitions, worked out here with transformers and float64."""

import math
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kit.cli import app
from kit.convert.bench import bench
from kit.convert.checkpoint import Checkpoint, open_checkpoint
from kit.convert.data import sample_from_model
from kit.convert.errors import KitError
from kit.convert.evaluate import evaluate
from kit.convert.inspect import cache_bytes
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.convert.report import markdown_table, table_cells
from kit.modules.accelerated import FusedModel, enable_kernels
from kit.modules.quantized import QuantizedLinear
from kit.recipes import load_recipes


@pytest.fixture(scope="module")
def models_(make_model):
    """Two tiny models with one tokenizer: (base folder, other folder)."""
    return make_model(seed=0), make_model(seed=1)


def log_probs(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    with torch.no_grad():
        return model(rows).logits.log_softmax(-1)


def perplexity(log_p, rows):
    return math.exp(-float(log_p[:, :-1].gather(-1, rows[:, 1:, None]).mean()))


def test_perplexity_kl_and_top1_are_what_their_definitions_say(models_, tmp_path):
    base, other = models_
    text = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(4, 64, (70,), generator=generator)
    text.write_text(" ".join(f"w{i}" for i in words.tolist()))
    result = evaluate(
        {"other": open_checkpoint(str(other))},
        base=open_checkpoint(str(base)),
        num_tokens=1024,
        dataset=str(text),
        seq_len=20,
        seed=5,
        speed=False,
    )
    rows = {row["name"]: row for row in result["rows"]}
    checkpoint = open_checkpoint(str(base))
    model = checkpoint.load_model(torch.float32, "cpu")
    sampled = sample_from_model(model, checkpoint.load_tokenizer(), 2, 512, 5).input_ids
    windows = words[:60].view(3, 20)
    p, q = log_probs(base, sampled), log_probs(other, sampled)
    kl = (p.exp() * (p - q)).sum(-1)
    assert rows["other"]["kl"] == pytest.approx(float(kl.mean()), rel=1e-4)
    assert rows["other"]["kl_stderr"] == pytest.approx(float(kl.mean(-1).std() / 2**0.5), rel=1e-3)
    assert rows["other"]["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=2e-3)
    assert rows["base"]["self_perplexity"] == pytest.approx(perplexity(p, sampled), rel=1e-4)
    assert rows["other"]["self_perplexity"] == pytest.approx(perplexity(q, sampled), rel=1e-4)
    for name, folder in (("base", base), ("other", other)):
        want = perplexity(log_probs(folder, windows), windows)
        assert rows[name]["perplexity"] == pytest.approx(want, rel=1e-4)
    assert "kl" not in rows["base"]
    assert result["settings"]["dataset_tokens"] == 60
    assert result["settings"]["sampled_tokens"] == 1024


def test_a_model_agrees_with_itself(models_):
    base = open_checkpoint(str(models_[0]))
    rows = evaluate({"same": base}, base=base, num_tokens=64, speed=True)["rows"]
    assert rows[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["top1"] == 1
    assert rows[1]["decode_tokens_per_second"] > 0
    assert rows[1]["peak_memory_bytes"] > 0


def test_tables_leave_out_what_nobody_measured():
    rows = [{"name": "a", "perplexity": 3.14159, "perplexity_stderr": 0.1}, {"name": "b"}]
    assert table_cells(rows) == (["model", "perplexity"], [["a", "3.14 ± 0.10"], ["b", ""]])
    assert markdown_table(rows).splitlines()[1] == "| --- | --- |"


@pytest.mark.parametrize(
    ("extra", "want"),
    [
        ({}, {"per_token": 2 * 4 * 2 * 16 * 2, "constant": 0}),
        ({"sliding_window": 9}, {"per_token": 0, "constant": 2 * 4 * 2 * 16 * 2 * 8}),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 9},
            {"per_token": 2 * 2 * 2 * 16 * 2, "constant": 2 * 2 * 2 * 16 * 2 * 8},
        ),
        (
            {"quantization_config": {"kv_cache_scheme": {"num_bits": 4, "symmetric": False}}},
            {"per_token": 2 * 4 * 2 * (16 // 2 + 3), "constant": 0},
        ),
        (
            {"quantization_config": {"kv_cache_scheme": {"num_bits": 4, "symmetric": True}, "kit": {"window": 9}}},
            {"per_token": 2 * 4 * 2 * (16 // 2 + 2), "constant": 2 * 4 * 2 * 16 * 2 * 8},
        ),
    ],
)
def test_cache_bytes(extra, want):
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    assert cache_bytes(config | extra) == want


def test_cache_bytes_of_a_linearized_model_are_those_of_its_cache():
    import kit.modules  # noqa: F401
    from kit.modules.modeling import KitLlamaConfig

    config = KitLlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, layer_types=["hybrid_sliding"] * 2,
        linear_attention={"feature_dim": 12, "feature_map_heads": "query"},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = model(torch.ones(1, 50, dtype=torch.long), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes + layer.recurrent_states[0].nbytes for layer in cache.layers)
    assert cache_bytes(config.to_dict()) == {"per_token": 0, "constant": real}


@pytest.fixture(scope="module")
def quantized(make_model, tmp_path_factory):
    """A tiny model in 16 bits, and as W4AFP8 with an INT4 cache: (base folder, quantized folder)."""
    base = make_model(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, seed=2)
    out = tmp_path_factory.mktemp("quantized") / "w4afp8"
    text = out.with_name("text.txt")
    text.write_text(" ".join(f"w{4 + i * i % 89}" for i in range(300)))
    data = [f"data.dataset={text}", "data.num_samples=4", "data.seq_len=32"]
    recipes = load_recipes("rtn", ["group_size=32", "kv.bits=4", "kv.window=16", *data])
    convert(open_checkpoint(str(base)), recipes, Options(out, eval_tokens=0, device="cpu"), Progress())
    return base, out


def test_a_quantized_model_is_measured_on_the_kernels_and_the_report_says_so(quantized, tmp_path, monkeypatch):
    """Attention in PyTorch, since this is no GPU: the fused path gives the modules' figures, but for ties of FP8."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i * i % 89}" for i in range(256)))
    base, model = (open_checkpoint(str(folder)) for folder in quantized)
    prompts = []
    run = FusedModel.prompt
    monkeypatch.setattr(FusedModel, "prompt", lambda *a: prompts.append(a[1].shape[1]) or run(*a))
    options = {"num_tokens": 64, "dataset": str(text), "seq_len": 64, "generations": 1}

    def measure(**change):
        prompts.clear()
        return evaluate({"w4afp8": model}, base=base, **options | change)["rows"]

    modules = measure()
    assert "need a Hopper GPU" in modules[1]["runs_on"] or "need Triton" in modules[1]["runs_on"]
    assert "runs_on" not in modules[0]
    assert not prompts
    loaded = []

    def on_reference(found):
        assert not any(earlier() for earlier in loaded)  # one model is in memory at a time
        loaded.append(weakref.ref(found))
        quantized_too = any(isinstance(module, QuantizedLinear) for module in found.modules())
        return enable_kernels(found, "reference") if quantized_too else found

    monkeypatch.setattr("kit.convert.checkpoint.on_kernels", on_reference)
    kernels = measure()
    assert kernels[1]["runs_on"] == "INT4-FP8 kernels"
    assert set(prompts) == {64, 256}  # windows, sampled text and prompt; the prompt of the timing
    assert kernels[1]["perplexity"] == pytest.approx(modules[1]["perplexity"], rel=0.05)
    assert kernels[1]["perplexity"] != modules[1]["perplexity"]
    assert kernels[1]["kl"] == pytest.approx(modules[1]["kl"], rel=0.5)
    assert kernels[1]["decode_tokens_per_second"] > 0
    evaluate({"one": model, "two": model}, num_tokens=64, speed=False)
    off = measure(kernels=False)
    assert (
        off[1]["runs_on"] == "PyTorch, weights dequantized: the kernels are switched off" or "need" in off[1]["runs_on"]
    )
    assert off[1]["perplexity"] == modules[1]["perplexity"]
    parts = measure(ablations=True, speed=False, generations=0)
    assert not prompts
    assert len(parts) == 4
    assert {row["runs_on"] for row in parts[1:]} == {off[1]["runs_on"]}


def test_the_commands_say_what_a_quantized_model_runs_on(quantized):
    folder = str(quantized[1])
    done = CliRunner().invoke(app, ["eval", folder, "--num-tokens", "64", "--no-speed", "--no-kernels", "-q"])
    assert done.exit_code == 0, done.output
    assert "w4afp8: PyTorch, weights dequantized: the " in " ".join(done.stdout.split())
    done = CliRunner().invoke(app, ["chat", folder, "--prompt", "w5 w6", "--max-new-tokens", "3", "--no-kernels"])
    assert done.exit_code == 0, done.output
    assert "w4afp8: PyTorch, weights dequantized: the " in done.stderr


def test_texts_longer_than_learned_positions_are_refused_before_weights_load(make_model, tmp_path, monkeypatch):
    folder = make_model("gpt2", max_position_embeddings=64)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.max_positions == 64
    assert open_checkpoint(str(make_model())).max_positions is None
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i % 60}" for i in range(300)))
    fits = {"num_tokens": 64, "dataset": str(text), "seq_len": 64, "speed": False}
    rows = evaluate({"gpt2": checkpoint}, base=checkpoint, **fits)["rows"]
    assert math.isfinite(rows[1]["perplexity"])
    monkeypatch.setattr(Checkpoint, "load_model", None)
    for change, option in (
        ({"num_tokens": 65}, "--num-tokens"),
        ({"seq_len": 65}, "--seq-len"),
        ({"recall": [512]}, "--recall"),
        ({"generations": 1}, "--generations"),
        ({"speed": True}, "--speed"),
    ):
        with pytest.raises(KitError, match="64 learned positions") as caught:
            evaluate({"gpt2": checkpoint}, **fits | change)
        assert (caught.value.where, caught.value.exit_code) == (option, 2)
    sizes = {"batches": [1], "new_tokens": 8, "repeats": 1, "dtype": "auto", "device": "cpu"}
    with pytest.raises(KitError, match="64 learned positions, and a text of 67"):
        bench(str(folder), base=None, config=None, contexts=[8, 56], **sizes)
