"""What a plan says of disk and memory, beside what a conversion has there; what cannot fit is refused first."""

import re
import weakref

import pytest
import safetensors.torch
import torch

from kit.convert.checkpoint import open_checkpoint
from kit.convert.errors import ExitCode, KitError
from kit.convert.export import verify_checkpoint
from kit.convert.pipeline import Options, convert, plan
from kit.convert.progress import Progress
from kit.convert.streaming import Scratch
from kit.recipes import load_recipes

ROWS = ["data.num_samples=6", "data.seq_len=24", "window_size=8"]
ALL = ["transfer.steps=2", "lora.steps=0", "distill.steps=3", "distill.batch_size=2"]
CASES = {
    "lolcats-all": ("lolcats", [*ALL, "feature_dim=64"]),
    "lolcats-cached": ("lolcats", [*ALL, "distill.teacher=cached", "distill.top_k=90"]),
    "lolcats-lora": ("lolcats", ["transfer.steps=2", "lora.steps=30", "lora.batch_size=1", "lora.rank=64"]),
    "lizard-lora-streamed": ("lizard", [*ALL, "distill.parameters=lora", "distill.rank=64", "distill.streamed=true"]),
    "hedgehog": ("hedgehog", ["transfer.steps=30", "transfer.batch_size=1", "distill.steps=0", "feature_dim=512"]),
    "window": ("window", ["keep_full=34%"]),
}
UNITS = {"MB": 1e6, "GB": 1e9}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(hidden_size=96, intermediate_size=2048, num_attention_heads=6, num_key_value_heads=2)


def said(items, what):
    """The first size in a line of the plan."""
    (value,) = [item.value for item in items if item.what == what]
    number, unit = re.search(r"([\d.,]+) (MB|GB)", value).groups()
    return float(number.replace(",", "")) * UNITS[unit]


@pytest.mark.parametrize("case", CASES)
def test_the_disk_and_the_activations_of_a_plan_are_those_of_the_run(model, tmp_path, monkeypatch, case):
    name, options = CASES[case]
    recipes, output = load_recipes(name, [*ROWS, *options]), tmp_path / "out"
    how = Options(output, device="cpu", eval_tokens=0)
    items = plan(open_checkpoint(str(model)), recipes, how)
    most, live, held = [0], [0], [0]
    save_file, empty = safetensors.torch.save_file, Scratch.empty

    def measured_save(*args, **kwargs):
        save_file(*args, **kwargs)
        most[0] = max(most[0], sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))

    def measured_empty(self, *args):
        tensor = empty(self, *args)
        live[0] += tensor.nbytes
        held[0] = max(held[0], live[0])
        weakref.finalize(tensor, lambda size: live.__setitem__(0, live[0] - size), tensor.nbytes)
        return tensor

    monkeypatch.setattr(safetensors.torch, "save_file", measured_save)
    monkeypatch.setattr("kit.convert.teacher.save_file", measured_save)
    monkeypatch.setattr(Scratch, "empty", measured_empty)
    convert(open_checkpoint(str(model)), recipes, how, Progress())
    small = 1e6  # code, card, tokenizer, headers
    print(case, "disk", said(items, "disk"), most, "activations", said(items, "activations"), held)
    assert most[0] - small < said(items, "disk") < 1.1 * most[0] + small / 10
    assert 0.7 * said(items, "activations") - 1e5 < held[0] <= said(items, "activations") + 1e5


def planned(model, output, name, *options, device="cpu", **more):
    return plan(
        open_checkpoint(str(model)), load_recipes(name, [*ROWS, *options]), Options(output, device=device, **more)
    )


def test_memory_is_counted_by_what_is_trained(model, tmp_path):
    """Weights, gradients, two moments, and a copy of the base where it runs beside: by hand."""
    new = {"lolcats": 3 * (8 * 16 * 16 + 6), "lizard": 3 * (8 * 16 * 16 + 96 + 1 + 12)}
    own = open_checkpoint(str(model)).num_parameters
    text = tmp_path / "t.txt"
    text.write_text("w4 w5 w6")
    adapters = 3 * 8 * (2 * (96 + 96) + 2 * (96 + 32))
    whole = "memory, whole model"

    def needs(*options, name="lolcats", device="cpu"):
        return said(
            planned(
                model,
                tmp_path / "o",
                name,
                "transfer.steps=1",
                f"data.dataset={text}",
                *options,
                device=device,
                eval_tokens=0,
            ),
            whole,
        )

    lora = ["distill.steps=0", "lora.steps=1"]
    near = {"abs": 6e4}  # the figure has one decimal
    assert needs("distill.steps=1", "lora.steps=0") == pytest.approx(20 * own + 16 * new["lolcats"], **near)
    assert needs("distill.steps=1", "lora.steps=0", device="cuda") == pytest.approx(
        22 * own + 16 * new["lolcats"], **near
    )  # on a GPU the fp32 weights run rounded to bf16, with gradients in bf16
    cached = ["distill.steps=1", "distill.teacher=cached", "lora.steps=0"]
    assert needs(*cached) == pytest.approx(16 * own + 16 * new["lolcats"], **near)
    assert needs(*cached, device="cuda") == pytest.approx(20 * own + 16 * new["lolcats"], **near)
    assert needs(*lora) == pytest.approx(4 * own + 4 * new["lolcats"] + 16 * adapters, **near)
    assert needs(*lora, device="cuda") == pytest.approx(2 * own + 4 * new["lolcats"] + 16 * adapters, **near)
    some = ["distill.steps=1", "distill.parameters=lora", "lora.steps=0"]
    assert needs(*some, name="lizard") == pytest.approx(4 * own + 16 * new["lizard"] + 16 * adapters, **near)


