"""A step of decoding as a CUDA graph, and what tells whether a model's forward pass may be replaced by one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

OUTPUT_HOOKS = "transformers.utils.output_capturing"  # whose hooks stay, and sleep unless outputs are asked for
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length
ONE_AT_A_TIME = threading.RLock()  # captures: one waits for the whole device as it begins


class StepGraph:
    """What a function launches, captured as it is made; the tensors that it works on must stay where they are.

    Args:
        run: the function. It is called once, but nothing that it launches runs yet.
        inputs: tensors on one CUDA device. The graph has copies, which every call fills.
        held: what it works on and would be freed otherwise.
    """

    def __init__(self, run: Callable[..., Tensor], *inputs: Tensor, held: Any = None) -> None:
        self.held, device = held, inputs[0].device
        with torch.inference_mode(False):  # so that they can be written to outside of that mode as well
            self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(  # meanwhile other threads may launch, but neither capture nor draw random numbers
            self.graph, stream=capture_stream(device), capture_error_mode="thread_local"
        )
        here = torch.cuda.stream(torch.cuda.current_stream(device))  # comes back even if the capture cannot be ended
        with ONE_AT_A_TIME, torch.cuda.device(device), here, capture:
            self.output = run(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function returns for inputs of the same shapes, in memory of its own."""
        for held, x in zip(self.inputs, inputs, strict=True):
            held.copy_(x)
        self.graph.replay()
        return self.output.clone()


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs of a device are captured on: torch's own is of whichever device was used first."""
    return torch.cuda.Stream(device)


def hooked(modules: Iterable[nn.Module], *own: Any) -> bool:
    """Whether somebody listens to one of some modules: with a hook that is neither transformers' nor among `own`."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return True
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(hook not in own and hook.__module__ != OUTPUT_HOOKS for hook in hooks):
                return True
    return False


def chosen(arguments: Mapping[str, Any], config: Any, name: str, default: bool = False) -> bool:
    """An argument of a forward pass, or what the config says."""
    given = arguments.get(name)
    return bool(getattr(config, name, default) if given is None else given)
