"""Losses that teach a linearized model what its base does: layer by layer, and on the logits.

The teacher is never a second model: it is the same layer, or the same model, with the new attention switched off. Where
all weights are trained, the base's weights are kept beside them in the compute dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kit.convert.measure import free_memory
from kit.convert.passes import Pass
from kit.convert.streaming import Recorder
from kit.families import family_of
from kit.kernels.logit_kl import kl_and_gradient, top_k_kl_and_gradient
from kit.modules.linear_attention import (
    Mixer,
    Step,
    branch_weights,
    causal_places,
    exact_branch_weights,
    original_attention,
    softmax_scores,
)
from kit.modules.modeling import packed_segments

if TYPE_CHECKING:
    from kit.convert.recipe import Layer
    from kit.convert.teacher import TopLogits

LINEAR_ONLY = (1.0, 0.0)
LOGITS_AT_ONCE = 2**27  # tokens x vocabulary of a chunk of the logit loss: 512 MiB in fp32
FREE_SHARE = 4  # of a GPU's free memory, one part may hold what enters and leaves a layer's attention
SCORES_AT_ONCE = 2**24  # B x H x C x T of a chunk of the attention-weight loss: 64 MiB in fp32


class WindowDropout:
    """Decides, pass by pass, whether the softmax window is left out of training (arXiv:2510.05901).

    The decision depends on the seed, the update and the rows alone, so a resumed training takes the same ones.

    Args:
        share: of the passes without a window at the start and at the end; linear between.
        steps: updates in all.
        linear_steps: so many updates at the start never have a window.
        seed: of the decisions.
    """

    def __init__(self, share: tuple[float, float], steps: int, linear_steps: int, *, seed: int) -> None:
        self.share, self.steps, self.seed, self.linear_steps = share, steps, seed, linear_steps
        self.step = 0

    def at_step(self, step: int) -> None:
        """Tell which update comes next."""
        self.step = step

    def drops(self, rows: Tensor) -> bool:
        """Whether the window is left out for these rows."""
        if self.step < self.linear_steps:
            return True
        done = (self.step - self.linear_steps) / max(self.steps - self.linear_steps - 1, 1)
        share = self.share[0] + (self.share[1] - self.share[0]) * done
        return random.Random(f"{self.seed}:{self.step}:{rows.tolist()}").random() < share

    def applied(self, model: nn.Module, rows: Tensor) -> Any:
        """Context in which the model has its window, or has not."""
        return branch_weights(model, *LINEAR_ONLY) if self.drops(rows) else nullcontext()

    def passed(
        self, model: nn.Module, rows: Tensor, loss: Callable[..., Tensor], *, packed: bool, **inputs: Tensor | None
    ) -> Pass:
        """The pass of a loss on rows, with the model's window or without.

        Args:
            model: what has the window.
            rows: (B,), which rows.
            loss: maps the inputs to their loss.
            packed: rows hold several sequences; how many decides on shapes, so that such a pass is never captured.
            inputs: those that are None are left out.
        """
        dropped = self.drops(rows)

        def value(**inputs: Tensor) -> Tensor:
            with branch_weights(model, *LINEAR_ONLY) if dropped else nullcontext():
                return loss(**inputs)

        given = {name: x for name, x in inputs.items() if x is not None}
        return Pass(value, given, None if packed else ("no window" if dropped else "whole"))


class LayerTeacher:
    """One attention layer, the hidden states that enter it, and what its heads gave as softmax attention.

    Args:
        layer: a layer of a stage that propagates the original model.
    """

    def __init__(self, layer: Layer) -> None:
        assert layer.inputs is not None
        hidden = layer.inputs.hidden
        # copying rows to the GPU for every update would take longer than the update
        fits = layer.device != "cpu" and 2 * hidden.nbytes < free_memory(layer.device) // FREE_SHARE
        place = layer.device if fits else None
        inputs, targets = (Recorder(layer.model.scratch, len(hidden), place) for _ in range(2))
        self.model, self.index, self.device = layer.model, layer.index, layer.device
        original = layer.model.attention(layer.original)
        with watched(original, layer.model.output_projection(layer.original), inputs.add, targets.add):
            layer.advance()
        self.inputs, self.targets = inputs.tensor, targets.tensor
        self.attention, self.output = layer.model.attention(layer.module), layer.model.output_projection(layer.module)
        self.positions = layer.inputs.position_ids

    def given(self, rows: Any, length: int | None = None) -> dict[str, Any]:
        """What `run` takes for rows, and for their first tokens only if a length is given."""
        where = self.positions[rows, :length]
        return {"hidden": self.inputs[rows, :length], "positions": where, "segment_ids": packed_segments(where)}

    def run(self, hidden: Tensor, positions: Tensor, segment_ids: Tensor | None = None) -> None:
        """Run the attention layer on hidden states (B, T, hidden) at positions (B, T), maybe of packed sequences."""
        hidden, positions = hidden.to(self.device), positions.to(self.device)
        self.attention(
            hidden_states=hidden,
            position_embeddings=self.model.position_embeddings(hidden, positions, self.index),
            attention_mask=None,
            segment_ids=None if segment_ids is None else segment_ids.to(self.device),
        )

    def output_error(self, targets: Tensor, **given: Any) -> Tensor:
        """Mean squared error of the heads' outputs, before o_proj, against (B, T, H·D)."""
        outputs: list[Tensor] = []
        with watched(self.attention, self.output, None, outputs.append):
            self.run(**given)
        return F.mse_loss(outputs[0].float(), targets.to(self.device).float())

    def weight_error(self, **given: Any) -> Tensor:
        """Cross-entropy of the attention weights with softmax's as labels (Hedgehog, arXiv:2402.04347, Eq. 4)."""
        mixer = self.attention.linear_attention
        with torch.no_grad(), original_attention(self.attention), queries_keys(mixer) as asked:
            self.run(**given)
        with queries_keys(mixer) as seen:
            self.run(**given)
        (q, k, step), (teacher_q, teacher_k, _) = seen[0], asked[0]
        return weight_loss(mixer, q, k, step, teacher_q, teacher_k)

    def relative_error(self, num_rows: int) -> float:
        """Output error over the targets' variance, on the first rows."""
        rows = torch.arange(min(len(self.inputs), num_rows))
        targets = self.targets[rows]
        with torch.no_grad():
            return float(self.output_error(targets, **self.given(rows)) / targets.float().var())


