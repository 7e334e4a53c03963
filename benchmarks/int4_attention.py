"""Attention over the INT4 cache beside PyTorch's SDPA: a step of decoding, and a prompt. Needs a Hopper GPU.

    python benchmarks/int4_attention.py [--output FILE.json]

Times are medians of CUDA-graph replays. The graph of a step goes through as many caches as take several times the L2
cache, so that none is found there; SDPA gets random keys and, apart from them, values. 32 query heads, 8 key/value
heads of 128, batch 1, a window of 128 recent keys. GB/s and the roofline count what a step has to read. `sdpa` is what
PyTorch chooses by itself. `error` is that of the first cache's output against fp32 on the same numbers, and `peers'
error` the largest of the peers'.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kit.kernels.int4_fp8 import attention_ops as ops
from kit.kernels.int4_fp8 import hadamard
from kit.kernels.int4_fp8.attention import KVStore
from kit.kernels.int4_fp8.attention_reference import Heads, decode_kv, from_ring

HEADS, KV_HEADS, DIM, WINDOW = 32, 8, 128, 128
BANDWIDTH = 3.0e12  # bytes/s of a copy on an H100
ROTATION = 2.0e8  # bytes that a graph goes through at least: four times the L2 cache
BACKENDS = {"sdpa": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def microseconds(calls: list[Callable[[], Any]], repeats: int = 7) -> float:
    """Median time of a call, over replays of a graph of all calls."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> dict[str, float | str]:
    """Times of PyTorch's backends and their largest error; what a backend refuses stands in its place.

    Args:
        query: (1, H, T, D).
        key, value: (n, 1, G, S, D): n to go through.
    """
    found: dict[str, float | str] = {}
    want = plain_attention(query, key[0].float(), value[0].float(), causal)
    worst = 0.0
    for name, backend in BACKENDS.items():

        def call(i: int, backend: SDPBackend | None = backend) -> Tensor:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key[i], value[i], is_causal=causal, enable_gqa=True)

        try:
            worst = max(worst, relative(call(0), want))
            found[name] = microseconds([lambda i=i: call(i) for i in range(len(key))])  # type: ignore[misc]
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found | {"peers' error": worst}


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def plain_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """(1, H, T, D) of the formula in fp32, a head at a time; keys and values (1, G, S, D)."""
    outs = []
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = query[0, head].float() @ key[0, group].T * DIM**-0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        outs.append(scores.softmax(-1) @ value[0, group])
    return torch.stack(outs)[None]


def heads_options(device: str) -> Heads:
    """What a checkpoint of the default recipe does to heads."""
    signs = (hadamard(DIM) * DIM**0.5).round().to(device, torch.bfloat16)
    return Heads(HEADS, KV_HEADS, DIM, key_mean=torch.randn(KV_HEADS, DIM, device=device).bfloat16(), signs=signs)


def filled_store(layers: int, tokens: int, device: str) -> KVStore:
    """A cache of random codes that has one token less than it has room for."""
    store = KVStore.empty(layers, 1, tokens, KV_HEADS, DIM, int4=True, window=WINDOW, device=device)
    store.codes.random_(0, 256)
    scale = (torch.rand(store.meta.shape, device=device) * 0.02 + 0.02).bfloat16().view(torch.int16).int() & 0xFFFF
    zero = torch.randint(6, 10, store.meta.shape, device=device).bfloat16().view(torch.int16).int() << 16
    store.meta.copy_(scale | zero)
    store.recent.normal_()
    store.length.fill_(tokens - 1)
    return store


