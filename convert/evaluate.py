"""Measure models: perplexity, agreement with a base model, speed, memory. One model is in memory at a time."""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.convert import generations as texts
from kit.convert import perplexity
from kit.convert.checkpoint import Checkpoint, run_path
from kit.convert.compare import check_settings
from kit.convert.data import ROW_LENGTH, perplexity_windows, read_documents, sample_from_model
from kit.convert.errors import ExitCode, KitError
from kit.convert.eval_folder import EvalFolder
from kit.convert.inspect import cache_bytes
from kit.convert.measure import free_models, hardware, peak_memory, reset_peak_memory
from kit.convert.perplexity import mean_and_error
from kit.convert.progress import Progress
from kit.convert.recall import RecallTest, measure_recall, recall_test
from kit.convert.retention import RetentionOptions, RetentionTest, check_base, measure_leaks, measure_retention
from kit.convert.retention import retention_test as read_retention_test
from kit.convert.task_data import TaskOptions
from kit.convert.windowed import window_name, windowed
from kit.modules.sparsity import counted, skipped_weights, token_window

DECODE_PROMPT, DECODE_TOKENS = 256, 48
WARM_TOKENS = 3  # of a decode, not timed: by then a step has been captured as a CUDA graph, if it can be


@dataclass
class _Text:
    """What models are measured on: held-out text of the base (N, T), windows of a data set (M, T), and more."""

    sampled: Tensor | None
    windows: Tensor | None
    words: int = 0  # of the windows
    base_log_probs: Tensor | None = None  # (N·T, vocabulary), on disk
    recall: RecallTest | None = None
    prompts: Tensor | None = None  # (N, P), to continue
    retention: RetentionTest | None = None


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
    windows: Sequence[tuple[int, int]] = (),
    speed: bool = True,
    tasks: TaskOptions | None = None,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    recall: list[int] | None = None,
    haystack: str | None = None,
    generations: int = 0,
    retention: RetentionOptions | None = None,
    dense_prefix: int = 0,
    earlier: dict[str, dict[str, Any]] | None = None,
    kernels: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure models beside their base.

    Args:
        models: what to measure, by the name that the table shows.
        base: the model they were made from; agreement (KL, top-1, top-5) is with it, on text that it samples.
        num_tokens: held-out tokens sampled from the base (0: none).
        dataset: text for perplexity by windows, as `--dataset` takes it.
        seq_len: tokens a window.
        max_windows: at most so many windows.
        seed: seed of the sampled text; use another one than for calibration.
        dtype: compute dtype; "auto" is the checkpoint's.
        device: where to run.
        ablations: also measure the first model with parts of what it does taken away.
        windows: also measure the base behind these training-free windows: keys in all, and how many of them are sinks.
        speed: also time prefill and decode.
        tasks: tasks of lm-evaluation-harness to score.
        output: folder for results.json and the samples of the tasks, written as they finish.
        resume: take the samples that `output` has; everything else is measured again.
        overwrite: replace what `output` has.
        recall: lengths in tokens of contexts to recall from; see `recall.py`.
        haystack: text around the needle, as `--dataset` takes it; None: the data set's, or else made-up sentences.
        dense_prefix: in sparse models, the first so many tokens of a text run dense and the others sparse, as if a
            prompt of that length had been continued; 0: every token is sparse. Speed is timed as the checkpoint says.
        generations: so many held-out prompts are continued greedily; from the data set, or else the sampled text.
        retention: what was learned beside what was kept; see `retention.py`. The base may be left out if a model is an
            adapter; agreement is measured on about `num_tokens` tokens of the data set, too.
        earlier: results of `evaluate` by name, to stand beside this one: their settings have to be the same.
        kernels: quantized models run on the kernels where they can (`Checkpoint.load_to_run`). A model whose parts are
            taken away (`ablations`) runs on its modules in any case, so that its rows differ in nothing else.
        trust_remote_code: allow a checkpoint's own code to run.
        progress: shows what is measured.

    Returns:
        `settings` and `rows`, one dict a model or ablation: `runs_on` of a quantized model (see `run_path`); what
        `perplexity.measures` finds on the data set; `self_perplexity`; `kl` in nats; `top1`: share of positions where
        base and model have the same most likely token; `top5`: share where the base's most likely token is among the
        model's five; each with its standard error;
        `sparse_tokens`, `weights_skipped` and `dropped_inputs` of a sparse model (see `_sparsity`); `recall`,
        `generations`, `retention`; `prefill_tokens_per_second`, `decode_tokens_per_second`, `peak_memory_bytes`,
        `bytes`, `cache_bytes`; `tasks` (see `Tasks.run`).

    Raises:
        KitError: before weights load, if the data cannot be read or is too little for what is asked, a task is unknown
            or its data broken, an earlier result has other settings, or `output` holds results that were not asked to
            be replaced; later, if a model cannot be loaded.
    """
    progress = progress or Progress()
    if retention is not None:
        base = check_base(models, base)
    folder = EvalFolder(output, resume=resume, overwrite=overwrite) if output else None
    first = base or next(iter(models.values()))
    tokenizer = first.load_tokenizer(trust_remote_code)
    settings: dict[str, Any] = {
        "base": base.source if base else None,
        "sampled_tokens": max(num_tokens // ROW_LENGTH, 1) * min(ROW_LENGTH, num_tokens),
        "sampled_from": first.source if num_tokens else None,
        "seed": seed,
        "dataset": Path(dataset).name if dataset else None,
        "dataset_tokens": 0,
        "window": seq_len,
        "dtype": dtype,
        "device": hardware(device),
    }
    if any("sparsity" in model.config for model in models.values()):
        settings["dense_prefix"] = dense_prefix
    text = _Text(None, None)
    read = None
    if dataset is not None:
        read = "\n\n".join(read_documents(dataset, tokenizer=tokenizer))
        text.windows = perplexity_windows(read, tokenizer, seq_len, max_windows)
        text.words = perplexity.count_words(text.windows, tokenizer)
        settings["dataset_tokens"] = text.windows.numel()
        settings["dataset_sha256"] = hashlib.sha256(text.windows.numpy().tobytes()).hexdigest()
    lengths = _lengths(text, num_tokens, recall, generations, speed)
    for checkpoint in (*models.values(), *([base] if base else [])):
        checkpoint.check_runs(lengths)
    if haystack is not None and not recall:
        raise KitError(
            "a haystack is for --recall, which is not asked for",
            where="--haystack",
            next_step="add --recall 512,1024",
            exit_code=ExitCode.USAGE,
        )
    if recall:
        source = Path(haystack or dataset or "made-up sentences").name
        hay = "\n\n".join(read_documents(haystack, tokenizer=tokenizer)) if haystack else read
        vocabulary = first.load_config(trust_remote_code).get_text_config().vocab_size
        text.recall = recall_test(recall, tokenizer, vocabulary, haystack=hay, source=source, seed=seed)
        settings["recall"] = text.recall.settings
    if generations:
        num_held_out = settings["dataset_tokens"] or settings["sampled_tokens"]
        settings["generations"] = texts.settings(generations, num_held_out, settings["dataset"] or "sampled text")
    if retention is not None:
        text.retention = read_retention_test(retention, text.windows, num_tokens)
        settings["retention"] = text.retention.settings

    def wants_kernels(model: Checkpoint) -> bool:
        return kernels and not (ablations and model is next(iter(models.values()), None))

    todo = ([("base", base, True)] if base else []) + [(name, model, False) for name, model in models.items()]
    harness = None
    if tasks is not None:
        from kit.convert.tasks import load_tasks

        harness = load_tasks(tasks)

        def logs(name: str, model: Checkpoint) -> Any:
            kind = device.split(":")[0]
            decides = {"model": model.fingerprint(), "dtype": str(model.compute_dtype(dtype)), "device": kind}
            if kind == "cuda" and "quantization_config" in model.config:
                decides["kernels"] = str(wants_kernels(model))
            return harness.open_logs(folder, name, decides)

        for name, checkpoint, _ in todo:
            logs(name, checkpoint)  # refuses other samples before weights load
        settings["tasks"] = harness.settings()
        for note in settings["tasks"]["notes"]:
            progress.log(f"note: {note}")
    for name, result in (earlier or {}).items():
        check_settings(name, {key: result["settings"].get(key) for key in settings}, "this run", settings)
    if text.retention is not None:
        measure_leaks(models, text.retention, dtype=dtype, device=device, progress=progress)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kit-eval-") as scratch:
        for name, checkpoint, is_base in todo:
            reset_peak_memory()
            model = checkpoint.load_to_run(
                dtype, device, trust_remote_code=trust_remote_code, kernels=wants_kernels(checkpoint)
            )
            path = run_path(model)
            if path:
                progress.log(f"{name}: {path}")
            if text.sampled is None and num_tokens:
                length = min(ROW_LENGTH, num_tokens)
                sampled = sample_from_model(model, tokenizer, settings["sampled_tokens"] // length, length, seed)
                text.sampled = sampled.input_ids
            held_out = text.sampled if text.windows is None else text.windows
            if generations and held_out is not None and text.prompts is None:
                text.prompts = texts.prompts(held_out, generations)
            if is_base and text.sampled is not None:
                text.base_log_probs = _scratch_tensor(
                    Path(scratch) / "base", text.sampled.numel(), model.config.get_text_config().vocab_size
                )
            if is_base and text.retention is not None and text.retention.preserve is not None:
                text.retention.base_log_probs = _scratch_tensor(
                    Path(scratch) / "preserve",
                    text.retention.preserve.numel(),
                    model.config.get_text_config().vocab_size,
                )
            ablated = ablations and checkpoint is next(iter(models.values()), None)
            for variant, context in _variants(model, ablated, windows if is_base else ()):
                label = f"{name}, {variant}" if variant else name
                with context:
                    with token_window(model, dense_prefix):
                        row: dict[str, Any] = {"name": label} | ({"runs_on": path} if path else {})
                        row |= _quality(model, text, is_base and not variant, progress, label)
                        row |= _recall_and_generations(model, tokenizer, text, progress, label)
                        if text.retention is not None:
                            found = measure_retention(label, model, tokenizer, text.retention, is_base, progress)
                            row["retention"] = found
                    if not variant:
                        row |= _speed(model, device) if speed else {}
                        row["peak_memory_bytes"] = peak_memory()
                        row["bytes"] = checkpoint.nbytes
                        row["cache_bytes"] = cache_bytes(checkpoint.config)
                    if harness is not None:  # last: what the harness holds is not the model's memory
                        with token_window(model, dense_prefix):
                            row["tasks"] = harness.run(model, tokenizer, logs(label, checkpoint), progress, label)
                rows.append(row)
            del model
            free_models()
    result = {"settings": settings, "rows": rows}
    if folder is not None:
        folder.write(result)
    return result


def _lengths(text: _Text, num_tokens: int, recall: list[int] | None, generations: int, speed: bool) -> dict[str, int]:
    """Tokens of the longest texts that the models will see, by the option that decides them."""
    return {
        "--seq-len": 0 if text.windows is None else text.windows.shape[1],
        "--num-tokens": min(ROW_LENGTH, num_tokens),
        "--recall": max(recall or (0,)),
        "--generations": texts.PROMPT_TOKENS + texts.NEW_TOKENS if generations else 0,
        "--speed": DECODE_PROMPT + WARM_TOKENS + DECODE_TOKENS // 3 if speed else 0,
    }


def _variants(
    model: Any, ablations: bool, windows: Sequence[tuple[int, int]]
) -> Iterator[tuple[str, AbstractContextManager]]:
    from kit.modules import linear_attention, quantized

    yield "", nullcontext()
    for window, sinks in windows:
        yield window_name(window, sinks), windowed(model, window, sinks)
    if ablations and getattr(model.config, "linear_attention", None):
        for name, weights in linear_attention.ABLATIONS.items():
            yield name, linear_attention.branch_weights(model, *weights)
    if ablations and any(isinstance(module, quantized.QuantizedLinear) for module in model.modules()):
        for name, parts in quantized.ABLATIONS.items():
            yield name, quantized.switched_off(model, parts)


def _sparsity(model: Any, counts: dict[str, Tensor], tokens: int) -> dict[str, Any]:
    """What a sparse model did not read while its quality was measured.

    Args:
        model: the model.
        counts: by mask, channels kept and seen at sparse tokens, and how many tokens there were.
        tokens: that were scored.

    Returns:
        `sparse_tokens`: the share of scored tokens that ran sparse; `weights_skipped`: of the decoder layers' weights,
        the share not read at those; `dropped_inputs`: the share of inputs (neurons) dropped, by linear, over layers.
    """
    name, (_, seen) = next(iter(counts.items()))
    size = getattr(model.get_submodule(name), "in_features", None) or model.get_submodule(name).up_proj.out_features
    dropped, skipped = skipped_weights(model, counts)
    by_linear: dict[str, list[float]] = {}
    for place, share in dropped.items():
        by_linear.setdefault(place.partition(".layers.")[2].partition(".")[2], []).append(share)
    return {"sparse_tokens": int(seen) / size / tokens, "weights_skipped": skipped, "dropped_inputs": by_linear}


def _scratch_tensor(path: Path, tokens: int, vocabulary: int) -> Tensor:
    """A float32 tensor (tokens, vocabulary) that lives on disk."""
    return torch.from_file(str(path), shared=True, size=tokens * vocabulary, dtype=torch.float32).view(
        tokens, vocabulary
    )


@torch.no_grad()
def _quality(model: Any, text: _Text, is_base: bool, progress: Progress, label: str) -> dict[str, Any]:
    """Perplexity on both texts; agreement with the base's stored log-probabilities on the sampled one."""
    found: dict[str, Any] = {}
    scored = [t for t in (text.sampled, text.windows) if t is not None]
    with progress.task(f"evaluate {label}", sum(map(len, scored))), counted(model) as counts:
        if text.windows is not None:
            found |= perplexity.measures(_losses(model, text.windows, progress), text.words)
        if text.sampled is not None:
            kl: list[Tensor] = []
            same: list[Tensor] = []
            among: list[Tensor] = []

            def compare(row: int, log_probs: Tensor) -> None:
                if text.base_log_probs is None:
                    return
                stored = text.base_log_probs[row * len(log_probs) : (row + 1) * len(log_probs)]
                if is_base:
                    stored.copy_(log_probs)
                    return
                reference = stored.to(log_probs.device)
                kl.append((reference.exp() * (reference - log_probs)).sum(-1).cpu())
                best = reference.argmax(-1)
                same.append((best == log_probs.argmax(-1)).float().cpu())
                five = log_probs.topk(min(5, log_probs.shape[-1])).indices
                among.append((five == best[:, None]).any(-1).float().cpu())

            own = perplexity.measures(_losses(model, text.sampled, progress, compare), 0)
            found["self_perplexity"], found["self_perplexity_stderr"] = own["perplexity"], own["perplexity_stderr"]
            for key, rows in (("kl", kl), ("top1", same), ("top5", among)):
                if rows:
                    found[key], found[f"{key}_stderr"] = mean_and_error(torch.stack(rows).mean(-1))
        if counts and scored:
            found |= _sparsity(model, counts, sum(t.numel() for t in scored))
    return found


