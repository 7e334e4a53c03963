"""Tiny random models that tests convert, run and measure."""

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU, slowly

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """A function that writes a tiny random model with a tokenizer of words w4, w5, ..., and returns its folder."""

    def make(family="llama", dtype=torch.float32, seed=0, **change):
        folder = tmp_path_factory.mktemp(f"{family}-") / "tiny"
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SHAPE | change))
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # matrices, and the fused ones of experts
                torch.nn.init.normal_(parameter, std=0.15)
        model.to(dtype).save_pretrained(folder)
        words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
        words |= {f"w{i}": i for i in range(4, model.config.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder)
        return folder

    return make


WITHOUT_KIT = """
import sys, torch
sys.modules["kit"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
path, ids, logits, trust = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, trust_remote_code=trust == "True", output_loading_info=True
)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
with torch.no_grad():
    save_file({"logits": model(load_file(ids)["ids"]).logits}, logits)
"""


@pytest.fixture
def logits_without_kit(tmp_path):
    """A function that gives a checkpoint's logits in a process that cannot import `kit`; no key may be left over."""

    def run(path, ids, trust_remote_code=False):
        given, made = tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"
        save_file({"ids": ids}, given)
        subprocess.run(
            [sys.executable, "-c", WITHOUT_KIT, path, given, made, str(trust_remote_code)],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
            timeout=600,
        )
        return load_file(made)["logits"]

    return run
