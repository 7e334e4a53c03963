"""What stands in for softmax attention in a linearized layer, and its place in transformers' cache.

Every kind of layer is a `Mixer`: it gets q, k and v from the family's own projections and returns the heads' outputs.

| kind | attends to | method |
|---|---|---|
| `window` | the last keys and the first ones (sinks), through softmax; nothing is learned | arXiv:2309.17453 |
| `hybrid` | the same, and all between through linear attention, under one denominator | LoLCATs, arXiv:2410.10254 |
| `linear` | everything through linear attention | Hedgehog, arXiv:2402.04347 |
| `gated` | everything through decaying linear attention, plus a window with meta memory | Lizard, arXiv:2507.09025 |
| `full` | everything through softmax: the family's attention, kept | |

Letters: B batch, T time, P keys before the first query, H query heads, G key/value heads, L feature-map key heads (G or
H), D head dim, F feature dim, S sinks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.kernels.linear_attention import (
    Sinks,
    gated_linear_attention,
    hedgehog_feature_map,
    hybrid_attention,
    sequence_bounds,
)
from kit.kernels.linear_attention.dispatch import StepOps, step_ops
from kit.modules.decoding import DecodingSlot

NOTHING = -1e30  # logarithm of a weight of 0; two infinite ones have no sum that can be differentiated
QUERIES_AT_ONCE = 1024  # of capped attention, whose scores are made for a chunk of queries at a time


@dataclass
class MixerOptions:
    """Shapes of a layer, and the `linear_attention` section of config.json.

    Attributes:
        num_heads, num_key_value_heads, head_dim, hidden_size: H, G, D, and the width of the hidden states.
        window_size: keys a query sees through softmax, itself included, sinks apart.
        num_sinks: S, first keys of a sequence that stay visible.
        feature_dim: columns of a feature map, F/2.
        feature_map_heads: "kv": one key map and one state a key/value head; "query": a query head.
        window_factor: starting value of the mixing factor g of `hybrid`.
        linear_weight, window_weight: scale the branches; 0 takes one away.
        meta_tokens: of `gated`: tokens that add to the window's denominator and have no value.
        window_rope: of `gated`: the window keeps RoPE. The linear branch never has it.
        gate_bias: of `gated`: a fresh gate's bias; 4: γ = 0.982, half of the weight is left after 38 tokens.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int = 0
    window_size: int = 64
    num_sinks: int = 0
    feature_dim: int = 64
    feature_map_heads: str = "kv"
    window_factor: float = 0.1
    linear_weight: float = 1.0
    window_weight: float = 1.0
    meta_tokens: int = 4
    window_rope: bool = False
    gate_bias: float = 4.0

    @property
    def num_states(self) -> int:
        """L."""
        return self.num_key_value_heads if self.feature_map_heads == "kv" else self.num_heads


@dataclass
class Step:
    """What a layer has to know of a forward pass beside q, k and v.

    Attributes:
        scale: softmax scale.
        slot: this layer's cache; None without one.
        padding_mask: (B, all tokens so far), False for padding.
        segment_ids: (B, T), for packed sequences.
        rotary: cos and sin (B, T, R) of the new tokens.
        hidden: (B, T, hidden), what enters the layer.
        base_window: keys that a query of the base model sees in this layer, itself included; None: all.
        softcap: scores are softcap · tanh(scores / softcap); None: as they are.
    """

    scale: float
    slot: CacheSlot | None = None
    padding_mask: Tensor | None = None
    segment_ids: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    hidden: Tensor | None = None
    base_window: int | None = None
    softcap: float | None = None

    def real_keys(self, num_keys: int) -> Tensor | None:
        """(B, num_keys), False where one of the last keys is padding; None if there is none."""
        return None if self.padding_mask is None else self.padding_mask[:, -num_keys:]


