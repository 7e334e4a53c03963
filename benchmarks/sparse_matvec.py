"""Time products that skip inactive channels beside dense ones: single products, and whole-model decoding.

    python benchmarks/sparse_matvec.py                                # on a GPU: products, crossover, 8B-shaped decode
    python benchmarks/sparse_matvec.py --sweep                        # which cut of the GPU kernel is fastest
    python benchmarks/sparse_matvec.py --device cpu --threads 2       # products on a CPU
    python benchmarks/sparse_matvec.py --device cpu --model llama-1b --dtype float32
    python benchmarks/sparse_matvec.py --device cpu --model FOLDER    # decode of a checkpoint, dense and sparse

Only torch and triton are needed (transformers for --model). Inputs are normal; channels are kept by |x_i|·scale_i, with
the threshold at the wanted quantile. GPU: CUDA graphs, weights rotated past the L2 cache, the median over replays, the
spread beside it; `roofline` is time at the measured copy bandwidth for the bytes that must be read. CPU: the least of
several repetitions for each side, in turns, since other work may share the machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.kernels.sparse_matvec import cpu_kernel, reference, sparse_linear

if TYPE_CHECKING:
    from kit.kernels.sparse_matvec import launch

SHAPES = {"gate_up": (28672, 4096), "down": (4096, 14336), "q, o": (4096, 4096), "k, v": (1024, 4096)}  # Llama-3-8B
CPU_SHAPES = {
    "SmolLM2 q": (576, 576), "SmolLM2 gate": (1536, 576), "SmolLM2 down": (576, 1536), "1B q": (2048, 2048),
    "1B gate": (8192, 2048), "1B down": (2048, 8192),
}  # fmt: skip


@dataclass
class Case:
    """Copies of one product's weights, more bytes than the cache holds, and inputs to go with them."""

    weights: list[Tensor]
    transposed: list[Tensor]
    inputs: list[Tensor]
    scale: Tensor

    @classmethod
    def of(cls, outputs: int, size: int, rows: int, dtype: torch.dtype, device: str, cache_bytes: float) -> Case:
        """Random weights (N, K) and inputs (M, K)."""
        copies = max(2, min(64, round(cache_bytes / (outputs * size * dtype.itemsize))))
        weights = [(torch.randn(outputs, size, device=device) / size**0.5).to(dtype) for _ in range(copies)]
        inputs = [torch.randn(rows, size, device=device).to(dtype) for _ in range(copies)]
        scale = torch.rand(size, device=device) + 0.5
        return cls(weights, [w.T.contiguous() for w in weights], inputs, scale)

    def threshold(self, sparsity: float) -> Tensor:
        """The score below which a share `sparsity` of the inputs lies; (1,)."""
        scores = torch.cat([(x.float().abs() * self.scale).flatten() for x in self.inputs])
        return torch.quantile(scores[: 2**23], sparsity).reshape(1) if sparsity > 0 else scores.new_full((1,), -1.0)


# ---- GPU


