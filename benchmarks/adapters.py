"""Learn without forgetting: LoRA, PiSSA, MiLoRA, CorDA (both modes) and KORE at equal trained parameters.

    python benchmarks/adapters.py smollm2 --data-dir DATA --output runs.json --split dev test
    python benchmarks/adapters.py --report runs.json

Targets: `facts`, fifty invented facts (`invented_facts.py`) through `kit augment`'s templates, asked for in held-out
words; `gsm8k`, the form of GSM8K's solutions. Preserved: WikiText, LAMBADA, NQ-open. KORE and CorDA-KPM see covariances
of WikiText's and C4's training part, CorDA-IPM those of what is learned.

`--split dev` measures on other facts, the last 400 rows of GSM8K's training file and the last fifth of WikiText's, with
the first seed. Every method gets the same grid of learning rates, continued beyond an end (1e-4, 3e-5, ...) for as long
as right answers are likeliest there. `--split test` reads the test files, at a method's --learning-rate, or at the one
after which right answers of the development split were likeliest. DATA holds gsm8k_train.jsonl, gsm8k_test.jsonl,
wikitext2_train_5k.txt, wikitext2_raw_test.txt, c4_sample_300.jsonl, lambada_openai_test.jsonl and nq_open_dev.jsonl.

The base is loaded once, in fp32, and its weights are copied back after each run; training and measuring run under bf16
autocast on a GPU. What a method starts from depends on no seed (LoRA's does) and is worked out once, in float64, on the
CPU's cores; --starts keeps it for other processes. A run is measured with its adapter merged. Every run is written to
--output as it ends; --resume goes on. Methods (`base` is one: the model before) and targets may be spread over
processes: --report takes all their files.
On the CPU: --steps 3 --limit 8 --window 128 --targets facts --methods lora kore --seeds 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adapter_tables import best_rates, grouped, plot, read_runs, report
from invented_facts import invented_facts
from torch import Tensor

from kit.convert.adapter_recipe import AdapterPlan, AdapterRecipe, Factors, plan_adapters, rank_for_parameters
from kit.convert.adapters import AdapterState, attach, load_initial, merge, target_linears
from kit.convert.augment import augment
from kit.convert.batches import score
from kit.convert.checkpoint import open_checkpoint
from kit.convert.covariance_store import Covariances, collect_from_model
from kit.convert.data import DataConfig, TokenRows, TrainDataConfig, load_rows, perplexity_windows, read_rows
from kit.convert.errors import KitError
from kit.convert.measure import hardware, versions
from kit.convert.perplexity import measures
from kit.convert.pipeline import resolve_device
from kit.convert.progress import Progress
from kit.convert.recipe import ModelFacts
from kit.convert.retention import Question, adapter_leak, preserve_scores, target_scores
from kit.convert.train import fit
from kit.recipes import load_recipes

METHODS = {  # the recipe of each, and its options
    "lora": ("lora", []),
    "pissa": ("pissa", []),
    "milora": ("milora", []),
    "corda-kpm": ("corda", ["mode=kpm"]),
    "corda-ipm": ("corda", ["mode=ipm"]),
    "kore": ("kore", []),
    "corda-kpm-balanced": ("corda", ["mode=kpm", "split=balanced"]),
}
SIX = list(METHODS)[:6]
BASE = "base"  # the model before
TARGETS = ("facts", "gsm8k")
DECIDES = ("model", "steps", "batch_size", "rank", "window", "limit", "target_modules", "max_new_tokens")
SIZES = {"windows": 32, "lambada": 1000, "nq": 400, "gsm8k": 128}  # what is measured on, unless --limit is less
LADDER = [float(f"{digit}e{power}") for power in range(-6, -1) for digit in (1, 3)]  # rates beyond the grid's ends
DEV_TOKENS = 32  # of a generated answer on the development split, where rates are chosen by likelihoods


@dataclass
class Target:
    """What is learned: its rows, and the questions that tell whether it was."""

    rows: TokenRows
    questions: list[Question]


@dataclass
class Bench:
    """Everything that the runs share."""

    options: argparse.Namespace
    model: Any
    tokenizer: Any
    device: str
    facts: ModelFacts
    weights: dict[str, Tensor]
    knowledge: list[TokenRows]
    split: str = ""
    targets: dict[str, Target] = field(default_factory=dict)
    windows: Tensor = field(default_factory=lambda: torch.empty(0))  # of the preserve set, held out, (N, T)
    lambada: list[tuple[str, str]] = field(default_factory=list)
    nq: list[Question] = field(default_factory=list)
    held_out: dict[str, Tensor] = field(default_factory=dict)
    base_log_probs: Tensor = field(default_factory=lambda: torch.empty(0))
    covariances: dict[str, Covariances] = field(default_factory=dict)
    starts: dict[str, dict[str, Factors]] = field(default_factory=dict)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 on a GPU."""
        return contextlib.nullcontext() if self.device == "cpu" else torch.autocast("cuda", torch.bfloat16)

    def recipe(self, method: str, rank: int, rate: float, seed: int) -> AdapterRecipe:
        """A method as a recipe of kit's."""
        name, own = METHODS[method]
        chosen = [*own, f"rank={rank}", f"seed={seed}", f"training.learning_rate={rate}"]
        chosen += [f"training.steps={self.options.steps}", f"training.batch_size={self.options.batch_size}"]
        if self.options.target_modules:
            chosen.append(f"target_modules=[{', '.join(self.options.target_modules)}]")
        recipe = load_recipes(name, chosen)[0]
        assert isinstance(recipe, AdapterRecipe)
        return recipe

    def plan(self, method: str) -> tuple[AdapterPlan, int]:
        """A method's plan and rank: LoRA's number of trained parameters, as near as ranks come."""
        budget = plan_adapters(self.facts, self.recipe("lora", self.options.rank, 1e-3, 0)).trained_parameters
        assert budget is not None
        rank = rank_for_parameters(plan_adapters(self.facts, self.recipe(method, self.options.rank, 1e-3, 0)), budget)
        return plan_adapters(self.facts, self.recipe(method, rank, 1e-3, 0)), rank


