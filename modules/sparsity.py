"""What a sparse checkpoint runs on: linears and MLPs that skip the channels whose score is below a threshold.

A model of `model_type: kit_sparse_llama` (and so on for each of `FAMILIES`) is the family's own with some linears
replaced, as the key "sparsity" of its config says:

    {"method": str, "target": float, "dense_prefill": bool, "weighted": bool,
     "linears": [names in a layer, such as "mlp.down_proj"], "neurons": bool,
     "ranks": {name: [rank of each layer]}, "int4_group": int or None}

`InputMask` is the one place that decides what is kept: calibration, evaluation and the kernels all ask it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from kit.kernels.sparse_matvec import (
    dequantize_int4,
    keep_mask,
    pays_on_gpu,
    quantize_int4,
    sparse_linear,
    sparse_linear_int4,
    sparse_linears,
    sparse_swiglu,
)
from kit.modules.own_code import CarriesCode

SAME_INPUT = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


class InputMask(nn.Module):
    """Which channels of which tokens are kept: s_i = 1[|x_i|·scale_i > T_i], at the tokens that may be sparse.

    Parameters: threshold () or (K,), and with `weighted` scale (K,). A checkpoint holds them in its weights' dtype, so
    calibration chooses numbers that bfloat16 can hold.

    Token window: a step of one token is sparse. Of several tokens at once (a prompt, or a text that is scored) the
    first `dense_prefix` are dense and the others sparse; None leaves them all dense.

    Args:
        size: K.
        weighted: whether there is a scale.
        channelwise: whether each channel has a threshold of its own.
        dense_prefix: see above.
    """

    scale: nn.Parameter | None

    def __init__(self, size: int, weighted: bool, channelwise: bool = False, dense_prefix: int | None = None) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(size if channelwise else ()), requires_grad=False)
        self.register_parameter("scale", nn.Parameter(torch.ones(size), requires_grad=False) if weighted else None)
        self.dense_prefix = dense_prefix
        self.counted: Tensor | None = None  # channels kept and channels seen at sparse tokens
        self._kernels: tuple[Any, Tensor, Tensor | None] | None = None

    def scores(self, x: Tensor) -> Tensor:
        """|x|·scale in fp32, (..., K)."""
        score = x.float().abs()
        return score if self.scale is None else score * self.scale.float()

    def for_kernels(self) -> tuple[Tensor, Tensor | None]:
        """Threshold and scale in fp32, as the kernels read them; made once."""
        version = 0 if self.threshold.is_inference() else self.threshold._version
        now = (self.threshold.device, self.threshold.data_ptr(), version)
        if self._kernels is None or self._kernels[0] != now:
            scale = None if self.scale is None else self.scale.detach().float()
            self._kernels = (now, self.threshold.detach().float(), scale)
        return self._kernels[1:]

    def is_dense(self, x: Tensor) -> bool:
        """Whether all tokens of x (..., T, K) are dense."""
        return x.shape[-2] > 1 and (self.dense_prefix is None or self.dense_prefix >= x.shape[-2])

    def forward(self, x: Tensor) -> Tensor | None:
        """(..., T, K) -> bool of the same shape, or None where everything is kept. A NaN is kept: it surfaces."""
        if self.is_dense(x):
            return None
        keep = keep_mask(x, self.threshold.float(), self.scale)
        first = (self.dense_prefix or 0) if x.shape[-2] > 1 else 0
        if self.counted is not None:
            sparse = keep[..., first:, :]
            self.counted += torch.stack([sparse.sum(), torch.tensor(sparse.numel(), device=x.device)])
        if first:
            keep[..., :first, :] = True
        return keep


class SparseLinear(nn.Linear):
    """y = W(s⊙x) + U_r S_r V_rᵀ((1−s)⊙x) + b (R-Sparse, arXiv:2504.19449); of rank 0, the first term (TEAL, WINA).

    Parameters beside those of nn.Linear: mask; with a rank, low_rank_up (r, N) and low_rank_down (r, K).

    Args:
        linear: whose weight (N, K) and bias it takes over.
        mask: decides about the inputs.
        rank: r.
        density: share of inputs that a token is expected to keep.
    """

    low_rank_up: nn.Parameter | None
    low_rank_down: nn.Parameter | None
    shared: SharedInput | None = None

    def __init__(self, linear: nn.Linear, mask: InputMask, rank: int = 0, density: float = 0.5) -> None:
        nn.Module.__init__(self)  # a weight of its own would be thrown away
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.mask, self.density = mask, density
        for name, size in (("low_rank_up", self.out_features), ("low_rank_down", self.in_features)):
            zeros = torch.zeros(rank, size, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=False) if rank else None)

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """((U_r S_r)ᵀ (r, N), V_rᵀ (r, K)), or None."""
        if self.low_rank_up is None or self.low_rank_down is None:
            return None
        return self.low_rank_up, self.low_rank_down

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, K) -> (..., T, N)."""
        low_rank = self.low_rank
        if uses_kernel(x, self.mask, self.density):
            if self.shared is not None and (y := self.shared(self, x)) is not None:
                return y
            threshold, scale = self.mask.for_kernels()
            weight = self.weight.T if self.shared is not None and self.shared.holds(self) else transposed_weight(self)
            return sparse_linear(x, weight, threshold, scale, low_rank=low_rank, bias=self.bias, density=self.density)
        return masked_linear(x, self.mask(x), self.weight, self.bias, low_rank)


