"""A conversion's report as one self-contained HTML page: `kit report OUT`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from kit.convert.charts import (
    HeatMap,
    Interval,
    LineChart,
    Scatter,
    heat_map,
    intervals,
    line_chart,
    scatter,
)
from kit.convert.errors import ExitCode, KitError
from kit.convert.figures import (
    Figure,
    Node,
    Text,
    derived,
    figure,
    fixed,
    general,
    memory,
    percent,
    plain,
    rate,
    short_name,
    signed,
    signed_percent,
    size,
    text,
    whole_bytes,
)
from kit.convert.results import Inputs, read_inputs
from kit.convert.summary import Part, before_and_after, error_key, is_error, main_metric, measured_on, summary

GENERATOR = '<meta name="generator" content="kit report">'
STYLES = 8  # colours of models, in report.css.jinja


@dataclass(frozen=True)
class Column:
    """A measure of a model: where it stands, what it is called, how it is written, what it means."""

    keys: tuple[str, ...]
    title: str
    form: Callable[[float], str]
    meaning: str


QUALITY = (
    Column(("perplexity",), "perplexity", fixed(2), "exp of the mean loss a token, on the named data"),
    Column(("word_perplexity",), "word perplexity", fixed(2), "exp of the loss a word, words split at whitespace"),
    Column(("self_perplexity",), "perplexity, own text", fixed(2), "on held-out text that the base model sampled"),
    Column(("kl",), "KL to base", fixed(4), "how far next-token distributions are from the base's, nats a token"),
    Column(("top1",), "top-1 same", percent, "share of tokens at which the base's first choice is this model's too"),
    Column(("top5",), "top-5 same", percent, "the same for the five likeliest tokens"),
    Column(("sparse_tokens",), "sparse tokens", percent, "share of the scored tokens that ran sparse"),
    Column(("weights_skipped",), "weights skipped", percent, "share of the layers' weights that those did not read"),
    Column(("generations", "repetition"), "repetition", percent, "share of repeated 4-grams in generated texts"),
    Column(("generations", "degenerate"), "degenerate", percent, "share of generated texts that loop or end empty"),
)
COST = (
    Column(("bytes",), "weights", size, "bytes on disk"),
    Column(("cache_bytes", "per_token"), "cache a token", whole_bytes, "keys and values, or what stands for them"),
    Column(("cache_bytes", "constant"), "cache a sequence", whole_bytes, "what does not grow with the text"),
    Column(("peak_memory_bytes",), "peak memory", memory, "while it was measured"),
    Column(("prefill_tokens_per_second",), "prefill, tokens/s", rate, "reading the prompt, one sequence"),
    Column(("decode_tokens_per_second",), "decode, tokens/s", rate, "writing token by token, one sequence"),
)
TILES = (
    ("Weights on disk", ("bytes",), size),
    ("Cache a token", ("cache_bytes", "per_token"), whole_bytes),
    ("Perplexity", ("perplexity",), fixed(2)),
    ("Perplexity, own text", ("self_perplexity",), fixed(2)),
    ("Decode, tokens/s", ("decode_tokens_per_second",), rate),
)


@dataclass(frozen=True)
class Tile:
    """One figure before and after."""

    title: str
    before: Figure
    after: Figure
    change: Figure | None


@dataclass(frozen=True)
class TableCell:
    """A number of a table (a text where it is not finite) and its standard error."""

    figure: Figure | Text
    error: Figure | None = None


@dataclass(frozen=True)
class TableRow:
    """A row of a table: its head, the number of its colour, its cells."""

    head: list[Part]
    style: int | None
    cells: list[TableCell | None]


@dataclass(frozen=True)
class Table:
    """A table of numbers."""

    corner: str
    columns: list[Text | str]
    rows: list[TableRow]


@dataclass(frozen=True)
class Measured:
    """A measurement's tables, under what was measured and on what."""

    title: str
    settings: list[Part]
    quality: Table | None
    cost: Table | None
    tasks: Table | None


@dataclass(frozen=True)
class Comparison:
    """A difference between two models with its interval."""

    a: Text
    b: Text
    difference: Figure
    low: Figure
    high: Figure
    samples: Figure | None
    significant: bool
    place: Interval