def main() -> None:
    """Run what is asked for and print a table a target."""
    options = parse()
    if options.report:
        settings, runs = read_runs(options.report)
        if options.plot:
            plot(runs, options.plot)
        return print(report(settings, runs))
    if options.output.exists() and not (options.resume or options.overwrite):
        raise SystemExit(f"{options.output} exists: add --resume or --overwrite")
    device = resolve_device(options.device)
    settings = {key: getattr(options, key) for key in DECIDES}
    settings |= {"device": hardware(device), "versions": versions()}
    done: dict[str, Any] = {"settings": settings, "runs": {}}
    if options.resume and options.output.exists():
        done = json.loads(options.output.read_text())
        if done["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{options.output} has other settings: {done['settings']}")
    bench: Bench | None = None
    for split in options.split:
        for target in options.targets:
            for method in options.methods:
                for of in wanted(options, done["runs"], {"split": split, "target": target, "method": method}):
                    bench = bench or load(options, device)
                    if bench.split != split:
                        read_split(bench, split)
                    started = time.monotonic()
                    try:
                        found = run(bench, **of) if "seed" in of else measure(bench, target)
                    except KitError as error:  # a learning rate of a grid may be too high
                        print(f"{key_of(of)}: {error}", flush=True)
                        found = {}
                    done["runs"][key_of(of)] = {"of": of} | found
                    save(options.output, done)
                    print(f"{key_of(of)}: {time.monotonic() - started:.1f} s", flush=True)
    print(report(settings, done["runs"]))


