"""The name of the cache among transformers' arguments: `cache` from 5.24 on, `past_key_values` before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cache_argument(arguments: Mapping[str, Any]) -> str:
    """Return the name that the arguments of a forward pass, or its output, have for the cache."""
    return "cache" if "cache" in arguments else "past_key_values"


def carried_cache(output: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cache in a model's output as the keyword argument of its next step."""
    name = cache_argument(output)
    return {name: output[name]}
