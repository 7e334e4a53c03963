"""The factory: outputs unchanged at the start, plain PEFT folders for the untouched base, merging, guards."""

import copy
import json
import logging

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kit.convert.adapter_recipe import decoder_linears
from kit.convert.adapters import (
    attach,
    choose_ranks,
    diagnose,
    export,
    leak,
    load_initial,
    merge,
    plan_adapters,
    rank_for_parameters,
    target_linears,
)
from kit.convert.checkpoint import open_checkpoint
from kit.convert.covariance_store import Covariances, collect_covariances, collect_from_model
from kit.convert.data import TokenRows
from kit.convert.errors import KitError
from kit.convert.recipe import ModelFacts
from kit.recipes import load_recipes

RECIPES = {
    "lora": ("lora", []),
    "pissa": ("pissa", []),
    "milora": ("milora", []),
    "kpm": ("corda", []),
    "ipm": ("corda", ["mode=ipm"]),
    "balanced": ("corda", ["split=balanced"]),
    "kore": ("kore", []),
    "kore-zero": ("kore", ["init=zero"]),
}


def make_recipe(name, *settings, rank=4):
    preset, more = RECIPES[name]
    return load_recipes(preset, [f"rank={rank}", *more, *settings])[0]


def random_rows(count, length=32, seed=0):
    ids = torch.randint(4, 96, (count, length), generator=torch.Generator().manual_seed(seed))
    return TokenRows(ids, torch.arange(length).expand_as(ids), count, "random", str(seed))


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def facts(folder):
    return ModelFacts.of(open_checkpoint(str(folder)))


@pytest.fixture(scope="module")
def covariances(folder, facts):
    return collect_covariances(open_checkpoint(str(folder)), random_rows(24), targets=list(decoder_linears(facts)))


@pytest.fixture
def load(folder):
    return lambda dtype=torch.float32: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


