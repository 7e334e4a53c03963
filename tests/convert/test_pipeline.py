"""Conversions of tiny random models, through every kind of stage, killed and resumed, and read back without kit."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from pydantic import Field
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kit.convert import pipeline
from kit.convert.checkpoint import load, open_checkpoint
from kit.convert.errors import ExitCode, KitError
from kit.convert.pipeline import Options, convert, plan
from kit.convert.progress import Progress
from kit.convert.recipe import Recipe, RecipeConfig, allocate_stage, layer_stage, prepare_stage, train_stage
from kit.modules.cache import carried_cache
from kit.recipes import load_recipes

VOCABULARY = 96
FAMILIES = {  # every architecture that can be linearized, with what is special about it
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 9, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "olmo2": {},
    "gpt2": {"num_key_value_heads": 3},
}


@pytest.fixture(scope="module")
def llama(make_model):
    return make_model()


LOLCATS = [
    "window_size=8",
    "data.num_samples=8",
    "data.seq_len=40",
    "transfer.steps=12",
    "transfer.batch_size=4",
    "lora.steps=3",
    "lora.batch_size=2",
]


def lolcats(*overrides):
    return load_recipes("lolcats", [*LOLCATS, *overrides])


def run(folder, output, recipes, **options):
    options = {"eval_tokens": 0, "device": "cpu"} | options
    return convert(open_checkpoint(str(folder)), recipes, Options(output, **options), Progress())


def ids(length=50, batch=2):
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    """One whole LoLCATs conversion with its evaluation: (folder, report)."""
    output = tmp_path_factory.mktemp("out") / "converted"
    report = run(llama, output, lolcats(), eval_tokens=256)
    return output, report


def test_a_conversion_leaves_a_whole_checkpoint_and_nothing_else(converted, llama):
    output, report = converted
    assert sorted(p.name for p in output.parent.iterdir()) == ["converted"]
    names = {p.name for p in output.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "kit_recipe.yaml", "kit_report.json"} <= names
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (llama / name).read_bytes()
    assert json.loads((output / "kit_report.json").read_text()) == json.loads(json.dumps(report))
    assert report["verification"]["relative_logit_difference"] < 1e-4


def test_attention_transfer_lowers_the_error_of_every_layer(converted):
    layers = converted[1]["stages"]["lolcats.attention_transfer"]
    assert len(layers) == 3
    for layer in layers:
        assert layer["relative_error"] < layer["relative_error_before"]


def test_a_killed_train_stage_goes_on_where_it_was(converted, llama, tmp_path, interrupt_training):
    checkpoint, output = open_checkpoint(str(llama)), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, lolcats(), Options(output, eval_tokens=0, device="cpu"), interrupt_training(2))
    rest = interrupt_training(1000)
    convert(checkpoint, lolcats(), Options(output, eval_tokens=0, device="cpu", resume=True), rest)
    assert rest.left == 999  # of three updates
    before, after = (load_file(folder / "model.safetensors") for folder in (converted[0], output))
    assert all(torch.equal(before[name], after[name]) for name in before)


STEPS = 100


def long_training(model, output, *more):
    """The command of a conversion that trains for a while."""
    options = [f"transfer.steps={STEPS}", "transfer.batch_size=2", f"lora.steps={STEPS}", "lora.batch_size=2"]
    command = [sys.executable, "-m", "kit.cli", "convert", model, "-r", "lolcats", "-o", output, "--num-samples", "6"]
    command += ["--seq-len", "24", "--eval-tokens", "0", "--device", "cpu", "-q", "--set", "window_size=8", *more]
    return command + [part for option in options for part in ("--set", option)]


def test_a_process_killed_in_a_layer_and_in_lora_ends_with_the_losses_of_an_unbroken_one(llama, tmp_path):
    """SIGKILL, twice; what is left on disk is all that the next process has."""
    losses, states = {}, []
    for name in ("whole", "killed"):
        command = long_training(llama, tmp_path / name)
        for wanted in ("attention_transfer-layer-0001", "low_rank") if name == "killed" else ():
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            work = tmp_path / ".killed.kit-work"
            while process.poll() is None and not list(work.glob(f"*{wanted}*.training")):
                time.sleep(0.002)
            process.kill()
            process.wait()
            states.append([file.name for file in work.glob("*.training")])
            command = long_training(llama, tmp_path / name, "--resume")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        stages = json.loads((tmp_path / name / "kit_report.json").read_text())["stages"]
        losses[name] = [entry["losses"] for stage in stages.values() for entry in stage]
        assert (tmp_path / name / "kit_losses.png").read_bytes()[1:4] == b"PNG"
    assert [len(names) for names in states] == [1, 1]
    assert [len(curve) for curve in losses["whole"]] == [STEPS] * 4
    for whole, killed in zip(losses["whole"], losses["killed"], strict=True):
        assert killed[-1] == pytest.approx(whole[-1], abs=1e-5)
        assert killed == pytest.approx(whole, abs=1e-5)


def test_activations_on_disk_make_the_same_model(converted, llama, tmp_path):
    checkpoint, options = open_checkpoint(str(llama)), {"eval_tokens": 0, "device": "cpu"}
    items = {i.what: i.value for i in plan(checkpoint, lolcats(), Options(tmp_path / "o", activations="disk"))}
    assert items["activations"].endswith("on disk")
    convert(checkpoint, lolcats(), Options(tmp_path / "out", activations="disk", **options), Progress())
    first, second = (load_file(f / "model.safetensors") for f in (converted[0], tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KitError, match="cannot live in 'tape'"):
        plan(checkpoint, lolcats(), Options(tmp_path / "o", activations="tape"))


def test_activations_go_to_disk_where_memory_is_short(llama, tmp_path, monkeypatch):
    needed = 4 * 8 * 40 * 48 * 4  # of rows, tokens, hidden size and bytes
    checkpoint = open_checkpoint(str(llama))
    for free, place in ((2 * needed - 1, "on disk"), (2 * needed, "in memory")):
        monkeypatch.setattr("kit.convert.pipeline.free_memory", lambda device, free=free: free)
        items = {item.what: item.value for item in plan(checkpoint, lolcats(), Options(tmp_path / "o"))}
        assert items["activations"] == f"up to {needed / 1e6:.1f} MB {place}"


def test_only_what_the_recipe_trains_has_changed(converted, llama):
    before, after = load_file(llama / "model.safetensors"), load_file(converted[0] / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qkvo"}
    new = after.keys() - before.keys()
    assert {name.rsplit(".", 1)[1] for name in new} == {"feature_map_q", "feature_map_k", "window_factor"}


def test_the_report_measures_base_result_and_ablations(converted):
    rows = {row["name"]: row for row in converted[1]["evaluation"]["rows"]}
    assert list(rows) == [
        "base",
        "converted",
        "converted, window only",
        "converted, linear only",
        "converted, attention zeroed",
    ]
    assert all(row["kl"] > 0 for name, row in rows.items() if name != "base")
    assert rows["converted"]["cache_bytes"]["per_token"] == 0


def test_the_card_and_the_recipe_can_be_read_by_others(converted, tmp_path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(converted[0] / "README.md")
    assert card.data.tags == ["kit", "lolcats"]
    assert "| converted, window only |" in card.text
    again = load_recipes(str(converted[0] / "kit_recipe.yaml"))
    assert again[0].config.model_dump(mode="json") == converted[1]["recipes"][0]


NO_KIT = """
import sys, torch
sys.modules["kit"] = None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
path, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
base = AutoModel.from_pretrained(path, trust_remote_code=True)
assert type(model.model).__name__ == type(base).__name__ == "KitLlamaModel"
assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "kit_llama"
model = model.eval()
ids = torch.load(out + "/ids", weights_only=True)
with torch.no_grad():
    logits = model(ids).logits
    one = model.generate(ids[:1], max_new_tokens=20, do_sample=False)
    padded = torch.cat([torch.nn.functional.pad(ids[:1, 9:], (9, 0)), ids[1:]])
    both = model.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=20, do_sample=False)
    short = model.generate(ids[:1, 9:], max_new_tokens=20, do_sample=False)
