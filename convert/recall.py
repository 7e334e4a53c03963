"""Recall over context length: multi-query associative recall (MQAR) and a needle in a haystack, both synthetic.

MQAR (Arora et al., arXiv:2312.04927) states key-value pairs of random tokens at the start of the context and asks for
every key at its end. Models trained on it read bare pairs; pretrained ones hardly do, so a pair is a line, `key:value`.
The needle (passkey retrieval, Mohtashami and Jaggi, arXiv:2305.16300) is a sentence that states a number somewhere in a
long text; the context ends with a question for it.

Answers are scored teacher-forced, all in one forward pass of a context. A needle counts if every token of the number is
the model's most likely one; that is when greedy decoding would write it.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kit.convert.data import opening_ids, ordinary_tokens
from kit.convert.errors import ExitCode, KitError
from kit.convert.perplexity import mean_and_error
from kit.convert.progress import Progress

PAIRS, SEQUENCES = 16, 4  # MQAR: pairs in a context, contexts of a length
DEPTHS, SAMPLES = (0.0, 0.25, 0.5, 0.75, 1.0), 4  # needle: where it lies, contexts at a depth
NEEDLE = " The secret number of this text is {}. Remember it."
QUESTION = "\n\nThe secret number that this text asks to remember is"


@dataclass
class Context:
    """A context that ends with its questions and answers.

    Attributes:
        kind: `mqar` or `needle`.
        length: T, tokens.
        depth: of the needle, from 0 (start) to 1 (end); None for MQAR.
        input_ids: (T,).
        answers: positions in `input_ids` of the tokens to recall, ascending.
    """

    kind: str
    length: int
    depth: float | None
    input_ids: Tensor
    answers: Tensor


@dataclass
class RecallTest:
    """Contexts to measure, and what the report says about them."""

    contexts: list[Context]
    settings: dict[str, Any]


def recall_test(
    lengths: list[int], tokenizer: Any, vocab_size: int, *, haystack: str | None, source: str, seed: int
) -> RecallTest:
    """Write the contexts; the same seed, tokenizer and haystack give the same ones.

    Args:
        lengths: tokens of a context, with questions and answers.
        tokenizer: the models'.
        vocab_size: tokens that the models know.
        haystack: text around the needle; None: sentences made up from the seed.
        source: where the haystack is from, for the report.
        seed: of tokens, numbers and places.

    Raises:
        KitError: if a length is too short for the questions, the haystack too short for a length, or the tokenizer
            cannot write the tests.
    """
    opening = opening_ids(tokenizer)
    colon, line_break = _encode(tokenizer, ":"), _encode(tokenizer, "\n")
    shortest = 2 * PAIRS * (2 + len(colon) + len(line_break)) + len(opening) + 1
    for length in lengths:
        if length < shortest:
            raise _usage(f"a context of {length} tokens has no room for {PAIRS} pairs", f"ask for {shortest} or more")
    tokens = torch.tensor(ordinary_tokens(tokenizer, vocab_size))
    if len(tokens) <= 2 * PAIRS:
        raise _usage(f"{PAIRS} pairs need {2 * PAIRS + 1} ordinary tokens, the tokenizer has {len(tokens)}", "leave it")
    hay = _encode(tokenizer, haystack if haystack is not None else made_up_text(max(lengths), seed))
    ends = [i + 1 for i, token in enumerate(hay) if tokenizer.decode([token]).rstrip().endswith((".", "!", "?"))]
    contexts = []
    for length in lengths:
        contexts += _mqar(length, tokens, colon, line_break, opening, seed)
        contexts += _needle(length, hay, ends, tokenizer, opening, source, seed)
    settings = {
        "lengths": lengths,
        "pairs": PAIRS,
        "sequences": SEQUENCES,
        "depths": list(DEPTHS),
        "samples": SAMPLES,
        "haystack": source,
        "seed": seed,
        "sha256": hashlib.sha256(torch.cat([c.input_ids for c in contexts]).numpy().tobytes()).hexdigest(),
    }
    return RecallTest(contexts, settings)


@torch.no_grad()
def measure_recall(
    model: Any, test: RecallTest, max_positions: int | None, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy by length, and for the needle by depth too.

    Args:
        model: causal language model.
        test: the contexts.
        max_positions: the longest context that the model is made for.
        progress: takes a step a context.

    Returns:
        `mqar`: `length`, `pairs`, `accuracy` (share of values that are the most likely token after their key), `stderr`
        (from the spread between contexts), `queries`, `extrapolation` (whether the length is over `max_positions`);
        `needle`: `length`, `depth`, `accuracy` (share of contexts whose whole number is right), `stderr`, `samples`,
        `extrapolation`.
    """
    scores: dict[tuple[str, int, float | None], list[float]] = {}
    for context in test.contexts:
        kept = context.length - int(context.answers[0]) + 1  # from the token before the first answer on
        ids = context.input_ids[None].to(model.device)
        likely = model(ids, use_cache=False, logits_to_keep=kept).logits[0].argmax(-1).cpu()
        right = likely[context.answers - 1 - context.length + kept] == context.input_ids[context.answers]
        score = float(right.double().mean()) if context.kind == "mqar" else float(right.all())
        scores.setdefault((context.kind, context.length, context.depth), []).append(score)
        progress.step()
    found: dict[str, list[dict[str, Any]]] = {"mqar": [], "needle": []}
    for (kind, length, depth), values in scores.items():
        accuracy, error = mean_and_error(torch.tensor(values))
        where = {"length": length, "pairs": PAIRS} if kind == "mqar" else {"length": length, "depth": depth}
        count = {"queries": PAIRS * len(values)} if kind == "mqar" else {"samples": len(values)}
        beyond = max_positions is not None and length > max_positions
        found[kind].append({**where, "accuracy": accuracy, "stderr": error, **count, "extrapolation": beyond})
    return found


