"""`kit bench`: how fast models are, over batch sizes and context lengths, as a table, a JSON file and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kit.convert.checkpoint import on_kernels, open_checkpoint, torch_dtype
from kit.convert.errors import usage_error
from kit.convert.outputs import replacing, write_text
from kit.convert.shapes import random_model, shape_config
from kit.convert.speed import longest, measure

FILES = ("bench.json", "bench.png")  # in the folder of `kit bench -o`
SIXTEEN_BIT = "16bit"  # the base of a random model: the same shape, not quantized


def bench(
    model: str | None,
    *,
    base: str | None,
    config: str | None,
    batches: list[int],
    contexts: list[int],
    new_tokens: int,
    repeats: int,
    dtype: str,
    device: str,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a model, and a base beside it; each is freed before the next is loaded.

    Args:
        model: what `kit` commands take as MODEL; None with a config.
        base: another one, or with a config "16bit".
        config: the name of a shipped shape, or a config.json: random weights, INT4 with FP8 inputs and INT4 cache.
        batches, contexts: every pair is measured.
        new_tokens: steps of decoding a measurement.
        repeats: of each prefill; the median counts.
        dtype: a torch dtype's name, or "auto".
        keep: is given the result so far whenever a case is done.

    Returns:
        `settings`; `rows`: a model, batch and context each, with `name`, `weight_bytes` and what `speed.measure`
        returns, or `error` where memory does not suffice; `missing`: `name`, `batch` and `context` of what is not
        measured yet.

    Raises:
        KitError: if a model cannot be loaded, or the options do not fit together.
    """
    from kit.convert.measure import free_models, hardware, versions

    if (model is None) == (config is None):
        raise usage_error("give a MODEL or --config", "MODEL", "`kit bench MODEL`, or `kit bench --config llama-3-8b`")
    if min([*batches, *contexts, new_tokens, repeats]) < 1:
        raise usage_error("all sizes are at least 1", "--batch-size, --context, --new-tokens", "give positive numbers")
    todo: list[tuple[str, Callable[[], Any]]] = []
    if config is not None:
        if base not in (None, SIXTEEN_BIT):
            raise usage_error("the base of a random model is the same shape", "--base", f"--base {SIXTEEN_BIT}")
        shape = shape_config(config)
        kind = torch_dtype("bfloat16" if dtype == "auto" else dtype)
        name = Path(config).name.removesuffix(".json")
        todo.append((name, lambda: on_kernels(random_model(shape, int4=True, dtype=kind, device=device, seed=seed))))
        if base is not None:
            todo.append(("base", lambda: random_model(shape, int4=False, dtype=kind, device=device, seed=seed)))
    else:
        for name, path in ((str(model), model), ("base", base)):
            if path is not None:
                checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
                checkpoint.compute_dtype(dtype)  # raises
                checkpoint.check_runs({"--context and --new-tokens": longest(max(contexts), new_tokens)})
                to_run = partial(checkpoint.load_to_run, dtype, device, trust_remote_code=trust_remote_code)
                todo.append((name, to_run))
    options: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "seed": seed}
    settings = {"device": hardware(device), "dtype": dtype, "random_weights": config is not None, **options}
    missing = [{"name": name, "batch": b, "context": c} for name, _ in todo for b in batches for c in contexts]
    result: dict[str, Any] = {"rows": [], "missing": missing, "settings": settings | {"versions": versions()}}
    for name, load in todo:
        for row in _rows(name, load, batches, contexts, options, progress):
            result["rows"].append(row)
            missing.pop(0)
            keep(result)
        free_models()
    return result


def _rows(
    name: str,
    load: Callable[[], Any],
    batches: list[int],
    contexts: list[int],
    options: dict[str, Any],
    progress: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    import torch

    failed = {"error": "out of memory"}
    progress(f"{name}: loading")
    try:
        model = load()
        weights = weight_bytes(model)
    except torch.OutOfMemoryError:
        yield from ({"name": name, "batch": b, "context": c} | failed for b in batches for c in contexts)
        return
    for batch in batches:
        for context in contexts:
            progress(f"{name}: batch {batch}, context {context}")
            row: dict[str, Any] = {"name": name, "batch": batch, "context": context, "weight_bytes": weights}
            try:
                row |= measure(model, batch=batch, context=context, **options)
            except torch.OutOfMemoryError:
                row |= failed
            yield row


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights, packed ones included."""
    from kit.modules.accelerated import packed_tensors

    tensors = [*model.parameters(), *packed_tensors(model)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


COLUMNS = (  # of the table: title, key, factor, format
    ("batch", "batch", 1, "{:,.0f}"),
    ("context", "context", 1, "{:,.0f}"),
    ("prefill ms", "prefill_ms", 1, "{:,.1f}"),
    ("first token ms", "ttft_ms", 1, "{:,.1f}"),
    ("decode tokens/s", "decode_tokens_per_second", 1, "{:,.1f}"),
    ("weights MiB", "weight_bytes", 2.0**-20, "{:,.0f}"),
    ("cache MiB", "cache_bytes", 2.0**-20, "{:,.1f}"),
    ("peak MiB", "peak_bytes", 2.0**-20, "{:,.0f}"),
)


def table_lines(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table; times of the base are also given as how often the model's fit into them."""
    header = ["model", *(title for title, *_ in COLUMNS)]
    base = {(row["batch"], row["context"]): row for row in rows if row["name"] == "base"}
    lines = []
    for row in rows:
        line = [row["name"]]
        for _, key, factor, form in COLUMNS:
            cell = form.format(row[key] * factor) if key in row else row.get("error", "") if key == "prefill_ms" else ""
            other = base.get((row["batch"], row["context"]), {}).get(key)
            if other and key in row and row["name"] != "base" and key in ("prefill_ms", "decode_tokens_per_second"):
                gain = other / row[key] if key == "prefill_ms" else row[key] / other
                cell += f" ({gain:.2f}x)"
            line.append(cell)
        lines.append(line)
    return header, lines


def missing_line(result: dict[str, Any]) -> str:
    """What an interrupted measurement has not measured, in a line."""
    if not result:
        return "no case is measured"
    cases = [f"{case['name']}, batch {case['batch']}, context {case['context']:,}" for case in result["missing"]]
    return f"{len(result['rows'])} cases are measured; missing: {'; '.join(cases) or 'none'}"


def write_bench(result: dict[str, Any], folder: Path) -> None:
    """Write bench.json into a folder and, once nothing is missing, bench.png."""
    write_text(folder / FILES[0], json.dumps(result, indent=1) + "\n")
    if not result["missing"] and any("error" not in row for row in result["rows"]):
        with replacing(folder / FILES[1]) as part:
            plot_bench(result, part)


def plot_bench(result: dict[str, Any], path: Path) -> None:
    """Draw decoding and prefill speed over context length, a line a model and batch size, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "error" not in row]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("decode_tokens_per_second", "decode (tokens/s)"), ("prefill_tokens_per_second", "prefill (tokens/s)"))
    for number, (key, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        for name, batch in dict.fromkeys((row["name"], row["batch"]) for row in rows):
            points = sorted((row["context"], row[key]) for row in rows if (row["name"], row["batch"]) == (name, batch))
            style = "--" if name == "base" else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", label=f"{name}, batch {batch}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="context (tokens)", ylabel=title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(result["settings"]["device"], fontsize=10)
    figure.savefig(path, dpi=150, format="png")
