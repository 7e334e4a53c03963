"""Measure models: perplexity, agreement with a base model, speed, memory. One model is in memory at a time."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.convert.checkpoint import Checkpoint
from kit.convert.data import perplexity_windows, read_documents, sample_from_model
from kit.convert.eval_folder import EvalFolder
from kit.convert.inspect import cache_bytes
from kit.convert.measure import hardware, peak_memory, reset_peak_memory
from kit.convert.progress import Progress
from kit.convert.task_data import TaskOptions

ROW_LENGTH = 512  # tokens of a held-out row sampled from the base model
DECODE_PROMPT, DECODE_TOKENS = 256, 48


@dataclass
class _Text:
    """What models are measured on: held-out text of the base (N, T), windows of a data set (M, T), or both."""

    sampled: Tensor | None
    windows: Tensor | None
    base_log_probs: Tensor | None = None  # (N·T, vocabulary), on disk


def evaluate(
    models: dict[str, Checkpoint],
    *,
    base: Checkpoint | None = None,
    num_tokens: int = 4096,
    dataset: str | None = None,
    seq_len: int = 2048,
    max_windows: int | None = None,
    seed: int = 1,
    dtype: str = "auto",
    device: str = "cpu",
    ablations: bool = False,
    speed: bool = True,
    tasks: TaskOptions | None = None,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure models beside their base.

    Args:
        models: what to measure, by the name that the table shows.
        base: the model they were made from; agreement (KL, top-1) is with it, on text that it samples.
        num_tokens: held-out tokens sampled from the base (0: none).
        dataset: text for perplexity by windows, as `--dataset` takes it.
        seq_len: tokens a window.
        max_windows: at most so many windows.
        seed: seed of the sampled text; use another one than for calibration.
        dtype: compute dtype; "auto" is the checkpoint's.
        device: where to run.
        ablations: also measure the first model with parts of what it does taken away.
        speed: also time prefill and decode.
        tasks: tasks of lm-evaluation-harness to score.
        output: folder for results.json and the samples of the tasks, written as they finish.
        resume: take the samples that `output` has; everything else is measured again.
        overwrite: replace what `output` has.
        trust_remote_code: allow a checkpoint's own code to run.
        progress: shows what is measured.

    Returns:
        `settings` and `rows`, one dict a model or ablation: `perplexity` (of the data set), `self_perplexity`, `kl` in
        nats, `top1`, each with its standard error, `prefill_tokens_per_second`, `decode_tokens_per_second`,
        `peak_memory_bytes`, and `tasks` (see `Tasks.run`).

    Raises:
        KitError: if a model cannot be loaded or the data set not be read, a task is unknown or its data broken, or
            `output` holds results that were not asked to be replaced.
    """
    progress = progress or Progress()
    folder = EvalFolder(output, resume=resume, overwrite=overwrite) if output else None
    first = base or next(iter(models.values()))
    tokenizer = first.load_tokenizer(trust_remote_code)
    text = _Text(None, None)
    if dataset is not None:
        documents = read_documents(dataset, tokenizer=tokenizer)
        text.windows = perplexity_windows("\n\n".join(documents), tokenizer, seq_len, max_windows)
    todo = ([("base", base, True)] if base else []) + [(name, model, False) for name, model in models.items()]
    harness = None
    if tasks is not None:
        from kit.convert.tasks import load_tasks

        harness = load_tasks(tasks)

        def logs(name: str, model: Checkpoint) -> Any:
            kind = device.split(":")[0]
            decides = {"model": model.fingerprint(), "dtype": str(model.compute_dtype(dtype)), "device": kind}
            return harness.open_logs(folder, name, decides)

        for name, checkpoint, _ in todo:
            logs(name, checkpoint)  # refuses other samples before weights load
        for note in harness.settings()["notes"]:
            progress.log(f"note: {note}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kit-eval-") as scratch:
        for name, checkpoint, is_base in todo:
            reset_peak_memory()
            model = checkpoint.load_model(checkpoint.compute_dtype(dtype), device, trust_remote_code)
            if text.sampled is None and num_tokens:
                length = min(ROW_LENGTH, num_tokens)
                sampled = sample_from_model(model, tokenizer, max(num_tokens // length, 1), length, seed)
                text.sampled = sampled.input_ids
            if is_base and text.sampled is not None:
                text.base_log_probs = _scratch_tensor(
                    Path(scratch) / "base", text.sampled.numel(), model.config.vocab_size
                )
            for variant, context in _variants(model, ablations and checkpoint is next(iter(models.values()))):
                label = f"{name}, {variant}" if variant else name
                with context:
                    row = {"name": label, **_quality(model, text, is_base, progress, label)}
                    if not variant:
                        row |= _speed(model, device) if speed else {}
                        row["peak_memory_bytes"] = peak_memory()
                        row["bytes"] = checkpoint.nbytes
                        row["cache_bytes"] = cache_bytes(checkpoint.config)
                    if harness is not None:  # last: what the harness holds is not the model's memory
                        row["tasks"] = harness.run(model, tokenizer, logs(label, checkpoint), progress, label)
                rows.append(row)
            del model
    result = {
        "settings": {
            "sampled_tokens": text.sampled.numel() if text.sampled is not None else 0,
            "sampled_from": first.source if text.sampled is not None else None,
            "seed": seed,
            "dataset": Path(dataset).name if dataset else None,
            "dataset_tokens": text.windows.numel() if text.windows is not None else 0,
            "window": seq_len,
            "dtype": dtype,
            "device": hardware(device),
            **({"tasks": harness.settings()} if harness is not None else {}),
        },
        "rows": rows,
    }
    if folder is not None:
        folder.write(result)
    return result


def _variants(model: Any, ablations: bool) -> Iterator[tuple[str, AbstractContextManager]]:
    from kit.modules import linear_attention, quantized

    yield "", nullcontext()
    if ablations and getattr(model.config, "linear_attention", None):
        for name, weights in linear_attention.ABLATIONS.items():
            yield name, linear_attention.branch_weights(model, *weights)
    if ablations and any(isinstance(module, quantized.QuantizedLinear) for module in model.modules()):
        for name, parts in quantized.ABLATIONS.items():
            yield name, quantized.switched_off(model, parts)


def _scratch_tensor(path: Path, tokens: int, vocabulary: int) -> Tensor:
    """A float32 tensor (tokens, vocabulary) that lives on disk."""
    return torch.from_file(str(path), shared=True, size=tokens * vocabulary, dtype=torch.float32).view(
        tokens, vocabulary
    )


@torch.no_grad()
def _quality(model: Any, text: _Text, is_base: bool, progress: Progress, label: str) -> dict[str, float]:
    """Perplexity on both texts; agreement with the base's stored log-probabilities on the sampled one."""
    found: dict[str, float] = {}
    total = sum(len(t) for t in (text.sampled, text.windows) if t is not None)
    with progress.task(f"evaluate {label}", total):
        if text.windows is not None:
            found["perplexity"], found["perplexity_stderr"] = _perplexity(model, text.windows, progress)
        if text.sampled is not None:
            kl: list[Tensor] = []
            same: list[Tensor] = []

            def compare(row: int, log_probs: Tensor) -> None:
                if text.base_log_probs is None:
                    return
                stored = text.base_log_probs[row * len(log_probs) : (row + 1) * len(log_probs)]
                if is_base:
                    stored.copy_(log_probs)
                    return
                reference = stored.to(log_probs.device)
                kl.append((reference.exp() * (reference - log_probs)).sum(-1).cpu())
                same.append((reference.argmax(-1) == log_probs.argmax(-1)).float().cpu())

            found["self_perplexity"], found["self_perplexity_stderr"] = _perplexity(
                model, text.sampled, progress, compare
            )
            if kl:
                found["kl"], found["kl_stderr"] = _mean(torch.stack(kl).mean(-1))
                found["top1"], found["top1_stderr"] = _mean(torch.stack(same).mean(-1))
    return found


def _perplexity(
    model: Any, rows: Tensor, progress: Progress, see: Callable[[int, Tensor], None] | None = None
) -> tuple[float, float]:
    """exp of the mean next-token loss over rows (N, T), and its standard error from the spread between rows."""
    losses = []
    for number, row in enumerate(rows):
        log_probs = F.log_softmax(model(row[None].to(model.device), use_cache=False).logits[0].float(), dim=-1)
        losses.append(F.nll_loss(log_probs[:-1], row[1:].to(log_probs.device)).cpu())
        if see:
            see(number, log_probs)
        progress.step()
    mean, error = _mean(torch.stack(losses))
    return math.exp(mean), math.exp(mean) * error


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error (nan for a single value)."""
    values = values.double()
    return float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


@torch.no_grad()
def _speed(model: Any, device: str) -> dict[str, float]:
    """Prefill and decode, batch 1, median of three; decode goes on from a prompt with the model's own cache."""
    from kit.modules.cache import carried_cache

    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (1, DECODE_PROMPT), generator=generator).to(model.device)

    def clock() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    prefill, decode = [], []
    for _ in range(3):
        start = clock()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        prefill.append(clock() - start)
        cache = carried_cache(out)
        token = out.logits[:, -1:].argmax(-1)
        start = clock()
        for _ in range(DECODE_TOKENS // 3):
            out = model(token, use_cache=True, **cache)
            token = out.logits[:, -1:].argmax(-1)
        decode.append(clock() - start)
    return {
        "prefill_tokens_per_second": DECODE_PROMPT / statistics.median(prefill),
        "decode_tokens_per_second": DECODE_TOKENS // 3 / statistics.median(decode),
    }
