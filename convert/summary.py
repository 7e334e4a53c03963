"""The short form of a conversion's outcome: one paragraph in plain words, and the hub's evaluation results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kit.convert.figures import (
    Figure,
    Node,
    Text,
    derived,
    figure,
    fixed,
    percent,
    plain,
    rate,
    short_name,
    size,
    text,
    whole_bytes,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Part = str | Figure | Text
QUALITY = (("perplexity", "Perplexity"), ("self_perplexity", "Perplexity on text that the base sampled"))
SAME = 5e-4  # a smaller change is none


@dataclass(frozen=True)
class Roles:
    """Which rows of a measurement are what.

    Attributes:
        base: the original model.
        result: the converted one.
        others: whole models measured beside them: baselines, other conversions.
        ablations: models with a part taken away.
    """

    base: Node | None
    result: Node | None
    others: list[Node]
    ablations: list[Node]


def roles(measurement: Node, name: str) -> Roles:
    """Tell the rows of a measurement apart.

    Args:
        measurement: `settings`, `rows`.
        name: of the converted checkpoint; `kit convert` itself calls it "converted".
    """
    base = result = None
    others, ablations = [], []
    names = {row["name"].value for row in measurement["rows"]}
    for row in measurement["rows"]:
        own = row["name"].value
        if own == "base" and base is None:
            base = row
        elif own in ("converted", name) and result is None:
            result = row
        elif any(own.startswith(f"{other}, ") for other in names):
            ablations.append(row)
        else:
            others.append(row)
    return Roles(base, result, others, ablations)


def before_and_after(measurements: Iterable[Node], name: str, *keys: str) -> tuple[Node, Node, Node] | None:
    """A measurement in which base and result both have a number under keys, and the two numbers; the latest one."""
    for measurement in reversed(list(measurements)):
        role = roles(measurement, name)
        if role.base and role.result:
            before, after = role.base.get(*keys), role.result.get(*keys)
            if before and after and before.is_number and after.is_number:
                return measurement, before, after
    return None


def summary(report: Node, measurements: list[Node], name: str) -> list[Part]:
    """What became cheaper, what became worse, whether that is significant, and which other models do better.

    Args:
        report: kit_report.json.
        measurements: evaluations, the latest last.
        name: of the converted checkpoint.

    Returns:
        Parts to write one after the other; numbers and names know where they come from. Empty where nothing was
        measured.
    """
    cheaper = list(_cheaper(measurements, name))
    worse = list(_worse(measurements, name))
    if not cheaper and not worse:
        return []
    start: list[Part] = []
    if cheaper:
        start = ["With ", *_listed([[text(recipe["recipe"])] for recipe in report["recipes"]]), ", "]
        start += [short_name(report["model"]["source"]), " ", *_listed(cheaper), ". "]
    return [*start, *worse]


def in_markdown(parts: Iterable[Part]) -> str:
    """Parts as Markdown, in which names that hold markup stay text."""
    return "".join(
        re.sub(r"([\\`*_<>&\[\]|])", r"\\\1", str(p)) if isinstance(p, Text) else str(p) for p in parts
    ).strip()


def _listed(items: list[list[Part]]) -> list[Part]:
    """Items with commas, and an "and" before the last."""
    parts: list[Part] = []
    for number, item in enumerate(items):
        if number:
            parts.append(" and " if number == len(items) - 1 else ", ")
        parts += item
    return parts


def _cheaper(measurements: list[Node], name: str) -> Iterator[list[Part]]:
    if found := before_and_after(measurements, name, "bytes"):
        _, before, after = found
        change = _change(before, after, "fewer", "more") or ["as many"]
        yield ["takes ", *change, " bytes on disk", *_from_to(before, after, size)]
    if found := before_and_after(measurements, name, "cache_bytes", "per_token"):
        measurement, before, after = found
        if before.value and not after.value:
            constant = before_and_after([measurement], name, "cache_bytes", "constant")
            more: list[Part] = [" (", figure(constant[2], size), " a sequence)"] if constant else []
            yield ["has a cache that does not grow with the text", *more]
        elif before.value and (change := _change(before, after, "fewer", "more")):
            yield ["needs ", *change, " bytes of cache a token", *_from_to(before, after, whole_bytes)]
    if found := before_and_after(measurements, name, "decode_tokens_per_second"):
        measurement, before, after = found
        if before.value and (change := _change(before, after, "slower", "faster")):
            where = measurement.get("settings", "device")
            device: list[Part] = [" on ", text(where)] if where else []
            yield ["decodes ", *change, *_from_to(before, after, rate, " tokens a second"), *device]


def _worse(measurements: list[Node], name: str) -> Iterator[Part]:
    for key, title in QUALITY:
        if any((own := roles(m, name).result) and (node := own.get(key)) and not node.is_number for m in measurements):
            yield f"{title} is not finite: the result is broken. "
            return
        found = before_and_after(measurements, name, key)
        if not found:
            continue
        measurement, before, after = found
        where = measurement.get("settings", "dataset") if key == "perplexity" else None
        yield title
        if where:
            yield from (" on ", text(where))
        change = _change(before, after, "lower", "higher")
        yield from (" is ", *change, *_from_to(before, after, fixed(2))) if change else (" is the same",)
        yield from _significance(measurements, name, key)
        yield from _agreement(measurements, name)
        yield from _rivals(measurement, measurements, name, key, after)
        return
    yield from _agreement(measurements, name)


def _agreement(measurements: list[Node], name: str) -> Iterator[Part]:
    for measurement in reversed(measurements):
        result = roles(measurement, name).result
        top1 = result.get("top1") if result else None
        if top1 and top1.is_number:
            yield from ("It picks the base's next token ", figure(top1, percent), " of the time. ")
            return


def _comparison(measurements: Iterable[Node], metric: str, a: set[str], b: set[str]) -> Node | None:
    """The comparison of two models by a metric, whichever comes first."""
    for measurement in measurements:
        for comparison in measurement.get("comparisons") or ():
            first, second = comparison["a"].value, comparison["b"].value
            if comparison["metric"].value == metric and ((first in a and second in b) or (first in b and second in a)):
                return comparison
    return None


def _significance(measurements: list[Node], name: str, key: str) -> Iterator[Part]:
    comparison = _comparison(measurements, key, {"converted", name}, {"base"})
    if comparison is None:
        yield ", not tested for significance. "
        return
    yield ", a significant difference" if comparison["significant"].value else ", no significant difference"
    samples = comparison.get("samples")
    if samples:
        yield from (" (paired bootstrap, ", figure(samples, "{:,}".format), " samples)")
    yield ". "


def _rivals(measurement: Node, measurements: list[Node], name: str, key: str, own: Node) -> Iterator[Part]:
    """Which other models the result beats, and which it loses to."""
    beaten: list[list[Part]] = []
    better: list[list[Part]] = []
    for other in roles(measurement, name).others:
        value = other.get(key)
        if not value or not value.is_number:
            continue
        label = other["name"]
        comparison = _comparison(measurements, key, {"converted", name}, {label.value})
        note = ""
        if comparison:
            note = ", significantly" if comparison["significant"].value else ", not significantly"
        item: list[Part] = [text(label), " (", figure(value, fixed(2)), note, ")"]
        (better if value.value < own.value else beaten).append(item)
    if better:
        yield from ["It loses to ", *_listed(better)]
        yield from [", and beats ", *_listed(beaten), ". "] if beaten else [". "]
    elif beaten:
        yield from ["It beats ", *_listed(beaten), ". "]


def _change(before: Node, after: Node, less: str, more: str) -> list[Part]:
    """A relative change in words; nothing where there is none."""
    change = after.value / before.value - 1 if before.value else 0.0
    if abs(change) < SAME:
        return []
    op, word = ("less", less) if change < 0 else ("change", more)
    return [derived(op, [before, after], percent), f" {word}"]


def _from_to(before: Node, after: Node, form: Callable[[float], str], unit: str = "") -> list[Part]:
    return [" (", figure(before, form), " → ", figure(after, form), f"{unit})"]


def measured_on(measurement: Node) -> list[Part]:
    """On what a measurement was made, as far as its settings say so."""
    found = {key: node for key, node in (measurement.get("settings") or Node({}, "")).items() if node.value}
    sentences: list[list[Part]] = []
    if "dataset" in found:
        sentence: list[Part] = ["perplexity on ", plain(found["dataset"])]
        if "dataset_tokens" in found:
            sentence += [", ", plain(found["dataset_tokens"]), " tokens"]
        if "window" in found:
            sentence += [" in windows of ", plain(found["window"])]
        sentences.append(sentence)
    if "sampled_tokens" in found:
        sentence = ["own text: ", plain(found["sampled_tokens"]), " held-out tokens"]
        if "sampled_from" in found:
            sentence += [" sampled from ", plain(found["sampled_from"])]
        if "seed" in found:
            sentence += [", seed ", plain(found["seed"])]
        sentences.append(sentence)
    if (dense := (measurement.get("settings") or Node({}, "")).get("dense_prefix")) is not None:
        sentences.append(["sparse models: the first ", plain(dense), " tokens of a text dense, the others sparse"])
    if "dtype" in found:
        sentences.append(["dtype ", plain(found["dtype"])])
    if "device" in found:
        sentences.append([plain(found["device"])])
    return [part for sentence in sentences for part in (*sentence, "; ")][:-1]


def is_error(metric: str) -> bool:
    """Whether a task's metric is the standard error of another one."""
    return metric.partition(",")[0].endswith("_stderr")


