"""What a sparse checkpoint runs on: linears and MLPs that skip the channels whose score is below a threshold.

A model of `model_type: kit_sparse_llama` (and so on for each of `FAMILIES`) is the family's own with some linears
replaced, as the key "sparsity" of its config says:

    {"method": str, "target": float, "dense_prefill": bool, "weighted": bool,
     "linears": [names in a layer, such as "mlp.down_proj"], "neurons": bool,
     "ranks": {name: [rank of each layer]}}

`InputMask` is the one place that decides what is kept: calibration, evaluation and the kernels all ask it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from kit.kernels.sparse_matvec import keep_mask, sparse_linear, sparse_swiglu
from kit.modules.own_code import CarriesCode

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
        now = (self.threshold.device, self.threshold.data_ptr(), self.threshold._version)
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
            threshold, scale = self.mask.for_kernels()
            weight = transposed_weight(self)
            return sparse_linear(x, weight, threshold, scale, low_rank=low_rank, bias=self.bias, density=self.density)
        keep = self.mask(x)
        if keep is None:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x.masked_fill(~keep, 0), self.weight, self.bias)
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
        new = SparseLinear(old, mask(old.in_features, old, sparsity["weighted"], False), rank, density)
        setattr(layer.get_submodule(parent), child, new.train(layer.training))
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
        elif isinstance(module, SparseLinear):
            skipped += share * module.weight.numel() - sum(f.numel() for f in module.low_rank or ())
    linears = (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name)
    return dropped, skipped / sum(linear.weight.numel() for linear in linears)


# ---- transformers


class SparsePreTrained(CarriesCode):
    """What the base model and the language model share."""

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
