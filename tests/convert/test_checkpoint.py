"""Checkpoints in: what is read equals what transformers reads, and what is broken is found before loading."""

import json
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import kit
from kit.convert.checkpoint import DTYPES, TensorInfo, check_matches_config, exact_attention, open_checkpoint
from kit.convert.errors import ExitCode, KitError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny(dtype=torch.float32, tied=False, **extra):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied, **extra)).to(dtype).eval()


@pytest.fixture
def folder(tmp_path):
    """A model in one file."""
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    """A model in several files, with an index."""
    tiny().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


@pytest.fixture
def pickled(folder):
    """A model in a pickle."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_header(path, entries, size=0):
    """A safetensors file whose data is a hole of `size` bytes."""
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def refused(model, match, **options):
    """Open it, expect the three-line error, and return it."""
    with pytest.raises(KitError, match=match) as caught:
        open_checkpoint(str(model), **options)
    assert caught.value.where
    assert caught.value.next_step
    return caught.value


# What is read is what transformers reads.


@pytest.mark.parametrize("shard", ["20KB", "1GB"], ids=["sharded", "single"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_read_equals_from_pretrained(tmp_path, dtype, tied, shard):
    tiny(dtype, tied).save_pretrained(tmp_path, max_shard_size=shard)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    truth = model.state_dict()
    checkpoint = open_checkpoint(str(tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard == "1GB" else len(set(checkpoint.files.values())))
    assert truth.keys() - checkpoint.tensors.keys() == ({"lm_head.weight"} if tied else set())
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert tensor.dtype == truth[name].dtype == dtype
        assert torch.equal(tensor, truth[name])
        assert info.shape == tensor.shape
        assert info.nbytes == tensor.nbytes
    assert checkpoint.tied_embeddings is tied
    assert checkpoint.dtype == str(dtype).removeprefix("torch.")
    assert checkpoint.num_parameters == sum(p.numel() for p in model.parameters())
    assert checkpoint.nbytes == checkpoint.num_parameters * dtype.itemsize
    assert checkpoint.config == json.loads((tmp_path / "config.json").read_text())
    assert check_matches_config(checkpoint).device.type == "meta"


def test_read_casts_and_gives_memory_of_its_own(folder):
    checkpoint = open_checkpoint(str(folder))
    name = "model.norm.weight"
    assert checkpoint.read(name, dtype=torch.float64).dtype == torch.float64
    checkpoint.read(name).zero_()
    assert checkpoint.read(name).all()
    assert load_file(folder / "model.safetensors")[name].all()


def test_read_knows_every_dtype_scalars_and_empty_tensors(folder):
    dtypes = [getattr(torch, torch_name) for torch_name, _ in DTYPES.values()]
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert read.tolist() == tensor.tolist()


def test_an_unknown_tensor_names_the_nearest(folder):
    with pytest.raises(KitError, match=r"no tensor 'model\.nrm") as caught:
        open_checkpoint(str(folder)).read("model.nrm.weight")
    assert "did you mean 'model.norm.weight'?" in caught.value.next_step


def test_the_main_dtype_goes_by_bytes_and_ignores_storage_formats(folder):
    tensors = {"big": torch.zeros(99, dtype=torch.float8_e4m3fn), "main": torch.zeros(9).bfloat16()}
    save_file(tensors | {"scale": torch.zeros(2), "packed": torch.zeros(99).int()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.dtype == "bfloat16"
    assert checkpoint.tensors["big"] == TensorInfo((99,), "F8_E4M3")
    assert checkpoint.nbytes == 99 + 18 + 8 + 4 * 99


def test_load_returns_a_model_with_the_same_logits(sharded):
    ids = torch.arange(12)[None]
    model = kit.load(str(sharded))
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny()(ids).logits)
    assert kit.load(str(sharded), dtype="bfloat16").dtype == torch.bfloat16
    assert kit.load(str(sharded), dtype=torch.float16).dtype == torch.float16
    for wrong in ("float15", "int8", "nn"):
        with pytest.raises(KitError, match=f"'{wrong}' is no dtype") as caught:
            kit.load(str(sharded), dtype=wrong)
        assert caught.value.exit_code == ExitCode.USAGE


def test_config_and_tokenizer(folder):
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.load_config().hidden_size == 32
    with pytest.raises(KitError, match="the tokenizer cannot be loaded"):
        checkpoint.load_tokenizer()


# Opening is lazy.


def test_importing_and_opening_need_neither_torch_nor_transformers(sharded):
    code = f"""
