"""Quantize a model with llm-compressor: what W4AFP8 by round-to-nearest, GPTQ and AWQ loses, beside `kit quantize`.

    python benchmarks/quantization_peers.py MODEL --dataset FILE --num-samples 32 --seq-len 512 --group-size 64 \
        --eval FILE --windows 12 --window 2048 --methods rtn,gptq,awq --json OUT.json

Needs llm-compressor, which kit does not depend on: install it in an environment of its own, and kit beside it without
its dependencies. MODEL is a folder. Every method gets the same format (INT4 weights, symmetric, one scale a group; FP8
e4m3 inputs, one dynamic scale a token; lm_head and the embedding as they were) and the rows of tokens that kit would
calibrate on, except that documents which share a row see each other. Round-to-nearest uses no data.

What is measured is the model in memory, in bfloat16, which rounds weights and inputs in its forward pass. Perplexity is
that of windows cut as in `kit eval --dataset`; KL is KL(unquantized ‖ quantized) a token, in nats. --eval may be
repeated, as FILE or FILE:WINDOWS:WINDOW. --ablations also measures each model with its inputs not rounded.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStatus
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.convert.data import DataConfig, TokenRows, load_rows, perplexity_windows, read_documents
from kit.convert.measure import hardware

PACKAGES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "datasets")
CHUNK = 128  # tokens whose probabilities are in memory at once


def scheme(group_size: int, observer: str = "memoryless_minmax") -> dict[str, Any]:
    """The format, as every modifier takes it; a new one each time, since GPTQ writes its ordering into it."""
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size, observer=observer
    )
    inputs = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="token", dynamic=True)
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


METHODS: dict[str, Callable[[int], list[Modifier]]] = {
    "rtn": lambda size: [QuantizationModifier(**scheme(size))],
    "rtn-mse": lambda size: [QuantizationModifier(**scheme(size, "memoryless_mse"))],
    "gptq": lambda size: [GPTQModifier(actorder="static", dampening_frac=0.01, **scheme(size))],
    "gptq-unordered": lambda size: [GPTQModifier(actorder=None, dampening_frac=0.01, **scheme(size))],
    "gptq-mse": lambda size: [GPTQModifier(actorder="static", dampening_frac=0.01, **scheme(size, "memoryless_mse"))],
    "awq": lambda size: [AWQModifier(), QuantizationModifier(**scheme(size))],
    "awq-both": lambda size: [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme(size))],
    "awq-mse": lambda size: [AWQModifier(), QuantizationModifier(**scheme(size, "memoryless_mse"))],
    "awq-gptq": lambda size: [
        AWQModifier(),
        GPTQModifier(actorder="static", dampening_frac=0.01, **scheme(size)),
    ],
}


@dataclass
class Text:
    """Windows (N, T) of a file, and the unquantized model's logits on each, as bfloat16 as it gives them."""

    name: str
    windows: Tensor
    base_logits: list[Tensor]


