"""What a model learned beside what it kept: a target task, a preserve set, and how much of the latter an adapter sees.

    kit eval OUT --base MODEL --retention questions.jsonl --dataset keep.txt

The target is a file of held-out questions. On the preserve set (`--dataset`) the adapted model is compared with its
base token by token: KL(base || model) and the share of equal most likely tokens. For a LoRA adapter the leak is the
share of the preserve set's activation energy that falls into the rows of A, where the adapter can act on it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.convert.adapted import AdaptedCheckpoint
from kit.convert.batches import encode, generate, score
from kit.convert.checkpoint import Checkpoint
from kit.convert.data import ANSWER_COLUMNS, PROMPT_COLUMNS, TokenRows, read_rows
from kit.convert.errors import ExitCode, KitError
from kit.convert.perplexity import mean_and_error
from kit.convert.progress import Progress

EXTRA_TOKENS, MOST_TOKENS = 16, 512  # of an answer beyond the longest right one; at most
FINAL = "####"  # GSM8K: what follows the last one is the answer


@dataclass(frozen=True)
class Question:
    """One question of the target, as the model is asked, and every answer that is right."""

    question: str
    answers: tuple[str, ...]


@dataclass
class RetentionOptions:
    """What `kit eval --retention` asks for.

    Attributes:
        target: file of questions.
        covariance: file of covariances of the preserve set; None: they are measured on it.
        limit: so many questions at most.
        batch_size: questions at a time.
    """

    target: Path
    covariance: Path | None = None
    limit: int | None = None
    batch_size: int = 1


@dataclass
class RetentionTest:
    """The target's questions, and the preserve set as windows (N, T)."""

    questions: list[Question]
    settings: dict[str, Any]
    batch_size: int
    preserve: Tensor | None
    base_log_probs: Tensor | None = None  # (N · T, vocabulary), on disk
    covariances: Any = None  # `Covariances` read from a file
    leaks: dict[str, dict[str, Any]] = field(default_factory=dict)  # by model


