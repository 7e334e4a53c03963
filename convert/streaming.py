"""Run a model one decoder layer at a time: tensors are read when a layer needs them and freed after it.

Peak memory is one layer, the activations, and (for the first and last step) the embedding or the output head.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kit.convert.checkpoint import Checkpoint
from kit.convert.errors import KitError

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
    """Hidden states between two layers: `hidden` (N, T, hidden) and `position_ids` (N, T), on the CPU."""

    hidden: Tensor
    position_ids: Tensor

    def batches(self, size: int, device: str | torch.device = "cpu") -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, hidden, position_ids) for `size` rows at a time, on `device`."""
        for start in range(0, len(self.hidden), size):
            rows = slice(start, start + size)
            yield rows, self.hidden[rows].to(device), self.position_ids[rows].to(device)


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
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(values)).eval()
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
    """

    def __init__(
        self,
        config: dict[str, Any],
        view: TensorView,
        *,
        device: str,
        dtype: torch.dtype,
        round_to: torch.dtype | None = None,
    ) -> None:
        self.view, self.device, self.dtype, self.round_to = view, device, dtype, round_to
        self.model = build_skeleton(config)
        self.base = self.model.base_model
        self.prefix = f"{self.model.base_model_prefix}."
        self._layers, self._norm = list(self.base.layers), self.base.norm
        self.base.layers = nn.ModuleList(_PassThrough() for _ in self._layers)
        self.base.norm = nn.Identity()
        self.base.rotary_emb = type(self.base.rotary_emb)(config=self.base.config).to(device)

    def __len__(self) -> int:
        return len(self._layers)

    def layer_prefix(self, index: int) -> str:
        """Name of a layer in the checkpoint, with the dot behind it."""
        return f"{self.prefix}layers.{index}."

    def layer_names(self, index: int) -> list[str]:
        """Names of a layer's tensors, without the prefix."""
        return list(self._layers[index].state_dict())

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Make one layer resident: its module, weights frozen; parameters the checkpoint lacks are initialised."""
        module = self._materialise(self._layers[index], self.layer_prefix(index))
        self.base.layers[index] = module
        try:
            yield module
        finally:
            self.base.layers[index] = _PassThrough()

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Run hidden states (B, T, hidden) through the resident layer."""
        return self.base(inputs_embeds=hidden, position_ids=position_ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Activations:
        """Turn token ids (N, T) into the first layer's inputs."""
        table = self.base.embed_tokens
        resident = self._materialise(table, f"{self.prefix}embed_tokens.")
        hidden = resident(input_ids.to(self.device)).cpu()
        return Activations(hidden, position_ids)

    @torch.no_grad()
    def advance(self, inputs: Activations, batch_size: int = 4) -> Activations:
        """Run all rows through the resident layer."""
        out = torch.empty_like(inputs.hidden)
        for rows, hidden, positions in inputs.batches(batch_size, self.device):
            out[rows] = self.forward(hidden, positions).to(out.device)
        return Activations(out, inputs.position_ids)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output head: (B, T, hidden) -> (B, T, vocabulary)."""
        return self.head()(hidden.to(self.device))

    def head(self) -> nn.Module:
        """Make the final norm and the output head resident, as one module."""
        norm = self._materialise(self._norm, f"{self.prefix}norm.")
        head = self.model.get_output_embeddings()
        tied = "lm_head.weight" not in self.view
        resident = copy.deepcopy(head)
        name = f"{self.prefix}embed_tokens.weight" if tied else "lm_head.weight"
        resident.load_state_dict({"weight": self._read(name)}, strict=False, assign=True)
        return nn.Sequential(norm, resident.requires_grad_(False))

    def resident(self) -> Any:
        """Return the whole model with its weights in memory."""
        self.base.layers, self.base.norm = nn.ModuleList(self._layers), self._norm
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
