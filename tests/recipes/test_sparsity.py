"""Recipes of activation sparsity on tiny random models: what is dropped, what it costs, and what is on disk."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from kit.cli import app
from kit.convert import pipeline
from kit.convert.checkpoint import load, open_checkpoint
from kit.convert.data import load_rows
from kit.convert.errors import ExitCode, KitError
from kit.convert.evaluate import evaluate
from kit.convert.pipeline import Options, convert, plan
from kit.convert.progress import Progress
from kit.convert.recipe import ModelFacts, SearchRun
from kit.convert.report import markdown_table, settings_line
from kit.convert.sparsity import error_without
from kit.convert.sparsity_search import RATIOS, SplitSearch, budget_rank
from kit.convert.streaming import StreamedModel, TensorView
from kit.convert.thresholds import install
from kit.kernels.sparse_matvec import sparse_linears
from kit.modules import sparsity
from kit.modules.sparsity import FAMILIES, counted, masks_of, skipped_weights, token_window
from kit.recipes import load_recipes

METHODS = ("teal", "wina", "chess", "r-sparse")
DATA = ["data.num_samples=6", "data.seq_len=48"]
BIG = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2}


def ids(length=40, batch=2):
    return torch.randint(4, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def run(folder, output, method, *overrides, **options):
    recipes = load_recipes(method, [*DATA, *overrides])
    return convert(
        open_checkpoint(str(folder)), recipes, Options(output, device="cpu", eval_tokens=0, **options), Progress()
    )


@pytest.fixture(scope="module")
def llama(make_model):
    return make_model(**BIG)


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    """Every method at 50 %, all tokens sparse: {method: (folder, report)}."""
    made = {}
    for method in METHODS:
        output = tmp_path_factory.mktemp("out") / method
        overrides = ["sparsity=0.5", "dense_prefill=false"]
        if method == "r-sparse":
            overrides += ["split.bands=2"]
        made[method] = (output, run(llama, output, method, *overrides))
    return made


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("method", METHODS)
def test_half_of_the_inputs_are_dropped_and_the_report_says_so(converted, method):
    output, report = converted[method]
    layers = report["stages"][f"{method}.sparsify"]
    ranks = report["allocation"][method].get("ranks", {})
    for index, layer in enumerate(layers):
        for key, value in layer.items():
            if key.endswith(" sparsity"):
                name = next((n for n in ranks if n.endswith(key.removesuffix(" sparsity"))), None)
                wanted = report["allocation"][method]["drop"][index][name] if name else 0.5
                assert value == pytest.approx(wanted, abs=0.02), key
    model = load(str(output), dtype=torch.float32)
    with counted(model) as counts:
        model(ids(64, 4))
        dropped, skipped = skipped_weights(model.model, {n.removeprefix("model."): c for n, c in counts.items()})
    if method in ("teal", "wina"):
        assert skipped == pytest.approx(0.5, abs=0.05)
    if method == "chess":
        assert skipped < 0.45
        assert not any("k_proj" in name or "v_proj" in name for name in dropped)
    if method == "r-sparse":  # what a low-rank path reads is not skipped
        assert 0.4 < skipped < 0.55


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_survive_the_round_trip_in_bfloat16(converted, tmp_path, method):
    """Written in fp32, loaded in bf16, saved, loaded again: the same numbers, and none of them zero."""
    output = converted[method][0]
    written = {n: t for n, t in load_file(output / "model.safetensors").items() if ".mask." in n}
    load(str(output), dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    again = load(str(tmp_path / "bf16"), dtype=torch.float32).state_dict()
    assert len(written) == sum(1 for name in again if ".mask." in name) > 0
    for name, tensor in written.items():
        assert (tensor > 0).all()
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_sparsity_of_zero_is_exactly_the_base(make_model, tmp_path, method, family):
    base = make_model(family)
    run(base, tmp_path / "zero", method, "sparsity=0", "dense_prefill=false")
    before, after = load(str(base)), load(str(tmp_path / "zero"))
    assert masks_of(after)
    assert torch.equal(before(ids()).logits, after(ids()).logits)
    assert torch.equal(before(ids()[:, :1]).logits, after(ids()[:, :1]).logits)


@pytest.mark.parametrize("method", METHODS)
def test_loads_without_kit(converted, logits_without_kit, method):
    output, _ = converted[method]
    expected = load(str(output), dtype=torch.float32)(ids()).logits
    assert torch.equal(expected, logits_without_kit(output, ids(), trust_remote_code=True))


@pytest.mark.parametrize("method", METHODS)
def test_prompts_run_dense_and_steps_sparse_unless_it_is_strict(llama, converted, method):
    """The first half dense in one pass = a dense prompt of that length and single steps after it."""
    base, model = load(str(llama)), load(str(converted[method][0]), dtype=torch.float32)
    text = ids(24)
    strict = model(text).logits
    with token_window(model, None):
        assert torch.allclose(model(text).logits, base(text).logits, atol=1e-5)
        out = model(text[:, :12], use_cache=True)
        steps = [out.logits]
        for place in range(12, 24):
            out = model(text[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    with token_window(model, 12):
        windowed = model(text).logits
    assert torch.allclose(torch.cat(steps, 1), windowed, atol=1e-4)
    assert not torch.allclose(windowed[:, 12:], strict[:, 12:], atol=1e-4)
    assert torch.equal(model(text).logits, strict)


def test_linears_of_one_input_are_multiplied_in_one_launch(make_model, tmp_path, monkeypatch):
    """Where the kernels run; here their reference stands for them."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    shape |= {"head_dim": 64}
    run(make_model("qwen2", **shape), tmp_path / "out", "wina", "sparsity=0.5")
    model = load(tmp_path / "out").eval()
    tokens, calls = ids(12, 2), []
    prompt = model(tokens, use_cache=True)
    apart = model(tokens[:, :1], past_key_values=copy.deepcopy(prompt.past_key_values)).logits

    def together(x, weight, bounds, *rest, **options):
        calls.append(bounds)
        return sparse_linears(x, weight, bounds, *rest, **options)

    monkeypatch.setattr(sparsity, "pays_on_gpu", lambda x, density, weights: True)
    monkeypatch.setattr(sparsity, "sparse_linears", together)
    for _ in range(2):
        step = model(tokens[:, :1], past_key_values=copy.deepcopy(prompt.past_key_values)).logits
        torch.testing.assert_close(step, apart)
    assert calls == [(256, 512), (512,)] * 6
    torch.testing.assert_close(model(tokens).logits, prompt.logits)
    q, k = (model.get_submodule(f"model.layers.1.self_attn.{name}_proj") for name in "qk")
    assert q.weight.untyped_storage().data_ptr() == k.weight.untyped_storage().data_ptr()
    x = torch.randn(1, 1, 256)  # one alone is multiplied by itself, and a new input is not taken for an old one
    torch.testing.assert_close(k(x), (x * k.mask(x)) @ k.weight.T + k.bias)
    assert not torch.equal(q(x), q(x + 1))
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all(torch.equal(tensor, after[name].to(tensor.dtype)) for name, tensor in before.items())


