"""Single tokens of linearized models as CUDA graphs: a step of the model, from embedding to final norm, replayed.

A step in ring form (`kit.modules.decoding`) launches the same kernels on the same memory each time. So the second step
that finds a cache where it was is captured, and later ones are replayed as long as nothing has changed that a graph
cannot see: the cache's tensors, the model's modules and the addresses of its weights, hooks, switches. Where something
has, a step runs as it is, and the next one that can be is captured anew. Beam search moves a cache every step and
captures nothing; a layer kept full, whose keys grow, keeps its model from it. `model.base_model.replay_steps = False`
turns it off for a model: threads that sample while another one captures need that.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kit.families import family_of
from kit.modules.cache import cache_argument
from kit.modules.decoding import as_configured, can_decode, stayed
from kit.modules.graphs import FIXED_ROPE, StepGraph, chosen, hooked

PLAIN_STEPS = 2  # on the same memory, before one is captured
KNOWN = ("torch", "transformers", __name__.partition(".")[0])  # packages whose modules read nothing on the host


class Steps:
    """How the single tokens of one cache run; the cache has it as `kit_steps`, and copies of a cache begin anew."""

    def __init__(self) -> None:
        self.plain = 0  # steps in a row that found the cache where it was, and could have been captured
        self.failed = False  # once a capture has failed, none is tried again
        self.replay: Replay | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, ()


class Replay:
    """A captured step of a model on a cache.

    Args:
        model: the base model; it is not kept alive.
        cache: all of whose layers are in ring form.
        forward: a step of inputs -> the model's output.
        inputs: token, place, and number of tokens before it of each row.
    """

    def __init__(self, model: nn.Module, cache: Any, forward: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        self.parts = weakref.ref(parts_of(model))
        self.memory = [(layer, _tensors(layer)) for layer in cache.layers]
        mixers = _mixers(model)
        self.mixers = [weakref.ref(mixer) for mixer in mixers]

        def run(*inputs: Tensor) -> Tensor:
            out = forward(*inputs)
            self.output_class = type(out)
            return out.last_hidden_state

        before = [layer.cumulative_length for layer in cache.layers]
        try:
            self.graph = StepGraph(run, *inputs)
        finally:  # nothing has run yet
            for layer, length in zip(cache.layers, before, strict=True):
                layer.cumulative_length = length

    def stands(self, model: nn.Module, cache: Any, inputs: tuple[Tensor, ...]) -> bool:
        """Whether a replay is what the model would do."""
        parts = self.parts()
        return (
            parts is not None
            and parts is parts_of(model)
            and _undisturbed(parts)
            and len(cache.layers) == len(self.memory)
            and all(
                layer is known and all(x is y for x, y in zip(_tensors(layer), tensors, strict=True))
                for layer, (known, tensors) in zip(cache.layers, self.memory, strict=True)
            )
            and all(as_configured(layer, mixer()) for layer, mixer in zip(cache.layers, self.mixers, strict=True))
            and all(
                (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
                for x, y in zip(inputs, self.graph.inputs, strict=True)
            )
        )

    def __call__(self, cache: Any, name: str, inputs: tuple[Tensor, ...]) -> Any:
        """The model's output; the cache, which it has under a name, counts the token."""
        hidden = self.graph(*inputs)
        for layer in cache.layers:
            layer.cumulative_length += 1
        return self.output_class(last_hidden_state=hidden, **{name: cache})


class Parts:
    """The modules of a model and where its weights are, so that replacing one is noticed.

    Attributes:
        usual: modules and weights are of kinds that read nothing on the host.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.modules = modules[1:]  # the model itself holds this
        held = [x for module in modules for x in (module._modules, module._parameters, module._buffers)]
        found: list[Any] = [(of, name, x) for of in held for name, x in of.items()]
        self.holders, self.names, self.values = ([row[i] for row in found] for i in range(3))
        tensors = [x for x in self.values if isinstance(x, Tensor)]
        self.usual = all(type(module).__module__.partition(".")[0] in KNOWN for module in self.modules) and all(
            type(x) in (Tensor, nn.Parameter) for x in tensors
        )
        self.tensors = tensors if self.usual else []  # others may have no address
        self.addresses = [x.data_ptr() for x in self.tensors]

    def unchanged(self) -> bool:
        """Whether all are where they were. It is asked every step, so the loops are C's."""
        same = all(map(operator.is_, map(dict.get, self.holders, self.names), self.values))
        return same and [x.data_ptr() for x in self.tensors] == self.addresses


