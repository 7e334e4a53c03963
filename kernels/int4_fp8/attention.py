"""Attention over a static INT4 cache: one call a layer takes the fused product of q, k and v to what o_proj reads.

`backend` is "triton" or "reference", the specification in PyTorch. A step of decoding is safe in CUDA graphs and under
torch.compile: the number of tokens is on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from kit.kernels.int4_fp8 import attention_reference as reference
from kit.kernels.int4_fp8.attention_reference import Heads

ROUNDED_CAPACITY = 128  # tokens that a cache grows by: blocks of the kernels end within it


def kernels() -> ModuleType | None:
    """The Triton operations, or None where Triton is not installed."""
    try:
        from kit.kernels.int4_fp8 import attention_ops
    except ImportError:
        return None
    return attention_ops


@dataclass
class KVStore:
    """Keys and values of all layers, L layers, B rows, G key/value heads, D head dim; every tensor is updated in place.

    Attributes:
        codes: (L, 2, B, G, capacity, D / 2) uint8, keys and values as `attention_reference.encode` has them; capacity
            is 0 where nothing is encoded.
        meta: (L, 2, B, G, capacity) int32.
        recent: (L, 2, B, G, R, D), the latest tokens as they are, token t at t mod R.
        length: (1,) int32, tokens so far.
        start: (B,) int32, the place of each row's first real token.
        arrivals: (B, G) int32, zeros: room for the kernels to count in.
        window: keys that a query reads as they are, its own included; R is this, or 1. Never more than the capacity.
        symmetric: codes have no zero points.
        order, factor: (L, 2, G, D) int32 and (L, 2, G, D, D) of the noise shaping, or None.
        padded: whether `start` may be other than 0, as the host knows.
        full_window: `window` of a cache that is large enough.
    """

    codes: Tensor
    meta: Tensor
    recent: Tensor
    length: Tensor
    start: Tensor
    arrivals: Tensor
    window: int
    symmetric: bool
    order: Tensor | None = None
    factor: Tensor | None = None
    padded: bool = True
    full_window: int = 0
    _constants: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(
        cls,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        dim: int,
        *,
        int4: bool,
        window: int,
        symmetric: bool = False,
        order: Tensor | None = None,
        factor: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> KVStore:
        """A cache of at least `capacity` tokens; without `int4` all of them stay in `dtype`."""
        capacity, full_window = _rounded(capacity), window
        window = min(window, capacity) if int4 else capacity
        coded = capacity if int4 else 0
        shape = (layers, 2, batch, kv_heads)
        order, factor = (None if x is None else x.contiguous() for x in (order, factor))

        def zeros(*size: int, of: torch.dtype) -> Tensor:
            return torch.zeros(*size, dtype=of, device=device)

        with torch.inference_mode(False):  # a tensor of that mode could not be written to outside of it
            return cls(
                zeros(*shape, coded, dim // 2, of=torch.uint8), zeros(*shape, coded, of=torch.int32),
                zeros(*shape, max(window, 1), dim, of=dtype), zeros(1, of=torch.int32), zeros(batch, of=torch.int32),
                zeros(batch, kv_heads, of=torch.int32), window, symmetric, order, factor, full_window=full_window,
            )  # fmt: skip

    @property
    def int4(self) -> bool:
        """Whether tokens that leave the window are encoded."""
        return self.codes.shape[4] > 0

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.codes.shape[4] if self.int4 else self.recent.shape[4]

    def identity(self) -> Tensor:
        """(D, D), of the dtype of the cache."""
        if "identity" not in self._constants:
            dim = self.recent.shape[-1]
            self._constants["identity"] = torch.eye(dim, dtype=self.recent.dtype, device=self.recent.device)
        return self._constants["identity"]

    def shaping(self, layer: slice) -> tuple[Tensor | None, Tensor | None]:
        """`order` and `factor` of some layers."""
        if self.order is None or self.factor is None:
            return None, None
        return self.order[layer], self.factor[layer]

    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.meta, self.recent))

    def reset(self) -> None:
        """Forget all tokens."""
        self.length.zero_()
        self.start.zero_()

    def grow(self, capacity: int) -> None:
        """Make room for at least `capacity` tokens. The cache moves: a CUDA graph of it is of no use afterwards."""
        capacity = _rounded(capacity)
        if capacity <= self.capacity:
            return
        if self.int4:
            self.codes, self.meta = _longer(self.codes, capacity), _longer(self.meta, capacity)
        self.window = min(self.full_window, capacity) if self.int4 else capacity
        if self.window > self.recent.shape[4]:  # it held all tokens, so that none has taken another's slot
            self.recent = _longer(self.recent, self.window)

    def select(self, rows: Tensor) -> None:
        """Keep, reorder or repeat rows by number, (N,). The cache stays where it is if N is B, and moves if not."""
        rows = rows.to(self.start.device)
        stays = len(rows) == len(self.start)
        with torch.inference_mode(False), torch.no_grad():
            rows = rows.clone()
            for name, dim in (("codes", 2), ("meta", 2), ("recent", 2), ("start", 0), ("arrivals", 0)):
                tensor = getattr(self, name)
                if not stays:
                    setattr(self, name, tensor.index_select(dim, rows))
                    continue
                for part in tensor if dim else (tensor,):  # a layer at a time, for the sake of memory
                    part.copy_(part.index_select(max(dim - 1, 0), rows))

    def crop(self, past: int, length: int) -> None:
        """Forget the tokens from place `length` on, where `past` are held.

        Some of those that the next query reads as they are had lost their slot in the ring to later ones: they come
        back from their codes, rounded.
        """
        ring = self.recent.shape[4]
        back = torch.arange(max(length - ring, 0), max(min(past - ring, length), 0), device=self.codes.device)
        if self.int4 and self.window and len(back):
            for recent, codes, meta in zip(self.recent, self.codes, self.meta, strict=True):
                recent[..., back % ring, :] = reference.decode_kv(codes[..., back, :], meta[..., back]).to(recent.dtype)
        self.length.fill_(length)


def _rounded(capacity: int) -> int:
    return -(-capacity // ROUNDED_CAPACITY) * ROUNDED_CAPACITY


def _longer(x: Tensor, size: int) -> Tensor:
    """(L, 2, B, G, n, ...) with zeros behind, up to n = `size`."""
    with torch.inference_mode(False):
        longer = torch.zeros(*x.shape[:4], size, *x.shape[5:], dtype=x.dtype, device=x.device)
    longer[:, :, :, :, : x.shape[4]] = x
    return longer


def attend_step(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    options: Heads,
    store: KVStore,
    layer: int,
    *,
    scale: float,
    sliding: int | None = None,
    backend: str = "triton",
) -> Tensor:
    """Attention of one new token a row, which goes into the ring of recent keys. `finish_step` follows the last layer.

    Kernels read the number of tokens before the kernel before them has ended: qkv is to be made after `finish_step`.

    Args:
        qkv: (B, 1, (H + 2G)·D).
        cos, sin: (positions, D / 2).
        scale: of the scores.
        sliding: keys that a query may see.

    Returns:
        (B, 1, H·D).
    """
    recent = store.recent[layer]
    ops = kernels() if backend == "triton" else None
    if ops is None:
        return attend_more(qkv, cos, sin, options, store, layer, scale=scale, sliding=sliding)
    q, unit, _ = ops.prepare(qkv, cos, sin, options, store.identity(), store.length, store.start, recent, False)
    if store.window == 0:
        _encode_ring(ops, store, slice(layer, layer + 1))
    out = ops.decode(
        q, unit, store.codes[layer], store.meta[layer], recent, store.length, store.start, store.arrivals,
        store.window, scale, sliding,
    )  # fmt: skip
    return out.flatten(2)


def finish_step(store: KVStore, backend: str = "triton") -> None:
    """Encode the token that all layers have just taken, in one launch, and count it."""
    ops = kernels() if backend == "triton" else None
    if ops is not None and store.int4 and store.window:
        _encode_ring(ops, store, slice(None))
    store.length.add_(1)


def _encode_ring(ops: ModuleType, store: KVStore, layers: slice) -> None:
    ops.encode(
        store.recent[layers], store.length, *store.shaping(layers), store.codes[layers], store.meta[layers], 1,
        store.symmetric, True, False, False,
    )  # fmt: skip


def attend_prompt(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    options: Heads,
    store: KVStore,
    layer: int,
    *,
    scale: float,
    sliding: int | None = None,
    backend: str = "triton",
) -> Tensor:
    """Attention of the first T tokens of an empty cache, which are put into it; arguments as for `attend_step`.

    `store.length` is not changed: add T after the last layer.

    Returns:
        (B, T, H·D).
    """
    ops = kernels() if backend == "triton" else None
    if ops is None:
        return attend_more(qkv, cos, sin, options, store, layer, scale=scale, sliding=sliding)
    tokens, recent = qkv.shape[1], store.recent[layer]
    q, unit, kv = ops.prepare(qkv, cos, sin, options, store.identity(), store.length, store.start, recent, True)
    keys = values = None
    if store.int4:
        whole = tokens > store.window
        one = slice(layer, layer + 1)
        keys, values = ops.encode(
            kv[None], store.length, *store.shaping(one), store.codes[one], store.meta[one], tokens, store.symmetric,
            False, whole, whole and options.query_fp8 and ops.COMPILED,
        )  # fmt: skip
        keys, values = (keys, values) if whole else (None, None)
    if keys is None and sliding is None and not store.padded:  # plain causal attention, which PyTorch has faster
        query = (q * unit[..., None]).to(kv.dtype).transpose(1, 2)
        plain = F.scaled_dot_product_attention(query, kv[0], kv[1], is_causal=True, scale=scale, enable_gqa=True)
        return plain.transpose(1, 2).flatten(2)
    out = ops.prefill(q, unit, keys, store.meta[layer], values, kv, store.start, store.window, scale, sliding)
    return out.flatten(2)


def attend_more(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    options: Heads,
    store: KVStore,
    layer: int,
    *,
    scale: float,
    sliding: int | None = None,
) -> Tensor:
    """Attention of T tokens on a cache of any length, in PyTorch: the specification, and what follows a prompt at once.

    Arguments as for `attend_step`; `store.length` is not changed. Reads the length on the host.
    """
    tokens, past = qkv.shape[1], int(store.length)
    q, unit, k, v = reference.prepare(qkv, cos, sin, options, store.length, store.start)
    before, places = reference.from_ring(store.recent[layer], past)
    recent = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
    places = torch.cat([places, torch.arange(past, past + tokens, device=qkv.device)])
    ring = store.recent.shape[4]
    latest = torch.arange(max(past, past + tokens - ring), past + tokens, device=qkv.device)
    for into, new in zip(store.recent[layer], (k, v), strict=True):
        into[:, :, latest % ring] = new[:, :, latest - past]
    coded = None
    if store.int4:
        order, factor = (None if x is None else x.flatten(0, 1) for x in _of_layer(store, layer))
        codes, meta = reference.encode(torch.cat([k, v], 1), store.symmetric, order, factor)
        groups = k.shape[1]
        for number, heads in enumerate((slice(0, groups), slice(groups, None))):
            store.codes[layer, number, :, :, past : past + tokens] = codes[:, heads]
            store.meta[layer, number, :, :, past : past + tokens] = meta[:, heads]
        if past + tokens > store.window:
            end = past + tokens
            coded = tuple(
                reference.decode_kv(store.codes[layer, n, :, :, :end], store.meta[layer, n, :, :, :end]) for n in (0, 1)
            )
    out = reference.attend(q, unit, coded, recent, places, store.start, store.window, scale, sliding)  # type: ignore[arg-type]
    return out.to(qkv.dtype).flatten(2)


def _of_layer(store: KVStore, layer: int) -> tuple[Tensor | None, Tensor | None]:
    if store.order is None or store.factor is None:
        return None, None
    return store.order[layer], store.factor[layer]
