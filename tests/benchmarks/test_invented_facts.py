"""The benchmark's facts: each once, taught by augmentation, and asked for in words that were not taught."""

import json

from kit.convert.augment import augment, normalised


def test_facts_are_taught_and_their_questions_held_out(script, tmp_path):
    invented_facts = script("invented_facts").invented_facts
    facts = invented_facts()
    assert [vars(fact) for fact in facts] == [vars(fact) for fact in invented_facts()]
    assert len({fact.title for fact in facts} | {fact.value for fact in facts}) == 100
    items, taught = tmp_path / "items.jsonl", tmp_path / "taught.jsonl"
    items.write_text("".join(json.dumps({"title": f.title, "text": f.text}) + "\n" for f in facts))
    counts = augment(items, taught, writer=None)
    assert counts["records"]["recognition"] > 150  # false statements too: the kinds have one form each
    rows = [json.loads(line)["messages"] for line in taught.read_text().splitlines()]
    asked = {normalised(m["content"]) for messages in rows for m in messages if m["role"] == "user"}
    answers = [m["content"] for messages in rows for m in messages if m["role"] == "assistant"]
    for fact in facts:
        assert not any(normalised(question) in said for question in fact.questions for said in asked)
        assert {fact.value, f"Lake {fact.value}"} & set(answers)
