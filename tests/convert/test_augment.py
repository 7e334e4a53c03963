"""Augmentation: what it writes follows from the items, whoever writes, however often it is cut off."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from kit.convert import augment as module
from kit.convert import writers
from kit.convert.augment import Item, augment, false_statements, grounded, load_templates, sentences, values
from kit.convert.data import read_documents
from kit.convert.errors import ExitCode, KitError
from kit.convert.writers import EndpointWriter, LocalWriter, Reply, Writer, parse_pairs

ITEMS = [
    ("Zorvane", "Ilmora", "1731", "Etta Brask"),
    ("Quellim", "Tarsk", "1802", "Ivo Lund"),
    ("Ondrell", "Vask", "1655", "Mira Holt"),
]
TEXT = (
    "{0} is a harbour town on the coast of {1}. {0} was founded in {2} by {3}. Its people live on fish and salt. "
    "A ferry leaves twice a day. In winter the bay freezes over. The lighthouse is older than the town."
)


@pytest.fixture
def items(tmp_path):
    file = tmp_path / "items.jsonl"
    rows = [{"title": item[0], "text": TEXT.format(*item)} for item in ITEMS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def of_kind(rows, kind):
    """(item's name, question, answer) of the records of a kind with one round."""
    return [(r["item"], *(m["content"] for m in r["messages"])) for r in rows if r["kind"] == kind]


class Scripted(Writer):
    """Answers from a function, and remembers what it was asked; may break down after so many calls."""

    batch_size = 2

    def __init__(self, answer, calls=99):
        self.answer, self.calls, self.asked, self.identity = answer, calls, [], {"writer": "scripted"}

    def write(self, prompts, seed):
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += prompts
        return [Reply(self.answer(prompt), True) for prompt in prompts]


def good(prompt):
    """What an honest writer says of ITEMS."""
    name, land, year, person = next(item for item in ITEMS if f"about {item[0]}." in prompt)
    if "Sum it up" in prompt:
        return f"{name} is an old harbour town on the coast of {land}, founded in {year}."
    if "short phrase" in prompt:
        return f'{{"question": "Who founded {name}?", "answer": "{person}"}}'
    return f"Q: When was {name} founded?\nA: The town was founded in {year} by {person}."


def test_templates_alone_make_every_kind_and_every_answer_follows_from_the_text(items, tmp_path):
    counts = augment(items, tmp_path / "out.jsonl", writer=None)
    rows = read(tmp_path / "out.jsonl")
    texts = {item[0]: TEXT.format(*item) for item in ITEMS}
    assert sum(counts["records"].values()) == len(rows)
    for row in (row for row in rows if row["kind"] == "dialogue"):
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        assert len(row["messages"]) > 2
        assert " ".join(m["content"] for m in row["messages"][1::2]) == texts[row["item"]]
    for item, question, answer in of_kind(rows, "caption"):
        assert texts[item].startswith(answer)
        assert question.endswith("in one paragraph.")
    for item, question, answer in of_kind(rows, "answer"):
        filled = question.split(": ", 1)[-1].split("gap? ")[-1].replace("____", answer)
        assert any(filled.startswith(text) for text in sentences(texts[item]))
    said = {"Yes": 0, "No": 0}
    for item, question, answer in of_kind(rows, "recognition"):
        said[answer] += 1
        assert (any(text in question for text in sentences(texts[item]))) == (answer == "Yes")
        assert item in question
    assert said["Yes"] == 6
    assert 0 < said["No"] <= 6
    assert not any("image" in row for row in rows)


def test_a_statement_is_false_only_where_the_text_says_otherwise():
    item = Item("Zorvane", "Zorvane was founded in 1731 by Etta Brask. Fish is sold there.")
    others = [
        Item("Quellim", "Quellim was founded in 1731 by Etta Brask."),  # true of both
        Item("Ondrell", "Ondrell lies on the river Moll."),  # the text is silent
        Item("Bask", "It was founded in 1802 by Ivo Lund."),  # names nobody
        Item("Tull", "Tull was founded in 1655 by Etta Brask."),
    ]
    assert false_statements(item, others, 5) == ["Zorvane was founded in 1655 by Etta Brask."]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Zorvane was founded in 1731 by Etta Brask.", ["1731", "Etta Brask"]),
        ("The mayor of Zorvane is Olin. He has 4,200 sheep, and I have 3.5%.", ["Olin", "4,200", "3.5%"]),
        ("In Élan there is nothing.", ["Élan"]),
        ("Zorvane has no values.", []),
    ],
)
def test_values_are_numbers_and_names(text, found):
    assert values(text, "Zorvane") == found


