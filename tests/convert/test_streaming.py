"""One layer at a time gives what the whole model gives, and new parameters stay fp32."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from kit.convert.checkpoint import open_checkpoint
from kit.convert.errors import KitError
from kit.convert.recipe import ModelFacts
from kit.convert.streaming import Recorder, Scratch, StreamedModel, TensorView, streamed_logits
from kit.recipes import load_recipes


def ids(length=30):
    return torch.randint(4, 96, (2, length), generator=torch.Generator().manual_seed(0))


def test_streamed_logits_are_the_models(make_model):
    sliding = {"sliding_window": 8, "pad_token_id": 0}
    mixed = ["sliding_attention", "full_attention", "sliding_attention"]
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    for options in (
        {},
        {"tie_word_embeddings": True},
        {"family": "qwen3"},
        {"family": "gemma2", "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **sliding},
        {"family": "gemma3_text", "layer_types": mixed, **sliding},
        {"family": "phi3", "rope_parameters": partial},
        {"family": "olmo2"},
        {"family": "gpt2"},
    ):
        folder = make_model(**options)
        checkpoint = open_checkpoint(str(folder))
        model = StreamedModel(checkpoint.config, TensorView(checkpoint), device="cpu", dtype=torch.float32)
        with torch.no_grad():
            want = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(ids()).logits
        torch.testing.assert_close(streamed_logits(model, ids()), want)


def test_packed_rows_do_not_see_each_other_in_a_streamed_layer(make_model):
    checkpoint = open_checkpoint(str(make_model()))
    model = StreamedModel(checkpoint.config, TensorView(checkpoint), device="cpu", dtype=torch.float32)
    row = ids(20)[:1]
    packed = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad(), model.layer(0):
        whole = model.forward(model.embed(row, packed).hidden, packed)
        second = model.forward(model.embed(row[:, 8:], packed[:, 8:]).hidden, packed[:, 8:])
    torch.testing.assert_close(whole[:, 8:], second)


def test_new_parameters_stay_fp32_under_bf16_weights(make_model, tmp_path):
    checkpoint = open_checkpoint(str(make_model(dtype=torch.bfloat16)))
    config = load_recipes("lolcats", ["window_size=8"])[0].build(ModelFacts.of(checkpoint))
    view = TensorView(checkpoint)
    new = torch.full((3,), 0.123456789)
    save_file({"model.layers.0.self_attn.linear_attention.window_factor": new}, tmp_path / "new.safetensors")
    view.lay_over(tmp_path / "new.safetensors")
    model = StreamedModel(config, view, device="cpu", dtype=torch.bfloat16)
    with model.layer(0) as layer:
        assert layer.self_attn.q_proj.weight.dtype == torch.bfloat16
        assert torch.equal(layer.self_attn.linear_attention.window_factor, new)
        assert layer.self_attn.linear_attention.feature_map_q.dtype == torch.float32
        out = model.advance(model.embed(ids(), torch.arange(30).expand(2, -1)))
    assert out.hidden.dtype == torch.bfloat16
    assert out.hidden.isfinite().all()


def test_reading_gives_memory_of_its_own(make_model, tmp_path):
    view = TensorView(open_checkpoint(str(make_model())))
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    view.lay_over(tmp_path / "x.safetensors")
    for name in ("x", "model.norm.weight"):
        before = view.read(name).clone()
        view.read(name).add_(1)
        assert torch.equal(view.read(name), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_on_disk_are_those_in_memory_and_leave_no_file(make_model, tmp_path, dtype):
    checkpoint = open_checkpoint(str(make_model()))
    rows = torch.randint(4, 96, (7, 20), generator=torch.Generator().manual_seed(0))
    positions, found = torch.arange(20).expand(7, -1), []
    for scratch in (Scratch(), Scratch(tmp_path)):
        model = StreamedModel(checkpoint.config, TensorView(checkpoint), device="cpu", dtype=dtype, scratch=scratch)
        recorder = Recorder(scratch, 7)
        with model.layer(0) as layer:
            hook = layer.mlp.register_forward_hook(lambda _, __, out, recorder=recorder: recorder.add(out))
            found.append((model.advance(model.embed(rows, positions)).hidden, recorder.tensor))
            hook.remove()
    assert not list(tmp_path.iterdir())
    for memory, disk in zip(*found, strict=True):
        assert torch.equal(memory, disk)
        assert disk.dtype == dtype
    if (maps := Path("/proc/self/maps")).exists():
        assert str(tmp_path) in maps.read_text()  # they do live in files


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(KitError, match="no space left"):
        Scratch(tmp_path).empty((4, 4), torch.float32)
    assert not list(tmp_path.iterdir())