def test_rows_longer_than_learned_positions_are_refused_before_weights_load(make_model, tmp_path):
    folder = make_model("gpt2", num_key_value_heads=3, max_position_embeddings=64)
    planned(folder, tmp_path / "o", "lolcats", "data.seq_len=64", eval_tokens=64)
    with pytest.raises(KitError, match="64 learned positions, and a text of 65 tokens") as error:
        planned(folder, tmp_path / "o", "lolcats", "data.seq_len=65", eval_tokens=64)
    assert (error.value.where, error.value.exit_code) == ("--seq-len", ExitCode.USAGE)


def test_a_streamed_conversion_of_a_text_holds_no_whole_model(model, tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("w4 w5 w6")
    options = ["distill.steps=1", "distill.parameters=lora", "distill.streamed=true", "lora.streamed=true"]
    options += [f"data.dataset={text}", "distill.teacher=cached"]
    items = planned(model, tmp_path / "o", "lolcats", *options, eval_tokens=0)
    values = {item.what: item.value for item in items}
    assert values["memory, whole model"] == "nothing holds the whole model"
    assert "201 updates" in values["streamed training"]
    assert "64 a token" in values["teacher's logits"]
    with pytest.raises(KitError, match="all weights cannot be trained with one layer in memory") as error:
        planned(model, tmp_path / "o", "lolcats", "distill.steps=1", "distill.streamed=true")
    assert error.value.exit_code == ExitCode.USAGE
    with pytest.raises(KitError, match="cannot stay compiled") as error:
        planned(model, tmp_path / "o", "lolcats", *options, "distill.compile=true")
    assert error.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("options", "eval_tokens", "what", "advice"),
    [
        ([], 0, "sampling text from the model", "--dataset"),
        (["data.dataset=TEXT"], 0, "low_rank_linearizing", "lora.streamed=true"),
        (["data.dataset=TEXT", "lora.steps=0", "distill.steps=2"], 0, "logit_distillation", "distill.streamed=true"),
        (["data.dataset=TEXT", "lora.steps=0"], 64, "evaluation", "--eval-tokens 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_load(
    model, tmp_path, monkeypatch, options, eval_tokens, what, advice
):
    text = tmp_path / "t.txt"
    text.write_text(" ".join(f"w{i}" for i in range(4, 90)) * 4)
    recipes = load_recipes("lolcats", [*ROWS, "transfer.steps=1", *[o.replace("TEXT", str(text)) for o in options]])
    checkpoint = open_checkpoint(str(model))
    monkeypatch.setattr(type(checkpoint), "read", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr("kit.convert.pipeline.free_memory", lambda device: checkpoint.nbytes // 2)
    with pytest.raises(KitError, match=f"{what} holds the whole model") as error:
        convert(checkpoint, recipes, Options(tmp_path / "o", device="cpu", eval_tokens=eval_tokens), Progress())
    assert advice in error.value.next_step
    assert not (tmp_path / ".o.kit-work").exists()


def test_a_result_that_fits_nowhere_is_verified_layer_by_layer(model, tmp_path, monkeypatch):
    text = tmp_path / "t.txt"
    text.write_text(" ".join(f"w{i}" for i in range(4, 90)) * 4)
    options = [
        *ROWS,
        f"data.dataset={text}",
        "transfer.steps=1",
        "lora.steps=2",
        "lora.batch_size=2",
        "lora.streamed=true",
    ]
    checkpoint, output = open_checkpoint(str(model)), tmp_path / "o"
    monkeypatch.setattr("kit.convert.pipeline.free_memory", lambda device: checkpoint.nbytes // 2)
    loaded = []
    monkeypatch.setattr("kit.convert.checkpoint.load", lambda *_, **__: loaded.append(1))
    report = convert(
        checkpoint, load_recipes("lolcats", options), Options(output, device="cpu", eval_tokens=0), Progress()
    )
    assert not loaded
    assert report["verification"]["relative_logit_difference"] < 1e-5
    written = safetensors.torch.load_file(output / "model.safetensors")
    probe = torch.arange(4, 30)[None]
    other = torch.randn(1, 26, 96)
    with pytest.raises(KitError, match="computes other logits") as error:
        verify_checkpoint(output, probe, other, dtype=torch.float32, device=None)
    assert error.value.exit_code == ExitCode.VERIFICATION
    written.pop("model.layers.1.self_attn.linear_attention.feature_map_q")
    safetensors.torch.save_file(written, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KitError, match=r"missing model\.layers\.1\.self_attn") as error:
        verify_checkpoint(output, probe, other, dtype=torch.float32, device=None)
    assert error.value.exit_code == ExitCode.VERIFICATION
