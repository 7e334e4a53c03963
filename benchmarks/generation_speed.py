"""Time `generate` of linearized models of SmolLM2-135M's shape, random weights: CUDA graphs, kernels, PyTorch.

    python benchmarks/generation_speed.py --output generation_speed.json

Prints a line each: milliseconds a new token as `generate` gives them, the rest being prefill; kernels on the GPU and
their microseconds of one step; and how far logits of both ways are from those in fp32, after a hundred steps in bf16.
The base model runs with transformers' own cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kit.convert.measure import hardware
from kit.convert.recipe import ModelFacts
from kit.convert.shapes import shape_config
from kit.modules import decoding, linear_attention, modeling
from kit.recipes import load_recipes


def build(recipe: str | None, changes: dict[str, Any], device: str) -> Any:
    """The base model, or what a recipe makes of it, in bf16; weights and new parameters are random."""
    endless = {"eos_token_id": None, "pad_token_id": 0}
    config, kind = shape_config("smollm2-135m") | endless | changes, LlamaConfig
    if recipe:
        config, kind = load_recipes(recipe, [])[0].build(ModelFacts(config, {})), modeling.KitLlamaConfig
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**config))
    for module in model.modules():
        if isinstance(module, linear_attention.Mixer):
            for name, parameter in module.named_parameters():
                parameter.data += torch.randn_like(parameter) * (0.02 if "gate" in name else 0.1)
    return model.to(device, torch.bfloat16).eval()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Linearized models take the PyTorch path."""
    modules: tuple[Any, ...] = (decoding, linear_attention)
    before = [module.step_ops for module in modules]
    for module in modules:
        module.step_ops = lambda v: None
    try:
        yield
    finally:
        for module, ops in zip(modules, before, strict=True):
            module.step_ops = ops


def tokens(batch: int, length: int, device: str, seed: int = 1) -> Tensor:
    """Random token ids."""
    return torch.randint(1, 49152, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall time of a call and of what it started."""
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def generation(model: Any, ids: Tensor, new: int) -> dict[str, float]:
    """Milliseconds of prefill, and of a new token after it."""

    def run(count: int) -> float:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        return seconds(lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), ids.device.type)

    run(new)  # PyTorch's attention prepares itself for each new length of keys
    first = statistics.median(run(1) for _ in range(3))
    return {"prefill_ms": round(first * 1e3, 1), "ms": round((run(new) - first) / (new - 1) * 1e3, 2)}


@torch.no_grad()
def steps(model: Any, ids: Tensor, more: Tensor) -> tuple[Tensor, DynamicCache]:
    """Logits after a prompt (B, T) and of single tokens (B, N) after it, (B, N + 1, vocabulary), and the cache."""
    cache = DynamicCache(config=model.config)
    out = [model(ids, past_key_values=cache, logits_to_keep=1).logits]
    out += [model(token, past_key_values=cache).logits for token in more.split(1, 1)]
    return torch.cat(out, 1), cache


def launches(model: Any, ids: Tensor, count: int = 5) -> dict[str, float]:
    """Kernels of a step on the GPU, and their microseconds together."""
    _, cache = steps(model, ids, ids[:, :3])
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for token in ids[:, :count].split(1, 1):
            model(token, past_key_values=cache)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_time_total > 0]
    return {
        "kernels": len(kernels) / count,
        "kernels_us": round(sum(event.device_time_total for event in kernels) / count),
    }


def exactness(model: Any, ids: Tensor, more: Tensor) -> dict[str, float]:
    """Relative distances of bf16 logits from fp32's of the whole, with the kernels and without."""
    got, _ = steps(model, ids, more)
    with without_kernels():
        other, _ = steps(model, ids, more)
    with torch.no_grad():
        want = model.float()(torch.cat([ids, more], 1), use_cache=False).logits[:, ids.shape[1] - 1 :]
    model.bfloat16()
    ours, theirs = (round(float((x.float() - want).norm() / want.norm()), 4) for x in (got, other))
    return {"kernels_off_by": ours, "pytorch_off_by": theirs}


def main() -> None:
    """Measure each model and way at each batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["lolcats", "lizard"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--config", default="{}", help="JSON: what is other than in SmolLM2's config.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    print(hardware(options.device), torch.__version__)
    rows: list[dict[str, Any]] = []

    def note(model: Any, name: str, way: str) -> None:
        for batch in options.batch:
            ids = tokens(batch, options.prompt, options.device)
            row = {"model": name, "way": way, "batch": batch, **generation(model, ids, options.new)}
            rows.append(row | (launches(model, ids) if options.device != "cpu" else {}))
            print(json.dumps(rows[-1]), flush=True)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1))

    changes = json.loads(options.config)
    note(build(None, changes, options.device), "base", "transformers")
    for recipe in options.recipes:
        model = build(recipe, changes, options.device)
        note(model, recipe, "kernels in CUDA graphs")
        model.base_model.replay_steps = False
        note(model, recipe, "kernels")
        model.base_model.replay_steps = True
        with without_kernels():
            note(model, recipe, "PyTorch")
        ids, more = (tokens(2, length, options.device, length) for length in (options.prompt, 100))
        rows.append({"model": recipe, **exactness(model, ids, more)})
        print(json.dumps(rows[-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
