"""Retention: scores, agreement and leak against their definitions; adapters opened as models."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from kit.convert.adapted import AdaptedCheckpoint, open_model
from kit.convert.batches import generate, score
from kit.convert.checkpoint import open_checkpoint
from kit.convert.covariance_store import collect_covariances
from kit.convert.data import TokenRows
from kit.convert.errors import ExitCode, KitError
from kit.convert.evaluate import evaluate
from kit.convert.retention import RetentionOptions, normalised, read_questions, target_scores

WORDS = [f"w{i}" for i in range(4, 90)]


@pytest.fixture(scope="module")
def base(make_model):
    return make_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A PEFT LoRA folder with random A and B on q_proj and down_proj."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    """A preserve set of 60 words and two questions."""
    draw = torch.Generator().manual_seed(0)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (60,), generator=draw).tolist()]
    (tmp_path / "keep.txt").write_text(" ".join(words))
    rows = [{"question": "w9 w4", "answer": ["w5 w6", "w7"]}, {"question": "w20 w21 w22", "answer": "w23"}]
    (tmp_path / "target.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def ids_of(text):
    return [int(word[1:]) for word in text.split()]


def test_an_adapter_is_opened_as_a_model_that_computes_what_peft_computes(base, adapter):
    opened = open_model(str(adapter))
    assert isinstance(opened, AdaptedCheckpoint)
    ids = torch.tensor([[5, 9, 33, 21]])
    ours = opened.load_model(torch.float32, "cpu")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    plain = open_checkpoint(str(base))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert not torch.allclose(ours(ids).logits, plain.load_model(torch.float32, "cpu")(ids).logits)
    added = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert opened.num_parameters == plain.num_parameters + added
    assert opened.nbytes == plain.nbytes + 4 * added
    assert opened.fingerprint() != plain.fingerprint()
    assert type(open_model(str(base))) is type(plain)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"peft_type": "IA3"}, "merge"),
        ({"base_model_name_or_path": None}, "--base"),
        ({"base_model_name_or_path": "/nowhere/model"}, "--base"),
    ],
)
def test_adapters_that_cannot_be_used_say_what_to_do(adapter, tmp_path, change, hint):
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(KitError) as caught:
        open_model(str(tmp_path))
    assert hint in caught.value.next_step
    assert str(tmp_path) in caught.value.where


def test_an_adapter_of_another_model_is_refused_before_weights_load(adapter, make_model):
    with pytest.raises(KitError, match="does not fit") as caught:
        open_model(str(adapter), base=str(make_model(hidden_size=32, num_attention_heads=2)))
    assert caught.value.exit_code == ExitCode.USAGE
    assert "--base" in caught.value.next_step


def test_batches_score_and_continue_as_each_text_alone_does(base):
    checkpoint = open_checkpoint(str(base))
    model, tokenizer = checkpoint.load_model(torch.float32, "cpu"), checkpoint.load_tokenizer()
    exact = loaded(base)
    pairs = [("w9 w4 ", "w5 w6"), ("w20 w21 w22 w30 w31 ", "w23"), ("w8", " w7 w9 w10")]
    for (context, continuation), (total, tokens, greedy) in zip(pairs, score(model, tokenizer, pairs), strict=True):
        first, then = ids_of(context), ids_of(continuation)
        with torch.no_grad():
            log_p = exact(torch.tensor([first + then])).logits.log_softmax(-1)[0, len(first) - 1 : -1]
        assert total == pytest.approx(float(log_p.gather(-1, torch.tensor(then)[:, None]).sum()), rel=1e-4)
        assert tokens == len(then)
        assert greedy == (log_p.argmax(-1).tolist() == then)
    prompts = [context.strip() for context, _ in pairs]
    together = generate(model, tokenizer, prompts, 6)
    assert together == [generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert len({text for text, _ in together}) > 1


@pytest.mark.parametrize(
    ("text", "answers", "exact", "contains"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], True, True),
        ("It is in Paris, France", ["Paris"], False, True),
        ("Parisian", ["Paris"], False, False),
        ("1,200", ["1200"], True, True),
        ("3.50", ["3"], False, False),
        ("so 4 + 4 = 8\n#### 8", ["4+4 is 8\n#### 8"], True, True),
        ("so it is 8", ["4+4 is 8\n#### 8"], False, False),
        ("#### 18", ["#### 8"], False, False),
    ],
)
def test_answers_are_compared_as_squad_and_gsm8k_do(text, answers, exact, contains):
    from kit.convert.retention import Question, _judge

    found = _judge(Question("?", tuple(answers)), text)
    assert (found["exact"], found["contains"]) == (exact, contains)


def test_normalised_drops_articles_case_and_punctuation():
    assert normalised("An apple, THE pear!") == "apple pear"


def test_target_scores_are_likelihoods_of_the_likeliest_right_answer(base, files):
    checkpoint = open_checkpoint(str(base))
    model, tokenizer = checkpoint.load_model(torch.float32, "cpu"), checkpoint.load_tokenizer()
    questions = read_questions(files / "target.jsonl")
    found = target_scores(model, tokenizer, questions, batch_size=3)
    exact, totals, means = loaded(base), [], []
    for question in questions:
        likelihoods = []
        for answer in question.answers:
            ids = ids_of(question.question) + ids_of(answer)
            with torch.no_grad():
                log_p = exact(torch.tensor([ids])).logits.log_softmax(-1)[0]
            count = len(ids_of(answer))
            likelihoods.append((sum(float(log_p[-count - 1 + i, ids[-count + i]]) for i in range(count)), count))
        totals.append(max(likelihoods)[0])
        means.append(max(likelihoods)[0] / max(likelihoods)[1])
    assert found["log_likelihood"] == pytest.approx(sum(totals) / 2, rel=1e-4)
    assert found["token_log_likelihood"] == pytest.approx(sum(means) / 2, rel=1e-4)
    assert found["log_likelihood_stderr"] == pytest.approx(abs(totals[0] - totals[1]) / 2, rel=1e-3)
    assert [sample["question"] for sample in found["samples"]] == ["w9 w4", "w20 w21 w22"]


def test_retention_says_what_was_kept_and_what_the_adapter_sees(base, adapter, files):
    options = RetentionOptions(files / "target.jsonl", batch_size=2)
    models = {"tuned": open_model(str(adapter))}
    measuring = {"dataset": str(files / "keep.txt"), "seq_len": 20, "num_tokens": 60, "speed": False}
    result = evaluate(models, retention=options, **measuring)
    before, after = result["rows"]
    assert (before["name"], after["name"]) == ("base", "tuned")
    assert result["settings"]["retention"]["preserve_tokens"] == 60
    assert "preserve" not in before["retention"] or not before["retention"]["preserve"]

    windows = torch.tensor(ids_of((files / "keep.txt").read_text())).view(3, 20)
    tuned = PeftModel.from_pretrained(loaded(base), adapter).double().eval()
    with torch.no_grad():
        p, q = loaded(base)(windows).logits.log_softmax(-1), tuned(windows).logits.log_softmax(-1)
    kept = after["retention"]["preserve"]
    assert kept["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert kept["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-6)

    # The leak by its other definition: the energy of x projected onto A's rows, token by token.
    seen = {}

    def see(name, module, given, output):
        seen[name] = given[0].reshape(60, -1)

    model, hooks = loaded(base), []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            hooks.append(module.register_forward_hook(partial(see, name)))
    with torch.no_grad():
        model(windows)
    assert len(hooks) == 4
    leak = after["retention"]["leak"]
    for name, x in seen.items():
        a = tuned.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.detach()
        projected = x @ torch.linalg.pinv(a) @ a
        want = float(projected.square().sum() / x.square().sum())
        assert leak["linears"][name.removeprefix("model.")] == pytest.approx(want, rel=1e-3)
    values = list(leak["linears"].values())
    assert leak["mean"] == pytest.approx(sum(values) / 4)
    assert leak["layers"]["1"] == pytest.approx(sum(v for n, v in leak["linears"].items() if ".1." in n) / 2)
    assert leak["chance"] == pytest.approx((4 / 48 + 4 / 64) / 2)


def test_covariances_of_a_file_are_used_and_those_of_another_model_refused(base, adapter, files, make_model):
    def measure(folder, name):
        rows = TokenRows(torch.arange(4, 44).view(2, 20), torch.arange(20).repeat(2, 1), 2, "x", "")
        names = [f"layers.{i}.{linear}" for i in (0, 1) for linear in ("self_attn.q_proj", "mlp.down_proj")]
        found = collect_covariances(open_checkpoint(str(folder)), rows, targets=names)
        found.save(files / name)
        return found

    covariances = measure(base, "cov.safetensors")
    options = RetentionOptions(files / "target.jsonl", files / "cov.safetensors")
    model = open_model(str(adapter))
    result = evaluate({"tuned": model}, retention=options, num_tokens=0, speed=False)
    name = "layers.0.mlp.down_proj"
    q, _ = torch.linalg.qr(model.rows_of_a()[name].double().T)
    c = covariances.get(name).double()
    want = float(torch.trace(q.T @ c @ q) / torch.trace(c))
    assert result["rows"][1]["retention"]["leak"]["linears"][name] == pytest.approx(want, rel=1e-6)
    measure(make_model(num_hidden_layers=2, seed=7), "cov.safetensors")
    with pytest.raises(KitError, match="another model"):
        evaluate({"tuned": model}, retention=options, num_tokens=0, speed=False)


def test_a_target_that_is_none_and_a_missing_base(base, files):
    (files / "wrong.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    model = open_checkpoint(str(base))
    with pytest.raises(KitError) as caught:
        evaluate({"m": model}, base=model, retention=RetentionOptions(files / "wrong.jsonl"))
    assert caught.value.where.endswith("line 2")
    with pytest.raises(KitError, match="before") as caught:
        evaluate({"m": model}, retention=RetentionOptions(files / "target.jsonl"))
    assert "--base" in caught.value.next_step


def test_the_command_prints_one_table(adapter, files):
    command = [sys.executable, "-m", "kit.cli", "eval", str(adapter), "--dataset", "keep.txt", "--seq-len", "20", "-q"]
    command += ["--retention", "target.jsonl", "-b", "2", "--num-tokens", "40"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files)
    assert done.returncode == 0, done.stderr
    assert "Learned: 2 questions of target.jsonl, kept: keep.txt, KL on 40 tokens" in done.stdout
    assert "leak" in done.stdout
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=files)
    row = json.loads(done.stdout)["rows"][1]
    assert row["name"] == "tuned"
    assert math.isfinite(row["retention"]["preserve"]["kl"])
    done = subprocess.run([*command[:5], "--covariance", "x"], capture_output=True, text=True, cwd=files)
    assert done.returncode == ExitCode.USAGE
    assert "--retention" in done.stderr
