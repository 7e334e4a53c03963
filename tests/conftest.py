"""Tiny random models that tests convert, run and measure."""

import os
import signal
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU, slowly

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from kit.convert.progress import Progress

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would commands

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


IMAGE_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def _tiny_llava():
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = LlavaConfig(text_config={"model_type": "llama", **IMAGE_TEXT}, vision_config=vision, image_token_id=95)
    ids = torch.cat([torch.full((2, 4), 95), torch.arange(4, 14).view(2, 5)], 1)  # an image is 4 patches
    return LlavaForConditionalGeneration(config).eval(), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def _tiny_qwen():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "depth": 2,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    special = {"bos_token_id": 1, "eos_token_id": 2, "image_token_id": 95, "vision_start_token_id": 94}
    config = Qwen2_5_VLConfig(
        text_config={**IMAGE_TEXT, "rope_parameters": rope} | special, vision_config=vision, **special
    )
    ids = torch.cat([torch.tensor([[94, 95, 95, 95, 95]] * 2), torch.arange(4, 14).view(2, 5)], 1)
    pixels = {"pixel_values": torch.randn(32, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    kinds = {"mm_token_type_ids": (ids == 95).int()}
    return Qwen2_5_VLForConditionalGeneration(config).eval(), {"input_ids": ids, **pixels, **kinds}


@pytest.fixture
def make_image_model():
    """A function that makes a tiny random model that takes images, and a batch of two texts with an image each."""

    def make(family, seed=0):
        torch.manual_seed(seed)
        return {"llava": _tiny_llava, "qwen2_5_vl": _tiny_qwen}[family]()

    return make


class InterruptTraining(Progress):
    """Interrupts after so many updates of a training whose progress is shown."""

    def __init__(self, after):
        self.left = after

    def step(self, advance=1, **values):
        self.left -= advance if "loss" in values else 0
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt_training():
    """The class, to be made with the number of updates."""
    return InterruptTraining


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
