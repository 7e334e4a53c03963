"""Trainings of linearized models: each layer on its base's attention, the model on its base's logits or on text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kit.convert.distill import LayerTeacher, WindowDropout, compiled_layers, logit_kl, logit_loss, top_k_loss
from kit.convert.learned import (
    SAVE_WHOLE_EVERY,
    AdapterConfig,
    DistillConfig,
    LoraTrainConfig,
    TransferConfig,
    WindowDropoutConfig,
)
from kit.convert.passes import Pass
from kit.convert.recipe import SAVE_EVERY, Layer, TrainConfig, TrainRun
from kit.convert.streamed_training import StreamedTraining
from kit.convert.teacher import CachedTeacher, TopLogits, labels_as_teacher
from kit.convert.train import autocast, fit
from kit.families import family_of
from kit.modules.linear_attention import Mixer

# what is trained, its loss as a function of row numbers, what is to be done when it is trained, and the ids of what is
# new in it
Training = tuple[list[Any], Callable[[Tensor], Tensor | Pass], Callable[[], Any], set[int]]

COMPILE_FROM = 1.2e16  # FLOP of a distillation that is worth compiling for: about two minutes of an H100


def transfer(layer: Layer, options: TransferConfig, seed: int, start: Callable[[LayerTeacher], None]) -> dict[str, Any]:
    """Train what is new in a layer until its heads give softmax attention's outputs, or its weights.

    Args:
        layer: of a stage that propagates the original model.
        options: of the training.
        seed: of the order of rows, and of the passes without a window.
        start: sets parameters from data before they are trained.

    Returns:
        The losses, and the relative error of the heads' outputs before and after; nothing for a layer without anything
        new.
    """
    mixer = layer.model.attention(layer.module).linear_attention
    parameters = [] if mixer is None else list(mixer.parameters())
    if not parameters:
        return {}
    teacher = LayerTeacher(layer)
    before = teacher.relative_error(options.batch_size)
    dropout = WindowDropout(*_dropout(options), seed=seed)

    def loss(rows: Tensor) -> Pass:
        given = teacher.given(rows)
        packed = given["segment_ids"] is not None
        if options.loss == "weights":
            return dropout.passed(mixer, rows, teacher.weight_error, packed=packed, **given)
        error = lambda **given: 1000 * teacher.output_error(**given)  # noqa: E731
        return dropout.passed(mixer, rows, error, packed=packed, targets=teacher.targets[rows], **given)

    if options.linear_steps < options.steps or not options.steps:
        start(teacher)
    if not options.steps:
        return {"relative_error_before": before, "relative_error": teacher.relative_error(options.batch_size)}
    losses = fit(
        parameters,
        loss,
        len(teacher.inputs),
        options,
        seed=seed,
        device=layer.device,
        name="transfer",
        progress=layer.progress.silent(),
        checkpoint=layer.state,
        at_step=dropout.at_step,
    )
    return {
        "losses": losses,
        "loss_first": losses[0],
        "loss_last": sum(losses[-10:]) / len(losses[-10:]),
        "relative_error_before": before,
        "relative_error": teacher.relative_error(options.batch_size),
    }


def distill(run: TrainRun, options: DistillConfig, seed: int, title: str) -> dict[str, Any]:
    """Train the model on KL(base ‖ model) of the next token; the base is the model with all that is new off.

    Args:
        run: the stage's.
        options: of the training.
        seed: of the order of rows, of streamed adapters, and of the passes without a window.
        title: of the progress bar.

    Returns:
        The losses, and how many parameters and tokens there were.
    """
    dropout = WindowDropout(*_dropout(options), seed=seed)
    teacher = None
    if options.teacher == "cached":  # before the model is in memory
        teacher = CachedTeacher(run.state)
        teacher.fill(run.original, run.rows, options.top_k, run.progress)
    if options.streamed:
        trained, loss, finish, new = _streamed_distillation(run, options, seed, dropout, teacher)
    else:
        trained, loss, finish, new = _resident_distillation(run, options, dropout, teacher)
    rate = options.new_learning_rate
    rates = None if rate is None else [rate if id(p) in new else options.learning_rate for p in trained]
    with _compiled(run, options, trained, loss), run.progress.task(title, options.steps):
        losses = _fit(run, trained, loss, options, seed, "distill", SAVE_WHOLE_EVERY, dropout.at_step, rates)
    finish()
    return {
        "losses": losses,
        "trained_parameters": sum(p.numel() for p in trained),
        "tokens": _tokens(options, run.rows),
    }


def _compiled(run: TrainRun, options: DistillConfig, trained: list[Any], loss: Callable[[Tensor], Any]) -> Any:
    """Context in which distillation runs: with compiled layers, if it is long enough for that."""
    device, wanted = run.device, options.compile
    if wanted is None and not options.streamed and device != "cpu":
        size = sum(p.numel() for p in run.model.parameters())
        wanted = 8.0 * size * _tokens(options, run.rows) > COMPILE_FROM
    if not wanted:
        return nullcontext()

    def attempt() -> None:
        made = loss(torch.arange(min(options.micro_batch_size or options.batch_size, len(run.rows.input_ids))))
        try:
            with autocast(device):
                made.value(**{name: x.to(device) for name, x in made.inputs.items()}).backward()
        finally:
            for parameter in trained:
                parameter.grad = None

    return compiled_layers(run.model, attempt, run.progress.log)


def _resident_distillation(
    run: TrainRun, options: DistillConfig, dropout: WindowDropout, teacher: CachedTeacher | None
) -> Training:
    """Logit distillation with the whole model in memory."""
    model, rows = run.model, run.rows
    new = [p for module in model.modules() if isinstance(module, Mixer) for p in module.parameters()]
    ours = {id(p) for p in new}
    base_weights, run_in = None, None
    off: Callable[[], Any] = nullcontext
    finish: Callable[[], Any] = _nothing
    if options.parameters == "lora":
        peft, trained = _with_adapters(model, options.rank, options.alpha, None)
        trained, off, finish = trained + new, peft.disable_adapter, peft.merge_and_unload
    else:
        run_in = model.dtype
        if teacher is None:
            base_weights = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in ours}
        trained = list(model.float().parameters())
    loss_of, predicting = logit_loss(model, base_weights, off, run_in), rows.predicting
    for parameter in trained:
        parameter.requires_grad_(True)

    def value(input_ids: Tensor, counts: Tensor, position_ids: Tensor | None = None, **known: Tensor) -> Tensor:
        return loss_of(input_ids, position_ids, counts, TopLogits(**known) if known else None)

    def loss(batch: Tensor) -> Pass:
        where = rows.position_ids[batch]
        packed = bool((where != torch.arange(where.shape[1])).any())
        inputs = {"input_ids": rows.input_ids[batch], "counts": predicting[batch]}
        inputs |= {"position_ids": where} if packed else {}
        inputs |= {} if teacher is None else teacher(batch)._asdict()
        return dropout.passed(model, batch, value, packed=packed, **inputs)

    return trained, loss, finish, ours


def _streamed_distillation(
    run: TrainRun, options: DistillConfig, seed: int, dropout: WindowDropout, teacher: CachedTeacher | None
) -> Training:
    """Logit distillation with one layer's weights in memory."""
    predicting = run.rows.predicting

    def compare_of(batch: Tensor) -> Any:
        counts = predicting[batch].to(run.device)
        known = None if teacher is None else teacher(batch)

        def compare(hidden: Tensor, head: Tensor, cap: float | None, base: Tensor | None) -> Tensor:
            if known is not None:
                return top_k_loss(hidden, head, known, cap, counts)
            assert base is not None
            return logit_kl(hidden, head, base, head, cap, counts)

        return compare

    return _streamed(run, options, None, True, seed, compare_of, teacher is None, dropout)


