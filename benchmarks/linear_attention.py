"""Time the linear-attention kernels beside SDPA and flash-linear-attention, on one GPU.

    python benchmarks/linear_attention.py --output linear_attention.json

Every figure is the median of CUDA-graph replays, bf16, 32 heads of 128, random data. `roofline` is the least time that
reading the inputs and writing the outputs once takes at the measured copy bandwidth, as a share of what was measured.
`first_s` is the first call: compiling, where Triton's cache is cold (`compiled` kernels, the slowest in `slowest_s`),
and no tuning, as the kernels ship one cut a shape (flash-linear-attention tunes itself then). `memory` rows: what a
forward pass keeps for the backward pass, and the peak of both. Decoding rotates among layers, so that no state or cache
stays in the L2. Peers that are not installed are left out. `--only` picks parts, and `--warm` makes each call once and
times none: run parts so in processes of their own to compile them side by side.
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
import triton
from torch import Tensor

from kit.kernels.linear_attention.decode_ops import HybridState, hybrid_step
from kit.kernels.linear_attention.gated_ops import gated_linear_attention
from kit.kernels.linear_attention.hybrid_ops import hybrid_attention

HEADS, DIM, WINDOW = 32, 128, 64
SHAPES = ((8, 2048), (4, 4096), (1, 16384))
LONG = ((1, 4096), (1, 65536), (1, 2**20))
MILLION = 2**20


def main() -> None:
    """Measure, print a line a figure, and write them all."""
    parts: dict[str, Callable[[Bench], None]] = {
        "gated": lambda bench: prefills(bench, gated_calls),
        "hybrid": lambda bench: prefills(bench, hybrid_calls),
        "decode": decode,
        "memory": memory,
        "sdpa": sdpa,
        "sdpa-decode": sdpa_decode,
        "fla": fla,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default=",".join(parts), help="parts to run, of " + ", ".join(parts))
    parser.add_argument("--warm", action="store_true", help="make each call once, which compiles it, and time nothing")
    parser.add_argument("--short", action="store_true", help="leave out a million tokens")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/linear_attention.py measures on a GPU, and torch sees none")
    bandwidth = 1e12 if options.warm else copy_bandwidth()
    bench = Bench(bandwidth, options.output, options.warm, options.short or options.warm)
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, torch {torch.__version__}")
    for part in options.only.split(","):
        parts[part](bench)


class Bench:
    """Times calls and keeps what they took, in a file as well."""

    def __init__(self, bandwidth: float, output: Path | None, warm: bool, short: bool) -> None:
        self.bandwidth, self.output, self.warm, self.short, self.rows = bandwidth, output, warm, short, []
        self.compiled: list[float] = []  # seconds of each compilation since a call began
        triton.knobs.compilation.listener = self._listen

    def _listen(self, *, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            self.compiled.append(times.total / 1e6)

    def time(self, name: str, call: Callable[[], Any], num_bytes: float, tokens: int, repeat: int = 1) -> None:
        """Time a call that does something `repeat` times, and print microseconds for one."""
        self.compiled.clear()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        row: dict[str, Any] = {"name": name, "first_s": round(time.perf_counter() - start, 2)}
        if self.compiled:
            row |= {"compiled": len(self.compiled), "slowest_s": round(max(self.compiled), 2)}
        if not self.warm:
            torch.cuda.empty_cache()
            micros = (replay(call) if tokens < MILLION else clock(call)) / repeat
            row |= {
                "us": round(micros, 2),
                "roofline": round(num_bytes / self.bandwidth * 1e6 / micros, 3),
                "ns_a_token": round(micros * 1e3 / tokens, 2),
            }
        self.note(row)

    def note(self, row: dict[str, Any]) -> None:
        """Keep a row and print it."""
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if self.output:
            self.output.write_text(json.dumps(self.rows, indent=1))


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


def clock(call: Callable[[], Any]) -> float:
    """Microseconds of a long call: median of three without a graph, whose memory would come on top."""
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (replay(lambda: torch.neg(source, out=target)) / 1e6)


def inputs(batch: int, length: int, backward: bool = False) -> dict[str, Tensor]:
    """q, k, v and do (B, H, T, D) as projections lay them out, gates, and feature maps."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 0.5) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator, dtype=torch.bfloat16).mul_(scale)

    names = ("q", "k", "v", *(["do"] if backward else []))
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