def load(model: str) -> Any:
    """The model in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()


def quantize(model: Any, modifiers: list[Modifier], rows: TokenRows, tokenizer: Any) -> None:
    """Run the modifiers on the model, in place."""
    data = Dataset.from_dict(
        {"input_ids": rows.input_ids.tolist(), "attention_mask": torch.ones_like(rows.input_ids).tolist()}
    )
    # AWQ pins memory even where there is no accelerator to pin it for, which fails (llm-compressor 0.14.0.1).
    no_pinning = patch.object(IntermediatesCache, "pin_memory", lambda *_: None)
    with nullcontext() if torch.accelerator.is_available() else no_pinning:
        oneshot(
            model=model,
            processor=tokenizer,
            recipe=modifiers,
            dataset=data,
            num_calibration_samples=len(data),
            max_seq_length=rows.input_ids.shape[1],
            shuffle_calibration_samples=False,
        )


def quantized_linears(model: Any) -> list[torch.nn.Module]:
    """Its quantized linears.

    Raises:
        RuntimeError: if a linear other than lm_head is not quantized and rounding in its forward pass, or lm_head is.
    """
    linears = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        given: QuantizationScheme | None = getattr(module, "quantization_scheme", None)
        active = (
            given is not None
            and given.weights is not None
            and given.input_activations is not None
            and getattr(module, "quantization_enabled", True)
            and module.quantization_status == QuantizationStatus.FROZEN
        )
        if active == (name == "lm_head"):
            raise RuntimeError(f"{name} is {'' if active else 'not '}quantized")
        if active:
            linears.append(module)
    return linears


@contextmanager
def inputs_not_rounded(linears: list[torch.nn.Module]) -> Iterator[None]:
    """Leave the inputs of these linears as they are."""
    given = [module.quantization_scheme for module in linears]
    for module in linears:
        module.quantization_scheme = module.quantization_scheme.model_copy(update={"input_activations": None})
    try:
        yield
    finally:
        for module, one in zip(linears, given, strict=True):
            module.quantization_scheme = one


@torch.no_grad()
def measure(model: Any, text: Text) -> dict[str, float]:
    """Perplexity and KL with the unquantized model, each with its standard error from the spread between windows.

    The first model measured on a text is the unquantized one.
    """
    is_base = not text.base_logits
    losses, divergences = [], []
    for number, window in enumerate(text.windows):
        logits = model(window[None], use_cache=False).logits[0, :-1]
        if is_base:
            text.base_logits.append(logits)
        loss, divergence = [], []
        for at in torch.arange(len(logits)).split(CHUNK):
            log_probs = F.log_softmax(logits[at].float(), dim=-1)
            loss.append(F.nll_loss(log_probs, window[1:][at], reduction="none"))
            if not is_base:
                base = F.log_softmax(text.base_logits[number][at].float(), dim=-1)
                divergence.append((base.exp() * (base - log_probs)).sum(-1))
        losses.append(torch.cat(loss).double().mean())
        if not is_base:
            divergences.append(torch.cat(divergence).double().mean())
    loss_mean, error = _mean(losses)
    found = {"perplexity": math.exp(loss_mean), "perplexity_stderr": math.exp(loss_mean) * error}
    if not is_base:
        found["kl"], found["kl_stderr"] = _mean(divergences)
    return found


def _mean(values: list[Tensor]) -> tuple[float, float]:
    stacked = torch.stack(values)
    return float(stacked.mean()), float(stacked.std() / len(stacked) ** 0.5) if len(stacked) > 1 else math.nan


def compare(
    source: str,
    data: DataConfig,
    group_size: int,
    evals: list[tuple[str, int, int]],
    methods: list[str],
    output: Path | None = None,
    ablations: bool = False,
) -> dict[str, Any]:
    """Quantize the model by each method, measure and print.

    Args:
        source: the model's folder.
        data: calibration text.
        group_size: weights a scale.
        evals: text to measure on: file, windows, tokens a window.
        methods: keys of METHODS.
        output: JSON file, written again after each method.
        ablations: also measure with inputs not rounded.

    Returns:
        `settings` and `rows`, a dict a method.

    Raises:
        RuntimeError: if a method did not quantize what it should, or touched the embedding or lm_head.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = load_rows(data, tokenizer, seed=0)
    texts = []
    for file, windows, length in evals:
        joined = "\n\n".join(read_documents(file))
        texts.append(Text(Path(file).name, perplexity_windows(joined, tokenizer, length, windows), []))
    model = load(source)
    embedding, head = model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()
    report: dict[str, Any] = {
        "settings": {
            "model": Path(source).name,
            "format": f"W4AFP8, symmetric, groups of {group_size}",
            "calibration": rows.summary(),
            "eval": [
                {
                    "dataset": text.name,
                    "windows": len(text.windows),
                    "window": text.windows.shape[1],
                    "tokens": text.windows.numel(),
                    "predicted_tokens": text.windows[:, 1:].numel(),
                }
                for text in texts
            ],
            "dtype": "bfloat16",
            "device": hardware("cpu"),
            "versions": {package: version(package) for package in PACKAGES},
        },
        "rows": [],
    }

    def add(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        _print(row)
        if output:
            output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    add({"method": "unquantized", "eval": {text.name: measure(model, text) for text in texts}})
    del model
    for method in methods:
        torch.manual_seed(0)
        model = load(source)
        start, start_cpu = time.perf_counter(), time.process_time()
        quantize(model, METHODS[method](group_size), rows, tokenizer)
        row: dict[str, Any] = {
            "method": method,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - start_cpu,
        }
        linears = quantized_linears(model)
        if not torch.equal(model.get_input_embeddings().weight, embedding):
            raise RuntimeError(f"{method} changed the embedding")
        if not torch.equal(model.get_output_embeddings().weight, head):
            raise RuntimeError(f"{method} changed lm_head")
        row["quantized_linears"] = len(linears)
        row["eval"] = {text.name: measure(model, text) for text in texts}
        if ablations:
            with inputs_not_rounded(linears):
                for text in texts:
                    row["eval"][text.name]["weights_only"] = measure(model, text)
        add(row)
        del model, linears
    return report


def _print(row: dict[str, Any]) -> None:
    for name, values in row["eval"].items():
        line = f"{row['method']:16}{name:28}{values['perplexity']:9.3f} ± {values['perplexity_stderr']:.3f}"
        if "kl" in values:
            line += f"  KL {values['kl']:.4f} ± {values['kl_stderr']:.4f}  {row['seconds']:6.0f} s"
        if "weights_only" in values:
            line += f"  weights only {values['weights_only']['perplexity']:9.3f}"
        print(line, flush=True)


def _eval(given: str, windows: int, length: int) -> tuple[str, int, int]:
    parts = given.rsplit(":", 2)
    if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
        return parts[0], int(parts[1]), int(parts[2])
    return given, windows, length


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--dataset", required=True, help="calibration text, as kit takes it")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--eval", action="append", required=True, help="FILE or FILE:WINDOWS:WINDOW; may be repeated")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--window", type=int, default=2048, help="tokens a window")
    parser.add_argument("--methods", default="rtn,gptq,gptq-unordered,awq,awq-both", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--ablations", action="store_true", help="also measure with inputs not rounded")
    given = parser.parse_args()
    methods = given.methods.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        parser.error(f"unknown methods: {', '.join(unknown)}; there are {', '.join(METHODS)}")
    compare(
        given.model,
        DataConfig(dataset=given.dataset, num_samples=given.num_samples, seq_len=given.seq_len),
        given.group_size,
        [_eval(one, given.windows, given.window) for one in given.eval],
        methods,
        given.json,
        given.ablations,
    )


if __name__ == "__main__":
    main()