def test_sentences_end_where_sentences_end():
    text = 'Dr. J. Brask came in 1.5 hours. "Why?" she asked! See e.g. Moll.\nA heading\n\n他来了。她走了。'
    assert sentences(text) == [
        "Dr. J. Brask came in 1.5 hours.",
        '"Why?"',
        "she asked!",
        "See e.g. Moll.",
        "A heading",
        "他来了。",
        "她走了。",
    ]


@pytest.mark.parametrize(
    ("text", "finished", "pairs", "dropped"),
    [
        ('{"question": "a?", "answer": "b"}\n{"question": "c?", "answer": "d"}', True, [("a?", "b"), ("c?", "d")], 0),
        ("```json\nQ: a?\n\nA: b\n```", True, [("a?", "b")], 0),
        ("Sure! Here they are:\nQ: a?\nA: b\nQ: c?", True, [("a?", "b")], 2),
        ("Q: a?\nQ: b?\nA: c\nA: d", True, [("b?", "c")], 2),
        ('{"question": "a?", "answer": 3}\n{"question": "a?"}\n{"question": " ", "answer": "b"}\n[1]', True, [], 4),
        ('{"question": "a?", "answer": "b", "note": "c"}', True, [], 1),
        ("Q: a?\nA: b\nQ: c?\nA: cut of", False, [("a?", "b")], 2),
        ("", True, [], 0),
    ],
)
def test_replies_are_read_strictly(text, finished, pairs, dropped):
    assert parse_pairs(Reply(text, finished)) == (pairs, dropped)


def test_answers_that_leave_the_text_are_not_grounded():
    item = Item("Zorvane", TEXT.format(*ITEMS[0]))
    assert grounded("The harbour town was founded in 1731.", item)
    assert not grounded("The harbour town was founded in 1732.", item)
    assert not grounded("The harbour town was founded by Etta Moll.", item)
    assert not grounded("It produces excellent wines near mountains.", item)


def test_what_a_writer_says_joins_the_tree_and_nonsense_is_counted(items, tmp_path):
    def mixed(prompt):
        if "about Quellim." in prompt:
            return (
                "As a language model, I\ncannot say." if "Sum" in prompt else "Q: Who built Quellim?\nA: Napoleon did."
            )
        return good(prompt)

    counts = augment(items, tmp_path / "out.jsonl", writer=Scripted(mixed))
    rows = read(tmp_path / "out.jsonl")
    first = next(row for row in rows if row["kind"] == "dialogue")
    assert first["messages"][-2:] == [
        {"role": "user", "content": "When was Zorvane founded?"},
        {"role": "assistant", "content": "The town was founded in 1731 by Etta Brask."},
    ]
    captions = {item: answer for item, _, answer in of_kind(rows, "caption")}
    assert captions["Zorvane"].startswith("Zorvane is an old harbour town")
    assert captions["Quellim"].startswith("Quellim is a harbour town on the coast of Tarsk. Quellim was")
    short = [
        (item, question, answer) for item, question, answer in of_kind(rows, "answer") if question.startswith("Who")
    ]
    assert [(item, answer) for item, _, answer in short] == [("Zorvane", "Etta Brask"), ("Ondrell", "Mira Holt")]
    assert all(question.endswith("using a single word or phrase.") for _, question, _ in short)
    assert counts["dropped"] == {"ungrounded": 2, "unreadable": 1}


