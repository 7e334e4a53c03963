"""Launches that cost the host little: a prompt is 350 of them, and short ones wait for nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNED = 16  # bytes that Triton knows addresses to be multiples of
REMEMBERED = 4096  # launches


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
    known = _compiled.get(key)
    if known is not None:
        compiled, values = known
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
