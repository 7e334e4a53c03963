"""Models of random weights, from a config alone: speed can be measured without the weights.

Quantized ones are made directly in packed form.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.convert.errors import ExitCode, KitError
from kit.convert.formats import WeightFormat, kv_scheme, quantization_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUPS = (128, 64, 32)  # of INT4 weights; the first that fits, else one a row
CACHE = {
    "query": "fp8",
    "center": True,
    "rotate": True,
    "shape": True,
    "window": 128,
    "post_rope": False,
    "table": False,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose linears have these names
LINEARS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))


def shape_config(name: str) -> dict[str, Any]:
    """A config.json by the name of a shipped shape (`configs/shapes`), or from a file.

    Raises:
        KitError: if there is none, or it is of a family that random models are not made of.
    """
    shipped = resources.files("kit.configs") / "shapes"
    names = sorted(f.name.removesuffix(".json") for f in shipped.iterdir() if f.name.endswith(".json"))
    file: Any = shipped / f"{name}.json" if name in names else Path(name)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("model_type") not in FAMILIES:
            raise ValueError(f"model_type is {content.get('model_type')}, not one of {', '.join(FAMILIES)}")
    except (OSError, ValueError) as error:
        raise KitError(
            f"'{name}' is no config: {error}",
            where="--config",
            next_step=f"name a config.json, or one of {', '.join(names)}",
            exit_code=ExitCode.USAGE,
        ) from error
    return content


def random_model(config: dict[str, Any], *, int4: bool, dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """A model of random weights, in `dtype` or as `kit quantize --int4-fp8` would leave it, made so from the start.

    Raises:
        KitError: if transformers does not know the model, or INT4 cannot store it.
    """
    import torch

    model = skeleton(config, int4=int4, dtype=dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            _fill(name.rpartition(".")[2], tensor, generator)
        model.tie_weights()
    backbone = getattr(model, model.base_model_prefix)
    backbone.rotary_emb = type(backbone.rotary_emb)(config=model.config).to(device)  # buffers are computed, not stored
    return model.eval()


def skeleton(config: dict[str, Any], *, int4: bool, dtype: torch.dtype) -> Any:
    """The same model without weights, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kit.modules.quantized import quantize_modules

    try:
        loaded = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded, dtype=dtype)
        return quantize_modules(model, random_quantization(loaded)) if int4 else model
    except ValueError as error:
        where, problem = f"--config, model_type {config['model_type']}", str(error).splitlines()[0]
        raise KitError(problem, where=where, next_step="give the config of a causal language model") from error


def random_quantization(config: Any) -> dict[str, Any]:
    """The `quantization_config` of a model whose linears are all INT4 with FP8 inputs, and whose cache is INT4."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    widths = config.hidden_size, config.intermediate_size, dim * config.num_attention_heads
    group = next((g for g in GROUPS if all(width % g == 0 for width in widths)), None)
    names = [f"model.layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in LINEARS]
    return quantization_config(
        {name: WeightFormat(4, group) for name in names}, untouched=["lm_head"], fp8_inputs=True,
        kv=kv_scheme(dim, symmetric=False), extra=CACHE, method="compressed-tensors",
    )  # fmt: skip


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    import torch

    device = tensor.device
    if name == "weight_packed":
        tensor.copy_(torch.randint(-(2**31), 2**31 - 1, tensor.shape, generator=generator, device=device).int())
    elif name == "weight_scale":
        tensor.fill_(0.02 / 4.6)  # codes in -8 ... 7 have a standard deviation of 4.6
    elif name in ("key_order", "value_order"):
        tensor.copy_(torch.arange(tensor.shape[-1], device=device).expand_as(tensor))
    elif name in ("key_factor", "value_factor"):
        tensor.copy_(torch.eye(tensor.shape[-1], device=device).expand_as(tensor))
    elif name == "key_scale" or (name == "weight" and tensor.ndim == 1):
        tensor.fill_(1.0)
    elif tensor.is_floating_point() and tensor.ndim == 2 and name == "weight":
        tensor.normal_(std=0.02, generator=generator)
    else:
        tensor.zero_()
