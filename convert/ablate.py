"""Does the linear branch of a linearized model carry weight? The model, its parts, and what needs no training at all.

Published hybrids of a softmax window and linear attention have been found to live on the window (arXiv:2510.05901),
and a window of the last keys with a few sinks, nothing trained, to beat them (arXiv:2608.28444). So a converted model
stands in one table with its own branches and with those windows, and a rule says what the table means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.convert.checkpoint import Checkpoint
from kit.convert.compare import FEWEST, paired_bootstrap
from kit.convert.errors import usage_error
from kit.convert.windowed import window_name

WINDOWS = ((64, 4), (128, 4))  # keys in all, and how many of them are sinks
BRANCHES = ("window only", "linear only", "attention zeroed")  # the ablations of kit.modules.linear_attention
LEAST_RISE = 0.01  # of perplexity without the branch, from which on it carries weight
RULE = (
    "the linear branch carries weight if, by 95 % intervals of a paired bootstrap over at least "
    f"{FEWEST} windows of text, perplexity rises by {LEAST_RISE:.0%} or more when it is taken away, and it gives, "
    "alone, a lower perplexity than no attention at all"
)


def ablate(
    models: dict[str, Checkpoint],
    *,
    base: Checkpoint | None,
    dataset: str | None,
    seq_len: int | None = None,
    recall: Sequence[int] | None = None,
    **measuring: Any,
) -> dict[str, Any]:
    """Measure a linearized model beside its base, its own branches and the training-free windows.

    The branches are taken away in hybrid layers; layers that were kept full stay full in every row.

    Args:
        models: the linearized model, by name.
        base: the model it was made from.
        dataset: text for perplexity, as `--dataset` takes it.
        seq_len: tokens a window of it; None: four times the rows that the model was trained on, else 2,048.
        recall: tokens of the contexts to recall from; none or 0 leaves recall out.
        measuring: the other arguments of `evaluate`.

    Returns:
        `settings` and `rows` as `evaluate` has them, rows in the order base, model, its branches, training-free
        windows; `verdict` as `judge` has it.

    Raises:
        KitError: before weights load, if the model has no linear branch, or base or text are missing; as `evaluate`.
    """
    from kit.convert.evaluate import evaluate

    (name, model), *_ = models.items()
    ours = model.config.get("linear_attention")
    if not ours or not set(ours.get("mixers", ["hybrid"])) - {"window", "full"}:
        raise usage_error(
            "the model has no linear attention, so nothing can be taken away",
            model.source,
            "give a checkpoint of a recipe such as lolcats; `kit eval` measures any model",
        )
    if base is None or dataset is None:
        missing, advice = ("base", "--base MODEL") if base is None else ("text", "--dataset FILE")
        raise usage_error(f"the {missing} to measure with is missing", advice.split()[0], f"add {advice}")
    trained = training_length(model.folder)
    result = evaluate(
        models,
        base=base,
        dataset=dataset,
        seq_len=seq_len or 4 * (trained or 512),
        recall=[length for length in recall or () if length],
        windows=WINDOWS,
        **measuring | {"ablations": True, "speed": False},
    )
    rows = {row["name"]: row for row in result["rows"]}
    free = [f"base, {window_name(*window)}" for window in WINDOWS]
    order = ["base", name, *(f"{name}, {branch}" for branch in BRANCHES), *free]
    result["rows"] = [rows[each] for each in order]
    return result | {"verdict": judge(result["rows"], trained)}


def training_length(folder: Path) -> int | None:
    """Tokens of the longest row that a checkpoint was trained on, None if its report does not say, or none was."""
    try:
        report = json.loads((folder / "kit_report.json").read_text(encoding="utf-8"))
        entries = [entry for stage in report["stages"].values() for entry in stage]
        if not any(key.startswith("loss") for entry in entries for key in entry):
            return None
        return max(int(recipe["data"]["seq_len"]) for recipe in report["recipes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def judge(rows: list[dict[str, Any]], trained: int | None) -> dict[str, Any]:
    """Say whether the linear branch carries weight (`RULE`).

    Args:
        rows: of `ablate`, in its order.
        trained: tokens of a training row, None if they are not known.

    Returns:
        `carries_weight`: True, False, or None where the windows are too few or an interval leaves it open; `sentence`;
        `rule`; `windows`, how many; `training_length`; and as ratios of perplexities, each with `ratio`, `low` and
        `high` (95 %): `without_it`: window only to converted; `alone`: linear only to attention zeroed;
        `training_free`: converted to each training-free window; `beyond_training`: see `_beyond`, None where the text's
        windows are no longer.
    """
    base, converted, window, linear, zeroed, *free = rows
    count = len(converted["window_losses"])
    without, alone = ratio(window, converted), ratio(linear, zeroed)
    against = {row["name"]: ratio(converted, row) for row in free}
    carries: bool | None = None
    if count >= FEWEST:
        if without["low"] >= 1 + LEAST_RISE and alone["high"] < 1:
            carries = True
        elif without["high"] < 1 + LEAST_RISE or alone["low"] >= 1:
            carries = False
    best = min(free, key=lambda row: row["perplexity"])
    told = {
        True: "The linear branch carries weight",
        False: "The linear branch carries no weight",
        None: f"Whether the linear branch carries weight cannot be told from these {count} windows",
    }[carries]
    interval = against[best["name"]]
    better = "better than" if interval["high"] < 1 else "worse than" if interval["low"] > 1 else "no different from"
    sentence = (
        f"{told}: without it perplexity is {_times(without)} what it was, and alone it gives "
        f"{linear['perplexity']:,.1f} where no attention gives {zeroed['perplexity']:,.1f}; at "
        f"{converted['perplexity']:,.2f} the model is {better} the best training-free row, "
        f"{best['name'].removeprefix('base, ')} ({best['perplexity']:,.2f})."
    )
    return {
        "carries_weight": carries,
        "sentence": sentence,
        "rule": RULE,
        "windows": count,
        "training_length": trained,
        "without_it": without,
        "alone": alone,
        "training_free": against,
        "beyond_training": _beyond(base, converted, trained) if trained else None,
    }


def ratio(row: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Perplexity of a row to that of another, with its 95 % interval by paired bootstrap over windows."""
    return _ratio(row["window_losses"], other["window_losses"])