import sys
from kit.convert.checkpoint import open_checkpoint
checkpoint = open_checkpoint({str(sharded)!r})
checkpoint.dtype, checkpoint.nbytes, checkpoint.fingerprint(), checkpoint.side_files()
print([name for name in ("torch", "transformers", "safetensors", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_only_headers_are_read(folder):
    """A terabyte that is a hole in the file system opens at once, and its last tensor can be read."""
    size = 10**12
    spans = {"huge": ([size // 2 - 2], [0, size - 4]), "last": ([2], [size - 4, size])}
    entries = {name: {"dtype": "BF16", "shape": shape, "data_offsets": at} for name, (shape, at) in spans.items()}
    try:
        write_header(folder / "model.safetensors", entries, size)
    except OSError:
        pytest.skip("this file system has no sparse files of that size")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.nbytes == size
    assert checkpoint.read("last").tolist() == [0, 0]


# Broken files are found at open.


def test_truncated_shard(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    error = refused(sharded, "truncated or corrupt")
    assert file.name in error.where
    assert "download" in error.next_step


@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"\xff" * 64, struct.pack("<Q", 6) + b"\x80garbg", struct.pack("<Q", 2) + b"[]", b"<html>" * 20],
    ids=["empty", "short", "huge length", "no utf-8", "a list", "a web page"],
)
def test_garbage_instead_of_a_header(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "truncated or corrupt")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F77", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
    ids=["shape", "hole", "dtype", "shape type", "no place", "no object"],
)
def test_headers_that_contradict_themselves(folder, entry):
    write_header(folder / "model.safetensors", {"x": entry}, size=8)
    refused(folder, "truncated or corrupt")


def test_trailing_bytes(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    refused(folder, "its header describes")


def test_missing_shard(sharded):
    file = sorted(sharded.glob("*.safetensors"))[0]
    file.unlink()
    assert file.name in refused(sharded, "1 of .* weight files are missing").what


def test_an_index_that_names_a_missing_tensor_or_leaves_the_folder(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = min(weight_map.values())
    edit_json(index, weight_map={**weight_map, "model.extra.weight": first})
    assert first in refused(sharded, r"promises 'model\.extra\.weight'").where
    shutil.copy(sharded / first, sharded.parent / first)
    edit_json(index, weight_map={**weight_map, "model.extra.weight": f"../{first}"})
    refused(sharded, "missing")


def test_a_single_file_comes_before_an_index_as_in_transformers(sharded):
    other = {name: tensor + 1 for name, tensor in tiny().state_dict().items()}
    save_file(other, sharded / "model.safetensors", metadata={"format": "pt"})
    truth = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    checkpoint = open_checkpoint(str(sharded))
    assert all(torch.equal(checkpoint.read(name), truth[name]) for name in truth)


def test_a_tensor_in_two_files(sharded):
    files = sorted(sharded.glob("*.safetensors"))
    merged = load_file(files[0]) | load_file(files[1])
    save_file(merged, files[1])
    refused(sharded, "in this file and in another")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{", "[]"])
def test_a_broken_index(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, "index")


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_config_that_is_no_json_object(folder, content):
    (folder / "config.json").write_text(content)
    refused(folder, r"config\.json (cannot be read|holds no JSON object)")


def test_no_config_or_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    refused(folder, "no weights")
    (folder / "config.json").unlink()
    refused(folder, r"config\.json is missing")
    (folder / "weights.gguf").touch()
    assert "weights.gguf" in refused(folder, r"config\.json is missing").next_step
    (folder / "adapter_config.json").touch()
    assert "adapter" in refused(folder, r"config\.json is missing").next_step


def test_a_file_that_changes_after_opening(folder):
    checkpoint = open_checkpoint(str(folder))
    again = open_checkpoint(str(folder))
    again.read("model.norm.weight")
    (folder / "model.safetensors").write_bytes(b"gone")
    for opened in (checkpoint, again):
        with pytest.raises(KitError, match="truncated or corrupt"):
            opened.read("model.norm.weight")
    (folder / "model.safetensors").unlink()
    for opened in (checkpoint, again):
        with pytest.raises(KitError, match="truncated or corrupt"):
            opened.read("model.norm.weight")


# Pickles are read, never run.


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_pickles_are_read_with_a_warning(pickled, zipped, caplog):
    tensors = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    torch.save(tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.WARNING, logger="kit"):
        checkpoint = open_checkpoint(str(pickled))
    assert "prefer safetensors" in caplog.text
    assert checkpoint.tensors["model.norm.weight"] == TensorInfo((32,), "BF16")
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        checkpoint.read(name).zero_()
        assert torch.equal(checkpoint.read(name), tensor)
    check_matches_config(checkpoint)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(kit.load(str(pickled))(ids).logits, tiny()(ids).logits)


def test_sharded_pickles(pickled):
    tensors = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    (pickled / "pytorch_model.bin").unlink()
    weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, pickled / file)
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(str(pickled))
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    (pickled / "pytorch_model-1.bin").unlink()
    refused(pickled, "pytorch_model-1.bin")


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False, None], ids=["zip", "legacy", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(pickled, tmp_path, zipped):
    target, file = tmp_path / "proof", pickled / "pytorch_model.bin"
    content = {"model.norm.weight": torch.ones(32), "evil": Malicious(target)}
    if zipped is None:
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert "safetensors" in refused(pickled, "nothing in it was run").next_step
    assert not target.exists()
    if zipped is None:  # the file does what it says, where pickles are trusted
        pickle.loads(file.read_bytes())
        assert target.exists()


def test_pickles_that_are_truncated_or_hold_something_else(pickled):
    file = pickled / "pytorch_model.bin"
    assert zipfile.is_zipfile(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(pickled, "corrupt")
    for other in ([torch.ones(2)], {"model": {"weight": torch.ones(2)}}):
        torch.save(other, file)
        refused(pickled, "no plain state_dict")
    torch.save({"x": torch.zeros(2, dtype=torch.complex128)}, file)
    refused(pickled, "complex128")


# Config and weights belong together.


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"num_hidden_layers": 3}, r"missing model\.layers\.2.* and 4 more"),
        ({"num_hidden_layers": 1}, r"unexpected model\.layers\.1"),
        ({"model_type": "qwen2"}, r"missing model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"intermediate_size": 40}, r"down_proj\.weight is \(32, 48\), not \(32, 40\)"),
        ({"model_type": "t5"}, "no causal language model"),
        ({"hidden_size": 33, "num_attention_heads": 4}, "no causal language model"),
        ({"model_type": "lama"}, "does not know the architecture 'lama'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "already quantized"),
    ],
    ids=lambda value: str(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_config_of_another_architecture(folder, values, match):
    edit_json(folder / "config.json", **values)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(KitError, match=match) as caught:
        check_matches_config(checkpoint)
    assert caught.value.next_step


def test_a_tied_head_may_be_stored_and_old_buffers_may_be_there(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", tie_word_embeddings=True)
    check_matches_config(open_checkpoint(str(folder)))
    kit.load(str(folder))


@pytest.mark.parametrize("layers", [1, 3], ids=["unexpected", "missing"])
def test_transformers_would_fill_in_random_weights_but_load_refuses(folder, layers):
    edit_json(folder / "config.json", num_hidden_layers=layers)
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(KitError, match="unexpected" if layers == 1 else "missing"):
        kit.load(str(folder))


def test_tied_embeddings_where_the_config_does_not_say(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert not open_checkpoint(str(folder)).tied_embeddings
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(str(folder)).tied_embeddings


# Code in a checkpoint runs only when asked for.


def test_remote_code_needs_the_flag(folder):
    code = f"open({str(folder / 'proof')!r}, 'w')\nfrom transformers import LlamaConfig as Config\n"
    (folder / "configuration_other.py").write_text(code)
    edit_json(folder / "config.json", model_type="other", auto_map={"AutoConfig": "configuration_other.Config"})
    assert "--trust-remote-code" in refused(folder, "code of its own").next_step
    checkpoint = open_checkpoint(str(folder), trust_remote_code=True)
    with pytest.raises(KitError, match="config cannot be loaded"):
        checkpoint.load_config()
    edit_json(folder / "config.json", model_type="kit_unheard_of")
    checkpoint = open_checkpoint(str(folder))
    for method in (checkpoint.load_config, checkpoint.load_tokenizer):
        with pytest.raises(KitError, match="cannot be loaded"):
            method()
    assert not (folder / "proof").exists()


# What else is in the folder.


def test_side_files(folder):
    wanted = {
        *("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "spm.model"),
        *("added_tokens.json", "merges.txt", "vocab.json", "vocab.txt", "qwen.tiktoken", "chat_template.jinja"),
        *("chat_template.json", "additional_chat_templates/tool_use.jinja", "generation_config.json"),
        *("preprocessor_config.json", "processor_config.json"),
    }
    (folder / "additional_chat_templates").mkdir()
    for name in {*wanted, "README.md", "tokenization_own.py", "modeling_own.py", "trainer_state.json"}:
        (folder / name).write_text("{}")
    checkpoint = open_checkpoint(str(folder))
    assert {str(file.relative_to(folder)) for file in checkpoint.side_files()} == wanted
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    found = {str(file.relative_to(folder)) for file in checkpoint.side_files()}
    assert found == wanted | {"tokenization_own.py"}


def test_fingerprint_changes_with_config_and_files_only(folder):
    first = open_checkpoint(str(folder)).fingerprint()
    (folder / "README.md").write_text("hello")
    assert open_checkpoint(str(folder)).fingerprint() == first
    os.utime(folder / "model.safetensors", (1, 1))
    second = open_checkpoint(str(folder)).fingerprint()
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    assert len({first, second, open_checkpoint(str(folder)).fingerprint()}) == 3


# What the user types.


def test_a_folder_that_is_not_there_names_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "my-llama-model").mkdir()
    (tmp_path / "something").mkdir()
    assert "did you mean 'my-llama-model'?" in refused(tmp_path / "my-lama-model", "there is no model").next_step
    assert "did you mean" not in refused(tmp_path / "zzz", "there is no model").next_step
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'my-llama-model'?" in refused("./my-llama-modell", "there is no model").next_step
    assert "did you mean 'smollm2'?" in refused("smolm2", "there is no model").next_step
    refused("models/weights.gguf", "there is no model")
    refused("something/deeper", "there is no model")


def test_files_that_are_no_models(folder, tmp_path):
    assert str(folder) in refused(folder / "model.safetensors", "a file is no model").next_step
    (tmp_path / "broken.gguf").write_bytes(b"no GGUF")
    refused(tmp_path / "broken.gguf", "GGUF")


# Hub ids, from a hand-made cache, without a network.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns a function that puts a folder into the hub's cache under an id."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name, source):
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        shutil.copytree(source, repo / "snapshots" / COMMIT)
        return repo / "snapshots" / COMMIT

    return put


@pytest.mark.parametrize("kind", ["folder", "sharded", "pickled"])
def test_a_hub_id_from_the_cache(hub, kind, request):
    source = request.getfixturevalue(kind)
    snapshot = hub("org/name", source)
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.source == "org/name"
    assert checkpoint.folder == snapshot
    assert checkpoint.tensors == open_checkpoint(str(source)).tensors
    assert open_checkpoint("org/name", revision=COMMIT).folder == snapshot


def test_a_hub_id_in_a_fresh_process_without_a_network(hub, folder, tmp_path):
    hub("org/name", folder)
    code = "from kit.convert.checkpoint import open_checkpoint as o; print(len(o('org/name').tensors))"
    variables = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.stdout.strip() == "21", done.stderr


def test_a_hub_id_that_cannot_be_had(hub, folder, sharded):
    hub("org/name", folder)
    assert "hf auth login" in refused("org/other", "'org/other' is neither on the hub nor whole in the cache").next_step
    assert "at v2" in refused("org/name", "neither on the hub", revision="v2").where
    refused("org/not a name", "neither on the hub")
    min(hub("org/partial", sharded).glob("*.safetensors")).unlink()
    refused("org/partial", "missing")


def test_the_cache_is_used_when_the_hub_cannot_be_reached(hub, folder, monkeypatch):
    import huggingface_hub

    snapshot, real = hub("org/name", folder), huggingface_hub.snapshot_download

    def unreachable(*args, local_files_only, **options):
        if not local_files_only:
            raise RuntimeError("the proxy refused")
        return real(*args, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert open_checkpoint("org/name").folder == snapshot
    refused("org/other", "the proxy refused")


def test_only_what_is_needed_is_downloaded_and_code_is_refused_before_the_weights(sharded, monkeypatch):
    import huggingface_hub

    remote = sorted(path.name for path in sharded.iterdir())
    asked = []

    def fake(model, *, revision, allow_patterns, local_files_only):
        asked.append(list(huggingface_hub.utils.filter_repo_objects(repository, allow_patterns=allow_patterns)))
        return str(sharded)

    repository = [*remote, "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx", "original/params.json"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    open_checkpoint("org/name")
    assert sorted(name for call in asked for name in call) == remote
    assert not any(name.endswith(".safetensors") for name in asked[0])
    asked.clear()
    edit_json(sharded / "config.json", model_type="other", auto_map={"AutoConfig": "x.Y"})
    refused("org/name", "code of its own")
    assert len(asked) == 1


# What `kit` writes.


def test_our_own_architectures_need_no_flag(tmp_path):
    from kit.convert.export import auto_map
    from kit.modules import modeling

    config = modeling.KitLlamaConfig(
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8},
        layer_types=["hybrid_sliding"] * 2,
        linear_attention={"feature_dim": 8, "feature_map_heads": "kv", "window_factor": 0.3},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(auto_map(settings, "kit.modules.modeling")))
    checkpoint = open_checkpoint(str(tmp_path))
    check_matches_config(checkpoint)
    assert checkpoint.load_config().model_type == "kit_llama"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(kit.load(str(tmp_path))(ids).logits, model(ids).logits)


# GGUF.


def write_gguf(path, model, architecture):
    """Write a model as llama.cpp's converter does: its names, and q and k of llama permuted for its RoPE."""
    import gguf

    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(12345.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(33 + n) for n in range(config.vocab_size - 2)), "!!", '""'])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["! !", '" "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        projection = name.split(".")[-2]
        if architecture == "llama" and projection in heads:
            tensor = tensor.view(heads[projection], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if not (model.config.tie_word_embeddings and name == "lm_head.weight"):
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_gguf_holds_the_model_that_it_was_made_from(tmp_path, monkeypatch, architecture, tied):
    from transformers import AutoConfig

    monkeypatch.setenv("KIT_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    if architecture == "qwen3":
        heads["head_dim"] = 128  # transformers reads no other from a GGUF of this family
    config = AutoConfig.for_model(architecture, **sizes, **heads, rope_parameters={"rope_theta": 12345.0})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # spread, and exact in bfloat16
        parameter.data = (0.3 * torch.randn_like(parameter)).bfloat16().float()
    model.tie_weights()
    write_gguf(tmp_path / "tiny.gguf", model, architecture)
    checkpoint = open_checkpoint(str(tmp_path / "tiny.gguf"))
    check_matches_config(checkpoint)
    truth = model.state_dict()
    assert truth.keys() - checkpoint.tensors.keys() == ({"lm_head.weight"} if tied else set())
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name, dtype=torch.float32), truth[name]), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        loaded = kit.load(str(tmp_path / "tiny.gguf"), dtype="float32")
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_capped_scores_are_asked_for_where_transformers_would_drop_the_cap(make_model, monkeypatch):
    from transformers import Gemma2PreTrainedModel

    capped = {"attn_logit_softcapping": 4.0}
    assert exact_attention(capped) == exact_attention({"text_config": capped}) == {"attn_implementation": "eager"}
    assert exact_attention({"attn_logit_softcapping": None}) == exact_attention({}) == {}
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)  # as before 5.21
    model = open_checkpoint(str(make_model("gemma2", **capped))).load_model(torch.float32, "cpu")
    assert model.config._attn_implementation == "eager"