def test_the_default_leaves_prompts_dense(llama, tmp_path):
    run(llama, tmp_path / "out", "teal")
    base, model = load(str(llama)), load(str(tmp_path / "out"))
    assert torch.equal(model(ids()).logits, base(ids()).logits)
    assert not torch.equal(model(ids()[:, :1]).logits, base(ids()[:, :1]).logits)


def test_greedy_is_no_worse_than_uniform_on_what_it_was_chosen_on(llama, tmp_path):
    report = run(llama, tmp_path / "greedy", "wina", "allocator=greedy")
    drops = report["allocation"]["wina"]["drop"]
    shapes = {n: t.numel() for n, t in load(str(llama)).model.layers[0].named_parameters() if "proj" in n}
    for layer in drops:
        mean = sum(share * shapes[f"{name}.weight"] for name, share in layer.items()) / sum(shapes.values())
        assert mean == pytest.approx(0.5, abs=1e-6)
        assert len(set(layer.values())) > 1


def test_a_perplexity_budget_is_kept_and_used(llama, tmp_path):
    report = run(llama, tmp_path / "budget", "teal", "ppl_budget=20%")
    found = report["allocation"]["teal"]
    limit = found["perplexity_dense"] * 1.2
    tried = {float(s): p for s, p in found["perplexity_by_sparsity"].items()}
    assert 0 < found["sparsity"] < 0.9
    assert tried[found["sparsity"]] <= limit
    assert min(s for s, p in tried.items() if p > limit) - found["sparsity"] <= 0.0101
    config = json.loads((tmp_path / "budget" / "config.json").read_text())
    assert config["sparsity"]["target"] == found["sparsity"]


