"""Time the linear-attention kernels beside SDPA and flash-linear-attention, on one GPU.

    python benchmarks/linear_attention.py --output linear_attention.json

Every figure is the median of CUDA-graph replays, bf16, 32 heads of 128, random data. `roofline` is the least time that
reading the inputs and writing the outputs once takes at the measured copy bandwidth, as a share of what was measured.
Peers that are not installed are left out. `first` is the first call: compiling, if it is the first of its
kernel and Triton's cache is cold, and no tuning, since the kernels ship one cut a shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.linear_attention.decode_ops import HybridState, hybrid_step
from kit.kernels.linear_attention.gated_ops import gated_linear_attention
from kit.kernels.linear_attention.hybrid_ops import hybrid_attention

HEADS, DIM, WINDOW = 32, 128, 64
SHAPES = ((8, 2048), (4, 4096), (1, 16384))
LONG = ((1, 65536), (1, 2**20))


def main() -> None:
    """Measure, print a line a figure, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--short", action="store_true", help="leave out a million tokens and the peers' backward passes"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/linear_attention.py measures on a GPU, and torch sees none")
    bench = Bench(copy_bandwidth())
    print(f"{torch.cuda.get_device_name()}, copy {bench.bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}")
    for shape in SHAPES:
        prefill(bench, *shape, backward=shape == (4, 4096))
        peers(bench, *shape, backward=shape == (4, 4096) and not options.short)
    for shape in LONG[: 1 if options.short else 2]:
        prefill(bench, *shape)
    decode(bench)
    if options.output:
        options.output.write_text(json.dumps(bench.rows, indent=1))


class Bench:
    """Times calls and keeps what they took."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self.rows = bandwidth, []

    def time(self, name: str, call: Callable[[], Any], num_bytes: float, tokens: int, repeat: int = 1) -> None:
        """Time a call that does something `repeat` times, and print microseconds for one."""
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        micros = replay(call) / repeat
        row = {
            "name": name,
            "us": round(micros, 2),
            "roofline": round(num_bytes / self.bandwidth * 1e6 / micros, 3),
            "ns_a_token": round(micros * 1e3 / tokens, 2),
            "first_s": round(first, 2),
        }
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def replay(call: Callable[[], Any], replays: int = 20) -> float:
    """Median microseconds of a CUDA graph's replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(replays + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * 2**30 / (replay(lambda: target.copy_(source)) / 1e6)


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """q, k, v and do (B, H, T, D) as projections lay them out, gates, and feature maps."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 0.5) -> Tensor:
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).bfloat16()

    names = ("q", "k", "v", "do")
    tensors = {name: normal(batch, length, HEADS, DIM).transpose(1, 2) for name in names}
    gate = -0.1 * torch.rand(batch, HEADS, length, device="cuda", generator=generator)
    maps = [normal(HEADS, DIM, DIM // 2, scale=0.1) for _ in range(2)]
    return tensors | {
        "gate": gate,
        "map_q": maps[0],
        "map_k": maps[1],
        "factor": torch.full((HEADS,), 0.3, device="cuda"),
    }


def both_ways(call: Callable[[], Tensor], leaves: list[Tensor], d_out: Tensor) -> Callable[[], None]:
    """A call and its backward pass."""
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        call().backward(d_out)

    return run


def prefill(bench: Bench, batch: int, length: int, backward: bool = False) -> None:
    """Ours: gated with and without a learned gate, with a denominator, and hybrid."""
    x = inputs(batch, length)
    q, k, v, gate = x["q"], x["k"], x["v"], x["gate"]
    size, tokens, shape = q.numel() * 2, batch * length, f"{batch} x {length}"
    maps = (x["map_q"], x["map_k"])
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "gated": (lambda: gated_linear_attention(q, k, v, gate, normalize=False, scale=0.1)[0], [q, k, v]),
        "gated, gate learned": (
            lambda: gated_linear_attention(q, k, v, gate, normalize=False, scale=0.1)[0],
            [q, k, v, gate],
        ),
        "linear with denominator": (lambda: gated_linear_attention(q, k, v)[0], [q, k, v]),
        "hybrid": (
            lambda: hybrid_attention(q, k, v, *maps, x["factor"], window_size=WINDOW, scale=DIM**-0.5)[0],
            [q, k, v],
        ),
        "window alone": (
            lambda: hybrid_attention(
                q, k, v, *maps, x["factor"], window_size=WINDOW, scale=DIM**-0.5, linear_weight=0.0, num_sinks=4
            )[0],
            [q, k, v],
        ),
    }
    for name, (call, leaves) in calls.items():
        for leaf in (q, k, v, gate):
            leaf.requires_grad_(False)
        if name != "gated, gate learned":
            bench.time(f"{name} {shape}", call, 4 * size, tokens)
        if backward:
            bench.time(f"{name} {shape} with backward", both_ways(call, leaves, x["do"]), 12 * size, tokens)


def peers(bench: Bench, batch: int, length: int, backward: bool) -> None:
    """SDPA, and flash-linear-attention's gated kernel (which tunes itself on its first call)."""
    x = inputs(batch, length)
    size, tokens, shape = x["q"].numel() * 2, batch * length, f"{batch} x {length}"
    leaves = [x[name] for name in ("q", "k", "v")]
    bench.time(f"SDPA {shape}", lambda: F.scaled_dot_product_attention(*leaves, is_causal=True), 4 * size, tokens)
    if backward:
        run = both_ways(lambda: F.scaled_dot_product_attention(*leaves, is_causal=True), leaves, x["do"])
        bench.time(f"SDPA {shape} with backward", run, 12 * size, tokens)
    if length != 4096:
        return
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        print("flash-linear-attention is not installed")
        return
    q, k, v, gate = (x[name].detach().transpose(1, 2).contiguous() for name in ("q", "k", "v", "gate"))
    call = lambda: chunk_simple_gla(q, k, v, g=gate, scale=0.1)[0]  # noqa: E731
    bench.time(f"fla chunk_simple_gla {shape}", call, 4 * size, tokens)
    if backward:
        run = both_ways(call, [q, k, v, gate], x["do"].transpose(1, 2).contiguous())
        bench.time(f"fla chunk_simple_gla {shape} with backward", run, 12 * size, tokens)


def decode(bench: Bench, layers: int = 20) -> None:
    """One decoding step of one layer; each of `layers` layers has a state of its own, so none stays in the cache."""
    x = inputs(1, 64)
    for map_heads in (HEADS, 8):
        for batch in (1, 16, 128):
            q = torch.randn(batch, HEADS, DIM, device="cuda").bfloat16()
            k, v = (torch.randn(batch, 8, DIM, device="cuda").bfloat16() for _ in range(2))
            maps = (x["map_q"], x["map_k"][:map_heads].contiguous())
            states = [
                HybridState.empty(k, v, map_heads=map_heads, features=DIM, window_size=WINDOW, num_sinks=4)
                for _ in range(layers)
            ]
            position = torch.full((batch,), 1000, dtype=torch.int32, device="cuda")

            log_g = x["factor"].log()

            def run(q=q, k=k, v=v, maps=maps, log_g=log_g, states=states, position=position) -> None:
                for state in states:
                    hybrid_step(q, k, v, *maps, log_g, state, position, scale=DIM**-0.5)

            moved = 2 * states[0].states.numel() * 4 + (states[0].ring_k.numel() + states[0].ring_v.numel()) * 2
            moved += (maps[0].numel() + maps[1].numel()) * 2
            bench.time(f"decode, {map_heads} states, batch {batch}", run, moved, batch, repeat=layers)


if __name__ == "__main__":
    main()
