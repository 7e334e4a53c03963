"""Quantized weights in compressed-tensors' terms, and which engines take the result.

The rules about engines are facts about their loaders (vLLM's compressed-tensors schemes W4A8-FP8, W4A16 and FP8, and
its KV cache scheme, as of its 0.2x releases), checked at planning so that nobody finds out after the work is done.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kit.convert.names import spellings

BASE: dict[str, Any] = {
    "block_structure": None,
    "actorder": None,
    "group_size": None,
    "observer": None,
    "observer_kwargs": {},
}
FP8_TOKENS = {**BASE, "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
PACKED, FP8 = "pack-quantized", "float-quantized"


@dataclass(frozen=True)
class WeightFormat:
    """How one linear's weight is stored: 4 bits in groups of `group_size` (None: per channel), or FP8 per channel, or,
    with 16-bit inputs, INT8 per channel (`integer`).
    """

    bits: int
    group_size: int | None = None
    zero_point: bool = False
    integer: bool = False

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """Storage for each weight of an (N, K) matrix in bits, bf16 scales and zero points included."""
        groups = 1 if self.group_size is None else shape[1] // self.group_size
        return self.bits + groups * (16 + 4 * self.zero_point) / shape[1]

    def arguments(self) -> dict[str, Any]:
        """The `weights` of a config group."""
        if self.bits == 8 and not self.integer:
            return {**BASE, "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        return {
            **BASE,
            "num_bits": self.bits,
            "type": "int",
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "symmetric": not self.zero_point,
            "dynamic": False,
            "observer": "minmax",
        }

    def __str__(self) -> str:
        if self.bits == 8:
            return f"{'INT' if self.integer else 'FP'}8 per channel"
        zero = ", zero points" if self.zero_point else ""
        return f"INT4 {'per channel' if self.group_size is None else f'group {self.group_size}'}{zero}"


def quantization_config(
    formats: dict[str, WeightFormat],
    *,
    untouched: list[str],
    fp8_inputs: bool,
    kv: dict[str, Any] | None,
    extra: dict[str, Any],
    method: str,
    words: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return the `quantization_config` of config.json.

    `format` stands inside every group too: with the top-level key alone the library infers another format for FP8
    inputs, finds none of the weights, and fills in random numbers.

    Args:
        formats: each quantized linear's format, by module name.
        untouched: linears that stay as they are.
        fp8_inputs: round inputs to FP8, one scale a token.
        kv: `kv_cache_scheme`.
        extra: what goes under the key "kit".
        method: `quant_method`.
        words: words of our names that the hub's files spell otherwise.
    """
    words = words or {}
    formats = {called: form for name, form in formats.items() for called in spellings(name, words)}
    untouched = [called for name in untouched for called in spellings(name, words)]
    if words:
        extra = {**extra, "names": words}
    groups: dict[str, dict[str, Any]] = {}
    for number, form in enumerate(dict.fromkeys(formats.values())):
        names = [name for name, other in formats.items() if other == form]
        groups[f"group_{number}"] = {
            "format": FP8 if form.bits == 8 and not form.integer else PACKED,
            "targets": ["Linear"] if len(set(formats.values())) == 1 else _targets(names, [*formats, *untouched]),
            "weights": form.arguments(),
            "input_activations": dict(FP8_TOKENS) if fp8_inputs and not form.integer else None,
            "output_activations": None,
        }
    kinds = {group["format"] for group in groups.values()}
    return {
        "quant_method": method,
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": untouched,
        "kv_cache_scheme": kv,
        "config_groups": groups,
        **({"kit": extra} if extra else {}),
    }


