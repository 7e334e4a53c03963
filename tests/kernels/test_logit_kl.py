"""KL of logits and its gradient against float64 autograd: the specification, and the kernel."""

import pytest
import torch
import torch.nn.functional as F

from kit.kernels.logit_kl.reference import kl_and_gradient

triton = pytest.importorskip("triton")
from kit.kernels.logit_kl import kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def truth(logits, teacher, scale, cap=None):
    x = logits.double().requires_grad_()
    squash = (lambda z: z) if cap is None else lambda z: cap * torch.tanh(z / cap)
    log_q, log_p = squash(x).log_softmax(-1), squash(teacher.double()).log_softmax(-1)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return kl.detach(), torch.autograd.grad(kl.sum() * scale, x)[0]


def case(rows, vocabulary, spread=3.0):
    torch.manual_seed(vocabulary)
    wide = torch.randn(2, rows, vocabulary + 3, device=DEVICE) * spread  # rows with a stride of their own
    return wide[0, :, :vocabulary], wide[1, :, :vocabulary]


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_specification(cap):
    logits, teacher = case(5, 37)
    kl, gradient = truth(logits, teacher, 0.3, cap)
    found = kl_and_gradient(logits, teacher, 0.3, cap)
    torch.testing.assert_close(found[0].double(), kl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1].double(), gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("vocabulary", "spread"), [(1, 3.0), (31, 3.0), (64, 60.0), (129, 3.0)])
def test_the_kernel_on_odd_sizes_and_large_logits(monkeypatch, vocabulary, spread):
    monkeypatch.setattr(kernel, "BLOCK", 64)
    logits, teacher = case(4, vocabulary, spread)
    kl, gradient = truth(logits, teacher, 0.3)
    found = kernel.kl_and_gradient_in_place(logits, teacher, 0.3)
    torch.testing.assert_close(found[0].double(), kl, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].double(), gradient, atol=1e-5, rtol=1e-4)
    assert found[1].data_ptr() == logits.data_ptr()


def test_the_kernel_in_bf16_on_a_real_vocabulary():
    logits, teacher = (x.bfloat16() for x in case(2, 49_152))
    kl, gradient = truth(logits, teacher, 0.3)
    found = kernel.kl_and_gradient_in_place(logits, teacher, 0.3)
    torch.testing.assert_close(found[0].double(), kl, atol=1e-4, rtol=1e-4)
    error = float((found[1].double() - gradient).norm() / gradient.norm())
    assert error < 5e-3  # bf16 rounds to 1.7e-3; the interpreter truncates, to 4e-3
