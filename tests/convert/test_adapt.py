"""`kit adapt` on tiny random models: results load in plain PEFT, killed runs go on, mistakes are found early."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.convert import adapters, train
from kit.convert.adapt import AdaptOptions, adapt, plan
from kit.convert.checkpoint import Checkpoint, open_checkpoint
from kit.convert.errors import ExitCode, KitError
from kit.convert.progress import Progress
from kit.recipes import load_recipes

VOCABULARY = 96
STEPS = 12
TINY = [
    "rank=4",
    f"training.steps={STEPS}",
    "training.batch_size=4",
    "training.learning_rate=0.02",
    "train_data.seq_len=24",
    "data.num_samples=8",
    "data.seq_len=32",
]


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Train in fp32 on CPUs with bf16 instructions too, so that figures agree to rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "bf16_is_fast", lambda device: False)
        yield


@pytest.fixture(scope="module")
def llama(make_model):
    return make_model()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(train, knowledge): answers that follow from their prompts, and random text."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for first in range(4, 60):
        rows.append({"question": f"w{first} w{first + 1}", "answer": f"w{first + 20} w{first + 21} w4"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = torch.randint(4, VOCABULARY, (600,), generator=generator)
    (folder / "knowledge.txt").write_text(" ".join(f"w{word}" for word in words))
    return folder / "train.jsonl", folder / "knowledge.txt"


@pytest.fixture
def run(llama, data):
    """A function that adapts: run(output, recipe, *overrides, **options) -> report."""

    def adapted(output, recipe="lora", *overrides, progress=None, model=llama, **options):
        known = [f"train_data.dataset={data[0]}", f"data.dataset={data[1]}"]
        recipes = load_recipes(recipe, [*TINY, *known, *overrides])
        options = AdaptOptions(output, device="cpu", **options)
        return adapt(open_checkpoint(str(model)), recipes, options, progress or Progress())

    return adapted


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model):
    ids = torch.randint(4, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.eval()(ids).logits


def close(found, expected, tolerance=1e-5):
    return float((found - expected).abs().max() / expected.abs().max()) < tolerance


def answer_loss(model, folder, file):
    """Mean loss on the answers (and on their end), a row at a time: what training should have lowered."""
    tokenizer, losses = AutoTokenizer.from_pretrained(folder), []
    for row in map(json.loads, Path(file).read_text().splitlines()):
        prompt, answer = tokenizer(row["question"])["input_ids"], tokenizer(row["answer"] + " </s>")["input_ids"]
        with torch.no_grad():
            predicted = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        losses.append(-predicted.gather(1, torch.tensor(answer)[:, None]).mean())
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("recipe", ["lora", "corda", "kore"])
def test_the_adapter_loads_in_plain_peft_and_has_learned(recipe, run, llama, data, tmp_path):
    report = run(tmp_path / "out", recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model = PeftModel.from_pretrained(base(llama), tmp_path / "out").eval()
    assert answer_loss(model, llama, data[0]) < answer_loss(base(llama), llama, data[0]) - 0.2
    stage = report["stages"][f"{recipe}.training"][0]
    assert len(stage["losses"]) == STEPS
    assert stage["difference_before_training"] < 1e-5
    assert report["verification"]["relative_logit_difference"] < 1e-5
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(llama)
    purposes = [used["purpose"] for used in report["data"]]
    assert purposes == (["training"] if recipe == "lora" else ["training", "knowledge covariances"])


def test_the_reported_loss_is_that_of_the_answers(run, llama, data, tmp_path):
    """All rows in one update: the first loss is the base's mean over all answers' tokens (each has four)."""
    report = run(tmp_path / "out", "lora", "training.steps=1", "training.batch_size=1000")
    expected = answer_loss(base(llama), llama, data[0])
    assert report["stages"]["lora.training"][0]["losses"] == [pytest.approx(expected, rel=1e-5)]
    everything = run(tmp_path / "all", "lora", "training.steps=1", "training.batch_size=1000", "train_data.loss_on=all")
    assert everything["data"][0]["learned_tokens"] > report["data"][0]["learned_tokens"] == 4 * 56


@pytest.mark.parametrize("recipe", ["pissa", "kore"])
def test_an_adapter_that_is_not_trained_changes_nothing(recipe, run, llama, tmp_path):
    run(tmp_path / "out", recipe, "training.steps=0")
    assert close(logits(PeftModel.from_pretrained(base(llama), tmp_path / "out")), logits(base(llama)))


@pytest.mark.parametrize("change", ["training.micro_batch_size=1", "training.gradient_checkpointing=true"])
def test_what_saves_memory_changes_no_loss(change, run, tmp_path):
    losses = [run(tmp_path / str(len(more)), "lora", *more)["stages"]["lora.training"][0]["losses"]
              for more in ([], [change])]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_epochs_become_updates(run, tmp_path):
    report = run(tmp_path / "out", "lora", "training.epochs=1.5")
    stage, rows = report["stages"]["lora.training"][0], report["data"][0]["rows"]
    assert len(stage["losses"]) == round(1.5 * rows / 4) != STEPS
    assert stage["epochs"] == pytest.approx(1.5, abs=2 / rows)


@pytest.mark.parametrize("recipe", ["lora", "corda"])
def test_an_interrupted_run_goes_on_to_the_same_adapter(recipe, run, tmp_path, interrupt_training):
    whole = run(tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", recipe, progress=interrupt_training(5))
    with pytest.raises(KitError, match="unfinished") as caught:
        run(tmp_path / "killed", recipe)
    assert caught.value.exit_code == ExitCode.USAGE
    with pytest.raises(KitError, match="cannot resume: recipe changed"):
        run(tmp_path / "killed", recipe, "seed=1", resume=True)
    seen = interrupt_training(1000)
    resumed = run(tmp_path / "killed", recipe, resume=True, progress=seen)
    assert seen.left == 1000 - (STEPS - 5)  # the five are not taken again
    assert resumed["stages"][f"{recipe}.training"] == whole["stages"][f"{recipe}.training"]
    for name in ("whole", "killed"):
        assert (tmp_path / name / "adapter_model.safetensors").exists()
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_computes_what_the_adapter_does(dtype, run, make_model, tmp_path):
    folder = make_model(dtype=dtype)
    run(tmp_path / "out", "corda", merge=True, model=folder)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    merged = logits(model)
    adapted = logits(PeftModel.from_pretrained(base(folder), tmp_path / "out" / "adapter"))
    assert close(merged, adapted, 1e-5 if dtype == torch.float32 else 3e-2)
    assert not close(adapted, logits(base(folder)), 0.05)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_covariances_are_kept_in_a_file_and_read_from_it(run, tmp_path):
    kept = tmp_path / "covariances.safetensors"
    first = run(tmp_path / "first", "corda", covariance=kept)
    written = kept.stat().st_mtime_ns
    second = run(tmp_path / "second", "corda", "data.dataset=nowhere.txt", covariance=kept)
    assert kept.stat().st_mtime_ns == written
    assert second["stages"] == first["stages"]
    assert second["data"][1]["source"] == "knowledge.txt"


def test_the_covariances_of_the_training_data_need_no_knowledge(run, tmp_path):
    report = run(tmp_path / "out", "corda", "mode=ipm", "data.dataset=nowhere.txt")
    assert [used["purpose"] for used in report["data"]] == ["training", "training covariances"]
    assert report["data"][1]["source"] == "train.jsonl"


def test_the_report_the_card_and_the_recipe_can_be_read_by_others(run, tmp_path):
    from huggingface_hub import ModelCard

    report = run(tmp_path / "out", "kore", merge=False)
    assert json.loads((tmp_path / "out" / "kit_report.json").read_text()) == json.loads(json.dumps(report))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.tags == ["kit", "lora", "kore"]
    assert "PeftModel.from_pretrained" in card.text
    assert "| loss |" in card.text
    again = load_recipes(str(tmp_path / "out" / "kit_recipe.yaml"))[0]
    assert again.config.model_dump(mode="json") == report["recipes"][0]


def test_an_existing_adapter_is_replaced_only_on_request(run, tmp_path):
    run(tmp_path / "out", "lora", "training.steps=1")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(KitError, match="exists already") as caught:
        run(tmp_path / "out", "lora", "training.steps=2")
    assert caught.value.exit_code == ExitCode.USAGE
    run(tmp_path / "out", "lora", "training.steps=2", overwrite=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != before


def test_a_wrong_adapter_is_not_put_in_place(run, monkeypatch, tmp_path):
    export = adapters.export

    def wrong(model, folder):
        next(p for n, p in model.named_parameters() if "lora_B" in n).data.mul_(1.5)
        export(model, folder)

    monkeypatch.setattr(adapters, "export", wrong)
    with pytest.raises(KitError, match="computes other logits than the one that was trained") as caught:
        run(tmp_path / "out", "lora")
    assert caught.value.exit_code == ExitCode.VERIFICATION
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "overrides", "options", "what", "code"),
    [
        ("lolcats", [], {}, "recipe lolcats makes no adapter", ExitCode.USAGE),
        ("lora", ["train_data.dataset=''"], {}, "no text to train on", ExitCode.USAGE),
        ("lora", ["train_data.dataset=self"], {}, "learns nothing from text of its own", ExitCode.USAGE),
        ("lora", ["train_data.dataset=nowhere.jsonl"], {}, "no such file", ExitCode.FAILED),
        ("corda", ["data.dataset=nowhere.jsonl"], {}, "no such file", ExitCode.FAILED),
        ("lora", ["target_modules=[q_prj]"], {}, "no linear of the model is called 'q_prj'", ExitCode.USAGE),
        ("lora", [], {"covariance": Path("c.safetensors")}, "uses no covariances", ExitCode.USAGE),
        ("corda", [], {"covariance": Path("no/c.safetensors")}, "or written", ExitCode.USAGE),
        ("corda", [], {"covariance": Path(__file__)}, "holds no covariances", ExitCode.USAGE),
        ("lora", [], {"dtype": "int8"}, "cannot write weights as int8", ExitCode.USAGE),
        ("lora", [], {"output": Path(__file__).parent}, "exists already", ExitCode.USAGE),
    ],
)
def test_mistakes_are_found_before_anything_is_read(
    recipe, overrides, options, what, code, llama, data, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoint, "read", lambda *_, **__: pytest.fail("weights were read"))
    known = [] if recipe == "lolcats" else [f"train_data.dataset={data[0]}", f"data.dataset={data[1]}"]
    with pytest.raises(KitError, match=what) as caught:
        plan(
            open_checkpoint(str(llama)),
            load_recipes(recipe, known + overrides),
            AdaptOptions(**{"output": tmp_path / "out"} | options),
        )
    assert caught.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_for_text_is_refused(llama, data, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlavaForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    recipes = load_recipes("lora", [f"train_data.dataset={data[0]}"])
    with pytest.raises(KitError, match="no causal language model"):
        plan(open_checkpoint(str(folder)), recipes, AdaptOptions(tmp_path / "out"))


def test_covariances_that_lack_a_linear_are_found_before_weights_are_read(run, data, llama, tmp_path, monkeypatch):
    kept = tmp_path / "covariances.safetensors"
    run(tmp_path / "out", "corda", "target_modules=[q_proj]", "training.steps=0", covariance=kept)
    monkeypatch.setattr(Checkpoint, "read", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(KitError, match=r"the covariances lack 'layers\.0"):
        run(tmp_path / "other", "corda", covariance=kept)


def test_data_without_an_answer_is_found_before_weights_are_read(run, tmp_path, monkeypatch):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "w5 w6"}]}))
    monkeypatch.setattr(Checkpoint, "read", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(KitError, match="there is an answer to learn"):
        run(tmp_path / "out", "lora", f"train_data.dataset={file}")


def test_the_command_prints_its_plan_and_its_result(llama, data, tmp_path):
    from typer.testing import CliRunner

    from kit.cli import app

    settings = [part for setting in TINY if "batch" not in setting for part in ("--set", setting)]
    command = ["adapt", str(llama), "-r", "corda", "--train", str(data[0]), "--knowledge", str(data[1]), *settings]
    command += ["-o", str(tmp_path / "out"), "--device", "cpu", "-b", "2", "--seed", "3", "--json"]
    planned = json.loads(CliRunner().invoke(app, [*command, "--dry-run"], catch_exceptions=False).stdout)["plan"]
    assert planned["measured on"].startswith(f"knowledge: {data[1]}, 8 rows")
    assert f"{STEPS} updates of 2 rows" in planned["training"]
    late = CliRunner().invoke(app, [*command, "--dry-run", "--dynamic-rank"], catch_exceptions=False)
    assert "known when the ranks are" in json.loads(late.stdout)["plan"]["trained"]
    assert not (tmp_path / "out").exists()
    report = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    assert report["recipes"][0]["seed"] == 3
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_no_more_rows_are_read_than_the_updates_take(run, tmp_path):
    report = run(tmp_path / "out", "lora", "training.steps=2", "training.batch_size=3")
    assert report["data"][0]["rows"] == 6
