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

from kit.families import TABLE, family_of
from kit.modules.cache import cache_argument
from kit.modules.decoding import DecodingSlot, can_decode, check_rows, in_ring_form, leave_ring_form, token_numbers
from kit.modules.linear_attention import MIXERS, CacheSlot, Mixer, Step, full_attention
from kit.modules.own_code import CarriesCode
from kit.modules.replay import asks_for_more, forget, take_step

ATTENTION = "kit_linear"
# transformers' names of cache layers: window keys and a state; all keys; window keys
LAYER_TYPES = ("hybrid_sliding", "full_attention", "sliding_attention")
FAMILIES = {model_type: family.prefix for model_type, family in TABLE.items()}


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Attention function that transformers calls: the layer itself knows how to attend."""
    return module.attend(query, key, value, **kwargs), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Build no T x T mask: layers get the 2-D padding mask as it is."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


class LinearizedAttention:
    """Mixed into a family's attention class: its projections and RoPE, our attention.

    `config.linear_attention` says what stands in for it: `mixers`, a kind for each layer ("full" is the family's own;
    without the list every layer is "hybrid"), and the options of `MixerOptions`. `base_windows`: for each layer, the
    sliding window of the base model's own attention, or None. `config.sliding_window` is the window of transformers'
    cache layers; a smaller `window_size` of ours may stand in the section.
    """

    linear_attention: Mixer | None

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)  # type: ignore[call-arg]
        options = dict(config.linear_attention)
        kinds, base_windows = options.pop("mixers", None), options.pop("base_windows", None)
        options.setdefault("window_size", config.sliding_window)
        kind = kinds[layer_idx] if kinds else "hybrid"
        self.base_window = base_windows[layer_idx] if base_windows else None
        self.linear_attention = None
        if kind != "full":
            self.linear_attention = MIXERS[kind](
                num_heads=config.num_attention_heads,
                num_key_value_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
                head_dim=self.head_dim,  # type: ignore[attr-defined]
                hidden_size=config.hidden_size,
                **options,
            )

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Like the family's attention; remembers where the cache stood before this step, and what enters the layer."""
        slot: CacheSlot | DecodingSlot | None = None
        cache, mixer = kwargs.get(cache_argument(kwargs)), self.linear_attention
        position = kwargs.pop("token_numbers", None)
        if cache is not None and mixer is not None and self.layer_idx < len(cache.layers):  # type: ignore[attr-defined]
            layer = cache.layers[self.layer_idx]  # type: ignore[attr-defined]
            check_rows(layer)
            softcap = getattr(self, "attn_logit_softcapping", None)
            if position is not None and can_decode(layer, mixer, softcap):
                slot = kwargs[cache_argument(kwargs)] = DecodingSlot(layer, mixer, position)
            elif in_ring_form(layer):
                leave_ring_form(layer, mixer, layer.get_seq_length(), kwargs.get("padding_mask"))
        if cache is not None and slot is None:
            kinds, cached = self.config.layer_types, self.config.sliding_window  # type: ignore[attr-defined]
            if kinds[self.layer_idx] == "full_attention":  # type: ignore[attr-defined]
                cached = None
            own = None if mixer is None else mixer.window_size
            slot = CacheSlot(cache, self.layer_idx, cached, own)  # type: ignore[attr-defined]
        rotary = kwargs.get("position_embeddings")
        if rotary is not None and mixer is not None and mixer.without_rope and not mixer.switched_off:
            kwargs["position_embeddings"] = (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]))
        return super().forward(  # type: ignore[misc]
            hidden_states=hidden_states, cache_slot=slot, rotary=rotary, layer_input=hidden_states, **kwargs
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        cache_slot: CacheSlot | DecodingSlot | None = None,
        padding_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        layer_input: Tensor | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend and carry the state on.

        Args:
            query: (B, H, T, D).
            key, value: (B, G, S, D) as the cache returned them, S >= P + T.
            scaling: softmax scale.
            cache_slot: this layer's cache, None without one; in ring form for a single token on the kernels.
            padding_mask: (B, all tokens so far), False or 0 for padding.
            segment_ids: (B, T), for packed sequences.
            rotary: cos and sin of RoPE (B, T, R).
            layer_input: (B, T, hidden).
            softcap: scores are softcap · tanh(scores / softcap), as Gemma 2 has it.

        Returns:
            (B, T, H, D), as transformers wants it.
        """
        if isinstance(cache_slot, DecodingSlot):
            step = Step(scaling, None, None, None, rotary, layer_input)
            return cache_slot.mixer.decode(query, key, value, step, cache_slot).transpose(1, 2)
        first = cache_slot.num_skipped if cache_slot else 0
        keys = slice(first, first + (cache_slot.num_past if cache_slot else 0) + query.shape[2])
        if padding_mask is not None:
            so_far = (cache_slot.num_seen if cache_slot else 0) + query.shape[2]
            padding_mask = padding_mask[:, :so_far].bool()
        step = Step(scaling, cache_slot, padding_mask, segment_ids, rotary, layer_input, self.base_window, softcap)
        attention = self.linear_attention or full_attention
        return attention(query, key[:, :, keys], value[:, :, keys], step).transpose(1, 2)


class LinearizedConfig:
    """Mixed into a family's config."""

    def standardize_rope_params(self) -> None:
        """As usual; where each kind of layer has a RoPE of its own, ours takes that of full attention."""
        rope = getattr(self, "rope_parameters", None)
        if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
            rope[LAYER_TYPES[0]] = dict(rope["full_attention"])
        super().standardize_rope_params()  # type: ignore[misc]


class LinearizedPreTrained(CarriesCode):
    """What the base model and the language model share."""

    def _check_and_adjust_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
        return ATTENTION

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, Mixer):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