def _recall_and_generations(
    model: Any, tokenizer: Any, text: _Text, progress: Progress, label: str
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if text.recall is not None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        with progress.task(f"recall {label}", len(text.recall.contexts)):
            found["recall"] = measure_recall(model, text.recall, limit, progress)
    if text.prompts is not None:
        with progress.task(f"generate {label}", len(text.prompts)):
            found["generations"] = texts.generate(model, tokenizer, text.prompts, progress)
    return found


def _losses(model: Any, rows: Tensor, progress: Progress, see: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Next-token losses (N, T - 1) in nats over rows (N, T)."""
    losses = []
    for number, row in enumerate(rows):
        log_probs = F.log_softmax(model(row[None].to(model.device), use_cache=False).logits[0].float(), dim=-1)
        losses.append(F.nll_loss(log_probs[:-1], row[1:].to(log_probs.device), reduction="none").cpu())
        if see:
            see(number, log_probs)
        progress.step()
    return torch.stack(losses)


@torch.no_grad()
def _speed(model: Any, device: str) -> dict[str, float]:
    """Prefill and decode, batch 1, median of three; decode goes on from a prompt with the model's own cache."""
    from kit.modules.cache import carried_cache

    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.get_text_config().vocab_size, (1, DECODE_PROMPT), generator=generator).to(
        model.device
    )

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
        for step in range(WARM_TOKENS + DECODE_TOKENS // 3):
            if step == WARM_TOKENS:
                start = clock()
            out = model(token, use_cache=True, **cache)
            token = out.logits[:, -1:].argmax(-1)
        decode.append(clock() - start)
    return {
        "prefill_tokens_per_second": DECODE_PROMPT / statistics.median(prefill),
        "decode_tokens_per_second": DECODE_TOKENS // 3 / statistics.median(decode),
    }
