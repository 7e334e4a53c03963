"""`kit bench`: what it measures of tiny models, random ones included, and what it refuses."""

import errno
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from kit.cli import app
from kit.convert.bench import bench, plot_bench, table_lines, weight_bytes
from kit.convert.errors import KitError
from kit.convert.outputs import check_files, replacing, write_text
from kit.convert.shapes import LINEARS, random_model, shape_config, skeleton
from kit.convert.speed import FusedRunner, PlainRunner, measure, runner_of
from kit.modules.accelerated import enable_kernels
from kit.modules.modeling import KitLlamaForCausalLM
from kit.modules.quantized import QuantizedLinear

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = ("llama-2-7b", "llama-3-8b", "llama-3.2-1b", "mistral-7b", "qwen3-8b", "smollm2-135m")


def tiny(int4, dtype=torch.float32, **change):
    return random_model(TINY | change, int4=int4, dtype=dtype, device="cpu")


@pytest.mark.parametrize("name", SHAPES)
def test_shipped_shapes_are_configs_of_models_whose_linears_can_be_packed(name):
    config = shape_config(name)
    model = skeleton(config | {"num_hidden_layers": 1}, int4=True, dtype=torch.bfloat16)
    linears = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert linears == {f"model.layers.0.{n}" for n in LINEARS}
    assert model.model.layers[0].mlp.down_proj.in_features == config["intermediate_size"]


def test_an_unknown_shape_names_those_that_there_are():
    with pytest.raises(KitError, match="llama-3-8b") as error:
        shape_config("llama-9")
    assert error.value.exit_code == 2


def test_a_family_whose_linears_have_other_names_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(KitError, match="gpt2, not one of llama"):
        shape_config(str(file))


def test_random_models_have_finite_logits_that_depend_on_the_seed():
    ids = torch.arange(4, 20)[None]
    for int4 in (True, False):
        logits = [
            random_model(TINY, int4=int4, dtype=torch.float32, device="cpu", seed=seed)(ids).logits
            for seed in (0, 0, 1)
        ]
        assert logits[0].isfinite().all()
        assert logits[0].std() > 1e-3
        assert torch.equal(logits[0], logits[1])
        assert not torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("fused", [True, False])