class SharedInput:
    """Sparse linears without low rank that read the same input: on a GPU, one launch multiplies them all.

    The first one, called with x, computes the outputs of all; the others then find theirs. Their weights become views
    of one tensor, side by side; there is no copy.

    Args:
        linears: two or three, in the order in which they are called.
    """

    def __init__(self, linears: list[SparseLinear]) -> None:
        self.linears = linears
        self.sizes = [linear.out_features for linear in linears]
        self.bounds = tuple(itertools.accumulate(self.sizes[:-1]))
        self._weight: Tensor | None = None
        self._masks: tuple[list[Tensor], Tensor, Tensor | None] | None = None
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def __call__(self, linear: SparseLinear, x: Tensor) -> Tensor | None:
        """linear(x), or None where it is to be multiplied by itself."""
        if x is self._input and id(linear) in self._outputs:
            y = self._outputs.pop(id(linear))
            self._input = x if self._outputs else None
            return y
        if linear is not self.linears[0] or torch.compiler.is_compiling() or not self._pays(x):
            return None
        thresholds, scales = self._stacked()
        biases: list[Tensor] = [each.bias for each in self.linears if each.bias is not None]
        bias = torch.cat(biases) if len(biases) == len(self.linears) else None
        y = sparse_linears(x, self._side_by_side(), self.bounds, thresholds, scales, bias=bias)
        parts = y.split(self.sizes, -1)
        self._input = x
        self._outputs = {id(each): part for each, part in zip(self.linears[1:], parts[1:], strict=True)}
        return parts[0]

    def holds(self, linear: SparseLinear) -> bool:
        """Whether a linear's weight is a view of the common tensor."""
        if self._weight is None:
            return False
        start = (0, *self.bounds)[self.linears.index(linear)]
        return linear.weight.data_ptr() == self._weight.data_ptr() + start * self._weight.element_size()

    def _pays(self, x: Tensor) -> bool:
        """Whether the kernel is faster; the bounds have to be ones that it takes, and the masks to drop something."""
        weights = sum(linear.weight.numel() for linear in self.linears)
        return all(bound % 256 == 0 for bound in self.bounds) and all(
            pays_on_gpu(x, linear.density, weights)
            and uses_kernel(x, linear.mask, linear.density)
            and linear.low_rank is None
            and (linear.bias is None) == (self.linears[0].bias is None)
            for linear in self.linears
        )

    def _side_by_side(self) -> Tensor:
        if self._weight is None or not all(self.holds(linear) for linear in self.linears):
            self._weight = torch.cat([linear.weight.T for linear in self.linears], 1)
            for linear, part in zip(self.linears, self._weight.split(self.sizes, 1), strict=True):
                linear.weight.data = part.T
        return self._weight

    def _stacked(self) -> tuple[Tensor, Tensor | None]:
        """Thresholds (linears,) and scales (linears, K); made once."""
        masks = [linear.mask.for_kernels() for linear in self.linears]
        now = [threshold for threshold, _ in masks]
        if self._masks is None or any(a is not b for a, b in zip(self._masks[0], now, strict=True)):
            scales = [scale for _, scale in masks if scale is not None]
            stacked = torch.stack(scales) if len(scales) == len(masks) else None
            self._masks = (now, torch.stack(now).flatten(), stacked)
        return self._masks[1:]


