"""Run a model one decoder layer at a time: tensors are read when a layer needs them and freed after it.

Peak memory is one layer, the activations, and (for the first and last step) the embedding or the output head.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kit.convert.checkpoint import Checkpoint, exact_attention
from kit.convert.errors import KitError
from kit.convert.work import disk_errors
from kit.families import family_of

COMPUTE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorView:
    """A checkpoint's tensors with newer ones laid over them, all read from disk when asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._overlay: dict[str, Any] = {}
        self.pending: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.pending or name in self._overlay or name in self._checkpoint.tensors

    def is_new(self, name: str) -> bool:
        """Whether a recipe has added the tensor; such ones keep their dtype (fp32), so that training does not round."""
        return name in self and name not in self._checkpoint.tensors

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Tensor:
        """Return the newest version of a tensor.

        Raises:
            KitError: if the model has no such tensor.
        """
        if name in self.pending:
            tensor = self.pending[name]
        elif name in self._overlay:
            tensor = self._overlay[name].get_tensor(name)
        elif name in self._checkpoint.tensors:
            return self._checkpoint.read(name, dtype=dtype, device=str(device))
        else:
            raise KitError(
                f"the model has no tensor '{name}'",
                where=self._checkpoint.source,
                next_step="check that config.json and the weights belong together",
            )
        return tensor.to(device=device, dtype=dtype, copy=True)  # files are mapped: later reads would see a change

    def write(self, name: str, tensor: Tensor) -> None:
        """Replace or add a tensor (prepare stages); kept in memory until the stage is committed."""
        self.pending[name] = tensor.detach().to("cpu").contiguous()

    def snapshot(self) -> TensorView:
        """The model as it is now, whatever is laid over it later."""
        view = TensorView(self._checkpoint)
        view._overlay = dict(self._overlay)
        return view

    def lay_over(self, path: Path) -> None:
        """Let the tensors of a safetensors file take precedence."""
        handle = safe_open(path, framework="pt")
        self._overlay |= dict.fromkeys(handle.keys(), handle)


@dataclass
class Activations:
    """Hidden states between two layers: `hidden` (N, T, hidden) and `position_ids` (N, T), on the CPU or on disk."""

    hidden: Tensor
    position_ids: Tensor

    def batches(self, size: int, device: str | torch.device = "cpu") -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, hidden, position_ids) for `size` rows at a time, on `device`."""
        for start in range(0, len(self.hidden), size):
            rows = slice(start, start + size)
            yield rows, self.hidden[rows].to(device), self.position_ids[rows].to(device)


class Scratch:
    """Where activations of a run live: in memory, or in files that vanish with the tensors in them.

    Args:
        folder: of the files; None for memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, its numbers not set.

        Raises:
            KitError: if the disk has no room for it; on Linux it is taken at once, so that no later write can fail.
        """
        if self.folder is None or not math.prod(shape):
            return torch.empty(tuple(shape), dtype=dtype)
        with disk_errors(self.folder):
            number, name = tempfile.mkstemp(prefix="activations-", dir=self.folder)
            try:
                if hasattr(os, "posix_fallocate"):  # Linux
                    os.posix_fallocate(number, 0, math.prod(shape) * dtype.itemsize)
                return torch.from_file(name, shared=True, size=math.prod(shape), dtype=dtype).view(tuple(shape))
            finally:
                os.close(number)
                os.unlink(name)  # what is mapped stays until nobody holds it; a killed run leaves nothing behind


class Recorder:
    """Batches of rows, collected into one tensor (N, ...) as they come.

    Args:
        scratch: where it lives.
        num_rows: N.
        device: where it lives instead; None: in the scratch.
    """

    def __init__(self, scratch: Scratch, num_rows: int, device: str | None = None) -> None:
        self.scratch, self.num_rows, self.device, self._filled = scratch, num_rows, device, 0
        self._tensor: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        """Take the next rows (B, ...)."""
        if self._tensor is None:
            shape = (self.num_rows, *batch.shape[1:])
            if self.device is None:
                self._tensor = self.scratch.empty(shape, batch.dtype)
            else:
                self._tensor = torch.empty(shape, dtype=batch.dtype, device=self.device)
        self._tensor[self._filled : self._filled + len(batch)] = batch.detach()
        self._filled += len(batch)

    @property
    def tensor(self) -> Tensor:
        """All rows, on the CPU or on the device that was named."""
        assert self._tensor is not None
        assert self._filled == self.num_rows, "rows are missing"
        return self._tensor


class SoftCap(nn.Module):
    """Logits pressed into (-cap, cap), as Gemma 2 has them: cap · tanh(x / cap)."""

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        """Press."""
        return torch.tanh(logits / self.cap) * self.cap


class _NoPositions(nn.Module):
    """Stands where learned positions would be added again, before each layer."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return zeros that broadcast."""
        return torch.zeros(1, device=position_ids.device)


