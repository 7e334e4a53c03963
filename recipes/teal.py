"""TEAL (arXiv:2408.14690): every linear of a layer drops the inputs of small magnitude."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kit.convert.sparsity import SparsityConfig, SparsityRecipe


class TealConfig(SparsityConfig):
    """Options of TEAL."""

    recipe: Literal["teal"] = Field("teal", description="This recipe.")


class Teal(SparsityRecipe):
    """Drop inputs whose |x_i| is small; the training-free baseline of activation sparsity."""

    name = "teal"
    paper = "arXiv:2408.14690"
    config_class = TealConfig
    config: TealConfig
