"""Convert with a linearizing recipe, distill for a given time, and measure the model and its parts before and after.

    python benchmarks/linearization.py smollm2 --recipe lolcats --set keep_full=25% --train TEXTS --dev DEV.txt \
        --test wikitext2_raw_test.txt --seconds 300 --output lolcats.json

Attention transfer runs as `kit convert` runs it. `logit_distillation` then gets as many updates as fit the time, by a
measured update; the figures hold their number, and `kit convert ... --set distill.steps=N` runs the same. Choose by the
development text's figures; the test text is for the one report.

    python benchmarks/linearization.py --tables *.json

prints what such runs wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from kit.convert.checkpoint import open_checkpoint
from kit.convert.data import load_rows, perplexity_windows, read_documents
from kit.convert.measure import hardware, versions
from kit.convert.perplexity import measures
from kit.convert.pipeline import Options, convert, resolve_device
from kit.convert.progress import Progress
from kit.convert.recall import measure_recall, recall_test
from kit.convert.recipe import TrainRun
from kit.modules.linear_attention import ABLATIONS, branch_weights
from kit.recipes import load_recipes

PROBE, WARM = 14, 4  # updates that are timed, and how many of them are not counted


class TimeIsUp(Exception):
    """The deadline passed during training."""


class Watch(Progress):
    """Prints losses, measures the development text now and then, and stops at a deadline."""

    def __init__(self, deadline: float, every: float, measure: Any) -> None:
        self.deadline, self.every, self.measure = deadline, every, measure
        self.steps, self.curve, self.times = 0, [], []
        self.last = time.monotonic()

    def step(self, advance: int = 1, **values: Any) -> None:
        """Count an update."""
        now = time.monotonic()
        self.steps += advance
        self.times.append(now)
        if now > self.deadline:
            raise TimeIsUp
        if self.every and now - self.last > self.every:
            self.curve.append({"step": self.steps, **values, **self.measure()})
            print(self.curve[-1], flush=True)
            self.last = time.monotonic()


def perplexity(model: Any, rows: torch.Tensor, base: Any = None) -> dict[str, Any]:
    """Perplexity of windows (N, T); with a base, KL in nats and top-1 agreement too."""
    losses, kl, same = [], [], []
    for row in rows.to(model.device):
        log_q = model(row[None], use_cache=False).logits[0].float().log_softmax(-1)
        losses.append(F.nll_loss(log_q[:-1], row[1:], reduction="none").cpu())
        if base is not None:
            log_p = base(row[None], use_cache=False).logits[0].float().log_softmax(-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().item())
            same.append((log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item())
    found = measures(torch.stack(losses), 0)
    return found | ({"kl": sum(kl) / len(kl), "top1": sum(same) / len(same)} if kl else {})


@torch.no_grad()
def measure(
    model: Any, texts: dict[str, torch.Tensor], recall: Any, base: Any, variants: bool = True
) -> dict[str, Any]:
    """Every text, with and without the model's branches; recall."""
    found: dict[str, Any] = {}
    for name, weights in {"converted": None, **(ABLATIONS if variants else {})}.items():
        with branch_weights(model, *weights) if weights else nullcontext():
            chosen = texts if weights is None else {k: v for k, v in texts.items() if "long" not in k}
            found[name] = {text: perplexity(model, rows, base) for text, rows in chosen.items()}
    if recall is not None:
        found["recall"] = measure_recall(model, recall, model.config.max_position_embeddings, Progress())
    return found


