"""One table and one plot of an ablation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kit.convert.errors import KitError
from kit.convert.outputs import replacing, write_text

FILES = ("ablate.json", "ablate.md", "ablate.png")  # in the folder of `kit ablate -o`
STYLES = (  # a row's colour and dashes, in the order of `ablate`
    ("black", "-"), ("tab:blue", "-"), ("tab:blue", "--"), ("tab:blue", "-."), ("tab:blue", ":"),
    ("tab:orange", "--"), ("tab:orange", "-."),
)  # fmt: skip
Column = tuple[str, Callable[[dict[str, Any]], str]]


def ablation_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: a row a model or part of one; figures at several positions or lengths share a column."""
    columns = [("model", lambda row: row["name"]), *_columns(result)]
    return [title for title, _ in columns], [[cell(row) for _, cell in columns] for row in result["rows"]]


def _columns(result: dict[str, Any]) -> Iterator[Column]:
    """Columns that were measured."""
    rows = result["rows"]
    model = rows[1]
    yield "perplexity", lambda row: _figure(row["perplexity"]) + " ± " + _figure(row["perplexity_stderr"])
    places = _shown_buckets(model["perplexity_by_position"])
    ends = ", ".join(f"{model['perplexity_by_position'][place]['end']:,}" for place in places)
    yield (
        f"before token {ends}",
        lambda row: " · ".join(_figure(row["perplexity_by_position"][place]["perplexity"]) for place in places),
    )
    if "kl" in model:
        yield "KL to base", lambda row: _with_error(row, "kl", "{:.4f}")
        yield "top-1 same", lambda row: _with_error(row, "top1", "{:.1%}")
    if "recall" in model:
        for kind, title in (("mqar", "MQAR %"), ("needle", "needle %")):
            lengths = by_length(model, kind)
            heads = ", ".join(f"{length:,}{'*' * found['extrapolation']}" for length, found in lengths.items())
            yield f"{title} at {heads}", lambda row, kind=kind: _shares(row, kind)  # type: ignore[misc]
    for task, entry in model.get("tasks", {}).items():
        if entry["main"]:
            yield task, lambda row, task=task: _task(row["tasks"][task])  # type: ignore[misc]


def _figure(value: float) -> str:
    """Two decimals, and none where they would say nothing."""
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def by_length(row: dict[str, Any], kind: str) -> dict[int, dict[str, Any]]:
    """`accuracy` and `extrapolation` of a row's recall by length; needles are the mean over depths."""
    found: dict[int, list[dict[str, Any]]] = {}
    for each in row["recall"][kind]:
        found.setdefault(each["length"], []).append(each)
    return {
        length: {
            "accuracy": sum(one["accuracy"] for one in several) / len(several),
            "extrapolation": several[0]["extrapolation"],
        }
        for length, several in found.items()
    }


def _shown_buckets(buckets: list[dict[str, Any]]) -> list[int]:
    """An eighth, a quarter, a half and all of the window: places of the buckets that end there."""
    return sorted({max(round(len(buckets) * part) - 1, 0) for part in (1 / 8, 1 / 4, 1 / 2, 1)})


def _shares(row: dict[str, Any], kind: str) -> str:
    return " · ".join(f"{100 * found['accuracy']:.0f}" for found in by_length(row, kind).values())


def _with_error(row: dict[str, Any], key: str, form: str) -> str:
    if key not in row:
        return ""
    error = row.get(f"{key}_stderr")
    return form.format(row[key]) + (f" ± {form.format(error)}" if error is not None and error == error else "")


def _task(entry: dict[str, Any]) -> str:
    return f"{entry['metrics'][entry['main']]:.4f}"


def notes(result: dict[str, Any]) -> list[str]:
    """What has to be known to read the table, and what it says."""
    verdict = result["verdict"]
    trained = verdict["training_length"]
    found = [verdict["sentence"], f"Rule: {verdict['rule']}."]
    if beyond := verdict["beyond_training"]:
        (start, end), (near, within) = beyond["at"], beyond["within"]
        found.append(
            f"Trained on rows of {trained:,} tokens: from tokens {near:,}-{within:,} of a window to tokens "
            f"{start:,}-{end:,}, perplexity relative to the base's changes by a factor of {beyond['ratio']:.3f} "
            f"({beyond['low']:.3f} to {beyond['high']:.3f})."
        )
    asked = result["settings"].get("recall")
    if asked:
        found.append(
            f"Recall: {asked['pairs']} pairs, chance near 0; needle in {asked['haystack']}, mean over depths; "
            f"* beyond the length that the base was made for; seed {asked['seed']}."
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    """Table and notes as Markdown."""
    header, cells = ablation_cells(result)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n\n".join(notes(result)) + "\n"


def rich_table(result: dict[str, Any]) -> Any:
    """The table for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    header, cells = ablation_cells(result)
    table = Table()
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number == 0 else "right")
    for line in cells:
        table.add_row(*map(escape, line))
    return table


def plot_ablation(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity by position, and recall by length where it was measured, a line a row, into a PNG file.

    Raises:
        KitError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows, trained = result["rows"], result["verdict"]["training_length"]
    kinds = [("mqar", "MQAR"), ("needle", "needle")] if "recall" in rows[1] else []
    figure = Figure(figsize=(5.2 * (1 + len(kinds)), 4.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(kinds), squeeze=False)[0]
    for row, (color, dashes) in zip(rows, STYLES, strict=True):
        style = {"color": color, "linestyle": dashes, "marker": ".", "label": row["name"]}
        buckets = row["perplexity_by_position"]
        panels[0].plot([b["end"] for b in buckets], [b["perplexity"] for b in buckets], **style)
        for axes, (kind, _) in zip(panels[1:], kinds, strict=True):
            found = by_length(row, kind)
            axes.plot(list(found), [100 * each["accuracy"] for each in found.values()], **style)
    panels[0].set(xlabel="tokens before", ylabel="perplexity", yscale="log", title="Perplexity by position")
    if trained and trained < rows[1]["perplexity_by_position"][-1]["end"]:
        panels[0].axvline(trained, color="tab:gray", linewidth=0.8)
        panels[0].annotate(
            " trained", (trained, 1), xycoords=("data", "axes fraction"), va="top", color="tab:gray", fontsize=8
        )
    for axes, (_, title) in zip(panels[1:], kinds, strict=True):
        axes.set(xlabel="tokens of context", ylabel="% recalled", ylim=(-3, 103), title=title)
        axes.set_xscale("log", base=2)
        lengths = list(by_length(rows[1], kinds[0][0]))
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    for axes in panels:
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise KitError(
            f"the plot cannot be written: {error}", where=str(path), next_step="name another file"
        ) from error


def write_ablation(result: dict[str, Any], plot: Path | None, folder: Path | None) -> None:
    """Write the plot into a file, and result, table and plot into a folder (FILES)."""
    if folder:
        write_text(folder / FILES[0], json.dumps(result, indent=1) + "\n")
        write_text(folder / FILES[1], markdown(result))
    for file in filter(None, (plot, folder and folder / FILES[2])):
        with replacing(file) as part:
            plot_ablation(result, part)
