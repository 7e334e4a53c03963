"""Decompositions that adapters start from, in float64: the methods live on directions that fp32 would lose."""

from __future__ import annotations

import torch
from torch import Tensor

from kit.convert.adapter_recipe import Factors

FLOOR = 1e-6  # of the root mean square singular value of W: below it a direction counts as none
TINY = 1e-12


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD U, S, Vᵀ in float64, S falling."""
    return torch.linalg.svd(matrix.double(), full_matrices=False)


def shares(values: Tensor) -> Tensor:
    """Falling energies as shares of their sum."""
    values = values.double().clamp(min=0)
    return values / values.sum().clamp(min=torch.finfo(torch.double).tiny)


def split(u: Tensor, s: Tensor, vh: Tensor, weight: Tensor, train_a: bool = True) -> Factors:
    """A = S^½ Vᵀ and B = U S^½.

    Where S is next to nothing both would be zero, and stay so: A and B are each other's gradients. There A gets the
    square root of a floor instead, and B what keeps B A as it is.

    Args:
        u: (out, r).
        s: (r,).
        vh: (r, in).
        weight: W, whose size sets the floor.
        train_a: for `Factors`.
    """
    out_features, in_features = weight.shape
    floor = FLOOR * float(weight.double().norm()) / min(out_features, in_features) ** 0.5
    root = s.clamp(min=max(floor, TINY)).sqrt()
    notes = []
    if weak := int((s < floor).sum()):
        notes.append(f"{weak} of {len(s)} directions have no weight (singular value next to 0): B starts from 0 there")
    return Factors((root[:, None] * vh).float(), (u * (s / root)).float(), train_a, tuple(notes))


def leak(a: Tensor, covariance: Tensor) -> float:
    """The share of a data set's activation energy that falls into A's rows: tr(Q C Qᵀ) / tr C, Q an orthonormal basis.

    Args:
        a: A (r, in).
        covariance: C (in, in) of the data.
    """
    _, s, basis = svd(a)
    basis, c = basis[s > s.max() * 1e-7], covariance.double()
    return float(((basis @ c) * basis).sum() / c.diagonal().sum().clamp(min=torch.finfo(torch.double).tiny))
