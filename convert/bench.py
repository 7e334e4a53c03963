"""`kit bench`: how fast models are, over batch sizes and context lengths, as a table, a JSON file and a plot."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kit.convert.checkpoint import on_kernels, open_checkpoint, torch_dtype
from kit.convert.errors import usage_error
from kit.convert.shapes import random_model, shape_config
from kit.convert.speed import measure

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

    Returns:
        `settings`, and `rows`: a model, batch and context each, with `name`, `weight_bytes` and what `speed.measure`
        returns, or `error` where memory does not suffice.

    Raises:
        KitError: if a model cannot be loaded, or the options do not fit together.
    """
    from kit.convert.measure import hardware, versions

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
                kind = checkpoint.compute_dtype(dtype)
                loaded = partial(checkpoint.load_model, kind, device, trust_remote_code)
                todo.append((name, partial(_on_kernels, loaded)))
    options: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "seed": seed}
    rows = []
    for name, load in todo:
        rows += _rows(name, load, batches, contexts, options, progress)
        _free()
    settings = {"device": hardware(device), "dtype": dtype, "random_weights": config is not None, **options}
    return {"rows": rows, "settings": settings | {"versions": versions()}}


def _on_kernels(load: Callable[[], Any]) -> Any:
    """Load a model and put it on the kernels, where they take it."""
    return on_kernels(load())


def _rows(
    name: str,
    load: Callable[[], Any],
    batches: list[int],
    contexts: list[int],
    options: dict[str, Any],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    import torch

    rows, failed = [], {"error": "out of memory"}
    progress(f"{name}: loading")
    try:
        model = load()
        weights = weight_bytes(model)
    except torch.OutOfMemoryError:
        return [{"name": name, "batch": b, "context": c} | failed for b in batches for c in contexts]
    for batch in batches:
        for context in contexts:
            progress(f"{name}: batch {batch}, context {context}")
            row: dict[str, Any] = {"name": name, "batch": batch, "context": context, "weight_bytes": weights}
            try:
                row |= measure(model, batch=batch, context=context, **options)
            except torch.OutOfMemoryError:
                row |= failed
            rows.append(row)
    return rows


def _free() -> None:
    """Give back what a model took: it is part of a reference cycle if it is on the kernels."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def check_folder(folder: Path | None) -> None:
    """Raise KitError if the output folder cannot be made: before anything is measured."""
    if folder is not None and folder.exists() and not folder.is_dir():
        raise usage_error("there is a file of that name", f"--output {folder}", "name a folder")


def write_bench(result: dict[str, Any], folder: Path) -> None:
    """Write bench.json and bench.png into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if any("error" not in row for row in result["rows"]):
        plot_bench(result, folder / "bench.png")


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