Calls = dict[str, tuple[Callable[[], Tensor], tuple[str, ...]]]


def gated_calls(x: dict[str, Tensor]) -> Calls:
    """Calls by name, and what they have gradients for."""
    q, k, v, gate = x["q"], x["k"], x["v"], x["gate"]
    gated = lambda: gated_linear_attention(q, k, v, gate, normalize=False, scale=0.1)[0]  # noqa: E731
    plain = lambda: gated_linear_attention(q, k, v, normalize=False, scale=0.1)[0]  # noqa: E731
    return {
        "no gate": (plain, ("q", "k", "v")),
        "gated": (gated, ("q", "k", "v")),
        "gated, gate learned": (gated, ("q", "k", "v", "gate")),
        "linear with denominator": (lambda: gated_linear_attention(q, k, v)[0], ("q", "k", "v")),
    }


def hybrid_calls(x: dict[str, Tensor]) -> Calls:
    """Calls by name, and what they have gradients for."""
    args = (x["q"], x["k"], x["v"], x["map_q"], x["map_k"], x["factor"])
    options = {"window_size": WINDOW, "scale": DIM**-0.5}
    learned = ("q", "k", "v", "map_q", "map_k", "factor")
    return {
        "hybrid": (lambda: hybrid_attention(*args, **options)[0], learned),
        "window alone": (
            lambda: hybrid_attention(*args, **options, linear_weight=0.0, num_sinks=4)[0],
            ("q", "k", "v", "factor"),
        ),
    }


def prefills(bench: Bench, calls_of: Callable[[dict[str, Tensor]], Calls]) -> None:
    """Whole sequences, forward, and at 4 x 4,096 with the backward pass."""
    for batch, length in SHAPES + LONG:
        if length == MILLION and bench.short:
            continue
        backward = (batch, length) in ((4, 4096), (1, 16384))
        x = inputs(batch, length, backward)
        size, tokens, shape = x["q"].numel() * 2, batch * length, f"{batch} x {length}"
        for name, (call, learned) in calls_of(x).items():
            for leaf in x.values():
                leaf.requires_grad_(False)
            if name != "gated, gate learned":
                bench.time(f"{name} {shape}", call, 4 * size, tokens)
            if backward:
                run = both_ways(call, [x[name] for name in learned], x["do"])
                bench.time(f"{name} {shape} with backward", run, 12 * size, tokens)


def sdpa(bench: Bench) -> None:
    """Softmax attention."""
    for batch, length in SHAPES + LONG[:-1]:
        backward = length == 4096 and batch == 4
        x = inputs(batch, length, backward)
        size, tokens, shape = x["q"].numel() * 2, batch * length, f"{batch} x {length}"
        leaves = [x[name] for name in ("q", "k", "v")]
        call = lambda leaves=leaves: F.scaled_dot_product_attention(*leaves, is_causal=True)  # noqa: E731
        bench.time(f"SDPA {shape}", call, 4 * size, tokens)
        if backward:
            bench.time(f"SDPA {shape} with backward", both_ways(call, leaves, x["do"]), 12 * size, tokens)


