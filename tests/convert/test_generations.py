"""Repetition and loops on texts counted by hand; continuations against a greedy loop of our own."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from kit.convert.checkpoint import open_checkpoint
from kit.convert.errors import KitError
from kit.convert.evaluate import evaluate
from kit.convert.generations import NEW_TOKENS, PROMPT_TOKENS, loops, prompts, repetition


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("a a a a a a a a", 4 / 5),
        ("a b c d e f g h", 0),
        ("the cat sat on the mat and the cat sat on the rug", 2 / 10),  # "the cat sat on" and "cat sat on the"
        ("a b c", 0),
        ("", 0),
    ],
)
def test_repeated_4_grams(text, want):
    assert repetition(text.split()) == pytest.approx(want)


@pytest.mark.parametrize(
    ("tokens", "want"),
    [
        (["x"] * 32, True),
        (["x"] * 31, False),
        ([*range(90), *["a", "b"] * 16], True),
        ([*range(90), *["a", "b"] * 15], False),
        ([*range(50), *[*range(100, 120)] * 3], True),
        ([*range(50), *[*range(100, 120)] * 2], False),  # said twice is no loop
        ([*range(50), *[*range(100, 120)] * 3, *range(100, 107)], True),  # cut off in the fourth turn
        ([*["a", "b"] * 40, *range(20)], False),  # it found its way out
        ([], False),
    ],
)
def test_loops(tokens, want):
    assert loops(tokens) is want


def test_prompts_are_evenly_spaced():
    found = prompts(torch.arange(10 * PROMPT_TOKENS + 7).view(1, -1), 5)
    assert found[:, 0].tolist() == [0, 2 * PROMPT_TOKENS, 4 * PROMPT_TOKENS, 6 * PROMPT_TOKENS, 8 * PROMPT_TOKENS]
    assert found.shape == (5, PROMPT_TOKENS)


def change_generation(folder, **settings):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_continuations_are_greedy_whatever_the_checkpoint_prefers(make_model, tmp_path):
    folder = make_model(seed=4)
    change_generation(folder, do_sample=True, temperature=3.0, repetition_penalty=4.0, eos_token_id=None)
    text = tmp_path / "text.txt"
    words = torch.randint(4, 96, (256,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(f"w{i}" for i in words.tolist()))
    checkpoint = open_checkpoint(str(folder))
    result = evaluate({"m": checkpoint}, num_tokens=0, dataset=str(text), seq_len=128, generations=2, speed=False)
    found = result["rows"][0]["generations"]
    assert result["settings"]["generations"]["from"] == "text.txt"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = checkpoint.load_tokenizer()
    shares = []
    for sample, start in zip(found["samples"], (0, 128), strict=True):
        ids = words[start : start + PROMPT_TOKENS]
        assert sample["prompt"] == tokenizer.decode(ids)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
        assert sample["text"] == tokenizer.decode(ids[PROMPT_TOKENS:], skip_special_tokens=True)
        shares.append(repetition(ids[PROMPT_TOKENS:].tolist()))
    assert found["repetition"] == pytest.approx(sum(shares) / 2)


def test_a_text_that_ends_before_its_first_word_is_degenerate(make_model):
    folder = make_model(seed=4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    change_generation(folder, eos_token_id=list(range(model.config.vocab_size)))  # whatever it says ends the text
    result = evaluate({"m": open_checkpoint(str(folder))}, num_tokens=128, generations=2, speed=False)
    found = result["rows"][0]["generations"]
    assert found["degenerate"] == 1
    assert found["repetition"] == 0
    assert [sample["text"] for sample in found["samples"]] == ["", ""]


def test_more_prompts_than_text_are_refused_before_weights_load(make_model, monkeypatch):
    checkpoint = open_checkpoint(str(make_model()))
    monkeypatch.setattr(type(checkpoint), "load_model", None)
    with pytest.raises(KitError, match="9 prompts of 64 tokens need 576 held-out tokens, there are 512"):
        evaluate({"m": checkpoint}, num_tokens=512, generations=9)