IDS = torch.randint(4, 96, (2, 16), generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def train(model, steps=4):
    """Move everything that is trained, far enough to see."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("settings", [[], ["alpha=6"]])
@pytest.mark.parametrize("name", RECIPES)
def test_the_output_does_not_change_by_attaching(name, settings, load, covariances):
    recipe, model = make_recipe(name, *settings), load()
    before = logits(model)
    adapted = attach(model, recipe, covariances)
    assert relative(logits(adapted), before) < 1e-5
    residual = any(bool(factors.b.any()) for factors in adapted.kit_adapter.initial.values())
    weight = adapted.get_base_model().get_submodule("model.layers.0.mlp.up_proj").get_base_layer().weight
    assert torch.equal(weight, load().model.layers[0].mlp.up_proj.weight) is not residual
    assert residual == (name not in ("lora", "kore-zero"))


@pytest.mark.parametrize("name", RECIPES)
def test_trained_adapters_go_on_the_untouched_base_and_merge(name, tmp_path, load, covariances):
    recipe = make_recipe(name, "alpha=6")
    adapted = train(attach(load(), recipe, covariances))
    expected = logits(adapted)
    assert relative(expected, logits(load())) > 1e-2
    export(adapted, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    for linear, module in adapted.kit_adapter.modules.items():
        layer, first = adapted.get_base_model().get_submodule(module), adapted.kit_adapter.initial[linear]
        a, b = (written[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a[:4], layer.lora_A.default.weight)
        assert torch.equal(b[:, :4], layer.lora_B.default.weight - (first.b if name == "kore" else 0))
        if len(a) == 8:
            assert torch.equal(a[4:], first.a)
            assert torch.equal(b[:, 4:], -first.b)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (4 if name in ("lora", "kore", "kore-zero") else 8)
    assert config["lora_alpha"] / config["r"] == 1.5
    loaded = PeftModel.from_pretrained(load(), tmp_path).eval()
    assert relative(logits(loaded), expected) < 2e-5
    again = {n.replace(".default.", "."): p for n, p in loaded.named_parameters() if "lora_" in n}
    assert written.keys() == again.keys()
    assert all(torch.equal(again[key], written[key]) for key in written)
    rounded = PeftModel.from_pretrained(load(torch.bfloat16), tmp_path).eval()
    assert relative(logits(rounded), expected) < 5e-2
    base = merge(adapted)
    assert not any("lora" in key for key in base.state_dict())
    assert relative(logits(base), expected) < 2e-5
    base.save_pretrained(tmp_path / "merged")
    assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) < 2e-5


def test_in_16_bits_merging_onto_the_untouched_weights_rounds_once(load, covariances):
    originals = dict(load(torch.bfloat16).requires_grad_(False).named_modules())
    adapted = train(attach(load(torch.bfloat16), make_recipe("kpm"), covariances), steps=2)
    sides = {
        name: tuple(
            adapted.get_base_model().get_submodule(module).get_parameter(f"lora_{side}.default.weight").detach()
            for side in "AB"
        )
        for name, module in adapted.kit_adapter.modules.items()
    }
    state = adapted.kit_adapter
    base = merge(adapted, lambda name: originals[name].weight)
    for name, module in state.modules.items():
        (a, b), first = sides[name], state.initial[name]
        exact = originals[module].weight.double() + b.double() @ a.double() - first.b.double() @ first.a.double()
        found = base.get_submodule(module).weight.detach()
        assert found.dtype == torch.bfloat16
        assert float(((found.double() - exact).abs() / exact.abs().clamp(min=1e-3)).max()) < 2**-8


@pytest.mark.parametrize(("name", "train_a"), [("lora", True), ("kpm", True), ("kore", False), ("kore-zero", False)])
def test_what_is_trained_is_what_the_plan_says(name, train_a, load, covariances, facts):
    recipe = make_recipe(name)
    adapted = attach(load(), recipe, covariances)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained) is train_a
    assert all("lora_" in n for n in trained)
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert plan_adapters(facts, recipe).trained_parameters == count
    before = {name: factors.a.clone() for name, factors in adapted.kit_adapter.initial.items()}
    train(adapted)
    moved = [
        not torch.equal(adapted.get_base_model().get_submodule(m).lora_A.default.weight, before[n])
        for n, m in adapted.kit_adapter.modules.items()
    ]
    assert all(moved) if train_a else not any(moved)


def test_saved_initial_factors_give_the_same_model_bit_for_bit(tmp_path, load, covariances):
    recipe = make_recipe("kore")
    first = attach(load(), recipe, covariances)
    first.kit_adapter.save(tmp_path / "initial.safetensors")
    second = attach(load(), recipe, initial=load_initial(tmp_path / "initial.safetensors"))
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [p.requires_grad for p in first.parameters()] == [p.requires_grad for p in second.parameters()]
    with pytest.raises(KitError, match="no initial factors"):
        load_initial(covariance_file(tmp_path, covariances))


def covariance_file(tmp_path, covariances):
    covariances.save(tmp_path / "c.safetensors")
    return tmp_path / "c.safetensors"


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_is_what_peft_computes(mode, tmp_path, load, covariances):
    pytest.importorskip("attr", reason="PEFT's CorDA needs attrs, which it does not ask for")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    recipe, model = make_recipe(mode), load()
    ours = attach(load(), recipe, covariances).kit_adapter
    file = tmp_path / "peft.pt"
    torch.save({ours.modules[name]: covariances.get(name) for name in ours.modules}, file)
    config = PeftLoraConfig(
        r=4,
        lora_alpha=4,
        init_lora_weights="corda",
        corda_config=CordaConfig(covariance_file=str(file), corda_method=mode),
        target_modules=list(ours.modules.values()),
    )
    preprocess_corda(model, config)
    values = {name: model.get_submodule(module).eigens.S_WC.clone() for name, module in ours.modules.items()}
    theirs = get_peft_model(model, config)
    for name, module in ours.modules.items():
        layer, factors = theirs.get_base_model().get_submodule(module), ours.initial[name]
        product = layer.lora_B.default.weight @ layer.lora_A.default.weight
        assert relative(factors.b @ factors.a, product.detach()) < 2e-4, name
        scale = covariances.get(name).diagonal().mean()  # we decompose with C of mean diagonal 1
        assert relative(factors.b.norm(dim=0).square() * scale, values[name]) < 1e-4, name


@pytest.mark.parametrize("name", ["pissa"])
def test_pissa_is_what_peft_computes(name, load):
    ours = attach(load(), make_recipe(name, "alpha=6")).kit_adapter
    config = PeftLoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=list(ours.modules.values()))
    theirs = get_peft_model(load(), config).get_base_model()
    for linear, module in ours.modules.items():
        layer, factors = theirs.get_submodule(module), ours.initial[linear]
        assert (
            relative(factors.b @ factors.a, (layer.lora_B.default.weight @ layer.lora_A.default.weight).detach()) < 1e-4
        )
        assert torch.allclose(factors.a.norm(dim=1), layer.lora_A.default.weight.norm(dim=1), rtol=1e-4)


def test_kore_leaves_inputs_of_the_kept_data_alone_whatever_b_becomes(folder, facts, load):
    """On data that was not measured; its words' embeddings span few directions, so there is a null space."""
    model = load()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        basis = torch.linalg.qr(torch.randn(48, 12, generator=torch.Generator().manual_seed(0)))[0]
        embedding[:40] = embedding[:40] @ basis @ basis.T  # words of the kept data
    names = ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"]
    kept, held_out, other = ({"input_ids": torch.randint(a, b, (8, 32))} for a, b in ((4, 40), (4, 40), (40, 96)))
    covariances = collect_from_model(model, [kept], targets=names)
    recipe = make_recipe("kore", f"target_modules={names}", rank=8)
    fresh, foreign = (collect_from_model(model, [x], targets=names).get(names[0]) for x in (held_out, other))
    adapted = attach(model, recipe, covariances)
    a = adapted.kit_adapter.initial[names[0]].a
    assert float((a @ fresh).norm() / (a.norm() * fresh.norm())) < 1e-5
    assert leak(a, fresh) < 1e-10
    assert leak(a, foreign) > 0.05
    x = torch.linalg.eigh(fresh.double()).eigenvectors[:, -1].float()
    with torch.no_grad():
        b = adapted.get_base_model().get_submodule("model.layers.0.self_attn.q_proj").lora_B.default.weight
        b.normal_(std=10)
        assert float((b @ (a @ x)).norm()) < 1e-3 * float(b.norm())


def test_leak_is_the_share_of_energy_in_the_row_space():
    x = torch.randn(500, 12, dtype=torch.double) * torch.linspace(0.1, 3, 12)
    a = torch.randn(3, 12, dtype=torch.double)
    projected = x @ a.T @ torch.linalg.inv(a @ a.T) @ a
    assert leak(a, x.T @ x) == pytest.approx(float(projected.square().sum() / x.square().sum()), rel=1e-9)


def test_rank_by_energy(load, covariances):
    recipe, model = make_recipe("kore", "rank_energy=0.02"), load()
    ranks = choose_ranks(model, recipe, covariances)
    assert len(set(ranks.values())) > 1
    for name, rank in ranks.items():
        values = torch.linalg.eigvalsh(covariances.get(name).double())
        smaller = min(target_linears(model, recipe.config)[name].weight.shape)
        assert values[:rank].sum() <= 0.02 * values.sum() or rank == 1
        assert rank == smaller or values[: rank + 1].sum() > 0.02 * values.sum()


@pytest.mark.parametrize("name", ["pissa", "milora", "kpm", "ipm", "kore"])
def test_dynamic_ranks_spend_the_same_parameters_better(name, load, covariances, tmp_path, facts):
    fixed, dynamic = make_recipe(name, rank=6), make_recipe(name, "dynamic_rank=true", rank=6)
    model = load()
    ranks = choose_ranks(model, dynamic, covariances)
    linears = target_linears(model, dynamic.config)

    def cost(chosen):
        return sum(
            r * (w.out_features + w.in_features * fixed.train_a) for r, w in zip(chosen, linears.values(), strict=True)
        )

    @torch.no_grad()
    def taken(chosen):
        total = 0.0
        for rank, (linear, module) in zip(chosen, linears.items(), strict=True):
            spectrum = dynamic.spectrum(module.weight.float(), covariances.get(linear))
            total += float((spectrum[:rank] if dynamic.takes() == "largest" else spectrum.flip(0)[:rank]).sum())
        return total

    budget = plan_adapters(facts, fixed).trained_parameters
    assert plan_adapters(facts, dynamic).trained_parameters is None
    assert budget - max(sum(w.weight.shape) for w in linears.values()) < cost(ranks.values()) <= budget
    assert len(set(ranks.values())) > 1
    assert all(1 <= rank <= 24 for rank in ranks.values())
    even = [6] * len(linears)
    better = taken(ranks.values()) - taken(even)
    assert better > 0 if dynamic.takes() == "largest" else better < 0
    adapted = train(attach(model, dynamic, covariances, ranks))
    export(adapted, tmp_path)
    assert relative(logits(PeftModel.from_pretrained(load(), tmp_path).eval()), logits(adapted)) < 2e-5


def test_kore_rank_of_the_same_parameters():
    """The KORE paper's 235 for LoRA's 128 on Llama-2-7B."""
    sizes = dict.fromkeys("qkvo", (4096, 4096)) | {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    facts = ModelFacts({}, {f"model.layers.0.{name}_proj.weight": shape for name, shape in sizes.items()})
    budget = plan_adapters(facts, make_recipe("lora", rank=128)).trained_parameters
    assert rank_for_parameters(plan_adapters(facts, make_recipe("kore")), budget) == 235
    assert rank_for_parameters(plan_adapters(facts, make_recipe("lora")), budget) == 128


def test_plans_find_the_language_model_and_refuse_what_is_not_there():
    shapes = {
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.language_model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.language_model.layers.0.input_layernorm.weight": (32,),
        "model.language_model.layers.0.mlp.gate.weight": (4, 32),
        "model.language_model.layers.0.mlp.experts.0.up_proj.weight": (48, 32),
        "model.language_model.embed_tokens.weight": (96, 32),
    }
    recipe = make_recipe("lora")
    assert list(plan_adapters(ModelFacts({}, shapes), recipe).linears) == ["layers.0.self_attn.q_proj"]
    with pytest.raises(KitError, match="no linear of the model is called") as caught:
        plan_adapters(ModelFacts({}, shapes), make_recipe("lora", 'target_modules=["q_prj"]'))
    assert "did you mean 'q_proj'" in caught.value.next_step
    with pytest.raises(KitError, match="no language model"):
        plan_adapters(ModelFacts({}, {"encoder.block.0.weight": (4, 4)}), recipe)
    with pytest.raises(KitError, match="more than one"):
        plan_adapters(ModelFacts({}, shapes | {"draft.layers.0.q_proj.weight": (4, 4)}), recipe)


def test_missing_or_foreign_covariances_are_refused_before_the_model_is_touched(load, covariances):
    model = load()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(KitError, match="needs covariances of the training data"):
        attach(model, make_recipe("ipm"))
    foreign = Covariances(covariances.linears, covariances.packed, covariances.tokens, "other", covariances.sources)
    with pytest.raises(KitError, match="another model"):
        attach(model, make_recipe("kore"), foreign)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_bad_data_is_guarded_and_named(folder, facts, load, caplog):
    few = collect_covariances(open_checkpoint(str(folder)), random_rows(1, 3), targets=list(decoder_linears(facts)))
    for name in ("kpm", "ipm", "balanced", "kore"):
        model = load()
        before = logits(model)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="kit"):
            adapted = attach(model, make_recipe(name), few)
        assert relative(logits(adapted), before) < 1e-5
        assert "layers.1.mlp.down_proj: C is of 3 tokens, fewer than the rank 4" in caplog.text
        for factors in adapted.kit_adapter.initial.values():
            assert factors.a.isfinite().all()
            assert factors.b.isfinite().all()


@pytest.mark.parametrize("name", RECIPES)
def test_ill_conditioned_inputs_and_zero_rows_are_guarded_and_named(name, load, facts, caplog):
    model = load()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.copy_(torch.logspace(0, -5, 48))
        model.model.layers[1].mlp.up_proj.weight[:6] = 0
    batch = {"input_ids": random_rows(24).input_ids}
    covariances = collect_from_model(model, [batch], targets=list(decoder_linears(facts)))
    before = logits(model)
    with caplog.at_level(logging.WARNING, logger="kit"):
        adapted = attach(model, make_recipe(name), covariances)
    assert relative(logits(adapted), before) < 1e-5
    assert all(f.a.isfinite().all() and f.b.isfinite().all() for f in adapted.kit_adapter.initial.values())
    warned = caplog.text + "".join(adapted.kit_adapter.warnings)
    assert "layers.1.mlp.up_proj: 6 of " in warned
    looks = make_recipe(name).covariance_source() != "none"
    assert ("layers.0.self_attn.q_proj: C is ill-conditioned" in warned) is looks
    assert ("layers.1.mlp.down_proj: 6 of " in warned) is looks
    assert relative(logits(train(adapted)), before) > 1e-2


def test_each_cause_has_its_warning():
    weight = torch.randn(6, 8)
    x = torch.randn(100, 8)
    good = x.T @ x / 100
    assert diagnose("layers.0.q", weight, good, 100, 4) == []
    dead = good.clone()
    dead[3], dead[:, 3] = 0, 0
    assert diagnose("layers.0.q", weight, dead, 100, 4) == [
        "layers.0.q: 1 of 8 inputs are dead (zero at each of 100 tokens)"
    ]
    assert "C is of 6 tokens for 8 inputs, so it is singular" in diagnose("layers.0.q", weight, good, 6, 4)[0]
    scale = torch.logspace(0, -5, 8)
    assert (
        "layers.0.q: C is ill-conditioned" in diagnose("layers.0.q", weight, good * scale * scale[:, None], 100, 4)[0]
    )
    weight[2] = 0
    assert diagnose("layers.0.q", weight, None, 0, 4) == ["layers.0.q: 1 of 6 rows of the weight are zero"]


def test_kit_convert_points_to_kit_adapt(folder, tmp_path):
    from kit.convert.pipeline import Options, plan

    with pytest.raises(KitError, match="does not run recipe corda") as caught:
        plan(open_checkpoint(str(folder)), [make_recipe("kpm")], Options(tmp_path / "out"))
    assert "kit adapt MODEL --recipe corda" in caught.value.next_step


@pytest.mark.parametrize("name", ["kpm", "kore"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_models_that_take_images_are_adapted_in_their_language_tower(family, name, make_image_model, tmp_path):
    model, batch = make_image_model(family)
    model.save_pretrained(tmp_path / "base")
    recipe = make_recipe(name)
    names = list(plan_adapters(ModelFacts.of(open_checkpoint(str(tmp_path / "base"))), recipe).linears)
    covariances = collect_from_model(model, [batch], targets=names)

    @torch.no_grad()
    def answer(model):
        return model(**batch).logits

    before = answer(model)
    adapted = attach(model, recipe, covariances)
    assert relative(answer(adapted), before) < 1e-5
    adapters = [n for n, p in adapted.named_parameters() if "lora_" in n]
    assert len(adapters) == 2 * 14
    assert all(".language_model.layers." in n for n in adapters)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)
    if name == "kore":  # with fewer tokens than inputs there is a null space: the kept answers stay as they are
        assert relative(answer(adapted), before) < 1e-3
    batch["input_ids"] = torch.cat([batch["input_ids"][:, :5], torch.randint(20, 90, (2, 5))], 1)
    after = answer(adapted)
    assert relative(after, answer(type(model).from_pretrained(tmp_path / "base"))) > 1e-2
    export(adapted, tmp_path / "adapter")
    fresh = type(model).from_pretrained(tmp_path / "base")
    assert relative(answer(PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()), after) < 2e-5
    assert relative(answer(merge(adapted)), after) < 2e-5
