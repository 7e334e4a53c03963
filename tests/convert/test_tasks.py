"""Scores, prompts and logs beside lm-evaluation-harness's own run on the hub's rows, which a fake hub serves here."""

import gzip
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from unittest import mock

import datasets
import lm_eval
import numpy
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks.hellaswag.utils import process_docs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kit.convert.checkpoint import Checkpoint, open_checkpoint
from kit.convert.errors import KitError
from kit.convert.eval_folder import EvalFolder
from kit.convert.evaluate import evaluate
from kit.convert.pipeline import Options, convert
from kit.convert.progress import Progress
from kit.convert.task_data import TaskData, TaskOptions, parse_names, source_of, wikitext_pages
from kit.convert.task_table import mean_over_tasks, task_cells, tasks_line
from kit.convert.tasks import _seeds, load_tasks
from kit.recipes import load_recipes

SUBJECTS = [name.removeprefix("mmlu_") for name in sorted(TaskManager().task_index["mmlu_stem_tasks"].tags)][:2]
PAGES = [
    " = Dog = \n \n A dog barks . \n = = Kinds = = \n Big , small . \n ",
    " = 1 H and C = \n x ",
    " = Cat = \n A cat @-@ like one . \n",
]
WIKITEXT = " \n" + "\n".join(PAGES)


def letters(texts, answer, name="question", question=""):
    return {name: question, "choices": {"text": texts, "label": list("ABCD"[: len(texts)])}, "answerKey": answer}


ARC = [
    letters(["sun", "a moon"], "A", question="What shines?"),
    letters(["ice", "fire", "tea"], "B", question="What is hot?"),
    letters(["one", "two"], "B", question="One and one is"),
]
HELLASWAG = [
    {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "endings": ["is using wrap.", "is ripping tiles [substeps] off.", "holds a cube.", "pulls up roofing."],
        "label": "3",
    },
    {
        "activity_label": "Family Life",
        "ctx_a": "[header] How to sleep [title] Dim the light. [step] Light wakes. [substeps] Close the e.g. blind.",
        "ctx_b": "",
        "endings": ["Use a [thick] curtain.", "Sing. [title] Loud.", "Run.", "Eat."],
        "label": "0",
    },
    {
        "activity_label": "Piercing",
        "ctx_a": "3 the guy puts a ring in.",
        "ctx_b": "4 the guy",
        "endings": ["a", "b", "c", "d"],
        "label": "1",
    },
]
PIQA = [
    {"goal": "How to boil an egg?", "sol1": "In water.", "sol2": "In sand.", "label": 0},
    {"goal": "dresser", "sol1": "paint", "sol2": "eat", "label": 1},
]
BOOLQ = [
    {"passage": "Ice is cold.\nQuestion: is it? It is.", "question": "is ice cold", "label": 1},
    {"passage": "Fire is hot.", "question": "is fire cold", "label": 0},
]
OPENBOOKQA = [
    letters(["lions", "grass"], "B", "question_stem", "Cows eat"),
    letters(["a marsh", "a desert"], "A", "question_stem", "Fog is around:"),
]
LAMBADA = [{"text": "I look at a clear stone.\n\nIt is a stone"}, {"text": '"Yes," he said. "No," she said'}]
GSM8K = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(7)]


def mmlu(split):
    return {
        subject: [
            {"subject": subject, "question": f" {split} {i} of {subject}?", "choices": list("wxyz"), "answer": i % 4}
            for i in range(3)
        ]
        for subject in SUBJECTS
    }