def test_the_search_never_loses_to_no_low_rank(converted):
    found = converted["r-sparse"][1]["allocation"]["r-sparse"]
    assert found["kl_split"] <= found["kl_sparse"]
    assert found["tried"] >= 8
    for layer in found["ratios"]:
        assert set(layer.values()) <= set(RATIOS)


def test_the_search_measures_what_the_written_models_lose(llama, tmp_path):
    """KL of no low rank at all is that of wina's masks, and one of a split is that of a model with that split."""
    overrides = [*DATA, "sparsity=0.5", "dense_prefill=false"]
    checkpoint, recipe = open_checkpoint(str(llama)), load_recipes("r-sparse", overrides)[0]
    rows = load_rows(recipe.config.data, checkpoint.load_tokenizer(), seed=0, model=load(llama), progress=Progress())
    model = lambda: StreamedModel(checkpoint.config, TensorView(checkpoint), device="cpu", dtype=torch.float32)  # noqa: E731
    search_run = SearchRun(rows, "cpu", Progress(), model, {}, ModelFacts.of(checkpoint))
    drops = [dict.fromkeys(recipe.linears, 0.5) for _ in range(3)]
    search = SplitSearch(search_run, recipe.description(), drops, "data", 1)
    genes = {place: 0.6 if place[1].endswith("up_proj") else 1.0 for place in search.genes}
    judged = rows.input_ids[-(len(rows.input_ids) // 3) :]
    dense = load(llama)
    target = dense(judged).logits.log_softmax(-1)
    for layer, module in enumerate(dense.model.layers):
        holder = SimpleNamespace(module=module, index=layer)
        install(holder, recipe.description())
        for name in drops[0]:
            setting = search.settings[layer][name, genes[layer, name]]
            linear = module.get_submodule(name)
            linear.mask.threshold.data = setting.threshold
            if setting.up is not None:
                assert setting.up.shape[0] == budget_rank((160, 96), 0.5, 0.6)
                linear.low_rank_up, linear.low_rank_down = (torch.nn.Parameter(f) for f in (setting.up, setting.down))
    with token_window(dense, 0):
        logits = dense(judged).logits.log_softmax(-1)
    expected = (target.exp() * (target - logits)).sum(-1).mean()
    torch.testing.assert_close(search.losses(genes).mean(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(search.losses(search.genes).mean(), expected, rtol=1e-4)


def test_a_killed_conversion_resumes_to_the_same_checkpoint(llama, converted, tmp_path, monkeypatch):
    changed, calls = pipeline._Conversion.changed, []

    def killed(self, module, prefix):
        calls.append(prefix)
        if len(calls) == 2:  # in the second layer of the last stage: those before it change nothing
            raise KeyboardInterrupt
        return changed(self, module, prefix)

    overrides = ["sparsity=0.5", "dense_prefill=false", "split.bands=2"]
    monkeypatch.setattr(pipeline._Conversion, "changed", killed)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out", "r-sparse", *overrides)
    monkeypatch.setattr(pipeline._Conversion, "changed", changed)
    run(llama, tmp_path / "out", "r-sparse", *overrides, resume=True)
    whole = load_file(converted["r-sparse"][0] / "model.safetensors")
    resumed = load_file(tmp_path / "out" / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_results_say_which_tokens_were_sparse(llama, converted, tmp_path):
    """With N dense tokens at the start, perplexity before N is the base's; what is counted is what ran sparse."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in ids(256, 1)[0].tolist()))
    sparse, base = open_checkpoint(str(converted["teal"][0])), open_checkpoint(str(llama))
    options = {"base": base, "num_tokens": 0, "dataset": str(text), "seq_len": 64, "speed": False, "dtype": "float32"}
    strict = evaluate({"teal": sparse}, **options)
    half = evaluate({"teal": sparse}, dense_prefix=32, **options)
    first, second = strict["rows"][1], half["rows"][1]
    assert (first["sparse_tokens"], second["sparse_tokens"]) == (1.0, 0.5)
    assert "sparse_tokens" not in strict["rows"][0]
    assert 0.4 < first["weights_skipped"] < 0.6
    assert [len(shares) for shares in first["dropped_inputs"].values()] == [3] * 7
    before = [row["perplexity_by_position"][:4] for row in half["rows"]]
    assert [b["perplexity"] for b in before[1]] == pytest.approx([b["perplexity"] for b in before[0]], rel=1e-5)
    assert second["perplexity"] != first["perplexity"]
    assert "every scored token sparse" in settings_line(strict["settings"])
    assert "the first 32 tokens of a text dense" in settings_line(half["settings"])
    assert "100%" in markdown_table(strict["rows"])


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "50%, uniform"), (["--ppl-budget", "1%", "--strict", "-r", "wina"], "perplexity + 1 %")],
)
def test_sparsify_is_a_front_for_convert(llama, tmp_path, options, said):
    done = CliRunner().invoke(
        app, ["sparsify", str(llama), "-o", str(tmp_path / "out"), "--dry-run", "--json", *options]
    )
    plan = json.loads(done.stdout)["plan"]
    assert said in plan["sparsity"]
    assert ("every token" in plan["sparse tokens"]) == ("--strict" in options)
    assert plan["recipe"] == ("wina" if options else "r-sparse")


@pytest.mark.parametrize("method", ["wina", "r-sparse"])
def test_four_bit_weights_stack_on_sparsity(llama, tmp_path, method, logits_without_kit):
    overrides = ["sparsity=0.5", "dense_prefill=false", "int4_group=16"]
    if method == "r-sparse":
        overrides += ["split.ratio=0.6"]
    run(llama, tmp_path / "out", method, *overrides)
    model, base = load(tmp_path / "out").eval(), load(llama)
    name = "model.layers.1.mlp.down_proj"
    linear, weight = model.get_submodule(name), base.get_submodule(name).weight
    grouped = weight.bfloat16().float().unflatten(1, (-1, 16))
    steps = (grouped.abs().amax(2) / 7).bfloat16().float()
    expected = ((grouped / steps[..., None]).round().clamp(-8, 7) * steps[..., None]).flatten(1)
    torch.testing.assert_close(linear.weight, expected)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{name}.weight" not in stored
    assert stored[f"{name}.weight_packed"].dtype == torch.uint8
    assert stored[f"{name}.weight_packed"].numel() == weight.numel() // 2
    x = torch.randn(1, 1, linear.in_features)
    keep = linear.mask(x)
    wanted = (x * keep) @ expected.T
    if method == "r-sparse":
        wanted = wanted + (x * ~keep) @ linear.low_rank_down.T @ linear.low_rank_up
    torch.testing.assert_close(linear(x), wanted)
    with counted(model) as counts:
        model(ids())
    assert skipped_weights(model, counts)[1] == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(logits_without_kit(tmp_path / "out", ids(), True), model(ids()).logits)


@pytest.mark.parametrize(("method", "group", "said"), [("chess", 16, "16 bits"), ("teal", 40, "no groups of 40")])
def test_four_bits_that_do_not_fit_are_refused_in_the_plan(llama, tmp_path, method, group, said):
    with pytest.raises(KitError, match=said):
        plan(
            open_checkpoint(str(llama)), load_recipes(method, [*DATA, f"int4_group={group}"]), Options(tmp_path / "out")
        )


def test_the_error_without_inputs_is_read_between_what_was_measured():
    shares = {"0.01": 0.1, "0.1": 0.3, "0.2": 0.5}
    measured = SimpleNamespace(droppable=shares, cett={"0.01": 0.2, "0.1": 0.4, "0.2": 0.6})
    found = [error_without(measured, share, False) for share in (0, 0.05, 0.1, 0.4, 0.5, 0.75, 1)]
    assert found == pytest.approx([0, 0.005, 0.01, 0.15, 0.2, 0.6, 1])
    assert error_without(measured, 0.5, True) == pytest.approx(0.15)
    assert error_without(SimpleNamespace(droppable=shares, cett=None), 0.4, True) == pytest.approx(0.15)


def test_fused_or_quantized_models_are_refused(llama):
    checkpoint = open_checkpoint(str(llama))
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(KitError, match=r"layers\.1\.mlp\.up_proj"):
        plan(checkpoint, load_recipes("teal"), Options(llama.parent / "none"))
    checkpoint.config["quantization_config"] = {}
    with pytest.raises(KitError, match="quantized"):
        plan(checkpoint, load_recipes("teal"), Options(llama.parent / "none"))


@pytest.mark.parametrize("budget", ["0%", "many"])
def test_a_budget_that_is_none_is_a_usage_error(budget):
    with pytest.raises(KitError) as caught:
        load_recipes("wina", [f"ppl_budget='{budget}'"])
    assert caught.value.exit_code == ExitCode.USAGE