def wanted(options: argparse.Namespace, runs: dict[str, Any], of: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is left to run of a method; what is asked for next may depend on the runs that were yielded before."""
    if of["method"] == BASE:
        yield from [of] * (key_of(of) not in runs)
        return
    dev = of["split"] == "dev"
    rates = sorted(options.learning_rates)
    if not dev:
        given = dict(rate.split("=") for rate in options.learning_rate)
        chosen = best_rates(grouped(runs, "dev", of["target"])).get(of["method"])
        rates = [float(given[of["method"]])] if of["method"] in given else [chosen] if chosen else rates
    for seed in options.seeds[:1] if dev else options.seeds:
        for rate in rates:
            run_of = of | {"learning_rate": rate, "seed": seed}
            if key_of(run_of) not in runs:
                yield run_of
    while dev and options.widen:
        best = best_rates(grouped(runs, "dev", of["target"])).get(of["method"])
        lower = [rate for rate in LADDER if rate < rates[0]][-1:] if best == rates[0] else []
        higher = [rate for rate in LADDER if rate > rates[-1]][:1] if best == rates[-1] else []
        if not (new := lower or higher):
            return
        rates = sorted(rates + new)
        run_of = of | {"learning_rate": new[0], "seed": options.seeds[0]}
        if key_of(run_of) not in runs:
            yield run_of


def key_of(of: dict[str, Any]) -> str:
    """What names a run."""
    return " ".join(f"{name}={value}" for name, value in of.items())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--report", nargs="+", type=Path, help="only print the tables of files that --output wrote")
    parser.add_argument("--plot", type=Path, help="with --report: PNG of what the development grid learned and lost")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, help="JSON of every run")
    parser.add_argument("--starts", type=Path, help="folder that keeps what methods start from")
    parser.add_argument("--methods", nargs="+", choices=[BASE, *METHODS], default=[BASE, *SIX])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8, help="rows an update")
    parser.add_argument("--window", type=int, default=512, help="tokens a row, of training and of the preserve set")
    parser.add_argument("--rank", type=int, default=16, help="LoRA's; other methods train as many parameters")
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="the same grid for every method"
    )
    parser.add_argument("--no-widen", dest="widen", action="store_false", help="no rates beyond the grid")
    parser.add_argument("--learning-rate", action="append", default=[], metavar="METHOD=LR", help="for the test split")
    parser.add_argument("--split", nargs="+", choices=("dev", "test"), default=["dev", "test"], help="in this order")
    parser.add_argument("--limit", type=int, help="windows and questions at most, and calibration rows")
    parser.add_argument("--eval-batch-size", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of a generated answer")
    parser.add_argument("--target-modules", nargs="+", help="linears by the end of their names; else all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    if not options.report and None in (options.model, options.data_dir, options.output):
        parser.error("give a model, --data-dir and --output; or --report")
    return options


def save(path: Path, done: dict[str, Any]) -> None:
    """Write the runs, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(done, indent=1))
    os.replace(part, path)


