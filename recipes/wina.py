"""WINA (arXiv:2505.19427): TEAL's masks with the weights in the score.

The paper picks the top K of each token, and first rotates the model so that k_proj and gate_proj have orthogonal
columns; here the scores of all tokens share a threshold and nothing is rotated: only the score differs from TEAL.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kit.convert.sparsity import SparsityConfig, SparsityRecipe


class WinaConfig(SparsityConfig):
    """Options of WINA."""

    recipe: Literal["wina"] = Field("wina", description="This recipe.")


class Wina(SparsityRecipe):
    """Drop inputs whose |x_i|·‖W[:, i]‖₂ is small; without the paper's rotation."""

    name = "wina"
    paper = "arXiv:2505.19427"
    config_class = WinaConfig
    weighted = True
    config: WinaConfig
