"""How much the logits change when one layer alone sees a window instead of everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kit.convert.recipe import SearchRun
from kit.convert.streaming import StreamedModel
from kit.modules.linear_attention import original_attention


@torch.no_grad()
def window_sensitivity(
    run: SearchRun, config: dict[str, Any], input_ids: Tensor, position_ids: Tensor, name: str
) -> list[float]:
    """Measure every layer in one pass: each is resident once, for the base and for all models changed before it.

    Activations are kept for as many models as there are layers.

    Args:
        run: makes the base, and has its tensors.
        config: config.json of the base with a window in every layer.
        input_ids, position_ids: (N, T).
        name: of the recipe, for the progress bar.

    Returns:
        For each layer KL(base ‖ changed) in nats, mean over tokens.
    """
    base = run.model()
    model = StreamedModel(config, base.view, device=base.device, dtype=base.dtype, scratch=base.scratch)
    streams = [model.embed(input_ids, position_ids)]
    with run.progress.task(f"{name}: layer_sensitivity, layers", len(model)):
        for index in range(len(model)):
            with model.layer(index) as layer:
                changed = model.advance(streams[0])
                with original_attention(layer):
                    for number, stream in enumerate(streams):  # one by one: the old one is free again
                        streams[number] = model.advance(stream)
                streams.append(changed)
            run.progress.step(1)
    head, found = model.head(), torch.zeros(len(model), dtype=torch.float64)
    for row in range(len(input_ids)):
        log_p = head(streams[0].hidden[row].to(base.device)).float().log_softmax(-1)
        for index, stream in enumerate(streams[1:]):
            log_q = head(stream.hidden[row].to(base.device)).float().log_softmax(-1)
            found[index] += (log_p.exp() * (log_p - log_q)).sum(-1).mean().cpu()
    return [float(kl) / len(input_ids) for kl in found]
