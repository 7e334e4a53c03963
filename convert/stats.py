"""What a model does on text: the facts that tell which recipe fits it (`kit inspect MODEL --stats`).

The model runs once, one decoder layer resident at a time; everything is measured while a layer is there.
docs/inspect.md defines each figure. Letters: B rows, T time, H query heads, G key/value heads, D head dim, K input and
N output features.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kit.convert.checkpoint import Checkpoint, check_matches_config
from kit.convert.covariance import BATCH_ROWS, Moment, add_inputs, check_finite, watch_inputs
from kit.convert.data import DataConfig, TokenRows, load_rows
from kit.convert.errors import KitError, closest
from kit.convert.measure import hardware
from kit.convert.progress import Progress
from kit.convert.rounding import Grid, fit_grid, output_error, round_to_nearest
from kit.convert.streaming import Activations, StreamedModel, TensorView
from kit.kernels.int4_fp8 import round_activations

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SITES = {  # linears that read the same input
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
NUM_SINKS = 4  # first tokens of a document that count as sinks (StreamingLLM, arXiv:2309.17453)
WINDOWS = (64, 128, 256)
ERRORS = (0.01, 0.1, 0.2)  # relative output errors at which sparsity is read off
MASSIVE = 1000  # times the median: a massive activation (arXiv:2402.17762)
SPARSITY_TOKENS = 256  # tokens, evenly spread, on which sparsity is searched
SPARSITY_STEPS = 7  # halvings: shares are multiples of 1 / 128
BLOCK_BYTES = 2**27  # of attention weights in memory at once


@dataclass
class ResidualStats:
    """The residual stream behind a layer.

    Attributes:
        largest: max |h|.
        median: median |h|, over all tokens and channels.
        ratio: largest / median.
        channels: the three channels with the largest |h|, and where: {"channel", "value", "ratio", "position" in its
            document, "token"}.
        massive_tokens: tokens with a channel over `MASSIVE` times the median.
        massive_starts: those of them that start a document.
    """

    largest: float
    median: float
    ratio: float
    channels: list[dict[str, Any]]
    massive_tokens: int
    massive_starts: int


@dataclass
class WindowStats:
    """What a window keeps, over the queries that see more keys than the window and the sinks together.

    Attributes:
        size: keys in the window, the query's own included.
        queries: how many such queries there are.
        mass: share of the attention in the window, by head (H,); None without queries.
        mass_with_sinks: the same, the document's first `NUM_SINKS` tokens included.
    """

    size: int
    queries: int
    mass: list[float] | None
    mass_with_sinks: list[float] | None


@dataclass
class AttentionStats:
    """Softmax attention of a layer, by query head (H,); means over queries.

    Attributes:
        entropy: in nats, over queries that see two keys or more; None without any.
        relative_entropy: the same over the log of the number of keys seen: 1 is uniform.
        first_token: share of the mass on the document's first token, over the queries of the smallest window; None
            without any.
        sinks: the same for its first `NUM_SINKS` tokens.
        windows: what windows of `WINDOWS` keys keep.
    """

    entropy: list[float] | None
    relative_entropy: list[float] | None
    first_token: list[float] | None
    sinks: list[float] | None
    windows: list[WindowStats]


@dataclass
class InputStats:
    """What enters the linears of one site, all of which read the same input.

    Attributes:
        droppable: for each of `ERRORS` ("0.2"): the largest share of the entries, smallest |x| first, without which
            the outputs change by that much (mean over tokens of ‖Δy‖ / ‖y‖).
        cett: the same with entries in order of |x_k| · ‖W_:k‖, the size of their contribution; for `down` only.
        effective_rank: exp of the entropy of the second moment's eigenvalues, at most K and the number of tokens.
        energy_top_1_percent: share of Σ x² in the first 1 % of the eigenvectors (at least one).
        energy_top_10_percent: and in the first 10 %.
        channel_energy_top_1_percent: share of Σ x² in the 1 % of the channels that hold most (at least one).
        kurtosis: over the channels of a token, mean over tokens; 3 for a Gaussian.
        max_over_rms: max|x| / rms(x) of a token, mean over tokens.
        largest_max_over_rms: and its largest.
        fp8_error: ‖x - fp8(x)‖ / ‖x‖ of a token, one e4m3 scale each, mean over tokens.
    """

    droppable: dict[str, float]
    cett: dict[str, float] | None
    effective_rank: float
    energy_top_1_percent: float
    energy_top_10_percent: float
    channel_energy_top_1_percent: float
    kurtosis: float
    max_over_rms: float
    largest_max_over_rms: float
    fp8_error: float


@dataclass
class WeightStats:
    """A linear rounded to nearest INT4, symmetric, largest magnitude a group: before any calibration.

    Attributes:
        group_size: inputs that share a scale: 128 where it divides, else 64, else all.
        int4_error: ‖ΔW‖ / ‖W‖.
        int4_output_error: ‖ΔW x‖ / ‖W x‖, root of the ratio of mean squares over tokens.
    """

    group_size: int
    int4_error: float
    int4_output_error: float


@dataclass
class LayerStats:
    """One decoder layer.

    Attributes:
        index: which layer.
        residual: what leaves it.
        attention: None where it is not softmax attention (linearized models).
        inputs: by site: qkv, o, gate_up, down.
        weights: by the linear's name in the layer.
    """

    index: int
    residual: ResidualStats
    attention: AttentionStats | None
    inputs: dict[str, InputStats]
    weights: dict[str, WeightStats]

    def input_of(self, linear: str) -> InputStats:
        """What enters a linear, by its name in the layer."""
        return next(self.inputs[site] for site, names in SITES.items() if linear in names)


@dataclass
class ModelStats:
    """All layers, and on what they were measured."""

    windows: ClassVar[tuple[int, ...]] = WINDOWS
    num_sinks: ClassVar[int] = NUM_SINKS
    settings: dict[str, Any]
    layers: list[LayerStats] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dicts, for JSON."""
        return asdict(self)

    def window_mass(self, size: int, sinks: bool) -> list[float] | None:
        """Attention mass that a window keeps, a mean over heads for each layer with softmax attention.

        Layers without a query that sees more keys than the window and the sinks keep all of it, so they count 1. None
        if that is so everywhere: the text, or the model's own window, is too short to tell.
        """
        windows = [w for layer in self.layers if layer.attention for w in layer.attention.windows if w.size == size]
        if not any(window.queries for window in windows):
            return None
        masses = [window.mass_with_sinks if sinks else window.mass for window in windows]
        return [sum(mass) / len(mass) if mass else 1.0 for mass in masses]


