"""CHESS (arXiv:2409.01366): neurons of the MLP by channel-wise thresholds, attention only where the cache stays exact.

MLP: a neuron is kept if |SiLU(W_gate x)_i| ≥ τ / μ_i, μ_i its mean |W_up x|_i; the gate itself is dense. Attention: the
inputs of q_proj and o_proj lose what is small; k_proj and v_proj see them whole.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kit.convert.sparsity import SparsityConfig, SparsityRecipe


class ChessConfig(SparsityConfig):
    """Options of CHESS."""

    recipe: Literal["chess"] = Field("chess", description="This recipe.")


class Chess(SparsityRecipe):
    """Drop MLP neurons by channel-wise thresholds, and small inputs of q_proj and o_proj."""

    name = "chess"
    paper = "arXiv:2409.01366"
    config_class = ChessConfig
    linears = ("self_attn.q_proj", "self_attn.o_proj")
    neurons = True
    config: ChessConfig