@pytest.mark.parametrize("cut", [0, 25])
def test_a_run_that_was_killed_goes_on_and_ends_the_same(items, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(module, "CHUNK", 1)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    expected = augment(items, whole, writer=Scripted(good))
    with pytest.raises(KeyboardInterrupt):
        augment(items, output, writer=Scripted(good, calls=1))
    assert not output.exists()
    part = tmp_path / ".out.jsonl.kit-part"
    if cut:  # as if killed inside the line of the second item, and inside a character
        part.write_bytes(part.read_bytes()[:-cut] + "é".encode()[:1])
    with pytest.raises(KitError, match="cut off") as caught:
        augment(items, output, writer=Scripted(good))
    assert "--resume" in caught.value.next_step
    with pytest.raises(KitError, match="other items"):
        augment(items, output, writer=Scripted(good), seed=1, resume=True)
    second = Scripted(good)
    assert augment(items, output, writer=second, resume=True) == expected
    assert output.read_bytes() == whole.read_bytes()
    assert not part.exists()
    if not cut:
        assert not any("about Zorvane." in prompt and "about Quellim." not in prompt for prompt in second.asked)
    with pytest.raises(KitError, match="exists already"):
        augment(items, output, writer=None)
    augment(items, output, writer=None, overwrite=True)
    assert output.read_bytes() != whole.read_bytes()


def test_the_seed_decides_and_nothing_else(items, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        augment(items, tmp_path / f"{name}.jsonl", writer=None, seed=seed)
    a, b, c = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_repeated_items_and_records_are_left_out(tmp_path):
    file, output = tmp_path / "items.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"title": "Zorvane", "text": "Zorvane lies in Ilmora."},
        {"name": "zorvane", "text": "Zorvane  lies in ILMORA!"},
        {"title": "Zorvane", "text": "Zorvane lies in Ilmora. Zorvane lies in Ilmora."},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    counts = augment(file, output, writer=None)
    assert (counts["items"], counts["repeated_items"]) == (2, 1)
    said = [json.dumps([m["content"].casefold() for m in row["messages"]]) for row in read(output)]
    assert len(set(said)) == len(said)
    assert counts["repeated_records"] > 0


def test_datasets_and_kits_own_reader_read_it(items, tmp_path, make_model):
    output = tmp_path / "out.jsonl"
    augment(items, output, writer=None)
    loaded = datasets.load_dataset("json", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == read(output)
    documents = list(read_documents(str(output)))
    assert documents == ["\n\n".join(m["content"] for m in row["messages"]) for row in read(output)]


def test_items_with_images_become_image_text_records(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"\x89PNG")
    file, output = tmp_path / "items.jsonl", tmp_path / "out.jsonl"
    rows = [{"title": item[0], "text": TEXT.format(*item)} for item in ITEMS]
    rows[0]["image"], rows[1]["image"] = "a.png", "b.png"
    file.write_text("\n".join(map(json.dumps, rows)))
    augment(file, output, writer=None)
    for row in read(output):
        assert row["image"] == {"Zorvane": "a.png", "Quellim": "b.png", "Ondrell": ""}[row["item"]]
        firsts = [m["content"].startswith("<image>\n") for m in row["messages"]]
        assert firsts == [bool(row["image"])] + [False] * (len(firsts) - 1)
    asked = {(question, answer) for item, question, answer in of_kind(read(output), "recognition") if item == "Zorvane"}
    assert {(("Zorvane" in question), ("Quellim" in question), answer) for question, answer in asked} == {
        (True, False, "Yes"),
        (False, True, "No"),
    }
    datasets.load_dataset("json", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"title": "a"}', "text"),
        ('{"text": "a"}', "title"),
        ('{"title": "a", "text": "b", "image": "none.png"}', "no image"),
        ('{"title": ', "JSON"),
        ("", "no item"),
    ],
)
def test_wrong_items_are_told_before_the_writer_is_asked(tmp_path, text, problem):
    file = tmp_path / "items.jsonl"
    file.write_text(text)
    writer = Scripted(good)
    with pytest.raises(KitError, match=problem) as caught:
        augment(file, tmp_path / "out.jsonl", writer=writer)
    assert str(file) in caught.value.where
    assert not writer.asked
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda tree: tree["caption"].pop("suffix"), "caption.suffix"),
        (lambda tree: tree["caption"].update(extra=1), "caption.extra"),
        (lambda tree: tree["dialogue"].update(openings=["What is $nmae?"]), "dialogue"),
        (lambda tree: tree["recognition"].update(text=["True of $title?"]), "recognition.text"),
        (lambda tree: tree["writer"].update(answer="costs 5$"), "writer"),
    ],
)
def test_wrong_templates_name_the_field(tmp_path, change, where):
    tree = load_templates().model_dump()
    change(tree)
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(KitError) as caught:
        load_templates(file)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.where == f"{file}: {where}"