torch.save({"logits": logits, "one": one, "both": both, "short": short}, out + "/result")
model.save_pretrained(out + "/again")
"""


def without_kit(folder, tmp_path):
    """Load and generate in a process that cannot import kit and has no cached modules."""
    torch.save(ids(), tmp_path / "ids")
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", NO_KIT, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "result", weights_only=True)


def test_it_loads_and_generates_without_kit_as_with_it(converted, tmp_path):
    got = without_kit(converted[0], tmp_path)
    model = load(str(converted[0]))
    with torch.no_grad():
        torch.testing.assert_close(got["logits"], model(ids()).logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(got["one"], model.generate(ids()[:1], max_new_tokens=20, do_sample=False))
    assert torch.equal(got["both"][:1, 9:], got["short"])
    (tmp_path / "second").mkdir()
    again = without_kit(tmp_path / "again", tmp_path / "second") if (tmp_path / "again").exists() else None
    assert again is not None
    torch.testing.assert_close(again["logits"], got["logits"])


def test_saved_from_a_kit_loaded_model_it_still_carries_its_code(converted, tmp_path):
    load(str(converted[0])).save_pretrained(tmp_path / "saved")
    (tmp_path / "run").mkdir()
    got = without_kit(tmp_path / "saved", tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(got["logits"], load(str(converted[0]))(ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_families_dtypes_and_tying(make_model, tmp_path, family, dtype, tied):
    source = make_model(family, dtype=dtype, tie_word_embeddings=tied)
    run(source, tmp_path / "out", lolcats("transfer.steps=2", "lora.steps=1"), max_shard_size=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert checkpoint.dtype == str(dtype).removeprefix("torch.")
    assert ("lm_head.weight" in checkpoint.tensors) != tied
    assert checkpoint.config["tie_word_embeddings"] == tied
    model = load(str(tmp_path / "out"), dtype="float32")
    with torch.no_grad():
        assert model(ids()).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_conversion_with_a_long_window_is_the_original(make_model, tmp_path, family):
    source = make_model(family, **FAMILIES[family])
    run(source, tmp_path / "out", lolcats("window_size=64", "transfer.steps=0", "lora.steps=0"))
    base = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    with torch.no_grad():
        want, got = base(ids()).logits, load(str(tmp_path / "out"))(ids()).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_every_family_trains_and_loads_without_kit(make_model, tmp_path, logits_without_kit, family):
    source, out = make_model(family, **FAMILIES[family]), tmp_path / "out"
    report = run(source, out, lolcats("distill.steps=2", "distill.batch_size=2", "transfer.steps=30"))
    stages = report["stages"]
    trained = [layer for layer in stages["lolcats.attention_transfer"] if layer]
    assert len(trained) == (3 if "sliding_window" not in FAMILIES[family] else 1)
    assert all(layer["relative_error"] < layer["relative_error_before"] for layer in trained)
    assert stages["lolcats.low_rank_linearizing"][0]["trained_parameters"] > 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert all("linear_attention" in name for name in after.keys() - before.keys())
    model = load(str(out))
    with torch.no_grad():
        want = model(ids(), use_cache=False).logits
        steps = torch.cat([o.logits for o in stepped(model, ids(), [9, 1, 1, 30, 9])], 1)
        torch.testing.assert_close(steps, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_without_kit(out, ids(), trust_remote_code=True), want, atol=1e-5, rtol=1e-5)


def stepped(model, tokens, splits):
    """Outputs of a text that comes in parts."""
    cache = {}
    for part in tokens.split(splits, 1):
        out = model(part, use_cache=True, **cache)
        cache = carried_cache(out)
        yield out


def test_an_exact_recipe_file_makes_the_same_model_again(llama, converted, tmp_path):
    run(llama, tmp_path / "again", load_recipes(str(converted[0] / "kit_recipe.yaml")))
    first, second = (load_file(f / "model.safetensors") for f in (converted[0], tmp_path / "again"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, msg=name)


class ToyConfig(RecipeConfig):
    recipe: Literal["toy"] = Field("toy", description="Toy.")
    factor: float = Field(2.0, description="Scale.")


class Toy(Recipe):
    """A recipe with a stage of every kind; every result can be told in advance."""

    name = "toy"
    config_class = ToyConfig
    config: ToyConfig
    kill_at: str | None = None
    calls: list[str] = []  # noqa: RUF012

    def called(self, what):
        Toy.calls.append(what)
        if what == Toy.kill_at:
            raise KeyboardInterrupt

    @prepare_stage
    def fold(self, view):
        """Move the first norm's gain into q, k and v: the function stays the same."""
        self.called("prepare")
        for index in range(3):
            prefix = f"model.layers.{index}."
            gain = view.read(prefix + "input_layernorm.weight") * self.config.factor
            for p in "qkv":
                weight = view.read(f"{prefix}self_attn.{p}_proj.weight")
                view.write(f"{prefix}self_attn.{p}_proj.weight", weight / self.config.factor)
            view.write(prefix + "input_layernorm.weight", gain)

    @layer_stage
    def halve(self, layer):
        """Halve the down projection; the next layer must see the outputs of the halved one."""
        self.called(f"layer {layer.index}")
        mean = float(layer.inputs.hidden.abs().mean())
        layer.module.mlp.down_proj.weight.mul_(0.5)
        return {"input": mean, "index": layer.index}

    @allocate_stage
    def choose(self, stats, model):
        self.called("allocate")
        return {"total": sum(m["index"] for m in stats["toy.halve"])}

    @train_stage
    def shift(self, run):
        self.called("train")
        run.model.model.norm.weight.add_(float(self.allocation["total"]))
        return {"done": 1.0}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(Toy, "kill_at", None)
    monkeypatch.setattr(Toy, "calls", [])
    return lambda: [Toy(ToyConfig(data={"num_samples": 2, "seq_len": 16}))]


