"""The one training loop: AdamW, warm-up and cosine decay, clipping, on accelerate; killed, it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kit.convert.errors import ExitCode, KitError
from kit.convert.passes import Pass, Passes
from kit.convert.progress import Progress
from kit.convert.recipe import SAVE_EVERY, TrainConfig
from kit.convert.work import replacing


def bf16_is_fast(device: str) -> bool:
    """Whether matrix products in bf16 beat those in fp32: on GPUs, and on CPUs with instructions for it."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device != "cpu" or any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def autocast(device: str) -> torch.autocast:
    """The context of forward passes: products in bf16 on a GPU."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=device != "cpu")


def fit(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor | Pass],
    num_rows: int,
    config: TrainConfig,
    *,
    seed: int,
    device: str,
    name: str,
    progress: Progress,
    row_weights: Tensor | None = None,
    checkpoint: Path | None = None,
    save_every: int = SAVE_EVERY,
    at_step: Callable[[int], None] | None = None,
    rates: Sequence[float] | None = None,
) -> list[float]:
    """Minimise a loss over rows of data.

    Args:
        parameters: what to train; they are made trainable here and frozen again at the end.
        loss_of: maps row numbers (micro batch,) to their mean loss, or to the pass that computes it: on a GPU, that
            is captured in a CUDA graph where it can be.
        num_rows: rows there are; each epoch is a new seeded permutation.
        config: steps, batch sizes, learning rate.
        seed: seed of the row order.
        device: "cpu" or a CUDA device.
        name: for error messages.
        progress: gets the loss of every step.
        row_weights: (num_rows,), what rows count in an update's mean, for example their numbers of labels; None: 1.
        checkpoint: file that keeps the state of the training: parameters, optimizer, step, random numbers. If it is
            there, training goes on from it, and takes the same steps as if it had never stopped.
        save_every: updates between two writes of it; it is also written on an interrupt.
        at_step: is told the number of each update before its loss is computed.
        rates: peak learning rate of each parameter; None: the config's for all.

    Returns:
        The loss of each update.

    Raises:
        KitError: if the loss or its gradient is not finite; the parameters keep their last finite values. If
            `checkpoint` is of another training, or cannot be written.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    trained = list(parameters)
    for parameter in trained:
        parameter.requires_grad_(True)
    AcceleratorState._reset_state(reset_partial_state=True)  # else a process trains on one kind of device only
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no" if device == "cpu" else "bf16")
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in zip(trained, rates or [config.learning_rate] * len(trained), strict=True):
        groups.setdefault(rate, []).append(parameter)
    on_gpu = device != "cpu"
    adamw = torch.optim.AdamW(
        [{"params": of, "lr": rate, "initial_lr": rate} for rate, of in groups.items()],
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=on_gpu or None,  # a few launches for all parameters; on a CPU PyTorch chooses
    )
    passes = Passes(trained, accelerator.autocast, graphs=on_gpu, say=progress.log)
    described = {"options": config.model_dump(mode="json"), "seed": seed, "num_rows": num_rows}
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        losses = _restore(checkpoint, trained, adamw, described, device)
        progress.step(len(losses))
    optimizer = accelerator.prepare(adamw)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer,
        round(config.warmup_ratio * config.steps),
        config.steps,
        min_lr_rate=0.1,
        last_epoch=len(losses) - 1,
    )
    batch_size = min(config.batch_size, num_rows)
    order = islice(_row_order(num_rows, seed), len(losses) * batch_size, None)
    weights = torch.ones(num_rows) if row_weights is None else row_weights.float()
    random_state, whole = _random_state(device), True
    try:
        for step in range(len(losses), config.steps):
            random_state = _random_state(device)
            if at_step is not None:
                at_step(step)
            batch = torch.tensor([next(order) for _ in range(batch_size)])
            parts = []
            micro = batch.split(config.micro_batch_size or len(batch))
            for rows in micro:
                share = float(weights[rows].sum() / weights[batch].sum().clamp(min=1e-30))
                if share:  # the mean over no labels is NaN
                    parts.append(passes.backward(loss_of, rows, share, alone=len(micro) == 1).double())
            norm = accelerator.clip_grad_norm_(trained, config.max_grad_norm)
            # read together, and when everything is launched: the CPU waits for the GPU once an update
            total, length = torch.stack([sum(parts, norm.new_zeros((), dtype=torch.float64)), norm.double()]).tolist()
            for what, value in (("loss", total), ("norm of the gradient", length)):
                if not isfinite(value):
                    raise KitError(
                        f"the {what} of {name} is {value} at step {step + 1}",
                        where=f"{name}: learning_rate={config.learning_rate}",
                        next_step="lower the learning rate (for example --set "
                        + name
                        + f".learning_rate={config.learning_rate / 10:g})",
                    )
            whole = False  # an interrupt from here on would leave some parameters behind the others
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            random_state, whole = _random_state(device), True
            progress.step(loss=total)
            if checkpoint is not None and (len(losses) % save_every == 0 or len(losses) == config.steps):
                _save(checkpoint, trained, adamw, described, losses, random_state)
    except KeyboardInterrupt:
        if checkpoint is not None and whole and losses:
            _save(checkpoint, trained, adamw, described, losses, random_state)
        raise
    for parameter in trained:
        parameter.requires_grad_(False)
    return losses


