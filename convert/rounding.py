"""Put a weight on a 4-bit grid: scales, clipping, round to nearest, GPTQ, and scales fitted to the codes.

Letters: W (N, K) is a weight, N output and K input features; g is the group size, one scale for g inputs of an output;
H (K, K) = Σ x xᵀ is the second moment of the input, so tr(ΔW H ΔWᵀ) is the squared error of the output. All in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kit.kernels.int4_fp8 import cast_fp8, dequantize_weight, per_tensor_factor

LEVELS = 16  # of INT4: codes -8 ... 7
CLIPS = tuple(1 - 0.025 * i for i in range(21))  # shares of the largest magnitude that the grid reaches
FP8_STEP = 2.0**-9  # the smallest e4m3 number


@dataclass(frozen=True)
class Grid:
    """Which numbers a weight's groups may take.

    Attributes:
        group_size: input features that share a scale; None is all of them (per channel).
        zero_point: codes are shifted by a whole number a group, so that the grid need not be symmetric.
        clip: search each group's scale for the least squared error; else the largest magnitude decides.
        signed: a symmetric grid's odd level, -8, may lie on either side (a negative scale).
        fp8_scales: scales are e4m3 numbers over a common power of two, as FireQ's table kernel wants them.
    """

    group_size: int | None
    zero_point: bool = False
    clip: bool = True
    signed: bool = True
    fp8_scales: bool = False


@dataclass
class Rounded:
    """A weight on its grid: codes (N, K) int8 in [-8, 7], scale (N, K / g) fp32, zero_point (N, K / g) int8 or None."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, (N, K) fp32."""
        return dequantize_weight(self.codes, self.scale, self.zero_point)


