"""What is kept of a teacher's distributions on disk, and trainings whose weights pass through a layer at a time."""

import json

import pytest
import torch
import torch.nn.functional as F

from kit.convert import teacher as teachers
from kit.convert.checkpoint import load, open_checkpoint
from kit.convert.data import DataConfig, TokenRows, load_rows, pack, pack_whole
from kit.convert.distill import logit_kl, top_k_loss
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.convert.recipe import ModelFacts
from kit.convert.streamed_training import StreamedTraining
from kit.convert.streaming import StreamedModel, TensorView
from kit.convert.teacher import CachedTeacher, labels_as_teacher
from kit.kernels.logit_kl import top_k_kl_and_gradient
from kit.modules.linear_attention import branch_weights
from kit.recipes import load_recipes

SHORT = ["data.num_samples=8", "data.seq_len=40", "window_size=10", "lora.steps=0", "seed=3"]


@pytest.fixture(scope="module")
def llama(make_model):
    return make_model()


def bucketed(p, q, k):
    """KL in float64 of p and q after all but the k likeliest of p are made one outcome."""
    kept = p.topk(k, -1).indices
    p, q = (torch.cat([x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)], -1) for x in (p, q))
    return torch.where(p > 0, p * (p.log() - q.clamp(min=1e-300).log()), 0).sum(-1)


def bucketed_of_logits(p, logits, k):
    """The same with logarithms of q, where its rest is tiny."""
    kept, log_q = p.topk(k, -1).indices, logits.log_softmax(-1)
    log_s = log_q.scatter(-1, kept, -torch.inf).logsumexp(-1)
    p_k, r = p.gather(-1, kept), p.scatter(-1, kept, 0).sum(-1)
    return (p_k * (p_k.log() - log_q.gather(-1, kept))).sum(-1) + r * (r.log() - log_s)


def kept_of(p, k):
    kept, tokens = p.topk(k, -1)
    rest = p.scatter(-1, tokens, 0).sum(-1)
    return tokens.int(), kept.log().float(), rest.log().float()


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("k", [1, 7, 29, 30])
def test_the_kl_of_what_is_kept_and_its_gradient(k, cap):
    """Against float64; never above the KL of all tokens, and that one where all are kept."""
    torch.manual_seed(k)
    logits = (4 * torch.randn(50, 30, dtype=torch.float64)).requires_grad_()
    p = (3 * torch.randn(50, 30, dtype=torch.float64)).softmax(-1)
    q = (logits if cap is None else cap * torch.tanh(logits / cap)).softmax(-1)
    want, whole = bucketed(p, q, k), (p * (p.log() - q.log())).sum(-1)
    (right,) = torch.autograd.grad(want.sum(), logits)
    kl, gradient = top_k_kl_and_gradient(logits.detach().float(), *kept_of(p, k), 2.0, cap)
    torch.testing.assert_close(kl.double(), want.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), 2 * right, atol=1e-5, rtol=1e-4)
    assert (want <= whole + 1e-12).all()
    if k >= 29:
        torch.testing.assert_close(want, whole)
    else:
        assert (want < whole).any()


def test_a_student_that_rules_out_what_is_not_kept_gets_a_finite_gradient():
    """Its share of the others is below what fp32 can hold, the teacher's is not."""
    torch.manual_seed(0)
    p = torch.randn(4, 30, dtype=torch.float64).softmax(-1)
    logits = torch.randn(4, 30, dtype=torch.float64)
    logits.scatter_add_(-1, p.topk(7, -1).indices, torch.full((4, 7), 200.0).double())
    logits.requires_grad_()
    want = bucketed_of_logits(p, logits, 7)
    (right,) = torch.autograd.grad(want.sum(), logits)
    kl, gradient = top_k_kl_and_gradient(logits.detach().float(), *kept_of(p, 7), 1.0)
    torch.testing.assert_close(kl.double(), want.detach(), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), right, atol=1e-4, rtol=1e-4)


def test_a_certain_teacher_is_the_next_token_loss():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 9, 8, requires_grad=True), torch.randn(30, 8)
    labels = torch.randint(0, 30, (2, 9)).index_fill(1, torch.tensor([0, 4]), -100)
    counts = F.pad(labels[:, 1:] != -100, (0, 1))
    want = F.cross_entropy((hidden @ head.mT)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    got = top_k_loss(hidden, head, labels_as_teacher(labels), None, counts)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (got, want)))


def rows_of(llama, count=8, length=40, **found):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 96, (count, length), generator=generator)
    positions = torch.arange(length).repeat(count, 1)
    positions[::2, 25:] -= 25  # two documents in every other row
    return TokenRows(ids, positions, count, "random", "", **found)