def _row_order(num_rows: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num_rows, generator=generator).tolist()


def _random_state(device: str) -> dict[str, Tensor]:
    """The state of the generators that dropout draws from."""
    state = {"random.cpu": torch.get_rng_state()}
    return state | ({} if device == "cpu" else {"random.cuda": torch.cuda.get_rng_state(device)})


def _save(
    file: Path,
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    described: dict[str, Any],
    losses: list[float],
    random_state: dict[str, Tensor],
) -> None:
    """Write the state of a training, whole or not at all."""
    from safetensors.torch import save_file

    tensors = dict(random_state)
    for number, parameter in enumerate(trained):
        state = optimizer.state[parameter] | {"value": parameter.detach()}
        tensors |= {f"{number}.{key}": value.cpu().contiguous() for key, value in state.items()}
    with replacing(file) as part:
        save_file(tensors, part, metadata={"training": json.dumps(described), "losses": json.dumps(losses)})


def _restore(
    file: Path,
    trained: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    described: dict[str, Any],
    device: str,
) -> list[float]:
    """Take up a training where `_save` left it.

    Returns:
        The losses until then.

    Raises:
        KitError: if it is of another training.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (it is no mapping)
            metadata = stored.metadata()
        if json.loads(metadata["training"]) != json.loads(json.dumps(described)):
            raise ValueError("its options, seed or data are others")
        values = [tensors[f"{number}.value"] for number in range(len(trained))]
        if [v.shape for v in values] != [p.shape for p in trained] or f"{len(trained)}.value" in tensors:
            raise ValueError("its parameters are others")
        losses = [float(loss) for loss in json.loads(metadata["losses"])]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise KitError(
            f"the state of a killed training cannot be taken up: {error}",
            where=str(file),
            next_step="run the command that was killed, unchanged, with --resume; or start again with --overwrite",
            exit_code=ExitCode.USAGE,
        ) from error
    for number, (parameter, value) in enumerate(zip(trained, values, strict=True)):
        parameter.data.copy_(value)
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{number}.{key}" in tensors]
        for key in keys:  # none for a parameter that never had a gradient
            moment = tensors[f"{number}.{key}"]
            counts = key == "step" and not optimizer.param_groups[0]["fused"]  # they stay on the CPU
            optimizer.state[parameter][key] = moment if counts else moment.to(parameter.device)
    torch.set_rng_state(tensors["random.cpu"])
    if device != "cpu" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    return losses
