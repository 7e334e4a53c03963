"""Perplexity by token, word and position, and top-5 agreement, against loops over float64 logits."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from kit.convert.checkpoint import open_checkpoint
from kit.convert.data import sample_from_model
from kit.convert.evaluate import evaluate
from kit.convert.perplexity import by_position, count_words, measures


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = torch.randint(4, 96, (130,), generator=torch.Generator().manual_seed(3)).tolist()
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in words))
    return path, words


def test_what_the_windows_say_is_what_a_float64_loop_says(make_model, text):
    path, words = text
    folder = make_model(seed=0)
    row = evaluate(
        {"m": open_checkpoint(str(folder))}, num_tokens=0, dataset=str(path), seq_len=26, max_windows=4, speed=False
    )["rows"][0]
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    losses = {}  # (window, position): nats
    for window in range(4):
        ids = torch.tensor(words[26 * window : 26 * window + 26])
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0].log_softmax(-1)
        for position in range(1, 26):
            losses[window, position] = -float(log_probs[position - 1, ids[position]])
    total = math.fsum(losses.values())
    assert row["perplexity"] == pytest.approx(math.exp(total / 100), rel=1e-5)
    assert row["word_perplexity"] == pytest.approx(math.exp(total / 104), rel=1e-5)  # 104 words, of which 4 not scored
    for window, loss in enumerate(row["window_losses"]):
        assert loss == pytest.approx(sum(losses[window, p] for p in range(1, 26)) / 25, rel=1e-5)
    assert len(row["window_losses"]) == 4
    buckets = row["perplexity_by_position"]
    assert [b["start"] for b in buckets] == [0, *(b["end"] for b in buckets[:-1])]
    assert buckets[-1]["end"] == 26
    assert len(buckets) == 8
    assert sum(b["tokens"] for b in buckets) == 100
    for bucket in buckets:
        inside = [loss for (_, position), loss in losses.items() if bucket["start"] <= position < bucket["end"]]
        assert bucket["tokens"] == len(inside)
        assert bucket["perplexity"] == pytest.approx(math.exp(sum(inside) / len(inside)), rel=1e-5)


def test_buckets_of_a_long_window_are_equal_and_of_a_short_one_not_empty():
    found = by_position(torch.zeros(3, 2047))
    assert [(b["start"], b["end"], b["tokens"]) for b in found[:2]] == [(0, 256, 3 * 255), (256, 512, 3 * 256)]
    assert {b["end"] - b["start"] for b in found} == {256}
    found = by_position(torch.tensor([[1.0, 2.0]]))
    assert [b["tokens"] for b in found] == [1, 1]
    assert [b["perplexity"] for b in found] == pytest.approx([math.e, math.e**2])


def test_words_are_split_at_whitespace(make_model):
    tokenizer = open_checkpoint(str(make_model())).load_tokenizer()
    assert count_words(torch.tensor([[4, 5], [6, 7]]), tokenizer) == 4


def test_a_broken_model_has_infinite_perplexity():
    found = measures(torch.full((2, 7), 1e4), 14)
    assert found["perplexity"] == found["word_perplexity"] == math.inf


def test_top5_is_the_share_where_the_base_s_choice_is_among_the_model_s_five(make_model):
    base, other = make_model(seed=0), make_model(seed=1)
    checkpoint = open_checkpoint(str(base))
    rows = evaluate(
        {"o": open_checkpoint(str(other)), "same": checkpoint}, base=checkpoint, num_tokens=1024, speed=False
    )
    other_row, same = rows["rows"][1:]
    sampled = sample_from_model(
        checkpoint.load_model(torch.float32, "cpu"), checkpoint.load_tokenizer(), 2, 512, seed=1
    ).input_ids
    with torch.no_grad():
        p = AutoModelForCausalLM.from_pretrained(base).double()(sampled).logits
        q = AutoModelForCausalLM.from_pretrained(other).double()(sampled).logits
    hits = 0
    for b in range(2):
        for t in range(512):
            chosen = int(p[b, t].argmax())
            hits += int((q[b, t] > q[b, t, chosen]).sum()) < 5
    assert other_row["top5"] == pytest.approx(hits / 1024, abs=2e-3)
    assert other_row["top1"] < other_row["top5"] < 1
    assert same["top5"] == 1
