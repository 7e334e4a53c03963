"""The ablation: windows against explicit masks, the rule against its words, and the command on tiny models."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from kit.convert.ablate import BRANCHES, ablate, judge, training_length
from kit.convert.ablation_table import ablation_cells, by_length, plot_ablation, write_ablation
from kit.convert.checkpoint import open_checkpoint
from kit.convert.errors import KitError
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.convert.windowed import pattern_mask, windowed
from kit.modules.linear_attention import ABLATIONS
from kit.recipes import load_recipes

KIT = [sys.executable, "-m", "kit.cli"]


def tiny(family="llama", implementation="sdpa", **change):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 64, "max_position_embeddings": 256, "pad_token_id": 0} | change  # fmt: skip
    if family != "gpt2":
        shape |= {"num_key_value_heads": 2, "head_dim": 8} | change
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens(length, batch=2):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def allowed(i, j, window, sinks):
    """A query at i and a key at j, in words: the first `sinks` tokens, and the last `window - sinks`."""
    return j <= i and (j < sinks or i - j < window - sinks)


@pytest.mark.parametrize(("window", "sinks"), [(6, 2), (5, 0), (1, 0), (40, 4)])
def test_the_pattern_is_what_the_words_say(window, sinks):
    want = torch.tensor([[allowed(i, j, window, sinks) for j in range(20)] for i in range(20)])
    assert torch.equal(pattern_mask(20, 20, window, sinks)[0, 0], want)
    assert torch.equal(pattern_mask(3, 20, window, sinks)[0, 0], want[-3:])
    assert torch.equal(pattern_mask(3, 8, window, sinks, first_key=12)[0, 0], want[-3:, 12:])
    assert int(want.sum(-1).max()) == min(window, 20)


def explicit(model, ids, window, sinks):
    """The same model with an additive mask made by a loop."""
    length = ids.shape[1]
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min)
    for i in range(length):
        for j in range(length):
            if allowed(i, j, window, sinks):
                mask[..., i, j] = 0
    return model(ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_windowed_model_is_the_model_behind_an_explicit_mask(family, implementation):
    model, ids = tiny(family, implementation), tokens(30)
    with torch.no_grad():
        full = model(ids).logits
        want = explicit(tiny(family, "eager"), ids, 7, 2)
        with windowed(model, 7, 2):
            torch.testing.assert_close(model(ids, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
            out, parts = None, []
            for part in ids.split([4, 1, 1, 20, 4], 1):  # the cache holds everything, the mask still narrows it
                out = model(part, past_key_values=out.past_key_values if out else None, use_cache=True)
                parts.append(out.logits)
            torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-4, rtol=1e-4)
            padded = torch.nn.functional.pad(ids, (5, 0))
            mask = (torch.arange(35) >= 5).long().expand(2, -1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            left = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
            torch.testing.assert_close(left, want, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(full, want, atol=1e-2)
        assert torch.equal(model(ids).logits, full)  # nothing is left behind


def test_a_window_never_widens_the_model_s_own():
    model, ids = tiny("mistral", sliding_window=5), tokens(30)
    with torch.no_grad(), windowed(model, 12, 2):
        got = model(ids).logits
        torch.testing.assert_close(got, tiny("mistral", sliding_window=5)(ids).logits, atol=1e-4, rtol=1e-4)


def test_attention_that_takes_no_mask_is_refused():
    model = tiny()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(KitError, match="'flash_attention_2' does not take"), windowed(model, 4, 1):
        pass
    with pytest.raises(KitError, match="which this model has not"), windowed(tiny("mamba", "eager"), 4, 1):
        pass


def row(name, losses, buckets=None):
    perplexity = math.exp(sum(losses) / len(losses))
    found = {"name": name, "window_losses": losses, "perplexity": perplexity, "perplexity_stderr": 0.5}
    ends = (256, 512, 768, 1024)
    buckets = buckets or [losses] * 4
    found["perplexity_by_position"] = [
        {"start": end - 256, "end": end, "perplexity": math.exp(sum(b) / len(b)), "window_losses": b}
        for end, b in zip(ends, buckets, strict=True)
    ]
    return found


HARD = [2.9, 3.1, 3.0, 3.2, 2.8, 3.05, 2.95, 3.15]  # windows differ far more than models do


def rows(without=0.5, alone=-1.0, count=8, converted=0.2, free=0.3, buckets=None):
    hard = HARD[:count]
    noise = [0.001 * (-1) ** i for i in range(count)]

    def at(shift):
        return [h + shift + e for h, e in zip(hard, noise, strict=True)]

    return [
        row("base", hard),
        row("m", at(converted), buckets and [[h + b for h in hard] for b in buckets]),
        row("m, window only", [h + converted + without for h in hard]),
        row("m, linear only", [h + 4 + alone for h in hard]),
        row("m, attention zeroed", at(4)),
        row("base, window 64, 4 sinks", at(free + 0.4)),
        row("base, window 128, 4 sinks", [h + free for h in hard]),
    ]


@pytest.mark.parametrize(
    ("change", "carries"),
    [
        ({}, True),
        ({"without": 0.004}, False),  # a rise of 0.4 %: real, and nothing
        ({"without": -0.2}, False),
        ({"alone": 0.0, "without": 0.5}, None),  # alone it is what no attention is
        ({"alone": 0.5}, False),
        ({"without": 0.0105}, None),  # the interval holds the bar
        ({"count": 5}, None),
    ],
)
def test_the_rule(change, carries):
    found = judge(rows(**change), 512)
    assert found["carries_weight"] is carries
    words = {True: "carries weight:", False: "carries no weight:", None: "cannot be told"}
    assert words[carries] in found["sentence"]
    assert found["without_it"]["ratio"] == pytest.approx(math.exp(change.get("without", 0.5)), rel=0.01)
    assert found["without_it"]["low"] <= found["without_it"]["ratio"] <= found["without_it"]["high"]


def test_the_sentence_compares_with_the_best_training_free_row():
    assert "better than the best training-free row, window 128, 4 sinks" in judge(rows(), None)["sentence"]
    assert "worse than the best training-free row" in judge(rows(free=-0.1), None)["sentence"]
    assert "no different from the best" in judge(rows(free=0.2), None)["sentence"]


def test_past_the_training_length_is_told_beside_the_base():
    found = judge(rows(buckets=[0.1, 0.2, 0.3, 0.6]), 512)["beyond_training"]
    assert (found["at"], found["within"]) == ([768, 1024], [256, 512])
    assert found["ratio"] == pytest.approx(math.exp(0.6 - 0.2))
    assert judge(rows(), 1024)["beyond_training"] is None
    assert judge(rows(), 100)["beyond_training"] is None


def test_the_branches_are_those_of_the_modules():
    assert tuple(ABLATIONS) == BRANCHES


def test_needles_are_the_mean_over_depths():
    needles = [{"length": 64, "depth": d, "accuracy": a, "extrapolation": False} for d, a in ((0, 0.0), (1, 0.5))]
    assert by_length({"recall": {"needle": needles}}, "needle")[64]["accuracy"] == 0.25


def test_recall_stands_in_the_table_and_the_plot(tmp_path):
    found = rows()
    for number, each in enumerate(found):
        mqar = [{"length": n, "accuracy": 0.1 * number, "extrapolation": n > 512} for n in (512, 1024)]
        needle = [{**one, "depth": d} for one in mqar for d in (0.0, 1.0)]
        each["recall"] = {"mqar": mqar, "needle": needle}
        each["tasks"] = {"piqa": {"main": "acc,none", "metrics": {"acc,none": 0.5 + 0.01 * number}}}
    asked = {"pairs": 16, "haystack": "hay.txt", "seed": 1}
    result = {"rows": found, "settings": {"recall": asked}, "verdict": judge(found, 512)}
    header, cells = ablation_cells(result)
    assert header[3:] == ["MQAR % at 512, 1,024*", "needle % at 512, 1,024*", "piqa"]
    assert cells[3][3:] == ["30 · 30", "30 · 30", "0.5300"]
    write_ablation(result, tmp_path / "plot.png", tmp_path / "made" / "here")
    assert (tmp_path / "plot.png").read_bytes() == (tmp_path / "made" / "here" / "ablate.png").read_bytes()
    assert "needle in hay.txt" in (tmp_path / "made" / "here" / "ablate.md").read_text()
    with pytest.raises(KitError, match="cannot be written"):
        plot_ablation(result, tmp_path / "none" / "plot.png")


def test_a_conversion_without_training_has_no_training_length(tmp_path):
    report = {"recipes": [{"data": {"seq_len": 24}}], "stages": {"lolcats.attention_transfer": [{}, {"losses": [1.0]}]}}
    (tmp_path / "kit_report.json").write_text(json.dumps(report))
    assert training_length(tmp_path) == 24
    (tmp_path / "kit_report.json").write_text(json.dumps(report | {"stages": {"window.layer_sensitivity": [{}]}}))
    assert training_length(tmp_path) is None


def test_the_command(make_model, tmp_path):
    base = make_model(num_hidden_layers=2, num_attention_heads=2, hidden_size=32)
    out, done = tmp_path / "out", tmp_path / "ablated"
    options = ["--set", "window_size=8", "--num-samples", "4", "--seq-len", "24", "-b", "2", "--eval-tokens", "0", "-q"]
    steps = ["--set", "transfer.steps=2", "--set", "lora.steps=0"]
    subprocess.run([*KIT, "convert", base, "-r", "lolcats", "-o", out, *options, *steps], check=True)
    text = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    text.write_text(" ".join(f"w{i}" for i in torch.randint(4, 96, (700,), generator=generator).tolist()))
    command = [*KIT, "ablate", out, "--base", base, "--dataset", text, "--num-tokens", "64", "-q", "-o", done]
    command += ["-L", "7"]
    shown = subprocess.run([*command, "--recall", "0"], check=True, capture_output=True, text=True).stdout
    result = json.loads((done / "ablate.json").read_text())
    assert result["verdict"]["sentence"] in " ".join(shown.split())
    names = ["base", "out", "out, window only", "out, linear only", "out, attention zeroed"]
    names += ["base, window 64, 4 sinks", "base, window 128, 4 sinks"]
    assert [each["name"] for each in result["rows"]] == names
    assert result["verdict"]["training_length"] == 24
    assert result["settings"]["window"] == 96  # four times that
    assert result["verdict"]["windows"] == 7
    assert result["verdict"]["beyond_training"]["within"][1] <= 24
    assert (done / "ablate.png").read_bytes()[1:4] == b"PNG"
    header, cells = ablation_cells(result)
    assert header[2] == "before token 12, 24, 48, 96"
    assert (done / "ablate.md").read_text().startswith("| " + " | ".join(header))
    assert len(cells) == 7
    free, full = result["rows"][6], result["rows"][0]
    assert free["perplexity"] == pytest.approx(full["perplexity"], rel=1e-4)  # 96 tokens fit in 128
    assert (free["kl"], free["top1"]) == (pytest.approx(0, abs=1e-5), 1)  # and so do 64 sampled ones
    assert result["rows"][5]["kl"] == pytest.approx(0, abs=1e-5)
    assert "kl" not in full
    for file in ("results.json", "run.json"):
        (done / file).unlink(missing_ok=True)
    refused = subprocess.run(command, capture_output=True, text=True)  # ablate's own files are enough
    assert refused.returncode == 2
    assert "results of an earlier run are there" in refused.stderr
    refused = subprocess.run([*KIT, "ablate", base, "--base", base], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no linear attention" in refused.stderr
    refused = subprocess.run([*KIT, "ablate", out, "--base", base], capture_output=True, text=True)
    assert "next:  add --dataset FILE" in refused.stderr


def test_a_window_alone_has_no_branch_to_take_away(make_model, tmp_path):
    base, out = open_checkpoint(str(make_model(num_hidden_layers=2))), tmp_path / "out"
    options = Options(out, device="cpu", eval_tokens=0)
    convert(base, load_recipes("window", ["window_size=8"]), options, Progress())
    with pytest.raises(KitError, match="no linear attention"):
        ablate({"out": open_checkpoint(str(out))}, base=base, dataset="text.txt")