def streamed(llama, config=None):
    checkpoint = open_checkpoint(str(llama))
    return StreamedModel(config or checkpoint.config, TensorView(checkpoint), device="cpu", dtype=torch.float32)


def test_files_hold_the_teachers_likeliest_tokens_and_a_killed_run_goes_on(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "TEACHER_TOKENS", 3 * 40)
    monkeypatch.setattr(teachers, "LOGITS_AT_ONCE", 7 * 96)
    rows, made = rows_of(llama), []

    def model():
        made.append(1)
        return streamed(llama)

    stem = tmp_path / "step"
    CachedTeacher(stem).fill(model, rows, 5, Progress())
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"step.teacher-000{i}.safetensors" for i in range(3)]
    size = sum(file.stat().st_size for file in files)
    planned = load_recipes("lolcats", [*SHORT, "distill.steps=1", "distill.teacher=cached", "distill.top_k=5"])[0]
    assert planned._teacher_bytes() <= size <= planned._teacher_bytes() + 3 * 400
    inode = files[0].stat().st_ino
    files[1].unlink()
    found = CachedTeacher(stem)
    found.fill(model, rows, 5, Progress())
    assert (files[0].stat().st_ino, len(made)) == (inode, 2)
    found.fill(model, rows, 5, Progress())
    assert len(made) == 2
    base = open_checkpoint(str(llama)).load_model(torch.float32, "cpu")
    batch = torch.tensor([7, 2, 3])
    with torch.no_grad():
        logits = base(rows.input_ids[batch], position_ids=rows.position_ids[batch], use_cache=False).logits
    want = logits.double().softmax(-1)
    got = found(batch)
    assert (got.tokens == want.topk(5, -1).indices).float().mean() > 0.99
    torch.testing.assert_close(got.log_p.double().exp(), want.topk(5, -1).values, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(
        got.log_rest.double().exp() + got.log_p.double().exp().sum(-1), torch.ones(3, 40).double(), atol=1e-6, rtol=0
    )


def test_padding_document_ends_and_what_is_not_learned_do_not_count():
    """Against a sum over pairs of tokens, by hand."""
    documents = [[5, 6, 7, 8, 9], [10, 11, 12], [20, 21, 22, 23]]
    learned = [[False, False, True, True, True], [False, True, True], [False, False, False, True]]
    rows = pack_whole(documents, learned, 14, 2, None, 0, seed=0)
    assert (rows.input_ids == 0).sum() == 2
    follow = {(6, 7), (7, 8), (8, 9), (10, 11), (11, 12), (22, 23)}
    pairs = rows.input_ids.unfold(1, 2, 1)[rows.predicting[:, :-1]].tolist()
    found = [tuple(pair) for pair in pairs]
    assert not rows.predicting[:, -1].any()
    assert set(found) == follow
    assert len(found) == len(follow)
    packed = pack([[5, 6, 7], [8, 9, 10]], 6, 1, "documents", None, seed=0)
    assert packed.predicting.tolist() == [[True, True, False, True, True, False]]
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    head, other = torch.randn(11, 8), torch.randn(11, 8)
    each = [logit_kl(student[:, [i]], head, teacher[:, [i]], other) for i in (0, 1, 3, 4)]
    student.requires_grad_(), head.requires_grad_()
    got = logit_kl(student, head, teacher, other, None, packed.predicting)
    assert float(got.detach()) == pytest.approx(float(sum(each) / 4), rel=1e-5)
    want = torch.stack(
        [
            F.kl_div(
                (student[:, i] @ head.mT).log_softmax(-1),
                (teacher[:, i] @ other.mT).log_softmax(-1),
                log_target=True,
                reduction="sum",
            )
            for i in (0, 1, 3, 4)
        ]
    ).mean()
    for a, b in zip(torch.autograd.grad(got, (student, head)), torch.autograd.grad(want, (student, head)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_rows_of_a_conversion_are_full_of_text(llama, tmp_path):
    """No loss of attention transfer has padding to leave out."""
    text = tmp_path / "t.jsonl"
    text.write_text(
        "".join(json.dumps({"text": " ".join(f"w{i}" for i in range(4, 4 + n))}) + "\n" for n in (9, 30, 5))
    )
    tokenizer = open_checkpoint(str(llama)).load_tokenizer()
    for packing in ("documents", "concat"):
        rows = load_rows(DataConfig(dataset=str(text), num_samples=3, seq_len=12, packing=packing), tokenizer, seed=0)
        assert rows.learned is None
        assert not (rows.input_ids == tokenizer.pad_token_id).any()


def training_of(llama, name, *options, **how):
    """A streamed training of a recipe's fresh model, B's made other than zero; (training, config)."""
    recipe = load_recipes(name, list(options))[0]
    checkpoint = open_checkpoint(str(llama))
    config = recipe.build(ModelFacts.of(checkpoint))
    from safetensors.torch import save_file

    fresh = streamed(llama, config)
    new = {}
    torch.manual_seed(0)
    for index in range(len(fresh)):
        with fresh.layer(index) as module:
            prefix = fresh.layer_prefix(index)
            new |= {
                prefix + n: p + 0.1 * torch.randn_like(p)
                for n, p in module.state_dict().items()
                if "linear_attention" in n
            }
    view = TensorView(checkpoint)
    file = llama.parent / f"{name}-{len(options)}.safetensors"
    save_file(new, file)
    view.lay_over(file)
    model = StreamedModel(config, view, device="cpu", dtype=torch.float32)
    training = StreamedTraining(model, **{"rank": 4, "alpha": 8, "targets": None, "mixers": True, "seed": 0} | how)
    with torch.no_grad():
        for adapters in training.adapters:
            for _, b in adapters.values():
                b.normal_(std=0.1)
    return training, view, config


CASES = {
    "lolcats": ("llama", {}, [*SHORT, "keep_full=[1]"]),
    "lizard": ("llama", {}, [*SHORT, "window_rope=true"]),
    "hedgehog": ("gpt2", {"num_key_value_heads": 3}, SHORT),
    "window": (
        "gemma2",
        {"sliding_window": 9, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0},
        ["window_size=10"],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at_once", [None, 3])
def test_streamed_losses_and_gradients_are_those_of_the_resident_model_with_peft(make_model, name, at_once):
    """KL to a live teacher, in packed rows, some passes without a window; then merged weights give the same model."""
    from peft import LoraConfig, get_peft_model

    family, change, options = CASES[name]
    folder = make_model(family, **change)
    training, view, config = training_of(folder, name, *options)
    rows = rows_of(folder, 4)
    counts = rows.predicting.float()

    def branches(layer):
        return branch_weights(layer, 1.0, 0.0 if name == "lolcats" else 1.0)

    got = training.loss(
        rows.input_ids,
        rows.position_ids,
        lambda h, w, cap, base: logit_kl(h, w, base, w, cap, counts),
        teacher=True,
        rows_at_once=at_once,
        branches=branches,
    )
    grads = torch.autograd.grad(2 * got, training.parameters, allow_unused=True)

    resident = StreamedModel(config, view, device="cpu", dtype=torch.float32).resident()
    row_family = training.model.family
    targets = [f"{row_family.attention}.{n}" for n in (*row_family.projections, row_family.output)]
    peft = get_peft_model(
        resident, LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=row_family.transposed)
    )
    named = dict(peft.named_parameters())
    mine = []
    for index, (adapters, mixers) in enumerate(zip(training.adapters, training.mixers, strict=True)):
        place = f"base_model.model.{training.model.layer_prefix(index)}"
        for linear, pair in adapters.items():
            for letter, value in zip("AB", pair, strict=True):
                named[f"{place}{linear}.lora_{letter}.default.weight"].data.copy_(value)
                mine.append(named[f"{place}{linear}.lora_{letter}.default.weight"])
        mine += [named[f"{place}{row_family.attention}.linear_attention.{n}"] for n in mixers]
    assert [p.shape for p in mine] == [p.shape for p in training.parameters]
    for parameter in mine:
        parameter.requires_grad_()
    base = open_checkpoint(str(folder)).load_model(torch.float32, "cpu")
    inputs = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "use_cache": False}
    with branches(peft):
        log_q = peft(**inputs).logits.log_softmax(-1)
    with torch.no_grad():
        log_p = base(**inputs).logits.log_softmax(-1)
    want = ((log_p.exp() * (log_p - log_q)).sum(-1) * counts).sum() / counts.sum()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-4)
    right = torch.autograd.grad(2 * want, mine, allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in right)
    for each, other in zip(grads, right, strict=True):
        if other is None or each is None:
            assert each is None or not each.any()
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(each, other, atol=1e-5, rtol=2e-3)

    merged = peft.merge_and_unload().state_dict()
    changed = {name: tensor for layer in training.merged() for name, tensor in layer.items()}
    for key, tensor in changed.items():
        torch.testing.assert_close(tensor, merged[key], atol=1e-5, rtol=1e-4)
    assert len(changed) == sum(len(a) + len(m) for a, m in zip(training.adapters, training.mixers, strict=True))


def run(llama, output, name, *options, **how):
    recipes = load_recipes(name, [*SHORT, *options])
    how = {"device": "cpu", "eval_tokens": 0} | how
    return convert(open_checkpoint(str(llama)), recipes, Options(output, **how), how.pop("progress", Progress()))


DISTILL = ["transfer.steps=4", "distill.steps=6", "distill.batch_size=4", "distill.learning_rate=3e-3"]
LORA = [*DISTILL, "distill.parameters=lora"]
STREAMED = [*LORA, "distill.streamed=true"]


@pytest.mark.parametrize("options", [DISTILL, LORA, STREAMED], ids=["all", "lora", "streamed"])
def test_a_cached_teacher_that_keeps_all_tokens_teaches_what_a_live_one_does(llama, tmp_path, options):
    losses = []
    for more in ([], ["distill.teacher=cached", "distill.top_k=1000"], ["distill.teacher=cached", "distill.top_k=8"]):
        report = run(llama, tmp_path / str(len(losses)), "lolcats", *options, *more)
        losses.append(report["stages"]["lolcats.logit_distillation"][0]["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    assert losses[2][0] < losses[0][0]
    assert losses[2][-1] < losses[2][0]


@pytest.mark.parametrize("name", ["lolcats", "hedgehog", "lizard"])
def test_streamed_stages_never_hold_the_model_and_survive_a_kill(
    llama, tmp_path, monkeypatch, interrupt_training, name
):
    options = [*STREAMED, "distill.teacher=cached", "distill.window_dropout=0.4", "lora.steps=3", "lora.streamed=true"]
    options += ["lora.learning_rate=1e-3", "lora.batch_size=4"]
    monkeypatch.setattr(StreamedModel, "resident", lambda self: pytest.fail("the whole model was in memory"))
    found = {}
    for after in (None, 3, 8):
        output = tmp_path / str(after)
        recipes = load_recipes(name, [*SHORT, *options])
        if after is not None:
            with pytest.raises(KeyboardInterrupt):
                convert(
                    open_checkpoint(str(llama)),
                    recipes,
                    Options(output, device="cpu", eval_tokens=0),
                    interrupt_training(after),
                )
        report = convert(
            open_checkpoint(str(llama)),
            load_recipes(name, [*SHORT, *options]),
            Options(output, device="cpu", eval_tokens=0, resume=after is not None),
            Progress(),
        )
        stages = [report["stages"][f"{name}.{stage}"][0] for stage in ("logit_distillation", "low_rank_linearizing")]
        found[after] = [stage["losses"] for stage in stages], load(str(output), dtype="float32").state_dict()
    losses, weights = found.pop(None)
    assert min(losses[0][1:]) < losses[0][0]
    for others, tensors in found.values():
        for curve, other in zip(losses, others, strict=True):
            assert other == pytest.approx(curve, abs=1e-5)
        assert all(torch.equal(weights[key], tensors[key]) for key in weights)
    base = open_checkpoint(str(llama)).load_model(torch.float32, "cpu").state_dict()
    moved = {key for key in base if not torch.equal(base[key], weights[key])}
    assert moved == {key for key in base if ".self_attn." in key}


def test_streamed_lora_is_peft_with_the_next_token_loss(llama, tmp_path):
    """First loss: B is zero, so it is the converted model's."""
    reports = []
    for streamed_ in ("true", "false"):
        report = run(
            llama, tmp_path / streamed_, "lolcats", "transfer.steps=3", "lora.steps=1", f"lora.streamed={streamed_}"
        )
        reports.append(report["stages"]["lolcats.low_rank_linearizing"][0])
    assert reports[0]["losses"] == pytest.approx(reports[1]["losses"], rel=1e-5)
    assert reports[0]["trained_parameters"] == reports[1]["trained_parameters"]


@pytest.mark.parametrize("name", ["lolcats", "lizard"])
def test_autocast_keeps_every_gradient(llama, name):
    """bf16 weights under autocast, as on a GPU: casts cached by the pass without gradients must not be taken again."""
    rows = rows_of(llama, 4)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        training, _, _ = training_of(llama, name, *SHORT)
        training.model.dtype = dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = training.loss(
                rows.input_ids,
                rows.position_ids,
                lambda h, w, cap, base: logit_kl(h, w, base, w, cap),
                teacher=True,
            )
        found.append(torch.autograd.grad(loss, training.parameters))
    for right, got in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert F.cosine_similarity(right.flatten(), got.flatten(), dim=0) > 0.8
