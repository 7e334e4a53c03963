"""Each adapter method against its formula in float64, on one linear."""

import pytest
import torch

from kit.convert.errors import KitError
from kit.recipes import load_recipes

OUT, IN, RANK = 20, 28, 5


@pytest.fixture
def linear():
    torch.manual_seed(0)
    weight = torch.randn(OUT, IN)
    x = torch.randn(400, IN) @ torch.randn(IN, IN) * torch.logspace(0, -1.5, IN)
    return weight, x.T @ x / len(x)


def factors_of(name, weight, covariance, *settings, rank=RANK):
    recipe = load_recipes(name, list(settings))[0]
    return recipe.initial_factors(weight, covariance, rank, torch.Generator().manual_seed(0))


def product(factors):
    return factors.b.double() @ factors.a.double()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_lora_is_uniform_and_zero(linear):
    factors = factors_of("lora", *linear, rank=500)
    assert not factors.b.any()
    assert factors.a.abs().max() <= IN**-0.5
    assert float(factors.a.std()) == pytest.approx((1 / 3 / IN) ** 0.5, rel=0.02)  # uniform, as kaiming_uniform_(a=√5)
    assert torch.equal(factors.a, factors_of("lora", *linear, rank=500).a)


@pytest.mark.parametrize(("name", "taken"), [("pissa", slice(RANK)), ("milora", slice(OUT - RANK, OUT))])
def test_pissa_and_milora_take_an_end_of_the_svd(name, taken, linear):
    weight, covariance = linear
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    factors = factors_of(name, weight, covariance)
    assert relative(product(factors), (u[:, taken] * s[taken]) @ vh[taken]) < 1e-6
    for norms in (factors.a.norm(dim=1), factors.b.norm(dim=0)):
        assert torch.allclose(norms.double(), s[taken].sqrt(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(OUT, IN), (IN + 8, IN)])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_corda_is_the_papers_formula_with_the_inverse(mode, shape, linear):
    covariance = linear[1]
    weight = torch.randn(shape)
    damped = covariance.double() / covariance.double().diagonal().mean() + 0.01 * torch.eye(IN, dtype=torch.double)
    u, s, vh = torch.linalg.svd(weight.double() @ damped, full_matrices=False)
    taken = slice(RANK) if mode == "ipm" else slice(len(s) - RANK, None)
    a = s[taken].sqrt()[:, None] * vh[taken] @ torch.linalg.inv(damped)
    b = u[:, taken] * s[taken].sqrt()
    factors = factors_of("corda", weight, covariance, f"mode={mode}")
    assert relative(product(factors), b @ a) < 1e-6
    signs = (factors.b.double() * b).sum(0).sign()
    assert relative(factors.b.double() * signs, b) < 1e-6
    assert relative(factors.a.double() * signs[:, None], a) < 1e-6
    balanced = factors_of("corda", weight, covariance, f"mode={mode}", "split=balanced")
    assert relative(product(balanced), b @ a) < 1e-6
    assert torch.allclose(balanced.a.norm(dim=1), balanced.b.norm(dim=0), rtol=1e-4)


def test_corda_keeps_the_smallest_directions_of_an_ill_conditioned_covariance(linear):
    """Inputs over six orders of magnitude, no damping: W C C Wᵀ, or the inverse of C, in fp32 loses them."""
    weight = linear[0]
    q = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.double))[0]
    covariance = ((q * torch.logspace(0, -6, IN, dtype=torch.double)) @ q.T).float()
    u, _, _ = torch.linalg.svd(weight.double() @ covariance.double())
    expected = u[:, -RANK:] @ u[:, -RANK:].T @ weight.double()
    assert relative(product(factors_of("corda", weight, covariance, "damping=0")), expected) < 1e-5
    fp32 = weight @ covariance
    small = torch.linalg.eigh(fp32 @ fp32.T).eigenvectors[:, :RANK]
    assert relative((small @ small.T @ weight).double(), expected) > 1e-2


def test_kore_is_the_papers_formula_on_the_smallest_eigenvectors(linear):
    weight, covariance = linear
    u, _, _ = torch.linalg.svd(covariance.double())
    null = u[:, -RANK:]
    factors = factors_of("kore", weight, covariance)
    assert not factors.train_a
    assert relative(product(factors), weight.double() @ null @ null.T) < 1e-6
    assert torch.allclose(factors.a.norm(dim=1), factors.b.norm(dim=0), rtol=1e-5)
    inside = factors.a.double() @ null @ null.T
    assert relative(inside, factors.a.double()) < 1e-6
    zero = factors_of("kore", weight, covariance, "init=zero")
    assert not zero.b.any()
    assert not zero.train_a
    assert relative(zero.a.double() @ null @ null.T, zero.a.double()) < 1e-6
    assert torch.allclose(zero.a @ zero.a.T, torch.eye(RANK), atol=1e-6)


def test_the_balance_of_corda_does_not_depend_on_the_scale_of_the_activations(linear):
    weight, covariance = linear
    one, other = factors_of("corda", weight, covariance), factors_of("corda", weight, covariance * 1e4)
    assert torch.allclose(one.b.norm(dim=0), other.b.norm(dim=0), rtol=1e-4)


def test_singular_values_next_to_nothing_do_not_blow_up_or_die(linear):
    weight, covariance = linear[0].clone(), linear[1]
    weight[3:7] = weight[:1]  # rank OUT - 4: four directions of W are zero
    for name, settings in [("milora", []), ("corda", []), ("corda", ["split=balanced"]), ("corda", ["damping=0"])]:
        factors = factors_of(name, weight, covariance, *settings)
        assert factors.a.isfinite().all()
        assert factors.b.isfinite().all()
        assert float(factors.a.abs().max()) < 1e2
    none = torch.zeros(OUT, IN)
    for name in ("pissa", "milora", "corda", "kore"):
        factors = factors_of(name, none, covariance)
        assert factors.a.isfinite().all()
        assert not product(factors).any()
        assert bool(factors.a.any() or factors.b.any()), f"{name}: A and B are both zero, and would stay so"
    assert "have no weight" in factors_of("milora", weight, covariance).notes[0]
    tiny = covariance * 0
    tiny[0, 0] = 1
    raised = factors_of("corda", linear[0], tiny, "damping=0")
    assert "were raised" in raised.notes[0]
    assert raised.a.isfinite().all()
    assert float(raised.a.norm(dim=1).div(raised.b.norm(dim=0)).max()) < 1.1e3


def test_only_one_rule_may_choose_the_ranks():
    with pytest.raises(KitError, match="use one"):
        load_recipes("kore", ["rank_energy=0.1", "dynamic_rank=true"])
    with pytest.raises(KitError, match="dynamic_rank"):
        load_recipes("lora", ["dynamic_rank=true"])