class CacheSlot:
    """One layer of transformers' cache: window keys, kept by transformers, and what else a layer carries, kept by us.

    `hybrid_sliding` layers hold both. Dynamic and static layers return the keys of a step in the same order, first the
    oldest one still in the window, so `num_past` and the slice to valid keys are all that differs. What we keep is one
    fp32 tensor (B, numbers): several tensors, flattened, so that beam search and static caches move them as one.

    Args:
        cache: the model's `past_key_values`.
        layer_idx: which layer.
        cached_window: the window of transformers' layer; None for a layer that keeps everything and carries nothing.
        window_size: the window of a layer that carries a state, where that is smaller; None for one that carries none.

    Raises:
        ValueError: if the cache was not built from this model's config.
    """

    def __init__(self, cache: Any, layer_idx: int, cached_window: int | None, window_size: int | None = None) -> None:
        self.cache, self.layer_idx = cache, layer_idx
        layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
        if window_size is not None and not hasattr(layer, "recurrent_states"):
            raise ValueError(
                f"layer {layer_idx} needs a cache with a recurrent state, got {type(layer).__name__}\n"
                f"  where: past_key_values ({type(cache).__name__})\n"
                "  next:  pass DynamicCache(config=model.config), or leave past_key_values out"
            )
        self.layer = layer
        self.num_seen = int(cache.get_seq_length(layer_idx))  # static layers give a tensor that changes later
        cached = self.num_seen if cached_window is None else min(self.num_seen, cached_window - 1)
        self.num_past = cached if window_size is None else min(cached, window_size - 1)
        self.num_skipped = cached - self.num_past  # keys that the cache still has, and the layer's window has not

    def load(self, *shapes: tuple[int, ...]) -> list[Tensor] | None:
        """Return the tensors (B, *shape), fp32, that the last step left; None at the start.

        Raises:
            ValueError: if the last step left none: it was a packed batch.
        """
        if not self.num_seen or not shapes:
            return None
        if not self.layer.is_recurrent_states_initialized[0]:
            raise ValueError(
                "a packed batch cannot be continued: it has no single state\n"
                "  where: past_key_values\n"
                "  next:  pass sequences as padded rows with an attention_mask"
            )
        parts = self.layer.recurrent_states[0].split([math.prod(shape) for shape in shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]

    def store(self, *tensors: Tensor) -> None:
        """Keep tensors (B, ...) for the next step."""
        flat = torch.cat([tensor.flatten(1).float() for tensor in tensors], 1)
        self.cache.update_recurrent_state(flat, self.layer_idx)


class Carried(NamedTuple):
    """What a layer hands from one step to the next, beside the window's keys.

    Attributes:
        sink_k, sink_v: (B, G, S, D), the first real tokens of each row.
        state: (B, L, F, D + 1), fp32: what has come through φ.
    """

    sink_k: Tensor | None = None
    sink_v: Tensor | None = None
    state: Tensor | None = None


class Mixer(nn.Module):
    """A kind of attention.

    Attributes:
        options: shapes and the config's section.
        linear_weight, window_weight: 1 and 1 normally; see `branch_weights`.
        without_rope: q and k come as they are before RoPE.
        switched_off: the base's attention runs in its place; see `original_attention`.
        features: F, of the state that the layer carries; 0 for none.
        ring: it looks at the window's keys.
        past_of_window: the state has the keys that have left the window, not all.
    """

    without_rope = False
    switched_off = False
    features = 0
    ring, past_of_window = True, False

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = MixerOptions(**options)
        self.linear_weight, self.window_weight = self.options.linear_weight, self.options.window_weight
        self.window_size, self.num_sinks = self.options.window_size, self.options.num_sinks

    def reset_parameters(self) -> None:
        """Give parameters their starting values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """Attend and carry on what the next step needs.

        Args:
            q: (B, H, T, D).
            k, v: (B, G, P + T, D): keys that the cache still has, then the new ones.
            step: the rest.

        Returns:
            (B, H, T, D).

        Raises:
            ValueError: if a cached sequence is continued while the layer is switched off.
        """
        if self.switched_off:
            if step.slot is not None and step.slot.num_seen:
                raise ValueError("a cache does not have the keys that the base's attention needs; pass use_cache=False")
            return full_attention(q, k, v, step)
        if step.slot is None or step.segment_ids is not None:
            return self.attend(q, k, v, replace(step, slot=None), None)[0]
        shapes = self.carried_shapes()
        kept = step.slot.load(*shapes.values())
        carried = None if kept is None else Carried(**dict(zip(shapes, kept, strict=True)))
        out, new = self.attend(q, k, v, step, carried)
        if shapes:
            found = new._asdict()
            absent = {name: v.new_zeros(len(v), *shape) for name, shape in shapes.items() if found[name] is None}
            step.slot.store(*[(found | absent)[name] for name in shapes])
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Return the output, and with a cache what to carry on."""
        raise NotImplementedError

    def decode(self, q: Tensor, k: Tensor, v: Tensor, step: Step, slot: DecodingSlot) -> Tensor:
        """Attend from a single token on the kernels of one launch: (B, H, 1, D); k and v (B, G, 1, D) are the token's.

        Both branches count as they are, and scores have no cap; see `can_decode`.
        """
        raise NotImplementedError

    def _steps(self, v: Tensor) -> StepOps:
        ops = step_ops(v)
        assert ops is not None
        return ops

    def _decode_window(self, q: Tensor, k: Tensor, v: Tensor, step: Step, slot: DecodingSlot, **options: Any) -> Tensor:
        """`hybrid_step` of a window without a linear past."""
        ops = self._steps(v)
        maps = [q.new_empty(1).expand(x.shape[1], q.shape[-1], 16) for x in (q, k)]  # they are not looked at
        token = (x[:, :, 0].to(v.dtype) for x in (q, k, v))
        factor = torch.zeros(q.shape[1], device=q.device)
        out = ops.hybrid_step(
            *token, *maps, factor, slot.window(ops), slot.position, scale=step.scale, linear_weight=0.0, **options
        )
        return out[:, :, None]

    def _decode_linear(
        self, q: Tensor, k: Tensor, v: Tensor, slot: DecodingSlot, maps: Any, log_gate: Tensor | None = None
    ) -> Tensor:
        """`gated_step`; log_gate (B, L)."""
        token = (x[:, :, 0].to(v.dtype) for x in (q, k, v))
        return self._steps(v).gated_step(*token, log_gate, *slot.states, slot.position, *maps)[:, :, None]

    def log_weights(self, q: Tensor, k: Tensor, step: Step, start: int, stop: int) -> Tensor:
        """Logarithms of what each key counts for queries start to stop: (B, H, C, D) of (B, H, T, D) -> (B, H, C, T).

        For losses on attention weights; whole sequences only. exp(·) @ v is the layer's output.
        """
        raise NotImplementedError

    def _log_window(self, q: Tensor, k: Tensor, step: Step, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Scaled scores (B, H, C, T), -inf outside the window and its sinks; which keys lie before it (B, 1, C, T)."""
        place, causal = causal_places(step, k.shape[2], start, stop, q.device)
        distance = place[:, start:stop, None] - place[:, None]
        inside = (distance < self.window_size) | (place[:, None] < self.num_sinks)
        scores = softmax_scores(q[:, :, start:stop], k, step.scale, step.softcap)
        return scores.masked_fill(~(causal & inside)[:, None], -torch.inf), (causal & ~inside)[:, None]

    def carried_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of what the layer carries, by name."""
        opts = self.options
        shapes: dict[str, tuple[int, ...]] = {}
        if self.num_sinks:
            shapes["sink_k"] = shapes["sink_v"] = (opts.num_key_value_heads, self.num_sinks, opts.head_dim)
        if self.features and opts.linear_weight:  # a branch that the config leaves out leaves nothing behind
            shapes["state"] = (opts.num_states, self.features, opts.head_dim + 1)
        return shapes

    def _windowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: Step,
        carried: Carried | None,
        maps: Any,
        factor: Tensor,
        **options: Any,
    ) -> tuple[Tensor, Carried]:
        """`hybrid_attention` with sinks, from the start of sequences or from a cache on."""
        where: dict[str, Any] = {"num_sinks": self.num_sinks}  # (dict[str, Any](...) is nothing torch.compile knows)
        sinks = Carried()
        if step.slot and self.num_sinks:
            sinks, seen = self._sinks(q, k, v, step, carried)
            where = {"num_sinks": self.num_sinks} if carried is None else {"sinks": seen}
        has_state = options["linear_weight"] > 0
        out, state = hybrid_attention(
            q,
            k,
            v,
            maps[0],
            maps[1],
            factor,
            window_size=self.window_size,
            scale=step.scale,
            window_weight=self.window_weight,
            softcap=step.softcap,
            state=carried.state if carried and has_state else None,
            key_mask=step.real_keys(k.shape[2]),
            segment_ids=step.segment_ids,
            return_state=step.slot is not None and has_state,
            **where,
            **options,
        )
        return out, sinks._replace(state=state)

    def _without_learning(self, q: Tensor, k: Tensor) -> tuple[Any, Tensor]:
        """Feature maps and a factor for a window alone; they are not looked at."""
        maps = [q.new_zeros(1, 1, 1).expand(x.shape[1], x.shape[-1], 16) for x in (q, k)]
        return maps, torch.ones(q.shape[1], device=q.device)

    def _sinks(self, q: Tensor, k: Tensor, v: Tensor, step: Step, carried: Carried | None) -> tuple[Carried, Sinks]:
        """Return the sinks after this step, to carry on and as `hybrid_attention` takes them.

        Sinks are the first tokens of a row that are no padding, so each row has them in columns of its own.
        """
        assert step.slot is not None
        new, seen = q.shape[2], step.slot.num_seen
        places = torch.arange(self.num_sinks, device=q.device)
        columns = places[None].expand(len(q), -1)
        if step.padding_mask is not None:
            count = step.padding_mask.long().cumsum(1)
            columns = (count[:, None] <= places[:, None]).sum(-1)  # where the rank-th real token is
        fresh = ((columns >= seen) & (columns < seen + new))[:, None, :, None]
        at = (columns - seen).clamp(0, new - 1)[:, None, :, None]
        sinks = []
        for x, old in ((k, carried and carried.sink_k), (v, carried and carried.sink_v)):
            found = x[:, :, -new:].gather(2, at.expand(-1, x.shape[1], -1, x.shape[-1]))
            sinks.append(torch.where(fresh, found, torch.zeros_like(found) if old is None else old.to(x.dtype)))
        query = torch.arange(seen, seen + new, device=q.device)
        key = torch.arange(seen + new - k.shape[2], seen + new, device=q.device)
        visible = query[None, :, None] - columns[:, None] >= self.window_size
        own = (key[None, :, None] == columns[:, None]).any(-1)
        return Carried(*sinks), Sinks(sinks[0], sinks[1], visible, own)

    def _linear_only(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        step: Step,
        carried: Carried | None,
        maps: Any,
        log_gate: Tensor | None = None,
    ) -> tuple[Tensor, Carried]:
        """Every key through φ; the state has them all, and the window in the cache is not looked at."""
        group, new = q.shape[1] // len(maps[1]), q.shape[2]
        bounds = None
        if step.padding_mask is not None or step.segment_ids is not None:
            bounds = sequence_bounds(step.real_keys(new), step.segment_ids)
        out, state = gated_linear_attention(
            q,
            k[:, :, -new:],
            v[:, :, -new:],
            log_gate,
            *maps,
            state=carried.state.repeat_interleave(group, 1) if carried and carried.state is not None else None,
            bounds=bounds,
            return_state=step.slot is not None,
        )
        return out, Carried(state=None if state is None else state[:, ::group])  # heads that share keys share the state


class WindowAttention(Mixer):
    """Softmax over the last `window_size` keys and the first `num_sinks`; no parameters, nothing to train."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Attend (see `Mixer`)."""
        out, new = self._windowed(q, k, v, step, carried, *self._without_learning(q, k), linear_weight=0.0)
        return out, new

    def decode(self, q: Tensor, k: Tensor, v: Tensor, step: Step, slot: DecodingSlot) -> Tensor:
        """See `Mixer`."""
        return self._decode_window(q, k, v, step, slot)


class _FeatureMaps(Mixer):
    """Has Hedgehog's feature maps: feature_map_q (H, D, F/2) and feature_map_k (L, D, F/2)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        opts = self.options
        self.features = 2 * opts.feature_dim
        self.feature_map_q = nn.Parameter(torch.empty(opts.num_heads, opts.head_dim, opts.feature_dim))
        self.feature_map_k = nn.Parameter(torch.empty(opts.num_states, opts.head_dim, opts.feature_dim))

    def reset_parameters(self) -> None:
        """Identity maps, as the papers start: cut to `feature_dim` columns; wider ones go on with 2 I, 3 I, ..."""
        with torch.no_grad():
            for weight in (self.feature_map_q, self.feature_map_k):
                dim, columns = weight.shape[1:]
                eyes = [number * torch.eye(dim, device=weight.device) for number in range(1, -(-columns // dim) + 1)]
                weight.copy_(torch.cat(eyes, 1)[:, :columns].expand_as(weight))

    @property
    def maps(self) -> tuple[Tensor, Tensor]:
        """Feature maps of queries and keys."""
        return self.feature_map_q, self.feature_map_k

    def _log_similarity(self, q: Tensor, k: Tensor) -> Tensor:
        """log φq·φk, (B, H, C, T)."""
        heads, states = q.shape[1], len(self.feature_map_k)
        keys = k.repeat_interleave(states // k.shape[1], 1)
        phi_k = hedgehog_feature_map(keys, self.feature_map_k).repeat_interleave(heads // states, 1)
        return (hedgehog_feature_map(q, self.feature_map_q) @ phi_k.mT).log()


class HybridLinearAttention(_FeatureMaps):
    """A softmax window with sinks and a linear past under one denominator (LoLCATs, arXiv:2410.10254, Eq. 7).

    Parameters: the feature maps, and window_factor (H,), the logit a of the mixing factor g = sigmoid(a).
    """

    past_of_window = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.window_factor = nn.Parameter(torch.empty(self.options.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity maps and the configured mixing factor, as LoLCATs starts."""
        super().reset_parameters()
        with torch.no_grad():
            self.window_factor.copy_(torch.logit(torch.full_like(self.window_factor, self.options.window_factor)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Attend (see `Mixer`). Without its window branch the layer sees every key through φ, the near ones too."""
        if not self.linear_weight and not self.window_weight:
            return torch.zeros_like(q), Carried()
        if not self.window_weight:
            return self._linear_only(q, k, v, step, carried, self.maps)
        factor = self.window_factor.float().sigmoid()
        return self._windowed(q, k, v, step, carried, self.maps, factor, linear_weight=self.linear_weight)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, step: Step, slot: DecodingSlot) -> Tensor:
        """See `Mixer`."""
        ops = self._steps(v)
        token = (x[:, :, 0].to(v.dtype) for x in (q, k, v))
        factor = F.logsigmoid(self.window_factor.float())
        out = ops.hybrid_step(*token, *self.maps, factor, slot.window(ops), slot.position, scale=step.scale)
        return out[:, :, None]

    def log_weights(self, q: Tensor, k: Tensor, step: Step, start: int, stop: int) -> Tensor:
        """See `Mixer`."""
        scores, before = self._log_window(q, k, step, start, stop)
        if not self.window_weight:
            before, scores = before | scores.isfinite(), torch.full_like(scores, -torch.inf)
        else:
            factor = self.window_factor.float().sigmoid() * self.window_weight
            scores = scores + factor.log()[:, None, None]
        if self.linear_weight:
            linear = self._log_similarity(q[:, :, start:stop], k) + math.log(self.linear_weight)
            scores = torch.where(before, linear, scores)
        return scores.log_softmax(-1)


class LinearAttention(_FeatureMaps):
    """Linear attention alone, every key through φ (Hedgehog, arXiv:2402.04347)."""

    ring = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_sinks = 0
        self.reset_parameters()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Attend (see `Mixer`); the cache is the state, and one key that tells how long the sequence is."""
        out, new = self._linear_only(q, k, v, step, carried, self.maps)
        return (out if self.linear_weight else torch.zeros_like(out)), new

    def decode(self, q: Tensor, k: Tensor, v: Tensor, step: Step, slot: DecodingSlot) -> Tensor:
        """See `Mixer`."""
        return self._decode_linear(q, k, v, slot, self.maps)

    def log_weights(self, q: Tensor, k: Tensor, step: Step, start: int, stop: int) -> Tensor:
        """See `Mixer`."""
        _, causal = causal_places(step, k.shape[2], start, stop, q.device)
        similarity = self._log_similarity(q[:, :, start:stop], k)
        return similarity.masked_fill(~causal[:, None], -torch.inf).log_softmax(-1)


class GatedWindowAttention(_FeatureMaps):
    """Gated linear attention over everything, plus a softmax window with meta memory (Lizard, arXiv:2507.09025).

    y_i = φq_i·Σ_{t≤i} (Π_{l=t+1..i} γ_l) φk_t v_t / (the same with v = 1)
        + α Σ_{j in window} exp(s_ij) v_j / (m e^t + Σ_{j in window} exp(s_ij)),      γ_l = sigmoid(w·x_l + b)

    Gates are kept as logarithms, log γ = logsigmoid(·), and only their differences are exponentiated, so no product of
    gates over- or underflows. The m meta tokens start equal, hence stay equal, and are one logit t + ln m.

    Parameters: the feature maps; gate (1, hidden) and gate_bias (1,), one gate a token for all heads; meta_logit and
    anchor_weight (H,): t + ln m, and α.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        heads = self.options.num_heads
        self.without_rope = not self.options.window_rope
        self.gate = nn.Parameter(torch.empty(1, self.options.hidden_size))
        self.gate_bias = nn.Parameter(torch.empty(1))
        self.meta_logit = nn.Parameter(torch.empty(heads))
        self.anchor_weight = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Identity maps, slow gates that do not look at the token yet, meta logits t = 0, and α = 1."""
        super().reset_parameters()
        with torch.no_grad():
            self.gate.zero_()
            self.gate_bias.fill_(self.options.gate_bias)
            self.meta_logit.fill_(math.log(self.options.meta_tokens))
            self.anchor_weight.fill_(1.0)

    def log_gate(self, hidden: Tensor) -> Tensor:
        """Log γ (B, 1, T), fp32, of hidden states (B, T, hidden)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.logsigmoid(hidden.float() @ self.gate.float().mT + self.gate_bias.float()).mT

    def unrotated(self, q: Tensor, k: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The queries and the new keys as they are before RoPE."""
        k = k[:, :, -q.shape[2] :]
        return (
            (q, k)
            if self.without_rope or step.rotary is None
            else (unrotate(q, *step.rotary), unrotate(k, *step.rotary))
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Attend (see `Mixer`)."""
        assert step.hidden is not None
        out, new = torch.zeros_like(q), Carried()
        if self.window_weight:
            unlearned = self._without_learning(q, k)
            out, new = self._windowed(q, k, v, step, carried, *unlearned, linear_weight=0.0, meta_logit=self.meta_logit)
            out = out * self.anchor_weight[:, None, None].to(out.dtype)
        if self.linear_weight:
            gate = self.log_gate(step.hidden)
            far, state = self._linear_only(*self.unrotated(q, k, step), v, step, carried, self.maps, gate)
            out, new = out + far, new._replace(state=state.state)
        return out, new

    def decode(self, q: Tensor, k: Tensor, v: Tensor, step: Step, slot: DecodingSlot) -> Tensor:
        """See `Mixer`."""
        assert step.hidden is not None
        near = self._decode_window(q, k, v, step, slot, meta_logit=self.meta_logit)
        gate = self.log_gate(step.hidden)[:, :, 0].expand(-1, self.options.num_states)
        far = self._decode_linear(*self.unrotated(q, k, step), v, slot, self.maps, gate)
        return near * self.anchor_weight[:, None, None].to(near.dtype) + far

    def log_weights(self, q: Tensor, k: Tensor, step: Step, start: int, stop: int) -> Tensor:
        """See `Mixer`. Both branches together; they need not sum to 1, and α counts as 0 where it is negative."""
        assert step.hidden is not None
        near, _ = self._log_window(q, k, step, start, stop)
        mass = torch.logaddexp(near.logsumexp(-1, keepdim=True), self.meta_logit.float()[:, None, None])
        alpha = (self.anchor_weight.float() * self.window_weight).clamp(min=1e-30)
        near = (near - mass + alpha.log()[:, None, None]).clamp(min=NOTHING)
        if not self.linear_weight:
            return near
        through = self.log_gate(step.hidden).cumsum(-1)
        _, causal = causal_places(step, k.shape[2], start, stop, q.device)
        far = self._log_similarity(*self._plain(q, k, step, start, stop))
        far = far + (through[:, :, start:stop, None] - through[:, :, None]).clamp(max=0)
        far = far.masked_fill(~causal[:, None], NOTHING).log_softmax(-1)
        return torch.logaddexp(near, far) if self.window_weight else far

    def _plain(self, q: Tensor, k: Tensor, step: Step, start: int, stop: int) -> tuple[Tensor, Tensor]:
        q, k = self.unrotated(q, k, step)
        return q[:, :, start:stop], k


MIXERS: dict[str, type[Mixer]] = {
    "window": WindowAttention,
    "hybrid": HybridLinearAttention,
    "linear": LinearAttention,
    "gated": GatedWindowAttention,
}


def causal_places(step: Step, length: int, start: int, stop: int, device: Any) -> tuple[Tensor, Tensor]:
    """Places of tokens in their own sequences (B or 1, T), and whom queries may look at: (B or 1, C, T).

    For C queries, from `start` to `stop`: losses on attention weights make nothing that is T x T.
    """
    at = torch.arange(length, device=device)
    causal = (at[start:stop, None] >= at)[None]
    segments = step.segment_ids
    if segments is None:
        return at[None], causal
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
    begin = torch.where(first, at, 0).cummax(-1).values
    return at - begin, causal & (segments[:, start:stop, None] == segments[:, None])


def softmax_scores(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """scale · q·k, maybe capped, fp32 or finer: (B, H, C, D), (B, G, T, D) -> (B, H, C, T)."""
    kind = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(kind) @ k.to(kind).repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Take RoPE off again.

    Args:
        x: (B, H, T, D), rotated in its first R channels, half against half.
        cos, sin: (B, T, R), as they were applied, maybe scaled.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    back = rotated * cos - torch.cat([-second, first], -1) * sin
    return torch.cat([back / (cos * cos + sin * sin), rest], -1)


def full_attention(q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
    """The base model's softmax attention: (B, H, T, D) against (B, G, P + T, D) -> (B, H, T, D); see `Mixer`."""
    new, keys = q.shape[2], k.shape[2]
    window = keys if step.base_window is None else step.base_window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    real = step.real_keys(keys)
    mask = None
    if real is not None or step.segment_ids is not None or window < keys or 1 < new < keys:
        at = torch.arange(keys, device=q.device)
        distance = at[keys - new :, None] - at
        mask = (distance >= 0)[None]
        if window < keys:
            mask = mask & (distance < window)
        if real is not None:
            mask = mask & real[:, None]
        if step.segment_ids is not None:
            mask = mask & (step.segment_ids[:, :, None] == step.segment_ids[:, None])
        mask = (mask | (distance == 0))[:, None]  # padding sees itself, so that no row is empty
    if step.softcap is None:
        return F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, is_causal=mask is None and new > 1, scale=step.scale
        )
    visible = torch.ones(new, keys, dtype=torch.bool, device=q.device).tril(keys - new) if mask is None else mask
    out = []
    for queries in torch.arange(new, device=q.device).split(QUERIES_AT_ONCE):  # PyTorch has no fused form of this
        scores = softmax_scores(q[:, :, queries], k, step.scale, step.softcap)
        p = scores.masked_fill(~visible[..., queries, :], -torch.inf).softmax(-1)
        out.append(p.to(v.dtype) @ v)
    return torch.cat(out, 2)


ABLATIONS = {"window only": (0.0, 1.0), "linear only": (1.0, 0.0), "attention zeroed": (0.0, 0.0)}


@contextmanager
def branch_weights(model: nn.Module, linear: float, window: float) -> Iterator[None]:
    """Scale the two branches of every linearized layer while the context is open; see `ABLATIONS`."""
    layers = [module for module in model.modules() if isinstance(module, Mixer)]
    before = [(layer.linear_weight, layer.window_weight) for layer in layers]
    for layer in layers:
        layer.linear_weight, layer.window_weight = layer.linear_weight * linear, layer.window_weight * window
    try:
        yield
    finally:
        for layer, weights in zip(layers, before, strict=True):
            layer.linear_weight, layer.window_weight = weights


@contextmanager
def exact_branch_weights(layer: Mixer, linear: float, window: float) -> Iterator[None]:
    """Give one layer these weights of its branches while the context is open, whatever it has."""
    before = layer.linear_weight, layer.window_weight
    layer.linear_weight, layer.window_weight = linear, window
    try:
        yield
    finally:
        layer.linear_weight, layer.window_weight = before


@contextmanager
def original_attention(model: nn.Module) -> Iterator[None]:
    """Let every linearized layer attend through softmax to everything while the context is open: the base's attention.

    With the base's weights the model is the base then. A cache cannot be used.
    """
    layers = [module for module in model.modules() if isinstance(module, Mixer)]
    before = [layer.switched_off for layer in layers]
    for layer in layers:
        layer.switched_off = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.switched_off = was
