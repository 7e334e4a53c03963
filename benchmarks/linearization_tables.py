"""Tables of what benchmarks/linearization.py measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from kit.convert.ablate import ratio
from kit.modules.linear_attention import ABLATIONS

REFERENCE = "hybrid"  # the run that others are compared with, window by window


def report(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown: every run, seeds together, effects against `REFERENCE`, long windows, recall; runs by their names.

    Names of runs that differ by the seed alone are NAME, NAME@1, NAME@2.
    """
    done = {name: run for name, run in runs.items() if run.get("complete")}
    parts = [_main(done), _seeds(done), _effects(done), _positions(done), _recall(done)]
    if left := sorted(runs.keys() - done.keys()):
        parts.append(f"Not complete: {', '.join(left)}")
    return "\n\n".join(part for part in parts if part)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _main(runs: dict[str, dict[str, Any]]) -> str:
    titles = ["", "tokens", "test", "to base", *ABLATIONS, "dev", "KL", "top-1", "cache", "tokens/s", "memory"]
    base = runs["base"]["final"]["converted"]["test"]["perplexity"] if "base" in runs else math.nan
    rows = []
    for name, run in runs.items():
        found = run["final"]
        test, dev = found["converted"]["test"], found["converted"]["dev"]
        parts = [f"{found[part]['test']['perplexity']:,.2f}" if part in found else "" for part in ABLATIONS]
        rows.append(
            [
                name,
                f"{run.get('tokens', 0) / 1e6:.2f} M",
                f"{test['perplexity']:.2f} ± {test['perplexity_stderr']:.2f}",
                f"{test['perplexity'] / base:.3f}",
                *parts,
                f"{dev['perplexity']:.2f}",
                f"{dev['kl']:.4f}",
                f"{dev['top1']:.1%}",
                f"{run['cache_bytes'] / 1e6:.1f} MB" if "cache_bytes" in run else "",
                f"{run.get('tokens_per_second', 0):,.0f}",
                f"{run.get('peak_memory_bytes', 0) / 2**30:.1f} GiB",
            ]
        )
    return _table(titles, rows)


def _seeds(runs: dict[str, dict[str, Any]]) -> str:
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, run in runs.items():
        groups.setdefault(name.split("@")[0], []).append(run["final"]["converted"])
    rows = []
    for name, group in groups.items():
        if len(group) > 1:
            figures = (
                [one[text][key] for one in group] for text, key in (("test", "perplexity"), ("dev", "perplexity"))
            )
            cells = [f"{mean(values):.2f} ± {stdev(values):.2f}" for values in figures]
            kl = [one["dev"]["kl"] for one in group]
            rows.append([name, str(len(group)), *cells, f"{mean(kl):.4f} ± {stdev(kl):.4f}"])
    return _table(["mean ± deviation over seeds", "seeds", "test", "dev", "KL"], rows) if rows else ""


def _effects(runs: dict[str, dict[str, Any]]) -> str:
    if REFERENCE not in runs:
        return ""
    rows = []
    for name, run in runs.items():
        if name not in (REFERENCE, "base"):
            cells = []
            for text in ("test", "dev"):
                found = ratio(*(one["final"]["converted"][text] for one in (run, runs[REFERENCE])))
                cells.append(f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
            rows.append([name, *cells])
    return _table([f"perplexity to that of {REFERENCE}", "test", "dev"], rows)


def _positions(runs: dict[str, dict[str, Any]]) -> str:
    long = {
        name: run["final"]["converted"]["test, long"]["perplexity_by_position"]
        for name, run in runs.items()
        if "test, long" in run["final"]["converted"]
    }
    if not long:
        return ""
    first = next(iter(long.values()))
    titles = ["perplexity by position", *(f"{bucket['start']:,} to {bucket['end']:,}" for bucket in first)]
    return _table(titles, ([name, *(f"{b['perplexity']:.2f}" for b in buckets)] for name, buckets in long.items()))


def _recall(runs: dict[str, dict[str, Any]]) -> str:
    """Share of needles found, by depth from the start to the end of the context, and MQAR."""
    found = {name: run["final"]["recall"] for name, run in runs.items() if "recall" in run["final"]}
    if not found:
        return ""
    first = next(iter(found.values()))
    lengths = [entry["length"] for entry in first["mqar"]]
    titles = ["recall", *(f"needle {length:,}" for length in lengths), *(f"MQAR {length:,}" for length in lengths)]
    rows = []
    for name, recall in found.items():
        needles = [
            " ".join(f"{entry['accuracy']:g}" for entry in recall["needle"] if entry["length"] == length)
            for length in lengths
        ]
        rows.append([name, *needles, *(f"{entry['accuracy']:.0%}" for entry in recall["mqar"])])
    return _table(titles, rows)
