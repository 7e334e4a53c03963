"""Checkpoint in: a folder, a GGUF file, a hub id, or `smollm2`, read lazily.

Opening reads config.json and tensor headers, and finds what is missing, truncated or corrupt; no torch is imported until a
tensor is read. Pickles are read only with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.convert.errors import KitError, closest

if TYPE_CHECKING:
    import torch

log = logging.getLogger("kit")

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
NAMES = {torch_name: name for name, torch_name in DTYPES.items()}
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}

SIDE_FILES = (
    "tokenizer*.json", "tokenizer.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "vocab.*", "spiece.model", "sentencepiece*.model", "chat_template.*", "additional_chat_templates/*",
    "generation_config.json", "*processor_config.json", "tokenization_*.py",
)  # fmt: skip
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "*.py", *SIDE_FILES]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype (in safetensors' names: F32, BF16, ...) of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * BYTES.get(self.dtype, 1)


@dataclass
class Checkpoint:
    """A model on disk.

    Attributes:
        source: what the user typed.
        folder: where its files lie.
        config: config.json.
        tensors: shape and dtype of each tensor, by name.
        files: the weight file that holds each tensor.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: dict[str, Path]
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> str:
        """The torch name of the dtype that most floating-point bytes have."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            if DTYPES.get(info.dtype, "").startswith(("float", "bfloat")):
                sizes[info.dtype] += info.nbytes
        return DTYPES[sizes.most_common(1)[0][0]] if sizes else "float32"

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the embedding."""
        return bool(self.config.get("tie_word_embeddings", False))

    def read(self, name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> torch.Tensor:
        """Read one tensor.

        Raises:
            KitError: if there is no tensor of that name.
        """
        if name not in self.tensors:
            raise KitError(
                f"no tensor '{name}'", where=self.source, next_step=f"{closest(name, self.tensors)}check config.json"
            )
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = _open_pickle(file) if file.suffix == ".bin" else _open_safetensors(file)
        return self._handles[file](name).to(device=device, dtype=dtype)

    def side_files(self) -> list[Path]:
        """Files of the tokenizer and of generation, which conversions copy byte for byte."""
        return sorted({file for pattern in SIDE_FILES for file in self.folder.glob(pattern) if file.is_file()})

    def fingerprint(self) -> str:
        """Hash of config, tensor headers, and the weight files' sizes and times."""
        files = sorted(set(self.files.values()))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        headers = {name: (info.shape, info.dtype) for name, info in self.tensors.items()}
        content = json.dumps([self.config, headers, stats], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def load_tokenizer(self, trust_remote_code: bool = False) -> Any:
        """Load the tokenizer from the folder.

        Raises:
            KitError: if there is none, or transformers cannot read it.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            raise KitError(
                f"the tokenizer cannot be loaded: {_first_line(error)}",
                where=str(self.folder),
                next_step="put the model's tokenizer files (tokenizer.json, ...) into the folder",
            ) from error

    def load_model(self, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> Any:
        """Load the whole model for inference; every tensor must find its place.

        transformers only warns about missing and unexpected keys and fills in random weights; here they are errors.

        Raises:
            KitError: on missing, unexpected or mismatched keys, or files that cannot be read.
        """
        from transformers import AutoModelForCausalLM

        import kit.modules  # noqa: F401  (registers our architectures)

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                local_files_only=True,
                weights_only=True,
            )
        except KitError:
            raise
        except Exception as error:
            raise KitError(
                f"the model cannot be loaded: {_first_line(error)}",
                where=str(self.folder),
                next_step="check that config.json and the weights belong together",
            ) from error
        problems = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(kind)}
        if problems:
            kind, keys = next(iter(problems.items()))
            raise _mismatch(self, f"{len(keys)} {kind.replace('_', ' ')}, for example {sorted(map(str, keys))[0]}")
        return model.to(device).eval()


def load(path: str, *, dtype: torch.dtype | str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """Load a model, converted or not, ready to run.

    Args:
        path: what `kit` commands take as MODEL.
        dtype: a torch dtype, its name, or "auto" for the checkpoint's own.
        device: where to.
        trust_remote_code: let code inside the checkpoint run (never needed for checkpoints that `kit` wrote).

    Raises:
        KitError: if it cannot be found or loaded whole.
    """
    import torch

    checkpoint = open_checkpoint(path, trust_remote_code=trust_remote_code)
    if isinstance(dtype, str):
        dtype = getattr(torch, checkpoint.dtype if dtype == "auto" else dtype)
    assert isinstance(dtype, torch.dtype)
    return checkpoint.load_model(dtype, device, trust_remote_code)


def open_checkpoint(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model without reading weights.

    Args:
        model: a folder, a .gguf file, `smollm2`, or a hub id.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: accept a checkpoint that names code of its own.

    Raises:
        KitError: if it is not there, or a file is missing, truncated or corrupt.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        folder = path
    elif path.is_file() and path.suffix == ".gguf":
        from kit.convert.gguf import materialise

        folder = materialise(path)
    elif path.is_file():
        raise KitError(
            "the file is no model", where=model, next_step="give the folder that holds config.json, or a .gguf file"
        )
    elif model == "smollm2":
        from kit.convert.gguf import materialise, smollm2_gguf

        folder = materialise(smollm2_gguf())
    elif model.startswith((".", "/", "~")) or model.count("/") != 1 or path.parent.is_dir() and str(path.parent) != ".":
        siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise KitError(
            f"there is no model '{model}'",
            where=str(path.parent.absolute()),
            next_step=f"{closest(str(path), [*siblings, 'smollm2'])}give a folder, a .gguf file or a hub id (org/name)",
        )
    else:
        folder = _from_hub(model, revision)
    return _open_folder(model, folder, trust_remote_code)


def check_matches_config(checkpoint: Checkpoint) -> None:
    """Compare names and shapes in the weights with what config.json asks for, before anything is loaded.

    Raises:
        KitError: naming the first differences.
    """
    from kit.convert.streaming import build_skeleton

    skeleton = build_skeleton(checkpoint.config)
    tied = set(skeleton.all_tied_weights_keys)
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    missing = sorted(name for name in expected.keys() - checkpoint.tensors.keys() if name not in tied)
    unexpected = sorted(name for name in checkpoint.tensors.keys() - expected.keys() if "rotary_emb.inv_freq" not in name)
    shapes = [
        f"{name} is {info.shape}, not {expected[name]}"
        for name, info in checkpoint.tensors.items()
        if name in expected and info.shape != expected[name]
    ]
    for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if names:
            raise _mismatch(checkpoint, f"{len(names)} tensors are {problem}: {', '.join(names[:3])}")


def _mismatch(checkpoint: Checkpoint, what: str) -> KitError:
    return KitError(
        f"config.json ({checkpoint.config.get('model_type')}) and the weights do not belong together: {what}",
        where=str(checkpoint.folder),
        next_step="get the config.json that came with these weights",
    )


def _open_folder(source: str, folder: Path, trust_remote_code: bool) -> Checkpoint:
    config = _read_json(folder / "config.json", "a model folder needs a config.json; download it with the weights")
    if config.get("auto_map") and not str(config.get("model_type")).startswith("kit_") and not trust_remote_code:
        raise KitError(
            "the model needs code of its own to run",
            where=str(folder / "config.json") + ": auto_map",
            next_step="read that code, then add --trust-remote-code",
        )
    safetensors, pickled = _weight_files(folder, "model.safetensors"), _weight_files(folder, "pytorch_model.bin")
    listed = safetensors or pickled
    if not listed:
        raise KitError(
            "no weights: neither model.safetensors nor pytorch_model.bin nor their index",
            where=str(folder),
            next_step="download the weights into the folder",
        )
    header: Callable[[Path], dict[str, TensorInfo]] = _safetensors_header if safetensors else _pickle_header
    if not safetensors:
        log.warning("%s holds pickles, read with weights_only=True; prefer safetensors", folder)
    headers = {file: header(file) for file in listed}
    for file, names in listed.items():
        if names and (lost := sorted(names - headers[file].keys())):
            raise KitError(
                f"the index promises '{lost[0]}' in a file that does not hold it",
                where=str(file),
                next_step="download the index and its files again; they are of different versions",
            )
    tensors = {name: info for found in headers.values() for name, info in found.items()}
    files = {name: file for file, found in headers.items() for name in found}
    return Checkpoint(source, folder, config, tensors, files)


def _weight_files(folder: Path, name: str) -> dict[Path, set[str]]:
    """The weight files and the tensors that the index promises in each (empty set: not said)."""
    index = folder / f"{name}.index.json"
    if not index.exists():
        return {folder / name: set()} if (folder / name).exists() else {}
    weight_map = _read_json(index, "download the index again").get("weight_map", {})
    files: dict[Path, set[str]] = {}
    for tensor, file in weight_map.items():
        files.setdefault(folder / file, set()).add(tensor)
    for path in files:
        if not path.exists() or path.parent.resolve() != folder.resolve():
            raise KitError(
                f"the weight file {path.name} is missing",
                where=str(index),
                next_step=f"download {path.name} into the folder; the index lists {len(files)} files",
            )
    return files


def _read_json(path: Path, next_step: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise KitError(f"{path.name} is missing", where=str(path.parent), next_step=next_step) from error
    except (ValueError, OSError) as error:
        raise KitError(f"{path.name} cannot be read: {error}", where=str(path), next_step=next_step) from error
    if not isinstance(content, dict):
        raise KitError(f"{path.name} holds no JSON object", where=str(path), next_step=next_step)
    return content


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Parse a safetensors header (8 bytes little-endian length, then JSON) and check the file's length against it."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header should be {length} bytes, the file has {size}")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size:
            raise ValueError(f"{size:,} bytes, but its header describes {end:,}")
        return {name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KitError(
            f"the weight file is truncated or corrupt: {error}", where=str(path), next_step="download this file again"
        ) from error


def _open_safetensors(path: Path) -> Callable[[str], torch.Tensor]:
    from safetensors import safe_open

    return safe_open(path, framework="pt").get_tensor


def _load_pickle(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    import torch

    try:
        return torch.load(path, weights_only=True, **options)
    except Exception as error:
        raise KitError(
            f"the pickle holds more than tensors, or is corrupt; nothing in it was run ({type(error).__name__})",
            where=str(path),
            next_step="get the model as safetensors",
        ) from error


def _pickle_header(path: Path) -> dict[str, TensorInfo]:
    tensors = _load_pickle(path, map_location="meta")
    return {n: TensorInfo(tuple(t.shape), NAMES[str(t.dtype).removeprefix("torch.")]) for n, t in tensors.items()}


def _open_pickle(path: Path) -> Callable[[str], torch.Tensor]:
    return _load_pickle(path, mmap=True, map_location="cpu").__getitem__


def _from_hub(model: str, revision: str | None) -> Path:
    """Download a model's files, or find them in the cache when the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(**options: Any) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES, **options))

    try:
        try:
            folder = download()
        except (LocalEntryNotFoundError, OSError):
            folder = download(local_files_only=True)
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=["*.bin", "*.bin.index.json"]))
        return folder
    except Exception as error:
        raise KitError(
            f"the model '{model}' is neither on the hub nor in the cache ({type(error).__name__})",
            where=f"hub id {model}" + (f" at {revision}" if revision else ""),
            next_step="check the name and the network (private models: `hf auth login`), or give a folder",
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