def low_rank(run: TrainRun, options: LoraTrainConfig, seed: int, title: str) -> dict[str, Any]:
    """LoRA on the projections with the next-token loss; what is new stays as it is; adapters are merged.

    Args:
        run: the stage's.
        options: of the training.
        seed: of the order of rows, and of streamed adapters.
        title: of the progress bar.

    Returns:
        The losses, and how many parameters there were.
    """
    trained, loss, finish, _ = _streamed_lora(run, options, seed) if options.streamed else _resident_lora(run, options)
    with run.progress.task(title, options.steps):
        losses = _fit(run, trained, loss, options, seed, "lora")
    finish()
    return {"losses": losses, "trained_parameters": sum(p.numel() for p in trained)}


def _resident_lora(run: TrainRun, options: LoraTrainConfig) -> Training:
    """LoRA with the whole model in memory."""
    rows, device = run.rows, run.device
    model, trained = _with_adapters(run.model, options.rank, options.alpha, options.target_modules)
    labels = rows.labels

    def loss(batch: Tensor) -> Tensor:
        return model(
            input_ids=rows.input_ids[batch].to(device),
            position_ids=rows.position_ids[batch].to(device),
            labels=labels[batch].to(device),
            use_cache=False,
        ).loss

    def finish() -> None:
        model.eval()
        model.merge_and_unload()

    model.train()
    return trained, loss, finish, set()