def decode_row(tokens: int, device: str) -> dict[str, Any]:
    """A step on a cache of so many tokens."""
    bytes_read = 2 * KV_HEADS * ((tokens - WINDOW) * (DIM // 2 + 4) + WINDOW * DIM * 2)
    layers = int(ROTATION // bytes_read) + 1
    store = filled_store(layers, tokens, device)
    q = (2 * torch.randn(1, 1, HEADS, DIM, device=device)).to(torch.float8_e4m3fn).to(torch.float16)
    unit = torch.ones(1, 1, HEADS, device=device)

    def step(i: int) -> Any:
        return ops.decode(
            q, unit, store.codes[i], store.meta[i], store.recent[i], store.length, store.start, store.arrivals, WINDOW,
            DIM**-0.5, None,
        )  # fmt: skip

    coded = (decode_kv(store.codes[0, n], store.meta[0, n])[:, :, : tokens - WINDOW] for n in (0, 1))
    recent = from_ring(store.recent[0], tokens)[0].float()
    key, value = (torch.cat([c, r], 2) for c, r in zip(coded, recent, strict=True))
    want = plain_attention(q.transpose(1, 2), key, value, False)
    error = relative(step(0).transpose(1, 2), want)
    time = microseconds([lambda i=i: step(i) for i in range(layers)])  # type: ignore[misc]
    count = int(ROTATION // (4 * tokens * KV_HEADS * DIM)) + 1
    key, value = (torch.randn(count, 1, KV_HEADS, tokens, DIM, device=device).bfloat16() for _ in range(2))
    peers = sdpa((2 * torch.randn(1, HEADS, 1, DIM, device=device)).bfloat16(), key, value, False)
    roofline = bytes_read / BANDWIDTH * 1e6
    row = {"step": tokens, "ours": time, "error": error, **peers, "roofline": roofline}
    return row | {"GB/s": bytes_read / time * 1e-3}


def prompt_row(tokens: int, device: str) -> dict[str, Any]:
    """A prompt: heads, codes and attention, each; PyTorch's causal attention reads keys as they are."""
    options = heads_options(device)
    order = torch.arange(DIM, device=device, dtype=torch.int32).expand(1, 2, KV_HEADS, DIM)
    factor = torch.eye(DIM, device=device).bfloat16().expand(1, 2, KV_HEADS, DIM, DIM)
    store = KVStore.empty(
        1, 1, tokens, KV_HEADS, DIM, int4=True, window=WINDOW, order=order, factor=factor, device=device
    )
    angle = torch.arange(store.capacity, device=device)[:, None] * 1e4 ** (-torch.arange(64, device=device) / 64)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    qkv = torch.randn(1, tokens, (HEADS + 2 * KV_HEADS) * DIM, device=device).bfloat16()

    def prepare() -> Any:
        recent = store.recent[0]
        return ops.prepare(qkv, cos, sin, options, store.identity(), store.length, store.start, recent, True)

    def encode(kv: Any) -> Any:
        return ops.encode(
            kv[None], store.length, store.order, store.factor, store.codes, store.meta, tokens, False, False, True, True
        )

    q, unit, kv = prepare()
    keys, values = encode(kv)

    def attend() -> Any:
        return ops.prefill(q, unit, keys, store.meta[0], values, kv, store.start, WINDOW, DIM**-0.5, None)

    times = {
        "heads": microseconds([prepare]),
        "codes": microseconds([lambda: encode(kv)]),
        "ours": microseconds([attend]),
    }
    query = (q * unit[..., None]).bfloat16().transpose(1, 2)
    operations = 2 * tokens**2 * DIM * HEADS
    return {
        "prompt": tokens,
        **times,
        **sdpa(query, kv[:1], kv[1:], True),
        "TFLOP/s": operations / times["ours"] * 1e-6,
    }


def main() -> None:
    """Print a line a length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--steps", default="1024,2048,8192,32768,131072")
    parser.add_argument("--prompts", default="2048,8192")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for text, measure in ((arguments.steps, decode_row), (arguments.prompts, prompt_row)):
        for tokens in map(int, filter(None, text.split(","))):
            rows.append(measure(tokens, "cuda"))
            print(
                *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                sep=" | ",
                flush=True,
            )
            torch.cuda.empty_cache()
    if arguments.output:
        result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
