"""Convert with settings of the linearizing recipes, several side by side on a device, and measure each and its parts.

    python benchmarks/linearization.py smollm2 --runs RUNS.txt --train TEXTS --dev DEV.txt --test TEST.txt \
        --jobs 5 --seconds 600 --output RESULTS

RUNS.txt has a run a line, in order of importance: its name, a recipe, and options as `kit convert --set` takes them:

    * lolcats transfer.steps=32 distill.steps=300
    hybrid lolcats
    no-sinks lolcats num_sinks=0
    long lolcats seconds=400
    window window window_size=128
    base base

A line that begins with `*` holds options for all later runs of a recipe. `seconds=N` trains on the logits for as many
updates as fit until N seconds after the start, by measured updates. `base` is the model itself. Settings that cannot be
are refused at once. A run that fails leaves its error in its log; one that would not be done `--seconds` after the
start is left out, and so is one whose file is there already. Several such commands, one a device, may share a RUNS.txt
and an output: each run is taken once.

Attention transfer runs as `kit convert` runs it, once for runs that do not differ in it. Choose by the development
text's figures; the test text is for the report.

    python benchmarks/linearization.py --tables RESULTS/*.json

prints what such runs wrote.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from kit.convert.checkpoint import open_checkpoint
from kit.convert.data import TokenRows, load_rows, perplexity_windows, read_documents
from kit.convert.inspect import cache_bytes
from kit.convert.measure import hardware, versions
from kit.convert.perplexity import measures
from kit.convert.pipeline import Options, convert, resolve_device
from kit.convert.progress import Progress
from kit.convert.recall import measure_recall, recall_test
from kit.convert.recipe import ModelFacts, TrainRun
from kit.modules.linear_attention import ABLATIONS, Mixer, branch_weights
from kit.recipes import load_recipes

PROBE, WARM = 20, 8  # updates that are timed where a run has seconds, and how many of them are not counted
BATCH_TOKENS = 8192  # measured at a time
FIRST_GUESS = {"update": 0.4, "transfer": 0.8, "measure": 25.0}  # seconds, until a run has been measured


class TimeIsUp(Exception):
    """The deadline passed during training."""


@dataclass
class Run:
    """A line of RUNS.txt; see the module."""

    name: str
    recipe: str
    settings: list[str] = field(default_factory=list)
    seconds: float | None = None


def read_runs(text: str) -> list[Run]:
    """Parse RUNS.txt.

    Raises:
        ValueError: on a line without a recipe, or a name that stands twice.
    """
    common: dict[str, list[str]] = {}
    runs: list[Run] = []
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) < 2 or words[0] in {run.name for run in runs}:
            raise ValueError(f"a run needs a name of its own and a recipe: {line}")
        name, recipe, *settings = words
        if name == "*":
            common[recipe] = common.get(recipe, []) + settings
            continue
        seconds = [float(s.removeprefix("seconds=")) for s in settings if s.startswith("seconds=")]
        kept = [s for s in settings if not s.startswith("seconds=")]
        runs.append(Run(name, recipe, common.get(recipe, []) + kept, seconds[0] if seconds else None))
    return runs


class Watch(Progress):
    """Counts updates, measures the development text now and then, and stops at a deadline."""

    def __init__(
        self, deadline: float, every: float = 0, measure: Callable[[], dict[str, float]] | None = None
    ) -> None:
        self.deadline, self.every, self.measure = deadline, every, measure
        self.curve: list[dict[str, float]] = []
        self.times: list[float] = []
        self.last = time.time()

    def log(self, message: str) -> None:
        """Print what the training says."""
        print(message, flush=True)

    def step(self, advance: int = 1, **values: Any) -> None:
        """Count an update.

        Raises:
            TimeIsUp: past the deadline.
        """
        now = time.time()
        self.times.append(now)
        if now > self.deadline:
            raise TimeIsUp
        if self.measure and now - self.last > self.every:
            self.curve.append({"step": len(self.times), **values, **self.measure()})
            print(self.curve[-1], flush=True)
            self.last = time.time()

    def each(self, skip: int = 0) -> float:
        """Seconds of an update, without those that the curve took."""
        gaps = sorted(b - a for a, b in zip(self.times[skip:], self.times[skip + 1 :], strict=False))
        kept = gaps[: len(gaps) - len(self.curve)]
        return sum(kept) / max(len(kept), 1)


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Make a file or folder in one process, while others that want it wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_name(path.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            make(part)
            os.replace(part, path)
    return path


def name_of(*parts: Any) -> str:
    """A short name for what is made from these parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def perplexity(
    model: Any, rows: torch.Tensor, base_hidden: torch.Tensor | None = None, base_head: torch.Tensor | None = None
) -> dict[str, Any]:
    """Perplexity of windows (N, T); with the base's last hidden states and head, KL in nats and top-1 agreement too."""
    losses, kl, same = [], [], []
    size = max(BATCH_TOKENS // rows.shape[1], 1)
    for start in range(0, len(rows), size):
        at = slice(start, start + size)
        ids = rows[at].to(model.device)
        logits = model(ids, use_cache=False).logits
        for number, row in enumerate(ids):
            log_q = logits[number].float().log_softmax(-1)
            losses.append(F.nll_loss(log_q[:-1], row[1:], reduction="none").cpu())
            if base_hidden is not None and base_head is not None:
                log_p = (base_hidden[start + number] @ base_head.mT).float().log_softmax(-1)
                kl.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
                same.append((log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item())
    found = measures(torch.stack(losses), 0)
    return found | ({"kl": sum(kl) / len(kl), "top1": sum(same) / len(same)} if kl else {})


class Bench:
    """What runs share in a process: the model, texts, the base's hidden states on the development text.

    Args:
        options: of the command.
        started: when the command was started.
    """

    def __init__(self, options: argparse.Namespace, started: float) -> None:
        self.options, self.started, self.deadline = options, started, started + options.seconds
        self.device = resolve_device("auto")
        self.kind = torch.bfloat16 if self.device != "cpu" else torch.float32
        self.checkpoint = open_checkpoint(options.model)
        tokenizer = self.checkpoint.load_tokenizer()
        self.texts: dict[str, torch.Tensor] = {}
        for name in ("dev", "test"):
            text = "\n\n".join(read_documents(getattr(options, name)))
            self.texts[name] = perplexity_windows(text, tokenizer, options.seq_len, options.windows)
            if options.long:
                windows = max(options.windows * options.seq_len // options.long, 1)
                self.texts[f"{name}, long"] = perplexity_windows(text, tokenizer, options.long, windows)
        base = self.base()
        lengths = [int(length) for length in options.recall.split(",") if length]
        hay = "\n\n".join(read_documents(options.dev))
        self.recall = None
        if lengths:
            source = Path(options.dev).name
            self.recall = recall_test(lengths, tokenizer, base.config.vocab_size, haystack=hay, source=source, seed=1)
        with torch.no_grad():
            states = [base.base_model(row[None].to(self.device)).last_hidden_state[0] for row in self.texts["dev"]]
        self.hidden, self.head = torch.stack(states), base.get_output_embeddings().weight.detach().clone()
        self.pace = dict(FIRST_GUESS)

    def base(self) -> Any:
        """The base model."""
        return self.checkpoint.load_model(self.kind, self.device)

    def recipe(self, run: Run, **updates: dict[str, Any]) -> Any:
        """The recipe of a run; `updates` change options of its training loops."""
        options = self.options
        rows = [f"data.dataset={options.train}", "data.packing=concat", f"data.seq_len={options.seq_len}"]
        made = load_recipes(run.recipe, rows + run.settings)[0]
        for stage, values in updates.items():
            if hasattr(made.config, stage):
                setattr(made.config, stage, getattr(made.config, stage).model_copy(update=values))
        return made

    def rows(self, recipe: Any) -> TokenRows:
        """The rows that a recipe trains on, tokenized in one process."""
        config, seed = recipe.config.data, recipe.config.seed

        def make(path: Path) -> None:
            rows = load_rows(config, self.checkpoint.load_tokenizer(), seed=seed)
            torch.save(vars(rows), path)

        path = once(self.options.output / "cache" / name_of(config.model_dump(), seed), make)
        return TokenRows(**torch.load(path))

    def transferred(self, run: Run) -> Path:
        """The folder of the model after layer sensitivity and attention transfer, made once for runs that share it."""
        recipe = self.recipe(run, distill={"steps": 0}, lora={"steps": 0})
        transfer = getattr(recipe.config, "transfer", None)
        if transfer is not None:
            needed = max(transfer.steps * transfer.batch_size, recipe.config.sensitivity_rows)
            recipe.config.data.num_samples = min(recipe.config.data.num_samples, needed)
        settings = recipe.config.model_dump(mode="json")
        for stage in ("distill", "lora"):
            settings.pop(stage, None)

        def make(path: Path) -> None:
            how = Options(path, device=self.device, eval_tokens=0, overwrite=True)  # of what a killed process left
            convert(self.checkpoint, [recipe], how, Progress())
            (path / "allocation.json").write_text(json.dumps(recipe.allocation))

        return once(self.options.output / "cache" / name_of(settings), make)

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, Any]:
        """Every text with the model as it is, and without its branches; recall."""
        found: dict[str, Any] = {}
        linearized = any(isinstance(module, Mixer) for module in model.modules())
        for name, weights in {"converted": None, **(ABLATIONS if linearized else {})}.items():
            with branch_weights(model, *weights) if weights else nullcontext():
                for text, rows in self.texts.items():
                    if weights is None or "long" not in text:
                        base = (self.hidden, self.head) if weights is None and text == "dev" else ()
                        found.setdefault(name, {})[text] = perplexity(model, rows, *base)
        if self.recall is not None:
            found["recall"] = measure_recall(model, self.recall, model.config.max_position_embeddings, Progress())
        return found

    @torch.no_grad()
    def point(self, model: Any) -> dict[str, float]:
        """Perplexity of four windows of the development text."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.device != "cpu"):
            return {"dev": perplexity(model, self.texts["dev"][:4])["perplexity"]}

    def needs(self, run: Run) -> float:
        """Seconds that a run takes, by what runs of this process took; one that has seconds takes what there is."""
        if run.recipe == "base":
            return self.pace["measure"]
        config = self.recipe(run).config
        transfer, updates = (getattr(getattr(config, stage, None), "steps", 0) for stage in ("transfer", "distill"))
        updates += getattr(getattr(config, "lora", None), "steps", 0)
        if run.seconds is not None:
            updates = 2 * PROBE
        return transfer * self.pace["transfer"] + updates * self.pace["update"] + self.pace["measure"]


def do(bench: Bench, run: Run) -> None:
    """Convert, train, measure, and write RESULTS/NAME.json as it goes on."""
    options, begun = bench.options, time.time()
    result: dict[str, Any] = {"name": run.name, "recipe": run.recipe, "settings": run.settings, "complete": False}
    result |= {"options": {k: str(v) for k, v in vars(options).items()}, "device": hardware(bench.device)}
    result["versions"] = versions()

    def keep(**more: Any) -> None:
        result.update(more, seconds=time.time() - begun)
        (options.output / f"{run.name}.json").write_text(json.dumps(result, indent=1) + "\n")

    if run.recipe == "base":
        keep(final=bench.measure(bench.base()), complete=True)
        return
    recipe = bench.recipe(run)
    folder = bench.transferred(run)
    if getattr(getattr(recipe.config, "transfer", None), "steps", 0):
        taken = (time.time() - begun) / recipe.config.transfer.steps
        bench.pace["transfer"] = max(taken, bench.pace["transfer"] * 0.5)
    report = json.loads((folder / "kit_report.json").read_text())
    allocation = json.loads((folder / "allocation.json").read_text())
    stages = {name: of for name, of in report["stages"].items() if "sensitivity" in name or "transfer" in name}
    model = open_checkpoint(str(folder)).load_model(bench.kind, bench.device)
    cache = cache_bytes(model.config.to_dict())
    keep(
        config=recipe.config.model_dump(mode="json"),
        stages=stages,
        allocation=allocation,
        cache_bytes=cache["constant"] + cache["per_token"] * options.seq_len,
        transferred=bench.point(model),
    )
    print(f"transfer done after {time.time() - begun:.0f} s: {result['transferred']}", flush=True)
    for stage, method in (("distill", "logit_distillation"), ("lora", "low_rank_linearizing")):
        if getattr(getattr(recipe.config, stage, None), "steps", 0) or (stage == "distill" and run.seconds):
            model = train(bench, run, (stage, method), folder, model, allocation, keep)
    model = model.to(bench.kind).eval()  # as it would be written
    if bench.device != "cpu":
        keep(peak_memory_bytes=torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
    measuring = time.time()
    keep(final=bench.measure(model), complete=True)
    bench.pace["measure"] = time.time() - measuring + 5
    for name, of in result["final"].items():
        if name != "recall":
            print(name, {text: round(found["perplexity"], 2) for text, found in of.items()}, flush=True)
    if options.save:
        model.save_pretrained(options.save / run.name)


def train(
    bench: Bench,
    run: Run,
    stage: tuple[str, str],
    folder: Path,
    model: Any,
    allocation: dict[str, Any],
    keep: Callable[..., None],
) -> Any:
    """Run a training stage of a run's recipe, for its steps or for as many as fit its seconds; return the model."""
    rows = bench.rows(bench.recipe(run))
    scratch = bench.options.output / "cache" / f"{run.name}.{stage[0]}"

    def fit(model: Any, watch: Watch, **updates: Any) -> dict[str, Any]:
        recipe = bench.recipe(run, **({stage[0]: updates} if updates else {}))
        recipe.allocation = allocation
        try:
            whole = SimpleNamespace(resident=lambda: model)
            return getattr(recipe, stage[1])(TrainRun(lambda: whole, rows, bench.device, watch, None, scratch))
        except TimeIsUp:
            return {"stopped": len(watch.times)}
        finally:
            for file in scratch.parent.glob(f"{scratch.name}*"):
                file.unlink()

    updates = {}
    tokens = min(getattr(bench.recipe(run).config, stage[0]).batch_size, len(rows.input_ids)) * rows.input_ids.shape[1]
    if run.seconds is not None and stage[0] == "distill":
        probe = Watch(math.inf)
        fit(model, probe, steps=PROBE)
        left = bench.started + run.seconds - time.time()
        updates["steps"] = max(int(left / probe.each(WARM) * 0.95), PROBE)
        print(f"an update takes {probe.each(WARM):.3f} s; {updates['steps']} updates", flush=True)
        del model
        gc.collect()
        model = open_checkpoint(str(folder)).load_model(bench.kind, bench.device)
    # Measuring has to fit behind it; a run whose seconds end there already has left room itself.
    watch = Watch(bench.deadline - bench.pace["measure"] * 0.6, bench.options.curve, lambda: bench.point(model))
    begun = time.time()
    found = fit(model, watch, **updates)
    each = watch.each()
    bench.pace["update"] = each
    keep(
        **{stage[1]: found, "data": rows.summary()},
        steps=len(watch.times),
        tokens=tokens * len(watch.times),
        curve=watch.curve,
        tokens_per_second=tokens / max(each, 1e-9),
        training_seconds=time.time() - begun,
    )
    print(f"{len(watch.times)} updates of {stage[1]}, {tokens / max(each, 1e-9):,.0f} tokens/s", flush=True)
    return model


def work(options: argparse.Namespace, started: float) -> None:
    """Take runs until none is left that can be done in time."""
    output = options.output
    with open(output / f"worker-{os.getpid()}.log", "w") as log, redirect_stdout(log), redirect_stderr(log):
        bench = Bench(options, started)
        for run in read_runs(options.runs.read_text()):
            if (output / f"{run.name}.json").exists() or time.time() + bench.needs(run) > bench.deadline:
                continue
            try:
                (output / f"{run.name}.claimed").open("x").close()
            except FileExistsError:
                continue
            with open(output / f"{run.name}.log", "w") as own, redirect_stdout(own), redirect_stderr(own):
                try:
                    print(f"{run} {time.time() - started:.0f} s after the start", flush=True)
                    do(bench, run)
                    print(f"done {time.time() - started:.0f} s after the start", flush=True)
                except Exception as error:
                    traceback.print_exc()
                    if "CUDA" in str(error) and "out of memory" not in str(error):
                        raise  # the device's context is gone; a new process takes what is left
                finally:
                    gc.collect()
                    if bench.device != "cpu":
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    """Start the processes, and start new ones where one dies."""
    if sys.argv[1:2] == ["--tables"]:
        from linearization_tables import report

        print(report({Path(file).stem: json.loads(Path(file).read_text()) for file in sys.argv[2:]}))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--long", type=int, default=8192)
    parser.add_argument("--recall", default="1024,2048,4096,8192")
    parser.add_argument("--seconds", type=float, default=math.inf, help="After which everything should be done.")
    parser.add_argument("--curve", type=float, default=60, help="Seconds between two points of a curve.")
    parser.add_argument("--jobs", type=int, default=1, help="Processes side by side.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for the results.")
    parser.add_argument("--save", type=Path, help="Folder for the models, if they are to be kept.")
    options, started = parser.parse_args(), time.time()
    options.output.mkdir(parents=True, exist_ok=True)
    facts = ModelFacts.of(open_checkpoint(options.model))
    for run in read_runs(options.runs.read_text()):
        if run.recipe != "base":
            load_recipes(run.recipe, [f"data.seq_len={options.seq_len}", *run.settings])[0].plan(facts)
    context = multiprocessing.get_context("spawn")

    def start() -> Any:
        process = context.Process(target=work, args=(options, started))
        process.start()
        return process

    workers = [start() for _ in range(options.jobs)]
    spare = options.jobs  # processes that may be started for dead ones
    while workers:
        time.sleep(1)
        dead = sum(bool(worker.exitcode) for worker in workers)
        workers = [worker for worker in workers if worker.exitcode is None]
        again, spare = min(dead, spare), max(spare - dead, 0)
        workers += [start() for _ in range(again)]
        if time.time() > started + options.seconds + 15:
            for worker in workers:
                worker.kill()
            return


if __name__ == "__main__":
    main()
