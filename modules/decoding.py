"""One token at a time: a layer of transformers' cache in the form that the one-launch kernels update in place.

Between forward passes of several tokens a layer of the cache is as transformers left it: window keys in order, and what
we carry in one tensor. The first single token turns it into ring form, in the same three tensors, batch first, so that
whatever reorders or copies a cache moves it too:

- `keys`, `values` (B, G, window_size + 1 + S, D): a ring in which a row's token number p (padding does not count) lies
  in slot p mod (window_size + 1), then the sinks. Layers without a window keep their one key, which nobody reads.
- `recurrent_states[0]` (B, L·(F·(D + 2) + 16)) fp32: the state (L, F, D), two copies of its denominators (2, L, F), and
  counters (L, 16), which are 0 between steps.

Anything but a single token turns it back first. The addresses stay the same from the first single token on.

The kernels move a key into the state one step later than PyTorch's path does. So the ring's state lacks φ of token
number (now - window_size). After a change of form its slot holds a key and a value of 0, whose features are subtracted;
when the form changes back, those of what the slot holds then are added.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from kit.kernels.linear_attention import linear_state
from kit.kernels.linear_attention.dispatch import StepOps, step_ops

MOST_NUMBERS = 256 * 128  # of the window's keys and the sinks: what a program can hold
COUNTERS = 16  # a state, of which D/32 are used: rows then begin at a multiple of 16 numbers


def token_numbers(cache: Any, mask: Tensor | None, length: int) -> Tensor | None:
    """How many tokens each row had before this single one, (B,) int32; None where the steps' kernels cannot go on.

    Args:
        cache: the model's cache; None without one.
        mask: (B, all tokens so far or more), 0 for padding; None without padding.
        length: new tokens.
    """
    if cache is None or length != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if getattr(cache, "offloading", False) or not cache.layers:
        return None
    ours = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    if not ours or not isinstance(ours[0], DynamicSlidingWindowLayer) or not ours[0].get_seq_length():
        return None
    keys, seen = ours[0].keys, ours[0].get_seq_length()
    if step_ops(keys) is None:
        return None
    if mask is None:
        return torch.full((len(keys),), seen, dtype=torch.int32, device=keys.device)
    if mask.shape[1] <= seen:
        return None
    real = mask[:, : seen + 1].bool()
    left_only = (real[:, 1:] >= real[:, :-1]).all() & real[:, -1].all()
    return real.sum(1, dtype=torch.int32) - 1 if bool(left_only) else None


class DecodingSlot:
    """One layer's cache in ring form; stands in for the whole cache while the family's attention runs.

    Args:
        layer: of transformers' cache.
        mixer: what attends.
        position: (B,) int32, how many tokens each row had.
    """

    def __init__(self, layer: Any, mixer: Any, position: Tensor) -> None:
        self.layer, self.mixer, self.position = layer, mixer, position.to(layer.keys.device)
        if not in_ring_form(layer):
            _to_ring(layer, mixer, self.position)
        layer.kit_ring_form = (layer.keys, layer.recurrent_states[0])

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Count the token, and hand its key and value on: the kernel puts them into the ring."""
        self.layer.cumulative_length += 1
        return keys, values

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """The state (B, L, F, D) and its denominators (2, B, L, F)."""
        return _views(self.layer.recurrent_states[0], self.mixer)[:2]

    def window(self, ops: StepOps) -> Any:
        """What `hybrid_step` updates; a layer whose window has no linear past gets a state that nobody reads."""
        slots, keys, values = self.mixer.window_size + 1, self.layer.keys, self.layer.values
        if self.mixer.past_of_window:
            states, sums, arrivals = _views(self.layer.recurrent_states[0], self.mixer)
        else:
            nothing = self.position.new_empty(1, dtype=torch.float32)
            batch, heads, _, dim = keys.shape
            states, sums = nothing.expand(batch, heads, 32, dim), nothing.expand(2, batch, heads, 32)
            arrivals = self.position.new_empty(1).expand(batch, heads, dim // 32)
        rings = keys[:, :, :slots], values[:, :, :slots]
        return ops.HybridState(*rings, states, sums, keys[:, :, slots:], values[:, :, slots:], arrivals)


def can_decode(layer: Any, mixer: Any, softcap: float | None) -> bool:
    """Whether the kernels can take single tokens of a layer, with this layer of the cache."""
    if not as_configured(layer, mixer) or softcap is not None or not hasattr(layer, "recurrent_states"):
        return False
    if not isinstance(layer, DynamicSlidingWindowLayer) or type(layer).update is not DynamicSlidingWindowLayer.update:
        return False  # keys that lie elsewhere, or in another form
    if layer.keys.dtype != layer.values.dtype:
        return False
    if mixer.carried_shapes() and not layer.is_recurrent_states_initialized[0]:
        return False
    opts = mixer.options
    group, dim = opts.num_heads // opts.num_key_value_heads, opts.head_dim
    keys = 2 ** (mixer.window_size + mixer.num_sinks - 1).bit_length() if mixer.ring else 0
    sizes = {dim} | ({mixer.features} if mixer.features else set())
    fit = keys <= 512 and keys * dim <= MOST_NUMBERS and (mixer.window_size < 512 or not mixer.ring)
    return sizes <= {32, 64, 128, 256} and group <= 16 and fit


def as_configured(layer: Any, mixer: Any) -> bool:
    """Whether a layer's branches count as they are, and its cache keeps no past to go back to."""
    if mixer.switched_off or mixer.linear_weight != 1 or mixer.window_weight != 1:
        return False
    return not getattr(layer, "record_past", False)


def in_ring_form(layer: Any) -> bool:
    """Whether a layer of a cache is in ring form."""
    return bool(_ring_form(layer))


def stayed(layer: Any) -> bool:
    """Whether a layer of a cache is in ring form, and in the memory that its last step left it in."""
    form = _ring_form(layer)
    return bool(form) and form[0] is layer.keys and form[1] is layer.recurrent_states[0]


def _ring_form(layer: Any) -> tuple[Tensor, ...]:
    """Keys and state as a layer's last step in ring form left them; whoever moves rows puts others in their place."""
    return getattr(layer, "kit_ring_form", ())


def check_rows(layer: Any) -> None:
    """Refuse a layer of a cache whose keys have moved to other rows while its state has not.

    transformers' `batch_repeat_interleave` and `batch_select_indices` leave recurrent states as they are.

    Raises:
        ValueError: if they have been called.
    """
    keys, states = getattr(layer, "keys", None), getattr(layer, "recurrent_states", {})
    if keys is None or states.get(0) is None:
        return
    moved = {x is not before for x, before in zip((keys, states[0]), _ring_form(layer), strict=False)}
    if len(keys) != len(states[0]) or len(moved) == 2:
        raise ValueError(
            f"the cache's keys ({len(keys)} rows) have been moved without its state ({len(states[0])} rows)\n"
            "  where: past_key_values\n"
            "  next:  call reorder_cache(indices) in place of batch_repeat_interleave and batch_select_indices: it "
            "moves both, and indices may come several times or not at all"
        )


@torch.no_grad()
def leave_ring_form(layer: Any, mixer: Any, num_seen: int, mask: Tensor | None) -> None:
    """Give a layer in ring form back the form that transformers' own methods need.

    Args:
        layer: of the cache.
        mixer: what attends.
        num_seen: columns so far; 0 after a reset.
        mask: (B, num_seen or more), False for padding; None without.
    """
    layer.kit_ring_form = ()
    state = layer.recurrent_states[0]
    shapes = mixer.carried_shapes()
    if not num_seen:
        if shapes:
            layer.recurrent_states[0] = state.new_zeros(len(state), sum(torch.Size(s).numel() for s in shapes.values()))
        if layer.keys is not None:
            layer.keys, layer.values = (x[:, :, :0] for x in (layer.keys, layer.values))
        return
    batch, slots = len(layer.keys), mixer.window_size + 1
    count = min(num_seen, layer.sliding_window - 1)  # those behind the mixer's window are anything, nobody reads them
    position = torch.full((batch,), num_seen, device=layer.keys.device)
    if mask is not None:
        position = mask[:, :num_seen].sum(1)
    parts = {}
    if "state" in shapes:
        states, sums, _ = _views(state, mixer)
        current = sums[position % 2, torch.arange(batch, device=sums.device)]
        parts["state"] = torch.cat([states, current[..., None]], -1)
    if mixer.ring:
        keys, values = layer.keys, layer.values
        if mixer.past_of_window:
            late = ((position - mixer.window_size) % slots)[:, None]
            counts = _leaves(mixer, position)[:, None]
            missing = linear_state(_slots_of(keys, late), _slots_of(values, late), mixer.maps[1], counts)
            parts["state"] = parts["state"] + missing
        parts |= {"sink_k": keys[:, :, slots:].float(), "sink_v": values[:, :, slots:].float()}
        places = (position[:, None] - count + torch.arange(count, device=keys.device)) % slots
        layer.keys, layer.values = _slots_of(keys, places), _slots_of(values, places)
    else:
        layer.keys, layer.values = (F.pad(x, (0, 0, count - x.shape[2], 0)) for x in (layer.keys, layer.values))
    if shapes:
        layer.recurrent_states[0] = torch.cat([parts[name].flatten(1) for name in shapes], 1)


def _to_ring(layer: Any, mixer: Any, position: Tensor) -> None:
    """Bring a layer that has seen tokens into ring form."""
    shapes, keys = mixer.carried_shapes(), layer.keys
    parts: dict[str, Tensor] = {}
    if shapes:
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        pieces = layer.recurrent_states[0].split(sizes, 1)
        parts = {name: x.unflatten(1, shapes[name]) for name, x in zip(shapes, pieces, strict=True)}
        layer.recurrent_states[0] = keys.new_zeros(len(keys), 0, dtype=torch.float32)
    if "state" in parts:
        sums = parts["state"][..., -1]
        if mixer.past_of_window:  # φ(0) is the same in all features
            sums = sums - _leaves(mixer, position)[:, None, None] * (2 / mixer.features)
        counters = sums.new_zeros(len(sums), sums.shape[1] * COUNTERS)
        flat = [parts["state"][..., :-1].flatten(1), sums.flatten(1), sums.flatten(1), counters]
        layer.recurrent_states[0] = torch.cat(flat, 1)
    if mixer.ring:
        slots, window = mixer.window_size + 1, keys.shape[2]
        count = min(window, mixer.window_size - 1)
        places = (position.long()[:, None] - count + torch.arange(count, device=keys.device)) % slots
        rings = []
        for x, sink in ((layer.keys, parts.get("sink_k")), (layer.values, parts.get("sink_v"))):
            ring = x.new_zeros(*x.shape[:2], slots + mixer.num_sinks, x.shape[3])
            at = places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            ring.scatter_(2, at, x[:, :, window - count :])
            if sink is not None:
                ring[:, :, slots:] = sink
            rings.append(ring)
        layer.keys, layer.values = rings


def _views(flat: Tensor, mixer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The state (B, L, F, D), denominators (2, B, L, F) and counters (B, L, D/32) in the tensor that holds them."""
    heads, features, dim = mixer.options.num_states, mixer.features, mixer.options.head_dim
    states, sums, counters = flat.split([heads * features * dim, 2 * heads * features, heads * COUNTERS], 1)
    return (
        states.unflatten(1, (heads, features, dim)),
        sums.unflatten(1, (2, heads, features)).transpose(0, 1),
        counters.view(torch.int32).unflatten(1, (heads, COUNTERS))[..., : dim // 32],
    )


def _slots_of(ring: Tensor, slots: Tensor) -> Tensor:
    """Keys of a ring (B, G, ..., D) in given slots (B, N): (B, G, N, D)."""
    return ring.gather(2, slots.long()[:, None, :, None].expand(-1, ring.shape[1], -1, ring.shape[3]))


def _leaves(mixer: Any, position: Tensor) -> Tensor:
    """Whether the token at (now - window_size) has been, and is no sink: (B,)."""
    return position - mixer.window_size >= mixer.num_sinks
