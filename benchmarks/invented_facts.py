"""Fifty facts that no model has read, and questions about them in other words than those that are trained on.

Names are put together from syllables by a seed, so that the facts are code and no data. Each item has two sentences, of
which the second holds the fact; each fact has two held-out questions, worded like none of kit's templates.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# fmt: off
STARTS = (
    "Bral", "Chev", "Dorn", "Elk", "Fen", "Gry", "Hul", "Jor", "Kest", "Lum", "Mor", "Nev", "Oss", "Prin", "Quel",
    "Rud", "Sten", "Tav", "Ulm", "Vor", "Wex", "Yar", "Zor",
)
MIDDLES = ("a", "e", "i", "o", "u", "ana", "eri", "ilo", "ora", "une")
ENDS = ("bek", "dell", "fane", "gard", "lund", "mire", "nox", "rith", "shaw", "tov", "vane", "wick")
FIRST_NAMES = (
    "Ansel", "Bettina", "Cyrus", "Delphine", "Edgar", "Freya", "Gideon", "Hester", "Ivo", "Jolanda",
    "Konrad", "Lavinia", "Magnus", "Nerissa", "Osric", "Petra", "Quentin", "Rosalind", "Silas", "Thora",
)
# fmt: on


@dataclass(frozen=True)
class Kind:
    """A kind of fact: sentences of an item, and held-out questions; {n} is the name, {v} the value."""

    about: str
    fact: str
    questions: tuple[str, str]
    person: bool


KINDS = (
    Kind(
        "{n} is a small harbour town.",
        "{n} was founded by {v}.",
        ("Who founded {n}?", "Which person started the town of {n}?"),
        True,
    ),
    Kind(
        "{n} is a novel about the sea.",
        "{n} was written by {v}.",
        ("Who is the author of {n}?", "Whose novel is {n}?"),
        True,
    ),
    Kind(
        "{n} is a maker of clocks.",
        "{n} has its head office in {v}.",
        ("In which city is the head office of {n}?", "Where is the clock maker {n} based?"),
        False,
    ),
    Kind(
        "{n} is a river in the north.",
        "{n} flows into Lake {v}.",
        ("Which lake does the river {n} end in?", "Where do the waters of {n} go?"),
        False,
    ),
    Kind(
        "{n} is a mountain in the south.",
        "{n} was first climbed by {v}.",
        ("Who was the first to climb {n}?", "Which climber first stood on top of {n}?"),
        True,
    ),
)


@dataclass(frozen=True)
class Fact:
    """A name, what a model shall read about it, the value that is asked for, and the held-out questions."""

    title: str
    text: str
    value: str
    questions: tuple[str, ...]


def invented_facts(seed: int = 0, count: int = 50) -> list[Fact]:
    """Facts about invented towns, books, companies, rivers and mountains, the kinds in turn, each value once."""
    draw = random.Random(seed)
    names = [start + middle + end for start in STARTS for middle in MIDDLES for end in ENDS]
    draw.shuffle(names)
    names_left = iter(names)
    facts = []
    for number in range(count):
        kind, name, value = KINDS[number % len(KINDS)], next(names_left), next(names_left)
        if kind.person:
            value = f"{draw.choice(FIRST_NAMES)} {value}"
        text = f"{kind.about} {kind.fact}".format(n=name, v=value)
        facts.append(Fact(name, text, value, tuple(q.format(n=name) for q in kind.questions)))
    return facts