class SparseInt4Linear(nn.Module):
    """A `SparseLinear` whose weights are rounded to 4 bits (see `quantize_int4`); its low-rank path is not.

    Parameters: weight_packed (K, N / 2) uint8, weight_scale (K / g, N), mask, and bias, low_rank_up, low_rank_down as
    `SparseLinear` has them.

    Args:
        linear: whose weight is rounded.
        group_size: g, inputs that share a scale.
    """

    def __init__(self, linear: SparseLinear, group_size: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = linear.in_features, linear.out_features, group_size
        # Scales are numbers that a bfloat16 checkpoint holds exactly, so that codes fit them after a round trip.
        packed, scale = quantize_int4(linear.weight.detach().T.bfloat16(), group_size)
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale.to(linear.weight.dtype), requires_grad=False)
        self.bias, self.mask, self.density = linear.bias, linear.mask, linear.density
        self.low_rank_up, self.low_rank_down = linear.low_rank_up, linear.low_rank_down

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """As of `SparseLinear`."""
        if self.low_rank_up is None or self.low_rank_down is None:
            return None
        return self.low_rank_up, self.low_rank_down

    @property
    def weight(self) -> Tensor:
        """(N, K), unpacked."""
        return dequantize_int4(self.weight_packed, self.weight_scale).T

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, K) -> (..., T, N)."""
        if not uses_kernel(x, self.mask, self.density):
            return masked_linear(x, self.mask(x), self.weight, self.bias, self.low_rank)
        threshold, scale = self.mask.for_kernels()
        y = sparse_linear_int4(x, self.weight_packed, self.weight_scale, threshold, scale, bias=self.bias)
        if self.low_rank is not None:
            up, down = self.low_rank
            y = y + F.linear(F.linear(x.masked_fill(keep_mask(x, threshold, scale), 0), down), up.T)
        return y


def masked_linear(
    x: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None
) -> Tensor:
    """W(s⊙x) + b, and what a low-rank path adds of the dropped x, densely; keep None: all of x."""
    if keep is None:
        return F.linear(x, weight, bias)
    y = F.linear(x.masked_fill(~keep, 0), weight, bias)
    if low_rank is not None:
        y = y + F.linear(F.linear(x.masked_fill(keep, 0), low_rank[1]), low_rank[0].T)
    return y


class SparseMLP(nn.Module):
    """A gated MLP that keeps the neurons whose gate matters: h = s⊙a⊙(W_up x), a = SiLU(W_gate x) (CHESS).

    s_i = 1[|a_i| > t_i] with a threshold for each neuron, t_i = τ / mean|W_up x|_i (arXiv:2409.01366). A dropped neuron
    needs neither its row of W_up nor its column of W_down; W_gate stays dense.

    Args:
        mlp: the family's MLP, whose parts it takes over.
        mask: decides about the neurons.
        density: share of neurons that a token is expected to keep.
    """

    def __init__(self, mlp: Any, mask: InputMask, density: float = 0.5) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.mask, self.density = mask, density
        biases = (mlp.gate_proj.bias, mlp.up_proj.bias)
        probe = torch.linspace(-4, 4, 9, device="cpu")  # the model may be on the meta device
        self.is_swiglu = biases == (None, None) and torch.equal(self.act_fn(probe), F.silu(probe))

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, hidden) -> (..., T, hidden)."""
        if self.is_swiglu and uses_kernel(x, self.mask, self.density):
            thresholds, _ = self.mask.for_kernels()
            inner = sparse_swiglu(x, self.gate_proj.weight, self.up_proj.weight, thresholds, density=self.density)
            down = self.down_proj
            return sparse_linear(inner, transposed_weight(down), 0.0, bias=down.bias, density=self.density)
        gate = self.act_fn(self.gate_proj(x))
        keep, inner = self.mask(gate), gate * self.up_proj(x)
        return self.down_proj(inner if keep is None else inner.masked_fill(~keep, 0))


