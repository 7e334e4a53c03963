"""FireQ on mixture-of-experts models: files, calibration of experts, folds, and other readers of the result."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import kit
from kit.convert.checkpoint import open_checkpoint
from kit.convert.covariance import RoutedTokens
from kit.convert.errors import KitError
from kit.convert.pipeline import Options, convert, plan
from kit.convert.progress import Progress
from kit.convert.recipe import Layer, ModelFacts
from kit.convert.streaming import Activations, StreamedModel, TensorView, streamed_logits
from kit.recipes import load_recipes
from kit.recipes.fireq import Fireq, sites_of

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
EXPERTS = {  # Qwen's second layer has one dense MLP
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "intermediate_size": 128,
        "mlp_only_layers": [1], "norm_topk_prob": True,
    },
}  # fmt: skip
STORED = {
    "mixtral": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
    "qwen3_moe": tuple(f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")),
}
FAMILIES = pytest.mark.parametrize("family", EXPERTS)
IDS = torch.randint(4, 96, (2, 40), generator=torch.Generator().manual_seed(1))
PLAIN = ("kv.bits=null", "query=null")


class Heard(Progress):
    def __init__(self):
        self.said = []

    def log(self, message):
        self.said.append(message)


@pytest.fixture
def make(make_model):
    """A function that makes a tiny model; `starving`: only experts 0 to 3 are ever chosen in its first layer."""

    def run(family, starving=False, **change):
        folder = make_model(family, dtype=torch.bfloat16, **(SHAPE | EXPERTS[family] | change))
        if starving:  # the two best are always a row and its 0.9-fold, whatever the sign
            file = folder / "model.safetensors"
            tensors = load_file(file)
            name = f"model.layers.0.{STORED[family][0].partition('.')[0]}.gate.weight"
            row = tensors[name][0].float()
            factors = torch.tensor([1, -1, 0.9, -0.9, 0.1, -0.1])
            tensors[name] = (factors[:, None] * row).bfloat16()
            save_file(tensors, file, metadata={"format": "pt"})
        return folder

    return run


@pytest.fixture
def quantize(make, tmp_path):
    """A function that quantizes a tiny model and returns (source folder, output folder, report)."""
    text = tmp_path / "text.txt"
    words = torch.randint(4, 96, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(" ".join(f"w{word}" for word in words))

    def run(source, *overrides, preset="fireq", name="out", progress=None, resume=False):
        data = [f"data.dataset={text}", "data.num_samples=8", "data.seq_len=64"] if preset != "rtn" else []
        recipes = load_recipes(preset, ["group_size=16", *data, *overrides])
        options = Options(tmp_path / name, eval_tokens=0, device="cpu", resume=resume)
        return tmp_path / name, convert(open_checkpoint(str(source)), recipes, options, progress or Progress())

    return run


def loaded(path):
    return kit.load(str(path), dtype="float32")


@torch.no_grad()
def kl(base, model):
    reference, other = (m(IDS).logits.float().log_softmax(-1) for m in (base, model))
    return float((reference.exp() * (reference - other)).sum(-1).mean())


# ---- files


@FAMILIES
@torch.no_grad()
def test_single_and_fused_experts_on_disk_are_read_alike(make, family, tmp_path):
    """The hub's files hold a tensor an expert; a state dict of transformers holds fused ones."""
    folder = make(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    hub = open_checkpoint(str(folder))
    for file in ("model.safetensors", "pytorch_model.bin"):
        fused = tmp_path / file.replace(".", "-")
        fused.mkdir()
        (fused / "config.json").write_text((folder / "config.json").read_text())
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        assert state["model.layers.0.mlp.experts.gate_up_proj"].ndim == 3
        if file.endswith(".bin"):
            torch.save(state, fused / file)
        else:
            save_file(state, fused / file, metadata={"format": "pt"})
        other = open_checkpoint(str(fused))
        assert other.tensors == hub.tensors
        for name in hub.tensors:
            assert torch.equal(other.read(name), hub.read(name))
    want = model.float().eval()(IDS).logits
    view = TensorView(other)
    streamed = StreamedModel(other.config, view, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(streamed_logits(streamed, IDS), want)


@FAMILIES
def test_files_hold_what_the_plan_counts_under_the_hubs_names(make, quantize, family):
    source = make(family)
    out, report = quantize(source, *PLAIN)
    stored, facts = load_file(out / "model.safetensors"), ModelFacts.of(open_checkpoint(str(source)))
    gate, up, down = (f"model.layers.0.{name}" for name in STORED[family])
    for name in (gate, up, down):
        for number in range(6):
            assert f"{name.format(number)}.weight_packed" in stored
    counted = sum(tensor.nbytes for name, tensor in stored.items() if not name.endswith("weight_shape"))
    recipe = load_recipes("fireq", ["group_size=16", *PLAIN])[0]
    assert recipe.result_bytes(facts) == counted
    assert report["plan"]["experts"].startswith(f"6 in each of {2 if family == 'mixtral' else 1} layers, 170 tokens")
    expert, rest = 3 * 64 * EXPERTS[family].get("moe_intermediate_size", 96), ".experts."
    others = sum(torch.Size(shape).numel() for name, shape in facts.shapes.items() if rest not in name)
    layers = 2 if family == "mixtral" else 1
    assert facts.active_parameters == others + 2 * layers * expert


# ---- what is computed


def dequantized(stored):
    """Weights in float64, by the format's definition: code + 8 in four bits, low ones first, times a scale a group."""
    weights = {}
    for name, tensor in stored.items():
        base, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            columns = int(stored[f"{base}.weight_shape"][1])
            words = tensor.to(torch.int64) & 0xFFFFFFFF
            codes = torch.stack([(words >> 4 * i) & 15 for i in range(8)], dim=-1).flatten(1)[:, :columns] - 8
            scale = stored[f"{base}.weight_scale"].double()
            weights[f"{base}.weight"] = codes.double() * scale.repeat_interleave(columns // scale.shape[1], dim=1)
        elif not kind.startswith("weight_"):  # FP8, or not quantized
            scale = stored.get(f"{base}.weight_scale", torch.ones(())) if tensor.dtype == torch.float8_e4m3fn else 1.0
            weights[name] = tensor.double() * scale
    return weights


def fused(weights, layer, family, kind):
    """What transformers makes of the experts of a layer."""
    gate, up, down = (
        torch.stack([weights[f"model.layers.{layer}.{part.format(number)}.weight"] for number in range(6)])
        for part in STORED[family]
    )
    return down if kind == "down_proj" else torch.cat([gate, up], dim=1)


def fp8(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).float().to(torch.float8_e4m3fn).double() * scale


@torch.no_grad()
def simulated(out, family):
    """transformers' own model in float64 on dequantized weights; the inputs of all quantized linears rounded to FP8."""
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config")
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family].from_dict(config), dtype=torch.float64).eval()
    weights = dequantized(load_file(out / "model.safetensors"))
    state = {}
    for name in model.state_dict():
        if ".experts." in name:
            state[name] = fused(weights, int(name.split(".")[2]), family, name.rpartition(".")[2])
        else:
            state[name] = weights[name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name]
    model.load_state_dict(state)

    def forward(experts, x, index, gates):
        y = torch.zeros_like(x)
        for token, place in ((t, p) for t in range(len(x)) for p in range(index.shape[1])):
            number = index[token, place]
            gate, up = F.linear(fp8(x[token]), experts.gate_up_proj[number]).chunk(2)
            y[token] += gates[token, place] * F.linear(fp8(F.silu(gate) * up), experts.down_proj[number])
        return y

    for module in model.model.modules():
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.__class__ is torch.nn.Parameter:
            module.forward = forward.__get__(module)
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (fp8(args[0]),))
    return model(IDS).logits