def _targets(names: list[str], all_names: list[str]) -> list[str]:
    """One pattern a kind of projection where all of that kind are in the group, else full names.

    Experts have patterns of their own: transformers finds their format by the word "experts" in an expression.
    """
    experts = any(".experts." in name for name in all_names)

    def kind(name: str) -> str:
        words = name.split(".")
        place = r"experts\.\d+\." if "experts" in words else rf"{words[-2:][0]}\." if experts else ""
        return rf"re:.*\.{place}{re.escape(words[-1])}$"

    every = Counter(map(kind, all_names))
    mine: dict[str, list[str]] = {}
    for name in names:
        mine.setdefault(kind(name), []).append(name)
    alone = {pattern for pattern, found in mine.items() if "." not in found[0]}  # lm_head: no pattern expects it
    return [
        target
        for pattern, found in mine.items()
        for target in ([pattern] if len(found) == every[pattern] and pattern not in alone else found)
    ]


def kv_scheme(head_dim: int, symmetric: bool) -> dict[str, Any]:
    """`kv_cache_scheme` of dynamic INT4 keys and values, one scale a token and head (a group is a head's numbers).

    The library's strategy "token" would take one scale for all tokens of a prompt: it reduces all but the first two
    dimensions, and keys are (batch, heads, tokens, head dim).
    """
    return {
        **BASE,
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": head_dim,
        "symmetric": symmetric,
        "dynamic": True,
    }


def refusals(
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    signed: bool,
    formats: dict[str, WeightFormat | None] | None = None,
) -> dict[str, list[str]]:
    """Why an engine would not load a quantized model, or not run it fast; an empty list is good news.

    Args:
        config: `quantization_config`.
        shapes: (N, K) of each quantized linear.
        signed: whether group scales may be negative.
        formats: of every linear, None where it stays as it is; needed for experts only.

    Returns:
        Reasons by engine: "transformers" (with the compressed-tensors library), "vllm".
    """
    found: dict[str, list[str]] = {"transformers": [], "vllm": []}
    if config["quant_method"] != "compressed-tensors":
        for reasons in found.values():
            reasons.append("rotation or scaling of keys at run time is no standard: the checkpoint needs its own code")
    if config["kv_cache_scheme"] is not None:
        found["vllm"].append("its kv_cache_scheme takes 8-bit floats only (use --set kv.bits=null)")
    if "lm_head" not in config["ignore"]:
        found["vllm"].append("a quantized output head was never tried with it (leave head out)")
    layers: dict[str, set[WeightFormat | None]] = {}
    for name, form in (formats or {}).items():
        if len(layer := name.split(".experts.")) == 2:
            layers.setdefault(layer[0], set()).add(form)
    if len(set().union(*layers.values())) > 1:
        found["transformers"].append("it takes one format for all experts (`kit.load` does not mind)")
    if several := [layer for layer, forms in layers.items() if len(forms) > 1]:
        found["vllm"].append(f"it takes one format for all experts of a layer, {several[0]} has more")
    for group in config["config_groups"].values():
        weights, fp8_inputs = group["weights"], group["input_activations"] is not None
        if weights["type"] != "int":
            continue
        if not weights["symmetric"]:
            found["transformers"].append("compressed-tensors 0.20 fails to load packed zero points (`kit.load` does)")
        if fp8_inputs:
            if weights["group_size"] != 128:
                size = weights["group_size"] or "per-channel"
                found["vllm"].append(f"its INT4-FP8 kernel takes groups of 128 only, not {size}")
            if not weights["symmetric"]:
                found["vllm"].append("its INT4-FP8 kernel has no zero points (use --set zero_point=false)")
            if signed:
                found["vllm"].append(
                    "negative group scales were never tried on its kernel (use --set signed_scales=false)"
                )
            if odd := [name for name, shape in shapes.items() if ".experts." in name and any(s % 256 for s in shape)]:
                found["vllm"].append(
                    f"its INT4-FP8 experts need dimensions divisible by 256: {odd[0]} is {shapes[odd[0]]}"
                )
        if odd := [name for name, shape in shapes.items() if any(size % 128 for size in shape)]:
            found["vllm"].append(f"its 4-bit kernels need dimensions divisible by 128: {odd[0]} is {shapes[odd[0]]}")
    return {engine: list(dict.fromkeys(reasons)) for engine, reasons in found.items()}