def uses_kernel(x: Tensor, mask: InputMask, density: float) -> bool:
    """Whether a step goes to the kernels: one token a sequence, no gradient, and something to skip.

    Kernels add in another order than the dense product; at a sparsity of 0 the result has to be the base's bit for bit.
    """
    return x.shape[-2] == 1 and density < 1 and mask.counted is None and not torch.is_grad_enabled()


def transposed_weight(linear: nn.Linear) -> Tensor:
    """Wᵀ, (K, N) contiguous: the weight itself is laid out anew, one input's weights side by side; there is no copy."""
    if not linear.weight.T.is_contiguous():
        linear.weight.data = linear.weight.T.contiguous().T
    return linear.weight.T


# ---- into a model


def sparsify_layer(layer: Any, sparsity: dict[str, Any], index: int) -> None:
    """Replace linears (and the MLP) of one decoder layer. Weights are kept; masks keep everything until they are set.

    Args:
        layer: with attention at self_attn and a gated MLP at mlp.
        sparsity: the config's key "sparsity".
        index: which layer.
    """
    dense_prefix = None if sparsity["dense_prefill"] else 0
    density = 1 - sparsity["target"]

    def mask(size: int, like: nn.Linear, weighted: bool, channelwise: bool) -> InputMask:
        with torch.device(like.weight.device):
            return InputMask(size, weighted, channelwise, dense_prefix)

    for name in sparsity["linears"]:
        parent, _, child = name.rpartition(".")
        old = layer.get_submodule(name)
        rank = sparsity["ranks"][name][index] if name in sparsity["ranks"] else 0
        linear = SparseLinear(old, mask(old.in_features, old, sparsity["weighted"], False), rank, density)
        group = sparsity.get("int4_group")
        new = SparseInt4Linear(linear, group) if group else linear
        setattr(layer.get_submodule(parent), child, new.train(layer.training))
    for site in SAME_INPUT:
        found = [layer.get_submodule(name) for name in site if name in sparsity["linears"]]
        if len(found) == len(site) and all(type(each) is SparseLinear and each.low_rank is None for each in found):
            shared = SharedInput(found)
            for each in found:
                each.shared = shared
    if sparsity["neurons"]:
        size = layer.mlp.gate_proj.out_features
        mlp = SparseMLP(layer.mlp, mask(size, layer.mlp.gate_proj, False, True), density)
        layer.mlp = mlp.train(layer.training)


def masks_of(module: nn.Module) -> dict[str, InputMask]:
    """Every mask of a model or layer by the name of what it belongs to; none in one that is not sparse."""
    return {name.removesuffix(".mask"): m for name, m in module.named_modules() if isinstance(m, InputMask)}


