"""Rounding against float64: GPTQ with explicit inverse updates, least squares, enumerated grids."""

import numpy as np
import pytest
import torch

from kit.convert.rounding import (
    Grid,
    Rounded,
    descend,
    fit_grid,
    fit_scales,
    follow_targets,
    gptq,
    inverse_factor,
    output_error,
    round_scale,
    round_to_nearest,
)
from kit.kernels.int4_fp8 import per_tensor_factor

GRIDS = {
    "plain": Grid(8, clip=False, signed=False),
    "clip": Grid(8, signed=False),
    "signed": Grid(8),
    "zero_point": Grid(8, zero_point=True),
    "per_channel": Grid(None),
    "fp8": Grid(8, fp8_scales=True),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(size, samples=None, seed=0, shared=2):
    """H of correlated inputs: a few common directions and some noise of its own for each."""
    samples = samples or 4 * size
    x = 0.3 * normal(samples, size, seed=seed) + normal(samples, shared, seed=seed + 1) @ normal(
        shared, size, seed=seed + 2
    )
    return x.T @ x


def levels(scale, zero, size):
    """Every number a weight may become, float64, (N, K, 16)."""
    codes = torch.arange(-8, 8).double()
    shift = torch.zeros_like(scale) if zero is None else zero.float()
    each = (codes - shift.double()[..., None]) * scale.double()[..., None]
    return each.repeat_interleave(size // scale.shape[1], dim=1)


def true_error(weight, rounded, moment):
    d = rounded.double() - weight.double()
    return float(torch.einsum("nk,kl,nl->", d, moment.double(), d))


# ---- grids


@pytest.mark.parametrize("name", GRIDS)
def test_scales_are_finite_and_never_zero(name):
    grid, base = GRIDS[name], normal(8, 16)
    base[0], base[1], base[2], base[3] = 0, base[1] * 1e-40, base[2] * 1e30, 0.37
    base[4], base[5, :8], base[6] = -0.37, 0, 1e-45
    for weight in (base, *base[:, None].unbind(0)):  # together, and each row alone
        scale, zero = fit_grid(weight, grid)
        assert scale.shape == (len(weight), 1 if grid.group_size is None else 2)
        assert bool(scale.isfinite().all())
        assert bool((scale != 0).all())
        assert (zero is not None) == grid.zero_point
        rounded = round_to_nearest(weight, scale, zero).dequantize()
        assert bool(rounded.isfinite().all())
        if name != "fp8":
            reach = weight.abs().amax(-1, keepdim=True)
            assert bool(((rounded - weight).abs() <= 0.6 * reach + 1e-37).all())
            torch.testing.assert_close(scale, scale.bfloat16().float(), rtol=0, atol=0)


@pytest.mark.parametrize("zero_point", [False, True])
def test_plain_scales_are_the_formula(zero_point):
    weight = normal(6, 32) + 0.5
    scale, zero = fit_grid(weight, Grid(8, zero_point=zero_point, clip=False, signed=False))
    for n in range(6):
        for group in range(4):
            w = weight[n, group * 8 : group * 8 + 8].double()
            low, high = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
            expected = (high - low) / 15 if zero_point else float(w.abs().max()) / 7.5
            assert float(scale[n, group]) == pytest.approx(expected, rel=2**-8)
            if zero_point:
                assert int(zero[n, group]) == min(max(round(-8 - 15 * low / (high - low)), -8), 7)


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_clipping_is_never_worse(zero_point, signed, weighted, fp8):
    weight = normal(16, 32) ** 3 * 0.1
    importance = normal(32, seed=1).square() if weighted else None
    share = torch.ones(32) if importance is None else importance

    def errors(clip, sign):
        grid = Grid(8, zero_point=zero_point, clip=clip, signed=sign, fp8_scales=fp8)
        scale, zero = fit_grid(weight, grid, importance)
        rounded = round_to_nearest(weight, scale, zero).dequantize()
        squared = (rounded.double() - weight.double()).square() * share.double()
        return squared.unflatten(-1, (4, 8)).sum(-1)

    plain, clipped = errors(False, False), errors(True, signed)
    assert bool((clipped <= plain * (1 + 1e-5) + 1e-12).all())
    assert float(clipped.sum()) <= float(plain.sum())


def test_clipping_finds_the_best_of_the_candidates():
    weight = normal(4, 16, seed=2)
    scale, _ = fit_grid(weight, Grid(16))
    for n in range(4):
        w = weight[n].double()
        top = w[w.abs().argmax()]
        tried = []
        for i in range(21):
            for candidate in ((1 - 0.025 * i) * top.abs() / 7.5, -(1 - 0.025 * i) * top / 8):
                s = candidate.bfloat16().double()
                tried.append(float(((w / s).round().clamp(-8, 7) * s - w).square().sum()))
        s = scale[n].double()
        mine = float(((w / s).round().clamp(-8, 7) * s - w).square().sum())
        assert mine == pytest.approx(min(tried), rel=1e-4)


def test_a_signed_scale_lets_minus_eight_take_the_largest_weight():
    weight = torch.tensor([[8, -7, 3, 0, 1, -2, 5, 6], [-8, 7, 3, 0, 1, -2, 5, 6]]).float()
    scale, zero = fit_grid(weight, Grid(8))
    rounded = round_to_nearest(weight, scale, zero)
    assert scale.tolist() == [[-1], [1]]
    assert rounded.codes[:, 0].tolist() == [-8, -8]
    assert torch.equal(rounded.dequantize(), weight)
    scale, _ = fit_grid(weight, Grid(8, signed=False))
    assert bool((scale > 0).all())


@pytest.mark.parametrize("magnitude", [0.01, 0.02, 0.003])
def test_fp8_scales_are_e4m3_numbers_over_one_power_of_two(magnitude):
    grid = Grid(64, clip=False, signed=False, fp8_scales=True)
    scale, _ = fit_grid(normal(64, 256) * magnitude, grid)
    lifted = scale * per_tensor_factor(scale)
    assert torch.equal(lifted.to(torch.float8_e4m3fn).float(), lifted)


@pytest.mark.parametrize("magnitude", [0.01, 0.003])
def test_clipped_fp8_scales_are_e4m3_numbers_over_one_power_of_two(magnitude):
    scale, _ = fit_grid(normal(64, 256) * magnitude, Grid(64, fp8_scales=True))
    lifted = scale * per_tensor_factor(scale)
    assert torch.equal(lifted.to(torch.float8_e4m3fn).float(), lifted)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_vanishing_scale_keeps_its_sign(fp8):
    scale = round_scale(torch.tensor([[-1e-44, 1.0]]), Grid(8, fp8_scales=fp8))
    assert float(scale[0, 0]) < 0


@pytest.mark.parametrize("name", GRIDS)
def test_nearest_is_the_nearest_of_all_levels(name):
    weight = normal(8, 32, seed=3)
    scale, zero = fit_grid(weight, GRIDS[name])
    rounded = round_to_nearest(weight, scale, zero)
    assert rounded.codes.dtype == torch.int8
    assert int(rounded.codes.min()) >= -8
    assert int(rounded.codes.max()) <= 7
    every = levels(scale, zero, 32)
    error = (rounded.dequantize().double() - weight.double()).abs()
    least = (every - weight.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-6)
    step = scale.double().abs().repeat_interleave(32 // scale.shape[1], dim=1)
    inside = (weight <= every.amax(-1)) & (weight >= every.amin(-1))
    assert bool((error <= step / 2 + 1e-6)[inside].all())
    assert float(inside.double().mean()) > 0.8


# ---- GPTQ


def gptq_by_hand(weight, moment, scale, zero, damp, act_order):
    """Round a column, move the rest to the conditional optimum, drop the column from the inverse (OBQ, in float64)."""
    weight, moment = weight.double().clone(), moment.double()
    size = weight.shape[1]
    inverse = torch.linalg.inv(moment + damp * moment.diagonal().mean() * torch.eye(size).double())
    columns = sorted(range(size), key=lambda k: -float(moment[k, k])) if act_order else range(size)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for k in columns:
        group = k // (size // scale.shape[1])
        s = scale[:, group].double()
        z = 0 if zero is None else zero[:, group].double()
        codes[:, k] = (weight[:, k] / s + z).round().clamp(-8, 7)
        error = (weight[:, k] - (codes[:, k].double() - z) * s) / inverse[k, k]
        weight -= torch.outer(error, inverse[k])
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["signed", "zero_point", "per_channel"])
@pytest.mark.parametrize("block_size", [128, 8, 7, 1])
def test_gptq_equals_obq(act_order, name, block_size):
    weight, moment = normal(6, 24, seed=4), second_moment(24)
    scale, zero = fit_grid(weight, GRIDS[name])
    rounded, damp = gptq(weight, moment, scale, zero, damp=0.01, act_order=act_order, block_size=block_size)
    assert damp == 0.01
    assert rounded.codes.dtype == torch.int8
    assert torch.equal(rounded.codes, gptq_by_hand(weight, moment, scale, zero, 0.01, act_order))
    assert torch.equal(rounded.scale, scale)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_gptq_of_uncorrelated_inputs_is_round_to_nearest(name, act_order):
    weight = normal(6, 32, seed=5)
    scale, zero = fit_grid(weight, GRIDS[name])
    rounded, _ = gptq(weight, torch.eye(32), scale, zero, act_order=act_order)
    assert torch.equal(rounded.codes, round_to_nearest(weight, scale, zero).codes)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_gptq_beats_round_to_nearest(name, act_order):
    weight, moment = normal(16, 64, seed=6), second_moment(64, seed=7)
    scale, zero = fit_grid(weight, GRIDS[name], moment.diagonal())
    rounded, _ = gptq(weight, moment, scale, zero, act_order=act_order)
    nearest = round_to_nearest(weight, scale, zero)
    assert true_error(weight, rounded.dequantize(), moment) < 0.5 * true_error(weight, nearest.dequantize(), moment)


def damped_error(weight, rounded, moment, damp):
    """tr(E (H + λ) Eᵀ) of each row, in float64."""
    moment = moment.double() + damp * moment.double().diagonal().mean() * torch.eye(len(moment)).double()
    error = rounded.dequantize().double() - weight.double()
    return ((error @ moment) * error).sum(-1)


@pytest.mark.parametrize("block_size", [5, 128])
@pytest.mark.parametrize("name", GRIDS)
def test_coordinate_descent_ends_where_no_single_code_could_be_better(name, block_size):
    weight, moment = normal(6, 24, seed=11), second_moment(24, seed=12)
    scale, zero = fit_grid(weight, GRIDS[name])
    rounded = round_to_nearest(weight, scale, zero)
    errors = [damped_error(weight, rounded, moment, 0.05)]
    for _ in range(30):
        before, rounded = rounded, descend(weight, rounded, moment, damp=0.05, block_size=block_size)
        errors.append(damped_error(weight, rounded, moment, 0.05))
        assert bool((errors[-1] <= errors[-2] * (1 + 1e-5)).all())
    assert torch.equal(rounded.codes, before.codes)
    assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())
    for column in range(24):
        for code in range(-8, 8):
            other = rounded.codes.clone()
            other[:, column] = code
            change = damped_error(weight, Rounded(other, scale, zero), moment, 0.05)
            assert bool((change >= errors[-1] * (1 - 1e-5)).all())


def test_coordinate_descent_improves_on_gptq():
    weight, moment = normal(16, 64, seed=6), second_moment(64, seed=7)
    scale, zero = fit_grid(weight, GRIDS["signed"], moment.diagonal())
    rounded, damp = gptq(weight, moment, scale, zero)
    better = descend(weight, rounded, moment, damp=damp)
    assert float(damped_error(weight, better, moment, damp).sum()) < 0.99 * float(
        damped_error(weight, rounded, moment, damp).sum()
    )


def test_gptq_leaves_its_arguments_alone():
    weight, moment = normal(4, 16), second_moment(16)
    scale, _ = fit_grid(weight, Grid(8))
    before = weight.clone(), moment.clone(), scale.clone()
    for act_order in (False, True):
        gptq(weight, moment, scale, None, act_order=act_order)
    fit_scales(weight, round_to_nearest(weight, scale, None), moment, Grid(8))
    descend(weight, round_to_nearest(weight, scale, None), moment)
    follow_targets(weight, moment, moment, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, moment, scale), strict=True))


