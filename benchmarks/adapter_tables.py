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


def grouped(runs: dict[str, Run], split: str, target: str) -> Groups:
    """A split's and target's runs that came to an end, by method and learning rate."""
    groups: Groups = defaultdict(list)
    for run in runs.values():
        of = run["of"]
        if (of["split"], of["target"]) == (split, target) and "seed" in of and "target" in run:
            groups[of["method"], of["learning_rate"]].append(run)
    return groups


def report(settings: dict[str, Any], runs: dict[str, Run]) -> str:
    """Tables of every split and target that was run, and on the development split the learning rates to take."""
    parts = []
    for split, target in dict.fromkeys((run["of"]["split"], run["of"]["target"]) for run in runs.values()):
        base = next((r for r in runs.values() if r["of"] == {"split": split, "target": target, "method": "base"}), None)
        groups = grouped(runs, split, target)
        if base and groups:
            parts += [f"**{target}**, split {split}\n", *_table(base, groups), ""]
        if split == "dev":
            parts += [f"{target}: --learning-rate {method}={rate:g}" for method, rate in best_rates(groups).items()]
            parts += [""]
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
    own = ["loss lost", "of LoRA's", "updates to its loss", "at the same rate"]
    titles = ["method", "seeds", *(title for title, _, _ in columns), *own]
    rows = [["base", "", *(shown([read(base)], form) for _, read, form in columns), *[""] * len(own)]]
    for (method, rate), runs in sorted(groups.items(), key=lambda group: (list(rates).index(group[0][0]), group[0][1])):
        measured = [shown([read(run) for run in runs], form) for _, read, form in columns]
        lost, share = _lost(lora, base, runs)
        updates = [updates_to_loss_of(loras, runs) for loras in (lora, groups.get(("lora", rate), []))]
        rows.append([f"{method}, {rate:g}", str(len(runs)), *measured, lost, share, *updates])
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _lost(lora: list[Run], base: Run, runs: list[Run]) -> tuple[str, str]:
    """The loss that was lost on the preserve set (nats a token), and its share of LoRA's."""
    lost, theirs = ([math.log(run["perplexity"] / base["perplexity"]) for run in some] for some in (runs, lora))
    share = f"{statistics.mean(lost) / statistics.mean(theirs):.0%}" if lora and statistics.mean(theirs) > 0 else ""
    return shown(lost, "{:.4f}"), share


def updates_to_loss_of(lora: list[Run], runs: list[Run]) -> str:
    """The updates to LoRA's loss: the mean of its last ten with the same seed (same rows, same order)."""
    levels = {run["of"]["seed"]: statistics.mean(run["losses"][-SMOOTH:]) for run in lora}
    reached = [steps_to(run["losses"], levels[seed]) for run in runs if (seed := run["of"]["seed"]) in levels]
    return "not by all" if None in reached else shown(reached, "{:.0f}")


def steps_to(losses: list[float], level: float) -> int | None:
    """The first update after which the loss, averaged over ten, is no more than a level."""
    span = min(SMOOTH, len(losses))
    for end in range(span, len(losses) + 1):
        if statistics.mean(losses[end - span : end]) <= level:
            return end
    return None


def plot(runs: dict[str, Run], path: Path) -> None:
    """Draw the development grid: what was learned against what was lost, a line a method, a point a learning rate."""
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(run["of"]["target"] for run in runs.values() if run["of"]["split"] == "dev"))
    figure = Figure(figsize=(6 * len(targets), 4.6), layout="constrained")
    for number, target in enumerate(targets, start=1):
        axes = figure.add_subplot(1, len(targets), number)
        base = runs[f"split=dev target={target} method=base"]
        methods: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for (method, rate), some in grouped(runs, "dev", target).items():
            lost = statistics.mean(math.log(run["perplexity"] / base["perplexity"]) for run in some)
            learned = statistics.mean(run["target"]["token_log_likelihood"] for run in some)
            methods[method].append((rate, lost, learned))
        for method, points in methods.items():
            _, lost_of, learned_of = zip(*sorted(points), strict=True)
            axes.plot(lost_of, learned_of, ".-", label=method, linewidth=2.5 if method == "lora" else 1.2)
        axes.axhline(base["target"]["token_log_likelihood"], color="gray", linestyle=":", label="base")
        axes.set_xscale("symlog", linthresh=0.03)
        axes.set(title=target, xlabel="loss lost on WikiText (nats a token)", ylabel="right answers (nats a token)")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def shown(values: list[Any], form: str) -> str:
    """Mean ± standard deviation; nothing if a value is missing."""
    if not values or None in values:
        return ""
    text = form.format(statistics.mean(values))
    return f"{text} ± {form.format(statistics.stdev(values))}" if len(set(values)) > 1 else text
