"""A softmax window with attention sinks (StreamingLLM, arXiv:2309.17453), training-free.

Every attention layer sees the last keys of a sequence and its first few, to which many heads attend whatever the text
(sinks). Nothing is trained and no parameter is added. Published linearized models have been found to lose to this
baseline (arXiv:2608.28444), so it stands beside every other recipe, and it is a product of its own: the cache stops
growing. Positions are those of the text: keys are cached after RoPE, as softmax attention caches them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kit.convert.linearize import Linearize, LinearizeConfig


class WindowConfig(LinearizeConfig):
    """Options of the window recipe."""

    recipe: Literal["window"] = Field("window", description="This recipe.")


class Window(Linearize):
    """Softmax over the last keys and the first few: nothing trained, a cache that stops growing."""

    name = "window"
    paper = "arXiv:2309.17453"
    config_class = WindowConfig
    mixer = "window"
    ablation_note = '"Attention zeroed" takes the attention of the converted layers away.'
    limits = (
        "Text before the window is not seen at all, but for its first tokens and by layers that are kept full. The "
        "cache cannot be rolled back: assisted decoding, prompt look-up and quantized caches are refused."
    )
    config: WindowConfig
