"""PEFT adapter folders as models: a base checkpoint with LoRA on it, opened and loaded as any other."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.convert.checkpoint import Checkpoint, TensorInfo, open_checkpoint, safetensors_tensors
from kit.convert.errors import KitError, usage_error

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIDE = re.compile(r"base_model\.model\.(?P<linear>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight")


@dataclass
class AdaptedCheckpoint(Checkpoint):
    """A base model with a PEFT LoRA folder on it; everything but the adapter's own is the base's.

    Attributes:
        base: the model that the adapter goes on.
        adapter: the folder.
        sides: shape and dtype of A ("A") and B ("B") by the linear's name in the base model.
    """

    base: Checkpoint = field(kw_only=True)
    adapter: Path = field(kw_only=True)
    sides: dict[str, dict[str, TensorInfo]] = field(kw_only=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the base's tensors and of the adapter's."""
        return self.base.nbytes + sum(info.nbytes for pair in self.sides.values() for info in pair.values())

    @property
    def num_parameters(self) -> int:
        """Elements of the base's tensors and of the adapter's."""
        return self.base.num_parameters + sum(info.numel for pair in self.sides.values() for info in pair.values())

    def fingerprint(self) -> str:
        """Hash of the base's fingerprint and the adapter's files."""
        content = [(self.adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)]
        hashes = [hashlib.sha256(part).hexdigest() for part in content]
        return hashlib.sha256(json.dumps([self.base.fingerprint(), *hashes]).encode()).hexdigest()

    def load_model(self, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> Any:
        """The base model's class with PEFT's LoRA layers in it, not merged.

        Raises:
            KitError: as for the base, or if PEFT refuses the adapter.
        """
        from peft import PeftModel

        model = self.base.load_model(dtype, device, trust_remote_code)
        try:
            return PeftModel.from_pretrained(model, str(self.adapter)).base_model.model.eval()
        except Exception as error:
            raise KitError(
                f"PEFT cannot load the adapter: {type(error).__name__}: {str(error).splitlines()[0]}",
                where=str(self.adapter),
                next_step="check that the adapter belongs to this base model",
            ) from error

    def rows_of_a(self) -> dict[str, torch.Tensor]:
        """A (r, in) of each linear, by its name in the decoder ("layers.0.self_attn.q_proj")."""
        from safetensors import safe_open

        found = {}
        with safe_open(self.adapter / WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  (it is no dict)
                match = SIDE.fullmatch(key)
                if match and match["side"] == "A" and (at := match["linear"].find("layers.")) >= 0:
                    found[match["linear"][at:]] = file.get_tensor(key)
        return found


def open_model(model: str, *, base: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """Open what `open_checkpoint` opens, or a PEFT LoRA folder.

    Args:
        model: a model, or a folder with adapter_config.json.
        base: the model that an adapter goes on; None: the one that adapter_config.json names.
        trust_remote_code: accept a base that names code of its own.

    Raises:
        KitError: as `open_checkpoint`; if the adapter is no LoRA, its base is not found, or they do not fit together.
    """
    folder = Path(model).expanduser()
    if not (folder / CONFIG).is_file() or (folder / "config.json").exists():
        return open_checkpoint(model, trust_remote_code=trust_remote_code)
    config = _adapter_config(folder)
    sides = _sides(folder)
    named = base or config.get("base_model_name_or_path")
    if not named:
        raise usage_error("the adapter does not say which model it goes on", folder / CONFIG, "name it with --base")
    try:
        opened = open_checkpoint(str(named), trust_remote_code=trust_remote_code)
    except KitError as error:
        if base is None:
            error.what = f"the adapter's base model is not there: {error.what}"
            error.where, error.next_step = str(folder / CONFIG), "name the base model with --base"
        raise
    for linear, pair in sides.items():
        _check_fit(folder, opened, linear, pair)
    return AdaptedCheckpoint(
        model,
        opened.folder,
        opened.config,
        opened.tensors,
        opened.files,
        opened.places,
        base=opened,
        adapter=folder,
        sides=sides,
    )


def _adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise usage_error(f"{CONFIG} cannot be read: {error}", folder, "get the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise usage_error(
            "only LoRA adapters are understood", folder / CONFIG, "merge the adapter into its base with PEFT"
        )
    return config


def _sides(folder: Path) -> dict[str, dict[str, TensorInfo]]:
    if not (folder / WEIGHTS).is_file():
        raise usage_error(
            f"{WEIGHTS} is missing", folder, "save the adapter with PEFT's save_pretrained, as safetensors"
        )
    sides: dict[str, dict[str, TensorInfo]] = {}
    for key, info in safetensors_tensors(folder / WEIGHTS).items():
        if match := SIDE.fullmatch(key):
            sides.setdefault(match["linear"], {})[match["side"]] = info
    if not sides:
        raise usage_error("the adapter has no lora_A and lora_B", folder / WEIGHTS, "get the adapter again")
    return sides


def _check_fit(folder: Path, base: Checkpoint, linear: str, pair: dict[str, TensorInfo]) -> None:
    weight = base.tensors.get(f"{linear}.weight")
    fits = (
        weight is not None
        and pair.keys() == {"A", "B"}
        and (pair["B"].shape[0], pair["A"].shape[-1]) == tuple(weight.shape)
        and pair["A"].shape[0] == pair["B"].shape[-1]
    )
    if not fits:
        raise usage_error(
            f"the adapter does not fit on {base.source}: '{linear}'",
            folder / WEIGHTS,
            "name the model that it was trained on with --base",
        )