_parts: weakref.WeakKeyDictionary[nn.Module, Parts] = weakref.WeakKeyDictionary()


def parts_of(model: nn.Module) -> Parts:
    """The parts of a model: the same object until one of them is another."""
    parts = _parts.get(model)
    if parts is None or not parts.unchanged():
        parts = _parts[model] = Parts(model)
    return parts


def asks_for_more(arguments: dict[str, Any], config: Any) -> bool:
    """Whether the arguments of a forward pass, beside tokens, masks and places, ask for more than hidden states."""
    usual = {cache_argument(arguments), "use_cache", "return_dict"}
    more = any(value is not None and value is not False for name, value in arguments.items() if name not in usual)
    return (
        more
        or any(chosen(arguments, config, name) for name in ("output_attentions", "output_hidden_states"))
        or not all(chosen(arguments, config, name, True) for name in ("use_cache", "return_dict"))
    )


def take_step(model: Any, cache: Any, name: str, forward: Callable[..., Any], *inputs: Tensor) -> Any:
    """The output of a model for one token a row: replayed if it can be.

    Args:
        model: the base model.
        cache: in which the tokens before are.
        name: what the model's output calls it.
        forward: what runs otherwise, and is captured; it gets the inputs.
        inputs: token (B, 1), place (1 or B, 1), and number of tokens before it (B,).
    """
    if not model.replay_steps or _capturing():  # for the caller, whose graph ours would spoil if it were freed now
        return forward(*inputs)
    steps = getattr(cache, "kit_steps", None)
    if steps is None:
        steps = cache.kit_steps = Steps()
    if steps.replay is not None and not steps.replay.stands(model, cache, inputs):
        steps.replay, steps.plain = None, 0
    if steps.replay is None:
        ready = all(stayed(layer) for layer in cache.layers) and _can_be_captured(model, cache, inputs)
        steps.plain = steps.plain + 1 if ready and not steps.failed else 0
        if steps.plain < PLAIN_STEPS:
            return forward(*inputs)
        try:
            steps.replay = Replay(model, cache, forward, inputs)
        except RuntimeError as error:  # CUDA's and lack of memory are of that kind
            steps.failed, steps.plain = True, 0
            warnings.warn(
                f"steps of this cache run without a CUDA graph, which could not be captured: {error}", stacklevel=2
            )
            return forward(*inputs)
    return steps.replay(cache, name, inputs)


def forget(cache: Any) -> None:
    """Free the graph of a cache that is about to leave the memory it was captured with."""
    if getattr(cache, "kit_steps", None) is not None and not _capturing():
        cache.kit_steps = None


def on_cuda(x: Tensor) -> bool:
    """Whether graphs of work on a tensor can be captured: it is on a GPU."""
    return x.is_cuda


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _undisturbed(parts: Parts) -> bool:
    """Whether a model does what its code says, and nobody watches it."""
    if torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled("cuda"):
        return False
    if any(module.training or "forward" in module.__dict__ or module._compiled_call_impl for module in parts.modules):
        return False
    return not hooked(parts.modules)


def _can_be_captured(model: Any, cache: Any, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a step of a model launches what does not depend on what the host reads, on one device."""
    if not all(on_cuda(x) and x.device == inputs[0].device for x in inputs):
        return False
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {x.get("rope_type", "default") for x in (rope, *rope.values()) if isinstance(x, dict)}
    parts = parts_of(model)
    if not kinds <= set(FIXED_ROPE) or model.training or not _undisturbed(parts):
        return False
    if not parts.usual or any(x.device != inputs[0].device for x in parts.tensors):
        return False
    mixers = _mixers(model)
    return len(mixers) == len(cache.layers) and all(
        mixer is not None and can_decode(layer, mixer, None) for layer, mixer in zip(cache.layers, mixers, strict=True)
    )


def _mixers(model: Any) -> list[Any]:
    """What attends in each layer of a linearized model; None in those kept full."""
    family = family_of(model.config.model_type)
    return [getattr(layer, family.attention).linear_attention for layer in getattr(model, family.layers)]


def _tensors(layer: Any) -> tuple[Any, ...]:
    """What a layer of a cache holds."""
    return layer.keys, layer.values, layer.recurrent_states[0]