def tables(files: list[Path]) -> None:
    """Print Markdown tables: perplexity with and without branches, agreement, long windows, recall."""
    runs = {file.stem: json.loads(file.read_text()) for file in files}
    base = next(iter(runs.values()))["base"]
    print("| | updates | tokens | test | dev | window only | linear only | zeroed | KL | top-1 |\n" + "|---" * 10 + "|")
    print(f"| base | | | {base['test']['perplexity']:.2f} | {base['dev']['perplexity']:.2f} |" + " |" * 5)
    for name, run in runs.items():
        found = run.get("final") or run["transferred"]
        tokens = run["steps"] * run["config"]["distill"]["batch_size"] * run["data"]["seq_len"] if "steps" in run else 0
        whole, test = found["converted"], [found[part]["test"]["perplexity"] for part in ABLATIONS]
        print(
            f"| {name} | {run.get('steps', '')} | {tokens / 1e6:.1f} M | {whole['test']['perplexity']:.2f} ± "
            f"{whole['test']['perplexity_stderr']:.2f} | {whole['dev']['perplexity']:.2f} | "
            + " | ".join(f"{value:,.2f}" for value in test)
            + f" | {whole['dev']['kl']:.4f} | {whole['dev']['top1']:.1%} |"
        )
    print("\n| | by position, long windows of the test text |\n|---|---|")
    for name, long in [("base", base.get("test, long"))] + [
        (name, (run.get("final") or run["transferred"])["converted"].get("test, long")) for name, run in runs.items()
    ]:
        if long:
            buckets = long["perplexity_by_position"]
            print(
                f"| {name} | " + " | ".join(f"{b['start']}-{b['end']}: {b['perplexity']:.2f}" for b in buckets) + " |"
            )
    for name, run in runs.items():
        for label, recall in (
            ("base", run.get("base_recall")),
            (name, (run.get("final") or run["transferred"]).get("recall")),
        ):
            if recall:
                print(f"\n{label}: {json.dumps(recall)[:1500]}")


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    if sys.argv[1:2] == ["--tables"]:
        tables([Path(file) for file in sys.argv[2:]])
        return
    parser.add_argument("model")
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--long", type=int, default=8192)
    parser.add_argument("--recall", default="1024,2048,4096,8192")
    parser.add_argument("--seconds", type=float, default=300, help="From the start until measuring begins.")
    parser.add_argument("--probe-at", type=float, default=0, help="Seconds: time updates no earlier.")
    parser.add_argument("--curve", type=float, default=45, help="Seconds between two points of the curve.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--save", type=Path, help="Folder for the model.")
    options = parser.parse_args()
    started, device = time.monotonic(), resolve_device("auto")
    kind = torch.bfloat16 if device != "cpu" else torch.float32
    result: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}, "device": hardware(device)}
    result |= {"versions": versions(), "complete": False}

    def keep(**more: Any) -> None:
        result.update(more, seconds=time.monotonic() - started)
        options.output.write_text(json.dumps(result, indent=1) + "\n")

    checkpoint = open_checkpoint(options.model)
    tokenizer = checkpoint.load_tokenizer()
    texts = {}
    for name in ("dev", "test"):
        text = "\n\n".join(read_documents(getattr(options, name)))
        texts[name] = perplexity_windows(text, tokenizer, options.seq_len, options.windows)
        if options.long:
            long_windows = max(options.windows * options.seq_len // options.long, 1)
            texts[f"{name}, long"] = perplexity_windows(text, tokenizer, options.long, long_windows)
    base = checkpoint.load_model(kind, device)
    lengths = [int(length) for length in options.recall.split(",") if length]
    hay = "\n\n".join(read_documents(options.dev))
    recall = None
    if lengths:
        vocabulary = base.config.vocab_size
        recall = recall_test(lengths, tokenizer, vocabulary, haystack=hay, source=Path(options.dev).name, seed=1)
    settings = [f"data.dataset={options.train}", "data.packing=concat", f"data.seq_len={options.seq_len}"]
    settings += options.set

    def recipe(**distill: Any) -> Any:
        made = load_recipes(options.recipe, settings)[0]
        if hasattr(made.config, "distill"):
            made.config.lora.steps = 0
            made.config.distill = made.config.distill.model_copy(update=distill)
        return made

    with torch.no_grad():
        keep(base={name: perplexity(base, rows) for name, rows in texts.items()})
        if recall is not None and options.recipe == "window":
            keep(base_recall=measure_recall(base, recall, base.config.max_position_embeddings, Progress()))
    with tempfile.TemporaryDirectory(prefix="kit-linearization-") as scratch:
        folder = Path(scratch) / "transferred"
        made = recipe(steps=0)
        trained = hasattr(made.config, "distill") and options.seconds > 0
        if trained:
            reading = ThreadPoolExecutor().submit(
                load_rows, made.config.data, checkpoint.load_tokenizer(), seed=made.config.seed
            )
        report = convert(checkpoint, [made], Options(folder, device=device, eval_tokens=0), Progress())
        reload = lambda: open_checkpoint(str(folder)).load_model(kind, device)  # noqa: E731
        keep(stages=report["stages"], allocation=made.allocation, config=made.config.model_dump(mode="json"))
        print(f"transfer done at {time.monotonic() - started:.0f} s", flush=True)
        short = {"dev": texts["dev"][:4]}
        keep(transferred=measure(reload(), short if trained else texts, None if trained else recall, base))
        print(f"measured at {time.monotonic() - started:.0f} s", flush=True)
        if not trained:
            keep(complete=True)
            return
        rows = reading.result()
        keep(data=rows.summary())
        time.sleep(max(started + options.probe_at - time.monotonic(), 0))

        def train(steps: int, watch: Watch, model: Any) -> dict[str, Any]:
            distilled = recipe(steps=steps)
            distilled.allocation = made.allocation
            run = TrainRun(model, rows, device, watch, original=None, state=Path(scratch) / "training")
            try:
                found = distilled.logit_distillation(run)
            except TimeIsUp:
                found = {"stopped": watch.steps}
            run.state.unlink(missing_ok=True)
            return found

        probe = Watch(float("inf"), 0, None)
        train(PROBE, probe, reload())
        each = (probe.times[-1] - probe.times[WARM - 1]) / (PROBE - WARM)
        left = options.seconds - (time.monotonic() - started)
        steps = max(int(left / each * 0.95), PROBE)
        tokens = min(made.config.distill.batch_size, len(rows.input_ids)) * options.seq_len
        print(f"an update takes {each:.3f} s ({tokens / each:,.0f} tokens/s); {steps} updates", flush=True)
        model = reload()

        @torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu")
        def point() -> dict[str, float]:
            found = measure(model, {"dev": texts["dev"][:4]}, None, None, False)
            return {"dev": found["converted"]["dev"]["perplexity"]}

        watch = Watch(started + options.seconds * 1.05, options.curve, point)
        found = train(steps, watch, model)
        spent = max(watch.times[-1] - watch.times[0], 1e-9)
        keep(distilled=found, steps=steps, curve=watch.curve, tokens_per_second=tokens * (watch.steps - 1) / spent)
        if device != "cpu":
            keep(peak_memory_bytes=torch.cuda.max_memory_allocated())
        del base
        base = checkpoint.load_model(kind, device)
        model = model.to(kind).eval()  # as it would be written
        keep(final=measure(model, texts, recall, base), complete=True)
        for name, of in result["final"].items():
            if name != "recall":
                print(name, {text: round(found["perplexity"], 2) for text, found in of.items()}, flush=True)
        if options.save:
            model.save_pretrained(options.save)


if __name__ == "__main__":
    main()
