"""Checkpoint out: shards, index, config, code, and the tokenizer's files, then the check that it loads as it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kit.convert.checkpoint import Checkpoint
from kit.convert.errors import ExitCode, KitError
from kit.convert.names import hub_names, renamed
from kit.convert.streaming import COMPUTE_DTYPES, StreamedModel, TensorView, streamed_logits
from kit.convert.work import disk_errors
from kit.modules.bundler import flat_name, write_code
from kit.modules.quantized import SIDECAR, SIDECAR_MARK


def auto_map(config: dict[str, Any], entry: str) -> dict[str, Any]:
    """Add the class names under which the Auto classes find the bundled code.

    Args:
        config: config.json with `architectures` naming the causal language model.
        entry: the bundled module that defines the classes.
    """
    prefix = config["architectures"][0].removesuffix("ForCausalLM")
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    return {**config, "auto_map": {auto: f"{flat_name(entry)}.{prefix}{kind}" for auto, kind in names.items()}}


def write_checkpoint(
    folder: Path,
    *,
    config: dict[str, Any],
    view: TensorView,
    skeleton: Any,
    source: Checkpoint,
    dtype: torch.dtype,
    max_shard_size: int,
    bundle_entries: list[str],
) -> None:
    """Write a checkpoint into `folder`; config.json comes last, so that a half-written folder does not load.

    Args:
        folder: a folder that does not exist yet.
        config: the result's config.json.
        view: where the tensors are read from, one at a time.
        skeleton: the result's model on the meta device: which tensors there must be, and their shapes.
        source: the model that was converted; its tokenizer's files are copied byte for byte.
        dtype: of all floating-point tensors.
        max_shard_size: bytes a file.
        bundle_entries: modules whose code travels along.

    Raises:
        KitError: if a tensor is missing or has another shape, or the disk is full.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True)
        _write_tensors(folder, view, skeleton, dtype, max_shard_size, config)
        for file in source.side_files():
            target = folder / file.relative_to(source.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        for entry in bundle_entries:
            write_code(folder, entry)
        config = {**config, "dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tensors(
    folder: Path, view: TensorView, skeleton: Any, dtype: torch.dtype, max_shard_size: int, config: dict[str, Any]
) -> None:
    """Write shards and index, in the hub's names; what other readers of a standard must not find goes into SIDECAR."""
    from safetensors.torch import save_file

    tied = set(skeleton.all_tied_weights_keys)
    expected = {name: tensor for name, tensor in skeleton.state_dict().items() if name not in tied}
    words = hub_names(config)
    if (config.get("quantization_config") or {}).get("quant_method") == "compressed-tensors":
        beside = {name: _read(view, name, dtype) for name in expected if SIDECAR_MARK in name}
        expected = {name: tensor for name, tensor in expected.items() if name not in beside}
        if beside:
            save_file(beside, folder / SIDECAR, metadata={"format": "pt"})
    shards: list[dict[str, int]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for name, like in expected.items():
        tensor = _read(view, name, dtype)
        if tensor.shape != like.shape:
            raise KitError(
                f"tensor '{name}' has shape {tuple(tensor.shape)}, its module expects {tuple(like.shape)}",
                where=str(folder),
                next_step="report this as a bug of the recipe",
            )
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_shard_size:
            flush()
        shard[renamed(name, words)] = tensor
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, sizes in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(sizes, file)
    total = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _read(view: TensorView, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor as it is written: floating-point numbers in `dtype`, integers and FP8 as they are."""
    tensor = view.read(name)
    return (tensor.to(dtype) if tensor.dtype in COMPUTE_DTYPES else tensor).contiguous()


@torch.no_grad()
def verify_checkpoint(
    folder: Path, probe: Tensor, expected: Tensor, *, dtype: torch.dtype, device: str | None
) -> float:
    """Reload a written checkpoint and compare its logits with those of the conversion.

    Args:
        folder: the written checkpoint.
        probe: (B, T) token ids.
        expected: (B, T, vocabulary), the conversion's logits with weights rounded as in the file.
        dtype: compute dtype of the reload; float32 gives the sharp check.
        device: where to run it; None: the model fits nowhere, and is read again layer by layer. Its names and shapes
            are compared with config.json then, as transformers would do.

    Returns:
        The largest difference relative to the largest logit.

    Raises:
        KitError: exit code 3, if a key is missing, unexpected or mismatched, or the logits differ.
    """
    from kit.convert.checkpoint import check_matches_config, load, open_checkpoint

    try:
        if device is None:
            written = open_checkpoint(str(folder))
            check_matches_config(written)
            streamed = StreamedModel(written.config, TensorView(written), device="cpu", dtype=dtype)
            logits = streamed_logits(streamed, probe).float()
        else:
            logits = load(str(folder), dtype=dtype, device=device)(probe.to(device)).logits.float().cpu()
    except KitError as error:
        error.exit_code = ExitCode.VERIFICATION
        raise
    difference = float((logits - expected.float().cpu()).abs().max() / expected.abs().max())
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    if not difference <= tolerance:
        raise KitError(
            f"the written checkpoint computes other logits than the conversion (relative difference {difference:.2g})",
            where=str(folder),
            next_step="the folder is kept for inspection and was not put in place; please report this",
            exit_code=ExitCode.VERIFICATION,
        )
    return difference