HUB = {
    ("allenai/ai2_arc", "ARC-Easy"): {"train": ARC[::-1], "test": ARC},
    ("Rowan/hellaswag", None): {"train": HELLASWAG, "validation": HELLASWAG},
    ("baber/piqa", None): {"train": PIQA, "validation": PIQA},
    ("aps/super_glue", "boolq"): {"train": BOOLQ, "validation": BOOLQ},
    ("allenai/openbookqa", "main"): {"train": OPENBOOKQA, "test": OPENBOOKQA},
    ("EleutherAI/lambada_openai", "default"): {"test": LAMBADA},
    ("openai/gsm8k", "main"): {"train": GSM8K, "test": GSM8K[:2]},
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): {
        "train": [{"page": page} for page in PAGES],
        "test": [{"page": page} for page in PAGES],
    },
    **{("cais/mmlu", subject): {"dev": mmlu("dev")[subject], "test": mmlu("test")[subject]} for subject in SUBJECTS},
}
ALL = ["arc_easy", "hellaswag", "piqa", "boolq", "openbookqa", "lambada_openai", "gsm8k", "wikitext"]
ALL += [f"mmlu_{subject}" for subject in SUBJECTS]


def plain(query, choices, gold):
    return {"query": query, "choices": choices, "gold": gold}


def cleaned(text):
    """HellaSwag's own marks taken out: 'x [title] y' is 'x. y', the others go, two spaces become one."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[(header|step|substeps)\]", "", text).replace("  ", " ")


def plain_rows():
    """The same rows as evaluation files have them, by file."""
    arc = [plain(f"Question: {r['question']}", r["choices"]["text"], "ABCD".index(r["answerKey"])) for r in ARC]
    return {
        "arc_easy_test.jsonl": arc,
        "arc_easy_train.jsonl": arc[::-1],
        "hellaswag_val.jsonl.gz": [
            plain(
                cleaned(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b']}").strip(),
                [cleaned(ending) for ending in r["endings"]],
                int(r["label"]),
            )
            for r in HELLASWAG
        ],
        "piqa_valid.jsonl": [plain(f"Question: {r['goal']}\n", [r["sol1"], r["sol2"]], r["label"]) for r in PIQA],
        "boolq_dev.jsonl": [
            plain(f"Passage: {r['passage']}\nQuestion: {r['question']}?", ["no", "yes"], r["label"]) for r in BOOLQ
        ],
        "openbookqa_test.jsonl": [
            plain(r["question_stem"], r["choices"]["text"], "ABCD".index(r["answerKey"])) for r in OPENBOOKQA
        ],
        "lambada_openai_test.jsonl": [
            {"context": "I look at a clear stone.\n\nIt is a", "continuation": "stone"},
            {"context": '"Yes," he said. "No," she', "continuation": "said"},
        ],
        "gsm8k_train.jsonl": GSM8K,
        "gsm8k_test.jsonl": GSM8K[:2],
        **{
            f"mmlu_{split}.jsonl": [
                {"gold" if name == "answer" else name: value for name, value in row.items()}
                for rows in mmlu(split).values()
                for row in rows
            ]
            for split in ("dev", "test")
        },
    }


def hub_rows():
    """The hub's rows, by file."""
    files = {}
    for (path, name), splits in HUB.items():
        for split, rows in splits.items():
            files.setdefault(f"{source_of('', path, name).stem}_{split}.jsonl", []).extend(rows)
    return files


def write(folder, files):
    folder.mkdir()
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("plain") / "data", plain_rows())
    (folder / "wikitext2_raw_test.txt").write_text(WIKITEXT)
    return folder


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hub") / "data", hub_rows())


@pytest.fixture
def hub(monkeypatch):
    """Serve the hub's rows to the harness."""

    def load_dataset(path, name=None, **options):
        splits = HUB[path, name]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture(scope="module")
