"""Several checkpoints beside each other: one table, and which differences are significant."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kit.convert.errors import ExitCode, KitError
from kit.convert.outputs import replacing, write_text

if TYPE_CHECKING:
    from kit.convert.checkpoint import Checkpoint

Result = dict[str, Any]  # what `evaluate` returns: settings and rows
RESAMPLES, LEVEL = 10_000, 0.95
FEWEST = 6  # of five samples that all agree, a sign test still gives p = 2 / 2^5 > 0.05
FILES = ("compare.json", "pareto.png")  # in the folder of `kit compare -o`
OPTIONS = {  # of `kit eval`, by the setting they decide
    "base": "--base", "sampled_tokens": "--num-tokens", "sampled_from": "--base", "seed": "--seed",
    "dataset": "--dataset", "dataset_tokens": "--limit and --seq-len", "dataset_sha256": "--dataset",
    "window": "--seq-len", "dtype": "--dtype", "device": "--device", "recall": "--recall and --haystack",
    "generations": "--generations", "retention": "--retention, --covariance and --batch-size",
    "tasks": "--tasks, --limit, --num-fewshot and --data-dir",
}  # fmt: skip


def compare(
    models: dict[str, Checkpoint | Result], *, base: Checkpoint | None = None, **measuring: Any
) -> dict[str, Any]:
    """Measure checkpoints, put earlier results beside them, and tell which differences are significant.

    Args:
        models: checkpoints to measure, and results of `evaluate` to take over, by name.
        base: the model they were made from; measured again only if a checkpoint is, or if no result has it.
        measuring: the other arguments of `evaluate`.

    Returns:
        `settings` and `rows` as `evaluate` has them, the base first and then in the order of `models`; `comparisons` as
        `compare_rows` has them.

    Raises:
        KitError: before weights load, if results have other settings than each other or than this run; as `evaluate`.
    """
    earlier: dict[str, Result] = {name: model for name, model in models.items() if isinstance(model, dict)}
    fresh: dict[str, Checkpoint] = {name: model for name, model in models.items() if not isinstance(model, dict)}
    known = list(earlier.items())
    for name, result in known[1:]:
        check_settings(name, result["settings"], known[0][0], known[0][1]["settings"])
    if fresh or (base and not any(row["name"] == "base" for _, result in known for row in result["rows"])):
        from kit.convert.evaluate import evaluate

        known.insert(0, ("this run", evaluate(fresh, base=base, earlier=earlier, **measuring)))
        for name, result in known[1:]:
            check_settings(name, result["settings"], known[0][0], known[0][1]["settings"])
    elif base:
        theirs = {"base": known[0][1]["settings"].get("base")}
        check_settings(known[0][0], theirs, "this run", {"base": base.source})
    rows = merge_rows(list(models), dict(known))
    return {"settings": known[0][1]["settings"], "rows": rows, "comparisons": compare_rows(rows)}


def open_or_read(model: str, *, base: str | None = None, trust_remote_code: bool = False) -> Checkpoint | Result:
    """Read an earlier result if the name ends in .json, else open a model or an adapter as `open_model` does."""
    if model.endswith(".json"):
        return read_result(Path(model))
    from kit.convert.adapted import open_model

    return open_model(model, base=base, trust_remote_code=trust_remote_code)


def read_result(path: Path) -> Result:
    """Read what `kit eval --json` or `kit compare --json` printed.

    Raises:
        KitError: if it is something else.
    """
    advice = "give a file that `kit eval ... --json > FILE` wrote"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KitError(f"the result cannot be read: {error}", where=str(path), next_step=advice) from error
    rows = result.get("rows") if isinstance(result, dict) else None
    named = isinstance(rows, list) and rows and all(isinstance(row, dict) and "name" in row for row in rows)
    if not named or not isinstance(result.get("settings"), dict):
        raise KitError("this is no result of an evaluation: settings and rows", where=str(path), next_step=advice)
    return result


def check_settings(name: str, theirs: dict[str, Any], other: str, ours: dict[str, Any]) -> None:
    """Raise KitError, naming the first difference, unless two results were measured alike."""
    for key in dict.fromkeys([*ours, *theirs]):
        if theirs.get(key) != ours.get(key):
            raise KitError(
                f"{name} was not measured like {other}: {key} is {theirs.get(key)!r}, not {ours.get(key)!r}",
                where=name,
                next_step=f"measure both with the same {OPTIONS.get(key, key)}",
                exit_code=ExitCode.USAGE,
            )


def write_comparison(result: Result, plot: Path | None, folder: Path | None) -> None:
    """Write the Pareto plot into a file, and result and plot into a folder (FILES)."""
    from kit.convert.pareto import plot_pareto

    if folder:
        write_text(folder / FILES[0], json.dumps(result, indent=1) + "\n")
    for file in filter(None, (plot, folder and folder / FILES[1])):
        with replacing(file) as part:
            plot_pareto(result["rows"], part)


def merge_rows(order: Sequence[str], results: dict[str, Result]) -> list[dict[str, Any]]:
    """Rows of several results: one base first, then by model, each under a name of its own.

    Args:
        order: names of earlier results, and of models in `this run`, as the table shall show them.
        results: results by name; of the base rows in them, the first is kept.
    """
    base = next((row for result in results.values() for row in result["rows"] if row["name"] == "base"), None)
    merged = [base] if base else []
    for name in order:
        if name in results:
            rows = [row for row in results[name]["rows"] if row["name"] != "base"]
        else:  # a model of this run, and its ablations
            found = results["this run"]["rows"]
            rows = [row for row in found if row["name"] == name or row["name"].startswith(f"{name}, ")]
        taken = {row["name"] for row in merged}
        merged += [row | {"name": f"{name}: {row['name']}"} if row["name"] in taken else row for row in rows]
    return merged


def compare_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare each row with the base, and with the first model, in what both have by sample.

    Perplexity is compared by windows (`window_losses`), tasks by questions (`tasks[...]["correct"]`); a pair whose
    samples differ in number is left out.

    Args:
        rows: of `evaluate`, the base first where there is one.

    Returns:
        One dict a pair and metric (`perplexity`, or a task's name): `metric`; `a`, `b`: names; `difference`: of a and
        b; `low`, `high`: its 95 % interval by paired bootstrap; `significant`: the interval does not hold 0, and there
        are at least six samples; `samples`.
    """
    references = rows[:2] if rows and rows[0]["name"] == "base" else rows[:1]
    found = []
    for place, reference in enumerate(references):
        theirs = _samples(reference)
        for row in rows[place + 1 :]:
            for metric, values in _samples(row).items():
                if len(theirs.get(metric, ())) != len(values):
                    continue
                transform = np.exp if metric == "perplexity" else None
                difference, low, high = paired_bootstrap(values, theirs[metric], transform)
                found.append(
                    {
                        "metric": metric,
                        "a": row["name"],
                        "b": reference["name"],
                        "difference": difference,
                        "low": low,
                        "high": high,
                        "significant": len(values) >= FEWEST and bool(low > 0 or high < 0),
                        "samples": len(values),
                    }
                )
    return found


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """Difference of two means over the same samples, with a percentile interval (Efron and Tibshirani, 1993, 13.3).

    Samples are drawn with replacement, for both at once: what makes a sample hard for both does not count.

    Args:
        a: n values.
        b: n values of the same samples.
        transform: of the means before they are subtracted; exp turns losses into perplexities.
        seed: of the draws.
        resamples: how many.

    Returns:
        transform(mean a) - transform(mean b), and the ends of its 95 % interval.
    """
    values = np.asarray([a, b], dtype=np.float64)
    transform = transform or (lambda mean: mean)
    draws = np.random.default_rng(seed)
    chunk = max(2**22 // values.shape[1], 1)  # resamples at a time: 32 MiB of places in the samples
    with np.errstate(over="ignore", invalid="ignore"):  # a broken model's perplexity may be infinite
        found = []
        for start in range(0, resamples, chunk):
            places = draws.integers(values.shape[1], size=(min(chunk, resamples - start), values.shape[1]))
            means = transform(values[:, places].mean(-1))
            found.append(means[0] - means[1])
        whole = transform(values.mean(-1))
        low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(whole[0] - whole[1]), float(low), float(high)


def _samples(row: dict[str, Any]) -> dict[str, list[float]]:
    """What a row has by sample, by metric."""
    found = {name: task["correct"] for name, task in row.get("tasks", {}).items() if task.get("correct")}
    return found | ({"perplexity": row["window_losses"]} if row.get("window_losses") else {})