def error_key(metric: str) -> str:
    """Where lm-evaluation-harness keeps a metric's standard error: `acc_stderr`, `exact_match_stderr,strict-match`."""
    name, comma, filter_name = metric.partition(",")
    return f"{name}_stderr{comma}{filter_name}"


def main_metric(task: Node) -> str | None:
    """The metric that a task is judged by: `main`, else that whose value is the mean of `correct`, else the first."""
    names = [name for name, value in task["metrics"].items() if value.is_number and not is_error(name)]
    if (main := task.get("main")) and main.value in names:
        return main.value
    if (correct := task.get("correct")) and correct.value:
        mean = sum(correct.value) / len(correct.value)
        names.sort(key=lambda name: abs(task["metrics"][name].value - mean) > 1e-9)
    return names[0] if names else None


def eval_results(measurements: Iterable[Node], name: str) -> list[EvalResult]:
    """Results of the converted model for a model card's `model-index`: perplexity on named data, and task scores.

    Where two measurements hold the same figure, the later one counts.

    Args:
        measurements: evaluations, the latest last.
        name: of the converted checkpoint.
    """
    from huggingface_hub import EvalResult

    found: dict[tuple[str, ...], EvalResult] = {}

    def add(data: str, metric: str, value: float, **more: Any) -> None:
        result = EvalResult(
            task_type="text-generation",
            dataset_type=data,
            dataset_name=data,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
            **more,
        )
        found[data, metric] = result

    for measurement in measurements:
        row = roles(measurement, name).result
        dataset = measurement.get("settings", "dataset")
        if not row:
            continue
        for key in ("perplexity", "word_perplexity"):
            value = row.get(key)
            if dataset and value and value.is_number:
                settings = {k: v.value for k in ("window", "dataset_tokens") if (v := measurement.get("settings", k))}
                add(dataset.value, key, value.value, metric_args=settings or None)
        for task, scores in tasks.items() if (tasks := row.get("tasks")) else ():
            shots = scores.get("num_fewshot")
            for metric, value in scores["metrics"].items():
                if value.is_number and not is_error(metric):
                    add(task, metric, value.value, dataset_args={"num_few_shot": shots.value} if shots else None)
    return list(found.values())