def test_inverse_factor():
    moment = second_moment(12)
    upper, damp = inverse_factor(moment, 0.05)
    assert damp == 0.05
    assert torch.equal(upper, upper.triu())
    damped = moment.double() + 0.05 * moment.double().diagonal().mean() * torch.eye(12).double()
    torch.testing.assert_close(upper.double().T @ upper.double() @ damped, torch.eye(12).double(), rtol=0, atol=1e-3)


def test_damping_grows_until_a_singular_moment_can_be_inverted():
    moment = torch.ones(8, 8)
    upper, damp = inverse_factor(moment, 1e-10)
    assert 1e-10 < damp <= 10
    assert bool(upper.isfinite().all())
    weight = normal(3, 8)
    scale, _ = fit_grid(weight, Grid(8))
    _, used = gptq(weight, moment, scale, None, damp=1e-10)
    assert used == damp


def test_inputs_never_seen_are_rounded_to_nearest():
    weight, moment = normal(5, 16), second_moment(16)
    moment[3], moment[:, 3] = 0, 0
    scale, _ = fit_grid(weight, Grid(8))
    for act_order in (False, True):
        rounded, _ = gptq(weight, moment, scale, None, act_order=act_order)
        assert torch.equal(rounded.codes[:, 3], round_to_nearest(weight, scale, None).codes[:, 3])


