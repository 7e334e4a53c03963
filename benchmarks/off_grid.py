"""Move a Llama-like model's linear weights off any grid that they lie on, without changing what the model computes.

    python benchmarks/off_grid.py smollm2 OUT [--sigma 0.2] [--seed 0]

SmolLM2 comes out of a GGUF file of type Q4_1, whose weights lie on a 4-bit grid (asymmetric, 32 weights a group): 4-bit
quantization looks better on it than it is. Here each input channel of q/k/v, gate/up, down and o is multiplied by
exp(sigma · n), n standard normal, and the inverse is folded into what produces the channel: the norm's gain, the rows
of up_proj, the rows of v_proj (query heads that share a key/value head share its factors). In exact arithmetic the
model is the same; written as bfloat16 it differs by rounding.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from kit.convert.checkpoint import open_checkpoint
from kit.convert.recipe import ModelFacts


def move_off_grid(source: str, output: Path, sigma: float = 0.2, seed: int = 0) -> Path:
    """Write the rescaled model.

    Args:
        source: MODEL as for `kit`; a family with input_layernorm, post_attention_layernorm and separate projections.
        output: folder to make.
        sigma: spread of the factors' logarithms.
        seed: of the factors.
    """
    checkpoint = open_checkpoint(source)
    heads, kv_heads, head_dim = ModelFacts.of(checkpoint).heads
    tensors = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    generator = torch.Generator().manual_seed(seed)

    def factors(count: int) -> torch.Tensor:
        return torch.exp(sigma * torch.randn(count, generator=generator, dtype=torch.float64))

    for index in range(int(checkpoint.config["num_hidden_layers"])):
        layer = f"model.layers.{index}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            factor = factors(len(tensors[f"{layer}{norm}.weight"]))
            tensors[f"{layer}{norm}.weight"] /= factor
            for reader in readers:
                tensors[f"{layer}{reader}.weight"] *= factor
        factor = factors(tensors[f"{layer}mlp.down_proj.weight"].shape[1])
        tensors[f"{layer}mlp.down_proj.weight"] *= factor
        tensors[f"{layer}mlp.up_proj.weight"] /= factor[:, None]
        factor = factors(kv_heads * head_dim)
        shared = factor.view(kv_heads, 1, head_dim).expand(-1, heads // kv_heads, -1).reshape(-1)
        tensors[f"{layer}self_attn.o_proj.weight"] *= shared
        tensors[f"{layer}self_attn.v_proj.weight"] /= factor[:, None]

    output.mkdir(parents=True)
    dtype = getattr(torch, checkpoint.dtype)
    saved = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(saved, output / "model.safetensors", metadata={"format": "pt"})
    for file in checkpoint.side_files():
        shutil.copyfile(file, output / file.name)
    (output / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--sigma", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(move_off_grid(given.model, given.output, given.sigma, given.seed))
