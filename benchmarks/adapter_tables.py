"""Tables of what benchmarks/adapters.py wrote: mean ± standard deviation over seeds, in Markdown.

python benchmarks/adapters.py --report test.json more.json
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMOOTH = 10  # updates that a loss is averaged over

Run = dict[str, Any]
Groups = dict[tuple[str, float], list[Run]]  # by method and learning rate, a run a seed


COLUMNS: list[tuple[str, Callable[[Run], float | None], str]] = [
    ("exact", lambda r: r["target"]["exact"], "{:.1%}"),
    ("contains", lambda r: r["target"]["contains"], "{:.1%}"),
    ("nats a token", lambda r: r["target"]["token_log_likelihood"], "{:.3f}"),
    ("form", lambda r: r["target"]["form"] if r["of"]["target"] == "gsm8k" else None, "{:.1%}"),
    ("perplexity", lambda r: r["perplexity"], "{:.2f}"),
    ("KL", lambda r: r.get("preserve", {}).get("kl"), "{:.4f}"),
    ("top-1", lambda r: r.get("preserve", {}).get("top1"), "{:.1%}"),
    ("LAMBADA", lambda r: r.get("lambada"), "{:.1%}"),
    ("NQ", lambda r: r.get("nq", {}).get("contains"), "{:.1%}"),
    ("NQ nats", lambda r: r.get("nq", {}).get("log_likelihood"), "{:.2f}"),
    ("leak", lambda r: r.get("leak", {}).get("mean"), "{:.2%}"),
    ("trained", lambda r: r.get("trained_parameters"), "{:,.0f}"),
]


def read_runs(paths: list[Path]) -> tuple[dict[str, Any], dict[str, Run]]:
    """The settings, and the runs of all files by key; exits if the files' settings differ."""
    settings, runs = None, {}
    for path in paths:
        done = json.loads(path.read_text())
        if settings not in (None, done["settings"]):
            raise SystemExit(f"{path} has other settings than {paths[0]}: {done['settings']}")
        settings = done["settings"]
        runs |= done["runs"]
    assert settings is not None
    return settings, runs


def report(settings: dict[str, Any], runs: dict[str, Run]) -> str:
    """Tables of every target that was run, and on the development split the learning rates to take."""
    parts = []
    for target in dict.fromkeys(run["of"]["target"] for run in runs.values()):
        base = next((run for run in runs.values() if run["of"] == {"target": target}), None)
        groups: Groups = defaultdict(list)
        for run in runs.values():
            if run["of"]["target"] == target and "method" in run["of"]:
                groups[run["of"]["method"], run["of"]["learning_rate"]].append(run)
        if base and groups:
            parts += [f"**{target}**, split {settings['split']}\n", *_table(base, groups), ""]
        if settings["split"] == "dev":
            parts += [f"{target}: --learning-rate {method}={rate:g}" for method, rate in best_rates(groups).items()]
    about = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    parts.append(
        f"{settings['model']}, {settings['device']}; {settings['steps']} updates of {settings['batch_size']} rows of "
        f"{settings['window']} tokens; {about}"
    )
    return "\n".join(parts)


def best_rates(groups: Groups) -> dict[str, float]:
    """By method the learning rate after which the target's right answers are likeliest."""
    found: dict[str, tuple[float, float]] = {}
    for (method, rate), runs in groups.items():
        likely = statistics.mean(run["target"]["token_log_likelihood"] for run in runs)
        found[method] = max(found.get(method, (-math.inf, rate)), (likely, rate))
    return {method: rate for method, (_, rate) in found.items()}


def _table(base: Run, groups: Groups) -> list[str]:
    """What was learned, what was kept, what it cost; beside LoRA at its learning rate that learns most."""
    rates = best_rates(groups)
    lora = groups.get(("lora", rates.get("lora", 0.0)), [])
    everything = [base, *(run for runs in groups.values() for run in runs)]
    columns = [column for column in COLUMNS if any(column[1](run) is not None for run in everything)]
    titles = ["method", "seeds", *(title for title, _, _ in columns), "loss lost", "of LoRA's", "updates to its loss"]
    rows = [["base", "", *(shown([read(base)], form) for _, read, form in columns), "", "", ""]]
    for (method, rate), runs in sorted(groups.items(), key=lambda group: list(rates).index(group[0][0])):
        measured = [shown([read(run) for run in runs], form) for _, read, form in columns]
        rows.append([f"{method}, {rate:g}", str(len(runs)), *measured, *_beside(lora, base, runs)])
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _beside(lora: list[Run], base: Run, runs: list[Run]) -> tuple[str, str, str]:
    """The loss that was lost on the preserve set (nats a token), its share of LoRA's, and the updates to LoRA's loss.

    The latter is the mean of LoRA's last ten updates with the same seed, which saw the same rows in the same order.
    """
    lost, theirs = ([math.log(run["perplexity"] / base["perplexity"]) for run in some] for some in (runs, lora))
    share = f"{statistics.mean(lost) / statistics.mean(theirs):.0%}" if lora and statistics.mean(theirs) > 0 else ""
    levels = {run["of"]["seed"]: statistics.mean(run["losses"][-SMOOTH:]) for run in lora}
    reached = [steps_to(run["losses"], levels[seed]) for run in runs if (seed := run["of"]["seed"]) in levels]
    updates = "not by all" if None in reached else shown(reached, "{:.0f}")
    return shown(lost, "{:.4f}"), share, updates


def steps_to(losses: list[float], level: float) -> int | None:
    """The first update after which the loss, averaged over ten, is no more than a level."""
    span = min(SMOOTH, len(losses))
    for end in range(span, len(losses) + 1):
        if statistics.mean(losses[end - span : end]) <= level:
            return end
    return None


def shown(values: list[Any], form: str) -> str:
    """Mean ± standard deviation; nothing if a value is missing."""
    if not values or None in values:
        return ""
    text = form.format(statistics.mean(values))
    return f"{text} ± {form.format(statistics.stdev(values))}" if len(set(values)) > 1 else text
