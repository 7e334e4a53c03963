"""Training-free windows: a model that sees the last keys and the first tokens (sinks) of its text, nothing trained.

The baseline that every linearized model is to be read beside (arXiv:2309.17453, arXiv:2608.28444). Only the mask of the
attention changes: weights, positions and cache stay the model's, so this measures quality, not speed or memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kit.convert.errors import ExitCode, KitError
from kit.modules.cache import cache_argument


def window_name(window: int, sinks: int) -> str:
    """What a training-free window is called in tables."""
    return f"window {window}, {sinks} sinks" if sinks else f"window {window}"


def pattern_mask(
    num_queries: int,
    num_keys: int,
    window: int,
    sinks: int,
    *,
    first_key: int = 0,
    real: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Where the last queries of a text may look: `window` keys in all, of which `sinks` are the first tokens.

    Args:
        num_queries: T, the last positions.
        num_keys: S >= T, keys up to and including the last query's.
        window: keys that a query sees, itself and the sinks included.
        sinks: first tokens of the text that every query sees.
        first_key: tokens of the text that stand before the first of these keys.
        real: (B, S), False for padding, which has no place in the text; None: all are tokens.
        device: of the result, where `real` does not say.

    Returns:
        (B or 1, 1, T, S), True where a query may look; causal. Padding is not taken out.
    """
    keys = torch.arange(num_keys, device=device if real is None else real.device)
    queries = keys[num_keys - num_queries :, None]  # compared, not subtracted: nothing but booleans is T x S
    text = keys[None] if real is None else real.long().cumsum(-1) - 1
    near, sink = keys > queries - (window - sinks), text + first_key < sinks
    return ((keys <= queries) & (near | sink[:, None]))[:, None]


@contextmanager
def windowed(model: Any, window: int, sinks: int) -> Iterator[None]:
    """Let a model see `window` keys in all, of which `sinks` are the first tokens, while the context is open.

    The pattern is laid over whatever mask the model's attention layers get (causal, sliding, padded).

    Raises:
        KitError: if the model has no attention layers as transformers writes them, or its attention takes no masks.
    """
    layers = [module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx")]
    kind = model.config.get_text_config()._attn_implementation
    if not layers or kind not in ("eager", "sdpa"):
        raise KitError(
            "the training-free windows need masked attention layers, which this model has not"
            if not layers
            else f"the training-free windows need a mask, which the attention '{kind}' does not take",
            where=type(model).__name__,
            next_step="give a base whose attention transformers computes with sdpa or eager",
            exit_code=ExitCode.USAGE,
        )

    unmasked = lru_cache(maxsize=1)(pattern_mask)  # one for all layers of a forward pass

    def narrow(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        given, num_queries = kwargs.get("attention_mask"), hidden.shape[1]
        cache = kwargs.get(cache_argument(kwargs))
        seen = cache.get_seq_length(layer.layer_idx) if cache is not None else 0
        num_keys = seen + num_queries if given is None else given.shape[-1]
        real, keep = None, None
        if given is not None:  # additive masks are 0 where a query may look
            keep = given if given.dtype == torch.bool else given == 0
            real = keep.any(2)[:, 0]
        first = max(seen + num_queries - num_keys, 0)
        if keep is None:
            mask = unmasked(num_queries, num_keys, window, sinks, first_key=first, device=hidden.device)
        else:
            mask = keep & pattern_mask(num_queries, num_keys, window, sinks, first_key=first, real=real)
        if kind == "eager":
            lowest = torch.finfo(hidden.dtype).min
            mask = torch.zeros(mask.shape, dtype=hidden.dtype, device=mask.device).masked_fill(~mask, lowest)
        return args, kwargs | {"attention_mask": mask}

    hooks = [layer.register_forward_pre_hook(narrow, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