@pytest.mark.parametrize("moment", [torch.zeros(4, 4), torch.full((4, 4), torch.nan), torch.eye(4).log()])
def test_a_moment_that_cannot_be_inverted_is_refused(moment):
    with pytest.raises(ValueError, match="second moment"):
        inverse_factor(moment, 0.01)


def test_one_nan_is_refused():
    moment = second_moment(8)
    moment[2, 5] = moment[5, 2] = torch.nan
    with pytest.raises(ValueError, match="second moment"):
        gptq(normal(2, 8), moment, torch.ones(2, 1), None)


# ---- least squares


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_fitted_scales_equal_lstsq(zero_point, damp):
    weight, x = normal(1, 24, seed=8), normal(80, 24, seed=9)
    grid = Grid(8, zero_point=zero_point)
    rounded = round_to_nearest(weight, *fit_grid(weight, grid))
    moment = x.T @ x
    split = np.zeros((24, 3))
    for k in range(24):
        zero = 0 if rounded.zero_point is None else int(rounded.zero_point[0, k // 8])
        split[k, k // 8] = int(rounded.codes[0, k]) - zero
    ridge = np.sqrt(damp * float(moment.diagonal().mean())) * np.eye(24)
    inputs = np.concatenate([x.double().numpy(), ridge])
    expected = np.linalg.lstsq(inputs @ split, inputs @ weight[0].double().numpy(), rcond=None)[0]
    fitted = fit_scales(weight, rounded, moment, grid, damp)
    np.testing.assert_allclose(fitted[0].numpy(), expected, rtol=2**-8 + 1e-4)
    assert torch.equal(fitted, fitted.bfloat16().float())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["plain", "signed", "zero_point", "per_channel"])
def test_fitted_scales_never_increase_the_output_error(name, seed):
    """Row by row, up to what rounding the optimum to bf16 (half a unit is 2^-8) costs."""
    weight, moment = normal(16, 32, seed=seed), second_moment(32, seed=seed + 10)
    rounded = round_to_nearest(weight, *fit_grid(weight, GRIDS[name]))
    fitted = Rounded(rounded.codes, fit_scales(weight, rounded, moment, GRIDS[name], damp=0.0), rounded.zero_point)
    before, after = 0.0, 0.0
    groups = rounded.scale.shape[1]
    shift = torch.zeros_like(rounded.scale) if rounded.zero_point is None else rounded.zero_point
    for n in range(16):
        row = slice(n, n + 1)
        old = true_error(weight[row], rounded.dequantize()[row], moment)
        new = true_error(weight[row], fitted.dequantize()[row], moment)
        code = rounded.codes[n].double().unflatten(0, (groups, -1)) - shift[n].double()[:, None]
        split = torch.block_diag(*code[:, None].unbind(0))
        off = fitted.scale[n].double().abs() * 2**-8
        assert new <= old * (1 + 1e-4) + float(off @ (split @ moment.double() @ split.T).abs() @ off)
        before, after = before + old, after + new
    assert after < before


def test_a_group_of_zeros_keeps_its_scale():
    weight, moment = normal(3, 16), second_moment(16)
    weight[1, :8] = 0
    weight[2] = 0
    rounded = round_to_nearest(weight, *fit_grid(weight, Grid(8)))
    fitted = fit_scales(weight, rounded, moment, Grid(8))
    assert bool(fitted.isfinite().all())
    assert fitted[1, 0] == rounded.scale[1, 0]
    assert torch.equal(fitted[2], rounded.scale[2])


def test_following_targets_is_ridge_regression():
    """The least squares problem of the docstring itself, its penalty as further rows."""
    weight, x, damp = normal(5, 12), normal(40, 12, seed=1), 0.05
    target = x + 0.3 * normal(40, 12, seed=2)
    moment, cross = x.T @ x, (target - x).T @ x
    change = follow_targets(weight, moment, cross, damp)
    ridge = np.sqrt(damp * float(moment.double().diagonal().mean())) * np.eye(12)
    wanted = (target - x).double().numpy() @ weight.double().numpy().T
    left = np.concatenate([x.double().numpy(), ridge])
    expected = np.linalg.lstsq(left, np.concatenate([wanted, np.zeros((12, 5))]), rcond=None)[0].T
    np.testing.assert_allclose(change.numpy(), expected, rtol=1e-3, atol=1e-5)
    assert float(follow_targets(weight, moment, torch.zeros(12, 12), damp).abs().max()) == 0


def test_output_error_is_the_share_of_the_outputs_power():
    x, weight = normal(50, 12), normal(4, 12, seed=1)
    rounded = weight + 0.1 * normal(4, 12, seed=2)
    exact = (x.double() @ (rounded - weight).double().T).square().sum() / (
        x.double() @ weight.double().T
    ).square().sum()
    assert output_error(weight, rounded, x.T @ x) == pytest.approx(float(exact), rel=1e-4)
    assert output_error(weight, weight, x.T @ x) == 0
