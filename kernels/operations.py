"""Operations for torch.library that cost the host little where torch need not know of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def operation(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as `torch.library.custom_op` does.

    torch takes 5 to 25 us to find a function that it already has, 0.3 ms a layer of a prompt, which is what short
    prompts wait for. So it is asked only where it does something: gradients, torch.compile, tracing, modes and
    tensors of subclasses that see every operation.

    Args:
        name: with a namespace.
        mutates: arguments that are updated.

    Returns:
        A decorator, whose result has `registered`, the operation, and its `register_fake` and `register_autograd`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(name, function, mutates_args=mutates)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
            plain = not watched and not torch.is_grad_enabled() and type(args[0]) is Tensor
            return function(*args) if plain else registered(*args)

        for attribute in ("register_fake", "register_autograd"):
            setattr(call, attribute, getattr(registered, attribute))
        call.registered = registered  # type: ignore[attr-defined]
        return call

    return decorate
