"""How fast a model is: prefill, decoding, time to the first token and memory.

Decoding runs as a CUDA graph where the device is a GPU and the model's cache has a fixed size, so that launches do not
count. Linearized models capture their steps by themselves.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kit.convert.measure import peak_memory, reset_peak_memory

if TYPE_CHECKING:
    from torch import Tensor

UNTIMED_STEPS = 3  # of decoding: two as they are, then the first replay


class FusedRunner:
    """A model on the kernels (`kit.enable_kernels`)."""

    kernels = True
    fixed = True  # the size of its cache

    def __init__(self, model: Any) -> None:
        self.fused = model.fused

    def start(self, batch: int, capacity: int) -> None:
        """Make a cache."""
        self.store = self.fused.empty_store(batch, capacity)
        self.store.padded = False

    def prefill(self, ids: Tensor) -> Tensor:
        """Fill the cache; logits of the last token, (B, 1, V)."""
        self.store.reset()
        return self.fused.prompt(self.fused.model.model.embed_tokens(ids), self.store)

    def step(self, ids: Tensor) -> Tensor:
        """One token a row, (B, 1), to (B, 1, V)."""
        return self.fused.step(ids, self.store)

    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self.store.nbytes()


class PlainRunner:
    """A model as `generate` runs it; on a GPU transformers' own get a cache of fixed size, if they can do with one."""

    kernels = False

    def __init__(self, model: Any) -> None:
        from kit.modules.cache import cache_argument
        from kit.modules.modeling import LinearizedForCausalLM

        on_gpu = model.device.type == "cuda" and not isinstance(model, LinearizedForCausalLM)
        self.fixed = on_gpu and getattr(model, "_can_compile_fullgraph", False)
        self.model = model
        self.name = cache_argument(inspect.signature(model.forward).parameters)

    def start(self, batch: int, capacity: int) -> None:
        """Set the size of caches."""
        self.capacity = capacity

    def prefill(self, ids: Tensor) -> Tensor:
        """Fill a new cache; logits of the last token, (B, 1, V)."""
        import torch
        from transformers import DynamicCache, StaticCache

        config = self.model.config
        self.cache = StaticCache(config, self.capacity) if self.fixed else DynamicCache(config=config)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=ids.device)
        out = self.model(ids, **{self.name: self.cache}, use_cache=True, logits_to_keep=1)
        self.position.fill_(ids.shape[1])
        return out.logits

    def step(self, ids: Tensor) -> Tensor:
        """One token a row, (B, 1), to (B, 1, V)."""
        out = self.model(ids, position_ids=self.position, **{self.name: self.cache}, use_cache=True)
        self.position.add_(1)
        return out.logits

    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return sum(t.numel() * t.element_size() for layer in self.cache.layers for t in _held(layer))


def _held(layer: Any) -> Iterator[Tensor]:
    """The tensors of a cache layer: keys and values, our unrounded latest ones, recurrent states."""
    for name in ("keys", "values", "latest", "conv_states", "recurrent_states"):
        part = getattr(layer, name, None)
        several = part.values() if isinstance(part, dict) else part if isinstance(part, tuple) else (part,)
        yield from (tensor for tensor in several if tensor is not None)


def longest(context: int, new_tokens: int) -> int:
    """Tokens of a row at the end of a measurement."""
    return context + UNTIMED_STEPS + new_tokens


def runner_of(model: Any) -> FusedRunner | PlainRunner:
    """What runs a model."""
    return FusedRunner(model) if getattr(model, "fused", None) is not None else PlainRunner(model)


def measure(
    model: Any, *, batch: int, context: int, new_tokens: int, repeats: int = 3, seed: int = 0, graphs: bool = True
) -> dict[str, Any]:
    """Time a prompt of `context` random tokens a row, then decoding, whose steps `graphs` captures.

    Linearized models capture theirs by themselves.

    Returns:
        prefill_ms (of the prompt), ttft_ms (from token ids on the host to the first new one there), decode_ms (a step),
        prefill_tokens_per_second, decode_tokens_per_second (all rows), cache_bytes, peak_bytes, graph, kernels.
    """
    import torch

    runner, device = runner_of(model), model.device
    generator = torch.Generator().manual_seed(seed)
    host = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator)
    reset_peak_memory()
    with torch.inference_mode():
        runner.start(batch, longest(context, new_tokens))
        logits = runner.prefill(host.to(device))  # compiles
        prefill = statistics.median(_seconds(lambda: runner.prefill(host.to(device)), device) for _ in range(repeats))
        ttft = statistics.median(
            _seconds(lambda: runner.prefill(host.to(device))[:, -1].argmax(-1).cpu(), device) for _ in range(repeats)
        )
        decode, graph = _decode_seconds(runner, logits[:, -1:].argmax(-1), new_tokens, graphs and device.type == "cuda")
    return {
        "batch": batch,
        "context": context,
        "new_tokens": new_tokens,
        "prefill_ms": 1e3 * prefill,
        "prefill_tokens_per_second": batch * context / prefill,
        "ttft_ms": 1e3 * ttft,
        "decode_ms": 1e3 * decode,
        "decode_tokens_per_second": batch / decode,
        "cache_bytes": runner.cache_bytes(),
        "peak_bytes": peak_memory(),
        "graph": graph,
        "kernels": runner.kernels,
    }


def _seconds(call: Callable[[], Any], device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _decode_seconds(runner: Any, ids: Tensor, steps: int, graphs: bool) -> tuple[float, bool]:
    """Seconds a step, over greedy decoding, and whether it ran as a CUDA graph."""
    import torch

    from kit.modules.graphs import capture_stream

    ids = ids.clone()

    def step() -> None:
        ids.copy_(runner.step(ids)[:, -1:].argmax(-1))

    step()
    step()
    replay, graph = step, None
    if graphs and runner.fixed:
        torch.cuda.synchronize(ids.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(ids.device), torch.cuda.graph(graph, stream=capture_stream(ids.device)):
                step()
            replay = graph.replay
        except RuntimeError:  # the model reads something on the host
            graph = None
        torch.cuda.synchronize(ids.device)
    replay()

    def all_steps() -> None:
        for _ in range(steps):
            replay()

    seconds = _seconds(all_steps, ids.device) / steps
    own = getattr(getattr(runner, "cache", None), "kit_steps", None)
    return seconds, graph is not None or (own is not None and own.replay is not None)