def retention_test(options: RetentionOptions, windows: Tensor | None, num_tokens: int) -> RetentionTest:
    """Read the target, and choose the part of the preserve set that agreement is measured on.

    Args:
        options: what is asked for.
        windows: the preserve set (N, T).
        num_tokens: about so many tokens of it, whole windows, evenly spaced; one at least.

    Raises:
        KitError: if the questions or covariances cannot be read.
    """
    from kit.convert.covariance_store import Covariances

    questions = read_questions(options.target, options.limit)
    covariances = Covariances.load(options.covariance) if options.covariance else None
    preserve = None
    if windows is not None:
        count = min(max(num_tokens // windows.shape[1], 1), len(windows))
        preserve = windows[torch.arange(count) * len(windows) // count]
    content = json.dumps([[q.question, q.answers] for q in questions])
    settings = {
        "target": options.target.name,
        "questions": len(questions),
        "target_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "preserve_tokens": preserve.numel() if preserve is not None else 0,
        "covariances": options.covariance.name if options.covariance else "of the preserve set",
        "batch_size": options.batch_size,
    }
    return RetentionTest(questions, settings, options.batch_size, preserve, covariances=covariances)


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Questions of a JSONL file: `question` (or prompt, instruction) and `answer`, a text or a list of texts.

    Raises:
        KitError: naming the line.
    """
    questions: list[Question] = []
    for where, row in read_rows(path):
        if limit is not None and len(questions) == limit:
            break
        question = next((row[column] for column in PROMPT_COLUMNS if row.get(column)), None)
        answers = next((row[column] for column in ANSWER_COLUMNS if row.get(column)), None)
        answers = answers if isinstance(answers, list) else [answers]
        if not isinstance(question, str) or not all(isinstance(text, str) and text.strip() for text in answers):
            raise KitError(
                "a question needs `question` and `answer`, texts that are not empty (of the answer, a list may be)",
                where=where,
                next_step='write a JSON object a line: {"question": "...", "answer": "..."}',
            )
        questions.append(Question(question, tuple(answers)))
    if not questions:
        raise KitError("the file holds no question", where=str(path), next_step="write a JSON object a line")
    return questions


def target_scores(
    model: Any,
    tokenizer: Any,
    questions: list[Question],
    batch_size: int = 1,
    progress: Progress | None = None,
    max_new_tokens: int = MOST_TOKENS,
) -> dict[str, Any]:
    """Answer questions greedily, and score the right answers.

    A question goes through the tokenizer's chat template, or stands before a blank line without one: as `kit adapt`
    trains on questions and answers. Texts are compared normalised: words without case, punctuation and articles. Where
    a right answer holds `####`, only what follows the last one counts, in it and in the model's answer.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        questions: N.
        batch_size: questions at a time; more than 1 pads, which moves results by rounding.
        progress: stepped by questions.
        max_new_tokens: of an answer; never more than 16 beyond the longest right one.

    Returns:
        `exact`: share of answers that equal a right one; `contains`: that hold one, word by word; `log_likelihood`: of
        the right answer in nats (of several, the likeliest), and `token_log_likelihood`, the same a token; each with
        its standard error over questions (`..._stderr`). `samples`: one dict a question.
    """
    progress = progress or Progress()
    samples: list[dict[str, Any]] = []
    longest = max(len(encode(tokenizer, answer)) for q in questions for answer in q.answers)
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].question))
    found: dict[int, dict[str, Any]] = {}
    prompts = [_prompt(question.question, tokenizer) for question in questions]
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]  # of like lengths, for the sake of padding
        some_prompts = [prompts[place] for place in places]
        written = generate(model, tokenizer, some_prompts, min(longest + EXTRA_TOKENS, max_new_tokens))
        for place, (text, _) in zip(places, written, strict=True):
            found[place] = _judge(questions[place], text.strip())
            progress.step()
    pairs = [(place, (prompts[place], answer)) for place in order for answer in questions[place].answers]
    likelihoods: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        scores = score(model, tokenizer, [pair for _, pair in some])
        for (place, _), (total, tokens, _greedy) in zip(some, scores, strict=True):
            likelihoods[place].append((total, tokens))
    for place in range(len(questions)):
        best, tokens = max(likelihoods[place])
        samples.append(found[place] | {"log_likelihood": best, "token_log_likelihood": best / tokens})
    result: dict[str, Any] = {"samples": samples}
    for key in ("exact", "contains", "log_likelihood", "token_log_likelihood"):
        values = torch.tensor([float(sample[key]) for sample in samples])
        result[key], result[f"{key}_stderr"] = mean_and_error(values)
    return result


def _prompt(question: str, tokenizer: Any) -> str:
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return question + "\n\n"


def _judge(question: Question, text: str) -> dict[str, Any]:
    final = any(FINAL in answer for answer in question.answers)
    said = normalised(text.rpartition(FINAL)[2] if final and FINAL in text else "" if final else text)
    right = [normalised(answer.rpartition(FINAL)[2]) for answer in question.answers]
    return {
        "question": question.question,
        "answers": list(question.answers),
        "text": text,
        "exact": said in right,
        "contains": any(f" {answer} " in f" {said} " for answer in right),
    }


def normalised(text: str) -> str:
    """Words without case, punctuation and articles, as SQuAD's score compares them; numbers without their commas."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold())
    return " ".join(word for word in re.findall(r"\w+(?:\.\d+)?", text) if word not in ("a", "an", "the"))


@torch.no_grad()
def preserve_scores(
    model: Any, windows: Tensor, base_log_probs: Tensor, is_base: bool, batch_size: int = 1
) -> dict[str, float]:
    """Agreement with the base on the preserve set: the base's log-probabilities are stored, other models' compared.

    Args:
        model: causal language model.
        windows: (N, T).
        base_log_probs: (N · T, vocabulary) fp32.
        is_base: store, and return nothing.
        batch_size: windows at a time.

    Returns:
        `kl`: mean KL(base || model) a token, nats; `top1`: share of positions with the same most likely token; each
        with its standard error over windows.
    """
    length = windows.shape[1]
    found: dict[str, list[Tensor]] = {"kl": [], "top1": []}
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size].to(model.device)
        log_probs = F.log_softmax(model(rows, use_cache=False).logits.float(), dim=-1)
        stored = base_log_probs[start * length : (start + len(rows)) * length].view_as(log_probs)
        if is_base:
            stored.copy_(log_probs)
            continue
        base = stored.to(log_probs.device)
        found["kl"].append((base.exp() * (base - log_probs)).sum(-1).mean(-1).cpu())
        found["top1"].append((base.argmax(-1) == log_probs.argmax(-1)).float().mean(-1).cpu())
    result = {}
    for key, values in found.items():
        if values:
            result[key], result[f"{key}_stderr"] = mean_and_error(torch.cat(values))
    return result


def adapter_leak(rows_of_a: dict[str, Tensor], covariances: Any) -> dict[str, Any]:
    """The leak of an adapter: for each linear tr(Q C Qᵀ) / tr C, Q an orthonormal basis of A's rows, C of its inputs.

    Args:
        rows_of_a: A (r, in) by the linear's name in the decoder.
        covariances: `Covariances` of the preserve set.

    Returns:
        `mean`: over linears; `layers`: a mean for each layer, by its number; `linears`: each; `chance`: what rows in
        random directions would have on average, r / in.

    Raises:
        KitError: if the covariances lack a linear.
    """
    from kit.convert.lowrank import leak

    linears = {name: leak(a, covariances.get(name)) for name, a in rows_of_a.items()}
    layers: dict[str, list[float]] = defaultdict(list)
    for name, value in linears.items():
        layers[name.split(".")[1]].append(value)
    chance = [a.shape[0] / a.shape[1] for a in rows_of_a.values()]
    return {
        "mean": sum(linears.values()) / len(linears),
        "layers": {layer: sum(values) / len(values) for layer, values in layers.items()},
        "linears": linears,
        "chance": sum(chance) / len(chance),
    }


def measure_leaks(
    models: dict[str, Checkpoint], test: RetentionTest, *, dtype: str, device: str, progress: Progress
) -> None:
    """Put the leak of every model that is an adapter into the test.

    Covariances are those of the file, or measured on the base, one layer resident at a time.

    Raises:
        KitError: if the covariances lack a linear.
    """
    from kit.convert.covariance_store import collect_covariances

    measured: dict[str, Any] = {}  # by the base's fingerprint
    for name, model in models.items():
        if not isinstance(model, AdaptedCheckpoint) or (test.preserve is None and test.covariances is None):
            continue
        rows_of_a = model.rows_of_a()
        covariances = test.covariances or measured.get(model.base.fingerprint())
        if covariances is None or (test.covariances is None and not rows_of_a.keys() <= covariances.linears.keys()):
            assert test.preserve is not None
            positions = torch.arange(test.preserve.shape[1]).repeat(len(test.preserve), 1)
            rows = TokenRows(test.preserve, positions, len(test.preserve), "the preserve set", "")
            covariances = measured[model.base.fingerprint()] = collect_covariances(
                model.base, rows, targets=sorted(rows_of_a), device=device, dtype=dtype, progress=progress
            )
        test.leaks[name] = adapter_leak(rows_of_a, covariances)


def measure_retention(
    name: str, model: Any, tokenizer: Any, test: RetentionTest, is_base: bool, progress: Progress
) -> dict[str, Any]:
    """A row's `retention`: `target` (see `target_scores`), `preserve` (see `preserve_scores`), `leak` (of an adapter).

    Raises:
        KitError: if the file of covariances is of another model than the base.
    """
    if is_base and test.covariances is not None:
        test.covariances.check([], model)
    found: dict[str, Any] = {}
    with progress.task(f"target {name}", len(test.questions)):
        found["target"] = target_scores(model, tokenizer, test.questions, test.batch_size, progress)
    if test.preserve is not None and test.base_log_probs is not None:
        found["preserve"] = preserve_scores(model, test.preserve, test.base_log_probs, is_base)
    if name in test.leaks:
        found["leak"] = test.leaks[name]
    return found


def check_base(models: dict[str, Checkpoint], base: Checkpoint | None) -> Checkpoint:
    """The base to compare with: the one named, or that of the first adapter.

    Raises:
        KitError: if there is none.
    """
    if base is not None:
        return base
    for model in models.values():
        if isinstance(model, AdaptedCheckpoint):
            return model.base
    raise KitError(
        "what was kept is told by comparing with the model before",
        where="--retention",
        next_step="name it with --base",
        exit_code=ExitCode.USAGE,
    )
