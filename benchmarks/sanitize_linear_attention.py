"""Launch every linear-attention kernel at small sizes, forward and backward, for compute-sanitizer to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize_linear_attention.py

and again with `--tool racecheck`. Parts can be named, to run them side by side. Tests look at results, this does not.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from kit.kernels.linear_attention.decode_ops import HybridState, gated_step, hybrid_step
from kit.kernels.linear_attention.gated_ops import gated_linear_attention
from kit.kernels.linear_attention.hybrid_ops import hybrid_attention
from kit.kernels.logit_kl import kl_and_gradient

HEADS, KV_HEADS = 4, 2


class Shape:
    """Sizes, and tensors of them: the tests' cuts for bf16, whose blocks are 64 rows, and for fp32, whose are 16."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.dim, self.length, self.window = (64, 150, 64) if dtype == torch.bfloat16 else (32, 70, 20)

    def random(self, *shape: int) -> Tensor:
        """A leaf that wants its gradient."""
        return (torch.randn(*shape, device="cuda") * 0.5).to(self.dtype).requires_grad_()

    def rows(self, heads: int, batch: int = 2, length: int | None = None) -> Tensor:
        """q, k or v."""
        return self.random(batch, heads, length or self.length, self.dim)

    def bounds(self) -> Tensor:
        """Two sequences in the first row, and one padded on both sides in the second."""
        cut, end = self.length // 4, self.length
        return torch.tensor([[0, 0, cut], [0, cut, end], [1, 11, end - 10]], dtype=torch.int32, device="cuda")


def differentiate(out: Tensor, state: Tensor | None) -> None:
    """Run the backward pass, of the state as well if it has one."""
    loss = out.float().square().sum()
    if state is not None and state.requires_grad:
        loss = loss + state.square().sum()
    loss.backward()
    torch.cuda.synchronize()


def gated(shape: Shape) -> None:
    """With and without a learned gate, a denominator, maps, a state, packed sequences and splits."""
    half, positive = shape.dim // 2, lambda x: x.detach().abs().requires_grad_()
    cases: tuple[tuple[bool, dict[str, Any]], ...] = (
        (False, {"normalize": False}),
        (True, {"return_state": True}),
        (False, {"bounds": shape.bounds()}),
    )
    for mapped, options in cases:
        for has_gate in (True, False):
            q, k, v = shape.rows(HEADS), shape.rows(KV_HEADS), shape.rows(KV_HEADS)
            gate = -torch.rand(2, HEADS, shape.length, device="cuda") if has_gate else None
            gate = gate.requires_grad_() if gate is not None else None
            maps = [shape.random(n, shape.dim, half) if mapped else None for n in (HEADS, KV_HEADS)]
            q, k = (q, k) if mapped else (positive(q), positive(k))
            differentiate(*gated_linear_attention(q, k, v, gate, *maps, **options))
    q, k, v = (shape.rows(1, 1, 1100) for _ in range(3))
    gate = (-0.1 * torch.rand(1, 1, 1100, device="cuda")).requires_grad_()
    differentiate(*gated_linear_attention(positive(q), positive(k), v, gate))


def hybrid(shape: Shape) -> None:
    """With sinks, terraces, packed sequences, a window of several blocks, and splits."""
    cases: tuple[tuple[int, dict[str, Any]], ...] = (
        (shape.length, {"num_sinks": 4}),
        (shape.length, {"terrace": True, "window_size": 32}),
        (shape.length, {"bounds": shape.bounds(), "num_sinks": 2}),
        (shape.length, {"window_size": 2 * shape.window}),
        (1100, {}),
    )
    for length, options in cases:
        batch, heads, kv_heads = (1, 1, 1) if length > shape.length else (2, HEADS, KV_HEADS)
        tensors = [shape.rows(n, batch, length) for n in (heads, kv_heads, kv_heads)]
        maps = [shape.random(n, shape.dim, shape.dim // 2) for n in (heads, kv_heads)]
        factor, meta = (torch.full((heads,), 0.3, device="cuda", requires_grad=True) for _ in range(2))
        given: dict[str, Any] = {"window_size": shape.window, "scale": 0.125, "meta_logit": meta} | options
        differentiate(*hybrid_attention(*tensors, *maps, factor, **given))


def chunked(shape: Shape) -> None:
    """The same in sizes that the kernels of chunk_kernel.py take."""
    shape.dim, shape.window = (128, 64) if shape.dtype == torch.bfloat16 else (32, 32)
    hybrid(shape)


@torch.no_grad()
def decode(shape: Shape) -> None:
    """Steps of few and many sequences, with a state a query head or a key head, past a window and its sinks."""
    dim, random = shape.dim, shape.random
    for batch, map_heads, sinks in ((2, 4, 4), (2, 2, 0), (130, 4, 4), (130, 2, 2)):
        k, v = random(batch, KV_HEADS, 1, dim), random(batch, KV_HEADS, 1, dim)
        state = HybridState.empty(k, v, map_heads=map_heads, features=dim, window_size=6, num_sinks=sinks)
        position, log_g = torch.zeros(batch, dtype=torch.int32, device="cuda"), torch.zeros(HEADS, device="cuda")
        maps = random(HEADS, dim, dim // 2), random(map_heads, dim, dim // 2)
        for _ in range(10):
            token = (random(batch, n, dim) for n in (HEADS, KV_HEADS, KV_HEADS))
            meta = log_g if sinks else None
            hybrid_step(*token, *maps, log_g, state, position, scale=0.125, meta_logit=meta)
            position += 1
    states, sums = torch.zeros(2, HEADS, dim, dim, device="cuda"), torch.zeros(2, 2, HEADS, dim, device="cuda")
    position, gate = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.zeros(2, HEADS, device="cuda")
    for _ in range(3):
        token = (random(2, n, dim) for n in (HEADS, KV_HEADS, KV_HEADS))
        gated_step(*token, gate, states, sums, position, *(random(n, dim, dim // 2) for n in (HEADS, KV_HEADS)))
        position += 1
    kl_and_gradient(random(5, 5001), random(5, 5001), 0.5)
    torch.cuda.synchronize()


def main() -> None:
    """Run the parts that are named, or all."""
    parts = {"gated": gated, "hybrid": hybrid, "chunked": chunked, "decode": decode}
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for name in sys.argv[1:] or [f"{part}-{kind}" for kind in kinds for part in parts]:
        part, kind = name.split("-")
        parts[part](Shape(kinds[kind]))
        print(f"{name} launched", flush=True)


if __name__ == "__main__":
    main()
