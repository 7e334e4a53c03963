"""The linearization benchmark: its list of runs, its tables on made-up figures, its training texts."""

import math
import random
import re

import pytest
import torch

from kit.convert.perplexity import measures

RUNS = """
# what follows
* lolcats distill.steps=5 lora.steps=0
hybrid lolcats
long lolcats seconds=300 seed=1  # as long as there is time
* lolcats window_size=32
narrow lolcats
hedge hedgehog
base base
"""


def test_a_line_is_a_run_with_the_options_that_lines_before_gave_its_recipe(script):
    runs = {run.name: run for run in script("linearization").read_runs(RUNS)}
    assert [run.recipe for run in runs.values()] == ["lolcats", "lolcats", "lolcats", "hedgehog", "base"]
    assert runs["hybrid"].settings == ["distill.steps=5", "lora.steps=0"]
    assert (runs["long"].seconds, runs["long"].settings[-1]) == (300.0, "seed=1")
    assert runs["narrow"].settings == ["distill.steps=5", "lora.steps=0", "window_size=32"]
    assert runs["hedge"].settings == []
    for broken in ("alone", "base base\nbase window"):
        with pytest.raises(ValueError, match="name of its own"):
            script("linearization").read_runs(broken)


def test_the_time_of_an_update_leaves_out_what_the_curve_took(script):
    watch = script("linearization").Watch(math.inf)
    watch.times, watch.curve = [0.0, 1.0, 2.0, 12.0, 13.0], [{"step": 3}]
    assert watch.each() == 1.0
    with pytest.raises(script("linearization").TimeIsUp):
        script("linearization").Watch(0.0).step()


def figures(nats):
    """What is measured of a model whose windows have these losses."""
    text = measures(torch.tensor(nats)[:, None].expand(-1, 15), 0)
    recall = {"mqar": [{"length": 512, "accuracy": 0.25}], "needle": [{"length": 512, "depth": 0, "accuracy": 0.5}]}
    dev = text | {"kl": 0.125, "top1": 0.75}
    return {"complete": True, "final": {"converted": {"test": text, "dev": dev, "test, long": text}, "recall": recall}}


def rows(text, title):
    """A table's rows by name, each as {title: cell}."""
    table = next(part.splitlines() for part in text.split("\n\n") if title in part.splitlines()[0])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}


def test_tables_compare_runs_with_the_base_the_hybrid_and_their_other_seeds(script):
    runs = {
        "base": figures([2.0] * 6),
        "hybrid": figures([2.0 + math.log(1.2), *[2.0 + math.log(1.2)] * 5]) | {"tokens": 2_000_000},
        "hybrid@1": figures([2.0 + math.log(1.4)] * 6),
        "control": figures([2.0 + math.log(1.5)] * 6) | {"cache_bytes": 1_500_000},
        "killed": {"complete": False},
    }
    text = script("linearization_tables").report(runs)
    main = rows(text, "to base")
    assert (main["hybrid"]["to base"], main["control"]["to base"]) == ("1.200", "1.500")
    assert (main["hybrid"]["tokens"], main["control"]["cache"], main["base"]["KL"]) == ("2.00 M", "1.5 MB", "0.1250")
    seeds = rows(text, "over seeds")
    assert seeds["hybrid"]["test"] == f"{1.3 * math.exp(2):.2f} ± {0.2 / math.sqrt(2) * math.exp(2):.2f}"
    assert seeds.keys() == {"hybrid"}
    assert rows(text, "to that of hybrid")["control"]["test"] == "1.250 (1.250 to 1.250)"
    assert rows(text, "by position")["hybrid"]["0 to 2"] == f"{1.2 * math.exp(2):.2f}"
    assert rows(text, "recall |")["base"] == {"recall": "base", "needle 512": "0.5", "MQAR 512": "25%"}
    assert "Not complete: killed" in text


def test_a_short_recall_text_too_says_everything_before_it_asks(script):
    texts = script("linearization_texts")
    text = texts.recall_text([f"w{number}" for number in range(5000)], random.Random(3), 100)
    facts = re.findall(r"The \w+ of the \w+ in \w+ is \d+\.", text)
    assert set(facts[: texts.FACTS]) == set(facts[texts.FACTS :])


def test_recall_texts_ask_for_what_they_said_and_repeat_passages(script):
    texts = script("linearization_texts")
    words = [f"w{number}" for number in range(5000)]
    text = texts.recall_text(words, random.Random(3), 900)
    facts = re.findall(r"The \w+ of the \w+ in \w+ is \d+\.", text)
    assert len(facts) == 2 * texts.FACTS
    assert sorted(facts) == sorted(2 * list(dict.fromkeys(facts)))
    ordinary = re.findall(r"w\d+", text)
    grams = [tuple(ordinary[i : i + texts.PASSAGE[0]]) for i in range(len(ordinary) - texts.PASSAGE[0])]
    assert len(set(grams)) < 0.9 * len(grams)
    assert 900 <= len(text.split()) <= 900 + texts.PASSAGE[1] + 8 * 2 * texts.FACTS
