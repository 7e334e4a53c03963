"""Time products with INT4 weights and FP8 activations beside cuBLAS, CUTLASS and tinygemm, on one GPU.

    python benchmarks/int4_fp8.py --output int4_fp8.json

Every figure is the median of CUDA-graph replays, in microseconds a call; a graph goes through as many copies of a
weight as fill the L2 cache more than twice. `least` is the time that the bytes take at the measured copy bandwidth, or
the operations at the measured FP8 rate, whichever is longer, and `roofline` its share of what ours took. Inputs of
products are quantized already; `FFN` rows have everything in them but the norm. Peers: bf16 and row-wise FP8 of
cuBLAS, `f8i4bf16_shuffled` of mslk (CUTLASS) where it is installed, tinygemm (bf16 activations) up to 64 tokens.
`rounded` is ours with `exact=False`. The `ragged` product has 5001 outputs and 65 groups of 64 inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.int4_fp8 import (
    PackedInt4,
    int4_fp8_linear,
    int4_fp8_swiglu,
    quantize_fp8,
    rms_norm_quantize,
    swiglu_quantize,
)

SHAPES = {"gate_up": (28672, 4096), "down": (4096, 14336), "qkv": (6144, 4096), "o": (4096, 4096)}
TOKENS = (1, 4, 16, 32, 64, 128, 256, 1024, 2048, 8192)
RAGGED, RAGGED_TOKENS = (5001, 4160, 64), (1, 7, 13, 33, 65, 100, 129, 200, 257, 300)
MODELS = {"Llama-3-8B": (4096, 14336), "Llama-2-7B": (4096, 11008)}
GROUP, FP8 = 128, torch.float8_e4m3fn
ROUNDED_FROM = 2048  # tokens, of `exact=False`
ROTATED = 130e6  # bytes of weights that a graph goes through


def main() -> None:
    """Measure, print a line a figure, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/int4_fp8.py measures on a GPU, and torch sees none")
    bandwidth, rate = copy_bandwidth(), fp8_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s, ", end="")
    print(f"FP8 {rate / 1e12:.0f} TFLOP/s")
    rows: list[dict[str, Any]] = [{"copy_bytes_a_second": bandwidth, "fp8_operations_a_second": rate}]
    steps: list[Callable[[], list[dict[str, Any]]]] = [
        *(lambda name=name: products(name, bandwidth, rate) for name in SHAPES),
        lambda: ragged_products(bandwidth, rate),
        lambda: quantizations(bandwidth),
        *(lambda model=model: feed_forward(model) for model in MODELS),
    ]
    for step in steps:
        for row in step():
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1))


def replay(calls: list[Callable[[], Any]], replays: int = 10) -> float:
    """Median microseconds a call, of a CUDA graph that makes all calls in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return round(statistics.median(times[2:]), 2)


def rotating(call: Callable[[Any], Any], weights: list[Any], least: int) -> list[Callable[[], Any]]:
    """The call on one weight after the other."""
    chosen = [weights[i % len(weights)] for i in range(max(least, len(weights)))]
    return [lambda w=w: call(w) for w in chosen]  # type: ignore[misc]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a kernel over 1 GiB, which is faster than a copy."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / (replay([lambda: torch.neg(source, out=target)]) / 1e6)


def fp8_rate() -> float:
    """Operations a second of cuBLAS' row-wise FP8 product of 8192 x 8192 matrices."""
    x, w = (torch.randn(8192, 8192, device="cuda").to(FP8) for _ in range(2))
    scale = torch.ones(8192, 1, device="cuda")
    return 2 * 8192**3 / (replay([lambda: scaled_mm(x, w, scale, scale.T)] * 4) / 1e6)