@FAMILIES
@torch.no_grad()
def test_logits_are_those_of_a_float64_simulation(make, quantize, family):
    source = make(family)
    out, _ = quantize(source, *PLAIN)
    want, found = simulated(out, family), loaded(out)(IDS).logits.double()
    assert float((found - want).norm() / want.norm()) < 1e-2  # sums in another order tip some FP8 codes


@FAMILIES
def test_every_weight_of_every_expert_is_within_half_a_step(make, quantize, family):
    source = make(family)
    out, _ = quantize(source, preset="rtn")
    before, stored = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    after, seen = dequantized(stored), 0
    for name in (name for name in after if ".experts." in name):
        scale = stored[name.removesuffix("weight") + "weight_scale"].double()
        step = scale.repeat_interleave(before[name].shape[1] // scale.shape[1], dim=1)
        assert bool(((after[name] - before[name].double()).abs() <= step * (0.5 + 7.5 * 2**-8)).all())  # bf16 scales
        seen += 1
    assert seen == 18 * (2 if family == "mixtral" else 1)


@FAMILIES
def test_calibration_beats_plain_rounding(make, quantize, family):
    source = make(family)
    base, plain = loaded(source), loaded(quantize(source, preset="rtn", name="rtn")[0])
    assert kl(base, loaded(quantize(source, *PLAIN)[0])) < 0.9 * kl(base, plain)


# ---- starved experts


@FAMILIES
def test_starved_experts_are_named_and_calibrated(make, quantize, family):
    source, heard = make(family, starving=True), Heard()
    out, report = quantize(source, *PLAIN, progress=heard)
    first, second = report["stages"]["fireq.quantize"]
    assert first["starved experts"] == {"4": 0, "5": 0}
    assert "starved experts" not in second
    assert [text for text in heard.said if "experts" in text] == [
        "layer 0: experts 4 and 5 saw 0 and 0 of 512 tokens, and are calibrated on all of them too"
    ]
    errors = {number: first[f"mlp.experts.{number}.down_proj error"] for number in range(6)}
    assert max(errors[4], errors[5]) < 2 * max(errors[number] for number in range(4))
    assert json.loads((out / "kit_report.json").read_text())["stages"]["fireq.quantize"][0] == first


def layer_of(folder, hidden):
    """A resident first layer in float32, given what enters it."""
    checkpoint = open_checkpoint(str(folder))
    model = StreamedModel(checkpoint.config, TensorView(checkpoint), device="cpu", dtype=torch.float32)
    positions = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
    inputs = Activations(hidden, positions)
    return model, lambda module: Layer(
        0, module, None, inputs, model, None, "cpu", Progress(), ModelFacts.of(checkpoint)
    )


@FAMILIES
@torch.no_grad()
def test_moments_are_of_routed_tokens_topped_up_by_all(make, family):
    """In float64: Σ a x xᵀ, a = 1 at tokens that the router sends plus what is missing to H tokens, spread over all.

    At down, for which errors count as the router weighs them: g² over its mean in place of 1, all times given weights.
    """
    torch.manual_seed(0)
    folder, x, counts = make(family, starving=True), torch.randn(150, 64), torch.rand(150) + 0.5
    model, layer_for = layer_of(folder, torch.randn(1, 8, 64))
    with model.layer(0) as module:
        tokens = RoutedTokens(layer_for(module), x)
        probabilities = F.linear(x, module.mlp.gate.weight).softmax(-1)
        best, chosen = probabilities.topk(2)
        gates = torch.zeros(150, 6).scatter(1, chosen, best / best.sum(-1, keepdim=True))
        assert tokens.seen.tolist() == (gates > 0).sum(0).tolist()
        assert tokens.starved().keys() == {n for n, seen in enumerate(tokens.seen.tolist()) if seen < 64} >= {4, 5}
        for number, expert in enumerate(module.mlp.experts):
            missing = max(64 - int(tokens.seen[number]), 0) / 150
            want = torch.einsum("t,ti,tj->ij", (gates[:, number] > 0).double() + missing, x.double(), x.double())
            found = tokens.moment(f"mlp.experts.{number}.gate_proj").second.double()
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)
            inner = (F.silu(x @ expert.gate_proj.weight.T) * (x @ expert.up_proj.weight.T)).double()
            squares = gates[:, number].double().square()
            share = squares / squares[squares > 0].mean() if bool(squares.any()) else squares
            want = torch.einsum("t,ti,tj->ij", (share + missing) * counts, inner, inner)
            found = tokens.moment(f"mlp.experts.{number}.down_proj", weights=counts).second.double()
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3 * float(want.abs().max()))