class _PassThrough(nn.Module):
    """Stands where a layer is not resident."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states as they are."""
        return hidden_states


def build_skeleton(config: dict[str, Any]) -> Any:
    """Build the model of a config.json without memory for weights (on the meta device), its experts as single linears.

    Raises:
        KitError: if transformers does not know the architecture.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    import kit.modules  # noqa: F401  (registers our architectures)
    from kit.modules.experts import separate_experts
    from kit.modules.quantized import quantize_modules

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise KitError(
            f"transformers does not know the architecture '{model_type}'",
            where="config.json: model_type",
            next_step="upgrade transformers, or check config.json",
        )
    apart = ("model_type", "auto_map", "quantization_config")
    values = {name: value for name, value in config.items() if name not in apart}
    with torch.device("meta"):
        found = CONFIG_MAPPING[model_type].from_dict(values)
        model = AutoModelForCausalLM.from_config(found, **exact_attention(config)).eval()
    if "quantization_config" in config:
        quantize_modules(model, config["quantization_config"])
    return separate_experts(model)


class StreamedModel:
    """A causal language model of which one decoder layer is resident at a time.

    The family's own forward code runs: layers that are not resident pass hidden states through, so masks, positions and
    keyword arguments are right for every architecture.

    Args:
        config: config.json as a dict.
        view: where tensors are read from.
        device: where the resident layer lives.
        dtype: its compute dtype.
        round_to: round weights to this dtype first (what a file of that dtype will hold).
        scratch: where activations live; None: in memory.
    """

    def __init__(
        self,
        config: dict[str, Any],
        view: TensorView,
        *,
        device: str,
        dtype: torch.dtype,
        round_to: torch.dtype | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.scratch = scratch or Scratch()
        self.view, self.device, self.dtype, self.round_to = view, device, dtype, round_to
        self.model = build_skeleton(config)
        self.base = self.model.base_model
        self.prefix = f"{self.model.base_model_prefix}."
        self.family = family_of(str(config["model_type"]))
        self._layers, self._norm = list(getattr(self.base, self.family.layers)), getattr(self.base, self.family.norm)
        setattr(self.base, self.family.layers, nn.ModuleList(_PassThrough() for _ in self._layers))
        setattr(self.base, self.family.norm, nn.Identity())
        self._positions = getattr(self.base, self.family.positions) if self.family.positions else None
        if self._positions is not None:
            setattr(self.base, self.family.positions, _NoPositions())
        if hasattr(self.base, "rotary_emb"):
            self.base.rotary_emb = type(self.base.rotary_emb)(config=self.base.config).to(device)
        self._ropes = isinstance((getattr(self.base.config, "rope_parameters", None) or {}).get("full_attention"), dict)

    def __len__(self) -> int:
        return len(self._layers)

    def layer_prefix(self, index: int) -> str:
        """Name of a layer in the checkpoint, with the dot behind it."""
        return f"{self.prefix}{self.family.layers}.{index}."

    def layer_names(self, index: int) -> list[str]:
        """Names of a layer's tensors, without the prefix."""
        return list(self._layers[index].state_dict())

    def layer_on_meta(self, index: int) -> nn.Module:
        """A layer without its weights."""
        return self._layers[index]

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Make one layer resident: its module, weights frozen; parameters the checkpoint lacks are initialised."""
        module = self._materialise(self._layers[index], self.layer_prefix(index))
        layers = getattr(self.base, self.family.layers)
        layers[index] = module
        try:
            yield module
        finally:
            layers[index] = _PassThrough()

    def attention(self, layer: nn.Module) -> Any:
        """The attention of a decoder layer."""
        return getattr(layer, self.family.attention)

    def output_projection(self, layer: nn.Module) -> nn.Module:
        """The linear behind the heads of a decoder layer."""
        return getattr(self.attention(layer), self.family.output)

    def position_embeddings(self, hidden: Tensor, position_ids: Tensor, index: int) -> Any:
        """What a layer's attention gets of the positions (B, T): cos and sin of RoPE, None where there is none."""
        if not hasattr(self.base, "rotary_emb"):
            return None
        config = self.base.config
        kinds = (config.layer_types[index],) if self._ropes else ()
        return self.base.rotary_emb(hidden, position_ids, *kinds)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Run hidden states (B, T, hidden) through the resident layer."""
        return self.base(inputs_embeds=hidden, position_ids=position_ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def embed(self, input_ids: Tensor, position_ids: Tensor, batch_size: int = 4) -> Activations:
        """Turn token ids (N, T) into the first layer's inputs."""
        name = self.family.embedding
        tokens = self._materialise(getattr(self.base, name), f"{self.prefix}{name}.")
        places: Callable[[Tensor], Any] = lambda _: 0  # noqa: E731
        if self._positions is not None:
            places = self._materialise(self._positions, f"{self.prefix}{self.family.positions}.")
        hidden = Recorder(self.scratch, len(input_ids))
        for ids, positions in zip(input_ids.split(batch_size), position_ids.split(batch_size), strict=True):
            hidden.add(tokens(ids.to(self.device)) + places(positions.to(self.device)))
        return Activations(hidden.tensor, position_ids)

    @torch.no_grad()
    def advance(self, inputs: Activations, batch_size: int = 4) -> Activations:
        """Run all rows through the resident layer."""
        out = self.scratch.empty(inputs.hidden.shape, inputs.hidden.dtype)
        for rows, hidden, positions in inputs.batches(batch_size, self.device):
            out[rows] = self.forward(hidden, positions).to(out.device)
        return Activations(out, inputs.position_ids)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: (B, T, hidden) -> (B, T, vocabulary)."""
        return self.head()(hidden.to(self.device))

    def head(self) -> nn.Sequential:
        """Make the final norm, the output head, and the cap of the logits where there is one, resident."""
        norm = self._materialise(self._norm, f"{self.prefix}{self.family.norm}.")
        head = self.model.get_output_embeddings()
        resident = copy.deepcopy(head)
        own = [name for name in resident.state_dict() if f"lm_head.{name}" in self.view]  # a rounded one has several
        tied = {} if own else {"weight": self._read(f"{self.prefix}{self.family.embedding}.weight")}
        weights = {name: self._read(f"lm_head.{name}") for name in own} | tied
        resident.load_state_dict(weights, strict=False, assign=True)
        cap = getattr(self.base.config, "final_logit_softcapping", None)
        return nn.Sequential(norm, resident.requires_grad_(False), *([SoftCap(cap)] if cap else []))

    def resident(self) -> Any:
        """Return the whole model with its weights in memory."""
        setattr(self.base, self.family.layers, nn.ModuleList(self._layers))
        setattr(self.base, self.family.norm, self._norm)
        if self._positions is not None:
            setattr(self.base, self.family.positions, self._positions)
        self._fill(self.model, "")
        self.model.tie_weights()
        return self.model

    def _materialise(self, module: nn.Module, prefix: str) -> nn.Module:
        resident = copy.deepcopy(module)
        self._fill(resident, prefix)
        return resident

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module its tensors; parameters that the checkpoint lacks are initialised, in fp32."""
        names = [name for name in module.state_dict() if prefix + name in self.view]
        known = {*names, *(getattr(module, "all_tied_weights_keys", None) or ())}
        for path, part in module.named_modules():
            if hasattr(part, "scalar_embed_scale"):  # Gemma's: a buffer that is in no file
                part.embed_scale = torch.tensor(part.scalar_embed_scale, device=self.device)
            own = {f"{path}.{name}".lstrip(".") for name, _ in part.named_parameters(recurse=False)}
            if own - known:
                part.to_empty(device=self.device, recurse=False).float()
                self.model._init_weights(part)
        module.load_state_dict({name: self._read(prefix + name) for name in names}, strict=False, assign=True)
        module.requires_grad_(False)

    def _read(self, name: str) -> Tensor:
        stored = self.view.read(name)
        if stored.dtype not in COMPUTE_DTYPES:  # packed integers, FP8
            return stored.to(self.device)
        if self.round_to is not None:
            return stored.to(self.round_to).to(device=self.device, dtype=self.dtype)
        return stored.to(device=self.device, dtype=None if self.view.is_new(name) else self.dtype)


@torch.no_grad()
def streamed_hidden(model: StreamedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """What leaves the last layer for ids (N, T), before the final norm: (N, T, hidden) on the CPU."""
    activations = model.embed(input_ids, position_ids)
    for index in range(len(model)):
        with model.layer(index):
            activations = model.advance(activations)
    return activations.hidden


def streamed_logits(model: StreamedModel, input_ids: Tensor) -> Tensor:
    """Logits (B, T, vocabulary) of whole sequences (B, T), one layer resident at a time."""
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return model.logits(streamed_hidden(model, input_ids, positions))
