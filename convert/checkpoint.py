"""Checkpoint in: a folder, a GGUF file, a hub id, or `smollm2`, read lazily.

Opening reads config.json and tensor headers, and finds what is missing, truncated or corrupt; for safetensors, torch is
not imported until a tensor is read. Pickles are read only with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from kit.convert.errors import ExitCode, KitError, closest, usage_error
from kit.convert.names import hub_names, matrices

if TYPE_CHECKING:
    import torch

    Reader = Callable[[str, int, tuple[int, ...]], torch.Tensor]  # stored name, first number, shape

log = logging.getLogger("kit")

DTYPES = {  # safetensors' name: torch's name and bytes an element
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "C64": ("complex64", 8), "BOOL": ("bool", 1),
}  # fmt: skip
COMPUTE_DTYPES = ("F64", "F32", "F16", "BF16")

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SIDE_FILES = (
    "tokenizer*.json", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.*",
    "chat_template.*", "additional_chat_templates/*", "generation_config.json", "*processor_config.json",
)  # fmt: skip
LEARNED_POSITIONS = ("wpe.weight", "embed_positions.weight", "position_embeddings.weight", "positions_embed.weight")
TOWERS = ("vision", "audio", "encoder.")  # whose positions are not those of text
HUB_FILES = ("config.json", "*.index.json", "*.py", *SIDE_FILES)


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
        return self.numel * DTYPES[self.dtype][1]


@dataclass
class Checkpoint:
    """A model on disk, as `open_checkpoint` found it.

    Attributes:
        source: what the user typed.
        folder: where its files lie.
        config: config.json.
        tensors: shape and dtype of each tensor, by our name (of experts: see `kit.convert.names`).
        files: the weight file that holds each tensor.
        places: the stored tensor that each lies in, by the file's name, and its first number there.
    """

    source: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: dict[str, Path]
    places: dict[str, tuple[str, int]]
    _readers: dict[Path, Reader] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> str:
        """The torch name of the dtype that most bytes have, among those that models compute in (16 bits and more)."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.dtype in COMPUTE_DTYPES:
                sizes[info.dtype] += info.nbytes
        return DTYPES[sizes.most_common(1)[0][0]][0] if sizes else "float32"

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def max_positions(self) -> int | None:
        """How many positions a model with learned ones has; None for others, which take any length."""
        own = {name: info for name, info in self.tensors.items() if not any(other in name for other in TOWERS)}
        table = next((info for name, info in own.items() if name.endswith(LEARNED_POSITIONS)), None)
        if table is None:
            return None
        named = (self.config.get(key) for key in ("max_position_embeddings", "n_positions", "n_ctx"))
        return min([table.shape[0], *(int(size) for size in named if size)])

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the embedding; where config.json does not say, whether the head is not stored."""
        return bool(self.config.get("tie_word_embeddings", "lm_head.weight" not in self.tensors))

    def read(self, name: str, dtype: torch.dtype | None = None, device: str = "cpu") -> torch.Tensor:
        """Read one tensor into memory of its own: writing to it changes no later read.

        Raises:
            KitError: if there is no tensor of that name, or its file changed since it was opened.
        """
        if name not in self.tensors:
            advice = f"{closest(name, self.tensors)}`kit inspect` shows what the model holds"
            raise KitError(f"there is no tensor '{name}'", where=self.source, next_step=advice)
        file = self.files[name]
        if file not in self._readers:
            self._readers[file] = _open_pickle(file) if file.suffix == ".bin" else _open_safetensors(file)
        return self._readers[file](*self.places[name], self.tensors[name].shape).to(device=device, dtype=dtype)

    def side_files(self) -> list[Path]:
        """Files of the tokenizer and of generation, which conversions copy byte for byte."""
        found = {file for pattern in SIDE_FILES for file in self.folder.glob(pattern)}
        settings = self.folder / "tokenizer_config.json"
        if settings.exists() and _read_json(settings, "download it again").get("auto_map"):
            found.update(self.folder.glob("tokenization_*.py"))
        return sorted(file for file in found if file.is_file())

    def fingerprint(self) -> str:
        """Hash of config, tensor headers, and the weight files' sizes and times."""
        files = sorted(set(self.files.values()))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        headers = {name: (info.shape, info.dtype) for name, info in self.tensors.items()}
        content = json.dumps([self.config, headers, stats], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def load_config(self, trust_remote_code: bool = False) -> Any:
        """Load the config as transformers' class.

        Raises:
            KitError: if transformers does not know the architecture, or rejects a value.
        """
        advice = "check config.json; a new architecture may need a newer transformers"
        return self._load("AutoConfig", "config", advice, trust_remote_code)

    def load_tokenizer(self, trust_remote_code: bool = False) -> Any:
        """Load the tokenizer from the folder.

        Raises:
            KitError: if there is none, or transformers cannot read it.
        """
        advice = "put the model's tokenizer files (tokenizer.json, tokenizer_config.json) into the folder"
        return self._load("AutoTokenizer", "tokenizer", advice, trust_remote_code)

    def compute_dtype(self, dtype: torch.dtype | str) -> torch.dtype:
        """Turn a dtype, its name, or "auto" (the weights' own) into a torch dtype.

        Raises:
            KitError: exit code 2, if it is no floating-point dtype.
        """
        return torch_dtype(self.dtype if dtype == "auto" else dtype)

    def check_runs(self, lengths: dict[str, int]) -> None:
        """Refuse what would only fail with the weights loaded.

        Args:
            lengths: tokens of the longest texts that the model will see, by the option that decides them.

        Raises:
            KitError: if keys and values are to be rounded in a way that `kit` does not compute; exit code 2, if a text
                is longer than a model with learned positions can take.
        """
        _quantization_of_ours(self.config)
        limit = self.max_positions
        for option, length in lengths.items():
            if limit is not None and length > limit:
                raise usage_error(
                    f"{self.source} has {limit:,} learned positions, and a text of {length:,} tokens is asked for",
                    option,
                    f"ask for {limit:,} tokens or fewer; beyond its table the model has no positions",
                )

    def load_model(self, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> Any:
        """Load the whole model with its own modules, to be trained or taken apart; every tensor must find its place.

        transformers only warns about missing and unexpected keys and fills in random weights; here they are errors.

        Raises:
            KitError: on missing, unexpected or mismatched keys, or files that cannot be read.
        """
        options: dict[str, Any] = {}
        if ours := _quantization_of_ours(self.config):
            options["config"] = self.load_config(trust_remote_code)
            options["config"].quantization_config = ours
        options |= exact_attention(self.config)
        model, info = self._load(
            "AutoModelForCausalLM",
            "model",
            "check that config.json and the weights belong together",
            trust_remote_code,
            **options,
            dtype=dtype,
            output_loading_info=True,
            weights_only=True,
        )
        if ours:
            info["missing_keys"] = {*(info.get("missing_keys") or ()), *_load_sidecar(self.folder, model)}
        problems = [
            f"{kind.removesuffix('_keys')} {key}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
            for key in sorted(map(str, info.get(kind) or ()))
        ]
        if problems:
            raise _mismatch(self, problems)
        return model.to(device).eval()

    def load_to_run(
        self,
        dtype: torch.dtype | str = "auto",
        device: str = "cpu",
        *,
        trust_remote_code: bool = False,
        kernels: bool = True,
    ) -> Any:
        """Load the model as every command runs it: a quantized one on a GPU is put on the kernels (`on_kernels`).

        Args:
            dtype: a torch dtype, its name, or "auto" for the checkpoint's own.
            device: where to.
            trust_remote_code: let code inside the checkpoint run.
            kernels: False leaves a quantized model on its modules.

        Raises:
            KitError: as `load_model`.
        """
        model = self.load_model(self.compute_dtype(dtype), device, trust_remote_code)
        return on_kernels(model) if kernels else model

    def _load(self, auto_class: str, what: str, advice: str, trust_remote_code: bool, **options: Any) -> Any:
        """Call `from_pretrained` of one of transformers' Auto classes, with our architectures registered."""
        import transformers

        import kit.modules  # noqa: F401

        try:
            return getattr(transformers, auto_class).from_pretrained(
                self.folder, trust_remote_code=trust_remote_code, local_files_only=True, **options
            )
        except Exception as error:
            problem = f"the {what} cannot be loaded: {_first_line(error)}"
            raise KitError(problem, where=str(self.folder), next_step=advice) from error


def exact_attention(config: dict[str, Any]) -> dict[str, str]:
    """What to tell transformers so that it computes a model's attention as its config.json says.

    Before 5.21 it takes PyTorch's fused attention for Gemma 2 too, which drops the cap on scores.
    """
    text = {**config, **(config.get("text_config") or {})}
    return {"attn_implementation": "eager"} if text.get("attn_logit_softcapping") else {}


def _quantization_of_ours(config: dict[str, Any]) -> dict[str, Any] | None:
    """A compressed-tensors config, so that our modules run it: packed weights stay packed, and so does the cache.

    None if the model is not quantized, or in a way that only the compressed-tensors library computes.

    Raises:
        KitError: if keys and values are to be rounded in a way that `kit` does not compute.
    """
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "compressed-tensors":
        return None
    from kit.modules.quantized import METHOD, check_kv_scheme, check_scheme

    try:
        for group in quantization["config_groups"].values():
            check_scheme(group)
    except (KeyError, TypeError, ValueError):
        return None
    text = {**config, **(config.get("text_config") or {})}
    head_dim = text.get("head_dim") or (text.get("hidden_size") or 0) // (text.get("num_attention_heads") or 1)
    try:
        check_kv_scheme(quantization.get("kv_cache_scheme"), head_dim)
    except ValueError as error:
        advice = "run it on an engine that computes this, or quantize the original model with `kit quantize`"
        raise KitError(str(error), where="config.json, quantization_config", next_step=advice) from error
    ours = {**(quantization.get("kit") or {}), "names": hub_names(config)}
    return {**quantization, "quant_method": METHOD, "sidecar": True, "kit": ours}


def _load_sidecar(folder: Path, model: Any) -> set[str]:
    """Load what stands beside a standard checkpoint's weights for our modules; return the names that are missing."""
    from kit.modules.quantized import SIDECAR, SIDECAR_MARK

    wanted = {name for name in model.state_dict() if SIDECAR_MARK in name}
    if not (folder / SIDECAR).exists():
        return wanted
    from safetensors.torch import load_file

    tensors = load_file(folder / SIDECAR)
    model.load_state_dict(tensors, strict=False)
    return wanted - tensors.keys()


def load(path: str, *, dtype: torch.dtype | str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """Load a model, converted or not, ready to run. On a GPU a quantized one is put on the kernels (`on_kernels`).

    Args:
        path: what `kit` commands take as MODEL.
        dtype: a torch dtype, its name, or "auto" for the checkpoint's own.
        device: where to.
        trust_remote_code: let code inside the checkpoint run (never needed for checkpoints that `kit` wrote).

    Raises:
        KitError: if it cannot be found or loaded whole.
    """
    return open_checkpoint(path, trust_remote_code=trust_remote_code).load_to_run(
        dtype, device, trust_remote_code=trust_remote_code
    )


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Turn a dtype or its name into a torch dtype.

    Raises:
        KitError: exit code 2, if it is no floating-point dtype.
    """
    import torch

    chosen = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        advice = "use auto, bfloat16, float16 or float32"
        raise KitError(f"'{dtype}' is no dtype", where="dtype", next_step=advice, exit_code=ExitCode.USAGE)
    return chosen


def on_kernels(model: Any) -> Any:
    """Put a quantized model that is on a GPU on the INT4-FP8 kernels, in place; any other stays as it is.

    One warning says so where the kernels cannot run it.
    """
    if model.device.type == "cuda":
        from kit.modules.quantized import QuantizedLinear

        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            from kit.modules.accelerated import enable_kernels

            enable_kernels(model)
    return model


def run_path(model: Any) -> str | None:
    """What a quantized model runs on, in words, and why not on the kernels; None for any other model."""
    from kit.modules.quantized import QuantizedLinear

    if getattr(model, "fused", None) is not None:
        return "INT4-FP8 kernels"
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return None
    from kit.modules.accelerated import unsupported

    return f"PyTorch, weights dequantized: {unsupported(model) or 'the kernels are switched off'}"


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
    elif path.is_file():
        folder = _from_file(path)
    elif model == "smollm2":
        from kit.convert.gguf import materialise, smollm2_gguf

        folder = materialise(smollm2_gguf())
    elif _looks_like_a_path(model):
        siblings = [p.name for p in path.parent.iterdir() if _is_model(p)] if path.parent.is_dir() else []
        raise KitError(
            f"there is no model '{model}'",
            where=str(path.parent.absolute()),
            next_step=f"{closest(path.name, [*siblings, 'smollm2'])}give a folder, a .gguf file or a hub id (org/name)",
        )
    else:
        folder = _from_hub(model, revision, trust_remote_code)
    return _open_folder(model, folder, trust_remote_code)


def check_matches_config(checkpoint: Checkpoint) -> Any:
    """Compare names and shapes in the weights with what config.json asks for, before anything is loaded.

    Returns:
        The model that config.json describes, on the meta device.

    Raises:
        KitError: naming the first differences, or if the weights are quantized, or transformers cannot build the model.
    """
    from kit.convert.streaming import build_skeleton

    where = str(checkpoint.folder / "config.json")
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "unknown method")
        advice = "give the model that it was made from, in bfloat16, float16 or float32"
        raise KitError(f"the weights are already quantized ({method})", where=where, next_step=advice)
    try:
        skeleton = build_skeleton(checkpoint.config)
    except KitError:
        raise
    except Exception as error:
        problem = f"config.json describes no causal language model that transformers can build: {_first_line(error)}"
        raise KitError(problem, where=where, next_step="get the config.json that came with these weights") from error
    if problems := _differences(checkpoint.tensors, skeleton):
        raise _mismatch(checkpoint, problems)
    return skeleton


def _differences(tensors: dict[str, TensorInfo], skeleton: Any) -> list[str]:
    """What is missing, unexpected or of another shape; tied weights may be left out, obsolete buffers may be there."""
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    obsolete = [*(skeleton._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    missing = expected.keys() - tensors.keys() - set(skeleton.all_tied_weights_keys)
    unexpected = [n for n in tensors.keys() - expected.keys() if not any(re.search(p, n) for p in obsolete)]
    reshaped = [n for n in expected.keys() & tensors.keys() if tensors[n].shape != expected[n]]
    return [
        *(f"missing {name}" for name in sorted(missing)),
        *(f"unexpected {name}" for name in sorted(unexpected)),
        *(f"{name} is {tensors[name].shape}, not {expected[name]}" for name in sorted(reshaped)),
    ]


def _mismatch(checkpoint: Checkpoint, problems: list[str]) -> KitError:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return KitError(
        f"config.json names another architecture ('{checkpoint.config.get('model_type')}') than the weights hold: "
        + "; ".join(problems[:5])
        + more,
        where=str(checkpoint.folder),
        next_step="get the config.json that came with these weights",
    )


def _is_model(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".gguf"


def _looks_like_a_path(model: str) -> bool:
    parent = Path(model).parent
    inside_a_folder = parent != Path(".") and parent.is_dir()
    return model.startswith((".", "/", "~")) or model.count("/") != 1 or model.endswith(".gguf") or inside_a_folder


def _from_file(path: Path) -> Path:
    if path.suffix != ".gguf":
        advice = f"give the folder that holds config.json ({path.parent}), or a .gguf file"
        raise KitError("a file is no model", where=str(path), next_step=advice)
    from kit.convert.gguf import materialise

    return materialise(path)


def _open_folder(source: str, folder: Path, trust_remote_code: bool) -> Checkpoint:
    config = _read_config(folder, trust_remote_code)
    listed = next((found for name in WEIGHTS if (found := _weight_files(folder, name))), None)
    if not listed:
        raise KitError(
            f"no weights: neither {' nor '.join(WEIGHTS)} nor an index of several files",
            where=str(folder),
            next_step="download the weights into the folder",
        )
    tensors: dict[str, TensorInfo] = {}
    files: dict[str, Path] = {}
    places: dict[str, tuple[str, int]] = {}
    for file, promised in listed.items():
        header = _pickle_header(file) if file.suffix == ".bin" else _safetensors_header(file)[0]
        advice = "download the index and its files again; they are of different versions"
        if lost := sorted(promised - header.keys()):
            problem = f"the index promises '{lost[0]}' in a file that does not hold it"
            raise KitError(problem, where=str(file), next_step=advice)
        for stored, info in header.items():
            for name, start, shape in matrices(stored, info.shape, config):
                if name in tensors:
                    raise KitError(f"'{name}' is in this file and in another", where=str(file), next_step=advice)
                tensors[name], files[name], places[name] = TensorInfo(shape, info.dtype), file, (stored, start)
    if any(file.suffix == ".bin" for file in listed):
        log.warning("%s holds pickles, read with weights_only=True; prefer safetensors", folder)
    return Checkpoint(source, folder, config, tensors, files, places)


def _read_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    advice = "give the folder that holds config.json and the weights, or a .gguf file"
    if (folder / "adapter_config.json").exists():
        advice = "this is an adapter: `kit eval` and `kit compare` take it; else merge it into its base model first"
    elif ggufs := sorted(folder.glob("*.gguf")):
        advice = f"give the GGUF file itself: {ggufs[0]}"
    config = _read_json(folder / "config.json", advice)
    ours = str(config.get("model_type")).startswith("kit_")
    if config.get("auto_map") and not ours and not trust_remote_code:
        raise KitError(
            "the model needs code of its own to run",
            where=f"{folder / 'config.json'}: auto_map",
            next_step="read that code, then add --trust-remote-code",
        )
    return config


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index."""
    found = _read_json(index, "download the index again").get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise KitError("the index names no files", where=f"{index}: weight_map", next_step="download the index again")
    return found


def _weight_files(folder: Path, name: str) -> dict[Path, set[str]]:
    """The weight files and the tensors that the index promises in each (empty set: not said)."""
    index = folder / f"{name}.index.json"
    if (folder / name).exists():  # transformers, too, takes the single file when there are both
        return {folder / name: set()}
    if not index.exists():
        return {}
    files: dict[Path, set[str]] = {}
    for tensor, file in _weight_map(index).items():
        files.setdefault(folder / file, set()).add(tensor)
    missing = [file.name for file in files if not file.is_file() or file.parent.resolve() != folder.resolve()]
    if missing:
        raise KitError(
            f"{len(missing)} of {len(files)} weight files are missing: {', '.join(missing[:5])}",
            where=str(index),
            next_step="download them into the folder",
        )
    return files


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise KitError(f"{path.name} is missing", where=str(path.parent), next_step=advice) from error
    except (ValueError, OSError) as error:
        problem = f"{path.name} cannot be read: {error}"
        raise KitError(problem, where=str(path), next_step="repair or download it again") from error
    if not isinstance(content, dict):
        raise KitError(f"{path.name} holds no JSON object", where=str(path), next_step="repair or download it again")
    return content


def _corrupt(path: Path, error: Exception) -> KitError:
    problem = f"the weight file is unreadable, truncated or corrupt: {_first_line(error)}"
    return KitError(problem, where=str(path), next_step="download this file again")


def safetensors_tensors(path: Path) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor of a safetensors file, by the name in the file.

    Raises:
        KitError: if it is truncated or corrupt.
    """
    return _safetensors_header(path)[0]


def _safetensors_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Parse a safetensors header (8 bytes little-endian length, then JSON) and check it against the file's length.

    Returns:
        By name: shape and dtype, and where in the file the tensor starts.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"the header should have {length:,} bytes, the file has {size:,}")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors, starts, end = {}, {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"'{name}' has the unknown dtype '{entry['dtype']}'")
            tensors[name] = TensorInfo(tuple(entry["shape"]), entry["dtype"])
            starts[name] = 8 + length + end
            start, end = end, end + tensors[name].nbytes
            if entry["data_offsets"] != [start, end]:
                raise ValueError(f"the place of '{name}' does not agree with its shape")
        if size != 8 + length + end:
            raise ValueError(f"the file has {size:,} bytes, its header describes {8 + length + end:,}")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(path, error) from error
    return tensors, starts


def _open_safetensors(path: Path) -> Reader:
    """Read tensors at their place in the file.

    safetensors' own reader maps the whole file as writable memory, which the system refuses for files larger than its
    memory, and lets a write to one tensor change the next read.
    """
    import torch

    tensors, starts = _safetensors_header(path)

    def read(name: str, start: int, shape: tuple[int, ...]) -> torch.Tensor:
        part = TensorInfo(shape, tensors[name].dtype)
        flat = torch.empty(part.numel, dtype=getattr(torch, DTYPES[part.dtype][0]))
        try:
            with path.open("rb") as file:
                file.seek(starts[name] + start * flat.itemsize)
                if file.readinto(flat.view(torch.uint8).numpy().data) != part.nbytes:
                    raise EOFError(f"'{name}' ends early")
        except (OSError, EOFError) as error:
            raise _corrupt(path, error) from error
        return flat.view(shape)

    return read


def _load_pickle(path: Path, device: str) -> dict[str, torch.Tensor]:
    """Read a pickle of tensors; nothing in it is ever executed."""
    import torch

    try:  # torch maps only its newer, zipped format
        content = torch.load(path, weights_only=True, mmap=zipfile.is_zipfile(path), map_location=device)
    except UnpicklingError as error:
        raise KitError(
            "the pickle holds more than tensors, or is corrupt; nothing in it was run",
            where=str(path),
            next_step="do not load it elsewhere; get the model as safetensors",
        ) from error
    except Exception as error:
        raise _corrupt(path, error) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        advice = "export its state_dict, best as safetensors"
        raise KitError("the file holds no plain state_dict", where=str(path), next_step=advice)
    return content


def _pickle_header(path: Path) -> dict[str, TensorInfo]:
    names = {f"torch.{torch_name}": name for name, (torch_name, _) in DTYPES.items()}
    tensors = _load_pickle(path, "meta")
    try:
        return {name: TensorInfo(tuple(tensor.shape), names[str(tensor.dtype)]) for name, tensor in tensors.items()}
    except KeyError as error:
        raise _corrupt(path, error) from error


def _open_pickle(path: Path) -> Reader:
    tensors = _load_pickle(path, "cpu")  # mapped: a clone, so that a write to it changes no later read
    return lambda name, start, shape: tensors[name].flatten()[start : start + prod(shape)].view(shape).clone()


def _from_hub(model: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Download a model, or find it in the cache: the small files first, then only the weights that they name."""
    folder = _snapshot(model, revision, HUB_FILES)
    _read_config(folder, trust_remote_code)
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        files = sorted(set(_weight_map(index).values())) if index.exists() else [name]
        _snapshot(model, folder.name, files)  # the folder is named after its commit
        if all((folder / file).exists() for file in files):
            break
    return folder


def _snapshot(model: str, revision: str | None, files: Sequence[str]) -> Path:
    """Fetch some files of a hub repository; without a connection, take them from the cache."""
    from huggingface_hub import snapshot_download

    def find(local_files_only: bool) -> Path:
        options: Any = {"allow_patterns": list(files), "local_files_only": local_files_only}
        return Path(snapshot_download(model, revision=revision, **options))

    try:
        try:
            return find(local_files_only=False)
        except Exception:  # a proxy that fails, a server that is down: the cache may do
            with suppress(Exception):
                return find(local_files_only=True)
            raise
    except Exception as error:
        raise KitError(
            f"the model '{model}' is neither on the hub nor whole in the cache ({_first_line(error)})",
            where=f"hub id {model}" + (f" at {revision}" if revision else ""),
            next_step="check the name and the network (private or gated models: `hf auth login`), or give a folder",
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