@contextmanager
def token_window(model: nn.Module, dense_prefix: int | None) -> Iterator[None]:
    """Let the first `dense_prefix` tokens of a text be dense and the others sparse.

    0: all are sparse; None: all are dense, but for steps of one token. A token is computed from its own mask, so this
    gives what a prompt of so many tokens and steps after it would give.
    """
    before = {mask: mask.dense_prefix for mask in masks_of(model).values()}
    for mask in before:
        mask.dense_prefix = dense_prefix
    try:
        yield
    finally:
        for mask, value in before.items():
            mask.dense_prefix = value


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count what masks drop.

    Yields:
        By name of the linear or MLP: [kept, seen] channels at sparse tokens, so far.
    """
    found = masks_of(model)
    for mask in found.values():
        mask.counted = torch.zeros(2, dtype=torch.long, device=mask.threshold.device)
    try:
        yield {name: mask.counted for name, mask in found.items() if mask.counted is not None}
    finally:
        for mask in found.values():
            mask.counted = None


LINEARS = (SparseLinear, SparseInt4Linear)


def _size(linear: Any) -> int:
    return int(linear.in_features * linear.out_features)


def skipped_weights(model: nn.Module, counts: dict[str, Tensor]) -> tuple[dict[str, float], float]:
    """What share of inputs, and of weights, was not read at sparse tokens.

    Args:
        model: a sparse model or layer.
        counts: from `counted`.

    Returns:
        The share of dropped inputs (neurons) by name, and the share of all weights of the decoder layers' linears that
        are not read; low-rank factors are read as well, and count against it.
    """
    dropped = {name: 1 - int(kept) / max(int(seen), 1) for name, (kept, seen) in counts.items()}
    skipped = 0.0
    for name, share in dropped.items():
        module = model.get_submodule(name)
        if isinstance(module, SparseMLP):
            skipped += share * (module.up_proj.weight.numel() + module.down_proj.weight.numel())
        elif isinstance(module, LINEARS):
            skipped += share * _size(module) - sum(f.numel() for f in module.low_rank or ())
    linears = [m for name, m in model.named_modules() if isinstance(m, (nn.Linear, *LINEARS)) and "lm_head" not in name]
    return dropped, skipped / sum(_size(linear) for linear in linears)


# ---- transformers


class SparsePreTrained(CarriesCode):
    """What the base model and the language model share."""

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        """As transformers has it; weights that lie side by side for the kernels are parted first."""
        for linear in (m for m in self.modules() if isinstance(m, SparseLinear)):  # type: ignore[attr-defined]
            if linear.shared is not None and linear.shared.holds(linear):
                linear.weight.data = linear.weight.data.contiguous()
        return super().save_pretrained(*args, **options)

    def _init_weights(self, module: Any) -> None:
        if isinstance(module, InputMask):
            nn.init.zeros_(module.threshold)
            if module.scale is not None:
                nn.init.ones_(module.scale)
        elif not isinstance(module, SparseLinear):
            super()._init_weights(module)  # type: ignore[misc]


class SparseModel(SparsePreTrained):
    """Mixed into a family's base model: its decoder layers become sparse."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for index, layer in enumerate(self.layers):  # type: ignore[attr-defined]
            sparsify_layer(layer, config.sparsity, index)
        self.post_init()  # type: ignore[attr-defined]


class SparseForCausalLM(SparsePreTrained):
    """Mixed into a family's language model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        for index, layer in enumerate(self.model.layers):  # type: ignore[attr-defined]
            sparsify_layer(layer, config.sparsity, index)
        self.post_init()  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    """Make KitSparse{Family}Config, ...Model and ...ForCausalLM from the family's own classes."""
    match = re.fullmatch(r"KitSparse([A-Z]\w*?)(Config|Model|ForCausalLM)", name)
    family = next((f for f, prefix in FAMILIES.items() if match and match[1] == prefix), None)
    if match is None or family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def derive(kind: str, bases: tuple[type, ...], **attributes: Any) -> None:
        attributes |= {"__module__": __name__, "__qualname__": f"KitSparse{match[1]}{kind}"}
        globals()[f"KitSparse{match[1]}{kind}"] = type(bases[0])(f"KitSparse{match[1]}{kind}", bases, attributes)

    derive("Config", (getattr(transformers, f"{match[1]}Config"),), model_type=f"kit_sparse_{family}")
    config = globals()[f"KitSparse{match[1]}Config"]
    for kind, mixin in (("Model", SparseModel), ("ForCausalLM", SparseForCausalLM)):
        base = getattr(transformers, f"{match[1]}{kind}")
        derive(kind, (mixin, base), config_class=config, __annotations__={"config": config})
    return globals()[name]
