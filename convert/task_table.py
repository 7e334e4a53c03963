"""The table of task scores: a line a metric, a column a model, and the mean over tasks."""

from __future__ import annotations

import math
from typing import Any


def task_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, with the harness's four digits; `*` marks the metric of a task that the mean is over."""
    rows = [row for row in rows if "tasks" in row]
    lines = []
    for task, entry in (rows[0]["tasks"] if rows else {}).items():
        for metric in entry["metrics"]:
            if "_stderr" not in metric:
                star = " *" if metric == entry["main"] and is_accuracy(metric) else ""
                shown = (_figure(row["tasks"][task]["metrics"], metric) for row in rows)
                lines.append([task, str(entry["num_fewshot"]), str(entry["num_samples"]), metric + star, *shown])
    means = [mean_over_tasks(row["tasks"]) for row in rows]
    if means and means[0]:
        shown = (f"{mean[0]:.4f} ± {mean[1]:.4f}" if mean else "" for mean in means)
        lines.append([f"mean of {means[0][2]}", "", "", "*", *shown])
    return ["task", "shots", "samples", "metric", *(row["name"] for row in rows)], lines


def mean_over_tasks(tasks: dict[str, dict[str, Any]]) -> tuple[float, float, int] | None:
    """Mean of the tasks' main accuracies, its standard error, and of how many; None with fewer than two.

    Tasks count alike, and their errors are independent: sqrt(Σ stderr²) / n. Perplexities are left out.
    """
    found = [entry for entry in tasks.values() if entry["main"] and is_accuracy(entry["main"])]
    if len(found) < 2:
        return None
    errors = [entry["metrics"].get(stderr_key(entry["main"]), math.nan) for entry in found]
    mean = sum(entry["metrics"][entry["main"]] for entry in found) / len(found)
    return mean, math.sqrt(sum(error**2 for error in errors)) / len(found), len(found)


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share of right answers."""
    return metric.startswith(("acc", "exact_match"))


def stderr_key(metric: str) -> str:
    """The harness's name of a metric's standard error."""
    name, comma, filter_name = metric.partition(",")
    return f"{name}_stderr{comma}{filter_name}"


def _figure(metrics: dict[str, float], metric: str) -> str:
    error = metrics.get(stderr_key(metric))
    return f"{metrics[metric]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def rich_task_table(rows: list[dict[str, Any]]) -> Any:
    """The table for a terminal."""
    from rich.table import Table

    header, lines = task_cells(rows)
    table = Table()
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number in (0, 3) else "right")
    last = ""
    for line in lines:
        if line[0].startswith("mean of"):
            table.add_section()
        table.add_row(*([""] * 3 + line[3:] if line[0] == last else line))
        last = line[0]
    return table


def tasks_line(settings: dict[str, Any]) -> str:
    """One line that says how the tasks were scored."""
    parts = [f"tasks: lm-evaluation-harness {settings['lm_eval']}"]
    if settings["data"]:
        parts.append("data: " + ", ".join(settings["data"]))
    if settings["limit"]:
        parts.append(f"the first {settings['limit']} samples of each (of a group: of each subtask)")
    return "; ".join([*parts, *settings["notes"], "± standard error over samples"])