def test_runners_decode_what_the_whole_sequence_gives(fused):
    model = tiny(True)
    ids = torch.randint(4, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids).logits
        if fused:
            enable_kernels(model, "reference")
        runner = runner_of(model)
        assert isinstance(runner, FusedRunner if fused else PlainRunner)
        runner.start(2, 20)
        got = [runner.prefill(ids[:, :9])[:, -1], *(runner.step(ids[:, i : i + 1])[:, -1] for i in (9, 10, 11))]
    torch.testing.assert_close(torch.stack(got, 1), want[:, 8:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("linearized", [False, True])
def test_on_a_gpu_caches_have_a_fixed_size_but_for_linearized_models_which_capture_their_steps(monkeypatch, linearized):
    kind = KitLlamaForCausalLM if linearized else LlamaForCausalLM
    monkeypatch.setattr(kind, "device", torch.device("cuda"))
    assert PlainRunner(kind.__new__(kind)).fixed != linearized


def test_a_measurement_has_times_that_agree_and_the_bytes_of_the_cache():
    model = enable_kernels(tiny(True), "reference")
    row = measure(model, batch=2, context=100, new_tokens=3, repeats=1)
    assert row["prefill_tokens_per_second"] == pytest.approx(200 / row["prefill_ms"] * 1e3)
    assert row["decode_tokens_per_second"] == pytest.approx(2 / row["decode_ms"] * 1e3)
    assert row["kernels"]
    assert not row["graph"]
    assert row["peak_bytes"] > 0
    heads = 2 * 2 * 2 * 2  # layers, keys and values, rows, heads
    coded = heads * 128 * (32 + 4)  # 111 tokens need 128 places
    assert row["cache_bytes"] == coded + heads * 128 * 64 * 4  # the window holds them all, in fp32


def test_weight_bytes_of_packed_models_are_those_of_four_bits_and_scales():
    model = tiny(True, torch.bfloat16)
    linears = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    others = 2 * (2 * 96 * 128 + 5 * 128)
    stored = linears // 2 + 2 * linears // 64 + others  # the largest groups that divide 128, 192 and 256
    quantization = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".quantization." in n)
    shapes = 16 * 14
    assert weight_bytes(model) == stored + quantization + shapes
    enable_kernels(model, "reference")  # q, k, v and gate, up also keep scales of their own
    assert stored + quantization <= weight_bytes(model) <= stored + quantization + 2 * linears // 64


def test_the_command_writes_a_table_a_file_and_a_plot(make_model, tmp_path):
    model, out = make_model(), tmp_path / "out"
    sizes = ["--batch-size", "1,2", "--context", "16,8", "--new-tokens", "2", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", str(model), "--base", str(model), *sizes, "-o", str(out), "-q"])
    assert result.exit_code == 0, result.output
    assert "decode tokens/s" in result.stdout
    assert "x)" in result.stdout
    written = json.loads((out / "bench.json").read_text())
    of = [(row["name"], row["batch"], row["context"]) for row in written["rows"]]
    assert of == [(name, b, c) for name in (str(model), "base") for b in (1, 2) for c in (8, 16)]
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_config_measures_random_weights_beside_sixteen_bits(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    options = ["--config", str(file), "--base", "16bit", "--context", "8", "--new-tokens", "2", "--repeats", "1"]
    result = CliRunner().invoke(app, ["bench", *options, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["rows"]] == ["tiny", "base"]
    assert found["rows"][0]["weight_bytes"] < found["rows"][1]["weight_bytes"]
    assert found["settings"]["random_weights"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")
def test_steps_on_a_gpu_are_captured_of_both_models(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    sizes = {"batches": [1, 3], "contexts": [200], "new_tokens": 4, "repeats": 1, "dtype": "auto", "device": "cuda"}
    rows = bench(None, base="16bit", config=str(file), **sizes)["rows"]
    assert [row["kernels"] for row in rows] == [True, True, False, False]
    assert all(row["graph"] for row in rows)
    assert all(row["peak_bytes"] > row["weight_bytes"] for row in rows)
    assert rows[1]["cache_bytes"] == 3 * rows[0]["cache_bytes"]


def test_options_that_do_not_fit_together_are_refused_before_anything_loads():
    sizes = {"batches": [1], "contexts": [8], "new_tokens": 2, "repeats": 1, "dtype": "auto", "device": "cpu"}
    for model, base, config in ((None, None, None), ("x", None, "llama-3-8b"), (None, "x", "llama-3-8b")):
        with pytest.raises(KitError) as error:
            bench(model, base=base, config=config, **sizes)
        assert error.value.exit_code == 2
    with pytest.raises(KitError, match="at least 1"):
        bench("x", base=None, config=None, **sizes | {"contexts": [0]})


def test_a_shape_keeps_its_whole_name_and_a_model_that_does_not_fit_fails_in_every_row(monkeypatch):
    def no_room(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("kit.convert.bench.random_model", no_room)
    sizes = {"batches": [1, 2], "contexts": [8, 16], "new_tokens": 2, "repeats": 1, "dtype": "auto", "device": "cpu"}
    rows = bench(None, base="16bit", config="llama-3.2-1b", **sizes)["rows"]
    assert [row["name"] for row in rows] == ["llama-3.2-1b"] * 4 + ["base"] * 4
    assert {row["error"] for row in rows} == {"out of memory"}
    with pytest.raises(KitError, match="no dtype"):
        bench(None, base=None, config="llama-3.2-1b", **sizes | {"dtype": "foo"})


def test_bytes_of_a_cache_count_states_and_what_is_kept_unrounded():
    runner = PlainRunner(tiny(True))
    state = torch.zeros(2, 3)
    layers = [SimpleNamespace(keys=None, recurrent_states={0: state, 1: None}), SimpleNamespace(latest=(state, state))]
    runner.cache = SimpleNamespace(layers=layers)
    assert runner.cache_bytes() == 3 * 24
    with torch.no_grad():
        runner.prefill(torch.arange(4, 12)[None])
    heads = 2 * 2 * 2  # layers, keys and values, heads
    assert runner.cache_bytes() == heads * 8 * (32 + 3 + 64 * 4)  # codes, scale and zero point; in fp32


def test_gains_are_how_often_the_base_takes_longer_and_errors_stand_in_the_table(tmp_path):
    row = {"batch": 1, "context": 8, "prefill_ms": 2.0, "decode_tokens_per_second": 30.0}
    rows = [row | {"name": "new"}, row | {"name": "base", "prefill_ms": 3.0, "decode_tokens_per_second": 10.0}]
    rows.append({"name": "new", "batch": 9, "context": 8, "error": "out of memory"})
    header, lines = table_lines(rows)
    assert lines[0][header.index("prefill ms")] == "2.0 (1.50x)"
    assert lines[0][header.index("decode tokens/s")] == "30.0 (3.00x)"
    assert lines[1][header.index("decode tokens/s")] == "10.0"
    assert lines[2][header.index("prefill ms")] == "out of memory"
    rows = [r | {"prefill_tokens_per_second": 5.0} for r in rows]
    plot_bench({"rows": rows, "settings": {"device": "CPU"}}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_an_interrupt_loses_no_finished_case_and_what_is_missing_is_told(make_model, tmp_path, monkeypatch):
    """From the second case of the base on nothing is measured; the plot of an earlier run is not left there."""
    model, out = make_model(), tmp_path / "out"
    out.mkdir()
    (out / "bench.png").write_text("earlier")
    cases, real = [], measure

    def interrupted(*args, **options):
        cases.append(options["context"])
        if len(cases) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr("kit.convert.bench.measure", interrupted)
    command = ["bench", str(model), "--base", str(model), "--context", "8,16", "--new-tokens", "2", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["kit", *command, "-o", str(out)])
    result = CliRunner().invoke(app, [*command, "-o", str(out), "-q", "--overwrite"])
    assert result.exit_code == 130
    assert "3 cases are measured; missing: base, batch 1, context 16" in result.stderr
    assert "interrupted: finished steps are kept" in result.stderr
    assert result.stderr.strip().endswith("--overwrite")
    written = json.loads((out / "bench.json").read_text())
    assert [(row["name"], row["context"]) for row in written["rows"]] == [
        (str(model), 8),
        (str(model), 16),
        ("base", 8),
    ]
    assert all(row["decode_tokens_per_second"] > 0 for row in written["rows"])
    assert written["missing"] == [{"name": "base", "batch": 1, "context": 16}]
    assert [file.name for file in out.iterdir()] == ["bench.json"]


def test_an_earlier_result_is_replaced_only_when_asked_and_only_by_a_finished_case(make_model, tmp_path, monkeypatch):
    model, out = make_model(), tmp_path / "out"
    out.mkdir()
    (out / "bench.json").write_text("earlier")
    command = ["bench", str(model), "--context", "8", "--new-tokens", "2", "--repeats", "1", "-q", "-o", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr("kit.convert.checkpoint.Checkpoint.load_model", None)
        result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, KitError)
    assert result.exception.exit_code == 2
    assert "--overwrite" in result.exception.next_step
    with monkeypatch.context() as patched:
        patched.setattr("kit.convert.bench.measure", lambda *_, **__: 1 / 0)
        assert isinstance(CliRunner().invoke(app, [*command, "--overwrite"]).exception, ZeroDivisionError)
    assert (out / "bench.json").read_text() == "earlier"
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    assert json.loads((out / "bench.json").read_text())["missing"] == []
    assert sorted(file.name for file in out.iterdir()) == ["bench.json", "bench.png"]


def test_files_are_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "made" / "x.json"
    write_text(file, "one")
    half = replacing(file)
    half.__enter__().write_text("half")
    with pytest.raises(RuntimeError):
        half.gen.throw(RuntimeError())
    assert file.read_text() == "one"
    assert list(file.parent.iterdir()) == [file]
    full = replacing(file)
    full.__enter__()
    with pytest.raises(KitError, match="no space") as caught:
        full.gen.throw(OSError(errno.ENOSPC, "full"))
    assert "--resume" not in caught.value.next_step  # `kit bench` has none


def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    file, plot = tmp_path / "made" / "x.json", tmp_path / "x.png"
    file.parent.mkdir()
    file.touch()
    plot.touch()
    check_files(tmp_path / "other" / "deep", ["x.json"], overwrite=False)
    check_files(file.parent, ["x.json"], overwrite=True)
    check_files(file.parent, ["x.json"], overwrite=False, resume=True)
    for arguments, what, advice in (
        ({"folder": file.parent, "names": ["x.json"]}, "earlier run", "add --overwrite,"),
        ({"folder": file.parent, "names": ["x.json"], "resume": False}, "earlier run", "--resume to go on"),
        ({"folder": None, "names": [], "plot": plot, "resume": False}, "earlier run", "add --overwrite,"),
        ({"folder": None, "names": [], "plot": plot, "resume": True}, "earlier run", "add --overwrite,"),
        ({"folder": file, "names": []}, "file of that name", "folder"),
        ({"folder": file / "deep" / "er", "names": []}, "nothing can be written into .*x.json", "another place"),
        ({"folder": None, "names": [], "plot": file}, "PNG", "pareto.png"),
    ):
        with pytest.raises(KitError, match=what) as caught:
            check_files(**arguments, overwrite=False)
        assert caught.value.exit_code == 2
        assert advice in caught.value.next_step
