"""The `kit` command: parse, call one function, print. Only typer is imported before a command runs."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core


class Group(typer.core.TyperGroup):
    """Says how to go on after an interrupt; typer alone would say "Aborted!"."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _interrupted()


app = typer.Typer(
    name="kit",
    cls=Group,
    help="Make a Hugging Face language model cheaper to run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List, show and copy recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

SCHEMES = {"w4afp8": "fireq", "w4a16": "w4a16", "fp8": "fp8", "rtn": "rtn"}  # and their presets

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, GGUF file, hub id, or smollm2.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda:0.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let code inside the checkpoint run.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries underneath say.")]
Dataset = Annotated[
    str | None,
    typer.Option(help="Hub id, .txt/.jsonl/.parquet file, folder, or self.", show_default=False),
]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe; repeatable.")]
Kernels = Annotated[
    bool,
    typer.Option("--kernels/--no-kernels", help="Quantized models on the INT4-FP8 kernels, on a GPU that has them."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to make.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
PushToHub = Annotated[
    str | None, typer.Option(metavar="REPO", help="Upload the result, privately.", show_default=False)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from kit import __version__

        print(__version__)
        raise typer.Exit()


def _with_options_of(
    other: Callable[..., Any], without: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `other` that it has not itself; they arrive in its `**options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        keyword = inspect.Parameter.KEYWORD_ONLY
        shared = {k: p for k, p in inspect.signature(other, eval_str=True).parameters.items() if k not in without}
        own = inspect.signature(command, eval_str=True).parameters
        named = {k: p for k, p in (shared | own).items() if p.kind not in (p.POSITIONAL_ONLY, p.VAR_KEYWORD)}
        signature = inspect.Signature([p.replace(kind=keyword) for p in named.values()])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {name: p.annotation for name, p in named.items()}
        return command

    return decorate


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["KIT_DEBUG"] = "1"


@app.command()
def convert(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name or YAML file; see `kit recipes ls`.")],
    output: Output,
    set_: Settings = None,
    dataset: Dataset = None,
    num_samples: Annotated[int | None, typer.Option(help="Rows of data.", show_default=False)] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a row.", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Rows an update, in every stage.", show_default=False)
    ] = None,
    keep_full: Annotated[
        str | None,
        typer.Option(
            help="Layers that a linearizing recipe leaves alone: 25% (the most sensitive), 1/4, or [0,7].",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default=False, help="Seed of data and training.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the result: auto, bfloat16, float16, float32.")] = "auto",
    device: Device = "auto",
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens of the before/after table; 0: none.")] = 4096,
    activations: Annotated[
        str, typer.Option(help="Where hidden states live: memory, disk, or auto (by their size).")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed conversion.")] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a model with a recipe and write a new checkpoint."""
    data = {"data.dataset": dataset, "data.num_samples": num_samples, "data.seq_len": seq_len, "seed": seed}
    _run_recipe(
        model,
        recipe,
        [*_settings(data | {"keep_full": keep_full}), *(set_ or [])],
        batch_size=batch_size,
        activations=activations,
        output=output,
        dtype=dtype,
        device=device,
        eval_tokens=eval_tokens,
        max_shard_size=max_shard_size,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        push_to_hub=push_to_hub,
        revision=revision,
        trust_remote_code=trust_remote_code,
        json_=json_,
        quiet=quiet,
        verbose=verbose,
    )


@app.command()
def adapt(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name or YAML file; see `kit recipes ls`.")],
    output: Output,
    train: Annotated[
        str | None, typer.Option(help="What to learn: a hub id, a file or a folder.", show_default=False)
    ] = None,
    knowledge: Annotated[
        str | None,
        typer.Option(help="What to keep: the same, or self (text sampled from the model).", show_default=False),
    ] = None,
    covariance: Annotated[
        Path | None,
        typer.Option(help="File of covariances: read if it exists, else measured and written.", show_default=False),
    ] = None,
    dynamic_rank: Annotated[
        bool, typer.Option("--dynamic-rank", help="Ranks by how compact each linear's spectrum is, at equal cost.")
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a whole checkpoint, and the adapter in its folder adapter.")
    ] = False,
    set_: Settings = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Rows an update.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(show_default=False, help="Seed of data and training.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the base in training; auto: float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    device: Device = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file of --merge.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed training.")] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    revision: Revision = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train an adapter that learns --train and keeps --knowledge; a plain PEFT LoRA folder."""
    from kit.convert.adapt import AdaptOptions, plan
    from kit.convert.adapt import adapt as run
    from kit.convert.checkpoint import open_checkpoint
    from kit.convert.pipeline import parse_size
    from kit.recipes import load_recipes

    _libraries(verbose)
    settings = {"train_data.dataset": train, "data.dataset": knowledge, "training.batch_size": batch_size, "seed": seed}
    settings["dynamic_rank"] = True if dynamic_rank else None
    recipes = load_recipes(recipe, [*_settings(settings), *(set_ or [])])
    checkpoint = open_checkpoint(model, revision=revision)
    options = AdaptOptions(
        output=output,
        dtype=dtype,
        device=device,
        resume=resume,
        overwrite=overwrite,
        max_shard_size=parse_size(max_shard_size),
        command=_command_line(),
        covariance=covariance,
        merge=merge,
    )
    items = {item.what: item.value for item in plan(checkpoint, recipes, options)}
    if dry_run or not json_:
        _print_json({"plan": items}) if json_ else _print_pairs("Plan", items)
    if dry_run:
        return
    report = run(checkpoint, recipes, options, _progress(quiet or json_))
    if push_to_hub:
        from kit.convert.hub import push

        report["hub"] = push(output, push_to_hub)
    if json_:
        _print_json({"output": str(output), **report})
        return
    (stage,) = next(iter(report["stages"].values()))
    losses, cost = stage["losses"], report["cost"]
    last = losses[-10:]
    if losses:
        print(f"loss {losses[0]:.3f} at first, {sum(last) / len(last):.3f} in the last {len(last)} updates")
    print(
        f"{output}: trained, written and verified in {cost['seconds']:.0f} s, "
        f"peak {cost['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


@app.command()
def quantize(
    model: Model,
    output: Output,
    int4_fp8: Annotated[
        bool, typer.Option("--int4-fp8", help="INT4 weights, FP8 activations, INT4 cache; the same as --scheme w4afp8.")
    ] = False,
    scheme: Annotated[
        str, typer.Option(help=f"{', '.join(SCHEMES)}; rtn is w4afp8 by plain rounding, the baseline.")
    ] = "w4afp8",
    group_size: Annotated[
        int | None, typer.Option(help="Inputs that share a scale; else 128 or 64, as it divides.", show_default=False)
    ] = None,
    bits_budget: Annotated[
        float | None,
        typer.Option(help="Bits a weight on average; more than INT4 buys FP8 linears.", show_default=False),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Linears to leave alone: a name, or re:PATTERN; repeatable.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="any, transformers or vllm: an engine that must take the result.")
    ] = "any",
    set_: Settings = None,
    dataset: Dataset = None,
    num_samples: Annotated[int | None, typer.Option(help="Rows of data.", show_default=False)] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a row.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(show_default=False, help="Seed of data and rotations.")] = None,
    dtype: Annotated[str, typer.Option(help="Of what stays unquantized: auto, bfloat16, float16, float32.")] = "auto",
    device: Device = "auto",
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens of the before/after table; 0: none.")] = 4096,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a killed quantization.")] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    push_to_hub: PushToHub = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a model; a front for `kit convert --recipe fireq`."""
    from kit.convert.errors import ExitCode, KitError, closest

    if scheme.lower() not in SCHEMES or (int4_fp8 and scheme.lower() not in ("w4afp8", "rtn")):
        advice = "--int4-fp8 goes with w4afp8 and rtn" if int4_fp8 else f"{closest(scheme, SCHEMES)}choose one of: "
        raise KitError(
            f"'{scheme}' is no scheme" if scheme.lower() not in SCHEMES else f"--int4-fp8 is not scheme {scheme}",
            where="--scheme",
            next_step=advice if int4_fp8 else advice + ", ".join(SCHEMES),
            exit_code=ExitCode.USAGE,
        )
    settings = {
        "group_size": group_size,
        "bits_budget": bits_budget,
        "target": None if target == "any" else target,
        "data.dataset": dataset,
        "data.num_samples": num_samples,
        "data.seq_len": seq_len,
        "seed": seed,
        "ignore": f"[{', '.join(map(repr, ignore))}]" if ignore else None,
    }
    _run_recipe(
        model,
        SCHEMES[scheme.lower()],
        [*_settings(settings), *(set_ or [])],
        output=output,
        dtype=dtype,
        device=device,
        eval_tokens=eval_tokens,
        max_shard_size=max_shard_size,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        push_to_hub=push_to_hub,
        revision=revision,
        trust_remote_code=trust_remote_code,
        json_=json_,
        quiet=quiet,
        verbose=verbose,
    )


@app.command()
@_with_options_of(convert)
def sparsify(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", help="r-sparse, chess, teal, wina, or a YAML file.")
    ] = "r-sparse",
    sparsity: Annotated[
        float | None, typer.Option(help="Share of inputs that a token drops, 0.5 unless given.", show_default=False)
    ] = None,
    ppl_budget: Annotated[
        str | None, typer.Option(help="Percent that perplexity may grow by, such as 1%.", show_default=False)
    ] = None,
    allocator: Annotated[str | None, typer.Option(help="uniform or greedy.", show_default=False)] = None,
    dense_prefill: Annotated[
        bool, typer.Option("--dense-prefill/--strict", help="Prompts run dense, or every token is sparse.")
    ] = True,
    set_: Settings = None,
    **options: Any,
) -> None:
    """Make activations sparse, so that decoding reads fewer weights; a front for `kit convert`."""
    chosen = {"sparsity": sparsity, "ppl_budget": ppl_budget, "allocator": allocator}
    chosen["dense_prefill"] = None if dense_prefill else "false"
    convert(recipe=recipe, set_=[*_settings(chosen), *(set_ or [])], **options)


def _settings(values: dict[str, Any]) -> list[str]:
    """key=value of the options that were given."""
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def _run_recipe(
    model: str,
    recipe: str,
    overrides: list[str],
    *,
    output: Path,
    dtype: str,
    device: str,
    eval_tokens: int,
    max_shard_size: str,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    push_to_hub: str | None,
    revision: str | None,
    trust_remote_code: bool,
    json_: bool,
    quiet: bool,
    verbose: bool,
    batch_size: int | None = None,
    activations: str = "auto",
) -> None:
    """Plan, convert, print: what `convert` and its fronts share."""
    from kit.convert.checkpoint import open_checkpoint
    from kit.convert.pipeline import Options, parse_size, plan
    from kit.convert.pipeline import convert as run
    from kit.recipes import load_recipes

    _libraries(verbose)
    recipes = load_recipes(recipe, overrides)
    if batch_size is not None:
        for each in recipes:
            each.set_batch_size(batch_size)
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    options = Options(
        output=output,
        dtype=dtype,
        device=device,
        resume=resume,
        overwrite=overwrite,
        max_shard_size=parse_size(max_shard_size),
        eval_tokens=eval_tokens,
        activations=activations,
        command=_command_line(),
    )
    items = plan(checkpoint, recipes, options)
    if not json_:
        _print_pairs("Plan", {item.what: item.value for item in items})
    if dry_run:
        if json_:
            _print_json({"plan": {item.what: item.value for item in items}})
        return
    report = run(checkpoint, recipes, options, _progress(quiet or json_))
    if push_to_hub:
        from kit.convert.hub import push

        report["hub"] = push(output, push_to_hub)
    if json_:
        _print_json({"output": str(output), **report})
        return
    if "evaluation" in report:
        _print_evaluation(report["evaluation"])
    cost = report["cost"]
    print(
        f"{output}: written and verified in {cost['seconds']:.0f} s, peak {cost['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


@app.command()
def augment(
    items: Annotated[
        Path, typer.Argument(metavar="ITEMS", help="JSONL of title, text and maybe image.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSONL file to make.", show_default=False)],
    writer: Annotated[
        str,
        typer.Option(help="Model that writes questions, or address of a server (http.../v1); none: templates only."),
    ] = "none",
    writer_model: Annotated[
        str | None, typer.Option(help="The server's name of the model; else its only one.", show_default=False)
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="YAML of templates; else kit's own.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of the writer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Questions to the writer at a time.")
    ] = 8,
    limit: Annotated[
        int | None, typer.Option("--limit", "-L", min=1, help="Items at most.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of templates, statements and sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of a local writer: auto, bfloat16, float16, float32.")] = "auto",
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn pieces of knowledge into conversations to train on (KORE augmentation)."""
    _libraries(verbose)
    from kit.convert.augment import augment as run
    from kit.convert.writers import is_local, open_writer

    if is_local(writer):
        from kit.convert.pipeline import resolve_device

        device = resolve_device(device)
    opened = open_writer(
        writer,
        model=writer_model,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    counts = run(
        items,
        output,
        writer=opened,
        templates=templates,
        seed=seed,
        limit=limit,
        resume=resume,
        overwrite=overwrite,
        progress=_progress(quiet or json_),
    )
    if json_:
        _print_json({"output": str(output), **counts})
        return
    records = ", ".join(f"{count} {kind}" for kind, count in counts["records"].items())
    print(f"{output}: {sum(counts['records'].values())} records of {counts['items']} items: {records}")
    for name, count in {"repeated records": counts["repeated_records"], **counts["dropped"]}.items():
        if count:
            print(f"  left out: {count} {name.replace('_', ' ')}")


def _measure(
    run: Any,
    open_model: Any,
    /,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models to measure.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The model they were made from.", show_default=False)] = None,
    dataset: Dataset = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a window of --dataset.")] = 2048,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", "-t", help="Of lm-evaluation-harness: arc_easy,mmlu,gsm8k.", show_default=False),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in a task's prompt; else its own number.", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Local files of the tasks; else they are downloaded.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Requests of tasks a forward pass.")] = 1,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", "-L", help="At most so many windows, and samples a task (mmlu: a subject).", show_default=False
        ),
    ] = None,
    num_tokens: Annotated[int, typer.Option(help="Held-out tokens sampled from the base; 0: none.")] = 4096,
    ablations: Annotated[bool, typer.Option("--ablations", help="Also the first, a branch taken away.")] = False,
    speed: Annotated[bool, typer.Option(help="Time prefill and decode.")] = True,
    recall: Annotated[
        str | None,
        typer.Option(metavar="N,N", help="Recall from contexts of so many tokens.", show_default=False),
    ] = None,
    haystack: Annotated[
        str | None, typer.Option(help="Text around --recall's needle; else --dataset.", show_default=False)
    ] = None,
    generations: Annotated[int, typer.Option(min=0, help="Held-out prompts to continue greedily.")] = 0,
    retention: Annotated[
        Path | None,
        typer.Option(
            metavar="QUESTIONS",
            help="JSONL of what was learned, beside what was kept of --dataset.",
            show_default=False,
        ),
    ] = None,
    covariance: Annotated[
        Path | None, typer.Option(help="Of --retention's leak; else measured on --dataset.", show_default=False)
    ] = None,
    kernels: Kernels = True,
    dense_prefix: Annotated[
        int, typer.Option(min=0, help="Sparse models: tokens of a text that run dense; else every token is sparse.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampled text.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results.json and the tasks' samples.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Take the samples that --output has.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --output.")] = False,
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, bfloat16, float16, float32.")] = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> dict[str, Any]:
    """Open the models and measure: what `eval` and `compare` share, and the options of both."""
    _libraries(verbose)
    from kit.convert.checkpoint import open_checkpoint
    from kit.convert.errors import ExitCode, KitError
    from kit.convert.pipeline import resolve_device
    from kit.convert.retention import RetentionOptions
    from kit.convert.task_data import TaskOptions, parse_names

    short = [_short(name) for name in models]
    names = short if len(set(short)) == len(short) else models
    if covariance is not None and retention is None:
        raise KitError(
            "covariances are for --retention, which is not asked for",
            where="--covariance",
            next_step="add --retention QUESTIONS.jsonl",
            exit_code=ExitCode.USAGE,
        )
    opened = [open_model(model, base=base, trust_remote_code=trust_remote_code) for model in models]
    return run(
        dict(zip(names, opened, strict=True)),
        base=open_checkpoint(base, trust_remote_code=trust_remote_code) if base else None,
        num_tokens=num_tokens,
        dataset=dataset,
        seq_len=seq_len,
        max_windows=limit,
        seed=seed,
        dtype=dtype,
        device=resolve_device(device),
        ablations=ablations,
        speed=speed,
        tasks=TaskOptions(parse_names(tasks), limit, num_fewshot, data_dir, batch_size) if tasks is not None else None,
        output=output,
        resume=resume,
        overwrite=overwrite,
        recall=_lengths(recall),
        haystack=haystack,
        generations=generations,
        retention=RetentionOptions(retention, covariance, limit, batch_size) if retention is not None else None,
        dense_prefix=dense_prefix,
        kernels=kernels,
        trust_remote_code=trust_remote_code,
        progress=_progress(quiet or json_),
    )


def _lengths(text: str | None, option: str = "--recall", what: str = "lengths") -> list[int] | None:
    """The numbers of 512,1024,2048, ascending."""
    from kit.convert.errors import ExitCode, KitError

    if text is None:
        return None
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise KitError(
            f"'{text}' are no {what}", where=option, next_step="write 512,1024,2048", exit_code=ExitCode.USAGE
        ) from error


@app.command("eval")
@_with_options_of(_measure)
def evaluate(**options: Any) -> None:
    """Measure perplexity, agreement with the base, recall, continuations, speed and memory."""
    from kit.convert.adapted import open_model
    from kit.convert.evaluate import evaluate as run

    result = _measure(run, open_model, **options)
    _print_json(result) if options["json_"] else _print_evaluation(result)


@app.command()
@_with_options_of(_measure)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Models, or .json files of `kit eval --json`.", show_default=False),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="PNG file: quality against bytes and speed.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for compare.json, pareto.png and what eval writes.", show_default=False
        ),
    ] = None,
    **options: Any,
) -> None:
    """Measure several models, and say which differences between them are significant."""
    from kit.convert.compare import FILES, open_or_read, write_comparison
    from kit.convert.compare import compare as run
    from kit.convert.outputs import check_files

    again = options["overwrite"] or options["resume"]
    check_files(output, FILES, plot=plot, replace=again, resume=True)
    result = _measure(run, open_or_read, models=models, output=output, **options)
    _print_json(result) if options["json_"] else _print_comparison(result)
    write_comparison(result, plot, output)


@app.command()
@_with_options_of(
    _measure,
    without=("models", "ablations", "speed", "generations", "retention", "covariance", "dense_prefix", "kernels"),
)
def ablate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A linearized checkpoint.", show_default=False)],
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens a window of --dataset; else 4 times the training rows.", show_default=False),
    ] = None,
    recall: Annotated[
        str, typer.Option(metavar="N,N", help="Recall from contexts of so many tokens; 0: none.")
    ] = "1024,2048,4096,8192",
    plot: Annotated[Path | None, typer.Option(help="PNG file of the plot.", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder for ablate.json, .md, .png and what eval writes.", show_default=False
        ),
    ] = None,
    **options: Any,
) -> None:
    """Say whether a linearized model's linear branch carries weight: beside its parts and training-free windows."""
    from kit.convert.ablate import ablate as run
    from kit.convert.ablation_table import FILES, notes, rich_table, write_ablation
    from kit.convert.checkpoint import open_checkpoint
    from kit.convert.outputs import check_files
    from kit.convert.report import settings_line

    def open_model(name: str, *, base: str | None, trust_remote_code: bool) -> Any:
        return open_checkpoint(name, trust_remote_code=trust_remote_code)

    again = options["overwrite"] or options["resume"]
    check_files(output, FILES, plot=plot, replace=again, resume=True)
    options |= {"models": [model], "seq_len": seq_len, "recall": recall, "output": output}
    result = _measure(run, open_model, **options)
    if options["json_"]:
        _print_json(result)
    else:
        console = _console()
        console.print(rich_table(result))
        for line in (settings_line(result["settings"]), *notes(result)):
            console.print(line, highlight=False, markup=False)
    write_ablation(result, plot, output)


@app.command("report")
def write_report(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Converted checkpoint.", show_default=False)],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="What `kit eval --json` or `kit compare --json` printed; repeatable.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page to write; else OUT/report.html.", show_default=False)
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Also renew OUT/README.md with these results.")] = False,
) -> None:
    """Write a conversion's report as one HTML page."""
    from kit.convert.html import write_html
    from kit.convert.report import renew_card
    from kit.recipes import load_recipes

    recipes = load_recipes(str(folder / "kit_recipe.yaml")) if card else []
    print(f"{write_html(folder, results or [], output)}: open it in a browser")
    if card:
        print(f"{renew_card(folder, recipes, results or [])}: renewed")


@app.command()
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Answer this and stop.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Device = "auto",
    kernels: Kernels = True,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a model; text streams as it is made."""
    _libraries(verbose)
    from kit.convert.chat import chat as run
    from kit.convert.checkpoint import open_checkpoint
    from kit.convert.pipeline import resolve_device

    run(
        open_checkpoint(model, trust_remote_code=trust_remote_code),
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
        kernels=kernels,
    )


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Folder, GGUF file, hub id, or smollm2.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Model to measure beside; 16bit with --config.", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="Random INT4-FP8 weights of this shape: llama-3-8b, ..., or a config.json.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[str, typer.Option("--batch-size", "-b", help="Rows; several with commas.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens of the prompt; several with commas.")] = "512",
    new_tokens: Annotated[int, typer.Option(help="Steps of decoding a measurement.")] = 32,
    repeats: Annotated[int, typer.Option(help="Of each prefill; the median counts.")] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of prompts and random weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in --output.")] = False,
    json_: Json = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure prefill, decoding, time to the first token, and memory, over batch and context."""
    _libraries(verbose)
    from kit.convert import bench as benching
    from kit.convert.outputs import check_files
    from kit.convert.pipeline import resolve_device

    check_files(output, benching.FILES, replace=overwrite)
    latest: dict[str, Any] = {}

    def keep(result: dict[str, Any]) -> None:
        latest.update(result)
        if output is not None:
            benching.write_bench(result, output)

    try:
        result = benching.bench(
            model,
            base=base,
            config=config,
            batches=_lengths(batch_size, "--batch-size", "batch sizes") or [],
            contexts=_lengths(context, "--context") or [],
            new_tokens=new_tokens,
            repeats=repeats,
            dtype=dtype,
            device=resolve_device(device),
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=_progress(quiet or json_).log,
            keep=keep,
        )
    except KeyboardInterrupt:
        print(benching.missing_line(latest), file=sys.stderr)
        raise
    _print_json(result) if json_ else _print_bench(result)


@app.command()
def covariance(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to make (.safetensors).", show_default=False)],
    dataset: Dataset = "self",
    num_samples: Annotated[int, typer.Option(help="Rows of data.")] = 256,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = 1024,
    target_modules: Annotated[
        list[str] | None,
        typer.Option(help="Linears by the end of their names, repeatable; else all.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of data.")] = 0,
    dtype: Annotated[str, typer.Option(help="To compute in: auto, bfloat16, float16, float32.")] = "auto",
    device: Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure the second moments of what enters a model's linears; adapters and other runs reuse the file."""
    from kit.convert.checkpoint import open_checkpoint
    from kit.convert.data import DataConfig
    from kit.convert.errors import ExitCode, KitError
    from kit.convert.pipeline import resolve_device

    if output.exists() and not overwrite:
        raise KitError(
            "the output exists already",
            where=str(output),
            next_step="choose another -o, or add --overwrite",
            exit_code=ExitCode.USAGE,
        )
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    _libraries(verbose)
    from kit.convert.covariance_store import measure_covariances

    measured = measure_covariances(
        checkpoint,
        DataConfig(dataset=dataset or "self", num_samples=num_samples, seq_len=seq_len),
        target_modules=target_modules,
        dtype=dtype,
        device=resolve_device(device),
        seed=seed,
        trust_remote_code=trust_remote_code,
        progress=_progress(quiet or json_),
    )
    measured.save(output)
    facts = {
        "output": str(output),
        "linears": len(measured.linears),
        "inputs": len(measured.packed),
        "bytes": output.stat().st_size,
        **measured.sources[0],
    }
    if json_:
        _print_json(facts)
    else:
        _print_pairs(str(output), facts)


@app.command("inspect")
def inspect_model(
    model: Model,
    stats: Annotated[
        bool, typer.Option("--stats", help="Run it on text; measure what tells which recipe fits.")
    ] = False,
    dataset: Dataset = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, help="Rows of data, 8 unless given.", show_default=False)
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a row, 1024 unless given.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of text.")] = 0,
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, bfloat16, float16, float32.")] = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print what a model is and which recipes take it; weights are not read, unless with --stats."""
    from kit.convert.checkpoint import open_checkpoint
    from kit.convert.errors import ExitCode, KitError
    from kit.convert.inspect import inspect, recommend
    from kit.recipes import available

    if not stats and (dataset, num_samples, seq_len) != (None, None, None):
        raise KitError(
            "only --stats looks at text",
            where="--dataset, --num-samples, --seq-len",
            next_step="add --stats, or leave them out",
            exit_code=ExitCode.USAGE,
        )
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    recipes = [cls(cls.config_class(recipe=name)) for name, cls in available().items()]
    facts = inspect(checkpoint, recipes)
    if stats:
        _libraries(verbose)
        from kit.convert.data import DataConfig
        from kit.convert.pipeline import resolve_device
        from kit.convert.stats import measure

        measured = measure(
            checkpoint,
            DataConfig(dataset=dataset or "self", num_samples=num_samples or 8, seq_len=seq_len or 1024),
            dtype=dtype,
            device=resolve_device(device),
            seed=seed,
            trust_remote_code=trust_remote_code,
            progress=_progress(quiet or json_),
        )
        facts |= {"stats": measured.to_dict(), "recommendation": recommend(checkpoint, recipes, measured)}
    if json_:
        _print_json(facts)
        return
    shown = {key: value for key, value in facts.items() if not isinstance(value, (dict, list))}
    shown["parameters"], shown["bytes"] = f"{facts['parameters']:,}", f"{facts['bytes']:,}"
    for part, count in facts["parameters_by_part"].items():
        shown[f"  {part}"] = f"{count:,}"
    for name, count in facts["parameters_by_dtype"].items():
        shown[f"stored as {name}"] = f"{count:,}"
    cache = facts["cache_bytes"]
    shown["cache (16-bit keys)"] = f"{cache['per_token']:,} bytes a token, and {cache['constant']:,} bytes a sequence"
    for name, refusal in facts["recipes"].items():
        shown[f"recipe {name}"] = f"no: {refusal}" if refusal else "applies"
    _print_pairs(shown.pop("source"), {key.replace("_", " "): value for key, value in shown.items()})
    if stats:
        from kit.convert.stats_tables import print_stats

        print_stats(_console(), measured, facts["recommendation"])


@recipes_app.command("ls")
def recipes_ls(json_: Json = False) -> None:
    """List presets and the recipes they configure."""
    from kit.recipes import available, presets

    known, recipes = presets(), available()
    if json_:
        _print_json([{"name": p.name, "recipe": p.recipe, "summary": p.summary} for p in known.values()])
        return
    for preset in known.values():
        print(f"{preset.name:20} {preset.summary}")
    print()
    for name, cls in recipes.items():
        print(f"{name:20} {(cls.__doc__ or '').splitlines()[0]} {cls.paper}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Preset or recipe.")]) -> None:
    """Print a preset and describe every option of its recipe."""
    from kit.recipes import describe, preset

    found = preset(name)
    print(found.text)
    for path, kind, default, text in describe(found.recipe):
        print(f"{path:28} {kind:12} default {default}\n    {text}")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="Preset.")],
    file: Annotated[Path, typer.Argument(help="Where to; edit it, then `kit convert --recipe FILE`.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a preset to edit it."""
    from kit.convert.errors import ExitCode, KitError
    from kit.recipes import preset

    text = preset(name).text
    if file.exists() and not overwrite:
        raise KitError(
            "the file exists already",
            where=str(file),
            next_step="choose another name, or add --overwrite",
            exit_code=ExitCode.USAGE,
        )
    file.write_text(text, encoding="utf-8")
    print(f"{file}: edit it, then run `kit convert MODEL --recipe {file} -o OUT`")


def _short(name: str) -> str:
    return name.rstrip("/").split("/")[-1]


def _command_line() -> str:
    import shlex

    return shlex.join(["kit", *sys.argv[1:]])


def _libraries(verbose: bool) -> None:
    """Keep transformers and datasets from printing bars and notes over ours."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|datasets)\b")


def _progress(quiet: bool) -> Any:
    from rich.console import Console

    from kit.convert.progress import make_progress

    return make_progress(Console(stderr=True), quiet)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1))


def _print_pairs(title: str, pairs: dict[str, Any]) -> None:
    print(title)
    for key, value in pairs.items():
        print(f"  {key:20} {value}")


def _console() -> Any:
    """Where tables go: as wide as the terminal, or 160 characters."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _print_evaluation(result: dict[str, Any]) -> None:
    from kit.convert.report import rich_table, settings_line
    from kit.convert.tables import print_details

    console = _console()
    console.print(rich_table(result["rows"]))
    console.print(settings_line(result["settings"]), highlight=False)
    _print_paths(console, result)
    _print_tasks(console, result)
    print_details(console, result)


def _print_paths(console: Any, result: dict[str, Any]) -> None:
    """A line for each quantized model: what it ran on."""
    paths = {row["name"]: row["runs_on"] for row in result["rows"] if "runs_on" in row and ", " not in row["name"]}
    for name, path in paths.items():
        console.print(f"{name}: {path}", highlight=False, markup=False)


def _print_tasks(console: Any, result: dict[str, Any]) -> None:
    if "tasks" in result["settings"]:
        from kit.convert.task_table import rich_task_table, tasks_line

        console.print(rich_task_table(result["rows"]))
        console.print(tasks_line(result["settings"]["tasks"]), highlight=False)


def _print_comparison(result: dict[str, Any]) -> None:
    from kit.convert.report import settings_line
    from kit.convert.tables import compared_table, comparison_table, print_details

    console = _console()
    console.print(compared_table(result["rows"], result["comparisons"]))
    console.print(settings_line(result["settings"]), highlight=False)
    _print_paths(console, result)
    if table := comparison_table(result["comparisons"]):
        console.print(table)
    _print_tasks(console, result)
    print_details(console, result)


def _print_bench(result: dict[str, Any]) -> None:
    from kit.convert.bench import table_lines
    from kit.convert.tables import plain_table

    settings, console = result["settings"], _console()
    console.print(plain_table(*table_lines(result["rows"])))
    kinds = {(row.get("kernels"), row.get("graph")) for row in result["rows"] if "error" not in row}
    notes = [settings["device"]]
    notes += ["INT4-FP8 kernels"] * any(kernels for kernels, _ in kinds)
    notes += ["decoding as a CUDA graph"] * any(graph for _, graph in kinds)
    notes += ["random weights"] * settings["random_weights"]
    console.print("; ".join(notes), highlight=False)


def main() -> None:
    """Run the command; errors become three lines and an exit code."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app()
    except SystemExit:
        raise
    except BaseException as error:  # a panic in a Rust extension is no Exception
        _fail(error)


def _fail(error: BaseException) -> None:
    from kit.convert.errors import ExitCode, KitError

    if os.environ.get("KIT_DEBUG"):
        raise error
    if not isinstance(error, KitError):
        error = KitError(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}",
            where=_command_line(),
            next_step="this is unexpected: run `kit --debug ...` for the traceback, and report it",
            exit_code=ExitCode.FAILED,
        )
    print(f"error: {error}", file=sys.stderr)
    sys.exit(int(error.exit_code))


def _interrupted() -> None:
    command, given = _command_line(), {*sys.argv[1:]}
    written = any(argument.startswith(("-o", "--output")) for argument in given)
    again = ""
    if given & {"adapt", "augment", "convert", "quantize", "sparsify"} or (
        given & {"eval", "compare", "ablate"} and written
    ):
        again = " --resume"
    elif "bench" in given and written:
        again = " --overwrite"
    kept = ": finished steps are kept" if again else ""
    command += again if again.strip() not in given else ""
    print(f"interrupted{kept}\n  where: {Path.cwd()}\n  next:  {command}", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
    main()