def fit_grid(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Choose scales and zero points.

    Without clipping: symmetric scale = max|w| / 7.5, asymmetric (max - min) / 15 over a range that holds 0. With it:
    the best of 21 shares of that, by Σ importance · (w - ŵ)² over the group, and of both signs if the grid is
    `signed`.

    Args:
        weight: (N, K).
        grid: the grid.
        importance: (K,), the diagonal of H; None is all ones.

    Returns:
        scale (N, K / g), rounded to bf16, never zero; zero point (N, K / g) int8 or None.
    """
    groups = 1 if grid.group_size is None else weight.shape[1] // grid.group_size
    w = weight.unflatten(-1, (groups, -1))
    if importance is None:
        importance = torch.ones_like(weight[0])
    importance = importance.clamp(min=1e-8 * float(importance.max()) + 1e-30).unflatten(-1, (groups, -1))
    best: tuple[Tensor, Tensor, Tensor] | None = None
    factor: float | None = None
    for scale, zero in _candidates(w, grid):
        if factor is None and grid.fp8_scales:
            factor = per_tensor_factor(_nonzero(scale))  # of the largest scales: the others fit too
        scale = round_scale(scale, grid, factor)
        codes = (w / scale[..., None] + zero[..., None]).round_().clamp_(-8, 7)
        error = (((codes - zero[..., None]) * scale[..., None] - w).square_() * importance).sum(-1)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            for old, new in zip(best, (error, scale, zero), strict=True):
                old.copy_(torch.where(better, new, old))
    assert best is not None
    return round_scale(best[1], grid), best[2].to(torch.int8) if grid.zero_point else None


def _candidates(w: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zero points (N, groups) to choose from; the first is the plain one."""
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    for clip in CLIPS if grid.clip else (1.0,):
        if grid.zero_point:
            scale = (high - low) * clip / (LEVELS - 1)
            yield scale, (-8 - low * clip / _nonzero(scale)).round().clamp(-8, 7)
            continue
        largest = torch.maximum(-low, high) * clip
        yield largest / 7.5, torch.zeros_like(largest)
        if grid.signed:  # -8 takes the largest magnitude, whatever its sign
            yield torch.where(high > -low, -largest, largest) / 8, torch.zeros_like(largest)


def round_scale(scale: Tensor, grid: Grid, factor: float | None = None) -> Tensor:
    """Round scales to what a file and a kernel hold: bf16, or e4m3 over a power of two.

    One that would vanish becomes the smallest of its sign.

    Args:
        scale: (N, K / g).
        grid: the grid.
        factor: the power of two; None: `per_tensor_factor` of the result, as whoever reads the file computes it.
    """
    if not grid.fp8_scales:
        return _nonzero(scale.to(torch.bfloat16).float())
    lift = per_tensor_factor(_nonzero(scale)) if factor is None else factor
    for _ in range(15):
        rounded = cast_fp8(scale * lift).float()
        rounded = torch.where(rounded == 0, torch.full_like(scale, FP8_STEP).copysign(scale), rounded) / lift
        if factor is not None or (again := per_tensor_factor(rounded)) == lift:
            break
        lift = again
    return rounded


def _nonzero(scale: Tensor) -> Tensor:
    tiny = torch.full_like(scale, torch.finfo(torch.bfloat16).tiny)
    return torch.where(scale == 0, tiny.copysign(scale), scale)


def round_to_nearest(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Rounded:
    """Each weight to its nearest level."""
    w = weight.unflatten(-1, (scale.shape[1], -1)) / scale[..., None]
    if zero_point is not None:
        w = w + zero_point[..., None]
    return Rounded(w.round().clamp(-8, 7).flatten(-2).to(torch.int8), scale, zero_point)


def inverse_factor(moment: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of (H + λ)⁻¹ = Uᵀ U, with λ = damp · mean diagonal; damping grows tenfold where it fails.

    Args:
        moment: H (K, K). Inputs that were never seen (zeros on the diagonal) get the mean: their weights are rounded
            without compensation.
        damp: share of the mean diagonal.

    Returns:
        (K, K) and the damping that was used.

    Raises:
        ValueError: if it fails with a damping of 10 too (a NaN, or nothing was seen).
    """
    moment = moment.clone()
    diagonal = moment.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal <= 0] = mean
    while damp <= 10:
        damped = moment.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper, damp
        damp = max(10 * damp, 1e-6)
    raise ValueError("the inputs' second moment cannot be inverted, even with a damping of 10 times its mean diagonal")


def follow_targets(weight: Tensor, moment: Tensor, cross: Tensor, damp: float) -> Tensor:
    """The change of W that makes W x on the quantized model's inputs closest to W t on the original's.

    Minimises Σ ‖W t - (W + D) x‖² + λ ‖D‖²: D = W C (H + λ)⁻¹ with C = Σ (t - x) xᵀ and λ = damp · mean diagonal of H.

    Args:
        weight: (N, K).
        moment: H (K, K).
        cross: C (K, K).
        damp: share of the mean diagonal.

    Returns:
        D, (N, K).
    """
    damped = moment.clone()
    damped.diagonal().add_(damp * moment.diagonal().mean())
    return weight @ torch.linalg.solve(damped, cross.T).T


def gptq(
    weight: Tensor,
    moment: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
) -> tuple[Rounded, float]:
    """Round column by column, each rounding error spread over the columns to come (GPTQ, arXiv:2210.17323, Alg. 1).

    Scales are fixed beforehand, so with `act_order` (columns in order of falling H_kk) groups stay where they are in
    the file and no `g_idx` is needed.

    Args:
        weight: (N, K).
        moment: H (K, K).
        scale: (N, K / g).
        zero_point: (N, K / g) or None.
        damp: see `inverse_factor`.
        act_order: most important inputs first.
        block_size: columns whose update of all later ones is done in one product.

    Returns:
        The rounded weight and the damping that was used.

    Raises:
        ValueError: see `inverse_factor`.
    """
    size = weight.shape[1]
    order = moment.diagonal().argsort(descending=True) if act_order else torch.arange(size, device=weight.device)
    upper, damp = inverse_factor(moment[order][:, order], damp)
    group = order // (size // scale.shape[1])
    w = weight[:, order].T.contiguous()  # (K, N): a column of W is a row of memory
    scales = scale[:, group].T.contiguous()
    zeros = None if zero_point is None else zero_point[:, group].T.float().contiguous()
    codes = torch.empty_like(w)
    for start in range(0, size, block_size):
        stop = min(start + block_size, size)
        block, errors = w[start:stop], torch.empty_like(w[start:stop])
        local = upper[start:stop, start:stop]
        diagonal = local.diagonal().tolist()
        for i in range(stop - start):
            k = start + i
            code = block[i] / scales[k]
            if zeros is None:
                code = code.round_().clamp_(-8, 7)
                rounded = code * scales[k]
            else:
                code = code.add_(zeros[k]).round_().clamp_(-8, 7)
                rounded = (code - zeros[k]) * scales[k]
            codes[k] = code
            errors[i] = (block[i] - rounded) / diagonal[i]
            if i + 1 < len(block):
                block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        if stop < size:
            w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    ordered = torch.empty_like(codes, dtype=torch.int8)
    ordered[order] = codes.to(torch.int8)
    return Rounded(ordered.T.contiguous(), scale, zero_point), damp


def descend(weight: Tensor, rounded: Rounded, moment: Tensor, *, damp: float = 0.01, block_size: int = 128) -> Rounded:
    """One sweep of coordinate descent over the codes (QuantEase, arXiv:2309.01885, Alg. 1).

    Column by column, most important first, each code becomes the best one while all others stay: with E = Ŵ - W and
    G = E (H + λ), λ = damp · mean diagonal of H, code k moves to the nearest level of ŵ_k - G_k / H_kk. The error
    tr(E (H + λ) Eᵀ) never grows; GPTQ, which looks at no column twice, leaves room.

    Args:
        weight: (N, K).
        rounded: where to start.
        moment: H (K, K).
        damp: share of the mean diagonal.
        block_size: columns whose update of all later ones is done in one product.

    Returns:
        The weight with new codes, scales and zero points as they were.
    """
    size = weight.shape[1]
    damped = moment.clone()
    damped.diagonal().add_(damp * moment.diagonal().mean()).clamp_(min=1e-30)
    order = damped.diagonal().argsort(descending=True)
    damped = damped[order][:, order]
    diagonal = damped.diagonal().tolist()
    group = order // (size // rounded.scale.shape[1])
    scales = rounded.scale[:, group].T.contiguous()
    codes = rounded.codes[:, order].T.float().contiguous()  # (K, N), as in `gptq`
    gradient = damped @ (rounded.dequantize() - weight)[:, order].T
    for start in range(0, size, block_size):
        stop = min(start + block_size, size)
        local, change = damped[start:stop, start:stop], torch.empty_like(codes[start:stop])
        block = gradient[start:stop]
        for i in range(stop - start):
            k = start + i
            new = (codes[k] - block[i] / diagonal[k] / scales[k]).round_().clamp_(-8, 7)
            change[i] = (new - codes[k]) * scales[k]
            codes[k] = new
            if i + 1 < len(block):
                block[i + 1 :].addr_(local[i + 1 :, i], change[i])
        if stop < size:
            gradient[stop:].addmm_(damped[stop:, start:stop], change)
    ordered = torch.empty_like(codes, dtype=torch.int8)
    ordered[order] = codes.to(torch.int8)
    return Rounded(ordered.T.contiguous(), rounded.scale, rounded.zero_point)


def fit_scales(weight: Tensor, rounded: Rounded, moment: Tensor, grid: Grid, damp: float = 0.01) -> Tensor:
    """Scales that minimise the output's error for the codes as they are: least squares, one (K/g)² system a row.

    For row n with codes split into its groups, Q (K/g, K): (Q H Qᵀ) s = Q H w.

    Returns:
        (N, K / g), rounded as the grid says.
    """
    groups = rounded.scale.shape[1]
    levels = rounded.codes.float()
    if rounded.zero_point is not None:
        levels = (levels.unflatten(-1, (groups, -1)) - rounded.zero_point.float()[..., None]).flatten(-2)
    damped = moment.clone()
    damped.diagonal().add_(damp * moment.diagonal().mean())
    split = levels.unflatten(-1, (groups, -1))
    size = split.shape[-1]
    gram = torch.empty(len(weight), groups, groups, device=weight.device)
    for row in range(groups):
        product = (split[:, row] @ damped[row * size : (row + 1) * size]).unflatten(-1, (groups, -1))
        gram[:, row] = (product * split).sum(-1)
    right = ((weight @ damped).unflatten(-1, (groups, -1)) * split).sum(-1)
    ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
    fitted = torch.linalg.solve(gram, right)
    usable = fitted.isfinite() & (fitted * rounded.scale > 0)  # a group of zeros keeps its scale
    return round_scale(torch.where(usable, fitted, rounded.scale), grid)


def output_error(weight: Tensor, rounded: Tensor, moment: Tensor) -> float:
    """tr(ΔW H ΔWᵀ) / tr(W H Wᵀ): the squared error of the outputs, relative to their power."""
    difference = rounded - weight
    power = float(((weight @ moment) * weight).sum())
    return float(((difference @ moment) * difference).sum()) / max(power, 1e-30)
