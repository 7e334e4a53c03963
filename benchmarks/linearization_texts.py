"""Training texts for linearization: sampled from the model, or such as need recall.

    python benchmarks/linearization_texts.py sample smollm2 SELF.jsonl --documents 512 --tokens 1024
    python benchmarks/linearization_texts.py recall TEXTS RECALL.jsonl --documents 600

`recall` writes documents of ordinary text in which passages come again, word for word, and statements about made-up
names with numbers are asked for again further on: what a model of the text can only predict by looking back.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from kit.convert.data import read_documents

THINGS = ("harbour", "engine", "garden", "letter", "station", "market", "bridge", "camera", "valley", "theatre")
KINDS = ("code", "price", "number", "weight", "key", "address")
PASSAGE = (40, 160)  # words of a passage that comes again
FACTS = 6  # statements a document


def sample(model: str, documents: int, tokens: int, seed: int) -> list[str]:
    """Texts of so many tokens, sampled from a model at temperature 1."""
    import torch

    from kit.convert.checkpoint import open_checkpoint
    from kit.convert.data import sample_from_model
    from kit.convert.pipeline import resolve_device

    device = resolve_device("auto")
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.load_tokenizer()
    base = checkpoint.load_model(torch.bfloat16 if device != "cpu" else torch.float32, device)
    rows = sample_from_model(base, tokenizer, documents, tokens, seed, batch_size=documents)
    return [tokenizer.decode(row) for row in rows.input_ids]


def recall_text(words: list[str], draw: random.Random, length: int) -> str:
    """One document of about so many words.

    Args:
        words: of ordinary text to draw passages from.
        draw: random numbers.
        length: words.
    """
    facts = [
        f"The {draw.choice(KINDS)} of the {draw.choice(THINGS)} in {_name(draw)} is {draw.randrange(100, 100_000)}."
        for _ in range(FACTS)
    ]
    parts: list[str] = []
    fresh: list[str] = []
    asked = facts.copy()
    draw.shuffle(asked)
    while sum(len(part.split()) for part in parts) < length:
        at, size = draw.randrange(max(len(words) - PASSAGE[1], 1)), draw.randint(*PASSAGE)
        again = len(fresh) > 1 and draw.random() < 0.5
        passage = fresh.pop(draw.randrange(len(fresh) - 1)) if again else " ".join(words[at : at + size])
        fresh += [] if again else [passage]
        parts.append(passage)
        if facts:
            parts.append(facts.pop())
        elif asked and draw.random() < 0.5:
            parts.append(asked.pop())
    return " ".join(parts + facts + asked)


def _name(draw: random.Random) -> str:
    return "".join(draw.choice("bdfklmnprstv") + draw.choice("aeiou") for _ in range(3)).capitalize()


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("sample", "recall"))
    parser.add_argument("source", help="A model, or texts.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.kind == "sample":
        texts = sample(options.source, options.documents, options.tokens, options.seed)
    else:
        draw = random.Random(options.seed)
        words = " ".join(read_documents(options.source)).split()
        texts = [
            recall_text(words, draw, draw.randint(options.tokens // 4, options.tokens))
            for _ in range(options.documents)
        ]
    part = options.output.with_suffix(".part")
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    part.replace(options.output)


if __name__ == "__main__":
    main()