def measure(
    checkpoint: Checkpoint,
    data: DataConfig,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ModelStats:
    """Run a model over text, one layer resident at a time, and measure what docs/inspect.md lists.

    Args:
        checkpoint: the model.
        data: the text; `self` samples it from the model, which is then loaded whole for a while.
        dtype: compute dtype; "auto" is the checkpoint's. Statistics are taken in fp32 or better whatever it is.
        device: where to run.
        seed: of the choice of text.
        trust_remote_code: allow the tokenizer's own code to run.
        progress: shows layers.

    Raises:
        KitError: before weights are read, on an architecture that is not known, quantized weights, a bad dtype or data
            that cannot be read; later, if an activation is not finite.
    """
    progress, compute = progress or Progress(), checkpoint.compute_dtype(dtype)
    _check_family(checkpoint)
    check_matches_config(checkpoint)
    tokenizer = checkpoint.load_tokenizer(trust_remote_code)
    whole = checkpoint.load_model(compute, device, trust_remote_code) if data.dataset == "self" else None
    rows = load_rows(data, tokenizer, seed=seed, model=whole, progress=progress)
    del whole
    stats = ModelStats(
        {
            **rows.summary(),
            "document_starts": int((rows.position_ids == 0).sum()),
            "seed": seed,
            "dtype": str(compute).removeprefix("torch."),
            "device": hardware(device),
            "num_sinks": NUM_SINKS,
            "massive_ratio": MASSIVE,
            "sparsity_tokens": min(SPARSITY_TOKENS, rows.num_tokens),
        }
    )
    model = StreamedModel(checkpoint.config, TensorView(checkpoint), device=device, dtype=compute)
    _observe_attention(model)
    inputs = model.embed(rows.input_ids, rows.position_ids)
    with progress.task("statistics, layers", len(model)):
        for index in range(len(model)):
            with model.layer(index) as module:
                layer, inputs = _measure_layer(index, module, model, inputs, rows, tokenizer)
            stats.layers.append(layer)
            progress.step(1)
    return stats


def _check_family(checkpoint: Checkpoint) -> None:
    """Only architectures whose layers are built as `SITES` says, and whose attention scores are plain q·k."""
    family = str(checkpoint.config.get("model_type"))
    if family.removeprefix("kit_") not in FAMILIES:
        raise KitError(
            f"statistics of the architecture '{family}' are not known",
            where="config.json: model_type",
            next_step=f"{closest(family, FAMILIES)}known are: {', '.join(FAMILIES)}; without --stats any is described",
        )


@torch.no_grad()
def _measure_layer(
    index: int, module: Any, model: StreamedModel, inputs: Activations, rows: TokenRows, tokenizer: Any
) -> tuple[LayerStats, Activations]:
    """Run a resident layer; return what was seen, and what leaves it."""
    linears = {name: module.get_submodule(name) for names in SITES.values() for name in names}
    step = max(1, rows.num_tokens // SPARSITY_TOKENS)
    seen = {site: _Inputs(linears[names[0]].in_features, model.device, step) for site, names in SITES.items()}
    attention, outputs = _Attention(), torch.empty_like(inputs.hidden)
    module.self_attn.observer = attention.add
    with watch_inputs(module, {names[0]: seen[site].add for site, names in SITES.items()}):
        for batch, hidden, attention.position_ids in inputs.batches(BATCH_ROWS, model.device):
            outputs[batch] = model.forward(hidden, attention.position_ids).to(outputs.device)
    weights = {name: linear.weight.float() for name, linear in linears.items()}
    for site, names in SITES.items():
        check_finite(index, names[0], seen[site].moment)
    layer = LayerStats(
        index,
        residual=residual_stats(outputs, rows, tokenizer),
        attention=attention.result(),
        inputs={
            site: seen[site].result(torch.cat([weights[name] for name in names]), site == "down")
            for site, names in SITES.items()
        },
        weights={
            name: weight_stats(weights[name], seen[site].moment.second)
            for site, names in SITES.items()
            for name in names
        },
    )
    return layer, Activations(outputs, inputs.position_ids)


# ---- residual stream


def residual_stats(hidden: Tensor, rows: TokenRows, tokenizer: Any) -> ResidualStats:
    """Find massive activations in hidden states (N, T, hidden); `rows` and the tokenizer say where they are."""
    size = hidden.float().abs()
    median = float(size.median())
    floor = max(median, torch.finfo(torch.float32).tiny)
    by_token, by_channel = size.amax(-1), size.amax((0, 1))
    channels = []
    for channel in by_channel.topk(min(3, len(by_channel))).indices.tolist():
        row, time = divmod(int(size[..., channel].argmax()), size.shape[1])
        channels.append(
            {
                "channel": channel,
                "value": float(hidden[row, time, channel]),
                "ratio": float(by_channel[channel]) / floor,
                "position": int(rows.position_ids[row, time]),
                "token": tokenizer.decode([int(rows.input_ids[row, time])]),
            }
        )
    massive = by_token > MASSIVE * floor
    return ResidualStats(
        largest=float(by_token.max()),
        median=median,
        ratio=float(by_token.max()) / floor,
        channels=channels,
        massive_tokens=int(massive.sum()),
        massive_starts=int((massive & (rows.position_ids == 0)).sum()),
    )


# ---- attention


def _observe_attention(model: StreamedModel) -> None:
    """Let the attention layers' `observer` see queries and keys as attention gets them, after RoPE."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.base.config
    inner = config._attn_implementation
    if getattr(config, "linear_attention", None):
        return  # no softmax over all keys to look at
    attend, name = ALL_ATTENTION_FUNCTIONS[inner], f"kit_observed_{inner}"

    def observed(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        module.observer(query, key, mask, kwargs["scaling"])
        return attend(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(name, observed)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    config._attn_implementation = name


class _Attention:
    """Sums over queries, by head, while a layer runs."""

    def __init__(self) -> None:
        self.position_ids = torch.empty(0)
        self.entropy: dict[str, Tensor] = {}
        self.marked: list[Tensor] = []  # for each window: mass on first token, sinks, window, window and sinks (H, 4)
        self.queries = torch.zeros(1 + len(WINDOWS), dtype=torch.long)  # that see two keys; that each window is for

    def add(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Look at a batch, a row and a block of queries at a time.

        Args:
            query: (B, H, T, D), after RoPE.
            key: (B, G, T, D).
            mask: (B or 1, 1, T, T), True where a query sees a key; None is causal.
            scaling: softmax scale.
        """
        heads, length = query.shape[1], query.shape[2]
        block = max(1, BLOCK_BYTES // (4 * heads * length))
        for row in range(len(query)):
            positions = self.position_ids[row]
            keys = key[row].float()
            queries = query[row].float().unflatten(0, (len(keys), -1))  # (G, H/G, T, D)
            for start in range(0, length, block):
                stop = min(start + block, length)
                now = torch.arange(start, stop, device=query.device)[:, None]
                distance = now - torch.arange(stop, device=query.device)  # (t, keys)
                seen = distance >= 0 if mask is None else mask[row % len(mask), 0, start:stop, :stop]
                scores = queries[:, :, start:stop] @ keys[:, None, :stop].transpose(-1, -2) * scaling
                attention = scores.masked_fill(~seen, -torch.inf).softmax(-1).flatten(0, 1)  # (H, t, keys)
                self._add_block(attention, seen.sum(-1), distance, positions[:stop])

    def _add_block(self, attention: Tensor, count: Tensor, distance: Tensor, positions: Tensor) -> None:
        """Add attention (H, t, keys) of t queries that see `count` (t,) keys."""
        several = count > 1
        entropy = torch.special.entr(attention[:, several]).sum(-1).double()
        found = {"entropy": entropy.sum(-1), "relative_entropy": (entropy / count[several].log()).sum(-1)}
        self.entropy = {name: self.entropy.get(name, 0) + value.cpu() for name, value in found.items()}
        first, sinks = (positions == 0).expand_as(distance), (positions < NUM_SINKS).expand_as(distance)
        for number, size in enumerate(WINDOWS):
            far, near = count > size + NUM_SINKS, distance < size  # keys that are not seen have no mass
            marks = torch.stack([first, sinks, near, near | sinks], -1)[far].to(attention.dtype)
            mass = torch.einsum("htk,tkm->hm", attention[:, far], marks).double().cpu()
            if len(self.marked) == number:
                self.marked.append(torch.zeros_like(mass))
            self.marked[number] += mass
            self.queries[1 + number] += far.sum().cpu()
        self.queries[0] += several.sum().cpu()

    def result(self) -> AttentionStats | None:
        """Means, or None if no softmax attention ran."""
        if not self.marked:
            return None
        several, *far = self.queries.tolist()

        def mean(total: Tensor, queries: int) -> list[float] | None:
            return (total / queries).tolist() if queries else None

        first, sinks = (mean(self.marked[0][:, column], far[0]) for column in (0, 1))
        return AttentionStats(
            **{name: mean(total, several) for name, total in self.entropy.items()},
            first_token=first,
            sinks=sinks,
            windows=[
                WindowStats(size, queries, mean(marked[:, 2], queries), mean(marked[:, 3], queries))
                for size, queries, marked in zip(WINDOWS, far, self.marked, strict=True)
            ],
        )


# ---- inputs and weights of linears


class _Inputs:
    """Sums over the tokens that enter a site, and every `step`-th of them, while a layer runs."""

    def __init__(self, size: int, device: str, step: int) -> None:
        self.moment = Moment(torch.zeros(size, size, device=device), torch.zeros(size, device=device), 0)
        self.step, self.kept, self.largest = step, list[Tensor](), 0.0
        self.sums = torch.zeros(3, dtype=torch.double)  # kurtosis, max over rms, FP8 error

    def add(self, x: Tensor) -> None:
        """Add inputs (B, T, K)."""
        x = x.flatten(0, -2).float()
        self.kept.append(x[-self.moment.tokens % self.step :: self.step][:SPARSITY_TOKENS])
        add_inputs(self.moment, x)
        tiny = torch.finfo(torch.float32).tiny
        centered = x - x.mean(-1, keepdim=True)
        kurtosis = centered.pow(4).mean(-1) / centered.square().mean(-1).square().clamp(min=tiny)
        norm = x.norm(dim=-1).clamp(min=tiny)
        peak = x.abs().amax(-1) / norm * x.shape[-1] ** 0.5
        error = (x - round_activations(x)).norm(dim=-1) / norm
        self.sums += torch.stack([kurtosis, peak, error]).sum(-1).double().cpu()
        self.largest = max(self.largest, float(peak.max()))

    def result(self, weight: Tensor, contributions: bool) -> InputStats:
        """Statistics, given the weights (N, K) of the site's linears, one over the other."""
        x = torch.cat(self.kept)[:SPARSITY_TOKENS]
        kurtosis, peak, error = (self.sums / self.moment.tokens).tolist()
        rank, top_1, top_10 = spectrum(self.moment.second)
        energy = self.moment.second.diagonal().double().sort(descending=True).values
        plain = droppable_shares(x, weight, x.abs())
        cett = droppable_shares(x, weight, x.abs() * weight.norm(dim=0)) if contributions else None
        return InputStats(
            droppable=plain,
            cett=cett,
            effective_rank=rank,
            energy_top_1_percent=top_1,
            energy_top_10_percent=top_10,
            channel_energy_top_1_percent=float(_head_share(energy, 0.01)),
            kurtosis=kurtosis,
            max_over_rms=peak,
            largest_max_over_rms=self.largest,
            fp8_error=error,
        )


def droppable_shares(x: Tensor, weight: Tensor, score: Tensor) -> dict[str, float]:
    """How many inputs a linear can do without, those of small score first: one threshold for all tokens.

    With contributions |x_k| · ‖W_:k‖ as the score, the error is CETT (Sparsing Law, arXiv:2411.02335): the mean over
    tokens of ‖Σ_dropped W_:k x_k‖ / ‖W x‖.

    Args:
        x: inputs (M, K).
        weight: (N, K).
        score: (M, K).

    Returns:
        For each of `ERRORS`, the largest share of the entries whose absence leaves the error at or below it: a multiple
        of 2^-`SPARSITY_STEPS`, found by halving, so rounded down.
    """
    norm = (x @ weight.T).norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
    ordered = score.flatten().sort().values
    known = {0.0: 0.0}

    def error(share: float) -> float:
        if share not in known:
            threshold = ordered[int(share * len(ordered))]
            known[share] = float(((x * (score < threshold)) @ weight.T).norm(dim=-1).div(norm).mean())
        return known[share]

    found = {}
    for limit in ERRORS:
        low = 0.0
        for step in range(1, SPARSITY_STEPS + 1):
            if error(low + 0.5**step) <= limit:
                low += 0.5**step
        found[str(limit)] = low
    return found


def spectrum(second: Tensor) -> tuple[float, float, float]:
    """Effective rank of a second moment (K, K), and the shares of its energy in the first 1 % and 10 % of directions.

    The effective rank is exp(-Σ p log p), p the eigenvalues over their sum (Roy and Vetterli 2007).
    """
    values = torch.linalg.eigvalsh(second).double().clamp(min=0).flip(0)
    p = values / values.sum().clamp(min=torch.finfo(torch.double).tiny)
    return (
        math.exp(float(torch.special.entr(p).sum())),
        float(_head_share(values, 0.01)),
        float(_head_share(values, 0.1)),
    )


def _head_share(ordered: Tensor, share: float) -> Tensor:
    """Part of the sum in the first `share` of falling values, at least one."""
    return ordered[: max(1, round(share * len(ordered)))].sum() / ordered.sum().clamp(
        min=torch.finfo(torch.double).tiny
    )


def weight_stats(weight: Tensor, second: Tensor) -> WeightStats:
    """Error of a weight (N, K) rounded to nearest INT4, by itself and on inputs of second moment (K, K)."""
    size = weight.shape[1]
    group = next((group for group in (128, 64) if size % group == 0), size)
    rounded = round_to_nearest(weight, *fit_grid(weight, Grid(group, clip=False, signed=False))).dequantize()
    return WeightStats(
        group_size=group,
        int4_error=float((rounded - weight).norm() / weight.norm().clamp(min=torch.finfo(weight.dtype).tiny)),
        int4_output_error=math.sqrt(max(output_error(weight, rounded, second), 0.0)),
    )
