"""Operations and launches that cost the host little: a prompt is 350 of them, and short ones wait for nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ALIGNED = 16  # bytes that Triton knows addresses to be multiples of
REMEMBERED = 4096  # launches


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


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)` of a Triton kernel whose last parameters are the constants.

    Triton takes 13 us to look a compiled kernel up. Here it is found by what it was compiled for: constants and
    options, types, alignment, and numbers as they are, so that what a prompt's first layer has looked up serves all.
    It runs on the device of its first tensor.
    """
    device = next(x for x in args if isinstance(x, Tensor)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, *args, **constants)
    key = (kernel, device, *map(_kind, args), *constants, *constants.values())
    if key in _compiled:
        compiled, values = _compiled[key]
        compiled[(*grid, 1, 1)[:3]](*args, *values)
        return None
    compiled = kernel[grid](*args, **constants)
    if compiled is not None:  # as in the interpreter
        if len(_compiled) >= REMEMBERED:
            _compiled.clear()
        _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
    return None


def _kind(x: Any) -> Any:
    """What Triton may have compiled a kernel for, of an argument: no less, for all that it does not look at."""
    if isinstance(x, Tensor):
        return x.dtype if x.data_ptr() % ALIGNED == 0 else (x.dtype,)
    if isinstance(x, float):
        return float
    return x if isinstance(x, int) else (type(x), x.base.dtype, *x.block_shape)  # or a descriptor


# Triton's own take 3 us each on the host, and a prompt asks for 39 a layer.


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
