"""Statistics of a model as tables for a terminal: a row a layer, shaded by value, the recommendation last."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kit.convert.stats import SITES, InputStats, LayerStats, ModelStats

BARS = "▁▂▃▄▅▆▇█"
SHADES = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6")  # light to dark; black text is readable on all
MAX_BARS = 32
SITE_NAMES = {"qkv": "q/k/v", "o": "o", "gate_up": "gate/up", "down": "down"}


@dataclass(frozen=True)
class _Column:
    """A figure of each layer.

    Attributes:
        title: its heading.
        value: the figure of a layer; None where it was not measured.
        form: how to write it.
        scale: columns of one scale are shaded together, and get a mean; "" is neither.
    """

    title: str
    value: Callable[[LayerStats], Any]
    form: str = "{:.0%}"
    scale: str = ""


def print_stats(console: Console, stats: ModelStats, recommendation: list[dict[str, Any]]) -> None:
    """Print all tables and the recommendation."""
    s = stats.settings
    console.print(
        f"\n{s['source']}: {s['num_tokens']:,} tokens in {s['rows']} rows, {s['document_starts']} starts of documents, "
        f"seed {s['seed']}, {s['dtype']}, {s['device']}",
        highlight=False,
    )
    for title, columns in (
        ("Residual stream behind each layer", _residual(stats)),
        ("Attention: mean of heads, bars a query head each, 0 to 1", _attention(stats)),
        ("Inputs of linears: share that can go at 20 % output error, and effective rank", _inputs()),
        ("Inputs: kurtosis (Gaussian: 3), error of rounding to FP8. Weights: output error in INT4", _rounding()),
    ):
        if (table := _table(columns, stats.layers)) is not None:
            console.print(Text(f"\n{title}", style="bold"))
            console.print(table)
    for line in _recommendation(recommendation, console.width):
        console.print(line, highlight=False, soft_wrap=True)


def _residual(stats: ModelStats) -> list[_Column]:
    def place(layer: LayerStats) -> str:
        return ", ".join(f"{c['channel']} at {c['position']} {c['token']!r}" for c in layer.residual.channels)

    return [
        _Column("max |h|", lambda layer: layer.residual.largest, "{:,.0f}"),
        _Column("over\nmedian", lambda layer: layer.residual.ratio, "{:,.0f}"),
        _Column("massive\ntokens", lambda layer: layer.residual.massive_tokens, "{:,}"),
        _Column("of them\nfirst", lambda layer: layer.residual.massive_starts, "{:,}"),
        _Column("largest channels: channel at position, token", place, "{}"),
    ]


def _attention(stats: ModelStats) -> list[_Column]:
    return [
        _Column("entropy /\nlog keys", _mean_of_heads("relative_entropy"), scale="entropy"),
        _Column("heads", _bars_of_heads("relative_entropy"), "{}"),
        _Column(f"mass on\nfirst {stats.num_sinks}", _mean_of_heads("sinks"), scale="sinks"),
        _Column("heads", _bars_of_heads("sinks"), "{}"),
        *(
            _Column(f"within\n{size}{f' + {stats.num_sinks}' if sinks else ''}", _window(number, sinks), scale="window")
            for sinks in (False, True)
            for number, size in enumerate(stats.windows)
        ),
    ]


def _inputs() -> list[_Column]:
    return [
        *_by_site("|x|", lambda site: site.droppable["0.2"], scale="sparsity"),
        _Column("CETT\ndown", lambda layer: (layer.inputs["down"].cett or {}).get("0.2"), scale="sparsity"),
        *_by_site("rank", lambda site: site.effective_rank, "{:,.0f}", "rank"),
    ]


def _rounding() -> list[_Column]:
    def error(name: str) -> Callable[[LayerStats], float]:
        return lambda layer: layer.weights[name].int4_output_error

    linears = [name for names in SITES.values() for name in names]
    return [
        *_by_site("kurt.", lambda site: site.kurtosis, "{:,.0f}", "kurtosis"),
        *_by_site("FP8", lambda site: site.fp8_error, "{:.1%}", "fp8"),
        *(
            _Column(f"INT4\n{name.rpartition('.')[2].removesuffix('_proj')}", error(name), "{:.1%}", "int4")
            for name in linears
        ),
    ]


def _by_site(title: str, value: Callable[[InputStats], float], form: str = "{:.0%}", scale: str = "") -> list[_Column]:
    def of(site: str) -> Callable[[LayerStats], float]:
        return lambda layer: value(layer.inputs[site])

    return [_Column(f"{title}\n{SITE_NAMES[site]}", of(site), form, scale) for site in SITES]


def _mean_of_heads(figure: str) -> Callable[[LayerStats], float | None]:
    return lambda layer: _mean(values) if (values := getattr(layer.attention, figure, None)) else None


def _bars_of_heads(figure: str) -> Callable[[LayerStats], str | None]:
    return lambda layer: sparkline(values) if (values := getattr(layer.attention, figure, None)) else None


def _window(number: int, sinks: bool) -> Callable[[LayerStats], float | None]:
    def mean(layer: LayerStats) -> float | None:
        window = layer.attention.windows[number] if layer.attention else None
        masses = window and (window.mass_with_sinks if sinks else window.mass)
        return _mean(masses) if masses else None

    return mean


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, 0 to 1; of more than 32, neighbours share one."""
    width = -(-len(values) // MAX_BARS)
    means = [_mean(values[start : start + width]) for start in range(0, len(values), width)]
    return "".join(BARS[min(int(max(value, 0.0) * len(BARS)), len(BARS) - 1)] for value in means)


def _table(columns: list[_Column], layers: list[LayerStats]) -> Table | None:
    """A row a layer and one of means; columns that nobody measured are left out, and so is a table of none."""
    measured = [(column, [column.value(layer) for layer in layers]) for column in columns]
    measured = [(column, values) for column, values in measured if any(value is not None for value in values)]
    if not measured:
        return None
    spans: dict[str, list[float]] = {}
    for column, values in measured:
        if column.scale:
            spans.setdefault(column.scale, []).extend(value for value in values if value is not None)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("layer", *(column.title for column, _ in measured)):
        table.add_column(title, justify="left" if "position" in title else "right", vertical="bottom", no_wrap=True)
    for row, layer in enumerate(layers):
        table.add_row(
            str(layer.index), *(_cell(values[row], column, spans.get(column.scale)) for column, values in measured)
        )
    if spans:
        table.add_row("mean", *(_mean_cell(column, values) for column, values in measured), style="bold")
    return table


def _cell(value: Any, column: _Column, span: list[float] | None) -> Text:
    if value is None:
        return Text("")
    text = column.form.format(value)
    if not span:
        return Text(text)
    low, high = min(span), max(span)
    shade = SHADES[min(int((value - low) / (high - low or 1) * len(SHADES)), len(SHADES) - 1)]
    return Text(text, style=f"black on {shade}")


def _mean_cell(column: _Column, values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    return column.form.format(_mean(known)) if column.scale else ""


def _recommendation(ranked: list[dict[str, Any]], width: int) -> list[str]:
    lines = [
        "",
        "Recommendation: by each recipe's own score of what it keeps before any training; it ranks, no forecast",
    ]
    if not ranked:
        lines.append("  none: no recipe takes this model, or the figures tell nothing (longer text may)")
    for place, each in enumerate(ranked, start=1):
        reason = f"{place}. {each['recipe']} {each['score']:.2f}: {each['reason']}"
        lines += textwrap.wrap(reason, width - 2, initial_indent="  ", subsequent_indent="     ")
        lines.append(f"     {each['command']}")
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