def make_byte_model(make_model):
    """Like `make_model`, with a tokenizer of bytes, so that every character of a prompt counts."""

    def make(**change):
        folder = make_model(vocab_size=259, max_position_embeddings=2048, num_hidden_layers=2, **change)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{byte: 3 + i for i, byte in enumerate(alphabet)}}
        tokenizer = Tokenizer(models.BPE(words, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def model(make_byte_model):
    return make_byte_model()


def run(folder, data, names, output=None, progress=None, **options):
    what = {name: options.pop(name) for name in ("resume", "overwrite") if name in options}
    result = evaluate(
        {"tiny": open_checkpoint(str(folder))},
        num_tokens=0,
        speed=False,
        tasks=TaskOptions(tuple(names), data_dir=data, **options),
        output=output,
        progress=progress,
        **what,
    )
    return result["rows"][0]["tasks"]


def own(folder, names, **options):
    """The harness's own run, from the model's folder on (but for what it would note down of this machine)."""
    lm = HFLM(pretrained=str(folder), dtype="auto", device="cpu")
    with mock.patch("lm_eval.evaluator.add_env_info"):
        return lm_eval.simple_evaluate(model=lm, tasks=list(names), **options)


def check_equal(mine, harness, folder):
    """Every metric, every standard error, every prompt and answer."""
    for name, entry in mine.items():
        theirs = {
            key.removesuffix(",none"): value
            for key, value in harness["results"][name].items()
            if "," in key and value != "N/A"
        }
        assert entry["metrics"] == theirs
        assert entry["num_samples"] == harness["results"][name]["sample_len"]
        assert entry["num_fewshot"] == harness["n-shot"][name]
        logged = [json.loads(line) for line in (folder / f"samples_tiny_{name}.jsonl").read_text().splitlines()]
        for filter_name in {sample["filter"] for sample in harness["samples"][name]}:
            samples = [sample for sample in harness["samples"][name] if sample["filter"] == filter_name]
            assert [line["doc_id"] for line in logged] == [sample["doc_id"] for sample in samples]
            for line, sample in zip(logged, samples, strict=True):
                assert line["prompt"] == sample["arguments"][0][0]
                if "continuations" in line:
                    assert line["continuations"] == [arguments[1] for arguments in sample["arguments"]]
                assert line["target"] == sample["target"]
                answers = sample["filtered_resps"] if filter_name == "none" else line["filtered"][filter_name]
                assert json.loads(json.dumps(sample["filtered_resps"])) == json.loads(json.dumps(answers))
                for metric in sample["metrics"]:
                    key = metric if filter_name == "none" else f"{metric},{filter_name}"
                    assert line["metrics"][key] == json.loads(json.dumps(sample[metric], default=float))


@pytest.mark.parametrize("form", ["plain_folder", "hub_folder"])
def test_scores_and_prompts_equal_the_harness_for_every_task(model, form, hub, tmp_path, request):
    mine = run(model, request.getfixturevalue(form), ALL, tmp_path / "out", limit=2)
    check_equal(mine, own(model, ALL, limit=2), tmp_path / "out")
    assert list(mine) == ALL
    assert mine["gsm8k"]["num_fewshot"] == 5
    assert mine["wikitext"]["metrics"]["word_perplexity"] > 1
    assert "correct" not in mine["wikitext"]
    assert mine["arc_easy"]["main"] == "acc"
    assert mine["hellaswag"]["main"] == "acc_norm"
    for name in ("arc_easy", "hellaswag", "lambada_openai"):
        assert sum(mine[name]["correct"]) / 2 == mine[name]["metrics"][mine[name]["main"]]


def test_examples_in_the_prompt_equal_the_harness(model, plain_folder, hub, tmp_path):
    names = ["arc_easy", f"mmlu_{SUBJECTS[0]}", "lambada_openai"]
    mine = run(model, plain_folder, names, tmp_path / "out", num_fewshot=1)
    check_equal(mine, own(model, names, num_fewshot=1), tmp_path / "out")
    logged = (tmp_path / "out" / f"samples_tiny_mmlu_{SUBJECTS[0]}.jsonl").read_text()
    assert f"dev 0 of {SUBJECTS[0]}?" in json.loads(logged.splitlines()[0])["prompt"]


def test_the_harness_downloads_without_local_files(model, hub):
    assert run(model, None, ["piqa"])["piqa"]["num_samples"] == 2


def test_a_group_is_scored_as_the_harness_scores_it(model, hub, tmp_path, monkeypatch):
    """A category of mmlu; the limit counts by subject. Of the whole there are 57."""
    index = TaskManager().task_index
    tags = [f"mmlu_{category}_tasks" for category in ("stem", "other", "social_sciences", "humanities")]
    subjects = [name.removeprefix("mmlu_") for tag in tags for name in sorted(index[tag].tags)]
    rows = [
        {"subject": subject, "question": f"{i}?", "choices": list("wxyz"), "answer": i}
        for subject in subjects
        for i in range(3)
    ]
    data = write(tmp_path / "data", {"mmlu_test.jsonl": rows})
    assert len(load_tasks(TaskOptions(("mmlu",), data_dir=data)).leaves) == 57
    for subject in subjects:
        found = [row for row in rows if row["subject"] == subject]
        monkeypatch.setitem(HUB, ("cais/mmlu", subject), {"dev": found, "test": found})
    mine = run(model, data, ["mmlu_stem"], limit=2)["mmlu_stem"]
    harness = own(model, ["mmlu_stem"], limit=2)["results"]
    stem = [f"mmlu_{subject}" for subject in subjects if f"mmlu_{subject}" in index["mmlu_stem_tasks"].tags]
    assert mine["metrics"]["acc"] == harness["mmlu_stem"]["acc,none"]
    assert mine["metrics"]["acc_stderr"] == harness["mmlu_stem"]["acc_stderr,none"]
    assert mine["num_samples"] == len(stem) * 2 == len(mine["correct"])
    assert {name: entry["metrics"]["acc"] for name, entry in mine["subtasks"].items()} == {
        name: harness[name]["acc,none"] for name in stem
    }


@pytest.mark.parametrize("row", HELLASWAG)
def test_hellaswag_contexts_are_put_together_again(row, tmp_path):
    folder = write(tmp_path / "data", {"hellaswag_validation.jsonl": plain_rows()["hellaswag_val.jsonl.gz"]})
    back = TaskData(folder).rows("hellaswag", "Rowan/hellaswag", None, "validation")[HELLASWAG.index(row)]
    got, want = (process_docs(datasets.Dataset.from_list([each]))[0] for each in (back, row))
    assert (got["query"], got["choices"], got["label"]) == (want["query"], want["choices"], row["label"])


def test_a_wikitext_file_is_cut_at_titles():
    assert wikitext_pages(WIKITEXT) == [{"page": page} for page in PAGES]


class Stop(Progress):
    """Interrupt after some samples."""

    def __init__(self, after=math.inf):
        self.after, self.seen = after, 0

    def step(self, advance=1, **values):
        self.seen += 1
        if self.seen >= self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("names", [["arc_easy", "piqa"], ["wikitext"], ["gsm8k"]])
def test_an_interrupted_run_goes_on_and_repeats_nothing(model, plain_folder, tmp_path, monkeypatch, names):
    whole = run(model, plain_folder, names, tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model, plain_folder, names, out, progress=Stop(after=2))  # one sample more is written than shown
    logs = {file: file.read_text() for file in out.glob("samples_*")}
    done = sum(text.count("\n") for text in logs.values())
    assert done == 2
    assert not (out / "results.json").exists()
    cut = max(logs)  # a kill in the middle of a line
    cut.write_text(logs[cut] + '{"doc_id": 1, "requ')
    asked = []
    for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        ask = getattr(HFLM, method)

        def count(self, requests, ask=ask, **options):
            asked.extend({(request.task_name, request.doc_id) for request in requests})
            return ask(self, requests, **options)

        monkeypatch.setattr(HFLM, method, count)
    again = run(model, plain_folder, names, out, resume=True)
    assert again == whole
    assert len(asked) == sum(entry["num_samples"] for entry in whole.values()) - done
    for file in (tmp_path / "whole").glob("samples_*"):
        assert (out / file.name).read_text() == file.read_text()
    asked.clear()
    assert run(model, plain_folder, names, out, resume=True) == whole
    assert asked == []


def test_more_samples_and_tasks_may_be_added_to_a_folder(model, plain_folder, tmp_path):
    run(model, plain_folder, ["arc_easy"], tmp_path / "out", limit=1)
    more = run(model, plain_folder, ["arc_easy", "piqa"], tmp_path / "out", resume=True)
    assert more == run(model, plain_folder, ["arc_easy", "piqa"])


def test_a_folder_is_not_mixed_or_replaced_unasked(model, make_byte_model, plain_folder, tmp_path):
    out = tmp_path / "out"
    first = run(model, plain_folder, ["piqa"], out)
    result = json.loads((out / "results.json").read_text())
    assert result["rows"][0]["tasks"] == first
    assert result["settings"]["tasks"]["data"].keys() == {"piqa_valid.jsonl"}
    with pytest.raises(KitError, match="holds the results") as caught:
        run(model, plain_folder, ["piqa"], out)
    assert "--resume" in caught.value.next_step
    other = make_byte_model(seed=1)
    with pytest.raises(KitError, match="cannot resume: model changed"):
        run(other, plain_folder, ["piqa"], out, resume=True)
    second = run(other, plain_folder, ["piqa"], out, overwrite=True)
    assert second == run(other, plain_folder, ["piqa"])
    with pytest.raises(KitError, match="cannot resume: num_fewshot changed"):
        EvalFolder(out, resume=True).samples("tiny", "piqa", known_settings(out) | {"num_fewshot": 3})


def test_two_models_of_one_name_do_not_share_samples(model, make_byte_model, plain_folder, no_weights, tmp_path):
    two = {"base": open_checkpoint(str(make_byte_model(seed=1)))}
    options = TaskOptions(("piqa",), data_dir=plain_folder)
    with pytest.raises(KitError, match="two models are called base"):
        evaluate(two, base=open_checkpoint(str(model)), num_tokens=0, tasks=options, output=tmp_path / "out")


def known_settings(out):
    return json.loads((out / "run.json").read_text())["samples_tiny_piqa.jsonl"]


@pytest.fixture
def no_weights(monkeypatch):
    def load_model(*arguments, **options):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(Checkpoint, "load_model", load_model)


@pytest.mark.parametrize(
    ("names", "files", "what", "where", "next_step"),
    [
        (["arc_esay"], {}, "'arc_esay' is no task", "--tasks", "did you mean 'arc_easy'?"),
        (["piqa"], {}, "no file for the validation split of task piqa", "piqa_validation.jsonl", "{goal, sol1, sol2"),
        (
            ["piqa"],
            {"piqa_val.jsonl": [PIQA[0], {"goal": "g", "sol1": "a", "label": 0}]},
            "field 'sol2' is missing",
            "piqa_val.jsonl, line 2",
            "{query, choices, gold}",
        ),
        (
            ["arc_easy"],
            {"arc_easy_test.jsonl.gz": [{"query": "q", "choices": ["a"]}]},
            "field 'gold' is missing",
            "arc_easy_test.jsonl.gz, line 1",
            "{query, choices, gold}",
        ),
        (["arc_easy"], {"arc_easy_test.jsonl": [plain("q", ["a"], 1)]}, "'gold' is 1, with 1", "line 1", "query"),
        (["arc_easy"], {"arc_easy_test.jsonl": [plain("q", ["a"], "0")]}, "'gold' is str", "line 1", "query"),
        (["arc_easy"], {"arc_easy_test.jsonl": [7]}, "no JSON object", "line 1", "query"),
        (["arc_easy"], {"arc_easy_test.jsonl": []}, "holds no row", "arc_easy_test.jsonl", "query"),
        (["boolq"], {"boolq_dev.jsonl": [plain("q", ["no", "yes"], 1)]}, "does not read", "line 1", "query"),
        (["lambada"], {"lambada_openai_test.jsonl": [{"context": "", "continuation": "b c"}]}, "one word", "1", "text"),
        (["gsm8k"], {"gsm8k_test.jsonl": GSM8K}, "no file for the train split", "gsm8k_train.jsonl", "question"),
        (["gsm8k"], {"gsm8k_test.jsonl": GSM8K, "gsm8k_train.jsonl": GSM8K[:3]}, "5 examples", "few", "use 3"),
        (["mmlu_anatomy"], {"mmlu_test.jsonl": mmlu("test")[SUBJECTS[0]]}, "no row of subject 'anatomy'", "mmlu", "s"),
        (["winogrande"], {"winogrande_validation.jsonl": [{"sentence": "a"}]}, "cannot be loaded", "--tasks", "fields"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_weights_load(model, no_weights, tmp_path, names, files, what, where, next_step):
    with pytest.raises(KitError) as caught:
        run(model, write(tmp_path / "data", files), names)
    assert what in caught.value.what
    assert where in caught.value.where
    assert next_step in caught.value.next_step


@pytest.mark.parametrize("content", [b'{"goal": "g"\n', b"\xff\n"])
def test_broken_files_are_told_with_the_line(tmp_path, content):
    (tmp_path / "piqa_val.jsonl").write_bytes(json.dumps(PIQA[0]).encode() + b"\n" + content)
    with pytest.raises(KitError, match="no JSON") as caught:
        TaskData(tmp_path).rows("piqa", "baber/piqa", None, "validation")
    assert caught.value.where.endswith("piqa_val.jsonl, line 2")


def test_a_cut_gzip_file_is_told(tmp_path):
    (tmp_path / "piqa_val.jsonl.gz").write_bytes(gzip.compress(json.dumps(PIQA[0]).encode() * 99)[:-20])
    with pytest.raises(KitError, match="cannot be read"):
        TaskData(tmp_path).rows("piqa", "baber/piqa", None, "validation")


def test_a_folder_that_is_not_there_and_bad_numbers(tmp_path):
    with pytest.raises(KitError, match="not there"):
        TaskData(tmp_path / "none")
    with pytest.raises(KitError, match="0 is too small"):
        TaskOptions(("piqa",), limit=0)
    with pytest.raises(KitError, match="no task"):
        parse_names(" , ")
    assert parse_names("piqa, boolq") == ("piqa", "boolq")


def test_offline_it_says_to_give_local_files(monkeypatch, no_weights, model):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(KitError, match="piqa cannot be loaded: ConnectionError") as caught:
        run(model, None, ["piqa"])
    assert "--data-dir" in caught.value.next_step


def test_base_and_models_are_scored_each_and_tabled(model, make_byte_model, plain_folder):
    other = make_byte_model(seed=1)
    result = evaluate(
        {"other": open_checkpoint(str(other))},
        base=open_checkpoint(str(model)),
        num_tokens=0,
        speed=False,
        tasks=TaskOptions(("arc_easy", "boolq", "wikitext"), limit=2, data_dir=plain_folder),
    )
    rows = result["rows"]
    assert [row["tasks"] for row in rows] == [
        run(folder, plain_folder, ["arc_easy", "boolq", "wikitext"], limit=2) for folder in (model, other)
    ]
    header, lines = task_cells(rows)
    assert header == ["task", "shots", "samples", "metric", "base", "other"]
    arc = rows[1]["tasks"]["arc_easy"]["metrics"]
    assert lines[0][5] == f"{arc['acc']:.4f} ± {arc['acc_stderr']:.4f}"
    metrics = ["acc *", "acc_norm", "acc *", "word_perplexity", "byte_perplexity", "bits_per_byte", "*"]
    assert [line[3] for line in lines] == metrics
    boolq = rows[1]["tasks"]["boolq"]["metrics"]
    mean, error, count = mean_over_tasks(rows[1]["tasks"])
    assert (mean, count) == (pytest.approx((arc["acc"] + boolq["acc"]) / 2), 2)
    assert error == pytest.approx(math.hypot(arc["acc_stderr"], boolq["acc_stderr"]) / 2)
    assert "title" in tasks_line(result["settings"]["tasks"])  # what boolq's plain rows cannot give back


def test_the_seeds_of_tasks_stay_inside():
    def draw():
        return random.random(), numpy.random.rand(), float(torch.rand(()))

    def seed():
        random.seed(7)
        numpy.random.seed(7)
        torch.manual_seed(7)

    seed()
    want = draw()
    seed()
    with _seeds([]):
        inside = draw()
    assert draw() == want != inside


@pytest.mark.parametrize("recipe", ["lolcats", "rtn"])
def test_converted_checkpoints_are_scored_as_the_harness_scores_the_loaded_model(
    make_byte_model, plain_folder, tmp_path, recipe
):
    """Linearized and quantized; they generate as well as score."""
    text = tmp_path / "text.txt"
    text.write_text("A dog barks at a cat. " * 200)
    settings = [f"data.dataset={text}", "data.num_samples=4", "data.seq_len=24"]
    settings += ["window_size=8", "transfer.steps=2", "lora.steps=2"] if recipe == "lolcats" else []
    model = make_byte_model(num_attention_heads=2, hidden_size=64, intermediate_size=128)
    out = tmp_path / "out"
    options = Options(output=out, eval_tokens=0, device="cpu")
    convert(open_checkpoint(str(model)), load_recipes(recipe, settings), options, Progress())
    found = run(out, plain_folder, ["arc_easy", "gsm8k"], limit=2)
    assert found["gsm8k"]["num_samples"] == 2
    checkpoint = open_checkpoint(str(out))
    loaded = checkpoint.load_model(checkpoint.compute_dtype("auto"), "cpu")
    lm = HFLM(pretrained=loaded, tokenizer=checkpoint.load_tokenizer())
    task = load_tasks(TaskOptions(("arc_easy",), data_dir=plain_folder)).built["arc_easy"]
    want = lm_eval.simple_evaluate(model=lm, tasks=[task], limit=2)["results"]["arc_easy"]
    assert found["arc_easy"]["metrics"]["acc"] == want["acc,none"]


def test_a_sample_says_what_was_asked_and_answered(model, plain_folder, tmp_path):
    run(model, plain_folder, ["piqa"], tmp_path / "out", limit=1)
    (line,) = (tmp_path / "out" / "samples_tiny_piqa.jsonl").read_text().splitlines()
    sample = json.loads(line)
    assert sample["prompt"] == "Question: How to boil an egg?\nAnswer:"
    assert sample["continuations"] == [" In water.", " In sand."]
    assert sample["target"] == 0
    likelihoods = [answer[0] for answer in sample["responses"]]
    assert sample["metrics"]["acc"] == float(likelihoods[0] > likelihoods[1])


def kit(*arguments):
    return [sys.executable, "-m", "kit.cli", *map(str, arguments)]


def test_on_the_command_line_stdout_is_json_and_an_interrupt_says_how_to_go_on(model, tmp_path):
    data = write(tmp_path / "data", {"gsm8k_test.jsonl": GSM8K * 20, "gsm8k_train.jsonl": GSM8K})
    out = tmp_path / "out"
    command = ["eval", model, "--tasks", "gsm8k", "--data-dir", data, "-o", out, "--num-tokens", 0, "--no-speed"]
    process = subprocess.Popen(kit(*command), stderr=subprocess.PIPE, text=True)
    log = out / f"samples_{model.name}_gsm8k.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and "\n" in log.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("  next:  kit eval")
    assert "--resume" in err
    before = log.read_text().count("\n")
    assert 0 < before < 140
    done = subprocess.run(kit(*command, "-L", before, "--resume", "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "results.json").read_text())
    assert result["rows"][0]["tasks"]["gsm8k"]["num_samples"] == before
    done = subprocess.run(kit(*command), capture_output=True, text=True)
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
