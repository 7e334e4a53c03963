"""Values that know where they come from: what a report shows can be checked against its sources to the last digit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from markupsafe import escape

# How what is shown follows from where it stands, by the name that the report's `data-op` carries. (`key` is no function
# of the value: the last step of the address itself is shown.)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "change": lambda before, after: after / before - 1,
    "less": lambda before, after: 1 - after / before,
    "same": lambda *values: values[0] if len(set(values)) == 1 else math.nan,
    "name": lambda path: path.rstrip("/").split("/")[-1],
}


@dataclass(frozen=True)
class Node:
    """A value inside a JSON document, with its address.

    Attributes:
        value: what stands there.
        at: document and JSON pointer as a URI fragment (RFC 6901, section 6): `kit_report.json#/cost/seconds`.
    """

    value: Any
    at: str

    @classmethod
    def document(cls, name: str, value: Any) -> Node:
        """The root of a document."""
        return cls(value, quote(name) + "#")

    def __getitem__(self, key: str | int) -> Node:
        step = str(key).replace("~", "~0").replace("/", "~1")
        return Node(self.value[key], f"{self.at}/{quote(step, safe='')}")

    def get(self, *keys: str) -> Node | None:
        """The value under keys, one inside the other; None where one is missing or holds null."""
        node = self
        for key in keys:
            if not isinstance(node.value, dict) or node.value.get(key) is None:
                return None
            node = node[key]
        return node

    def __iter__(self) -> Iterator[Node]:
        return (self[index] for index in range(len(self.value)))

    def items(self) -> Iterator[tuple[str, Node]]:
        """Keys and values of an object."""
        return ((key, self[key]) for key in self.value)

    @property
    def is_number(self) -> bool:
        """Whether it is a finite number."""
        return isinstance(self.value, int | float) and not isinstance(self.value, bool) and math.isfinite(self.value)


@dataclass(frozen=True)
class Figure:
    """A number as shown.

    Attributes:
        text: rounded, with its unit.
        value: in full.
        at: where it stands, or where what it follows from stands, separated by spaces.
        op: the operation of `OPERATIONS` that it follows by; empty where it stands there itself.
    """

    text: str
    value: float
    at: str
    op: str = ""

    def __str__(self) -> str:
        return self.text

    def __html__(self) -> str:
        return f'<data {self.attributes}title="{escape(self.value)}">{escape(self.text)}</data>'

    @property
    def attributes(self) -> str:
        """The HTML attributes that let a reader check it."""
        op = f'data-op="{escape(self.op)}" ' if self.op else ""
        return f'value="{escape(repr(self.value))}" data-at="{escape(self.at)}" {op}'


@dataclass(frozen=True)
class Text:
    """A text of a document, shown as it stands there, or as an operation makes it."""

    text: str
    at: str
    op: str = ""

    def __str__(self) -> str:
        return self.text

    def __html__(self) -> str:
        op = f' data-op="{escape(self.op)}"' if self.op else ""
        return f'<span data-at="{escape(self.at)}"{op}>{escape(self.text)}</span>'


def figure(node: Node, form: Callable[[float], str]) -> Figure:
    """A number of a document, as `form` writes it."""
    return Figure(form(node.value), node.value, node.at)


def derived(op: str, nodes: list[Node], form: Callable[[float], str]) -> Figure:
    """A number that follows from others."""
    value = OPERATIONS[op](*(node.value for node in nodes))
    return Figure(form(value), value, " ".join(node.at for node in nodes), op)


def text(node: Node) -> Text:
    """A text of a document."""
    return Text(node.value, node.at)


def short_name(node: Node) -> Text:
    """The last part of a path or hub id."""
    return Text(OPERATIONS["name"](node.value), node.at, "name")


def plain(node: Node) -> Figure | Text:
    """A value of any kind, as it stands: numbers in full with thousands set apart."""
    value = node.value
    if node.is_number:
        return figure(node, general)
    text = value if isinstance(value, str) else "none" if value is None else str(value)
    return Text(text, node.at)


def fixed(places: int) -> Callable[[float], str]:
    """So many decimals, thousands set apart, with a real minus sign."""
    return lambda value: f"{value:,.{places}f}".replace("-", "−")


def rate(value: float) -> str:
    """A speed: one decimal, or three digits where it is small."""
    return fixed(1)(value) if value >= 10 else f"{value:#.3g}"


def percent(value: float) -> str:
    """A share, such as 91.2 %."""
    return f"{value:.1%}".replace("%", " %").replace("-", "−")


def signed_percent(value: float) -> str:
    """A change, such as +19.6 %."""
    return f"{value:+.1%}".replace("%", " %").replace("-", "−")


def signed(value: float) -> str:
    """A difference, four digits."""
    return f"{value:+.4g}".replace("-", "−")


def general(value: float) -> str:
    """Whole numbers in full, others with four digits."""
    text = f"{value:,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return text.removesuffix(".0").replace("-", "−")


def brief(value: float) -> str:
    """A tick of an axis: millions and more with a letter."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {letter}".replace("-", "−")
    return general(value)


def size(value: float) -> str:
    """Bytes on disk, in powers of 1,000."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:,.1f} {unit}"
    return f"{value:,.0f} B"


def memory(value: float) -> str:
    """Bytes of memory, in GiB as the other tables have it."""
    return f"{value / 2**30:.2f} GiB"


def whole_bytes(value: float) -> str:
    """Bytes in full."""
    return f"{value:,.0f} B"