@dataclass(frozen=True)
class Panel:
    """A heat map of one model."""

    name: Text
    style: int
    grid: HeatMap


@dataclass(frozen=True)
class Prompt:
    """What models wrote after one prompt."""

    prompt: Text
    answers: list[tuple[Text, int, Text]]


def write_html(folder: Path, results: Iterable[Path] = (), output: Path | None = None) -> Path:
    """Write a report's page.

    Args:
        folder: a converted checkpoint, with kit_report.json.
        results: files that `kit eval --json` or `kit compare --json` printed.
        output: the page; `report.html` in the folder if not given. A page that this function wrote is replaced.

    Returns:
        The page's path.

    Raises:
        KitError: if an input is missing or broken, or the output is a file of another kind or cannot be written.
    """
    output = output or folder / "report.html"
    inputs = read_inputs(folder, results)
    if output.is_dir() or (output.exists() and GENERATOR not in output.read_text("utf-8", "replace")[:2000]):
        raise KitError(
            "the output exists and is no page of `kit report`",
            where=str(output),
            next_step="choose another -o",
            exit_code=ExitCode.USAGE,
        )
    try:
        output.write_text(render(inputs), encoding="utf-8")
    except OSError as error:
        raise KitError(
            f"the page cannot be written: {error.strerror}", where=str(output), next_step="choose another -o"
        ) from error
    return output


