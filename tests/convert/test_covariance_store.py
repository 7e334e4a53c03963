"""Covariances against X^T X in float64, whatever is streamed, padded, packed, shared, stored or merged."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kit.cli import app
from kit.convert.adapter_recipe import decoder_linears
from kit.convert.checkpoint import open_checkpoint
from kit.convert.covariance_store import (
    Covariances,
    collect_covariances,
    collect_from_model,
    decoder_of,
    model_fingerprint,
    pack,
    unpack,
)
from kit.convert.data import TokenRows
from kit.convert.errors import ExitCode, KitError
from kit.convert.recipe import ModelFacts


def rows_of(ids, positions=None):
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
    return TokenRows(ids, positions, len(ids), "test text", "abc")


def true_second_moments(model, names, batches):
    """Mean of x xᵀ in float64 of every linear by itself; a batch is (kwargs, mask of the tokens that count)."""
    decoder, seen = decoder_of(model), {name: [] for name in names}
    hooks = [
        decoder.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0].double()))
        for name in names
    ]
    kept = {name: [] for name in names}
    for arguments, mask in batches:
        with torch.no_grad():
            model(**arguments)
        for name in names:
            x = seen[name].pop()
            kept[name].append(x[mask] if mask is not None else x.flatten(0, 1))
    for hook in hooks:
        hook.remove()
    return {name: (x := torch.cat(parts)).T @ x / len(x) for name, parts in kept.items()}


def names_in(path):
    return list(decoder_linears(ModelFacts.of(open_checkpoint(str(path)))))


@pytest.fixture(scope="module")
def llama(make_model):
    return make_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def measured(llama):
    ids = torch.randint(4, 96, (6, 20), generator=torch.Generator().manual_seed(0))
    return ids, collect_covariances(open_checkpoint(str(llama)), rows_of(ids), targets=names_in(llama))


def close(found, truth):
    assert float((found.double() - truth).abs().max() / truth.abs().max()) < 2e-6


def test_streamed_covariances_are_those_of_the_whole_model_in_float64(llama, measured):
    ids, covariances = measured
    model = AutoModelForCausalLM.from_pretrained(llama).double()
    truth = true_second_moments(model, names_in(llama), [({"input_ids": ids}, None)])
    assert len(truth) == 14
    for name, expected in truth.items():
        close(covariances.get(name), expected)
        assert covariances.tokens_of(name) == ids.numel()


def test_linears_that_read_the_same_tensor_share_one(measured):
    kept = measured[1].linears
    for layer in ("layers.0", "layers.1"):
        assert {kept[f"{layer}.self_attn.{name}_proj"] for name in "qkv"} == {f"{layer}.self_attn.q_proj"}
        assert kept[f"{layer}.mlp.gate_proj"] == kept[f"{layer}.mlp.up_proj"] == f"{layer}.mlp.gate_proj"
    assert len(measured[1].packed) == 8


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_counted_nor_seen(llama, side):
    ids = torch.randint(4, 96, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 5, 9)):
        cut = slice(pads) if side == "left" else slice(16 - pads, 16)
        mask[row, cut] = 0
    padded = ids.masked_fill(mask == 0, 0)
    names = names_in(llama)
    found = collect_covariances(open_checkpoint(str(llama)), rows_of(padded), targets=names, attention_mask=mask)
    whole = AutoModelForCausalLM.from_pretrained(llama)
    batches = [({"input_ids": ids[row][mask[row].bool()][None]}, None) for row in range(3)]
    truth = true_second_moments(whole.double(), names, batches)
    hooked = collect_from_model(whole.float(), [{"input_ids": padded, "attention_mask": mask}], targets=names)
    assert set(found.tokens.values()) == {int(mask.sum())} == set(hooked.tokens.values())
    for name, expected in truth.items():
        close(found.get(name), expected)
        if side == "right":  # left padding moves the positions of a plain forward pass; the truth has none
            close(hooked.get(name), expected)


def test_documents_in_a_packed_row_do_not_see_each_other(llama):
    ids = torch.randint(4, 96, (2, 18), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(7), torch.arange(11)]).expand_as(ids)
    names = names_in(llama)
    found = collect_covariances(open_checkpoint(str(llama)), rows_of(ids, positions), targets=names)
    model = AutoModelForCausalLM.from_pretrained(llama).double()
    parts = [part for row in ids for part in (row[:7], row[7:])]
    truth = true_second_moments(model, names, [({"input_ids": part[None]}, None) for part in parts])
    for name, expected in truth.items():
        close(found.get(name), expected)


def test_the_triangle_is_packed_and_unpacked():
    square = torch.randn(7, 7)
    square += square.T.clone()
    assert pack(square).numel() == 28
    assert torch.equal(unpack(pack(square)), square)


def test_a_file_gives_back_the_same_bits_and_holds_no_more_than_triangles(tmp_path, measured):
    file = tmp_path / "deep" / "c.safetensors"
    measured[1].save(file)
    again = Covariances.load(file)
    assert again.linears == measured[1].linears
    assert again.tokens == measured[1].tokens
    assert again.sources == [{"source": "test text", "sha256": "abc", "tokens": 120, "weight": 1.0}]
    assert all(torch.equal(again.packed[name], tensor) for name, tensor in measured[1].packed.items())
    numbers = 2 * (3 * 48 * 49 // 2 + 64 * 65 // 2)
    assert 4 * numbers < file.stat().st_size < 4 * numbers + 8192
    assert list(file.parent.iterdir()) == [file]


def test_merging_by_tokens_is_measuring_on_both(llama, measured):
    ids, whole = measured
    checkpoint, names = open_checkpoint(str(llama)), names_in(llama)
    parts = [collect_covariances(checkpoint, rows_of(part), targets=names) for part in (ids[:2], ids[2:])]
    pooled = Covariances.merge([(part, part.sources[0]["tokens"]) for part in parts])
    for name in names:
        close(pooled.get(name), whole.get(name).double())
    assert pooled.tokens == whole.tokens
    assert [source["weight"] for source in pooled.sources] == pytest.approx([1 / 3, 2 / 3])
    even = Covariances.merge([(part, 0.5) for part in parts])
    close(even.get(names[0]), sum(part.get(names[0]).double() for part in parts) / 2)


def test_the_fingerprint_is_of_the_weights_not_of_the_folder_or_dtype(llama, measured, make_model):
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert model_fingerprint(model) == measured[1].fingerprint
    assert model_fingerprint(model.bfloat16()) == measured[1].fingerprint
    with torch.no_grad():
        decoder_of(model).layers[1].mlp.down_proj.weight[0, 0] += 1
    assert model_fingerprint(model) != measured[1].fingerprint


def test_errors_name_what_is_wrong(tmp_path, llama, measured, make_model):
    with pytest.raises(KitError, match="the covariances lack") as caught:
        measured[1].get("layers.0.mlp.up_prj")
    assert "did you mean 'layers.0.mlp.up_proj'" in caught.value.next_step
    other = AutoModelForCausalLM.from_pretrained(make_model("llama", num_hidden_layers=2, seed=1))
    with pytest.raises(KitError, match="another model"):
        measured[1].check([], other)
    with pytest.raises(KitError, match="no such file"):
        Covariances.load(tmp_path / "none.safetensors")
    with pytest.raises(KitError, match="holds no covariances"):
        Covariances.load(llama / "model.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(KitError, match="cannot be read"):
        Covariances.load(tmp_path / "broken.safetensors")
    with pytest.raises(KitError, match="no linear of the model"):
        collect_covariances(open_checkpoint(str(llama)), rows_of(torch.ones(1, 4).long()), targets=["layers.0.mlp.x"])
    with pytest.raises(KitError, match="different models"):
        Covariances.merge([(measured[1], 1), (Covariances({}, {}, {}, "x"), 1)])
    with pytest.raises(KitError, match="not > 0"):
        Covariances.merge([(measured[1], 1), (measured[1], 0)])


def test_the_command_writes_the_file_and_never_over_one(llama, tmp_path):
    text, file = tmp_path / "text.txt", tmp_path / "c.safetensors"
    text.write_text(" ".join(f"w{4 + i % 90}" for i in range(400)))
    options = ["--dataset", str(text), "--num-samples", "4", "--seq-len", "32", "--target-modules", "down_proj"]
    arguments = ["covariance", str(llama), "-o", str(file), *options, "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said, written = json.loads(done.stdout), Covariances.load(file)
    assert (said["linears"], said["inputs"], said["tokens"], said["source"]) == (2, 2, 128, "text.txt")
    assert list(written.linears) == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    before = file.read_bytes()
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, KitError)
    assert again.exception.exit_code == ExitCode.USAGE
    assert file.read_bytes() == before


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_models_that_take_images_are_measured_on_their_language_tower(family, make_image_model, tmp_path):
    model, batch = make_image_model(family)
    model.save_pretrained(tmp_path)
    names = names_in(tmp_path)  # from the names on disk, which are not those of the modules
    assert len(names) == 14
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -3:] = 0
    found = collect_from_model(model, [{**batch, "attention_mask": mask}], targets=names)
    assert len(found.packed) == 8
    doubles = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    truth = true_second_moments(model.double(), names, [({**doubles, "attention_mask": mask}, mask.bool())])
    for name, expected in truth.items():
        close(found.get(name), expected)
        assert found.tokens_of(name) == int(mask.sum())
