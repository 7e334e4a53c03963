"""Covariances: the second moment C = mean of x xᵀ of what enters a model's linears, one for each distinct input.

q, k and v read the same input, and so do gate and up: linears that are handed the same tensor in a forward pass share
one C. Stored as fp32 upper triangles in safetensors, with what they were measured on, so that several recipes and
several runs use one measurement.

Linears go by their names in the decoder ("layers.0.self_attn.q_proj"), whatever wraps it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kit.convert.adapter_recipe import ROUTED, decoder_linears, select_targets
from kit.convert.checkpoint import Checkpoint, check_matches_config
from kit.convert.covariance import BATCH_ROWS, Moment, add_inputs, check_finite, watch_inputs
from kit.convert.data import DataConfig, TokenRows, load_rows
from kit.convert.errors import KitError, closest
from kit.convert.progress import Progress
from kit.convert.recipe import ModelFacts
from kit.convert.streaming import StreamedModel, TensorView
from kit.convert.work import replacing

FORMAT = "kit-covariances-1"


@dataclass
class Covariances:
    """Second moments of what enters a model's linears.

    Attributes:
        linears: for each linear's name the name of the linear under which its input's moment is kept.
        packed: (K (K + 1) / 2,) fp32 by that name, the upper triangle of C row by row, on the CPU.
        tokens: by that name, how many tokens it was measured on.
        fingerprint: of the model (`model_fingerprint`).
        sources: what text: {"source", "sha256", "tokens", "weight"} for each data set; weights sum to 1.
    """

    linears: dict[str, str]
    packed: dict[str, Tensor]
    tokens: dict[str, int]
    fingerprint: str
    sources: list[dict[str, Any]] = field(default_factory=list)

    def get(self, linear: str, device: str | torch.device = "cpu") -> Tensor:
        """C (K, K) fp32 of a linear's input, mean over tokens.

        Raises:
            KitError: if the linear was not measured.
        """
        self.check([linear])
        return unpack(self.packed[self.linears[linear]].to(device))

    def tokens_of(self, linear: str) -> int:
        """How many tokens a linear's C was measured on.

        Raises:
            KitError: if the linear was not measured.
        """
        self.check([linear])
        return self.tokens[self.linears[linear]]

    def check(self, names: Iterable[str], model: Any = None) -> None:
        """Refuse covariances that lack a linear, or are of another model than the one given (loaded with weights).

        Raises:
            KitError: naming what is wrong.
        """
        if model is not None and model_fingerprint(model) != self.fingerprint:
            raise KitError(
                "the covariances were measured on another model",
                where=", ".join(str(source["source"]) for source in self.sources) or "covariances",
                next_step="measure them on this model, with the weights as they are now",
            )
        missing = [name for name in names if name not in self.linears]
        if missing:
            raise KitError(
                f"the covariances lack '{missing[0]}'"
                + (f" and {len(missing) - 1} other linears" if missing[1:] else ""),
                where=", ".join(str(source["source"]) for source in self.sources) or "covariances",
                next_step=f"{closest(missing[0], self.linears)}measure them again for all target modules",
            )

    def save(self, path: Path) -> None:
        """Write a safetensors file, through a temporary sibling.

        Raises:
            KitError: if the disk is full or not writable.
        """
        from safetensors.torch import save_file

        about = {"linears": self.linears, "tokens": self.tokens, "sources": self.sources}
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint} | {k: json.dumps(v) for k, v in about.items()}
        with replacing(path) as part:
            save_file(self.packed, part, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Covariances:
        """Read a file that `save` wrote.

        Raises:
            KitError: if it is not there, or is none.
        """
        from safetensors import SafetensorError, safe_open

        advice = "give a file of covariances that `kit` wrote"
        if not path.is_file():
            raise KitError("there is no such file of covariances", where=str(path), next_step=advice)
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        except (SafetensorError, OSError) as error:
            raise KitError(f"the file cannot be read: {error}", where=str(path), next_step=advice) from error
        if about.get("format") != FORMAT:
            raise KitError("the file holds no covariances", where=str(path), next_step=advice)
        linears, tokens, sources = (json.loads(about[key]) for key in ("linears", "tokens", "sources"))
        return cls(linears, packed, tokens, about["fingerprint"], sources)

    @classmethod
    def merge(cls, parts: Sequence[tuple[Covariances, float]]) -> Covariances:
        """The weighted mean Σ w C / Σ w of several data sets' covariances of one model.

        With their numbers of tokens as weights the data sets are pooled.

        Raises:
            KitError: if they are of different models or linears, or a weight is not positive.
        """
        first, total = parts[0][0], sum(weight for _, weight in parts)
        for other, weight in parts:
            same = other.fingerprint == first.fingerprint and other.linears == first.linears
            if not same or not weight > 0:
                raise KitError(
                    "covariances of different models or linears cannot be merged"
                    if not same
                    else "a weight is not > 0",
                    where=", ".join(str(source["source"]) for source in other.sources) or "covariances",
                    next_step="measure them on one model for the same targets" if not same else "give positive weights",
                )
        packed = {
            name: sum(
                (other.packed[name].double() * (w / total) for other, w in parts), torch.zeros((), dtype=torch.double)
            )
            for name in first.packed
        }
        return cls(
            first.linears,
            {name: tensor.float() for name, tensor in packed.items()},
            {name: sum(other.tokens[name] for other, _ in parts) for name in first.tokens},
            first.fingerprint,
            [s | {"weight": s["weight"] * w / total} for other, w in parts for s in other.sources],
        )


def pack(square: Tensor) -> Tensor:
    """The upper triangle of a symmetric (K, K), row by row: (K (K + 1) / 2,)."""
    rows, columns = torch.triu_indices(*square.shape, device=square.device)
    return square[rows, columns]


def unpack(triangle: Tensor) -> Tensor:
    """The symmetric (K, K) of a packed upper triangle (K (K + 1) / 2,)."""
    size = (isqrt(8 * triangle.numel() + 1) - 1) // 2
    square = triangle.new_empty(size, size)
    rows, columns = torch.triu_indices(size, size, device=triangle.device)
    square[rows, columns] = square[columns, rows] = triangle
    return square


class _Inputs:
    """Moments of what enters some linears while a module runs, one for those that are handed the same tensor.

    Which those are is seen in the first forward pass: the same memory, seen in the same way, not written to in between.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self.linears = linears
        self.kept_by: dict[str, str] = {}
        self.moments: dict[str, Moment] = {}
        self.mask: Tensor | None = None  # (B, T), of the batch that runs
        self._pass: list[tuple[str, Tensor, int]] = []

    @contextmanager
    def watch(self, module: nn.Module, prefix: str) -> Iterator[None]:
        """Collect while the module's linears (their names without the prefix) run."""
        with watch_inputs(module, {name.removeprefix(prefix): partial(self._see, name) for name in self.linears}):
            yield

    def start(self, mask: Tensor | None) -> None:
        """Announce a batch: which of its tokens count (B, T), None for all."""
        self.mask, self._pass = mask, []

    def _see(self, name: str, x: Tensor) -> None:
        if name not in self.kept_by:  # x is held for the time of the pass, so that no later tensor takes its address
            same = (other for other, y, version in self._pass if _is_same(x, y) and x._version == version)
            self.kept_by[name] = next(same, name)
            self._pass.append((name, x, x._version))
        if self.kept_by[name] != name:
            return
        if name not in self.moments:
            size = x.shape[-1]
            self.moments[name] = Moment(torch.zeros(size, size, device=x.device), torch.zeros(size, device=x.device), 0)
        if self.mask is not None:  # taken out, so that what stands in padding, even NaN, does not matter
            x = x[self.mask.to(x.device)]
        add_inputs(self.moments[name], x)

    def take(self, index: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Packed means and numbers of tokens, by the name of the linear under which they are kept.

        Raises:
            KitError: if an input was not finite.
        """
        packed, tokens = {}, {}
        for name, moment in self.moments.items():
            check_finite(index, name, moment)
            packed[name], tokens[name] = pack(moment.second / max(moment.tokens, 1)).cpu(), moment.tokens
        return packed, tokens


def _is_same(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)


def measure_covariances(
    checkpoint: Checkpoint,
    data: DataConfig,
    *,
    target_modules: list[str] | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Covariances:
    """Read or sample text and measure what enters a model's linears on it.

    Args:
        checkpoint: a ...ForCausalLM.
        data: the text; `self` samples it from the model, which is then loaded whole for a while.
        target_modules: linears by the end of their names; None: all in the decoder layers.
        dtype: compute dtype, "auto" is the checkpoint's; sums are fp32.
        device: where to run.
        seed: of the choice of text.
        trust_remote_code: allow the tokenizer's own code to run.
        progress: shows layers.

    Raises:
        KitError: as `collect_covariances`, or if the data cannot be read.
    """
    targets = select_targets(list(decoder_linears(ModelFacts.of(checkpoint))), target_modules)
    check_matches_config(checkpoint)
    tokenizer, whole = checkpoint.load_tokenizer(trust_remote_code), None
    if data.dataset == "self":
        whole = checkpoint.load_model(checkpoint.compute_dtype(dtype), device, trust_remote_code)
    rows = load_rows(data, tokenizer, seed=seed, model=whole, progress=progress)
    del whole
    return collect_covariances(checkpoint, rows, targets=targets, device=device, dtype=dtype, progress=progress)


@torch.no_grad()
def collect_covariances(
    checkpoint: Checkpoint,
    rows: TokenRows,
    *,
    targets: Sequence[str],
    device: str = "cpu",
    dtype: str = "auto",
    attention_mask: Tensor | None = None,
    progress: Progress | None = None,
) -> Covariances:
    """Run a causal language model over text, one layer resident at a time, and measure what enters its linears.

    Args:
        checkpoint: a ...ForCausalLM.
        rows: packed rows (N, T); documents in one row do not see each other.
        targets: linears, by their names in the decoder.
        device: where to run.
        dtype: compute dtype, "auto" is the checkpoint's; sums are fp32.
        attention_mask: (N, T), 0 for padding, which is neither counted nor seen by other tokens.
        progress: shows layers.

    Raises:
        KitError: if the model cannot be streamed, a target is not in it, or an activation is not finite.
    """
    progress, digest = progress or Progress(), hashlib.sha256()
    check_matches_config(checkpoint)
    model = StreamedModel(
        checkpoint.config, TensorView(checkpoint), device=device, dtype=checkpoint.compute_dtype(dtype)
    )
    mask, positions = None, rows.position_ids
    if attention_mask is not None:
        mask = attention_mask.bool()
        positions = _apart(positions, mask)
    found = Covariances({}, {}, {}, "", [])
    inputs = model.embed(rows.input_ids, positions)
    with progress.task("covariances, layers", len(model)):
        for index in range(len(model)):
            prefix = f"layers.{index}."
            with model.layer(index) as module:
                digest.update(_digest(module, prefix))
                names = [name for name in targets if name.startswith(prefix)]
                seen = _Inputs(_linears(module, names, prefix))
                outputs = torch.empty_like(inputs.hidden)
                with seen.watch(module, prefix):
                    for batch, hidden, where in inputs.batches(BATCH_ROWS, device):
                        seen.start(None if mask is None else mask[batch])
                        outputs[batch] = model.forward(hidden, where).to(outputs.device)
                _add(found, seen, index)
            inputs.hidden = outputs
            progress.step(1)
    return _finished(found, targets, digest.hexdigest(), rows.source, rows.sha256)


@torch.no_grad()
def collect_from_model(
    model: Any,
    batches: Iterable[dict[str, Tensor]],
    *,
    targets: Sequence[str],
    source: str = "",
    sha256: str = "",
    progress: Progress | None = None,
) -> Covariances:
    """The same with the whole model in memory: for models that take images, whose forward is not a stack of layers.

    All moments stay on the model's device until the end.

    Args:
        model: its language model's decoder is found with `get_decoder()`.
        batches: keyword arguments of its forward; `attention_mask` (B, T) says what is padding.
        targets: linears, by their names in the decoder.
        source: where the data is from, for the record.
        sha256: of the data.
        progress: shows batches.

    Raises:
        KitError: if a target is not in the model, or an activation is not finite.
    """
    progress, decoder, training = progress or Progress(), decoder_of(model), model.training
    seen = _Inputs(_linears(decoder, targets, ""))
    model.eval()
    try:
        with seen.watch(decoder, ""):
            for batch in batches:
                mask = batch.get("attention_mask")
                seen.start(None if mask is None else mask.bool())
                model(**{name: value.to(model.device) for name, value in batch.items()})
                progress.step(1)
    finally:
        model.train(training)
    found = Covariances({}, {}, {}, "", [])
    for index in range(len(decoder.layers)):
        own = _Inputs({})
        own.kept_by = {name: kept for name, kept in seen.kept_by.items() if name.startswith(f"layers.{index}.")}
        own.moments = {name: moment for name, moment in seen.moments.items() if name in own.kept_by}
        _add(found, own, index)
    return _finished(found, targets, model_fingerprint(model), source, sha256)


def decoder_of(model: Any) -> Any:
    """The language model's stack of decoder layers in a model, wrapped by PEFT or not.

    Raises:
        KitError: if there is none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if not hasattr(decoder, "layers"):
        raise KitError(
            "no decoder layers were found in the model",
            where=type(base).__name__,
            next_step="adapters and covariances need a language model whose get_decoder() has `layers`",
        )
    return decoder


def model_fingerprint(model: Any) -> str:
    """Hash of the linears in a model's decoder layers: their names, shapes and first rows, rounded to bf16.

    The same for a checkpoint loaded in 32 or in 16 bits, from any folder, with or without a head.
    """
    digest = hashlib.sha256()
    for index, layer in enumerate(decoder_of(model).layers):
        digest.update(_digest(layer, f"layers.{index}."))
    return digest.hexdigest()


def _digest(layer: nn.Module, prefix: str) -> bytes:
    """Hash of one layer's linears; experts are left out, which are single linears only where layers are streamed."""
    digest = hashlib.sha256()
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and not ROUTED.search(f".{name}"):
            digest.update(f"{prefix}{name} {tuple(module.weight.shape)}".encode())
            digest.update(module.weight[0].detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.digest()


def _linears(module: nn.Module, names: Sequence[str], prefix: str) -> dict[str, nn.Linear]:
    """The linears of those names (which begin with the prefix) in a module.

    Raises:
        KitError: naming one that is not there, or is no linear.
    """
    known, found = dict(module.named_modules()), {}
    for name in names:
        linear = known.get(name.removeprefix(prefix))
        if not isinstance(linear, nn.Linear):
            raise KitError(
                f"'{name}' is no linear of the model",
                where="the targets of covariances",
                next_step=f"{closest(name, (prefix + n for n, m in known.items() if isinstance(m, nn.Linear)))}"
                "name linears of the decoder layers",
            )
        found[name] = linear
    return found


def _add(found: Covariances, seen: _Inputs, index: int) -> None:
    packed, tokens = seen.take(index)
    found.linears |= seen.kept_by
    found.packed |= packed
    found.tokens |= tokens


def _finished(found: Covariances, targets: Sequence[str], fingerprint: str, source: str, sha256: str) -> Covariances:
    found.fingerprint = fingerprint
    found.sources = [
        {"source": source, "sha256": sha256, "tokens": max(found.tokens.values(), default=0), "weight": 1.0}
    ]
    found.check(targets)
    return found


def _apart(position_ids: Tensor, mask: Tensor) -> Tensor:
    """Positions (N, T) that set padding apart as documents of its own, so that no token sees it.

    transformers tells packed sequences apart by where positions do not go on.
    """
    index = torch.arange(mask.shape[1]).expand_as(position_ids)
    starts = (position_ids == 0) | (index == 0)
    starts[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
