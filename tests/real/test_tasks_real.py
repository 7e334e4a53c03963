"""Scores of the real model, through `kit eval` and by lm-evaluation-harness itself on the model's folder."""

import json

import datasets
import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM

from kit.convert.checkpoint import open_checkpoint
from kit.convert.evaluate import evaluate
from kit.convert.task_data import TaskOptions

pytestmark = pytest.mark.real


def choice(question, texts, answer):
    return {"question": question, "choices": {"text": texts, "label": list("ABCD")}, "answerKey": answer}


ARC = [
    choice("Which of these gives off its own light?", ["the Moon", "the Sun", "a mirror", "the Earth"], "B"),
    choice("What do plants take in to make food?", ["oxygen", "iron", "carbon dioxide", "salt"], "C"),
    choice("Water turns into ice when it", ["boils", "melts", "evaporates", "freezes"], "D"),
]
GSM8K = [
    {"question": f"Ann has {n} apples and buys {n}. How many has she?", "answer": f"{n} + {n} = {2 * n}.\n#### {2 * n}"}
    for n in range(2, 8)
]
PAGE = (
    " = Harbour = \n \n The harbour was built in 1 @,@ 200 days , and it has two piers . \n = = Use = = \n Boats . \n"
)
LAMBADA = {"text": "She opened the door, and behind the door stood her old friend Tom. Tom"}
HUB = {
    "allenai/ai2_arc": {"arc_easy": {"train": ARC, "test": ARC}},
    "EleutherAI/lambada_openai": {
        "lambada_openai": {
            "test": [{"text": "She opened the door, and behind the door stood her old friend Tom. Tom"}] * 2
        }
    },
    "openai/gsm8k": {"gsm8k": {"train": GSM8K[1:], "test": GSM8K[:1]}},
    "EleutherAI/wikitext_document_level": {"wikitext": {"train": [{"page": PAGE}], "test": [{"page": PAGE}]}},
}


def test_scores_equal_the_harness_to_the_last_digit(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    names = []
    for tasks in HUB.values():
        for name, splits in tasks.items():
            names.append(name)
            for split, rows in splits.items():
                (data / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoint = open_checkpoint("smollm2")
    options = TaskOptions(tuple(names), data_dir=data)
    mine = evaluate({"smollm2": checkpoint}, num_tokens=0, speed=False, tasks=options)["rows"][0]["tasks"]

    def load_dataset(path, name=None, **options):
        (splits,) = HUB[path].values()
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    lm = HFLM(pretrained=str(checkpoint.folder), dtype="auto", device="cpu")
    harness = lm_eval.simple_evaluate(model=lm, tasks=names)["results"]
    for name in names:
        theirs = {key.removesuffix(",none"): v for key, v in harness[name].items() if "," in key and v != "N/A"}
        assert mine[name]["metrics"] == theirs
    assert 1 < mine["wikitext"]["metrics"]["word_perplexity"] < 1e4