def _streamed_lora(run: TrainRun, options: LoraTrainConfig, seed: int) -> Training:
    """LoRA with one layer's weights in memory."""
    labels, predicting = run.rows.labels, run.rows.predicting

    def compare_of(batch: Tensor) -> Any:
        known, counts = labels_as_teacher(labels[batch]), predicting[batch].to(run.device)
        return lambda hidden, head, cap, _: top_k_loss(hidden, head, known, cap, counts)

    return _streamed(run, options, options.target_modules, False, seed, compare_of, False, None)


def _nothing() -> None:
    """Leave a model as it is."""


def _streamed(
    run: TrainRun,
    options: AdapterConfig,
    targets: list[str] | None,
    mixers: bool,
    seed: int,
    compare_of: Callable[[Tensor], Any],
    teacher: bool,
    dropout: WindowDropout | None,
) -> Training:
    """What a `StreamedTraining` trains, its loss as a function of row numbers, and what is to be done at its end."""
    rows = run.rows
    training = StreamedTraining(
        run.streamed(), rank=options.rank, alpha=options.alpha, targets=targets, mixers=mixers, seed=seed
    )

    def loss(batch: Tensor) -> Tensor:
        return training.loss(
            rows.input_ids[batch],
            rows.position_ids[batch],
            compare_of(batch),
            teacher=teacher,
            rows_at_once=options.micro_batch_size,
            branches=lambda layer: nullcontext() if dropout is None else dropout.applied(layer, batch),
        )

    def finish() -> None:
        run.changed = training.merged()

    return training.parameters, loss, finish, {id(p) for layer in training.mixers for p in layer.values()}


def _fit(
    run: TrainRun,
    trained: list[Any],
    loss: Callable[[Tensor], Tensor | Pass],
    options: AdapterConfig,
    seed: int,
    name: str,
    save_every: int = SAVE_EVERY,
    at_step: Callable[[int], None] | None = None,
    rates: list[float] | None = None,
) -> list[float]:
    """`fit` for a train stage: rows count by the predictions in them; a streamed loss splits its batch itself."""
    return fit(
        trained,
        loss,
        len(run.rows.input_ids),
        options.model_copy(update={"micro_batch_size": None}) if options.streamed else options,
        seed=seed,
        device=run.device,
        name=name,
        progress=run.progress,
        row_weights=run.rows.predicting.sum(1),
        checkpoint=run.state,
        save_every=save_every,
        at_step=at_step,
        rates=rates,
    )


def _dropout(options: WindowDropoutConfig) -> tuple[tuple[float, float], int, int]:
    """Arguments of `WindowDropout`: shares, steps, steps without any window."""
    end = options.window_dropout if options.window_dropout_end is None else options.window_dropout_end
    return (options.window_dropout, end), options.steps, options.linear_steps


def _tokens(options: TrainConfig, rows: Any) -> int:
    return options.steps * min(options.batch_size, len(rows.input_ids)) * rows.input_ids.shape[1]


def _with_adapters(model: Any, rank: int, alpha: float, targets: list[str] | None) -> tuple[Any, list[Any]]:
    """A model with LoRA adapters, and their parameters."""
    from peft import LoraConfig, get_peft_model

    family = family_of(model.config.model_type)
    targets = targets or [f"{family.attention}.{name}" for name in (*family.projections, family.output)]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=family.transposed)
    adapted = get_peft_model(model, config)
    return adapted, [parameter for name, parameter in adapted.named_parameters() if "lora_" in name]
