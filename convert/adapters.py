"""Adapters on a model: attach what a recipe starts from, export a plain PEFT LoRA folder, merge.

One path for every method. Where a method's B A is not zero at the start, the linear keeps W - s · B₀ A₀, so that the
model's output does not change; the exported folder makes up for it, and goes on the untouched base.

Linears go by their names in the decoder ("layers.0.self_attn.q_proj").
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kit.convert.adapter_recipe import (
    ROUTED,
    AdaptedLinear,
    AdapterConfig,
    AdapterPlan,
    AdapterRecipe,
    AdapterTrainConfig,
    Factors,
    SpectralRecipe,
    plan_adapters,
    rank_for_parameters,
    select_targets,
)
from kit.convert.covariance_store import Covariances, decoder_of
from kit.convert.errors import KitError
from kit.convert.lowrank import leak

__all__ = [
    "AdaptedLinear", "AdapterConfig", "AdapterPlan", "AdapterRecipe", "AdapterState", "AdapterTrainConfig", "Factors",
    "attach", "choose_ranks", "diagnose", "export", "leak", "load_initial", "merge", "plan_adapters",
    "rank_for_parameters", "target_linears",
]  # fmt: skip

log = logging.getLogger("kit")

NAME = "default"  # of the adapter in PEFT's modules
FORMAT = "kit-adapter-initial-1"
DYNAMIC_RANGE = 4  # dynamic ranks lie between the nominal rank over this and times this


@dataclass
class AdapterState:
    """What `attach` keeps with the model, as `peft_model.kit_adapter`.

    Attributes:
        initial: by the linear's name in the decoder, A₀ and B₀ on the CPU, as PEFT's modules got them.
        modules: the linear's name in the base model, by its name in the decoder.
        scaling: s.
        warnings: what may be wrong with the start, each naming the layer and the cause.
    """

    initial: dict[str, Factors]
    modules: dict[str, str]
    scaling: float
    warnings: list[str]

    def save(self, path: Path) -> None:
        """Write the initial factors (safetensors), for `attach(..., initial=load_initial(path))` after a kill."""
        from safetensors.torch import save_file

        tensors = {
            f"{name}.{side}": getattr(f, side).contiguous() for name, f in self.initial.items() for side in ("a", "b")
        }
        frozen = [name for name, factors in self.initial.items() if not factors.train_a]
        save_file(tensors, path, metadata={"format": FORMAT, "frozen": json.dumps(frozen)})


def load_initial(path: Path) -> dict[str, Factors]:
    """Read what `AdapterState.save` wrote.

    Raises:
        KitError: if it is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError) as error:
        raise KitError(f"the file cannot be read: {error}", where=str(path), next_step="start again") from error
    if about.get("format") != FORMAT:
        raise KitError("the file holds no initial factors", where=str(path), next_step="give what `save` wrote")
    frozen = set(json.loads(about["frozen"]))
    names = [name.removesuffix(".a") for name in tensors if name.endswith(".a")]
    return {name: Factors(tensors[f"{name}.a"], tensors[f"{name}.b"], name not in frozen) for name in names}


