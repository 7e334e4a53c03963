"""A quantized model on the kernels of `kit.kernels.int4_fp8`: products fused, RMSNorm and SwiGLU with FP8 outputs, a
static INT4 cache, and a step of decoding that is replayed as a CUDA graph.

`enable_kernels` changes a model in place. Calls without gradients then take the fast path, with a cache of its own that
grows; what it does not take (beam search, other caches and masks, hidden states, gradients, torch.compile) runs the
model's own forward pass, on the same packed weights.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from kit.kernels.int4_fp8 import (
    PackedInt4,
    int4_fp8_linear,
    int4_fp8_swiglu,
    int8_linear,
    prepack,
    quantize_fp8,
    rms_norm_quantize,
    unpack_int4,
    unpack_int8,
)
from kit.kernels.int4_fp8.attention import (
    KVStore,
    attend_more,
    attend_prompt,
    attend_step,
    finish_step,
    kernels,
)
from kit.kernels.int4_fp8.attention_reference import Heads
from kit.kernels.int4_fp8.packing import TILE, kernel_group
from kit.modules.cache import cache_argument
from kit.modules.graphs import FIXED_ROPE, StepGraph, chosen, hooked
from kit.modules.quantized import AttentionQuantization, QuantizedLinear, _quantize_cache, rotation_signs

LOAD_AGAIN = "load it again: kit.load(path, device=..., dtype=...)"
SPARE = 128  # tokens that a cache of a plain call has room for beyond its prompt
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class KernelLinear(QuantizedLinear):
    """An INT4 linear whose weight is packed for the kernels; a part of a fused weight, where it can share its memory.

    Args:
        linear: what it replaces.
        packed: (N, K).
    """

    def __init__(self, linear: QuantizedLinear, packed: PackedInt4) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.fp8_inputs = self.quantize_inputs = self.int4 = True
        self.packed, self.bias = packed, linear.bias

    def dequantize(self) -> Tensor:
        """Return the weight, (N, K) fp32."""
        return self.packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.quantize_inputs:
            if torch.is_grad_enabled() and x.requires_grad:
                return _StraightThrough.apply(x, self.packed, self.bias)
            return int4_fp8_linear(x, self.packed, self.bias)
        y = F.linear(x.float(), self.dequantize(), None if self.bias is None else self.bias.float())
        return y.to(x.dtype)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, since the weight would be left out without a word; loading one, too."""
        raise _refusal("a model on the INT4-FP8 kernels has no state dict: its weights are repacked", "state_dict")

    _load_from_state_dict = _save_to_state_dict

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        return f"{self.in_features}, {self.out_features}, INT4 in groups of {self.packed.group}, inputs FP8, kernels"


