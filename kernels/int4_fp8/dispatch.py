"""Operations of torch.library without its cost, where nobody looks."""

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
    prompts wait for. So it is asked only where it does something: gradients, torch.compile, modes and tensors of
    subclasses that see every operation.

    Args:
        name: with a namespace.
        mutates: arguments that are updated.

    Returns:
        A decorator, whose result has `registered`, the operation, and its `register_fake`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        registered = torch.library.custom_op(name, function, mutates_args=mutates)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            plain = not (torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode())
            return function(*args) if plain and type(args[0]) is Tensor else registered(*args)

        call.registered, call.register_fake = registered, registered.register_fake  # type: ignore[attr-defined]
        return call

    return decorate


# Triton's own take 3 us each on the host, and a prompt asks for 39 a layer.


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