def made_up_text(num_sentences: int, seed: int) -> str:
    """Plain sentences without numbers, drawn word by word: a haystack that no model has read."""
    draw = random.Random(seed)
    who = ("baker", "gardener", "sailor", "teacher", "painter", "farmer", "doctor", "tailor", "miller", "singer")
    how = ("old", "young", "quiet", "cheerful", "tall", "patient", "busy", "careful", "tired", "clever")
    did = ("carried", "found", "painted", "washed", "mended", "sold", "watched", "lifted", "borrowed", "moved")
    what = ("basket", "chair", "lamp", "boat", "letter", "coat", "wheel", "kettle", "ladder", "blanket")
    where = ("near the river", "at the market", "behind the barn", "on the hill", "by the window", "in the harbour")
    return " ".join(
        f"The {draw.choice(how)} {draw.choice(who)} {draw.choice(did)} a {draw.choice(what)} {draw.choice(where)}."
        for _ in range(num_sentences)
    )


def _mqar(
    length: int, tokens: Tensor, colon: list[int], line_break: list[int], opening: list[int], seed: int
) -> list[Context]:
    """Pairs, random tokens that are no key and no value, then all pairs again in another order."""
    generator = torch.Generator().manual_seed(seed)
    contexts = []
    for _ in range(SEQUENCES):
        drawn = tokens[torch.randperm(len(tokens), generator=generator)]
        rest = drawn[2 * PAIRS :]
        lines = [[key, *colon, value, *line_break] for key, value in drawn[: 2 * PAIRS].view(PAIRS, 2).tolist()]
        stated = [*opening, *chain.from_iterable(lines)]
        order = torch.randperm(PAIRS, generator=generator).tolist()
        asked = list(chain.from_iterable(lines[i] for i in order))
        between = rest[torch.randint(len(rest), (length - len(stated) - len(asked),), generator=generator)].tolist()
        answers = torch.arange(length - len(asked) + 1 + len(colon), length, len(lines[0]))
        contexts.append(Context("mqar", length, None, torch.tensor([*stated, *between, *asked]), answers))
    return contexts


def _needle(
    length: int, hay: list[int], ends: list[int], tokenizer: Any, opening: list[int], source: str, seed: int
) -> list[Context]:
    """Haystack with the needle after the sentence that ends nearest before its depth, then question and number."""
    draw = random.Random(seed)
    contexts = []
    for _ in range(SAMPLES):
        number, offset = str(draw.randrange(10_000, 100_000)), draw.random()
        needle, question = _encode(tokenizer, NEEDLE.format(number)), _encode(tokenizer, QUESTION)
        asked = _encode(tokenizer, f"{QUESTION} {number}")
        same = next((i for i, pair in enumerate(zip(asked, question, strict=False)) if pair[0] != pair[1]), None)
        answer = len(asked) - (len(question) if same is None else same)
        if answer < 1 or number not in tokenizer.decode(asked).replace(" ", ""):
            raise _usage("the tokenizer cannot write the needle's number", "leave --recall out for this model")
        room = length - len(opening) - len(needle) - len(asked)
        if room < 1:
            raise _usage(f"a context of {length} tokens has no room for the needle", "ask for a longer one")
        if len(hay) < room:
            advice = "give a longer --haystack, or shorter lengths"
            raise _usage(
                f"the haystack has {len(hay):,} tokens, a context of {length:,} needs {room:,}", advice, source
            )
        start = _after_a_sentence(int(offset * (len(hay) - room)), 0, ends)
        for depth in DEPTHS:
            place = _after_a_sentence(start + round(depth * room), start, ends)
            ids = [*opening, *hay[start:place], *needle, *hay[place : start + room], *asked]
            contexts.append(Context("needle", length, depth, torch.tensor(ids), torch.arange(length - answer, length)))
    return contexts


def _after_a_sentence(place: int, start: int, ends: list[int]) -> int:
    """The last end of a sentence in (start, place], or `place` itself if there is none."""
    found = bisect_right(ends, place) - 1
    return ends[found] if found >= 0 and ends[found] > start else place


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _usage(problem: str, advice: str, where: str = "--recall") -> KitError:
    return KitError(problem, where=where, next_step=advice, exit_code=ExitCode.USAGE)
