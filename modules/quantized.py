"""What a quantized checkpoint runs on: linears of packed INT4 or FP8 weights, FP8 queries and the packed INT4 cache.

`quantize_modules` puts them into a model of any family, as a `quantization_config` in compressed-tensors' terms says.
What goes beyond that standard is how queries are rounded and how keys and values are encoded; it stands under the key
"kit", which other readers ignore, since it changes no weight:

    {"query": "fp8" or null, "center": bool, "rotate": bool, "post_rope": bool, "shape": bool, "window": int,
     "table": bool}

(and "names", see `quantize_modules`).

Its tensors lie in a file of their own, SIDECAR. A checkpoint of `quant_method: "kit"` holds them among its weights,
has a model_type of its own, and carries this code, so that it runs the same where `kit` was never installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from kit.kernels.int4_fp8 import (
    dequantize_kv,
    dequantize_weight,
    dequantized_linear,
    hadamard,
    per_tensor_factor,
    quantize_kv,
    round_activations,
    table_weight,
    unpack_int4,
    unpack_int8,
)
from kit.modules.cache import cache_argument
from kit.modules.experts import separate_experts

METHOD = "kit"
ATTENTION = "kit_quantized"
QUERY_BLOCK = 512  # queries that attend at a time where some keys are read in two forms
SIDECAR, SIDECAR_MARK = "kit_cache.safetensors", ".quantization."
FAMILIES = {
    "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}  # fmt: skip
ABLATIONS = {  # name: what is switched off
    "16-bit keys and values": ("kv",),
    "weights only": ("kv", "query", "activations"),
}


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Return rounding(x), whose gradient is taken as that of x (the straight-through estimator, arXiv:1308.3432)."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounding(x)
    with torch.no_grad():
        change = rounding(x) - x
    return x + change


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored as compressed-tensors stores it; shapes N output, K input features.

    Parameters: INT4 has weight_packed (N, ceil(K / 8)) int32, weight_scale (N, K / g), weight_shape (2,) int64 and,
    with zero points, weight_zero_point (ceil(N / 8), K / g) int32, packed along its first dimension. INT8 has
    weight_packed (N, ceil(K / 4)) int32, weight_scale (N, 1) and weight_shape. FP8 has weight
    (N, K) e4m3 and weight_scale (N, 1). Both may have bias (N,).

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        weights: the `weights` of a config group.
        fp8_inputs: round the input to FP8, one scale a token.
        table: multiply with products rounded to e4m3, as FireQ's look-up kernel does.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weights: dict[str, Any],
        fp8_inputs: bool,
        table: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fp8_inputs, self.table, self.quantize_inputs = fp8_inputs, table, True
        self.int4, self.int8 = (weights["type"] == "int" and weights["num_bits"] == bits for bits in (4, 8))
        groups = in_features // weights["group_size"] if weights["strategy"] == "group" else 1

        def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        if self.int4 or self.int8:
            each = 8 if self.int4 else 4
            self.weight_packed = parameter(out_features, -(-in_features // each), dtype=torch.int32)
            self.weight_shape = parameter(2, dtype=torch.int64)
            if not weights["symmetric"]:
                self.weight_zero_point = parameter(-(-out_features // 8), groups, dtype=torch.int32)
        else:
            self.weight = parameter(out_features, in_features, dtype=torch.float8_e4m3fn)
        self.weight_scale = parameter(out_features, groups)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self._dense: Tensor | None = None
        self._codes: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Return the weight, (N, K) fp32. Codes stay unpacked while scales are trained."""
        if self.int8:
            return unpack_int8(self.weight_packed, self.in_features).float() * self.weight_scale.float()
        if not self.int4:
            return self.weight.float() * self.weight_scale.float()
        codes = unpack_int4(self.weight_packed, self.in_features) if self._codes is None else self._codes
        self._codes = codes if self.weight_scale.requires_grad else None
        zero = getattr(self, "weight_zero_point", None)
        if zero is not None:
            zero = unpack_int4(zero.T, self.out_features).T
        weight, scale = dequantize_weight(codes, self.weight_scale, zero), self.weight_scale
        if self.table:
            return straight_through(weight, lambda _: table_weight(codes, scale, per_tensor_factor(scale)))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N). On a CPU the dequantized weight is kept after the first call; on a GPU it is not."""
        trained = torch.is_grad_enabled() and self.weight_scale.requires_grad
        if self._dense is None or self._dense.device != x.device or trained:
            dense = self.dequantize()
            self._dense = dense if x.device.type == "cpu" and not trained else None
        else:
            dense = self._dense
        inputs = x.float()
        if self.fp8_inputs and self.quantize_inputs:
            if not (trained or (torch.is_grad_enabled() and x.requires_grad)):
                return dequantized_linear(x, dense, self.bias)
            inputs = straight_through(inputs, round_activations)
        y = F.linear(inputs, dense, None if self.bias is None else self.bias.float())
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and format, for print(model)."""
        group = self.in_features // self.weight_scale.shape[1]
        weight = f"INT4, groups of {group}" if self.int4 else "INT8" if self.int8 else "FP8"
        return f"{self.in_features}, {self.out_features}, {weight}, inputs {'FP8' if self.fp8_inputs else '16 bit'}"


