"""Tables for a terminal that stand below the main one: by position, recall, continuations, comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kit.convert.report import table_cells


def print_details(console: Console, result: dict[str, Any]) -> None:
    """Print what the rows of an evaluation hold beside single figures, and the continuations under one another."""
    rows, settings = result["rows"], result["settings"]
    tables = (
        position_table(rows),
        recall_table(rows, settings),
        generations_table(rows, settings),
        retention_table(rows, settings),
    )
    for table in filter(None, tables):
        console.print(table)
    with_texts = [row for row in rows if row.get("generations")]
    for number in range(min((len(row["generations"]["samples"]) for row in with_texts), default=0)):
        prompt = with_texts[0]["generations"]["samples"][number]["prompt"]
        console.print(f"\n[bold]Prompt {number + 1}[/bold] {escape(prompt)}", highlight=False)
        for row in with_texts:
            text = row["generations"]["samples"][number]["text"]
            console.print(f"[bold]{escape(row['name'])}:[/bold] {escape(text)}", highlight=False)


def compared_table(rows: list[dict[str, Any]], comparisons: list[dict[str, Any]]) -> Table:
    """The evaluation table with the weights' bytes, perplexities marked that differ from the first row's."""
    header, cells = table_cells(rows)
    differ = {
        found["a"]
        for found in comparisons
        if found["metric"] == "perplexity" and found["b"] == rows[0]["name"] and found["significant"]
    }
    for line, row in zip(cells, rows, strict=True):
        if row["name"] in differ:
            line[header.index("perplexity")] += " *"
        line.append(f"{row['bytes'] / 2**20:,.1f} MiB" if "bytes" in row else "")
    return _table(None, [*header, "weights"], cells)


def plain_table(header: list[str], cells: list[list[str]]) -> Table:
    """A table of given cells, without a title."""
    return _table(None, header, cells)


def position_table(rows: list[dict[str, Any]]) -> Table | None:
    """Perplexity by how many tokens of the window stand before a token, a row a model."""
    rows = [row for row in rows if row.get("perplexity_by_position")]
    if not rows:
        return None
    buckets = [f"{b['start']}-{b['end'] - 1}" for b in rows[0]["perplexity_by_position"]]
    cells = ([row["name"], *(f"{b['perplexity']:.2f}" for b in row["perplexity_by_position"])] for row in rows)
    return _table("Perplexity by position in the window", ["model", *buckets], cells)


def recall_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Table | None:
    """Accuracy of associative recall and of the needle by depth, a row a model and length."""
    rows = [row for row in rows if row.get("recall")]
    if not rows:
        return None
    depths = list(dict.fromkeys(found["depth"] for row in rows for found in row["recall"]["needle"]))

    def cells() -> Iterator[list[str]]:
        for row in rows:
            needles = {(found["length"], found["depth"]): found["accuracy"] for found in row["recall"]["needle"]}
            for found in row["recall"]["mqar"]:
                length = found["length"]
                yield [
                    row["name"],
                    f"{length:,}{' (extrapolation)' if found['extrapolation'] else ''}",
                    f"{found['accuracy']:.0%} ± {found['stderr']:.0%}",
                    *(f"{needles[length, depth]:.0%}" for depth in depths),
                ]

    asked = settings["recall"]
    title = f"Recall: {asked['pairs']} pairs; needle in {asked['haystack']}; seed {asked['seed']}"
    return _table(title, ["model", "tokens", "MQAR", *(f"needle at {depth:.0%}" for depth in depths)], cells())


def generations_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Table | None:
    """How much the continuations repeat, a row a model."""
    rows = [row for row in rows if row.get("generations")]
    if not rows:
        return None
    cells = ([row["name"], *(f"{row['generations'][key]:.1%}" for key in ("repetition", "degenerate"))] for row in rows)
    asked = settings["generations"]
    title = (
        f"Greedy continuations, up to {asked['new_tokens']} tokens of {asked['prompts']} prompts from {asked['from']}"
    )
    return _table(title, ["model", "4-grams repeated", "loop or empty"], cells)


def retention_table(rows: list[dict[str, Any]], settings: dict[str, Any]) -> Table | None:
    """What was learned and what was kept, a row a model; columns that nobody measured are left out."""
    rows = [row for row in rows if "retention" in row]
    if not rows:
        return None

    def error(found: dict[str, Any], key: str, form: str) -> str:
        if key not in found:
            return ""
        text = form.format(found[key])
        known = found.get(f"{key}_stderr")
        return text + (f" ± {form.format(known)}" if known is not None and known == known else "")

    columns: dict[str, list[str]] = {}
    for key, title, form in (
        ("exact", "exact", "{:.1%}"),
        ("contains", "contains", "{:.1%}"),
        ("log_likelihood", "nats of the answer", "{:.2f}"),
    ):
        columns[title] = [error(row["retention"]["target"], key, form) for row in rows]
    columns["perplexity"] = [error(row, "perplexity", "{:.2f}") for row in rows]
    for key, title, form in (("kl", "KL to base", "{:.4f}"), ("top1", "top-1 same", "{:.1%}")):
        columns[title] = [error(row["retention"].get("preserve", {}), key, form) for row in rows]
    for task in rows[0].get("tasks", {}):
        columns[task] = []
        for row in rows:
            entry = row["tasks"][task]
            value = entry["metrics"].get(entry["main"]) if entry["main"] else None
            columns[task].append("" if value is None else f"{value:.4f}")
    leaks = [row["retention"].get("leak") for row in rows]
    columns["leak"] = [f"{leak['mean']:.2%} (chance {leak['chance']:.2%})" if leak else "" for leak in leaks]
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    about = settings["retention"]
    kept = f", kept: {settings['dataset']}, KL on {about['preserve_tokens']:,} tokens" if settings["dataset"] else ""
    title = f"Learned: {about['questions']} questions of {about['target']}{kept}"
    lines = ([row["name"], *cells] for row, *cells in zip(rows, *columns.values(), strict=True))
    return _table(title, ["model", *columns], lines)


def comparison_table(comparisons: list[dict[str, Any]]) -> Table | None:
    """Differences with their intervals, the significant ones marked."""
    if not comparisons:
        return None
    cells = (
        [
            found["metric"],
            f"{found['a']} - {found['b']}",
            f"{found['difference']:+.3f}{' *' if found['significant'] else '  '}",
            f"{found['low']:+.3f} to {found['high']:+.3f}",
            str(found["samples"]),
        ]
        for found in comparisons
    )
    title = "Differences (* significant: the 95 % interval by paired bootstrap leaves out 0, of six samples or more)"
    return _table(title, ["metric", "models", "difference", "95 % interval", "samples"], cells, left=2)


def _table(title: str | None, header: list[str], rows: Any, left: int = 1) -> Table:
    """A table with its first columns to the left."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