def scaled_mm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """Row-wise FP8 of cuBLAS: x (M, K), w (N, K), scales (M, 1) and (1, N)."""
    return torch._scaled_mm(x, w.T, x_scale, w_scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def packed_weight(outputs: int, inputs: int, group: int = GROUP) -> PackedInt4:
    """Random codes, and scales such that outputs have the size of inputs."""
    shape = (-(-outputs // 64), inputs // group, 64, group // 2)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    scales = (torch.rand(inputs // group, shape[0] * 64, device="cuda") + 0.5) / (4.6 * inputs**0.5)
    return PackedInt4(codes, scales.bfloat16(), None, outputs, inputs)


def copies(outputs: int, inputs: int, bits: float) -> int:
    """How many copies of a weight to rotate."""
    return max(2, round(ROTATED / (outputs * inputs * bits / 8) + 0.5))


def mslk_weights(outputs: int, inputs: int) -> list[Any]:
    """Weights of mslk's product, or none."""
    try:
        import mslk.gemm  # noqa: F401
        from mslk.quantize.shuffle import quantize_int4_preshuffle
    except ImportError:
        return []
    made = lambda: torch.randn(outputs, inputs, device="cuda").bfloat16() * 0.02  # noqa: E731
    return [quantize_int4_preshuffle(made()) for _ in range(copies(outputs, inputs, 4.5))]


def tinygemm_weights(outputs: int, inputs: int) -> list[tuple[Tensor, Tensor]]:
    """Codes and scales as `_weight_int4pack_mm` takes them."""
    made = []
    for _ in range(copies(outputs, inputs, 4.25)):
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(inputs // GROUP, outputs, 2, device="cuda").bfloat16()
        made.append((torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales))
    return made


def products(name: str, bandwidth: float, rate: float) -> list[dict[str, Any]]:
    """One weight's shape: every number of tokens, ours and peers'."""
    outputs, inputs = SHAPES[name]
    weights = {
        "kit": [packed_weight(outputs, inputs) for _ in range(copies(outputs, inputs, 4.125))],
        "bf16": [torch.randn(outputs, inputs, device="cuda").bfloat16() for _ in range(copies(outputs, inputs, 16))],
        "mslk": mslk_weights(outputs, inputs),
        "tinygemm": tinygemm_weights(outputs, inputs),
    }
    weights["rounded"] = weights["kit"]
    count = copies(outputs, inputs, 8)
    weights["fp8"] = [torch.randn(outputs, inputs, device="cuda").to(FP8) for _ in range(count)]
    w_scale = torch.rand(1, outputs, device="cuda")
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, inputs, device="cuda").bfloat16()
        x8, scale = quantize_fp8(x)
        column = scale[:, None]
        calls: dict[str, Callable[[Any], Any]] = {
            "kit": lambda w, x8=x8, scale=scale: int4_fp8_linear((x8, scale), w),
            "rounded": lambda w, x8=x8, scale=scale: int4_fp8_linear((x8, scale), w, exact=False),
            "bf16": lambda w, x=x: F.linear(x, w),
            "fp8": lambda w, x8=x8, column=column: scaled_mm(x8, w, column, w_scale),
            "mslk": lambda w, x8=x8, s=scale: torch.ops.mslk.f8i4bf16_shuffled(x8, w[0], s, w[1][1], w[1][0]),
            "tinygemm": lambda w, x=x: torch.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1]),
        }
        micros = {
            peer: replay(rotating(call, weights[peer], 20 if tokens <= 256 else 4))
            for peer, call in calls.items()
            if weights[peer] and runs(peer, tokens)
        }
        floor = roofline(tokens, outputs, inputs, 4.125, bandwidth, rate, micros["kit"])
        rows.append({"product": name, "tokens": tokens, **micros, **floor})
    return rows


def runs(peer: str, tokens: int) -> bool:
    """Whether a peer is there for so many tokens."""
    return {"tinygemm": tokens <= 64, "rounded": tokens >= ROUNDED_FROM}.get(peer, True)


def roofline(
    tokens: int, outputs: int, inputs: int, bits: float, bandwidth: float, rate: float, micros: float
) -> dict[str, float]:
    """The least microseconds that a product of a weight of so many bits can take, as a share of what it took too."""
    moved = outputs * inputs * bits / 8 + tokens * (inputs + 2 * outputs)
    least = max(moved / bandwidth, 2 * tokens * outputs * inputs / rate) * 1e6
    return {"least": round(least, 2), "roofline": round(least / micros, 3)}


def ragged_products(bandwidth: float, rate: float) -> list[dict[str, Any]]:
    """Sizes that no tile divides: ours beside bf16, the only peer that takes them."""
    outputs, inputs, group = RAGGED
    weights = [packed_weight(outputs, inputs, group) for _ in range(copies(outputs, inputs, 4.25))]
    wide = [torch.randn(outputs, inputs, device="cuda").bfloat16() for _ in range(copies(outputs, inputs, 16))]
    rows = []
    for tokens in RAGGED_TOKENS:
        x = torch.randn(tokens, inputs, device="cuda").bfloat16()
        quantized = quantize_fp8(x)
        micros = {
            "kit": replay(rotating(lambda w, q=quantized: int4_fp8_linear(q, w), weights, 20)),
            "bf16": replay(rotating(lambda w, x=x: F.linear(x, w), wide, 20)),
        }
        floor = roofline(tokens, outputs, inputs, 4.25, bandwidth, rate, micros["kit"])
        rows.append({"product": "ragged", "tokens": tokens, **micros, **floor})
    return rows


def quantizations(bandwidth: float) -> list[dict[str, Any]]:
    """The launches that quantize, at Llama-3-8B's sizes."""
    hidden, inner = MODELS["Llama-3-8B"]
    gain, rows = torch.randn(hidden, device="cuda").bfloat16(), []
    for tokens in (1, 16, 256, 2048, 16384):
        x, residual = (torch.randn(tokens, hidden, device="cuda").bfloat16() for _ in range(2))
        gate_up = torch.randn(tokens, 2 * inner, device="cuda").bfloat16()
        calls: dict[str, tuple[Callable[[], Any], int]] = {
            "quantize_fp8": (lambda x=x: quantize_fp8(x), 3 * hidden),
            "rms_norm_quantize": (lambda x=x, r=residual: rms_norm_quantize(x, gain, 1e-5, r), 7 * hidden),
            "swiglu_quantize": (lambda g=gate_up: swiglu_quantize(g), 5 * inner),
        }
        for name, (call, width) in calls.items():
            micros = replay([call] * 10)
            least = tokens * width / bandwidth * 1e6
            rows.append({"quantization": name, "tokens": tokens, "kit": micros, "roofline": round(least / micros, 3)})
    return rows


def feed_forward(model: str) -> list[dict[str, Any]]:
    """Gate and up, SwiGLU, down, of quantized input; against bf16 with a compiled SwiGLU."""
    hidden, inner = MODELS[model]
    weights = [(packed_weight(2 * inner, hidden), packed_weight(hidden, inner)) for _ in range(2)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").bfloat16() * 0.02

    wide = [(normal(2 * inner, hidden), normal(hidden, inner)) for _ in range(2)]
    torch._dynamo.reset()  # it compiles a function for eight shapes and no more
    swiglu = torch.compile(lambda x: F.silu(x[:, :inner]) * x[:, inner:], dynamic=False)
    rows = []
    for tokens in (1, 16, 64, 1024, 4096, 16384):
        x = torch.randn(tokens, hidden, device="cuda").bfloat16()

        def ours(w: tuple[PackedInt4, PackedInt4], x: Tensor = x, exact: bool = True) -> Tensor:
            return int4_fp8_linear(int4_fp8_swiglu(quantize_fp8(x), w[0], exact=exact), w[1], exact=exact)

        def rounded(w: tuple[PackedInt4, PackedInt4]) -> Tensor:
            return ours(w, exact=False)

        def theirs(w: tuple[Tensor, Tensor], x: Tensor = x) -> Tensor:
            return F.linear(swiglu(F.linear(x, w[0])), w[1])

        least = 8 if tokens <= 1024 else 2
        calls = {"kit": (ours, weights), "rounded": (rounded, weights), "bf16": (theirs, wide)}
        micros = {name: replay(rotating(call, of, least)) for name, (call, of) in calls.items() if runs(name, tokens)}
        faster = {f"{name} faster": round(micros["bf16"] / micros[name], 2) for name in micros if name != "bf16"}
        rows.append({"FFN": model, "tokens": tokens, **micros, **faster})
    return rows


if __name__ == "__main__":
    main()
