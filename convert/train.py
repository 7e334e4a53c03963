"""The one training loop: AdamW, warm-up and cosine decay, clipping, on accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kit.convert.errors import KitError
from kit.convert.progress import Progress

if TYPE_CHECKING:
    from kit.convert.recipe import TrainConfig


def bf16_is_fast(device: str) -> bool:
    """Whether matrix products in bf16 beat those in fp32: on GPUs, and on CPUs with instructions for it."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device != "cpu" or any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def fit(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    num_rows: int,
    config: TrainConfig,
    *,
    seed: int,
    device: str,
    name: str,
    progress: Progress,
) -> list[float]:
    """Minimise a loss over rows of data.

    Args:
        parameters: what to train; they are made trainable here and frozen again at the end.
        loss_of: maps row numbers (micro batch,) to their mean loss.
        num_rows: rows there are; each epoch is a new seeded permutation.
        config: steps, batch sizes, learning rate.
        seed: seed of the row order.
        device: "cpu" or a CUDA device.
        name: for error messages.
        progress: gets the loss of every step.

    Returns:
        The loss of each update.

    Raises:
        KitError: if the loss is not finite; the parameters keep their last finite values.
    """
    from accelerate import Accelerator
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    trained = [parameter.requires_grad_(True) for parameter in parameters]
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no" if device == "cpu" else "bf16")
    optimizer = accelerator.prepare(
        torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, round(config.warmup_ratio * config.steps), config.steps, min_lr_rate=0.1
    )
    order = _row_order(num_rows, seed)
    losses = []
    for step in range(config.steps):
        batch = torch.tensor([next(order) for _ in range(min(config.batch_size, num_rows))])
        micro = batch.split(config.micro_batch_size or len(batch))
        total = 0.0
        for rows in micro:
            with accelerator.autocast():
                loss = loss_of(rows) * (len(rows) / len(batch))
            accelerator.backward(loss)
            total += float(loss.detach())
        if not torch.isfinite(torch.tensor(total)):
            raise KitError(
                f"the loss of {name} is {total} at step {step + 1}",
                where=f"{name}: learning_rate={config.learning_rate}",
                next_step="lower the learning rate (for example --set "
                + name
                + f".learning_rate={config.learning_rate / 10:g})",
            )
        accelerator.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        progress.step(loss=total)
    for parameter in trained:
        parameter.requires_grad_(False)
    return losses


def _row_order(num_rows: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(num_rows, generator=generator).tolist()