def render(inputs: Inputs) -> str:
    """The page of a conversion and its measurements."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kit.convert", "."),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = _words
    return environment.get_template("report.html.jinja").render(**_page(inputs), generator=GENERATOR, plain=plain)


def _page(inputs: Inputs) -> dict[str, Any]:
    """What the template shows."""
    report, measurements = inputs.report, inputs.measurements
    styles = _styles(inputs)
    measured = [_measured(m, styles, inputs) for m in measurements if m["rows"].value]
    titles = {title for each in measured for table in (each.quality, each.cost) if table for title in table.columns}
    return {
        "source": short_name(report["model"]["source"]),
        "recipes": [text(recipe["recipe"]) for recipe in report["recipes"]],
        "summary": summary(report, measurements, inputs.name),
        "tiles": list(_tiles(inputs)),
        "measured": measured,
        "meanings": [(c.title, c.meaning) for c in (*QUALITY, *COST) if c.title in titles],
        "comparisons": _comparisons(measurements),
        "pareto": list(_pareto(measurements, styles)),
        "by_position": list(_by_position(measurements, styles)),
        "needle": list(_recall(measurements, styles, "needle", "depth", lambda depth: f"{100 * depth:.0f} %")),
        "mqar": list(_recall(measurements, styles, "mqar", "pairs", general)),
        "dropped": list(_dropped(measurements, styles)),
        "losses": list(_loss_curves(report)),
        "layers": list(_layers(report)),
        "prompts": list(_prompts(measurements, styles)),
        "report": report,
        "settings": [(m.at.split("#")[0], s) for m in measurements if (s := m.get("settings"))],
        "recipe_yaml": inputs.recipe_yaml,
        "styles": STYLES,
    }


def _styles(inputs: Inputs) -> dict[str, int]:
    """A colour for each model, the same all over the page: 0 the base, 1 the result, then the others as they come."""
    styles = {"base": 0, "converted": 1, inputs.name: 1}
    for measurement in inputs.measurements:
        for row in measurement["rows"]:
            taken = len(set(styles.values()))
            styles.setdefault(row["name"].value, taken if taken < STYLES else 2 + (taken - 2) % (STYLES - 2))
    return styles


def _tiles(inputs: Inputs) -> Iterator[Tile]:
    named = before_and_after(inputs.measurements, inputs.name, "perplexity")
    for title, keys, form in TILES:
        if named and keys == ("self_perplexity",):  # one perplexity is enough
            continue
        if found := before_and_after(inputs.measurements, inputs.name, *keys):
            _, before, after = found
            change = derived("change", [before, after], signed_percent) if before.value else None
            yield Tile(title, figure(before, form), figure(after, form), change)


def _measured(measurement: Node, styles: dict[str, int], inputs: Inputs) -> Measured:
    own = measurement.at.startswith(inputs.report.at)
    return Measured(
        title="Measured by the conversion" if own else measurement.at.removesuffix("#"),
        settings=measured_on(measurement),
        quality=_model_table(measurement, QUALITY, styles),
        cost=_model_table(measurement, COST, styles),
        tasks=_task_table(measurement),
    )


def _model_table(measurement: Node, columns: tuple[Column, ...], styles: dict[str, int]) -> Table | None:
    """Models as rows, measures as columns; those that nobody took are left out."""

    shown = [column for column in columns if any(row.get(*column.keys) for row in measurement["rows"])]
    rows = []
    for row in measurement["rows"]:
        cells = [_cell(row.get(*column.keys), _error(row, column), column.form) for column in shown]
        if any(cells):
            rows.append(TableRow([text(row["name"])], styles[row["name"].value], cells))
    return Table("model", [column.title for column in shown], rows) if rows else None


def _error(row: Node, column: Column) -> Node | None:
    return row.get(*column.keys[:-1], f"{column.keys[-1]}_stderr")


def _cell(value: Node | None, error: Node | None, form: Callable[[float], str]) -> TableCell | None:
    if value is None:
        return None
    if not value.is_number:
        return TableCell(plain(value))
    return TableCell(figure(value, form), figure(error, form) if error and error.is_number else None)


def _task_table(measurement: Node) -> Table | None:
    """Tasks and their metrics as rows, models as columns."""
    models = [row for row in measurement["rows"] if row.get("tasks")]
    names = list(dict.fromkeys(task for row in models for task in row["tasks"].value))
    rows = []
    for task in names:
        holders = [row["tasks"][task] for row in models if task in row["tasks"].value]
        first = holders[0]
        main = main_metric(first)
        metrics = dict.fromkeys(
            name for scores in holders for name, v in scores["metrics"].items() if v.is_number and not is_error(name)
        )
        for metric in sorted(metrics, key=lambda name: name != main):
            head: list[Part] = [Text(task, first.at, "key"), " ", Text(metric, first["metrics"][metric].at, "key")]
            if metric == main and (samples := first.get("num_samples")):
                head += [", ", figure(samples, "{:,}".format), " samples"]
            if metric == main and (shots := first.get("num_fewshot")) is not None:
                head += [", ", figure(shots, general), "-shot"]
            cells: list[TableCell | None] = []
            for row in models:
                value = row.get("tasks", task, "metrics", metric)
                error = row.get("tasks", task, "metrics", error_key(metric))
                form = percent if value and value.is_number and 0 <= value.value <= 1 else fixed(2)
                cells.append(_cell(value, error, form))
            rows.append(TableRow(head, None, cells))
    return Table("task", [text(row["name"]) for row in models], rows) if rows else None


def _comparisons(measurements: list[Node]) -> list[tuple[Text, list[Comparison]]]:
    """Comparisons by metric."""
    groups: dict[str, list[Node]] = {}
    for measurement in measurements:
        for comparison in measurement.get("comparisons") or ():
            if not all(comparison[key].is_number for key in ("difference", "low", "high")):
                continue  # a broken model: its row says so
            groups.setdefault(comparison["metric"].value, []).append(comparison)
    return [
        (
            text(rows[0]["metric"]),
            [
                Comparison(
                    a=text(row["a"]),
                    b=text(row["b"]),
                    difference=figure(row["difference"], signed),
                    low=figure(row["low"], signed),
                    high=figure(row["high"], signed),
                    samples=figure(samples, "{:,}".format) if (samples := row.get("samples")) else None,
                    significant=row["significant"].value,
                    place=place,
                )
                for row, place in zip(rows, intervals(rows), strict=True)
            ],
        )
        for rows in groups.values()
    ]


def _pareto(measurements: list[Node], styles: dict[str, int]) -> Iterator[Scatter]:
    """Quality against bytes and against speed, from the latest measurement that holds two models or more."""
    costs = (
        (("bytes",), "weights on disk", size, False),
        (("decode_tokens_per_second",), "decode, tokens/s", general, True),
    )
    qualities = (("perplexity", "perplexity"), ("self_perplexity", "perplexity, own text"))
    for keys, label, form, more_is_better in costs:
        for measurement, (key, title) in product(reversed(measurements), qualities):
            points = [
                (row["name"].value, styles[row["name"].value], x, y)
                for row in measurement["rows"]
                if (x := row.get(*keys)) and (y := row.get(key)) and x.is_number and y.is_number
            ]
            if len(points) >= 2:
                forms = {"x_form": form, "y_form": general}
                yield scatter(label, label, title, points, **forms, more_is_better=more_is_better)
                break


def _by_position(measurements: list[Node], styles: dict[str, int]) -> Iterator[LineChart]:
    for measurement in measurements:
        series: list[tuple[Text | str, int, list[tuple[float, Node]], str]] = []
        for row in measurement["rows"]:
            positions = row.get("perplexity_by_position")
            points = [
                ((position["start"].value + position["end"].value) / 2, position["perplexity"])
                for position in positions or ()
                if position["perplexity"].is_number
            ]
            if points:
                series.append((text(row["name"]), styles[row["name"].value], points, ""))
        if series:
            yield line_chart(
                "Perplexity by position",
                "position in the window, tokens",
                "perplexity",
                series,
                lambda x: f"around token {x:,.0f}",
            )


def _recall(
    measurements: list[Node], styles: dict[str, int], kind: str, by: str, name: Callable[[float], str]
) -> Iterator[Panel]:
    """A grid a model: context length from left to right, depth or pairs from top to bottom."""
    for measurement in measurements:
        for row in measurement["rows"]:
            found = row.get("recall", kind)
            if not found or not found.value:
                continue
            lengths = sorted({cell["length"].value for cell in found})
            steps = sorted({cell[by].value for cell in found})
            numbers = {
                (steps.index(cell[by].value), lengths.index(cell["length"].value)): cell["accuracy"]
                for cell in found
                if cell["accuracy"].is_number
            }
            if not numbers:
                continue
            grid = heat_map(
                text(row["name"]),
                [name(step) for step in steps],
                [f"{length:,}" for length in lengths],
                numbers,
                row_label=by,
                column_label="length",
                unit=(0.0, 1.0, "0 %", "100 %"),
                form=lambda value: f"{100 * value:.0f}",
                written=True,
            )
            yield Panel(text(row["name"]), styles[row["name"].value], grid)


def _dropped(measurements: list[Node], styles: dict[str, int]) -> Iterator[Panel]:
    """A grid a sparse model: the share of inputs that sparse tokens dropped, layers from left to right."""
    for measurement in measurements:
        for row in measurement["rows"]:
            found = row.get("dropped_inputs")
            if not found or not found.value:
                continue
            linears = [(name.rpartition(".")[2].removesuffix("_proj"), list(shares)) for name, shares in found.items()]
            numbers = {
                (place, layer): share
                for place, (_, shares) in enumerate(linears)
                for layer, share in enumerate(shares)
                if share.is_number
            }
            if not numbers:
                continue
            grid = heat_map(
                text(row["name"]),
                [name for name, _ in linears],
                [str(layer) for layer in range(max(len(shares) for _, shares in linears))],
                numbers,
                row_label="input of",
                column_label="layer",
                unit=(0.0, 1.0, "0 %", "100 %"),
                form=lambda value: f"{100 * value:.1f} %",
            )
            yield Panel(text(row["name"]), styles[row["name"].value], grid)


def _loss_curves(report: Node) -> Iterator[LineChart]:
    """The losses of each stage that trains; of one that trains layers, those of the first, middle and last layer."""
    for stage, entries in stages.items() if (stages := report.get("stages")) else ():
        curves = []
        for index, entry in enumerate(entries):
            losses = entry.get("losses")
            points = [(float(step), node) for step, node in enumerate(losses or (), 1) if node.is_number]
            if losses and len(points) > 1:
                curves.append((f"layer {index}", points, losses.at))
        if not curves:
            continue
        title, several = _stage_title(stage), len(curves) > 1
        shown = sorted({0, len(curves) // 2, len(curves) - 1})
        series: list[tuple[Text | str, int, list[tuple[float, Node]], str]] = [
            (name if several else title, style, points, at)
            for style, (name, points, at) in enumerate((curves[place] for place in shown), 1)
        ]
        chart = line_chart(title, "update", "loss", series, lambda x: f"update {x:.0f}")
        if not several:
            points = curves[0][1]
            chart.first_last = figure(points[0][1], general), figure(points[-1][1], general)
        yield chart


def _stage_title(stage: str) -> str:
    return _words(stage.replace(".", ": "))


@dataclass(frozen=True)
class StageByLayer:
    """What a stage measured in each layer.

    Attributes:
        title: of the stage.
        heat_maps: families of numbers, such as the error of each linear.
        charts: numbers of which a layer has one, or one before and one after.
        constants: numbers that are the same in every layer.
    """

    title: str
    heat_maps: list[HeatMap]
    charts: list[LineChart]
    constants: list[tuple[str, Figure]]


def _layers(report: Node) -> Iterator[StageByLayer]:
    """Metrics a layer.

    `q_proj error` and `k_proj error` are a family, `error`; `loss_first` and `loss_last` share a chart, and so do
    `loss` and `loss, unscaled`.
    """
    for stage, entries in stages.items() if (stages := report.get("stages")) else ():
        layers = list(entries)
        if len(layers) < 2:
            continue
        families: dict[str, list[str]] = {}
        singles: dict[str, list[str]] = {}
        constants: list[tuple[str, Figure]] = []
        metrics = {
            key: [node for layer in layers if (node := layer.get(key)) and node.is_number]
            for key in dict.fromkeys(key for layer in layers for key, node in layer.items() if node.is_number)
        }
        for key in metrics:
            name, _, family = key.rpartition(" ")
            families.setdefault("" if family.isdigit() else family if name else key, []).append(key)
        for family in [family for family, keys in families.items() if len(keys) < 2]:
            key = families.pop(family)[0]
            if len({node.value for node in metrics[key]}) == 1:
                constants.append((_words(key), derived("same", metrics[key], general)))
            else:
                singles.setdefault(re.sub(r"_(before|after|first|last)$|, .*", "", key), []).append(key)
        heat_maps = [_layer_heat_map(layers, keys, family) for family, keys in families.items()]
        charts = [_layer_chart(layers, keys, stem) for stem, keys in singles.items()]
        if heat_maps or charts or constants:
            yield StageByLayer(_stage_title(stage), heat_maps, charts, constants)


def _words(key: str) -> str:
    return key.replace("_", " ")


def _layer_heat_map(layers: list[Node], keys: list[str], family: str) -> HeatMap:
    labels = [key.removesuffix(family).strip() or key for key in keys]
    short = [label.rsplit(".", 1)[-1] for label in labels]
    numbers = {
        (row, column): node
        for row, key in enumerate(keys)
        for column, layer in enumerate(layers)
        if (node := layer.get(key)) and node.is_number
    }
    return heat_map(
        f"{family or 'value'} by layer",
        short if len(set(short)) == len(short) else labels,
        [str(index) for index in range(len(layers))],
        numbers,
        row_label="linear",
        column_label="layer",
    )


def _layer_chart(layers: list[Node], keys: list[str], stem: str) -> LineChart:
    series: list[tuple[Text | str, int, list[tuple[float, Node]], str]] = []
    earlier = re.compile(r"_(before|first)$|, ")
    for style, key in enumerate(sorted(keys, key=lambda key: not earlier.search(key))):
        points = [(float(i), node) for i, layer in enumerate(layers) if (node := layer.get(key)) and node.is_number]
        series.append((_words(key), style if len(keys) > 1 else 1, points, ""))
    return line_chart(_words(stem), "layer", "", series, lambda x: f"layer {x:.0f}")


def _prompts(measurements: list[Node], styles: dict[str, int]) -> Iterator[Prompt]:
    """What each model wrote after each prompt, side by side."""
    for measurement in measurements:
        prompts: dict[str, Prompt] = {}
        for row in measurement["rows"]:
            for sample in row.get("generations", "samples") or ():
                prompt = text(sample["prompt"])
                entry = prompts.setdefault(prompt.text, Prompt(prompt, []))
                entry.answers.append(
                    (
                        text(row["name"]),
                        styles[row["name"].value],
                        Text(sample["text"].value.strip(), sample["text"].at),
                    )
                )
        yield from prompts.values()