class _StraightThrough(torch.autograd.Function):
    """The product, whose gradient does not see the rounding of x; no weight is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedInt4, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return int4_fp8_linear(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (grads[0].float() @ ctx.packed.dequantize()).to(grads[0].dtype), None, None


class KernelHead(QuantizedLinear):
    """An output head in INT8, on a kernel.

    Args:
        linear: what it replaces.
    """

    codes: Tensor

    def __init__(self, linear: QuantizedLinear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.fp8_inputs = self.int4 = False
        self.int8 = self.quantize_inputs = True
        self.register_buffer("codes", unpack_int8(linear.weight_packed, linear.in_features).contiguous())
        self.weight_scale, self.bias = linear.weight_scale, linear.bias

    def dequantize(self) -> Tensor:
        """Return the weight, (N, K) fp32."""
        return self.codes.float() * self.weight_scale.float()

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x.float(), self.dequantize()).to(x.dtype)
        return int8_linear(x, self.codes, self.weight_scale[:, 0])


class Product:
    """One or several linears of the same input as one product; they become `KernelLinear`s.

    Args:
        parent: the module that holds them.
        names: in the order of the outputs.
        exact: as for `int4_fp8_linear`.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...], exact: bool) -> None:
        self.exact = exact
        linears: list[QuantizedLinear] = [getattr(parent, name) for name in names]
        codes = torch.cat([unpack_int4(x.weight_packed, x.in_features) for x in linears])
        scale = torch.cat([x.weight_scale for x in linears])
        zeros = [
            unpack_int4(x.weight_zero_point.T, x.out_features).T for x in linears if hasattr(x, "weight_zero_point")
        ]
        self.packed = prepack(codes, scale, torch.cat(zeros) if zeros else None)
        biases = [x.bias for x in linears]
        self.bias = None if all(b is None for b in biases) else torch.cat(
            [torch.zeros_like(x.weight_scale[:, 0]) if b is None else b for x, b in zip(linears, biases, strict=True)]
        )  # fmt: skip
        first = 0
        for name, linear in zip(names, linears, strict=True):
            end = first + linear.out_features
            part = self._part(first, end) if len(linears) > 1 else self.packed
            if part is None:
                zero = zeros[names.index(name)] if zeros else None
                part = prepack(codes[first:end], linear.weight_scale, zero)
            setattr(parent, name, KernelLinear(linear, part))
            first = end

    def _part(self, first: int, end: int) -> PackedInt4 | None:
        """Some outputs, in the same memory but for the scales; None if they do not lie at whole tiles."""
        if first % TILE or end % TILE:
            return None
        p = self.packed
        zeros = None if p.zeros is None else p.zeros[:, first:end].contiguous()
        codes = p.codes[first // TILE : end // TILE]
        return PackedInt4(codes, p.scales[:, first:end].contiguous(), zeros, end - first, p.in_features)

    def __call__(self, x: Tensor | tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """(..., K), quantized or not, -> (..., N) in `dtype`."""
        return int4_fp8_linear(x, self.packed, self.bias, dtype, self.exact)

    def swiglu(self, x: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """SwiGLU of the outputs, which are gates and up's, quantized: (..., N / 2) and a scale a token."""
        return int4_fp8_swiglu(x, self.packed, self.bias, dtype, self.exact)


class FusedLayer:
    """One decoder layer: its four products, norms, and what its attention does to heads."""

    def __init__(self, layer: Any, config: Any, exact: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = Product(attention, ("q_proj", "k_proj", "v_proj"), exact)
        self.o = Product(attention, ("o_proj",), exact)
        self.gate_up = Product(mlp, ("gate_proj", "up_proj"), exact)
        self.down = Product(mlp, ("down_proj",), exact)
        self.scale = float(attention.scaling)
        self.sliding = sliding_window(attention, config)
        dim, q_norm = attention.head_dim, getattr(attention, "q_norm", None)
        quantization: AttentionQuantization | None = getattr(attention, "quantization", None)
        dtype, device = layer.input_layernorm.weight.dtype, layer.input_layernorm.weight.device
        options: dict[str, Any] = {"query_fp8": False}
        if quantization is not None:
            signs = rotation_signs(dim, device).to(dtype) if quantization.rotate else None
            options = {
                "key_mean": quantization.key_mean,
                "key_scale": quantization.key_scale,
                "signs": signs,
                "query_fp8": quantization.query_fp8,
            }
        if q_norm is not None:
            options |= {"q_norm": q_norm.weight, "k_norm": attention.k_norm.weight, "eps": q_norm.variance_epsilon}
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, dim, **options)

    def __call__(self, x: Tensor, h: Tensor | None, attend: Any) -> tuple[Tensor, Tensor]:
        """Ten launches a step: a layer's output comes as two addends, so that the next norm adds them.

        Args:
            x: (B, T, hidden), the last product.
            h: (B, T, hidden), the residual stream before it, or None.
            attend: (B, T, (H + 2G)·D) and this layer -> (B, T, H·D).

        Returns:
            The same two for the next layer.
        """
        norm = self.input_norm
        if h is None:
            codes, scale = rms_norm_quantize(x, norm.weight, norm.variance_epsilon)  # type: ignore[misc]
            h = x
        else:
            codes, scale, h = rms_norm_quantize(x, norm.weight, norm.variance_epsilon, h)  # type: ignore[misc]
        attended = attend(self.qkv((codes, scale), x.dtype), self)
        x = self.o(quantize_fp8(attended), x.dtype)
        norm = self.post_norm
        codes, scale, h = rms_norm_quantize(x, norm.weight, norm.variance_epsilon, h)  # type: ignore[misc]
        return self.down(self.gate_up.swiglu((codes, scale), x.dtype), x.dtype), h


class FusedCache(Cache):
    """The cache that `generate` hands around: a `KVStore` that grows, or, where the fast path cannot go on, the model's
    usual cache in `delegate`.

    Args:
        capacity: tokens that there is room for at first. When they are used up, the room is doubled; a CUDA graph is
            then captured anew.
    """

    def __init__(self, capacity: int = SPARE) -> None:
        super().__init__(layers=[])
        self.room, self.length = capacity, 0
        self.store: KVStore | None = None
        self.graph: StepGraph | None = None
        self.delegate: Cache | None = None
        self.warm = False  # whether a step has run, and compiled its kernels

    @property
    def is_compileable(self) -> bool:
        """No: transformers would make 4-D masks, which nothing here reads."""
        return False

    def __len__(self) -> int:
        """Layers; none before the first call."""
        if self.delegate is not None:
            return len(self.delegate)
        return 0 if self.store is None else len(self.store.recent)

    @property
    def is_linear(self) -> list[bool]:
        """Keys and values are kept: `generate` leaves out the tokens that they are of."""
        return [False]

    @property
    def is_sliding(self) -> list[bool]:
        """What a sliding window hides is kept, too."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far."""
        return self.length if self.delegate is None else self.delegate.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that so many queries may see, and the place of the first."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache grows."""
        return -1

    get_max_cache_shape = get_max_length

    def open(self, fused: FusedModel, start: Tensor, tokens: int) -> KVStore:
        """The store for a first call of so many tokens, with (B,) padded ones at the start of each row."""
        if self.store is None or len(self.store.start) != len(start):
            self.store = fused.empty_store(len(start), max(self.room, tokens))
            self._moved()
        self.store.length.zero_()
        self.store.start.copy_(start)
        self.store.padded = bool(start.any())
        return self.store

    def grow(self, tokens: int) -> None:
        """Make room for so many tokens in all, and for as many again as there was room for."""
        if self.store is not None and tokens > self.store.capacity:
            self.store.grow(max(tokens, 2 * self.store.capacity))
            self._moved()

    def _moved(self) -> None:
        self.graph, self.warm = None, False

    def reset(self) -> None:
        """Forget all tokens; memory and graph stay."""
        self.length, self.delegate = 0, None
        if self.store is not None:
            self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: so many if the number is negative, all but so many if not (transformers before 5.18).

        Some that queries read as they are come back rounded: those that had left the window of recent keys.
        """
        if self.delegate is not None:
            return self.delegate.crop(tokens_to_remove)
        n = tokens_to_remove
        kept = min(n, self.length) if n > 0 else max(self.length + n, 0)
        if self.store is not None and kept < self.length:
            self.store.crop(self.length, kept)
            self.length = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows into another order."""
        self._select("reorder_cache", beam_idx, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = None if self.store is None else torch.arange(len(self.store.start)).repeat_interleave(repeats)
        self._select("batch_repeat_interleave", repeats, rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows: their numbers, or a mask."""
        rows = None if self.store is None else torch.arange(len(self.store.start))[indices.cpu()]
        self._select("batch_select_indices", indices, rows)

    def _select(self, name: str, argument: Any, rows: Tensor | None) -> None:
        if self.delegate is not None:
            getattr(self.delegate, name)(argument)
        elif self.store is not None and rows is not None:
            if len(rows) != len(self.store.start):
                self._moved()
            self.store.select(rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedCache:
        """A copy that goes on by itself (prefixes that are used again); it captures a graph of its own."""
        new = FusedCache(self.room)
        new.length, new.delegate = self.length, copy.deepcopy(self.delegate, memo)
        if self.store is not None:
            memo |= {id(x): x for x in (self.store.order, self.store.factor) if x is not None}  # of the model
            with torch.inference_mode(False):  # as `KVStore.empty`
                new.store = copy.deepcopy(self.store, memo)
        return new


class FusedModel:
    """The fast path of a model: `prompt` and `step` on a `KVStore`.

    Args:
        model: a causal language model of one of FAMILIES; its linears are repacked.
        backend: of attention: "triton" or "reference".
        exact: of products, as for `int4_fp8_linear`.
    """

    def __init__(self, model: Any, backend: str, exact: bool = True) -> None:
        self.model, self.backend = model, backend
        config = self.config = model.config.get_text_config(decoder=True)
        self.layers = [FusedLayer(layer, config, exact) for layer in model.model.layers]
        if getattr(model.lm_head, "int8", False) and model.lm_head.bias is None:
            model.lm_head = KernelHead(model.lm_head)
        quantizations = [getattr(layer.self_attn, "quantization", None) for layer in model.model.layers]
        first: AttentionQuantization | None = quantizations[0]
        self.int4, self.symmetric = first is not None and first.kv is not None, first is not None and first.symmetric
        self.window = first.window if first is not None else 0
        self.order = self.factor = None
        if self.int4 and first is not None and first.key_order is not None:
            self.order, self.factor = (
                torch.stack(
                    [torch.stack([getattr(q, f"key_{name}"), getattr(q, f"value_{name}")]) for q in quantizations]
                )
                for name in ("order", "factor")
            )
        self.graphs = model.device.type == "cuda" and backend == "triton"  # the reference reads on the host
        self._angles: tuple[Tensor, Tensor] | None = None

    def empty_store(self, batch: int, capacity: int) -> KVStore:
        """A cache for `batch` rows of `capacity` tokens."""
        heads, norm = self.layers[0].heads, self.layers[0].input_norm.weight
        return KVStore.empty(
            len(self.layers), batch, capacity, heads.kv_heads, heads.dim, int4=self.int4, window=self.window,
            symmetric=self.symmetric, order=self.order, factor=self.factor, dtype=norm.dtype, device=norm.device,
        )  # fmt: skip

    def angles(self, capacity: int) -> tuple[Tensor, Tensor]:
        """cos and sin of RoPE, (positions, D / 2), for at least so many positions."""
        if self._angles is None or self._angles[0].shape[0] < capacity:
            weight = self.layers[0].input_norm.weight
            positions = torch.arange(-(-capacity // 1024) * 1024, device=weight.device)[None]
            cos, sin = self.model.model.rotary_emb(weight[None, None], position_ids=positions)
            half = cos.shape[-1] // 2
            self._angles = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return self._angles

    def _logits(self, x: Tensor, h: Tensor) -> Tensor:
        norm = self.model.model.norm
        return self.model.lm_head(F.rms_norm(x + h, norm.weight.shape, norm.weight, norm.variance_epsilon))

    def _run(self, x: Tensor, store: KVStore, attention: Any, **options: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.angles(store.capacity)
        h: Tensor | None = None
        for index, layer in enumerate(self.layers):

            def attend(qkv: Tensor, layer: FusedLayer, index: int = index) -> Tensor:
                return attention(
                    qkv, cos, sin, layer.heads, store, index, scale=layer.scale, sliding=layer.sliding, **options
                )

            x, h = layer(x, h, attend)
        assert h is not None
        return x, h

    def step(self, ids: Tensor, store: KVStore) -> Tensor:
        """One token a row, (B, 1) -> logits (B, 1, V). Nothing is read on the host."""
        x, h = self._run(self.model.model.embed_tokens(ids), store, attend_step, backend=self.backend)
        finish_step(store, self.backend)
        return self._logits(x, h)

    def prompt(self, embedded: Tensor, store: KVStore, keep: int | Tensor = 1) -> Tensor:
        """T tokens a row of an empty cache, (B, T, hidden) -> logits of the last `keep` (0: all) or given places."""
        return self._several(embedded, store, keep, attend_prompt, backend=self.backend)

    def more(self, embedded: Tensor, store: KVStore, keep: int | Tensor = 1) -> Tensor:
        """As `prompt`, on a cache that holds tokens; attention is PyTorch's."""
        return self._several(embedded, store, keep, attend_more)

    def _several(self, embedded: Tensor, store: KVStore, keep: int | Tensor, attention: Any, **options: Any) -> Tensor:
        x, h = self._run(embedded, store, attention, **options)
        store.length.add_(embedded.shape[1])
        places = (
            slice(-keep, None) if isinstance(keep, int) and keep else slice(None) if isinstance(keep, int) else keep
        )
        return self._logits(x[:, places], h[:, places])

    def forward(
        self, cache: FusedCache, arguments: dict[str, Any], *, plain: bool = False, kept: bool = True
    ) -> Tensor | None:
        """Logits of a call of the model, or None if its own forward pass has to take it.

        Args:
            cache: to use, and to fill.
            arguments: of the model's forward pass, without the cache.
            plain: the caller gave no cache: the call means what it means to transformers to the last position.
            kept: the cache is used once more.

        Raises:
            ValueError: if a cache that holds tokens cannot go on as asked, or a CUDA graph is being captured.
        """
        ids, embedded = arguments.get("input_ids"), arguments.get("inputs_embeds")
        given: Any = ids if embedded is None else embedded
        if cache.delegate is not None:
            return None
        if self.captured():
            raise _refusal(
                "a call with a FusedCache cannot be captured: it counts tokens on the host, and its memory moves when "
                "it grows",
                "torch.cuda.graph",
                "capture model.fused.step(ids, store), with model.fused.empty_store(batch, tokens)",
            )
        if cache.length == 0:
            start = self._first(arguments, plain, kept)
            if start is None:
                return None
            store = cache.open(self, start, given.shape[1])
        else:
            store = self._goes_on(cache, arguments, given)
        past, tokens = cache.length, given.shape[1]
        cache.grow(past + tokens)
        try:
            with torch.no_grad():
                if past and tokens == 1 and embedded is None:
                    logits = self._replay(given, cache, store)
                else:
                    embedded = self.model.model.embed_tokens(ids) if embedded is None else embedded
                    run = self.more if past else self.prompt
                    logits = run(embedded, store, arguments.get("logits_to_keep", 0))
        except BaseException:  # memory that does not suffice, an interrupt: the cache can be used again
            store.crop(past + tokens, past)
            raise
        cache.length = past + tokens
        return logits

    def _first(self, arguments: dict[str, Any], plain: bool, kept: bool) -> Tensor | None:
        """Padded tokens at the start of each row, (B,), of a first call; None if the fast path does not take it."""
        ids, embedded = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if (ids is None) == (embedded is None) or self._wants_more(arguments):
            return None
        if torch.is_grad_enabled() or self.model.training or self._switched_off() or self._hooked():
            return None
        given: Any = ids if embedded is None else embedded
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        if not kept and isinstance(mask, Tensor) and left_padding(mask.flip(-1), given) is not None:
            mask = None  # padding on the right is seen by no token
        start = left_padding(mask, given)
        if start is None or not counted_from(start, positions, given.shape[1]):
            return None
        return None if plain and positions is None and bool(start.any()) else start  # transformers counts padding then

    def _goes_on(self, cache: FusedCache, arguments: dict[str, Any], given: Tensor) -> KVStore:
        """The store of a cache that holds tokens.

        Masks and positions of single tokens are not looked at, since that would wait for the GPU.

        Raises:
            ValueError: if the call asks for something that such a cache cannot give.
        """
        store, tokens, problem = cache.store, given.shape[1], ""
        assert store is not None
        if len(given) != len(store.start):
            problem = f"the cache holds {len(store.start)} rows, and {len(given)} are given"
        elif self._wants_more(arguments):
            problem = "hidden states, attentions and losses are only given by a call without a FusedCache"
        elif tokens > 1 and not _same_padding(arguments.get("attention_mask"), cache, tokens):
            problem = "the INT4 cache cannot hide tokens but those that the first call had as padding"
        elif tokens > 1 and not counted_from(store.start, arguments.get("position_ids"), tokens, cache.length):
            problem = "the INT4 cache counts positions on from each row's first token"
        if problem:
            raise _refusal(problem, "a call with a FusedCache", "begin with a transformers.DynamicCache")
        return store

    def captured(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return self.layers[0].qkv.packed.scales.is_cuda and torch.cuda.is_current_stream_capturing()

    def _wants_more(self, arguments: dict[str, Any]) -> bool:
        outputs = ("output_attentions", "output_hidden_states")
        return arguments.get("labels") is not None or any(chosen(arguments, self.config, x) for x in outputs)

    def _hooked(self) -> bool:
        """Whether somebody listens to a module that the fast path goes around."""
        backbone = self.model.model
        return hooked([backbone, backbone.norm, *backbone.layers.modules()], _quantize_cache)

    def _replay(self, ids: Tensor, cache: FusedCache, store: KVStore) -> Tensor:
        """A step; the first of a cache runs as it is, the second is captured."""
        if not self.graphs:
            return self.step(ids, store)
        if cache.graph is None and cache.warm:
            angles = self.angles(store.capacity)  # which the model may replace by longer ones
            cache.graph = StepGraph(functools.partial(self.step, store=store), ids, held=angles)
        cache.warm = True
        return self.step(ids, store) if cache.graph is None else cache.graph(ids)

    def _switched_off(self) -> bool:
        """Whether some rounding is (`quantized.switched_off`)."""
        for layer in self.model.model.layers:
            quantization = getattr(layer.self_attn, "quantization", None)
            if quantization is not None and not (quantization.quantize_kv and quantization.quantize_query):
                return True
            if not layer.mlp.down_proj.quantize_inputs:
                return True
        return False


def packed_tensors(model: Any) -> list[Tensor]:
    """The packed weights of a model on the kernels, views of the same memory too; none of another model."""
    layers = [] if getattr(model, "fused", None) is None else model.fused.layers
    packed = [product.packed for x in layers for product in (x.qkv, x.o, x.gate_up, x.down)]
    packed += [module.packed for module in model.modules() if isinstance(module, KernelLinear)]  # scales of parts
    return [tensor for p in packed for tensor in (p.codes, p.scales, p.zeros) if tensor is not None]


def left_padding(mask: Any, given: Tensor) -> Tensor | None:
    """Padded tokens at the start of each row, (B,) int32; None if a mask says anything else, or hides a whole row.

    Args:
        mask: (B, T) of ones and zeros, or None.
        given: (B, T, ...).
    """
    if mask is None:
        return torch.zeros(len(given), dtype=torch.int32, device=given.device)
    if not isinstance(mask, Tensor) or mask.shape != given.shape[:2]:
        return None
    kept = mask.bool()
    start = (~kept).sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    in_order = (kept == (places >= start[:, None])).all() & kept.any(1).all()
    return start.to(torch.int32) if bool(in_order) else None


def _same_padding(mask: Any, cache: FusedCache, tokens: int) -> bool:
    """Whether a mask over all tokens, (B, past + T), hides what the first call's did and no more."""
    if cache.store is None or mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.shape != (len(cache.store.start), cache.length + tokens):
        return False
    start = left_padding(mask, mask)
    return start is not None and torch.equal(start, cache.store.start)


def counted_from(start: Tensor, position_ids: Tensor | None, tokens: int, past: int = 0) -> bool:
    """Whether given positions are those that count from each row's first token, `past` tokens before these."""
    if position_ids is None:
        return True
    counted = past + torch.arange(tokens, device=start.device) - start[:, None]
    return bool(((counted < 0) | (counted == position_ids)).all())


def sliding_window(attention: Any, config: Any) -> int | None:
    """Keys that queries of an attention layer see, or None."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return config.sliding_window if config.model_type.endswith("mistral") else None


def enable_kernels(model: Any, backend: str | None = None, *, exact: bool = True) -> Any:
    """Put a quantized model (W4AFP8, as `kit quantize --int4-fp8` writes it) on the kernels, in place.

    Call it when the model is where it stays. Where the kernels cannot run (no Hopper GPU, another family or format),
    the model is left as it is, which computes the same from dequantized weights, and one warning says why.

    Args:
        model: of `kit.load`, or a `quantize_modules` model.
        backend: None to choose; "triton" or "reference" insist, on attention in Triton or in PyTorch.
        exact: False rounds weights to FP8 from 2,048 tokens on (`int4_fp8_linear`): faster, less accurate.

    Returns:
        The model.

    Raises:
        ValueError: if `backend` insists and cannot be had.
    """
    if getattr(model, "fused", None) is not None:
        return model
    reason = unsupported(model, backend)
    if reason is not None:
        if backend is not None:
            raise ValueError(reason)
        _warn_once(reason)
        return model
    with torch.no_grad():
        model.fused = FusedModel(model, backend or "triton", exact)
    _redirect(model)
    _pin(model)
    return model


def _redirect(model: Any) -> None:
    """Let `model.forward` and `model.generate` take the fast path where it goes."""
    own, signature = model.forward, inspect.signature(model.forward)
    name = cache_argument(signature.parameters)

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not any(isinstance(x, FusedCache) for x in (*args, *kwargs.values())):
            return own(*args, **kwargs)
        if "past_key_values" in kwargs:  # which transformers renames, from 5.24 on
            kwargs[name] = kwargs.pop("past_key_values")
        arguments = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
        cache = given = arguments.get(name)
        if not (isinstance(given, FusedCache) or (given is None and not model.fused.captured())):
            return own(*args, **kwargs)
        if cache is None:
            embedded = arguments.get("inputs_embeds")
            first = arguments.get("input_ids") if embedded is None else embedded
            cache = FusedCache(SPARE if first is None else first.shape[1] + SPARE)
        kept = given is not None or chosen(arguments, model.config, "use_cache", True)
        logits = model.fused.forward(cache, arguments, plain=given is None, kept=kept)
        if logits is not None:
            out = CausalLMOutputWithPast(logits=logits, **({name: cache} if kept else {}))
            return out if chosen(arguments, model.config, "return_dict", True) else out.to_tuple()
        if given is None:
            return own(*args, **kwargs)
        if given.delegate is None:
            given.delegate = DynamicCache(config=model.fused.config)
        out = own(**{**arguments, name: given.delegate, "return_dict": True})
        out[name] = given
        return out if chosen(arguments, model.config, "return_dict", True) else out.to_tuple()

    prepare = model._prepare_cache_for_generation

    @functools.wraps(prepare)
    def prepare_cache(config: Any, kwargs: dict[str, Any], mode: Any, batch: int, length: int, *more: Any) -> Any:
        simple = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        free = kwargs.get(name) is None and config.use_cache is not False and config.cache_implementation is None
        if not (simple and free) or config.is_assistant:  # of which transformers' own keep what they crop unrounded
            return prepare(config, kwargs, mode, batch, length, *more)
        kwargs[name] = FusedCache(length)
        return None

    model.forward, model._prepare_cache_for_generation = forward, prepare_cache


def _pin(model: Any) -> None:
    """Refuse to move, convert, copy or save a model: its weights are no parameters any more, and would be left out."""
    scales = model.fused.layers[0].qkv.packed.scales

    def pin(module: Any) -> None:
        apply = module._apply

        @functools.wraps(apply)
        def apply_in_place(fn: Any, *args: Any, **kwargs: Any) -> Any:
            after = fn(scales[:0])
            if (after.device, after.dtype) != (scales.device, scales.dtype):
                what = "a model on the INT4-FP8 kernels cannot be moved or converted"
                raise _refusal(what, f"{type(module).__name__}.to", LOAD_AGAIN)
            return apply(fn, *args, **kwargs)

        module._apply = apply_in_place

    def refuse(what: str, where: str, next_step: str) -> Any:
        def refused(*_: Any, **__: Any) -> None:
            raise _refusal(
                f"a model on the INT4-FP8 kernels cannot be {what}", f"{type(model).__name__}, {where}", next_step
            )

        return refused

    for module in list(model.modules()):
        if any(isinstance(part, KernelLinear) for part in module.modules()):
            pin(module)
            module.__deepcopy__ = refuse("copied", "copy.deepcopy", LOAD_AGAIN)
    model.save_pretrained = refuse(
        "saved: its weights are repacked", "save_pretrained", "copy the folder that it was loaded from"
    )


def _refusal(what: str, where: str, next_step: str = LOAD_AGAIN) -> ValueError:
    return ValueError(f"{what}\n  where: {where}\n  next:  {next_step}")


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"{reason}; weights are dequantized for every product instead", stacklevel=3)


def unsupported(model: Any, backend: str | None = None) -> str | None:
    """Why a model cannot be put on the kernels; None if it can."""
    config = model.config.get_text_config(decoder=True)
    family = config.model_type.removeprefix("kit_quantized_")
    if family not in FAMILIES:
        return f"the INT4-FP8 kernels run {', '.join(FAMILIES)}, not {family}"
    linears = {name: module for name, module in model.model.layers.named_modules() if name.endswith("_proj")}
    for name, module in linears.items():
        taken = isinstance(module, QuantizedLinear) and module.int4 and module.fp8_inputs and not module.table
        if not taken:
            found = f"{type(module).__name__}({module.extra_repr()})"
            return f"the INT4-FP8 kernels take W4AFP8 linears, and model.layers.{name} is {found}"
        groups = module.weight_scale.shape[1]
        if kernel_group(module.in_features, groups) is None:
            size = module.in_features // groups
            return (
                f"the INT4-FP8 kernels take groups of 32, 64, 128 or a row, and those of model.layers.{name} are {size}"
            )
    for layer in model.model.layers:
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            of = layer.self_attn if "q_proj" in names else layer.mlp
            parts = [getattr(of, name) for name in names]
            if len({(x.weight_scale.shape[1], hasattr(x, "weight_zero_point")) for x in parts}) > 1:
                return f"the INT4-FP8 kernels take one format for {', '.join(names)}"
    if getattr(model.model.layers[0].self_attn, "k_scale", None) is not None:
        return "the INT4-FP8 kernels take an INT4 or a 16-bit cache, not FP8"
    if config.hidden_act != "silu":
        return f"the INT4-FP8 kernels take silu, not {config.hidden_act}"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in FIXED_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"the INT4-FP8 kernels take RoPE of the kinds {', '.join(FIXED_ROPE)}, on whole heads, not {rope}"
    if backend == "reference":
        return None
    ops, device = kernels(), model.device
    if ops is None:
        return "the INT4-FP8 kernels need Triton, which is not installed"
    if backend == "triton":
        able = device.type == "cuda" or not ops.COMPILED
    else:
        able = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if not able:
        return f"the INT4-FP8 kernels need a Hopper GPU, and the model is on {device}"
    weight, attention = model.model.norm.weight, model.model.layers[0].self_attn
    heads = Heads(config.num_attention_heads, config.num_key_value_heads, attention.head_dim)
    return ops.unsupported(heads, weight.dtype)