def check_toy(folder, output):
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    for name, tensor in before.items():
        factor = 2.0 if "input_layernorm" in name else 0.5 if re.search("q_proj|k_proj|v_proj|down_proj", name) else 1.0
        torch.testing.assert_close(after[name], tensor * factor + (3.0 if name == "model.norm.weight" else 0.0))


def test_every_kind_of_stage_runs_in_order_and_does_what_it_says(llama, tmp_path, toy):
    report = run(llama, tmp_path / "out", toy())
    assert Toy.calls == ["prepare", "layer 0", "layer 1", "layer 2", "allocate", "train"]
    check_toy(llama, tmp_path / "out")
    assert report["allocation"] == {"toy": {"total": 3}}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"  # no code where none is needed
    assert not list((tmp_path / "out").glob("*.py"))
    # the inputs of layer 2, worked out by hand from the folded and halved model
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    rows = report["data"][0]
    assert (rows["rows"], rows["seq_len"]) == (2, 16)
    assert folded.config.model_type == "llama"


def test_layers_see_the_outputs_of_transformed_layers(llama, tmp_path, toy):
    text = tmp_path / "data.jsonl"
    words = " ".join(f"w{i}" for i in ids(16, 1)[0].tolist())
    text.write_text(json.dumps({"text": words}) + "\n")
    recipes = [Toy(ToyConfig(data={"num_samples": 1, "seq_len": 16, "dataset": str(text)}))]
    report = run(llama, tmp_path / "out", recipes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        hidden = model(ids(16, 1), output_hidden_states=True).hidden_states
    seen = [m["input"] for m in report["stages"]["toy.halve"]]
    torch.testing.assert_close(torch.tensor(seen), torch.stack([h.abs().mean() for h in hidden[:3]]))


@pytest.mark.parametrize("at", ["prepare", "layer 0", "layer 1", "layer 2", "allocate", "train", "write", "evaluate"])
def test_killed_anywhere_the_old_output_is_intact_and_resume_finishes(llama, tmp_path, toy, monkeypatch, at):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")
    Toy.kill_at = at

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    if at == "write":
        monkeypatch.setattr("kit.convert.export.verify_checkpoint", killed)
    if at == "evaluate":
        monkeypatch.setattr("kit.convert.report.write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        run(llama, output, toy(), overwrite=True)
    assert [(p.name, p.read_text()) for p in output.iterdir()] == [("config.json", "old")]
    finished = [p for p in tmp_path.rglob("config.json") if ".out.kit-work" not in p.parts]
    assert finished == [output / "config.json"]
    monkeypatch.undo()
    Toy.kill_at, Toy.calls = None, []
    run(llama, output, toy(), overwrite=True, resume=True)
    check_toy(llama, output)
    order = ["prepare", "layer 0", "layer 1", "layer 2", "allocate", "train"]
    assert Toy.calls == (order[order.index(at) :] if at in order else [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_resumed_lolcats_run_equals_an_unbroken_one(llama, converted, tmp_path, monkeypatch):
    from kit.recipes.lolcats import Lolcats

    real, calls = Lolcats.low_rank_linearizing, []

    def killed(self, run):
        calls.append(1)
        raise KeyboardInterrupt

    killed._kit_stage = real._kit_stage
    monkeypatch.setattr(Lolcats, "low_rank_linearizing", killed)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", lolcats())
    monkeypatch.undo()
    run(llama, tmp_path / "out", lolcats(), resume=True)
    first, second = (load_file(f / "model.safetensors") for f in (converted[0], tmp_path / "out"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, msg=name)


def test_recipes_compose_in_order(llama, tmp_path, toy):
    recipes = [*toy(), *lolcats("lora.steps=0")]
    run(llama, tmp_path / "out", recipes)
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(after[name], before[name] * 0.5)
    assert type(load(str(tmp_path / "out"))).__name__ == "KitLlamaForCausalLM"
    assert "recipes" in yaml.safe_load((tmp_path / "out" / "kit_recipe.yaml").read_text())


def test_a_result_that_computes_something_else_is_not_put_in_place(llama, tmp_path, toy, monkeypatch):
    from kit.convert import export

    real = export.write_checkpoint

    def broken(folder, **options):
        real(folder, **options)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"] += 0.3
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(export, "write_checkpoint", broken)
    with pytest.raises(KitError, match="other logits") as caught:
        run(llama, tmp_path / "out", toy())
    assert caught.value.exit_code == ExitCode.VERIFICATION
    assert not (tmp_path / "out").exists()


def test_a_tensor_lost_in_writing_is_found(llama, tmp_path, toy, monkeypatch):
    from kit.convert import export

    real = export.write_checkpoint

    def broken(folder, **options):
        real(folder, **options)
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "write_checkpoint", broken)
    with pytest.raises(KitError) as caught:
        run(llama, tmp_path / "out", toy())
    assert caught.value.exit_code == ExitCode.VERIFICATION


def test_the_loss_that_explodes_is_named(llama, tmp_path):
    with pytest.raises(KitError, match=r"the loss of lora is (nan|inf)") as caught:
        run(llama, tmp_path / "out", lolcats("lora.learning_rate=1e30", "lora.steps=8"))
    assert "learning_rate" in caught.value.next_step


def test_the_plan_needs_no_torch_and_no_weights(llama):
    code = f"""
import sys
from pathlib import Path
from kit.convert.checkpoint import open_checkpoint
from kit.convert.pipeline import Options, plan
from kit.recipes import load_recipes
for item in plan(open_checkpoint({str(llama)!r}), load_recipes("lolcats"), Options(Path("/tmp/nowhere-kit"))):
    print(item.what, "=", item.value)
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr
    assert "converted = 3 of 3 attention layers" in done.stdout


def test_what_fails_before_any_weight_is_read(llama, make_model, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(str(llama))
    monkeypatch.setattr(type(checkpoint), "read", lambda *a, **k: pytest.fail("a weight was read"))
    (tmp_path / "there").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    cases = {
        "exists already": (checkpoint, lolcats(), Options(tmp_path / "there")),
        "is no checkpoint": (checkpoint, lolcats(), Options(tmp_path / "notes", overwrite=True)),
        "is the model itself": (checkpoint, lolcats(), Options(llama, overwrite=True)),
        "cannot write weights as int3": (checkpoint, lolcats(), Options(tmp_path / "o", dtype="int3")),
        "never leave a window": (checkpoint, lolcats("window_size=64"), Options(tmp_path / "o")),
    }
    for message, (model, recipes, options) in cases.items():
        with pytest.raises(KitError, match=message) as caught:
            plan(model, recipes, options)
        assert caught.value.exit_code == ExitCode.USAGE
    checkpoint.config = checkpoint.config | {"model_type": "mamba"}
    with pytest.raises(KitError, match="does not know the architecture 'mamba'"):
        plan(checkpoint, lolcats(), Options(tmp_path / "o"))
    checkpoint.config = checkpoint.config | {"model_type": "llama", "num_attention_heads": 6, "head_dim": 16}
    with pytest.raises(KitError, match="should have shape"):
        plan(checkpoint, lolcats(), Options(tmp_path / "o"))


def test_too_little_disk_is_said_first(llama, tmp_path, monkeypatch):
    usage = pipeline.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(KitError, match="too little disk"):
        plan(open_checkpoint(str(llama)), lolcats(), Options(tmp_path / "o"))


def test_the_example_in_contributing_works(llama, tmp_path, monkeypatch):
    text = (Path(pipeline.__file__).parents[1] / "CONTRIBUTING.md").read_text()
    code, preset = re.search(r"```python\n(.*?)```\n\n```yaml\n(.*?)```", text, re.DOTALL).groups()
    (tmp_path / "magnitude_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    import magnitude_example

    assert yaml.safe_load(preset)["recipe"] == "magnitude"
    recipe = magnitude_example.Magnitude(magnitude_example.MagnitudeConfig(**yaml.safe_load(preset)))
    report = run(llama, tmp_path / "out", [recipe])
    for layer in report["stages"]["magnitude.prune"]:
        assert layer["sparsity"] == pytest.approx(0.5, abs=0.01)
    weight = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