def weight_loss(mixer: Mixer, q: Tensor, k: Tensor, step: Step, teacher_q: Tensor, teacher_k: Tensor) -> Tensor:
    """Mean over queries of −Σ_j p_ij log a_ij, p softmax's attention weights and a the layer's, normalised.

    Scores are made for a chunk of queries at a time, and made again in the backward pass, with the branches that the
    layer has now: by then `WindowDropout` has given it its window back.

    Args:
        mixer: the layer's attention.
        q, k: (B, H, T, D) and (B, G, T, D), as the layer gets them.
        step: what else it gets.
        teacher_q, teacher_k: the same as softmax attention gets them.
    """
    batch, heads, length = q.shape[:3]
    at = torch.arange(length, device=q.device)
    branches = mixer.linear_weight, mixer.window_weight

    def part(q: Tensor, k: Tensor, start: int, stop: int) -> Tensor:
        with exact_branch_weights(mixer, *branches):
            log_a = mixer.log_weights(q, k, step, start, stop).log_softmax(-1)
        scores = softmax_scores(teacher_q[:, :, start:stop], teacher_k, step.scale, step.softcap)
        _, visible = causal_places(step, length, start, stop, q.device)
        if step.base_window is not None:
            visible = visible & (at[start:stop, None] - at < step.base_window)
        visible = visible[:, None].expand(log_a.shape)
        p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return -(p * log_a.clamp(min=-100.0)).sum()  # softmax sees what a window without linear branch cannot: p log 0

    size = max(SCORES_AT_ONCE // (batch * heads * length), 1)
    parts = [
        checkpoint(part, q, k, start, min(start + size, length), use_reentrant=False, preserve_rng_state=False)
        for start in range(0, length, size)
    ]
    return torch.stack(parts).sum() / (batch * heads * length)


@contextmanager
def queries_keys(mixer: Mixer) -> Iterator[list[tuple[Tensor, Tensor, Step]]]:
    """Record q (B, H, T, D), k (B, G, T, D) and the step that a layer's attention gets."""
    seen: list[tuple[Tensor, Tensor, Step]] = []
    hook = mixer.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1], args[3])))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def watched(
    attention: Any, output: Any, see_input: Callable[[Tensor], None] | None, see_output: Callable[[Tensor], None]
) -> Iterator[None]:
    """Hand over what enters an attention layer (B, T, hidden) and what enters its output projection (B, T, H·D)."""
    hooks = [output.register_forward_pre_hook(lambda _, args: see_output(args[0]))]
    if see_input is not None:

        def look(_: Any, args: tuple, named: dict[str, Any]) -> None:
            see_input(args[0] if args else named["hidden_states"])

        hooks.append(attention.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _ChunkedKL(torch.autograd.Function):
    """KL to some teacher's distributions, weighted mean over tokens; logits exist for a chunk of tokens at a time only.

    The gradient of a token's logits is (q − p) times its share of the mean, so it is spent at once on the hidden states
    and the head, and only those gradients are kept.

    `compare(logits, at, scale)` gives the KL of the tokens `at`, and `scale` times its gradient by their logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, kind: torch.dtype, compare: Any, counts: Tensor | None):
        head = weight.to(kind)
        size = max(LOGITS_AT_ONCE // len(head), 1)
        total = torch.zeros((), device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        # shares of the mean, times the number of tokens
        shares = None if counts is None else counts.float() * (len(counts) / counts.float().sum().clamp(min=1e-30))
        for start in range(0, len(hidden), size):
            at = slice(start, start + size)
            h = hidden[at].to(kind)
            kl, gradient = compare(h @ head.mT, at, 1 / len(hidden))
            share = None if shares is None else shares[at]
            total += (kl if share is None else kl * share).sum()
            if d_hidden is not None:
                through = gradient @ head
                d_hidden[at] = (through if share is None else through * share[:, None]).to(hidden.dtype)
            if d_weight is not None:
                d_weight += gradient.mT @ (h if share is None else (h * share[:, None]).to(kind))
        ctx.save_for_backward(d_hidden, d_weight)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        d_hidden, d_weight = ctx.saved_tensors
        return *(None if x is None else x * grad.to(x.dtype) for x in (d_hidden, d_weight)), None, None, None


def logit_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    softcap: float | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Mean over tokens of KL(teacher ‖ student) in nats, and its gradient, without the logits of all tokens at once.

    Args:
        hidden: (..., d), after the final norm.
        weight: (V, d), the output head.
        teacher_hidden, teacher_weight: the same of the teacher; products are in the dtype of its hidden states.
        softcap: logits are softcap · tanh(logits / softcap), as Gemma 2 has it.
        counts: (...), how much each token counts in the mean; None: all alike.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        teacher, right = teacher_hidden.flatten(0, -2).detach(), teacher_weight.detach().to(teacher_hidden.dtype)

        def compare(logits: Tensor, at: slice, scale: float) -> tuple[Tensor, Tensor]:
            return kl_and_gradient(logits, teacher[at] @ right.mT, scale, softcap)

        return _ChunkedKL.apply(hidden.flatten(0, -2), weight, teacher.dtype, compare, _flat(counts))


def top_k_loss(
    hidden: Tensor, weight: Tensor, known: TopLogits, softcap: float | None = None, counts: Tensor | None = None
) -> Tensor:
    """As `logit_kl`, of what is kept of a teacher's distributions: see `kit.kernels.logit_kl.top_k_kl_and_gradient`.

    Args:
        hidden: (B, T, d), after the final norm; products are in its dtype, or in bfloat16 under autocast.
        weight: (V, d), the output head.
        known: of the same tokens.
        softcap, counts: as for `logit_kl`; the teacher's is in `known` already.
    """
    device = hidden.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        tokens, log_p, log_rest = (x.flatten(0, 1).to(hidden.device) for x in known)

        def compare(logits: Tensor, at: slice, scale: float) -> tuple[Tensor, Tensor]:
            return top_k_kl_and_gradient(logits, tokens[at], log_p[at], log_rest[at], scale, softcap)

        return _ChunkedKL.apply(hidden.flatten(0, -2), weight, kind, compare, _flat(counts))


def _flat(counts: Tensor | None) -> Tensor | None:
    return None if counts is None else counts.flatten()


class _Rounded(torch.autograd.Function):
    """Many tensors in one dtype, each way in a few launches; one by one they would be two for each tensor."""

    @staticmethod
    def forward(ctx: Any, kind: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kinds = [x.dtype for x in tensors]
        return _copied(tensors, [kind] * len(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        given = [number for number, grad in enumerate(grads) if grad is not None]
        copies = iter(_copied([grads[number] for number in given], [ctx.kinds[number] for number in given]))
        return None, *(None if grad is None else next(copies) for grad in grads)


def _copied(tensors: Sequence[Any], kinds: list[torch.dtype]) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(x, dtype=kind) for x, kind in zip(tensors, kinds, strict=True)]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)


@contextmanager
def compiled_layers(model: Any, attempt: Callable[[], Any], say: Callable[[str], None]) -> Iterator[None]:
    """Run a model's decoder layers through torch.compile while the context is open; equal layers are compiled once.

    Rows of packed sequences run as they are: how many there are is data, on which shapes depend.

    Args:
        model: the linearized causal language model, or what holds one (PEFT).
        attempt: runs it forward and backward; most of compiling happens there.
        say: is told if that failed; layers run as they are then.
    """
    family = family_of(model.config.model_type)
    layers = next(layer for module in model.modules() if (layer := getattr(module, family.layers, None)) is not None)
    failed = False

    def fail(error: Exception) -> None:
        nonlocal failed
        if not failed:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"layers could not be compiled ({reason}): they run as they are, which is slower")
        failed = True

    def compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(plain, fullgraph=True, dynamic=False)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not failed and kwargs.get("segment_ids") is None:
                try:
                    return fast(*args, **kwargs)
                except Exception as error:  # what is no failure of the compiler, the plain layer meets too
                    fail(error)
            return plain(*args, **kwargs)

        return forward

    for layer in layers:
        layer.forward = compiled(layer.forward)
    try:
        try:
            attempt()
        except Exception as error:  # and the training meets it again
            fail(error)
        yield
    finally:
        for layer in layers:
            del layer.forward


def logit_loss(
    model: Any,
    base_weights: dict[str, Tensor] | None,
    adapters_off: Callable[[], Any] = nullcontext,
    run_in: torch.dtype | None = None,
) -> Callable[..., Tensor]:
    """Make the KL loss of a linearized model against its base.

    It is a function of `input_ids` and `position_ids` (B, T), of how much each token's prediction counts (B, T; None:
    all alike), and of what is known of the base's distributions (None: the base runs beside the model).

    Positions may be left out where they are 0, 1, ... in every row: looking for packed sequences waits for the GPU.

    Weights that are trained in fp32 run rounded to the dtype of the base's, as they will be written: activations are
    half as large then as autocast would make them.

    Args:
        model: the linearized causal language model.
        base_weights: the base's, by name, where the model's own change; None: they do not, or the base does not run.
        adapters_off: context in which the model has no adapters.
        run_in: dtype that trained weights are rounded to where the base does not run; None: they are not.
    """
    body, head = model.base_model, model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    prefix = f"{model.base_model_prefix}."
    embedding = f"{prefix}{family_of(model.config.model_type).embedding}.weight"
    inner = {n.removeprefix(prefix): value for n, value in (base_weights or {}).items() if n.startswith(prefix)}
    new = {id(p) for module in model.modules() if isinstance(module, Mixer) for p in module.parameters()}

    def rounded(dtype: torch.dtype | None) -> dict[str, Tensor]:
        wide = (
            {} if dtype is None else {n: p for n, p in body.named_parameters() if id(p) not in new and p.dtype != dtype}
        )
        return dict(zip(wide, _Rounded.apply(dtype, *wide.values()), strict=True)) if wide else {}

    def loss(
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        counts: Tensor | None = None,
        known: TopLogits | None = None,
    ) -> Tensor:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if known is not None:
            hidden = torch.func.functional_call(body, rounded(run_in), kwargs=inputs).last_hidden_state
            return top_k_loss(hidden, head.weight, known, cap, counts)
        with torch.no_grad(), original_attention(model), adapters_off():
            if base_weights is None:
                teacher, teacher_head = body(**inputs).last_hidden_state, head.weight
            else:
                teacher = torch.func.functional_call(body, inner, kwargs=inputs).last_hidden_state
                teacher_head = base_weights["lm_head.weight" if "lm_head.weight" in base_weights else embedding]
        weights = rounded(None if base_weights is None else teacher.dtype)
        hidden = torch.func.functional_call(body, weights, kwargs=inputs).last_hidden_state
        return logit_kl(hidden, head.weight, teacher, teacher_head, cap, counts)

    return loss
