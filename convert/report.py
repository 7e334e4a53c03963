"""What stands beside the weights: kit_report.json, kit_recipe.yaml and the model card; and tables for a terminal."""

from __future__ import annotations

import itertools
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from kit.convert.checkpoint import Checkpoint
from kit.convert.figures import Node
from kit.convert.recipe import PlanItem, Recipe
from kit.convert.results import read_inputs
from kit.convert.summary import eval_results, in_markdown, measured_on, summary

COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("word_perplexity", "per word", "{:.2f}"),
    ("self_perplexity", "perplexity, own text", "{:.2f}"),
    ("kl", "KL to base", "{:.4f}"),
    ("top1", "top-1 same", "{:.1%}"),
    ("top5", "in top 5", "{:.1%}"),
    ("sparse_tokens", "sparse tokens", "{:.0%}"),
    ("weights_skipped", "weights skipped", "{:.1%}"),
    ("prefill_tokens_per_second", "prefill tok/s", "{:,.0f}"),
    ("decode_tokens_per_second", "decode tok/s", "{:,.1f}"),
    ("peak_memory_bytes", "peak memory", None),
)


def build_report(
    checkpoint: Checkpoint, recipes: list[Recipe], *, plan: list[PlanItem], **parts: Any
) -> dict[str, Any]:
    """Put together the report of a conversion: one JSON object, everything that was chosen and measured."""
    return {
        "model": {
            "source": checkpoint.source,
            "fingerprint": checkpoint.fingerprint(),
            "parameters": checkpoint.num_parameters,
        },
        "recipes": [recipe.config.model_dump(mode="json") for recipe in recipes],
        "allocation": {recipe.name: recipe.allocation for recipe in recipes if recipe.allocation},
        "plan": {item.what: item.value for item in plan},
        **parts,
    }


def write_report(folder: Path, report: dict[str, Any], recipes: list[Recipe]) -> None:
    """Write kit_report.json, kit_recipe.yaml (run it again with `--recipe kit_recipe.yaml`), README.md, loss curves."""
    from kit.convert import loss_plot

    (folder / "kit_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "kit_recipe.yaml").write_text(recipe_yaml(recipes), encoding="utf-8")
    (folder / "README.md").write_text(model_card(report, recipes), encoding="utf-8")
    loss_plot.plot_losses(report, folder / loss_plot.FILE)


def recipe_yaml(recipes: list[Recipe]) -> str:
    """Every option of the recipes as they ran, in the form that `--recipe FILE` reads."""
    configs = [recipe.config.model_dump(mode="json") for recipe in recipes]
    return yaml.safe_dump(configs[0] if len(configs) == 1 else {"recipes": configs}, sort_keys=False)


def model_card(report: dict[str, Any], recipes: list[Recipe], name: str = "converted", results: Any = ()) -> str:
    """The model card, from convert/card.md.jinja.

    Args:
        report: of the conversion.
        recipes: that made it.
        name: of the checkpoint in the results.
        results: measurements made later, as `convert.results.read_inputs` gives them.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    source, adapter = report["model"]["source"], report.get("adapter")
    own = Node.document("kit_report.json", report)
    measurements = [evaluation for evaluation in [own.get("evaluation")] if evaluation] + list(results)
    done = "adapted" if adapter else "converted"
    title = f"{source.rstrip('/').split('/')[-1]}, {done} with {' and '.join(recipe.name for recipe in recipes)}"
    relation = "finetune" if adapter and adapter["merged"] else recipes[-1].base_model_relation
    measured = eval_results(measurements, name)
    data = ModelCardData(
        model_name=title if measured else None,
        eval_results=measured or None,
        base_model=hub_id(source),
        base_model_relation=relation if hub_id(source) else None,
        library_name="peft" if adapter and not adapter["merged"] else "transformers",
        pipeline_tag="text-generation",
        tags=["kit", *(["lora"] if adapter else []), *(recipe.name for recipe in recipes)],
    )
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    template = environment.from_string(files("kit.convert").joinpath("card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        metadata=data.to_yaml(),
        title=title,
        summary=in_markdown(summary(own, measurements, name)),
        results=[(markdown_table(m["rows"].value), in_markdown(measured_on(m))) for m in results],
        report=report,
        adapter=adapter,
        losses=loss_table([loss for stage in report["stages"].values() for loss in stage[0]["losses"]])
        if adapter
        else "",
        recipes=recipes,
        recipe_yaml=recipe_yaml(recipes),
        table=markdown_table(report.get("evaluation", {}).get("rows", [])),
    )


def hub_id(source: str) -> str | None:
    """A model's id on the hub, if it was named by one."""
    return source if "/" in source and not Path(source).exists() else None


def loss_table(losses: list[float]) -> str:
    """A training's losses as a Markdown table: means over eighths of it."""
    bounds = [round(len(losses) * part / 8) for part in range(9)]
    parts = [(start, end) for start, end in itertools.pairwise(bounds) if end > start]
    lines = [
        ["updates", *(f"{start + 1}–{end}" if end > start + 1 else f"{end}" for start, end in parts)],
        ["---"] * (len(parts) + 1),
        ["loss", *(f"{sum(losses[start:end]) / (end - start):.3f}" for start, end in parts)],
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if parts else ""


def renew_card(folder: Path, recipes: list[Recipe], results: list[Path]) -> Path:
    """Write a converted checkpoint's README.md again, with measurements made since.

    Args:
        folder: the checkpoint.
        recipes: that made it.
        results: files that `kit eval --json` or `kit compare --json` printed.

    Raises:
        KitError: if an input is missing or broken.
    """
    inputs = read_inputs(folder, results)
    later = [m for m in inputs.measurements if not m.at.startswith(inputs.report.at)]
    card = folder / "README.md"
    card.write_text(model_card(inputs.report.value, recipes, inputs.name, later), encoding="utf-8")
    return card


def table_cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of an evaluation table; columns that nobody measured are left out."""
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    return ["model", *(title for _, title, _ in columns)], [
        [row["name"], *(_cell(row, key, form) for key, _, form in columns)] for row in rows
    ]


def _cell(row: dict[str, Any], key: str, form: str | None) -> str:
    if key not in row:
        return ""
    text = form.format(row[key]) if form else f"{row[key] / 2**30:.2f} GiB"
    error = row.get(f"{key}_stderr")
    if error is not None and error == error and form:
        text += " ± " + form.format(error)
    return text


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """An evaluation as a Markdown table."""
    if not rows:
        return ""
    header, cells = table_cells(rows)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rich_table(rows: list[dict[str, Any]], title: str | None = None) -> Any:
    """An evaluation as a rich table."""
    from rich.table import Table

    header, cells = table_cells(rows)
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number == 0 else "right")
    for line in cells:
        table.add_row(*line)
    return table


def settings_line(settings: dict[str, Any]) -> str:
    """One line that says on what the figures were measured."""
    parts = []
    if settings["dataset"]:
        parts.append(
            f"perplexity: {settings['dataset']}, {settings['dataset_tokens']:,} tokens "
            f"in windows of {settings['window']:,}"
        )
    if settings["sampled_tokens"]:
        parts.append(
            f"own text: {settings['sampled_tokens']:,} held-out tokens sampled from {settings['sampled_from']}, "
            f"seed {settings['seed']}"
        )
    if (dense := settings.get("dense_prefix")) is not None:
        window = f"the first {dense:,} tokens of a text dense, the others" if dense else "every scored token"
        parts.append(f"sparse models: {window} sparse")
    return "; ".join([*parts, f"{settings['dtype']} weights", str(settings["device"]), "± standard error over rows"])
