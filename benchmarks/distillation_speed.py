"""Time updates of logit distillation: every weight of a Llama of SmolLM2-135M's shape, random, on random tokens.

    python benchmarks/distillation_speed.py --batch 4 8 16 --ways launched graph compiled

`launched` runs passes as they are, `graph` captures them in CUDA graphs, `compiled` compiles decoder layers too. Prints
a line each: tokens a second, milliseconds an update, peak memory, losses; with --launches also launches of an update.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kit.convert import passes
from kit.convert.data import TokenRows
from kit.convert.measure import hardware
from kit.convert.progress import Progress
from kit.convert.recipe import ModelFacts, TrainRun
from kit.convert.shapes import shape_config
from kit.modules import modeling
from kit.recipes import load_recipes

WARM, ROWS = passes.WARM + 2, 64  # updates that are not timed; rows of data


class Watch(Progress):
    """Remembers when each update ended, and its loss; profiles the last one."""

    def __init__(self, steps: int, profile: bool) -> None:
        self.steps, self.times, self.losses = steps, [], []
        self.profile = torch.profiler.profile() if profile else None

    def log(self, message: str) -> None:
        """What could not be captured or compiled."""
        print(message, flush=True)

    def step(self, advance: int = 1, **values: Any) -> None:
        """Count an update."""
        self.times.append(time.perf_counter())
        self.losses.append(values["loss"])
        if self.profile and len(self.times) == self.steps - 1:
            self.profile.__enter__()
        elif self.profile and len(self.times) == self.steps:
            self.profile.__exit__(None, None, None)


def launches(profile: Any) -> dict[str, float]:
    """Of one update: launches by the CPU, kernels on the GPU, and how long these took together."""
    events = profile.key_averages()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "launches": sum(event.count for event in events if "Launch" in event.key and event not in kernels),
        "kernels": sum(event.count for event in kernels),
        "kernel_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
    }


def measure(recipe_name: str, settings: list[str], batch: int, way: str, options: Any) -> dict[str, Any]:
    """Train for a few updates."""
    device, length = options.device, options.seq_len
    passes.WARM = WARM - 2 if way != "launched" else options.steps
    sizes = [f"distill.batch_size={batch}", f"distill.steps={options.steps}", "distill.learning_rate=1e-4"]
    recipe = load_recipes(recipe_name, [*settings, *sizes, f"distill.compile={str(way == 'compiled').lower()}"])[0]
    facts = ModelFacts(shape_config("smollm2-135m") | json.loads(options.config), {})
    config = recipe.build(facts)
    torch.manual_seed(0)
    kind = getattr(modeling, f"Kit{facts.family.prefix}Config")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(kind(**config)).to(torch.bfloat16).eval()
    ids = torch.randint(model.config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(1))
    rows = TokenRows(ids, torch.arange(length).expand(ROWS, -1).contiguous(), ROWS, "random", "")
    watch = Watch(options.steps, options.launches)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    whole = SimpleNamespace(resident=lambda: model)
    run: Any = TrainRun(lambda: whole, rows, device, watch, original=None, state=None)  # type: ignore[arg-type]
    recipe.logit_distillation(run)
    last = -2 if options.launches else -1
    each = (watch.times[last] - watch.times[WARM - 1]) / (len(watch.times) + last + 1 - WARM)
    return {
        "recipe": recipe_name,
        "batch": batch,
        "way": way,
        "tokens_per_second": round(batch * length / each),
        "ms": round(1e3 * each, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device != "cpu" else None,
        "seconds_to_first_update": round(watch.times[0] - started, 1),
        "losses": [round(loss, 5) for loss in watch.losses],
        **(launches(watch.profile) if options.launches else {}),
    }


def main() -> None:
    """Measure each way at each batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="lolcats")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", nargs="+", type=int, default=[4])
    parser.add_argument("--ways", nargs="+", default=["launched", "graph", "compiled"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--config", default="{}", help="JSON: what is other than in SmolLM2's config.")
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    print(hardware(options.device), torch.__version__)
    for batch in options.batch:
        for way in options.ways:
            found = measure(options.recipe, options.set, batch, way, options)
            print(json.dumps(found), flush=True)
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
