"""Data: every kind of file becomes the same documents, packing loses nothing, sampling is repeatable."""

import gzip
import hashlib
import itertools
import json
import random
import subprocess
import sys

import pydantic
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kit.convert.data import (
    DataConfig,
    TokenRows,
    TrainDataConfig,
    load_rows,
    pack,
    perplexity_windows,
    read_documents,
    sample_from_model,
)
from kit.convert.errors import KitError

SPECIAL = ["<unk>", "<s>", "</s>", "<reserved>"]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
WORDS = [f"w{i}" for i in range(40)]
CONVERSATION = "<user>ask</s>\n<assistant>tell</s>"


def make_tokenizer(template=None, bos=False):
    """One token a word; `<reserved>` is special without being one of the tokenizer's named tokens."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in SPECIAL])
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, model_max_length=16, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEMPLATE)


@pytest.fixture(scope="module")
def model():
    """More rows in the embedding than words in the tokenizer, as padded vocabularies have."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
    return LlamaForCausalLM(config).eval()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_words(path, documents=20, length=30):
    """Rows of `length` words each."""
    return write_rows(path, [{"text": " ".join(random.Random(i).choices(WORDS, k=length))} for i in range(documents)])


def slow_pack(documents, seq_len, eos, seed):
    """The specification of packing, a token at a time: (id, position, starts a document) of every token."""
    documents = [ids + ([eos] if eos is not None and ids[-1] != eos else []) for ids in documents if ids]
    if len(documents) == 1:
        only = documents[0]
        documents = [only[i : i + seq_len] for i in range(0, len(only) - seq_len + 1, seq_len)]
    random.Random(seed).shuffle(documents)
    tokens, position = [], 0
    for ids in documents:
        position = 0
        for number, token in enumerate(ids):
            if len(tokens) % seq_len == 0:
                position = 0
            tokens.append((token, position, number == 0))
            position += 1
    return tokens


