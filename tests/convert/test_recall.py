"""Recall tests judged by models made by hand: one that copies, one that sees a window only, one that guesses."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from kit.convert.checkpoint import open_checkpoint
from kit.convert.errors import KitError
from kit.convert.evaluate import evaluate
from kit.convert.progress import Progress
from kit.convert.recall import DEPTHS, PAIRS, QUESTION, SAMPLES, SEQUENCES, made_up_text, measure_recall, recall_test


def byte_tokenizer(bos=False):
    """A token a byte, as GPT-2 writes bytes; ids 0 and 1 are special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: 2 + i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


class Copies:
    """Predicts what followed the longest earlier match of the last tokens, as far back as its window."""

    device = "cpu"

    def __init__(self, window=10**9):
        self.window = window

    def predict(self, seen):
        seen = seen[-self.window :]
        best, following = 0, 0
        for end in range(1, len(seen)):
            same = 0
            while same < end and seen[end - 1 - same] == seen[-1 - same]:
                same += 1
            if same > best:
                best, following = same, seen[end]
        return following

    def __call__(self, ids, use_cache, logits_to_keep):
        assert ids.shape[0] == 1
        row = ids[0].tolist()
        predicted = [self.predict(row[: t + 1]) for t in range(len(row) - logits_to_keep, len(row))]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor(predicted)[None], 258).float())


class FirstValue(Copies):
    """Answers every question with the first value that was stated: right once in each context."""

    def predict(self, seen):
        return seen[2]


def written(lengths=(512,), tokenizer=None, haystack=None, seed=1):
    tokenizer = tokenizer or byte_tokenizer()
    return recall_test(list(lengths), tokenizer, 258, haystack=haystack, source="made-up sentences", seed=seed)


def test_a_model_that_copies_recalls_everything():
    found = measure_recall(Copies(), written((300, 512)), 300, Progress())
    assert [(f["length"], f["accuracy"], f["extrapolation"]) for f in found["mqar"]] == [
        (300, 1.0, False),
        (512, 1.0, True),
    ]
    assert {f["queries"] for f in found["mqar"]} == {PAIRS * SEQUENCES}
    assert [(f["length"], f["depth"]) for f in found["needle"]] == [(n, d) for n in (300, 512) for d in DEPTHS]
    assert {(f["accuracy"], f["stderr"], f["samples"]) for f in found["needle"]} == {(1.0, 0.0, SAMPLES)}


def test_a_model_that_sees_a_window_finds_the_needle_only_there():
    found = measure_recall(Copies(window=250), written((1024,)), None, Progress())
    assert [f["accuracy"] for f in found["needle"]] == [0, 0, 0, 0, 1]
    assert found["mqar"][0]["accuracy"] < 0.2


def test_a_model_that_guesses_among_the_values_is_right_by_chance():
    found = measure_recall(FirstValue(), written((256,)), None, Progress())
    assert found["mqar"][0]["accuracy"] == pytest.approx(1 / PAIRS)
    assert {f["accuracy"] for f in found["needle"]} == {0.0}


@pytest.mark.parametrize("bos", [False, True])
def test_contexts_are_as_long_as_asked_and_say_what_they_should(bos):
    tokenizer = byte_tokenizer(bos)
    hay = made_up_text(60, seed=5)
    contexts = written((700,), tokenizer, hay).contexts
    assert len(contexts) == SEQUENCES + len(DEPTHS) * SAMPLES
    for context in contexts:
        ids = context.input_ids.tolist()
        assert len(ids) == 700
        assert ids.count(0) == (ids[0] == 0) == bos
        if context.kind == "mqar":
            lines = [ids[bos : bos + 4 * PAIRS][i : i + 4] for i in range(0, 4 * PAIRS, 4)]
            asked = [ids[-4 * PAIRS :][i : i + 4] for i in range(0, 4 * PAIRS, 4)]
            assert sorted(lines) == sorted(asked)
            assert lines != asked
            assert [ids[i] for i in context.answers.tolist()] == [value for _, _, value, _ in asked]
            once = [token for line in lines for token in (line[0], line[2])]
            assert len(set(once)) == 2 * PAIRS
            assert not set(once) & set(ids[bos + 4 * PAIRS : -4 * PAIRS])
            continue
        text = tokenizer.decode(ids[bos:])
        number = tokenizer.decode([ids[i] for i in context.answers.tolist()]).strip()
        assert number.isdigit()
        assert len(number) == 5
        before, needle, after = text.partition(f" The secret number of this text is {number}. Remember it.")
        assert needle
        kept = after.removesuffix(f"{QUESTION} {number}")
        assert before + kept in hay  # in one piece but for the needle
        place = len(before) / len(before + kept)
        assert place == pytest.approx(context.depth, abs=70 / len(before + kept))  # as far as a sentence is long
        if 0 < context.depth < 1:
            assert before.endswith(".")


def test_the_same_seed_writes_the_same_contexts():
    first, again, other = written(), written(), written(seed=2)
    assert first.settings == again.settings
    assert first.settings["sha256"] != other.settings["sha256"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lengths": [100]}, "no room for 16 pairs"),
        ({"haystack": "Short."}, "haystack has 6 tokens"),
    ],
)
def test_what_cannot_be_written_is_said(change, what):
    with pytest.raises(KitError, match=what) as caught:
        written(**change)
    assert caught.value.exit_code == 2


def test_a_tokenizer_without_digits_is_refused_before_weights_load(make_model, monkeypatch):
    checkpoint = open_checkpoint(str(make_model()))
    monkeypatch.setattr(type(checkpoint), "load_model", None)
    with pytest.raises(KitError, match="cannot write the needle's number"):
        evaluate({"m": checkpoint}, num_tokens=0, recall=[512])
    with pytest.raises(KitError, match="a haystack is for --recall"):
        evaluate({"m": checkpoint}, num_tokens=0, haystack="text.txt")


def test_evaluate_takes_the_data_set_as_haystack_and_marks_extrapolation(make_model, tmp_path):
    folder = make_model(vocab_size=258, max_position_embeddings=600, num_hidden_layers=1)
    byte_tokenizer().save_pretrained(folder)
    text = tmp_path / "hay.txt"
    text.write_text(made_up_text(80, seed=9))
    result = evaluate(
        {"m": open_checkpoint(str(folder))},
        num_tokens=0,
        dataset=str(text),
        seq_len=64,
        max_windows=2,
        recall=[512, 640],
        speed=False,
    )
    assert result["settings"]["recall"]["haystack"] == "hay.txt"
    assert [f["extrapolation"] for f in result["rows"][0]["recall"]["mqar"]] == [False, True]