class LinearizedModel(LinearizedPreTrained):
    """Mixed into a family's base model: replaces its attention layers and hands the padding mask down to them."""

    attention_class: type
    masks_by_layer_type: bool  # some families look their mask up by `layer_types`
    replay_steps = True  # single tokens as CUDA graphs where they can be (`kit.modules.replay`)

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        family = family_of(config.model_type)
        for index, layer in enumerate(getattr(self, family.layers)):
            setattr(layer, family.attention, self.attention_class(config, index))
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
        given = input_ids if input_ids is not None else inputs_embeds
        new = 0 if given is None else given.shape[1]
        if attention_mask is not None and position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        elif attention_mask is None and position_ids is not None and kwargs.get(cache_argument(kwargs)) is None:
            segment_ids = packed_segments(position_ids)
        padding_mask = attention_mask
        if attention_mask is not None and not torch.compiler.is_compiling() and bool(attention_mask.all()):
            padding_mask = None  # layers then need not look for padding
        cache: Any = kwargs.get(cache_argument(kwargs))
        numbers = token_numbers(cache, padding_mask, new)
        shared = {
            "attention_mask": dict.fromkeys(LAYER_TYPES) if self.masks_by_layer_type else None,
            "inputs_embeds": inputs_embeds,
            "padding_mask": padding_mask,
            "segment_ids": segment_ids,
            **kwargs,
        }
        if numbers is not None and inputs_embeds is None and not asks_for_more(kwargs, self.config):  # type: ignore[attr-defined]
            forward = super().forward  # type: ignore[misc]

            def step(input_ids: Tensor, position_ids: Tensor, token_numbers: Tensor) -> Any:
                return forward(input_ids=input_ids, position_ids=position_ids, token_numbers=token_numbers, **shared)

            if position_ids is None:  # rows without padding have the same
                position_ids = numbers[:1, None].long()
            return take_step(self, cache, cache_argument(kwargs), step, input_ids, position_ids, numbers)  # type: ignore[arg-type]
        forget(cache)
        return super().forward(input_ids=input_ids, position_ids=position_ids, token_numbers=numbers, **shared)  # type: ignore[misc]


class LinearizedForCausalLM(LinearizedPreTrained):
    """Mixed into a family's language model."""

    model_class: type

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        setattr(self, family_of(config.model_type).base, self.model_class(config))
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
    model_type, family = next((name, family) for name, family in TABLE.items() if family.prefix == prefix)
    place = family.module or model_type
    configuration = importlib.import_module(f"transformers.models.{place}.configuration_{place}")
    modeling = importlib.import_module(f"transformers.models.{place}.modeling_{place}")
    base_config = getattr(configuration, f"{prefix}{family.text}Config")

    def derive(name: str, *bases: type, **attributes: Any) -> type:
        return type(bases[0])(name, bases, {"__module__": __name__, "__qualname__": name, **attributes})

    config = derive(f"Kit{prefix}Config", LinearizedConfig, base_config, model_type=f"kit_{model_type}")
    attention = derive(f"Kit{prefix}Attention", LinearizedAttention, getattr(modeling, f"{prefix}Attention"))
    shared = {"config_class": config, "__annotations__": {"config": config}}
    model = derive(
        f"Kit{prefix}Model",
        LinearizedModel,
        getattr(modeling, f"{prefix}{family.text}Model"),
        attention_class=attention,
        masks_by_layer_type=hasattr(base_config, "layer_types"),
        **shared,
    )
    causal_lm = derive(
        f"Kit{prefix}ForCausalLM",
        LinearizedForCausalLM,
        getattr(modeling, f"{prefix}{family.causal_lm}"),
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