def graph_us(function: Callable[[int], object], copies: int, replays: int = 12, calls: int = 24) -> tuple[float, float]:
    """Median and spread (largest less smallest) of microseconds a call, over replays of a graph of calls."""
    calls = copies * max(1, calls // copies)
    for i in range(copies):
        function(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function(i % copies) for i in range(calls)]
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    del kept
    return statistics.median(times), max(times) - min(times)


def copy_bandwidth() -> float:
    """Bytes a second that a large copy moves, reads and writes together."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (graph_us(lambda _: b.copy_(a), 1)[0] * 1e-6)


def check(y: Tensor, again: Tensor, expected: Tensor) -> str:
    """Largest error over the largest output, against float64; results must repeat to the bit."""
    assert torch.equal(y, again), "not deterministic"
    return f"{((y.double() - expected).abs().max() / expected.abs().max()).item():.0e}"


def gpu_products(dtype: torch.dtype, bandwidth: float) -> None:
    """Table of single products, at every sparsity and batch, with the low-rank path, and of the gate/up pair."""
    from kit.kernels.sparse_matvec import launch

    print(f"\n{'product, ' + str(dtype)[6:]:24} {'M':>2} {'sparsity':>8} {'dense':>8} {'sparse':>8} {'spread':>7} "
          f"{'speed-up':>8} {'roofline':>8} {'error':>6}   (us; dense is cuBLAS)")  # fmt: skip
    plans = [(1, s, 0) for s in (0.25, 0.4, 0.5, 0.65)] + [(1, 0.5, 96)] + [(m, 0.5, 0) for m in (2, 3, 4)]
    for name, (outputs, size) in SHAPES.items():
        for rows, group in itertools.groupby(plans, key=lambda plan: plan[0]):
            case = Case.of(outputs, size, rows, dtype, "cuda", 3e8)
            copies = len(case.weights)
            dense, _ = graph_us(lambda i: F.linear(case.inputs[i], case.weights[i]), copies)  # noqa: B023
            for _, sparsity, rank in group:
                low_rank = None
                if rank:
                    up_t, down = torch.randn(rank, outputs), torch.randn(rank, size) / size**0.5
                    low_rank = up_t.to("cuda", dtype), down.to("cuda", dtype)
                threshold = case.threshold(sparsity)

                def sparse(i: int, case=case, threshold=threshold, low_rank=low_rank) -> Tensor:
                    return launch.sparse_linear(case.inputs[i], case.transposed[i], threshold, case.scale, low_rank)

                wide = None if low_rank is None else tuple(t.double() for t in low_rank)
                expected = reference.sparse_linear(
                    case.inputs[0].double(), case.transposed[0].double(), threshold, case.scale, low_rank=wide
                )
                error = check(sparse(0), sparse(0), expected)
                spent, spread = graph_us(sparse, copies)
                read = (1 - sparsity**rows) * outputs * size + rank * (outputs + size)
                print(f"{name + (f' + rank {rank}' if rank else ''):24} {rows:2} {sparsity:8.0%} {dense:8.1f} "
                      f"{spent:8.1f} {spread:7.1f} {dense / spent:7.2f}x {read * dtype.itemsize / bandwidth * 1e6:8.1f}"
                      f" {error:>6}", flush=True)  # fmt: skip
    gpu_shared(dtype, bandwidth)
    gpu_swiglu(dtype, bandwidth)
    gpu_int4(dtype, bandwidth)


def gpu_shared(dtype: torch.dtype, bandwidth: float) -> None:
    """Rows of the table for q, k and v, and for gate and up, in one launch each; dense is one product a linear."""
    from kit.kernels.sparse_matvec import launch

    for name, sizes, size in (("q+k+v", (4096, 1024, 1024), 4096), ("gate+up", (14336, 14336), 4096)):
        case = Case.of(sum(sizes), size, 1, dtype, "cuda", 3e8)
        limits, scales = case.threshold(0.5).repeat(len(sizes)), case.scale.repeat(len(sizes), 1)
        bounds = tuple(itertools.accumulate(sizes[:-1]))

        def dense(i: int, case=case, sizes=sizes) -> list[Tensor]:
            return [F.linear(case.inputs[i], w) for w in case.weights[i].split(sizes)]

        def sparse(i: int, case=case, limits=limits, scales=scales, bounds=bounds) -> Tensor:
            return launch.sparse_linear(case.inputs[i], case.transposed[i], limits, scales, bounds=bounds)

        expected = reference.sparse_linear(case.inputs[0].double(), case.transposed[0].double(), limits[0], case.scale)
        error, copies = check(sparse(0), sparse(0), expected), len(case.weights)
        (before, _), (spent, spread) = graph_us(dense, copies), graph_us(sparse, copies)
        read = 0.5 * sum(sizes) * size * dtype.itemsize
        print(f"{name:24} {1:2} {0.5:8.0%} {before:8.1f} {spent:8.1f} {spread:7.1f} {before / spent:7.2f}x "
              f"{read / bandwidth * 1e6:8.1f} {error:>6}", flush=True)  # fmt: skip


def gpu_int4(dtype: torch.dtype, bandwidth: float) -> None:
    """Rows of the table for weights in 4 bits, in groups of 128, beside dense ones in 16."""
    from kit.kernels.sparse_matvec import launch

    for (name, (outputs, size)), rows in itertools.product(list(SHAPES.items())[:2], (1, 2, 4)):
        case = Case.of(outputs, size, rows, dtype, "cuda", 8e8)
        copies = len(case.weights)
        dense, _ = graph_us(lambda i: F.linear(case.inputs[i], case.weights[i]), copies)  # noqa: B023
        packed = [reference.quantize_int4(w, 128) for w in case.transposed]
        for sparsity in (0.0, 0.5):
            limit = case.threshold(sparsity)

            def sparse(i: int, cut=None, case=case, packed=packed, limit=limit) -> Tensor:
                return launch.sparse_linear_int4(case.inputs[i], *packed[i], limit, case.scale, cut=cut)

            w = reference.dequantize_int4(*packed[0]).double()
            expected = reference.sparse_linear(case.inputs[0].double(), w, limit, case.scale)
            error = check(sparse(0), sparse(0), expected)
            spent, spread = graph_us(sparse, copies)
            read = (1 - sparsity**rows) * outputs * size / 2 + outputs * size / 128 * dtype.itemsize
            print(f"{name + ', INT4':24} {rows:2} {sparsity:8.0%} {dense:8.1f} {spent:8.1f} {spread:7.1f} "
                  f"{dense / spent:7.2f}x {read / bandwidth * 1e6:8.1f} {error:>6}", flush=True)  # fmt: skip
            if sparsity and rows == 1:
                tried = {}
                for warps, depth, chunk in itertools.product((2, 4), (8, 16), (128, 256, 512, 1024)):
                    cut = launch.Cut(256, warps, depth, warps, chunk=chunk)
                    tried[warps, depth, chunk] = graph_us(lambda i, cut=cut: sparse(i, cut), copies, 4)[0]
                best = sorted(tried, key=tried.__getitem__)[:4]
                print("    fastest (warps, depth, chunk):", ", ".join(f"{c} {tried[c]:.1f}" for c in best), flush=True)


def gpu_swiglu(dtype: torch.dtype, bandwidth: float) -> None:
    """Rows of the table for gate, SwiGLU and up in one kernel, beside two dense products and the activation."""
    from kit.kernels.sparse_matvec import launch

    outputs, size = 14336, 4096
    for rows in (1, 2, 4):
        gate, up = (Case.of(outputs, size, rows, dtype, "cuda", 2e8) for _ in range(2))
        copies = len(gate.weights)
        a = F.silu(F.linear(gate.inputs[0].double(), gate.weights[0].double()))
        thresholds = torch.full((outputs,), a.abs().float().quantile(0.5).item(), device="cuda")

        def dense(i: int, gate=gate, up=up) -> Tensor:
            return F.silu(F.linear(gate.inputs[i], gate.weights[i])) * F.linear(gate.inputs[i], up.weights[i])

        def sparse(i: int, gate=gate, up=up, thresholds=thresholds, block=None) -> Tensor:
            return launch.sparse_swiglu(gate.inputs[i], gate.weights[i], up.weights[i], thresholds, block)

        clear = (a.abs() - thresholds).abs() > 1e-3  # rounding decides about the others
        expected = a * F.linear(gate.inputs[0].double(), up.weights[0].double()) * (a.abs() > thresholds)
        error = check(sparse(0) * clear, sparse(0) * clear, expected * clear)
        (before, _), (spent, spread) = graph_us(dense, copies), graph_us(sparse, copies)
        read = (2 - 0.5**rows) * outputs * size * dtype.itemsize
        print(f"{'gate, SwiGLU, up':24} {rows:2} {0.5:8.0%} {before:8.1f} {spent:8.1f} {spread:7.1f} "
              f"{before / spent:7.2f}x {read / bandwidth * 1e6:8.1f} {error:>6}", flush=True)  # fmt: skip
        if rows == 1:
            tried = {}
            for block in itertools.product((2, 4, 8), (1024, 2048, 4096), (2, 4)):
                if 512 <= block[0] * block[1] // block[2] <= 4096:
                    tried[block] = graph_us(lambda i, block=block: sparse(i, block=block), copies, 4)[0]
            best = sorted(tried, key=tried.__getitem__)[:4]
            print("    fastest (rows, features, warps):", ", ".join(f"{b} {tried[b]:.1f}" for b in best))


def gpu_crossover(dtype: torch.dtype) -> None:
    """Speed-up by share of weights read, one row: where it falls below 1, dense is the better path."""
    from kit.kernels.sparse_matvec import launch

    print("\nspeed-up over cuBLAS by share of weights read")
    shares = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)
    print(f"{'':24}" + "".join(f"{share:>7.0%}" for share in shares))
    for name, (outputs, size) in SHAPES.items():
        case = Case.of(outputs, size, 1, dtype, "cuda", 3e8)
        dense, _ = graph_us(lambda i: F.linear(case.inputs[i], case.weights[i]), len(case.weights), 6)  # noqa: B023
        row = f"{name:24}"
        for share in shares:
            limit = case.threshold(1 - share)
            run = lambda i: launch.sparse_linear(case.inputs[i], case.transposed[i], limit, case.scale)  # noqa: B023, E731
            row += f"{dense / graph_us(run, len(case.weights), 6)[0]:6.2f}x"
        print(row, flush=True)


def cuts(rows: int) -> list[tuple[int, int, int]]:
    """(columns, warps, depth) of `linear_rows` that are worth a try for M rows of input."""
    found = [(256, 4, 8), (256, 8, 8), (512, 4, 8), (512, 8, 8), (256, 4, 4)]
    if rows == 1:
        found += [(256, 2, 16), (256, 4, 16), (256, 8, 16), (512, 8, 16), (1024, 8, 8)]
    return found


def swept(rows: int, outputs: int, size: int) -> Iterator[tuple[tuple[int, int, int, int], launch.Cut]]:
    """((columns, warps, depth, programs), cut) of the sweep, for one shape."""
    from kit.kernels.sparse_matvec import launch

    for (columns, warps, depth), each in itertools.product(cuts(rows), (1, 2, 3, 4, 5, 6, 8, 12, 16)):
        splits = max(1, 132 * each // -(-outputs // columns))
        groups = warps * 256 // columns
        chunk = max(-(-size // splits), 2 * depth * groups)
        yield (columns, warps, depth, 132 * each), launch.Cut(columns, groups, depth, warps, chunk=chunk)


def gpu_sweep(dtype: torch.dtype, rows: int) -> dict[tuple[int, int, int, int], float]:
    """Every cut of `linear_rows`, half of the channels kept; microseconds of all products of a layer by cut."""
    from kit.kernels.sparse_matvec import launch

    print(f"\nfastest cuts, M = {rows}, 50 % (columns, warps, depth, programs: us)")
    layer: dict[tuple[int, int, int, int], float] = {}
    for name, (outputs, size) in SHAPES.items():
        case = Case.of(outputs, size, rows, dtype, "cuda", 3e8)
        limit, times = case.threshold(0.5), {}
        tried: dict[launch.Cut, float] = {}
        for key, cut in swept(rows, outputs, size):

            def run(i: int, case=case, limit=limit, cut=cut) -> Tensor:
                return launch.sparse_linear(case.inputs[i], case.transposed[i], limit, case.scale, cut=cut)

            if cut not in tried:
                tried[cut] = graph_us(run, len(case.weights), 5)[0]
            times[key] = tried[cut]
            layer[key] = layer.get(key, 0) + times[key] * (2 if "," in name else 1)
        print(f"{name:10}", "; ".join(f"{k}: {times[k]:.1f}" for k in sorted(times, key=times.__getitem__)[:6]))
        default = graph_us(lambda i: launch.sparse_linear(case.inputs[i], case.transposed[i], limit, case.scale),  # noqa: B023
                           len(case.weights), 5)[0]  # fmt: skip
        print(f"{'':10} default: {default:.1f}", flush=True)
    best = sorted(layer, key=layer.__getitem__)[:6]
    print(f"{'a layer':10}", "; ".join(f"{k}: {layer[k]:.1f}" for k in best), flush=True)
    return layer


class Decoder:
    """A Llama-shaped stack of decoder layers and its head, random weights, one token a step, keys of `past` tokens."""

    groups = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # linears of one input

    def __init__(self, dtype: torch.dtype, layers: int = 32, past: int = 512) -> None:
        self.hidden, wide, kv, vocabulary = 4096, 14336, 1024, 128256
        shapes = {"q": (self.hidden, self.hidden), "k": (kv, self.hidden), "v": (kv, self.hidden),
                  "o": (self.hidden, self.hidden), "gate": (wide, self.hidden), "up": (wide, self.hidden),
                  "down": (self.hidden, wide)}  # fmt: skip
        make = lambda n, k: torch.empty(n, k, device="cuda", dtype=dtype).normal_(std=k**-0.5)  # noqa: E731
        self.sizes = {name: shape[0] for name, shape in shapes.items()}
        self.layers = [{name: make(*shape) for name, shape in shapes.items()} for _ in range(layers)]
        self.transposed: list[dict[str, Tensor]] = []
        self.scales = [{name: w.float().norm(dim=0) for name, w in layer.items()} for layer in self.layers]
        self.thresholds: list[dict[str, Tensor]] = [{} for _ in self.layers]
        self.head, self.token = make(vocabulary, self.hidden), make(1, self.hidden)
        self.cache = [torch.randn(2, 1, 8, past, 128, device="cuda", dtype=dtype) for _ in range(layers)]
        self.norm = torch.ones(self.hidden, device="cuda", dtype=dtype)
        self.error = torch.zeros((), device="cuda")

    def step(self, linears: Callable[[int, tuple[str, ...], Tensor], Sequence[Tensor]]) -> Tensor:
        """Logits of one token; `linears` (layer, names, input) multiplies linears of one input."""
        h = self.token
        for i, past in enumerate(self.cache):
            x = F.rms_norm(h, (self.hidden,), self.norm)
            q, k, v = (y.view(1, -1, 1, 128) for y in linears(i, self.groups[0], x))
            past[0, :, :, -1:], past[1, :, :, -1:] = k, v
            y = F.scaled_dot_product_attention(q, past[0], past[1], enable_gqa=True)
            h = h + linears(i, self.groups[1], y.reshape(1, -1))[0]
            gate, up = linears(i, self.groups[2], F.rms_norm(h, (self.hidden,), self.norm))
            h = h + linears(i, self.groups[3], F.silu(gate) * up)[0]
        return F.linear(F.rms_norm(h, (self.hidden,), self.norm), self.head)

    def dense(self, layer: int, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
        """Products by cuBLAS."""
        return [F.linear(x, self.layers[layer][name]) for name in names]

    def calibrate(self, layer: int, names: tuple[str, ...], x: Tensor) -> list[Tensor]:
        """Set thresholds to the median score."""
        for name in names:
            self.thresholds[layer][name] = (x.float().abs() * self.scales[layer][name]).median()
        masked = [(x.float().abs() * self.scales[layer][name] > self.thresholds[layer][name]) * x for name in names]
        return [F.linear(each, self.layers[layer][name]) for each, name in zip(masked, names, strict=True)]

    def lay_out(self) -> None:
        """Weights of one input side by side, one input's contiguous; the dense ones are gone."""
        for i, layer in enumerate(self.layers):
            self.transposed.append({})
            for names in self.groups:
                self.transposed[i][names[0]] = torch.cat([layer.pop(name).T for name in names], 1)
                stacked = [torch.stack([each[i][name] for name in names]) for each in (self.thresholds, self.scales)]
                self.thresholds[i][names[0]], self.scales[i][names[0]] = stacked

    def sparse(self, layer: int, names: tuple[str, ...], x: Tensor) -> Sequence[Tensor]:
        """Products of the kept channels, in one launch."""
        from kit.kernels.sparse_matvec import launch

        sizes = [self.sizes[name] for name in names]
        limit, scale = self.thresholds[layer][names[0]], self.scales[layer][names[0]]
        bounds = tuple(itertools.accumulate(sizes[:-1]))
        y = launch.sparse_linear(x, self.transposed[layer][names[0]], limit, scale, bounds=bounds)
        return y.split(sizes, -1)

    def checked(self, layer: int, names: tuple[str, ...], x: Tensor) -> Sequence[Tensor]:
        """The same, each product beside the masked dense one in float32."""
        found, start = self.sparse(layer, names, x), 0
        for i, (name, y) in enumerate(zip(names, found, strict=True)):
            w = self.transposed[layer][names[0]][:, start : start + self.sizes[name]].float()
            limit, scale = self.thresholds[layer][names[0]][i], self.scales[layer][names[0]][i]
            wanted, start = reference.sparse_linear(x.float(), w, limit, scale), start + self.sizes[name]
            self.error = torch.maximum(self.error, (y.float() - wanted).abs().max() / wanted.abs().max())
        return found


def gpu_decode(dtype: torch.dtype) -> None:
    """Tokens a second of an 8B-shaped model, dense and at 50 %, both under CUDA graphs."""
    model = Decoder(dtype)
    model.step(model.calibrate)
    dense, _ = graph_us(lambda _: model.step(model.dense), 1, calls=1)
    model.lay_out()
    sparse, spread = graph_us(lambda _: model.step(model.sparse), 1, calls=1)
    model.step(model.checked)
    print(f"\n8B-shaped decode, {str(dtype)[6:]}, one token, 50 % of all but the head: dense {dense / 1e3:.2f} ms, "
          f"sparse {sparse / 1e3:.2f} (±{spread / 1e3:.2f}), {dense / sparse:.2f}x; largest error of a product "
          f"{float(model.error):.0e}", flush=True)  # fmt: skip


@torch.no_grad()
def gpu_model(dtype: torch.dtype, layers: int = 32, past: int = 512) -> None:
    """The same of transformers' own Llama of 8B's shape, random weights, and of the sparse model made from it."""
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

    from kit.modules.sparsity import counted, masks_of, sparsify_layer

    config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
                         num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    kept = torch.randn(layers, 2, 1, 8, past, 128, device="cuda", dtype=dtype)
    cache, token = DynamicCache(), torch.ones(1, 1, dtype=torch.long, device="cuda")
    for index, (keys, values) in enumerate(kept):
        cache.update(keys, values, index)

    def step(_: int = 0) -> Tensor:
        for layer, (keys, values) in zip(cache.layers, kept, strict=True):
            layer.keys, layer.values = keys, values
        return model(token, past_key_values=cache, use_cache=True).logits

    dense, _ = graph_us(step, 1, calls=1)
    names = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    sparsity = {"dense_prefill": True, "target": 0.5, "weighted": True, "linears": names, "neurons": False, "ranks": {}}
    for index, layer in enumerate(model.model.layers):
        sparsify_layer(layer, sparsity, index)
    for name, mask in masks_of(model).items():
        mask.scale.data = model.get_submodule(name).weight.float().norm(dim=0)

    def calibrate(mask: nn.Module, given: tuple[Tensor, ...]) -> None:
        mask.threshold.data = mask.scores(given[0]).median()  # type: ignore[operator]

    hooks = [mask.register_forward_pre_hook(calibrate) for mask in masks_of(model).values()]
    with counted(model) as counts:  # counting needs the masked dense products
        step()
    share = sum(int(k) for k, _ in counts.values()) / sum(int(n) for _, n in counts.values())
    for hook in hooks:
        hook.remove()
    sparse, spread = graph_us(step, 1, calls=1)
    errors: list[float] = []

    def compare(linear: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
        weight, mask = linear.weight.float(), linear.mask  # type: ignore[operator, union-attr]
        wanted = F.linear(given[0].float().masked_fill(~mask(given[0]), 0), weight)  # type: ignore[operator]
        errors.append(float((y.float() - wanted).abs().max() / wanted.abs().max()))

    for name in masks_of(model):
        model.get_submodule(name).register_forward_hook(compare)
    step()
    print(f"transformers' Llama, 8B-shaped, {str(dtype)[6:]}, {past} tokens of past, {share:.0%} of inputs kept: dense "
          f"{dense / 1e3:.2f} ms, sparse {sparse / 1e3:.2f} (±{spread / 1e3:.2f}), {dense / sparse:.2f}x; largest "
          f"error of a product {max(errors):.0e}", flush=True)  # fmt: skip


# ---- CPU


def least_us(functions: dict[str, Callable[[int], object]], copies: int, repeat: int = 7) -> dict[str, float]:
    """Least microseconds a call of each function, in turns."""
    least = dict.fromkeys(functions, float("inf"))
    for name, function in [*functions.items()] * repeat:
        start = time.perf_counter()
        for i in range(copies):
            function(i)
        least[name] = min(least[name], (time.perf_counter() - start) / copies * 1e6)
    return least


@torch.inference_mode()
def cpu_products(dtype: torch.dtype, sparsity: float) -> None:
    """Table of single products: dense PyTorch, PyTorch gathering rows, the kernel, and the kernel with all kept."""
    print(f"\n{'product, ' + str(dtype)[6:]:24} {'M':>2} {'dense':>8} {'gather':>8} {'sparse':>8} {'speed-up':>8} "
          f"{'all kept':>8} {'SwiGLU dense':>12} {'sparse':>8}   (us, {sparsity:.0%} dropped)")  # fmt: skip
    for (name, (outputs, size)), rows in itertools.product(CPU_SHAPES.items(), (1, 2, 4)):
        case = Case.of(outputs, size, rows, dtype, "cpu", 2e8)
        x, weights, flipped, scale = case.inputs[0], case.weights, case.transposed, case.scale
        limit = case.threshold(sparsity).item()
        kept = reference.keep_mask(x, limit, scale).any(0).nonzero().squeeze(1)
        a = F.silu(F.linear(x, weights[0])).float().abs()
        cut = torch.full((outputs,), a.quantile(sparsity).item())
        last = len(weights) - 1
        least = least_us(
            {
                "dense": lambda i: F.linear(x, weights[i]),  # noqa: B023
                "gather": lambda i: x[:, kept] @ flipped[i].index_select(0, kept),  # noqa: B023
                "sparse": lambda i: cpu_kernel.sparse_linear(x, flipped[i], limit, scale, None, None),  # noqa: B023
                "all": lambda i: cpu_kernel.sparse_linear(x, flipped[i], -1.0, scale, None, None),  # noqa: B023
                "pair": lambda i: F.silu(F.linear(x, weights[i])) * F.linear(x, weights[last - i]),  # noqa: B023
                "sparse pair": lambda i: cpu_kernel.sparse_swiglu(x, weights[i], weights[last - i], cut),  # noqa: B023
            },
            len(weights),
        )
        print(f"{name:24} {rows:2} {least['dense']:8.0f} {least['gather']:8.0f} {least['sparse']:8.0f} "
              f"{least['dense'] / least['sparse']:7.2f}x {least['all']:8.0f} {least['pair']:12.0f} "
              f"{least['sparse pair']:8.0f}", flush=True)  # fmt: skip


class SparseLinear(nn.Module):
    """A linear layer that reads the weights of the inputs with the largest |x_i| times column norm."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight_t, self.bias = linear.weight.detach().T.contiguous(), linear.bias
        self.scale, self.threshold = linear.weight.detach().float().norm(dim=0), torch.tensor(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(1, 1, K) -> (1, 1, N)."""
        return sparse_linear(x, self.weight_t, self.threshold, self.scale, bias=self.bias)


@torch.inference_mode()
def cpu_decode(name: str, dtype: torch.dtype, sparsity: float, tokens: int, repeat: int) -> None:
    """Milliseconds a token of greedy decoding: dense, the layers' linears sparse, and their kernel with all kept."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    if name == "llama-1b":
        config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                             num_attention_heads=32, num_key_value_heads=8)  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    model.eval()
    ids = torch.randint(5, 1000, (1, 64))
    places = [(parent, child, linear) for parent in model.get_decoder().layers.modules()
              for child, linear in parent.named_children() if isinstance(linear, nn.Linear)]  # fmt: skip
    limits: dict[nn.Module, Tensor] = {}

    def calibrate(linear: nn.Module, given: tuple[Tensor, ...]) -> None:
        score = given[0].float().abs() * linear.weight.float().norm(dim=0)  # type: ignore[operator]
        limits[linear] = score.quantile(sparsity)

    hooks = [linear.register_forward_pre_hook(calibrate) for _, _, linear in places]
    model(ids)
    for hook in hooks:
        hook.remove()
    sparse = {linear: SparseLinear(linear) for _, _, linear in places}
    least = dict.fromkeys(("dense", "sparse", "all kept"), float("inf"))
    for kind in [*least] * repeat:
        for parent, child, linear in places:
            sparse[linear].threshold = limits[linear] if kind == "sparse" else torch.tensor(-1.0)
            setattr(parent, child, linear if kind == "dense" else sparse[linear])
        cache, token = None, ids[:, :1]
        for step in range(tokens + 3):
            if step == 3:
                start = time.perf_counter()
            out = model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        least[kind] = min(least[kind], (time.perf_counter() - start) / tokens * 1e3)
    print(f"decode of {name}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, {sparsity:.0%}, ms a token: "
          + ", ".join(f"{kind} {ms:.1f}" for kind, ms in least.items())
          + f"; speed-up {least['dense'] / least['sparse']:.2f}x, by skipping alone "
          f"{least['all kept'] / least['sparse']:.2f}x", flush=True)  # fmt: skip


def main() -> None:
    """Parse arguments and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of channels dropped (CPU)")
    parser.add_argument("--model", help="CPU: decode this checkpoint, or llama-1b: random weights")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded a repetition")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of decoding")
    parser.add_argument("--sweep", action="store_true", help="GPU: time every cut of the kernel instead")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        print(
            f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        )
        if arguments.model:
            cpu_decode(arguments.model, dtype, arguments.sparsity, arguments.tokens, arguments.repeat)
        else:
            cpu_products(dtype, arguments.sparsity)
        return
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    if arguments.sweep:
        for rows in (1, 2):
            gpu_sweep(dtype, rows)
        return
    gpu_products(dtype, bandwidth)
    gpu_crossover(dtype)
    gpu_decode(dtype)
    torch.cuda.empty_cache()
    gpu_model(dtype)


if __name__ == "__main__":
    main()