# ---- folds


@FAMILIES
@torch.no_grad()
def test_folds_keep_the_function_and_the_routing(make, family):
    folder = make(family)
    checkpoint = open_checkpoint(str(folder))
    facts, recipe = ModelFacts.of(checkpoint), load_recipes("fireq", ["group_size=16"])[0]
    model = StreamedModel(checkpoint.config, TensorView(checkpoint), device="cpu", dtype=torch.float64)
    x, positions = torch.randn(2, 20, 64, dtype=torch.float64), torch.arange(20).expand(2, -1)
    sites, formats = sites_of(facts, 0), recipe.formats(facts)
    with model.layer(0) as layer:
        scores = []
        layer.mlp.gate.register_forward_hook(lambda _, args, output: scores.append(output[0]))
        before, up = model.forward(x, positions), layer.mlp.experts[1].up_proj.weight.clone()
        own = {name: formats[f"model.layers.0.{name}"] for site in sites for name in site.linears}
        chosen = recipe._fold(layer, sites, own, {}, {}, facts)
        torch.testing.assert_close(model.forward(x, positions), before, rtol=1e-12, atol=1e-12)
        assert torch.equal(*scores)  # factors at the router are powers of two
    assert not torch.equal(layer.mlp.experts[1].up_proj.weight, up)
    assert "mlp.experts.0.gate_proj scaling" in chosen
    assert "mlp.experts.5.down_proj scaling" in chosen