def _beyond(base: dict[str, Any], converted: dict[str, Any], trained: int) -> dict[str, Any] | None:
    """How the model, relative to its base on the same tokens, does at a window's end beside the training length's.

    Returns:
        `at`, `within`: the two buckets of positions, [start, end]; `ratio`, `low`, `high`: of (model / base) in the
        first to (model / base) in the second; None if no bucket ends within the training length, or none beyond it.
    """
    buckets = list(zip(converted["perplexity_by_position"], base["perplexity_by_position"], strict=True))
    inside = [pair for pair in buckets if pair[0]["end"] <= trained]
    if not inside or buckets[-1][0]["end"] <= trained:
        return None

    def excess(pair: tuple[dict[str, Any], dict[str, Any]]) -> list[float]:
        return [a - b for a, b in zip(*(bucket["window_losses"] for bucket in pair), strict=True)]

    places = {"at": buckets[-1][0], "within": inside[-1][0]}
    found = _ratio(excess(buckets[-1]), excess(inside[-1]))
    return {name: [bucket["start"], bucket["end"]] for name, bucket in places.items()} | found


def _ratio(losses: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    middle, low, high = paired_bootstrap(losses, others)
    return {key: math.exp(min(value, 700.0)) for key, value in (("ratio", middle), ("low", low), ("high", high))}


def _times(found: dict[str, float]) -> str:
    return f"{found['ratio']:.3g} times ({found['low']:.3g} to {found['high']:.3g})"
