"""Linearized models: a transformers family with every attention layer replaced by hybrid linear attention.

Classes are made from the family's own: `KitLlamaConfig`, `KitLlamaModel`, `KitLlamaForCausalLM`, and so on for each of
`FAMILIES`. Projections, biases, norms of q and k, and RoPE stay the family's code; transformers hands us q, k and v
through its attention interface. Names are resolved on first use, so one family does not import the others.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kit.modules.cache import cache_argument
from kit.modules.linear_attention import CacheSlot, HybridLinearAttention
from kit.modules.own_code import CarriesCode

ATTENTION = "kit_linear"
LAYER_TYPE = "hybrid_sliding"  # transformers' name of a cache layer with window keys and a recurrent state
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention function that transformers calls: the layer itself knows how to attend."""
    return module.attend(query, key, value, **kwargs), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Build no T x T mask: layers get the 2-D padding mask as it is."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


class LinearizedAttention:
    """Mixed into a family's attention class: its projections and RoPE, our attention."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.linear_attention = HybridLinearAttention(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=self.head_dim,  # type: ignore[attr-defined]
            window_size=config.sliding_window,
            **config.linear_attention,
        )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Like the family's attention; remembers where the cache stood before this step."""
        slot, cache = None, kwargs.get(cache_argument(kwargs))
        if cache is not None:
            slot = CacheSlot(cache, self.layer_idx, self.config.sliding_window)  # type: ignore[attr-defined]
        return super().forward(hidden_states=hidden_states, cache_slot=slot, **kwargs)  # type: ignore[misc]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        cache_slot: CacheSlot | None = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend and carry the state on.

        Args:
            query: (B, H, T, D).
            key, value: (B, G, S, D) as the cache returned them, S >= P + T.
            scaling: softmax scale.
            cache_slot: this layer's cache, None without one.
            padding_mask: (B, all tokens so far), False or 0 for padding.
            segment_ids: (B, T), for packed sequences.

        Returns:
            (B, T, H, D), as transformers wants it.
        """
        num_past = cache_slot.num_past if cache_slot else 0
        num_keys = num_past + query.shape[2]
        seen_before = cache_slot.num_seen - num_past if cache_slot else 0
        if padding_mask is not None:
            padding_mask = padding_mask[:, seen_before : seen_before + num_keys].bool()
        out, state = self.linear_attention(
            query,
            key[:, :, :num_keys],
            value[:, :, :num_keys],
            scale=scaling,
            state=cache_slot.state if cache_slot else None,
            key_mask=padding_mask,
            segment_ids=segment_ids,
            return_state=cache_slot is not None,
        )
        if cache_slot:
            cache_slot.store(state)
        return out.transpose(1, 2)


class LinearizedPreTrained(CarriesCode):
    """What the base model and the language model share."""

    def _check_and_adjust_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
        return ATTENTION

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, HybridLinearAttention):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


class LinearizedModel(LinearizedPreTrained):
    """Mixed into a family's base model: replaces its attention layers and hands the padding mask down to them."""

    attention_class: type
    masks_by_layer_type: bool  # some families look their mask up by `layer_types`

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for index, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            layer.self_attn = self.attention_class(config, index)
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the family's, with a 2-D `attention_mask` (B, all tokens so far).

        Positions of a left-padded batch are counted from its first real token. Packed sequences are told by
        `position_ids` that start again, as elsewhere in transformers, and do not see each other.

        Raises:
            ValueError: if `attention_mask` is not 2-D.
        """
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be 2-D (B, T), got shape {tuple(attention_mask.shape)}")
        segment_ids = None
        if attention_mask is not None and position_ids is None:
            length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        elif attention_mask is None and position_ids is not None and kwargs.get(cache_argument(kwargs)) is None:
            segment_ids = packed_segments(position_ids)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask={LAYER_TYPE: None} if self.masks_by_layer_type else None,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            padding_mask=attention_mask,
            segment_ids=segment_ids,
            **kwargs,
        )


class LinearizedForCausalLM(LinearizedPreTrained):
    """Mixed into a family's language model."""

    model_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.model_class(config)
        self.post_init()  # type: ignore[attr-defined]

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Keep the 2-D mask: transformers would build a (B, 1, T, T) one for a static cache."""
        return attention_mask

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate. Modes that take tokens back are refused: a recurrent state cannot forget.

        Raises:
            ValueError: on assisted decoding, prompt look-up, or a quantized cache.
        """
        config = kwargs.get("generation_config")
        for option, refused in (
            ("assistant_model", True),
            ("prompt_lookup_num_tokens", True),
            ("assistant_early_exit", True),
            ("cache_implementation", "quantized"),
        ):
            value = kwargs.get(option, getattr(config, option, None))
            if value is not None and (refused is True or value == refused):
                raise ValueError(
                    f"{option}={value if isinstance(value, (str, int)) else type(value).__name__} cannot work on a "
                    "linearized model: its recurrent state cannot be rolled back or quantized\n"
                    f"  where: generate({option}=...)\n"
                    "  next:  leave the option out; sampling, beam search and static caches work"
                )
        return super().generate(*args, **kwargs)  # type: ignore[misc]


def packed_segments(position_ids: Tensor) -> Tensor | None:
    """Number packed sequences: (B, T) positions -> (B, T) sequence numbers, or None if every row is one sequence."""
    restarts = (position_ids[:, 1:] - position_ids[:, :-1]) != 1
    if not restarts.any():
        return None
    return torch.nn.functional.pad(restarts.long().cumsum(-1), (1, 0))


def _family_classes(prefix: str) -> dict[str, type]:
    """Make the config, base model and language model of one family ("Llama" -> KitLlamaConfig, ...)."""
    family = next(name for name, value in FAMILIES.items() if value == prefix)
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    base_config = getattr(configuration, f"{prefix}Config")

    def derive(name: str, *bases: type, **attributes: Any) -> type:
        return type(bases[0])(name, bases, {"__module__": __name__, "__qualname__": name, **attributes})

    config = derive(f"Kit{prefix}Config", base_config, model_type=f"kit_{family}")
    attention = derive(f"Kit{prefix}Attention", LinearizedAttention, getattr(modeling, f"{prefix}Attention"))
    shared = {"config_class": config, "__annotations__": {"config": config}}
    model = derive(
        f"Kit{prefix}Model",
        LinearizedModel,
        getattr(modeling, f"{prefix}Model"),
        attention_class=attention,
        masks_by_layer_type=hasattr(base_config, "layer_types"),
        **shared,
    )
    causal_lm = derive(
        f"Kit{prefix}ForCausalLM",
        LinearizedForCausalLM,
        getattr(modeling, f"{prefix}ForCausalLM"),
        model_class=model,
        **shared,
    )
    return {cls.__name__: cls for cls in (config, attention, model, causal_lm)}


def __getattr__(name: str) -> Any:
    match = re.fullmatch(r"Kit([A-Z]\w*?)(Config|Attention|Model|ForCausalLM)", name)
    if not match or match[1] not in FAMILIES.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    classes = _family_classes(match[1])
    globals().update(classes)
    return classes[name]