@FAMILIES
@torch.no_grad()
def test_a_rotated_layer_is_the_layer_in_rotated_coordinates(make, family):
    folder = make(family)
    checkpoint = open_checkpoint(str(folder))
    facts, recipe = ModelFacts.of(checkpoint), load_recipes("fireq", ["rotate_residual=true"])[0]
    model = StreamedModel(checkpoint.config, TensorView(checkpoint), device="cpu", dtype=torch.float64)
    x, positions = torch.randn(2, 20, 64, dtype=torch.float64), torch.arange(20).expand(2, -1)
    rotation = recipe._residual_rotation(64).double()
    with model.layer(0) as layer:
        layer.input_layernorm.weight.uniform_(0.5, 2)
        layer.post_attention_layernorm.weight.uniform_(0.5, 2)
        before = model.forward(x, positions)
        recipe._residual_rotation = lambda size: rotation
        recipe._rotate_layer(layer, sites_of(facts, 0))
        torch.testing.assert_close(model.forward(x @ rotation, positions), before @ rotation, rtol=0, atol=1e-5)


# ---- the result and its readers


@FAMILIES
@pytest.mark.parametrize("override", ["scheme=W4AFP8", "scheme=FP8", "group_size=null"])
def test_compressed_tensors_unpacks_the_experts_in_its_default_mode(make, quantize, family, override):
    sizes = {"intermediate_size": 64} if family == "mixtral" else {"moe_intermediate_size": 64}
    out, report = quantize(make(family, num_attention_heads=8, **sizes), *PLAIN, override)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == (2 if override == "group_size=null" else 1)  # o_proj has groups of 128, experts of 64
    assert report["plan"]["for transformers"].startswith("loads it")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    weights = dequantized(load_file(out / "model.safetensors"))
    for kind in ("gate_up_proj", "down_proj"):
        theirs = getattr(model.model.layers[0].mlp.experts, kind).double()
        torch.testing.assert_close(theirs, fused(weights, 0, family, kind), rtol=2**-7, atol=0)