# ---- attention: FP8 queries, INT4 keys and values


class AttentionQuantization(nn.Module):
    """How one attention layer's queries, keys and values are rounded; `self_attn.quantization` of a quantized model.

    None of what is done to keys changes attention, but for rounding: queries undo scales and rotations, and a vector
    that is taken from all keys adds the same number to all scores of a query, which softmax does not see.

    Parameters, G key/value heads, D head dim, each there if its option is on:
        key_mean: (G, D), taken from keys after RoPE (`center`).
        key_scale: (G, D), multiplies keys and divides queries after RoPE (FireQ, section 3.3; `post_rope`).
        key_order, value_order: (G, D) int32, and key_factor, value_factor: (G, D, D), the noise shaping of
        `quantize_kv`
            (`shape`).

    Args:
        kv: the `kv_cache_scheme`, or None for a 16-bit cache: dynamic INT4, or FP8 with a fixed scale (`fixed_fp8`).
        options: the key "kit" of the quantization config.
        heads: (G, D).
    """

    key_mean: nn.Parameter | None
    key_scale: nn.Parameter | None
    key_order: nn.Parameter | None
    value_order: nn.Parameter
    key_factor: nn.Parameter
    value_factor: nn.Parameter

    def __init__(self, kv: dict[str, Any] | None, options: dict[str, Any], heads: tuple[int, int]) -> None:
        super().__init__()
        self.kv, self.query_fp8, self.rotate = kv, options.get("query") == "fp8", bool(options.get("rotate"))
        self.window = int(options.get("window") or 0)
        self.quantize_kv = self.quantize_query = True
        g, d = heads

        def parameter(name: str, option: str, *shape: int, dtype: torch.dtype | None = None) -> None:
            made = torch.zeros(*shape, dtype=dtype) if options.get(option) else None
            self.register_parameter(name, None if made is None else nn.Parameter(made, requires_grad=False))

        parameter("key_mean", "center", g, d)
        parameter("key_scale", "post_rope", g, d)
        for name in ("key", "value"):
            parameter(f"{name}_order", "shape", g, d, dtype=torch.int32)
            parameter(f"{name}_factor", "shape", g, d, d)

    @property
    def fixed_fp8(self) -> bool:
        """Whether keys and values are e4m3 multiples of `k_scale` and `v_scale`, (1,) of the attention layer.

        The cache holds those numbers in 16 bits.
        """
        return bool(self.kv and self.kv["type"] == "float")

    @property
    def symmetric(self) -> bool:
        """Whether keys and values have no zero point."""
        return bool(self.kv and self.kv["symmetric"])

    def keys(self, k: Tensor) -> Tensor:
        """Centre, scale and rotate keys (B, G, T, D) after RoPE, before they are rounded."""
        if self.key_mean is not None:
            k = (k.float() - self.key_mean.float()[:, None]).to(k.dtype)
        if self.key_scale is not None:
            k = (k.float() * self.key_scale.float()[:, None]).to(k.dtype)
        return _rotate(k) if self.rotate else k

    def queries(self, q: Tensor) -> Tensor:
        """Undo scale and rotation on queries (B, H, T, D), and round them."""
        if self.key_scale is not None:
            scale = self.key_scale.float().repeat_interleave(q.shape[1] // len(self.key_scale), dim=0)
            q = (q.float() / scale[:, None]).to(q.dtype)
        if self.rotate:
            q = _rotate(q)
        return straight_through(q, round_activations) if self.query_fp8 and self.quantize_query else q

    def pack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize keys and values (B, G, T, D) as the cache stores them, in one pass."""
        shaping: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.key_order is not None:
            shaping = torch.cat([self.key_order, self.value_order]), torch.cat([self.key_factor, self.value_factor])
        packed = quantize_kv(torch.cat([k, v], dim=1), self.symmetric, *shaping)
        return packed.split(k.shape[1], dim=1)

    def round(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache would give back of keys and values (B, G, T, D); gradients pass."""
        with torch.no_grad():
            stored_k, stored_v = (self.unpack(x, k.dtype) for x in self.pack(k, v))
        return straight_through(k, lambda _: stored_k), straight_through(v, lambda _: stored_v)

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo `pack` for keys or for values."""
        return dequantize_kv(packed, self.symmetric, dtype)


@lru_cache
def _rotation(size: int, device: torch.device) -> Tensor:
    return hadamard(size).to(device, torch.float32)


def rotation_signs(size: int, device: torch.device) -> Tensor:
    """√size times the rotation of heads, (size, size), of ±1."""
    return (_rotation(size, device) * size**0.5).round()


def _joined(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([before[0], after[0]], dim=2), torch.cat([before[1], after[1]], dim=2)


def _rotate(x: Tensor) -> Tensor:
    return (x.float() @ _rotation(x.shape[-1], x.device)).to(x.dtype)


class _Packed:
    """Mixed into a cache layer of transformers: keys and values are stored as `quantize_kv` packs them.

    The latest also stay as they were (`latest`, two tensors (B, G, up to window - 1, D)): they are read unrounded.
    """

    quantization: AttentionQuantization
    latest: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, G, T, D) and return all of them, dequantized.

        `latest` holds all that these T queries may read unrounded, until `forget` cuts it to what the next may.
        """
        new = (key_states, value_states)
        keys, values = super().update(*self.quantization.pack(*new), *args, **kwargs)  # type: ignore[misc]
        if self.quantization.window:
            self.latest = new if self.latest is None else _joined(self.latest, new)
        return tuple(self.quantization.unpack(x, key_states.dtype) for x in (keys, values))  # type: ignore[return-value]

    def forget(self) -> None:
        """Keep unrounded what is in the window of the next query."""
        self._change_latest(lambda x: x[:, :, max(x.shape[2] - self.quantization.window + 1, 0) :])

    def _change_latest(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.latest is not None:
            self.latest = change(self.latest[0]), change(self.latest[1])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As transformers' layer does, the unrounded part too; so the methods below."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change_latest(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change_latest(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change_latest(lambda x: x[indices, ...])

    def crop(self, *args: Any) -> None:
        """Take tokens back; those that had left the window stay rounded."""
        before = self.get_seq_length()  # type: ignore[attr-defined]
        super().crop(*args)  # type: ignore[misc]
        removed = before - self.get_seq_length()  # type: ignore[attr-defined]
        self._change_latest(lambda x: x[:, :, : max(x.shape[2] - removed, 0)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self.latest = None


class Int4Layer(_Packed, DynamicLayer):
    """A growing cache layer of packed INT4 keys and values."""

    def __init__(self, quantization: AttentionQuantization) -> None:
        super().__init__()
        self.quantization = quantization


class Int4SlidingWindowLayer(_Packed, DynamicSlidingWindowLayer):
    """A sliding-window cache layer of packed INT4 keys and values."""

    def __init__(self, sliding_window: int, quantization: AttentionQuantization) -> None:
        super().__init__(sliding_window)
        self.quantization = quantization


class _QuantizingCache:
    """Stands in for the cache during one attention call: what is written to it, or used without it, is rounded once.

    `latest` holds the last keys and values unrounded, where several queries read them so, each within its own window.
    """

    def __init__(self, attention: Any, cache: Any) -> None:
        self.attention, self.quantization, self.cache = attention, attention.quantization, cache
        self.latest: tuple[Tensor, Tensor] | None = None

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k = self.quantization.keys(k)
        if self.quantization.kv is None or not self.quantization.quantize_kv:
            return (k, v) if self.cache is None else self.cache.update(k, v, layer_idx, *args, **kwargs)
        if self.quantization.fixed_fp8:
            k, v = (_to_fp8(x, scale) for x, scale in ((k, self.attention.k_scale), (v, self.attention.v_scale)))
            return (k, v) if self.cache is None else self.cache.update(k, v, layer_idx, *args, **kwargs)
        if self.cache is None:
            rounded, latest = self.quantization.round(k, v), (k, v)
        elif self._packed_layer(layer_idx):
            layer = self.cache.layers[layer_idx]
            rounded, latest = self.cache.update(k, v, layer_idx, *args, **kwargs), layer.latest
            layer.forget()
        else:  # of fixed size: it holds rounded numbers, the latest too
            return self.cache.update(*self.quantization.round(k, v), layer_idx, *args, **kwargs)
        return self._unrounded(rounded, latest, k.shape[2])

    def _unrounded(self, all_: tuple[Tensor, Tensor], latest: Any, queries: int) -> tuple[Tensor, Tensor]:
        """Put the latest keys and values where they are read; with several queries, that is left to the attention."""
        if not self.quantization.window:
            return all_
        latest = tuple(x[:, :, -all_[0].shape[2] :] for x in latest)  # a sliding window may hold fewer
        if queries > 1 and all_[0].shape[2] > self.quantization.window:
            self.latest = latest
            return all_
        return tuple(torch.cat([x[:, :, : -y.shape[2]], y], 2) for x, y in zip(all_, latest, strict=True))  # type: ignore[return-value]

    def _packed_layer(self, index: int) -> bool:
        """Whether the cache packs this layer; an empty growing layer is replaced by one that does."""
        layers = self.cache.layers
        while len(layers) <= index and self.cache.layer_class_to_replicate is not None:
            layers.append(self.cache.layer_class_to_replicate())
        layer = layers[index]
        if not layer.is_initialized:
            if type(layer) is DynamicLayer:
                layers[index] = Int4Layer(self.quantization)
            elif type(layer) is DynamicSlidingWindowLayer:
                layers[index] = Int4SlidingWindowLayer(layer.sliding_window, self.quantization)
        return isinstance(layers[index], _Packed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """The nearest e4m3 multiples of a scale (1,), the largest where there is none."""
    largest = torch.finfo(torch.float8_e4m3fn).max

    def rounding(x: Tensor) -> Tensor:
        multiples = (x.float() / scale.float()).clamp(-largest, largest).to(torch.float8_e4m3fn)
        return (multiples.float() * scale.float()).to(x.dtype)

    return straight_through(x, rounding)


def _quantize_cache(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of an attention layer."""
    name = cache_argument(kwargs)
    cache = _QuantizingCache(module, kwargs.get(name))
    return args, {**kwargs, name: cache, "quantizing_cache": cache}


def _attention(inner: str) -> str:
    """Register attention that rounds queries and then runs the implementation `inner`; return its name."""
    name = f"{ATTENTION}_{inner}"

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        quantizing_cache: _QuantizingCache | None = None,
        **kwargs: Any,
    ) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(inner, _eager(module))
        if quantizing_cache is not None:
            query = quantizing_cache.quantization.queries(query)
            if quantizing_cache.latest is not None:
                window, latest = quantizing_cache.quantization.window, quantizing_cache.latest
                return _attend_in_two_forms(module, query, (key, value), latest, attention_mask, window, **kwargs), None
        return attend(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    return name


def _attend_in_two_forms(
    module: nn.Module,
    query: Tensor,
    rounded: tuple[Tensor, Tensor],
    latest: tuple[Tensor, Tensor],
    attention_mask: Any,
    window: int,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention that reads the last `window` keys before each query unrounded and those before them rounded.

    A block of queries attends to the rounded keys, then to the unrounded ones, with a mask that lets each query see
    every key in one form; no tensor is quadratic in T.

    Args:
        module: the attention layer.
        query: (B, H, T, D).
        rounded: all S keys and values, (B, G, S, D).
        latest: the last of them, unrounded, (B, G, R, D); R is min(S, window - 1 + T), or less after a `crop`.
        attention_mask: as transformers makes it for the implementation: None (causal), (B, S) padding, or
            (B or 1, 1, T, S) of bool or of numbers to add.
        window: keys, the query's own included.
        sliding_window: keys that may be seen at all, where no 4-D mask says it.
        kwargs: of the attention implementation.

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: on a mask of another kind (flex attention's).
    """
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"the INT4 cache cannot read a mask of type {type(attention_mask).__name__}\n"
            "  where: attn_implementation\n"
            '  next:  load the model with attn_implementation="sdpa"'
        )
    num_queries, num_keys = query.shape[2], rounded[0].shape[2]
    past, first = num_keys - num_queries, num_keys - latest[0].shape[2]
    kwargs["is_causal"] = False  # the mask says it
    attend, outputs = ALL_ATTENTION_FUNCTIONS["sdpa"], []
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        end = past + stop
        old, near = max(end - window, first, 0), max(past + start - window + 1, first)
        rows = torch.arange(past + start, end, device=query.device)[:, None]
        columns = torch.cat([torch.arange(old, device=query.device), torch.arange(near, end, device=query.device)])
        distance = rows - columns
        is_rounded = torch.arange(len(columns), device=query.device) < old
        visible = ((distance >= window) | (columns < first)) == is_rounded
        if attention_mask is None or attention_mask.ndim == 2:
            visible = visible & (distance >= 0) & (distance < (sliding_window or num_keys))
            if attention_mask is not None:
                visible = visible & attention_mask[:, None, None, columns].bool()
        else:
            given = attention_mask[:, :, start:stop, columns]
            visible = visible & (given if given.dtype == torch.bool else given == 0)
        if visible.ndim == 2:
            visible = visible[None, None]
        keys, values = (
            torch.cat([x[:, :, :old], y[:, :, near - first : end - first]], dim=2)
            for x, y in zip(rounded, latest, strict=True)
        )
        outputs.append(attend(module, query[:, :, start:stop], keys, values, visible, **kwargs)[0])
    return torch.cat(outputs, dim=1)


def _eager(module: nn.Module) -> Any:
    import sys

    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


# ---- into a model


def quantize_modules(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Replace a model's linears and hook its attention, as a quantization config says. Weights are left empty.

    Experts become linears of their own first. A config names modules as the hub's files do: what those call otherwise
    stands under "names" of the key "kit", our word and theirs ({"mlp": "block_sparse_moe", ...}).

    Args:
        model: a causal language model, usually on the meta device.
        config: `quantization_config` of config.json.

    Raises:
        ValueError: on a scheme that is none of W4A16, W4AFP8 and FP8.
    """
    extra = config.get("kit") or {}
    for name, module in list(separate_experts(model).named_modules()):
        stored = ".".join((extra.get("names") or {}).get(word, word) for word in name.split("."))
        if not isinstance(module, nn.Linear) or _matches(stored, module, config.get("ignore") or []):
            continue
        group = next((g for g in config["config_groups"].values() if _matches(stored, module, g["targets"])), None)
        if group is None:
            continue
        inputs = group["input_activations"]
        check_scheme(group)
        parent, _, child = name.rpartition(".")
        with torch.device(module.weight.device):
            linear = QuantizedLinear(
                module.in_features,
                module.out_features,
                module.bias is not None,
                group["weights"],
                inputs is not None,
                bool(extra.get("table")),
            )
        setattr(model.get_submodule(parent), child, linear.to(module.weight.dtype))
    quantize_attention(model, model.config, config)
    return model


def quantize_attention(module: nn.Module, model_config: Any, config: dict[str, Any]) -> None:
    """Hook the attention layers inside `module` as a quantization config says; a model of no such layer stays as it is.

    Args:
        module: a model or one of its layers.
        model_config: transformers' config of the model; its attention implementation is wrapped.
        config: `quantization_config` of config.json.
    """
    kv, extra = config.get("kv_cache_scheme"), config.get("kit") or {}
    if not (kv or extra.get("query")):
        return
    text = model_config.get_text_config(decoder=True)
    heads = (text.num_key_value_heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    check_kv_scheme(kv, heads[1])
    inner = model_config._attn_implementation or "sdpa"
    if not inner.startswith(ATTENTION):
        model_config._attn_implementation = _attention(inner)
    attention: Any
    for attention in list(module.modules()):
        if hasattr(attention, "layer_idx") and hasattr(attention, "o_proj"):
            attention.config._attn_implementation = model_config._attn_implementation  # a copied layer has its own
            with torch.device(next(attention.parameters()).device):
                attention.quantization = AttentionQuantization(kv, extra, heads)
                if attention.quantization.fixed_fp8:
                    for name in ("k_scale", "v_scale"):
                        attention.register_parameter(name, nn.Parameter(torch.ones(1), requires_grad=False))
            attention.register_forward_pre_hook(_quantize_cache, with_kwargs=True)


def check_scheme(group: dict[str, Any]) -> None:
    """Refuse a config group that these modules do not compute.

    Raises:
        ValueError: naming what is not supported.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    int4 = (weights["num_bits"], weights["type"], weights["strategy"] in ("group", "channel")) == (4, "int", True)
    fp8 = (weights["num_bits"], weights["type"], weights["strategy"]) == (8, "float", "channel")
    int8 = (weights["num_bits"], weights["type"], weights["strategy"]) == (8, "int", "channel") and inputs is None
    known = inputs is None or (inputs["num_bits"], inputs["type"], inputs["strategy"], inputs["dynamic"]) == (
        8, "float", "token", True
    )  # fmt: skip
    plain = int4 or weights["symmetric"]
    if not ((int4 or fp8 or int8) and known and plain) or weights.get("actorder") == "group":
        raise ValueError(f"weights {weights} with inputs {inputs} are none of W4A16, W4AFP8, FP8 and W8A16")


def check_kv_scheme(kv: dict[str, Any] | None, head_dim: int) -> None:
    """Refuse a `kv_cache_scheme` that these modules do not compute.

    Raises:
        ValueError: naming what is supported.
    """
    kv = kv or {}
    kind = tuple(kv.get(key) for key in ("num_bits", "type", "strategy", "dynamic"))
    ours = kind == (4, "int", "group", True) and kv.get("group_size") == head_dim
    if kv and not (ours or (kind == (8, "float", "tensor", False) and kv.get("symmetric"))):
        told = ", ".join(f"{key} {kv.get(key)}" for key in ("num_bits", "type", "strategy", "group_size", "dynamic"))
        raise ValueError(
            f"kv_cache_scheme ({told}) is neither dynamic INT4 with a scale a token and head nor FP8 with a fixed scale"
        )


def _matches(name: str, module: nn.Module, targets: list[str]) -> bool:
    """compressed-tensors' rule: a full name, a class name, or a regular expression behind `re:`."""
    return any(
        re.match(target[3:], name) is not None if target.startswith("re:") else target in (name, type(module).__name__)
        for target in targets
    )


@contextmanager
def switched_off(model: nn.Module, parts: tuple[str, ...]) -> Iterator[None]:
    """Compute without the rounding of some parts: "kv", "query", "activations"."""
    for on in (False, True):
        for module in model.modules():
            if isinstance(module, QuantizedLinear) and "activations" in parts:
                module.quantize_inputs = on
            if isinstance(module, AttentionQuantization):
                module.quantize_kv = on or "kv" not in parts
                module.quantize_query = on or "query" not in parts
        if not on:
            yield


# ---- transformers


class KitQuantizationConfig(QuantizationConfigMixin):
    """A `quantization_config` for `quantize_modules`, as from_pretrained hands it around."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update({**values, "quant_method": METHOD})


class KitQuantizer(HfQuantizer):
    """Lets from_pretrained build the modules above and load the packed tensors into them."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if getattr(self.quantization_config, "sidecar", False):  # `kit.load` fills these in, and checks that it did
            model._keys_to_ignore_on_load_missing.add(re.escape(SIDECAR_MARK))
        return quantize_modules(model, dict(self.quantization_config.__dict__))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Cast what transformers before 5.21 leaves in the file's dtype: tensors whose names were changed."""
        dtype = model.get_input_embeddings().weight.dtype
        for parameter in model.parameters():
            if parameter.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(dtype)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Give stored names our words, and merge no experts."""
        names = (getattr(self.quantization_config, "kit", None) or {}).get("names") or {}
        merges = ("experts.gate_up_proj", "experts.down_proj")
        kept = [c for c in weight_conversions if not any(str(t).endswith(merges) for t in c.target_patterns)]
        return [*kept, *(WeightRenaming(rf"\.{theirs}\.", f".{ours}.") for ours, theirs in names.items())]

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Saving is refused: only `kit quantize` writes this format."""
        raise ValueError(
            "a loaded quantized model cannot be saved again\n"
            "  where: save_pretrained\n"
            "  next:  copy the checkpoint's folder, or run `kit quantize` on the original model"
        )

    @property
    def is_trainable(self) -> bool:
        """No: weights are integers."""
        return False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Compute in the dtype that was asked for."""
        return dtype


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # transformers may run this file twice in one load
    register_quantization_config(METHOD)(KitQuantizationConfig)
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(KitQuantizer)


def __getattr__(name: str) -> Any:
    """Make KitQuantized{Family}Config, ...Model and ...ForCausalLM: the family's own classes under another model_type.

    The type is what keeps a transformers without this code from loading a checkpoint of ours with random weights.
    """
    match = re.fullmatch(r"KitQuantized([A-Z]\w*?)(Config|Model|ForCausalLM)", name)
    family = next((f for f, prefix in FAMILIES.items() if match and match[1] == prefix), None)
    if match is None or family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    prefix = f"KitQuantized{match[1]}"
    config = type(
        f"{prefix}Config",
        (getattr(transformers, f"{match[1]}Config"),),
        {"model_type": f"kit_quantized_{family}", "__module__": __name__},
    )
    globals()[config.__name__] = config
    for kind in ("Model", "ForCausalLM"):
        base = getattr(transformers, f"{match[1]}{kind}")
        globals()[f"{prefix}{kind}"] = type(
            f"{prefix}{kind}", (base,), {"config_class": config, "__module__": __name__}
        )
    return globals()[name]
