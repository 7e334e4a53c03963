"""The text model inside a model that takes images, so that what converts text models converts it."""

from __future__ import annotations

import re
from dataclasses import replace

from kit.convert.checkpoint import Checkpoint

TOWERS = {"gemma3": "Gemma3ForCausalLM"}  # model types with a text model that a family of ours is, and its class
PLACE = re.compile(r"^(?:language_model\.model|model\.language_model|language_model\.(?=lm_head))\.?")


def text_tower(checkpoint: Checkpoint) -> Checkpoint:
    """The text model of a checkpoint that takes images, as a checkpoint of its own; any other as it is.

    Where config.json leaves values to transformers' defaults, they are filled in.
    """
    kind = str(checkpoint.config.get("model_type"))
    if kind not in TOWERS:
        return checkpoint
    from transformers import CONFIG_MAPPING

    values = {name: value for name, value in checkpoint.config.items() if name != "model_type"}
    config = CONFIG_MAPPING[kind].from_dict(values)
    tied = config.tie_word_embeddings
    text = config.get_text_config().to_dict() | {"architectures": [TOWERS[kind]], "tie_word_embeddings": tied}
    names = {}
    for name in checkpoint.tensors:
        if name.startswith("lm_head."):
            names[name] = name
        elif match := PLACE.match(name):
            names[name] = ("" if name[match.end() :].startswith("lm_head.") else "model.") + name[match.end() :]
    return replace(
        checkpoint,
        config=text,
        tensors={ours: checkpoint.tensors[name] for name, ours in names.items()},
        files={ours: checkpoint.files[name] for name, ours in names.items()},
        places={ours: checkpoint.places[name] for name, ours in names.items()},
    )
