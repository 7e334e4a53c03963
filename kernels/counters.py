"""Counters by which the last program of a tile knows that it is the last."""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[int | None, int, int], Tensor] = {}


def counters_of(weight: Tensor, number: int) -> Tensor:
    """Counters of a weight, (number,) int32, zero between calls. A weight must not run on two streams at a time."""
    key = (weight.device.index, weight.data_ptr(), number)
    if key not in _counters:
        made = torch.zeros(number, dtype=torch.int32, device=weight.device)
        if made.is_cuda and torch.cuda.is_current_stream_capturing():
            return made  # it lives in the graph, which also zeroes it
        _counters[key] = made
    return _counters[key]