@pytest.mark.parametrize("seed", range(25))
def test_packing_equals_the_slow_truth(seed):
    draw = random.Random(seed)
    eos = draw.choice([None, 2])
    count, seq_len, num_rows = draw.choice([1, 2, 15]), draw.randint(2, 9), draw.randint(1, 12)
    documents = [[draw.randint(2, 30) for _ in range(draw.randint(count == 1 and 20, 25))] for _ in range(count)]
    documents += [[5] * seq_len] if not any(documents) else []
    expected = slow_pack(documents, seq_len, eos, seed)
    rows = min(len(expected) // seq_len, num_rows)
    if not rows:
        with pytest.raises(KitError, match=f"tokens, and one row needs {seq_len}"):
            pack(documents, seq_len, num_rows, "documents", eos, seed)
        return
    packed = pack(documents, seq_len, num_rows, "documents", eos, seed)
    kept = expected[: rows * seq_len]
    assert packed.input_ids.shape == packed.position_ids.shape == (rows, seq_len)
    assert packed.input_ids.dtype == packed.position_ids.dtype == torch.long
    assert packed.input_ids.flatten().tolist() == [token for token, _, _ in kept]
    assert packed.position_ids.flatten().tolist() == [position for _, position, _ in kept]
    assert packed.labels.flatten().tolist() == [-100 if position == 0 else token for token, position, _ in kept]
    assert packed.num_documents == (1 if sum(map(bool, documents)) == 1 else sum(start for _, _, start in kept))
    assert packed.sha256 == hashlib.sha256(packed.input_ids.numpy().tobytes()).hexdigest()

    concat = pack(documents, seq_len, num_rows, "concat", eos, seed)
    assert torch.equal(concat.input_ids, packed.input_ids)
    assert concat.position_ids.tolist() == [list(range(seq_len))] * rows
    assert (concat.labels == -100).sum() == rows


def test_packing_by_hand():
    packed = pack([[7, 8, 9, 2], [], [4]], 3, 10, "documents", 2, seed=1)
    assert packed.input_ids.tolist() in ([[7, 8, 9], [2, 4, 2]], [[4, 2, 7], [8, 9, 2]])
    assert packed.position_ids.tolist() in ([[0, 1, 2], [0, 0, 1]], [[0, 1, 0], [0, 1, 2]])
    assert (packed.num_tokens, packed.num_documents) == (6, 2)


def test_packed_documents_do_not_see_each_other(model):
    """The positions are what transformers takes for packed sequences: logits equal those of each document alone."""
    packed = pack([[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]], 12, 1, "documents", None, seed=0)
    together = model(packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits[0]
    starts = [*(packed.position_ids[0] == 0).nonzero().flatten().tolist(), 12]
    for start, end in itertools.pairwise(starts):
        alone = model(packed.input_ids[:, start:end], use_cache=False).logits[0]
        torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-5)


def test_the_seed_fixes_the_order(tmp_path, tokenizer):
    config = DataConfig(dataset=write_words(tmp_path / "a.jsonl"), num_samples=4, seq_len=25)
    first, again, other = (load_rows(config, tokenizer, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.sha256 == again.sha256 != other.sha256
    summary = {"source": "a.jsonl", "rows": 4, "seq_len": 25, "num_tokens": 100, "num_documents": 4}
    assert first.summary() == {**summary, "sha256": first.sha256}


def test_less_text_than_asked_for(tmp_path, tokenizer):
    path = write_words(tmp_path / "a.jsonl", documents=2, length=30)
    assert load_rows(DataConfig(dataset=path, num_samples=50, seq_len=20), tokenizer, seed=0).input_ids.shape == (3, 20)
    with pytest.raises(KitError, match="holds 62 tokens, and one row needs 63") as caught:
        load_rows(DataConfig(dataset=path, num_samples=1, seq_len=63), tokenizer, seed=0)
    assert caught.value.where == path


def test_documents_start_with_bos_where_the_tokenizer_puts_one(tmp_path):
    tokenizer = make_tokenizer("<s> {{ messages[0].content }}", bos=True)
    path = write_rows(tmp_path / "a.jsonl", [{"text": "w1 w2"}, {"prompt": "w1 w2", "response": ""}, {"text": ""}])
    rows = load_rows(DataConfig(dataset=path, num_samples=2, seq_len=4), tokenizer, seed=0)
    assert rows.input_ids.tolist() == [[1, 5, 6, 2]] * 2


def test_text_file_is_joined_as_gptq_papers_join_wikitext(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = Title = \n \n One line . \u2028 still \n\n last", encoding="utf-8")
    with open(path, encoding="utf-8") as lines:
        rows = [line if line.strip() else "" for line in lines]
    assert list(read_documents(str(path))) == ["\n\n".join(rows)]


def test_a_single_text_gives_windows_of_it(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(random.Random(0).choices(WORDS, k=50)))
    rows = load_rows(DataConfig(dataset=str(path), num_samples=9, seq_len=8), tokenizer, seed=0)
    windows = perplexity_windows(next(read_documents(str(path))), tokenizer, 8)
    assert sorted(rows.input_ids.tolist()) == sorted(windows.tolist())
    assert rows.input_ids.tolist() != windows.tolist()
    assert rows.num_documents == 1


CHATS = [
    {"messages": [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]},
    {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]},
    {"instruction": "ask", "input": "", "output": "tell"},
    {"instruction": "ask", "response": "tell", "category": "x"},
    {"prompt": "ask", "response": "tell"},
    {"prompt": "ask", "completion": "tell"},
    {"question": "ask", "answer": "tell"},
]


@pytest.mark.parametrize("row", CHATS)
def test_conversations_go_through_the_chat_template(tmp_path, tokenizer, row):
    path = write_rows(tmp_path / "a.jsonl", [row])
    for chat in (None, True):
        assert list(read_documents(path, tokenizer=tokenizer, chat=chat)) == [CONVERSATION]
    assert list(read_documents(path, tokenizer=tokenizer, chat=False)) == ["ask\n\ntell"]
    assert list(read_documents(path, tokenizer=make_tokenizer())) == list(read_documents(path)) == ["ask\n\ntell"]


def test_rows_with_more_than_the_question(tmp_path, tokenizer):
    rows = [
        {"instruction": "ask", "input": "about this", "output": ""},
        {"instruction": "ask", "context": "about this", "response": None},
        {"text": "plain", "instruction": "ask", "output": "tell"},
        {"text": None, "messages": CHATS[0]["messages"]},
        {"content": "2020-01-01"},
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    asked = "<user>ask\n\nabout this</s>\n<assistant></s>"
    documents = list(read_documents(path, tokenizer=tokenizer))
    assert documents == [asked, asked, "plain", CONVERSATION, "2020-01-01"]


def test_every_kind_of_file_gives_the_same_documents(tmp_path):
    from datasets import Dataset

    texts = ["one\u2028two\nthree", "", "café"]
    rows = [{"text": text} for text in texts]
    paths = [tmp_path / name for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz", "e.parquet", "f.v1.JSONL")]
    write_rows(paths[0], rows)
    paths[1].write_text(json.dumps(rows, indent=1))
    paths[2].write_text(paths[0].read_text(encoding="utf-8"), encoding="utf-8")
    paths[3].write_bytes(gzip.compress(paths[0].read_bytes()))
    Dataset.from_list(rows).to_parquet(str(paths[4]))
    paths[5].write_bytes(b"\xef\xbb\xbf\r\n" + paths[0].read_bytes())
    for path in paths:
        assert list(read_documents(str(path))) == texts, path
    folder = tmp_path / "folder"
    (folder / "train").mkdir(parents=True)
    (folder / ".cache").mkdir()
    write_rows(folder / ".cache" / "x.jsonl", [{"text": "hidden"}])
    write_rows(folder / "train" / "b.jsonl", [{"text": "second"}])
    (folder / "a.txt").write_text("first")
    (folder / "README.md").write_text("not data")
    assert list(read_documents(str(folder))) == ["first", "second"]


BROKEN = {
    "missing.jsonl": (None, "no such file or folder"),
    "data.csv": (b"text\nx", r"'.csv' files are not understood"),
    "data": (b"x", "files without an ending"),
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\n", "holds no text"),
    "empty.jsonl": (b"\n", "holds no text"),
    "blank.jsonl": (b'{"text": " "}\n', "holds no text"),
    "latin.txt": (b"caf\xe9", "not UTF-8"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "not UTF-8"),
    "line.jsonl": (b'{"text": "a"}\n\n{"text": \n', "not JSON"),
    "list.jsonl": (b"[1]\n", "JSON object"),
    "list.json": (b"[1]", "JSON object"),
    "broken.json": (b'[{"text": "a"},', "not JSON"),
    "plain.jsonl.gz": (b'{"text": "a"}', "gzip"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 100)[:-12], "before the end-of-stream"),
    "broken.parquet": (b"PAR1", "cannot be read"),
    "columns.jsonl": (b'{"query": "q", "gold": 1}', "columns are not understood: query, gold"),
    "turns.jsonl": (b'{"messages": ["a"]}', "no list of role and content"),
    "type.jsonl": (b'{"question": ["q", "r"], "answer": "a"}', "column 'question' holds a list"),
    "number.jsonl": (b'{"text": 3}', "column 'text' holds a int"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_say_what_and_where(tmp_path, name):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(KitError, match=message) as caught:
        list(read_documents(str(tmp_path / name)))
    assert caught.value.where.startswith(str(tmp_path / name))
    assert caught.value.next_step
    if name == "line.jsonl":
        assert caught.value.where.endswith("line 3")


def test_errors_name_what_is_understood_or_near(tmp_path):
    with pytest.raises(KitError) as caught:
        list(read_documents(write_rows(tmp_path / "train.jsonl", [{"query": "q"}])))
    assert all(word in caught.value.next_step for word in ("text", "messages", "instruction", "answer"))
    with pytest.raises(KitError, match=r"did you mean 'train\.jsonl'"):
        list(read_documents(str(tmp_path / "trian.jsonl")))
    (tmp_path / "none").mkdir()
    with pytest.raises(KitError, match="folder holds no"):
        list(read_documents(str(tmp_path / "none")))


def test_chat_that_cannot_be(tmp_path, tokenizer):
    chats, plain = write_rows(tmp_path / "a.jsonl", CHATS[:1]), write_rows(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(KitError, match="no chat template"):
        list(read_documents(chats, tokenizer=make_tokenizer(), chat=True))
    with pytest.raises(KitError, match="needs conversations"):
        list(read_documents(plain, tokenizer=tokenizer, chat=True))
    strict = make_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(KitError, match=r"refuses a row: .*roles must alternate"):
        list(read_documents(chats, tokenizer=strict))


def test_hub_data_sets(monkeypatch, tokenizer):
    calls = []

    def loaded(name, **options):
        calls.append((name, options))
        if name != "org/set":
            raise ConnectionError("Couldn't reach the Hub\nlong story")
        return ({"text": f"w{i} w{i}"} for i in range(8))

    monkeypatch.setattr("datasets.load_dataset", loaded)
    rows = load_rows(DataConfig(dataset="org/set", split="test", num_samples=2, seq_len=6), tokenizer, seed=0)
    assert (rows.source, rows.num_documents) == ("org/set (test)", 4)
    assert calls == [("org/set", {"split": "test", "streaming": True})]
    with pytest.raises(KitError, match=r"the hub gave: ConnectionError: Couldn't reach the Hub\n  where"):
        list(read_documents("org/other"))
    for path in ("./org/set", "/org/set", "a/b/c", "~/set", "set.jsonl", "a set"):
        with pytest.raises(KitError, match="no such file or folder"):
            list(read_documents(path))
    assert len(calls) == 2


def test_a_big_data_set_is_not_read_to_its_end(monkeypatch, tokenizer):
    def endless(name, **options):
        while True:
            yield {"text": " ".join(WORDS)}

    monkeypatch.setattr("datasets.load_dataset", endless)
    monkeypatch.setattr("kit.convert.data.POOL_CHARACTERS", 100)
    rows = load_rows(DataConfig(dataset="org/set", num_samples=2, seq_len=60), tokenizer, seed=0)
    assert rows.input_ids.shape == (2, 60)


def test_config_refuses_what_it_does_not_know():
    for bad in ({"rows": 3}, {"packing": "none"}, {"num_samples": 0}, {"seq_len": 1}):
        with pytest.raises(pydantic.ValidationError):
            DataConfig(**bad)
    assert all(field.description for field in DataConfig.model_fields.values())


def test_text_sampled_from_the_model(model, tokenizer):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    config = DataConfig(num_samples=5, seq_len=17)
    rows = load_rows(config, tokenizer, seed=1, model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(rows, TokenRows)
    assert rows.input_ids.shape == (5, 17)
    assert rows.input_ids.dtype == torch.long
    assert rows.position_ids.tolist() == [list(range(17))] * 5
    assert rows.num_documents == 5
    assert int(rows.input_ids.min()) >= len(SPECIAL)
    assert int(rows.input_ids.max()) < len(tokenizer)
    assert torch.equal(load_rows(config, tokenizer, seed=1, model=model).input_ids, rows.input_ids)
    assert not torch.equal(load_rows(config, tokenizer, seed=2, model=model).input_ids, rows.input_ids)
    with pytest.raises(KitError, match="has to be loaded"):
        load_rows(config, tokenizer, seed=1)


def test_sampled_rows_do_not_depend_on_the_batch(model, tokenizer):
    rows = [sample_from_model(model, tokenizer, 5, 12, 0, batch_size=size).input_ids for size in (1, 2, 5, 32)]
    assert all(torch.equal(rows[0], other) for other in rows[1:])


def test_sampling_follows_the_model_distribution(model, tokenizer):
    """Second tokens after one first token are as frequent as the model says."""
    rows = sample_from_model(model, tokenizer, 20_000, 2, 0, batch_size=20_000).input_ids
    firsts = torch.bincount(rows[:, 0], minlength=64) / len(rows)
    assert firsts[: len(SPECIAL)].sum() == 0
    torch.testing.assert_close(firsts[len(SPECIAL) : len(tokenizer)], torch.full((40,), 1 / 40), atol=0.006, rtol=0)
    with torch.no_grad():
        logits = model(torch.arange(64)[:, None]).logits[:, 0]
    logits[:, : len(SPECIAL)] = logits[:, len(tokenizer) :] = -torch.inf
    expected = firsts @ logits.softmax(-1)
    found = torch.bincount(rows[:, 1], minlength=64) / len(rows)
    assert expected.max() > 2 * expected[len(SPECIAL) : len(tokenizer)].mean()
    torch.testing.assert_close(found, expected, atol=0.012, rtol=0)


def test_sampling_leaves_each_module_in_its_mode(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    try:
        sample_from_model(model, tokenizer, 2, 4, 0)
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_a_model_that_gives_nan_is_an_error(tokenizer):
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=64, num_attention_heads=1)
    broken = LlamaForCausalLM(config).eval()
    broken.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(KitError, match="not finite"):
        sample_from_model(broken, tokenizer, 2, 4, 0)


def test_perplexity_windows(caplog):
    tokenizer = make_tokenizer(bos=True)
    words = random.Random(0).choices(WORDS, k=23)
    ids = tokenizer.convert_tokens_to_ids(words)
    windows = perplexity_windows(" ".join(words), tokenizer, 5)
    assert windows.dtype == torch.long
    assert windows.tolist() == [ids[i : i + 5] for i in range(0, 20, 5)]
    assert perplexity_windows(" ".join(words), tokenizer, 5, max_windows=2).tolist() == windows[:2].tolist()
    assert perplexity_windows(" ".join(words), tokenizer).tolist() == [ids]
    assert not caplog.records
    with pytest.raises(KitError, match="needs two tokens, the text has 1"):
        perplexity_windows("w1", tokenizer)


def test_import_is_light():
    code = "import sys, kit.convert.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def learned_text(rows, tokenizer):
    """The learned words of each row."""
    return [tokenizer.decode(ids[labels != -100]) for ids, labels in zip(rows.input_ids, rows.labels, strict=True)]


def train_rows(path, tokenizer, **change):
    options = {"dataset": str(path), "seq_len": 16} | change
    return load_rows(TrainDataConfig(**options), tokenizer, seed=0)


CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": " w3 w1 "},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4"},
]


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (None, "w3 w1 w4 </s>"),
        ("{% for m in messages %} {{ m.role }} {{ m.content }} </s>\n{% endfor %}", "w3 w1 </s> w4 </s>"),
        ("{% for m in messages %} {{ m.role }} {{ m.content | trim }} </s>\n{% endfor %}", "w3 w1 </s> w4 </s>"),
        # as Qwen3's: the last answer is written in another way than those before it
        (
            "{% for m in messages %}{{ m.role }} {% if loop.last %}w9 w9 {% endif %}{{ m.content }} </s>\n{% endfor %}",
            "w3 w1 </s> w4 </s>",
        ),
    ],
)
def test_of_a_conversation_the_answers_are_learned_and_that_they_end(template, learned, tmp_path):
    tokenizer = make_tokenizer(template)
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    rows = train_rows(path, tokenizer)
    assert learned_text(rows, tokenizer) == [learned]
    everything = train_rows(path, tokenizer, loss_on="all")
    assert torch.equal(everything.input_ids, rows.input_ids)
    length = [*(rows.position_ids[0] == 0).nonzero().flatten().tolist(), 16][1]  # the rest is padding
    assert (everything.labels[0] != -100).tolist() == [0 < place < length for place in range(16)]
    assert rows.summary()["learned_tokens"] == len(learned.split())


def test_text_is_learned_whole_and_a_conversation_without_answers_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    rows = train_rows(write_rows(tmp_path / "text.jsonl", [{"text": "w1 w2 w3"}]), tokenizer)
    assert learned_text(rows, tokenizer) == ["w2 w3 </s>"]  # nothing stands before w1
    path = write_rows(tmp_path / "asked.jsonl", [{"messages": CHAT[:1]}])
    with pytest.raises(KitError, match="there is an answer to learn"):
        train_rows(path, make_tokenizer(TEMPLATE))


def test_of_several_answers_the_first_is_taken(tmp_path):
    path = write_rows(tmp_path / "nq.jsonl", [{"question": "w1", "answer": ["w2", "w3"]}])
    assert list(read_documents(path)) == ["w1\n\nw2"]


def test_a_template_that_changes_answers_is_refused(tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    upper = make_tokenizer("{% for m in messages %}{{ m.content | replace('w', 'v') }} {% endfor %}")
    with pytest.raises(KitError, match="changes the answers"):
        train_rows(path, upper)


def test_no_answer_loses_its_prompt_and_nothing_else_is_learned(tmp_path):
    """Every document stands in one row, whole; what is learned is the answers and the closing token, each once."""
    tokenizer = make_tokenizer()
    draw = random.Random(0)
    data = [
        {"prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 6))), "answer": f"w{i} " * draw.randint(1, 5)}
        for i in range(40)
    ]
    rows = train_rows(write_rows(tmp_path / "qa.jsonl", data), tokenizer)
    found = []
    for ids, positions, labels in zip(rows.input_ids, rows.position_ids, rows.labels, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            learned = labels[start:end] != -100
            if learned.any():
                assert learned.tolist() == sorted(learned.tolist())  # the answer is the end
                found.append((tokenizer.decode(ids[start:end]), tokenizer.decode(ids[start:end][learned])))
            else:
                assert set(ids[start:end].tolist()) == {tokenizer.eos_token_id}  # padding
    expected = [(f"{row['prompt']} {row['answer']}</s>", f"{row['answer']}</s>") for row in data]
    assert sorted(found) == sorted(expected)
    tokens = sum(len(text.split()) for text, _ in expected)
    assert tokens / rows.input_ids.numel() > 0.85  # best fit wastes little
    assert rows.num_documents == len(data)


def test_rows_of_training_are_limited_and_long_documents_are_cut(tmp_path):
    tokenizer = make_tokenizer()
    rows = train_rows(write_words(tmp_path / "text.jsonl", documents=3, length=40), tokenizer, num_samples=2)
    assert rows.input_ids.shape == (2, 16)
    long = [{"prompt": "w1 " * 20, "answer": "w2"}]
    rows = train_rows(write_rows(tmp_path / "long.jsonl", long), tokenizer)
    assert learned_text(rows, tokenizer) == ["w2 </s>"]


def test_other_packings_keep_what_is_learned(tmp_path):
    tokenizer = make_tokenizer()
    data = [{"prompt": "w1 w1 w1", "answer": "w2 w2"}] * 8
    rows = train_rows(write_rows(tmp_path / "qa.jsonl", data), tokenizer, packing="concat", seq_len=6)
    assert rows.input_ids.shape == (8, 6)
    assert learned_text(rows, tokenizer) == ["w2 w2 </s>"] * 8


def test_words_of_several_tokens_are_learned_whole(tmp_path):
    """By a byte-level tokenizer: characters of several tokens, spaces that belong to a word's token."""
    from tokenizers import decoders

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    from tokenizers.trainers import BpeTrainer

    trainer = BpeTrainer(vocab_size=280, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(["the answer is"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>", pad_token="</s>")
    path = write_rows(tmp_path / "qa.jsonl", [{"prompt": "what 漢字 is it?", "answer": "the 漢字 answer…"}])
    rows = train_rows(path, tokenizer, seq_len=64)
    assert learned_text(rows, tokenizer) == ["the 漢字 answer…</s>"]
