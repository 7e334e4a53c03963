"""Forward and backward passes of a training: run as they are, or captured once in a CUDA graph and replayed.

A small model's step has thousands of short kernels, and launching them takes the CPU longer than running them takes the
GPU. A graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WARM = 3  # passes that run as they are before a graph is captured: kernels are chosen and compiled in them


@dataclass(frozen=True)
class Pass:
    """A loss that is still to be computed, and what it is computed from.

    Attributes:
        value: maps the inputs, by name, to the loss. It must not copy from the device, nor read anything else that
            changes while `program` stays the same.
        inputs: tensors, on any device.
        program: passes of one program, with inputs of the same shapes, launch the same kernels. None: this one must
            not be captured.
    """

    value: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    program: Hashable = None

    def key(self) -> Hashable:
        """What a graph is good for."""
        shapes = ((name, tuple(x.shape), x.dtype) for name, x in self.inputs.items())
        return None if self.program is None else (self.program, *shapes)


class _Graph:
    """A captured pass.

    Args:
        made: the pass.
        share: what its loss is multiplied by.
        parameters: what gradients are wanted of; none may have one now.
        pool: memory that graphs of one training share. What a graph leaves there is good until the next replay of any.
    """

    def __init__(self, made: Pass, share: float, parameters: list[nn.Parameter], context: Any, pool: Any) -> None:
        device = parameters[0].device
        self.inputs = {name: x.to(device, copy=True) for name, x in made.inputs.items()}
        self.share = torch.tensor(share, device=device)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, pool=pool):
                with context():
                    loss = made.value(**self.inputs) * self.share
                loss.backward()
            self.loss, self.grads = loss.detach(), [parameter.grad for parameter in parameters]
        finally:
            for parameter in parameters:
                parameter.grad = None

    def replay(self, made: Pass, share: float) -> Tensor:
        """Run it on other inputs; returns the loss."""
        for name, x in made.inputs.items():
            self.inputs[name].copy_(x, non_blocking=True)
        self.share.fill_(share)
        self.graph.replay()
        return self.loss.clone()


class Passes:
    """Runs passes, and adds their gradients to the parameters'.

    Args:
        parameters: what is trained.
        context: makes the context of forward passes (autocast).
        graphs: whether to capture them; else they run as they are.
        say: is told, once, if that failed.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        context: Callable[[], Any],
        *,
        graphs: bool,
        say: Callable[[str], None],
    ) -> None:
        self.parameters, self.context, self.graphs, self.say = list(parameters), context, graphs, say
        self._seen: dict[Hashable, int] = {}
        self._captured: dict[Hashable, _Graph] = {}
        self._pool: Any = None

    def backward(self, loss_of: Callable[[Tensor], Tensor | Pass], rows: Tensor, share: float, alone: bool) -> Tensor:
        """Add the gradient of a loss, times `share`, to the parameters'.

        Args:
            loss_of: maps rows to their loss, or to the pass that computes it.
            rows: (micro batch,).
            share: a factor.
            alone: no other pass adds to the gradients of this update: they may stay where a graph leaves them.

        Returns:
            The loss times `share`, on the device.
        """
        with self.context():
            made = loss_of(rows)
        key = made.key() if isinstance(made, Pass) and self.graphs else None
        if key is None or not isinstance(made, Pass):
            return self._run(made, share)
        if (graph := self._captured.get(key)) is None:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= WARM or (graph := self._capture(key, made, share)) is None:
                return self._run(made, share)
        loss = graph.replay(made, share)
        self._take(graph.grads, alone)
        return loss

    def _run(self, made: Tensor | Pass, share: float) -> Tensor:
        with self.context():
            if isinstance(made, Pass):
                device = self.parameters[0].device
                made = made.value(**{name: x.to(device, non_blocking=True) for name, x in made.inputs.items()})
            loss = made * share
        loss.backward()
        return loss.detach()

    def _capture(self, key: Hashable, made: Pass, share: float) -> _Graph | None:
        """A graph of a pass; None if there can be none: then no other is tried either."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._captured[key] = _Graph(made, share, self.parameters, self.context, self._pool)
        except RuntimeError as error:  # those of CUDA, of its memory, and of torch.compile are all of this kind
            self.graphs = False
            self._captured.clear()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.say(f"no CUDA graph could be captured ({reason}): kernels are launched one by one, which is slower")
        for parameter, grad in zip(self.parameters, before, strict=True):
            parameter.grad = grad
        return self._captured.get(key)

    def _take(self, grads: list[Tensor | None], alone: bool) -> None:
        """Add a graph's gradients to the parameters'."""
        found = [(parameter, grad) for parameter, grad in zip(self.parameters, grads, strict=True) if grad is not None]
        sums = [(parameter.grad, grad) for parameter, grad in found if parameter.grad is not None]
        if sums:
            torch._foreach_add_([total for total, _ in sums], [grad for _, grad in sums])
        for parameter, grad in found:
            if parameter.grad is None:
                parameter.grad = grad if alone else grad.clone()
