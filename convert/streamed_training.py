"""Train adapters, and what is new in a linearized model, while its frozen weights pass through one layer at a time.

An update reads the layers twice: forwards, when what enters each of them is kept, and backwards, when each runs once
more for its gradients. So a model that does not fit the device is trained on its logits: what has to fit is a layer,
the head, the hidden states that enter the layers, and what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kit.convert.streaming import StreamedModel
from kit.modules.linear_attention import original_attention

Compare = Callable[[Tensor, Tensor, float | None, Tensor | None], Tensor]


class StreamedTraining:
    """What is trained of a streamed model: LoRA (arXiv:2106.09685) on linears of every layer, and maybe its mixers.

    Args:
        model: the converted model.
        rank, alpha: of the adapters: alpha / rank · B A is added to a weight.
        targets: linears that get an adapter, by the end of their names; None: the attention's projections.
        mixers: train the parameters of the linear attention too.
        seed: of A; B starts at 0.
    """

    def __init__(
        self, model: StreamedModel, *, rank: int, alpha: float, targets: list[str] | None, mixers: bool, seed: int
    ) -> None:
        family = model.family
        targets = targets or [f"{family.attention}.{name}" for name in (*family.projections, family.output)]
        self.model, self.scale, self.adapting = model, alpha / rank, True
        self.adapters: list[dict[str, tuple[nn.Parameter, nn.Parameter]]] = []
        self.mixers: list[dict[str, nn.Parameter]] = []
        generator = torch.Generator().manual_seed(seed)
        for index in range(len(model)):
            layer, found = model.layer_on_meta(index), {}
            for name, module in layer.named_modules():
                if not any(f".{name}".endswith(f".{target}") for target in targets):
                    continue
                outputs, inputs = module.weight.mT.shape if family.transposed else module.weight.shape
                a = (2 * torch.rand(rank, inputs, generator=generator) - 1) / math.sqrt(inputs)
                pair = a.to(model.device), torch.zeros(outputs, rank, device=model.device)
                found[name] = (nn.Parameter(pair[0]), nn.Parameter(pair[1]))
            self.adapters.append(found)
            mixer = model.attention(layer).linear_attention if mixers else None
            names = [] if mixer is None else [name for name, _ in mixer.named_parameters()]
            place = model.layer_prefix(index) + f"{family.attention}.linear_attention."
            self.mixers.append({n: nn.Parameter(model.view.read(place + n, device=model.device)) for n in names})

    def layer_parameters(self, index: int) -> list[nn.Parameter]:
        """What is trained of a layer."""
        return [*(p for pair in self.adapters[index].values() for p in pair), *self.mixers[index].values()]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, layer by layer."""
        return [parameter for index in range(len(self.model)) for parameter in self.layer_parameters(index)]

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Make a layer resident, with its adapters on it."""
        with self.model.layer(index) as module:
            mixer = self.model.attention(module).linear_attention
            for name, parameter in self.mixers[index].items():
                setattr(mixer, name, parameter)
            for name, pair in self.adapters[index].items():
                module.get_submodule(name).register_forward_hook(partial(self._adapt, *pair))
            yield module

    def _adapt(self, a: Tensor, b: Tensor, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not self.adapting:
            return out
        (x,) = args
        return out + (x @ a.to(x.dtype).mT) @ b.to(x.dtype).mT * self.scale

    def loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        compare: Compare,
        *,
        teacher: bool,
        rows_at_once: int | None = None,
        branches: Callable[[nn.Module], AbstractContextManager] = nullcontext,
    ) -> Tensor:
        """A loss on the last hidden states; its gradients by `parameters` are computed with it.

        Args:
            input_ids, position_ids: (B, T).
            compare: gives the loss of hidden states (B, T, d) after the final norm, the head's weight (V, d), the cap
                of the logits or None, and the base's hidden states (None without a teacher).
            teacher: run the base too: the same layers without adapters, the new attention off.
            rows_at_once: rows that pass through a layer together; None: all.
            branches: context in which a layer has the branches that it is trained with.
        """
        batch = (input_ids, position_ids, compare, teacher, rows_at_once or len(input_ids), branches)
        return _Sweep.apply(self, batch, *self.parameters)

    def sweep(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        compare: Compare,
        teacher: bool,
        rows_at_once: int,
        branches: Callable[[nn.Module], AbstractContextManager],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The loss, and its gradient by each of `parameters` (None where it does not depend on one)."""
        model = self.model
        positions = position_ids.to(model.device)
        splits = [slice(start, start + rows_at_once) for start in range(0, len(positions), rows_at_once)]

        def through(hidden: Tensor) -> Tensor:
            return torch.cat([model.forward(hidden[rows], positions[rows]) for rows in splits])

        entering = [model.embed(input_ids, position_ids).hidden.to(model.device)]
        base = entering[0] if teacher else None
        with torch.no_grad():
            for index in range(len(model)):
                with self.layer(index) as module:
                    with branches(module):
                        entering.append(through(entering[-1]))
                    if base is not None:
                        with original_attention(module), self._without_adapters():
                            base = through(base)
        loss, gradient = self._head(entering.pop(), base, compare)
        found: list[list[Tensor | None]] = []
        for index in reversed(range(len(model))):
            hidden, own, below = entering.pop(), self.layer_parameters(index), []
            sums: list[Tensor | None] = [None] * len(own)
            with self.layer(index) as module, branches(module), torch.enable_grad():
                for rows in splits:
                    torch.clear_autocast_cache()  # weights that were cast without a gradient
                    x = hidden[rows].detach().requires_grad_()
                    out = model.forward(x, positions[rows])
                    to_x, *to_own = torch.autograd.grad(out, [x, *own], gradient[rows], allow_unused=True)
                    below.append(to_x)
                    for number, new in enumerate(to_own):
                        old = sums[number]
                        sums[number] = new if old is None else old if new is None else old + new
            gradient = torch.cat(below)
            found.append(sums)
        return loss, [each for layer in reversed(found) for each in layer]

    def _head(self, hidden: Tensor, base: Tensor | None, compare: Compare) -> tuple[Tensor, Tensor]:
        """The loss of what leaves the last layer, and its gradient."""
        norm, head, *_ = self.model.head()
        weight: Any = head.weight
        cap = getattr(self.model.base.config, "final_logit_softcapping", None)
        teacher = None if base is None else norm(base)
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            loss = compare(norm(leaf), weight, cap, teacher)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        self.adapting = False
        try:
            yield
        finally:
            self.adapting = True

    @torch.no_grad()
    def merged(self) -> Iterator[dict[str, Tensor]]:
        """Layer by layer the tensors that training has changed, adapters added to the weights, by full name."""
        model = self.model
        for index in range(len(model)):
            prefix = model.layer_prefix(index)
            place = f"{prefix}{model.family.attention}.linear_attention."
            changed: dict[str, Tensor] = {place + name: p.detach() for name, p in self.mixers[index].items()}
            for name, (a, b) in self.adapters[index].items():
                delta = (self.scale * (b @ a)).cpu()
                weight = model.view.read(f"{prefix}{name}.weight").float()
                changed[f"{prefix}{name}.weight"] = (weight + (delta.mT if model.family.transposed else delta)).to(
                    model.dtype
                )
            yield changed


class _Sweep(torch.autograd.Function):
    """Makes gradients that exist already those of a scalar."""

    @staticmethod
    def forward(ctx: Any, training: StreamedTraining, batch: tuple, *parameters: Tensor) -> Tensor:
        loss, ctx.gradients = training.sweep(*batch)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, None, *(None if each is None else each * grad.to(each.dtype) for each in ctx.gradients)
