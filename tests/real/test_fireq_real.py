"""Quantization of the real model on a small budget: calibration must pay, and others must read the result."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import kit
from kit.convert.checkpoint import open_checkpoint
from kit.convert.evaluate import evaluate
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.recipes import load_recipes

pytestmark = pytest.mark.real

BUDGET = ["group_size=64", "data.num_samples=8", "data.seq_len=256"]


def quantize(folder, preset, *overrides):
    budget = BUDGET if preset != "rtn" else BUDGET[:1]
    options = Options(folder, eval_tokens=0, device="cpu")
    convert(open_checkpoint("smollm2"), load_recipes(preset, [*budget, *overrides]), options, Progress())
    return open_checkpoint(str(folder))


def test_a_short_calibration_beats_plain_rounding_even_with_the_cache_in_int4(tmp_path):
    models = {name: quantize(tmp_path / name, name) for name in ("fireq", "rtn")}
    rows = evaluate(models, base=open_checkpoint("smollm2"), num_tokens=1024, seed=7, ablations=True, speed=False)
    kl = {row["name"]: row["kl"] for row in rows["rows"] if "kl" in row}
    assert kl["fireq"] < 0.6 * kl["rtn"]
    assert kl["fireq, weights only"] < kl["fireq"]


def test_transformers_alone_computes_what_kit_computes(tmp_path):
    out = tmp_path / "out"
    quantize(out, "rtn", "kv.bits=null", "query=null")
    ids = torch.randint(1000, 40000, (1, 256), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    script = """
import sys, torch
sys.modules["kit"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["ids"]).logits}, sys.argv[3])
"""
    command = [sys.executable, "-c", script, out, tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=600)
    theirs = load_file(tmp_path / "logits.safetensors")["logits"].float()
    with torch.no_grad():
        ours = kit.load(str(out), dtype="bfloat16")(ids).logits.float()
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2
    assert float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()) > 0.97