@FAMILIES
def test_our_own_format_brings_its_code(make, quantize, logits_without_kit, family):
    out, report = quantize(make(family), "format=kit")
    assert report["plan"]["for transformers"].startswith("no")
    with torch.no_grad():
        torch.testing.assert_close(loaded(out)(IDS).logits, logits_without_kit(out, IDS, trust_remote_code=True))


def test_config_groups_single_out_experts_and_ignored_ones_keep_their_weights(make, quantize):
    source = make("mixtral")
    out, _ = quantize(source, *PLAIN, "group_size=null", "ignore=[re:.*block_sparse_moe.experts.1.w2]")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = [group["targets"] for group in config["config_groups"].values()]
    assert [r"re:.*\.experts\.\d+\.w1$" in group for group in groups] == [True, False]
    assert [r"re:.*\.experts\.\d+\.gate_proj$" in group for group in groups] == [True, False]  # what vLLM looks up
    assert "model.layers.1.block_sparse_moe.experts.0.w2" in groups[1]
    for name in ("gate", "experts.1.w2", "experts.1.down_proj"):
        assert f"model.layers.0.block_sparse_moe.{name}" in config["ignore"]
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("overrides", "engine", "reason"),
    [
        (("group_size=null",), "transformers", "one format for all experts"),
        (("group_size=16", "ignore=[re:.*layers.0.mlp.experts.*]"), "transformers", "one format for all experts"),
        (("ignore=[re:.*experts.2.up_proj]", "group_size=16"), "vllm", "one format for all experts of a layer"),
        (("group_size=16",), "vllm", "divisible by 256"),
    ],
)
def test_engines_that_would_not_take_the_experts_are_named(make, tmp_path, overrides, engine, reason):
    checkpoint = open_checkpoint(str(make("mixtral")))
    items = plan(checkpoint, load_recipes("fireq", list(overrides)), Options(tmp_path / "out"))
    assert reason in next(item.value for item in items if item.what == f"for {engine}")
    with pytest.raises(KitError, match="would not take the result"):
        plan(checkpoint, load_recipes("fireq", [*overrides, f"target={engine}"]), Options(tmp_path / "out"))


@FAMILIES
def test_other_ways_to_calibrate(make, quantize, family):
    """Searched scaling, statistics of the original model, a rotated stream, mixed precision, tuning."""
    source = make(family)
    base = loaded(source)
    plain = kl(base, loaded(quantize(source, preset="rtn", name="rtn")[0]))
    for number, overrides in enumerate(
        [
            ("scaling=search", "gptq.sequential=false"),
            ("rotate_residual=true", "gptq.match_original=0", "tune.steps=3"),
            ("bits_budget=5.5",),
        ]
    ):
        out, report = quantize(source, *PLAIN, *overrides, name=f"out-{number}")
        assert kl(base, loaded(out)) < plain
    assert report["allocation"]["fireq"]["bits_per_weight"] <= 5.5


def test_a_killed_run_resumes_to_the_same_bytes(make, quantize, monkeypatch):
    source = make("mixtral", starving=True)
    out, report = quantize(source, name="whole")
    original = Fireq.quantize

    def killed(self, layer):
        if layer.index == 1:
            raise KeyboardInterrupt
        return original(self, layer)

    killed._kit_stage = original._kit_stage
    monkeypatch.setattr(Fireq, "quantize", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, name="again")
    monkeypatch.setattr(Fireq, "quantize", original)
    again, resumed = quantize(source, name="again", resume=True)
    assert resumed["stages"] == report["stages"]
    for file in ("model.safetensors", "kit_cache.safetensors"):
        assert (again / file).read_bytes() == (out / file).read_bytes()