def target_linears(model: Any, config: AdapterConfig) -> dict[str, nn.Linear]:
    """The linears of a loaded model that get an adapter: those of `plan_adapters`.

    Raises:
        KitError: if the model has no decoder layers, they hold no plain linears (they are quantized), or an ending in
            `target_modules` fits none.
    """
    found = {
        f"layers.{index}.{name}": module
        for index, layer in enumerate(decoder_of(model).layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and not ROUTED.search(f".{name}")
    }
    if not found:
        raise KitError(
            "the model's decoder layers hold no plain linears",
            where=type(model).__name__,
            next_step="adapt the model before it is quantized, in bfloat16, float16 or float32",
        )
    return {name: found[name] for name in select_targets(list(found), config.target_modules)}


@torch.no_grad()
def choose_ranks(model: Any, recipe: AdapterRecipe, covariances: Covariances | None = None) -> dict[str, int]:
    """The rank of each adapted linear of a loaded model, at most its smaller side.

    It is `rank`, or what the recipe reads off the linear's spectrum. With `dynamic_rank` the parameters that `rank`
    would train are spent where the spectra make them count most: the sum, over linears, of the taken directions' shares
    of energy becomes largest (methods that take the largest) or smallest (those that take the smallest, and should
    disturb little). A rank stays within a factor `DYNAMIC_RANGE` of the nominal one. CorDA++ (arXiv:2506.13187) has the
    idea, ranks by the compactness of spectra; this rule is ours.

    Args:
        model: loaded, without adapters.
        recipe: the method and its options.
        covariances: where the method needs them.
    """
    linears = target_linears(model, recipe.config)
    nominal = {name: min(recipe.config.rank, *linear.weight.shape) for name, linear in linears.items()}
    if not isinstance(recipe, SpectralRecipe) or not recipe.ranks_need_spectra():
        return nominal
    spectra = {
        name: recipe.spectrum(linear.weight.float(), _covariance(recipe, covariances, name, linear)).cpu()
        for name, linear in linears.items()
    }
    if not recipe.config.dynamic_rank:
        asked = {name: recipe.rank_of(spectrum) or nominal[name] for name, spectrum in spectra.items()}
        return {name: min(rank, *linears[name].weight.shape) for name, rank in asked.items()}
    costs = {
        name: AdaptedLinear(name, linear.out_features, linear.in_features, None).trained(1, recipe.train_a)
        for name, linear in linears.items()
    }
    largest = {name: min(DYNAMIC_RANGE * recipe.config.rank, *linear.weight.shape) for name, linear in linears.items()}
    return _allocate(spectra, nominal, largest, costs, largest_first=recipe.takes() == "largest")


def _allocate(
    spectra: dict[str, Tensor],
    nominal: dict[str, int],
    largest: dict[str, int],
    costs: dict[str, int],
    *,
    largest_first: bool,
) -> dict[str, int]:
    """Spend Σ nominal · cost on ranks, the best direction a parameter first; spectra fall, so it is the optimum."""
    ranks = {name: max(1, rank // DYNAMIC_RANGE) for name, rank in nominal.items()}
    left = sum((nominal[name] - ranks[name]) * cost for name, cost in costs.items())
    offers = []
    for name, spectrum in spectra.items():
        ordered = spectrum if largest_first else spectrum.flip(0)
        worth = ordered[ranks[name] : largest[name]] / costs[name]
        offers += [(float(-w if largest_first else w), name) for w in worth]
    for _, name in sorted(offers, key=lambda offer: offer[0]):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def diagnose(name: str, weight: Tensor, covariance: Tensor | None, tokens: int, rank: int) -> list[str]:
    """What is wrong with the data that an adapter starts from; each line names the linear and the cause.

    Args:
        name: the linear's.
        weight: W (out, in).
        covariance: C (in, in), or None.
        tokens: how many C was measured on.
        rank: of the adapter.
    """
    found, size = [], weight.shape[1]
    if zero := int((weight == 0).all(1).sum()):
        found.append(f"{name}: {zero} of {weight.shape[0]} rows of the weight are zero")
    if covariance is None:
        return found
    live = covariance.diagonal() > 0
    if dead := size - int(live.sum()):
        found.append(f"{name}: {dead} of {size} inputs are dead (zero at each of {tokens} tokens)")
    if tokens < rank:
        found.append(f"{name}: C is of {tokens} tokens, fewer than the rank {rank}; give more data")
    elif tokens < size:
        found.append(f"{name}: C is of {tokens} tokens for {size} inputs, so it is singular; give more data")
    elif bool(live.any()):
        values = torch.linalg.eigvalsh(covariance[live][:, live].double())
        if values[0] < torch.finfo(torch.float32).eps * values[-1]:
            found.append(
                f"{name}: C is ill-conditioned (fp32 loses its smallest eigenvalues beside the largest, "
                f"{float(values[-1]):.2g}): its smallest directions are rounding in part"
            )
    return found


def _covariance(recipe: AdapterRecipe, covariances: Covariances | None, name: str, linear: nn.Linear) -> Tensor | None:
    if recipe.covariance_source() == "none":
        return None
    assert covariances is not None
    return covariances.get(name, linear.weight.device)


@torch.no_grad()
def attach(
    model: Any,
    recipe: AdapterRecipe,
    covariances: Covariances | None = None,
    ranks: dict[str, int] | None = None,
    *,
    initial: dict[str, Factors] | None = None,
) -> Any:
    """Put a recipe's adapters on a loaded model, whose output does not change by it.

    The linears become plain PEFT LoRA modules, adapter "default", in fp32; W becomes W - s · B₀ A₀ in its own dtype. A
    is frozen where the method says so: train the parameters that have `requires_grad`.

    Args:
        model: loaded with weights; changed in place.
        recipe: the method and its options.
        covariances: of the data that `recipe.covariance_source()` names.
        ranks: by the linear's name in the decoder; None: `choose_ranks`.
        initial: factors of an earlier `attach` of the same model and recipe, used as they are.

    Returns:
        A PeftModel, with an `AdapterState` as `kit_adapter`.

    Raises:
        KitError: if covariances are missing, of another model, or lack a linear.
    """
    from peft import get_peft_model

    linears = target_linears(model, recipe.config)
    if initial is None:
        _check_covariances(model, recipe, covariances, linears)
        initial, warnings = _start(linears, recipe, covariances, ranks or choose_ranks(model, recipe, covariances))
    else:
        warnings = []
    for warning in warnings:
        log.warning("%s", warning)
    names = {id(module): name for name, module in model.named_modules()}
    modules = {name: names[id(linear)] for name, linear in linears.items()}
    scaling = recipe.config.scaling
    for name, linear in linears.items():
        factors = initial[name]
        if bool(factors.b.any()):
            update = factors.b.to(linear.weight.device).double() @ factors.a.to(linear.weight.device).double()
            linear.weight.copy_(linear.weight.double() - scaling * update)
    peft_model = get_peft_model(model, _peft_config(model, modules, initial, scaling))
    for name, factors in initial.items():
        a, b = _sides(peft_model, modules[name])
        a.weight.copy_(factors.a)
        b.weight.copy_(factors.b)
        a.weight.requires_grad_(factors.train_a)
    peft_model.kit_adapter = AdapterState(initial, modules, scaling, warnings)
    return peft_model


def _check_covariances(
    model: Any, recipe: AdapterRecipe, covariances: Covariances | None, names: Iterable[str]
) -> None:
    if (source := recipe.covariance_source()) == "none":
        return
    if covariances is None:
        raise KitError(
            f"recipe {recipe.name} needs covariances of the {source} data, and there are none",
            where=f"recipe {recipe.name}",
            next_step="measure them first (`collect_covariances`)",
        )
    covariances.check(names, model)


def _start(
    linears: dict[str, nn.Linear], recipe: AdapterRecipe, covariances: Covariances | None, ranks: dict[str, int]
) -> tuple[dict[str, Factors], list[str]]:
    """Every linear's factors without the scaling, on the CPU; and warnings, one for linears that share an input."""
    found, warnings, root, seen = {}, list[str](), recipe.config.scaling**0.5, set[str]()
    for number, (name, linear) in enumerate(linears.items()):
        weight, rank = linear.weight.float(), ranks[name]
        covariance = _covariance(recipe, covariances, name, linear)
        if covariances is None or covariance is None or (shared := covariances.linears[name]) in seen:
            warnings += diagnose(name, weight, None, 0, rank)
        else:
            warnings += diagnose(name, weight, covariance, covariances.tokens_of(name), rank)
            seen.add(shared)
        generator = torch.Generator(weight.device).manual_seed(recipe.config.seed * 1_000_003 + number)
        factors = recipe.initial_factors(weight, covariance, rank, generator)
        warnings += [f"{name}: {note}" for note in factors.notes]
        share = root if bool(factors.b.any()) else 1.0
        a, b = (factors.a / share).cpu().contiguous(), (factors.b / share).cpu().contiguous()
        found[name] = Factors(a, b, factors.train_a, factors.notes)
    return found, warnings


def _peft_config(model: Any, modules: dict[str, str], initial: dict[str, Factors], scaling: float) -> Any:
    """A plain LoraConfig: one r and alpha, and patterns for linears of another rank, all with the same alpha / r."""
    from peft import LoraConfig

    def alpha(rank: int) -> int | float:
        exact = scaling * rank
        return int(exact) if exact == int(exact) else exact

    ranks = {modules[name]: len(factors.a) for name, factors in initial.items()}
    largest = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != largest}
    causal = type(model).__name__.endswith("ForCausalLM")
    return LoraConfig(
        r=largest,
        lora_alpha=alpha(largest),
        rank_pattern=others,
        alpha_pattern={name: alpha(rank) for name, rank in others.items()},
        target_modules=list(ranks),
        task_type="CAUSAL_LM" if causal else None,
    )


def _sides(peft_model: Any, module: str) -> tuple[Any, Any]:
    """PEFT's A and B of a linear, by its name in the base model."""
    layer = peft_model.get_base_model().get_submodule(module)
    return layer.lora_A[NAME], layer.lora_B[NAME]


@torch.no_grad()
def export(peft_model: Any, folder: Path) -> None:
    """Write a plain PEFT LoRA folder for the untouched base: adapter_config.json and adapter_model.safetensors.

    Methods with B₀ = 0 are written as they are, at rank r. Otherwise the update is B A - B₀ A₀: with a frozen A that is
    (B - B₀) A, rank r; else A' = [A; A₀], B' = [B, -B₀], rank 2 r.

    Args:
        peft_model: from `attach`, trained or not; not changed.
        folder: made if it is not there.
    """
    from safetensors.torch import save_file

    state: AdapterState = peft_model.kit_adapter
    written, tensors = {}, {}
    for name, first in state.initial.items():
        a, b = (side.weight.detach().float().cpu() for side in _sides(peft_model, state.modules[name]))
        if bool(first.b.any()):
            a, b = (a, b - first.b) if not first.train_a else (torch.cat([a, first.a]), torch.cat([b, -first.b], 1))
        key = f"base_model.model.{state.modules[name]}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a.contiguous(), b.contiguous()
        written[name] = Factors(a, b)
    config = copy.deepcopy(peft_model.peft_config[NAME])
    plain = _peft_config(peft_model.get_base_model(), state.modules, written, state.scaling)
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(config, field, getattr(plain, field))
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


@torch.no_grad()
def merge(peft_model: Any, read_weight: Callable[[str], Tensor] | None = None) -> Any:
    """Take the adapters off and put them into the weights: W + s (B A - B₀ A₀), computed in fp32, in W's dtype.

    Args:
        peft_model: from `attach`; used up.
        read_weight: gives the untouched W of a linear by its name in the base model. None: W is the residual and
            s · B₀ A₀ together, which in 16 bits has lost half a unit in the last place.

    Returns:
        The base model.
    """
    state: AdapterState = peft_model.kit_adapter
    for name, first in state.initial.items():
        layer = peft_model.get_base_model().get_submodule(state.modules[name])
        weight = layer.get_base_layer().weight
        a, b = (side.weight.float() for side in _sides(peft_model, state.modules[name]))
        update = state.scaling * (b @ a)
        if read_weight is None:
            weight.copy_(weight.float() + update)
        else:
            update -= state.scaling * (first.b.to(b.device) @ first.a.to(a.device))
            weight.copy_(read_weight(state.modules[name]).to(weight.device).float() + update)
    return peft_model.unload()
