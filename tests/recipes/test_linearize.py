"""What the linearizing recipes share: layers, stages, losses; whole conversions that load with and without kit."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from kit.convert.checkpoint import load, open_checkpoint
from kit.convert.distill import WindowDropout, logit_kl, logit_loss, weight_loss
from kit.convert.errors import ExitCode, KitError
from kit.convert.inspect import cache_bytes
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.convert.recipe import ModelFacts
from kit.modules.linear_attention import MIXERS, Step, branch_weights, original_attention
from kit.recipes import load_recipes

SHORT = ["data.num_samples=8", "data.seq_len=40", "window_size=10"]
TRAIN = ["transfer.steps=6", "transfer.batch_size=4", "distill.steps=4", "distill.batch_size=4"]
RUNS = {
    "window": [*SHORT, "keep_full=34%"],
    "lolcats": [
        *SHORT,
        *TRAIN,
        "lora.steps=2",
        "keep_full=[1]",
        "transfer.linear_steps=2",
        "distill.window_dropout=0.5",
    ],
    "hedgehog": [*SHORT, *TRAIN, "keep_full=1/3"],
    "lizard": [*SHORT, *TRAIN, "distill.parameters=lora", "keep_window=34%", "window_rope=true"],
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 8,
    "vocab_size": 64,
}


def facts(**change):
    shapes = {}
    for index in range(CONFIG["num_hidden_layers"]):
        for name, shape in {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}.items():
            shapes[f"model.layers.{index}.self_attn.{name}_proj.weight"] = shape
    return ModelFacts(CONFIG | change, shapes)


def ids(length=50, batch=2):
    return torch.randint(4, 96, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(make_model):
    return make_model()


@pytest.fixture(scope="module", params=RUNS)
def converted(request, llama, tmp_path_factory):
    """One conversion by each recipe: (recipe, folder, report)."""
    folder = tmp_path_factory.mktemp(request.param) / "out"
    recipes = load_recipes(request.param, RUNS[request.param])
    report = convert(open_checkpoint(str(llama)), recipes, Options(folder, device="cpu", eval_tokens=0), Progress())
    return request.param, folder, report


def test_it_loads_with_and_without_kit_and_decodes_as_it_prefills(converted, logits_without_kit):
    _, folder, _ = converted
    model = load(str(folder), dtype="float32")
    assert type(model).__name__ == "KitLlamaForCausalLM"
    with torch.no_grad():
        want = model(ids(), use_cache=False).logits
        cache = DynamicCache(config=model.config)
        steps = torch.cat([model(part, past_key_values=cache).logits for part in ids().split([30, 1, 1, 18], 1)], 1)
    torch.testing.assert_close(steps, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_without_kit(folder, ids(), True), want, atol=1e-5, rtol=1e-5)


def test_left_padding_changes_no_real_position(converted):
    """Also where a step follows; rows of different padding in one batch."""
    model = load(str(converted[1]), dtype="float32")
    padding = torch.tensor([7, 0])
    rows = ids(43)
    padded = torch.zeros(2, 50, dtype=torch.long)
    mask = torch.arange(50) >= padding[:, None]
    for row, left in enumerate(padding.tolist()):
        padded[row, left : left + 43] = rows[row]
    mask = mask & (torch.arange(50) < padding[:, None] + 43)
    with torch.no_grad():
        want = model(rows, use_cache=False).logits
        got = model(padded, attention_mask=mask.long(), use_cache=False).logits
        for row, left in enumerate(padding.tolist()):
            torch.testing.assert_close(got[row, left : left + 43], want[row], atol=1e-4, rtol=1e-4)
        prompt = torch.cat([torch.zeros(2, 7, dtype=torch.long), rows], 1)
        seen = (torch.arange(50) >= 7).long().expand(2, -1)
        cache = DynamicCache(config=model.config)
        steps = [
            model(part, attention_mask=seen[:, :end], past_key_values=cache).logits
            for part, end in zip(prompt.split([30, 1, 19], 1), (30, 31, 50), strict=True)
        ]
    torch.testing.assert_close(torch.cat(steps, 1)[:, 7:], want, atol=1e-4, rtol=1e-4)


class KilledAt(Progress):
    """Interrupts at one of the steps that are told, those inside layers too."""

    def __init__(self, left=10**9):
        self.left, self.told = left, 0

    def step(self, advance=1, **values):
        self.told += 1
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def silent(self):
        return self


def test_a_conversion_killed_anywhere_ends_with_the_same_losses_and_weights(converted, llama, tmp_path):
    """Three times: in its first half (sampling, sensitivity, layers), and in the trainings after it."""
    name, folder, report = converted
    recipes, whole = load_recipes(name, RUNS[name]), KilledAt()
    checkpoint, how = open_checkpoint(str(llama)), {"device": "cpu", "eval_tokens": 0}
    convert(checkpoint, recipes, Options(tmp_path / "whole", **how), whole)
    output = tmp_path / "out"
    for number, share in enumerate((0.5, 0.2, 0.2)):
        killed = KilledAt(max(int(share * whole.told), 1))
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint, load_recipes(name, RUNS[name]), Options(output, resume=number > 0, **how), killed)
    again = convert(checkpoint, load_recipes(name, RUNS[name]), Options(output, resume=True, **how), Progress())
    assert again["allocation"] == report["allocation"]
    for stage, entries in report["stages"].items():
        for entry, other in zip(entries, again["stages"][stage], strict=True):
            assert other.get("losses", []) == pytest.approx(entry.get("losses", []), abs=1e-5)
    weights, others = (load(str(where), dtype="float32").state_dict() for where in (folder, output))
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_layers_are_what_the_options_say_and_the_cache_costs_what_is_said(converted):
    name, folder, report = converted
    config = json.loads((folder / "config.json").read_text())
    kinds = config["linear_attention"]["mixers"]
    mixer = {"window": "window", "lolcats": "hybrid", "hedgehog": "linear", "lizard": "gated"}[name]
    assert kinds.count("full") == (name != "lizard")
    assert set(kinds) - {"full", "window"} <= {mixer}
    if name in ("window", "lizard"):
        found = report["allocation"][name]
        order = sorted(range(3), key=found["sensitivity"].__getitem__)
        assert kinds[order[-1] if name == "window" else order[0]] == ("full" if name == "window" else "window")
    else:
        assert kinds[{"lolcats": 1, "hedgehog": 2}[name]] == "full"
    model = load(str(folder), dtype="bfloat16")
    cache = model(ids(80, 1), use_cache=True).past_key_values
    told = cache_bytes(config)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    real += sum(layer.recurrent_states[0].nbytes for layer in cache.layers if hasattr(layer, "recurrent_states"))
    assert real == told["constant"] + 80 * told["per_token"]


def test_stages_lower_what_they_minimise(converted):
    name, _, report = converted
    for metrics in report["stages"].get(f"{name}.attention_transfer", []):
        assert not metrics or metrics["relative_error"] < metrics["relative_error_before"]
    if name != "window":
        losses = report["stages"][f"{name}.logit_distillation"][0]["losses"]
        assert min(losses[1:]) < losses[0]


def test_recipes_on_one_base_in_one_process_do_not_disturb_each_other(converted, llama, tmp_path):
    """Each beside each: loaded side by side and used in turn, they give what each gives alone; so does the base."""
    name, folder, _ = converted
    with torch.no_grad():
        alone = load(str(folder), dtype="float32")(ids()).logits
        base = AutoModelForCausalLM.from_pretrained(llama)
        want = base(ids()).logits
        one = load(str(folder), dtype="float32")
        for other in sorted(RUNS.keys() - {name}):
            options = [*SHORT, *(["transfer.steps=1", "distill.steps=0"] if other != "window" else [])]
            recipes = load_recipes(other, [*options, *(["lora.steps=0"] if other == "lolcats" else [])])
            with torch.enable_grad():
                convert(
                    open_checkpoint(str(llama)),
                    recipes,
                    Options(tmp_path / other, device="cpu", eval_tokens=0),
                    Progress(),
                )
            second = load(str(tmp_path / other), dtype="float32")
            its = second(ids()).logits
            assert not torch.allclose(its, alone)
            with original_attention(one):
                torch.testing.assert_close(second(ids(), use_cache=False).logits, its, atol=1e-4, rtol=1e-4)
            with branch_weights(second, 0.0, 0.0):
                assert torch.equal(one(ids()).logits, alone)
                assert torch.equal(base(ids()).logits, want)
            assert torch.equal(second(ids()).logits, its)


def test_a_window_is_the_base_behind_a_mask(llama, tmp_path):
    recipes = load_recipes("window", ["window_size=10", "num_sinks=3"])
    convert(open_checkpoint(str(llama)), recipes, Options(tmp_path / "out", device="cpu", eval_tokens=0), Progress())
    model, base = load(str(tmp_path / "out"), dtype="float32"), AutoModelForCausalLM.from_pretrained(llama)
    at = torch.arange(50)
    seen = (at[:, None] >= at) & ((at[:, None] - at < 7) | (at < 3))
    with torch.no_grad():
        want = base(ids(), attention_mask=seen.expand(2, 1, -1, -1)).logits
        torch.testing.assert_close(model(ids()).logits, want, atol=1e-4, rtol=1e-4)


def test_sensitivity_is_the_kl_of_one_changed_layer(llama, tmp_path):
    recipes = load_recipes("window", [*SHORT, "keep_full=34%", "sensitivity_rows=2", "seed=5"])
    report = convert(
        open_checkpoint(str(llama)), recipes, Options(tmp_path / "out", device="cpu", eval_tokens=0), Progress()
    )
    from kit.convert.data import load_rows

    checkpoint = open_checkpoint(str(llama))
    base = checkpoint.load_model(torch.float32, "cpu")
    rows = load_rows(recipes[0].config.data, checkpoint.load_tokenizer(), seed=5, model=base).input_ids[:2]
    model = load(str(tmp_path / "out"), dtype="float32")
    for index, found in enumerate(report["allocation"]["window"]["sensitivity"]):
        one = load_recipes("window", [*SHORT, f"keep_full={[i for i in range(3) if i != index]}"])
        config = type(model.config)(**one[0].build(ModelFacts.of(checkpoint)))
        changed = AutoModelForCausalLM.from_config(config).eval()
        changed.load_state_dict(base.state_dict())
        with torch.no_grad():
            log_p, log_q = (m(rows).logits.log_softmax(-1) for m in (base, changed))
        assert found == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_chunked_kl_is_the_kl_and_so_are_its_gradients(cap, monkeypatch):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (14, 11))
    other, head = torch.randn(14, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)

    def plain(logits):
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    want = F.kl_div(plain(hidden @ weight.mT), plain(other @ head.mT), log_target=True, reduction="batchmean")
    wanted = torch.autograd.grad(want, (hidden, weight))
    monkeypatch.setattr("kit.convert.distill.LOGITS_AT_ONCE", 55)  # five tokens a chunk
    got = logit_kl(
        hidden.float().unflatten(0, (2, 7)), weight.float(), other.float().unflatten(0, (2, 7)), head.float(), cap
    )
    grads = torch.autograd.grad(3 * got, (hidden, weight))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    for grad, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, 3 * right, atol=1e-5, rtol=1e-4)


def test_the_teacher_stays_the_base_while_all_weights_move(llama):
    recipe = load_recipes("lolcats", SHORT)[0]
    checkpoint = open_checkpoint(str(llama))
    base = checkpoint.load_model(torch.float32, "cpu")
    import kit.modules.modeling as modeling

    model = AutoModelForCausalLM.from_config(modeling.KitLlamaConfig(**recipe.build(ModelFacts.of(checkpoint)))).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if "linear_attention" not in n}
    loss = logit_loss(model, kept)
    positions = torch.arange(50).expand(2, -1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        log_p, log_q = (m(ids()).logits.log_softmax(-1) for m in (base, model))
        want = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert float(loss(ids(), positions)) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("kind", ["hybrid", "linear", "gated"])
def test_the_weight_loss_is_the_cross_entropy_of_all_weights(kind, monkeypatch):
    """Against T x T softmax weights as labels; chunks of 7 queries."""
    torch.manual_seed(0)
    length = 30
    mixer = MIXERS[kind](
        num_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=16, window_size=6, num_sinks=2, feature_dim=8
    )
    q, k = torch.randn(2, 4, length, 8) * 2, torch.randn(2, 2, length, 8)
    step = Step(
        8**-0.5, hidden=torch.randn(2, length, 16), rotary=(torch.ones(2, length, 8), torch.zeros(2, length, 8))
    )
    scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(
        torch.ones(length, length).triu(1).bool(), -math.inf
    )
    a = mixer.log_weights(q, k, step, 0, length).double().exp()
    a = a / a.sum(-1, keepdim=True)
    want = -(scores.double().softmax(-1) * a.log().clamp(min=-100)).sum(-1).mean()
    monkeypatch.setattr("kit.convert.distill.SCORES_AT_ONCE", 7 * 2 * 4 * length)
    got = weight_loss(mixer, q, k, step, q, k)
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    got.backward()
    assert mixer.feature_map_q.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@pytest.mark.parametrize("kind", ["hybrid", "gated"])
def test_the_weight_loss_keeps_its_branches_until_its_backward_pass(kind):
    """Scores are made again when the window that was left out is back."""
    torch.manual_seed(0)
    mixer = MIXERS[kind](num_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=16, window_size=6, feature_dim=8)
    q, k = torch.randn(2, 4, 30, 8) * 2, torch.randn(2, 2, 30, 8)
    step = Step(8**-0.5, hidden=torch.randn(2, 30, 16))

    def gradients(leave_first):
        mixer.zero_grad()
        with branch_weights(mixer, 1.0, 0.0):
            loss = weight_loss(mixer, q, k, step, q, k)
            if not leave_first:
                loss.backward()
        if leave_first:
            loss.backward()
        return {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}

    want, got = gradients(False), gradients(True)
    assert want["feature_map_q"].abs().sum() > 0
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert (mixer.linear_weight, mixer.window_weight) == (1, 1)


@pytest.mark.parametrize("name", ["lolcats", "hedgehog"])
def test_layers_are_chosen_among_those_not_named_and_measured_behind_the_configured_window(name, monkeypatch):
    seen = []
    kl = [0.1, 0.8, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6]
    monkeypatch.setattr("kit.convert.sensitivity.window_sensitivity", lambda run, config, *_: seen.append(config) or kl)
    recipe = load_recipes(name, ["keep_full=25%", "keep_window=[3]"])[0]
    rows = SimpleNamespace(input_ids=torch.zeros(4, 8), position_ids=torch.zeros(4, 8))
    found = recipe.layer_sensitivity(SimpleNamespace(facts=facts(), rows=rows))
    assert (found["keep_full"], found["keep_window"]) == ([1, 7], [3])
    alone = load_recipes(name, ["keep_full=25%"])[0]
    alone.layer_sensitivity(SimpleNamespace(facts=facts(), rows=rows))
    assert [config["sliding_window"] for config in seen] == [60, 60]
    assert alone.build(facts())["sliding_window"] == (60 if name == "lolcats" else 2)


def test_without_a_linear_branch_no_state_is_kept():
    import kit.modules.modeling as modeling

    base = facts(intermediate_size=16)
    config = load_recipes("lolcats", ["linear_weight=0", "window_size=10"])[0].build(base)
    assert cache_bytes(config) == cache_bytes(load_recipes("window", ["window_size=10"])[0].build(base))
    model = AutoModelForCausalLM.from_config(modeling.KitLlamaConfig(**config)).eval()
    cache, rows = DynamicCache(config=model.config), ids() % 64
    with torch.no_grad():
        steps = torch.cat([model(part, past_key_values=cache).logits for part in rows.split([30, 1, 19], 1)], 1)
        torch.testing.assert_close(steps, model(rows, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    sinks = 2 * 2 * 4 * 8  # keys and values, heads, sinks, head dim
    assert all(layer.recurrent_states[0].shape == (2, sinks) for layer in cache.layers)


def test_a_wide_window_leaves_rows_to_balance_on():
    from kit.recipes.lolcats import BALANCE_TOKENS

    mixer = MIXERS["hybrid"](
        num_heads=2, num_key_value_heads=1, head_dim=4, window_size=BALANCE_TOKENS, feature_dim=4
    ).requires_grad_(False)
    q, k = torch.randn(1, 2, 4096, 4), torch.randn(1, 1, 4096, 4)

    class Teacher:
        attention = SimpleNamespace(linear_attention=mixer, scaling=0.5)

        def given(self, rows, length):
            return {"queries": q[rows, :, :length], "keys": k[rows, :, :length]}

        def run(self, queries, keys):
            mixer(queries, keys, keys, Step(0.5))

    load_recipes("lolcats", [f"window_size={BALANCE_TOKENS}"])[0].start(Teacher())
    assert mixer.window_factor.isfinite().all()


def test_the_windows_a_base_has_are_those_that_transformers_gives_it():
    from transformers import Qwen2Config

    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
    config = load_recipes("window", [])[0].build(facts(model_type="qwen2", **sliding))
    kinds = Qwen2Config(num_hidden_layers=8, **sliding).layer_types
    want = [16 if kind == "sliding_attention" else None for kind in kinds]
    assert config["linear_attention"]["base_windows"] == want


def test_window_dropout_follows_its_schedule_and_remembers_nothing():
    dropout = WindowDropout((0.8, 0.0), 101, 20, seed=0)
    rows = [torch.tensor([i]) for i in range(400)]

    def share(step):
        dropout.at_step(step)
        return sum(map(dropout.drops, rows)) / len(rows)

    assert share(19) == 1
    assert share(20) == pytest.approx(0.8, abs=0.06)
    assert share(60) == pytest.approx(0.4, abs=0.06)
    assert share(100) == 0
    later = WindowDropout((0.8, 0.0), 101, 20, seed=0)
    later.at_step(60)
    dropout.at_step(60)
    assert [dropout.drops(r) for r in rows] == [later.drops(r) for r in rows]


def test_what_is_new_can_start_and_learn_at_rates_of_its_own(llama, tmp_path):
    """AdamW moves a weight by its rate in the first update, so a gate's bias tells which rate it had."""
    moved = {}
    for rate in (None, 0.25):
        options = [*SHORT, "transfer.steps=0", "distill.steps=1", "distill.warmup_ratio=0", "gate_bias=7"]
        options += ["distill.learning_rate=0.001"] + ([f"distill.new_learning_rate={rate}"] if rate else [])
        convert(
            open_checkpoint(str(llama)),
            load_recipes("lizard", options),
            Options(tmp_path / str(rate), device="cpu", eval_tokens=0),
            Progress(),
        )
        weights = load(str(tmp_path / str(rate)), dtype="float32").state_dict()
        biases = [value for name, value in weights.items() if name.endswith("gate_bias")]
        moved[rate] = [float(abs(bias - 7)) for bias in biases]
    assert len(moved[None]) == len(moved[0.25]) == 3
    assert moved[None] == pytest.approx([0.001] * 3, rel=0.05)
    assert moved[0.25] == pytest.approx([0.25] * 3, rel=0.05)