def load(options: argparse.Namespace, device: str) -> Bench:
    """The base, and what KORE and CorDA-KPM see of the preserved knowledge."""
    checkpoint = open_checkpoint(options.model)
    tokenizer = checkpoint.load_tokenizer()
    model = checkpoint.load_model(torch.float32, device)
    pages = [row for _, row in read_rows(options.data_dir / "c4_sample_300.jsonl")][:200]
    with tempfile.TemporaryDirectory() as folder:
        (text := Path(folder) / "train.txt").write_text(wikitext(options, "train"), encoding="utf-8")
        (web := Path(folder) / "web.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages), "utf-8")
        knowledge = [
            load_rows(DataConfig(dataset=str(file), num_samples=count, seq_len=options.window), tokenizer, seed=0)
            for file, count in ((text, 128), (web, 64))
        ]
    bench = Bench(options, model, tokenizer, device, ModelFacts.of(checkpoint), {}, knowledge)
    linears = target_linears(model, bench.recipe("lora", options.rank, 1e-3, 0).config)
    bench.weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    return bench


def read_split(bench: Bench, split: str) -> None:
    """Read a split's data, and store what the base says of its preserve set."""
    options, dev = bench.options, split == "dev"

    def some(what: str) -> int:
        return min(SIZES[what], options.limit or SIZES[what])

    def rows(name: str, what: str) -> list[dict[str, Any]]:
        return [] if dev else spaced([row for _, row in read_rows(options.data_dir / name)], some(what))

    bench.split = split
    bench.targets = {name: read_target(name, split, bench, some("gsm8k")) for name in options.targets}
    # Which test questions are taken: evenly spaced, so that the choice does not follow the file's order.
    bench.windows = perplexity_windows(joined(wikitext(options, split)), bench.tokenizer, options.window)
    bench.windows = torch.stack(spaced(list(bench.windows), some("windows")))
    bench.lambada = [(r["context"], " " + r["continuation"]) for r in rows("lambada_openai_test.jsonl", "lambada")]
    bench.nq = [Question(row["question"] + "?", tuple(row["answer"])) for row in rows("nq_open_dev.jsonl", "nq")]
    positions = torch.arange(options.window).repeat(len(bench.windows), 1)
    held = collect(bench, TokenRows(bench.windows, positions, len(bench.windows), "held out", ""))
    bench.held_out = {name: held.get(name) for name in bench.weights}
    # On the CPU: it is 3 GB, and several processes may share a GPU.
    bench.base_log_probs = torch.empty(bench.windows.numel(), bench.model.config.vocab_size)
    with bench.autocast():
        preserve_scores(bench.model, bench.windows, bench.base_log_probs, True, 4)
    print(f"split {split}: model and data are read", flush=True)


def wikitext(options: argparse.Namespace, part: str) -> str:
    """WikiText: the first four fifths of the training file, its last fifth ("dev"), or the test file."""
    if part == "test":
        return (options.data_dir / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    text = (options.data_dir / "wikitext2_train_5k.txt").read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    return "".join(lines[:cut] if part == "train" else lines[cut:])


def spaced(values: list[Any], count: int) -> list[Any]:
    """At most so many of the values, evenly spaced."""
    count = min(count, len(values))
    return [values[number * len(values) // count] for number in range(count)]


def joined(text: str) -> str:
    """A text file as `kit` reads it: lines, blank ones empty, joined by two line breaks."""
    return "\n\n".join(line if line.strip() else "" for line in text.splitlines(keepends=True))


def read_target(name: str, split: str, bench: Bench, count: int) -> Target:
    """Training rows and held-out questions of a target."""
    options, data, dev = bench.options, bench.options.data_dir, split == "dev"
    with tempfile.TemporaryDirectory() as folder:
        train = Path(folder) / "train.jsonl"
        if name == "facts":
            facts = invented_facts(seed=1 if dev else 0)
            items = Path(folder) / "items.jsonl"
            items.write_text("".join(json.dumps({"title": f.title, "text": f.text}) + "\n" for f in facts))
            augment(items, train, writer=None)
            questions = [Question(question, (fact.value,)) for fact in facts for question in fact.questions]
            questions = spaced(questions, options.limit or len(questions))
        else:
            rows = [row for _, row in read_rows(data / "gsm8k_train.jsonl")]
            asked = rows[-400:] if dev else [row for _, row in read_rows(data / "gsm8k_test.jsonl")]
            train.write_text("".join(json.dumps(row) + "\n" for row in rows[:-400]), encoding="utf-8")
            questions = [Question(row["question"], (row["answer"],)) for row in spaced(asked, count)]
        config = TrainDataConfig(dataset=str(train), seq_len=options.window)
        return Target(load_rows(config, bench.tokenizer, seed=0), questions)


def collect(bench: Bench, rows: TokenRows) -> Covariances:
    """Covariances of at most 128 rows, on the base in memory; tokens that pad are left out."""
    count = min(len(rows.input_ids), bench.options.limit or 128)
    ids, positions = rows.input_ids[:count], rows.position_ids[:count]
    if rows.learned is None:
        batches = [
            {"input_ids": some, "position_ids": where}
            for some, where in zip(ids.split(8), positions.split(8), strict=True)
        ]
    else:  # a row at a time, cut after its last answer: a mask for the padding would undo the documents' separation
        ends = [int(learned.nonzero().max()) + 1 for learned in rows.learned[:count]]
        batches = [
            {"input_ids": ids[n : n + 1, :end], "position_ids": positions[n : n + 1, :end]}
            for n, end in enumerate(ends)
        ]
    targets = list(bench.weights)
    return collect_from_model(bench.model, batches, targets=targets, source=rows.source, sha256=rows.sha256)


def covariances_of(bench: Bench, source: str, target: str) -> Covariances | None:
    """What a method's start needs, measured once: of the target's rows, of the knowledge, or nothing."""
    if source == "none":
        return None
    key = f"{target} {bench.split}" if source == "training" else source
    if key not in bench.covariances:
        parts = [bench.targets[target].rows] if source == "training" else bench.knowledge
        measured = [collect(bench, part) for part in parts]
        first = next(iter(bench.weights))
        bench.covariances[key] = Covariances.merge([(part, float(part.tokens_of(first))) for part in measured])
    return bench.covariances[key]


def start_of(bench: Bench, target: str, method: str, recipe: AdapterRecipe) -> dict[str, Factors] | None:
    """What a method starts from, worked out once on all cores; None for methods that draw."""
    if method == "lora":
        return None
    source = recipe.covariance_source()
    key = f"{method}-{target}-{bench.split}" if source == "training" else method
    if key in bench.starts:
        return bench.starts[key]
    file = bench.options.starts / f"{key}.safetensors" if bench.options.starts else None
    if file and file.exists():
        bench.starts[key] = load_initial(file)
        return bench.starts[key]
    started = time.monotonic()
    covariances, (plan, _) = covariances_of(bench, source, target), bench.plan(method)

    def one(name: str) -> Factors:
        covariance = None if covariances is None else covariances.get(name)
        return recipe.initial_factors(bench.weights[name].cpu(), covariance, plan.linears[name].rank or 1)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            bench.starts[key] = dict(zip(bench.weights, pool.map(one, bench.weights), strict=True))
    finally:
        torch.set_num_threads(threads)
    print(f"start of {key}: {time.monotonic() - started:.1f} s", flush=True)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        AdapterState(bench.starts[key], {}, 1.0, []).save(part)
        os.replace(part, file)
    return bench.starts[key]


def run(bench: Bench, split: str, target: str, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """Attach, train, measure, and put the base's weights back."""
    assert split == bench.split
    plan, rank = bench.plan(method)
    recipe = bench.recipe(method, rank, learning_rate, seed)
    initial = start_of(bench, target, method, recipe)
    started = time.monotonic()
    rows = bench.targets[target].rows
    labels = rows.labels.to(bench.device)
    ids, positions = rows.input_ids.to(bench.device), rows.position_ids.to(bench.device)
    model = attach(bench.model, recipe, initial=initial)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss_of(batch: Tensor) -> Tensor:
        batch = batch.to(bench.device)
        return model(input_ids=ids[batch], position_ids=positions[batch], labels=labels[batch], use_cache=False).loss

    try:
        losses = fit(
            trained,
            loss_of,
            len(ids),
            recipe.config.training,
            seed=seed,
            device=bench.device,
            name="training",
            progress=Progress(),
            row_weights=(rows.labels[:, 1:] != -100).sum(1),
        )
        seconds = time.monotonic() - started
        modules = model.kit_adapter.modules
        base = model.get_base_model()
        a = {name: base.get_submodule(modules[name]).lora_A["default"].weight.detach().cpu() for name in modules}
        bench.model = merge(model)
        found = measure(bench, target)
    finally:
        restore(bench, model)
    leak = adapter_leak(a, bench.held_out)
    return {
        **found,
        "leak": {key: leak[key] for key in ("mean", "chance", "layers")},
        "losses": losses,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "planned_parameters": plan.trained_parameters,
        "rank": rank,
        "training_seconds": seconds,
        "seconds": time.monotonic() - started,
    }


@torch.no_grad()
def restore(bench: Bench, model: Any) -> None:
    """The base as it was: no adapters, its own weights."""
    if any("lora_" in name for name, _ in bench.model.named_parameters()):
        bench.model = model.unload()
    if hasattr(bench.model, "peft_config"):
        del bench.model.peft_config  # PEFT would warn of a second adapter
    bench.model.eval().requires_grad_(False)
    config = bench.recipe("lora", bench.options.rank, 1e-3, 0).config
    for name, linear in target_linears(bench.model, config).items():
        linear.weight.copy_(bench.weights[name])


@torch.no_grad()
def measure(bench: Bench, target: str) -> dict[str, Any]:
    """What the model knows of the target and kept of the rest."""
    model, tokenizer, size = bench.model.eval(), bench.tokenizer, bench.options.eval_batch_size
    learned = bench.targets[target]
    most = min(bench.options.max_new_tokens, DEV_TOKENS if bench.split == "dev" else bench.options.max_new_tokens)
    with bench.autocast():
        scores = target_scores(model, tokenizer, learned.questions, size, max_new_tokens=most)
        found: dict[str, Any] = {"target": summary(scores)}
        found["target"]["form"] = statistics.mean("####" in sample["text"] for sample in scores["samples"])
        found["perplexity"] = perplexity(model, bench.windows)
        found["preserve"] = preserve_scores(model, bench.windows, bench.base_log_probs, False, 4)
        if bench.lambada:
            pairs = sorted(bench.lambada, key=lambda pair: len(pair[0]))
            parts = [score(model, tokenizer, pairs[i : i + size]) for i in range(0, len(pairs), size)]
            found["lambada"] = statistics.mean(float(greedy) for part in parts for _, _, greedy in part)
        if bench.nq:
            found["nq"] = summary(target_scores(model, tokenizer, bench.nq, size))
    return found


def summary(scores: dict[str, Any]) -> dict[str, Any]:
    """The figures without the samples."""
    return {key: value for key, value in scores.items() if key != "samples"}


def perplexity(model: Any, windows: Tensor) -> float:
    """Perplexity a token, as `kit eval --dataset` has it."""
    losses = []
    for rows in windows.split(4):
        ids = rows.to(model.device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").cpu())
    return float(measures(torch.cat(losses), 0)["perplexity"])


if __name__ == "__main__":
    main()