def sdpa_decode(bench: Bench, layers: int = 4) -> None:
    """One query a sequence against caches of 8 heads."""
    for length in (2048, 32768, 131072):
        count = layers * max(1, 32768 // length)
        q = torch.randn(1, HEADS, 1, DIM, device="cuda").bfloat16()
        caches = [torch.randn(2, 1, 8, length, DIM, device="cuda").bfloat16() for _ in range(count)]

        def run(q=q, caches=caches) -> None:
            for k, v in caches:
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        bench.time(f"decode, SDPA at {length}", run, caches[0].numel() * 2, 1, repeat=count)


def fla(bench: Bench) -> None:
    """flash-linear-attention: gated, without a gate, and with a denominator; it tunes itself on the first calls."""
    try:
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        print("flash-linear-attention is not installed")
        return
    x = inputs(4, 4096, backward=True)
    size, tokens = x["q"].numel() * 2, 4 * 4096
    q, k, v, gate = (x[name].detach().transpose(1, 2).contiguous() for name in ("q", "k", "v", "gate"))
    positive, d_out = (q.abs(), k.abs(), v), x["do"].transpose(1, 2).contiguous()
    calls: Calls = {
        "chunk_simple_gla": (lambda: chunk_simple_gla(q, k, v, g=gate, scale=0.1)[0], ()),
        "chunk_simple_gla, no gate": (lambda: chunk_simple_gla(q, k, v, scale=0.1)[0], ()),
        "chunk_linear_attn": (lambda: chunk_linear_attn(*positive, normalize=True)[0], ()),
    }
    leaves = {"chunk_simple_gla": [q, k, v, gate], "chunk_simple_gla, no gate": [q, k, v]}
    for backward in (False, True):
        for name, (call, _) in calls.items():
            text = f"fla {name} 4 x 4096" + (" with backward" if backward else "")
            try:
                run = both_ways(call, leaves.get(name, list(positive)), d_out) if backward else call
                bench.time(text, run, (12 if backward else 4) * size, tokens)
            except RuntimeError as error:  # it refuses gated gradients on Hopper for a fault of Triton before 3.7.1
                bench.note({"name": text, "refused": str(error)})


def memory(bench: Bench) -> None:
    """What a forward pass keeps for the backward pass beside its inputs, and the peak of both; 4 x 4,096."""
    x = inputs(4, 4096, backward=True)
    softmax = lambda: F.scaled_dot_product_attention(x["q"], x["k"], x["v"], is_causal=True)  # noqa: E731
    calls = {"SDPA": (softmax, ("q", "k", "v"))} | gated_calls(x) | hybrid_calls(x)
    for name, (call, learned) in calls.items():
        for leaf in x.values():
            leaf.requires_grad_(False)
        run = both_ways(call, [x[name] for name in learned], x["do"])
        run()
        for leaf in x.values():
            leaf.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = call()
        kept = torch.cuda.memory_allocated() - before
        del out
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
        bench.note({"name": f"memory, {name}", "kept_mib": kept >> 20, "peak_mib": peak >> 20})


def decode(bench: Bench, layers: int = 20) -> None:
    """One decoding step of one layer, with 4 sinks and without."""
    x = inputs(1, 64)
    for map_heads in (HEADS, 8):
        for batch in (1, 16, 128, 512):
            q = torch.randn(batch, HEADS, DIM, device="cuda").bfloat16()
            k, v = (torch.randn(batch, 8, DIM, device="cuda").bfloat16() for _ in range(2))
            maps = (x["map_q"], x["map_k"][:map_heads].contiguous())
            log_g = x["factor"].log()
            for sinks in (4, 0) if batch == 1 else (4,):
                shape = {"map_heads": map_heads, "features": DIM, "window_size": WINDOW, "num_sinks": sinks}
                states = [HybridState.empty(k, v, **shape) for _ in range(layers if batch < 512 else 4)]
                moved = 2 * states[0].states.numel() * 4 + (states[0].ring_k.numel() + states[0].ring_v.numel()) * 2
                moved += (maps[0].numel() + maps[1].numel()) * 2
                for place in (1_000, 1_000_000) if batch == 1 else (1_000,):
                    position = torch.full((batch,), place, dtype=torch.int32, device="cuda")

                    def run(q=q, k=k, v=v, maps=maps, log_g=log_g, states=states, position=position) -> None:
                        for state in states:
                            hybrid_step(q, k, v, *maps, log_g, state, position, scale=DIM**-0.5)

                    name = f"decode, {map_heads} states, {sinks} sinks, batch {batch}, position {place}"
                    bench.time(name, run, moved, batch, repeat=len(states))


if __name__ == "__main__":
    main()