def kinds(recipe, *overrides):
    return load_recipes(recipe, list(overrides))[0].build(facts())["linear_attention"]["mixers"]


def test_layers_can_be_named_in_three_ways():
    assert kinds("lolcats", "keep_full=1/4") == ["hybrid"] * 3 + ["full"] + ["hybrid"] * 3 + ["full"]
    assert kinds("lizard", "keep_full=[0]", "keep_window=[6,7]") == ["full"] + ["gated"] * 5 + ["window"] * 2
    plan = {item.what: item.value for item in load_recipes("lolcats", ["keep_full=25%"])[0].plan(facts())}
    assert plan["converted"] == "6 of 8 attention layers"
    assert "0.1 kB a token" in plan["cache"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["keep_full=[8]"], "there is no layer 8"),
        (["keep_full=quarter"], "'quarter' names no layers"),
        (["keep_full=[1]", "keep_window=[1]"], "layer 1 cannot be both"),
        (["keep_full=75%", "keep_window=50%"], "more layers are kept than there are"),
        (["lora.target_modules=[qkv_proj]"], "the model has no linear 'qkv_proj'"),
        (["lora.target_modules=[input_layernorm]"], "the model has no linear 'input_layernorm'"),
        (["lora.target_modules=[embed_tokens]", "lora.streamed=true"], "no linear 'embed_tokens' in its layers"),
        (["linear_weight=0", "transfer.window_dropout=0.5"], "passes without a window need the linear branch"),
        (["num_sinks=9", "window_size=10"], "9 sinks leave no window of 10"),
        (["data.seq_len=64"], "rows of 64 tokens never leave a window of 64"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_weights_load(overrides, message):
    model = facts()
    model.shapes.update({"model.layers.0.input_layernorm.weight": (32,), "model.embed_tokens.weight": (96, 32)})
    with pytest.raises(KitError, match=message) as error:
        load_recipes("lolcats", overrides)[0].plan(model)
    assert error.value.exit_code == ExitCode.USAGE


def test_new_parameters_are_counted_for_every_recipe():
    from kit.convert.streaming import build_skeleton

    for name in RUNS:
        recipe = load_recipes(name, ["keep_full=[1,2]"])[0]
        skeleton = build_skeleton(recipe.build(facts(intermediate_size=16)))
        real = sum(p.numel() for parameter, p in skeleton.named_parameters() if "linear_attention" in parameter)
        assert recipe.new_parameters(facts()) == real


def test_weights_run_in_the_bases_dtype_and_are_trained_in_their_own(llama):
    import kit.modules.modeling as modeling

    recipe, checkpoint = load_recipes("lolcats", SHORT)[0], open_checkpoint(str(llama))
    model = AutoModelForCausalLM.from_config(modeling.KitLlamaConfig(**recipe.build(ModelFacts.of(checkpoint)))).eval()
    kept = {n: p.detach().bfloat16() for n, p in model.named_parameters() if "linear_attention" not in n}
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    logit_loss(model, kept)(ids(), torch.arange(50).expand(2, -1)).backward()
    assert seen == [torch.bfloat16] * 2
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("options", [["distill.steps=1"], ["distill.steps=0", "lora.steps=1"], ["keep_full=34%"]])
def test_branches_are_balanced_on_data_without_attention_transfer_too(llama, tmp_path, options):
    """transfer.steps=0 leaves the steps out, not the starting value of g; a given one stays."""

    def factors(*more):
        recipes = load_recipes("lolcats", [*SHORT, "transfer.steps=0", "distill.learning_rate=1e-9", *more])
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        convert(open_checkpoint(str(llama)), recipes, Options(output, device="cpu", eval_tokens=0), Progress())
        found = load(str(output), dtype="float32").state_dict()
        return torch.cat([v.sigmoid() for k, v in found.items() if k.endswith("window_factor")])

    rest = [] if "lora.steps=1" in options else ["lora.steps=0"]
    balanced = factors(*options, *rest)
    assert (balanced - 0.1).abs().mean() > 1e-2
    transferred = factors(*options, *rest, "transfer.steps=1", "transfer.learning_rate=1e-9")
    torch.testing.assert_close(balanced, transferred, atol=1e-5, rtol=1e-4)
    given = factors(*options, *rest, "window_factor=0.2")
    torch.testing.assert_close(given, torch.full_like(given, 0.2), atol=1e-5, rtol=1e-4)


def test_the_weight_loss_makes_nothing_of_the_square_of_the_length(monkeypatch):
    """In packed rows with a base window; the largest tensor grows with the length, for chunks of so many scores."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple) else (out,):
                if isinstance(each, torch.Tensor):
                    self.most = max(self.most, each.numel())
            return out

    length = 512
    monkeypatch.setattr("kit.convert.distill.SCORES_AT_ONCE", 16 * 2 * length)
    for kind in ("hybrid", "linear", "gated"):
        mixer = MIXERS[kind](
            num_heads=2, num_key_value_heads=1, head_dim=4, hidden_size=8, window_size=6, num_sinks=2, feature_dim=4
        )
        q, k = torch.randn(1, 2, length, 4), torch.randn(1, 1, length, 4)
        segments = (torch.arange(length) >= 200).long()[None]
        step = Step(0.5, hidden=torch.randn(1, length, 8), segment_ids=segments, base_window=100)
        with Largest() as largest:
            weight_loss(mixer, q, k, step, q, k).backward()
        assert largest.most <= 16 * 2 * length, kind