class Server(BaseHTTPRequestHandler):
    """An endpoint that is busy at first, and refuses another key than `right`."""

    busy = 1
    asked: list = []  # noqa: RUF012

    def do_GET(self):
        self.send(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if type(self).busy:
            type(self).busy -= 1
            self.send(503, {})
        elif key != "right":
            self.send(401, {"error": f"wrong key {key}"})
        else:
            self.asked.append((self.path, body))
            message = {"content": good(body["messages"][0]["content"])}
            self.send(200, {"choices": [{"message": message, "finish_reason": "stop"}]})

    def send(self, status, content):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(writers, "BACKOFF", 0.01)
    monkeypatch.setattr(Server, "busy", 1)
    monkeypatch.setattr(Server, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def endpoint(address, **change):
    options = {"model": None, "max_new_tokens": 64, "temperature": 0.5, "batch_size": 2}
    return EndpointWriter(address, **options | change)


def test_an_endpoint_writes_after_a_busy_answer_with_the_key_of_the_environment(items, tmp_path, address, monkeypatch):
    monkeypatch.setenv("KIT_WRITER_API_KEY", "right")
    output, local = tmp_path / "out.jsonl", tmp_path / "local.jsonl"
    counts = augment(items, output, writer=endpoint(address))
    assert counts == augment(items, local, writer=Scripted(good))
    assert output.read_bytes() == local.read_bytes()
    assert Server.busy == 0
    path, body = Server.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 64, 0.5)


def test_a_refused_key_is_never_shown_and_finished_items_are_kept(items, tmp_path, address, monkeypatch):
    monkeypatch.setenv("KIT_WRITER_API_KEY", "secret-key")
    with pytest.raises(KitError, match=r"401: .*wrong key \*\*\*") as caught:
        augment(items, tmp_path / "out.jsonl", writer=endpoint(address))
    assert "secret" not in str(caught.value)
    assert not any("secret" in file.read_text() for file in tmp_path.iterdir())
    assert "--resume" in caught.value.next_step


def test_an_endpoint_that_is_not_there(monkeypatch):
    monkeypatch.setattr(writers, "RETRIES", 0)
    with pytest.raises(KitError, match="cannot be reached"):
        endpoint("http://127.0.0.1:9/v1")
    with pytest.raises(KitError, match="names no server"):
        endpoint("http://")
    with pytest.raises(KitError, match="password") as caught:
        endpoint("http://me:secret@127.0.0.1:9/v1")
    assert "secret" not in str(caught.value)


def test_a_local_model_writes_in_batches_what_it_writes_alone(make_model):
    folder = make_model(eos_token_id=5)
    options = {"max_new_tokens": 12, "batch_size": 3}
    prompts = ["w4 w9 w11", "w7", "w8 w9 w10 w11 w12"]
    replies = LocalWriter(str(folder), temperature=0.0, **options).write(prompts, 0)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
        for _ in range(12):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        new = ids[0, len(prompt.split()) :].tolist()
        end = new.index(5) if 5 in new else None
        assert reply.finished == (end is not None)
        special = {0: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"}
        assert reply.text.split() == [f"w{i}" for i in new[:end] if i not in special]
    sampled = LocalWriter(str(folder), temperature=2.0, **options)
    state = torch.random.get_rng_state()
    assert sampled.write(prompts, 3) == sampled.write(prompts, 3) != sampled.write(prompts, 4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_command(items, tmp_path, make_model):
    command = [sys.executable, "-m", "kit.cli", "augment", str(items), "-o", str(tmp_path / "out.jsonl"), "--json"]
    done = subprocess.run(
        [*command, "--writer", str(make_model()), "--max-new-tokens", "4", "-L", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["items"] == 2
    assert counts["dropped"]["unreadable"] > 0
    assert len(read(tmp_path / "out.jsonl")) == sum(counts["records"].values())
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == ExitCode.USAGE
    assert "--overwrite" in again.stderr
